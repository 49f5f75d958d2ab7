"""Exported graphs of decoders, family by family and with replaced leaves: operators, names, logits and tokens."""

import functools
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from families import (
    FAMILIES,
    SPECIAL,
    assert_same_text,
    difference,
    load_oracle,
    prompts,
    ragged,
    some_slow,
)
from helpers import CPU, TINY, numpy

import export
import tinylm
from export import OnnxLM, export_onnx
from tinylm import Config, TinyLM


@pytest.mark.parametrize("case", some_slow(FAMILIES + SPECIAL), ids=str)
def test_logits_and_tokens_are_those_of_transformers(case, folder, exported_folder):
    """From a checkpoint that transformers wrote, through the export, under ONNX Runtime; rows padded on either side."""
    oracle, lm, onnx_lm = (
        load_oracle(folder(case)),
        TinyLM.from_pretrained(folder(case)),
        OnnxLM(exported_folder(case), providers=CPU),
    )
    ids = prompts(case, 2, 15)
    with torch.no_grad():
        assert difference(torch.from_numpy(onnx_lm(*numpy(ids))), oracle(ids).logits) < 1e-4
    rows = [prompts(case, n, seed=n) for n in (11, 4, 7)]
    batch, mask = ragged(rows, ["left", "right", "both"])
    options = dict(max_new_tokens=9, eos_token_id=())
    tokens = onnx_lm.generate(*numpy(batch, mask), **options)
    assert tokens.tolist() == lm.generate(batch, mask, **options).tolist()
    for row, prompt in zip(tokens, rows, strict=True):
        theirs = oracle.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.no_grad():
            logits = oracle(theirs).logits[0]
        ours = [*prompt.tolist(), *row[batch.shape[1] :].tolist()]
        assert_same_text(ours, theirs[0].tolist(), logits, len(prompt))


@pytest.mark.parametrize("case", some_slow(FAMILIES), ids=str)
def test_graph_has_single_operators_and_each_weight_once(case, folder, exported_folder):
    """Guards attention, rotary positions and norms that leave the trace written out, and a tied head stored twice."""
    path, lm = exported_folder(case) / "onnx" / "model.onnx", TinyLM.from_pretrained(folder(case))
    graph = onnx.load(path).graph
    onnx.checker.check_model(path, full_check=True)
    found, layers = Counter(node.op_type for node in graph.node), lm.config.num_hidden_layers
    skip = found[
        "SkipSimplifiedLayerNormalization"
    ]  # a sum of the residual stream and the norm after it
    assert {node.op_type for node in graph.node if node.domain} <= {
        "SkipSimplifiedLayerNormalization"
    }
    assert lm.config.norm == "layer" or lm.config.norm_position == "output" or skip == 2 * layers
    routers = layers if lm.config.num_experts else 0
    assert found["Attention"] == layers and found["Softmax"] == routers
    rotating = sum(lm.config.no_rope_layers or [1] * layers)
    assert found["RotaryEmbedding"] == (2 * rotating if lm.config.position == "rope" else 0)
    norms = sum(name.endswith("norm.weight") for name in lm.state_dict())
    assert (
        skip + found["RMSNormalization" if lm.config.norm == "rms" else "LayerNormalization"]
        == norms
    )
    stored = sum(
        np.prod(tensor.dims)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    )
    assert stored == pytest.approx(sum(p.numel() for p in lm.parameters()), rel=0.01)


