"""tinylm: a whole language-model library in one file.

    from tinylm import Config, TinyLM, train_step
    lm = TinyLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")    # or a folder; see FAMILIES for what it reads
    for piece in lm.stream("The capital of France is", max_new_tokens=20): print(piece, end="")
    lm.save_pretrained("copy")                                     # transformers, vLLM and llama.cpp load it unchanged
    lm = TinyLM(Config(hidden_size=256, num_hidden_layers=4))      # or start from nothing, with a loop around train_step

It needs torch, einops and safetensors; `tokenizers` only for checkpoints that bring a tokenizer.json of their own.
Read it from top to bottom: config, blocks, cache, model, generation, tokenizers, families, checkpoints, training step.
Every leaf (`rms_norm`, `rotate`, `attend`, `MLP`, ...) is looked up when it is called: replace one in place and train.

Sources: Vaswani et al. 2017 (the transformer); Devlin et al. 2019 (BERT); Raffel et al. 2020 (T5); Lewis et al. 2020
(BART); Su et al. 2021 (rotary positions); Zhang & Sennrich 2019 (RMS norm); Shazeer 2020 (gated MLP); Ainslie et al.
2023 (grouped queries); Jordan 2024 (Muon). Reference implementation of every family: Hugging Face transformers.
"""

from __future__ import annotations

import datetime
import fnmatch
import functools
import json
import math
import numbers
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
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
    "Tokenizer",
    "ByteTokenizer",
    "load_tokenizer",
    "config_from_hf",
    "config_to_hf",
    "MuonAdamW",
    "loss_sum",
    "train_step",
    "Error",
]

# Axes: b batch, s query positions, t key positions, h query heads, g key-value heads, d head width.


class Error(ValueError):
    """What the caller gave cannot be used: one line that names it, its value and what was expected."""

    def __init__(self, message: str):
        line = " ".join(str(message).split())
        super().__init__(line if len(line) < 1000 else f"{line[:700]} ... {line[-200:]}")


def require(ok, message: str):
    if not ok:
        raise Error(message)


def is_number_in(value, low, high, kind=numbers.Real) -> bool:
    """Is it a number from low to high (not a bool, which Python counts among the ints)?"""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


Size = Annotated[int, 1, 2**31]
Width = Annotated[int, 1, 2**18]
Layers = Annotated[int, 1, 9999]
Count = Annotated[int, 0, 2**31]
Id = Annotated[int, -1, 2**31]
Real = Annotated[float, 1e-30, 1e30]
Share = Annotated[float, 0, 1]
Dropout = Annotated[float, 0, 0.99]


def matches_annotation(hint, value) -> tuple[bool, str]:
    """Does an annotation allow a value, and what does it: a number of a range, choices, or instances of a class."""
    if get_origin(hint) in (Union, UnionType):
        parts = [matches_annotation(part, value) for part in get_args(hint)]
        return any(fine for fine, _ in parts), " or ".join(text for _, text in parts if text)
    if get_origin(hint) is Annotated:
        kind, low, high = get_args(hint)
        limits = "of 64 bits" if low == -(2**63) else f"from {low:g} to {high:g}"
        if kind is float:
            return is_number_in(value, low, high), f"a number {limits}"
        return is_number_in(value, low, high, numbers.Integral), f"an integer {limits}"
    if get_origin(hint) is Literal or hint is bool:
        choices = get_args(hint) or (True, False)
        return value in choices, " or ".join(map(str, choices))
    return isinstance(value, hint), "" if hint is NoneType else f"a {hint.__name__}"


def check_fields(owner, spelled: Callable = str):
    """Refuse a dataclass whose fields are not as annotated; `spelled`: how an error spells a field's name."""
    for name, hint in get_type_hints(type(owner), include_extras=True).items():
        fine, expected = matches_annotation(hint, getattr(owner, name))
        require(fine, f"{spelled(name)} = {getattr(owner, name)!r}, expected {expected}")


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
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}  # rope_type -> keys that it needs
ORIGINAL = "original_max_position_embeddings"
ROPE_OPTIONS = {
    "llama3": (ORIGINAL,),
    "yarn": (ORIGINAL, "attention_factor", "beta_fast", "beta_slow")
    + ("mscale", "mscale_all_dim", "truncate"),
}  # rope_type -> keys that it may have


