"""Exported graphs of encoders, heads and encoder-decoders: names, logits and tokens."""

import itertools
import json
import random
import shutil
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from families import (
    CLASSIFIERS,
    ENCODERS,
    FAMILIES,
    READERS,
    SEQ2SEQ,
    SPECIAL,
    WRITERS,
    difference,
    load_oracle,
    prompts,
    ragged,
    save_word_tokenizer,
)
from helpers import CPU, every
from onnx_ir.traversal import RecursiveGraphIterator
from rounding import ROOT

import export
import train
from export import OnnxLM, export_onnx, quantize_channels
from tinylm import TinyLM

CASES = {case.name: case for case in ENCODERS + CLASSIFIERS + SEQ2SEQ}


def batch(case):
    return ragged([prompts(case, n, seed=n) for n in (11, 4, 7)], ["left", "right", "both"])


def assert_says_nearly_the_same(onnx_lm, lm, case):
    """In norm, as a router's choice may flip for a token."""
    ids, mask = batch(case)
    target = {"decoder_input_ids": prompts(case, 3, 8, seed=5)} if lm.encoder else {}
    theirs = lm(ids, mask, **target)
    ours = onnx_lm(ids.numpy(), mask.numpy(), **{name: x.numpy() for name, x in target.items()})
    kept = mask.bool() if theirs.ndim == 3 and not target else slice(None)
    error = torch.from_numpy(ours)[kept] - theirs[kept]
    assert error.norm() < 0.1 * theirs[kept].norm()


def with_words(path, copy):
    """A copy of a folder with a tokenizer, and a text of its words to round for."""
    save_word_tokenizer(shutil.copytree(path, copy))
    return copy, " ".join(f"w{random.Random(i).randrange(5, 200)}" for i in range(3000))


@pytest.mark.parametrize("name", READERS)
def test_what_reads_says_what_transformers_says(name, folder, exported_pair):
    case, (lm, onnx_lm, _) = CASES[name], exported_pair(name)
    ids, mask = batch(case)
    kinds = (
        {"token_type_ids": torch.arange(ids.numel()).view(ids.shape) % 3}
        if lm.config.type_vocab_size == 3
        else {}
    )
    with torch.no_grad():
        ours, theirs = (
            onnx_lm(*(x.numpy() for x in (ids, mask, *kinds.values()))),
            lm(ids, mask, **kinds),
        )
        kept = mask.bool() if theirs.ndim == 3 else slice(None)
        assert difference(torch.from_numpy(ours)[kept], theirs[kept]) < 1e-4
        ids, kinds = prompts(case, 2, 9), {key: kind[:2, :9] for key, kind in kinds.items()}
        said = load_oracle(folder(case), case.head)(ids, **kinds)
        theirs = (
            torch.stack((said.start_logits, said.end_logits), -1) if case.head == "qa" else said[0]
        )
        ours = onnx_lm(ids.numpy(), None, *(kind.numpy() for kind in kinds.values()))
        assert difference(torch.from_numpy(ours), theirs) < 1e-4


@pytest.mark.parametrize("name", WRITERS)
def test_what_writes_writes_what_torch_writes(name, folder, exported_pair):
    """Logits of transformers; tokens of torch, from a ragged source, with all that changes logits."""
    case, (lm, onnx_lm, _) = CASES[name], exported_pair(name)
    ids, mask = batch(case)
    target = prompts(case, 3, 8, seed=5)
    row, real = ids[1:2], mask[1:2]  # padded on the right, as transformers takes it
    with torch.no_grad():
        oracle = load_oracle(folder(case), "seq2seq")
        theirs = oracle(input_ids=row, attention_mask=real, decoder_input_ids=target[:1]).logits
    ours = onnx_lm(row.numpy(), real.numpy(), decoder_input_ids=target[:1].numpy())
    assert difference(torch.from_numpy(ours), theirs) < 1e-4
    for options in (
        dict(),
        dict(no_repeat_ngram_size=2, min_length=9),
        dict(temperature=0.9, top_k=20, seed=4),
        dict(
            repetition_penalty=1.4,
            bad_words_ids=[[7], [8, 9]],
            forced_bos_token_id=5,
            forced_eos_token_id=6,
        ),
        dict(num_beams=3),
        dict(num_beams=2, eos_token_id=[*range(20, 40)], length_penalty=2.0),
        dict(num_beams=4, early_stopping=True, no_repeat_ngram_size=2, min_length=5),
        dict(num_beams=2, bad_words_ids=[[7]], renormalize_logits=True, forced_bos_token_id=5),
    ):
        options = dict(max_new_tokens=14, num_beams=1) | options
        ours = onnx_lm.generate(ids.numpy(), mask.numpy(), **options)
        assert ours.tolist() == lm.generate(ids, mask, **options).tolist(), options


