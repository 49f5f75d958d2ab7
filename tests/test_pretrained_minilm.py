"""The real all-MiniLM-L6-v2 (BERT) against `transformers`, and against what `sentence-transformers` documents."""

import json

import pytest
import torch
from families import difference, load_oracle
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from tinylm import TinyLM

DOCUMENTED = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
SIMILARITIES = torch.tensor(
    [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
)
TEXTS = [
    *DOCUMENTED,
    "Größer, naïve; 日本 🙂 isn't unaffordable — 12,345!",
    "",
    "It was the best of times, it was the worst of times, it was the age of wisdom, " * 9,
]


@pytest.fixture(scope="module")
def lm(minilm):
    return TinyLM.from_pretrained(minilm).requires_grad_(False)


@pytest.fixture(scope="module")
def oracle(minilm):
    return load_oracle(minilm, None).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return AutoTokenizer.from_pretrained(minilm)


def pooled(states, mask):
    """Mean of the hidden states of the real tokens, of length one."""
    mask = mask[..., None].to(states.dtype)
    return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def embed(lm, texts, side="right"):
    """Embeddings by tinylm alone: its tokenizer, and padding that we do here."""
    rows = [lm.tokenizer.encode(text, special=True) for text in texts]
    width = max(map(len, rows))
    padded = [
        row + [0] * (width - len(row)) if side == "right" else [0] * (width - len(row)) + row
        for row in rows
    ]
    ids = torch.tensor(padded)
    mask = (ids != 0).long()
    return pooled(lm(ids, mask), mask)


def test_fixture_is_the_published_model(minilm):
    config, pooling = (
        json.loads((minilm / name).read_text()) for name in ("config.json", "1_Pooling/config.json")
    )
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (
        384,
        6,
        30522,
    )
    assert pooling["pooling_mode_mean_tokens"] is True


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_are_those_of_transformers(text, lm, tokenizer):
    """The file pads and cuts every text to 128 tokens; neither is for us to do unasked."""
    assert lm.tokenizer.encode(text, special=True) == tokenizer.encode(text)
    assert len(tokenizer.encode(TEXTS[-1])) > 128
    pair = tokenizer(text, DOCUMENTED[1])
    assert lm.tokenizer.encode(text, pair=DOCUMENTED[1], special=True) == pair.input_ids
    encoding = lm.tokenizer.encoding(text, pair=DOCUMENTED[1])
    assert (encoding.ids, encoding.type_ids) == (pair.input_ids, pair.token_type_ids)


def test_hidden_states_are_those_of_transformers(lm, oracle, tokenizer):
    batch = tokenizer(
        TEXTS, [text[:40] for text in reversed(TEXTS)], padding=True, return_tensors="pt"
    )
    assert len(batch.token_type_ids.unique()) == 2
    ours = lm(batch.input_ids, batch.attention_mask, batch.token_type_ids)
    theirs, real = oracle(**batch).last_hidden_state, batch.attention_mask.bool()
    assert difference(ours[real], theirs[real]) < 1e-4
    assert (
        difference(lm(batch.input_ids[:1, :9]), oracle(batch.input_ids[:1, :9]).last_hidden_state)
        < 1e-4
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_are_those_of_transformers(side, lm, oracle, tokenizer):
    """Each text alone through transformers; all of them in one batch through tinylm."""
    theirs = []
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt")
        theirs.append(pooled(oracle(**batch).last_hidden_state, batch.attention_mask))
    assert difference(embed(lm, TEXTS, side), torch.cat(theirs)) < 1e-4


def test_similarities_are_those_that_are_documented(lm):
    """By the model card's own example; and a happy person is more like a very happy person than like a sunny day."""
    vectors = embed(lm, DOCUMENTED)
    assert torch.allclose(vectors @ vectors.T, SIMILARITIES, atol=6e-5)
    happy, very, day = embed(
        lm, ["That is a happy person", "That is a very happy person", "Today is a sunny day"]
    )
    assert happy @ very > 0.9 and happy @ day < 0.3


def test_save_keeps_every_bit_and_every_file(lm, oracle, minilm, tmp_path):
    lm.save_pretrained(tmp_path)
    saved, before = load_oracle(tmp_path, None).state_dict(), oracle.state_dict()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert (
        AutoTokenizer.from_pretrained(tmp_path)(TEXTS).input_ids
        == AutoTokenizer.from_pretrained(minilm)(TEXTS).input_ids
    )
