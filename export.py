"""From a checkpoint to deployment: safetensors and a verified ONNX graph in one folder that every loader takes.

    python export.py --onnx                           # the shipped model
    python export.py SmolLM2-135M-Instruct --onnx --out smollm2 --prompt "The capital of France is"

    from onnxlm import OnnxLM                         # numpy, onnxruntime and tokenizers; no torch
    for piece in OnnxLM("smollm2").stream("The capital of France is"): print(piece, end="")

The graph is traced from the model of tinylm.py itself: only its leaves (`rms_norm`, `rotate`, `attend`, `linear`) are
swapped for single ONNX operators, which ONNX Runtime has fast kernels for on CPU and CUDA and would not find by
itself in their written-out form. A leaf that somebody replaced is traced as it is. Names and axes are those of optimum
and transformers.js.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    ON_CPU,
    SUFFIXES,
    TRAINING,
    OnnxLM,
    Session,
    as_ids,
    encode_windows,
    first_line,
    has_chat_template,
    is_embedder,
    is_number_in,
    plain_warnings,
    progress_bar,
    remembered,
    run_lines,
    sentence_files,
    use_utf8,
)
from tinylm import Error, require

if __package__:  # installed
    from . import pretrained
else:  # beside each other
    import pretrained

# The model shipped beside this file.
WEIGHTS = Path(__file__).resolve().parent / "weights"
# A folder with this file may be replaced by the next export.
MARK = ".tinylm-export"
# The first opset with Attention, RotaryEmbedding and RMSNormalization.
OPSET = 23
# Bits -> the most weights in a row that share a scale.
BLOCK = {4: 32, 8: 64}
# Shorter blocks are padded to this.
LEAST_BLOCK = 32
# Shares of a block's range that are tried for the least error.
SHARES = (1.1, 1.05, 1, 0.95, 0.9, 0.85, 0.8, 0.75)
# What is added to the moments' diagonal, in shares of its mean. Less of it, as GPTQ's usual 0.01, serves the text that
# they are measured on better and other texts worse.
DAMPING = 0.3
# Multiples of the median range that a column of inputs is limited to, powers of what exceeds it, and inputs to try on.
LIMITS, POWERS, SAMPLE = (1, 1.5, 2.5), (0.75, 1), 768
# Columns of inputs that stay in floats, and by how much that has to lessen the error.
OUTLIERS, PRICE = 8, 1.5
# Rows that are searched at a time.
ROWS = 256
# The tensors that store a rounded matrix.
PARTS = ("blocks", "scales", "zero_points")
# Bytes of weights above which they go into a file of their own, which ONNX Runtime maps into memory: a graph loads in
# two thirds of the time. (A protobuf file ends at 2 GiB.)
EXTERNAL_ABOVE = 10**8
# Bytes of a weight that goes there.
SMALL = 1024
# Tokens in a window of text, windows to calibrate rounding on, and windows to measure on.
WINDOW, WINDOWS, MEASURED = 256, 28, 8
# The same of text for encoders, which has special tokens around each window.
READ, READS = 64, 80


@dataclass(frozen=True)
class Precision:
    """How the numbers of a graph are stored.

    tolerance: largest difference from torch with the same weights, relative to the largest value, before the products
    with rounded weights are told to compute in 8 bits; dtype: of what flows through the graph, and of weights that are
    not rounded; bits: of its matrices, but 8 for embedding and head, and 0 where they are as dtype; exact: greedy
    decoding must say what torch says; cache: dtype of keys and values in a decoder's cache, where it is another.
    """

    name: str
    tolerance: float
    dtype: str = "float32"
    bits: int = 0
    exact: bool = False
    cache: str = ""

    @property
    def suffix(self) -> str:
        """The end of its file names in onnx/."""
        return SUFFIXES[self.name]

    @property
    def cuda(self) -> bool:
        """Whether all its nodes have CUDA kernels."""
        return self.name in CUDA_PRECISIONS


PRECISIONS = {
    "fp32": Precision("fp32", 2e-4, exact=True),
    "fp16": Precision("fp16", 0.2, "float16"),
    "int8": Precision("int8", 1e-3, bits=8),
    "int4": Precision("int4", 1e-3, bits=4),
    "q4f16": Precision("q4f16", 0.2, "float16", bits=4),
}


# ---------------------------------------------------------------------------------------------------------------------
# Tracing: the model's leaves as single operators
# ---------------------------------------------------------------------------------------------------------------------


def is_own(leaf) -> bool:
    """Whether the leaf is tinylm's own and not a replacement."""
    return getattr(leaf, "__globals__", None) is vars(tinylm)


def operator(name: str, inputs: tuple, like, *shapes, rest=None, **attributes):
    """Adds a single ONNX node in place of a traced function. Its outputs have the given `shapes` (default: that of `like`)
    and the dtype of `like`; outputs after the first have that of `rest`, if given."""
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
    """Attention as one operator, which splits the heads and appends to the past by itself. Keys of a source come with
    heads already split, as they are kept between calls."""
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


def expand_mask(attend):
    """Expands the mask of a replaced `attend` to one row per query, as ONNX Attention requires."""

    def expanded(q, k, v, mask, *arguments, **options):
        if mask is not None:
            mask = mask.expand(-1, -1, q.shape[1], -1)
        return attend(q, k, v, mask, *arguments, **options)

    return expanded


def onnx_linear(x, weight, bias=None):
    """A product with a weight, which `put_weights` makes ONNX operators of."""
    y = operator("tinylm::Linear", (x, weight), x, (*x.shape[:-1], weight.shape[0]))
    return y if bias is None else y + bias


OPERATORS = {
    "rms_norm": onnx_rms_norm,
    "rotate": onnx_rotate,
    "attend": onnx_attend,
    "linear": onnx_linear,
}


def grouped_attention(self, x, rope, mask, cache, layer, keys_values=None):
    """tinylm's `Attention.forward` as ONNX Runtime's GroupQueryAttention, which applies rotary positions from a table,
    writes keys and values behind the past (in place, where past and present share a buffer) and masks by lengths."""
    qkv = self.qkv(x)
    inputs = qkv, None, None
    if not isinstance(self.q_norm, nn.Identity):
        q, k, v = qkv.split(self.sizes, dim=-1)
        inputs = self.q_norm(q), self.k_norm(k), v
    options = {
        "num_heads": self.sizes[0] // self.head_dim,
        "kv_num_heads": self.sizes[1] // self.head_dim,
        "scale": self.scale,
        "do_rotary": int(rope is not None),
    }
    if self.softcap:
        options["softcap"] = self.softcap
    if cache.windows[layer]:
        options["local_window_size"] = cache.windows[layer]
    more = (*cache.lengths, *(rope or (None, None)))
    if cache.scales:
        more = (*more, None, None, None, *cache.scales[layer])
        options |= {"kv_cache_bit_width": 8}
        options |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    like = qkv[..., : self.sizes[0]]
    name = "com.microsoft::GroupQueryAttention"
    return self.o(cache.append(layer, name, inputs, x.shape[1], like, more, **options))


class Past:
    """Replaces tinylm's KVCache in an exported graph: past comes in, a longer present goes out.

    past: keys and values of every layer, (batch, kv_heads, past, head_dim); positions (batch, seq) of the new tokens;
    of grouped attention: lengths, what each row and the longest of them hold, and by layer the window (or False) and,
    of keys and values of 8 bits, their scales.
    """

    first = False  # the past may have any length

    def __init__(self, past: list, positions, lengths=(), windows=(), scales=()):
        self.past = past
        self.positions = positions
        self.lengths = lengths
        self.windows = windows
        self.scales = scales
        self.present = [None] * len(past)

    def append(
        self, layer: int, name: str, inputs: tuple, new: int, like, more: tuple = (), **attributes
    ):
        """A layer's attention operator, which adds `new` columns to its cache."""
        past = self.past[2 * layer : 2 * layer + 2]
        batch, heads, length, width = past[0].shape
        longer = batch, heads, length + new, width
        shapes = like.shape, longer, longer
        inputs = (*inputs, *past, *more)
        x, *present = operator(name, inputs, like, *shapes, rest=past[0], **attributes)
        self.present[2 * layer : 2 * layer + 2] = present
        return x

    def update(self, layer: int, k, v) -> list:
        """All keys and values of a layer, the new ones behind the past, for an `attend` that is traced operation by operation."""
        past = self.past[2 * layer : 2 * layer + 2]
        present = [torch.cat((old, new), 2) for old, new in zip(past, (k, v))]
        self.present[2 * layer : 2 * layer + 2] = present
        return present

    def extend(self, mask):
        """Positions of queries and keys. The mask covers past and new tokens."""
        columns = self.past[0].shape[2] + self.positions.shape[1]
        # The mask's length has its own symbol, and the tracer could not prove that the two are equal.
        mask = operator("Identity", (mask,), mask, (mask.shape[0], columns))
        return self.positions, tinylm.count_positions(mask)[1]

    def outputs(self) -> list:
        for i, x in enumerate(self.present):
            require(x is not None, f"layer {i // 2} leaves the cache as it is")
        return self.present


@dataclass(frozen=True)
class Graph:
    """A graph to trace. `forward(lm, inputs by name)` returns the list of its outputs."""

    stem: str  # of its file
    forward: object
    inputs: dict  # name -> dtype and axes: sizes, or names where the size varies
    outputs: list
    grouped: bool = False  # its attention is ONNX Runtime's GroupQueryAttention


def key_values(config, prefix: str, sides: dict, dtype: str = "float32") -> dict:
    """Names of keys and values -> dtype and axes; sides: part of the name ("decoder", "encoder") -> its length's axis."""
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
OPTIONS = {
    "temperature": ("float32",),
    "top_k": ("int64",),
    "top_p": ("float32",),
    "seed": ("int64",),
    "eos_token_id": ("int64", "eos_tokens"),
}
SOURCE_IDS = ("int64", "batch_size", "encoder_sequence_length")


def groups_queries(lm) -> bool:
    """Whether GroupQueryAttention can compute the model's attention."""
    config = lm.config
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    # the others rotate by a table of all positions, which must not depend on a row's length
    fixed = config.position == "rope" and kind not in ("dynamic", "longrope")
    fits = config.head_dim % 16 == 0 and config.rotary_dim % 16 == 0
    return fixed and fits and has_own_attention(lm)


def has_own_attention(lm) -> bool:
    """Whether no part of the model's attention was replaced."""
    attentions = [getattr(block, "attention", None) for block in lm.layers]
    forwards = [getattr(m, "forward", None) for m in (*attentions, *lm.rotary.values())]
    return all(map(is_own, (tinylm.attend, tinylm.rotate, *forwards)))


def decoder_graph(lm, stored: Precision) -> list:
    """A decoder with a cache. The mask covers past and new tokens and determines the positions. The number of columns
    of `position_ids`, which all loaders pass, says for how many of the last tokens logits are computed. In fp32,
    where GroupQueryAttention has no CUDA kernel, the CPU has a graph of its own with it."""
    dtype = stored.cache or stored.dtype
    past = key_values(lm.config, "past_key_values", {"": "past_sequence_length"}, dtype)

    def forward(lm, feed, grouped):
        return decoder_step(lm, feed, [feed[name] for name in past], stored, grouped)

    inputs = {
        "input_ids": IDS,
        "attention_mask": ("int64", "batch_size", "total_sequence_length"),
        "position_ids": ("int64", "batch_size", "logits_length"),
    }
    outputs = ["logits", *key_values(lm.config, "present", {"": ""})]

    def graph(stem, grouped):
        return Graph(stem, partial(forward, grouped=grouped), inputs | past, outputs, grouped)

    if stored.exact and groups_queries(lm):
        return [graph("model", False), graph("model" + ON_CPU, True)]
    return [graph("model", groups_queries(lm))]


