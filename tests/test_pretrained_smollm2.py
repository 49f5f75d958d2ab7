"""The real SmolLM2-135M-Instruct against `transformers`: what the tiny random models cannot show."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from families import difference, load_oracle
from transformers import AutoTokenizer

from tinylm import TinyLM

QUESTION = "What is the capital of France?"
TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "In 1969, 12345 people — größer, naïve, 日本 🙂 —",
    "It was the best of times, it was the worst of times, it was the age of wisdom, " * 4,
]


@pytest.fixture(scope="module")
def lm(smollm2):
    return TinyLM.from_pretrained(smollm2).requires_grad_(False)


@pytest.fixture(scope="module")
def oracle(smollm2):
    return load_oracle(smollm2).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def test_fixture_is_the_published_model(smollm2, tokenizer):
    """What the conversion from GGUF must not lose; numbers split into digits before anything else does."""
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config["tie_word_embeddings"] is True and config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert tokenizer.tokenize("x  99") == ["x", "ĠĠ", "9", "9"]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_are_those_of_transformers(text, lm, tokenizer):
    ids = lm.tokenizer.encode(text)
    assert ids == tokenizer.encode(text) and lm.tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_logits_are_those_of_transformers(text, lm, oracle, tokenizer):
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert difference(lm(ids), oracle(ids).logits) < 1e-4


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers_alone_and_in_a_batch(lm, oracle, tokenizer):
    options = dict(max_new_tokens=16, do_sample=False, pad_token_id=0)
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS[:3]]
    theirs = [
        oracle.generate(row, attention_mask=torch.ones_like(row), **options)[
            0, row.shape[1] :
        ].tolist()
        for row in rows
    ]
    for row, new in zip(rows, theirs, strict=True):
        assert lm.generate(row, max_new_tokens=16)[0, row.shape[1] :].tolist() == new
    for side in ("left", "right"):
        batch = tokenizer(TEXTS[:3], return_tensors="pt", padding=True, padding_side=side)
        ours = lm.generate(batch.input_ids, batch.attention_mask, max_new_tokens=16)[
            :, batch.input_ids.shape[1] :
        ]
        for row, new in zip(ours.tolist(), theirs, strict=True):
            assert row[: len(new)] == new


@pytest.mark.slow
def test_stream_is_the_text_of_generate(lm):
    """Tokens of a BPE that hold parts of characters: pieces join to the text, and none has half a character."""
    prompt = "Translate to Japanese and add emojis: Good morning! 日本語:"
    pieces = list(lm.stream(prompt, max_new_tokens=40, temperature=1.5, seed=2))
    ids = torch.tensor([lm.tokenizer.encode(prompt)])
    new = lm.generate(ids, max_new_tokens=40, temperature=1.5, seed=2)[0, ids.shape[1] :]
    assert "".join(pieces) == lm.tokenizer.decode(new) and not any(
        "\ufffd" in piece for piece in pieces
    )


@pytest.mark.slow
def test_save_keeps_every_bit_and_every_file(lm, smollm2, tmp_path):
    lm.save_pretrained(tmp_path)
    saved, before = load_oracle(tmp_path).state_dict(), load_oracle(smollm2).state_dict()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    messages = [{"role": "user", "content": QUESTION}]
    template = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
        for folder in (smollm2, tmp_path)
    ]
    assert template[0] == template[1]


# ---- the two commands -----------------------------------------------------------------------------------------------


def tinylm(*arguments, **options):
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_sample_knows_the_capital_of_france(smollm2):
    prompt = "The capital of France is"
    out = tinylm("sample", smollm2, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 8)
    assert out.startswith(prompt) and "Paris" in out


@pytest.mark.slow
def test_chat_is_that_of_transformers(smollm2, oracle, tokenizer):
    """Questions are read from a pipe; each answer is to the whole conversation, through the chat template."""
    messages, answers = [], []
    for question in (QUESTION, "And of Italy?"):
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = oracle.generate(**ids, max_new_tokens=24, do_sample=False)[
            0, ids["input_ids"].shape[1] :
        ]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    out = tinylm(
        "chat",
        smollm2,
        "--temperature",
        0,
        "--max-new-tokens",
        24,
        input=f"{QUESTION}\nAnd of Italy?\n",
    )
    assert out.splitlines() == "\n".join(answers).splitlines() and "Paris" in answers[0]


@pytest.mark.slow
def test_chat_template_sees_the_system_message(smollm2):
    """Guards a system message that is dropped, or that does not replace the template's own."""
    out = tinylm(
        "chat",
        smollm2,
        "--system",
        "You are a pirate. Your name is Blackbeard.",
        "--temperature",
        0,
        "--max-new-tokens",
        30,
        input="What is your name?\n",
    )
    assert "SmolLM" not in out
