"""From a checkpoint to deployment: safetensors and a verified ONNX graph in one folder that every loader takes.

    python export.py --onnx                           # the shipped model
    python export.py SmolLM2-135M-Instruct --onnx --out smollm2 --prompt "The capital of France is"

    from onnxlm import OnnxLM                         # numpy, onnxruntime and tokenizers; no torch
    for piece in OnnxLM("smollm2").stream("The capital of France is"): print(piece, end="")

The graph is traced from the model of tinylm.py itself: only its three leaves (`rms_norm`, `rotate`, `attend`) are
swapped for single ONNX operators, which ONNX Runtime has fast kernels for on CPU and CUDA and would not find by
itself in their written-out form. Names and axes are those of optimum and transformers.js.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import itertools
import logging
import math
import os
import shutil
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime as ort
import torch
from einops import rearrange
from torch import nn

import tinylm
from onnxlm import (
    CPU,
    CUDA_PRECISIONS,
    SUFFIXES,
    OnnxLM,
    Session,
    first_line,
    is_embedder,
    run_lines,
    sentence_files,
    stream_text,
)
from tinylm import Error, require

WEIGHTS = Path(__file__).resolve().parent / "weights"  # the model shipped beside this file
MARK = ".tinylm-export"  # this file says: the next export may replace the folder
OPSET = 23  # the first with Attention, RotaryEmbedding, RMSNormalization
BLOCK = {4: 32, 8: 64}  # bits -> weights in a row that share a scale, at most
SHARES = (1.1, 1.05, 1, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a block's range, tried for the least error
PARTS = ("blocks", "scales", "zero_points")  # tensors that a rounded matrix is stored in
EXTERNAL_ABOVE = 2**31 - 2**26  # bytes; a protobuf file ends at 2 GiB
WINDOW, WINDOWS, MEASURED = 256, 40, 8  # tokens, windows to round for and, of these, to measure on


@dataclass(frozen=True)
class Precision:
    """How the numbers of a graph are stored."""

    name: str
    tolerance: (
        float  # largest difference from torch with the same weights, relative to the largest value,
    )
    # before the products with rounded weights are told to compute in 8 bits
    dtype: str = "float32"  # of what flows through it, and of weights that are not rounded
    bits: int = 0  # of its matrices, but 8 for embedding and head; 0: as dtype
    exact: bool = False  # greedy decoding must say what torch says
    cache: str = ""  # dtype of keys and values in a decoder's cache, where it is another

    @property
    def suffix(self) -> str:
        """Of its files' names in onnx/."""
        return SUFFIXES[self.name]

    @property
    def cuda(self) -> bool:
        """All its nodes run there."""
        return self.name in CUDA_PRECISIONS


PRECISIONS = {
    "fp32": Precision("fp32", 2e-4, exact=True),
    "fp16": Precision("fp16", 0.2, "float16"),
    "int8": Precision("int8", 1e-3, bits=8),
    "int4": Precision("int4", 1e-3, bits=4),
    "q4f16": Precision("q4f16", 0.2, "float16", bits=4),
}


# ---------------------------------------------------------------------------------------------------------------------
# Tracing: the model's leaves as single operators. From here on torch is needed.
# ---------------------------------------------------------------------------------------------------------------------


def operator(name: str, inputs: tuple, like, *shapes, rest=None, **attributes):
    """One node of the ONNX graph in the place of a traced function. Its outputs have the dtype of `like`, those after
    the first that of `rest` if given, and the `shapes`, or the one shape of `like`."""
    shapes = shapes or (like.shape,)
    dtypes = [like.dtype, *[(like if rest is None else rest).dtype] * (len(shapes) - 1)]
    out = torch.onnx.ops.symbolic_multi_out(
        name, inputs, attributes, dtypes=dtypes, shapes=shapes, version=1 if "::" in name else OPSET
    )
    return out if len(shapes) > 1 else out[0]


def onnx_rms_norm(x, weight, eps):
    return operator("RMSNormalization", (x, weight.to(x.dtype)), x, axis=-1, epsilon=eps)


def onnx_rotate(x, cos, sin, head_dim):
    width = 2 * cos.shape[-1]
    part = {} if width == head_dim else {"rotary_embedding_dim": width}
    return operator(
        "RotaryEmbedding",
        (x, cos.to(x.dtype), sin.to(x.dtype)),
        x,
        num_heads=x.shape[-1] // head_dim,
        **part,
    )