def decoder_step(lm, feed: dict, past: list, stored: Precision, grouped: bool) -> list:
    """The float32 logits of as many last columns as position_ids has, and the cache after the call."""
    ids = feed["input_ids"]
    mask = feed["attention_mask"]
    seq = ids.shape[1]
    kept = feed["position_ids"].shape[1]
    positions = tinylm.count_positions(mask)[0][:, -seq:]
    last = torch.arange(seq - kept, seq)
    columns = last[None].expand(ids.shape[0], kept)
    lengths = ()
    if grouped:
        # GroupQueryAttention takes rows without leading padding, so padding moves behind.
        new = mask[:, -seq:]
        columns = tinylm.count_positions(new)[0].index_select(1, last)
        ids = ids.gather(1, new.sort(1, descending=True).indices)
        total = operator("Shape", (mask,), mask, (1,), start=1)[0]
        lengths = (mask.sum(1) - 1).int(), total.int()
    windows = tuple(
        kind == "sliding_attention" and lm.config.sliding_window for kind in lm.config.layer_types
    )
    scales = tuple(
        (block.attention.k_scale, block.attention.v_scale) for block in lm.layers if stored.cache
    )
    cache = Past(past, positions, lengths, windows, scales)
    return [lm(ids, mask, cache=cache, columns=columns).float(), *cache.outputs()]


def choice_graph(lm) -> Graph:
    """What follows a decoder step in `in_a_loop`: the choice of a token, and whether all rows have ended."""
    config = lm.config

    def forward(lm, feed):
        text, ended, ends = (feed[name] for name in ("text", "ended", "eos_token_id"))
        options = [feed[name] for name in ("temperature", "top_k", "top_p", "seed", "step")]
        token = torch.cond(
            options[0] > 0,
            choose,
            lambda logits, *_: logits.argmax(-1),
            (feed["logits"][:, 0], *options),
        )
        pad = lm.special_token_id("pad_token_id")
        pad = ends[0] if pad is None or pad < 0 else min(pad, config.vocab_size - 1)
        token = torch.where(ended, pad, token)
        ended = ended | (token[:, None] == ends).any(-1)
        return [~ended.all(), token[:, None], torch.cat((text, token[:, None]), 1), ended]

    inputs = {
        "step": ("int64",),
        "logits": ("float32", "batch_size", 1, config.vocab_size),
        "text": ("int64", "batch_size", "total_sequence_length"),
        "ended": ("bool", "batch_size"),
    }
    outputs = ["go_on", "new_ids", "new_text", "have_ended"]
    return Graph("generate", forward, inputs | OPTIONS, outputs)


def choose(logits, temperature, top_k, top_p, seed, step):
    """tinylm's `sample`, (batch, vocab) -> (batch,), with every option as a tensor."""
    ordered, order = (logits / temperature).sort(descending=True)
    rank = torch.arange(logits.shape[1])
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), -math.inf)
    p = ordered.softmax(-1)
    outside = (top_p < 1) & (rank > 0) & (p.cumsum(-1) - p >= top_p)
    noise = tinylm.uniform(seed, step, *logits.shape).gather(1, order)
    best = (ordered.masked_fill(outside, -math.inf) - (-noise.log()).log()).argmax(-1, keepdim=True)
    return order.gather(1, best)[:, 0]


def join(step, choice):
    """Joins the graphs of a decoder step and of the choice that follows into the body of a Loop. Its inputs are the
    turn, whether to go on, new ids, all ids, which rows have ended, and the cache; its outputs are the last five."""
    ids, mask, kept, *past = step.inputs
    logits, *present = step.outputs
    nodes = list(ir.traversal.RecursiveGraphIterator(choice))
    values = [*choice.inputs, *choice.initializers.values()]
    for value in (*values, *(value for node in nodes for value in node.outputs)):
        value.name = f"choice.{value.name}"
    for node in nodes:
        node.name = f"choice.{node.name}"
    given = {value.name.removeprefix("choice."): value for value in choice.inputs}
    outputs = [*choice.outputs]
    first = ir.val("first", const_value=ir.tensor(np.array([0]), name="first"))
    ones = ir.tensor(np.ones(1, np.int64))
    shape = ir.node("Shape", [given["text"]])
    every = ir.node("ConstantOfShape", shape.outputs, {"value": ones})
    column = ir.node("Gather", [ids, first], {"axis": 1})
    for node, name in ((shape, "shape"), (every, "every"), (column, "column")):
        node.name = node.outputs[0].name = f"choice.{name}"
    for old, new in ((mask, every), (kept, column)):
        new.outputs[0].type, new.outputs[0].shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new.outputs[0])
    ir.convenience.replace_all_uses_with(given.pop("logits"), logits)
    chosen, constants = list(choice), list(choice.initializers.values())
    choice.inputs.clear()
    choice.outputs.clear()
    choice.initializers.clear()
    choice.remove(chosen)
    step.insert_before(step[0], [shape, every, column])
    step.extend(chosen)
    for value in (*constants, first):
        step.register_initializer(value)
    going_on = ir.val("going_on", ir.DataType.BOOL, [])
    step.inputs[:] = [given["step"], going_on, ids, given["text"], given["ended"], *past]
    step.outputs[:] = [*outputs, *present]
    step.opset_imports.update(choice.opset_imports)
    return step, {name: given[name] for name in OPTIONS}