def one_of_each():
    """A case of each family, one head of each encoder, and the two lengths of longrope."""
    heads = [case for case in ENCODERS if case.name in (f"{case.family}-tokens", "bert-qa")]
    writers = [case for case in SEQ2SEQ if case.name == case.family]
    longrope = [case for case in SPECIAL if case.name == "phi3-long"]
    return [*FAMILIES, *longrope, *heads, *writers]


@pytest.mark.slow
@every(one_of_each())
@torch.no_grad()
def test_every_family_in_8_bits(case, folder, tmp_path):
    """The export verifies the graph against the rounded weights; here, that they say what the weights said. All of a
    family's matrices are rounded, its experts too."""
    lm = TinyLM.from_pretrained(folder(case))
    export_onnx(lm, tmp_path / "out", precisions=["int8"], safetensors=False)
    assert_says_nearly_the_same(OnnxLM(tmp_path / "out", "int8", providers=CPU), lm, case)
    found = Counter(
        node.op_type
        for path in (tmp_path / "out" / "onnx").glob("*.onnx")
        for node in RecursiveGraphIterator(ir.load(path).graph)
    )
    # as they are: routers, and what computes keys and values of a source
    plain = len(lm.layers) if lm.config.num_experts or lm.encoder else 0
    assert found["MatMulNBits"] >= 2 * len(lm.layers) and found["MatMul"] <= plain


# What rounding to 8 bits adds, all of it in ONNX Runtime for browsers and on its CPU.
INTEGERS = {"DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Add", "Sum", "MatMul"}
ROWS = {"Gather", "Sub", "Unsqueeze", "Reshape", "Slice", "MatMulNBits"}
PADDING = {"ArgMax", "GatherElements", "Where"}


@pytest.mark.parametrize("name", READERS + WRITERS)
@torch.no_grad()
def test_what_reads_multiplies_integers(name, folder, tmp_path):
    """Every matrix of an encoder, but for its head's; the decoder behind it writes a token at a time and keeps its
    kernels. Nodes are such as ONNX Runtime fuses, and its graph for browsers has."""
    case = CASES[name]
    source, text = with_words(folder(case), tmp_path / "source")
    export_onnx(source, tmp_path / "out", precisions=["fp32", "int8"], text=text)
    lm = TinyLM.from_pretrained(source)
    assert_says_nearly_the_same(OnnxLM(tmp_path / "out", "int8", providers=CPU), lm, case)
    stem = "encoder_model" if lm.encoder else "model"
    exact, rounded = (
        Counter(node.op_type for node in ir.load(path).graph)
        for path in (tmp_path / "out/onnx" / f"{stem}{end}.onnx" for end in ("", "_quantized"))
    )
    assert rounded.keys() - exact.keys() <= INTEGERS | ROWS | PADDING
    # ELECTRA projects its embedding, too.
    layers = len((lm.encoder or lm).layers)
    assert rounded["MatMulInteger"] - 4 * layers in (0, 1)
    assert rounded["MatMulInteger"] == rounded["DynamicQuantizeLinear"]
    if lm.encoder:
        path = tmp_path / "out/onnx/decoder_model_merged_quantized.onnx"
        found = Counter(node.op_type for node in RecursiveGraphIterator(ir.load(path).graph))
        assert found["MatMulNBits"] > 4 * len(lm.layers) and not found["MatMulInteger"]