def onnx_attend(
    q, k, v, mask, head_dim, scale, softcap=None, dropout=0.0, cache=None, layer=0, causal=True
):
    """With heads folded, as the model has them: the operator unfolds them, and appends to the past, by itself. Keys of
    a source come unfolded, as they are kept between calls."""
    mask = mask.expand(*mask.shape[:2], q.shape[1], mask.shape[3])
    options = dict(scale=scale, **({"softcap": softcap} if softcap else {}))
    if k.ndim == 4:
        q = rearrange(q, "b s (h d) -> b h s d", d=head_dim)
        return rearrange(
            operator("Attention", (q, k, v, mask), q, **options), "b h s d -> b s (h d)"
        )
    options |= dict(q_num_heads=q.shape[-1] // head_dim, kv_num_heads=k.shape[-1] // head_dim)
    if cache is None:
        return operator("Attention", (q, k, v, mask), q, **options)
    return cache.append(layer, "Attention", (q, k, v, mask), k.shape[1], q, **options)


def grouped_attention(self, x, rope, mask, cache, layer):
    """tinylm's `Attention.forward` as ONNX Runtime's own operator: it rotates by the tables of all positions, writes
    keys and values behind those of the past, in place where past and present are one buffer, and masks by lengths."""
    qkv = self.qkv(x)
    like, inputs = qkv[..., : self.sizes[0]], (qkv, None, None)
    if not isinstance(self.q_norm, nn.Identity):
        q, k, v = qkv.split(self.sizes, dim=-1)
        inputs = self.q_norm(q), self.k_norm(k), v
    heads, groups, _ = (size // self.head_dim for size in self.sizes)
    more = dict(softcap=self.softcap) if self.softcap else {}
    more |= dict(local_window_size=cache.windows[layer]) if cache.windows[layer] else {}
    scales = ()
    if cache.scales:
        scales = None, None, None, *cache.scales[layer]
        more |= dict(kv_cache_bit_width=8, k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL")
    return self.o(
        cache.append(
            layer,
            "com.microsoft::GroupQueryAttention",
            inputs,
            x.shape[1],
            like,
            (*cache.lengths, *rope, *scales),
            num_heads=heads,
            kv_num_heads=groups,
            scale=self.scale,
            do_rotary=1,
            **more,
        )
    )


def onnx_linear(x, weight, bias, blocks: QuantizedWeight | None):
    """tinylm's `linear` on rounded weights, which `put_blocks` puts in the place of the traced ones."""
    if blocks is None:
        return torch.nn.functional.linear(x, weight, bias)
    rows, columns = weight.shape
    y = operator(
        "com.microsoft::MatMulNBits",
        (x, weight, weight, weight),
        x,
        (*x.shape[:-1], rows),
        N=rows,
        K=columns,
        bits=blocks.bits,
        block_size=blocks.codes.shape[-1],
    )
    return y if bias is None else y + bias


def onnx_embedding(table, ids):
    """Rows of a rounded table, which may be a tied head's too; written out, since the ONNX Runtime of browsers has no
    single operator for it."""
    codes, scales, zeros = (getattr(table, part).index_select(0, ids.flatten()) for part in PARTS)
    rows = (codes.to(scales.dtype) - zeros[..., None].to(scales.dtype)) * scales[..., None]
    return rows.flatten(1).unflatten(0, ids.shape)


def rotary_tables(self, positions):
    """tinylm's `Rotary.forward` where the attention looks up its positions by itself."""
    return self.cos, self.sin


class Past:
    """The cache of an exported graph, in the place of tinylm's KVCache: past comes in, present goes out, longer."""

    def __init__(
        self, past: list, positions, lengths: tuple = (), windows: tuple = (), scales: tuple = ()
    ):
        self.past, self.positions, self.lengths, self.windows, self.present = (
            past,
            positions,
            lengths,
            windows,
            [],
        )
        self.scales = scales  # of keys and values of 8 bits, by layer

    def append(
        self, layer: int, name: str, inputs: tuple, new: int, like, more: tuple = (), **attributes
    ):
        """An attention operator of a layer, after which its cache has `new` more columns."""
        past = self.past[2 * layer : 2 * layer + 2]
        batch, heads, length, width = past[0].shape
        longer = batch, heads, length + new, width
        x, *present = operator(
            name,
            (*inputs, *past, *more),
            like,
            like.shape,
            longer,
            longer,
            rest=past[0],
            **attributes,
        )
        self.present += present
        return x

    def extend(self, mask):
        """Positions of the queries and of the keys; the mask spans past and new tokens."""
        return self.positions, tinylm.count_positions(mask)[1]


@dataclass(frozen=True)
class Graph:
    """A graph to trace: `forward(lm, inputs by name)` lists its outputs."""

    stem: str  # of its file
    forward: object
    inputs: dict  # name -> dtype and axes: sizes, or names where the size varies
    outputs: list
    grouped: bool = False  # its attention is ONNX Runtime's GroupQueryAttention


def key_values(config, prefix: str, sides: dict, dtype: str = "float32") -> dict:
    """Names of keys and values -> dtype and axes; sides: what names say of whose they are -> the name of their axis."""
    heads, width = config.num_key_value_heads, config.head_dim
    return {
        f"{prefix}.{layer}{side}.{part}": (dtype, "batch_size", heads, length, width)
        for layer in range(config.num_hidden_layers)
        for side, length in sides.items()
        for part in ("key", "value")
    }


SIZES = {
    "batch_size": 2,
    "sequence_length": 6,
    "past_sequence_length": 5,
    "total_sequence_length": 11,
    "logits_length": 3,
    "encoder_sequence_length": 7,
    "eos_tokens": 4,
}  # axes that vary: no two alike, none 0 or 1
IDS = ("int64", "batch_size", "sequence_length")
KNOBS = {
    "temperature": ("float32",),
    "top_k": ("int64",),
    "top_p": ("float32",),
    "seed": ("int64",),
    "eos_token_id": ("int64", "eos_tokens"),
}
SOURCE_IDS = ("int64", "batch_size", "encoder_sequence_length")


def groups_queries(config, stored: Precision) -> bool:
    """Does GroupQueryAttention compute it? In fp32 it has no CUDA kernel."""
    scaling = config.rope_scaling or {}
    fixed = config.position == "rope" and scaling.get("rope_type", scaling.get("type")) != "dynamic"
    return not stored.exact and fixed and config.head_dim % 16 == 0 and config.rotary_dim % 16 == 0


def decoder_graph(config, stored: Precision) -> list:
    """With a cache: the mask spans past and new tokens, and positions follow from it. `position_ids`, which all loaders
    give, says by its columns how many logits are asked for: those of the last ones."""
    past = key_values(
        config, "past_key_values", {"": "past_sequence_length"}, stored.cache or stored.dtype
    )

    def forward(lm, feed):
        return decoder_step(lm, feed, [feed[name] for name in past], stored)

    inputs = {
        "input_ids": IDS,
        "attention_mask": ("int64", "batch_size", "total_sequence_length"),
        "position_ids": ("int64", "batch_size", "logits_length"),
    }
    return [
        Graph(
            "model",
            forward,
            inputs | past,
            ["logits", *key_values(config, "present", {"": ""})],
            groups_queries(config, stored),
        )
    ]


def decoder_step(lm, feed: dict, past: list, stored: Precision) -> list:
    """Logits in float32, of as many last columns as position_ids has, and the cache after a call."""
    ids, mask, lengths, config = feed["input_ids"], feed["attention_mask"], (), lm.config
    seq, kept = ids.shape[1], feed["position_ids"].shape[1]
    positions, last = tinylm.count_positions(mask)[0][:, -seq:], torch.arange(seq - kept, seq)
    columns = last[None].expand(ids.shape[0], kept)
    if groups_queries(
        config, stored
    ):  # it takes rows that begin with their first token: padding goes behind
        new = mask[:, -seq:]
        columns = tinylm.count_positions(new)[0].index_select(1, last)
        ids = ids.gather(1, new.argsort(1, descending=True))
        total = operator(
            "Gather", (operator("Shape", (mask,), mask, (2,)), torch.tensor(1)), mask, ()
        )
        lengths = (mask.sum(1) - 1).int(), total.int()
    windows = tuple(
        kind == "sliding_attention" and config.sliding_window for kind in config.layer_types
    )
    scales = tuple(
        (block.attention.k_scale, block.attention.v_scale) for block in lm.layers if stored.cache
    )
    cache = Past(past, positions, lengths, windows, scales)
    return [lm(ids, mask, cache=cache, columns=columns).float(), *cache.present]


def generate_graph(config, stored: Precision) -> Graph:
    """What `in_a_loop` repeats: a step of the decoder, the choice of a token, and whether all rows have ended."""
    past = key_values(config, "past", {"": "past_sequence_length"}, stored.cache or stored.dtype)

    def forward(lm, feed):
        ids, text, ended, ends = (feed[name] for name in ("ids", "text", "ended", "eos_token_id"))
        step = dict(input_ids=ids, attention_mask=torch.ones_like(text), position_ids=ids[:, :1])
        logits, *present = decoder_step(lm, step, [feed[name] for name in past], stored)
        generation_config = [
            feed[name] for name in ("temperature", "top_k", "top_p", "seed", "step")
        ]
        token = torch.cond(
            generation_config[0] > 0,
            choose,
            lambda logits, *_: logits.argmax(-1),
            (logits[:, 0], *generation_config),
        )
        pad = lm.special_token_id("pad_token_id")
        pad = ends[0] if pad is None or pad < 0 else min(pad, config.vocab_size - 1)
        token = torch.where(ended, pad, token)
        ended = ended | (token[:, None] == ends).any(-1)
        return [~ended.all(), token[:, None], torch.cat((text, token[:, None]), 1), ended, *present]

    inputs = {
        "step": ("int64",),
        "ids": IDS,
        "text": ("int64", "batch_size", "total_sequence_length"),
        "ended": ("bool", "batch_size"),
    } | past
    return Graph(
        "generate",
        forward,
        inputs | KNOBS,
        ["go_on", "new_ids", "new_text", "have_ended", *key_values(config, "present", {"": ""})],
        groups_queries(config, stored),
    )


def choose(logits, temperature, top_k, top_p, seed, step):
    """tinylm's `sample` (batch, vocab) -> (batch,), where every knob is a tensor."""
    ordered, order = (logits / temperature).sort(descending=True)
    rank = torch.arange(logits.shape[1])
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), -math.inf)
    p = ordered.softmax(-1)
    outside = (top_p < 1) & (rank > 0) & (p.cumsum(-1) - p >= top_p)
    noise = tinylm.uniform(seed, step, *logits.shape).gather(1, order)
    best = (ordered.masked_fill(outside, -math.inf) - (-noise.log()).log()).argmax(-1, keepdim=True)
    return order.gather(1, best)[:, 0]


def in_a_loop(model, config, stored: Precision):
    """A traced `generate_graph` as the body of an ONNX Loop: from ids and knobs to whole sequences in one call."""
    body, given = model.graph, {}
    for value in [
        value for value in body.inputs if value.name in KNOBS
    ]:  # the body sees them from outside
        body.inputs.remove(value)
        given[value.name] = ir.val(value.name, value.dtype, value.shape)
        ir.convenience.replace_all_uses_with(value, given[value.name])
    body.inputs.insert(1, ir.val("going_on", ir.DataType.BOOL, []))
    weights = list(body.initializers.values())
    body.initializers.clear()
    heads = ir.tensor(np.array([config.num_key_value_heads, 0, config.head_dim]), name="no_past")
    weights.append(
        ir.val(heads.name, const_value=heads, type=ir.TensorType(heads.dtype), shape=heads.shape)
    )
    prompt = ir.val("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    steps = ir.val("max_new_tokens", ir.DataType.INT64, [])
    nothing, false = np.zeros(1, stored.cache or stored.dtype), np.zeros(1, bool)
    batch = ir.node("Shape", [prompt], {"end": 1})
    shape = ir.node("Concat", [batch.outputs[0], weights[-1]], {"axis": 0})
    empty = ir.node("ConstantOfShape", shape.outputs, {"value": ir.tensor(nothing)})
    ended = ir.node("ConstantOfShape", batch.outputs, {"value": ir.tensor(false)})
    past = [empty.outputs[0]] * (2 * config.num_hidden_layers)
    loop = ir.node(
        "Loop",
        [steps, None, prompt, prompt, ended.outputs[0], *past],
        {"body": body},
        num_outputs=3 + len(past),
    )
    nodes, text = [batch, shape, empty, ended, loop], loop.outputs[1]
    for i, value in enumerate(value for node in nodes for value in node.outputs):
        value.name = f"loop.{i}"  # no name of the body's
    text.name, text.type = "sequences", ir.TensorType(ir.DataType.INT64)
    text.shape = ir.Shape(["batch_size", "total_sequence_length"])
    graph = ir.Graph(
        [prompt, steps, *given.values()],
        [text],
        nodes=nodes,
        initializers=weights,
        opset_imports=body.opset_imports,
        name="tinylm",
    )
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def encoder_graph(config, stored: Precision) -> list:
    """Whatever reads a text in one call: no cache."""
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * bool(config.type_vocab_size)

    def forward(lm, feed):
        outputs = lm(**feed)
        return [x.float() for x in (outputs.unbind(-1) if config.head == "qa" else [outputs])]

    outputs = {"qa": ["start_logits", "end_logits"], None: ["last_hidden_state"]}.get(
        config.head, ["logits"]
    )
    return [Graph("model", forward, dict.fromkeys(names, IDS), outputs)]


def encoder_decoder_graphs(config, stored: Precision) -> list:
    """The encoder, and the decoder with two caches: of what it said, and of the source, filled by the first call."""
    sides = {
        ".decoder": "past_sequence_length",
        ".encoder": "encoder_sequence_length",
    }  # the latter may be 0 at first
    past, outputs = (
        key_values(config, "past_key_values", sides, stored.dtype),
        [*key_values(config, "present", sides)],
    )

    def encode(lm, feed):
        return [lm.encoder.states(lm.embed(feed["input_ids"]), feed["attention_mask"])]

    def decode(lm, feed):
        own, kept = ([feed[name] for name in past if side in name] for side in sides)

        def source():
            states = feed["encoder_hidden_states"]
            parts = (
                part for block in lm.layers for part in block.cross_attention.keys_values(states)
            )
            return [
                rearrange(part, "b s (h d) -> b h s d", d=config.head_dim).contiguous()
                for part in parts
            ]

        with mock.patch.object(
            tinylm, "linear", torch.nn.functional.linear
        ):  # a branch takes no operator of our own
            kept = torch.cond(feed["use_cache_branch"], lambda: [x.clone() for x in kept], source)
        ids = feed["input_ids"]
        encoder_mask = feed["encoder_attention_mask"].bool()[:, None, None, :]
        ones = torch.ones(1, own[0].shape[2] + ids.shape[1], dtype=torch.long)
        cache = Past(own, torch.arange(ones.shape[1])[None, -ids.shape[1] :])
        cross_kv = list(zip(kept[::2], kept[1::2]))
        logits = lm(ids, ones, cache=cache, cross_kv=cross_kv, encoder_mask=encoder_mask).float()
        present = dict(zip([n for n in outputs if ".decoder." in n], cache.present))
        present |= zip([n for n in outputs if ".encoder." in n], kept)
        return [logits, *map(present.get, outputs)]

    states = (stored.dtype, "batch_size", "encoder_sequence_length", config.hidden_size)
    inputs = {
        "encoder_attention_mask": SOURCE_IDS,
        "input_ids": IDS,
        "encoder_hidden_states": states,
    } | past
    sources = dict.fromkeys(["input_ids", "attention_mask"], SOURCE_IDS)
    return [
        Graph("encoder_model", encode, sources, ["last_hidden_state"]),
        Graph(
            "decoder_model_merged",
            decode,
            inputs | {"use_cache_branch": ("bool", 1)},
            ["logits", *outputs],
        ),
    ]


def graphs_of(config, stored: Precision) -> list:
    """What a model is exported as."""
    if config.num_encoder_layers:
        return encoder_decoder_graphs(config, stored)
    return (decoder_graph if config.causal and config.head == "lm" else encoder_graph)(
        config, stored
    )


def trace(lm, graph: Graph, blocks: dict = {}):
    """An onnx_ir.Model; blocks: the rounded weights of `lm` by their names."""
    leaves = mock.patch.multiple(
        tinylm, rms_norm=onnx_rms_norm, rotate=onnx_rotate, attend=onnx_attend
    )

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = lm

        def forward(self, tensors):
            rounded = {
                id(weight): blocks[name] for name, weight in lm.named_parameters() if name in blocks
            }
            linear = lambda x, weight, bias=None: onnx_linear(
                x, weight, bias, rounded.get(id(weight))
            )  # noqa: E731
            with mock.patch.object(tinylm, "linear", linear):
                return graph.forward(self.lm, dict(zip(graph.inputs, tensors)))

    dims = {axis: torch.export.Dim(axis) for axis in SIZES}
    arguments = [
        torch.ones([SIZES.get(axis, axis) for axis in axes], dtype=getattr(torch, dtype))
        for dtype, *axes in graph.inputs.values()
    ]
    shapes = [
        {i: dims[axis] for i, axis in enumerate(axes) if axis in dims}
        for _, *axes in graph.inputs.values()
    ]
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(
        logging.ERROR
    )  # "no torchvision"
    with torch.no_grad(), leaves, contextlib.ExitStack() as patches, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that axes share names, as they should, and torch's own deprecations
        if "embed.weight" in blocks:
            for part, array in zip(
                PARTS, blocks["embed.weight"].arrays(str(lm.dtype).removeprefix("torch."))
            ):
                lm.embed.register_buffer(part, torch.from_numpy(array), persistent=False)
            patches.enter_context(
                mock.patch.object(lm.embed, "forward", lambda ids: onnx_embedding(lm.embed, ids))
            )
        if graph.grouped:
            patches.enter_context(mock.patch.object(tinylm.Attention, "forward", grouped_attention))
            for rotary in lm.rotary.values():
                positions = torch.arange(lm.config.max_position_embeddings)[None]
                rotary.cos, rotary.sin = (x[0].to(lm.dtype) for x in rotary(positions))
            patches.enter_context(mock.patch.object(tinylm.Rotary, "forward", rotary_tables))
        program = torch.onnx.export(
            Traced().eval(),
            (arguments,),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes=(shapes,),
            input_names=[*graph.inputs],
            output_names=graph.outputs,
        )
    model = tidy(program.model)
    put_blocks(model.graph, blocks)
    for value in (
        *model.graph.inputs,
        *model.graph.outputs,
    ):  # the axes of optimum, whose callers ask for all logits
        value.shape = ir.Shape(
            "sequence_length" if str(dim) == "logits_length" else dim for dim in value.shape
        )
    if graph.grouped:
        model.metadata_props["shared_cache"] = (
            "1"  # present may be written in place, where past has the room
        )
    if graph.grouped or lm.config.position in tinylm.LIMITED:
        model.metadata_props["max_position_embeddings"] = str(lm.config.max_position_embeddings)
    return model


def put_blocks(graph, blocks: dict):
    """Rounded weights in the place of the traced ones: bytes, scales and zero points, each stored once."""
    for node in list(ir.traversal.RecursiveGraphIterator(graph)):
        if node.op_type != "MatMulNBits":
            continue
        weight = node.inputs[1]
        names = [weight.name.removesuffix("weight") + part for part in PARTS]
        if names[0] not in graph.initializers:  # a tied table's are there already
            for name, array in zip(names, blocks[weight.name].arrays(weight.dtype.numpy())):
                graph.register_initializer(
                    ir.Value(name=name, const_value=ir.tensor(array, name=name))
                )
        for place, name in enumerate(names, 1):
            node.replace_input_with(place, graph.initializers[name])
        if not weight.uses():
            del graph.initializers[weight.name]


def tidy(model):
    """Give every weight the name of its module; drop dead nodes and the stack traces, which name this machine."""
    graph = model.graph
    for (
        node
    ) in graph:  # a transposed weight has lost its name: its node knows the modules around it
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if node.op_type == "MatMul" and node.inputs[1].is_initializer() and scopes:
            rename(graph, node.inputs[1], ast.literal_eval(scopes)[-2] + ".weight")
        if node.op_type == "RMSNormalization":
            fuse_norm(graph, node)
    for value in list(graph.initializers.values()):
        rename(graph, value, value.name.removeprefix("lm."))
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    for thing in (
        model,
        graph,
        *graph.inputs,
        *graph.initializers.values(),
        *(v for n in graph for v in n.outputs),
    ):
        thing.metadata_props.clear()
    graph.name, model.producer_name, model.producer_version = "tinylm", "tinylm", None
    for node in graph:
        node.name = node.outputs[0].name
    return model


def fuse_norm(graph, norm):
    """The sum of the residual stream and the norm after it as one operator, which ONNX Runtime has on CPU and CUDA
    (its own optimizer finds it for layer norms only). A sum with a bias, which has one axis, is none."""
    add = norm.inputs[0].producer()
    if (
        add is None
        or add.op_type != "Add"
        or any(x.shape is None or len(x.shape) != 3 for x in add.inputs)
    ):
        return
    fused = ir.Node(
        "com.microsoft",
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        [norm.attributes["epsilon"]],
        num_outputs=4,
    )
    fused.outputs[1].name = fused.outputs[2].name = ""
    graph.opset_imports["com.microsoft"] = 1
    ir.convenience.replace_nodes_and_values(
        graph, norm, [norm, add], [fused], [norm.outputs[0], add.outputs[0]], fused.outputs[::3]
    )


def rename(graph, value, name: str):
    """An initializer under another name, unless an earlier one has that."""
    if name not in graph.initializers:
        value.name = name


# ---------------------------------------------------------------------------------------------------------------------
# Rounding weights
# ---------------------------------------------------------------------------------------------------------------------


class QuantizedWeight(NamedTuple):
    """A matrix of whole numbers 0 to 2^bits - 1, a scale and a zero point for each block of them in a row."""

    codes: object  # (rows, blocks, block)
    scales: object  # (rows, blocks, 1)
    zeros: object
    bits: int

    def weight(self):
        return ((self.codes - self.zeros) * self.scales).flatten(1)

    def arrays(self, dtype) -> tuple:
        """Codes, scales and zero points, as ONNX Runtime has them: two codes of 4 bits in a byte, the first one low."""
        codes, zeros = (x.numpy().astype(np.uint8) for x in (self.codes, self.zeros[..., 0]))
        if self.bits == 4:
            zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
            codes, zeros = (x[..., ::2] | x[..., 1::2] << 4 for x in (codes, zeros))
        return codes, self.scales[..., 0].numpy().astype(dtype), zeros


def quantize(weight, bits: int, moments=None) -> QuantizedWeight:
    """Blocks for a weight (rows, columns). With the second moments (columns, columns) of the inputs it meets, ranges
    and zeros are those of least weighted error, and what rounding a column does to the outputs is made up for by the
    columns after it, the weightiest first (GPTQ, Frantar et al. 2022)."""
    top, blocks = (
        2**bits - 1,
        weight.float().unflatten(1, (-1, math.gcd(weight.shape[1], BLOCK[bits]))),
    )
    low, high = (
        blocks.amin(-1, keepdim=True).clamp(max=0),
        blocks.amax(-1, keepdim=True).clamp(min=1e-6),
    )
    middle, least = (-low / (high - low) * top).round(), None
    importance = 1 if moments is None else moments.diagonal().view(blocks.shape[1:])
    for share, shift in ((1, 0),) if moments is None else itertools.product(SHARES, (0, -1, 1)):
        scale = ((high - low) * (share / top)).half().float().clamp(min=1e-7)
        zero = (middle + shift).clamp(0, top)
        codes = (blocks / scale + zero).round().clamp(0, top)
        error = (((codes - zero) * scale - blocks).square() * importance).sum(-1, keepdim=True)
        found = error, scale, zero
        least = (
            found
            if least is None
            else [torch.where(error < least[0], *both) for both in zip(found, least)]
        )
    _, scales, zeros = least
    codes = (blocks / scales + zeros).round().clamp(0, top)
    if (
        moments is not None
    ):  # codes for these scales, the scales that suit those best, and codes for these
        factor = inverse_hessian_cholesky(moments)
        steps = gptq(weight, scales, zeros, factor, top) - zeros
        better = (
            (
                (steps * blocks * importance).sum(-1, keepdim=True)
                / (steps.square() * importance).sum(-1, keepdim=True).clamp(min=1e-12)
            )
            .half()
            .float()
        )
        scales = torch.where(better > 1e-7, better, scales)
        codes = gptq(weight, scales, zeros, factor, top)
    return QuantizedWeight(codes, scales, zeros, bits)


def inverse_hessian_cholesky(moments) -> tuple:
    """The order of columns, the weightiest first, and the upper Cholesky factor of the damped moments' inverse."""
    order = moments.diagonal().argsort(descending=True)
    moments = moments + 0.03 * moments.diagonal().mean() * torch.eye(len(moments))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order]))
    return order, torch.linalg.cholesky(inverse, upper=True)