def in_a_loop(model, choice, config, stored: Precision):
    """Wraps a decoder's graph and the choice of a token in an ONNX Loop: from ids and options to whole sequences in one
    call. The weights stay inside the body, since ONNX Runtime before 1.29 misreads rounded weights of an outer graph."""
    body, inner = join(model.graph, choice.graph)
    given = {}
    for name, value in inner.items():
        # The body reads these from the outer graph.
        given[name] = ir.val(name, value.dtype, value.shape)
        ir.convenience.replace_all_uses_with(value, given[name])
    heads = ir.tensor(np.array([config.num_key_value_heads, 0, config.head_dim]), name="no_past")
    no_past = ir.val(
        heads.name, const_value=heads, type=ir.TensorType(heads.dtype), shape=heads.shape
    )
    prompt = ir.val("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    steps = ir.val("max_new_tokens", ir.DataType.INT64, [])
    nothing = np.zeros(1, stored.cache or stored.dtype)
    false = np.zeros(1, bool)
    batch = ir.node("Shape", [prompt], {"end": 1})
    shape = ir.node("Concat", [batch.outputs[0], no_past], {"axis": 0})
    empty = ir.node("ConstantOfShape", shape.outputs, {"value": ir.tensor(nothing)})
    ended = ir.node("ConstantOfShape", batch.outputs, {"value": ir.tensor(false)})
    past = [empty.outputs[0]] * (2 * config.num_hidden_layers)
    loop = ir.node(
        "Loop",
        [steps, None, prompt, prompt, ended.outputs[0], *past],
        {"body": body},
        num_outputs=3 + len(past),
    )
    nodes = [batch, shape, empty, ended, loop]
    text = loop.outputs[1]
    for i, value in enumerate(value for node in nodes for value in node.outputs):
        # A name that the body does not use.
        value.name = f"loop.{i}"
    for node in nodes:
        node.name = node.outputs[0].name
    text.name, text.type = "sequences", ir.TensorType(ir.DataType.INT64)
    text.shape = ir.Shape(["batch_size", "total_sequence_length"])
    graph = ir.Graph(
        [prompt, steps, *given.values()],
        [text],
        nodes=nodes,
        initializers=[no_past],
        opset_imports=body.opset_imports,
        name="tinylm",
    )
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def encoder_graph(lm, stored: Precision) -> list:
    """A model that reads a text in one call, without a cache."""
    config = lm.config
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * bool(config.type_vocab_size)

    def forward(lm, feed):
        outputs = lm(**feed)
        return [x.float() for x in (outputs.unbind(-1) if config.head == "qa" else [outputs])]

    outputs = {"qa": ["start_logits", "end_logits"], None: ["last_hidden_state"]}.get(
        config.head, ["logits"]
    )
    return [Graph("model", forward, dict.fromkeys(names, IDS), outputs)]


def encoder_decoder_graphs(lm, stored: Precision) -> list:
    """The encoder, and the decoder with two caches: its own tokens', and the source's, which the first call fills."""
    config = lm.config
    # A replaced attend takes keys with heads folded, as in the model.
    folds = not is_own(tinylm.attend)
    plain = {"linear": tinylm.linear, "rms_norm": tinylm.rms_norm}
    sides = {".decoder": "past_sequence_length", ".encoder": "encoder_sequence_length"}
    # The source's cache may be empty.
    past_axes = key_values(config, "past_key_values", sides, stored.dtype)
    outputs = list(key_values(config, "present", sides))
    own_past, source_past = ([n for n in past_axes if side in n] for side in sides)
    own_present, source_present = ([n for n in outputs if side in n] for side in sides)

    def encode(lm, feed):
        return [lm.encoder.states(lm.embed(feed["input_ids"]), feed["attention_mask"])]

    def keys_and_values_of(lm, states):
        found = (block.cross_attention.keys_values(states) for block in lm.layers)
        parts = (part for both in found for part in both)
        unfolded = (rearrange(part, "b s (h d) -> b h s d", d=config.head_dim) for part in parts)
        return [part.contiguous() for part in unfolded]

    def decode(lm, feed):
        past = [feed[name] for name in own_past]
        kept = [feed[name] for name in source_past]
        # The tracer accepts no custom operators inside a branch.
        with mock.patch.multiple(tinylm, **plain):
            kept = torch.cond(
                feed["use_cache_branch"],
                lambda: [x.clone() for x in kept],
                lambda: keys_and_values_of(lm, feed["encoder_hidden_states"]),
            )
        ids = feed["input_ids"]
        encoder_mask = feed["encoder_attention_mask"].bool()[:, None, None, :]
        ones = torch.ones(1, past[0].shape[2] + ids.shape[1], dtype=torch.long)
        cache = Past(past, torch.arange(ones.shape[1])[None, -ids.shape[1] :])
        seen = kept
        if folds:
            # The tracer does not know the sizes of a branch's outputs.
            size = ids.shape[0], config.num_key_value_heads, encoder_mask.shape[3], config.head_dim
            seen = [operator("Identity", (x,), x, size) for x in kept]
            seen = [rearrange(x, "b h s d -> b s (h d)") for x in seen]
        cross_kv = list(zip(seen[::2], seen[1::2]))
        logits = lm(ids, ones, cache=cache, cross_kv=cross_kv, encoder_mask=encoder_mask).float()
        present = dict(zip(own_present, cache.outputs())) | dict(zip(source_present, kept))
        return [logits, *(present[name] for name in outputs)]

    states = (stored.dtype, "batch_size", "encoder_sequence_length", config.hidden_size)
    inputs = {
        "encoder_attention_mask": SOURCE_IDS,
        "input_ids": IDS,
        "encoder_hidden_states": states,
        **past_axes,
        "use_cache_branch": ("bool", 1),
    }
    sources = dict.fromkeys(["input_ids", "attention_mask"], SOURCE_IDS)
    return [
        Graph("encoder_model", encode, sources, ["last_hidden_state"]),
        Graph("decoder_model_merged", decode, inputs, ["logits", *outputs]),
    ]


def has_target(lm) -> bool:
    """Whether a decoder writes behind an encoder, so that it takes two texts."""
    return lm.encoder is not None and lm.config.head == "lm"


def graphs_of(lm, stored: Precision) -> list:
    """The graphs that a model is exported as."""
    if has_target(lm):
        return encoder_decoder_graphs(lm, stored)
    if lm.config.causal and lm.config.head == "lm":
        return decoder_graph(lm, stored)
    return encoder_graph(lm, stored)


class Traced(torch.nn.Module):
    """A graph's forward over a list of tensors, in the order of its inputs."""

    def __init__(self, lm, graph: Graph):
        super().__init__()
        self.lm, self.graph = lm, graph

    def forward(self, tensors):
        return self.graph.forward(self.lm, dict(zip(self.graph.inputs, tensors)))


def trace(lm, graph: Graph):
    """Traces a graph to an onnx_ir.Model, which `put_weights` finishes."""
    axes = [axes for _, *axes in graph.inputs.values()]
    dtypes = [getattr(torch, dtype) for dtype, *_ in graph.inputs.values()]
    sizes = [[SIZES.get(axis, axis) for axis in value] for value in axes]
    arguments = [torch.ones(size, dtype=dtype) for size, dtype in zip(sizes, dtypes)]
    dims = {axis: torch.export.Dim(axis) for axis in SIZES}
    shapes = [{i: dims[axis] for i, axis in enumerate(value) if axis in dims} for value in axes]
    # "no torchvision", and nodes of a branch without a name
    for name in ("_registration", "_core"):
        logging.getLogger(f"torch.onnx._internal.exporter.{name}").setLevel(logging.ERROR)
    with (
        torch.no_grad(),
        single_operators(lm, graph),
        warnings.catch_warnings(),
        # Comparing symbolic shapes with cached ones takes longer than computing them.
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
        mock.patch.object(torch.export.ExportedProgram, "run_decompositions", decompose),
    ):
        # Axes that share names on purpose, and torch's own deprecations.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Traced(lm, graph).eval(),
            (arguments,),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes=(shapes,),
            input_names=[*graph.inputs],
            output_names=graph.outputs,
            optimize=False,
        )
    repeat_layers(program.model.graph, lm)
    passes.IdentityEliminationPass()(program.model)
    program.optimize()
    model = tidy(program.model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        # The axes of optimum, whose callers ask for all logits.
        value.shape = ir.Shape(
            "sequence_length" if str(dim) == "logits_length" else dim for dim in value.shape
        )
    if graph.grouped:
        # present may be written in place, where past is long enough.
        model.metadata_props["shared_cache"] = "1"
    if graph.grouped or lm.config.position in tinylm.LIMITED:
        model.metadata_props["max_position_embeddings"] = str(lm.config.max_position_embeddings)
    if original := tinylm.short_limit(lm.config):
        model.metadata_props[tinylm.ORIGINAL] = str(original)
    return model


ATEN = torch.ops.aten
# Operations that torch.onnx translates under another name.
SYNONYMS = {
    ATEN.to.dtype: ATEN._to_copy.default,
    ATEN.__and__.Tensor: ATEN.bitwise_and.Tensor,
    ATEN.__and__.Scalar: ATEN.bitwise_and.Scalar,
    ATEN.__or__.Tensor: ATEN.bitwise_or.Tensor,
    ATEN.__xor__.Tensor: ATEN.bitwise_xor.Tensor,
}


def decompose(program, table, original=torch.export.ExportedProgram.run_decompositions):
    """Replaces `run_decompositions`, which traces all again, where only synonyms are to be decomposed. table: what
    torch.onnx has no translation for."""
    modules = program.graph_module.modules()
    nodes = [x for module in modules for x in module.graph.nodes if x.op == "call_function"]
    for node in nodes:
        if node.target is ATEN.to.dtype:
            node.args, node.kwargs = node.args[:1], {"dtype": node.args[1]}
        node.target = SYNONYMS.get(node.target, node.target)
    changes = lambda target: getattr(getattr(target, "_schema", None), "is_mutable", False)
    if any(node.target in table or changes(node.target) for node in nodes):
        return original(program, table)
    return program


@contextlib.contextmanager
def single_operators(lm, graph: Graph):
    """A context in which tinylm's own leaves become single operators, and a layer that differs from an earlier one in its
    weights only becomes a node that says so."""
    with contextlib.ExitStack() as patches:
        patch = lambda *what: patches.enter_context(mock.patch.object(*what))
        layers = layer_kinds(lm)
        for name, leaf in OPERATORS.items():
            if is_own(getattr(tinylm, name)):
                patch(tinylm, name, leaf)
            elif name == "attend":
                patch(tinylm, name, expand_mask(tinylm.attend))
        if graph.grouped:
            for block in lm.layers:
                patch(block.attention, "forward", partial(grouped_attention, block.attention))
            for rotary in lm.rotary.values():
                positions = torch.arange(lm.config.max_position_embeddings)[None]
                rotary.cos, rotary.sin = (x[0].to(lm.dtype) for x in rotary(positions))
                patch(rotary, "forward", lambda _, rotary=rotary: (rotary.cos, rotary.sin))
        traced = {}
        for name, (block, kind) in layers.items():
            patch(block, "forward", partial(trace_layer, traced, name, kind, block.forward))
        yield


def layer_kinds(lm) -> dict:
    """Name -> block and a key that is equal where two differ in their weights only; empty where a part of tinylm was
    replaced, which may do something else in each layer."""
    found = {}
    if not all(is_own(getattr(tinylm, leaf)) for leaf in OPERATORS):
        return found
    for path, stack in lm.named_modules():
        for i, block in enumerate(stack.layers if isinstance(stack, tinylm.Stack) else ()):
            kind = [stack.config.layer_types[i]]
            kind += [(name, tuple(x.shape)) for name, x in block.state_dict().items()]
            for name, module in block.named_modules():
                plain = type(module) in (nn.Identity, nn.Dropout) or is_own(module.forward)
                if not plain or module._forward_hooks or module._forward_pre_hooks:
                    return {}
                settings = {key: x for key, x in vars(module).items() if not key.startswith("_")}
                kind.append((name, type(module), repr(settings)))
            found[".".join(filter(None, ("lm", path, f"layers.{i}.")))] = block, tuple(kind)
    return found


def trace_layer(
    traced: dict, name, kind, forward, x, rope, mask, cache, layer, cross_kv, encoder_mask
):
    """Traces a layer, or adds a node that `repeat_layers` replaces by a copy of the layer in `traced` with this `kind`,
    whose inputs and outputs it has besides its own inputs."""
    own = slice(2 * layer, 2 * layer + 2)
    past = [] if cache is None else cache.past[own]
    inputs = [x, *past, *(cross_kv[layer] if cross_kv else ())]
    key = kind, id(rope), id(mask), id(encoder_mask)
    if key in traced:
        first, *values = traced[key]
        shapes = [value.shape for value in values[len(inputs) :]]
        names = {"first": first, "own": name}
        found = operator("tinylm::Layer", (*inputs, *values), x, *shapes, rest=values[-1], **names)
        x, *present = found if past else [found]
    else:
        # Nothing but this layer depends on these.
        x, *rest = inputs = [operator("Identity", (value,), value) for value in inputs]
        if past:
            cache.past[own] = rest[:2]
        if cross_kv:
            cross_kv = {layer: rest[-2:]}
        x = forward(x, rope, mask, cache, layer, cross_kv, encoder_mask)
        present = [] if cache is None else cache.present[own]
        traced[key] = name, *inputs, x, *present
    if past:
        cache.present[own] = present
    return x


def repeat_layers(graph, lm):
    """Replaces each node of `trace_layer` by a copy of the nodes of the layer that it names, with its own inputs and
    weights of `lm`."""
    weights = {**dict(lm.named_parameters("lm")), **dict(lm.named_buffers("lm"))}
    for node in [node for node in graph if node.op_type == "Layer"]:
        first, name = (node.attributes[key].as_string() for key in ("first", "own"))
        count = (len(node.inputs) - len(node.outputs)) // 2
        copies = dict(zip(node.inputs[count:], node.inputs[:count]))
        nodes = []

        def copy_of(value):
            if value is None or value in copies:
                return copies.get(value)
            copies[value] = value
            producer = value.producer()
            if value.is_initializer() and value.name.startswith(first):
                own = name + value.name.removeprefix(first)
                copies[value] = constant(graph, own, weights[own].detach())
            elif producer is not None:
                inputs = [copy_of(x) for x in producer.inputs]
                if any(new is not old for new, old in zip(inputs, producer.inputs)):
                    nodes.append(copy_node(producer, inputs, first, name))
                    copies.update(zip(producer.outputs, nodes[-1].outputs))
            return copies[value]

        outputs = [copy_of(value) for value in node.inputs[2 * count :]]
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, outputs)


def copy_node(node, inputs: list, first: str, name: str):
    """A copy of a node with other inputs, from the layer `name` and not `first`."""
    scopes = {key: x.replace(first, name) for key, x in node.metadata_props.items()}
    options = dict(overload=node.overload, version=node.version, metadata_props=scopes)
    values = list(node.attributes.values())
    new = ir.Node(
        node.domain, node.op_type, inputs, values, num_outputs=len(node.outputs), **options
    )
    for old, output in zip(node.outputs, new.outputs):
        output.type, output.shape = old.type, old.shape
    return new


def put_weights(model, blocks: dict, exact: bool = True):
    """A copy of a traced model with ONNX's operators in place of each product with a weight and of the embedding:
    products of integers, MatMulNBits and a dequantized row for those in `blocks`, rounded weights by name; MatMul for
    the others. exact: the inputs of rounded weights are not rounded."""
    model = model.clone()
    graph = model.graph
    integers = any(isinstance(block, ChannelWeight) for block in blocks.values())
    nodes = list(ir.traversal.RecursiveGraphIterator(graph))
    # A decoder behind an encoder has no padding of its own.
    if integers and any(value.name == "attention_mask" for value in graph.inputs):
        fill_padding(graph)
    for node in nodes:
        if node.op_type == "LayerNormalization" and integers:
            keep_sum(node)
            continue
        block = blocks.get(node.inputs[1].name) if node.op_type == "Linear" else None
        if isinstance(block, ChannelWeight):
            new = integer_product(graph, node, block, exact)
        elif block:
            new = rounded_product(graph, node, block, exact)
        elif node.op_type == "Linear":
            new = plain_product(graph, node, fused="shared_cache" in model.metadata_props)
        elif node.op_type == "Gather" and node.inputs[0].name in blocks:
            new = rounded_rows(graph, node, blocks[node.inputs[0].name])
        else:
            continue
        output = node.outputs[0]
        ir.convenience.replace_nodes_and_values(
            node.graph, node, [node], new, [output], new[-1].outputs
        )
        for part in new:
            part.name = part.outputs[0].name
    for name in blocks.keys() & graph.initializers.keys():
        if not graph.initializers[name].uses():
            del graph.initializers[name]
    graph.opset_imports["com.microsoft"] = 1
    passes.RemoveUnusedOpsetsPass()(model)
    return model


