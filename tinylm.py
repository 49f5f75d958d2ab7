"""tinylm: a language model in one file: the transformer, its training step and its KV-cached sampler.

    from tinylm import Config, MuonAdamW, TinyLM, train_step
    lm = TinyLM(Config(hidden_size=256, num_hidden_layers=4))                  # a decoder over bytes
    loss = train_step(lm, MuonAdamW(lm), torch.tensor([lm.tokenizer.encode("To be, or not to be")]))
    for piece in lm.stream("To be", max_new_tokens=20): print(piece, end="")
    lm.save("mine"); lm = TinyLM.load("mine")                                  # safetensors and config.json

It needs torch, einops and safetensors. With pretrained.py and onnxlm.py beside it, `TinyLM.from_pretrained` opens
Hugging Face folders and `save_pretrained` writes them. Read it from top to bottom: config, blocks, positions and cache,
model, saving, training step, generation. Every leaf (`rms_norm`, `rotate`, `attend`, `MLP`, ...) is looked up when it
is called: replace one in this module, and train.

Sources: Vaswani et al. 2017 (the transformer); Devlin et al. 2019 (BERT); Raffel et al. 2020 (T5); Lewis et al. 2020
(BART); Su et al. 2021 (rotary positions); Zhang & Sennrich 2019 (RMS norm); Shazeer 2020 (gated MLP); Ainslie et al.
2023 (grouped queries); Jordan 2024 (Muon). Reference implementation: Hugging Face transformers.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import numbers
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__version__ = "0.2.0"
__all__ = [
    "Config",
    "TinyLM",
    "KVCache",
    "GenerationConfig",
    "ByteTokenizer",
    "MuonAdamW",
    "loss_sum",
    "train_step",
    "Error",
]

# Axes: b batch, s query positions, t key positions, h query heads, g key-value heads, d head width.


class Error(ValueError):
    """Invalid input. One line: the argument or file, its value, what was expected."""

    def __init__(self, message: str):
        line = " ".join(str(message).split())
        super().__init__(line if len(line) < 1000 else f"{line[:700]} ... {line[-200:]}")


def require(ok, message: str):
    if not ok:
        raise Error(message)


def is_number_in(value, low, high, kind=numbers.Real) -> bool:
    """Whether it is a number from low to high; a bool, which Python counts among the ints, is not."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def beside(name: str):
    """A module of ours that lies beside this file, or is installed with it. Raises Error where it is missing."""
    for place in [f"{__package__}.{name}", name] if __package__ else [name]:
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name != place:
                raise
    also = ", with onnxlm.py" if name == "pretrained" else ""
    raise Error(f"{name}.py is missing: copy it beside {Path(__file__).name}{also}")


Size = Annotated[int, 1, 2**31]
Width = Annotated[int, 1, 2**18]
Layers = Annotated[int, 1, 9999]
Count = Annotated[int, 0, 2**31]
Id = Annotated[int, -1, 2**31]
Real = Annotated[float, 1e-30, 1e30]
Share = Annotated[float, 0, 1]
Dropout = Annotated[float, 0, 0.99]


def matches_annotation(annotation, value) -> tuple[bool, str]:
    """Returns (whether the value fits the annotation, a phrase for what is allowed)."""
    if get_origin(annotation) in (Union, UnionType):
        parts = [matches_annotation(part, value) for part in get_args(annotation)]
        return any(fits for fits, _ in parts), " or ".join(text for _, text in parts if text)
    if get_origin(annotation) is Annotated:
        kind, low, high = get_args(annotation)
        limits = "of 64 bits" if low == -(2**63) else f"from {low:g} to {high:g}"
        if kind is float:
            return is_number_in(value, low, high), f"a number {limits}"
        return is_number_in(value, low, high, numbers.Integral), f"an integer {limits}"
    if get_origin(annotation) is Literal or annotation is bool:
        choices = get_args(annotation) or (True, False)
        return value in choices, " or ".join(map(str, choices))
    is_none = annotation is NoneType
    return isinstance(value, annotation), "" if is_none else f"a {annotation.__name__}"


def check_fields(owner, spelled: Callable = str):
    """Raises Error for a dataclass field that does not fit its annotation; `spelled` turns a field's name into the
    form that the error shows."""
    for name, annotation in get_type_hints(type(owner), include_extras=True).items():
        fits, expected = matches_annotation(annotation, getattr(owner, name))
        require(fits, f"{spelled(name)} = {getattr(owner, name)!r}, expected {expected}")


# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------
ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}
Act = Literal[tuple(ACTIVATIONS)]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
LAYER_TYPES = ("full_attention", "sliding_attention")
POSITIONS = ("rope", "learned", "sinusoidal", "relative", "learned_relative")
# rope_type -> keys of rope_scaling that it needs, and optional ones.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
ORIGINAL = "original_max_position_embeddings"
ROPE_OPTIONS = {
    "llama3": (ORIGINAL,),
    "yarn": (ORIGINAL, "attention_factor", "beta_fast", "beta_slow")
    + ("mscale", "mscale_all_dim", "truncate"),
    "longrope": (ORIGINAL, "attention_factor", "factor"),
}


def by_number(names: dict) -> dict:
    """Class names in the order of their numbers, which are text in JSON."""
    if not all(str(number).isdecimal() for number in names):
        return names
    return dict(sorted((int(number), str(name)) for number, name in names.items()))