def gptq(weight, scales, zeros, factor: tuple, top: int):
    """The codes of `nearest`, column by column."""
    (_, groups, _), columns, (order, upper) = scales.shape, weight.shape[1], factor
    block = columns // groups
    w, scales, zeros = (
        x.flatten(1).t()[order].contiguous()
        for x in (  # a column is a row here: memory in one piece
            weight.float(),
            scales.expand(-1, -1, block),
            zeros.expand(-1, -1, block),
        )
    )
    codes, errors = torch.empty_like(w), torch.empty(block, len(weight))
    for start in range(0, columns, block):
        stop = start + block
        for i in range(start, stop):
            codes[i] = (w[i] / scales[i] + zeros[i]).round().clamp(0, top)
            error = errors[i - start] = (w[i] - (codes[i] - zeros[i]) * scales[i]) / upper[i, i]
            w[i:stop].addr_(upper[i, i:stop], error, alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return codes[order.argsort()].t().unflatten(1, (groups, block))


def quantize_weights(lm, bits: int, ids) -> dict:
    """Round the matrices of a model in place; their Blocks by name. Embedding, head and fused query, key and value keep
    8 bits: 4 cost more there than in all others. Keys and values of a source, made once, stay as they are. In 4 bits a
    matrix is rounded for the inputs it meets when `ids` (batch, seq) run through what was rounded before it."""
    linear, blocks = tinylm.linear, {}
    modules = {"embed": lm.embed} | {
        name: m for name, m in lm.named_modules() if isinstance(m, tinylm.Linear)
    }
    names = {
        id(module.weight): name + ".weight"
        for name, module in modules.items()
        if module.weight is not None
        and module.weight.shape[1] % 32 == 0
        and not name.endswith(".kv")
    }

    def put(weight, inputs=None):
        name = names.get(id(weight))
        if name is None or name in blocks:
            return
        wide = (
            bits == 8 or name in ("embed.weight", "head.out.weight") or name.endswith("qkv.weight")
        )
        moments = None if wide or inputs is None else inputs.t() @ inputs / len(inputs)
        blocks[name] = quantize(weight.data, 8 if wide else bits, moments)
        weight.data = blocks[name].weight()

    def rounded(x, weight, bias=None):
        put(weight, x.flatten(0, -2))
        return linear(x, weight, bias)

    with torch.no_grad():
        put(lm.embed.weight)
        if bits < 8 and ids is not None:
            with mock.patch.object(tinylm, "linear", rounded):
                lm(
                    ids,
                    decoder_input_ids=ids if lm.encoder else None,
                    columns=torch.zeros_like(ids[:, :1]),
                )
        for module in modules.values():
            if module.weight is not None:
                put(module.weight)
    return blocks


def scale_cache(lm, ids):
    """Give every layer the scales (1, kv_heads, 1, head_dim) by which its keys and values fit into 8 bits, as large as
    ids (batch, seq) ask for. Channels of a key that turn together share theirs, so that it holds at every position."""
    half = lm.config.rotary_dim // 2

    def see(attention, k, v):
        turning = torch.hypot(k[..., :half], k[..., half : 2 * half])
        k = torch.cat((turning, turning, k[..., 2 * half :]), -1)
        attention.k_scale, attention.v_scale = (
            x.abs().amax((0, 1))[None, :, None].clamp(min=1e-6) / 127 for x in (k, v)
        )
        return k, v

    with torch.no_grad(), keys_and_values(lm, see):
        lm(ids, columns=torch.zeros_like(ids[:, :1]))


def round_to_scale(attention, k, v):
    """Keys and values as a cache of 8 bits gives them back."""
    return [
        (x / scale[:, :, 0]).round().clamp(-128, 127) * scale[:, :, 0]
        for x, scale in ((k, attention.k_scale), (v, attention.v_scale))
    ]


def keys_and_values(lm, change):
    """While it lasts, `change(attention, k, v)` sees keys and values (batch, seq, kv_heads, head_dim) of every layer on
    their way into tinylm's `attend`, and says what goes on."""
    attend = tinylm.attend

    def changed(q, k, v, mask, head_dim, scale, softcap, dropout, cache, layer, causal):
        k, v = change(
            lm.layers[layer].attention, *(x.unflatten(-1, (-1, head_dim)) for x in (k, v))
        )
        return attend(
            q,
            k.flatten(2),
            v.flatten(2),
            mask,
            head_dim,
            scale,
            softcap,
            dropout,
            cache,
            layer,
            causal,
        )

    return mock.patch.object(tinylm, "attend", changed)


# ---------------------------------------------------------------------------------------------------------------------
# Verifying: the file that was written, against torch
# ---------------------------------------------------------------------------------------------------------------------


def verify(lm, folder: Path, precision: str, stored: Precision) -> dict:
    """Largest difference from torch, relative to the largest value, per check; of ids the number of equal ones. Raises
    Error where one is too large or, in fp32, where ids differ."""

    def reference(ids, mask, **more):
        with (
            torch.no_grad(),
            keys_and_values(lm, round_to_scale) if stored.cache else contextlib.nullcontext(),
        ):
            more = {name: torch.from_numpy(x) for name, x in more.items()}
            return lm(torch.from_numpy(ids), torch.from_numpy(mask), **more).float().numpy()

    found = {}
    for name, ours, theirs in checks(lm, OnnxLM(folder, precision, providers=[CPU]), reference):
        if np.issubdtype(theirs.dtype, np.integer):
            if (
                stored.exact
            ):  # elsewhere a near tie of random ids says nothing; `measure` counts on real ones
                found[name] = equal_columns(ours, theirs)
                require(
                    found[name] == theirs.shape[1],
                    f"verify: {precision} {name} differ from torch after "
                    f"{found[name]} of {theirs.shape[1]}",
                )
        else:
            error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            found[name] = max(error, found.get(name, 0.0))
            require(
                error <= stored.tolerance,
                f"verify: {precision} {name} differs from torch by {error:.1e} of the "
                f"largest value, expected at most {stored.tolerance:.0e}",
            )
    return found


def equal_columns(a, b) -> int:
    """So many columns, from the first, are equal in all rows."""
    return int((a == b).all(0).cumprod().sum()) if a.shape == b.shape else 0


def examples(lm) -> dict:
    """Name -> random ids (2, seq) and their mask: whole, or the second row padded on one side."""
    rng, limit, found = np.random.default_rng(0), min(lm.config.max_position_embeddings, 64), {}
    ids, short = rng.integers(0, lm.config.vocab_size, (2, max(2, limit // 4))), max(1, limit // 8)
    rows = {
        "prefill": slice(None),
        "left padding": slice(-short, None),
        "right padding": slice(short),
    }
    for name, real in rows.items():
        mask = np.ones_like(ids)
        mask[1], mask[1, real] = 0, 1
        found[name] = ids, mask
    return found


def checks(lm, onnx_lm, reference):
    """(name, what OnnxLM says, what torch says) of padded batches and, where text is written, of a step after others
    and of greedy tokens."""
    for name, (ids, mask) in examples(lm).items():
        more = {"decoder_input_ids": ids[:, ::-1].copy()} if lm.encoder else {}
        if kinds := lm.config.type_vocab_size:
            more["token_type_ids"] = ids % kinds
        expected = reference(ids, mask, **more)
        seen = mask.astype(bool) if expected.ndim == 3 and not lm.encoder else slice(None)
        yield name, onnx_lm(ids, mask, **more)[seen], expected[seen]
        if onnx_lm.past and name == "left padding":
            text, real = (
                (more["decoder_input_ids"], np.ones_like(ids)) if lm.encoder else (ids, mask)
            )
            source, start = (onnx_lm.source(ids, mask), 1) if lm.encoder else (None, ids.shape[1])
            _, past = onnx_lm.step(text[:, :-1], real[:, :-1], source=source)
            yield "decode", onnx_lm.step(text[:, -1:], real, past, source)[0], expected[:, -1:]
            new = min(32, lm.config.max_position_embeddings - start)
            options = dict(max_new_tokens=new, eos_token_id=(), num_beams=1)
            theirs = lm.generate(*map(torch.from_numpy, (ids, mask)), **options).numpy()
            yield (
                "greedy tokens",
                onnx_lm.generate(ids, mask, **options)[:, start:],
                theirs[:, start:],
            )


def check_loop(lm, onnx_lm, path: Path):
    """The graph that generates says, greedily and sampled, what OnnxLM does with the one it was made of."""
    session = Session(path, ort.SessionOptions(), [CPU])
    ids = np.repeat(examples(lm)["prefill"][0][:1], 2, 0)
    new = min(24, lm.config.max_position_embeddings - ids.shape[1])
    for options in ({}, dict(temperature=0.8, top_k=40, top_p=0.95), dict(temperature=1.0)):
        ours = onnx_lm.generate(
            ids, max_new_tokens=new, eos_token_id=(), seed=3, num_beams=1, **options
        )
        generation_config = dict(temperature=0.0, top_k=0, top_p=1.0) | options
        feeds = {
            name: np.array(value, np.float32 if isinstance(value, float) else None)
            for name, value in generation_config.items()
        }
        (text,) = session(
            input_ids=ids,
            max_new_tokens=np.array(new),
            seed=np.array(3),
            eos_token_id=np.array([-1]),
            **feeds,
        )
        require(
            np.array_equal(text.numpy(), ours),
            f"verify: {path.name} with {options or 'temperature 0'} differs "
            f"from OnnxLM after {equal_columns(text.numpy(), ours)} of {ours.shape[1]} columns",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Exporting
# ---------------------------------------------------------------------------------------------------------------------


def export_onnx(
    lm_or_folder,
    out,
    onnx: bool = True,
    safetensors: bool = True,
    log=None,
    precisions=("fp32",),
    text: str | None = None,
    generate: bool = False,
    int8_cache: bool = False,
) -> dict:
    """Write the folder `out` from a TinyLM or a checkpoint folder: config, tokenizer and model.safetensors in the
    stored dtype, and the graphs in onnx/ in each of the precisions (keys of PRECISIONS), of a decoder with
    genai_config.json for the first of them, and with `generate` onnx/generate.onnx: prefill, cache, sampling and
    stopping in one graph. Weights of 4 bits and, with `int8_cache`, keys and values (in all but fp32) are rounded for a
    text such as the model will meet; without one, for what it writes by itself. Returns what `verify` found, by
    precision. The folder appears whole, after its check, or not at all; an earlier export in its place is replaced.

    Raises Error (or tinylm's) where the checkpoint cannot be read or a check fails.
    """
    out, log, found = Path(out).resolve(), log or (lambda text: None), {}
    require(
        not out.exists() or out.is_dir() and (not any(out.iterdir()) or (out / MARK).exists()),
        f"{out}: exists and is no ONNX export; name another folder with --out",
    )
    for name in precisions:
        require(name in PRECISIONS, f"precision {name!r}: expected one of {', '.join(PRECISIONS)}")
    if isinstance(lm_or_folder, tinylm.TinyLM):
        lm, extras = copy.deepcopy(lm_or_folder), []
    else:
        source = tinylm.find_checkpoint(lm_or_folder).resolve()
        require(
            out not in (source, *source.parents),
            f"{out}: is the checkpoint itself, or holds it; name another folder",
        )
        log(f"loading {lm_or_folder}")
        head = None if is_embedder(source) else "config"
        lm = tinylm.TinyLM.from_pretrained(source, head=head)
        extras = sentence_files(source)
    work = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        work.mkdir(parents=True)
        lm.save_pretrained(work)
        for name in extras:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, work / name)
        (work / MARK).write_text("")
        log(f"model.safetensors {megabytes(work / 'model.safetensors')}")
        if onnx:
            found = write_graphs(
                lm, work, list(dict.fromkeys(precisions)), text, generate, int8_cache, log
            )
        if not safetensors:
            (work / "model.safetensors").unlink()
        replace_directory(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def write_graphs(
    lm, folder: Path, precisions: list, text: str | None, generate: bool, int8_cache: bool, log
) -> dict:
    """onnx/ of a folder, each precision verified and, if there is more than fp32, measured."""
    lm, found = lm.to("cpu", torch.float32).eval(), {}
    writes = lm.config.causal and lm.config.head == "lm" and not lm.config.num_encoder_layers
    require(writes or not generate, "--generate: the model is no decoder that writes text")
    told = [
        name
        for name in (
            "no_repeat_ngram_size",
            "min_length",
            "bad_words_ids",
            "forced_bos_token_id",
            "forced_eos_token_id",
        )
        if lm.generation_config.get(name)
    ]
    told += ["repetition_penalty"] * (
        lm.generation_config.get("repetition_penalty", 1) not in (None, 1)
    )
    require(
        not (generate and told),
        f"--generate: generation_config.json has {', '.join(told)}, which the graph lacks",
    )
    caches = [name for name in precisions if writes and groups_queries(lm.config, PRECISIONS[name])]
    require(
        caches or not int8_cache,
        f"--int8-cache: no graph of {', '.join(precisions)} groups queries",
    )
    (folder / "onnx").mkdir()
    measured = text is not None or precisions != ["fp32"]
    ids = calibration_ids(lm, text, writes) if measured else None
    rounded = {0: (lm, {})}
    log(f"tracing {sum(p.numel() for p in lm.parameters()):,} parameters")
    for name in precisions:
        stored = PRECISIONS[name]
        if int8_cache and name in caches:
            stored = replace(
                stored, cache="int8", tolerance=0.1
            )  # a hair's breadth may tip what is rounded
        if stored.bits not in rounded:
            log(f"rounding to {stored.bits} bits")
            model = copy.deepcopy(lm)
            rounded[stored.bits] = (
                model,
                quantize_weights(model, stored.bits, None if ids is None else ids[MEASURED:]),
            )
        model, blocks = rounded[stored.bits]
        if stored.cache:
            scale_cache(model, ids[MEASURED:])
        traced = copy.deepcopy(model).to(getattr(torch, stored.dtype))
        try:
            graphs = {
                graph.stem: trace(traced, graph, blocks) for graph in graphs_of(lm.config, stored)
            }
            if generate:
                graph = generate_graph(lm.config, stored)
                graphs[graph.stem] = in_a_loop(trace(traced, graph, blocks), lm.config, stored)
        except Exception as error:  # the exporter's own have no common base
            raise Error(f"onnx: the trace of {name} failed ({first_line(error)})") from error
        graphs = {
            folder / "onnx" / f"{stem}{stored.suffix}.onnx": model for stem, model in graphs.items()
        }
        write_all(graphs)
        found[name] = verify(model, folder, name, stored)
        log(f"{name} verified against torch: " + format_differences(found[name]))
        if blocks:
            write_all(graphs, accuracy_level=4)
            rough = verify(model, folder, name, replace(stored, tolerance=math.inf))
            log(f"{name} in 8-bit arithmetic: {format_differences(rough)}")
        for path in graphs:
            log(f"onnx/{path.name} {megabytes(path)}")
        if generate:
            check_loop(lm, OnnxLM(folder, name, providers=[CPU]), path)
            log(f"onnx/{path.name} writes what onnx/model{stored.suffix}.onnx does")
        if measured and writes:
            log(f"{name} " + measure(lm, folder, name, ids[:MEASURED]))
    if large := {
        path.name: True
        for path in (folder / "onnx").glob("*.onnx")
        if Path(f"{path}_data").exists()
    }:
        config = tinylm.read_json(folder / "config.json")  # where browsers look
        config["transformers.js_config"] = {"use_external_data_format": large}
        tinylm.write_json(folder / "config.json", config)
    if writes:
        tinylm.write_json(folder / "genai_config.json", genai_config(lm, PRECISIONS[precisions[0]]))
    return found


def write_all(graphs: dict, **attributes):
    """Write models to their paths, with attributes for the products with rounded weights."""
    for path, model in graphs.items():
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type == "MatMulNBits":
                node.attributes.update(
                    {name: ir.AttrInt64(name, value) for name, value in attributes.items()}
                )
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        ir.save(
            model, path, **({"external_data": path.name + "_data"} if size > EXTERNAL_ABOVE else {})
        )


def format_differences(found: dict) -> str:
    return ", ".join(
        f"{check} {value:.1e}" if isinstance(value, float) else f"{value} {check} equal"
        for check, value in found.items()
    )


def calibration_ids(lm, text: str | None, writes: bool):
    """Windows (windows, WINDOW) of a text, or of what a decoder writes by itself; None where there is neither."""
    length = min(WINDOW, lm.config.max_position_embeddings)
    if text is not None:
        require(lm.tokenizer, "--text: the checkpoint has no tokenizer.json")
        ids = lm.tokenizer.encode(text)
        count = min(len(ids) // length, WINDOWS)
        require(
            count > MEASURED,
            f"--text: {len(ids)} tokens, expected at least {(MEASURED + 1) * length}",
        )
        return torch.tensor(ids[: count * length]).view(count, length)
    if not writes:
        return None
    begin = lm.config.bos_token_id if lm.config.bos_token_id in range(lm.config.vocab_size) else 0
    return lm.generate(
        torch.full((WINDOWS, 1), begin),
        max_new_tokens=length - 1,
        temperature=1.0,
        eos_token_id=(),
        seed=0,
        num_beams=1,
    )


def measure(lm, folder: Path, precision: str, ids) -> str:
    """What a precision costs against torch in fp32, on windows of ids that it was not rounded for."""
    onnx_lm, array, half = (
        OnnxLM(folder, precision, providers=[CPU]),
        ids.numpy(),
        ids.shape[1] // 2,
    )

    def perplexity(model):
        rows = array if model is onnx_lm else ids
        logits = torch.cat([torch.as_tensor(model(row[None]))[0, :-1] for row in rows])
        return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).exp())

    with torch.no_grad():
        before, after = perplexity(lm), perplexity(onnx_lm)
    options = dict(max_new_tokens=max(1, min(32, half)), eos_token_id=(), num_beams=1)
    new = slice(half, None)
    ours, theirs = (
        onnx_lm.generate(array[:, :half], **options)[:, new],
        lm.generate(ids[:, :half], **options)[:, new],
    )
    agree = (ours == theirs.numpy()).cumprod(1).mean()
    begin = time.monotonic()
    onnx_lm.generate(array[:1, :1], **options)
    speed = options["max_new_tokens"] / (time.monotonic() - begin)
    return (
        f"perplexity {after:.3f} (torch in fp32 {before:.3f}, {after / before - 1:+.2%}), {agree:.0%} of greedy "
        f"tokens before the first that differs, {speed:.0f} tokens/s"
    )


def replace_directory(work: Path, out: Path):
    """Rename a folder; what had the name before goes, unless the renaming fails."""
    old = work.with_suffix(".old")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(work, out)
    except BaseException:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def megabytes(path: Path) -> str:
    size = sum(p.stat().st_size for p in path.parent.glob(path.name + "*"))
    return f"{size / 1e6:.1f} MB"


def genai_config(lm, stored: Precision) -> dict:
    """The settings of onnxruntime-genai for a graph."""
    config, layers = lm.config, lm.config.num_hidden_layers
    ends = lm.ends()
    pad = lm.special_token_id("pad_token_id")
    if (
        pad not in range(config.vocab_size) or pad in ends
    ):  # it wants one that ends nothing: of the last, used least
        pad = next(i for i in reversed(range(config.vocab_size)) if i not in ends)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"onnx/model{stored.suffix}.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")},
        "outputs": {"logits": "logits"}
        | {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")},
    }
    begin = config.bos_token_id if config.bos_token_id is not None else ends[0] if ends else 0
    search = {
        "do_sample": False,
        "max_length": config.max_position_embeddings,
        "past_present_share_buffer": groups_queries(config, stored),
    }
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "bos_token_id": begin,
            "context_length": config.max_position_embeddings,
            "eos_token_id": list(ends) or [pad],
            "pad_token_id": pad,
            "decoder": decoder,
        },
        "search": search,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list | None = None) -> int:
    """`export.py [FOLDER] --onnx` exports."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run_export(argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever it is, of whichever library: one line
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        print(f"tinylm-export: error: {kind}{first_line(error)}", file=sys.stderr)
        return 1


def run_export(argv: list) -> int:
    parser = argparse.ArgumentParser(
        prog="tinylm export",
        description="Turn a checkpoint into safetensors and ONNX "
        "graphs in one folder, verified against torch, and try it; `run FOLDER INPUT...` "
        "runs it later.",
    )
    parser.add_argument(
        "folder", nargs="?", default=str(WEIGHTS), help="a checkpoint (default: the shipped one)"
    )
    parser.add_argument(
        "--onnx", action="store_true", help="write onnx/*.onnx, beside model.safetensors"
    )
    parser.add_argument(
        "--safetensors", action="store_true", help="write model.safetensors alone, without --onnx"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=[*PRECISIONS, "all"],
        default=["fp32"],
        metavar="PRECISION",
        help=f"{', '.join(PRECISIONS)} or all; loaders take the first (default: fp32)",
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="also onnx/generate*.onnx: the whole of generation, "
        "cache, sampling and stopping, in one graph and one call",
    )
    parser.add_argument(
        "--int8-cache",
        action="store_true",
        help="keys and values in 8 bits (in all but fp32): a "
        "quarter of the memory, and long texts are written faster; not for optimum and transformers.js",
    )
    parser.add_argument(
        "--text",
        help="file of text such as the model will meet: weights of 4 bits are rounded for "
        "it, and every precision is measured on it",
    )
    parser.add_argument("--out", default="exported", help="folder to write (default: exported)")
    parser.add_argument(
        "--prompt",
        help="text that the exported model continues, greedily (default: 'ROMEO:', "
        "sampled), or reads",
    )
    parser.add_argument("--max-new-tokens", type=int, default=160)
    options = parser.parse_args(argv)
    if not (options.onnx or options.safetensors):
        parser.error("nothing to do: give --onnx, --safetensors or both")
    if not options.onnx and (
        options.generate or options.int8_cache or options.text or options.prompt
    ):
        parser.error("--generate, --int8-cache, --text and --prompt go with --onnx")
    begin = time.monotonic()
    precisions = [*PRECISIONS] if "all" in options.precision else options.precision
    text = Path(options.text).read_text(encoding="utf-8") if options.text else None
    export_onnx(
        options.folder,
        options.out,
        onnx=options.onnx,
        precisions=precisions,
        text=text,
        generate=options.generate,
        int8_cache=options.int8_cache,
        log=lambda text: print(f"[{time.monotonic() - begin:5.1f} s] {text}", flush=True),
    )
    print(f"[{time.monotonic() - begin:5.1f} s] wrote {options.out}", flush=True)
    if options.onnx:
        lm = OnnxLM(options.out, precisions[0])
        if lm.task == "lm":
            sampled = {} if options.prompt else {"temperature": 0.7, "seed": 1}
            show(lm, options.prompt or "ROMEO:", options.max_new_tokens, **sampled)
        elif options.prompt:
            run_lines(lm, [options.prompt], max_new_tokens=options.max_new_tokens)
    return 0


def show(lm: OnnxLM, prompt: str, max_new_tokens: int, **options):
    """Print a continuation as it comes, then its speed after the first token."""
    if not (lm.folder / "tokenizer.json").exists():
        return print("no sample: the checkpoint has no tokenizer.json")
    print(f"\n{prompt}", end="", flush=True)
    times, ids = [], lm.tokenizer.encode(prompt)
    max_new_tokens = max(1, min(max_new_tokens, lm.session.limit - len(ids)))

    def timed():
        for token in lm.tokens(ids, max_new_tokens, **options):
            times.append(time.monotonic())
            yield token

    for piece in stream_text(lm.tokenizer, timed(), prompt=ids):
        print(piece, end="", flush=True)
    speed = f", {(len(times) - 1) / (times[-1] - times[0]):.0f} tokens/s" if len(times) > 1 else ""
    print(f"\n\n{lm.provider}{speed}")


if __name__ == "__main__":
    sys.exit(main())