def test_names_and_axes_are_those_of_optimum(exported_folder):
    case = FAMILIES[1]
    graph = onnx.load(exported_folder(case) / "onnx" / "model.onnx").graph
    shape = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    kv, width = (
        case.fields["num_key_value_heads"],
        case.fields["hidden_size"] // case.fields["num_attention_heads"],
    )
    assert shape["input_ids"] == shape["position_ids"] == ["batch_size", "sequence_length"]
    assert shape["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shape["logits"] == ["batch_size", "sequence_length", case.fields["vocab_size"]]
    for i in range(case.fields["num_hidden_layers"]):
        for part in ("key", "value"):
            assert shape[f"past_key_values.{i}.{part}"] == [
                "batch_size",
                kv,
                "past_sequence_length",
                width,
            ]
            assert shape[f"present.{i}.{part}"][0::3] == ["batch_size", width]
    assert len(shape) == 4 + 4 * case.fields["num_hidden_layers"]


def test_file_names_no_machine(exported_folder):
    """Guards the stack traces that the exporter leaves in a file's metadata."""
    content = (exported_folder(FAMILIES[1]) / "onnx" / "model.onnx").read_bytes()
    for trace in (
        b"site-packages",
        b"stack_trace",
        b"pkg.torch",
        str(ROOT).encode(),
        sys.prefix.encode(),
    ):
        assert trace not in content, trace


def test_loading_prints_nothing(exported_folder):
    """Guards outputs declared with wrong shapes: ONNX Runtime warns of each at every load."""
    script = (
        f"from export import OnnxLM; OnnxLM({str(exported_folder(FAMILIES[1]))!r}, providers={CPU})"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == run.stdout == "", run.stderr


# ---- leaves that somebody replaced ----------------------------------------------------------------------------------


class SquaredReLU(tinylm.MLP):
    """The README's."""

    def forward(self, x):
        return self.down(torch.relu(self.up(x)).square())


def plain_attend(
    q, k, v, mask, head_dim, scale, softcap=None, dropout=0.0, cache=None, layer=0, causal=True
):
    """Attention as somebody writes it, with twice the scale and a cache that it asks for keys and values."""
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if cache is not None:
        k, v = cache.update(layer, k, v)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (2 * scale)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def operators(folder, file="model.onnx"):
    return Counter(node.op_type for node in onnx.load(folder / "onnx" / file).graph.node)


@pytest.mark.parametrize(
    "leaf, replacement, fields",
    [
        ("MLP", SquaredReLU, dict(gated=False)),
        pytest.param("attend", plain_attend, dict(num_key_value_heads=1), marks=pytest.mark.slow),
    ],
)
def test_a_replaced_leaf_is_traced_as_it_is(leaf, replacement, fields, tmp_path, monkeypatch):
    """Guards the stock operator in the place of somebody's own leaf; what is not replaced stays a single operator."""
    monkeypatch.setattr(tinylm, leaf, replacement)
    torch.manual_seed(1)
    sizes = TINY | dict(hidden_size=32, head_dim=16, initializer_range=0.4)
    lm = TinyLM(Config(**sizes | fields)).eval().requires_grad_(False)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    ours = lm(ids)
    precisions = ["fp32", "fp16"]  # in 16 bits the stock attention would be grouped
    export_onnx(lm, tmp_path / "out", precisions=precisions)
    for precision, tolerance in zip(precisions, (1e-4, 2e-2)):
        onnx_lm = OnnxLM(tmp_path / "out", precision, providers=CPU)
        assert difference(torch.from_numpy(onnx_lm(ids.numpy())), ours) < tolerance
        held = onnx_lm.step(ids[:, :3].numpy(), np.ones((1, 3), np.int64))[1]
        last = onnx_lm.step(ids[:, 3:].numpy(), np.ones((1, 5), np.int64), held)[0]
        assert difference(torch.from_numpy(last), ours[:, 3:]) < tolerance
    found = operators(tmp_path / "out"), operators(tmp_path / "out", "model_fp16.onnx")
    assert found[0]["RotaryEmbedding"] == 2 and not found[1]["RotaryEmbedding"] or leaf == "attend"
    assert [bool(x["Attention"] + x["GroupQueryAttention"]) for x in found] == [leaf == "MLP"] * 2
    monkeypatch.undo()
    if leaf == "attend":  # it did change something
        assert difference(lm(ids), ours) > 1e-2


def fused_attend(
    q, k, v, mask, head_dim, scale, softcap=None, dropout=0.0, cache=None, layer=0, causal=True
):
    """Attention as somebody writes it who has PyTorch compute it."""
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if cache is not None:
        k, v = cache.update(layer, k, v)
    square = mask is None and causal
    x = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=square)
    return x.transpose(1, 2).flatten(2)


@pytest.mark.slow
def test_a_replaced_attend_gets_a_mask_for_every_query(tmp_path, monkeypatch):
    """ONNX Runtime refused an encoder's mask of one row for all queries; and norms of the keys of a source could not be
    traced."""
    monkeypatch.setattr(tinylm, "attend", fused_attend)
    lm = TinyLM(Config(**TINY, num_encoder_layers=1, position="learned", qk_norm="head")).eval()
    found = export_onnx(lm, tmp_path / "out", safetensors=False)["fp32"]
    assert max(found[name] for name in ("prefill", "left padding", "decode")) < 1e-5


def test_each_replaced_leaf_is_known(monkeypatch):
    """Whatever takes its place: a function, one that is wrapped under its name, a lambda."""
    for name in ("rms_norm", "rotate", "attend", "linear"):
        own = getattr(tinylm, name)
        assert export.is_own(own)
        assert not export.is_own(functools.wraps(own)(lambda *_: None))
    lm = TinyLM(Config(**TINY | dict(hidden_size=64)))
    assert export.groups_queries(lm)

    class Mine(tinylm.Attention):
        def forward(self, *arguments):
            return super().forward(*arguments)

    monkeypatch.setattr(tinylm, "Attention", Mine)
    assert not export.groups_queries(TinyLM(lm.config))
    assert export.groups_queries(lm)
    monkeypatch.setattr(tinylm, "rotate", lambda *_: None)
    assert not export.groups_queries(lm)


def test_only_layers_that_differ_in_weights_alone_share_a_trace(tmp_path):
    """The trace of one layer is copied for those like it. A layer with a setting or a hook of its own is not like it."""
    sizes = TINY | dict(num_hidden_layers=4, sliding_window=4)
    kinds = ("sliding_attention", "full_attention") * 2
    lm = TinyLM(Config(**sizes, layer_types=kinds)).eval()

    def traced():
        found = export_onnx(lm, tmp_path / "out", safetensors=False)["fp32"]
        assert max(found[name] for name in ("prefill", "left padding", "decode")) < 1e-5
        return len({kind for _, kind in export.layer_kinds(lm).values()})

    assert traced() == 2
    lm.layers[2].attention.scale *= 2
    assert traced() == 3
    lm.layers[3].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not export.layer_kinds(lm)