@dataclass(frozen=True)
class Config:
    """A model's architecture, in the names of Hugging Face `config.json`. The defaults are Qwen3's.

    Raises Error where a value is out of its range.
    """

    # Sizes
    vocab_size: Size = 320  # rows of the embedding; bytes and two specials, padded to 64
    hidden_size: Width = 256  # width of the residual stream
    intermediate_size: Size | None = (
        None  # inside the MLP; None: 8/3 of hidden_size, ungated 4 times
    )
    num_hidden_layers: Layers = 4  # of the decoder, or of the only stack
    max_position_embeddings: Size = 1024  # the longest sequence
    num_encoder_layers: Count = 0  # above 0: an encoder-decoder
    encoder_attention_heads: Width | None = None  # None: num_attention_heads
    encoder_intermediate_size: Size | None = None  # None: intermediate_size

    # Attention
    causal: bool = True  # a token attends to earlier ones only; False: an encoder
    num_attention_heads: Width = 4  # query heads
    num_key_value_heads: Width | None = None  # None: as many as query heads; fewer: grouped queries
    head_dim: Width | None = None  # None: hidden_size / num_attention_heads
    qk_norm: Literal["head", "full", None] = (
        "head"  # norm of q and k: over each head, or over all heads
    )
    attention_bias: bool = False  # bias of q, k, v
    attention_output_bias: bool | None = None  # bias of o; None: as attention_bias
    query_pre_attn_scalar: Real | None = None  # scores are q.k / sqrt(this); None: head_dim
    attn_logit_softcapping: Real | None = None  # c: scores become c tanh(scores / c)
    attention_multiplier: Real | None = None  # scores are q.k times this (Granite)
    sliding_window: Size | None = None  # a sliding layer sees keys at a distance below this
    layer_types: tuple | list | None = None  # one of LAYER_TYPES per layer; None: all alike

    # Norms
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: Real = 1e-6
    norm_offset: float = 0.0  # added to the RMS norm's weight (Gemma: 1)
    # pre: x + f(norm(x)); post: norm(x + f(x)); output: x + norm(f(x)); sandwich: x + norm(f(norm(x)))
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"
    norm_bias: bool = True  # of layer norms
    first_norm: bool = True  # a norm before the first layer's attention
    final_norm: bool = True  # a norm after the last layer
    use_parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm(x))
    residual_multiplier: Real = 1.0  # of what each sub-layer adds to the residual stream

    # MLP
    hidden_act: Act = "silu"
    gated: bool = True  # act(gate(x)) * up(x), else act(up(x))
    mlp_bias: bool = False
    num_experts: Count = 0  # above 0: so many gated MLPs of intermediate_size, behind a router
    num_experts_per_tok: Size = 2
    norm_topk_prob: bool = True  # the weights of a token's experts add up to one
    output_router_logits: bool = False  # in training, add a loss that balances the experts
    router_aux_loss_coef: Annotated[float, 0, 1e9] = 0.001  # weight of that loss

    # Positions
    position: Literal[POSITIONS] = "rope"  # learned_relative: both of them (MPNet)
    position_offset: Count = 0  # unused positions of a table before position 0
    rope_theta: Real = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": a key of ROPE_KEYS, "factor": ...}
    rope_local_base_freq: Real | None = None  # theta of sliding layers, unscaled; None: rope_theta
    no_rope_layers: tuple | list | None = None  # per layer: 1 rotates, 0 does not; None: all do
    partial_rotary_factor: Share = 1.0  # share of each head's channels that rotate
    relative_attention_num_buckets: Annotated[int, 4, 2**20] = 32
    relative_attention_max_distance: Annotated[int, 2, 2**31] = 128

    # Embeddings
    embedding_size: Width | None = None  # projected to hidden_size; None: hidden_size
    type_vocab_size: Count = 0  # token types; 0: none
    scale_embedding: bool = False  # embeddings times sqrt(hidden_size)
    embedding_multiplier: Real = 1.0  # embeddings times this
    embedding_norm: bool = False  # a norm after all embeddings are added
    tie_word_embeddings: bool = True  # the head's weight is the embedding
    initializer_range: Real = 0.02  # standard deviation of random weights

    # Head
    head: Literal["lm", "mlm", "classify", "tokens", "qa", None] = "lm"  # None: hidden states
    head_act: Act | None = None  # a dense layer with this activation before the head's output
    head_dense_bias: bool = True
    head_norm: bool = False  # and a norm after that
    head_bias: bool = False  # bias of the head's output
    # The state that a classifier reads. None: the first token's in an encoder, else the last one's.
    classifier_pooling: Literal["cls", "last", "mean", None] = None
    scale_logits: bool = False  # the input of a language model's head over sqrt(hidden_size) (T5)
    logits_scaling: Real = 1.0  # the input of a language model's head is divided by this
    final_logit_softcapping: Real | None = None  # c: logits become c tanh(logits / c)
    id2label: dict | None = None  # classes of a classifying head; None: two
    problem_type: Problem | None = None  # what the loss takes labels for; None: a single label

    # Dropout, in training
    attention_dropout: Dropout = 0.0  # of attention weights
    hidden_dropout: Dropout = 0.0  # of the output of each sub-layer
    embedding_dropout: Dropout = 0.0
    # Before the head's output. None: hidden_dropout in an encoder's classifier, else 0.
    head_dropout: Dropout | None = None

    # Special tokens, and the family
    bos_token_id: Id | None = None
    eos_token_id: int | tuple | list | None = None
    pad_token_id: Id | None = None
    decoder_start_token_id: Id | None = None  # first token of a decoder behind an encoder
    model_type: str | None = None  # a family of pretrained.py; None: the first that can express it

    def __post_init__(self):
        check_fields(self, "config: {}".format)
        self._expect(
            "num_attention_heads",
            self.head_dim or self.hidden_size % self.num_attention_heads == 0,
            f"a divisor of hidden_size = {self.hidden_size}, or head_dim",
        )
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(self).items()
            if value is not None
        }
        if self.id2label:
            given["id2label"] = by_number(self.id2label)
        vars(self).update(self._defaults() | given)
        self._check_attention()
        self._check_head()
        if self.position == "rope":
            self._check_rope()

    def _defaults(self) -> dict:
        """Defaults that follow from other fields."""
        heads, inner = self.num_attention_heads, self.intermediate_size
        if inner is None:
            # A gated MLP has three matrices, a plain one two; both get about as many weights.
            inner = -(-self.hidden_size * 8 // 3 // 64) * 64 if self.gated else 4 * self.hidden_size
        layer_type = "full_attention" if self.sliding_window is None else "sliding_attention"
        defaults = dict(
            head_dim=self.hidden_size // heads,
            num_key_value_heads=heads,
            intermediate_size=inner,
            embedding_size=self.hidden_size,
            layer_types=(layer_type,) * self.num_hidden_layers,
            attention_output_bias=self.attention_bias,
        )
        if self.num_encoder_layers:
            start = self.pad_token_id or 0
            defaults |= dict(
                encoder_attention_heads=heads,
                encoder_intermediate_size=inner,
                decoder_start_token_id=start if self.bos_token_id is None else self.bos_token_id,
            )
        if self.head in ("classify", "tokens"):
            defaults["id2label"] = {0: "LABEL_0", 1: "LABEL_1"}
        return defaults

    def _expect(self, name: str, fine, expected: str):
        require(fine, f"config: {name} = {getattr(self, name)!r}, expected {expected}")

    def _check_attention(self):
        heads, types = self.num_attention_heads, self.layer_types
        self._expect(
            "num_key_value_heads",
            heads % self.num_key_value_heads == 0,
            f"a divisor of num_attention_heads = {heads}",
        )
        if "relative" in self.position:
            self._expect(
                "position",
                heads == self.num_key_value_heads and self.attn_logit_softcapping is None,
                "another: relative positions support neither grouped queries nor soft-capping",
            )
        self._expect(
            "use_parallel_residual",
            not self.use_parallel_residual or self.norm_position != "post",
            "False where norm_position is post",
        )
        self._expect(
            "encoder_attention_heads",
            self.encoder_attention_heads in (None, heads)
            or self.hidden_size % self.encoder_attention_heads == 0,
            f"a divisor of hidden_size = {self.hidden_size}",
        )
        self._expect(
            "layer_types",
            isinstance(types, tuple)
            and len(types) == self.num_hidden_layers
            and set(types) <= set(LAYER_TYPES),
            f"{self.num_hidden_layers} of {', '.join(LAYER_TYPES)}",
        )
        if "sliding_attention" in types:
            self._expect(
                "sliding_window",
                self.sliding_window,
                "a number, as layer_types has a sliding_attention",
            )

        rotates = self.no_rope_layers
        self._expect(
            "no_rope_layers",
            rotates is None or len(rotates) == self.num_hidden_layers and {*rotates} <= {0, 1},
            f"{self.num_hidden_layers} of 0 and 1",
        )

        experts = self.num_experts
        self._expect(
            "num_experts",
            not experts or self.gated and not self.mlp_bias and self.num_experts_per_tok <= experts,
            f"0, or from num_experts_per_tok = {self.num_experts_per_tok}, gated and without mlp_bias",
        )

    def _check_head(self):
        projected = self.head == "mlm" and self.head_act
        self._expect(
            "embedding_size",
            not self.tied or self.embedding_size == self.hidden_size or projected,
            f"hidden_size = {self.hidden_size}, as the head is the embedding",
        )
        if self.head in ("classify", "tokens"):
            labels = self.id2label
            self._expect(
                "id2label",
                isinstance(labels, dict) and list(labels) == list(range(len(labels))) != [],
                "names for 0, 1, 2, ...",
            )

    def _check_rope(self):
        self._expect(
            "head_dim",
            self.rotary_dim in range(2, self.head_dim + 1, 2),
            f"a size of which an even number of channels rotate, not {self.rotary_dim}",
        )
        scaling = {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling
        kind = isinstance(scaling, dict) and scaling.get("rope_type")
        self._expect(
            "rope_scaling", kind in [*ROPE_KEYS], f"an object with rope_type {', '.join(ROPE_KEYS)}"
        )
        optional = (ORIGINAL, *ROPE_OPTIONS.get(kind, ()))
        for key in {*ROPE_KEYS[kind], *scaling} - {"rope_type"}:
            known = key in ROPE_KEYS[kind] + optional
            self._expect("rope_scaling", known, f"no {key} in type {kind!r}")
            value = scaling.get(key)
            if key in ("short_factor", "long_factor"):
                many = isinstance(value, (list, tuple)) and len(value) == self.rotary_dim // 2
                fine = many and all(is_number_in(x, 1e-6, 1e9) for x in value)
                expected = f"{key} of {self.rotary_dim // 2} positive numbers"
                self._expect("rope_scaling", fine, expected)
                continue
            unset = key in optional and value in (None, True, False)
            self._expect(
                "rope_scaling", unset or is_number_in(value, 1e-6, 1e9), f"a positive {key}"
            )

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def qkv_sizes(self) -> tuple:
        """Rows of q, k and v in the fused projection."""
        kv_size = self.num_key_value_heads * self.head_dim
        return self.num_attention_heads * self.head_dim, kv_size, kv_size

    @property
    def encoder(self) -> Config:
        """The config of an encoder-decoder's encoder."""
        same_heads = self.encoder_attention_heads == self.num_attention_heads
        return replace(
            self,
            causal=False,
            num_encoder_layers=0,
            num_hidden_layers=self.num_encoder_layers,
            num_attention_heads=self.encoder_attention_heads,
            num_key_value_heads=self.num_key_value_heads if same_heads else None,
            head_dim=self.head_dim if same_heads else None,
            intermediate_size=self.encoder_intermediate_size,
            layer_types=None,
            sliding_window=None,
            no_rope_layers=None,
            head=None,
            head_act=None,
        )

    @property
    def num_labels(self) -> int:
        return len(self.id2label or ("start", "end"))

    @property
    def outputs(self) -> int:
        """Outputs of the head for each text or token."""
        if self.head is None:
            return 0
        if self.head in ("lm", "mlm"):
            return self.vocab_size
        return 2 if self.head == "qa" else self.num_labels

    @property
    def tied(self) -> bool:
        return self.tie_word_embeddings and self.head in ("lm", "mlm")


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 (Zhang & Sennrich 2019)."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias. A single row on a CPU is bound by memory, and there the compiler's fused sum streams the
    weights up to twice as fast as the library's matrix product."""
    one_row = x.device.type == "cpu" and x.shape[:-1].numel() == 1
    if not (one_row and torch.compiler.is_dynamo_compiling()):
        return F.linear(x, weight, bias)
    # as_strided forces the row to be materialised; otherwise its producer is recomputed in every sum.
    row = x.reshape(-1).as_strided((x.shape[-1],), (1,))
    y = (row * weight).sum(-1).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Rotary positions (Su et al. 2021). Rotates the pairs (i, i + r/2) of each head's first r channels; the remaining
    channels pass through.

    x (batch, seq, heads * head_dim); cos, sin (batch, seq, r / 2).
    """
    x = rearrange(x, "b s (h d) -> b s h d", d=head_dim)
    cos = cos[:, :, None].to(x.dtype)
    sin = sin[:, :, None].to(x.dtype)
    half = cos.shape[-1]
    # A single split, so that its gradient is a single concatenation.
    x1, x2, rest = x.split((half, half, head_dim - 2 * half), dim=-1)
    rotated1 = torch.addcmul(x1 * cos, x2, sin, value=-1)
    rotated2 = torch.addcmul(x2 * cos, x1, sin)
    return rearrange(torch.cat((rotated1, rotated2, rest), dim=-1), "b s h d -> b s (h d)")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    head_dim: int,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    cache=None,
    layer: int = 0,
    causal: bool = True,
) -> Tensor:
    """softmax(q k^T scale) v with grouped queries, (batch, seq, heads * head_dim). `softcap` caps the scores (Gemma 2).

    q (batch, seq, heads * head_dim); k, v (batch, keys, kv_heads * head_dim), which are appended to the layer's cache;
    mask (batch, 1, seq, keys), True where attention is allowed, or (batch, heads, seq, keys), added to the scores, or
    None for the causal triangle or for all keys, so that flash kernels can run.
    """
    q, k, v = (rearrange(x, "b s (h d) -> b h s d", d=head_dim) for x in (q, k, v))
    if cache is not None:
        k, v = cache.update(layer, k, v)
    # Query heads that share a key head.
    groups = q.shape[1] // k.shape[1]
    seq = q.shape[2]
    if softcap is not None:
        if mask is None and causal:
            mask = torch.ones(seq, seq, dtype=torch.bool, device=q.device).tril()
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        x = softcapped_attention(q, k, v, mask, scale, softcap, dropout)
    elif mask is None:
        x = F.scaled_dot_product_attention(
            q, k, v, None, dropout, causal, scale=scale, enable_gqa=groups > 1
        )
    else:
        # The queries that share a key head become rows of one matrix, so keys are read once and not expanded.
        q = rearrange(q, "b (g r) s d -> b g (r s) d", r=groups)
        if min(groups, seq) > 1:
            mask = mask.expand(-1, -1, seq, -1).repeat(1, 1, groups, 1)
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        x = rearrange(x, "b g (r s) d -> b (g r) s d", s=seq)
    return rearrange(x, "b h s d -> b s (h d)")


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float, dropout: float
) -> Tensor:
    """softmax(cap tanh(q k^T scale / cap)) v of (batch, heads, seq, head_dim). No fused kernel computes it."""
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * (scale / cap))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


class Linear(nn.Linear):
    """nn.Linear that calls the leaf `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Drawn at random, except on the meta device, where drawing nothing would import torch._dynamo for a second."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class Norm(nn.Module):
    """RMS norm or layer norm over the last axis, or over each group of `size` channels in it."""

    def __init__(self, config: Config, size: int):
        super().__init__()
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        self.layer = config.norm == "layer"
        biased = self.layer and config.norm_bias
        self.bias = nn.Parameter(torch.zeros(size)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        size = len(self.weight)
        if x.shape[-1] != size:
            heads = rearrange(x, "... (h d) -> ... h d", d=size)
            return rearrange(self(heads), "... h d -> ... (h d)")
        if self.layer:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        weight = self.weight.float() + self.offset if self.offset else self.weight
        return rms_norm(x, weight, self.eps)


class Rotary(nn.Module):
    """The cos and sin, each (batch, seq, dim / 2), of the angles of positions (batch, seq).

    `limit` is the model's longest sequence. Scalings stretch it: linear (kaiokendev 2023), dynamic (NTK-aware: each
    row's length stretches its theta), llama3 (Llama 3.1), yarn (Peng et al. 2023) and longrope (Ding et al. 2024: each
    row's length chooses one of two lists of factors).
    """

    def __init__(self, dim: int, theta: float, limit: int, scaling: dict | None = None):
        super().__init__()
        scaling = scaling or {"rope_type": "default"}
        self.kind = scaling["rope_type"]
        self.factor = scaling.get("factor", 1.0)
        self.dim = dim
        self.theta = theta
        self.limit = limit
        # Multiplies cos and sin.
        self.magnitude = 1.0
        original = scaling.get("original_max_position_embeddings") or limit
        # On the CPU, since a model is built on the meta device before its weights are read.
        inv_freq = inverse_frequencies(dim, theta, "cpu")
        if self.kind == "linear":
            inv_freq = inv_freq / self.factor
        elif self.kind == "llama3":
            inv_freq = llama3_frequencies(inv_freq, scaling, original)
        elif self.kind == "yarn":
            inv_freq = yarn_frequencies(inv_freq, scaling, original, theta)
            self.magnitude = yarn_magnitude(scaling)
        elif self.kind == "longrope":
            self.original = original
            self.magnitude = longrope_magnitude(scaling, limit / original, original)
            short, long = (
                torch.tensor(scaling[key], dtype=torch.float32, device="cpu")
                for key in ("short_factor", "long_factor")
            )
            self.register_buffer("long_inv_freq", inv_freq / long, persistent=False)
            inv_freq = inv_freq / short
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn, recurse=True):
        """Follows the model's device but stays float32."""
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq
        length = positions.amax(-1, keepdim=True) + 1
        if self.kind == "longrope":
            inv_freq = torch.where(length > self.original, self.long_inv_freq, inv_freq)
        if self.kind == "dynamic":
            length = length.clamp(min=self.limit)
            stretch = self.factor * length / self.limit - (self.factor - 1)
            base = self.theta * stretch ** (self.dim / (self.dim - 2))
            inv_freq = inverse_frequencies(self.dim, base, positions.device)
        angles = positions[..., None].float() * inv_freq[..., None, :]
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude


def inverse_frequencies(dim: int, theta: float | Tensor, device) -> Tensor:
    """The angle by which each pair of channels rotates per position: theta^(-2i / dim), (dim / 2,)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / theta**exponents


def llama3_frequencies(inv_freq: Tensor, scaling: dict, original: int) -> Tensor:
    """Stretches long wavelengths, keeps short ones and blends between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # Rotations within the original length.
    turns = original * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]


def yarn_frequencies(inv_freq: Tensor, scaling: dict, original: int, theta: float) -> Tensor:
    """Stretches channels that complete less than beta_slow rotations within the original length, keeps those that
    complete more than beta_fast, and blends between."""
    dim = 2 * len(inv_freq)

    def channel(turns):
        # The channel that completes `turns` rotations within the original length.
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = channel(scaling.get("beta_fast") or 32)
    high = channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)
    channels = torch.arange(dim // 2, device="cpu")
    stretch = ((channels - low) / (high - low or 0.001)).clamp(0, 1)
    return stretch * inv_freq / scaling["factor"] + (1 - stretch) * inv_freq


def yarn_magnitude(scaling: dict) -> float:
    """The factor of cos and sin that keeps attention as sharp as at the original length."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    growth = 0.1 * math.log(max(scaling["factor"], 1))
    m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return (growth * m + 1) / (growth * m_all + 1) if m and m_all else growth + 1


def longrope_magnitude(scaling: dict, growth: float, original: int) -> float:
    """The factor of cos and sin at all lengths; growth: the longest length by the original one, if no factor is given."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    growth = max(scaling.get("factor") or growth, 1)
    return math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0


class Attention(nn.Module):
    """Grouped-query attention: self-attention with one fused projection, or cross-attention whose keys and values are
    computed once."""

    def __init__(self, config: Config, cross: bool = False):
        super().__init__()
        self.sizes = config.qkv_sizes
        self.head_dim = config.head_dim
        self.causal = config.causal and not cross
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        if config.attention_multiplier is not None:
            self.scale = config.attention_multiplier
        self.softcap = config.attn_logit_softcapping
        self.dropout = config.attention_dropout
        q_size, k_size, v_size = self.sizes
        hidden, bias = config.hidden_size, config.attention_bias
        if cross:
            self.q = Linear(hidden, q_size, bias=bias)
            self.kv = Linear(hidden, k_size + v_size, bias=bias)
        else:
            self.qkv = Linear(hidden, q_size + k_size + v_size, bias=bias)
        self.o = Linear(q_size, hidden, bias=config.attention_output_bias)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm is not None:
            over_head = config.qk_norm == "head"
            self.q_norm = Norm(config, config.head_dim if over_head else q_size)
            self.k_norm = Norm(config, config.head_dim if over_head else k_size)

    def forward(
        self,
        x: Tensor,
        rope: tuple | None,
        mask: Tensor | None,
        cache=None,
        layer: int = 0,
        keys_values: tuple | None = None,
    ) -> Tensor:
        """x (batch, seq, hidden); rope: cos and sin of the positions; keys_values: from `keys_values` of another sequence."""
        if keys_values is None:
            q, k, v = self.qkv(x).split(self.sizes, dim=-1)
            k = self.k_norm(k)
        else:
            q = self.q(x)
            k, v = keys_values
        q = self.q_norm(q)
        if rope is not None:
            q = rotate(q, *rope, self.head_dim)
            k = rotate(k, *rope, self.head_dim)
        dropout = self.dropout if self.training else 0.0
        shape = self.head_dim, self.scale, self.softcap
        return self.o(attend(q, k, v, mask, *shape, dropout, cache, layer, self.causal))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, source, kv_heads * head_dim) of another sequence x (batch, source, hidden)."""
        k, v = self.kv(x).split(self.sizes[1:], dim=-1)
        return self.k_norm(k), v


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up fused (Shazeer 2020), or the plain down(act(up(x)))."""

    def __init__(self, config: Config):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.act = ACTIVATIONS[config.hidden_act]
        self.gated = config.gated
        if self.gated:
            self.gate_up = Linear(hidden, 2 * inner, bias=bias)
        else:
            self.up = Linear(hidden, inner, bias=bias)
        self.down = Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(self.act(self.up(x)))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class MoE(MLP):
    """A mixture of experts (Shazeer et al. 2017): each token's output is the sum of those of its num_experts_per_tok
    most probable experts, weighted by the router. The experts lie side by side in one wide MLP: gates of all experts,
    then their ups; the columns of `down` are those of all experts."""

    def __init__(self, config: Config):
        self.experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.inner, self.normalize = config.intermediate_size, config.norm_topk_prob
        super().__init__(replace(config, intermediate_size=self.experts * self.inner))
        self.router = nn.Linear(config.hidden_size, self.experts, bias=False)
        self.keeps_logits = config.output_router_logits
        self.router_logits = None

    def route(self, x: Tensor) -> Tensor:
        """The weights (batch, seq, experts) of the experts for each token, zero for most."""
        logits = self.router(x)
        if self.keeps_logits and self.training:
            self.router_logits = logits
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        return torch.zeros_like(logits, dtype=x.dtype).scatter(-1, chosen, weights)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.route(x)
        if not torch.compiler.is_compiling():
            return self.sparse(x, weights)
        # All experts at once: a graph of one shape, which needs no loop.
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y = rearrange(self.act(gate) * up, "... (e i) -> ... e i", e=self.experts)
        return self.down(rearrange(y * weights[..., None], "... e i -> ... (e i)"))

    def sparse(self, x: Tensor, weights: Tensor) -> Tensor:
        """Computes only the experts that a token has chosen."""
        rows, weights = rearrange(x, "b s h -> (b s) h"), rearrange(weights, "b s e -> (b s) e")
        total = torch.zeros_like(rows)
        gates, ups = self.gate_up.weight.chunk(2)
        for expert in weights.any(0).nonzero()[:, 0].tolist():
            part = slice(expert * self.inner, (expert + 1) * self.inner)
            tokens = weights[:, expert].nonzero()[:, 0]
            y = rows[tokens]
            y = self.act(linear(y, gates[part])) * linear(y, ups[part])
            y = linear(y * weights[tokens, expert, None], self.down.weight[:, part])
            total = total.index_add(0, tokens, y.to(total.dtype))
        return total.view(x.shape)


class Block(nn.Module):
    """Self-attention, cross-attention (in a decoder behind an encoder) and MLP. Each is added to the residual stream,
    with a norm before it (pre), after it (output), both (sandwich) or after the sum (post)."""

    def __init__(self, config: Config):
        super().__init__()
        before = config.norm_position != "output"
        after = config.norm_position in ("output", "sandwich")

        def norm(present: bool) -> nn.Module:
            return Norm(config, config.hidden_size) if present else nn.Identity()

        self.post = config.norm_position == "post"
        self.parallel = config.use_parallel_residual
        self.multiplier = config.residual_multiplier
        self.attention_norm = norm(before)
        self.attention_output_norm = norm(after)
        self.attention = Attention(config)
        self.cross_attention = Attention(config, cross=True) if config.num_encoder_layers else None
        if self.cross_attention is not None:
            self.cross_attention_norm = norm(before)
            self.cross_attention_output_norm = norm(after)
        self.mlp_norm = norm(before)
        self.mlp_output_norm = norm(after)
        self.mlp = MoE(config) if config.num_experts else MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple | None,
        mask: Tensor | None,
        cache=None,
        layer: int = 0,
        cross_kv: list | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Tensor:
        """x (batch, seq, hidden); cross_kv: for every layer, keys and values (batch, source, kv_heads * head_dim) of the
        encoder's output; encoder_mask (batch, 1, 1, source), True for tokens, or None without padding."""
        attention = self.attention, self.attention_norm, self.attention_output_norm
        before, x = x, self.add(x, *attention, rope, mask, cache, layer)
        if cross_kv is not None:
            norms = self.cross_attention_norm, self.cross_attention_output_norm
            arguments = None, encoder_mask, None, layer, cross_kv[layer]
            x = self.add(x, self.cross_attention, *norms, *arguments)
        mlp = self.mlp, self.mlp_norm, self.mlp_output_norm
        return x + self.output(before, *mlp) if self.parallel else self.add(x, *mlp)

    def add(
        self, x: Tensor, sublayer, norm: nn.Module, output_norm: nn.Module, *arguments
    ) -> Tensor:
        """x plus the sub-layer's output, normed where norm_position says."""
        y = x + self.output(x, sublayer, norm, output_norm, *arguments)
        return norm(y) if self.post else y

    def output(self, x: Tensor, sublayer, norm, output_norm, *arguments) -> Tensor:
        y = self.dropout(output_norm(sublayer(x if self.post else norm(x), *arguments)))
        return y if self.multiplier == 1 else y * self.multiplier


# ---------------------------------------------------------------------------------------------------------------------
# Positions and the key-value cache. One rule masks everything: a query sees keys at its own or earlier positions (in a
# sliding layer, within the window), or in an encoder later ones too, except padding. Padding has a position after all.
# ---------------------------------------------------------------------------------------------------------------------
# Kinds of positions that cannot exceed max_position_embeddings.
LIMITED = ("learned", "sinusoidal", "learned_relative")
# The position of padding and of cache columns that are not written yet.
NEVER = 2**30


def count_positions(mask: Tensor, start: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """Positions of queries and of keys, each (batch, seq), from a mask (batch, seq) with padding anywhere."""
    positions = start + mask.long().cumsum(-1) - 1
    return positions.clamp(min=0), torch.where(mask.bool(), positions, NEVER)


def visible(
    positions: Tensor, key_positions: Tensor, window: int | None = None, causal: bool = True
) -> Tensor:
    """The attention mask (batch, 1, seq, keys) for query and key positions, True where attention is allowed."""
    if not causal and window is None:
        return (key_positions < NEVER)[:, None, None, :]
    distance = positions[:, None, :, None] - key_positions[:, None, None, :]
    if not causal:
        return distance.abs() < window
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def last_column(mask: Tensor) -> Tensor:
    """The column (batch, 1) of the last token. Computed in floats, since ONNX Runtime's CUDA kernel takes no integers."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.float() * columns).argmax(-1, keepdim=True)


def pooled_column(input_ids: Tensor, mask: Tensor | None, config: Config) -> Tensor:
    """The column (batch, 1) whose state represents the text: the first token's in an encoder, else the last one's that
    is not a pad id, even if the mask covers it, as in transformers. classifier_pooling may say which."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if config.classifier_pooling == "cls" or not config.causal and not config.classifier_pooling:
        return real.float().argmax(-1, keepdim=True)
    pad = -1 if config.pad_token_id is None else config.pad_token_id
    return last_column(real & (input_ids != pad))


def shift_right(ids: Tensor, mask: Tensor | None, start: int) -> Tensor:
    """The tokens (batch, seq) before each token of a text: a start token, then all but the last."""
    shifted = torch.cat((ids[:, :1], ids[:, :-1]), dim=1)
    first = torch.ones_like(ids) if mask is None else mask.long()
    return torch.where(first.cumsum(1) * first == 1, start, shifted)


def mean_state(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (batch, 1, hidden) of the states of a text's tokens."""
    if mask is None:
        return x.mean(1, keepdim=True)
    real = mask[..., None].to(x.dtype)
    return (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)


class KVCache:
    """Keys and values of every layer, (batch, kv_heads, length, head_dim), allocated once and written in place.

    Rows share cache columns but keep their own positions, so prompts padded on either side can be batched. The write
    position is a tensor: a compiled decode step keeps one shape and never waits for the device.
    """

    def __init__(self, config: Config, batch: int, length: int, dtype=torch.float32, device=None):
        self.size = batch, length, dtype, device
        shape = batch, config.num_key_value_heads, length, config.head_dim
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        long = dict(dtype=torch.long, device=device)
        self.key_positions = torch.full((batch, length), NEVER, **long)
        # Tokens of each row, columns that the current call writes, columns used so far.
        self.lengths = torch.zeros((batch, 1), **long)
        self.columns = torch.zeros(0, **long)
        self.written = torch.zeros(1, **long)
        # The current call writes the first tokens, which see no others.
        self.first, self.empty = False, True

    def reset(self) -> KVCache:
        self.empty = True
        self.key_positions.fill_(NEVER)
        self.lengths.zero_()
        self.written.zero_()
        return self

    def extend(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Makes room for new tokens. Returns their positions (batch, seq) and those of the keys that `update` returns."""
        self.first, self.empty = self.empty, False
        positions, new = count_positions(mask, self.lengths)
        self.columns = self.written + torch.arange(mask.shape[1], device=mask.device)
        self.key_positions.index_copy_(1, self.columns, new)
        self.lengths += mask.long().sum(-1, keepdim=True)
        self.written += mask.shape[1]
        return positions, new if self.first else self.key_positions

    def truncate(self, columns: int):
        """Forgets the newest columns, which held a token in every row."""
        self.written -= columns
        self.lengths -= columns
        unused = torch.arange(self.size[1], device=self.written.device) >= self.written
        self.key_positions.masked_fill_(unused, NEVER)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v (batch, kv_heads, seq, head_dim) of the new tokens. Returns all keys and values of the layer:
        those alone if they are the first, else every column of the cache."""
        keys = self.k[layer].index_copy_(2, self.columns, k)
        values = self.v[layer].index_copy_(2, self.columns, v)
        return (k, v) if self.first else (keys, values)

    def reorder(self, rows: Tensor):
        """Row i continues from what row rows[i] held (beam search)."""
        columns = int(self.written)
        for stored in (*self.k, *self.v):
            stored[:, :, :columns] = stored[rows, :, :columns]
        self.key_positions[:] = self.key_positions[rows]
        self.lengths[:] = self.lengths[rows]


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
class Stack(nn.Module):
    """An encoder or a decoder without its word embeddings: positions and token types, blocks, final norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        width = config.embedding_size
        limit = config.max_position_embeddings
        if config.position in ("learned", "learned_relative"):
            self.position_embed = Embedding(limit + config.position_offset, width)
        if "relative" in config.position:
            buckets = config.relative_attention_num_buckets
            self.relative_bias = Embedding(buckets, config.num_attention_heads)
        elif config.position != "learned":
            dim = config.rotary_dim if config.position == "rope" else width
            full = Rotary(dim, config.rope_theta, limit, config.rope_scaling)
            self.rotary = nn.ModuleDict({"full_attention": full})
            if config.rope_local_base_freq is not None:
                self.rotary["sliding_attention"] = Rotary(dim, config.rope_local_base_freq, limit)
        types = config.type_vocab_size
        self.type_embed = Embedding(types, width) if types else None
        self.embedding_norm = Norm(config, width) if config.embedding_norm else nn.Identity()
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.embedding_project = Linear(width, hidden) if width != hidden else nn.Identity()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        if not config.first_norm:
            self.layers[0].attention_norm = nn.Identity()
        self.norm = Norm(config, hidden) if config.final_norm else nn.Identity()

    def states(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache=None,
        cross_kv: list | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (batch, seq, hidden) of word embeddings x (batch, seq, embedding_size)."""
        mask = attention_mask
        if mask is None:
            # Rows without padding share their positions.
            rows = 1 if cache is None else x.shape[0]
            mask = torch.ones(rows, x.shape[1], dtype=torch.long, device=x.device)
        positions, key_positions = count_positions(mask) if cache is None else cache.extend(mask)
        plain = attention_mask is None and (cache is None or cache.first)
        masks = {}
        ropes = {}
        for kind in dict.fromkeys(self.config.layer_types):
            masks[kind] = self.layer_mask(kind, positions, key_positions, plain, x.dtype)
            if self.config.position == "rope":
                rotary = self.rotary[kind if kind in self.rotary else "full_attention"]
                ropes[kind] = rotary(positions)
        x = self.embed_positions(x, positions, token_type_ids)
        rotates = self.config.no_rope_layers or [1] * len(self.layers)
        for layer, (block, kind) in enumerate(zip(self.layers, self.config.layer_types)):
            rope = ropes.get(kind) if rotates[layer] else None
            x = block(x, rope, masks[kind], cache, layer, cross_kv, encoder_mask)
        return self.norm(x)

    def embed_positions(
        self, x: Tensor, positions: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        """The first block's input (batch, seq, hidden): word embeddings and everything that is added to them."""
        config = self.config
        if config.scale_embedding:
            # The factor is rounded to the dtype, as in the reference implementation.
            x = x * x.new_full((), config.hidden_size**0.5)
        if config.embedding_multiplier != 1:
            x = x * config.embedding_multiplier
        if config.position in ("learned", "learned_relative"):
            x = x + self.position_embed(positions + config.position_offset)
        if config.position == "sinusoidal":
            # Sines, then cosines, as in Marian.
            cos, sin = self.rotary["full_attention"](positions + config.position_offset)
            x = x + torch.cat((sin, cos), dim=-1)[..., : x.shape[-1]].to(x.dtype)
        if self.type_embed is not None:
            types = torch.zeros_like(positions) if token_type_ids is None else token_type_ids
            x = x + look_up(self.type_embed, types, "token_type_ids")
        return self.embedding_project(self.embedding_dropout(self.embedding_norm(x)))

    def layer_mask(
        self, kind: str, positions: Tensor, key_positions: Tensor, plain: bool, dtype
    ) -> Tensor | None:
        """The attention mask of a layer type, as `attend` takes it; plain: no earlier keys and no padding."""
        config = self.config
        window = config.sliding_window if kind == "sliding_attention" else None
        if "relative" in config.position:
            return self.relative_mask(positions, key_positions, window, dtype)
        if plain and (window is None or positions.shape[1] <= window):
            return None
        return visible(positions, key_positions, window, config.causal)

    def relative_mask(
        self, positions: Tensor, key_positions: Tensor, window: int | None, dtype
    ) -> Tensor:
        """T5's relative bias (batch, heads, seq, keys), added to the scores; the lowest number where masked. Distances
        are sorted into buckets: one each for near ones, logarithmic for far ones."""
        config = self.config
        distance = key_positions[:, None, :] - positions[:, :, None]
        steps = -distance.clamp(max=0) if config.causal else distance.abs()
        buckets = config.relative_attention_num_buckets // (1 if config.causal else 2)
        near = buckets // 2
        scale = (buckets - near) / math.log(config.relative_attention_max_distance / near)
        far = near + ((steps.float() / near).clamp(min=1).log() * scale).long()
        bucket = torch.where(steps < near, steps, far.clamp(max=buckets - 1))
        if not config.causal:
            # Later keys have their own buckets.
            bucket = bucket + buckets * (distance > 0)
        bias = rearrange(self.relative_bias(bucket).to(dtype), "b s t h -> b h s t")
        allowed = visible(positions, key_positions, window, config.causal)
        return bias.masked_fill(~allowed, torch.finfo(dtype).min)


class Head(nn.Module):
    """Turns hidden states into outputs: an optional dense layer with activation and norm, then one output per word or
    class. A head without outputs (a pooler) is kept only so that it can be saved again."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.hidden_size
        self.act = ACTIVATIONS.get(config.head_act)
        if config.head_act:
            inner = config.embedding_size if config.head == "mlm" else width
            self.dense = Linear(width, inner, bias=config.head_dense_bias)
            width = inner
        self.norm = Norm(config, width) if config.head_norm else nn.Identity()
        dropout = config.head_dropout
        if dropout is None:
            classifies = config.head in ("classify", "tokens") and not config.causal
            dropout = config.hidden_dropout if classifies else 0.0
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(width, config.outputs, bias=config.head_bias) if config.outputs else None
        if config.tied:
            self.out.register_parameter("weight", None)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Outputs (..., outputs) for hidden states (..., hidden). A tied head's weight is the `embedding`."""
        if self.out is None:
            return x
        if self.act is not None:
            x = self.norm(self.act(self.dense(x)))
        weight = embedding if self.out.weight is None else self.out.weight
        return linear(self.dropout(x), weight, self.out.bias)


# The stock parts. They are looked up at call time, so replacing one in this module takes effect.
LEAVES = {
    leaf.__name__: leaf
    for leaf in (rms_norm, linear, rotate, attend, count_positions, visible)
    + (Linear, Norm, Rotary, Attention, MLP, MoE, Block, Stack, Head)
}


def replaced_leaves() -> dict[str, str]:
    """The leaves that were replaced in this module, and their replacements: {"MLP": "package.module.SquaredReLU"}."""
    return {
        name: qualified_name(globals()[name])
        for name, leaf in LEAVES.items()
        if globals()[name] is not leaf
    }


def qualified_name(leaf) -> str:
    """Module and name of a function or class. For a script, the module name under which others would import it."""
    module = leaf.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        if getattr(main, "__spec__", None):
            module = main.__spec__.name
        elif getattr(main, "__file__", None):
            module = Path(main.__file__).stem
    return f"{module}.{getattr(leaf, '__qualname__', type(leaf).__qualname__)}"


def as_ids_tensor(name: str, ids, device: torch.device, optional: bool = False) -> Tensor | None:
    """Ids or a mask (batch, seq) as a tensor, from a tensor, a numpy array or lists."""
    if isinstance(ids, Tensor) or ids is None and optional:
        return ids
    expected = "token ids (batch, seq): a tensor, an array or lists of one length"
    require(not isinstance(ids, str), f"{name}: a text, expected {expected}; stream takes a text")
    if isinstance(ids, (list, tuple)):
        lengths = {len(row) for row in ids if isinstance(row, (list, tuple))}
        require(
            len(lengths) < 2,
            f"{name}: rows of {min(lengths, default=0)} to {max(lengths, default=0)} tokens, expected "
            f"{expected}; pad them and give an attention_mask",
        )
    try:
        tensor = torch.as_tensor(ids, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise Error(f"{name} = {str(ids)[:60]}, expected {expected}; stream takes a text") from None
    return tensor if tensor.is_floating_point() else tensor.long()


def check_inputs(
    config: Config,
    ids: Tensor,
    mask: Tensor | None = None,
    types: Tensor | None = None,
    cache=None,
    name: str = "input_ids",
):
    """Raises Error for ids, a mask or token types that are not (batch, seq). `look_up` checks the values of ids."""
    shape = tuple(ids.shape)
    # With a cache, the mask may be longer than the ids.
    mask = mask if cache is None else None
    for argument, tensor in ((name, ids), ("token_type_ids", types), ("attention_mask", mask)):
        if tensor is not None:
            same = len(shape) == 2 and shape[1] and tuple(tensor.shape) == shape
            require(
                same and (tensor is mask or not tensor.is_floating_point()),
                f"{argument}: {tensor.dtype} of shape {tuple(tensor.shape)}, expected ids (batch, seq), all of one shape",
            )
    require(types is None or config.type_vocab_size, "token_type_ids: the model has no token types")
    limit = config.max_position_embeddings
    require(
        cache is not None or config.position not in LIMITED or shape[1] <= limit,
        f"{name}: {shape[1]} tokens, but the model has only {limit} positions",
    )


def check_range(name: str, ids: Tensor, limit: int):
    """Raises Error for ids outside of a table with `limit` rows, on a CPU; elsewhere the check would wait for the
    device."""
    if ids.device.type == "cpu" and ids.numel():
        low, high = map(int, ids.aminmax())
        require(
            0 <= low and high < limit, f"{name}: ids {low} to {high}, expected 0 to {limit - 1}"
        )


def look_up(table: nn.Embedding, ids: Tensor, name: str) -> Tensor:
    """The rows (batch, seq, width) of ids (batch, seq). Raises Error for ids out of range; on a CPU the embedding itself
    checks them, so that costs nothing."""
    if torch.compiler.is_compiling():
        return table(ids)
    try:
        return table(ids)
    except IndexError:
        check_range(name, ids, table.num_embeddings)
        raise


class TinyLM(Stack):
    """A language model: a decoder, an encoder, or both, and a head.

    Several threads may use one model at once, except for training and `compile`.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.tokenizer = None
        self.generation_config = {}
        self.replaced = replaced_leaves()
        # The compiled parts of the decoding loop, and idle decoding states by shape.
        self._compiled, self._states = {}, {}
        self.embed = Embedding(config.vocab_size, config.embedding_size)
        self.encoder = Stack(config.encoder) if config.num_encoder_layers else None
        self.head = Head(config)
        if not self.embed.weight.is_meta:
            self.apply(self._init)
            self.tokenizer = ByteTokenizer() if config.vocab_size >= ByteTokenizer.size else None

    def _init(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight is not None:
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        # The deeper the model, the less each block adds to the residual stream at first (GPT-2).
        for sublayer, output in (("attention", "o"), ("mlp", "down")):
            out = getattr(getattr(module, sublayer, None), output, None)
            if isinstance(out, nn.Linear):
                nn.init.normal_(out.weight, std=std / math.sqrt(2 * self.config.num_hidden_layers))

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        *,
        cache=None,
        cross_kv: list | None = None,
        encoder_mask: Tensor | None = None,
        columns: Tensor | None = None,
        apply_head: bool = True,
    ) -> Tensor:
        """Returns the head's output:

        - a language model, masked or not: logits (batch, seq, vocab)
        - a classifier: (batch, labels); a token classifier: (batch, seq, labels)
        - question answering: start and end logits (batch, seq, 2)
        - without a head: hidden states (batch, seq, hidden)

        input_ids (batch, seq): a tensor, an array or lists; attention_mask (batch, seq): 1 for a token, 0 for padding on
        either side; decoder_input_ids (batch, target): behind an encoder; cache: holds what the ids continue; cross_kv,
        encoder_mask: from `encode`, if input_ids are the decoder's; columns (batch, n): compute only these columns'
        outputs; apply_head=False: return the head's input. Raises Error for invalid ids or shapes.
        """
        ids = as_ids_tensor("input_ids", input_ids, self.device)
        mask = as_ids_tensor("attention_mask", attention_mask, self.device, optional=True)
        types = as_ids_tensor("token_type_ids", token_type_ids, self.device, optional=True)
        name, text = "input_ids", ids
        if self.encoder is not None and self.config.head == "classify":
            # The decoder reads the text too, behind its start token.
            require(decoder_input_ids is None, "decoder_input_ids: a classifier reads input_ids")
            cross_kv, encoder_mask = self.encode(ids, mask)
            ids = shift_right(ids, mask, self.config.decoder_start_token_id)
        elif self.encoder is not None:
            name = "decoder_input_ids"
            if cross_kv is None:
                cross_kv, encoder_mask = self.encode(ids, mask)
                mask = None
                rows = len(ids)
                ids = as_ids_tensor(name, decoder_input_ids, self.device)
                require(
                    len(ids) == rows, f"{name}: {len(ids)} rows, expected the {rows} of input_ids"
                )
        else:
            require(decoder_input_ids is None, "decoder_input_ids: the model has no encoder")
        check_inputs(self.config, ids, mask, types, cache, name)
        x = look_up(self.embed, ids, name)
        x = self.states(x, mask, types, cache, cross_kv, encoder_mask)
        if self.config.head == "classify" and self.config.classifier_pooling == "mean":
            x = mean_state(x, mask)
        elif self.config.head == "classify":
            columns = pooled_column(text, mask, self.config)
        if columns is not None:
            x = x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))
        if self.config.scale_logits and self.config.head == "lm":
            x = x * self.config.hidden_size**-0.5
        if self.config.logits_scaling != 1 and self.config.head == "lm":
            x = x / self.config.logits_scaling
        if not apply_head:
            return x
        logits = self.head(x, self.embed.weight)
        cap = self.config.final_logit_softcapping
        if cap is not None and self.config.head == "lm":
            logits = cap * torch.tanh(logits / cap)
        return logits[:, 0] if self.config.head == "classify" else logits

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[list, Tensor | None]:
        """Encodes a source (batch, seq) for the decoder. Returns cross_kv and encoder_mask for `forward`."""
        ids = as_ids_tensor("input_ids", input_ids, self.device)
        mask = as_ids_tensor("attention_mask", attention_mask, self.device, optional=True)
        check_inputs(self.config, ids, mask)
        states = self.encoder.states(look_up(self.embed, ids, "input_ids"), mask)
        cross_kv = [block.cross_attention.keys_values(states) for block in self.layers]
        return cross_kv, None if mask is None else rearrange(mask.bool(), "b t -> b 1 1 t")

    def save(self, folder: str | Path):
        """Write config.json (the Config's own fields, as model_type "tinylm"), model.safetensors and the tokenizer's
        files, each one at once. `load` reads it, and so does `from_pretrained`."""
        save_own(self, Path(folder))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> TinyLM:
        """The model that `save` wrote, in eval mode, in its own dtype unless another is given. Raises Error where a file
        or a tensor is missing, unexpected or of a wrong shape, and where leaves were replaced by others than now."""
        return load_own(cls, Path(folder), dtype, device)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        head: str | None = "config",
        revision: str | None = None,
        **changes,
    ) -> TinyLM:
        """Opens a Hugging Face checkpoint in eval mode, from a folder with config.json, model.safetensors (or its index
        of shards) and maybe a tokenizer, or by its name on the hub; see pretrained.py, which has to lie beside this
        file. dtype None or "auto" keeps the stored dtype; `torch_dtype` is another name of the argument.

        `head` ("lm", "classify", None, ...) replaces the head; tensors of the new one that the checkpoint lacks are
        random. `changes` override fields of Config. Raises Error for files or tensors that are missing, unexpected or
        of a wrong shape, for an unsupported config.json, and where the model was saved with replaced leaves (see
        `save_pretrained`) that are not replaced by the same now.
        """
        pretrained = beside("pretrained")
        return pretrained.load_model(cls, folder, dtype, device, head, revision, changes)

    def save_pretrained(self, folder: str | Path):
        """Writes a Hugging Face folder: config.json, model.safetensors, generation_config.json and the tokenizer's
        files, each one at once. transformers, vLLM and llama.cpp load it.

        A model with replaced leaves is saved as model_type "tinylm"; config.json notes the replacements as
        `tinylm_replaced`, and the model loads only where they are in place. If a replaced function computes the same as
        the stock one, put that back before saving. Raises Error where the config's `model_type` cannot express the
        architecture.
        """
        beside("pretrained").save_model(self, Path(folder))

    def compile(self, *arguments, **options):
        """nn.Module.compile, with rearrange as a single graph operation: tracing einops' parser dominates compile time."""
        torch.compiler.allow_in_graph(rearrange)
        super().compile(*arguments, **options)

    def __getstate__(self):
        """A copy compiles its own steps."""
        return self.__dict__ | {"_compiled": {}, "_states": {}}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        compile: bool = False,
        max_length: int | None = None,
        **options,
    ) -> Tensor:
        """Continues every row of ids (batch, seq). Returns (batch, seq + new), with the pad id after a row's end; behind
        an encoder (batch, 1 + new), beginning with decoder_start_token_id.

        The options are fields of `GenerationConfig`: temperature, top_k, top_p, min_p, repetition_penalty,
        eos_token_id, stop, seed, num_beams, ...; generation_config.json sets the others. Nothing is sampled unless an
        argument asks for it: `temperature`, or `do_sample=True` with the file's temperature, top_k and top_p. The same
        seed gives the same text whatever is in the other rows. `compile` compiles the decode step (CUDA graphs on
        CUDA). `num_return_sequences` gives so many rows for each. Raises Error for arguments out of range and for
        logits that are not finite.
        """
        input_ids = as_ids_tensor("input_ids", input_ids, self.device)
        attention_mask = as_ids_tensor("attention_mask", attention_mask, self.device, optional=True)
        start = 1 if self.encoder else math.prod(input_ids.shape[1:])
        config = self.make_generation_config(start, max_new_tokens, max_length, **options)
        search = None
        choose = sample
        if config.num_beams > 1:
            require(not compile, f"num_beams = {config.num_beams}, expected 1 with compile=True")
            search = BeamSearch(config, len(input_ids))
            choose = functools.partial(choose_beams, search=search)
        steps = list(generate_steps(self, input_ids, attention_mask, config, compile, choose))
        if search:
            rows = [torch.tensor(ids, device=input_ids.device) for ids in search.best()]
            new = nn.utils.rnn.pad_sequence(rows, True, config.pad_token_id)
        else:
            tokens, alive = (torch.stack(parts, dim=1) for parts in list(zip(*steps))[:2])
            # Until the last row has ended.
            new = tokens[:, : int(alive.any(0).sum())]
        start = start_ids(self, input_ids)
        return torch.cat((start.repeat_interleave(config.num_return_sequences, 0), new), dim=1)

    def stream(
        self,
        text: str | list[int],
        max_new_tokens: int | None = None,
        compile: bool = False,
        max_length: int | None = None,
        **options,
    ) -> Iterator[str]:
        """The continuation of a text (or of its ids) piece by piece: whole characters only, up to a stop string. Takes
        the options of `generate`, except for beams."""
        require(
            self.tokenizer,
            "stream: the checkpoint has no tokenizer.json; use generate with token ids",
        )
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        # Something has to come before the first token.
        ids = ids or [*self.ends(), 0][:1]
        start = 1 if self.encoder else len(ids)
        options["num_beams"] = 1
        config = self.make_generation_config(start, max_new_tokens, max_length, **options)
        require(
            config.num_return_sequences == 1, "stream: one text, expected num_return_sequences = 1"
        )
        row = torch.tensor([ids], device=self.device)
        steps = generate_steps(self, row, None, config, compile, with_text=True)
        return (pieces[0] for *_, pieces in steps if pieces[0])

    def chat(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        variables: dict | None = None,
        **options,
    ) -> Iterator[str]:
        """Streams the answer to a conversation. `messages`, `tools` and the template's `variables` are those of the
        tokenizer's `apply_chat_template`. The answer ends at the end token of the config or of the tokenizer."""
        require(self.tokenizer, "chat: the checkpoint has no tokenizer.json")
        text = self.tokenizer.apply_chat_template(messages, tools, True, **(variables or {}))
        ids, limit = self.tokenizer.encode(text, special=False), self.config.max_position_embeddings
        require(
            len(ids) <= limit, f"chat: {len(ids)} tokens, but the model has only {limit} positions"
        )
        ends = (*self.ends(), *as_ids("eos_token_id", self.tokenizer.eos_token_id))
        return self.stream(ids, **{"eos_token_id": ends} | options)

    def special_token_id(self, name: str):
        """A special id of generation_config.json, else of the config."""
        return self.generation_config.get(name, getattr(self.config, name))

    def ends(self) -> tuple:
        """The ids that end a text."""
        return as_ids("eos_token_id", self.special_token_id("eos_token_id"))

    def make_generation_config(
        self, prompt: int = 0, /, max_new_tokens=None, max_length=None, **given
    ) -> GenerationConfig:
        """The options of a generation: those given, else those of generation_config.json, else the defaults, of which
        max_new_tokens is cut to what the model takes after a prompt of so many tokens."""
        given["max_new_tokens"] = count_new_tokens(max_new_tokens, max_length, prompt)
        defaults = {}
        if self.generation_config:
            read = beside("onnxlm").generation_defaults
            defaults = read(self.generation_config, self.encoder is not None)
        made = make_generation_config(given, defaults, vars(self.config))
        limited = self.config.position in LIMITED
        limit = self.config.max_position_embeddings if limited else 2**31
        return cut_to_fit(made, given, limit - prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading: safetensors, and a config.json of Config's own fields
# ---------------------------------------------------------------------------------------------------------------------
def write_file(path: Path, write):
    """Writes a file whole or not at all: `write` fills a temporary file, which is then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch()
    # safetensors makes files that only their owner may read.
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode)
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: dict, metadata: dict):
    """Writes a safetensors file. (`safetensors.torch.save_file` would need numpy.)"""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=str(t.dtype).removeprefix("torch."),
            shape=t.shape,
            data_ptr=t.data_ptr(),
            data_len=t.nbytes,
        )
        for name, t in tensors.items()
    }
    write_file(path, lambda temporary: serialize_file(specs, temporary, metadata=metadata))


def write_json(path: Path, content):
    write_file(
        path,
        lambda p: p.write_text(
            json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        ),
    )


def read_json(path: Path, missing: dict | list | None = None):
    """The JSON object in a file. `missing` is returned where there is no file; a list means that an array is expected."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if missing is not None:
            return missing
        raise Error(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Error(f"{path}: not readable as JSON ({error})") from None
    kind, expected = ("array", list) if isinstance(missing, list) else ("object", dict)
    require(isinstance(content, expected), f"{path}: expected a JSON {kind}")
    return content


def open_tensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise Error(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise Error(f"{path}: not a readable safetensors file ({error})") from None


def save_own(lm: TinyLM, folder: Path):
    """What `TinyLM.save` does."""
    raw = {"model_type": "tinylm"} | {
        name: value for name, value in vars(lm.config).items() if name != "model_type"
    }
    files = lm.tokenizer.files if lm.tokenizer else {}
    write_checkpoint(folder, raw | describe_model(lm), lm.state_dict(), files)


FORMER_WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?"
)


def write_checkpoint(folder: Path, config: dict, tensors: dict, files: dict[str, bytes]):
    """A folder of config.json, model.safetensors and `files`, each one whole or not at all. Other files of weights that
    a former save left there are removed after that, since programs that look for them first would read old weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, lambda path, content=content: path.write_bytes(content))
    former = former_weights(folder)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", config)
    for path in former:
        path.unlink(missing_ok=True)


def former_weights(folder: Path) -> list[Path]:
    """Files of weights besides model.safetensors, an index before the shards that it names."""
    try:
        index = read_json(folder / "model.safetensors.index.json", {})
        shards = {*map(str, index.get("weight_map", {}).values())}
    except (Error, AttributeError):
        shards = set()
    found = []
    for path in folder.iterdir():
        shard = path.suffix == ".safetensors" and path.name in shards
        if path.name != "model.safetensors" and (shard or FORMER_WEIGHTS.fullmatch(path.name)):
            found.append(path)
    return sorted(found, key=lambda path: path.suffix != ".json")


def load_own(cls, folder: Path, dtype, device) -> TinyLM:
    """What `TinyLM.load` does."""
    file = folder / "config.json"
    raw = read_json(file)
    require(
        raw.get("model_type") == "tinylm",
        f"{file}: model_type = {raw.get('model_type')!r}, expected 'tinylm'; from_pretrained reads others",
    )
    check_replaced(raw, str(file))
    named = {f.name for f in fields(Config)} - {"model_type"}
    unknown = sorted(raw.keys() - named - {"model_type", "torch_dtype", "tinylm_replaced"})
    require(not unknown, f"{file}: {', '.join(unknown)}: no such field of Config")
    lm = cls(Config(**{name: raw[name] for name in named & raw.keys()}))
    load_tensors(lm, folder / "model.safetensors")
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        lm.tokenizer = None
    elif tokenizer.read_bytes() != ByteTokenizer().files["tokenizer.json"]:
        lm.tokenizer = beside("pretrained").load_tokenizer(folder)
    stored = parse_dtype(raw.get("torch_dtype"))
    return lm.to(usable_device(device or "cpu"), parse_dtype(dtype) or stored).eval()


def load_tensors(lm: nn.Module, path: Path):
    """The tensors of a file into a model that has the same ones. Raises Error for any difference."""
    file = open_tensors(path)
    expected = lm.state_dict()
    for name in sorted(expected.keys() ^ {*file.keys()}):
        raise Error(f"{path}: tensor {name} is {'missing' if name in expected else 'unexpected'}")
    stored = {name: file.get_tensor(name) for name in expected}
    for name, tensor in stored.items():
        shape = tuple(expected[name].shape)
        require(
            tensor.shape == shape,
            f"{path}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}",
        )
    lm.load_state_dict(stored)


def usable_device(name=None) -> torch.device:
    """The device of that name, or by default CUDA if there is one. Raises Error for one that cannot compute here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        x = torch.zeros(1, device=name)
        # a value that is read back: the meta device has none
        x.item()
        return x.device
    except (RuntimeError, AssertionError, ValueError, NotImplementedError):
        # A build without CUDA raises AssertionError.
        there = torch.accelerator.current_accelerator(check_available=True)
        devices = "cpu" if there is None else f"cpu or {there.type}"
        raise Error(f"--device {name} cannot be used here, expected {devices}") from None


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from a dtype, its name, or None or "auto", which mean the stored one."""
    given = dtype
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."), dtype)
    require(
        dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point,
        f"dtype = {given!r}, expected a floating-point torch.dtype",
    )
    return dtype


def describe_model(lm: TinyLM) -> dict:
    """Fields of config.json beside the architecture: the dtype, and which leaves were replaced by what. Classes are
    those that the model was made of, functions those that it calls."""
    made_of = {leaf: by for leaf, by in lm.replaced.items() if isinstance(LEAVES[leaf], type)}
    calls = {
        leaf: by for leaf, by in replaced_leaves().items() if not isinstance(LEAVES[leaf], type)
    }
    described = {"torch_dtype": str(lm.dtype).removeprefix("torch.")}
    return described | ({"tinylm_replaced": made_of | calls} if made_of | calls else {})


def check_replaced(raw: dict, source: str):
    """Raises Error for a model that was saved with replaced leaves, unless they are replaced by the same now."""
    noted = raw.get("tinylm_replaced") or {}
    require(isinstance(noted, dict), f"{source}: tinylm_replaced = {noted!r}, expected an object")
    now = replaced_leaves()
    for leaf, by in noted.items():
        require(
            now.get(leaf) == by,
            f"{source}: saved with {leaf} replaced by {by}, and here it is "
            f"{now.get(leaf, 'the stock one')}: replace it before loading",
        )


# ---------------------------------------------------------------------------------------------------------------------
# The training step
# ---------------------------------------------------------------------------------------------------------------------
# Above so many logits in a step, they are computed in chunks.
CHUNKED_LOSS_MIN_LOGITS = 2**22


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Approximates the nearest matrix with orthogonal rows or columns: Newton-Schulz with Jordan's quintic (2024).

    Runs in bfloat16 on a GPU, and for large matrices on a CPU with matrix units. torch.optim.Muon always uses bfloat16,
    which other CPUs compute 25 to 30 times slower than float32: 513 ms against 19 ms for a 768 x 256 matrix on an AMD
    EPYC.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[0] <= x.shape[1]
    fast = x.is_cuda or min(x.shape) >= 256 and torch.cpu.get_capabilities().get("amx_bf16")
    y = (x if wide else x.t()).to(torch.bfloat16 if fast else torch.float32)
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = y @ y.t()
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y if wide else y.t()).to(x.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """AdamW for embeddings, head, norms and biases; Muon for the layers' matrices: momentum, with each matrix's update
    made orthogonal (Jordan 2024). Like torch.optim.Muon, except that `orthogonal` chooses its precision."""

    def __init__(
        self, model: nn.Module, lr: float = 0.02, adam_lr: float = 4e-3, weight_decay: float = 0.1
    ):
        matrices = []
        others = []
        for name, p in model.named_parameters():
            if p.requires_grad:
                in_a_layer = p.ndim == 2 and "embed" not in name and "head" not in name
                (matrices if in_a_layer else others).append(p)
        self.adamw = torch.optim.AdamW(
            others, adam_lr, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0, fused=True
        )
        muon = dict(params=matrices, lr=lr, weight_decay=weight_decay)
        super().__init__([*self.adamw.param_groups, muon], {})

    @torch.no_grad()
    def step(self, momentum: float = 0.95):
        adamw, muon = self.param_groups
        self.adamw.state = self.state
        self.adamw.param_groups = [adamw]
        self.adamw.step()
        lr = muon["lr"]
        for p in muon["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            update = orthogonal(full_tensor(p.grad.lerp(average, momentum)))
            # Changes the outputs by the same amount for every shape.
            size = lr * max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - lr * muon["weight_decay"]).add_(shard_like(p, update), alpha=-size)


def target_labels(model: TinyLM, batch: dict) -> Tensor:
    """The targets of the model's outputs. For a decoder, the next token after each one but the last (batch, seq - 1);
    -100 at padding."""
    if model.config.head != "lm" or model.encoder is not None:
        return batch["labels"]
    labels = batch.get("labels", batch["input_ids"])[:, 1:]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask[:, 1:] * mask[:, :-1] == 0, -100)


def label_weight(labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The divisor of a sum of losses: the number of labels, or the sum of their class weights."""
    if labels.is_floating_point():
        return labels.new_tensor(labels.numel())
    labels = labels[labels != -100]
    return labels.new_tensor(len(labels)) if class_weights is None else class_weights[labels].sum()


def loss_sum(
    model: TinyLM, batch: dict, class_weights: Tensor | None = None, bf16: bool = False
) -> Tensor:
    """The sum over a batch's labels of the loss that goes with the model's head.

    A batch is a dict of input_ids (batch, seq), attention_mask, token_type_ids, decoder_input_ids and labels, as in
    Hugging Face. Labels of -100 are ignored:

    - decoder: (batch, seq), not shifted, by default the input_ids; behind an encoder: (batch, target)
    - masked language model, token classifier: (batch, seq)
    - classifier: (batch,); multi-label: floats (batch, classes); regression: floats (batch,)
    - question answering: (batch, 2), the first and last column of the answer
    """
    config = model.config
    loss = head_loss_sum(model, batch, class_weights, bf16)
    balanced = config.num_experts and config.output_router_logits and config.head == "lm"
    if model.training and balanced:
        count = (target_labels(model, batch) != -100).sum()
        loss = loss + config.router_aux_loss_coef * count * balance_loss(model, batch)
    return loss


def balance_loss(model: TinyLM, batch: dict) -> Tensor:
    """Grows as the router sends more tokens to some experts than to others (Fedus et al. 2021), over the tokens of all
    layers in the last call."""
    config = model.config
    logits = torch.stack([block.mlp.router_logits for block in model.layers]).float()
    mask = batch.get("attention_mask")
    real = torch.ones_like(logits[..., 0])
    if mask is not None:
        real = real * mask[:, : real.shape[2]]
    p = logits.softmax(-1)
    chosen = torch.zeros_like(p).scatter(-1, p.topk(config.num_experts_per_tok).indices, 1.0)
    used, probable = ((x * real[..., None]).flatten(0, -2).sum(0) / real.sum() for x in (chosen, p))
    return config.num_experts * (used * probable).sum()


def head_loss_sum(model: TinyLM, batch: dict, class_weights: Tensor | None, bf16: bool) -> Tensor:
    """`loss_sum` without the loss of a mixture of experts."""
    config = model.config
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    labels = target_labels(model, batch)
    columns = None
    if model.encoder is None and config.head == "lm":
        # The last token's output has no label.
        ids = ids[:, :-1]
        mask = None if mask is None else mask[:, :-1]
    if model.encoder is None and config.head in ("lm", "mlm") and "labels" in batch:
        columns, labels = labelled_columns(labels)
    inputs = ids, mask, batch.get("token_type_ids"), batch.get("decoder_input_ids")
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16 or ids.device.type == "cuda"):
        large = labels.numel() * config.vocab_size > CHUNKED_LOSS_MIN_LOGITS
        if large and can_chunk(model):
            return chunked_loss(model, inputs, columns, labels)
        logits = model(*inputs, columns=columns).float()
    if labels.is_floating_point():
        regression = config.problem_type == "regression"
        loss = F.mse_loss if regression else F.binary_cross_entropy_with_logits
        return loss(logits.reshape(labels.shape), labels, reduction="sum")
    if config.head == "qa":
        # Start and end are distributions over columns.
        logits = rearrange(logits, "b s ends -> b ends s")
        if mask is not None:
            logits = logits.masked_fill(mask[:, None] == 0, -math.inf)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), class_weights, reduction="sum")


def labelled_columns(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The columns (batch, n) that have labels, and the labels, so that the head skips the others."""
    has_label = labels != -100
    most = int(has_label.sum(1).max().clamp(min=1))
    columns = has_label.int().topk(most).indices
    return columns, labels.gather(1, columns)


def can_chunk(model: TinyLM) -> bool:
    """Whether the head is a single stock matrix, so that its logits can be computed in chunks."""
    config = model.config
    stock = linear is LEAVES["linear"] and Linear is LEAVES["Linear"] and Head is LEAVES["Head"]
    return stock and config.head == "lm" and not (config.final_logit_softcapping or config.head_act)


def chunked_loss(model: TinyLM, inputs: tuple, columns: Tensor | None, labels: Tensor) -> Tensor:
    """The cross-entropy of a language model without all of its logits in memory at once."""
    head = model.head
    states = head.dropout(model(*inputs, columns=columns, apply_head=False)).flatten(0, -2)
    weight = (model.embed if head.out.weight is None else head.out).weight.to(states.dtype)
    return F.linear_cross_entropy(
        states,
        weight,
        labels.flatten(),
        linear_bias=head.out.bias,
        reduction="sum",
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=512),
    )


def train_step(
    model: TinyLM,
    optimizer: torch.optim.Optimizer,
    batch: Tensor | dict,
    max_grad_norm: float = 1.0,
    accumulate: int = 1,
    bf16: bool = False,
    class_weights: Tensor | None = None,
) -> Tensor:
    """One update on a batch of ids (batch, seq), or on a dict as `loss_sum` takes it, run in `accumulate` parts.
    Returns the mean loss per label, a detached scalar; where the gradient is not finite, its norm. The optimizer is
    `MuonAdamW` or any of torch.optim. A model that is `sharded` learns from the batches of all processes as from one.
    """
    model.train()
    shards = rank_and_world_size()[1] if hasattr(model, "set_requires_gradient_sync") else 1
    batch = batch if isinstance(batch, dict) else {"input_ids": batch}
    batch = {name: tensor for name, tensor in batch.items() if tensor is not None}
    weight = label_weight(target_labels(model, batch), class_weights).clamp(min=1e-9)
    weight = all_reduce(weight.float(), shards)
    rows = zip(*(tensor.tensor_split(accumulate) for tensor in batch.values()))
    parts = [dict(zip(batch, part)) for part in rows if len(part[0])]
    total = torch.zeros((), device=weight.device)
    for i, part in enumerate(parts):
        if shards > 1:
            # Gradients are exchanged once, after the last part.
            model.set_requires_gradient_sync(i + 1 == len(parts))
        loss = loss_sum(model, part, class_weights, bf16) / weight
        # Gradients are averaged over processes, so this makes them a sum.
        (loss * shards).backward()
        total += loss.detach()
    total = all_reduce(total, shards)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = full_tensor(nn.utils.get_total_norm(gradients))
    nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
    return torch.where(norm.isfinite(), total, norm.to(total))


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank under torchrun, and the number of processes."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def all_reduce(x: Tensor, shards: int, how: str = "SUM") -> Tensor:
    """Reduces x over all processes, in place."""
    if shards > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, how))
    return x


def full_tensor(x: Tensor) -> Tensor:
    """A sharded tensor as a plain one, on every process."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(p: Tensor, x: Tensor) -> Tensor:
    """A plain tensor, sharded like the parameter p."""
    if not hasattr(p, "device_mesh") or x.ndim == 0:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


# ---------------------------------------------------------------------------------------------------------------------
# Generation: the options, logits processors, sampling, beam search, the decoding loop, the text of its ids.
# onnxlm.py defines the same names for arrays; a test holds equal the sources, or the results where they use tensors.
# ---------------------------------------------------------------------------------------------------------------------
# Cache lengths are multiples of this, so that one compiled step serves many prompt lengths.
CACHE_BUCKET = 128
# Compiled decoding states that a model keeps, one for each shape.
KEPT_STATES = 4
# On a GPU, asking whether all rows have ended waits for it, so it is asked only once in so many steps.
STEPS_BETWEEN_LOOKS = 16


def as_ids(name: str, value) -> tuple:
    """One id, several or None as a tuple."""
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    are_ids = all(is_number_in(i, -1, 2**31, numbers.Integral) for i in ids)
    require(are_ids, f"{name} = {value!r}, expected integers")
    return tuple(map(int, ids))


def stop_strings(stop) -> tuple:
    """One string, several or None as a tuple."""
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    are_texts = all(isinstance(text, str) and text for text in stop)
    require(are_texts, f"stop = {stop!r}, expected strings that are not empty")
    return stop


@dataclass(frozen=True)
class GenerationConfig:
    """Options of `generate`, in Hugging Face's names. `active` names those that are not left at their no-op value.

    Raises Error where a value is out of its range.
    """

    max_new_tokens: Size = 128
    # 0 takes the likeliest token.
    temperature: Annotated[float, 0, 1e9] = 0.0
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, 1e-9, 1e9] = 1.0
    # The ids that end a row; without any it never ends.
    eos_token_id: int | str | tuple | list | None = ()
    # Fills a row after its end. None: the first id that ends it, or 0.
    pad_token_id: Id | None = None
    # A row ends once its new text contains one of these strings.
    stop: str | tuple | list = ()
    seed: Annotated[int, -(2**63), 2**63 - 1] | None = None
    no_repeat_ngram_size: Count = 0
    # Tokens before a row may end, including the prompt.
    min_length: Count = 0
    # Sequences of ids that must not be written.
    bad_words_ids: tuple | list = ()
    # The first token after a decoder's start token, and the last one.
    forced_bos_token_id: Count | None = None
    forced_eos_token_id: Count | None = None
    # Above 1: beam search.
    num_beams: Annotated[int, 1, 2**16] = 1
    # A finished beam's score is its log-probability / length**length_penalty.
    length_penalty: Annotated[float, -1e3, 1e3] = 1.0
    # When to stop a row that has num_beams finished texts: True at once, False unless a better one is likely,
    # "never" unless one is possible.
    early_stopping: Literal[True, False, "never"] = False
    # Beam search: normalize scores again after the logits processors.
    renormalize_logits: bool = False
    # Texts for each row: so many samples, or the best of its beams.
    num_return_sequences: Annotated[int, 1, 2**16] = 1
    # Prompt lookup decoding: ids that a step drafts, at most, and of an n-gram that a draft follows (None: 2).
    prompt_lookup_num_tokens: Annotated[int, 1, 2**16] | None = None
    max_matching_ngram_size: Size | None = None

    def __post_init__(self):
        check_fields(self)
        ends = as_ids("eos_token_id", self.eos_token_id)
        words = self.bad_words_ids
        are_lists = all(isinstance(word, (list, tuple)) and word for word in words)
        require(are_lists, f"bad_words_ids = {words!r}, expected lists of ids that are not empty")
        words = [as_ids("bad_words_ids", word) for word in words]
        pads = (self.pad_token_id, *ends, 0)
        count = self.num_return_sequences
        vars(self).update(
            eos_token_id=ends,
            stop=stop_strings(self.stop),
            bad_words_ids=tuple(word for word in words if word not in [(end,) for end in ends]),
            pad_token_id=next(id for id in pads if id is not None and id >= 0),
            # Below this, dividing by it would overflow, and the draw is the likeliest token anyway.
            temperature=self.temperature if self.temperature >= 1e-5 else 0.0,
            top_k=self.top_k or None,
            top_p=None if self.top_p == 1 else self.top_p,
            min_p=self.min_p or None,
        )
        active = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        vars(self).update(active=frozenset(active))
        require(
            count == 1 or self.temperature or count <= self.num_beams,
            f"num_return_sequences = {count}, expected 1 without sampling, or at most num_beams",
        )
        if self.num_beams > 1:
            plain = not (self.temperature or self.stop)
            require(plain, f"num_beams = {self.num_beams}, expected 1 with a temperature or stop")
        if self.prompt_lookup_num_tokens:
            one = self.num_beams == count == 1
            require(
                one,
                f"prompt_lookup_num_tokens = {self.prompt_lookup_num_tokens}, expected none with "
                f"num_beams or num_return_sequences",
            )


# The options that sampling needs. generation_config.json sets them, but only an argument asks for sampling.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def make_generation_config(given: dict, defaults: dict, config: dict) -> GenerationConfig:
    """The arguments `given`, else the `defaults` of generation_config.json, else the ids of config.json.

    An `eos_token_id` of None among the arguments means that a row never ends. `do_sample` is as in transformers: True
    samples with the defaults' temperature, top_k and top_p, False does not sample.
    """
    options = {name: config.get(name) for name in ("eos_token_id", "pad_token_id")} | defaults
    sampling = {name: options.pop(name) for name in SAMPLING if name in options}
    if given.get("eos_token_id", 0) is None:
        options["eos_token_id"] = None
    given = {name: value for name, value in given.items() if value is not None}
    do_sample = given.pop("do_sample", None)
    require(do_sample in (None, True, False), f"do_sample = {do_sample!r}, expected True or False")
    if do_sample:
        options |= {"temperature": 1.0, "top_k": 50} | sampling
    if "stop_strings" in given:
        given = {"stop": given.pop("stop_strings")} | given
    unknown = sorted((options | given).keys() - {f.name for f in fields(GenerationConfig)})
    require(not unknown, f"{', '.join(unknown)}: no such option of a generation")
    made = GenerationConfig(
        **options | given | ({"temperature": 0.0} if do_sample is False else {})
    )
    unused = [name for name in (*SAMPLING, "seed") if given.get(name) and not made.temperature]
    if unused:
        names = ", ".join(unused)
        text = f"{names}: no effect, as nothing is sampled without a temperature or do_sample=True"
        warnings.warn(text, stacklevel=4)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        token, vocab = getattr(made, name), config["vocab_size"]
        require(token is None or token < vocab, f"{name} = {token}, expected less than {vocab}")
    return made


def cut_to_fit(made: GenerationConfig, given: dict, room: int) -> GenerationConfig:
    """Options of which max_new_tokens, where it was not given, is at most `room`."""
    if given.get("max_new_tokens") is None and 0 < room < made.max_new_tokens:
        return replace(made, max_new_tokens=room)
    return made


def count_new_tokens(max_new_tokens, max_length, prompt: int) -> int | None:
    """max_new_tokens, else as many as `max_length` leaves after a prompt of so many tokens."""
    if max_length is None or max_new_tokens is not None:
        return max_new_tokens
    fits = is_number_in(max_length, prompt + 1, 2**31, numbers.Integral)
    require(
        fits, f"max_length = {max_length!r}, expected more than the {prompt} tokens of the prompt"
    )
    return max_length - prompt


def uniform(seed: Tensor, step: Tensor, batch: int, vocab: int) -> Tensor:
    """Random numbers in (0, 1), (batch, vocab), that depend on seed, row, step and column alone: the same on every
    device and in every batch size (Salmon et al. 2011, counter-based random numbers)."""

    def hash32(x):
        # Wellons' two-round prospector mixes all of the lowest 32 bits.
        x = x & 0xFFFFFFFF
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 15)

    rows = torch.arange(batch, device=seed.device)
    columns = torch.arange(vocab, device=seed.device)
    state = hash32(hash32(hash32(seed) + rows) + step)
    bits = hash32(state[:, None] + columns * 0x9E3779B9)
    return ((bits >> 9).float() + 0.5) / 2**23


# Logits processors take logits or log-probabilities (batch, vocab) and the state after the ids so far, and return
# logits. They read numbers from tensors of the state, so that new values do not recompile the step.


def penalize_repetition(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    penalty = state.numbers["repetition_penalty"]
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(state.seen, penalized, logits)


def forbid_repeated_ngrams(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    n, vocab = config.no_repeat_ngram_size, logits.shape[-1]
    if n > state.ids.shape[1]:
        return logits
    # (batch, windows, n)
    windows = state.ids.unfold(1, n, 1)
    written = torch.arange(windows.shape[1], device=logits.device) + n <= state.lengths
    repeats = (windows[..., :-1] == state.newest(n - 1)[:, None]).all(-1) & written
    # Windows that do not repeat point to a spare column.
    banned = torch.where(repeats, windows[..., -1], vocab)
    forbidden = torch.zeros(len(logits), vocab + 1, dtype=torch.bool, device=logits.device)
    return logits.masked_fill(forbidden.scatter_(1, banned, True)[:, :-1], -math.inf)


def forbid_bad_words(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    column = torch.arange(logits.shape[-1], device=logits.device)
    for *before, last in config.bad_words_ids:
        same = state.newest(len(before)) == state.ids.new_tensor(before)
        banned = same.all(-1, keepdim=True) & (state.lengths >= len(before))
        logits = torch.where(banned & (column == last), -math.inf, logits)
    return logits


def forbid_early_end(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    column = torch.arange(logits.shape[-1], device=logits.device)
    ends = (column[:, None] == state.ends).any(-1)
    return torch.where(ends & (state.lengths < config.min_length), -math.inf, logits)


def force_token(logits: Tensor, token: int, when: Tensor) -> Tensor:
    column = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(when, torch.where(column == token, 0.0, -math.inf), logits)


def force_first(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    return force_token(logits, config.forced_bos_token_id, state.lengths == 1)


def force_last(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    return force_token(logits, config.forced_eos_token_id, state.count == state.last)


def scale_by_temperature(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    return logits / state.numbers["temperature"]


def keep_top_k(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    least = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    ordered, order = logits.sort(descending=True)
    p = ordered.softmax(-1)
    # Drop a token where the likelier ones reach top_p without it.
    outside = p.cumsum(-1) - p >= state.numbers["top_p"]
    outside[:, 0] = False
    return logits.masked_fill(outside.scatter(1, order, outside), -math.inf)


def keep_min_p(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    p = logits.softmax(-1)
    least = state.numbers["min_p"] * p.amax(-1, keepdim=True)
    return logits.masked_fill(p < least, -math.inf)


# Option -> its processor, in transformers' order: those that always apply, and those of sampling.
PROCESSORS = {
    "repetition_penalty": penalize_repetition,
    "no_repeat_ngram_size": forbid_repeated_ngrams,
    "bad_words_ids": forbid_bad_words,
    "min_length": forbid_early_end,
    "forced_bos_token_id": force_first,
    "forced_eos_token_id": force_last,
}
SAMPLERS = {
    "temperature": scale_by_temperature,
    "top_k": keep_top_k,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
}


def process_logits(logits, state: DecodeState, config: GenerationConfig, processors=PROCESSORS):
    """Logits or log-probabilities (batch, vocab) after the processors of all active options."""
    for option, process in processors.items():
        if option in config.active:
            logits = process(logits, state, config)
    return logits


def sample(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    """The next id (batch,) of each row of logits (batch, vocab): the likeliest, or at a temperature one drawn by the
    Gumbel trick."""
    logits = process_logits(logits, state, config)
    if "temperature" not in config.active:
        return logits.argmax(-1)
    logits = process_logits(logits, state, config, SAMPLERS)
    noise = uniform(state.seed, state.count, *logits.shape)
    return (logits - (-noise.log()).log()).argmax(-1)


class BeamSearch:
    """Beam search as transformers does it: candidates that end in a step compete by their score for as many places as
    there are beams."""

    def __init__(self, config: GenerationConfig, batch: int):
        n = config.num_beams
        self.config = config
        # Candidates of a row to look at in each step.
        self.candidates = max(2, 1 + len(config.eos_token_id)) * n
        # New ids of each beam, and their log-probabilities. At first only one beam of a row counts.
        self.texts = [[] for _ in range(batch * n)]
        self.sums = [0.0, *[-1e9] * (n - 1)] * batch
        # (score, ids) of each row's finished texts, the best first, and whether it may still find a better one.
        self.finished = [[] for _ in range(batch)]
        self.open = [True] * batch

    def advance(self, sums: list, places: list, vocab: int) -> list[int]:
        """Continue with the best candidates of each row: their sums (batch, candidates), the best first, and places
        (batch, candidates), beam * vocab + token. Returns which old beam each new one (batch * beams,) continues."""
        beams = []
        for row, candidates in enumerate(zip(sums, places)):
            beams += self.advance_row(row, *candidates, vocab)
        parents, self.sums, self.texts = map(list, zip(*beams))
        return parents

    def advance_row(self, row: int, sums: list, places: list, vocab: int) -> list:
        """(old beam, sum, ids) of the beams that a row continues with."""
        config, finished, beams = self.config, self.finished[row], []
        length = len(self.texts[0]) + 1
        last = length == config.max_new_tokens
        for rank, (total, place) in enumerate(zip(sums, places)):
            beam, token = row * config.num_beams + place // vocab, place % vocab
            ids = [*self.texts[beam], token]
            ends = token in config.eos_token_id
            if (ends or last) and self.open[row] and rank < config.num_beams:
                finished.append((total / length**config.length_penalty, ids))
            if not ends:
                beams.append((beam, total, ids))
        # Where nearly every token ends a text, the remaining beams can never win.
        while len(beams) < config.num_beams:
            beams.append((beam, -math.inf, ids))
        finished.sort(key=lambda pair: -pair[0])
        del finished[config.num_beams :]
        patient = config.early_stopping == "never" and config.length_penalty > 0
        longest = config.max_new_tokens if patient else length
        best_possible = beams[0][1] / longest**config.length_penalty
        if len(finished) == config.num_beams:
            better = best_possible > finished[-1][0]
            self.open[row] &= config.early_stopping is not True and better
        self.open[row] &= not last
        return beams[: config.num_beams]

    def best(self) -> list:
        """The new ids of the num_return_sequences best texts of each row, of different lengths."""
        count = self.config.num_return_sequences
        return [ids for finished in self.finished for _, ids in finished[:count]]


def choose_beams(
    logits: Tensor, state: DecodeState, config: GenerationConfig, search: BeamSearch
) -> Tensor:
    """The next id of each beam (batch * beams,), in place of `sample`. The state continues from the best beams."""
    scores = process_logits(logits.log_softmax(-1), state, config)
    if config.renormalize_logits:
        scores = scores.log_softmax(-1)
    totals = (scores + scores.new_tensor(search.sums)[:, None]).view(len(search.open), -1)
    sums, places = totals.topk(min(search.candidates, totals.shape[1]))
    parents = search.advance(sums.tolist(), places.tolist(), logits.shape[-1])
    state.reorder(torch.tensor(parents, device=logits.device))
    state.done |= not any(search.open)
    return torch.tensor([ids[-1] for ids in search.texts], device=logits.device)


# Options that a step reads from tensors.
TENSOR_OPTIONS = ("temperature", "top_p", "min_p", "repetition_penalty")


class DecodeState:
    """All that changes while a batch is generated: tensors of fixed shape and, in a compiled step, fixed address.

    cache: keys and values; cross_kv, encoder_mask: from `encode`; ids (batch, length + 1): prompt and new ids by
    position; seen (batch, vocab): ids that occur in a row; token, one (batch, 1): the newest id and its mask; done
    (batch,): the row has ended; alive (batch,): it had not ended before its newest token; finite: all logits were;
    draft (1, width): the newest id and a draft behind it, logits (1, width, vocab) and column: which is chosen from next.
    """

    def __init__(self, lm: TinyLM, prompt: Tensor, source: tuple, config: GenerationConfig):
        batch, vocab, length = len(prompt), lm.config.vocab_size, cache_length(prompt, config)

        def new(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=lm.device)

        self.cache = KVCache(lm.config, batch, length, lm.dtype, lm.device)
        self.cross_kv, self.encoder_mask = tree_map_only(Tensor, torch.clone, source)
        self.ids = new(batch, length + 1)
        self.seen = new(batch, vocab, dtype=torch.bool)
        self.token = new(batch, 1)
        self.one = new(batch, 1) + 1
        self.done = new(batch, dtype=torch.bool)
        self.alive = new(batch, dtype=torch.bool)
        self.finite = new(dtype=torch.bool)
        width = draft_width(config)
        self.draft, self.column = new(1, width), new(1)
        self.logits = new(1, width, vocab, dtype=torch.float32)
        self.ends = new(len(config.eos_token_id))
        self.pad, self.seed = new(), new()
        # Tokens written so far, and before the last one.
        self.count, self.last = new(), new()
        active = [name for name in TENSOR_OPTIONS if name in config.active]
        self.numbers = {name: new(dtype=torch.float32) for name in active}

    @staticmethod
    def signature(lm: TinyLM, prompt: Tensor, source: tuple, config: GenerationConfig) -> tuple:
        """Determines the shapes of a state."""
        shapes = [x.shape for x in tree_leaves(source) if isinstance(x, Tensor)]
        active = config.active.intersection(TENSOR_OPTIONS)
        size = (len(prompt), cache_length(prompt, config), draft_width(config), lm.dtype, lm.device)
        return (*size, len(config.eos_token_id), active, *shapes)

    def begin(self, prompt: Tensor, mask: Tensor, source: tuple, config: GenerationConfig):
        """Resets everything, in place, to the moment before the first token after a prompt (batch, seq)."""
        real = mask.bool()
        rows = torch.arange(len(prompt), device=prompt.device)[:, None].expand_as(real)[real]
        self.cache.reset()
        kept = tree_leaves((self.cross_kv, self.encoder_mask))
        for stored, given in zip(kept, tree_leaves(source)):
            if stored is not None:
                stored.copy_(given)
        self.ids.fill_(-1)
        self.ids[rows, count_positions(mask)[0][real]] = prompt[real]
        self.seen.fill_(False)
        self.seen[rows, prompt[real]] = True
        self.done.fill_(False)
        self.finite.fill_(True)
        self.ends.copy_(torch.tensor(config.eos_token_id))
        self.pad.fill_(min(config.pad_token_id, self.seen.shape[1] - 1))
        seed = torch.randint(2**31, ()) if config.seed is None else torch.tensor(config.seed)
        self.seed.copy_(seed)
        self.count.fill_(0)
        self.last.fill_(config.max_new_tokens - 1)
        for name, number in self.numbers.items():
            number.fill_(getattr(config, name))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row (batch, 1), including the prompt."""
        return self.cache.lengths

    def newest(self, n: int) -> Tensor:
        """The last n ids of each row (batch, n)."""
        columns = self.lengths - n + torch.arange(n, device=self.ids.device)
        return self.ids.gather(1, columns.clamp(min=0))

    def append(self, token: Tensor):
        """Adds the new ids (batch,) to the rows."""
        self.ids.scatter_(1, self.lengths, token[:, None])
        self.alive.copy_(~self.done)
        self.done |= (token[:, None] == self.ends).any(-1)
        self.seen.scatter_(1, token[:, None], True)
        self.token.copy_(token[:, None])
        self.count += 1

    def reorder(self, rows: Tensor):
        """Row i continues from what row rows[i] held (beam search)."""
        self.cache.reorder(rows)
        self.ids.copy_(self.ids[rows])
        self.seen.copy_(self.seen[rows])

    def tensors(self) -> list:
        return [x for x in tree_leaves((vars(self), vars(self.cache))) if isinstance(x, Tensor)]


def cache_length(prompt: Tensor, config: GenerationConfig) -> int:
    return -(-(prompt.shape[1] + config.max_new_tokens) // CACHE_BUCKET) * CACHE_BUCKET


def draft_width(config: GenerationConfig) -> int:
    """Columns of a compiled step with a draft: the newest token and the longest draft. 0 without drafts."""
    count = config.prompt_lookup_num_tokens
    return count + 1 if count else 0


def read_ids(lm, state: DecodeState, ids, mask, columns) -> Tensor:
    """Reads ids (batch, seq) and returns the logits behind some columns, or all. Nothing here waits for the device."""
    source = dict(cross_kv=state.cross_kv, encoder_mask=state.encoder_mask)
    return lm(ids, mask, cache=state.cache, columns=columns, **source).float()


def choose_token(state: DecodeState, logits: Tensor, config, choose):
    """Writes one token by its logits (batch, vocab)."""
    # amax returns NaN if there is one.
    state.finite &= (logits.amax(-1).isfinite() | state.done).all()
    state.append(torch.where(state.done, state.pad, choose(logits, state, config)))


def write_token(lm, state: DecodeState, ids, mask, columns, config, choose):
    """Reads ids (batch, seq) and writes one token."""
    choose_token(state, read_ids(lm, state, ids, mask, columns)[:, -1], config, choose)


def prefill(lm: TinyLM, state: DecodeState, prompt: Tensor, mask: Tensor, config, choose=sample):
    """Reads the prompt (batch, seq) and writes the first token."""
    padding = None if mask.all() else mask
    write_token(lm, state, prompt, padding, last_column(mask), config, choose)


def decode_one_token(lm: TinyLM, state: DecodeState, config: GenerationConfig, choose=sample):
    """Writes the token after the newest. Shapes and addresses are the same in every step, so it can be compiled."""
    write_token(lm, state, state.token, state.one, None, config, choose)


def read_draft(lm: TinyLM, state: DecodeState, width: int):
    """Reads the first columns of state.draft. Its keys are kept, but none is part of the text yet."""
    ids = state.draft[:, :width]
    state.logits[:, :width] = read_ids(lm, state, ids, torch.ones_like(ids), None)
    state.cache.truncate(width)
    state.column.fill_(0)


def decode_drafted(lm: TinyLM, state: DecodeState, config: GenerationConfig, choose=sample):
    """Makes the next column that `read_draft` has read part of the text, and writes the token behind it."""
    state.cache.extend(state.one)
    logits = state.logits.index_select(1, state.column)[:, 0]
    state.column += 1
    choose_token(state, logits, config, choose)


def short_limit(config: Config) -> int | None:
    """The longest row that longrope rotates by its short factors; None for other models."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "longrope":
        return scaling.get(ORIGINAL) or config.max_position_embeddings


def outgrows_short_factors(lm: TinyLM, state: DecodeState) -> bool:
    """Whether longrope rotates a row by its long factors from the newest token on: then its keys change too."""
    original = short_limit(lm.config)
    return original is not None and bool((state.lengths == original).any())


def read_again(lm: TinyLM, state: DecodeState, config: GenerationConfig, choose=sample):
    """Writes the token after the newest from a new cache of all ids."""
    lengths = state.lengths + 1
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths
    ids = state.ids[:, : mask.shape[1]].clamp(min=0)
    state.cache.reset()
    prefill(lm, state, ids, mask.long(), config, choose)


def compiled(lm: TinyLM, step: Callable) -> Callable:
    """A part of the decoding loop, compiled once for a model, with CUDA graphs on CUDA."""
    if step not in lm._compiled:
        torch.compiler.allow_in_graph(rearrange)
        mode = "reduce-overhead" if lm.device.type == "cuda" else None
        lm._compiled[step] = torch.compile(
            step, fullgraph=True, dynamic=False, mode=mode, recompile_limit=256
        )
    return lm._compiled[step]


def lookup_step(lm: TinyLM, lookup, step: Callable, compile: bool) -> Callable:
    """`step`, with the drafts of onnxlm.py's PromptLookup. A compiled step with a draft always reads the columns of the longest."""
    read, follow = read_draft, decode_drafted
    if compile:
        read, follow = compiled(lm, read), compiled(lm, follow)
    before, short = len(lookup.ids), short_limit(lm.config)
    draft = []

    def take(lm: TinyLM, state: DecodeState, config: GenerationConfig, choose=sample):
        length = len(lookup.ids)
        if draft and draft.pop(0) == lookup.ids[-1]:
            # It was read already.
            follow(lm, state, config, choose)
            return
        start, room = time.perf_counter(), config.max_new_tokens - (length - before) - 1
        if short and length <= short:
            room = min(room, short - length)
        draft[:] = lookup.draft(room, compile)
        columns = 1 + (lookup.longest if draft and compile else len(draft))
        if draft:
            ids = torch.tensor([lookup.ids[-1], *draft], device=state.draft.device)
            state.draft[0, : len(ids)] = ids
            read(lm, state, columns)
            follow(lm, state, config, choose)
        else:
            step(lm, state, config, choose)
        # Wait for the device.
        state.token.tolist()
        lookup.measure(columns, time.perf_counter() - start)

    return take


def make_state(lm: TinyLM, prompt, mask, source, config: GenerationConfig, compile: bool):
    """A state for a generation. A compiled step takes the one that an earlier generation of its shape has left, at the
    same addresses; while that one is still running, it gets another."""
    key = DecodeState.signature(lm, prompt, source, config)
    state = lm._states.pop(key, None) if compile else None
    if state is None:
        # Tensors made in inference mode could only be written in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            state = DecodeState(lm, prompt, source, config)
        state.key = key
        for tensor in state.tensors() if compile else ():
            torch._dynamo.mark_static_address(tensor, guard=False)
    state.begin(prompt, mask, source, config)
    return state


def prepare(lm: TinyLM, input_ids, attention_mask, config: GenerationConfig, compile: bool):
    """Checks the input and returns the prompt and its mask, one row for each beam or sample, and what `encode` gives."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    head = lm.config.head
    writes = head == "lm" and lm.config.causal
    require(
        writes, f"generate: the checkpoint's head is {head!r}, expected a language model's, 'lm'"
    )
    can_stop = not config.stop or lm.tokenizer
    require(can_stop, f"stop = {config.stop} needs a tokenizer.json, which the checkpoint lacks")
    check_inputs(lm.config, input_ids, mask)
    check_range("input_ids", input_ids, lm.config.vocab_size)
    require(bool(mask.any(-1).all()), "attention_mask: a row has no token")
    input_ids, source = input_ids.long(), (None, None)
    seq, limit = 1 if lm.encoder else input_ids.shape[1], lm.config.max_position_embeddings
    require(
        lm.config.position not in LIMITED or seq + config.max_new_tokens <= limit,
        f"max_new_tokens = {config.max_new_tokens} after {seq} tokens, expected at most {limit} in all",
    )
    if lm.encoder is not None:
        if compile:
            # Padded, so that a compiled step serves many lengths of the source.
            more = min(-input_ids.shape[1] % CACHE_BUCKET, max(limit - input_ids.shape[1], 0))
            input_ids, attention_mask = F.pad(input_ids, (0, more)), F.pad(mask, (0, more))
        source = lm.encode(input_ids, attention_mask)
        input_ids = start_ids(lm, input_ids)
        mask = torch.ones_like(input_ids)
    copies = max(config.num_beams, config.num_return_sequences)
    repeat = functools.partial(torch.repeat_interleave, repeats=copies, dim=0)
    inputs = input_ids, mask, source
    return inputs if copies == 1 else tree_map_only(Tensor, repeat, inputs)


def start_ids(lm: TinyLM, input_ids) -> Tensor:
    """The ids before the new tokens: the prompt's, or behind an encoder the start token (batch, 1)."""
    if lm.encoder is None:
        return input_ids
    ids = as_ids("decoder_start_token_id", lm.special_token_id("decoder_start_token_id"))
    return input_ids.new_full((len(input_ids), 1), [*ids, lm.config.decoder_start_token_id][0])


@torch.no_grad()
def generate_steps(
    lm: TinyLM,
    input_ids,
    attention_mask,
    config: GenerationConfig,
    compile=False,
    choose=sample,
    with_text=False,
):
    """Yields for each step the new ids (batch,), which rows (batch,) had not ended before it, and with stop strings or
    `with_text` the text that the step adds to each row, until all rows have ended.

    Raises Error where logits are not finite.
    """
    prompt, mask, source = prepare(lm, input_ids, attention_mask, config, compile)
    step, lookup = compiled(lm, decode_one_token) if compile else decode_one_token, None
    if config.prompt_lookup_num_tokens:
        make_lookup, rope = beside("onnxlm").make_lookup, lm.config.rope_scaling or {}
        text = [prompt[mask.bool()]] if lm.encoder is None else [input_ids[0], prompt[0]]
        lookup = make_lookup(config, len(input_ids), rope, torch.cat(text).tolist())
        step = lookup_step(lm, lookup, step, compile)
    state = make_state(lm, prompt, mask, source, config, compile)
    texts = []
    for row, real in zip(prompt, mask.bool()) if config.stop or with_text else ():
        texts.append(TextStream(lm.tokenizer, config, () if lm.encoder else row[real].tolist()))
    on_gpu = prompt.device.type == "cuda"
    look_every = STEPS_BETWEEN_LOOKS if on_gpu and not texts else 1
    try:
        prefill(lm, state, prompt, mask, config, choose)
        for i in range(1, config.max_new_tokens + 1):
            last = i == config.max_new_tokens
            look = last or i % look_every == 0
            if look:
                require(bool(state.finite), NOT_FINITE)
            token, alive = state.token[:, 0].clone(), state.alive.clone()
            pieces = [text.append(int(id), last) for text, id in zip(texts, token)]
            yield token, alive, pieces
            for row, text in enumerate(texts):
                if text.ended:
                    state.done[row] = True
            if last or look and bool(state.done.all()):
                return
            if lookup:
                lookup.append(int(token[0]))
            if compile and on_gpu:
                torch.compiler.cudagraph_mark_step_begin()
            take = read_again if outgrows_short_factors(lm, state) else step
            take(lm, state, config, choose)
    finally:
        # A state with keys that are not finite would spoil the next text.
        if compile and bool(state.finite):
            lm._states[state.key] = state
            for old in list(lm._states)[:-KEPT_STATES]:
                lm._states.pop(old, None)


NOT_FINITE = (
    "the model's logits are not finite (its numbers overflow): try another dtype or precision"
)


class TextStream:
    """Turns the new ids of a row into text, one by one: whole characters only, and nothing from a stop string on. Stop
    strings are searched for in the text with its special tokens, which are not shown.

    New text = decode(all ids) minus decode(all but the newest): a decoder may strip a leading space.
    """

    def __init__(self, tokenizer, config: GenerationConfig, prompt=()):
        self.tokenizer = tokenizer
        self.ends, self.stop = config.eos_token_id, config.stop
        self.ids = list(prompt)
        # Ids from `start` on are decoded; the text of those before `known` is out already.
        self.start, self.known = 0, len(self.ids)
        # (text with special tokens, text to show) that may begin a stop string.
        self.held = []
        self.ended = False

    def new_text(self, special: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.known], special)
        return self.tokenizer.decode(self.ids[self.start :], special)[len(before) :]

    def append(self, token: int, last: bool = False) -> str:
        """The text to show once an id has come; after the `last` one, all that is left."""
        if self.ended:
            return ""
        text = ""
        if token in self.ends:
            last = True
        else:
            self.ids.append(token)
            text = self.known_text()
        if last and not self.ended:
            self.ended = True
            held = "".join(shown for _, shown in self.held)
            text += held + self.new_text(False)
        return text

    def known_text(self) -> str:
        """The new text that is complete and cannot begin a stop string."""
        full = self.new_text(bool(self.stop))
        # The bytes of the last character are not complete.
        if full.endswith("\ufffd"):
            return ""
        shown = self.new_text(False) if self.stop else full
        # Ids without text are no context to decode the next ones in.
        if shown:
            self.start = self.known
        self.known = len(self.ids)
        if not self.stop:
            return shown
        self.held.append((full, shown))
        text = "".join(full for full, _ in self.held)
        cut = min((text.find(stop) for stop in self.stop if stop in text), default=-1)
        self.ended = cut >= 0
        if not self.ended:
            begins = [
                n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])
            ]
            cut = len(text) - max(begins, default=0)
        return self.release(cut)

    def release(self, cut: int) -> str:
        """The held text before a character. Where a stop string has come, the rest is dropped."""
        out = []
        while self.held and (len(self.held[0][0]) <= cut or self.ended):
            full, shown = self.held.pop(0)
            out.append(shown if len(full) <= cut else os.path.commonprefix([shown, full[:cut]]))
            cut = max(cut - len(full), 0)
        return "".join(out)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes as a tokenizer
# ---------------------------------------------------------------------------------------------------------------------
BPE_OPTIONS = {  # of a plain one
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def added_token(value: str | dict, **flags) -> dict:
    """A token beside the vocabulary as tokenizer.json has it, but for its id: of its text, or of an object of a file."""
    given = ({"content": value} if isinstance(value, str) else value) | flags
    special = given.get("special", False)
    token = dict.fromkeys(("content", "single_word", "lstrip", "rstrip"), False)
    token |= {"normalized": not special, "special": special}
    return token | {name: given[name] for name in token if name in given}


class ByteTokenizer:
    """UTF-8 bytes as ids; 256 ends a text and 257 pads. Its tokenizer.json is a byte-level BPE without merges, so other
    libraries read it too. It has the methods of `onnxlm.Tokenizer`."""

    eos_token_id, pad_token_id, size = 256, 257, 258
    specials = ("<|endoftext|>", "<|pad|>")

    def __init__(self, more: dict[str, bytes] | None = None):
        # Files to save beside tokenizer.json, such as a chat template.
        self.more = more or {}

    def encode(self, text: str, pair: str | None = None, special: bool = True) -> list[int]:
        if pair is None and not any(name in text for name in self.specials):
            return list(text.encode("utf-8", errors="replace"))
        return self.encoding(text, pair, special).ids

    def batch(self, texts: list[str]):
        return map(self.encode, texts)

    def encoding(self, text: str, pair: str | None = None, special: bool = True):
        """Like `onnxlm.Tokenizer.encoding`. A second text follows after the end-of-text token."""
        rows = [(id, 0, offsets) for id, offsets in self._tokens(text)]
        if pair is not None:
            rows += [(self.eos_token_id, None, (0, 0))] * special
            rows += [(id, 1, offsets) for id, offsets in self._tokens(pair)]
        return SimpleNamespace(
            ids=[id for id, _, _ in rows],
            type_ids=[which or 0 for _, which, _ in rows],
            sequence_ids=[which for _, which, _ in rows],
            offsets=[offsets for _, _, offsets in rows],
            special_tokens_mask=[int(which is None) for _, which, _ in rows],
        )

    def _tokens(self, text: str):
        """(id, (first character, one past the last)) of each byte and of each special token in the text."""
        start = 0
        for part in re.split("|".join(f"({re.escape(name)})" for name in self.specials), text):
            if part in self.specials:
                yield 256 + self.specials.index(part), (start, start + len(part))
            else:
                for i, char in enumerate(part or "", start):
                    for byte in char.encode("utf-8", errors="replace"):
                        yield byte, (i, i + 1)
            start += len(part or "")

    def decode(self, ids, special: bool = False) -> str:
        """The text of ids, with their special tokens if `special`."""
        pieces = [
            bytes([i]) if i < 256 else self.specials[i - 256].encode() * special
            for i in map(int, ids)
            if i < self.size
        ]
        return b"".join(pieces).decode("utf-8", errors="replace")

    @property
    def special_tokens(self) -> dict[str, str]:
        return beside("onnxlm").special_tokens(self.files)

    def apply_chat_template(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        **variables,
    ) -> str:
        render_chat = beside("onnxlm").render_chat
        return render_chat(self, messages, tools, add_generation_prompt, **variables)[0]

    @property
    def files(self) -> dict[str, bytes]:
        """File name -> content, in the format of `tokenizers`. Bytes are spelled as in GPT-2."""
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        moved = [b for b in range(256) if b not in plain]
        vocab = {chr(b if b in plain else 256 + moved.index(b)): b for b in range(256)}
        added = [
            {"id": i} | added_token(name, special=True) for i, name in enumerate(self.specials, 256)
        ]
        level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None,
            "decoder": level,
            "model": {"type": "BPE"} | BPE_OPTIONS | {"vocab": vocab, "merges": []},
        }
        return {
            "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode("utf-8"),
            "tokenizer_config.json": tokenizer_config(*self.specials),
        } | self.more


def tokenizer_config(eos: str, pad: str, **more) -> bytes:
    return json.dumps(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
        }
        | more,
        indent=2,
    ).encode("utf-8")
