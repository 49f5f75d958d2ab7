"""GGUF files, as llama.cpp writes them: weights, config and tokenizer, against the models that they were made of and
against what transformers makes of them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from families import (
    CASES,
    assert_same_text,
    difference,
    gemma3,
    load_oracle,
    longrope,
    prompts,
    rope,
    save,
)
from helpers import CPU, every, finished, refuses, run_command
from safetensors.torch import load_file

import export
import onnxlm
import pretrained
import train
from export import OnnxLM
from tinylm import TinyLM

gguf = pytest.importorskip("gguf")
import gguf_file

BY_NAME = {case.name: case for case in CASES}


def changed(name, **fields):
    case = BY_NAME[name]
    return dataclasses.replace(case, fields=case.fields | fields)


LOCAL = dict(full_attention=rope(theta=5000.0), sliding_attention=rope(theta=10000.0))
# What llama.cpp writes of each architecture, which leaves some fields to its own rules.
WRITTEN = [
    BY_NAME["llama"],
    changed("llama-tied", hidden_act="silu"),
    BY_NAME["llama-yarn"],
    BY_NAME["llama-biases"],
    changed("llama", rope_parameters=longrope(5, original_max_position_embeddings=16)),
    BY_NAME["qwen2"],
    BY_NAME["qwen3-tied"],
    BY_NAME["gemma-mqa"],
    changed("gemma2", query_pre_attn_scalar=14),
    dataclasses.replace(
        BY_NAME["gemma3_text"],
        fields=gemma3(
            num_hidden_layers=7,
            query_pre_attn_scalar=14,
            layer_types=None,
            rope_parameters=LOCAL,
        ),
    ),
    BY_NAME["granite"],
    BY_NAME["smollm3"],
    BY_NAME["olmo2"],
    BY_NAME["phi3-short"],
    BY_NAME["starcoder2"],
    BY_NAME["gpt2"],
    BY_NAME["qwen3_moe"],
]


def interleaved(x, heads):
    """llama.cpp's `permute`."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write(case, folder, path, tokenizer=None):
    """The folder of a case as llama.cpp's converter writes it."""
    family, config = pretrained.FAMILIES[case.family], load_oracle(folder).config
    arch = next(k for k, v in gguf_file.FAMILIES.items() if v == case.family)
    writer = gguf.GGUFWriter(path, arch)
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    eps = getattr(config, family.fields["norm_eps"])
    rms = family.fixed.get("norm") != "layer"
    (writer.add_layer_norm_rms_eps if rms else writer.add_layer_norm_eps)(eps)
    if arch not in ("gpt2", "starcoder2", "qwen2"):
        writer.add_key_length(head_dim)
    for name, add in (
        ("sliding_window", writer.add_sliding_window),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("attention_multiplier", writer.add_attention_scale),
        ("num_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
    ):
        if getattr(config, name, None) is not None and not (arch == "qwen2" and "window" in name):
            add(getattr(config, name))
    tensors = load_file(folder / "model.safetensors")
    if rope_parameters := getattr(config, "rope_parameters", None):
        full = rope_parameters.get("full_attention", rope_parameters)
        writer.add_rope_freq_base(full["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim * full.get("partial_rotary_factor", 1)))
        original = full.get("original_max_position_embeddings")
        if full["rope_type"] == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(full["factor"])
            writer.add_rope_scaling_orig_ctx_len(original)
        if full["rope_type"] == "longrope":
            writer.add_rope_scaling_orig_ctx_len(original)
            if "attention_factor" in full:
                writer.add_rope_scaling_attn_factors(full["attention_factor"])
            for length in ("long", "short"):
                tensors[f"rope_factors_{length}.weight"] = torch.tensor(full[f"{length}_factor"])
    if tokenizer:
        tokenizer(writer)
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), config.num_hidden_layers
    )
    experts = {}
    for name, x in tensors.items():
        x = x.numpy()
        if arch in ("llama", "granite", "smollm3") and ("q_proj" in name or "k_proj" in name):
            x = interleaved(x, heads if "q_proj" in name else kv)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        if arch == "gpt2" and ".h." in name and x.ndim == 2:
            x = x.T
        if ".experts." in name:
            before, _, rest = name.partition(".experts.")
            number, _, rest = rest.partition(".")
            experts.setdefault(f"{before}.experts.{rest}", {})[int(number)] = x
        elif name.startswith("rope_factors"):
            writer.add_tensor(name, np.ascontiguousarray(x))
        else:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(x))
    for name, parts in experts.items():
        stacked = np.stack([parts[i] for i in sorted(parts)])
        writer.add_tensor(names.get_name(name, (".weight",)), stacked)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@every(WRITTEN)