def constant(graph, name: str, array):
    """The initializer of that name, registered once."""
    if name not in graph.initializers:
        tensor = ir.tensor(array() if callable(array) else array, name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    return graph.initializers[name]


def plain_product(graph, node, fused: bool) -> list:
    """MatMul with the transposed weight, which is stored transposed unless something else reads it (a tied embedding).
    fused: transpose that one in the product, and not when the graph is loaded."""
    x, weight = node.inputs
    turned = weight.meta.get("turned")
    alone = all(use.op_type == "Linear" for use, _ in weight.uses())
    if not weight.is_initializer() or not (turned or alone):
        if fused:
            return [ir.node("FusedMatMul", [x, weight], {"transB": 1}, domain="com.microsoft")]
        turn = ir.node("Transpose", [weight], {"perm": [1, 0]})
        turn.outputs[0].name = f"{node.outputs[0].name}.weight"
        return [turn, ir.node("MatMul", [x, turn.outputs[0]])]
    if not turned:
        array = np.ascontiguousarray(weight.const_value.numpy().T)
        weight.const_value = ir.tensor(array, name=weight.name)
        weight.shape = ir.Shape(array.shape)
        weight.meta["turned"] = True
    return [ir.node("MatMul", [x, weight])]


def rounded_parts(graph, weight, block: QuantizedWeight) -> list:
    """The tensors of a rounded weight, each stored once: bytes, scales and zero points."""
    names = [weight.name.removesuffix("weight") + part for part in PARTS]
    if names[0] in graph.initializers:
        return [graph.initializers[name] for name in names]
    return [
        constant(graph, name, array)
        for name, array in zip(names, block.arrays(weight.dtype.numpy()))
    ]


def rounded_product(graph, node, block: QuantizedWeight, exact: bool) -> list:
    x, weight = node.inputs
    rows, columns = weight.shape
    options = dict(N=rows, K=columns, bits=block.bits, block_size=block.codes.shape[-1])
    options |= {} if exact else {"accuracy_level": 4}
    inputs = [x, *rounded_parts(graph, weight, block)]
    return [ir.node("MatMulNBits", inputs, options, domain="com.microsoft")]


def integer_product(graph, node, block: ChannelWeight, exact: bool) -> list:
    """A product of integers, the inputs rounded to 8 bits as they come (in operators that ONNX Runtime fuses to
    DynamicQuantizeMatMul, with the bias that follows), or of floats if `exact`."""
    x, weight = node.inputs
    stem = weight.name.removesuffix("weight")
    codes = constant(graph, stem + "codes", block.codes.t().contiguous().numpy())
    scales = constant(graph, stem + "scales", block.scales.flatten().numpy())
    nodes = []

    def add(*arguments, outputs: int = 1):
        nodes.append(ir.node(*arguments, num_outputs=outputs))
        for i, output in enumerate(nodes[-1].outputs):
            output.name = f"{node.outputs[0].name}.{len(nodes)}.{i}"
        return nodes[-1].outputs if outputs > 1 else nodes[-1].outputs[0]

    if len(block.outliers):
        columns = constant(graph, stem + "outliers", block.outliers.numpy())
        kept = constant(graph, stem + "kept", block.kept.t().contiguous().numpy())
        kept = add("MatMul", [add("Gather", [x, columns], {"axis": -1}), kept])
        add_behind_bias(node, kept, f"{node.outputs[0].name}.kept")
    if block.factors is not None:
        x = add("Mul", [x, constant(graph, stem + "factors", block.factors.numpy())])
    to_float = {"to": ir.DataType.FLOAT}
    if exact:
        # DequantizeLinear would be fused with the product, to one that rounds.
        add("MatMul", [x, add("Mul", [add("Cast", [codes], to_float), scales])])
        return nodes
    x, scale, zero = add("DynamicQuantizeLinear", [x], outputs=3)
    sums = add("MatMulInteger", [x, codes, zero])
    add("Mul", [add("Cast", [sums], to_float), add("Mul", [scale, scales])])
    return nodes


def add_behind_bias(product, value, name: str):
    """Adds a value to a product with a weight, behind its bias."""
    output = product.outputs[0]
    uses = [use.node for use in output.uses()]
    # A fused norm has an initializer, too.
    if (
        len(uses) == 1
        and uses[0].op_type == "Add"
        and any(x.is_initializer() for x in uses[0].inputs)
    ):
        output = uses[0].outputs[0]
    total = ir.node("Add", [value, value], name=name)
    total.outputs[0].name = name
    ir.convenience.replace_all_uses_with(output, total.outputs[0])
    total.replace_input_with(0, output)
    product.graph.insert_after(output.producer(), total)


def fill_padding(graph):
    """Reads the first token of a row where its padding is. Nothing sees what becomes of padding, but products of integers
    round a whole batch in one range, which the states of padding tokens make several times as wide."""
    inputs = {value.name: value for value in graph.inputs}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    uses = list(ids.uses())
    first = ir.node("ArgMax", [mask], {"axis": 1})
    token = ir.node("GatherElements", [ids, first.outputs[0]], {"axis": 1})
    real = ir.node("Cast", [mask], {"to": ir.DataType.BOOL})
    filled = ir.node("Where", [real.outputs[0], ids, token.outputs[0]])
    for node, name in ((first, "first"), (token, "token"), (real, "real"), (filled, "filled")):
        node.name = node.outputs[0].name = f"padding.{name}"
    for node, place in uses:
        node.replace_input_with(place, filled.outputs[0])
    graph.insert_before(graph[0], [first, token, real, filled])


def keep_sum(norm):
    """Writes the residual sum before a layer norm as Sum, since ONNX Runtime fuses an Add and the norm into one
    operator that takes its CPU several times as long as both."""
    add = norm.inputs[0].producer()
    if add is not None and add.op_type == "Add":
        add.op_type = "Sum"


def rounded_rows(graph, node, block: QuantizedWeight) -> list:
    """Looks up rows of a rounded table, which may be the tied head's. Uses basic operators, since ONNX Runtime for
    browsers has no GatherBlockQuantized."""
    table, ids = node.inputs
    nodes = []

    def add(*arguments):
        nodes.append(ir.node(*arguments))
        nodes[-1].outputs[0].name = f"{node.outputs[0].name}.{len(nodes)}"
        return nodes[-1].outputs[0]

    codes, scales, zeros = (add("Gather", [x, ids]) for x in rounded_parts(graph, table, block))
    last = constant(graph, "last_axis", np.array([-1]))
    codes, zeros = (add("Cast", [x], {"to": table.dtype}) for x in (codes, zeros))
    scales, zeros = (add("Unsqueeze", [x, last]) for x in (scales, zeros))
    rows = add("Mul", [add("Sub", [codes, zeros]), scales])
    shape = constant(graph, "rows_shape", np.array([0, 0, -1]))
    rows = add("Reshape", [rows, shape])
    if block.codes[0].numel() > block.columns:
        bounds = [constant(graph, f"rows_{x}", np.array([x])) for x in (0, block.columns)]
        add("Slice", [rows, *bounds, last])
    return nodes


def tidy(model):
    """Names every weight after its module, and drops dead nodes and stack traces, which contain paths."""
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
    passes.IdentityEliminationPass()(model)
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
    """Fuses the residual sum and the following RMS norm into one operator, which ONNX Runtime has for CPU and CUDA; its
    own optimizer fuses layer norms only. The sum with a bias, which has one axis, is not a residual sum."""
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
    """Renames an initializer, unless another one has the name already."""
    if name not in graph.initializers:
        value.name = name


# ---------------------------------------------------------------------------------------------------------------------
# Rounding weights
# ---------------------------------------------------------------------------------------------------------------------


class QuantizedWeight(NamedTuple):
    """A matrix as integers from 0 to 2^bits - 1, with a scale and a zero point for each block of a row. A row's last
    block may be padded with zeros."""

    codes: object  # (rows, blocks, block)
    scales: object  # (rows, blocks, 1)
    zeros: object
    bits: int
    columns: int  # without the padding

    def weight(self):
        """The matrix (rows, columns) that the graph computes with."""
        return ((self.codes - self.zeros) * self.scales).flatten(1)[:, : self.columns]

    def arrays(self, dtype) -> tuple:
        """Codes, scales and zero points in ONNX Runtime's layout: two 4-bit codes in a byte, the first in the low bits."""
        codes, zeros = (x.numpy().astype(np.uint8) for x in (self.codes, self.zeros[..., 0]))
        if self.bits == 4:
            zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
            codes, zeros = (x[..., ::2] | x[..., 1::2] << 4 for x in (codes, zeros))
        return codes, self.scales[..., 0].numpy().astype(dtype), zeros


class ChannelWeight(NamedTuple):
    """A matrix as integers of 8 bits with a sign and a scale for each row, for inputs that are multiplied by `factors`
    and rounded to 8 bits in one range as they come; but for the columns `outliers`, which stay in floats. Products
    with two columns never exceed 16 bits (see `largest_pair`)."""

    codes: object  # (rows, columns)
    scales: object  # (rows, 1)
    factors: object  # (columns,), 0 for outliers, or None
    outliers: object  # (n,)
    kept: object  # (rows, n)

    def weight(self):
        """The matrix (rows, columns) that the graph computes with, but for the inputs' rounding."""
        w = self.codes * self.scales
        w = w if self.factors is None else w * self.factors
        return w.index_copy(1, self.outliers, self.kept)


def quantize(weight, bits: int, moments=None) -> QuantizedWeight:
    """Blocks for a weight (rows, columns). With the second moments (columns, columns) of the inputs it meets, ranges
    and zeros are those of least weighted error, and what rounding a column does to the outputs is made up for by the
    columns after it, the weightiest first (GPTQ, Frantar et al. 2022)."""
    top = 2**bits - 1
    columns = weight.shape[1]
    block = max(math.gcd(columns, BLOCK[bits]), LEAST_BLOCK)
    padding = -columns % block
    weight = torch.nn.functional.pad(weight.float(), (0, padding))
    if moments is not None:
        moments = torch.nn.functional.pad(moments, (0, padding, 0, padding))
        moments = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments))
    blocks = weight.unflatten(1, (-1, block))
    importance = 1 if moments is None else moments.diagonal().view(blocks.shape[1:])
    search = moments is not None
    # A few rows at a time stay in the processor's cache.
    parts = [block_ranges(rows, importance, top, search) for rows in blocks.split(ROWS)]
    scales, zeros = (torch.cat(x) for x in zip(*parts))
    if moments is None:
        codes = (blocks / scales + zeros).round().clamp(0, top)
        return QuantizedWeight(codes, scales, zeros, bits, columns)
    factor = inverse_hessian_cholesky(moments)
    steps = gptq(weight, scales, zeros, factor, top) - zeros
    # Codes for these scales, then the best scales for those codes, then codes for these.
    better = (steps * blocks * importance).sum(-1, keepdim=True)
    better = better / (steps.square() * importance).sum(-1, keepdim=True).clamp(min=1e-12)
    better = better.half().float()
    scales = torch.where(better > 1e-7, better, scales)
    codes = gptq(weight, scales, zeros, factor, top)
    return QuantizedWeight(codes, scales, zeros, bits, columns)


def block_ranges(blocks, importance, top: int, search: bool) -> tuple:
    """Scale and zero point of every block (rows, blocks, block): for its whole range, or with a search for the share of
    it that gives the least weighted error."""
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    high = blocks.amax(-1, keepdim=True).clamp(min=1e-6)
    middle = (-low / (high - low) * top).round()
    least = None
    for share, shift in itertools.product(SHARES, (0, -1, 1)) if search else [(1, 0)]:
        scale = ((high - low) * (share / top)).half().float().clamp(min=1e-7)
        zero = (middle + shift).clamp(0, top)
        codes = (blocks / scale + zero).round().clamp(0, top)
        error = (((codes - zero) * scale - blocks).square() * importance).sum(-1, keepdim=True)
        found = error, scale, zero
        if least is not None:
            found = [torch.where(error < least[0], *both) for both in zip(found, least)]
        least = found
    return least[1:]


def inverse_hessian_cholesky(moments) -> tuple:
    """The order of columns, the most important first, and the upper Cholesky factor of the inverse moments."""
    order = moments.diagonal().argsort(descending=True)
    # The inverse of the lower factor of a matrix is the upper factor of its inverse, both read from their ends.
    backwards = order.flip(0)
    lower = torch.linalg.cholesky(moments[backwards][:, backwards])
    identity = torch.eye(len(moments))
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return order, upper.contiguous()