@dataclass(frozen=True)
class Config:
    """What a model is made of, in the names of Hugging Face `config.json`. The defaults are Qwen3's architecture.

    Raises Error where a value is out of its range.
    """

    # Sizes
    vocab_size: Size = 320  # rows of the embedding; bytes and two specials, padded to 64
    hidden_size: Width = 256  # width of the residual stream
    intermediate_size: Size | None = None  # inside the MLP; None: 8/3 of hidden, or 4 times ungated
    num_hidden_layers: Layers = 4  # of the decoder, or of the only stack
    max_position_embeddings: Size = 1024  # the longest sequence it is made for
    num_encoder_layers: Count = 0  # above 0: an encoder-decoder
    encoder_attention_heads: Width | None = None  # None: num_attention_heads
    encoder_intermediate_size: Size | None = None  # None: intermediate_size

    # Attention
    causal: bool = True  # a token sees only what stands before it; False: an encoder
    num_attention_heads: Width = 4  # query heads
    num_key_value_heads: Width | None = None  # None: as many as query heads; fewer: grouped queries
    head_dim: Width | None = None  # None: hidden_size / num_attention_heads
    qk_norm: Literal["head", "full", None] = "head"  # of q and k: over each head, or over all heads
    attention_bias: bool = False  # bias of q, k, v
    attention_output_bias: bool | None = None  # bias of o; None: as attention_bias
    query_pre_attn_scalar: Real | None = None  # scores are q.k / sqrt(this); None: head_dim
    attn_logit_softcapping: Real | None = None  # c: scores become c tanh(scores / c)
    sliding_window: Size | None = None  # keys seen by a sliding layer, itself included
    layer_types: tuple | list | None = None  # of LAYER_TYPES, one per layer; None: all alike

    # Norms
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: Real = 1e-6
    norm_offset: float = 0.0  # added to the RMS norm's weight (Gemma: 1)
    # pre: x + f(norm(x)); post: norm(x + f(x)); output: x + norm(f(x)); sandwich: x + norm(f(norm(x)))
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"
    final_norm: bool = True  # a norm after the last layer

    # MLP
    hidden_act: Act = "silu"
    gated: bool = True  # act(gate(x)) * up(x), else act(up(x))
    mlp_bias: bool = False

    # Positions
    position: Literal["rope", "learned", "sinusoidal", "relative"] = "rope"
    position_offset: Count = 0  # rows of a learned table before that of position 0
    rope_theta: Real = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": a key of ROPE_KEYS, "factor": ...}
    rope_local_base_freq: Real | None = None  # theta of sliding layers, unscaled; None: as the full
    partial_rotary_factor: Share = 1.0  # the part of each head that rotates
    relative_attention_num_buckets: Annotated[int, 4, 2**20] = 32
    relative_attention_max_distance: Annotated[int, 2, 2**31] = 128

    # Embeddings
    embedding_size: Width | None = None  # projected to hidden_size; None: hidden_size
    type_vocab_size: Count = 0  # token types; 0: none
    scale_embedding: bool = False  # embeddings times sqrt(hidden_size)
    embedding_norm: bool = False  # a norm after all embeddings are added
    tie_word_embeddings: bool = True  # the head's weight is the embedding
    initializer_range: Real = 0.02  # standard deviation of weights that begin at random

    # Head
    head: Literal["lm", "mlm", "classify", "tokens", "qa", None] = "lm"  # None: hidden states
    head_act: Act | None = None  # a dense layer with this activation before the head's output
    head_norm: bool = False  # and a norm after that
    head_bias: bool = False  # bias of the head's output
    scale_logits: bool = False  # the head's input over sqrt(hidden_size) (T5)
    final_logit_softcapping: Real | None = None  # c: logits become c tanh(logits / c)
    id2label: dict | None = None  # classes of a classifying head; None: two
    problem_type: Problem | None = None  # what classes mean to the loss; None: one of them is right

    # Dropout, in training
    attention_dropout: Dropout = 0.0  # of attention weights
    hidden_dropout: Dropout = 0.0  # of what each sub-layer adds
    embedding_dropout: Dropout = 0.0
    # before the output; None: an encoder's classifier as hidden
    head_dropout: Dropout | None = None

    # Special tokens, and the family
    bos_token_id: Id | None = None
    eos_token_id: int | tuple | list | None = None
    pad_token_id: Id | None = None
    decoder_start_token_id: Id | None = None  # what a decoder behind an encoder begins with
    model_type: Literal[tuple(FAMILIES)] | None = None  # None: the first that can express it

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
        vars(self).update(self._defaults() | given)
        self._check_attention()
        self._check_head()
        if self.position == "rope":
            self._check_rope()

    def _defaults(self) -> dict:
        """Fields whose default follows from others."""
        heads, inner = self.num_attention_heads, self.intermediate_size
        if inner is None:
            # A gated MLP has three matrices, a plain one two: both get as many weights.
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
        if self.position == "relative":
            self._expect(
                "position",
                heads == self.num_key_value_heads and self.attn_logit_softcapping is None,
                "another one with grouped queries or soft-capped scores",
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
            self._expect("sliding_window", self.causal, "none in an encoder")
            self._expect(
                "sliding_window",
                self.sliding_window,
                "a number, as layer_types has a sliding_attention",
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
            f"an even number of channels that rotate, not {self.rotary_dim}",
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
        """The encoder of an encoder-decoder, as a model of its own."""
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
            head=None,
            head_act=None,
        )

    @property
    def num_labels(self) -> int:
        return len(self.id2label or ("start", "end"))

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for each text or token."""
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
    """x weight^T + bias. A single row on a CPU only waits for memory, and there the compiler's fused sum streams the
    weights up to twice as fast as the library's matrix product does."""
    one_row = x.device.type == "cpu" and x.shape[:-1].numel() == 1
    if not (one_row and torch.compiler.is_dynamo_compiling()):
        return F.linear(x, weight, bias)
    # In memory, by as_strided: otherwise what made the row is computed again in every sum.
    row = x.reshape(-1).as_strided((x.shape[-1],), (1,))
    y = (row * weight).sum(-1).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Rotary positions (Su et al. 2021): turn the pairs (i, i + r/2) of each head's first r channels, pass the others.

    x (batch, seq, heads * head_dim); cos, sin (batch, seq, r / 2).
    """
    x = rearrange(x, "b s (h d) -> b s h d", d=head_dim)
    cos = cos[:, :, None].to(x.dtype)
    sin = sin[:, :, None].to(x.dtype)
    half = cos.shape[-1]
    # One split, whose gradient is one concatenation.
    x1, x2, rest = x.split((half, half, head_dim - 2 * half), dim=-1)
    turned1 = torch.addcmul(x1 * cos, x2, sin, value=-1)
    turned2 = torch.addcmul(x2 * cos, x1, sin)
    return rearrange(torch.cat((turned1, turned2, rest), dim=-1), "b s h d -> b s (h d)")


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
    """softmax(q k^T scale) v with grouped queries, (batch, seq, heads * head_dim); scores are soft-capped where
    `softcap` is given (Gemma 2).

    q (batch, seq, heads * head_dim); k, v (batch, keys, kv_heads * head_dim), which join those of the layer in the
    cache; mask (batch, 1, seq, keys), True where attention is allowed, or (batch, heads, seq, keys) to be added to the
    scores, or None for the causal square or for all keys, which lets the flash kernels in.
    """
    q, k, v = (rearrange(x, "b s (h d) -> b h s d", d=head_dim) for x in (q, k, v))
    if cache is not None:
        k, v = cache.update(layer, k, v)
    groups = q.shape[1] // k.shape[1]  # query heads that share a key head
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
    else:  # the queries of a key head stand below each other: keys are read once, and not expanded
        q = rearrange(q, "b (g r) s d -> b g (r s) d", r=groups)
        if min(groups, seq) > 1:
            mask = mask.expand(-1, -1, seq, -1).repeat(1, 1, groups, 1)
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        x = rearrange(x, "b g (r s) d -> b (g r) s d", s=seq)
    return rearrange(x, "b h s d -> b s (h d)")


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float, dropout: float
) -> Tensor:
    """softmax(cap tanh(q k^T scale / cap)) v of (batch, heads, seq, head_dim), for which there is no fused kernel."""
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * (scale / cap))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


class Linear(nn.Linear):
    """nn.Linear through the leaf `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """Root-mean-square norm, or layer norm where the config says so, over the last axis, or each `size` of it."""

    def __init__(self, config: Config, size: int):
        super().__init__()
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        size = len(self.weight)
        if x.shape[-1] != size:
            heads = rearrange(x, "... (h d) -> ... h d", d=size)
            return rearrange(self(heads), "... h d -> ... (h d)")
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        weight = self.weight.float() + self.offset if self.offset else self.weight
        return rms_norm(x, weight, self.eps)


class Rotary(nn.Module):
    """Angles of positions (batch, seq): their cos and sin, each (batch, seq, dim / 2).

    `limit` is the model's longest sequence. Scalings stretch it: linear (kaiokendev 2023), dynamic (NTK-aware, per row:
    its own length stretches its base), llama3 (Llama 3.1) and yarn (Peng et al. 2023).
    """

    def __init__(self, dim: int, theta: float, limit: int, scaling: dict | None = None):
        super().__init__()
        scaling = scaling or {"rope_type": "default"}
        self.kind = scaling["rope_type"]
        self.factor = scaling.get("factor", 1.0)
        self.dim = dim
        self.theta = theta
        self.limit = limit
        self.magnitude = 1.0  # what cos and sin are multiplied by
        original = scaling.get("original_max_position_embeddings") or limit
        # Explicitly on the CPU: a model is made on the meta device before its weights are read.
        inv_freq = inverse_frequencies(dim, theta, "cpu")
        if self.kind == "linear":
            inv_freq = inv_freq / self.factor
        elif self.kind == "llama3":
            inv_freq = llama3_frequencies(inv_freq, scaling, original)
        elif self.kind == "yarn":
            inv_freq = yarn_frequencies(inv_freq, scaling, original, theta)
            self.magnitude = yarn_magnitude(scaling)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves with the model, but is never rounded to its dtype."""
        self.inv_freq = self.inv_freq.to(fn(self.inv_freq).device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq
        if self.kind == "dynamic":
            length = (positions.amax(-1, keepdim=True) + 1).clamp(min=self.limit)
            stretch = self.factor * length / self.limit - (self.factor - 1)
            base = self.theta * stretch ** (self.dim / (self.dim - 2))
            inv_freq = inverse_frequencies(self.dim, base, positions.device)
        angles = positions[..., None].float() * inv_freq[..., None, :]
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude


def inverse_frequencies(dim: int, theta: float | Tensor, device) -> Tensor:
    """The angle by which each pair of channels turns from one position to the next: theta^(-2i / dim), (dim / 2,)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / theta**exponents


def llama3_frequencies(inv_freq: Tensor, scaling: dict, original: int) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * inv_freq / (2 * math.pi)  # within the original length
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]


def yarn_frequencies(inv_freq: Tensor, scaling: dict, original: int, theta: float) -> Tensor:
    """Channels that turn less than beta_slow times within the original length are stretched, those that turn more than
    beta_fast times kept, those between blended."""
    dim = 2 * len(inv_freq)

    def channel(turns):  # the one that turns so often within the original length
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
    """What yarn multiplies cos and sin by, which makes attention as sharp as it was at the original length."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    growth = 0.1 * math.log(max(scaling["factor"], 1))
    m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return (growth * m + 1) / (growth * m_all + 1) if m and m_all else growth + 1


class Attention(nn.Module):
    """Grouped-query attention: to the sequence itself by one fused query-key-value projection, or across to another,
    whose keys and values are made once."""

    def __init__(self, config: Config, cross: bool = False):
        super().__init__()
        self.sizes = config.qkv_sizes
        self.head_dim = config.head_dim
        self.causal = config.causal and not cross
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
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
        """x (batch, seq, hidden); rope: cos and sin of the positions; keys_values: those of another sequence."""
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


class Block(nn.Module):
    """Attention, attention across (in a decoder behind an encoder) and MLP, each added to the residual stream and
    normed before (pre), after (output), both (sandwich) or after the sum (post)."""

    def __init__(self, config: Config):
        super().__init__()
        before = config.norm_position != "output"
        after = config.norm_position in ("output", "sandwich")

        def norm(there: bool) -> nn.Module:
            return Norm(config, config.hidden_size) if there else nn.Identity()

        self.post = config.norm_position == "post"
        self.attention_norm = norm(before)
        self.attention_output_norm = norm(after)
        self.attention = Attention(config)
        self.cross_attention = Attention(config, cross=True) if config.num_encoder_layers else None
        if self.cross_attention is not None:
            self.cross_attention_norm = norm(before)
            self.cross_attention_output_norm = norm(after)
        self.mlp_norm = norm(before)
        self.mlp_output_norm = norm(after)
        self.mlp = MLP(config)
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
        """x (batch, seq, hidden); cross_kv: keys and values of a source, (batch, source, kv_heads * head_dim) each, for
        every layer; encoder_mask (batch, 1, 1, source), True where the source has a token, None without padding."""
        attention = self.attention, self.attention_norm, self.attention_output_norm
        x = self.add(x, *attention, rope, mask, cache, layer)
        if cross_kv is not None:
            norms = self.cross_attention_norm, self.cross_attention_output_norm
            arguments = None, encoder_mask, None, layer, cross_kv[layer]
            x = self.add(x, self.cross_attention, *norms, *arguments)
        return self.add(x, self.mlp, self.mlp_norm, self.mlp_output_norm)

    def add(
        self, x: Tensor, sublayer, norm: nn.Module, output_norm: nn.Module, *arguments
    ) -> Tensor:
        """x plus what a sub-layer makes of it, with the norms where they stand."""
        y = self.dropout(output_norm(sublayer(x if self.post else norm(x), *arguments)))
        return norm(x + y) if self.post else x + y


# ---------------------------------------------------------------------------------------------------------------------
# Positions and the key-value cache. One rule masks everything: a query sees the keys whose position is not after its
# own (and, in a sliding layer, less than a window before), or, in an encoder, all keys that are no padding. Padding has
# a position after all others.
# ---------------------------------------------------------------------------------------------------------------------
LIMITED = ("learned", "sinusoidal")  # kinds of positions that end
NEVER = 2**30  # the position of padding and of cache columns not written yet


def count_positions(mask: Tensor, start: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """Positions of queries and of keys, each (batch, seq), from a mask of real tokens with padding anywhere."""
    positions = start + mask.long().cumsum(-1) - 1
    return positions.clamp(min=0), torch.where(mask.bool(), positions, NEVER)


def visible(
    positions: Tensor, key_positions: Tensor, window: int | None = None, causal: bool = True
) -> Tensor:
    """The attention mask (batch, 1, seq, keys) of query and key positions, True where a query may look."""
    if not causal:
        return (key_positions < NEVER)[:, None, None, :]
    distance = positions[:, None, :, None] - key_positions[:, None, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def last_column(mask: Tensor) -> Tensor:
    """The column (batch, 1) of the last real token. In floats, which ONNX Runtime's CUDA kernel takes."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.float() * columns).argmax(-1, keepdim=True)


def pooled_column(input_ids: Tensor, mask: Tensor | None, config: Config) -> Tensor:
    """The column (batch, 1) whose state stands for the text: the first real token's in an encoder, else the last's. As
    transformers has it, the latter is no pad id, whatever the mask says of it."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if not config.causal:
        return real.float().argmax(-1, keepdim=True)
    pad = -1 if config.pad_token_id is None else config.pad_token_id
    return last_column(real & (input_ids != pad))


class KVCache:
    """Keys and values of every layer, (batch, kv_heads, length, head_dim), allocated once and written in place.

    All rows write the same columns, each at positions of its own, so that prompts padded on either side batch as they
    are. The write position is a tensor: a compiled decode step keeps one shape, and nothing waits for the device.
    """

    def __init__(self, config: Config, batch: int, length: int, dtype=torch.float32, device=None):
        self.size = batch, length, dtype, device
        shape = batch, config.num_key_value_heads, length, config.head_dim
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        long = dict(dtype=torch.long, device=device)
        self.key_positions = torch.full((batch, length), NEVER, **long)
        self.lengths = torch.zeros((batch, 1), **long)  # real tokens of each row
        self.columns = torch.zeros(0, **long)  # written by the current call
        self.written = torch.zeros(1, **long)  # columns used so far

    def reset(self) -> KVCache:
        self.key_positions.fill_(NEVER)
        self.lengths.zero_()
        self.written.zero_()
        return self

    def extend(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Make room for a call's tokens: their positions (batch, seq) and those of all keys (batch, length)."""
        positions, new = count_positions(mask, self.lengths)
        self.columns = self.written + torch.arange(mask.shape[1], device=mask.device)
        self.key_positions.index_copy_(1, self.columns, new)
        self.lengths += mask.long().sum(-1, keepdim=True)
        self.written += mask.shape[1]
        return positions, self.key_positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (batch, kv_heads, seq, head_dim) of the current call; all keys and values of the layer."""
        keys = self.k[layer].index_copy_(2, self.columns, k)
        values = self.v[layer].index_copy_(2, self.columns, v)
        return keys, values

    def reorder(self, rows: Tensor):
        """Row i goes on from what row rows[i] held (beam search)."""
        columns = int(self.written)
        for stored in (*self.k, *self.v):
            stored[:, :, :columns] = stored[rows, :, :columns]
        self.key_positions[:] = self.key_positions[rows]
        self.lengths[:] = self.lengths[rows]


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
class Stack(nn.Module):
    """An encoder or a decoder: what is added to word embeddings, the blocks, the final norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        width = config.embedding_size
        limit = config.max_position_embeddings
        if config.position == "learned":
            self.position_embed = nn.Embedding(limit + config.position_offset, width)
        elif config.position == "relative":
            buckets = config.relative_attention_num_buckets
            self.relative_bias = nn.Embedding(buckets, config.num_attention_heads)
        else:
            dim = config.rotary_dim if config.position == "rope" else width
            full = Rotary(dim, config.rope_theta, limit, config.rope_scaling)
            self.rotary = nn.ModuleDict({"full_attention": full})
            if config.rope_local_base_freq is not None:
                self.rotary["sliding_attention"] = Rotary(dim, config.rope_local_base_freq, limit)
        types = config.type_vocab_size
        self.type_embed = nn.Embedding(types, width) if types else None
        self.embedding_norm = Norm(config, width) if config.embedding_norm else nn.Identity()
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.embedding_project = Linear(width, hidden) if width != hidden else nn.Identity()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
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
        if mask is None:  # rows without padding share their positions
            rows = 1 if cache is None else x.shape[0]
            mask = torch.ones(rows, x.shape[1], dtype=torch.long, device=x.device)
        positions, key_positions = count_positions(mask) if cache is None else cache.extend(mask)
        plain = cache is None and attention_mask is None
        masks = {}
        ropes = {}
        for kind in dict.fromkeys(self.config.layer_types):
            masks[kind] = self.layer_mask(kind, positions, key_positions, plain, x.dtype)
            if self.config.position == "rope":
                rotary = self.rotary[kind if kind in self.rotary else "full_attention"]
                ropes[kind] = rotary(positions)
        x = self.embed_positions(x, positions, token_type_ids)
        for layer, (block, kind) in enumerate(zip(self.layers, self.config.layer_types)):
            x = block(x, ropes.get(kind), masks[kind], cache, layer, cross_kv, encoder_mask)
        return self.norm(x)

    def embed_positions(
        self, x: Tensor, positions: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        """What the first block reads, (batch, seq, hidden): word embeddings and all that is added to them."""
        config = self.config
        if config.scale_embedding:  # rounded to the dtype, as the reference rounds it
            x = x * x.new_full((), config.hidden_size**0.5)
        if config.position == "learned":
            x = x + self.position_embed(positions + config.position_offset)
        if config.position == "sinusoidal":  # sines, then cosines, in the order of Marian
            cos, sin = self.rotary["full_attention"](positions)
            x = x + torch.cat((sin, cos), dim=-1)[..., : x.shape[-1]].to(x.dtype)
        if self.type_embed is not None:
            types = torch.zeros_like(positions) if token_type_ids is None else token_type_ids
            x = x + look_up(self.type_embed, types, "token_type_ids")
        return self.embedding_project(self.embedding_dropout(self.embedding_norm(x)))

    def layer_mask(
        self, kind: str, positions: Tensor, key_positions: Tensor, plain: bool, dtype
    ) -> Tensor | None:
        """The attention mask of a kind of layer, as `attend` takes it; plain: nothing is cached and nothing padded."""
        config = self.config
        window = config.sliding_window if kind == "sliding_attention" else None
        if config.position == "relative":
            return self.relative_mask(positions, key_positions, window, dtype)
        if plain and (window is None or config.causal and positions.shape[1] <= window):
            return None
        return visible(positions, key_positions, window, config.causal)

    def relative_mask(
        self, positions: Tensor, key_positions: Tensor, window: int | None, dtype
    ) -> Tensor:
        """What is added to the scores, (batch, heads, seq, keys): little where masked, else the bias of the distance,
        which T5 sorts into buckets, the near ones one by one, the far ones by the logarithm."""
        config = self.config
        distance = key_positions[:, None, :] - positions[:, :, None]
        steps = -distance.clamp(max=0) if config.causal else distance.abs()
        buckets = config.relative_attention_num_buckets // (1 if config.causal else 2)
        near = buckets // 2
        scale = (buckets - near) / math.log(config.relative_attention_max_distance / near)
        far = near + ((steps.float() / near).clamp(min=1).log() * scale).long()
        bucket = torch.where(steps < near, steps, far.clamp(max=buckets - 1))
        if not config.causal:  # what follows has buckets of its own
            bucket = bucket + buckets * (distance > 0)
        bias = rearrange(self.relative_bias(bucket).to(dtype), "b s t h -> b h s t")
        allowed = visible(positions, key_positions, window, config.causal)
        return bias.masked_fill(~allowed, torch.finfo(dtype).min)


class Head(nn.Module):
    """What the model is for, read off its hidden states: a dense layer, an activation and a norm where the config has
    them, then one output per word or class. Without outputs the rest only travels along (a pooler)."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.hidden_size
        self.act = ACTIVATIONS.get(config.head_act)
        if config.head_act:
            inner = config.embedding_size if config.head == "mlm" else width
            self.dense = Linear(width, inner)
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
        """Outputs (..., outputs) of hidden states (..., hidden); a tied head's weight is the `embedding`."""
        if self.out is None:
            return x
        if self.act is not None:
            x = self.norm(self.act(self.dense(x)))
        weight = embedding if self.out.weight is None else self.out.weight
        return linear(self.dropout(x), weight, self.out.bias)


# What may be replaced, as it stands here: a leaf is looked up in this module when it is called.
LEAVES = {
    leaf.__name__: leaf
    for leaf in (rms_norm, linear, rotate, attend, count_positions, visible)
    + (Linear, Norm, Rotary, Attention, MLP, Block, Stack, Head)
}


def replaced_leaves() -> dict[str, str]:
    """The leaves that somebody has replaced in this module, each by what: {"MLP": "package.module.SquaredReLU"}."""
    return {
        name: qualified_name(globals()[name])
        for name, leaf in LEAVES.items()
        if globals()[name] is not leaf
    }


def qualified_name(leaf) -> str:
    """Module and name of a function or a class; a program's module is that by which others import it."""
    module = leaf.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        if getattr(main, "__spec__", None):
            module = main.__spec__.name
        elif getattr(main, "__file__", None):
            module = Path(main.__file__).stem
    return f"{module}.{getattr(leaf, '__qualname__', type(leaf).__qualname__)}"


def as_ids_tensor(name: str, ids, device: torch.device, optional: bool = False) -> Tensor | None:
    """Ids or a mask (batch, seq) as a tensor: lists of one length and numpy arrays are taken too."""
    if isinstance(ids, Tensor) or ids is None and optional:
        return ids
    expected = "token ids (batch, seq): a tensor, an array or lists of one length"
    try:
        tensor = torch.as_tensor(ids, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Error(f"{name}: {error}, expected {expected}; stream takes a text") from None
    return tensor if tensor.is_floating_point() else tensor.long()


def check_inputs(
    config: Config,
    ids: Tensor,
    mask: Tensor | None = None,
    types: Tensor | None = None,
    cache=None,
    name: str = "input_ids",
):
    """Refuse ids (batch, seq), a mask and token types of wrong shapes; of ids, `look_up` sees the values."""
    shape = tuple(ids.shape)
    mask = mask if cache is None else None  # the cache's own may be longer
    for what, tensor in ((name, ids), ("token_type_ids", types), ("attention_mask", mask)):
        if tensor is not None:
            fine = len(shape) == 2 and shape[1] and tuple(tensor.shape) == shape
            require(
                fine and (tensor is mask or not tensor.is_floating_point()),
                f"{what}: {tensor.dtype} of shape {tuple(tensor.shape)}, expected ids (batch, seq), all of one shape",
            )
    require(types is None or config.type_vocab_size, "token_type_ids: the model has no token types")
    limit = config.max_position_embeddings
    require(
        cache is not None or config.position not in LIMITED or shape[1] <= limit,
        f"{name}: {shape[1]} tokens, but the model has only {limit} positions",
    )


def check_range(name: str, ids: Tensor, limit: int):
    """Refuse ids outside of a table with `limit` rows. Only on a CPU: elsewhere a look would wait for the device."""
    if ids.device.type == "cpu" and ids.numel():
        low, high = map(int, ids.aminmax())
        require(
            0 <= low and high < limit, f"{name}: ids {low} to {high}, expected 0 to {limit - 1}"
        )


def look_up(table: nn.Embedding, ids: Tensor, name: str) -> Tensor:
    """The rows (batch, seq, width) of ids (batch, seq). Raises Error for ids that have none, which costs nothing: on a
    CPU the embedding looks for itself."""
    if torch.compiler.is_compiling():
        return table(ids)
    try:
        return table(ids)
    except IndexError:
        check_range(name, ids, table.num_embeddings)
        raise


class TinyLM(Stack):
    """A language model: a decoder, an encoder, or both, and a head.

    One model may be used from many threads at once, but for training and `compile`.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.tokenizer = None
        self.generation_config = {}
        self.replaced = replaced_leaves()  # what it is made of
        self._compiled, self._states = None, {}  # of generation: the step, idle states by shape
        self.embed = nn.Embedding(config.vocab_size, config.embedding_size)
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
        # What a block adds to the residual stream shrinks with the depth (GPT-2).
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
        """What the head says, one tensor: of a language model, masked or not, logits (batch, seq, vocab); of a
        classifier (batch, labels), of tokens (batch, seq, labels); start and end logits of an answer (batch, seq, 2);
        of a model without a head its hidden states (batch, seq, hidden).

        input_ids (batch, seq), a tensor, a numpy array or lists; attention_mask (batch, seq), 1 for a token and 0 for
        padding on either side; decoder_input_ids (batch, target) behind an encoder; a cache (its own columns only) if
        the ids continue what it holds; cross_kv and encoder_mask, what `encode` gave, if the ids are the decoder's;
        columns (batch, n) to get logits (batch, n, vocab) of those columns alone; apply_head False for the hidden
        states that the head would read. Raises Error for ids that the model cannot read.
        """
        ids = as_ids_tensor("input_ids", input_ids, self.device)
        mask = as_ids_tensor("attention_mask", attention_mask, self.device, optional=True)
        types = as_ids_tensor("token_type_ids", token_type_ids, self.device, optional=True)
        name = "input_ids"
        if self.encoder is not None:
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
        if self.config.head == "classify":
            columns = pooled_column(ids, mask, self.config)
        if columns is not None:
            x = x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))
        if self.config.scale_logits:
            x = x * self.config.hidden_size**-0.5
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
        """What a decoder needs of a source (batch, seq): cross_kv and encoder_mask, as `forward` takes them."""
        ids = as_ids_tensor("input_ids", input_ids, self.device)
        mask = as_ids_tensor("attention_mask", attention_mask, self.device, optional=True)
        check_inputs(self.config, ids, mask)
        states = self.encoder.states(look_up(self.embed, ids, "input_ids"), mask)
        cross_kv = [block.cross_attention.keys_values(states) for block in self.layers]
        return cross_kv, None if mask is None else rearrange(mask.bool(), "b t -> b 1 1 t")

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
        """The model in a checkpoint folder, in eval mode: config.json, model.safetensors (or its sharded index) and
        tokenizer.json where there is one; or of that name on the Hugging Face hub, see `find_checkpoint`. dtype None
        or "auto" keeps the stored one; `torch_dtype` is the same argument.

        `head` swaps the head (a key of the family's heads): of the new one, what the checkpoint has is loaded, and the
        rest begins at random; `changes` are of Config fields. Raises Error where the folder lacks a file or a tensor,
        has one too many or of a wrong shape, where config.json asks for something unsupported, or where the model was
        saved with leaves replaced (see `save_pretrained`) that are not replaced by the same.
        """
        return load_model(cls, folder, dtype, device, head, revision, changes)

    def save_pretrained(self, folder: str | Path):
        """Write config.json, model.safetensors, generation_config.json and the tokenizer's files, each one at once.

        A model with leaves of somebody else's is none of a known family: it is saved as model_type "tinylm", with what
        they are replaced by (`tinylm_replaced` of config.json), and loads only where they are. Whoever replaced a
        function by one that computes the same puts the old one back before saving. Raises Error where the architecture
        cannot be written as the config's `model_type`.
        """
        save_model(self, Path(folder))

    def compile(self, *arguments, **options):
        """As of any module, with einops as operations of the graph: to trace its parser at each call takes longer than
        all the rest."""
        torch.compiler.allow_in_graph(rearrange)
        super().compile(*arguments, **options)

    def __getstate__(self):
        """Copies compile for themselves."""
        return self.__dict__ | {"_compiled": None, "_states": {}}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        compile: bool = False,
        **options,
    ) -> Tensor:
        """Continue every row of ids (batch, seq): (batch, seq + new), with the pad id after a row's end; behind an
        encoder (batch, 1 + new), beginning with decoder_start_token_id.

        The options are fields of `GenerationConfig`: temperature, top_k, top_p, min_p, repetition_penalty,
        eos_token_id, stop, seed, num_beams, ...; what is not given is as generation_config.json says, but for
        temperature, top_k, top_p and min_p: nothing is sampled unless asked for. The same seed gives the same text,
        whatever stands in the other rows. `compile` compiles the decode step (CUDA graphs on CUDA). Raises Error for
        arguments out of range and for logits that are not finite.
        """
        input_ids = as_ids_tensor("input_ids", input_ids, self.device)
        attention_mask = as_ids_tensor("attention_mask", attention_mask, self.device, optional=True)
        config = self.make_generation_config(max_new_tokens=max_new_tokens, **options)
        search = BeamSearch(config, len(input_ids)) if config.num_beams > 1 else None
        require(
            not search or not (config.temperature or config.stop or compile),
            f"num_beams = {config.num_beams} goes with temperature 0, no stop strings and compile=False",
        )
        choose = functools.partial(choose_beams, search=search) if search else sample
        steps = list(generate_steps(self, input_ids, attention_mask, config, compile, choose))
        if search:
            rows = [torch.tensor(text, device=input_ids.device) for text in search.best()]
            new = nn.utils.rnn.pad_sequence(rows, True, config.pad_token_id)
        else:
            tokens, alive = (torch.stack(parts, dim=1) for parts in zip(*steps))
            new = tokens[:, : int(alive.any(0).sum())]  # until the last row ended
        return torch.cat((start_ids(self, input_ids), new), dim=1)

    def stream(
        self,
        text: str | list[int],
        max_new_tokens: int | None = None,
        compile: bool = False,
        **options,
    ) -> Iterator[str]:
        """The continuation of a text (or of its ids), piece by piece, whole characters only, up to a stop string; with
        the options of `generate`, but for beams."""
        require(
            self.tokenizer,
            "stream: the checkpoint has no tokenizer.json; use generate with token ids",
        )
        options |= {"max_new_tokens": max_new_tokens, "num_beams": 1}
        config = self.make_generation_config(**options)
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        ids = ids or [*config.eos_token_id, 0][:1]

        def tokens():
            row, plain = torch.tensor([ids], device=self.device), replace(config, stop=())
            for token, _ in generate_steps(self, row, None, plain, compile):
                if int(token) in config.eos_token_id:
                    return
                yield int(token)

        return stream_text(self.tokenizer, tokens(), config.stop, () if self.encoder else ids)

    def chat(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        variables: dict | None = None,
        **options,
    ) -> Iterator[str]:
        """The answer to a conversation, as `stream` gives it; see `Tokenizer.apply_chat_template` for `messages`,
        `tools` and the template's `variables`. It ends where the config or the tokenizer says so."""
        require(self.tokenizer, "chat: the checkpoint has no tokenizer.json")
        text = self.tokenizer.apply_chat_template(messages, tools, True, **(variables or {}))
        ids, limit = self.tokenizer.encode(text, special=False), self.config.max_position_embeddings
        require(
            len(ids) <= limit, f"chat: {len(ids)} tokens, but the model has only {limit} positions"
        )
        ends = (*self.ends(), *as_ids("eos_token_id", self.tokenizer.eos_token_id))
        return self.stream(ids, **{"eos_token_id": ends} | options)

    def special_token_id(self, name: str):
        """A special id, as generation_config.json says it, else as the config does."""
        return self.generation_config.get(name, getattr(self.config, name))

    def ends(self) -> tuple:
        """The ids that end a text."""
        return as_ids("eos_token_id", self.special_token_id("eos_token_id"))

    def make_generation_config(self, **given) -> GenerationConfig:
        """How to generate: as given, else as generation_config.json says, else plainly."""
        seq2seq = self.encoder is not None
        return make_generation_config(given, self.generation_config, vars(self.config), seq2seq)


# ---------------------------------------------------------------------------------------------------------------------
# Generation: how a text is written (GenerationConfig), what changes logits, the choice of a token, beam search, the
# state of a batch, the loop, the text of its ids. What onnxlm.py needs too stands there again under the same name: a
# test holds the two together.
# ---------------------------------------------------------------------------------------------------------------------
CACHE_BUCKET = 128  # cache lengths are multiples of it: a compiled step serves many prompt lengths
KEPT_STATES = 4  # compiled states that a model keeps, one for each shape
STEPS_BETWEEN_LOOKS = 16  # at whether all rows have ended, on a GPU, where a look waits for it


def as_ids(name: str, value) -> tuple:
    """One id, several or None as a tuple."""
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    fine = all(is_number_in(i, -1, 2**31, numbers.Integral) for i in ids)
    require(fine, f"{name} = {value!r}, expected integers")
    return tuple(map(int, ids))


def stop_strings(stop) -> tuple:
    """One string, several or None as a tuple."""
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    fine = all(isinstance(text, str) and text for text in stop)
    require(fine, f"stop = {stop!r}, expected strings that are not empty")
    return stop


@dataclass(frozen=True)
class GenerationConfig:
    """How a text is generated, in the words of Hugging Face; what changes logits does so in its order.

    Raises Error where a value is out of its range.
    """

    max_new_tokens: Size = 128
    temperature: Annotated[float, 0, 1e9] = 0.0  # 0: the likeliest
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, 1e-9, 1e9] = 1.0
    eos_token_id: int | str | tuple | list = ()  # ids that end a row; none: it never ends
    pad_token_id: Id | None = None  # stands after a row's end; None: the first that ends it, or 0
    stop: str | tuple | list = ()  # strings: a row ends once its new text has one
    seed: Annotated[int, -(2**63), 2**63 - 1] | None = None
    no_repeat_ngram_size: Count = 0
    min_length: Count = 0  # tokens before a row may end, the prompt's included
    bad_words_ids: tuple | list = ()  # sequences of ids that must not come
    forced_bos_token_id: Count | None = None  # what a decoder says after its start token
    forced_eos_token_id: Count | None = None  # what it says last
    num_beams: Annotated[int, 1, 2**16] = 1  # above 1: the likeliest text that such a search finds
    length_penalty: Annotated[float, -1e3, 1e3] = 1.0  # score: log-probability / length**this
    # of a row, once it has num_beams finds: at once; unless a better one is likely; or possible
    early_stopping: Literal[True, False, "never"] = False
    renormalize_logits: bool = False  # of beams, after what changes logits

    def __post_init__(self):
        check_fields(self)
        ends = as_ids("eos_token_id", self.eos_token_id)
        words = self.bad_words_ids
        fine = all(isinstance(word, (list, tuple)) and word for word in words)
        require(fine, f"bad_words_ids = {words!r}, expected lists of ids that are not empty")
        words = [as_ids("bad_words_ids", word) for word in words]
        pads = (self.pad_token_id, *ends, 0)
        vars(self).update(
            eos_token_id=ends,
            stop=stop_strings(self.stop),
            bad_words_ids=tuple(word for word in words if word not in [(end,) for end in ends]),
            pad_token_id=next(id for id in pads if id is not None and id >= 0),
            # below, a division would overflow, and the draw is the likeliest anyway
            temperature=self.temperature if self.temperature >= 1e-5 else 0.0,
        )


# What generation_config.json may say. As transformers does, but for what samples: that only an argument asks for.
FROM_FILE = set(
    """max_new_tokens repetition_penalty no_repeat_ngram_size min_length bad_words_ids
    forced_bos_token_id forced_eos_token_id num_beams renormalize_logits length_penalty
    early_stopping stop_strings""".split()
)
UNSUPPORTED = {  # what would change a greedy text -> the value, beside None, that doesn't
    **dict.fromkeys(
        """dola_layers exponential_decay_length_penalty max_time
        watermarking_config""".split()
    ),
    **dict.fromkeys(
        """begin_suppress_tokens constraints force_words_ids sequence_bias
        suppress_tokens""".split(),
        [],
    ),
    **dict.fromkeys(
        "encoder_no_repeat_ngram_size min_new_tokens penalty_alpha token_healing".split(), 0
    ),
    **dict.fromkeys(
        """encoder_repetition_penalty guidance_scale num_beam_groups num_return_sequences
        typical_p""".split(),
        1,
    ),
}
GENERATION = {*FROM_FILE, *UNSUPPORTED} | set(  # what may stand in config.json, too
    """max_length do_sample diversity_penalty temperature top_k top_p min_p top_h epsilon_cutoff
    eta_cutoff force_bos_token_to_be_generated decoder_start_token_id bos_token_id eos_token_id
    pad_token_id""".split()
)
NOT_OF_THE_TEXT = set(  # what transformers knows, and what changes no text
    """assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind cache_config cache_implementation compile_config
    continuous_batching_config disable_compile is_assistant low_memory max_cache_len
    max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule output_attentions
    output_hidden_states output_logits output_scores prefill_chunk_size prompt_lookup_num_tokens
    remove_invalid_values return_dict_in_generate speculation_type target_lookbehind
    transformers_version use_cache use_mtp""".split()
)


def read_generation_config(folder: Path, config: dict) -> dict:
    """A folder's generation_config.json; where it has none, what its config.json says of generation, as checkpoints of
    transformers 4 have it. Fields that nobody gives a meaning are warned of."""
    file = folder / "generation_config.json"
    if file.exists():
        found = read_json(file)
        unknown = sorted(n for n in found.keys() - GENERATION - NOT_OF_THE_TEXT if n[:1] != "_")
        if unknown:
            warnings.warn(f"{file}: ignored, as unknown: {', '.join(unknown)}", stacklevel=2)
        return found
    found = {name: value for name, value in config.items() if name in GENERATION}
    if config.get("force_bos_token_to_be_generated"):
        found["forced_bos_token_id"] = config.get("bos_token_id")
    return found


def make_generation_config(
    given: dict, file: dict, config: dict, seq2seq: bool = False
) -> GenerationConfig:
    """How to generate: as the arguments `given` say, else as generation_config.json (`file`) does, else with the ids of
    config.json, plainly. An `eos_token_id` of None among the arguments: a row never ends."""
    for name, harmless in UNSUPPORTED.items():
        fine = file.get(name) in (None, harmless)
        require(fine, f"generation_config.json: {name} = {file.get(name)!r} is not supported")
    options = {n: file.get(n, config.get(n)) for n in ("eos_token_id", "pad_token_id")}
    if seq2seq and is_number_in(file.get("max_length"), 2, 2**31, numbers.Integral):
        options["max_new_tokens"] = file["max_length"] - 1
    options |= {name: file[name] for name in FROM_FILE if file.get(name) is not None}
    if given.get("eos_token_id", 0) is None:
        options["eos_token_id"] = None
    options |= {name: value for name, value in given.items() if value is not None}
    if "stop_strings" in options:
        options = {"stop": options.pop("stop_strings")} | options
    unknown = sorted(options.keys() - {f.name for f in fields(GenerationConfig)})
    require(not unknown, f"{', '.join(unknown)}: no such option of a generation")
    options["eos_token_id"] = as_ids("eos_token_id", options["eos_token_id"])
    made = GenerationConfig(**options)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        token, vocab = getattr(made, name), config["vocab_size"]
        require(token is None or token < vocab, f"{name} = {token}, expected less than {vocab}")
    return made


def uniform(seed: Tensor, step: Tensor, batch: int, vocab: int) -> Tensor:
    """Numbers in (0, 1), (batch, vocab), a function of seed, row, step and column alone: the same on every device and
    in every batch size (Salmon et al. 2011, counter-based random numbers)."""

    def hash32(x):  # full avalanche of the lowest 32 bits (Wellons' two-round prospector)
        x = x & 0xFFFFFFFF
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 15)

    rows = torch.arange(batch, device=seed.device)
    columns = torch.arange(vocab, device=seed.device)
    state = hash32(hash32(hash32(seed) + rows) + step)
    bits = hash32(state[:, None] + columns * 0x9E3779B9)
    return ((bits >> 9).float() + 0.5) / 2**23


# Logits processors: logits or log-probabilities (batch, vocab), the state after the ids so far, the config -> the same,
# less what the config forbids. Numbers are tensors of the state: a compiled step is the same for others.


def penalize_repetition(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    if "repetition_penalty" not in state.numbers:
        return logits
    penalty = state.numbers["repetition_penalty"]
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(state.seen, penalized, logits)


def forbid_repeated_ngrams(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    n, vocab = config.no_repeat_ngram_size, logits.shape[-1]
    if not 0 < n <= state.ids.shape[1]:
        return logits
    windows = state.ids.unfold(1, n, 1)  # (batch, windows, n)
    written = torch.arange(windows.shape[1], device=logits.device) + n <= state.lengths
    again = (windows[..., :-1] == state.newest(n - 1)[:, None]).all(-1) & written
    # what does not repeat goes to a column to spare
    banned = torch.where(again, windows[..., -1], vocab)
    spare = torch.zeros(len(logits), vocab + 1, dtype=torch.bool, device=logits.device)
    return logits.masked_fill(spare.scatter_(1, banned, True)[:, :-1], -math.inf)


def forbid_bad_words(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    column = torch.arange(logits.shape[-1], device=logits.device)
    for *before, last in config.bad_words_ids:
        same = state.newest(len(before)) == state.ids.new_tensor(before)
        banned = same.all(-1, keepdim=True) & (state.lengths >= len(before))
        logits = torch.where(banned & (column == last), -math.inf, logits)
    return logits


def forbid_early_end(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    if not config.min_length:
        return logits
    column = torch.arange(logits.shape[-1], device=logits.device)
    ends = (column[:, None] == state.ends).any(-1)
    return torch.where(ends & (state.lengths < config.min_length), -math.inf, logits)


def force_tokens(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    column = torch.arange(logits.shape[-1], device=logits.device)
    for token, when in (
        (config.forced_bos_token_id, state.lengths == 1),
        (config.forced_eos_token_id, state.count == state.last),
    ):
        if token is not None:
            logits = torch.where(when, torch.where(column == token, 0.0, -math.inf), logits)
    return logits


def process_logits(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    """Logits or log-probabilities (batch, vocab), less what the config forbids after the ids so far."""
    logits = penalize_repetition(logits, state, config)
    logits = forbid_repeated_ngrams(logits, state, config)
    logits = forbid_bad_words(logits, state, config)
    logits = forbid_early_end(logits, state, config)
    return force_tokens(logits, state, config)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    ordered, order = logits.sort(descending=True)
    p = ordered.softmax(-1)
    outside = p.cumsum(-1) - p >= top_p  # what stands before it is enough already
    outside[:, 0] = False
    return logits.masked_fill(outside.scatter(1, order, outside), -math.inf)


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -math.inf)


def sample(logits: Tensor, state: DecodeState, config: GenerationConfig) -> Tensor:
    """The next id (batch,) of each row of logits (batch, vocab), drawn by the Gumbel trick; at temperature 0 the
    likeliest."""
    logits = process_logits(logits, state, config)
    if "temperature" not in state.numbers:
        return logits.argmax(-1)
    logits = logits / state.numbers["temperature"]
    if config.top_k:
        logits = keep_top_k(logits, config.top_k)
    if "top_p" in state.numbers:
        logits = keep_top_p(logits, state.numbers["top_p"])
    if "min_p" in state.numbers:
        logits = keep_min_p(logits, state.numbers["min_p"])
    noise = uniform(state.seed, state.count, *logits.shape)
    return (logits - (-noise.log()).log()).argmax(-1)


class BeamSearch:
    """The likeliest continuation of each row that a search finds, step by step as transformers does it: candidates that
    end in a step compete, by their score, for as many places as there are beams."""

    def __init__(self, config: GenerationConfig, batch: int):
        n = config.num_beams
        self.config = config
        self.candidates = max(2, 1 + len(config.eos_token_id)) * n  # of a row, looked at in a step
        self.texts = [[] for _ in range(batch * n)]  # new ids of each beam
        self.sums = [0.0, *[-1e9] * (n - 1)] * batch  # log-probabilities; at first one beam counts
        self.found = [[] for _ in range(batch)]  # (score, text) of what has ended, the best first
        self.open = [True] * batch  # the row may still find a better one

    def advance(self, sums: list, places: list, vocab: int) -> list[int]:
        """Go on with the best of each row's candidates: their sums (batch, candidates), the best first, and places
        (batch, candidates), beam * vocab + token. Returns which of the old beams (batch * beams,) each new one
        continues."""
        going = []
        for row, candidates in enumerate(zip(sums, places)):
            going += self.advance_row(row, *candidates, vocab)
        beams, self.sums, self.texts = map(list, zip(*going))
        return beams

    def advance_row(self, row: int, sums: list, places: list, vocab: int) -> list:
        """(beam, sum, text) of the beams that a row goes on with."""
        config, found, going = self.config, self.found[row], []
        length = len(self.texts[0]) + 1
        last = length == config.max_new_tokens
        for rank, (total, place) in enumerate(zip(sums, places)):
            beam, token = row * config.num_beams + place // vocab, place % vocab
            text = [*self.texts[beam], token]
            ends = token in config.eos_token_id
            if (ends or last) and self.open[row] and rank < config.num_beams:
                found.append((total / length**config.length_penalty, text))
            if not ends:
                going.append((beam, total, text))
        while len(going) < config.num_beams:  # nearly every token ends a text: a beam to nowhere
            going.append((beam, -math.inf, text))
        found.sort(key=lambda pair: -pair[0])
        del found[config.num_beams :]
        patient = config.early_stopping == "never" and config.length_penalty > 0
        longest = config.max_new_tokens if patient else length
        hope = going[0][1] / longest**config.length_penalty
        if len(found) == config.num_beams:
            self.open[row] &= config.early_stopping is not True and hope > found[-1][0]
        self.open[row] &= not last
        return going[: config.num_beams]

    def best(self) -> list:
        """The new ids of each row (batch,), of different lengths."""
        return [found[0][1] for found in self.found]


def choose_beams(
    logits: Tensor, state: DecodeState, config: GenerationConfig, search: BeamSearch
) -> Tensor:
    """The next id of each beam (batch * beams,), in the place of `sample`; the state goes on from the best beams."""
    scores = process_logits(logits.log_softmax(-1), state, config)
    if config.renormalize_logits:
        scores = scores.log_softmax(-1)
    totals = (scores + scores.new_tensor(search.sums)[:, None]).view(len(search.open), -1)
    sums, places = totals.topk(min(search.candidates, totals.shape[1]))
    beams = search.advance(sums.tolist(), places.tolist(), logits.shape[-1])
    state.reorder(torch.tensor(beams, device=logits.device))
    state.done |= not any(search.open)
    return torch.tensor([text[-1] for text in search.texts], device=logits.device)


class DecodeState:
    """All that changes while a batch is generated: tensors of fixed shape and, in a compiled step, fixed address.

    cache: its keys and values; cross_kv, encoder_mask: what `encode` gave; ids (batch, length + 1): the prompt and what
    came after it, by position; seen (batch, vocab): ids that a row has had; token, one (batch, 1): the newest, and its
    mask; done (batch,): the row has ended; alive (batch,): it had not before its newest token; finite: all logits were.
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
        self.ends = new(len(config.eos_token_id))
        self.pad, self.seed = new(), new()
        self.count, self.last = new(), new()  # tokens written, and before the last one
        self.numbers = {name: new(dtype=torch.float32) for name in active_numbers(config)}

    @staticmethod
    def signature(lm: TinyLM, prompt: Tensor, source: tuple, config: GenerationConfig) -> tuple:
        """What the shapes of a state follow from."""
        shapes = [x.shape for x in tree_leaves(source) if isinstance(x, Tensor)]
        size = (len(prompt), cache_length(prompt, config), lm.dtype, lm.device)
        return (*size, len(config.eos_token_id), *active_numbers(config), *shapes)

    def begin(self, prompt: Tensor, mask: Tensor, source: tuple, config: GenerationConfig):
        """Everything as it is before the first token of a prompt (batch, seq), in place."""
        real = mask.bool()
        rows = torch.arange(len(prompt), device=prompt.device)[:, None].expand_as(real)[real]
        self.cache.reset()
        for kept, given in zip(
            tree_leaves((self.cross_kv, self.encoder_mask)), tree_leaves(source)
        ):
            if kept is not None:
                kept.copy_(given)
        self.ids.fill_(-1)
        self.ids[rows, count_positions(mask)[0][real]] = prompt[real]
        self.seen.fill_(False)
        self.seen[rows, prompt[real]] = True
        self.done.fill_(False)
        self.finite.fill_(True)
        self.ends.copy_(torch.tensor(config.eos_token_id))
        self.pad.fill_(min(config.pad_token_id, self.seen.shape[1] - 1))
        self.seed.copy_(
            torch.randint(2**31, ()) if config.seed is None else torch.tensor(config.seed)
        )
        self.count.fill_(0)
        self.last.fill_(config.max_new_tokens - 1)
        for name, value in active_numbers(config).items():
            self.numbers[name].fill_(value)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row (batch, 1), the prompt's included."""
        return self.cache.lengths

    def newest(self, n: int) -> Tensor:
        """The last n ids of each row (batch, n)."""
        columns = self.lengths - n + torch.arange(n, device=self.ids.device)
        return self.ids.gather(1, columns.clamp(min=0))

    def append(self, token: Tensor):
        """The new ids (batch,) join the text."""
        self.ids.scatter_(1, self.lengths, token[:, None])
        self.alive.copy_(~self.done)
        self.done |= (token[:, None] == self.ends).any(-1)
        self.seen.scatter_(1, token[:, None], True)
        self.token.copy_(token[:, None])
        self.count += 1

    def reorder(self, rows: Tensor):
        """Row i goes on from what row rows[i] held (beam search)."""
        self.cache.reorder(rows)
        self.ids.copy_(self.ids[rows])
        self.seen.copy_(self.seen[rows])

    def tensors(self) -> list:
        return [x for x in tree_leaves((vars(self), vars(self.cache))) if isinstance(x, Tensor)]


def cache_length(prompt: Tensor, config: GenerationConfig) -> int:
    return -(-(prompt.shape[1] + config.max_new_tokens) // CACHE_BUCKET) * CACHE_BUCKET


def active_numbers(config: GenerationConfig) -> dict:
    """The numbers that do something: a compiled step takes them as tensors, and is the same for others."""
    idle = dict(temperature=0, top_p=1, min_p=0, repetition_penalty=1)
    given = {name: getattr(config, name) for name in idle}
    return {name: value for name, value in given.items() if value not in (None, idle[name])}


def write_token(lm, state: DecodeState, ids, mask, columns, config, choose):
    """Read ids (batch, seq), write one token: nothing here waits for the device."""
    logits = lm(
        ids,
        mask,
        cache=state.cache,
        columns=columns,
        cross_kv=state.cross_kv,
        encoder_mask=state.encoder_mask,
    )
    logits = logits[:, -1].float()
    state.finite &= (logits.amax(-1).isfinite() | state.done).all()  # NaN is the largest, too
    state.append(torch.where(state.done, state.pad, choose(logits, state, config)))


def prefill(lm: TinyLM, state: DecodeState, prompt: Tensor, mask: Tensor, config, choose=sample):
    """Read the prompt (batch, seq) and write the first token."""
    write_token(lm, state, prompt, mask, last_column(mask), config, choose)


def decode_one_token(lm: TinyLM, state: DecodeState, config: GenerationConfig, choose=sample):
    """Write the token after the newest. It can be compiled: shapes and addresses are the same in every step."""
    write_token(lm, state, state.token, state.one, None, config, choose)


def compiled_step(lm: TinyLM) -> Callable:
    """`decode_one_token`, compiled once for a model; CUDA graphs on CUDA."""
    if lm._compiled is None:
        torch.compiler.allow_in_graph(rearrange)
        mode = "reduce-overhead" if lm.device.type == "cuda" else None
        lm._compiled = torch.compile(
            decode_one_token, fullgraph=True, dynamic=False, mode=mode, recompile_limit=256
        )
    return lm._compiled


def make_state(lm: TinyLM, prompt, mask, source, config: GenerationConfig, compile: bool):
    """A state for a generation. A compiled step finds the one that an earlier generation of its shape left, at the same
    addresses; while that is still running, it gets one of its own."""
    key = DecodeState.signature(lm, prompt, source, config)
    state = lm._states.pop(key, None) if compile else None
    if state is None:
        # what is made in inference mode can be written there alone
        with torch.inference_mode(False), torch.no_grad():
            state = DecodeState(lm, prompt, source, config)
        state.key = key
        for tensor in state.tensors() if compile else ():
            torch._dynamo.mark_static_address(tensor, guard=False)
    state.begin(prompt, mask, source, config)
    return state


def prepare(lm: TinyLM, input_ids, attention_mask, config: GenerationConfig, compile: bool):
    """What a generation begins with, checked: prompt and mask (batch * beams, seq), what `encode` gave."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    head = lm.config.head
    fine = head == "lm" and lm.config.causal
    require(fine, f"generate: the checkpoint's head is {head!r}, expected a language model's, 'lm'")
    fine = not config.stop or lm.tokenizer
    require(fine, f"stop = {config.stop} needs a tokenizer.json, which the checkpoint lacks")
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
        if compile:  # a compiled step serves many lengths of the source
            more = min(-input_ids.shape[1] % CACHE_BUCKET, max(limit - input_ids.shape[1], 0))
            input_ids, attention_mask = F.pad(input_ids, (0, more)), F.pad(mask, (0, more))
        source = lm.encode(input_ids, attention_mask)
        input_ids = start_ids(lm, input_ids)
        mask = torch.ones_like(input_ids)

    def for_each_beam(x):
        return x.repeat_interleave(config.num_beams, 0) if config.num_beams > 1 else x

    return tree_map_only(Tensor, for_each_beam, (input_ids, mask, source))


def start_ids(lm: TinyLM, input_ids: Tensor) -> Tensor:
    """What new tokens stand behind: the ids, or behind an encoder the start token (batch, 1)."""
    if lm.encoder is None:
        return input_ids
    ids = as_ids("decoder_start_token_id", lm.special_token_id("decoder_start_token_id"))
    return input_ids.new_full((len(input_ids), 1), [*ids, lm.config.decoder_start_token_id][0])


@torch.no_grad()
def generate_steps(
    lm: TinyLM, input_ids, attention_mask, config: GenerationConfig, compile=False, choose=sample
):
    """Yield, step by step, the new ids (batch,) and which rows (batch,) had not ended before it, until all rows have.
    Raises Error where logits are not finite."""
    prompt, mask, source = prepare(lm, input_ids, attention_mask, config, compile)
    state = make_state(lm, prompt, mask, source, config, compile)
    step = compiled_step(lm) if compile else decode_one_token
    texts = []
    for row, real in zip(prompt, mask.bool()) if config.stop else ():
        start = () if lm.encoder else row[real].tolist()
        texts.append(TextStream(lm.tokenizer, config.stop, start))
    on_gpu = prompt.device.type == "cuda"
    look_every = STEPS_BETWEEN_LOOKS if on_gpu and not texts else 1
    try:
        prefill(lm, state, prompt, mask, config, choose)
        for i in range(1, config.max_new_tokens + 1):
            look = i % look_every == 0 or i == config.max_new_tokens
            if look:
                require(bool(state.finite), NOT_FINITE)
            token, alive = state.token[:, 0].clone(), state.alive.clone()
            yield token, alive
            for row, text in enumerate(texts):
                text.append(int(token[row]))
                if text.ended:
                    state.done[row] = True
            if i == config.max_new_tokens or look and bool(state.done.all()):
                return
            if compile and on_gpu:
                torch.compiler.cudagraph_mark_step_begin()
            step(lm, state, config, choose)
    finally:
        if compile and bool(state.finite):  # keys that are not would spoil the next text
            lm._states[state.key] = state
            for old in list(lm._states)[:-KEPT_STATES]:
                lm._states.pop(old, None)


NOT_FINITE = (
    "the model's logits are not finite (its numbers overflow): try another dtype or precision"
)


class TextStream:
    """The text of ids that come one by one behind those of a prompt: whole characters only, and nothing from a stop
    string on. Stop strings are looked for in the text with its special tokens written out, which is not shown.

    New text is what a text has more than the same without its newest ids: a decoder may strip the first space of what
    it is given, so that ids alone do not say their text.
    """

    def __init__(self, tokenizer, stop: tuple = (), prompt=()):
        self.tokenizer, self.stop, self.ids = tokenizer, stop, list(prompt)
        self.start, self.known = 0, len(self.ids)  # ids to compare with, and ids whose text is out
        self.held = []  # (text with special tokens, text to show), which may begin a stop string
        self.ended = False  # a stop string has come

    def new_text(self, special: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.known], special)
        return self.tokenizer.decode(self.ids[self.start :], special)[len(before) :]

    def append(self, token: int) -> str:
        """What there is to show once an id has come."""
        self.ids.append(token)
        full = self.new_text(bool(self.stop))
        if full.endswith("\ufffd"):  # a character whose bytes are not all there
            return ""
        shown = self.new_text(False) if self.stop else full
        if shown:  # ids without a text are no beginning to compare with
            self.start = self.known
        self.known = len(self.ids)
        if not self.stop:
            return shown
        self.held.append((full, shown))
        text = "".join(full for full, _ in self.held)
        cut = min((text.find(stop) for stop in self.stop if stop in text), default=-1)
        self.ended = cut >= 0
        if not self.ended:  # keep back what may begin a stop string
            begins = [
                n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])
            ]
            cut = len(text) - max(begins, default=0)
        return self.release(cut)

    def release(self, cut: int) -> str:
        """What is shown of the held text before a character; where it has ended, the rest is dropped."""
        out = []
        while self.held and (len(self.held[0][0]) <= cut or self.ended):
            full, shown = self.held.pop(0)
            out.append(shown if len(full) <= cut else os.path.commonprefix([shown, full[:cut]]))
            cut = max(cut - len(full), 0)
        return "".join(out)

    def flush(self) -> str:
        """The rest, once no more ids come."""
        return "" if self.ended else "".join(shown for _, shown in self.held) + self.new_text(False)


def stream_text(tokenizer, tokens, stop: tuple = (), prompt=()):
    """The text of a stream of ids behind those of a prompt, piece by piece, as `TextStream` has it."""
    text = TextStream(tokenizer, stop, prompt)
    for token in tokens:
        if piece := text.append(token):
            yield piece
        if text.ended:
            return
    if rest := text.flush():
        yield rest


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers and chat templates; mirrored in onnxlm.py, but for bytes and the resolving of files
# ---------------------------------------------------------------------------------------------------------------------
TOKENIZER_FILES = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
    vocab.json merges.txt vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model source.spm target.spm""".split()
EXTRA_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja

SPECIAL_TOKENS = """bos_token eos_token unk_token sep_token pad_token cls_token
    mask_token""".split()  # in transformers' order
SENTENCEPIECE = "bos=<s> eos=</s> unk=<unk>"
ROBERTA = "bos=<s> eos=</s> unk=<unk> sep=</s> pad=<pad> cls=<s> mask=<mask>"
CLASS_TOKENS = {  # tokenizer class of transformers -> the special tokens that it has where no file says otherwise
    "BertTokenizer": "unk=[UNK] sep=[SEP] pad=[PAD] cls=[CLS] mask=[MASK]",
    "RobertaTokenizer": ROBERTA,
    "XLMRobertaTokenizer": ROBERTA,
    "MBartTokenizer": ROBERTA,
    "LlamaTokenizer": SENTENCEPIECE,
    "CodeLlamaTokenizer": SENTENCEPIECE,
    "GPT2Tokenizer": "bos=<|endoftext|> eos=<|endoftext|> unk=<|endoftext|>",
    "GPTNeoXTokenizer": "bos=<|endoftext|> eos=<|endoftext|> unk=<|endoftext|> pad=<|padding|>",
    "Qwen2Tokenizer": "eos=<|endoftext|> unk=<|endoftext|> pad=<|endoftext|>",
    "T5Tokenizer": "eos=</s> unk=<unk> pad=<pad>",
    "GemmaTokenizer": "bos=<bos> eos=<eos> unk=<unk> pad=<pad> mask=<mask>",
}
SAME_TOKENIZERS = {  # a second name of a class -> the class
    "DistilBertTokenizer": "BertTokenizer",
    "ElectraTokenizer": "BertTokenizer",
    "BartTokenizer": "RobertaTokenizer",
}
MODEL_TOKENIZERS = {  # tokenizer class -> model types that have it; "": whatever tokenizer.json says
    "BertTokenizer": "bert distilbert electra",
    "RobertaTokenizer": "roberta bart",
    "XLMRobertaTokenizer": "xlm-roberta",
    "MBartTokenizer": "mbart",
    "GPT2Tokenizer": "gpt2 starcoder2",
    "Qwen2Tokenizer": "qwen2 qwen3",
    "GemmaTokenizer": "gemma gemma2 gemma3_text",
    "T5Tokenizer": "t5",
    "": "mistral olmo2 phi3",
}


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of those of a folder's files that a tokenizer and its chat templates are made of."""
    names = [*TOKENIZER_FILES]
    names += [
        f"{EXTRA_TEMPLATES}/{path.name}" for path in folder.glob(f"{EXTRA_TEMPLATES}/*.jinja")
    ]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def parse_json_file(files: dict[str, bytes], name: str) -> dict:
    """The JSON object of one of the files; {} where it is not there."""
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise Error(f"{name}: not readable as JSON ({error})") from None
    require(isinstance(content, dict), f"{name}: expected a JSON object")
    return content


def tokenizer_class(files: dict[str, bytes], hf_config: dict) -> str:
    """The class of transformers that its AutoTokenizer takes; "" where it goes by tokenizer.json alone."""
    declared = parse_json_file(files, "tokenizer_config.json").get("tokenizer_class")
    declared = str(declared or hf_config.get("tokenizer_class") or "").removesuffix("Fast")
    declared = SAME_TOKENIZERS.get(declared, declared)
    model_type = hf_config.get("model_type")
    rows = MODEL_TOKENIZERS.items()
    registered = next((name for name, types in rows if model_type in types.split()), None)
    if declared == "LlamaTokenizer" and model_type != "qwen2":
        if b'"ByteLevel"' in files.get("tokenizer.json", b""):  # Llama 3
            return ""
    if declared and registered == "":
        return ""
    if registered and (not declared or model_type == "qwen2"):
        return registered
    return declared if declared in CLASS_TOKENS else ""


def special_tokens(
    files: dict[str, bytes], hf_config: dict | None = None, padding: dict | None = None
) -> dict[str, str]:
    """Name -> text of the special tokens (bos_token, ...) that the files name or that the tokenizer's class has; null
    takes one away. `padding`: what tokenizer.json says of it."""
    named = parse_json_file(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in named:
        named = named | parse_json_file(files, "special_tokens_map.json")
    words = CLASS_TOKENS.get(tokenizer_class(files, hf_config or {}), "").split()
    tokens = {f"{name}_token": text for name, text in (word.split("=") for word in words)}
    tokens |= {name: value for name, value in named.items() if name.endswith("_token")}
    extra = named.get("extra_special_tokens")
    if isinstance(extra, dict):
        tokens |= extra
    if padding:
        tokens.setdefault("pad_token", padding["pad_token"])
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in tokens.items()
    }
    names = dict.fromkeys([*SPECIAL_TOKENS, *texts])
    return {name: texts[name] for name in names if isinstance(texts.get(name), str)}


def without_surrogates(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which UTF-8 can't encode."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


class Tokenizer:
    """A tokenizer.json, run by the `tokenizers` library.

    files: name -> content; what else a checkpoint has of a tokenizer travels along; hf_config: its config.json.
    special_tokens: name -> text, e.g. "eos_token" -> "</s>"; size: how many tokens there are.
    """

    def __init__(self, files: dict[str, bytes], hf_config: dict | None = None):
        from tokenizers import Tokenizer as Backend

        self.files = files
        self.backend = Backend.from_str(files["tokenizer.json"].decode("utf-8"))
        self.special_tokens = special_tokens(files, hf_config, self.backend.padding)
        self.backend.no_truncation()  # what the file says of both is about somebody's batches
        self.backend.no_padding()
        config = parse_json_file(files, "tokenizer_config.json")
        self.backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        self.size = self.backend.get_vocab_size()
        self.eos_token_id = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        self.pad_token_id = self.backend.token_to_id(self.special_tokens.get("pad_token", ""))

    def encode(self, text: str, pair: str | None = None, special: bool = True) -> list[int]:
        """Ids of a text or of two; `special`: with the tokens that the model wants around them."""
        return self.encoding(text, pair, special).ids

    def encoding(self, text: str, pair: str | None = None, special: bool = True):
        """The `tokenizers` library's Encoding: ids, type_ids, sequence_ids (which text; None: a special token), offsets
        in the text, special_tokens_mask."""
        pair = None if pair is None else without_surrogates(pair)
        return self.backend.encode(without_surrogates(text), pair, add_special_tokens=special)

    def batch(self, texts: list[str]):
        """Ids of texts without special tokens around them, on all processors."""
        texts = [without_surrogates(text) for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)

    def decode(self, ids, special: bool = False) -> str:
        """The text of ids; `special`: with the special tokens that are among them."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def apply_chat_template(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        **variables,
    ) -> str:
        """A conversation as the text that the checkpoint's chat template makes of it: what transformers'
        `apply_chat_template(..., tokenize=False)` returns.

        messages: {"role", "content", ...}; tools: JSON schemas; variables: what else the template reads (`documents`,
        `enable_thinking`, ...); `chat_template` names one of several or is one.
        Raises Error where there is no template, where it refuses the conversation, and where it runs away.
        """
        return render_chat(self, messages, tools, add_generation_prompt, **variables)[0]


class ByteTokenizer:
    """UTF-8 bytes are their own ids; 256 ends a text and 257 pads. Its tokenizer.json is a byte-level BPE that has no
    merges, so every other library reads it too. The methods are those of `Tokenizer`."""

    eos_token_id, pad_token_id, size = 256, 257, 258
    specials = ("<|endoftext|>", "<|pad|>")

    def __init__(self, more: dict[str, bytes] | None = None):
        self.more = more or {}  # files that travel along: a chat template

    def encode(self, text: str, pair: str | None = None, special: bool = True) -> list[int]:
        if pair is None and not any(name in text for name in self.specials):
            return list(text.encode("utf-8", errors="replace"))
        return self.encoding(text, pair, special).ids

    def batch(self, texts: list[str]):
        return map(self.encode, texts)

    def encoding(self, text: str, pair: str | None = None, special: bool = True):
        """What `Tokenizer.encoding` gives; a second text stands behind the end-of-text token."""
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
        """(id, (first character, one behind the last)) of each byte and of each special token that stands there."""
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
        """The text of ids; `special`: with the special tokens that are among them."""
        pieces = [
            bytes([i]) if i < 256 else self.specials[i - 256].encode() * special
            for i in map(int, ids)
            if i < self.size
        ]
        return b"".join(pieces).decode("utf-8", errors="replace")

    @property
    def special_tokens(self) -> dict[str, str]:
        return special_tokens(self.files)

    def apply_chat_template(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        **variables,
    ) -> str:
        return render_chat(self, messages, tools, add_generation_prompt, **variables)[0]

    @property
    def files(self) -> dict[str, bytes]:
        """File name -> content, in the format of `tokenizers`. Bytes are spelled as GPT-2 spells them."""
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


def load_tokenizer(folder: str | Path) -> Tokenizer | ByteTokenizer | None:
    """The tokenizer of a checkpoint folder as transformers' AutoTokenizer reads it, or None if it has none. Where that is
    not what tokenizer.json says alone, the tokenizer's `files` have one that says it. A byte tokenizer of ours needs no
    library."""
    folder = Path(folder)
    files = read_tokenizer_files(folder)
    if files.get("tokenizer.json") == ByteTokenizer().files["tokenizer.json"]:
        del files["tokenizer.json"]
        return ByteTokenizer(files)
    names = ("tokenizer.json", "vocab.txt", "merges.txt")
    source = next((name for name in names if name in files), None)
    if source is None or source == "merges.txt" and "vocab.json" not in files:
        for name in files:
            require(
                not name.endswith((".model", ".spm")),
                f"{folder / name}: a SentencePiece model alone, expected a tokenizer.json; where transformers can convert "
                f"it, AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) writes one",
            )
        return None
    try:
        hf_config = read_json(folder / "config.json", {})
        return Tokenizer(resolve_tokenizer(files, hf_config), hf_config)
    except ImportError:
        raise Error(f"{folder / source}: reading it needs `pip install tokenizers`") from None
    except Error as error:
        raise Error(f"{folder}: {error}") from None
    except Exception as error:  # the library raises plain Exception
        raise Error(f"{folder / source}: not a readable tokenizer ({error})") from None


def resolve_tokenizer(files: dict[str, bytes], hf_config: dict) -> dict[str, bytes]:
    """The files, with a tokenizer.json that says all that transformers' AutoTokenizer reads from them: the tokens that
    only other files name; of some classes, the flags of tokenizer_config.json in place of what tokenizer.json says."""
    from tokenizers import Tokenizer as Backend

    config = parse_json_file(files, "tokenizer_config.json")
    kind = tokenizer_class(files, hf_config)
    if "tokenizer.json" in files:
        config = {k: v for k, v in config.items() if k not in ("add_bos_token", "add_eos_token")}
    else:
        kind, files = kind_of_vocabulary(files, kind, config)
    spec = json.loads(files["tokenizer.json"])
    model, before = spec["model"], spec.get("added_tokens") or []
    model_type, pipeline = CLASS_PIPELINES.get(kind, ("", None))
    if model_type != model.get("type"):
        kind, pipeline = "", None
    tokens = special_tokens(files, hf_config, spec.get("padding"))
    added = find_added_tokens(files, tokens, before, kind)
    ids = token_ids(model["vocab"], added)
    # All but the words, as the library itself writes it.
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    backend = Backend.from_str(json.dumps(spec | {"model": empty, "added_tokens": []}))
    written = backend.to_str()
    if pipeline:
        model = model | pipeline(backend, kind, config, tokens)
        backend.post_processor = around_texts(kind, config, tokens, ids) or backend.post_processor
    same = added == {token["content"]: added_token(token) for token in before}
    # What is null, empty or false need not be there.
    same &= all((spec["model"].get(name) or None) == (model[name] or None) for name in model)
    if same and backend.to_str() == written:
        return files
    spec = json.loads(backend.to_str()) | {"model": model}
    spec["added_tokens"] = [{"id": ids[text]} | token for text, token in added.items()]
    return files | {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode("utf-8")}


def kind_of_vocabulary(files: dict[str, bytes], kind: str, config: dict) -> tuple[str, dict]:
    """(tokenizer class, files with a tokenizer.json) of a folder that has a vocabulary in other files."""
    declared = config.get("tokenizer_class")
    if "vocab.txt" in files:
        default = "BertTokenizer"
        lines = files["vocab.txt"].decode("utf-8").removesuffix("\n").split("\n")
        model = {"type": "WordPiece", "vocab": {line.rstrip(): i for i, line in enumerate(lines)}}
    else:
        default = "GPT2Tokenizer"
        lines = files["merges.txt"].decode("utf-8").split("\n")
        merges = [line.rstrip("\r") for line in lines if line.strip() and line[:8] != "#version"]
        model = {"type": "BPE", "vocab": json.loads(files["vocab.json"]), "merges": merges}
    kind = kind or ("" if declared else default)
    require(
        CLASS_PIPELINES.get(kind, (None,))[0] == model["type"],
        f"tokenizer_class = {declared or kind!r} without a tokenizer.json is not supported",
    )
    files = {"tokenizer_config.json": json.dumps({"tokenizer_class": kind}).encode()} | files
    return kind, files | {"tokenizer.json": json.dumps({"model": model}).encode()}


def added_token(value: str | dict, **flags) -> dict:
    """A token beside the vocabulary as tokenizer.json has it, but for its id: of its text, or of an object of a file."""
    given = ({"content": value} if isinstance(value, str) else value) | flags
    special = given.get("special", False)
    token = dict.fromkeys(("content", "single_word", "lstrip", "rstrip"), False)
    token |= {"normalized": not special, "special": special}
    return token | {name: given[name] for name in token if name in given}


def find_added_tokens(
    files: dict[str, bytes], tokens: dict[str, str], before: list, kind: str
) -> dict[str, dict]:
    """Text -> `added_token` of what stands beside the vocabulary, in transformers' order: what tokenizer.json has, unless
    the class makes its own (`kind`), what other files have by id, the special tokens."""
    config = parse_json_file(files, "tokenizer_config.json")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    by_id = {int(i): added_token(v) for i, v in (config.get("added_tokens_decoder") or {}).items()}
    if "added_tokens_decoder" not in config:  # older files, else ignored
        named = parse_json_file(files, "special_tokens_map.json")
        config = config | named
        extra = extra or named.get("additional_special_tokens") or []
        if isinstance(extra, list):
            extra = [*extra, *(named.get("extra_special_tokens") or [])]
        special = {*tokens.values(), *map(str, extra)}
        for text, i in parse_json_file(files, "added_tokens.json").items():
            by_id[i] = added_token(text, special=text in special)
        by_id |= {token["id"]: added_token(token) for token in before}
    if isinstance(extra, dict):  # names of their own, which are among the tokens already
        extra = []
    if kind == "T5Tokenizer" and not config.get("additional_special_tokens"):
        extra = [*extra, *(f"<extra_id_{i}>" for i in range(config.get("extra_ids", 100)))]
    found = {} if kind else {token["content"]: added_token(token) for token in before}
    found |= {by_id[i]["content"]: by_id[i] for i in sorted(by_id)}
    named = [config[n] if isinstance(config.get(n), dict) else text for n, text in tokens.items()]
    for value in filter(None, [*named, *extra]):
        token = added_token(value, special=True)
        found.setdefault(token["content"], token)
    special = {*tokens.values(), *(token["content"] for token in before if token["special"])}
    for text, token in found.items():
        token["special"] |= text in special
    return found


def token_ids(vocabulary: dict | list, added: dict) -> dict[str, int]:
    """Token -> id, where the library numbers what is added."""
    if isinstance(vocabulary, list):
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    ids, free = dict(vocabulary), len(vocabulary)
    for text in added:
        free = max(free, ids.setdefault(text, free) + 1)
    return ids


# Classes of transformers go by tokenizer_config.json where tokenizer.json says otherwise. Their pipelines (the library's
# tokenizer, class, config, special tokens) set what stands before and behind the model and return what they change of it.
BPE_OPTIONS = {  # of a plain one
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bert_pipeline(backend, kind, config, tokens) -> dict:
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    model = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return model | {"unk_token": tokens["unk_token"]}


def byte_level_pipeline(backend, kind, config, tokens) -> dict:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    qwen = kind == "Qwen2Tokenizer"
    prefix = bool(config.get("add_prefix_space"))
    words = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not qwen)
    if qwen:
        split = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
        words = pre_tokenizers.Sequence([split, words])
    backend.normalizer = normalizers.NFC() if qwen else None
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    return BPE_OPTIONS


def sentencepiece_pipeline(backend, kind, config, tokens) -> dict:
    from tokenizers import decoders, normalizers, pre_tokenizers

    gemma = kind == "GemmaTokenizer"
    prefix = not gemma and config.get("add_prefix_space") in (None, True)
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    words = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1))
    if gemma:
        words = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.normalizer = normalizers.Replace(" ", "▁") if gemma else None
    backend.pre_tokenizer = words
    backend.decoder = decoders.Sequence(steps)
    unknown = tokens.get("unk_token") if gemma else None
    return BPE_OPTIONS | {"fuse_unk": True, "byte_fallback": True, "unk_token": unknown}


def unigram_pipeline(backend, kind, config, tokens) -> dict:
    """A normalizer that comes from SentencePiece stays."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    parts = backend.normalizer
    parts = parts if isinstance(parts, normalizers.Sequence) else [parts]
    charsmaps = [part for part in parts if isinstance(part, normalizers.Precompiled)]
    t5 = kind == "T5Tokenizer"
    scheme = "always" if t5 or config.get("add_prefix_space", True) else "never"
    words = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.normalizer = next(iter(charsmaps), None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return {"byte_fallback": False, "unk_id": 2 if t5 else 3}


CLASS_PIPELINES = {  # class -> (type of its model in tokenizer.json, its pipeline)
    "BertTokenizer": ("WordPiece", bert_pipeline),
    "RobertaTokenizer": ("BPE", byte_level_pipeline),
    "GPT2Tokenizer": ("BPE", byte_level_pipeline),
    "Qwen2Tokenizer": ("BPE", byte_level_pipeline),
    "LlamaTokenizer": ("BPE", sentencepiece_pipeline),
    "GemmaTokenizer": ("BPE", sentencepiece_pipeline),
    "XLMRobertaTokenizer": ("Unigram", unigram_pipeline),
    "T5Tokenizer": ("Unigram", unigram_pipeline),
}


def around_texts(kind: str, config: dict, tokens: dict[str, str], ids: dict[str, int]):
    """The post-processor that puts a class's special tokens around texts; None: tokenizer.json's. ids: text -> id."""
    from tokenizers import processors

    bos, eos, cls, sep = (tokens.get(f"{name}_token") for name in ("bos", "eos", "cls", "sep"))
    start = [bos] if bos and config.get("add_bos_token") else []
    end = [eos] if eos and config.get("add_eos_token") else []
    if kind == "RobertaTokenizer":
        trim, prefix = config.get("trim_offsets", True), bool(config.get("add_prefix_space"))
        return processors.RobertaProcessing((sep, ids[sep]), (cls, ids[cls]), trim, prefix)
    if kind == "BertTokenizer":
        pair = [cls, "$A", sep, "$B:1", f"{sep}:1"]
    elif kind == "XLMRobertaTokenizer":
        pair = [bos, "$A", eos, eos, "$B", eos]
    elif kind == "T5Tokenizer":
        pair = ["$A", eos, "$B", eos]
    elif start or end:
        pair = [*start, "$A", *end, *(f"{piece}:1" for piece in (*start, "$B", *end))]
    else:
        return None
    single = pair[: (len(pair) + 1) // 2]  # a text alone has what stands around the first
    special = [(text, ids[text]) for text in (bos, eos, cls, sep) if text in single]
    return processors.TemplateProcessing(single, pair, special)


# Chat templates are programs that come with a checkpoint. They run in jinja2's sandbox, and there in bounds.
MAX_TEMPLATE_SECONDS = 2
MAX_TEMPLATE_VALUE = 2**22  # characters or items of one value
MAX_TEMPLATE_BITS = 2**12  # of one number
template_time = threading.local()  # .end: when the template that this thread renders has to be done


def render_chat(
    tokenizer,
    messages: list[dict],
    tools: list[dict] | None = None,
    add_generation_prompt: bool = False,
    chat_template: str | None = None,
    **variables,
) -> tuple[str, list[tuple[int, int]]]:
    """(text, the parts of it from which character to which that stood in {% generation %})."""
    unsupported = {"tokenize", "continue_final_message", "return_dict", "return_tensors"}
    for name in unsupported & set(variables):
        require(not variables[name], f"apply_chat_template: {name} is not supported")
    require(messages, "messages: expected at least one")
    for message in messages:
        require(isinstance(message, dict), f"messages: {str(message)[:60]!r}, expected a dict")
    for tool in tools or ():
        require(isinstance(tool, dict), f"tools: {str(tool)[:60]!r}, expected a JSON schema")
    template = find_chat_template(tokenizer.files, chat_template, tools)
    names = tokenizer.special_tokens | {"documents": None} | variables
    names |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    names = plain_data(names)
    names["messages"] = [template_message(message) for message in names["messages"]]
    limit = 2**20 + 8 * len(str(names))
    template_time.end = time.monotonic() + MAX_TEMPLATE_SECONDS
    pieces, size, generated = [], 0, []
    try:
        require(
            isinstance(template, str) and len(template) <= limit,
            f"expected a text of at most {limit} characters",
        )
        for piece in compile_template(template).generate(names):
            if isinstance(piece, GeneratedText):
                generated.append((size, size + len(piece)))
            pieces.append(piece)
            size += len(piece)
            require(size <= limit, f"it writes more than {limit} characters")
            require(time.monotonic() < template_time.end, "it takes too long")
    except ImportError:
        raise Error("chat templates need `pip install 'jinja2>=3.1.6'`") from None
    except Exception as error:  # whatever a template's code raises
        reason = " ".join(str(error).split())[:500]
        raise Error(
            f"chat: the checkpoint's chat template failed ({type(error).__name__}: {reason})"
        ) from None
    return "".join(pieces), generated


def find_chat_template(
    files: dict[str, bytes], chosen: str | None = None, tools: list[dict] | None = None
):
    """The template to use of those in the files, as transformers chooses: the one named `chosen` (else it is a template
    itself), tool_use where there are tools, default."""
    templates = parse_json_file(files, "tokenizer_config.json").get("chat_template")
    if isinstance(templates, list):
        pairs = [entry for entry in templates if isinstance(entry, dict) and "name" in entry]
        templates = {entry["name"]: entry.get("template") for entry in pairs}
    found = {
        Path(name).stem: content
        for name, content in files.items()
        if name.startswith(EXTRA_TEMPLATES)
    }
    if "chat_template.jinja" in files:
        found["default"] = files["chat_template.jinja"]
    if found:
        templates = {name: text.decode("utf-8", errors="replace") for name, text in found.items()}
        if [*found] == ["default"]:
            templates = templates["default"]  # the only one has no name
    if not isinstance(templates, dict):
        require(
            templates or chosen,
            "chat: the checkpoint has no chat_template in tokenizer_config.json and no chat_template.jinja",
        )
        return templates if chosen is None else chosen
    if chosen is not None:
        return templates.get(chosen, chosen)
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    require(
        templates.get("default"),
        f"chat: the checkpoint has chat templates named {', '.join(map(str, templates))}, but no default",
    )
    return templates["default"]


def plain_data(value):
    """Copies of what a template may see: JSON's types, whose methods the sandbox knows; of all else its name."""
    if isinstance(value, dict):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain_data(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if hasattr(value, "item") and not getattr(value, "shape", None):
        value = value.item()  # a number of numpy's
    for kind in (bool, str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else f"<{type(value).__name__}>"


def template_message(message: dict) -> dict:
    """A message as transformers hands it on: without what is null, and with thoughts under the names that are read."""
    message = {name: value for name, value in message.items() if value is not None}
    names = [name for name in ("reasoning_content", "thinking", "reasoning") if name in message]
    if names:
        thoughts = message[names[0]]
        message = {"thinking": thoughts} | message | {"reasoning_content": thoughts}
    return message


@functools.lru_cache(maxsize=16)
def compile_template(template: str):
    return template_environment().from_string(template)


class GeneratedText(str):
    """What {% generation %} writes."""


@functools.lru_cache(maxsize=1)
def template_environment():
    """transformers' environment for chat templates; more than its sandbox, each loop, call, filter and operator looks
    whether there is time left and whether its value would be very large."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < (3, 1, 6):  # there are ways out of the sandbox of older ones
        raise ImportError(jinja2.__version__)

    def check(value, *arguments):
        """The value, if it is not too large and if what is called with the arguments will not make it so."""
        if time.monotonic() > template_time.end:
            raise TimeoutError(f"it takes more than {MAX_TEMPLATE_SECONDS} seconds")
        lengths = [len(x) for x in (value, *arguments) if isinstance(x, (str, list, tuple, dict))]
        numbers = [abs(x) for x in arguments if isinstance(x, int)]
        longest = sorted(lengths)[-2:]
        if max(lengths + numbers, default=0) > MAX_TEMPLATE_VALUE or math.prod(longest) > 2**30:
            raise SecurityError("a value is too large")
        return value

    def check_format(text: str):
        """Widths in a format make long texts of short ones."""
        if re.search(r"\d{7}|\*", text):
            raise SecurityError("a width in a format")

    def each(iterable):
        for item in iterable:
            yield check(item)

    def bounded(function):
        @functools.wraps(function)  # keeps what jinja2 notes on it
        def call(*arguments, **options):
            check(None, *arguments, *options.values())
            return check(function(*arguments, **options))

        return call

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("write"), [], [], body).set_lineno(line)

        def write(self, caller):
            return GeneratedText(caller())

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def _parse(self, *source):
            tree = super()._parse(*source)
            for node in [*tree.find_all((nodes.For, nodes.Concat))]:
                if isinstance(node, nodes.For):
                    node.iter = nodes.Filter(node.iter, "each", [], [], None, None)
                else:
                    joined = nodes.Concat(node.nodes)
                    node.nodes = [nodes.Filter(joined, "check", [], [], None, None)]
            return tree.set_environment(self)

        def call(self, context, function, *arguments, **options):
            target = getattr(function, "__self__", None)
            if isinstance(target, str) and function.__name__ in ("format", "format_map"):
                check_format(target)
            check(target, *arguments, *options.values())
            return check(super().call(context, function, *arguments, **options))

        def call_binop(self, context, operator, left, right):
            if operator == "%" and isinstance(left, str):
                check_format(left)
            elif isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length()
                if (
                    bits * right if operator == "**" else bits + right.bit_length()
                ) > MAX_TEMPLATE_BITS:
                    raise SecurityError("a number is too large")
            elif operator == "*":
                times, items = (left, right) if isinstance(left, int) else (right, left)
                if (
                    isinstance(items, (str, list, tuple))
                    and times * len(items) > MAX_TEMPLATE_VALUE
                ):
                    raise SecurityError("a value is too large")
            return check(super().call_binop(context, operator, left, right))

    class Namespace(jinja2.utils.Namespace):
        def __init__(*arguments, **options):
            self, *arguments = arguments  # so that `self` can be an option
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*arguments, **options).items():
                self[name] = value

        def __setitem__(self, name, value):
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace takes no name like {name!r}")
            super().__setitem__(name, value)

    class Dict:
        __call__ = staticmethod(dict)
        fromkeys = staticmethod(dict.fromkeys)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(format):
        return datetime.datetime.now().strftime(format)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.filters = {name: bounded(f) for name, f in environment.filters.items()}
    environment.filters |= {"each": each, "check": check}
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# Families: rows of data. How a config.json reads as a Config, and which tensors are ours under which names.
# ---------------------------------------------------------------------------------------------------------------------
class Name(str):
    """Of a module or a tensor in a family's checkpoints; how ours reads from it, and is written to it."""

    read = write = staticmethod(lambda x: x)


class Transposed(Name):
    """Of a module whose weight is stored (in, out), as GPT-2's Conv1D does."""

    read = write = staticmethod(lambda x: x.t() if x.ndim == 2 else x)


class Row(Name):
    """Of a vector that is stored (1, n), or not at all where it is zero."""

    read, write = staticmethod(lambda x: x[0]), staticmethod(lambda x: x[None])


class Unused(Name):
    """Of a module that only travels along, and is zero where it is not stored."""


def name_map(*texts: str) -> dict[str, str]:
    """Our names -> theirs, of words `ours=theirs`, or of one word where both are the same. The last one counts."""
    words = (word.partition("=") for text in texts for word in text.split())
    return {ours: theirs if sign else ours for ours, sign, theirs in words}


def tensor_map(prefix: str, layer: str, *texts: str, inside: type = Name) -> dict:
    """Our modules -> a tuple of theirs, fused along the rows in ours, of words `ours=theirs+theirs`.

    Theirs stand behind the prefix, and those of a layer behind `layer` too, with {} for its number.
    """
    table = {}
    for ours, theirs in name_map(*texts).items():
        kind, place = Name, prefix
        if ours.startswith("layers."):
            ours, kind, place = ours.replace("layers", "layers.{}", 1), inside, prefix + layer
        table[ours] = tuple(kind(place + name) for name in theirs.split("+") if name)
    return table


CLASS = {  # head -> end of its class's name
    "lm": "ForCausalLM",
    "mlm": "ForMaskedLM",
    "classify": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "qa": "ForQuestionAnswering",
    None: "Model",
}


def head_row(*texts: str, kind: type = Name, **config_fields) -> tuple[dict, dict]:
    """A head's tensors, of words `ours=theirs`, and the config fields that it has."""
    return {ours: (kind(theirs),) for ours, theirs in name_map(*texts).items()}, config_fields


LM_ONLY = {"lm": head_row("head.out=lm_head")}
DECODER_HEADS = LM_ONLY | {"classify": head_row("head.out=score"), None: head_row()}


def nothing(_) -> dict:
    """What most families read, and write, beside their table of fields."""
    return {}


@dataclass(frozen=True)
class Family:
    """One `model_type`. Tables are read one way to load and the other way to save."""

    stem: str  # of its classes' names
    tensors: dict  # as from tensor_map
    fields: dict  # our config field -> their key
    heads: dict = field(default_factory=lambda: DECODER_HEADS)  # as from head_row
    prefix: str = "model."  # of the body's tensors, where there is a head
    fixed: dict = field(default_factory=dict)  # our config fields which the family always has
    defaults: dict = field(default_factory=dict)  # their key -> what transformers takes without it
    only: dict = field(default_factory=dict)  # their key -> the one value that is supported
    read: Callable[[dict], dict] = (
        nothing  # a config.json with defaults -> more of our config fields
    )
    write: Callable[[Config], dict] = nothing  # and back
    drop: str = (
        "model.layers.*.self_attn.rotary_emb.inv_freq"  # patterns of tensors that carry nothing
    )
    copies: dict = field(default_factory=dict)  # a tensor -> the one that it repeats, if stored
    aliases: dict = field(default_factory=dict)  # a second name of a key -> the key
    unstored_head_is_tied: bool = False  # whatever config.json says of it
    classes: dict = field(default_factory=dict)  # head -> end of its class's name, if not CLASS's

    def architecture(self, head) -> str:
        return self.stem + (CLASS | self.classes)[head]

    def head_of(self, architecture: str | None):
        """The head of a class of transformers. One we do not know counts as the language model, where there is one."""
        for head in self.heads:
            if self.architecture(head) == architecture:
                return head
        known = ", ".join(map(self.architecture, self.heads))
        require(
            architecture is None or "lm" in self.heads,
            f"config: architectures = {architecture!r} is not supported (supported: {known}); "
            "name a head to open its body",
        )
        return "lm" if "lm" in self.heads else None


# ---- Decoders ----
FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings hidden_act
    tie_word_embeddings attention_dropout bos_token_id eos_token_id pad_token_id problem_type """
ROTARY = FIELDS + "num_key_value_heads head_dim rope_theta rope_scaling norm_eps=rms_norm_eps "
BIASES = "attention_bias attention_output_bias=attention_bias "
LLAMA = """
    embed=embed_tokens
    norm=norm
    layers.attention_norm=input_layernorm
    layers.attention.qkv=self_attn.q_proj+self_attn.k_proj+self_attn.v_proj
    layers.attention.q_norm=self_attn.q_norm
    layers.attention.k_norm=self_attn.k_norm
    layers.attention.o=self_attn.o_proj
    layers.mlp_norm=post_attention_layernorm
    layers.mlp.gate_up=mlp.gate_proj+mlp.up_proj
    layers.mlp.down=mlp.down_proj
"""
SANDWICH = """
    layers.attention_output_norm=post_attention_layernorm
    layers.mlp_output_norm=post_feedforward_layernorm
"""
GPT2 = """
    embed=wte
    position_embed=wpe
    norm=ln_f
    layers.attention_norm=ln_1
    layers.attention.qkv=attn.c_attn
    layers.attention.o=attn.c_proj
    layers.mlp_norm=ln_2
    layers.mlp.up=mlp.c_fc
    layers.mlp.down=mlp.c_proj
"""
LLAMA_DEFAULTS = dict(tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
QWEN_DEFAULTS = dict(
    tie_word_embeddings=False,
    max_position_embeddings=32768,
    sliding_window=4096,
    use_sliding_window=False,
    max_window_layers=28,
    num_key_value_heads=32,
)
GEMMA_DEFAULTS = dict(head_dim=256, pad_token_id=0, eos_token_id=1, bos_token_id=2)
GEMMA_FIXED = dict(norm_offset=1.0, scale_embedding=True)


def llama_like(*changes: str) -> dict:
    """Llama's tensors, but for some."""
    return tensor_map("model.", "layers.{}.", LLAMA, *changes)


def read_gemma(raw: dict) -> dict:
    """The first files say "gelu" and mean its approximation."""
    return {"hidden_act": "gelu_pytorch_tanh"} if raw["hidden_act"] == "gelu" else {}


def gemma(stem: str, fields: str, defaults: dict, **rest) -> Family:
    """Gemma 2 and later."""
    usual = dict(
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        sliding_window=4096,
        num_key_value_heads=4,
    )
    common = "hidden_act=hidden_activation sliding_window layer_types query_pre_attn_scalar final_logit_softcapping"
    return Family(
        stem,
        llama_like("layers.mlp_norm=pre_feedforward_layernorm", SANDWICH),
        name_map(ROTARY, BIASES, common, fields),
        defaults=GEMMA_DEFAULTS | usual | defaults,
        only=dict(hidden_act="gelu_pytorch_tanh"),
        **rest,
    )


FAMILIES = {
    "qwen3": Family(
        "Qwen3",
        llama_like(),
        name_map(ROTARY, BIASES, "sliding_window layer_types"),
        fixed=dict(qk_norm="head"),
        defaults=QWEN_DEFAULTS | dict(head_dim=128),
    ),
    "llama": Family(
        "Llama",
        llama_like(),
        name_map(ROTARY, BIASES, "mlp_bias"),
        defaults=LLAMA_DEFAULTS | dict(max_position_embeddings=2048),
    ),
    "mistral": Family(
        "Mistral",
        llama_like(),
        name_map(ROTARY, "sliding_window"),
        defaults=LLAMA_DEFAULTS
        | dict(max_position_embeddings=131072, sliding_window=4096, num_key_value_heads=8),
    ),
    "qwen2": Family(
        "Qwen2",
        llama_like(),
        name_map(ROTARY, "sliding_window layer_types"),
        fixed=dict(attention_bias=True, attention_output_bias=False),
        defaults=QWEN_DEFAULTS,
    ),
    "gemma": Family(
        "Gemma",
        llama_like(),
        name_map(ROTARY, BIASES),
        fixed=GEMMA_FIXED,
        defaults=GEMMA_DEFAULTS
        | dict(
            hidden_act="gelu_pytorch_tanh", max_position_embeddings=8192, num_key_value_heads=16
        ),
        only=dict(hidden_activation="gelu_pytorch_tanh"),
        read=read_gemma,
    ),
    "gemma2": gemma(
        "Gemma2",
        "attn_logit_softcapping",
        fixed=GEMMA_FIXED | dict(norm_position="sandwich"),
        defaults=dict(
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            max_position_embeddings=8192,
            sliding_window_pattern=2,
        ),
    ),
    "gemma3_text": gemma(
        "Gemma3",
        "rope_local_base_freq",
        fixed=GEMMA_FIXED | dict(norm_position="sandwich", qk_norm="head"),
        heads=LM_ONLY,
        defaults=dict(
            max_position_embeddings=131072,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            sliding_window_pattern=6,
        ),
    ),
    "gpt2": Family(
        "GPT2",
        tensor_map("transformer.", "h.{}.", GPT2, inside=Transposed),
        name_map(
            FIELDS,
            """hidden_size=n_embd num_hidden_layers=n_layer num_attention_heads=n_head intermediate_size=n_inner
            norm_eps=layer_norm_epsilon max_position_embeddings=n_positions hidden_act=activation_function
            attention_dropout=attn_pdrop hidden_dropout=resid_pdrop embedding_dropout=embd_pdrop""",
        ),
        prefix="transformer.",
        aliases=name_map(
            """hidden_size=n_embd max_position_embeddings=n_positions num_attention_heads=n_head
            num_hidden_layers=n_layer"""
        ),
        classes={"lm": "LMHeadModel"},
        fixed=dict(
            norm="layer", position="learned", gated=False, attention_bias=True, mlp_bias=True
        ),
        defaults=dict(
            n_positions=1024,
            layer_norm_epsilon=1e-5,
            activation_function="gelu_new",
            attn_pdrop=0.1,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            bos_token_id=50256,
            eos_token_id=50256,
        ),
        only=dict(scale_attn_weights=True),
        drop="transformer.h.*.attn.bias transformer.h.*.attn.masked_bias",
    ),
    "phi3": Family(
        "Phi3",
        llama_like("layers.attention.qkv=self_attn.qkv_proj layers.mlp.gate_up=mlp.gate_up_proj"),
        name_map(
            ROTARY,
            """sliding_window partial_rotary_factor hidden_dropout=resid_pdrop
            embedding_dropout=embd_pdrop""",
        ),
        defaults=LLAMA_DEFAULTS
        | dict(
            rms_norm_eps=1e-5, max_position_embeddings=4096, eos_token_id=32000, pad_token_id=32000
        ),
        only=dict(rope_scaling=None),
    ),
    "olmo2": Family(
        "Olmo2",
        llama_like("layers.attention_norm= layers.mlp_norm=", SANDWICH),
        name_map(ROTARY, BIASES),
        LM_ONLY,
        fixed=dict(norm_position="output", qk_norm="full"),
        defaults=dict(
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            max_position_embeddings=2048,
            eos_token_id=50279,
            pad_token_id=1,
        ),
    ),
    "starcoder2": Family(
        "Starcoder2",
        llama_like("layers.mlp.up=mlp.c_fc layers.mlp.down=mlp.c_proj"),
        name_map(
            ROTARY,
            """sliding_window norm_eps=norm_epsilon attention_bias=use_bias attention_output_bias=use_bias
            mlp_bias=use_bias hidden_dropout=residual_dropout embedding_dropout""",
        ),
        fixed=dict(norm="layer", gated=False),
        defaults=dict(
            use_bias=True,
            norm_epsilon=1e-5,
            hidden_act="gelu_pytorch_tanh",
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=50256,
            eos_token_id=50256,
        ),
        only=dict(
            activation_function="gelu",
            layer_norm_epsilon=1e-5,
            mlp_type="default",
            norm_type="layer_norm",
            scale_attn_weights=True,
        ),
    ),
}

# ---- Encoders: one body and five heads, under the names of each family ----
ENCODER = dict(
    causal=False,
    norm="layer",
    norm_position="post",
    final_norm=False,
    embedding_norm=True,
    position="learned",
    gated=False,
    attention_bias=True,
    mlp_bias=True,
)
EMBEDDINGS = """
    embed=embeddings.word_embeddings
    position_embed=embeddings.position_embeddings
    type_embed=embeddings.token_type_embeddings
    embedding_norm=embeddings.LayerNorm
    embedding_project=embeddings_project
"""
BERT = """
    layers.attention.qkv=attention.self.query+attention.self.key+attention.self.value
    layers.attention.o=attention.output.dense
    layers.attention_norm=attention.output.LayerNorm
    layers.mlp.up=intermediate.dense
    layers.mlp.down=output.dense
    layers.mlp_norm=output.LayerNorm
"""
DISTILBERT = """
    layers.attention.qkv=attention.q_lin+attention.k_lin+attention.v_lin
    layers.attention.o=attention.out_lin
    layers.attention_norm=sa_layer_norm
    layers.mlp.up=ffn.lin1
    layers.mlp.down=ffn.lin2
    layers.mlp_norm=output_layer_norm
"""
BERT_FIELDS = name_map(
    FIELDS,
    """type_vocab_size norm_eps=layer_norm_eps attention_dropout=attention_probs_dropout_prob
    hidden_dropout=hidden_dropout_prob embedding_dropout=hidden_dropout_prob head_dropout=classifier_dropout""",
)
BERT_DEFAULTS = dict(
    hidden_act="gelu",
    max_position_embeddings=512,
    type_vocab_size=2,
    pad_token_id=0,
    layer_norm_eps=1e-12,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)
TIED = dict(tie_word_embeddings=True)
ABSOLUTE = dict(position_embedding_type="absolute")
SAME = "hidden_act"  # the activation of a head that has the layers' own


def encoder_heads(mlm: tuple, classify: tuple, bare: tuple = ({}, {})) -> dict:
    heads = {
        "mlm": mlm,
        "classify": classify,
        "tokens": head_row("head.out=classifier"),
        "qa": head_row("head.out=qa_outputs"),
    }
    biased = {head: (rows, fields | {"head_bias": True}) for head, (rows, fields) in heads.items()}
    return {None: bare} | biased


def read_roberta(raw: dict) -> dict:
    """Its table of positions begins with unused rows, up to that of the pad id."""
    offset = raw["pad_token_id"] + 1
    positions = raw["max_position_embeddings"] - offset
    return dict(position_offset=offset, max_position_embeddings=positions)


def write_roberta(config: Config) -> dict:
    return {"max_position_embeddings": config.max_position_embeddings + config.position_offset}


def roberta(stem: str) -> Family:
    return Family(
        stem,
        tensor_map("roberta.", "encoder.layer.{}.", EMBEDDINGS, BERT),
        BERT_FIELDS,
        encoder_heads(
            head_row(
                """head.dense=lm_head.dense head.norm=lm_head.layer_norm head.out=lm_head.decoder
                head.out.bias=lm_head.bias""",
                head_act="gelu",
                head_norm=True,
            ),
            head_row("head.dense=classifier.dense head.out=classifier.out_proj", head_act="tanh"),
            head_row("head.dense=roberta.pooler.dense", kind=Unused, head_act="tanh"),
        ),
        "roberta.",
        fixed=ENCODER,
        defaults=BERT_DEFAULTS | dict(pad_token_id=1, bos_token_id=0, eos_token_id=2),
        only=TIED | ABSOLUTE,
        read=read_roberta,
        write=write_roberta,
        copies={"lm_head.decoder.bias": "lm_head.bias"},
        drop="roberta.embeddings.position_ids",
    )


FAMILIES |= {
    "bert": Family(
        "Bert",
        tensor_map("bert.", "encoder.layer.{}.", EMBEDDINGS, BERT),
        BERT_FIELDS,
        encoder_heads(
            head_row(
                """head.dense=cls.predictions.transform.dense head.norm=cls.predictions.transform.LayerNorm
                head.out=cls.predictions.decoder head.out.bias=cls.predictions.bias""",
                head_act=SAME,
                head_norm=True,
            ),
            head_row("head.dense=bert.pooler.dense head.out=classifier", head_act="tanh"),
            head_row("head.dense=bert.pooler.dense", kind=Unused, head_act="tanh"),
        ),
        "bert.",
        fixed=ENCODER,
        defaults=BERT_DEFAULTS,
        only=TIED | ABSOLUTE,
        copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        drop="bert.embeddings.position_ids cls.seq_relationship.*",
    ),
    "roberta": roberta("Roberta"),
    "xlm-roberta": roberta("XLMRoberta"),
    "distilbert": Family(
        "DistilBert",
        tensor_map("distilbert.", "transformer.layer.{}.", EMBEDDINGS, DISTILBERT),
        name_map(
            FIELDS,
            """hidden_size=dim num_hidden_layers=n_layers num_attention_heads=n_heads intermediate_size=hidden_dim
            hidden_act=activation hidden_dropout=dropout embedding_dropout=dropout head_dropout=seq_classif_dropout""",
        ),
        encoder_heads(
            head_row(
                "head.dense=vocab_transform head.norm=vocab_layer_norm head.out=vocab_projector",
                head_act=SAME,
                head_norm=True,
            ),
            head_row("head.dense=pre_classifier head.out=classifier", head_act="relu"),
        ),
        "distilbert.",
        aliases=name_map("hidden_size=dim num_attention_heads=n_heads num_hidden_layers=n_layers"),
        fixed=ENCODER | dict(norm_eps=1e-12),
        defaults=dict(
            activation="gelu",
            max_position_embeddings=512,
            pad_token_id=0,
            dropout=0.1,
            attention_dropout=0.1,
            seq_classif_dropout=0.2,
        ),
        only=ABSOLUTE,
        drop="distilbert.embeddings.position_ids",
    ),
    "electra": Family(
        "Electra",
        tensor_map("electra.", "encoder.layer.{}.", EMBEDDINGS, BERT),
        BERT_FIELDS | name_map("embedding_size"),
        encoder_heads(
            head_row(
                """head.dense=generator_predictions.dense head.norm=generator_predictions.LayerNorm
                head.out=generator_lm_head""",
                head_act="gelu",
                head_norm=True,
            ),
            head_row("head.dense=classifier.dense head.out=classifier.out_proj", head_act="gelu"),
        ),
        "electra.",
        fixed=ENCODER,
        defaults=BERT_DEFAULTS | dict(embedding_size=128),
        only=ABSOLUTE,
        drop="electra.embeddings.position_ids discriminator_predictions.*",
    ),
}

# ---- Encoder-decoders ----
BART = """
    position_embed=embed_positions
    embedding_norm=layernorm_embedding
    norm=layer_norm
    layers.attention.qkv=self_attn.q_proj+self_attn.k_proj+self_attn.v_proj
    layers.attention.o=self_attn.out_proj
    layers.attention_norm=self_attn_layer_norm
    layers.cross_attention.q=encoder_attn.q_proj
    layers.cross_attention.kv=encoder_attn.k_proj+encoder_attn.v_proj
    layers.cross_attention.o=encoder_attn.out_proj
    layers.cross_attention_norm=encoder_attn_layer_norm
    layers.mlp.up=fc1
    layers.mlp.down=fc2
    layers.mlp_norm=final_layer_norm
"""
T5 = """
    relative_bias=block.0.layer.0.SelfAttention.relative_attention_bias
    norm=final_layer_norm
    layers.attention.qkv=0.SelfAttention.q+0.SelfAttention.k+0.SelfAttention.v
    layers.attention.o=0.SelfAttention.o
    layers.attention_norm=0.layer_norm
    layers.cross_attention.q=1.EncDecAttention.q
    layers.cross_attention.kv=1.EncDecAttention.k+1.EncDecAttention.v
    layers.cross_attention.o=1.EncDecAttention.o
    layers.cross_attention_norm=1.layer_norm
    layers.mlp.up=MLP.DenseReluDense.wi
    layers.mlp.gate_up=MLP.DenseReluDense.wi_0+MLP.DenseReluDense.wi_1
    layers.mlp.down=MLP.DenseReluDense.wo
    layers.mlp_norm=MLP.layer_norm
"""
T5_ACTIVATIONS = {  # feed_forward_proj -> gated, hidden_act
    **{name: (False, name) for name in ACTIVATIONS},
    **{f"gated-{name}": (True, name) for name in ACTIVATIONS},
    "gated-gelu": (True, "gelu_new"),
}


def two_stacks(embed: str, encoder: dict, decoder: dict) -> dict:
    encoder = {f"encoder.{ours}": theirs for ours, theirs in encoder.items()}
    return {"embed": (Name(embed),)} | encoder | decoder


def read_t5(raw: dict) -> dict:
    """Its activation says whether the MLP is gated; the logits are scaled unless it says that they are not tied."""
    name = raw["feed_forward_proj"]
    require(
        name in T5_ACTIVATIONS,
        f"feed_forward_proj = {name!r}, expected one of {', '.join(T5_ACTIVATIONS)}",
    )
    gated, act = T5_ACTIVATIONS[name]
    for key, value in (("is_gated_act", gated), ("dense_act_fn", act)):
        require(raw[key] in (None, value), f"{key} = {raw[key]!r}, expected {value} with {name}")
    scaled = raw.get("tie_word_embeddings") is not False
    if raw["scale_decoder_outputs"] is not None:
        scaled = raw["scale_decoder_outputs"]
    layers = raw["num_decoder_layers"]
    return dict(
        gated=gated,
        hidden_act=act,
        scale_logits=scaled,
        num_hidden_layers=raw.get("num_layers") if layers is None else layers,
    )


def write_t5(config: Config) -> dict:
    wanted = config.gated, config.hidden_act
    names = [name for name, meaning in T5_ACTIVATIONS.items() if meaning == wanted]
    return {"feed_forward_proj": names[0] if names else config.hidden_act}


def read_marian(raw: dict) -> dict:
    size, expected = raw["decoder_vocab_size"], raw.get("vocab_size")
    require(size in (None, expected), f"decoder_vocab_size = {size!r}, expected {expected}")
    return {}


def bart_like(stem: str, end="ForConditionalGeneration", **rest) -> Family:
    stacks = (tensor_map(f"model.{side}.", "layers.{}.", BART) for side in ("encoder", "decoder"))
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    head = {"head.out": (Name("lm_head"),), "head.out.bias": (Row("final_logits_bias"),)}
    return Family(
        stem,
        two_stacks("model.shared", *stacks),
        name_map(
            FIELDS,
            """scale_embedding decoder_start_token_id hidden_size=d_model hidden_act=activation_function
            num_hidden_layers=decoder_layers num_encoder_layers=encoder_layers
            num_attention_heads=decoder_attention_heads encoder_attention_heads
            intermediate_size=decoder_ffn_dim encoder_intermediate_size=encoder_ffn_dim
            hidden_dropout=dropout embedding_dropout=dropout""",
        ),
        {"lm": (head, {})},
        copies=dict.fromkeys(copies, "model.shared.weight"),
        aliases=name_map(
            """hidden_size=d_model num_attention_heads=encoder_attention_heads
            num_hidden_layers=encoder_layers"""
        ),
        classes={"lm": end},
        **rest,
    )


SEQ2SEQ = ENCODER | dict(causal=True, norm_eps=1e-5, head_bias=True, position_offset=2)
BART_DEFAULTS = dict(
    activation_function="gelu",
    dropout=0.1,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    forced_eos_token_id=2,
)
FAMILIES |= {
    "bart": bart_like(
        "Bart",
        fixed=SEQ2SEQ,
        defaults=BART_DEFAULTS | dict(decoder_start_token_id=2),
        only=dict(normalize_embedding=True),
    ),
    "mbart": bart_like(
        "MBart",
        fixed=SEQ2SEQ | dict(norm_position="pre", final_norm=True),
        defaults=BART_DEFAULTS,
        only=dict(normalize_embedding=True, normalize_before=True, add_final_layer_norm=True),
    ),
    "marian": bart_like(
        "Marian",
        "MTModel",
        fixed=SEQ2SEQ | dict(position="sinusoidal", embedding_norm=False, position_offset=0),
        defaults=BART_DEFAULTS
        | dict(
            pad_token_id=58100,
            decoder_start_token_id=58100,
            eos_token_id=0,
            forced_eos_token_id=0,
            bos_token_id=None,
            decoder_vocab_size=None,
        ),
        only=dict(share_encoder_decoder_embeddings=True, static_position_embeddings=True),
        read=read_marian,
        drop="model.encoder.embed_positions.weight model.decoder.embed_positions.weight",
    ),
    "t5": Family(
        "T5",
        two_stacks(
            "shared",
            tensor_map("encoder.", "block.{}.layer.", T5.replace("MLP", "1")),
            tensor_map("decoder.", "block.{}.layer.", T5.replace("MLP", "2")),
        ),
        name_map(
            FIELDS,
            """decoder_start_token_id relative_attention_num_buckets relative_attention_max_distance hidden_size=d_model
            head_dim=d_kv intermediate_size=d_ff num_encoder_layers=num_layers num_hidden_layers=num_decoder_layers
            num_attention_heads=num_heads norm_eps=layer_norm_epsilon head_dropout=dropout_rate
            hidden_dropout=dropout_rate embedding_dropout=dropout_rate attention_dropout=dropout_rate
            scale_logits=scale_decoder_outputs hidden_act=feed_forward_proj""",
        ),
        LM_ONLY,
        "",
        fixed=dict(position="relative", query_pre_attn_scalar=1),
        defaults=dict(
            num_decoder_layers=None,
            d_kv=64,
            feed_forward_proj="relu",
            is_gated_act=None,
            dense_act_fn=None,
            dropout_rate=0.1,
            pad_token_id=0,
            eos_token_id=1,
            scale_decoder_outputs=None,
        ),
        read=read_t5,
        write=write_t5,
        copies=dict.fromkeys(
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"
        ),
        aliases=name_map(
            """hidden_size=d_model head_dim=d_kv num_attention_heads=num_heads
            num_hidden_layers=num_layers"""
        ),
        unstored_head_is_tied=True,
        classes={"lm": "ForConditionalGeneration"},
        drop="decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ),
    # What no other family can express (an architecture changed on the fly) keeps our own names; only tinylm loads it.
    "tinylm": Family(
        "TinyLM",
        {},
        {f.name: f.name for f in fields(Config) if f.name not in ("model_type", "id2label")},
        dict.fromkeys(CLASS, ({}, {})),
        "",
        classes=dict.fromkeys(CLASS, ""),
    ),
}

# ---- config.json ----
# Fields that no class of transformers computes with, or none of those of the rows above.
INERT = set(
    """adapters architectures attention_softmax_in_fp32 attn_implementation auto_map cache_implementation
    chunk_size_feed_forward directionality dtype extra_pos_embeddings finetuning_task gradient_checkpointing id2label
    init_std initializer_factor initializer_range is_llama_config label2id max_window_layers model_type n_ctx n_positions
    num_labels original_max_position_embeddings prefix pretraining_tp reorder_and_upcast_attn return_dict
    scale_attention_softmax_in_fp32 sep_token_id sinusoidal_pos_embds task_specific_params tie_weights_ tokenizer_class
    tinylm_replaced torch_dtype transformers.js_config transformers_version unk_token_id use_cache use_sliding_window""".split()
)
INERT_NAMES = "_[!r]* *dropout *dropout_* *pdrop *layerdrop output_past output_hidden_states output_attentions pooler_* summary_*"
# Fields by which a model of transformers computes something else: refused where a row does not read them.
MECHANISMS = """
    alibi rope_* *_rope *_rope_* *mrope* *rotary* *dynamic_ntk* *logn_attn* position_embedding* position_bias* pos_att_type
    static_position_embeddings sinusoidal_embeddings *learned_position* relative_* max_relative_positions
    sliding_* [!_]*_sliding_* layer_types layers_block_type *bidirectional* causal is_causal is_decoder is_encoder_decoder
    prefix_lm *cross_attention* attention_type attn_type attention_chunk* attention_window* window_size local_att* global_att*
    num_random_blocks num_landmarks keep_window_size *kv_shar* *attention_sink* learnable_sink*
    *head_dim *key_value_heads *kv_heads n_head_kv multi_query kv_channels *_lora_rank clip_qkv swa_* *softcap* *soft_cap
    bias *_bias add_bias_* attn_scale attn_config attn_temperature* attention_*multiplier attention_value_scale attention_k_*
    query_pre_attn_scalar scale_attn* lambda_std_dev enable_shape enable_pronunciation *heads_per_layer *_groups pruned_heads gating new_decoder_architecture num_ln_*
    *qk_norm* *qk_layernorm* query_norm key_norm *norm_before* pre_norm post_norm *use_*_norm norm_type normalization_type
    normalize_before normalize_embedding layernorm_embedding add_final_layer_norm _remove_* apply_residual* gated_norm_rank
    *_multiplier *_multipliers *mup_* logit_scale logits_scaling residual_scale* embedding_scale scale_emb* scale_depth
    *rescale_* *parallel_attn* *parallel_residual* feed_forward_proj mlp_type mlp_only_layers mlp_layer_types swiglu_*
    *sparsity* altup_* laurel_* *per_layer* ffn_config text_config vision_config audio_config encoder_config decoder_config
    *embedding_size embedding_rank word_embed_proj_dim *type_vocab_size* use_task_id use_lang_emb num_hidden_groups tie_encoder_*
    *expert* moe_* *_moe* router_* topk_group mamba_* ssm_* linear_*_dim linear_num_* linear_att* conv_* *_conv_* state_size
    lru_width encoder decoder *_2d_position* index_head* index_n* index_topk* indexer_* entity_* hash_* num_hash ngram* *_ngram* hc_* token_dropout quantization* compression_config
"""
INERT_NAMES, MECHANISMS = (
    re.compile("|".join(map(fnmatch.translate, names.split())))
    for names in (INERT_NAMES, MECHANISMS)
)
# Of these, numbers that change nothing where they are one.
NEUTRAL_AT_ONE = """partial_rotary_factor rotary_pct attention_value_scale residual_scale embedding_multiplier
    embedding_scale logit_scale logits_scaling residual_multiplier scale_emb""".split()


def normalize_hf_config(row: Family, raw: dict, source: str) -> dict:
    """A config.json with the family's defaults, in today's words, and nothing in it that is not supported.

    Warns once of all fields that nobody gives a meaning; raises Error for one that has another meaning than ours.
    """
    raw, ignored = row.defaults | raw, []
    for name, key in row.aliases.items():
        value, known = raw.pop(name, None), raw.get(key)
        if known is None or known == row.defaults.get(key):
            raw[key] = known if value is None else value
        require(
            value in (None, raw[key]) or name == "num_hidden_layers",  # which the tensors tell
            f"{source}: {name} = {value!r} and {key} = {known!r}, expected the same",
        )
    if "rope_scaling" in row.fields:
        flat_rope(row, raw, source, ignored)
    if "use_sliding_window" in row.defaults and not raw["use_sliding_window"]:
        raw["sliding_window"] = None
    if "layer_types" in row.fields and raw.get("layer_types") is None:
        raw["layer_types"] = layer_types(raw)
    if is_number_in(raw.get("num_labels"), 1, 2**16, int) and not raw.get("id2label"):
        raw["id2label"] = {i: f"LABEL_{i}" for i in range(raw["num_labels"])}
    refuse_unsupported(row, raw, source, ignored)
    if ignored:
        names = ", ".join(ignored)[:1000]
        warnings.warn(f"{source}: ignored, as it means nothing here: {names}", stacklevel=4)
    return raw


def layer_types(raw: dict) -> list | None:
    """Which layers slide, of the rules that stood for the list in older files: from one on (Qwen), all but every n-th
    (Gemma)."""
    if raw.get("sliding_window") is None or raw.get("num_hidden_layers") is None:
        return None
    first, period = raw.get("max_window_layers") or 0, raw.get("sliding_window_pattern")
    kinds = []
    for i in range(min(raw["num_hidden_layers"], 9999)):
        full = i < first or period and (i + 1) % period == 0
        kinds.append(LAYER_TYPES[not full])
    return kinds


def refuse_unsupported(row: Family, raw: dict, source: str, ignored: list):
    """Refuse fields that change what a model computes and that the row does not read; add those unheard of to
    `ignored`."""
    read = INERT | GENERATION | row.defaults.keys() | set(row.fields.values())
    hidden, heads = (raw.get(row.fields[name]) for name in ("hidden_size", "num_attention_heads"))
    whole = is_number_in(hidden, 1, 2**31, int) and is_number_in(heads, 1, 2**31, int)
    causal, position = row.fixed.get("causal", True), row.fixed.get("position", "rope")
    seq2seq = "num_encoder_layers" in row.fields
    kind = LAYER_TYPES[raw.get("sliding_window") is not None]
    neutral = dict.fromkeys(NEUTRAL_AT_ONE, 1) | row.fixed
    neutral |= {
        "causal": causal,
        "is_decoder": causal and not seq2seq,
        "is_encoder_decoder": seq2seq,
        "layer_types": [kind] * len(raw.get("layer_types") or ()),
        "num_key_value_heads": heads,
        "head_dim": whole and hidden // heads,
        "embedding_size": hidden,
        "position_embedding_type": {"rope": "rope", "learned": "absolute"}.get(position),
    }
    only = row.only | ({"is_causal": True} if causal else {})
    for key, value in raw.items():
        if key in only:
            fine, supported = value in (None, only[key]), only[key]
        elif key in read or value in (None, False, "", [], {}):
            continue
        elif MECHANISMS.fullmatch(key):
            fine, supported = value == neutral.get(key), neutral.get(key)
        else:
            if not INERT_NAMES.fullmatch(key):
                ignored.append(key)
            continue
        require(fine, f"{source}: {key} = {value!r} is not supported (supported: {supported!r})")


ROPE_UNUSED = {*ROPE_OPTIONS["yarn"], *sum(ROPE_KEYS.values(), ()), "finetuned"}  # by some types


def flat_rope(row: Family, raw: dict, source: str, ignored: list):
    """Rotary positions in one dialect, in place: `rope_theta`, `partial_rotary_factor`, `rope_scaling` for the rest.

    As transformers has it: `rope_scaling` goes before the `rope_parameters` of version 5, and what stands inside of
    these before what stands beside them, but for the original length. Adds to `ignored` what the rope_type ignores.
    """
    rope, scaling = raw.pop("rope_parameters", None) or {}, raw.get("rope_scaling") or {}
    for value in (rope, scaling):
        require(isinstance(value, dict), f"{source}: rope_scaling = {value!r}, expected an object")
    beside = raw.get(ORIGINAL)
    if "rope_local_base_freq" in row.defaults:
        rope, beside = nested_rope(raw, rope, source) | scaling, None
        rope.pop("truncate", None)  # which transformers looks for elsewhere
    elif scaling:
        rope = scaling
    rope = {key: value for key, value in rope.items() if value is not None}
    for key in ("rope_theta", "partial_rotary_factor"):
        raw[key] = rope.pop(key, raw.get(key))
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(
        rope.pop("type", kind) == kind,
        f"{source}: rope_scaling has rope_type = {kind!r} and another type",
    )
    if not isinstance(kind, str) or kind not in ROPE_KEYS:  # which Config refuses
        raw["rope_scaling"] = rope | {"rope_type": kind}
        return
    if kind in ROPE_OPTIONS:
        length = raw["max_position_embeddings"]
        if beside is not None:
            rope[ORIGINAL] = beside
        original = rope.get(ORIGINAL, length)
        require(
            is_number_in(original, 1, 2**31),
            f"{source}: {ORIGINAL} = {original!r}, expected a size",
        )
        if kind == "yarn":
            rope.setdefault("factor", length / original)
        else:
            low, high = rope.get("low_freq_factor", 0), rope.get("high_freq_factor", 1e9)
            require(low < high, f"{source}: low_freq_factor = {low}, expected less than {high}")
    used = {"rope_type", *ROPE_KEYS[kind], *ROPE_OPTIONS.get(kind, ())}
    for key in rope.keys() - used:
        known = key in ROPE_UNUSED or (key, rope[key]) == ("attn_factor", 1)
        require(
            known, f"{source}: rope_scaling has {key} = {rope[key]!r}, not supported in {kind!r}"
        )
        ignored.append(f"{key} of rope_scaling")
    told = {key: value for key, value in rope.items() if key in used}
    raw["rope_scaling"] = None if kind == "default" else told | {"rope_type": kind}


def nested_rope(raw: dict, rope: dict, source: str) -> dict:
    """Gemma 3 has `rope_parameters` for each type of layers: those of the full ones; the others have but a theta."""
    strange = [key for key in rope if key not in LAYER_TYPES]
    require(not strange, f"{source}: rope_parameters has {strange}, expected {LAYER_TYPES}")
    full, local = (dict(rope.get(kind) or {"rope_type": "default"}) for kind in LAYER_TYPES)
    raw["rope_local_base_freq"] = local.pop("rope_theta", raw["rope_local_base_freq"])
    require(
        local in ({}, {"rope_type": "default"}),
        f"{source}: rope_parameters of sliding_attention = {local} is not supported "
        "(supported: rope_type 'default')",
    )
    return full


UNSET = dict(  # where Config's default is an architecture or a size of its own
    vocab_size=None,
    hidden_size=None,
    num_hidden_layers=None,
    num_attention_heads=None,
    qk_norm=None,
)


def read_labels(names: dict) -> dict[int, str]:
    """The names of classes in their order; JSON has their numbers as text."""
    require(
        isinstance(names, dict) and all(str(i).isdecimal() for i in names),
        f"id2label = {names!r}, expected names for 0, 1, 2, ...",
    )
    return dict(sorted((int(i), str(name)) for i, name in names.items()))


def config_from_hf(raw: dict, source: str = "config.json", head="config") -> Config:
    """The Config that a `config.json` describes, in the dialect of transformers 4 or 5, with the head of its
    `architectures` or another one.

    Warns of fields that nobody gives a meaning. Raises Error for an unknown model_type, and for any field that would
    change what the model computes and that this file does not support.
    """
    name = raw.get("model_type")
    require(
        name in [*FAMILIES],
        f"{source}: model_type = {name!r} is not supported (supported: {', '.join(FAMILIES)})",
    )
    row = FAMILIES[name]
    try:
        if head == "config":
            architectures = raw.get("architectures") or [None]
            head = raw.get("head", "lm") if name == "tinylm" else row.head_of(architectures[0])
        require(
            head in row.heads,
            f"{source}: head = {head!r} is not supported for {name} (supported: "
            f"{', '.join(map(str, row.heads))})",
        )
        raw = normalize_hf_config(row, raw, f"{source}, model_type {name}")
        given = {ours: raw[key] for ours, key in row.fields.items() if raw.get(key) is not None}
        values = UNSET | given | row.fixed | row.read(raw) | row.heads[head][1]
        if values.get("head_act") == SAME:
            values["head_act"] = values["hidden_act"]
        if raw.get("id2label"):
            values["id2label"] = read_labels(raw["id2label"])
        return Config(**values | dict(head=head, model_type=name))
    except Error as error:  # where it names our field, name theirs
        ours, _, rest = str(error).removeprefix("config: ").partition(" ")
        text = f"{source}: {row.fields.get(ours, ours)} {rest}"
        raise (error if str(error).startswith(source) else Error(text)) from None
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise Error(f"{source}: a field has a value of the wrong kind ({error})") from None


def config_to_hf(config: Config) -> dict:
    """The `config.json` of a config, in the flat dialect that transformers 4 and 5 both read.

    Without a `model_type` it is the first family that can express it. Raises Error where the named family cannot.
    """
    for name in [config.model_type] if config.model_type else FAMILIES:
        row = FAMILIES[name]
        raw = {
            "architectures": [row.architecture(config.head)],
            "model_type": name,
            "initializer_range": config.initializer_range,
        }
        raw |= {key: getattr(config, ours) for ours, key in row.fields.items()} | row.write(config)
        if config.id2label:
            raw["id2label"] = {str(i): label for i, label in config.id2label.items()}
            raw["label2id"] = {label: i for i, label in config.id2label.items()}
        if "use_sliding_window" in row.defaults:
            raw["use_sliding_window"] = config.sliding_window is not None
        if config.num_encoder_layers:
            raw["is_encoder_decoder"] = True
        try:
            require_same(config_from_hf(raw, "config", config.head), config)
            return raw
        except Error as error:
            reason = error
    raise Error(f"{reason} cannot be written as model_type {name!r}")


def require_same(back: Config, config: Config):
    """What is written right reads back as the same, but for what only training uses."""
    unwritten = (
        "model_type",
        "hidden_dropout",
        "embedding_dropout",
        "head_dropout",
        "initializer_range",
    )
    lost = [
        f"{f.name} = {getattr(config, f.name)!r}"
        for f in fields(Config)
        if f.name not in unwritten and getattr(back, f.name) != getattr(config, f.name)
    ]
    require(not lost, f"config: {', '.join(lost)}")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: the tensor tables at work, in both directions
# ---------------------------------------------------------------------------------------------------------------------
def usable_device(name=None) -> torch.device:
    """The device of that name, by default CUDA where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        raise Error(f"--device {name} cannot be used ({str(error).splitlines()[0]})") from None


def write_file(path: Path, write):
    """Whole or not at all: `write` fills a temporary file that then takes the name."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode  # safetensors writes files that only their owner may read
    write(temporary)
    temporary.chmod(mode)
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: dict, metadata: dict):
    """A safetensors file. (`safetensors.torch.save_file` would need numpy.)"""
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
    """A file's JSON object; `missing`: what stands for a file that is not there, a list where a list is expected."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise Error(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Error(f"{path}: not readable as JSON ({error})") from None
    kind = "array" if isinstance(missing, list) else "object"
    fine = isinstance(content, list if kind == "array" else dict)
    require(fine, f"{path}: expected a JSON {kind}")
    return content


CHECKPOINT_FILES = """config.json generation_config.json model*.safetensors model.safetensors.index.json tokenizer.json
tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json merges.txt *.model *.jinja modules.json
*sentence*.json */config.json [0-9]*_*/model.safetensors""".split()


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: one of that name, else a repository of the Hugging Face hub, in `huggingface_hub`'s
    cache; what is not there yet is downloaded, unless HF_HUB_OFFLINE is set. `revision`: a branch, tag or commit.

    Raises Error where there is neither.
    """
    name = str(name)
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]{,95}(/[\w-][\w.-]{,95})?", name):
        require(os.path.isdir(name), f"{name}: no such folder")
        require(
            revision is None, f"revision = {revision!r}: {name} is a folder, not a name on the hub"
        )
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise Error(
            f"{name}: no such folder; to have it from the Hugging Face hub, pip install huggingface_hub, "
            f"or download it elsewhere: hf download {name} --local-dir {name}"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=CHECKPOINT_FILES))
    except (OSError, ValueError) as error:
        raise Error(
            f"{name}: no such folder, and the Hugging Face hub does not give it ({error})"
        ) from None


def sources(name: str, model_type: str, head: str | None) -> tuple[tuple, type]:
    """Which tensors of a family's checkpoint make up our tensor `name`, and the kind of their names."""
    row, (module, kind) = FAMILIES[model_type], name.rsplit(".", 1)
    if not row.tensors:
        return (name,), Name
    layer = next((part for part in module.split(".") if part.isdigit()), "")
    table = row.tensors | row.heads[head][0]
    # of a tensor, or of a module
    theirs = table.get(name) or table.get(module.replace(f".{layer}.", ".{}."))
    require(
        theirs, f"{name}: model_type {model_type!r} has no such tensor; use model_type 'tinylm'"
    )
    return tuple(n.format(layer) + f".{kind}" * (name not in table) for n in theirs), type(
        theirs[0]
    )


def fused_sizes(name: str, config: Config) -> tuple:
    """Rows that each part has in a fused projection of ours."""
    config = config.encoder if name.startswith("encoder.") else config
    sizes = {
        "qkv": config.qkv_sizes,
        "kv": config.qkv_sizes[1:],
        "gate_up": (config.intermediate_size,) * 2,
    }
    return sizes[name.split(".")[-2]]


def stored_form(name: str, tensor: Tensor, config: Config, model_type: str) -> tuple[dict, type]:
    """Our tensor under a family's names, its fused parts apart, and the kind of the names."""
    theirs, kind = sources(name, model_type, config.head)
    parts = tensor.split(fused_sizes(name, config)) if len(theirs) > 1 else [tensor]
    return {n: kind.write(part) for n, part in zip(theirs, parts)}, kind


def to_checkpoint(state: dict, config: Config, model_type: str) -> dict:
    """Our state dict in the form of a family's checkpoints."""
    prefix = FAMILIES[model_type].prefix if config.head is None else ""
    return {
        n.removeprefix(prefix): part.contiguous()
        for name, tensor in state.items()
        for n, part in stored_form(name, tensor, config, model_type)[0].items()
    }


def open_tensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise Error(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise Error(f"{path}: not a readable safetensors file ({error})") from None


class Checkpoint:
    """The tensors in a folder, as our state dict: each one is found and fits, and none is left over."""

    def __init__(self, folder: Path, config: Config, dtype, device):
        self.row, self.dtype, self.device = FAMILIES[config.model_type], dtype, device
        self.place, files = self.files(folder)
        self.stored = self.named(files)  # name in the table -> (file, the opened one, name there)
        (self.embedding,), _ = sources("embed.weight", config.model_type, config.head)
        self.output = self.tied_output()
        # A tensor that is tied, or stored twice, may stand under one of its names only.
        tied = {self.output: self.embedding} if config.tie_word_embeddings else {}
        for name, original in (self.row.copies | tied).items():
            if name in self.stored:
                self.stored.setdefault(original, self.stored[name])
        layers = max(config.num_hidden_layers, config.num_encoder_layers)
        number = len(self.stored)
        require(layers <= number, f"{self.place}: {number} tensors, expected {layers} layers")
        self.dtype = dtype or self.fetch(self.embedding).dtype
        self.config = replace(config, tie_word_embeddings=self.is_tied(config))

    def named(self, files: dict) -> dict:
        """The stored tensors under today's names, behind the prefix that bare models leave out."""
        opened = {file: open_tensors(file) for file in sorted({*files.values()})}
        heads = self.head_tensors()
        bare = not any(name.startswith(self.row.prefix) for name in files)
        stored = {}
        for name, file in files.items():
            new = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            new = new.replace("LayerNorm.beta", "LayerNorm.bias")
            if bare and new not in heads:
                new = self.row.prefix + new
            stored[new] = file, opened[file], name
        return stored

    def tied_output(self) -> str | None:
        """The name of the language model's output, which may be tied to the embedding."""
        for head in {"lm", "mlm"} & self.row.heads.keys():
            for name in self.row.heads[head][0].get("head.out", ()):
                return f"{name}.weight"
        return None

    def is_tied(self, config: Config) -> bool:
        """An output that is stored is tied in name only, unless it equals the embedding."""
        if config.tied and self.output in self.stored:
            tied = torch.equal(self.fetch(self.output), self.fetch(self.embedding))
            require(
                tied or "tie_word_embeddings" not in self.row.only,
                f"{self.place}: tensor {self.output} differs from the embedding, "
                f"but model_type {config.model_type!r} ties them",
            )
            return tied
        unstored = self.output not in self.stored
        return config.tie_word_embeddings or unstored and self.row.unstored_head_is_tied

    @staticmethod
    def files(folder: Path) -> tuple[Path, dict]:
        """The file that says it, and the safetensors file of every tensor."""
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.exists():
            return single, dict.fromkeys(open_tensors(single).keys(), single)
        others = sorted(
            p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5")
        )
        require(
            index.exists(),
            f"{folder}: no model.safetensors and no model.safetensors.index.json"
            + (f" ({', '.join(others)}: only safetensors is read)" if others else ""),
        )
        files = read_json(index).get("weight_map")
        require(
            isinstance(files, dict) and files,
            f"{index}: weight_map = {files!r}, expected tensor names and their files",
        )
        for name, file in files.items():
            require(
                isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors"),
                f"{index}: {name} lies in {file!r}, expected the name of a .safetensors file in this folder",
            )
        return index, {name: folder / file for name, file in files.items()}

    def head_tensors(self, but="none") -> set:
        """Names of the heads' own tensors, but for those of the head `but`."""
        names = set()
        for head, (table, _) in self.row.heads.items():
            for ours, (name,) in table.items() if head != but else ():
                ends = {name} if ours.endswith(".bias") else {f"{name}.weight", f"{name}.bias"}
                names |= ends
        return names

    def fetch(self, name: str, shape: tuple | None = None) -> Tensor:
        require(
            name in self.stored,
            f"{self.place}: tensor {name} is missing"
            + (f", expected with shape {tuple(shape)}" if shape else ""),
        )
        file, opened, stored = self.stored[name]
        try:
            tensor = opened.get_tensor(stored)
        except SafetensorError as error:
            raise Error(f"{file}: tensor {stored} is not readable ({error})") from None
        plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        require(
            tensor.dtype in plain and shape in (None, tensor.shape),
            f"{file}: tensor {stored} has shape "
            f"{tuple(tensor.shape)} and dtype {tensor.dtype}, expected floats of shape {tuple(shape or ())}",
        )
        return tensor.to(self.device, self.dtype)

    def state(self, lm: TinyLM, fresh: dict) -> dict:
        """The state dict of a model; `fresh` stands in for tensors of its head that are not stored."""
        row, state, used = self.row, {}, set()
        for name, tensor in lm.state_dict().items():
            parts, kind = stored_form(name, tensor, self.config, self.config.model_type)
            used |= parts.keys()
            if not parts.keys() & self.stored.keys() and (name in fresh or kind in (Row, Unused)):
                new = fresh.get(name, torch.zeros(tensor.shape))
                state[name] = new.to(self.device, self.dtype)
            else:
                found = [
                    kind.read(self.fetch(n, part.shape)).contiguous() for n, part in parts.items()
                ]
                state[name] = found[0] if len(found) == 1 else torch.cat(found)
        for name in row.copies.keys() & self.stored.keys():
            original = row.copies[name]
            require(
                original not in used or torch.equal(self.fetch(name), self.fetch(original)),
                f"{self.place}: tensor {name} differs from the one that it should repeat, {original}",
            )
        spare = row.copies.keys() | self.head_tensors(self.config.head)
        if self.config.tied:
            spare.add(self.output)
        for name in sorted(self.stored.keys() - used - spare):
            file, _, stored = self.stored[name]
            fine = any(fnmatch.fnmatchcase(name, pattern) for pattern in row.drop.split())
            model_type = self.config.model_type
            require(fine, f"{file}: tensor {stored} is unexpected for model_type {model_type!r}")
        return state


def load_model(cls, name, dtype, device, head, revision, changes: dict) -> TinyLM:
    """What `TinyLM.from_pretrained` does."""
    dtype = parse_dtype(changes.pop("torch_dtype", dtype))
    require(
        "device_map" not in changes,
        'device_map: a model lies on one device; name it with device=, such as device="cuda"',
    )
    unknown = sorted(changes.keys() - {f.name for f in fields(Config)})
    require(
        not unknown,
        f"from_pretrained: {', '.join(unknown)}: no such argument, and no such field of Config",
    )
    folder = find_checkpoint(name, revision)
    device = usable_device(device or "cpu")
    source = str(folder / "config.json")
    raw = read_json(folder / "config.json")
    check_replaced(raw, source)
    config = replace(config_from_hf(raw, source, head), **changes)
    checkpoint = Checkpoint(folder, config, dtype, device)
    # A leaf of somebody else's may keep tensors that no checkpoint has, and that a meta device would lose.
    with torch.device("cpu" if replaced_leaves() else "meta"):
        lm = cls(checkpoint.config)
    fresh = {}
    if head != "config":
        lm.head = Head(lm.config).apply(lm._init)
        fresh = lm.head.state_dict(prefix="head.")
    lm.load_state_dict(checkpoint.state(lm, fresh), assign=True)
    lm.folder = folder
    lm.tokenizer = load_tokenizer(folder)
    lm.generation_config = read_generation_config(folder, raw)
    return lm.to(device).eval()


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype, or its name, or None for the stored one."""
    given = dtype
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."), dtype)
    require(
        dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point,
        f"dtype = {given!r}, expected a floating-point torch.dtype",
    )
    return dtype


def check_replaced(raw: dict, source: str):
    """Refuse a model whose leaves were replaced when it was saved, unless they are by the same."""
    noted = raw.get("tinylm_replaced") or {}
    require(isinstance(noted, dict), f"{source}: tinylm_replaced = {noted!r}, expected an object")
    now = replaced_leaves()
    for leaf, by in noted.items():
        require(
            now.get(leaf) == by,
            f"{source}: saved with {leaf} replaced by {by}, and here it is "
            f"{now.get(leaf, 'the stock one')}: replace it before loading",
        )


def save_model(lm: TinyLM, folder: Path):
    """What `TinyLM.save_pretrained` does."""
    # Classes are those that the model was made of, functions those that it calls.
    replaced = {leaf: by for leaf, by in lm.replaced.items() if isinstance(LEAVES[leaf], type)}
    now = replaced_leaves().items()
    replaced |= {leaf: by for leaf, by in now if not isinstance(LEAVES[leaf], type)}
    config = replace(lm.config, model_type="tinylm") if replaced else lm.config
    raw = config_to_hf(config) | {"torch_dtype": str(lm.dtype).removeprefix("torch.")}
    if replaced:
        raw["tinylm_replaced"] = replaced
    tensors = to_checkpoint(lm.state_dict(), config, raw["model_type"])
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    ids = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (lm.tokenizer.files if lm.tokenizer else {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, lambda path, content=content: path.write_bytes(content))
    write_json(folder / "generation_config.json", lm.generation_config or ids)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", raw)


# ---------------------------------------------------------------------------------------------------------------------
# The training step
# ---------------------------------------------------------------------------------------------------------------------
CHUNKED_LOSS_MIN_LOGITS = 2**22  # logits of a step above which they are made a chunk at a time


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """About the nearest matrix of orthogonal rows or columns: Newton-Schulz in Jordan's quintic (2024).

    In bfloat16 on a GPU and, if large, on a processor with matrix units. torch.optim.Muon always takes bfloat16, which
    others compute 25 to 30 times slower than float32: 513 ms against 19 for a 768 x 256 matrix on an AMD EPYC.
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
    """AdamW for embeddings, head, norms and biases; Muon for the matrices of the layers: momentum whose update of each
    matrix is made orthogonal (Jordan 2024), as in torch.optim.Muon, but that `orthogonal` chooses its precision."""

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
            # As large a change of the outputs for every shape.
            size = lr * max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - lr * muon["weight_decay"]).add_(shard_like(p, update), alpha=-size)


def target_labels(model: TinyLM, batch: dict) -> Tensor:
    """What the model's outputs are compared with. Of a decoder what it should say after each token but the last (batch,
    seq - 1), where nothing follows from padding."""
    if model.config.head != "lm" or model.encoder is not None:
        return batch["labels"]
    labels = batch.get("labels", batch["input_ids"])[:, 1:]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask[:, 1:] * mask[:, :-1] == 0, -100)


def label_weight(labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """What a sum of losses is divided by: so many labels that count, or their classes' weights."""
    if labels.is_floating_point():
        return labels.new_tensor(labels.numel())
    labels = labels[labels != -100]
    return labels.new_tensor(len(labels)) if class_weights is None else class_weights[labels].sum()


def loss_sum(
    model: TinyLM, batch: dict, class_weights: Tensor | None = None, bf16: bool = False
) -> Tensor:
    """Sum over a batch's labels of the loss that goes with the model's head.

    input_ids (batch, seq), attention_mask where there is padding, token_type_ids, decoder_input_ids and labels as in
    Hugging Face, where -100 is ignored: of a decoder (batch, seq), not shifted, and by default the input; behind an
    encoder (batch, target); of a masked model and of tokens (batch, seq); of a classifier (batch,), or floats (batch,
    classes) of several classes, or floats (batch,) of a regression; of an answer (batch, 2), its first and last column.
    """
    config = model.config
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    labels = target_labels(model, batch)
    columns = None
    if model.encoder is None and config.head == "lm":  # what it says after the last has no label
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
    if config.head == "qa":  # a distribution over columns, for the start and for the end
        logits = rearrange(logits, "b s ends -> b ends s")
        if mask is not None:
            logits = logits.masked_fill(mask[:, None] == 0, -math.inf)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), class_weights, reduction="sum")


def labelled_columns(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The columns (batch, n) that have labels, and these: the head is spared the others."""
    has_label = labels != -100
    most = int(has_label.sum(1).max().clamp(min=1))
    columns = has_label.int().topk(most).indices
    return columns, labels.gather(1, columns)


def can_chunk(model: TinyLM) -> bool:
    """Can the logits of a language model be made apart from its head: is that one stock matrix?"""
    config = model.config
    stock = linear is LEAVES["linear"] and Linear is LEAVES["Linear"] and Head is LEAVES["Head"]
    return stock and config.head == "lm" and not (config.final_logit_softcapping or config.head_act)


def chunked_loss(model: TinyLM, inputs: tuple, columns: Tensor | None, labels: Tensor) -> Tensor:
    """The cross-entropy of a language model whose logits are never there all at once."""
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
    ceiling: float = math.inf,
) -> Tensor:
    """One update on a batch of ids (batch, seq), or on a dict as `loss_sum` takes it, run in `accumulate` parts.
    Returns the mean loss per label, a detached scalar; above the `ceiling` its gradient is left out. The optimizer is
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
        if shards > 1:  # gradients travel once
            model.set_requires_gradient_sync(i + 1 == len(parts))
        loss = loss_sum(model, part, class_weights, bf16) / weight
        (loss * shards).backward()  # of which the mean over processes is taken
        total += loss.detach()
    total = all_reduce(total, shards)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = full_tensor(nn.utils.get_total_norm(gradients))
    # By an infinite norm gradients become 0, and nothing waits for the device.
    norm = torch.where(total > ceiling, math.inf, norm)
    nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


def rank_and_world_size() -> tuple[int, int]:
    """This process's number under torchrun, and how many there are."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def all_reduce(x: Tensor, shards: int, how: str = "SUM") -> Tensor:
    """The sum of what all processes have."""
    if shards > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, how))
    return x


def full_tensor(x: Tensor) -> Tensor:
    """A sharded tensor as a plain one, on every process."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(p: Tensor, x: Tensor) -> Tensor:
    """A plain tensor, sharded as the parameter is."""
    if not hasattr(p, "device_mesh") or x.ndim == 0:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