@torch.no_grad()
def test_a_file_is_the_model_that_it_was_made_of(case, tmp_path):
    """Weights, and all that is left of config.json."""
    folder = save(case, tmp_path / "hf")
    path = write(case, folder, tmp_path / "model.gguf")
    ours = TinyLM.from_pretrained(path)
    ids = prompts(case, 2, 23)
    assert difference(ours(ids), load_oracle(folder)(ids).logits) < 1e-5
    ours.save_pretrained(tmp_path / "again")
    assert difference(load_oracle(tmp_path / "again")(ids).logits, ours(ids)) < 1e-5


@torch.no_grad()
def test_llama_3_stores_its_scaling_as_a_list(tmp_path):
    case = BY_NAME["llama-llama3"]
    folder = save(case, tmp_path / "hf")
    oracle = load_oracle(folder)
    plain = dict(rope_type="default", rope_theta=10000.0)
    rotary = oracle.model.rotary_emb.inv_freq
    base = 10000.0 ** (-torch.arange(0, 20, 2) / 20)
    config = folder / "config.json"
    text = config.read_text()
    changed_case = dataclasses.replace(case, fields=case.fields | dict(rope_parameters=plain))

    def factors(writer):
        writer.add_tensor("rope_freqs.weight", (base / rotary).numpy().astype(np.float32))

    path = write(changed_case, folder, tmp_path / "model.gguf", factors)
    assert config.read_text() == text
    ids = prompts(case, 2, 23)
    assert difference(TinyLM.from_pretrained(path)(ids), oracle(ids).logits) < 1e-4


def byte_level(writer):
    """The 256 bytes, two merges, and three special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "he", "hel", "<|a|>", "<|b|>", "<tool>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3, 3, 4])
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|b|>{% endfor %}")


def sentencepiece(writer):
    """Bytes, letters, and pieces whose scores say which pair goes first."""
    letters = "▁abcdehlo"
    pieces = ["he", "ll", "hell", "▁hell", "o▁", "lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *pieces]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(letters) + len(pieces)))
    scores = [0.0] * 259 + [-100.0 - i for i in range(len(letters))]
    writer.add_token_scores(scores + [-float(i) for i in range(len(pieces))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


TEXTS = ["hello hell", " he  lo\n", "12345 naïve 日本", "<|a|>x<tool>y", ""]


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_tokenizers_are_those_of_transformers(kind, tmp_path):
    from transformers import AutoTokenizer

    case = changed("llama", vocab_size=280)
    folder = save(case, tmp_path / "hf")
    path = write(case, folder, tmp_path / "model.gguf", kind)
    lm = TinyLM.from_pretrained(path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        ids = lm.tokenizer.encode(text)
        if "12345" not in text and text[:1] != " ":
            # transformers splits words as GPT-2 does, whatever tokenizer.ggml.pre says, and puts no space before one.
            assert ids == theirs.encode(text, add_special_tokens=True), text
        plain = lm.tokenizer.encode(text, special=False)
        assert lm.tokenizer.decode(plain, True) == text
    assert lm.tokenizer.encode("")[:1] == [258 if kind is byte_level else 1]
    lm.save_pretrained(tmp_path / "again")
    again = TinyLM.from_pretrained(tmp_path / "again")
    assert [again.tokenizer.encode(text) for text in TEXTS] == [
        lm.tokenizer.encode(text) for text in TEXTS
    ]
    if kind is byte_level:
        assert lm.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi<|b|>"


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A Llama of bytes, as one file."""
    folder, case = tmp_path_factory.mktemp("gguf"), changed("llama", vocab_size=280)
    return write(case, save(case, folder / "hf"), folder / "model.gguf", byte_level)