def gptq(weight, scales, zeros, factor: tuple, top: int):
    """Codes (rows, blocks, block) for given scales and zeros, column by column; later columns compensate the error of
    earlier ones."""
    order, upper = factor
    columns = weight.shape[1]
    groups = scales.shape[1]
    block = columns // groups
    wide = weight, scales.expand(-1, -1, block), zeros.expand(-1, -1, block)
    # Transposed, so that a column is contiguous in memory.
    later, scales, zeros = (x.flatten(1).t()[order].contiguous() for x in wide)
    errors = torch.empty(block, len(weight))
    # The same memory in numpy, which starts short operations several times as fast as torch.
    w, s, z, e, u = (x.numpy() for x in (later, scales, zeros, errors, upper))
    codes = np.empty_like(w)
    for start in range(0, columns, block):
        stop = start + block
        for i in range(start, stop):
            # Not @, which would start threads.
            column = w[i] - np.einsum("i,ij->j", u[start:i, i], e[: i - start])
            code = codes[i] = np.rint(column / s[i] + z[i]).clip(0, top)
            e[i - start] = (column - (code - z[i]) * s[i]) / u[i, i]
        later[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return torch.from_numpy(codes)[order.argsort()].t().unflatten(1, (groups, block))


def quantize_channels(weight, inputs, smooth: bool = True) -> ChannelWeight:
    """Codes and scales for a weight (rows, columns) whose inputs (n, columns) are rounded, too. Columns of inputs beyond
    a multiple of the median range are made smaller and their weights larger (SmoothQuant, Xiao et al. 2023), as far as
    that brings the least error. A few of the largest may stay in floats (Dettmers et al. 2022), where outputs are fewer
    than inputs, so that it costs little."""
    low, high = inputs.amin(0), inputs.amax(0)
    largest = torch.maximum(-low, high).clamp(min=1e-9)
    x = inputs[:: max(1, len(inputs) // SAMPLE)]
    y = x @ weight.t()
    # The first limits no column.
    trials = [(math.inf, 1), *(itertools.product(LIMITS, POWERS) if smooth else ())]
    least = math.inf
    for count in (0, OUTLIERS) if smooth and max(len(weight), OUTLIERS) < len(largest) else (0,):
        outliers = largest.topk(count).indices.sort().values
        rest = torch.ones_like(largest).index_fill(0, outliers, 0)
        limit = largest[rest > 0].median()
        kept = x[:, outliers] @ weight[:, outliers].t()
        for times, power in trials:
            factors = (largest / (times * limit)).clamp(min=1) ** -power
            step = ((high * factors * rest).amax() - (low * factors * rest).amin()) / 255
            w = weight / factors * rest
            scales = largest_pair(w).clamp(min=1e-9) / 127
            codes = (w / scales).round()
            rounded = (x * factors / step).round() * step
            error = float((rounded @ (codes * scales).t() + kept - y).square().sum())
            # An operator more has to pay.
            error *= PRICE if count else 1
            # Not a number either, which the verification names.
            if not error >= least:
                least = error
                plain = not count and bool((factors == 1).all())
                factors = None if plain else factors * rest
                parts = codes.to(torch.int8), scales, factors, outliers, weight[:, outliers]
    return ChannelWeight(*parts)


def largest_pair(weight):
    """Of each row (rows, 1), the largest size of a column or of the sum of columns 2i and 2i + 1. x86 without VNNI adds
    the products with these two in 16 bits: 255 times a sum of 128 fits."""
    pairs = torch.nn.functional.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
    sizes = torch.maximum(pairs.sum(-1).abs(), pairs.abs().amax(-1))
    return sizes.amax(1, keepdim=True)


def progress(what: str, total: int, log=None, items=None):
    """A progress bar (over the items) on stderr; where that is no terminal, lines of the log, or nothing without one."""
    silent = log is None and not sys.stderr.isatty()
    return progress_bar(total, what, items, print_line=log, silent=silent)


def quantize_weights(lm, bits: int, ids, log=None) -> dict:
    """Round the matrices of a model in place; their QuantizedWeight by name. Embedding, head and fused query, key and
    value keep 8 bits: 4 cost more there than in all others. Keys and values of a source, made once, stay as they are,
    and so do weights that a replaced `linear` or a module of somebody's own multiplies with. In 4 bits, and in 8 where a
    text is read at once, a matrix is rounded for the inputs it meets when `ids` (batch, seq) run through what was
    rounded before it."""
    linear = tinylm.linear
    blocks = {}
    if not is_own(linear):
        if log:
            log("nothing is rounded: tinylm.linear is replaced")
        return blocks
    linears = {name: m for name, m in lm.named_modules() if isinstance(m, tinylm.Linear)}
    weights = {
        name + ".weight": module.weight
        for name, module in ({"embed": lm.embed} | linears).items()
        if module.weight is not None and not name.endswith(".kv")
    }
    names = {id(weight): name for name, weight in weights.items()}
    left = [name for name, p in lm.named_parameters() if p.ndim > 1 and id(p) not in names]
    if left and log:
        log(f"not rounded: {', '.join(left)}")
    bar = progress(f"rounding to {bits} bits", len(names), log)

    def put(weight, inputs=None):
        name = names.get(id(weight))
        if name is None or name in blocks:
            return
        if bits == 8 and inputs is not None and reads(lm, name):
            # What attention puts out has no outliers.
            smooth = not name.endswith(".o.weight")
            blocks[name] = quantize_channels(weight.data, inputs, smooth)
        else:
            wide = name in ("embed.weight", "head.out.weight") or name.endswith("qkv.weight")
            wide = wide or bits == 8
            moments = None if wide or inputs is None else inputs.t() @ inputs / len(inputs)
            blocks[name] = quantize(weight.data, 8 if wide else bits, moments)
        weight.data = blocks[name].weight()
        bar.update()

    def rounded(x, weight, bias=None):
        put(weight, x.flatten(0, -2))
        return linear(x, weight, bias)

    with torch.no_grad(), bar:
        put(lm.embed.weight)
        if ids is not None and (bits < 8 or not writes(lm)):
            with mock.patch.object(tinylm, "linear", rounded):
                lm(
                    ids,
                    decoder_input_ids=ids if has_target(lm) else None,
                    columns=torch.zeros_like(ids[:, :1]),
                )
        for weight in weights.values():
            put(weight)
    return blocks


def reads(lm, name: str) -> bool:
    """Whether the matrix of that name multiplies all tokens of a text at once: those of encoders, but for heads."""
    return name.startswith("encoder.") if has_target(lm) else not name.startswith("head.")


def scale_cache(lm, ids):
    """Gives every layer scales (1, kv_heads, 1, head_dim) with which its keys and values fit into 8 bits, measured on
    ids (batch, seq). Channels of a key that rotate together share a scale, so that it is valid at every position."""
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
    """Keys and values rounded as an 8-bit cache rounds them."""
    return [
        (x / scale[:, :, 0]).round().clamp(-128, 127) * scale[:, :, 0]
        for x, scale in ((k, attention.k_scale), (v, attention.v_scale))
    ]


def keys_and_values(lm, change):
    """A context in which `change(attention, k, v)` replaces every layer's keys and values (batch, seq, kv_heads,
    head_dim) before they reach tinylm's `attend`."""
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


class Reference:
    """What torch says, computed once for each input."""

    def __init__(self, lm, stored: Precision):
        self.lm = lm
        self.stored = stored
        self.known = {}

    def __call__(self, ids, mask, **more):
        """The model's output for ids, mask and more arrays."""
        arrays = dict(ids=ids, mask=mask, **more)
        key = tuple((name, x.shape, x.tobytes()) for name, x in arrays.items())
        if key not in self.known:
            tensors = {name: torch.from_numpy(x) for name, x in more.items()}
            rounded = contextlib.nullcontext()
            if self.stored.cache:
                rounded = keys_and_values(self.lm, round_to_scale)
            with torch.no_grad(), rounded:
                output = self.lm(torch.from_numpy(ids), torch.from_numpy(mask), **tensors)
            self.known[key] = output.float().numpy()
        return self.known[key]

    def generate(self, ids, mask, **options):
        """The ids that the model writes."""
        key = ids.tobytes(), mask.tobytes(), repr(options)
        if key not in self.known:
            tensors = torch.from_numpy(ids), torch.from_numpy(mask)
            self.known[key] = self.lm.generate(*tensors, **options).numpy()
        return self.known[key]


def verify(lm, onnx_lm, stored: Precision, reference, text=None, log=None) -> dict:
    """Largest difference from torch, relative to the largest value, per check; of ids the number of equal ones.
    reference: see `Reference`; text: ids (batch, seq) of a real one, where there is any. Raises Error where a
    difference is too large or, in fp32, where ids differ."""
    found = {}
    count = 3 + (text is not None) + (1 + stored.exact) * bool(onnx_lm.past)
    pairs = checks(lm, onnx_lm, stored, reference, text)
    for name, ours, theirs in progress(f"verifying {stored.name}", count, log, pairs):
        if not np.issubdtype(theirs.dtype, np.integer):
            error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            found[name] = max(error, found.get(name, 0.0))
            require(
                # False for NaN.
                error <= stored.tolerance,
                f"verify: {stored.name} {name} differs from torch by {error:.1e} of the "
                f"largest value, expected at most {stored.tolerance:.0e}",
            )
        else:
            found[name] = equal_columns(ours, theirs)
            require(
                found[name] == theirs.shape[1],
                f"verify: {stored.name} {name} differ from torch after "
                f"{found[name]} of {theirs.shape[1]}",
            )
    return found


def check_16_bit_range(lm, precision: str, stored: Precision, texts: list, log) -> None:
    """Refuse a type that a weight or what flows through the model on its way over `texts`, ids (batch, seq), leaves; a
    value near its end is named in the log."""
    limit = torch.finfo(getattr(torch, stored.dtype)).max
    if limit >= torch.finfo(torch.float32).max:
        return
    largest = {name: float(p.detach().abs().max()) for name, p in lm.named_parameters()}

    def see(name, module, inputs, output):
        for x in (*inputs[:1], output):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                largest[name] = max(largest.get(name, 0.0), float(x.abs().max()))

    seen = [(n, m) for n, m in lm.named_modules() if not isinstance(m, nn.Dropout | nn.Identity)]
    hooks = [module.register_forward_hook(partial(see, name)) for name, module in seen]
    try:
        with torch.no_grad():
            for ids in texts:
                lm(ids, decoder_input_ids=ids if has_target(lm) else None)
    finally:
        for hook in hooks:
            hook.remove()
    name = next((n for n, x in largest.items() if not x <= limit), max(largest, key=largest.get))
    words = f"{name or 'the outputs'} reaches {largest[name]:.3g}, and {stored.dtype} ends at {limit:.0f}"
    require(largest[name] <= limit, f"verify: {precision}: {words}; export another precision")
    if largest[name] > limit / 4:
        log(f"{precision}: take care: {words}")


def range_texts(lm, text) -> list:
    """Ids (batch, seq) that may cause large values: random ones, a real text, and those of the largest embeddings."""
    ids = [torch.from_numpy(ids) for ids, _ in list(examples(lm).values())[:1]]
    largest = lm.embed.weight.detach().abs().amax(-1).topk(min(64, lm.config.vocab_size)).indices
    width = min(8, lm.config.max_position_embeddings, len(largest))
    ids.append(largest[: len(largest) // width * width].view(-1, width))
    return ids if text is None else [*ids, text]


def equal_columns(a, b) -> int:
    """The number of leading columns that are equal in all rows."""
    return int((a == b).all(0).cumprod().sum()) if a.shape == b.shape else 0


def columns_to_compare(ours, theirs, logits_after: Callable, tolerance: float) -> int:
    """The number of columns of greedy ids (batch, seq) to compare: all of them, or those before a near tie, where two
    tokens' logits are closer than the tolerance. `logits_after(ids)` gives the next token's logits (batch, vocab)."""
    same = equal_columns(ours, theirs)
    if ours.shape != theirs.shape or same == theirs.shape[1]:
        return theirs.shape[1]
    rows = np.flatnonzero(ours[:, same] != theirs[:, same])
    logits = logits_after(theirs[:, :same])
    gaps = np.abs(logits[rows, ours[rows, same]] - logits[rows, theirs[rows, same]])
    return same if gaps.max() <= tolerance * np.abs(logits).max() else theirs.shape[1]


def examples(lm) -> dict:
    """Name -> random ids (2, seq) and their mask: without padding, or with the second row padded on one side."""
    limit = min(lm.config.max_position_embeddings, 64)
    short = max(1, limit // 8)
    rows = {
        "prefill": slice(None),
        "left padding": slice(-short, None),
        "right padding": slice(short),
    }
    ids = np.random.default_rng(0).integers(0, lm.config.vocab_size, (2, max(2, limit // 4)))
    found = {}
    for name, real in rows.items():
        mask = np.ones_like(ids)
        mask[1] = 0
        mask[1, real] = 1
        found[name] = ids, mask
    return found


def checks(lm, onnx_lm, stored: Precision, reference, text=None):
    """Yields (name, OnnxLM's output, torch's output): for padded batches, for a real text if there is one, and for
    decoders a cached step and greedy tokens."""
    rows = examples(lm)
    if text is not None:
        rows["text"] = text.numpy(), np.ones_like(text.numpy())
    for name, (ids, mask) in rows.items():
        more = {"decoder_input_ids": ids[:, ::-1].copy()} if has_target(lm) else {}
        if kinds := lm.config.type_vocab_size:
            more["token_type_ids"] = ids % kinds
        expected = reference(ids, mask, **more)
        seen = mask.astype(bool) if expected.ndim == 3 and not lm.encoder else slice(None)
        yield name, onnx_lm(ids, mask, **more)[seen], expected[seen]
        if onnx_lm.past and name == "left padding":
            yield from decoding_checks(lm, onnx_lm, stored, reference, ids, mask, expected, more)


def decoding_checks(lm, onnx_lm, stored: Precision, reference, ids, mask, expected, more: dict):
    """The checks of a decoder: a cached step and, in exact precisions, greedy tokens. Elsewhere near ties on random ids
    mean nothing, and `measure` compares on real text."""
    written, real, source = ids, mask, None
    start = ids.shape[1]
    if lm.encoder:
        written = more["decoder_input_ids"]
        real = np.ones_like(written)
        source = onnx_lm.source(ids, mask)
        start = 1
    _, past = onnx_lm.step(written[:, :-1], real[:, :-1], source=source)
    yield "decode", onnx_lm.step(written[:, -1:], real, past, source)[0], expected[:, -1:]
    if not stored.exact:
        return
    new = min(32, lm.config.max_position_embeddings - start)
    options = dict(max_new_tokens=new, eos_token_id=(), num_beams=1)
    theirs = reference.generate(ids, mask, **options)
    ours = onnx_lm.generate(ids, mask, **options)

    def logits_after(written):
        if lm.encoder:
            return reference(ids, mask, decoder_input_ids=written)[:, -1]
        ones = np.ones_like(written[:, start:])
        return reference(written, np.concatenate([mask, ones], axis=1))[:, -1]

    end = columns_to_compare(ours, theirs, logits_after, stored.tolerance)
    yield "greedy tokens", ours[:, start:end], theirs[:, start:end]


def check_loop(lm, onnx_lm, path: Path, tolerance: float, briefly: bool, log=None):
    """Raises Error unless the generating graph gives OnnxLM's tokens, sampled and, unless `briefly`, greedily."""
    session = Session(path, ort.SessionOptions(), [CPU])
    ids = np.repeat(examples(lm)["prefill"][0][:1], 2, 0)
    new = min(24, lm.config.max_position_embeddings - ids.shape[1])
    likeliest = dict(temperature=0.0, top_k=0, top_p=1.0)
    ways = dict(temperature=0.8, top_k=40, top_p=0.95), dict(temperature=1.0), {}
    ways = ways[: 1 if briefly else None]
    for options in progress(f"running {path.name}", len(ways), log, ways):
        seed = {"seed": 3} if options else {}
        ours = onnx_lm.generate(
            ids, max_new_tokens=new, eos_token_id=(), num_beams=1, **options | seed
        )
        feeds = {
            name: np.array(value, np.float32 if isinstance(value, float) else None)
            for name, value in (likeliest | options).items()
        }
        (text,) = session(
            input_ids=ids,
            max_new_tokens=np.array(new),
            seed=np.array(3),
            eos_token_id=np.array([-1]),
            **feeds,
        )
        text = text.numpy()
        end = ours.shape[1]
        if not options:
            end = columns_to_compare(text, ours, lambda ids: onnx_lm(ids)[:, -1], tolerance)
        require(
            equal_columns(text, ours) >= end,
            f"verify: {path.name} with {options or 'temperature 0'} differs "
            f"from OnnxLM after {equal_columns(text, ours)} of {ours.shape[1]} columns",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Exporting
# ---------------------------------------------------------------------------------------------------------------------


def export_onnx(
    model_or_folder: tinylm.TinyLM | str | Path,
    out: str | Path,
    onnx: bool = True,
    safetensors: bool = True,
    log: Callable[[str], None] | None = None,
    precisions: Sequence[str] = ("fp32",),
    text: str | None = None,
    generate: bool = False,
    int8_cache: bool = False,
    eval_data=None,
    max_drop: float | None = None,
) -> dict:
    """Writes a folder with config, tokenizer, model.safetensors in the stored dtype and verified graphs in onnx/; for a
    decoder also genai_config.json, for the first precision. Returns what `verify` found, by precision.

    model_or_folder: a TinyLM, or a checkpoint by its folder or its name on the hub. out: the folder. It appears whole,
    after all checks, or not at all; an earlier export there is replaced, except for graphs in other precisions of the
    same weights. onnx, safetensors: whether to write these. log: takes a line at each stage. precisions: keys of
    PRECISIONS. text: like what the model will meet; 4-bit weights, 8-bit caches and an encoder's int8 are rounded for
    it (default: text that the model generates, or our docstrings for one that only reads). generate: also write
    onnx/generate.onnx, with prefill, cache, sampling and stopping in one graph. int8_cache: keys and values in 8
    bits, in all precisions but fp32.
    eval_data: data of the model's task, a file or rows. Each precision is evaluated on it (see `evaluate`); the table
    goes into the model card, its rows under "eval" into the result. max_drop: a precision whose figure is worse than
    torch's by more than this is left out.

    Raises Error for a checkpoint or data that cannot be read, and if a check fails.
    """
    out = Path(out).resolve()
    log = log or (lambda text: None)
    found = {}
    require(
        not out.exists() or out.is_dir() and (not any(out.iterdir()) or (out / MARK).exists()),
        f"{out}: exists and is no ONNX export; name another folder with --out",
    )
    precisions = list(dict.fromkeys(precisions))
    for name in precisions:
        require(name in PRECISIONS, f"precision {name!r}: expected one of {', '.join(PRECISIONS)}")
    require(
        max_drop is None or is_number_in(max_drop, 0, math.inf) and eval_data is not None,
        f"--max-drop {max_drop}: expected a number from 0, with --eval",
    )
    require(eval_data is None or onnx, "--eval: expected with --onnx")
    extras = []
    source = None
    if isinstance(model_or_folder, tinylm.TinyLM):
        lm = copy.deepcopy(model_or_folder)
    else:
        source = pretrained.find_checkpoint(model_or_folder).resolve()
        require(
            out not in (source, *source.parents),
            f"{out}: is the checkpoint itself, or holds it; name another folder",
        )
        log(f"loading {model_or_folder}")
        head = None if is_embedder(source) else "config"
        lm = tinylm.TinyLM.from_pretrained(source, head=head)
        lm.remembered = remembered(source)
        extras = sentence_files(source) + [TRAINING] * (source / TRAINING).is_file()
    work = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        work.mkdir(parents=True)
        lm.save_pretrained(work)
        for name in extras:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, work / name)
        weights = sha256(work)
        tinylm.write_json(work / MARK, {"weights": weights})
        log(f"model.safetensors {megabytes(work / 'model.safetensors')}")
        if onnx:
            (work / "onnx").mkdir()
            evaluation = None
            if eval_data is not None:
                # Before the graphs are traced, which takes longer than to find that a column is missing.
                evaluation = tinylm.beside("train").Evaluation(lm, eval_data)
            found = write_graphs(lm, work, precisions, text, generate, int8_cache, log)
            if evaluation:
                table = evaluate(lm, work, found, evaluation, max_drop, log)
                write_card(work / "README.md", out.name, source, table, safetensors)
            write_genai_config(lm, work, next(iter(found), precisions[0]), log)
            keep_graphs(out, work, weights, precisions, log)
            note_external_data(work)
        if not safetensors:
            (work / "model.safetensors").unlink()
        replace_directory(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def sha256(folder: Path) -> str:
    """A hash of the weights and settings, which determine the graphs."""
    found = hashlib.sha256()
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        with open(folder / name, "rb") as file:
            while chunk := file.read(2**24):
                found.update(chunk)
    return found.hexdigest()


def keep_graphs(earlier: Path, folder: Path, weights: str, precisions: list, log):
    """Keeps graphs of other precisions from an earlier export of the same weights."""
    if not (earlier / "onnx").is_dir():
        return
    try:
        mark = json.loads((earlier / MARK).read_text())
    except ValueError:
        # An older export, without a hash.
        mark = None
    if mark != {"weights": weights}:
        return log("the earlier export has other weights: its graphs are replaced")
    for name in PRECISIONS.keys() - {*precisions}:
        for path in graph_files(earlier, name):
            shutil.copyfile(path, folder / "onnx" / path.name)
            log(f"onnx/{path.name} is kept")


def graph_files(folder: Path, precision: str) -> list[Path]:
    stems = f"model|model{ON_CPU}|generate|encoder_model|decoder_model_merged"
    pattern = rf"({stems}){SUFFIXES[precision]}\.onnx(_data)?"
    return [
        path for path in sorted((folder / "onnx").iterdir()) if re.fullmatch(pattern, path.name)
    ]


def note_external_data(folder: Path):
    """Notes external data in config.json, where transformers.js looks for it."""
    large = [path.name.removesuffix("_data") for path in (folder / "onnx").glob("*.onnx_data")]
    if large:
        config = tinylm.read_json(folder / "config.json")
        config["transformers.js_config"] = {"use_external_data_format": dict.fromkeys(large, True)}
        tinylm.write_json(folder / "config.json", config)


# Fields of generation_config.json that the generating graph does not implement.
ONE_CALL_LACKS = (
    "no_repeat_ngram_size",
    "min_length",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def check_options(lm, precisions: list, generate: bool, int8_cache: bool):
    """Raises Error where --generate or --int8-cache cannot be had for this model."""
    require(writes(lm) or not generate, "--generate: the model is no decoder that writes text")
    found = [name for name in ONE_CALL_LACKS if lm.generation_config.get(name)]
    if lm.generation_config.get("repetition_penalty", 1) not in (None, 1):
        found.append("repetition_penalty")
    require(
        not (generate and found),
        f"--generate: generation_config.json has {', '.join(found)}, which the graph lacks",
    )
    require(
        not int8_cache or any(has_int8_cache(lm, name) for name in precisions),
        f"--int8-cache: no graph of {', '.join(precisions)} groups queries",
    )


def writes(lm) -> bool:
    """Whether the model is a decoder that writes text."""
    return lm.config.causal and lm.config.head == "lm" and not lm.config.num_encoder_layers


def has_int8_cache(lm, precision: str) -> bool:
    return writes(lm) and groups_queries(lm) and not PRECISIONS[precision].exact


def write_graphs(
    lm, folder: Path, precisions: list, text: str | None, generate: bool, int8_cache: bool, log
) -> dict:
    """Writes a folder's onnx/, verifies each precision and measures those below fp32."""
    lm = lm.to("cpu", torch.float32).eval()
    found = {}
    check_options(lm, precisions, generate, int8_cache)
    measured = text is not None or precisions != ["fp32"]
    traces = Traces(lm, log)
    ids = None
    if measured:
        rounds = int8_cache or any(PRECISIONS[name].bits == 4 for name in precisions)
        with text_writer(traces, folder, precisions) as write:
            ids = calibration_ids(lm, text, log, WINDOWS if rounds else MEASURED, write)
    measure = Measure(lm, ids[:MEASURED]) if ids is not None and writes(lm) else None
    rounded = {0: (lm, {})}
    for name in precisions:
        stored = PRECISIONS[name]
        if int8_cache and has_int8_cache(lm, name):
            # A tiny difference can flip a rounded value.
            stored = replace(stored, cache="int8", tolerance=0.1)
        if stored.bits not in rounded:
            log(f"rounding to {stored.bits} bits")
            model = copy.deepcopy(lm)
            windows = None if ids is None else ids[MEASURED:]
            rounded[stored.bits] = model, quantize_weights(model, stored.bits, windows, log)
        model, blocks = rounded[stored.bits]
        if stored.cache:
            scale_cache(model, ids[MEASURED:])
        sample = None if ids is None else ids[:2, :64]
        check_16_bit_range(
            model, name, stored, range_texts(lm, None if ids is None else ids[:8]), log
        )
        log(f"tracing {name}, {sum(p.numel() for p in lm.parameters()):,} parameters")
        graphs = trace_graphs(traces, model, folder, stored, blocks, generate and not blocks)
        alone = {path: graphs.pop(path) for path in [*graphs] if path.stem.endswith(ON_CPU)}
        reference = Reference(model, stored)
        for some in filter(None, (graphs, alone)):
            write_all(some)
            # OnnxLM loads what was written last.
            onnx_lm = OnnxLM(folder, name, providers=[CPU])
            found[name] = verify(model, onnx_lm, stored, reference, sample, log)
            differences = format_differences(found[name])
            log(f"{name}{' on the CPU' * (some is alone)} verified against torch: {differences}")
        if blocks:
            graphs = trace_graphs(traces, model, folder, stored, blocks, generate, exact=False)
            write_all(graphs)
            onnx_lm = OnnxLM(folder, name, providers=[CPU])
            loose = replace(stored, tolerance=math.inf)
            rough = verify(model, onnx_lm, loose, reference, sample, log)
            log(f"{name} in 8-bit arithmetic: {format_differences(rough)}")
        for path in (*graphs, *alone):
            log(f"onnx/{path.name} {megabytes(path)}")
        if generate:
            path = next(path for path in graphs if path.stem.startswith("generate"))
            # The choice of a token is one graph in all precisions.
            check_loop(lm, onnx_lm, path, stored.tolerance, name != precisions[0], log)
            log(f"onnx/{path.name} writes what onnx/model{stored.suffix}.onnx does")
        if measure:
            log(f"measuring {name}")
            log(f"{name} {measure(onnx_lm, stored, log)}")
    return found


class Traces:
    """The traced graphs of a model, which precisions share that differ in their weights only."""

    def __init__(self, lm, log=None):
        self.lm = lm
        self.log = log
        self.kept = {}

    def of(self, lm, stored: Precision) -> dict:
        """Stem -> traced onnx_ir.Model, with the weights of `lm`."""
        found = {}
        graphs = graphs_of(lm, stored)
        for graph in progress(f"tracing {stored.name}", len(graphs), self.log, graphs):
            kind = graph.stem.removesuffix(ON_CPU), graph.grouped
            # Scales of a cache belong to one precision.
            key = *kind, stored.dtype, stored.cache and stored.name
            if key not in self.kept:
                traced = copy.deepcopy(lm if stored.cache else self.lm)
                self.kept[key] = trace(traced.to(getattr(torch, stored.dtype)), graph)
            found[graph.stem] = self.kept[key]
        return found

    @functools.cached_property
    def choice(self):
        require(
            not tinylm.short_limit(self.lm.config), "generate: longrope has to read a text again"
        )
        return trace(self.lm, choice_graph(self.lm))


def trace_graphs(
    traces: Traces,
    lm,
    folder: Path,
    stored: Precision,
    blocks: dict,
    generate: bool,
    exact: bool = True,
):
    """Path -> onnx_ir.Model of a precision's graphs, with the generating one last. exact: see `put_weights`."""
    try:
        traced = traces.of(lm, stored)
        graphs = {stem: put_weights(model, blocks, exact) for stem, model in traced.items()}
        if generate:
            choice = traces.choice.clone()
            graphs["generate"] = in_a_loop(graphs["model"].clone(), choice, lm.config, stored)
    except Exception as error:
        # The exporter's exceptions have no common base.
        raise Error(f"onnx: the trace of {stored.name} failed ({first_line(error)})") from error
    found = {
        folder / "onnx" / f"{stem}{stored.suffix}.onnx": model for stem, model in graphs.items()
    }
    first = next(iter(found))
    if writes(lm) and (len(traced) > 1 or inner_size(found[first]) > EXTERNAL_ABOVE):
        share_weights(found, first)
    return found


def write_all(graphs: dict):
    """Writes models to their paths."""
    for path, model in graphs.items():
        external = (
            {"external_data": path.name + "_data"} if inner_size(model) > EXTERNAL_ABOVE else {}
        )
        ir.save(model, path, **external)


def inner_size(model) -> int:
    """Bytes of the weights that a graph's own file would have."""
    tensors = [x.const_value for graph in model.graphs() for x in graph.initializers.values()]
    return sum(x.nbytes for x in tensors if not isinstance(x, ir.ExternalTensor))


def share_weights(graphs: dict, path: Path):
    """Moves the weights of graphs into one file beside `path`, each once where several graphs have it by its name."""
    values: dict = {}
    for model in graphs.values():
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.const_value.nbytes >= SMALL:
                    values.setdefault(value.name, []).append(value)
    shared = []
    for first, *others in values.values():
        array = first.const_value.numpy()
        same = [
            x
            for x in others
            if x.const_value is first.const_value or np.array_equal(array, x.const_value.numpy())
        ]
        shared.append([first, *same])
    tensors = [first.const_value for first, *_ in shared]
    moved = ir.external_data.convert_tensors_to_external(tensors, path.parent, path.name + "_data")
    for same, tensor in zip(shared, moved):
        for value in same:
            value.const_value = tensor


def format_differences(found: dict) -> str:
    return ", ".join(
        f"{check} {value:.1e}" if isinstance(value, float) else f"{value} {check} equal"
        for check, value in found.items()
    )


def calibration_ids(lm, text: str | None, log, count: int = WINDOWS, write=None):
    """Windows (count, WINDOW) of a text, or of text that the decoder generates; None if there is neither. write:
    `generate` of an exported graph, which is faster than torch's, and the calls to count."""
    if not writes(lm):
        return reading_ids(lm, text)
    length = min(WINDOW, lm.config.max_position_embeddings)
    if text is not None:
        require(lm.tokenizer, "--text: the checkpoint has no tokenizer.json")
        ids = lm.tokenizer.encode(text)
        found = min(len(ids) // length, WINDOWS)
        require(
            found > MEASURED,
            f"--text: {len(ids)} tokens, expected at least {(MEASURED + 1) * length}",
        )
        return torch.tensor(ids[: found * length]).view(found, length)
    use = "to round for and to measure on" if count > MEASURED else "to measure on"
    log(f"writing {count} texts of {length} tokens {use}; --text gives your own")
    begin = lm.config.bos_token_id if lm.config.bos_token_id in range(lm.config.vocab_size) else 0
    options = dict(temperature=1.0, eos_token_id=(), seed=0, num_beams=1)
    writer = lm if write is None else write()
    with progress("writing tokens", length - 1, log) as bar, count_calls(writer, bar.update):
        start = np.full((count, 1), begin)
        start = torch.from_numpy(start) if writer is lm else start
        return torch.as_tensor(writer.generate(start, max_new_tokens=length - 1, **options))


def own_text() -> str:
    """English that is always at hand: the docstrings of the model and of the runtime."""
    parts = [
        x.__doc__ or ""
        for module in (tinylm, tinylm.beside("onnxlm"))
        for x in vars(module).values()
        if callable(x) and getattr(x, "__module__", None) == module.__name__
    ]
    return " ".join(" ".join(parts).split())


def reading_ids(lm, text: str | None):
    """Windows (count, seq) of a text, or of our own docstrings, as an encoder reads them, with special tokens; None
    without a tokenizer."""
    require(lm.tokenizer or text is None, "--text: the checkpoint has no tokenizer.json")
    if not lm.tokenizer:
        return None
    length = min(READ, lm.config.max_position_embeddings)
    words = own_text() if text is None else text
    windows = encode_windows(lm.tokenizer, words, limit=length, stride=0)
    rows = [window.ids for window in windows if len(window.ids) == length][:READS]
    require(
        text is None or len(rows) > MEASURED,
        f"--text: {len(rows) * length} tokens, expected at least {(MEASURED + 1) * length}",
    )
    return torch.tensor(rows) if len(rows) > MEASURED else None


@contextlib.contextmanager
def count_calls(lm, update: Callable):
    """Calls `update` after each step of a TinyLM or an OnnxLM."""
    if isinstance(lm, OnnxLM):
        step = lm.step

        def counted(*arguments, **options):
            update()
            return step(*arguments, **options)

        with mock.patch.object(lm, "step", counted):
            yield
        return

    def count(*_):
        # it returns whether it was drawn, and the hook's result would replace the model's output
        update()

    hook = lm.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def text_writer(traces: Traces, folder: Path, precisions: list):
    """Yields a function that gives an OnnxLM with the weights as they are, of the trace that most of `precisions` share.
    It is the one that `verify` checks in them."""
    scratch = folder / "writer"
    stored = next((PRECISIONS[name] for name in precisions if name in ("int8", "int4")), None)

    def write():
        (scratch / "onnx").mkdir(parents=True)
        for path in folder.glob("*.json"):
            shutil.copyfile(path, scratch / path.name)
        graphs = trace_graphs(traces, traces.lm, scratch, stored or PRECISIONS["fp32"], {}, False)
        *_, model = graphs.values()
        write_all({scratch / "onnx" / "model.onnx": model})
        return OnnxLM(scratch, "fp32", [CPU])

    try:
        yield write
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Measure:
    """Compares precisions with torch in fp32 on windows (batch, seq) of ids that they were not calibrated on."""

    def __init__(self, lm, ids):
        self.lm = lm
        self.ids = ids

    def read(self, logits_of: Callable) -> tuple:
        """The perplexity, and the likeliest token behind each one."""
        found = []
        for row in self.ids:
            logits = torch.as_tensor(logits_of(row[None]))[0, :-1]
            found.append((torch.nn.functional.cross_entropy(logits, row[1:]), logits.argmax(-1)))
        losses, likeliest = map(torch.stack, zip(*found))
        return float(losses.mean().exp()), likeliest

    @functools.cached_property
    def before(self) -> tuple:
        with torch.no_grad():
            return self.read(self.lm)

    def __call__(self, onnx_lm, stored: Precision, log=None) -> str:
        """A line of figures. An exact graph was verified to say what torch does, so that others may be compared with it,
        which takes less time."""
        new = max(1, min(32, self.ids.shape[1] - 1))
        torch_too = not stored.exact and "before" not in vars(self)
        bar = progress(f"measuring {stored.name}", len(self.ids) * (1 + torch_too) + new, log)
        count = partial(count_calls, update=bar.update)
        with bar, count(onnx_lm), count(self.lm):
            perplexity, likeliest = found = self.read(lambda row: onnx_lm(row.numpy()))
            if stored.exact:
                self.before = found
            begin = time.monotonic()
            options = dict(max_new_tokens=new, eos_token_id=(), num_beams=1)
            onnx_lm.generate(self.ids[:1, :1].numpy(), **options)
            speed = new / (time.monotonic() - begin)
            before, theirs = self.before
        figures = [f"perplexity {perplexity:.3f}"]
        if not stored.exact:
            same = (likeliest == theirs).double().mean()
            figures[0] += f" (in fp32 {before:.3f}, {perplexity / before - 1:+.2%})"
            figures.append(f"{same:.0%} of tokens have the same likeliest successor")
        return ", ".join((*figures, f"{speed:.0f} tokens/s"))


def evaluate(
    lm, folder: Path, found: dict, evaluation, max_drop: float | None, log
) -> dict[str, dict]:
    """Evaluates torch in fp32 and each precision in `found` on the CPU; evaluation: train.py's `Evaluation`.

    Returns a table, precision -> column -> value: size, the first figure of a validation, rows whose prediction differs
    from torch's, texts per second, and that relative to fp32. Deletes the graphs of a precision whose figure is worse
    than torch's by more than `max_drop`, and its entry in `found`. Raises Error if none is left.
    """
    train = tinylm.beside("train")
    table: dict = {}
    speeds: dict = {}
    for name in ("torch", *found):
        log(f"evaluating {name}")
        model = lm if name == "torch" else train.ExportedLM(folder, name, [CPU])
        begin = time.monotonic()
        figures = evaluation.figures(model)
        measured = time.monotonic()
        decisions = evaluation.decisions(model)
        if decisions is None:
            speeds[name] = len(evaluation.examples) / (measured - begin)
        else:
            speeds[name] = len(decisions) / (time.monotonic() - measured)
        if name == "torch":
            figure = train.chosen_figure(figures, evaluation.options)
            expected = decisions
        files = graph_files(folder, name) if name in found else [folder / "model.safetensors"]
        size = sum(path.stat().st_size for path in files) / 1e6
        table[name] = {"size": f"{size:.1f} MB", figure: figures[figure]}
        if decisions is not None:
            changed = sum(one != other for one, other in zip(decisions, expected))
            table[name]["changed"] = "" if name == "torch" else f"{changed:,} of {len(decisions):,}"
    base = "fp32" if "fp32" in speeds else "torch"
    for name, speed in speeds.items():
        table[name] |= {"texts/s": f"{speed:.1f}", f"beside {base}": f"{speed / speeds[base]:.2f}"}
    for line in train.table_lines(table):
        log(line)
    below = "above" if figure in train.LOWER_IS_BETTER else "below"
    for name in list(found):
        found[name] |= {"eval": table[name]}
        drop = table["torch"][figure] - table[name][figure]
        drop = -drop if below == "above" else drop
        if max_drop is not None and not drop <= max_drop:
            log(
                f"{name} is dropped: {figure} {table[name][figure]:.4f} is {drop:.4f} {below} torch's, "
                f"more than --max-drop {max_drop:g}"
            )
            for path in graph_files(folder, name):
                path.unlink()
            del found[name], table[name]
    require(
        found, f"--max-drop {max_drop}: no precision is as good on {figure}; nothing is written"
    )
    return table


def write_card(file: Path, title: str, source: Path | None, table: dict, safetensors: bool):
    """Writes the checkpoint's model card, with its pictures, and the table of `evaluate` under it."""
    card = source / "README.md" if source else file
    text = f"# {title}\n"
    if card.exists():
        text = card.read_text(encoding="utf-8", errors="replace").rstrip() + "\n"
        for name in re.findall(r"!\[[^]]*\]\(([\w.-]+)\)", text):
            if (source / name).is_file():
                shutil.copyfile(source / name, file.with_name(name))
    columns = [*next(iter(table.values()))]
    rows = [["precision", *columns], ["---"] * (len(columns) + 1)]
    for name, values in table.items():
        rows.append([name, *(f"{x:.4f}" if isinstance(x, float) else x for x in values.values())])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    about = (
        "Measured on the CPU. Changed: rows whose prediction differs from that of torch in fp32."
    )
    about += "" if safetensors else " There is no model.safetensors: these graphs are the model."
    code = f'from onnxlm import OnnxLM\n\nmodel = OnnxLM(".", precision="{rows[-1][0]}")'
    text += f"\n## Graphs\n\n{about}\n\n{lines}\n\n```python\n{code}\n```\n"
    file.write_text(text, encoding="utf-8")


def replace_directory(work: Path, out: Path):
    """Renames a folder over another one, which is restored if that fails."""
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


# Fields that genai_config.json shares with generation_config.json.
GENAI_SEARCH = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "num_beams",
    "num_return_sequences",
    "length_penalty",
    "early_stopping",
    "min_length",
    "no_repeat_ngram_size",
    "diversity_penalty",
)
# Fields of generation_config.json that do not affect the search, or have another place in genai_config.json.
NO_SEARCH = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "max_length",
    "transformers_version",
    "use_cache",
    "cache_implementation",
    "trust_remote_code",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
)


def write_genai_config(lm, folder: Path, precision: str, log):
    """Writes the genai_config.json of a decoder, for the graph of one precision."""
    if writes(lm):
        config, left = genai_config(lm, PRECISIONS[precision])
        tinylm.write_json(folder / "genai_config.json", config)
        if left:
            log(f"genai_config.json cannot say {', '.join(left)} of generation_config.json")


def genai_config(lm, stored: Precision) -> tuple[dict, list]:
    """onnxruntime-genai's settings for a graph, and the fields of generation_config.json that they cannot express."""
    config = lm.config
    ends = lm.ends()
    pad = lm.special_token_id("pad_token_id")
    if pad not in range(config.vocab_size) or pad in ends:
        # genai requires an end token even where none ends the text: the last id is the rarest.
        pad = next(i for i in reversed(range(config.vocab_size)) if i not in ends)
    # onnxruntime-genai runs on the CPU unless it is told otherwise.
    graph = decoder_graph(lm, stored)[-1]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"onnx/{graph.stem}{stored.suffix}.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")},
        "outputs": {"logits": "logits"}
        | {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")},
    }
    begin = config.bos_token_id if config.bos_token_id is not None else ends[0] if ends else 0
    length = tinylm.short_limit(config) or config.max_position_embeddings
    search, left = genai_search(lm.generation_config, length)
    # Beams cannot share a buffer.
    search["past_present_share_buffer"] = graph.grouped and search["num_beams"] == 1
    model = {
        "type": "decoder",
        "vocab_size": config.vocab_size,
        "bos_token_id": begin,
        "context_length": length,
        "eos_token_id": list(ends) or [pad],
        "pad_token_id": pad,
        "decoder": decoder,
    }
    return {"model": model, "search": search}, left


def genai_search(file: dict, positions: int) -> tuple[dict, list]:
    """The search options of generation_config.json, and the names that onnxruntime-genai does not know."""
    search = {"do_sample": False, "num_beams": 1, "max_length": positions}
    left = []
    if isinstance(length := file.get("max_length"), int) and length > 0:
        search["max_length"] = min(length, positions)
    for name, value in file.items():
        if value is None or name in NO_SEARCH or name.startswith(("_", "output_", "return_")):
            continue
        flag = name in ("do_sample", "early_stopping")
        if name in GENAI_SEARCH and isinstance(value, bool) == flag and not isinstance(value, str):
            search[name] = value
        elif value or name.endswith("_token_id"):
            inert = value == 1 and not name.endswith(("_token_id", "_new_tokens"))
            left += [] if inert else [name]
    return search, left


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list | None = None) -> int:
    """`export.py [FOLDER] --onnx` exports."""
    use_utf8()
    argv = sys.argv[1:] if argv is None else argv
    try:
        with plain_warnings("tinylm export"):
            return run_export(argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # Any library's error becomes one line.
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        print(f"tinylm export: error: {kind}{first_line(error)}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinylm export",
        description="Turn a checkpoint into safetensors and ONNX graphs in one folder, verified against torch, and "
        "try it; `python onnxlm.py FOLDER INPUT...` runs it later, without torch.",
    )
    parser.add_argument(
        "folder",
        nargs="?",
        default=str(WEIGHTS),
        help="a checkpoint: its folder, or its name on the hub (default: the shipped one)",
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
        help="file of text such as the model will meet: weights of 4 bits and an encoder's int8 are rounded "
        "for it, and every precision is measured on it",
    )
    parser.add_argument(
        "--eval",
        metavar="DATA",
        help="data of the model's task, as for `tinylm eval`: for each precision the size, the figure, the rows that "
        "change and the speed, in a table that the model card gets too",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="DROP",
        help="with --eval: leave out a precision whose figure is worse than torch's by more than this, such as 0.01",
    )
    parser.add_argument(
        "--weights",
        choices=["safetensors", "none"],
        default="safetensors",
        help="none: leave model.safetensors out, which graphs do not need",
    )
    parser.add_argument(
        "--out",
        default="exported",
        help="folder to write (default: exported); an earlier export there keeps its other precisions, if they are "
        "of the same weights",
    )
    parser.add_argument(
        "--prompt",
        help="text that the exported model continues, greedily, or reads (default: a question for a chat model, else a "
        "sample)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=160, help="of that text (default: 160)"
    )
    return parser


def run_export(argv: list) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if not (options.onnx or options.safetensors):
        parser.error("nothing to do: give --onnx, --safetensors or both")
    if not options.onnx and (
        options.generate or options.int8_cache or options.text or options.prompt
    ):
        parser.error("--generate, --int8-cache, --text and --prompt go with --onnx")
    if options.weights == "none" and (options.safetensors or not options.onnx):
        parser.error("--weights none goes with --onnx, without --safetensors")
    precisions = [*PRECISIONS] if "all" in options.precision else options.precision
    text = Path(options.text).read_text(encoding="utf-8") if options.text else None
    with stage_log() as log:
        found = export_onnx(
            options.folder,
            options.out,
            onnx=options.onnx,
            safetensors=options.weights == "safetensors",
            precisions=precisions,
            text=text,
            generate=options.generate,
            int8_cache=options.int8_cache,
            eval_data=options.eval,
            max_drop=options.max_drop,
            log=log,
        )
        log(f"wrote {options.out}")
    if not options.onnx:
        return 0
    lm = OnnxLM(options.out, next(iter(found), None))
    if lm.task == "lm":
        shipped = Path(options.folder).resolve() == WEIGHTS
        print_sample(lm, options.prompt, options.max_new_tokens, "ROMEO:" if shipped else "")
    elif options.prompt:
        run_lines(lm, [options.prompt], max_new_tokens=options.max_new_tokens)
    return 0


@contextlib.contextmanager
def stage_log(silence: float = 9.5):
    """Yields a function that prints a line with the seconds since the start. Where stderr is no terminal that would show
    progress bars, so many seconds of silence end in a line too."""
    begin = printed = time.monotonic()
    done = threading.Event()

    def log(text: str):
        nonlocal printed
        printed = time.monotonic()
        print(f"[{printed - begin:5.1f} s] {text}", flush=True)

    def break_silence():
        while not done.wait(silence / 20):
            if time.monotonic() - printed >= silence:
                log("still working")

    if not sys.stderr.isatty():
        threading.Thread(target=break_silence, daemon=True).start()
    try:
        yield log
    finally:
        done.set()


def print_sample(lm: OnnxLM, prompt: str | None, max_new_tokens: int, default_prompt: str):
    """Prints a continuation as it is generated, greedy for a prompt that was given, and the speed after the first token.
    Without a prompt, a chat model answers a question; others continue the default."""
    if not (lm.folder / "tokenizer.json").exists():
        return print("no sample: the checkpoint has no tokenizer.json")
    options = {} if prompt else {"temperature": 0.7, "seed": 1}
    chat = prompt is None and has_chat_template(lm.tokenizer)
    prompt = default_prompt if prompt is None else prompt
    if chat:
        prompt = "What is the capital of France?\n"
        messages = [{"role": "user", "content": prompt.strip()}]
        text = lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = lm.tokenizer.encode(text, special=False)
        ends = as_ids("eos_token_id", lm.tokenizer.eos_token_id)
        options = {"eos_token_id": (*lm.ends(), *ends)}
    else:
        ids = lm.tokenizer.encode(prompt)
    print(f"\n{prompt}", end="", flush=True)
    times = []
    max_new_tokens = max(1, min(max_new_tokens, lm.session.limit - len(ids)))

    for _, piece in lm.steps(ids, max_new_tokens, **options):
        times.append(time.monotonic())
        print(piece, end="", flush=True)
    speed = f", {(len(times) - 1) / (times[-1] - times[0]):.0f} tokens/s" if len(times) > 1 else ""
    print(f"\n\n{lm.provider}{speed}")


if __name__ == "__main__":
    sys.exit(main())