@pytest.mark.parametrize("name", ["bert-bare", "t5"])
def test_padding_does_not_widen_the_range_of_a_batch(name, folder, tmp_path):
    """Guards MiniLM's products of integers, whose errors in padded batches were four times those of one text: of 1,066
    labels 7 changed, now 4. A token with a huge embedding stands in for its [PAD]."""
    source, text = with_words(folder(CASES[name]), tmp_path / "source")
    lm = TinyLM.from_pretrained(source)
    with torch.no_grad():
        lm.embed.weight[3] *= 1000
    export_onnx(lm, tmp_path / "out", precisions=["int8"], text=text)
    onnx_lm = OnnxLM(tmp_path / "out", "int8", providers=CPU)
    ids = np.random.default_rng(0).integers(4, lm.config.vocab_size, (2, 12))
    mask = np.ones_like(ids)
    mask[0, 8:] = mask[1, :3] = 0
    states = []
    for padding in (3, 4):
        filled = np.where(mask, ids, padding)
        if lm.encoder:
            states.append(onnx_lm.source(filled, mask)["encoder_hidden_states"].numpy())
        else:
            states.append(onnx_lm(filled, mask))
    assert np.array_equal(states[0][mask > 0], states[1][mask > 0])


@pytest.mark.parametrize("name", ["bert-bare", "t5"])
def test_columns_in_floats_are_added_behind_a_bias(name, folder, tmp_path, monkeypatch):
    """Guards T5's, which has none: they went behind the fused norm that follows, and the export failed."""
    monkeypatch.setattr(export, "PRICE", 0)
    source, text = with_words(folder(CASES[name]), tmp_path / "source")
    export_onnx(source, tmp_path / "out", precisions=["int8"], text=text)
    stem = "encoder_model" if name == "t5" else "model"
    graph = ir.load(tmp_path / "out/onnx" / f"{stem}_quantized.onnx").graph
    # Each layer's second matrix of the MLP has fewer outputs than inputs.
    rounded, kept = (
        {
            name.removesuffix(part)
            for name in graph.initializers
            if name.endswith("mlp.down." + part)
        }
        for part in ("codes", "kept")
    )
    assert kept == rounded and kept


@torch.no_grad()
def test_outliers_are_kept_from_the_range():
    """One huge column takes no precision from the others, neither of inputs nor of weights: it stays in floats."""
    torch.manual_seed(0)
    x, weight = torch.randn(600, 64), torch.randn(32, 64)
    x[:, 5] *= 100
    found = quantize_channels(weight, x)
    step = ((x * found.factors).amax() - (x * found.factors).amin()) / 255
    inputs = (x * found.factors / step).round() * step
    y = inputs @ (found.codes * found.scales).t() + x[:, found.outliers] @ found.kept.t()
    expected = x @ weight.t()
    assert 5 in found.outliers and found.factors[5] == 0
    assert (found.weight() - weight).norm() < 0.01 * weight.norm()
    error = (y - expected).norm() / (expected - x[:, 5:6] @ weight[:, 5:6].t()).norm()
    assert error < 0.02


@pytest.mark.parametrize("columns", [64, 63])
def test_products_of_integers_fit_16_bits(columns):
    """Guards sums of two products that saturate on x86 without VNNI, where MiniLM's least cosine fell from 0.998 to
    0.989 (ONNX Runtime on an emulated Haswell). vpmaddubsw: bytes times signed bytes, neighbours added in 16 bits."""
    torch.manual_seed(0)
    weight = torch.cat((torch.randn(32, columns), torch.rand(32, columns) + 1))
    found = quantize_channels(weight, torch.rand(200, columns), smooth=False)
    codes = found.codes.numpy().astype(int)
    codes = np.pad(codes, ((0, 0), (0, columns % 2))).reshape(len(codes), -1, 2)
    for bytes_ in itertools.product((0, 255), repeat=2):
        sums = (codes * bytes_).sum(-1)
        assert (sums == sums.clip(-(2**15), 2**15 - 1)).all()
    # Ordinary weights lose no bit by it.
    assert np.abs(codes[:32]).max(axis=(1, 2)).min() > 64
    assert (found.weight() - weight).norm() < 0.01 * weight.norm()