def test_commands_take_a_file(small_file, tmp_path):
    lm = TinyLM.from_pretrained(small_file)
    ids = lm.tokenizer.encode("hello<|b|>", special=False)
    expected = lm.generate([ids], max_new_tokens=6, eos_token_id=())[0, len(ids) :]
    run = ["run", small_file, "hello", "--max-new-tokens", 6, "--json"]
    ((found,),) = [json.loads(finished(run_command(*run)).stdout)["output"]]
    assert found["generated_text"] == lm.tokenizer.decode(expected.tolist())
    data = tmp_path / "text.txt"
    data.write_text("hello hell " * 200)
    before = json.loads(finished(run_command("eval", small_file, data, "--json")).stdout)
    options = ["--init", small_file, "--steps", 10, "--block", 32, "--batch", 4, "--lr", 1e-3]
    finished(run_command("train", data, "--out", tmp_path / "out", *options, "--quiet"))
    after = finished(run_command("eval", tmp_path / "out" / "best", data, "--json"))
    assert json.loads(after.stdout)["perplexity"] < before["perplexity"]
    labels = tmp_path / "labels.csv"
    labels.write_text("text,label\n" + "hello,good\nhell,bad\n" * 10)
    options[4:] = ["--task", "classify", "--block", 32]
    finished(run_command("train", labels, "--out", tmp_path / "classes", *options, "--quiet"))
    assert TinyLM.from_pretrained(tmp_path / "classes" / "best").config.head == "classify"


def test_a_file_opens_inside_a_package(small_file, tmp_path):
    """The four files side by side in somebody's package."""
    vendor = tmp_path / "app" / "vendor"
    vendor.mkdir(parents=True)
    for name in ("tinylm.py", "pretrained.py", "onnxlm.py", "gguf_file.py"):
        shutil.copy(ROOT / name, vendor)
    script = (
        "import sys; sys.path.insert(0, ''); from app.vendor import tinylm; "
        f"lm = tinylm.TinyLM.from_pretrained({str(small_file)!r}); "
        "print(lm.tokenizer.encode('hello'), *sorted(sys.modules.keys() & {'tinylm', 'pretrained', 'gguf_file'}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    expected = TinyLM.from_pretrained(small_file).tokenizer.encode("hello")
    assert run.stdout.strip() == str(expected), run.stderr


@pytest.mark.slow
def test_a_file_is_exported(small_file, tmp_path, capsys):
    arguments = [small_file, "--onnx", "--out", tmp_path / "out", "--prompt", "hello"]
    assert export.main([*map(str, arguments)]) in (None, 0)
    assert "verified against torch" in capsys.readouterr().out
    (theirs,) = onnxlm.run(OnnxLM(tmp_path / "out", providers=CPU), ["hello"], max_new_tokens=9)
    lm = TinyLM.from_pretrained(small_file)
    assert theirs == onnxlm.run(train.TorchRunner(lm, small_file), ["hello"], max_new_tokens=9)[0]


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUX" + bytes(40))
    refuses(lambda: TinyLM.from_pretrained(path), path, "not a readable GGUF file")
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refuses(lambda: TinyLM.from_pretrained(path), path, "general.architecture = 'mamba'")
    folder = save(BY_NAME["llama"], tmp_path / "hf")

    def more(writer):
        writer.add_tensor("blk.0.extra.weight", np.ones(3, np.float32))

    path = write(BY_NAME["llama"], folder, tmp_path / "more.gguf", more)
    refuses(lambda: TinyLM.from_pretrained(path), path, "blk.0.extra.weight is unexpected")

    def wide(writer):
        writer.add_tensor("rope_freqs.weight", np.ones(10))

    path = write(BY_NAME["llama"], folder, tmp_path / "wide.gguf", wide)
    refuses(lambda: TinyLM.from_pretrained(path), path, "tensor rope_freqs.weight is not readable")

    def unknown(writer):
        byte_level(writer)
        writer.add_tokenizer_pre("of-tomorrow")

    path = write(
        changed("llama", vocab_size=280),
        save(changed("llama", vocab_size=280), tmp_path / "x"),
        tmp_path / "u.gguf",
        unknown,
    )
    with pytest.warns(UserWarning, match="no tokenizer, as .*of-tomorrow"):
        assert TinyLM.from_pretrained(path).tokenizer is None


@pytest.mark.parametrize(
    "key, message",
    [
        ("llama.block_count", "llama.block_count = None, expected 1 to 9999"),
        ("llama.embedding_length", "llama.embedding_length = None"),
        ("llama.attention.head_count", "llama.attention.head_count = None"),
        ("llama.attention.head_count_kv", "expected an even number of rows for each of 6 heads"),
        # The default was taken silently.
        ("llama.attention.layer_norm_rms_epsilon", "layer_norm_rms_epsilon is missing"),
        ("tokenizer.ggml.merges", "not a readable tokenizer"),
    ],
)
def test_a_missing_key_is_one_line(key, message, tmp_path):
    case = changed("llama", vocab_size=280)

    def without(writer):
        byte_level(writer)
        writer.kv_data[0].pop(key)

    path = write(case, save(case, tmp_path / "hf"), tmp_path / "model.gguf", without)
    refuses(lambda: TinyLM.from_pretrained(path), path, message)


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_says_what_transformers_makes_it_say(smollm2, smollm2_gguf):
    """The real file, in blocks of 4 and 8 bits; its tokenizer is the published one, digits by themselves."""
    from transformers import AutoModelForCausalLM

    ours, published = TinyLM.from_pretrained(smollm2_gguf), TinyLM.from_pretrained(smollm2)
    oracle = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    text = "The capital of France is"
    ids = torch.tensor([ours.tokenizer.encode(text)])
    assert difference(ours(ids), oracle(ids).logits) < 1e-4
    expected = oracle.generate(ids, max_new_tokens=20, do_sample=False)
    assert ours.generate(ids, max_new_tokens=20).tolist() == expected.tolist()
    for text in ("a 1234 b", "naïve — 日本 🙂\n\n  x", "<|im_start|>user\nhi<|im_end|>"):
        assert ours.tokenizer.encode(text) == published.tokenizer.encode(text)
    chat = [{"role": "user", "content": "hi"}]
    assert ours.tokenizer.apply_chat_template(chat) == published.tokenizer.apply_chat_template(chat)


SCRIPTS = [
    "The capital of France is",
    "  Two  spaces,\n\n\n  and\tmore \t\n ",
    "\u00a0naïve\u3000café\r\nŁódź  ",
    "Привет,  мир 12345",
    "こんにちは世界。 안녕하세요",
    "مرحبا بالعالم नमस्ते ไทย",
    "🙂🏽 \U0001f468\u200d\U0001f469\u200d\U0001f467 ∑x² <b>&amp;</b>",
    "def f(x):\n        return x+1\n",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "",
]


@pytest.mark.slow
@torch.no_grad()
def test_gemma3_says_what_transformers_makes_it_say(gemma3_gguf, tmp_path):
    """The real file, whose 262,144 pieces come without their merges, in blocks of 4 to 8 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = dict(pretrained_model_name_or_path=gemma3_gguf.parent, gguf_file=gemma3_gguf.name)
    ours, published = TinyLM.from_pretrained(gemma3_gguf), AutoTokenizer.from_pretrained(**source)
    for text in SCRIPTS:
        ids = ours.tokenizer.encode(text)
        assert ids == published(text)["input_ids"], text
        assert ours.tokenizer.decode(ids[1:], True) == published.decode(ids[1:]), text
    oracle = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    ids = torch.tensor([ours.tokenizer.encode("".join(SCRIPTS[:6]))])
    expected = oracle(ids).logits
    assert difference(ours(ids), expected) < 1e-4
    start = ids[:, :6]
    new = dict(max_new_tokens=40, do_sample=False)
    (theirs,) = oracle.generate(start, attention_mask=torch.ones_like(start), **new)
    (text,) = ours.generate(start, max_new_tokens=40)
    assert_same_text(text.tolist(), theirs.tolist(), oracle(theirs[None]).logits[0], len(start[0]))
    ours.save_pretrained(tmp_path)
    assert difference(load_oracle(tmp_path)(ids).logits, expected) < 1e-4
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert all(saved(text)["input_ids"] == published(text)["input_ids"] for text in SCRIPTS)