def test_a_weight_that_is_no_number_is_rounded_to_what_verification_refuses():
    weight = torch.randn(3, 4)
    weight[1, 2] = float("nan")
    assert quantize_channels(weight, torch.rand(50, 4)).weight()[1].isnan().any()


@pytest.mark.slow
def test_minilm_embeds_in_8_bits(minilm, tmp_path):
    """On sentences that it was not rounded for. Plain dynamic quantization has 0.97."""
    export_onnx(minilm, tmp_path / "out", precisions=["fp32", "int8"])
    text = (ROOT / "README.md").read_text() + (ROOT / "LICENSE").read_text()
    texts = [line for line in text.splitlines() if len(line.split()) > 5]
    fp32, int8 = (
        np.array(
            [first["embedding"] for first, *_ in OnnxLM(tmp_path / "out", name, CPU).run(texts)]
        )
        for name in ("fp32", "int8")
    )
    assert (fp32 * int8).sum(1).min() > 0.99


def test_names_are_those_of_optimum_and_the_source_is_read_once(exported_pair):
    """As transformers.js calls it: empty pasts first, then the cached source, whatever states are given with it."""
    lm, onnx_lm, out = exported_pair("marian")
    assert sorted(path.name for path in (out / "onnx").iterdir()) == [
        "decoder_model_merged.onnx",
        "encoder_model.onnx",
    ]
    past = [
        f"{i}.{side}.{part}"
        for i in range(2)
        for side in ("decoder", "encoder")
        for part in ("key", "value")
    ]
    assert {*onnx_lm.session.inputs} == {
        "input_ids",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "use_cache_branch",
        *(f"past_key_values.{n}" for n in past),
    }
    assert [*onnx_lm.session.outputs] == ["logits", *(f"present.{n}" for n in past)]
    ids, mask = (x.numpy() for x in batch(CASES["marian"]))
    start, ones = np.full((3, 1), 210), np.ones((3, 2), np.int64)
    source = onnx_lm.source(ids, mask)
    _, present = onnx_lm.step(start, ones[:, :1], source=source)
    assert [x.shape()[2] for x in present[:4]] == [1, 1, ids.shape[1], ids.shape[1]]
    logits = onnx_lm.step(start, ones, present, source)[0]
    other = source | {"encoder_hidden_states": np.zeros((3, ids.shape[1], 60), np.float32)}
    assert (onnx_lm.step(start, ones, present, other)[0] == logits).all()
    stored = sum(
        np.prod(t.dims)
        for path in (out / "onnx").iterdir()
        for t in onnx.load(path).graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
    )
    parameters = sum(p.numel() for p in lm.parameters()) + lm.embed.weight.numel()
    assert stored == pytest.approx(
        parameters, rel=0.01
    )  # each weight once in a file, the embedding in both


@pytest.mark.slow
def test_minilm_embeds_as_in_torch(minilm, tmp_path, capsys):
    """Pooling and normalisation travel with the export."""
    export_onnx(minilm, tmp_path / "out")
    texts = ["This is an example sentence", "Each sentence is converted"]
    vectors = np.array(
        [row["embedding"] for (row,) in OnnxLM(tmp_path / "out", providers=CPU).run(texts)]
    )
    train.main(["run", str(minilm), *texts, "--json"])
    theirs = [
        json.loads(line)["output"][0]["embedding"] for line in capsys.readouterr().out.splitlines()
    ]
    assert vectors.shape == (2, 384) and np.allclose(vectors, theirs, atol=1e-5)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
