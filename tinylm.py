"""tinylm: a whole language-model library in one file.

    from tinylm import Config, TinyLM, train_step
    lm = TinyLM.from_pretrained("SmolLM2-135M-Instruct")          # GPT, Llama, Qwen, BERT, T5, BART, ...: see FAMILIES
    for piece in lm.stream("The capital of France is", max_new_tokens=20): print(piece, end="")
    lm.save_pretrained("copy")                                     # transformers, vLLM and llama.cpp load it unchanged
    lm = TinyLM(Config(hidden_size=256, num_hidden_layers=4))      # or start from nothing: python tinylm.py train FILE

It needs torch, einops and safetensors; `tokenizers` only for checkpoints that bring a tokenizer.json of their own.
Read it from top to bottom: config, families, blocks, cache, model, checkpoints, tokens, sampling, training, commands.
Every leaf (`rms_norm`, `rotate`, `attend`, `MLP`, ...) is looked up when it is called: replace one in place and train.

Sources: Vaswani et al. 2017 (the transformer); Devlin et al. 2019 (BERT); Raffel et al. 2020 (T5); Lewis et al. 2020
(BART); Su et al. 2021 (rotary positions); Zhang & Sennrich 2019 (RMS norm); Shazeer 2020 (gated MLP); Ainslie et al.
2023 (grouped queries); Jordan 2024 (Muon). Reference implementation of every family: Hugging Face transformers.
"""
from __future__ import annotations

import argparse
import array
import codecs
import contextlib
import csv
import ctypes
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import string
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

try:
    import fcntl
except ImportError:  # Windows, where nothing locks a folder
    fcntl = None

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils._pytree import tree_leaves, tree_map_only

# Axes: b batch, s query positions, t key positions, h query heads, g key-value heads, d head width.


class Error(ValueError):
    """What the caller gave cannot be used: one line that names it, its value and what was expected."""

    def __init__(self, message: str):
        line = " ".join(str(message).split())
        super().__init__(line if len(line) < 1000 else f"{line[:700]} ... {line[-200:]}")


def require(ok, message: str):
    if not ok:
        raise Error(message)


def number(value, low, high, kind=(int, float)) -> bool:
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
Rate = Annotated[float, 1e-12, 1e12]


def allows(hint, value) -> tuple[bool, str]:
    """Does an annotation allow a value, and what does it: a number of a range, choices, or instances of a class."""
    if get_origin(hint) in (Union, UnionType):
        parts = [allows(part, value) for part in get_args(hint)]
        return any(fine for fine, _ in parts), " or ".join(text for _, text in parts if text)
    if get_origin(hint) is Annotated:
        (kind, low, high), real = get_args(hint), get_args(hint)[0] is float
        said = "of 64 bits" if low == -2**63 else f"from {low:g} to {high:g}"
        return number(value, low, high, (int, float) if real else int), f"{'a number' if real else 'an integer'} {said}"
    if get_origin(hint) is Literal or hint is bool:
        choices = get_args(hint) or (True, False)
        return value in choices, " or ".join(map(str, choices))
    return isinstance(value, hint), "" if hint is NoneType else f"a {hint.__name__}"


def check(owner, spelled: Callable = str):
    """Refuse a dataclass whose fields are not as annotated; `spelled`: how an error spells a field's name."""
    for name, hint in get_type_hints(type(owner), include_extras=True).items():
        fine, expected = allows(hint, getattr(owner, name))
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
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
Act = Literal[tuple(ACTIVATIONS)]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_KEYS = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor")}  # rope_type -> keys that it needs
YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")  # that it may have


@dataclass(frozen=True)
class Config:
    """What a model is made of, in the names of Hugging Face `config.json`. The defaults are Qwen3's architecture.

    Raises Error where a value is out of its range.
    """
    vocab_size: Size = 320                        # rows of the embedding; bytes and two specials, padded to 64
    hidden_size: Width = 256                      # width of the residual stream
    intermediate_size: Size | None = None         # width inside the MLP; None: 8/3 of hidden (gated), 4 times (plain)
    num_hidden_layers: Layers = 4                 # of the decoder, or of the only stack
    num_attention_heads: Width = 4                # query heads
    num_key_value_heads: Width | None = None      # None: as many as query heads; fewer: grouped queries
    head_dim: Width | None = None                 # None: hidden_size / num_attention_heads
    max_position_embeddings: Size = 1024          # the longest sequence it is made for
    causal: bool = True                           # a token sees only what stands before it; False: an encoder
    num_encoder_layers: Count = 0                 # above 0: an encoder-decoder
    encoder_attention_heads: Width | None = None  # None: num_attention_heads
    encoder_intermediate_size: Size | None = None  # None: intermediate_size
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: Real = 1e-6
    norm_offset: float = 0.0                      # added to the RMS norm's weight (Gemma: 1)
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"  # x + f(norm(x)) | norm(x + f(x)) |
    final_norm: bool = True                       # x + norm(f(x)) | x + norm(f(norm(x))); a norm after the last layer
    position: Literal["rope", "learned", "sinusoidal", "relative"] = "rope"
    position_offset: Count = 0                    # rows of a learned table before that of position 0
    rope_theta: Real = 10000.0
    rope_scaling: dict | None = None              # {"rope_type": a key of ROPE_KEYS, "factor": ...}
    rope_local_base_freq: Real | None = None      # theta of the sliding layers, unscaled; None: as the full ones
    partial_rotary_factor: Share = 1.0            # the part of each head that rotates
    relative_attention_num_buckets: Annotated[int, 4, 2**20] = 32
    relative_attention_max_distance: Annotated[int, 2, 2**31] = 128
    sliding_window: Size | None = None            # keys seen by a sliding layer, itself included
    layer_types: tuple | list | None = None       # full_attention | sliding_attention per layer; None: all alike
    qk_norm: Literal["head", "full", None] = "head"  # norm of q and k: over each head, or over all heads
    attention_bias: bool = False                  # bias of q, k, v
    attention_output_bias: bool | None = None     # bias of o; None: as attention_bias
    query_pre_attn_scalar: Real | None = None     # scores are q.k / sqrt(this); None: head_dim
    attn_logit_softcapping: Real | None = None    # c tanh(scores / c)
    final_logit_softcapping: Real | None = None   # c tanh(logits / c)
    hidden_act: Act = "silu"
    gated: bool = True                            # act(gate(x)) * up(x), else act(up(x))
    mlp_bias: bool = False
    embedding_size: Width | None = None           # width of the embeddings, projected to hidden; None: hidden_size
    type_vocab_size: Count = 0                    # token types; 0: none
    scale_embedding: bool = False                 # embeddings times sqrt(hidden_size)
    embedding_norm: bool = False                  # a norm after all embeddings are added
    tie_word_embeddings: bool = True              # the head is the embedding
    scale_logits: bool = False                    # the head's input over sqrt(hidden_size) (T5)
    head: Literal["lm", "mlm", "classify", "tokens", "qa", None] = "lm"  # None: hidden states
    head_act: Act | None = None                   # a dense layer with this activation before the head's output
    head_norm: bool = False                       # and a norm after that
    head_bias: bool = False                       # bias of the head's output
    id2label: dict | None = None                  # classes of a classifying head; None: two
    problem_type: Problem | None = None           # what the classes mean to the loss; None: one of them is right
    attention_dropout: Dropout = 0.0              # of attention weights, in training
    hidden_dropout: Dropout = 0.0                 # of what each sub-layer adds, in training
    embedding_dropout: Dropout = 0.0
    head_dropout: Dropout | None = None           # before the head's output; None: an encoder's classifier as hidden
    initializer_range: Real = 0.02
    bos_token_id: Id | None = None
    eos_token_id: int | tuple | list | None = None
    pad_token_id: Id | None = None
    decoder_start_token_id: Id | None = None      # what a decoder behind an encoder begins with
    model_type: Literal[tuple(FAMILIES)] | None = None  # to save as; None: the first that can express it


    def __post_init__(self):
        check(self, "config: {}".format)
        hidden, heads, inner = self.hidden_size, self.num_attention_heads, self.intermediate_size
        self._expect("num_attention_heads", self.head_dim or hidden % heads == 0,
                     f"a divisor of hidden_size = {hidden}, or head_dim")
        inner = inner or (-(-hidden * 8 // 3 // 64) * 64 if self.gated else 4 * hidden)
        kind = LAYER_TYPES[self.sliding_window is not None]
        meant = dict(head_dim=hidden // heads, num_key_value_heads=heads, intermediate_size=inner,
                     embedding_size=hidden, layer_types=(kind,) * self.num_hidden_layers,
                     attention_output_bias=self.attention_bias)
        if self.num_encoder_layers:
            start = self.bos_token_id if self.bos_token_id is not None else self.pad_token_id or 0
            meant |= dict(encoder_attention_heads=heads, encoder_intermediate_size=inner, decoder_start_token_id=start)
        if self.head in ("classify", "tokens"):
            meant["id2label"] = {0: "LABEL_0", 1: "LABEL_1"}
        given = {name: value for name, value in vars(self).items() if value is not None}
        vars(self).update(meant | {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})
        self._check()

    def _expect(self, name: str, fine, expected: str):
        require(fine, f"config: {name} = {getattr(self, name)!r}, expected {expected}")

    def _check(self):
        """Refuse fields that do not go together."""
        heads, kinds, labels = self.num_attention_heads, self.layer_types, self.id2label
        self._expect("num_key_value_heads", heads % self.num_key_value_heads == 0,
                     f"a divisor of num_attention_heads = {heads}")
        self._expect("position", self.position != "relative" or heads == self.num_key_value_heads
                     and self.attn_logit_softcapping is None, "another one with grouped queries or soft-capped scores")
        self._expect("encoder_attention_heads", self.encoder_attention_heads in (None, heads)
                     or self.hidden_size % self.encoder_attention_heads == 0,
                     f"a divisor of hidden_size = {self.hidden_size}")
        self._expect("embedding_size", not self.tied or self.embedding_size == self.hidden_size or self.head == "mlm"
                     and self.head_act, f"hidden_size = {self.hidden_size}, as the head is the embedding")
        self._expect("id2label", self.head not in ("classify", "tokens") or isinstance(labels, dict)
                     and list(labels) == list(range(len(labels))) != [], "names for 0, 1, 2, ...")
        self._expect("layer_types", isinstance(kinds, tuple) and len(kinds) == self.num_hidden_layers
                     and set(kinds) <= set(LAYER_TYPES), f"{self.num_hidden_layers} of {', '.join(LAYER_TYPES)}")
        self._expect("sliding_window", self.sliding_window and self.causal or LAYER_TYPES[1] not in kinds,
                     "a number, as layer_types has a sliding_attention" if self.causal else "none in an encoder")
        if self.position == "rope":
            self._expect("head_dim", self.rotary_dim in range(2, self.head_dim + 1, 2), "an even number of channels "
                         f"that rotate, not {self.rotary_dim}")
            scaling = {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling
            kind = isinstance(scaling, dict) and scaling.get("rope_type")
            self._expect("rope_scaling", kind in [*ROPE_KEYS], f"an object with rope_type {', '.join(ROPE_KEYS)}")
            may = ("original_max_position_embeddings",) + YARN_KEYS * (kind == "yarn")
            for key in {*ROPE_KEYS[kind], *scaling} - {"rope_type"}:
                value = scaling.get(key)
                self._expect("rope_scaling", key in ROPE_KEYS[kind] + may, f"no {key} in type {kind!r}")
                self._expect("rope_scaling", number(value, 1e-6, 1e9) or key in may and value in (None, True, False),
                             f"a positive {key}")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def qkv_sizes(self) -> tuple:
        """Rows of q, k and v in the fused projection."""
        return tuple(n * self.head_dim for n in (self.num_attention_heads,) + 2 * (self.num_key_value_heads,))

    @property
    def encoder(self) -> Config:
        """The encoder of an encoder-decoder, as a model of its own."""
        same = self.encoder_attention_heads == self.num_attention_heads
        return replace(self, causal=False, num_encoder_layers=0, num_hidden_layers=self.num_encoder_layers, head=None,
                       num_attention_heads=self.encoder_attention_heads, layer_types=None, head_act=None,
                       sliding_window=None, num_key_value_heads=self.num_key_value_heads if same else None,
                       head_dim=self.head_dim if same else None, intermediate_size=self.encoder_intermediate_size)

    @property
    def num_labels(self) -> int:
        return len(self.id2label or ("start", "end"))

    @property
    def outputs(self) -> int:
        """So many numbers the head says of each text or token."""
        return {"lm": self.vocab_size, "mlm": self.vocab_size, "qa": 2, None: 0}.get(self.head, self.num_labels)

    @property
    def tied(self) -> bool:
        return self.tie_word_embeddings and self.head in ("lm", "mlm")


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


PLAIN = lambda value, _: value  # noqa: E731 (how most fields of a config read, and are written)
DECODER_HEADS = {"lm": ({"head.out": "lm_head"}, {}), "classify": ({"head.out": "score"}, {}), None: ({}, {})}
CLASS = {  # head -> end of its class's name
    "lm": "ForCausalLM", "mlm": "ForMaskedLM", "classify": "ForSequenceClassification",
    "tokens": "ForTokenClassification", "qa": "ForQuestionAnswering", None: "Model"}


@dataclass(frozen=True)
class Family:
    """One `model_type`. Tables are read one way to load and the other way to save."""
    stem: str                                     # of its classes' names
    tensors: dict                                 # our module -> theirs, or a tuple of theirs fused along the rows
    fields: dict                                  # our config field -> their key, or (key, how it reads, is written)
    heads: dict = field(default_factory=lambda: DECODER_HEADS)  # head -> (its rows of the table, its config fields)
    prefix: str = "model."                        # of the body's tensors, where there is a head
    fixed: dict = field(default_factory=dict)     # our config fields which the family always has, or how they follow
    defaults: dict = field(default_factory=dict)  # their key -> what transformers takes where config.json is silent
    only: dict = field(default_factory=dict)      # their key -> the one value supported, where None will not do
    drop: tuple = ("model.layers.{}.self_attn.rotary_emb.inv_freq",)  # their tensors that carry nothing
    copies: dict = field(default_factory=dict)    # their tensors that some writers store beside ours of equal values
    unstored_head_is_tied: bool = False           # whatever config.json says of it
    classes: dict = field(default_factory=dict)   # head -> end of its class's name, where it is not that of CLASS

    def __post_init__(self):
        vars(self).update(fields={ours: entry if isinstance(entry, tuple) else (entry, PLAIN, PLAIN)
                                  for ours, entry in self.fields.items()},
                          heads={head: (table("", "", rows, {}), more) for head, (rows, more) in self.heads.items()})

    def architecture(self, head) -> str:
        return self.stem + (CLASS | self.classes)[head]

    def head_of(self, architecture: str | None):
        """The head of a class of transformers. One we do not know counts as the language model, where there is one."""
        found = [head for head in self.heads if self.architecture(head) == architecture]
        require(found or architecture is None or "lm" in self.heads, f"config: architectures = {architecture!r} is "
                f"not supported (supported: {', '.join(map(self.architecture, self.heads))}); name a head to open its "
                "body")
        return [*found, "lm" if "lm" in self.heads else None][0]


def same(names: str) -> dict:
    return {name: name for name in names.split()}


NEUTRAL = dict(qk_norm=None, **dict.fromkeys((  # where Config's default is an architecture or a size of its own
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")))
INERT = set("""
    adapters architectures attention_softmax_in_fp32 auto_map cache_implementation chunk_size_feed_forward dense_act_fn
    directionality dtype extra_pos_embeddings finetuning_task gradient_checkpointing id2label init_std
    initializer_factor initializer_range is_encoder_decoder is_gated_act is_llama_config label2id max_window_layers
    model_type n_ctx n_positions num_hidden_layers num_labels original_max_position_embeddings prefix pretraining_tp
    reorder_and_upcast_attn return_dict scale_attention_softmax_in_fp32 sep_token_id sinusoidal_pos_embds
    sliding_window_pattern task_specific_params tie_weights_ tokenizer_class torch_dtype transformers.js_config
    transformers_version unk_token_id unsloth_version use_cache
""".split())
INERT_STARTS, INERT_ENDS = ("_", "output_", "pooler_", "summary_"), ("dropout", "pdrop", "layerdrop")
FIELDS = same("""vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings
    hidden_act tie_word_embeddings attention_dropout bos_token_id eos_token_id pad_token_id problem_type""") | dict(
        id2label=("id2label", lambda names, raw: dict(sorted((int(i), str(name)) for i, name in names.items())),
                  lambda names, config: names and {str(i): name for i, name in names.items()}))
COMMON = FIELDS | same("num_key_value_heads head_dim rope_theta rope_scaling") | dict(norm_eps="rms_norm_eps")
BIASES = dict(attention_bias="attention_bias", attention_output_bias="attention_bias")


def table(prefix: str, layer: str, outside: dict, inside: dict) -> dict:
    """A tensor table: our modules outside of the layers and those inside -> theirs, after the prefixes. Several names
    are fused in ours."""
    rows = {ours: (prefix, theirs) for ours, theirs in outside.items()}
    rows |= {"layers.{}." + ours: (prefix + layer, theirs) for ours, theirs in inside.items()}
    return {ours: tuple((type(theirs) if isinstance(theirs, Name) else Name)(place + name) for name in theirs.split())
            for ours, (place, theirs) in rows.items()}


def llama_like(**inside) -> dict:
    """Llama's table, but for some modules inside of a layer."""
    return table("model.", "layers.{}.", {"embed": "embed_tokens", "norm": "norm"}, {
        "attention_norm": "input_layernorm",
        "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "attention.o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate_up": "mlp.gate_proj mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    } | inside)


LLAMA = llama_like()
SANDWICH = dict(attention_output_norm="post_attention_layernorm", mlp_output_norm="post_feedforward_layernorm")
GPT2 = table("transformer.", "h.{}.", {"embed": "wte", "position_embed": "wpe", "norm": "ln_f"}, {
    "attention_norm": "ln_1",
    "attention.qkv": Transposed("attn.c_attn"),
    "attention.o": Transposed("attn.c_proj"),
    "mlp_norm": "ln_2",
    "mlp.up": Transposed("mlp.c_fc"),
    "mlp.down": Transposed("mlp.c_proj"),
})
LM_ONLY = {"lm": DECODER_HEADS["lm"]}
LLAMA_DEFAULTS = dict(tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
QWEN_DEFAULTS = dict(tie_word_embeddings=False, max_position_embeddings=32768, sliding_window=4096,
                     use_sliding_window=False, max_window_layers=28)
GEMMA_DEFAULTS = dict(head_dim=256, pad_token_id=0, eos_token_id=1, bos_token_id=2)
GEMMA_FIXED = dict(norm_offset=1.0, scale_embedding=True)


def gemma(stem: str, fields: str, fixed: dict = {}, defaults: dict = {}, **rest) -> Family:
    """Gemma 2 and later."""
    return Family(
        stem, llama_like(mlp_norm="pre_feedforward_layernorm", **SANDWICH), COMMON | BIASES | same(
            "sliding_window layer_types query_pre_attn_scalar final_logit_softcapping " + fields) | dict(
                hidden_act="hidden_activation"),
        fixed=GEMMA_FIXED | dict(norm_position="sandwich") | fixed,
        defaults=GEMMA_DEFAULTS | dict(hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
                                       sliding_window=4096) | defaults,
        only=dict(hidden_act="gelu_pytorch_tanh"), **rest)


FAMILIES = {
    "qwen3": Family(
        "Qwen3", LLAMA, COMMON | BIASES | same("sliding_window layer_types"), fixed=dict(qk_norm="head"),
        defaults=QWEN_DEFAULTS | dict(head_dim=128)),
    "llama": Family(
        "Llama", LLAMA, COMMON | BIASES | same("mlp_bias"), defaults=LLAMA_DEFAULTS | dict(
            max_position_embeddings=2048)),
    "mistral": Family(
        "Mistral", LLAMA, COMMON | same("sliding_window"), defaults=LLAMA_DEFAULTS | dict(
            max_position_embeddings=131072, sliding_window=4096, num_key_value_heads=8)),
    "qwen2": Family(
        "Qwen2", LLAMA, COMMON | same("sliding_window layer_types"), defaults=QWEN_DEFAULTS,
        fixed=dict(attention_bias=True, attention_output_bias=False)),
    "gemma": Family(
        "Gemma", LLAMA, COMMON | BIASES | dict(hidden_act=(
            "hidden_act", lambda act, raw: "gelu_pytorch_tanh" if act == "gelu" else act, PLAIN)), fixed=GEMMA_FIXED,
        defaults=GEMMA_DEFAULTS | dict(hidden_act="gelu_pytorch_tanh", max_position_embeddings=8192),
        only=dict(hidden_activation="gelu_pytorch_tanh")),
    "gemma2": gemma(
        "Gemma2", "attn_logit_softcapping", defaults=dict(
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, max_position_embeddings=8192,
            sliding_window_pattern=2)),
    "gemma3_text": gemma(
        "Gemma3", "rope_local_base_freq", fixed=dict(qk_norm="head"), heads=LM_ONLY, defaults=dict(
            max_position_embeddings=131072, rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=6)),
    "gpt2": Family(
        "GPT2", GPT2, FIELDS | dict(
            hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
            intermediate_size="n_inner", norm_eps="layer_norm_epsilon", max_position_embeddings="n_positions",
            hidden_act="activation_function", attention_dropout="attn_pdrop", hidden_dropout="resid_pdrop",
            embedding_dropout="embd_pdrop"),
        prefix="transformer.", classes={"lm": "LMHeadModel"},
        fixed=dict(norm="layer", position="learned", gated=False, attention_bias=True, mlp_bias=True),
        defaults=dict(n_positions=1024, layer_norm_epsilon=1e-5, activation_function="gelu_new", attn_pdrop=0.1,
                      resid_pdrop=0.1, embd_pdrop=0.1, bos_token_id=50256, eos_token_id=50256),
        only=dict(scale_attn_weights=True), drop=("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias")),
    # Three more that need nothing new.
    "phi3": Family(
        "Phi3", llama_like(**{"attention.qkv": "self_attn.qkv_proj", "mlp.gate_up": "mlp.gate_up_proj"}),
        COMMON | same("sliding_window partial_rotary_factor") | dict(
            hidden_dropout="resid_pdrop", embedding_dropout="embd_pdrop"),
        defaults=LLAMA_DEFAULTS | dict(rms_norm_eps=1e-5, max_position_embeddings=4096, eos_token_id=32000,
                                       pad_token_id=32000), only=dict(rope_scaling=None)),
    "olmo2": Family(
        "Olmo2", llama_like(attention_norm="", mlp_norm="", **SANDWICH), COMMON | BIASES, LM_ONLY,
        fixed=dict(norm_position="output", qk_norm="full"), defaults=dict(
            rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=2048, eos_token_id=50279,
            pad_token_id=1)),
    "starcoder2": Family(
        "Starcoder2", llama_like(**{"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}),
        COMMON | same("sliding_window") | dict(
            norm_eps="norm_epsilon", attention_bias="use_bias", attention_output_bias="use_bias", mlp_bias="use_bias",
            hidden_dropout="residual_dropout"),
        fixed=dict(norm="layer", gated=False),
        defaults=dict(use_bias=True, norm_epsilon=1e-5, hidden_act="gelu_pytorch_tanh", num_key_value_heads=2,
                      max_position_embeddings=4096, bos_token_id=50256, eos_token_id=50256),
        only=dict(activation_function="gelu", layer_norm_epsilon=1e-5, mlp_type="default", norm_type="layer_norm",
                  scale_attn_weights=True)),
}

# Encoders: one body and five heads, under the names of each family.
ENCODER = dict(causal=False, norm="layer", norm_position="post", final_norm=False, embedding_norm=True,
               position="learned", gated=False, attention_bias=True, mlp_bias=True)
BERT = {
    "attention.qkv": "attention.self.query attention.self.key attention.self.value",
    "attention.o": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
DISTILBERT = {
    "attention.qkv": "attention.q_lin attention.k_lin attention.v_lin",
    "attention.o": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "mlp.up": "ffn.lin1",
    "mlp.down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}
BERT_FIELDS = FIELDS | dict(
    type_vocab_size="type_vocab_size", norm_eps="layer_norm_eps", attention_dropout="attention_probs_dropout_prob",
    hidden_dropout="hidden_dropout_prob", embedding_dropout="hidden_dropout_prob", head_dropout="classifier_dropout")
BERT_DEFAULTS = dict(hidden_act="gelu", max_position_embeddings=512, type_vocab_size=2, pad_token_id=0,
                     layer_norm_eps=1e-12, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
TIED = dict(tie_word_embeddings=True)


def dense_head(act, dense: str, out: str, norm: str = "", bias: str = "") -> tuple:
    """A head that has a dense layer, an activation and (masked language models) a norm before its output."""
    rows = {"head.dense": dense, "head.norm": norm, "head.out": out, "head.out.bias": bias}
    return {ours: theirs for ours, theirs in rows.items() if theirs}, dict(head_act=act, head_norm=bool(norm))


def encoder(stem: str, prefix: str, fields: dict, mlm: tuple, classify: tuple, bare: tuple = ({}, {}), inside=BERT,
            layer="encoder.layer.{}.", fixed: dict = {}, drop: tuple = (), only: dict = {}, **rest) -> Family:
    heads = {None: bare, "mlm": mlm, "classify": classify, "tokens": ({"head.out": "classifier"}, {}),
             "qa": ({"head.out": "qa_outputs"}, {})}
    outside = dict(
        embed="embeddings.word_embeddings", position_embed="embeddings.position_embeddings",
        type_embed="embeddings.token_type_embeddings", embedding_norm="embeddings.LayerNorm",
        embedding_project="embeddings_project")
    return Family(
        stem, table(prefix, layer, outside, inside), fields,
        {head: (rows, dict(head_bias=head is not None) | more) for head, (rows, more) in heads.items()}, prefix,
        fixed=ENCODER | fixed, only=dict(position_embedding_type="absolute") | only,
        drop=(prefix + "embeddings.position_ids", *drop), **rest)


def roberta(stem: str) -> Family:
    """Its table of positions begins with unused rows, up to that of the pad id."""
    return encoder(
        stem, "roberta.", BERT_FIELDS | dict(max_position_embeddings=(
            "max_position_embeddings", lambda n, raw: n - raw["pad_token_id"] - 1,
            lambda n, config: n + config.position_offset)),
        dense_head("gelu", "lm_head.dense", "lm_head.decoder", "lm_head.layer_norm", "lm_head.bias"),
        dense_head("tanh", "classifier.dense", "classifier.out_proj"),
        ({"head.dense": Unused("roberta.pooler.dense")}, dict(head_act="tanh")),
        fixed=dict(position_offset=lambda raw: raw["pad_token_id"] + 1),
        defaults=BERT_DEFAULTS | dict(pad_token_id=1, bos_token_id=0, eos_token_id=2),
        copies={"lm_head.decoder.bias": "head.out.bias"}, only=TIED)


FAMILIES |= {
    "bert": encoder(
        "Bert", "bert.", BERT_FIELDS,
        dense_head(lambda raw: raw["hidden_act"], "cls.predictions.transform.dense", "cls.predictions.decoder",
                   "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
        dense_head("tanh", "bert.pooler.dense", "classifier"),
        ({"head.dense": Unused("bert.pooler.dense")}, dict(head_act="tanh")),
        defaults=BERT_DEFAULTS, copies={"cls.predictions.decoder.bias": "head.out.bias"}, only=TIED,
        drop=("cls.seq_relationship.weight", "cls.seq_relationship.bias")),
    "roberta": roberta("Roberta"),
    "xlm-roberta": roberta("XLMRoberta"),
    "distilbert": encoder(
        "DistilBert", "distilbert.", FIELDS | dict(
            hidden_size="dim", num_hidden_layers="n_layers", num_attention_heads="n_heads",
            intermediate_size="hidden_dim", hidden_act="activation", hidden_dropout="dropout",
            embedding_dropout="dropout", head_dropout="seq_classif_dropout"),
        dense_head(lambda raw: raw["activation"], "vocab_transform", "vocab_projector", "vocab_layer_norm"),
        dense_head("relu", "pre_classifier", "classifier"), inside=DISTILBERT, layer="transformer.layer.{}.",
        fixed=dict(norm_eps=1e-12),
        defaults=dict(activation="gelu", max_position_embeddings=512, pad_token_id=0, dropout=0.1,
                      attention_dropout=0.1, seq_classif_dropout=0.2)),
    "electra": encoder(
        "Electra", "electra.", BERT_FIELDS | same("embedding_size"),
        dense_head("gelu", "generator_predictions.dense", "generator_lm_head", "generator_predictions.LayerNorm"),
        dense_head("gelu", "classifier.dense", "classifier.out_proj"), defaults=BERT_DEFAULTS | dict(
            embedding_size=128),
        drop=tuple(f"discriminator_predictions.{name}.{kind}" for name in ("dense", "dense_prediction")
                   for kind in ("weight", "bias"))),
}


# Encoder-decoders.
T5_ACTIVATIONS = {gate + name: name for gate in ("", "gated-") for name in ACTIVATIONS} | {"gated-gelu": "gelu_new"}


def t5_mlp(_, config: Config) -> str:
    """The feed_forward_proj of a config."""
    return "gated-" * config.gated + ("gelu" if config.gated and config.hidden_act == "gelu_new" else config.hidden_act)


def two_stacks(embed: str, encoder: dict, decoder: dict) -> dict:
    return {"embed": (Name(embed),)} | {"encoder." + ours: theirs for ours, theirs in encoder.items()} | decoder


def bart_stack(prefix: str) -> dict:
    return table(prefix, "layers.{}.", {
        "position_embed": "embed_positions", "embedding_norm": "layernorm_embedding", "norm": "layer_norm"}, {
        "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attention.o": "self_attn.out_proj",
        "attention_norm": "self_attn_layer_norm",
        "cross_attention.q": "encoder_attn.q_proj",
        "cross_attention.kv": "encoder_attn.k_proj encoder_attn.v_proj",
        "cross_attention.o": "encoder_attn.out_proj",
        "cross_attention_norm": "encoder_attn_layer_norm",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
        "mlp_norm": "final_layer_norm",
    })


def t5_stack(prefix: str, mlp: int) -> dict:
    return table(prefix, "block.{}.layer.", {
        "relative_bias": "block.0.layer.0.SelfAttention.relative_attention_bias", "norm": "final_layer_norm"}, {
        "attention.qkv": "0.SelfAttention.q 0.SelfAttention.k 0.SelfAttention.v",
        "attention.o": "0.SelfAttention.o",
        "attention_norm": "0.layer_norm",
        "cross_attention.q": "1.EncDecAttention.q",
        "cross_attention.kv": "1.EncDecAttention.k 1.EncDecAttention.v",
        "cross_attention.o": "1.EncDecAttention.o",
        "cross_attention_norm": "1.layer_norm",
        "mlp.up": f"{mlp}.DenseReluDense.wi",
        "mlp.gate_up": f"{mlp}.DenseReluDense.wi_0 {mlp}.DenseReluDense.wi_1",
        "mlp.down": f"{mlp}.DenseReluDense.wo",
        "mlp_norm": f"{mlp}.layer_norm",
    })


def bart_like(stem: str, end="ForConditionalGeneration", fixed: dict = {}, defaults: dict = {}, **rest) -> Family:
    return Family(
        stem, two_stacks("model.shared", bart_stack("model.encoder."), bart_stack("model.decoder.")),
        FIELDS | same("scale_embedding decoder_start_token_id encoder_attention_heads") | dict(
            hidden_size="d_model", num_hidden_layers="decoder_layers", num_encoder_layers="encoder_layers",
            num_attention_heads="decoder_attention_heads", intermediate_size="decoder_ffn_dim",
            encoder_intermediate_size="encoder_ffn_dim", hidden_act="activation_function", hidden_dropout="dropout",
            embedding_dropout="dropout"),
        {"lm": ({"head.out": "lm_head", "head.out.bias": Row("final_logits_bias")}, {})},
        fixed=ENCODER | dict(causal=True, norm_eps=1e-5, head_bias=True, position_offset=2) | fixed,
        defaults=dict(activation_function="gelu", dropout=0.1, pad_token_id=1, bos_token_id=0, eos_token_id=2)
        | defaults, classes={"lm": end}, copies=dict.fromkeys(
            [f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")], "embed.weight"), **rest)


FAMILIES |= {
    "bart": bart_like(
        "Bart", defaults=dict(decoder_start_token_id=2, forced_eos_token_id=2), only=dict(normalize_embedding=True)),
    "mbart": bart_like(
        "MBart", fixed=dict(norm_position="pre", final_norm=True), defaults=dict(forced_eos_token_id=2),
        only=dict(normalize_embedding=True, normalize_before=True, add_final_layer_norm=True)),
    "marian": bart_like(
        "Marian", "MTModel", fixed=dict(position="sinusoidal", embedding_norm=False, position_offset=0),
        defaults=dict(pad_token_id=58100, decoder_start_token_id=58100, eos_token_id=0, forced_eos_token_id=0,
                      bos_token_id=None),
        only=dict(share_encoder_decoder_embeddings=True, static_position_embeddings=True,
                  decoder_vocab_size=lambda raw: raw["vocab_size"]),
        drop=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")),
    "t5": Family(
        "T5", two_stacks("shared", t5_stack("encoder.", 1), t5_stack("decoder.", 2)),
        FIELDS | same("decoder_start_token_id relative_attention_num_buckets relative_attention_max_distance") | dict(
            hidden_size="d_model", head_dim="d_kv", intermediate_size="d_ff", num_encoder_layers="num_layers",
            num_hidden_layers="num_decoder_layers", num_attention_heads="num_heads", norm_eps="layer_norm_epsilon",
            head_dropout="dropout_rate", hidden_dropout="dropout_rate", embedding_dropout="dropout_rate",
            attention_dropout="dropout_rate",
            scale_logits="scale_decoder_outputs",
            gated=("feed_forward_proj", lambda name, raw: name.startswith("gated-"), t5_mlp),
            hidden_act=("feed_forward_proj", lambda name, raw: T5_ACTIVATIONS.get(name, name), t5_mlp)),
        LM_ONLY, "", fixed=dict(position="relative", query_pre_attn_scalar=1),
        defaults=dict(num_decoder_layers=lambda raw: raw.get("num_layers"), d_kv=64, feed_forward_proj="relu",
                      dropout_rate=0.1, pad_token_id=0, eos_token_id=1,
                      scale_decoder_outputs=lambda raw: raw.get("tie_word_embeddings") is not False),
        copies=dict.fromkeys(["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], "embed.weight"),
        unstored_head_is_tied=True, classes={"lm": "ForConditionalGeneration"},
        drop=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)),
}
# What no other family can express (an architecture changed on the fly) keeps our own names; only tinylm loads it.
FAMILIES["tinylm"] = Family("TinyLM", {}, {f.name: f.name for f in fields(Config) if f.name != "model_type"} | dict(
    id2label=FIELDS["id2label"]), dict.fromkeys(CLASS, ({}, {})), "", classes=dict.fromkeys(CLASS, ""))


def settings(row: Family, raw: dict, source: str) -> dict:
    """A config.json with the family's defaults, in today's words, and nothing in it that is not supported."""
    raw = flat_rope(raw, source)
    for key, value in row.defaults.items():
        raw.setdefault(key, value(raw) if callable(value) else value)
    if raw.get("use_sliding_window") is False:
        raw["sliding_window"] = None
    layers, window = raw.get("num_hidden_layers"), raw.get("sliding_window")
    if None not in (layers, window) and raw.get("layer_types") is None and "layer_types" in row.fields:
        period = raw.get("_sliding_window_pattern", raw.get("sliding_window_pattern"))
        first = raw.get("max_window_layers") or 0
        raw["layer_types"] = [LAYER_TYPES[i >= first and not (period and (i + 1) % period == 0)]
                              for i in range(min(layers, 9999))]
    if number(raw.get("num_labels"), 1, 2**16, int) and not raw.get("id2label"):
        raw["id2label"] = {i: f"LABEL_{i}" for i in range(raw["num_labels"])}
    known = INERT | GENERATION | {*row.only, *row.defaults, *(key for key, _, _ in row.fields.values())}
    for key, value in raw.items():
        only = row.only.get(key)
        only = only(raw) if callable(only) else only
        require(key not in row.only or value in (None, only), f"{source}: {key} = {value!r} is not supported "
                f"(supported: {only!r})")
        inert = key in known or key.startswith(INERT_STARTS) or key.endswith(INERT_ENDS)
        require(inert or value in (None, False, [], {}, ""), f"{source}: {key} = "
                f"{value!r} is not supported; remove the field if it does not change what the model computes")
    return raw


def flat_rope(raw: dict, source: str) -> dict:
    """transformers 5 nests `rope_parameters`, per layer type where these differ; take it back to the flat names."""
    raw = dict(raw)
    rope = raw.pop("rope_parameters", None) or {}
    full, local = (dict(rope.get(kind) or {}) for kind in LAYER_TYPES) if set(rope) & set(LAYER_TYPES) else (rope, {})
    if local:
        raw["rope_local_base_freq"] = local.pop("rope_theta", None)
        require(local in ({}, {"rope_type": "default"}), f"{source}: rope_parameters of sliding_attention = {local} is "
                "not supported (supported: rope_type 'default')")
    if full:
        own = ("rope_theta", "partial_rotary_factor")
        raw |= {key: full[key] for key in own if key in full}
        raw["rope_scaling"] = {key: value for key, value in full.items() if key not in own}
    if isinstance(scaling := raw.get("rope_scaling"), dict):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        rest = {key: value for key, value in scaling.items() if key != "type"}
        raw["rope_scaling"] = None if kind == "default" else rest | {"rope_type": kind}
    return raw


def config_from_hf(raw: dict, source: str = "config.json", head="config") -> Config:
    """The Config that a `config.json` describes, in the dialect of transformers 4 or 5, with the head of its
    `architectures` or another one.

    Raises Error for an unknown model_type, and for any field that would change what the model computes and that this
    file does not support.
    """
    name, key = raw.get("model_type"), "rope_parameters"
    require(name in [*FAMILIES], f"{source}: model_type = {name!r} is not supported (supported: {', '.join(FAMILIES)})")
    row = FAMILIES[name]
    try:
        if head == "config":
            head = raw.get("head", "lm") if name == "tinylm" else row.head_of((raw.get("architectures") or [None])[0])
        require(head in row.heads, f"{source}: head = {head!r} is not supported for {name} (supported: "
                f"{', '.join(map(str, row.heads))})")
        raw, values = settings(row, raw, f"{source}, model_type {name}"), NEUTRAL | dict(head=head)
        for ours, (key, read, _) in row.fields.items():
            if raw.get(key) is not None:
                values[ours] = read(raw[key], raw)
        for ours, value in (row.fixed | row.heads[head][1] | dict(head=head)).items():
            values[ours] = value(raw) if callable(value) else value
        return Config(**values, model_type=name)
    except Error as error:  # where it names our field, name theirs
        ours, _, rest = str(error).removeprefix("config: ").partition(" ")
        ours = row.fields.get(ours, (ours,))[0]
        raise error if str(error).startswith(source) else Error(f"{source}: {ours} {rest}") from None
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise Error(f"{source}: {key} = {raw.get(key)!r}, or a field like it, has a value of the wrong kind ({error})"
                    ) from None


def config_to_hf(config: Config) -> dict:
    """The `config.json` of a config, in the flat dialect that transformers 4 and 5 both read.

    Without a `model_type` it is the first family that can express it. Raises Error where the named family cannot.
    """
    unwritten = {"model_type", "hidden_dropout", "embedding_dropout", "head_dropout", "initializer_range"}
    for name in [config.model_type] if config.model_type else FAMILIES:
        row = FAMILIES[name]
        raw = {"architectures": [row.architecture(config.head)], "model_type": name,
               "initializer_range": config.initializer_range}
        raw |= {key: write(getattr(config, ours), config) for ours, (key, _, write) in row.fields.items()}
        if raw.get("id2label"):
            raw["label2id"] = {label: int(i) for i, label in raw["id2label"].items()}
        if "use_sliding_window" in row.defaults:
            raw["use_sliding_window"] = config.sliding_window is not None
        if config.num_encoder_layers:
            raw["is_encoder_decoder"] = True
        try:  # written right is what reads back as the same
            back = config_from_hf(raw, "config", config.head)
            lost = [f"{f.name} = {getattr(config, f.name)!r}" for f in fields(Config)
                    if f.name not in unwritten and getattr(back, f.name) != getattr(config, f.name)]
            require(not lost, f"config: {', '.join(lost)}")
            return raw
        except Error as error:
            reason = error
    raise Error(f"{reason} cannot be written as model_type {name!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------

def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 (Zhang & Sennrich 2019)."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias. A single row on a CPU only waits for memory, and there the compiler's fused sum streams the
    weights up to twice as fast as the library's matrix product does."""
    if torch.compiler.is_dynamo_compiling() and x.device.type == "cpu" and x.shape[:-1].numel() == 1:
        row = x.reshape(-1).as_strided((x.shape[-1],), (1,))  # in memory: else what made it runs again in every sum
        y = (row * weight).sum(-1).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Rotary positions (Su et al. 2021): turn the pairs (i, i + r/2) of each head's first r channels, pass the others.

    x (batch, seq, heads * head_dim); cos, sin (batch, seq, r / 2).
    """
    half, x = cos.shape[-1], rearrange(x, "b s (h d) -> b s h d", d=head_dim)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    x1, x2, rest = x.split((half, half, head_dim - 2 * half), dim=-1)  # whose gradient is one concatenation
    turned = torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin), rest
    return rearrange(torch.cat(turned, dim=-1), "b s h d -> b s (h d)")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, head_dim: int, scale: float,
           softcap: float | None = None, dropout: float = 0.0, cache=None, layer: int = 0,
           causal: bool = True) -> Tensor:
    """softmax(q k^T scale) v with grouped queries, (batch, seq, heads * head_dim); scores are soft-capped where
    `softcap` is given (Gemma 2).

    q (batch, seq, heads * head_dim); k, v (batch, keys, kv_heads * head_dim), which join those of the layer in the
    cache; mask (batch, 1, seq, keys), True where attention is allowed, or (batch, heads, seq, keys) to be added to the
    scores, or None for the causal square or for all keys, which lets the flash kernels in.
    """
    q, k, v = (rearrange(x, "b s (h d) -> b h s d", d=head_dim) for x in (q, k, v))
    if cache is not None:
        k, v = cache.update(layer, k, v)
    groups, s = q.shape[1] // k.shape[1], q.shape[2]
    if softcap is not None:
        if mask is None and causal:
            mask = torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        x = F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout) @ v
    elif mask is None:
        x = F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=scale, enable_gqa=groups > 1)
    else:  # queries that share a key head stand below each other, so that keys are read once and not expanded
        q = rearrange(q, "b (g r) s d -> b g (r s) d", r=groups)
        mask = mask.expand(-1, -1, s, -1).repeat(1, 1, groups, 1) if min(groups, s) > 1 else mask
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        x = rearrange(x, "b g (r s) d -> b (g r) s d", s=s)
    return rearrange(x, "b h s d -> b s (h d)")


class Linear(nn.Linear):
    """nn.Linear through the leaf `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """Root-mean-square norm, or layer norm where the config says so, over the last axis, or each `size` of it."""

    def __init__(self, config: Config, size: int):
        super().__init__()
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != len(self.weight):  # heads side by side
            return self(x.unflatten(-1, (-1, len(self.weight)))).flatten(-2)
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return rms_norm(x, self.weight.float() + self.offset if self.offset else self.weight, self.eps)


class Rotary(nn.Module):
    """Angles of positions (batch, seq): their cos and sin, each (batch, seq, dim / 2).

    Scalings: linear (kaiokendev 2023), dynamic (NTK-aware, per row: its own length stretches its base), llama3
    (Llama 3.1) and yarn (Peng et al. 2023).
    """

    def __init__(self, dim: int, theta: float, limit: int, scaling: dict | None = None):
        super().__init__()
        scaling = scaling or {"rope_type": "default"}
        self.kind, self.dim, self.theta, self.limit = scaling["rope_type"], dim, theta, limit
        self.factor, self.magnitude = scaling.get("factor", 1.0), 1.0
        original = scaling.get("original_max_position_embeddings") or limit
        # Explicitly on the CPU: a model is made on the meta device before its weights are read.
        inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        if self.kind == "linear":
            inv_freq = inv_freq / self.factor
        elif self.kind == "llama3":  # long waves are stretched, short ones kept, those between blended
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            keep = ((original * inv_freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            inv_freq = keep * inv_freq + (1 - keep) * inv_freq / self.factor
        elif self.kind == "yarn":
            inv_freq = self._yarn(inv_freq, scaling, original)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _yarn(self, inv_freq: Tensor, scaling: dict, original: int) -> Tensor:
        def channel(rotations):  # the channel that turns so often within the original length
            return self.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        def magnitude(weight):
            return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        low, high = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        stretch = ((torch.arange(self.dim // 2, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)
        m, m_all, given = (scaling.get(key) for key in ("mscale", "mscale_all_dim", "attention_factor"))
        said = magnitude(m) / magnitude(m_all) if m and m_all else magnitude(1)
        self.magnitude = said if given is None else given
        return stretch * inv_freq / self.factor + (1 - stretch) * inv_freq

    def _apply(self, fn, recurse=True):
        """Moves with the model, but is never rounded to its dtype."""
        self.inv_freq = self.inv_freq.to(fn(self.inv_freq).device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq
        if self.kind == "dynamic":
            length = (positions.amax(-1, keepdim=True) + 1).clamp(min=self.limit)
            stretch = (self.factor * length / self.limit - (self.factor - 1)) ** (self.dim / (self.dim - 2))
            exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device=positions.device) / self.dim
            inv_freq = 1.0 / (self.theta * stretch) ** exponent
        angles = positions[..., None].float() * inv_freq[..., None, :]
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude


class Attention(nn.Module):
    """Grouped-query attention: to the sequence itself by one fused query-key-value projection, or across to another,
    whose keys and values are made once."""

    def __init__(self, config: Config, cross: bool = False):
        super().__init__()
        self.sizes, self.head_dim, self.causal = config.qkv_sizes, config.head_dim, config.causal and not cross
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap, self.dropout = config.attn_logit_softcapping, config.attention_dropout
        project = lambda *sizes: Linear(config.hidden_size, sum(sizes), bias=config.attention_bias)  # noqa: E731
        if cross:
            self.q, self.kv = project(self.sizes[0]), project(*self.sizes[1:])
        else:
            self.qkv = project(*self.sizes)
        self.o = Linear(self.sizes[0], config.hidden_size, bias=config.attention_output_bias)
        over = {None: (0, 0), "head": (self.head_dim,) * 2, "full": self.sizes[:2]}[config.qk_norm]
        self.q_norm, self.k_norm = (Norm(config, width) if width else nn.Identity() for width in over)

    def forward(self, x: Tensor, rope: tuple | None, mask: Tensor | None, cache=None, layer: int = 0,
                keys_values: tuple | None = None) -> Tensor:
        if keys_values is None:
            q, k, v = self.qkv(x).split(self.sizes, dim=-1)
            q, k = self.q_norm(q), self.k_norm(k)
        else:
            q, (k, v) = self.q_norm(self.q(x)), keys_values
        if rope is not None:
            q, k = (rotate(x, *rope, self.head_dim) for x in (q, k))
        return self.o(attend(q, k, v, mask, self.head_dim, self.scale, self.softcap,
                             self.dropout if self.training else 0.0, cache, layer, self.causal))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(x).split(self.sizes[1:], dim=-1)
        return self.k_norm(k), v


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up fused (Shazeer 2020), or the plain down(act(up(x)))."""

    def __init__(self, config: Config):
        super().__init__()
        self.act, bias = ACTIVATIONS[config.hidden_act], config.mlp_bias
        self.gated = config.gated
        if self.gated:
            self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        else:
            self.up = Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(self.act(gate) * up)
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Attention, attention across (in a decoder behind an encoder) and MLP, each added to the residual stream and
    normed before (pre), after (output), both (sandwich) or after the sum (post)."""

    def __init__(self, config: Config):
        super().__init__()
        before, after = config.norm_position != "output", config.norm_position in ("output", "sandwich")
        norm = lambda there: Norm(config, config.hidden_size) if there else nn.Identity()  # noqa: E731
        self.post = config.norm_position == "post"
        self.attention_norm, self.attention_output_norm = norm(before), norm(after)
        self.attention = Attention(config)
        self.cross_attention = Attention(config, cross=True) if config.num_encoder_layers else None
        if self.cross_attention is not None:
            self.cross_attention_norm, self.cross_attention_output_norm = norm(before), norm(after)
        self.mlp_norm, self.mlp_output_norm = norm(before), norm(after)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, rope: tuple | None, mask: Tensor | None, cache=None, layer: int = 0,
                context: tuple | None = None) -> Tensor:
        """x (batch, seq, hidden); `context`: of each layer the keys and values of a source, and the mask of that."""
        x = self.add(x, self.attention, self.attention_norm, self.attention_output_norm, rope, mask, cache, layer)
        if context is not None:
            keys_values, real = context
            x = self.add(x, self.cross_attention, self.cross_attention_norm, self.cross_attention_output_norm,
                         None, real, None, layer, keys_values[layer])
        return self.add(x, self.mlp, self.mlp_norm, self.mlp_output_norm)

    def add(self, x: Tensor, sublayer, norm: nn.Module, output_norm: nn.Module, *arguments) -> Tensor:
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


def visible(positions: Tensor, key_positions: Tensor, window: int | None = None, causal: bool = True) -> Tensor:
    """The attention mask (batch, 1, seq, keys) of query and key positions, True where a query may look."""
    if not causal:
        return (key_positions < NEVER)[:, None, None, :]
    distance = positions[:, None, :, None] - key_positions[:, None, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def last_column(mask: Tensor) -> Tensor:
    """The column (batch, 1) of the last real token. In floats, which ONNX Runtime's CUDA kernel takes."""
    return (mask.float() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1, keepdim=True)


def pooled_column(input_ids: Tensor, mask: Tensor | None, config: Config) -> Tensor:
    """The column (batch, 1) whose state stands for the text: the first real token's in an encoder, else the last's. As
    transformers has it, the latter is no pad id, whatever the mask says of it."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    pad = -1 if config.pad_token_id is None else config.pad_token_id
    return last_column(real & (input_ids != pad)) if config.causal else real.float().argmax(-1, keepdim=True)


class KVCache:
    """Keys and values of every layer, (batch, kv_heads, length, head_dim), allocated once and written in place.

    All rows write the same columns, each at positions of its own, so that prompts padded on either side batch as they
    are. The write position is a tensor: a compiled decode step keeps one shape, and nothing waits for the device.
    """

    def __init__(self, config: Config, batch: int, length: int, dtype=torch.float32, device=None):
        self.size, shape = (batch, length, dtype, device), (batch, config.num_key_value_heads, length, config.head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.key_positions = torch.full((batch, length), NEVER, device=device)
        self.lengths = torch.zeros((batch, 1), dtype=torch.long, device=device)  # real tokens of each row
        self.columns = torch.zeros(0, dtype=torch.long, device=device)           # written by the current call
        self.written = torch.zeros(1, dtype=torch.long, device=device)           # columns used so far

    def reset(self):
        self.key_positions.fill_(NEVER), self.lengths.zero_(), self.written.zero_()
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
        return self.k[layer].index_copy_(2, self.columns, k), self.v[layer].index_copy_(2, self.columns, v)

    def reorder(self, rows: Tensor):
        """Row i goes on from what row rows[i] held (beam search)."""
        columns = int(self.written)
        for held in (*self.k, *self.v):
            held[:, :, :columns] = held[rows, :, :columns]
        self.key_positions[:], self.lengths[:] = self.key_positions[rows], self.lengths[rows]


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

class Stack(nn.Module):
    """An encoder or a decoder: what is added to word embeddings, the blocks, the final norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, width = config, config.embedding_size
        if config.position == "learned":
            self.position_embed = nn.Embedding(config.max_position_embeddings + config.position_offset, width)
        elif config.position == "relative":
            self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_attention_heads)
        else:
            dim, limit = config.rotary_dim if config.position == "rope" else width, config.max_position_embeddings
            self.rotary = nn.ModuleDict({"full_attention": Rotary(dim, config.rope_theta, limit, config.rope_scaling)})
            if config.rope_local_base_freq is not None:
                self.rotary["sliding_attention"] = Rotary(dim, config.rope_local_base_freq, limit)
        self.type_embed = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.embedding_norm = Norm(config, width) if config.embedding_norm else nn.Identity()
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.embedding_project = Linear(width, config.hidden_size) if width != config.hidden_size else nn.Identity()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config, config.hidden_size) if config.final_norm else nn.Identity()

    def states(self, x: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, cache=None,
               context: tuple | None = None) -> Tensor:
        """Hidden states (batch, seq, hidden) of word embeddings x (batch, seq, embedding_size)."""
        config, seq = self.config, x.shape[1]
        real = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if attention_mask is None else attention_mask
        if cache is not None:
            positions, keys = cache.extend(real)
        else:  # rows without padding share their positions
            positions, keys = count_positions(real[:1] if attention_mask is None else real)
        masks, ropes = {}, {}
        for kind in dict.fromkeys(config.layer_types):
            window = config.sliding_window if kind == "sliding_attention" else None
            plain = cache is None and attention_mask is None and (window is None or config.causal and seq <= window)
            if config.position == "relative":
                masks[kind] = self.relative_mask(positions, keys, window, x.dtype)
            else:
                masks[kind] = None if plain else visible(positions, keys, window, config.causal)
            if config.position == "rope":
                ropes[kind] = self.rotary[kind if kind in self.rotary else "full_attention"](positions)
        if config.scale_embedding:
            x = x * x.new_full((), config.hidden_size ** 0.5)  # rounded to the dtype, as the reference rounds it
        if config.position == "learned":
            x = x + self.position_embed(positions + config.position_offset)
        if config.position == "sinusoidal":  # sines, then cosines, in the order of Marian
            x = x + torch.cat(self.rotary["full_attention"](positions)[::-1], dim=-1)[..., :x.shape[-1]].to(x.dtype)
        if self.type_embed is not None:
            x = x + self.type_embed(torch.zeros_like(positions) if token_type_ids is None else token_type_ids)
        x = self.embedding_project(self.embedding_dropout(self.embedding_norm(x)))
        for layer, (block, kind) in enumerate(zip(self.layers, config.layer_types)):
            x = block(x, ropes.get(kind), masks[kind], cache, layer, context)
        return self.norm(x)

    def relative_mask(self, positions: Tensor, keys: Tensor, window: int | None, dtype) -> Tensor:
        """What is added to the scores, (batch, heads, seq, keys): little where masked, else the bias of the distance,
        which T5 sorts into buckets, the near ones one by one, the far ones by the logarithm."""
        config, distance = self.config, keys[:, None, :] - positions[:, :, None]
        buckets = config.relative_attention_num_buckets // (1 if config.causal else 2)
        near, steps = buckets // 2, -distance.clamp(max=0) if config.causal else distance.abs()
        scale = (buckets - near) / math.log(config.relative_attention_max_distance / near)
        far = near + ((steps.float() / near).clamp(min=1).log() * scale).long()
        bucket = torch.where(steps < near, steps, far.clamp(max=buckets - 1))
        bias = self.relative_bias(bucket if config.causal else bucket + buckets * (distance > 0)).to(dtype)
        mask = visible(positions, keys, window, config.causal)
        return rearrange(bias, "b s t h -> b h s t").masked_fill(~mask, torch.finfo(dtype).min)


class Head(nn.Module):
    """What the model is for, read off its hidden states: a dense layer, an activation and a norm where the config has
    them, then one output per word or class."""

    def __init__(self, config: Config):
        super().__init__()
        self.act, width = ACTIVATIONS.get(config.head_act), config.hidden_size
        if config.head_act:
            inner = config.embedding_size if config.head == "mlm" else width
            self.dense, width = Linear(width, inner), inner
        self.norm = Norm(config, width) if config.head_norm else nn.Identity()
        usual = config.hidden_dropout if config.head in ("classify", "tokens") and not config.causal else 0.0
        self.dropout = nn.Dropout(usual if config.head_dropout is None else config.head_dropout)
        self.bare = not config.outputs
        if not self.bare:
            self.out = Linear(width, config.outputs, bias=config.head_bias)
            if config.tied:
                self.out.register_parameter("weight", None)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Outputs (..., outputs) of hidden states (..., hidden); a tied head's weight is the `embedding`."""
        if self.bare:  # hidden states as they are; a pooler only travels along
            return x
        if self.act is not None:
            x = self.norm(self.act(self.dense(x)))
        return linear(self.dropout(x), embedding if self.out.weight is None else self.out.weight, self.out.bias)


class TinyLM(Stack):
    """A language model: a decoder, an encoder, or both, and a head."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.tokenizer, self.generation_config, self._compiled, self._idle = None, {}, None, None
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
        if isinstance(module, Block):  # what is added to the residual stream shrinks with its depth (GPT-2)
            for out in (module.attention.o, module.mlp.down):
                nn.init.normal_(out.weight, std=std / math.sqrt(2 * self.config.num_hidden_layers))

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def dtype(self):
        return self.embed.weight.dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
                decoder_input_ids: Tensor | None = None, *, cache=None, context: tuple | None = None,
                columns: Tensor | None = None) -> Tensor:
        """What the head says, one tensor: of a language model, masked or not, logits (batch, seq, vocab); of a
        classifier (batch, labels), of tokens (batch, seq, labels); start and end logits of an answer (batch, seq, 2);
        of a model without a head its hidden states (batch, seq, hidden).

        input_ids (batch, seq); attention_mask (batch, seq), 1 for a token and 0 for padding on either side;
        decoder_input_ids (batch, target) behind an encoder; a cache (its own columns only) if the ids continue what it
        holds; context, what `encode` gave, if the ids are the decoder's; columns (batch, n) to get logits (batch, n,
        vocab) of those columns alone.
        """
        if self.encoder is not None and context is None:
            require(decoder_input_ids is not None, "decoder_input_ids = None, expected ids (batch, target)")
            require(len(decoder_input_ids) == len(input_ids), f"decoder_input_ids: {len(decoder_input_ids)} rows, "
                    f"expected the {len(input_ids)} of input_ids")
            context = self.encode(input_ids, attention_mask)
            input_ids, attention_mask, decoder_input_ids = decoder_input_ids, None, None
        require(decoder_input_ids is None, "decoder_input_ids: the model has no encoder")
        name = "input_ids" if context is None else "decoder_input_ids"
        self._fits(input_ids, attention_mask, token_type_ids, cache, name)
        x = self.states(self.embed(input_ids), attention_mask, token_type_ids, cache, context)
        if self.config.head == "classify":
            columns = pooled_column(input_ids, attention_mask, self.config)
        if columns is not None:
            x = x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))
        if self.config.scale_logits:
            x = x * self.config.hidden_size ** -0.5
        logits = self.head(x, self.embed.weight)
        if self.config.final_logit_softcapping is not None and self.config.head == "lm":
            logits = self.config.final_logit_softcapping * torch.tanh(logits / self.config.final_logit_softcapping)
        return logits[:, 0] if self.config.head == "classify" else logits

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple:
        """What a decoder needs of a source (batch, seq): keys and values for each of its layers, and their mask."""
        self._fits(input_ids, attention_mask)
        states = self.encoder.states(self.embed(input_ids), attention_mask)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        return [block.cross_attention.keys_values(states) for block in self.layers], mask

    def _fits(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
              cache=None, name: str = "input_ids"):
        """Refuse what the model cannot read."""
        config, shape = self.config, tuple(input_ids.shape)
        for what, ids, limit in ((name, input_ids, config.vocab_size), ("token_type_ids", token_type_ids,
                                                                        config.type_vocab_size)):
            if ids is None:
                continue
            require(limit, f"{what}: the model has no token types")
            require(len(shape) == 2 and shape[1] and tuple(ids.shape) == shape and not ids.is_floating_point(),
                    f"{what}: {ids.dtype} of shape {tuple(ids.shape)}, expected ids (batch, seq), all of one shape")
            if ids.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would wait
                require(0 <= ids.min() and ids.max() < limit, f"{what}: ids {int(ids.min())} to {int(ids.max())}, "
                        f"expected 0 to {limit - 1}")
        require(config.position not in LIMITED or cache is not None or shape[1] <= config.max_position_embeddings,
                f"{name}: {shape[1]} tokens, but the model has only {config.max_position_embeddings} positions")
        require(attention_mask is None or cache is not None or tuple(attention_mask.shape) == shape,
                f"attention_mask: shape {attention_mask is None or tuple(attention_mask.shape)}, expected {shape}")

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype | None = None, device=None, head="config", **changes) -> TinyLM:
        """The model in a checkpoint folder, in eval mode: config.json, model.safetensors (or its sharded index) and
        tokenizer.json where there is one. dtype None keeps the stored one.

        `head` swaps the head (a key of the family's heads): of the new one, what the checkpoint has is loaded, and the
        rest begins at random; `changes` are of Config fields. Raises Error where the folder lacks a file or a tensor,
        has one too many or of a wrong shape, or where config.json asks for something unsupported.
        """
        folder, device = Path(folder), usable_device(device or "cpu")
        require(dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point,
                f"dtype = {dtype!r}, expected a floating-point torch.dtype")
        raw, source = read_json(folder / "config.json"), str(folder / "config.json")
        checkpoint = Checkpoint(folder, replace(config_from_hf(raw, source, head), **changes), dtype, device)
        with torch.device("meta"):
            lm = cls(checkpoint.config)
        fresh = {}
        if head != "config":
            lm.head = Head(lm.config).apply(lm._init)
            fresh = lm.head.state_dict(prefix="head.")
        lm.load_state_dict(checkpoint.state(lm, fresh), assign=True)
        lm.tokenizer = load_tokenizer(folder)
        lm.generation_config = read_json(folder / "generation_config.json", {
            key: value for key, value in raw.items() if key in GENERATION})
        return lm.to(device).eval()

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors, generation_config.json and the tokenizer's files, each one at once.

        Raises Error where the architecture cannot be written as the config's `model_type`.
        """
        raw = config_to_hf(self.config) | {"torch_dtype": str(self.dtype).removeprefix("torch.")}
        tensors = to_checkpoint(self.state_dict(), self.config, raw["model_type"])
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        ids = {name: getattr(self.config, name) for name in names if getattr(self.config, name) is not None}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (self.tokenizer.files if self.tokenizer else {}).items():
            write_file(folder / name, lambda path: path.write_bytes(content))
        write_json(folder / "generation_config.json", self.generation_config or ids)
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        write_json(folder / "config.json", raw)

    def __getstate__(self):
        """Copies compile for themselves."""
        return self.__dict__ | {"_compiled": None, "_idle": None}

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int | None = None,
                 compile: bool = False, **options) -> Tensor:
        """Continue every row of (batch, seq): (batch, seq + new), with the pad id after a row's end; behind an encoder
        (batch, 1 + new), beginning with decoder_start_token_id.

        The options are fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id, stop,
        seed, num_beams, ...; what is not given is as generation_config.json says, but for temperature, top_k and top_p:
        nothing is sampled unless asked for. The same seed gives the same text,
        whatever stands in the other rows. `compile` compiles the decode step (CUDA graphs on CUDA). Raises Error for
        arguments out of range.
        """
        knobs = self.sampling(max_new_tokens=max_new_tokens, **options)
        beams = Beams(knobs, len(input_ids)) if knobs.num_beams > 1 else None
        require(not beams or not (knobs.temperature or knobs.stop or compile), f"num_beams = {knobs.num_beams} goes "
                "with temperature 0, no stop strings and compile=False")
        steps = list(self.decode(input_ids, attention_mask, knobs, compile, beams.choose if beams else sample))
        if beams:
            new = nn.utils.rnn.pad_sequence([torch.tensor(found[0][1]) for found in beams.found], batch_first=True,
                                            padding_value=knobs.pad_token_id).to(input_ids)
        else:
            running = torch.stack([alive for _, alive in steps], dim=1).any(0).sum()  # until the last row ended
            new = torch.stack([token for token, _ in steps], dim=1)[:, :int(running)]
        return torch.cat((self._prompt(input_ids), new), dim=1)

    def stream(self, text: str | list[int], max_new_tokens: int | None = None, compile: bool = False, **options):
        """The continuation of a text (or of its ids), piece by piece, whole characters only, up to a stop string; with
        the options of `generate`, but for beams."""
        require(self.tokenizer, "stream: the checkpoint has no tokenizer.json; use generate with token ids")
        knobs = self.sampling(max_new_tokens=max_new_tokens, **options)
        ids = (self.tokenizer.encode(text) if isinstance(text, str) else list(text)) or [*knobs.eos_token_id, 0][:1]
        plain, ends = replace(knobs, num_beams=1, stop=()), knobs.eos_token_id
        steps = self.decode(torch.tensor([ids], device=self.device), None, plain, compile)
        tokens = (token for token in (int(token) for token, _ in steps) if token not in ends)
        return text_pieces(self.tokenizer, tokens, knobs.stop, () if self.encoder else ids)

    def chat(self, messages: list[dict], **options):
        """The answer to a conversation of {"role", "content"}, as `stream` gives it."""
        require(self.tokenizer, "chat: the checkpoint has no tokenizer.json")
        ids, limit = (self.tokenizer.encode(chat_prompt(self.tokenizer, messages), special=False),
                      self.config.max_position_embeddings)
        require(len(ids) <= limit, f"chat: {len(ids)} tokens, but the model has only {limit} positions")
        return self.stream(ids, **options)

    def said(self, name: str):
        """A special id, as generation_config.json says it, else as the config does."""
        return self.generation_config.get(name, getattr(self.config, name))

    def ends(self) -> tuple:
        """The ids that end a text."""
        return as_ids("eos_token_id", self.said("eos_token_id"))

    def sampling(self, **given) -> Sampling:
        """How to generate: as given, else as generation_config.json says, else plainly."""
        file, ends = self.generation_config, () if "eos_token_id" in given else self.ends()
        for key in UNSUPPORTED & set(file):
            require(file[key] in (None, 0, 1, []), f"generation_config.json: {key} = {file[key]!r} is not supported")
        options = {"eos_token_id": ends, "pad_token_id": self.said("pad_token_id")}
        if self.encoder is not None and number(file.get("max_length"), 2, 2**31, int):
            options["max_new_tokens"] = file["max_length"] - 1
        options |= {name: file.get(name) for name in FROM_FILE if file.get(name) is not None}
        options |= {name: value for name, value in given.items() if value is not None}
        unknown = sorted(set(options) - {f.name for f in fields(Sampling)})
        require(not unknown, f"{', '.join(unknown)}: no such option of a generation")
        return Sampling(**options)

    def _prompt(self, input_ids: Tensor) -> Tensor:
        """What a continuation stands behind: the ids, or the start token (batch, 1) behind an encoder."""
        if self.encoder is None:
            return input_ids
        said = as_ids("decoder_start_token_id", self.said("decoder_start_token_id"))
        return input_ids.new_full((len(input_ids), 1), [*said, self.config.decoder_start_token_id][0])

    @torch.no_grad()
    def decode(self, input_ids, attention_mask, knobs: Sampling, compile=False, choose=None):
        """Yield, per step, the new ids (batch,) and which rows (batch,) had not ended before it."""
        require(not knobs.stop or self.tokenizer, f"stop = {knobs.stop} needs a tokenizer.json, which the checkpoint "
                "lacks")
        choose, (prompt, mask, context) = choose or sample, self._begin(input_ids, attention_mask, knobs, compile)
        state, step = self._state(prompt, mask, context, knobs, compile)
        device, texts = prompt.device.type, [[] for _ in prompt]
        look = 1 if knobs.stop or device == "cpu" else 16  # steps between looks at the device: a look waits for it
        self._step(state, prompt, mask, last_column(mask), knobs, choose)
        try:
            for i in range(1, knobs.max_new_tokens + 1):
                token, alive = state.token[:, 0].clone(), state.alive.clone()
                yield token, alive
                for row, text in enumerate(texts if knobs.stop else ()):
                    text.append(int(token[row]))
                    if any(s in self.tokenizer.decode(text[-2 * len(s.encode()) - 8:]) for s in knobs.stop):
                        state.done[row] = True
                if i == knobs.max_new_tokens or i % look == 0 and bool(state.done.all()):
                    return
                if compile and device == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                step(state, state.token, state.one, None, knobs, choose)
        finally:
            if compile:
                self._idle = state

    def _begin(self, input_ids, attention_mask, knobs: Sampling, compile: bool) -> tuple:
        """The checked start of a generation: prompt, its mask, the encoder's context; a row of them for each beam."""
        mask, context = torch.ones_like(input_ids) if attention_mask is None else attention_mask, None
        require(self.config.head == "lm" and self.config.causal,
                f"generate: the checkpoint's head is {self.config.head!r}, expected a language model's, 'lm'")
        self._fits(input_ids, mask)
        require(bool(mask.any(-1).all()), "attention_mask: a row has no token")
        input_ids = input_ids.long()
        seq, limit = 1 if self.encoder else input_ids.shape[1], self.config.max_position_embeddings
        require(self.config.position not in LIMITED or seq + knobs.max_new_tokens <= limit,
                f"max_new_tokens = {knobs.max_new_tokens} after {seq} tokens, expected at most {limit} in all")
        if self.encoder is not None:
            if compile:  # a compiled step serves many lengths of the source
                more = min(-input_ids.shape[1] % CACHE_BUCKET, max(limit - input_ids.shape[1], 0))
                input_ids, attention_mask = F.pad(input_ids, (0, more)), F.pad(mask, (0, more))
            context = self.encode(input_ids, attention_mask)
            input_ids = self._prompt(input_ids)
            mask = torch.ones_like(input_ids)
        beams = lambda x: x if knobs.num_beams == 1 else x.repeat_interleave(knobs.num_beams, 0)  # noqa: E731
        return tree_map_only(Tensor, beams, (input_ids, mask, context))

    def _state(self, prompt, mask, context, knobs: Sampling, compile: bool) -> tuple:
        """The state of a generation and its step. A compiled step finds the tensors of the last generation again, at
        the same addresses, unless their shapes differ or it is still running."""
        length = -(-(prompt.shape[1] + knobs.max_new_tokens) // CACHE_BUCKET) * CACHE_BUCKET
        size, start = (len(prompt), length, self.dtype, self.device), (prompt, mask, context, knobs)
        if not compile:
            return Decoding(KVCache(self.config, *size), self.config.vocab_size, *start), self._step
        if self._compiled is None:
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self._compiled = torch.compile(self._step, fullgraph=True, dynamic=False, mode=mode, recompile_limit=256)
        idle, self._idle = self._idle, None
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode can be written there alone
            cache = idle.cache.reset() if idle and idle.cache.size == size else KVCache(self.config, *size)
            state = Decoding(cache, self.config.vocab_size, *start)
            if idle and idle.cache is cache and idle.form() == state.form():
                for old, given in zip(idle.tensors(), state.tensors()):
                    old.copy_(given)
                return idle, self._compiled
        for tensor in state.tensors():
            torch._dynamo.mark_static_address(tensor, guard=False)
        return state, self._compiled

    def _step(self, state, ids, mask, columns, knobs, choose):
        """One step, prefill or decode: nothing here waits for the device or changes shape between steps."""
        logits = self(ids, mask, cache=state.cache, columns=columns, context=state.context)[:, -1].float()
        state.take(torch.where(state.done, state.pad, choose(logits, state, knobs)))


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
    specs = {name: TensorSpec(dtype=str(t.dtype).removeprefix("torch."), shape=t.shape, data_ptr=t.data_ptr(),
                              data_len=t.nbytes) for name, t in tensors.items()}
    write_file(path, lambda temporary: serialize_file(specs, temporary, metadata=metadata))


def write_json(path: Path, content):
    write_file(path, lambda p: p.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"))


def read_json(path: Path, missing: dict | None = None) -> dict:
    """A file's JSON object; `missing`: what stands for a file that is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise Error(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Error(f"{path}: not readable as JSON ({error})") from None
    require(isinstance(content, dict), f"{path}: expected a JSON object")
    return content


def sources(name: str, model_type: str, head: str | None) -> tuple[tuple, type]:
    """Which tensors of a family's checkpoint make up our tensor `name`, and the kind of their names."""
    row, (module, kind) = FAMILIES[model_type], name.rsplit(".", 1)
    if not row.tensors:
        return (name,), Name
    layer = next((part for part in module.split(".") if part.isdigit()), "")
    table, place = row.tensors | row.heads[head][0], module.replace(f".{layer}.", ".{}.") if layer else module
    theirs = table.get(name) or table.get(place)  # of a tensor, or of a module
    require(theirs, f"{name}: model_type {model_type!r} has no such tensor; use model_type 'tinylm'")
    return tuple(n.format(layer) + f".{kind}" * (name not in table) for n in theirs), type(theirs[0])


def fused_sizes(name: str, config: Config) -> tuple:
    """Rows that each part has in a fused projection of ours."""
    config = config.encoder if name.startswith("encoder.") else config
    sizes = {"qkv": config.qkv_sizes, "kv": config.qkv_sizes[1:], "gate_up": (config.intermediate_size,) * 2}
    return sizes[name.split(".")[-2]]


def stored_form(name: str, tensor: Tensor, config: Config, model_type: str) -> tuple[dict, type]:
    """Our tensor under a family's names, its fused parts apart, and the kind of the names."""
    theirs, kind = sources(name, model_type, config.head)
    parts = tensor.split(fused_sizes(name, config)) if len(theirs) > 1 else [tensor]
    return {n: kind.write(part) for n, part in zip(theirs, parts)}, kind


def to_checkpoint(state: dict, config: Config, model_type: str) -> dict:
    """Our state dict in the form of a family's checkpoints."""
    prefix = FAMILIES[model_type].prefix if config.head is None else ""
    return {n.removeprefix(prefix): part.contiguous() for name, tensor in state.items()
            for n, part in stored_form(name, tensor, config, model_type)[0].items()}


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
        opened = {file: open_tensors(file) for file in sorted(set(files.values()))}
        heads, bare = self.head_tensors(), not any(name.startswith(self.row.prefix) for name in files)
        self.stored = {}  # name in the table -> (file, the opened one, name there)
        for name, file in files.items():
            new = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            self.stored[self.row.prefix * (bare and new not in heads) + new] = file, opened[file], name
        embed, head = (sources(name, config.model_type, config.head)[0][0] if there else None for name, there in (
            ("embed.weight", True), ("head.out.weight", config.head in ("lm", "mlm"))))
        for stack, layers in (("", config.num_hidden_layers), ("encoder.", config.num_encoder_layers)):
            if layers:  # before so many are made
                last, = sources(f"{stack}layers.{layers - 1}.mlp.down.weight", config.model_type, config.head)[0]
                require(last in self.stored, f"{self.place}: tensor {last} is missing")
        self.dtype = dtype or self.fetch(embed).dtype
        if config.tied and head in self.stored:  # then it is tied in name only, unless it equals the embedding
            tied = torch.equal(self.fetch(head), self.fetch(embed))
            require(tied or "tie_word_embeddings" not in self.row.only, f"{self.place}: tensor {head} differs from the "
                    f"embedding, but model_type {config.model_type!r} ties them")
            config = replace(config, tie_word_embeddings=tied)
        elif head not in self.stored and self.row.unstored_head_is_tied:
            config = replace(config, tie_word_embeddings=True)
        self.config, self.spare = config, {head} if config.tied else set()

    @staticmethod
    def files(folder: Path) -> tuple[Path, dict]:
        """The file that says it, and the safetensors file of every tensor."""
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.exists():
            return single, dict.fromkeys(open_tensors(single).keys(), single)
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"))
        require(index.exists(), f"{folder}: no model.safetensors and no model.safetensors.index.json"
                + (f" ({', '.join(others)}: only safetensors is read)" if others else ""))
        files = read_json(index).get("weight_map")
        require(isinstance(files, dict) and files,
                f"{index}: weight_map = {files!r}, expected tensor names and their files")
        for name, file in files.items():
            require(isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors"),
                    f"{index}: {name} lies in {file!r}, expected the name of a .safetensors file in this folder")
        return index, {name: folder / file for name, file in files.items()}

    def head_tensors(self, but="none") -> set:
        """Names of the heads' own tensors, but for those of the head `but`."""
        rows = [(ours, name) for head, (table, _) in self.row.heads.items() if head != but
                for ours, (name,) in table.items()]
        return {name if ours.endswith(".bias") else f"{name}.{kind}" for ours, name in rows
                for kind in ("weight", "bias")}

    def fetch(self, name: str, shape: tuple | None = None) -> Tensor:
        require(name in self.stored, f"{self.place}: tensor {name} is missing"
                + (f", expected with shape {tuple(shape)}" if shape else ""))
        file, opened, stored = self.stored[name]
        try:
            tensor = opened.get_tensor(stored)
        except SafetensorError as error:
            raise Error(f"{file}: tensor {stored} is not readable ({error})") from None
        plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        require(tensor.dtype in plain and shape in (None, tensor.shape), f"{file}: tensor {stored} has shape "
                f"{tuple(tensor.shape)} and dtype {tensor.dtype}, expected floats of shape {tuple(shape or ())}")
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
                found = [kind.read(self.fetch(n, part.shape)).contiguous() for n, part in parts.items()]
                state[name] = found[0] if len(found) == 1 else torch.cat(found)
        for name, ours in row.copies.items():
            require(name not in self.stored or ours not in state or torch.equal(self.fetch(name), state[ours]),
                    f"{self.place}: tensor {name} differs from the one that it should repeat, {ours}")
        layers = range(max(self.config.num_hidden_layers, self.config.num_encoder_layers))
        dropped = {pattern.format(i) for pattern in row.drop for i in layers} | self.head_tensors(self.config.head)
        for name in sorted(self.stored.keys() - used - dropped - row.copies.keys() - self.spare):
            file, _, stored = self.stored[name]
            raise Error(f"{file}: tensor {stored} is unexpected for model_type {self.config.model_type!r}")
        return state


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------

class ByteTokenizer:
    """UTF-8 bytes are their own ids; 256 ends a text and 257 pads. Its tokenizer.json is a byte-level BPE that has no
    merges, so every other library reads it too."""

    eos_token_id, pad_token_id, size = 256, 257, 258
    specials = ("<|endoftext|>", "<|pad|>")

    def __init__(self, more: dict = {}):
        self.more = more  # files that travel along: a chat template

    def encode(self, text: str, pair: str | None = None, special: bool = True) -> list[int]:
        return list(text.encode("utf-8", errors="replace")) if pair is None else self.encoding(text, pair).ids

    def batch(self, texts: list):
        return map(self.encode, texts)

    def encoding(self, text: str, pair: str | None = None):
        """What `Tokenizer.encoding` gives; a second text stands behind the end-of-text token."""
        first, second = ([(byte, part, (i, i + 1)) for i, char in enumerate(one or "") for byte in self.encode(char)]
                         for part, one in enumerate((text, pair)))
        rows = first if pair is None else [*first, (self.eos_token_id, None, (0, 0)), *second]
        ids, parts, offsets = map(list, zip(*rows)) if rows else ([], [], [])
        return SimpleNamespace(ids=ids, type_ids=[part or 0 for part in parts], sequence_ids=parts, offsets=offsets)

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    @property
    def files(self) -> dict:
        """File name -> content, in the format of `tokenizers`. Bytes are spelled as GPT-2 spells them."""
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        moved = [b for b in range(256) if b not in plain]
        vocab = {chr(b if b in plain else 256 + moved.index(b)): b for b in range(256)}
        added = [{"id": 256 + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                  "normalized": False, "special": True} for i, name in enumerate(self.specials)]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                 "vocab": vocab, "merges": []}
        tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                     "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}
        return {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode("utf-8"),
                "tokenizer_config.json": tokenizer_config(*self.specials)} | self.more


def tokenizer_config(eos: str, pad: str, **more) -> bytes:
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": pad,
                       "clean_up_tokenization_spaces": False} | more, indent=2).encode("utf-8")


class Tokenizer:
    """A checkpoint's tokenizer.json, run by the `tokenizers` library; its other files travel along in `files`."""

    def __init__(self, files: dict):
        from tokenizers import Tokenizer as Backend
        self.files, self.backend = files, Backend.from_str(files["tokenizer.json"].decode("utf-8"))
        self.backend.no_truncation(), self.backend.no_padding()  # what the file says of them is about some batch
        self.size = self.backend.get_vocab_size()
        tokens = special_tokens(files)
        self.eos_token_id, self.pad_token_id = (self.backend.token_to_id(tokens.get(name) or "")
                                                for name in ("eos_token", "pad_token"))

    def encode(self, text: str, pair: str | None = None, special: bool = True) -> list[int]:
        return self.encoding(text, pair, special).ids

    def batch(self, texts: list):
        """Ids of texts without specials, on all processors."""
        texts = [text.encode("utf-8", errors="replace").decode("utf-8") for text in texts]
        return (encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False))

    def encoding(self, text: str, pair: str | None = None, special: bool = True):
        """Ids of a text or of two, with `type_ids`, `sequence_ids` (which text; None: special) and `offsets` in it."""
        text, pair = (one and one.encode("utf-8", errors="replace").decode("utf-8") for one in (text, pair))
        return self.backend.encode(text, pair, add_special_tokens=special)

    def decode(self, ids) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def special_tokens(files: dict) -> dict:
    """Name -> text of the special tokens that tokenizer_config.json names (bos_token, eos_token, ...)."""
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    return {key: value.get("content") if isinstance(value, dict) else value
            for key, value in config.items() if key.endswith("_token")}


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")


def load_tokenizer(folder: Path):
    """The tokenizer of a checkpoint folder, or None if it has none. A byte tokenizer of ours needs no library."""
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
    if "tokenizer.json" not in files:
        return None
    if files["tokenizer.json"] == ByteTokenizer().files["tokenizer.json"]:
        return ByteTokenizer({name: content for name, content in files.items() if name != "tokenizer.json"})
    try:
        return Tokenizer(files)
    except ImportError:
        raise Error(f"{folder / 'tokenizer.json'}: reading it needs `pip install tokenizers`") from None
    except Exception as error:  # the library raises plain Exception
        raise Error(f"{folder / 'tokenizer.json'}: not a readable tokenizer ({error})") from None


@contextlib.contextmanager
def bounded(seconds: float = 2, memory: int = 2**29):
    """Python code within ends with an error after some seconds or, on Linux, where it takes more memory."""
    end, before, limits = time.monotonic() + seconds, sys.gettrace(), None

    def trace(frame, event, argument):
        if time.monotonic() > end:
            raise TimeoutError(f"more than {seconds} seconds")
        return trace

    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, limits[1]))
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def chat_prompt(tokenizer, messages: list[dict], answer: bool = True) -> str:
    """Messages ({"role", "content"}) as text, through the checkpoint's own chat template: in jinja2's sandbox, within
    bounds of time and size."""
    files = getattr(tokenizer, "files", {})
    template = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode("utf-8", errors="replace")
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template
                         if isinstance(entry, dict) and entry.get("name") == "default"), None)
    require(template, "chat: the checkpoint has no chat_template in tokenizer_config.json and no chat_template.jinja")
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context, operator, left, right):  # one product of big numbers may take days
            if operator == "**" or any(isinstance(x, int) and abs(x) > 2**31 for x in (left, right)):
                raise SecurityError(f"{operator} of big numbers")
            return left * right

    def refuse(message):
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    size = 2**20 + 2 * sum(len(str(message)) for message in messages)
    try:
        require(isinstance(template, str) and len(template) <= size, f"expected a text of at most {size} characters")
        with bounded():
            text = environment.from_string(template).render(messages=messages, add_generation_prompt=answer,
                                                            tools=None, documents=None, **special_tokens(files))
        require(len(text) <= size, f"it writes {len(text)} characters, expected at most {size}")
    except Exception as error:  # whatever a template's code raises
        raise Error(f"chat: the checkpoint's chat template failed ({type(error).__name__}: {error})") from None
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------

CACHE_BUCKET = 128  # cache lengths are multiples of it, so that a compiled step serves many prompt lengths
FROM_FILE = set("""max_new_tokens repetition_penalty no_repeat_ngram_size min_length bad_words_ids forced_bos_token_id
    forced_eos_token_id num_beams renormalize_logits length_penalty early_stopping""".split())
UNSUPPORTED = set("""num_beam_groups penalty_alpha typical_p encoder_no_repeat_ngram_size suppress_tokens constraints
    begin_suppress_tokens exponential_decay_length_penalty encoder_repetition_penalty sequence_bias guidance_scale
    min_new_tokens epsilon_cutoff eta_cutoff force_words_ids""".split())
GENERATION = FROM_FILE | UNSUPPORTED | set("""max_length do_sample diversity_penalty temperature top_k top_p
    num_return_sequences force_bos_token_to_be_generated decoder_start_token_id bos_token_id
    eos_token_id pad_token_id""".split())  # what may stand in config.json


def as_ids(name: str, value) -> tuple:
    """One id, several or None as a tuple."""
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    require(all(number(i, -1, 2**31, int) for i in ids), f"{name} = {value!r}, expected integers")
    return ids


@dataclass(frozen=True)
class Sampling:
    """How a text is generated, in the words of Hugging Face; what changes logits does so in its order."""
    max_new_tokens: Size = 128
    temperature: Annotated[float, 0, 1e9] = 0.0  # 0: the likeliest
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, 1e-9, 1e9] = 1.0
    eos_token_id: int | str | tuple | list = ()     # an id that ends a row, or several; none: it never ends
    pad_token_id: Id | None = None             # what stands after a row's end; None: the first that ends it, or 0
    stop: str | tuple | list = ()              # a string, or several: a row ends once its new text has one
    seed: Annotated[int, -2**63, 2**63 - 1] | None = None
    no_repeat_ngram_size: Count = 0
    min_length: Count = 0                      # tokens before a row may end, the prompt's included
    bad_words_ids: tuple | list = ()           # sequences of ids that must not come
    forced_bos_token_id: Count | None = None   # what a decoder says after its start token
    forced_eos_token_id: Count | None = None   # what it says last
    num_beams: Annotated[int, 1, 2**16] = 1    # above 1: the likeliest text that a search with so many finds
    length_penalty: Annotated[float, -1e3, 1e3] = 1.0  # its score is its log-probability over length to the power of it
    early_stopping: Literal[True, False, "never"] = False  # it ends at the first finds | when better is unlikely
    renormalize_logits: bool = False           # of beams, after what changes logits

    def __post_init__(self):
        check(self)
        words, ends = self.bad_words_ids, as_ids("eos_token_id", self.eos_token_id)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        require(all(isinstance(s, str) and s for s in stop), f"stop = {stop!r}, expected strings that are not empty")
        pad = next(i for i in (self.pad_token_id, *ends, 0) if i is not None and i >= 0)
        require(all(words), f"bad_words_ids = {words!r}, expected lists of ids that are not empty")
        vars(self).update(bad_words_ids=tuple(as_ids("bad_words_ids", word) for word in words), eos_token_id=ends,
                          stop=stop, pad_token_id=pad)
        if self.temperature < 1e-5:  # where a division would overflow, the draw is the likeliest anyway
            vars(self).update(temperature=0.0)

    def numbers(self) -> dict:
        """The numbers that do something: a compiled step takes them as tensors, and is the same for others."""
        idle = dict(temperature=0, top_p=1, min_p=0, repetition_penalty=1)
        return {name: getattr(self, name) for name, none in idle.items() if getattr(self, name) not in (None, none)}


def uniform(seed: Tensor, step: Tensor, batch: int, vocab: int) -> Tensor:
    """Numbers in (0, 1), (batch, vocab), a function of seed, row, step and column alone: the same on every device and
    in every batch size (Salmon et al. 2011, counter-based random numbers)."""
    def hashed(x):  # 32 bits with full avalanche, of the lowest 32 of x (Wellons' two-round prospector)
        x = x & 0xFFFFFFFF
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 15)

    rows, columns = (torch.arange(n, device=seed.device) for n in (batch, vocab))
    state = hashed(hashed(hashed(seed) + rows) + step)
    return ((hashed(state[:, None] + columns * 0x9E3779B9) >> 9).float() + 0.5) / 2**23


def constrain(logits: Tensor, state: Decoding, knobs: Sampling) -> Tensor:
    """Logits or log-probabilities (batch, vocab), less what the knobs forbid after the ids so far."""
    length, ids, column = state.cache.lengths, state.ids, torch.arange(logits.shape[-1], device=logits.device)

    def newest(n):  # the last n ids (batch, n)
        return ids.gather(1, (length - n + torch.arange(n, device=ids.device)).clamp(min=0))

    if "repetition_penalty" in state.numbers:
        penalty = state.numbers["repetition_penalty"]
        logits = torch.where(state.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if 0 < (n := knobs.no_repeat_ngram_size) <= ids.shape[1]:
        windows = ids.unfold(1, n, 1)
        inside = torch.arange(windows.shape[1], device=ids.device) + n <= length
        again = (windows[..., :-1] == newest(n - 1)[:, None]).all(-1) & inside
        banned = torch.where(again, windows[..., -1], len(column))  # what does not repeat goes to a column to spare
        spare = torch.zeros(len(ids), len(column) + 1, dtype=torch.bool, device=ids.device)
        logits = logits.masked_fill(spare.scatter_(1, banned, True)[:, :-1], -math.inf)
    for *before, last in knobs.bad_words_ids:
        banned = (newest(len(before)) == ids.new_tensor(before)).all(-1, keepdim=True) & (length >= len(before))
        logits = torch.where(banned & (column == last), -math.inf, logits)
    if knobs.min_length:
        ends = (column[:, None] == state.ends).any(-1)
        logits = torch.where(ends & (length < knobs.min_length), -math.inf, logits)
    forced = (knobs.forced_bos_token_id, length == 1), (knobs.forced_eos_token_id, state.count == state.last)
    for token, when in forced:
        if token is not None:
            logits = torch.where(when, torch.where(column == token, 0.0, -math.inf), logits)
    return logits


def sample(logits: Tensor, state: Decoding, knobs: Sampling) -> Tensor:
    """The next id of each row of logits (batch, vocab), drawn by the Gumbel trick; at temperature 0 the likeliest."""
    logits, numbers = constrain(logits, state, knobs), state.numbers
    if "temperature" not in numbers:
        return logits.argmax(-1)
    logits = logits / numbers["temperature"]
    if knobs.top_k:
        least = logits.topk(min(knobs.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if "top_p" in numbers:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= numbers["top_p"]  # what stands before it is enough already
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    if "min_p" in numbers:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < numbers["min_p"] * p.amax(-1, keepdim=True), -math.inf)
    return (logits - (-uniform(state.seed, state.count, *logits.shape).log()).log()).argmax(-1)


class Beams:
    """The likeliest continuation of each row that a search finds, step by step as transformers does it: candidates that
    end in a step compete, by their score, for as many places as there are beams."""

    def __init__(self, knobs: Sampling, batch: int):
        n = knobs.num_beams
        self.knobs, self.texts = knobs, [[] for _ in range(batch * n)]
        self.sums = [0.0, *[-1e9] * (n - 1)] * batch  # log-probabilities; all beams begin alike: only the first counts
        self.found = [[] for _ in range(batch)]       # (score, text) of what has ended, the best first
        self.open = [True] * batch                    # the row may still find a better one

    def choose(self, logits: Tensor, state: Decoding, knobs: Sampling) -> Tensor:
        """The next id of each beam, (batch * beams,), in the place of `sample`."""
        scores = constrain(logits.log_softmax(-1), state, knobs)
        scores = scores.log_softmax(-1) if knobs.renormalize_logits else scores
        keep = max(2, 1 + len(knobs.eos_token_id)) * knobs.num_beams
        top, index = (scores + scores.new_tensor(self.sums)[:, None]).view(len(self.open), -1).topk(keep)
        beams = [beam for row, candidates in enumerate(zip(top.tolist(), index.tolist()))
                 for beam in self.advance(row, logits.shape[-1], *candidates)]
        rows, self.sums, self.texts = zip(*beams)
        state.reorder(torch.tensor(rows, device=logits.device))
        state.done |= not any(self.open)
        return torch.tensor([text[-1] for text in self.texts], device=logits.device)

    def advance(self, row: int, vocab: int, sums: list, places: list) -> list:
        """(beam, sum, text) of the beams that a row goes on with, of its candidates, the best first."""
        knobs, n, found, going = self.knobs, self.knobs.num_beams, self.found[row], []
        length = len(self.texts[0]) + 1
        last = length == knobs.max_new_tokens
        for rank, (total, place) in enumerate(zip(sums, places)):
            beam, token = row * n + place // vocab, place % vocab
            text = [*self.texts[beam], token]
            if (token in knobs.eos_token_id or last) and self.open[row] and rank < n:
                found.append((total / length ** knobs.length_penalty, text))
            if token not in knobs.eos_token_id:
                going.append((beam, total, text))
        found.sort(key=lambda pair: -pair[0])
        del found[n:]
        longest = knobs.max_new_tokens if knobs.early_stopping == "never" and knobs.length_penalty > 0 else length
        hope = going[0][1] / longest ** knobs.length_penalty
        full = len(found) == n
        self.open[row] &= not last and not (full and (knobs.early_stopping is True or hope <= found[-1][0]))
        return going[:n]


class Decoding:
    """All that changes while a batch is generated: tensors of fixed shape and, in a compiled step, fixed address."""

    def __init__(self, cache: KVCache, vocab: int, prompt: Tensor, mask: Tensor, context, knobs: Sampling):
        def new(value, *shape, dtype=torch.long):
            return torch.full(shape, value, dtype=dtype, device=prompt.device)

        batch, real = len(prompt), mask.bool()
        rows = torch.arange(batch, device=prompt.device)[:, None].expand_as(real)[real]
        self.cache, self.context = cache, tree_map_only(Tensor, torch.clone, context)
        self.ids = new(-1, batch, cache.size[1] + 1)            # by position: prompt and what came after it
        self.ids[rows, count_positions(mask)[0][real]] = prompt[real]
        self.seen = new(False, batch, vocab, dtype=torch.bool)
        self.seen[rows, prompt[real]] = True
        self.token, self.one = new(0, batch, 1), new(1, batch, 1)             # the newest, and its mask
        self.done, self.alive = (new(False, batch, dtype=torch.bool) for _ in range(2))  # has ended; had not before
        self.ends = torch.tensor(knobs.eos_token_id, device=prompt.device).long()
        self.pad = new(min(knobs.pad_token_id, vocab - 1))
        self.count, self.last = new(0), new(knobs.max_new_tokens - 1)
        self.seed = torch.randint(2**31, ()).to(prompt) if knobs.seed is None else new(knobs.seed)
        self.numbers = {name: new(value, dtype=torch.float32) for name, value in knobs.numbers().items()}

    def take(self, token: Tensor):
        """The new ids (batch,) join the text."""
        self.ids.scatter_(1, self.cache.lengths, token[:, None])
        self.alive.copy_(~self.done)
        self.done |= (token[:, None] == self.ends).any(-1)
        self.seen.scatter_(1, token[:, None], True)
        self.token.copy_(token[:, None])
        self.count += 1

    def reorder(self, rows: Tensor):
        self.cache.reorder(rows)
        self.ids, self.seen = self.ids[rows], self.seen[rows]

    def form(self) -> list:
        return [*self.numbers, *(x.shape for x in self.tensors())]

    def tensors(self) -> list:
        return [x for x in tree_leaves((vars(self), vars(self.cache))) if isinstance(x, Tensor)]


def text_pieces(tokenizer, tokens, stop: tuple = (), prompt=()):
    """The text of a stream of ids after those of a prompt: whole characters only, and nothing from a stop string on.

    New text is what a text has more than the same without its newest ids: a decoder may strip the first space of what
    it is given, so that ids alone do not say their text.
    """
    ids, done, shown, held = list(prompt), 0, len(prompt), ""

    def more():
        return tokenizer.decode(ids[done:])[len(tokenizer.decode(ids[done:shown])):]

    for token in tokens:
        ids.append(token)
        new = more()
        if new.endswith("\ufffd"):  # a character whose bytes are not all there
            continue
        done, shown = shown if new else done, len(ids)  # ids without a text are no beginning to compare with
        held += new
        cut = min((held.find(s) for s in stop if s in held), default=-1)
        if cut >= 0:
            yield held[:cut]
            return
        keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > keep:
            yield held[:len(held) - keep]
            held = held[len(held) - keep:]
    if rest := held + more():
        yield rest


# ---------------------------------------------------------------------------------------------------------------------
# Training: options, optimizers, losses, a step
# ---------------------------------------------------------------------------------------------------------------------

def option(default, help: str):
    """A field of TrainOptions, and what the command line says of it."""
    return field(default=default, metadata=dict(help=help))


@dataclass(frozen=True)
class TrainOptions:
    """Options of `tinylm.py train`; the command line is made of these fields. None is what `TASKS` and `STARTS` say."""
    task: Literal[TRAINABLE] = option("lm", "lm, classify, tokens, qa, seq2seq or mlm")
    init: str = option("", "checkpoint to fine-tune; without one, a model from scratch")
    out: str = option("out", "folder for the checkpoints `best` and `last`")
    val: str = option("", "file to validate on; without one, the last tenth of the data (of each class)")
    text: str = option("", "column of the text, of its words, or of the source; by default its usual name")
    label: str = option("", "column of the label, a list of labels, a number, or a tag for each word")
    target: str = option("", "column of the text to write")
    question: str = option("", "column of the question")
    context: str = option("", "column of the text that has the answer")
    size: Literal[(*SIZES, None)] = option(None, "pico, nano, small, medium or large, from scratch")
    epochs: Annotated[float, 1e-6, 1e6] | None = option(None, "passes over the data, in place of --steps")
    steps: Size | None = option(None, "optimizer steps")
    batch: Size | None = option(None, "sequences per step")
    block: Annotated[int, 8, 2**31] = option(256, "tokens per sequence, at most")
    vocab: Count | None = option(None, "train a byte-level BPE of this many tokens; 0: bytes")
    lr: Rate | None = option(None, "peak learning rate of Muon (matrices); in fine-tuning, of the body")
    adam_lr: Rate | None = option(None, "that of AdamW (all else); in fine-tuning, of a new head")
    weight_decay: Annotated[float, 0, 1e3] | None = option(None, "of the matrices")
    dropout: Dropout | None = option(None, "of embeddings and sub-layers; else as the config says")
    warmup: Dropout | None = option(None, "share of the steps in which the rates rise")
    decay: Dropout | None = option(None, "share of the steps in which they fall to zero, at the end")
    clip: Rate = option(1.0, "largest norm of the gradient")
    accumulate: Size = option(1, "parts in which a step's batch is run, to save memory")
    parallel: Literal["fsdp", "ddp"] = option("fsdp", "under torchrun: fsdp (each process has a part of the weights) "
                                              "or ddp (has all)")
    checkpoint: bool = option(False, "run each layer again in the backward pass, to save memory")
    lora: Annotated[int, 0, 2**16] = option(0, "train adapters of this rank and a new head only; saved merged, and for "
                                            "PEFT")
    freeze: str = option("", "what stays as it is: embeddings, body (all but the head), or them and the first N layers")
    class_weights: bool = option(False, "rare classes count as much as frequent ones")
    patience: Count = option(0, "stop after so many validations without a better one; 0: never")
    eval_every: Size | None = option(None, "steps between validations and checkpoints; else an epoch's")
    seed: Count = option(0, "of weights, data order and dropout")
    device: str = option("", "cpu, cuda, ...; cuda where there is one")
    bf16: bool = option(False, "bfloat16 autocast on the CPU too (on CUDA it is always on)")
    compile: bool = option(False, "torch.compile the model")

    def __post_init__(self):
        check(self, flag)
        for name, ok, expected in (
                ("vocab", not self.vocab or self.vocab >= ByteTokenizer.size,
                 f"at least {ByteTokenizer.size} (all bytes and two specials), or 0 for bytes"),
                ("freeze", self.freeze in ("", "embeddings", "body") or self.freeze.isdecimal(),
                 "embeddings, body or a number of layers"),
                ("freeze", not (self.lora and self.freeze), "no --lora, which freezes all but the adapters by itself"),
                ("size", not (self.init and self.size), "no --init, whose size is as it is"),
                ("vocab", not (self.init and self.vocab), "no --init, whose tokens are as they are"),
                ("lora", not self.lora or self.init, "a pretrained model, --init FOLDER"),
                ("epochs", self.steps is None or self.epochs is None, "it or --steps, not both")):
            require(ok, f"{flag(name)} {getattr(self, name)}: expected {expected}")

    def filled(self) -> TrainOptions:
        """With what the start (from scratch, pretrained, adapters) and the task say of the options that are None."""
        start = "lora" if self.lora else "init" if self.init else "scratch"
        said = STARTS[start] | getattr(TASKS[self.task], start, {})
        given = {name: value for name, value in asdict(self).items() if value is not None}
        length = {"steps", "epochs"}
        said = {name: value for name, value in said.items() if name not in length or not length & set(given)}
        options = replace(self, **said | given)
        require(options.batch % (world()[1] * options.accumulate) == 0, f"--batch {options.batch}: expected a multiple "
                f"of --accumulate {options.accumulate} (times {world()[1]} processes)")
        return options


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


STARTS = {  # where a training starts -> its defaults
    "scratch": dict(steps=1000, lr=0.02, adam_lr=4e-3, weight_decay=0.1, warmup=0.02, decay=0.6, dropout=0.0, vocab=0,
                    size="small", batch=16),
    "init": dict(epochs=3, lr=1e-4, adam_lr=5e-4, weight_decay=0.01, warmup=0.06, decay=0.94, batch=16),
    "lora": dict(epochs=3, lr=1e-3, adam_lr=1e-3, weight_decay=0.0, warmup=0.06, decay=0.94, batch=16),
}
SIZES = {
    "pico": dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192),
    "nano": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4),
    "small": dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=3),
    "medium": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4),
    "large": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4),
}
NEW_HEADS = ("classify", "tokens", "qa")  # heads that fine-tuning begins at random
LARGE = 2**22  # logits of a step above which they are made a chunk at a time


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """About the nearest matrix of orthogonal rows or columns: Newton-Schulz in Jordan's quintic (2024). In bfloat16 on
    a GPU and, if large, where a processor has matrix units; others would take longer than in float32."""
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

    def __init__(self, model: nn.Module, lr: float = 0.02, adam_lr: float = 4e-3, weight_decay: float = 0.1):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "head" not in name]
        others = [p for _, p in named if not any(p is matrix for matrix in matrices)]
        self.adamw = torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0, fused=True)
        super().__init__([*self.adamw.param_groups, dict(params=matrices, lr=lr, weight_decay=weight_decay)], {})

    @torch.no_grad()
    def step(self, momentum: float = 0.95):
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[:1]
        self.adamw.step()
        lr, decay = self.param_groups[1]["lr"], self.param_groups[1]["weight_decay"]
        for p in (p for p in self.param_groups[1]["params"] if p.grad is not None):
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            update = like(p, orthogonal(whole(p.grad.lerp(average, momentum))))
            p.mul_(1 - lr * decay).add_(update, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def make_optimizer(lm: TinyLM, options: TrainOptions) -> torch.optim.Optimizer:
    """Muon and AdamW from scratch; in fine-tuning AdamW, with one rate for what was pretrained and another for a new
    head, where only matrices decay."""
    require(any(p.requires_grad for p in lm.parameters()), f"--freeze {options.freeze}: nothing is left to train")
    if not options.init:
        return MuonAdamW(lm, options.lr, options.adam_lr, options.weight_decay)
    groups = {}
    for name, p in lm.named_parameters():
        if p.requires_grad:
            rate = options.adam_lr if name.startswith("head.") and lm.config.head in NEW_HEADS else options.lr
            groups.setdefault((rate, options.weight_decay if p.ndim == 2 else 0.0), []).append(p)
    return torch.optim.AdamW([dict(params=params, lr=rate, weight_decay=decay)
                              for (rate, decay), params in groups.items()], fused=True)


def target_labels(model: TinyLM, batch: dict) -> Tensor:
    """What the model's outputs are compared with. Of a decoder what it should say after each token but the last (batch,
    seq - 1), where nothing follows from padding."""
    if model.config.head != "lm" or model.encoder is not None:
        return batch["labels"]
    mask, labels = batch.get("attention_mask"), batch.get("labels", batch["input_ids"])[:, 1:]
    return labels if mask is None else labels.masked_fill(mask[:, 1:] * mask[:, :-1] == 0, -100)


def label_weight(labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """What a sum of losses is divided by: so many labels that count, or their classes' weights."""
    if labels.is_floating_point():
        return labels.new_tensor(labels.numel())
    labels = labels[labels != -100]
    return labels.new_tensor(len(labels)) if class_weights is None else class_weights[labels].sum()


def loss_sum(model: TinyLM, batch: dict, class_weights: Tensor | None = None, bf16: bool = False) -> Tensor:
    """Sum over a batch's labels of the loss that goes with the model's head.

    input_ids (batch, seq), attention_mask where there is padding, token_type_ids, decoder_input_ids and labels as in
    Hugging Face, where -100 is ignored: of a decoder (batch, seq), not shifted, and by default the input; behind an
    encoder (batch, target); of a masked model and of tokens (batch, seq); of a classifier (batch,), or floats (batch,
    classes) of several classes, or floats (batch,) of a regression; of an answer (batch, 2), its first and last column.
    """
    config, ids, mask, labels, columns = (model.config, batch["input_ids"], batch.get("attention_mask"),
                                          target_labels(model, batch), None)
    if config.head == "lm" and model.encoder is None:
        ids, mask = ids[:, :-1], None if mask is None else mask[:, :-1]
    if config.head in ("lm", "mlm") and model.encoder is None and "labels" in batch:  # spare the head the other columns
        most = int((labels != -100).sum(1).max().clamp(min=1))
        columns = (labels != -100).int().topk(most).indices
        labels = labels.gather(1, columns)
    inputs = ids, mask, batch.get("token_type_ids"), batch.get("decoder_input_ids")
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16 or ids.device.type == "cuda"):
        if config.head == "lm" and labels.numel() * config.vocab_size > LARGE and not (
                config.final_logit_softcapping or config.head_act):
            return chunked_loss(model, inputs, columns, labels)
        logits = model(*inputs, columns=columns).float()
    if labels.is_floating_point():
        loss = F.mse_loss if config.problem_type == "regression" else F.binary_cross_entropy_with_logits
        return loss(logits.reshape(labels.shape), labels, reduction="sum")
    if config.head == "qa":  # a distribution over columns, for the start and for the end
        logits = logits.transpose(1, 2)
        logits = logits if mask is None else logits.masked_fill(mask[:, None] == 0, -math.inf)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), class_weights, reduction="sum")


def chunked_loss(model: TinyLM, inputs: tuple, columns: Tensor | None, labels: Tensor) -> Tensor:
    """The cross-entropy of a language model whose logits are never there all at once."""
    head = model.head
    head.bare = True  # gives hidden states
    try:
        states = head.dropout(model(*inputs, columns=columns)).flatten(0, -2)
    finally:
        head.bare = False
    weight = (model.embed if head.out.weight is None else head.out).weight.to(states.dtype)
    return F.linear_cross_entropy(states, weight, labels.flatten(), linear_bias=head.out.bias, reduction="sum",
                                  options=nn.LinearCrossEntropyOptions(batch_chunk_size=512))


def train_step(model: TinyLM, optimizer, batch, max_grad_norm: float = 1.0, accumulate: int = 1, bf16: bool = False,
               class_weights: Tensor | None = None, ceiling: float = math.inf) -> Tensor:
    """One update on a batch of ids (batch, seq), or on a dict as `loss_sum` takes it, run in `accumulate` parts.
    Returns the mean loss per label, a detached scalar; above the `ceiling` its gradient is left out. The optimizer is
    `MuonAdamW` or any of torch.optim. A model that is `sharded` learns from the batches of all processes as from one.
    """
    model.train()
    shards = world()[1] if hasattr(model, "set_requires_gradient_sync") else 1
    batch = batch if isinstance(batch, dict) else {"input_ids": batch}
    batch = {name: tensor for name, tensor in batch.items() if tensor is not None}
    weight, total = label_weight(target_labels(model, batch), class_weights).clamp(min=1e-9), 0.0
    weight = summed(weight.float(), shards)
    parts = [rows for rows in zip(*(tensor.tensor_split(accumulate) for tensor in batch.values())) if len(rows[0])]
    for i, rows in enumerate(parts):
        if shards > 1:  # gradients travel once
            model.set_requires_gradient_sync(i + 1 == len(parts))
        loss = loss_sum(model, dict(zip(batch, rows)), class_weights, bf16) / weight
        (loss * shards).backward()  # of which the mean over processes is taken
        total += loss.detach()
    total, gradients = summed(total, shards), [p.grad for p in model.parameters() if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    norm = torch.where(total > ceiling, math.inf, norm)  # by which gradients become 0, and nothing waits for the device
    nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


def world() -> tuple[int, int]:
    """This process's number under torchrun, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def summed(x: Tensor, shards: int, how: str = "SUM") -> Tensor:
    """The sum of what all processes have."""
    if shards > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, how))
    return x


def whole(x: Tensor) -> Tensor:
    """A sharded tensor as a plain one, on every process."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def like(p: Tensor, x: Tensor) -> Tensor:
    """A plain tensor, sharded as the parameter is."""
    if not hasattr(p, "device_mesh") or x.ndim == 0:
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def sharded(lm: TinyLM, parallel: str = "fsdp"):
    """Spread a model over all processes: fsdp shards its weights, gradients and the optimizer's state, ddp keeps a copy
    on each (shards over one process each). The state dict stays the plain model's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    shape, cuda = (world()[1],) if parallel == "fsdp" else (world()[1], 1), lm.device.type == "cuda"
    mesh = init_device_mesh(lm.device.type, shape, mesh_dim_names=("copies", "shards")[-len(shape):])
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if cuda else MixedPrecisionPolicy()
    if lm.encoder is None:  # behind an encoder, parts of a layer are called by themselves
        for block in lm.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(lm, mesh=mesh, mp_policy=policy)
    lm.register_state_dict_post_hook(lambda _, state, *__: state.update(
        {name: whole(x).cpu() for name, x in state.items()}))  # one at a time: a device may not hold them all


class LoRA(Linear):
    """A frozen projection, and for each part fused in it a trained one of low rank: W x + 2 B A x (Hu et al. 2021; 2 is
    alpha / rank). Its state dict is the merged projection's, so that a checkpoint needs no adapters."""

    def __init__(self, base: Linear, sizes: tuple, rank: int):
        nn.Module.__init__(self)
        self.weight, self.bias, self.sizes = base.weight, base.bias, sizes
        self.in_features, self.out_features = base.in_features, base.out_features
        self.a = nn.Parameter(torch.randn(len(sizes) * rank, base.in_features) * base.in_features ** -0.5)
        self.b = nn.Parameter(torch.zeros(sum(sizes), rank))

    def parts(self) -> list:
        """(A, B) of each part."""
        return list(zip(whole(self.a).chunk(len(self.sizes)), whole(self.b).split(self.sizes)))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.a).chunk(len(self.sizes), dim=-1)
        return super().forward(x) + 2 * torch.cat([F.linear(part, b) for part, (_, b) in zip(low, self.parts())], -1)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = (whole(self.weight) + 2 * torch.cat([b @ a for a, b in self.parts()])).detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()


def add_adapters(lm: TinyLM, rank: int):
    """Freeze all but a new head, and give every projection of the layers an adapter."""
    for name, p in lm.named_parameters():
        p.requires_grad_(name.startswith("head.") and lm.config.head in NEW_HEADS)
    for name, module in list(lm.named_modules()):
        if isinstance(module, Linear) and "layers." in name:
            fused = len(sources(name + ".weight", lm.config.model_type, lm.config.head)[0]) > 1
            sizes = fused_sizes(name + ".weight", lm.config) if fused else (module.out_features,)
            lm.set_submodule(name, LoRA(module, sizes, rank).to(lm.device))


def save_adapter(folder: Path, lm: TinyLM, options: TrainOptions):
    """adapter_config.json and adapter_model.safetensors as PEFT names them, after the family's own modules."""
    config, tensors, targets, transposed = lm.config, {}, set(), False
    for name, module in lm.named_modules():
        if isinstance(module, LoRA):
            names, kind = sources(name + ".weight", config.model_type, config.head)
            transposed |= kind is Transposed
            for theirs, pair in zip(names, module.parts()):
                theirs = theirs.removesuffix(".weight")
                targets.add(theirs.split(f".{next(part for part in theirs.split('.') if part.isdigit())}.", 1)[1])
                tensors |= {f"{theirs}.lora_{side}.weight": tensor for side, tensor in zip("AB", pair)}
    head = {f"head.{name}": whole(p) for name, p in lm.head.named_parameters() if p.requires_grad}
    head = to_checkpoint(head, config, config.model_type)
    if world()[0] > 0:
        return
    kinds = {"lm": "SEQ_2_SEQ_LM" if config.num_encoder_layers else "CAUSAL_LM", "classify": "SEQ_CLS",
             "tokens": "TOKEN_CLS", "qa": "QUESTION_ANS"}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors",
                  {f"base_model.model.{name}": tensor for name, tensor in (tensors | head).items()}, {"format": "pt"})
    write_json(folder / "adapter_config.json", dict(
        peft_type="LORA", task_type=kinds.get(config.head), base_model_name_or_path=options.init, inference_mode=True,
        r=options.lora, lora_alpha=2 * options.lora, lora_dropout=0.0, bias="none", fan_in_fan_out=transposed,
        target_modules=sorted(targets), modules_to_save=sorted({  # PEFT wraps a classifier as one
            name.partition(".")[0] if name.startswith("classifier.") else name.rpartition(".")[0] for name in head})
        or None))


def freeze(lm: TinyLM, what: str):
    """Keep the embeddings as they are; for a number so many layers of each stack too; for "body" all but the head."""
    layers = 0 if what == "embeddings" else 2**31 if what == "body" else int(what)
    for name, p in lm.named_parameters():
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), -1)
        p.requires_grad_(not ("embed" in name or 0 <= layer < layers or what == "body" and parts[0] != "head"))


# ---------------------------------------------------------------------------------------------------------------------
# Data: files to rows, rows to examples, examples to batches. A row maps roles (text, label, ...) to values; an example
# is a dict of a model's inputs and labels, one text's, without padding.
# ---------------------------------------------------------------------------------------------------------------------

def as_text(value) -> str:
    value = " ".join(value) if isinstance(value, list) else value
    if not isinstance(value, (str, MappedText)):
        raise TypeError
    return value


def as_label(value):
    """A class's name, a list of them, or a number that is no class: one with a decimal point."""
    if isinstance(value, list):
        return [str(item) for item in value]
    if isinstance(value, str):
        return float(value) if value.count(".") == 1 and value.replace(".", "").lstrip("-").isdecimal() else value
    return value if isinstance(value, float) else str(int(value))


def as_answers(value) -> list:
    """[(text, where it starts or None)] of SQuAD's answers, of {"text": [...], "answer_start": [...]}, or of texts."""
    if isinstance(value, dict):
        value = [{"text": text, "answer_start": start} for text, start in zip(value["text"], value["answer_start"])]
    value = [value] if isinstance(value, str) else value
    return [(item, None) if isinstance(item, str) else (as_text(item["text"]), int(item["answer_start"]))
            for item in value]


def as_list(value) -> list:
    return [str(item) for item in (value.split() if isinstance(value, str) else [*value])]


def as_messages(value) -> list:
    return [{name: as_text(message[name]) for name in ("role", "content")} for message in value]


ROLES = {  # role -> (the option that names its column, the usual names, how it reads, what that is)
    "messages": ("", "messages conversations", as_messages, "a list of role and content"),
    "text": ("text", "text sentence review content sentence1 premise question1 comment tweet", as_text, "a string"),
    "pair": ("", "sentence2 hypothesis question2", as_text, "a string"),
    "words": ("text", "tokens words text sentence", as_list, "a list of words"),
    "source": ("text", "source text document article dialogue input abstract", as_text, "a string"),
    "label": ("label", "label labels class category sentiment stars rating score", as_label, "a label or a list"),
    "tags": ("label", "ner_tags tags pos_tags labels label", as_list, "a list of tags"),
    "target": ("target", "target summary translation tldr highlights output", as_text, "a string"),
    "question": ("question", "question query", as_text, "a string"),
    "context": ("context", "context passage paragraph document text", as_text, "a string"),
    "answer": ("", "answers answer", as_answers, "an answer"),
}
COLUMNS = tuple(dict.fromkeys(option for option, *_ in ROLES.values() if option))
OPTIONAL = ("messages", "pair")
READ_ALOUD = ("text", "pair", "words", "source", "target", "question", "context")  # what a tokenizer is trained on
HELD_BACK = 0.1  # the share of the data that is validated on; of texts at most BIG / 64 characters
BIG = 2**26      # bytes of a text file above which it is not read into memory
PIECE = 2**17    # characters, or bytes, of a text that are tokenised at once


class MappedText:
    """A large file's text, or some bytes of it, that stays on the disk; `tokens` are memory-mapped too."""

    def __init__(self, path: Path, first: int = 0, last: int | None = None):
        self.path, self.size, self.changed = path, path.stat().st_size, path.stat().st_mtime_ns
        self.first, self.last = first, self.size if last is None else last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, part: slice) -> MappedText:
        first, last, _ = part.indices(len(self))
        return MappedText(self.path, self.first + first, self.first + last)

    def __str__(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.first)
            return file.read(len(self)).decode("utf-8", errors="replace")

    def __repr__(self) -> str:  # changes with the file
        return f"{self.path.name} {self.size} {self.changed} {self.first} {self.last}"

    def tokens(self, tokenizer) -> Tensor:
        """Ids (tokens,): of bytes the file's own; else of a file beside it, made once, and again if it is torn."""
        if isinstance(tokenizer, ByteTokenizer):
            return torch.from_file(str(self.path), False, self.size, dtype=torch.uint8)[self.first:self.last]
        key = hashlib.sha256(tokenizer.files["tokenizer.json"] + repr(self).encode()).hexdigest()[:16]
        cache = self.path.with_name(f".{self.path.name}.{key}.tokens")

        def stored() -> Tensor | None:
            count = cache.stat().st_size // 4 if cache.exists() else 0
            ids = torch.from_file(str(cache), False, count, dtype=torch.int32) if count else None
            return ids[:-1] if count and ids[-1] == count - 1 else None  # it ends with its length

        if world()[0] == 0 and stored() is None:
            write_file(cache, lambda path: self.tokenise(tokenizer, path))
        if world()[1] > 1:
            dist.barrier()
        return stored()

    def tokenise(self, tokenizer, path: Path):
        decoder, left, count = codecs.getincrementaldecoder("utf-8")("replace"), len(self), 0

        def pieces():
            nonlocal left
            with open(self.path, "rb") as text:
                text.seek(self.first)
                while left:
                    piece = text.read(min(PIECE, left))
                    left -= len(piece)
                    yield decoder.decode(piece)

        with open(path, "wb") as file:
            for i, ids in enumerate(piecewise(tokenizer, pieces())):
                count += len(ids)
                file.write(ids.tobytes())
                if i % 16 == 0 or not left:
                    print(f"{self.path}: {1 - left / len(self):.0%} tokenised", file=sys.stderr)
            file.write(array.array("i", [count]).tobytes())


def piecewise(tokenizer, pieces):
    """Ids of a long text, an array for each of its pieces: of a whole one at once the library takes 200 bytes for each
    of the text's."""
    pieces = iter(pieces)
    while some := list(itertools.islice(pieces, 16)):
        yield from (array.array("i", ids) for ids in tokenizer.batch(some))


def sliced(text: str):
    return (text[i:i + PIECE] for i in range(0, len(text), PIECE))


class Blocks:
    """Consecutive blocks of a stream of tokens, each made when asked for; `more` tokens of the next go with it."""

    def __init__(self, ids: Tensor, first: int, last: int, step: int, more: int, example: Callable):
        self.ids, self.first, self.last, self.step, self.more, self.example = ids, first, last, step, more, example

    def __len__(self) -> int:
        return max(-(-(self.last - self.first) // self.step), 0)

    def __getitem__(self, k: int) -> dict:
        if k >= len(self):
            raise IndexError
        first = self.first + k * self.step
        return self.example(self.ids[first:min(first + self.step, self.last) + self.more].long())


def records(file: Path):
    """(place, record) of a file: of jsonl, csv, tsv, of SQuAD's json, or one of a plain text."""
    if file.suffix not in (".jsonl", ".csv", ".tsv", ".json") and file.stat().st_size > BIG:
        yield str(file), {"text": MappedText(file)}
        return
    content = file.read_text(encoding="utf-8-sig", errors="replace")
    if file.suffix == ".jsonl":
        for n, line in enumerate(content.split("\n"), 1):  # at no other end of line: a string may hold U+2028
            if line.strip():
                try:
                    yield f"{file}, line {n}", json.loads(line)
                except (ValueError, RecursionError):
                    raise Error(f"{file}, line {n}: {line[:60]!r}, expected a JSON object") from None
    elif file.suffix in (".csv", ".tsv"):
        csv.field_size_limit(2**31 - 1)
        table = csv.DictReader(io.StringIO(content, newline=""), delimiter="\t" if file.suffix == ".tsv" else ",")
        for record in table:
            require(None not in record, f"{file}, line {table.line_num}: more fields than columns")
            yield f"{file}, line {table.line_num}", record
    elif file.suffix == ".json":
        for article in read_json(file).get("data", ()):
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield f"{file}, question {question.get('id')}", question | {"context": paragraph["context"]}
    else:
        yield str(file), {"text": content}


def read_rows(path: Path, options: TrainOptions) -> list:
    """Rows of a file or, sorted by name, of a folder's files, with the roles that the task needs.

    Raises Error where a column is missing or has something else in it.
    """
    suffixes = (".txt", ".md", ".jsonl", ".csv", ".tsv", ".json")
    files = sorted(p for p in path.rglob("*") if p.suffix in suffixes) if path.is_dir() else [path]
    require(files, f"{path}: no {', '.join(suffixes)} file in this folder")
    rows = []
    for file in files:
        try:
            rows += [read_row(where, record, options) for where, record in records(file)]
        except (KeyError, TypeError, AttributeError) as error:
            raise Error(f"{file}: expected SQuAD's json: data, paragraphs, qas ({error!r})") from None
    require(rows, f"{path}: no rows")
    require(len({"messages" in row for row in rows}) == 1, f"{path}: texts and messages, expected one kind")
    return rows


def read_row(where: str, record, options: TrainOptions) -> dict:
    require(isinstance(record, dict), f"{where}: {str(record)[:60]!r}, expected an object")
    columns, row = {str(name).lower(): name for name in record}, {}
    for role in TASKS[options.task].roles:
        option, names, read, kind = ROLES[role]
        given = getattr(options, option, "")
        column = given if given else next((columns[name] for name in names.split() if name in columns), None)
        if column is None and (role in OPTIONAL or "messages" in row):
            continue
        require(column in record, f"{where}: no column {given or ' or '.join(names.split())} for the {role} (columns: "
                f"{', '.join(map(str, record))[:200]})")
        try:
            row[role] = read(record[column])
        except (TypeError, ValueError, KeyError):
            raise Error(f"{where}: {column} = {str(record[column])[:60]!r}, expected {kind}") from None
    return row


def split_rows(rows: list, share: float = HELD_BACK) -> tuple[list, list]:
    """Rows before and after the point that leaves `share` of them behind it: of their characters where they are texts,
    of each class where they have one label."""
    if set(rows[0]) == {"text"}:
        total, kept, held = sum(len(row["text"]) for row in rows), [], []
        left = max(int(total * (1 - share)), total - BIG // 64)
        for text in (row["text"] for row in rows):
            kept += [{"text": text[:left]}] * (left > 0)
            held += [{"text": text[left:]}] * (left < len(text))
            left = max(left - len(text), 0)
        return kept, held
    groups = {}
    for row in rows:
        groups.setdefault(row["label"] if isinstance(row.get("label"), str) else None, []).append(row)
    cuts = [(group, len(group) - round(len(group) * share)) for group in groups.values()]
    return [row for group, cut in cuts for row in group[:cut]], [row for group, cut in cuts for row in group[cut:]]


def limit(lm: TinyLM, block: int) -> int:
    """Tokens that a text may have."""
    return min(block, lm.config.max_position_embeddings) if lm.config.position in LIMITED else block


def text_example(lm: TinyLM, block: int, text: str, pair: str | None = None) -> dict:
    """A text, or two, between specials: as much as fits, cut at the end of the longer text."""
    encoding = lm.tokenizer.encoding(text, pair)
    columns = {part: [c for c, p in enumerate(encoding.sequence_ids) if p == part] for part in (None, 0, 1)}
    texts = [columns[0], columns[1]]
    for _ in range(len(encoding.ids) - limit(lm, block)):
        max(texts, key=len).pop()
    return columns_example(lm, encoding, sorted(columns[None] + texts[0] + texts[1]), 0)


def columns_example(lm: TinyLM, encoding, kept: list, part: int) -> dict:
    """Some columns of an encoding; `offsets` are their places in one of its texts, None elsewhere."""
    example = {"input_ids": [encoding.ids[c] for c in kept] or [*lm.ends(), 0][:1],
               "offsets": [encoding.offsets[c] if encoding.sequence_ids[c] == part else None for c in kept]}
    if lm.config.type_vocab_size > 1:
        example["token_type_ids"] = [encoding.type_ids[c] for c in kept] or [0]
    return example


def collate(lm: TinyLM, examples: list, seed: int = 0) -> dict:
    """Examples as a batch, padded on the right to the longest; what a masked model is to guess depends on the seed."""
    pad, batch = max(lm.config.pad_token_id or 0, 0), {}
    for name, padding in dict(input_ids=pad, token_type_ids=0, decoder_input_ids=pad, labels=-100).items():
        values = [torch.as_tensor(example[name]) for example in examples if name in example]
        if values:
            stacked = values[0].ndim == 0
            batch[name] = torch.stack(values) if stacked else nn.utils.rnn.pad_sequence(values, True, padding)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    if lengths.min() < lengths.max():
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    if "guess" in examples[0]:
        batch |= masked(lm, batch["input_ids"].long(), torch.Generator().manual_seed(seed))
    batch = {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in batch.items()}
    if lm.device.type == "cuda":  # from pinned memory, so that nothing waits for the copy
        return {name: tensor.pin_memory().to(lm.device, non_blocking=True) for name, tensor in batch.items()}
    return {name: tensor.to(lm.device) for name, tensor in batch.items()}


def masked(lm: TinyLM, ids: Tensor, generator: torch.Generator) -> dict:
    """15% of the tokens to be guessed: 80% of them masked, 10% replaced, 10% as they are (Devlin et al. 2019)."""
    special = torch.isin(ids, torch.tensor([*lm.tokenizer.encode(""), lm.config.pad_token_id or 0]))
    dice, chosen = torch.rand(ids.shape, generator=generator), torch.rand(ids.shape, generator=generator) < 0.15
    chosen &= ~special
    other = torch.randint(lm.tokenizer.size, ids.shape, generator=generator)
    shown = torch.where(dice < 0.8, torch.full_like(ids, mask_token(lm)[1]), torch.where(dice < 0.9, other, ids))
    return {"input_ids": torch.where(chosen, shown, ids), "labels": ids.masked_fill(~chosen, -100)}


def mask_token(lm: TinyLM) -> tuple[str, int]:
    """Text and id of the token that hides another."""
    names = special_tokens(lm.tokenizer.files).get("mask_token"), "[MASK]", "<mask>"  # BERT's own files do not name it
    backend = getattr(lm.tokenizer, "backend", None)
    found = [(name, backend.token_to_id(name)) for name in names if backend and name]
    found = [(name, token) for name, token in found if token is not None]
    require(found, "tokenizer_config.json: no mask_token")
    return found[0]


class Batches:
    """An epoch's examples in batches of similar length, shuffled twice; all of it depends on seed and step alone, so
    that a resumed run goes on. Each of several processes has its part of every batch."""

    def __init__(self, lm: TinyLM, epoch, options: TrainOptions):
        self.lm, self.epoch, self.batch, self.seed, self.number = lm, epoch, options.batch, options.seed, None
        self.rank, self.world = world()
        least = self.world * options.accumulate if self.world > 1 else 1  # rows of a last batch that is not full
        self.per_epoch = (len(epoch(torch.Generator())) + self.batch - least) // self.batch

    def draw(self, step: int) -> dict:
        number, i = divmod(step, self.per_epoch)
        if number != self.number:
            self.number, generator = number, torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self.examples = self.epoch(generator)
            self.order = torch.randperm(len(self.examples), generator=generator)
            if not isinstance(self.examples, Blocks):  # equal lengths stay shuffled
                lengths = torch.tensor([len(example["input_ids"]) for example in self.examples])
                self.order = self.order[lengths[self.order].argsort(stable=True)]
            self.turns = torch.randperm(self.per_epoch, generator=generator)
        rows = self.order[self.turns[i] * self.batch:][:self.batch][self.rank::self.world].tolist()
        return collate(self.lm, [self.examples[j] for j in rows], self.seed * 1_000_003 + step)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: how a row becomes examples, how what a model's head says answers it, and how good that is.
# ---------------------------------------------------------------------------------------------------------------------

class Task:
    """What is common: each row makes its own examples; a model is as good as its loss is low."""
    head, family = None, "bert"         # of a model from scratch
    inputs, roles = ("text",), ()       # of a row: what a line given to `run` has, what there is to learn from
    scratch, init = {}, {}              # what differs from STARTS
    longest = 512                       # tokens of a text that `run` reads, where the model has no limit of its own

    def examples(self, lm: TinyLM, row: dict, block: int):
        """Yield the examples of a row: one, or a window at a time of a long text."""
        yield text_example(lm, block, *(row[name] for name in self.inputs if name in row))

    def answer(self, lm: TinyLM, windows: list) -> list:
        """A list of dicts, the likeliest first, from the windows (example, what the head says of it) of a row."""
        return [{"generated_text": text} for _, text in windows]

    def figures(self, lm: TinyLM, examples: list, batch: int) -> dict:
        """Name -> figure; the first one chooses the best checkpoint."""
        total = weight = 0.0
        for i, indices in enumerate(similar(examples, batch)):
            inputs = collate(lm.eval(), [examples[j] for j in indices], seed=i)
            with torch.no_grad():
                total += loss_sum(lm, inputs).item()
            weight += label_weight(target_labels(lm, inputs)).item()
        nats, size = total / max(weight, 1), sum(example.get("bytes", 0) for example in examples)
        figures = {"nats/token": nats} | ({"bits/byte": total / size / math.log(2)} if size else {})
        return figures | {"perplexity": math.exp(min(nats, 700))}

    def report(self, lm: TinyLM, examples: list, batch: int) -> dict:
        """The figures where `eval` has more time."""
        return self.figures(lm, examples, batch)

    def epochs(self, lm: TinyLM, rows: list, block: int) -> Callable:
        """A function of a random generator that gives an epoch's examples; of None, it gives all of them in order."""
        examples = [example | {"row": row, "number": number} for number, row in enumerate(rows)
                    for example in self.examples(lm, row, block)]
        return lambda generator: examples

    def answers(self, lm: TinyLM, examples: list, batch: int, **options) -> list:
        """The answer to each row of the examples."""
        rows = {}
        for example, said in zip(examples, outputs(lm, examples, batch, **options)):
            rows.setdefault(example["number"], []).append((example, said))
        return [self.answer(lm, windows) for windows in rows.values()]


def similar(examples: list, batch: int) -> list:
    """Indices of examples in batches of similar length, the longest first."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    return [order[i:i + batch] for i in range(0, len(order), batch)]


@torch.no_grad()
def outputs(lm: TinyLM, examples: list, batch: int, max_new_tokens: int | None = None) -> list:
    """What the head says of each example, on the CPU and without padding; of a language model the text it writes."""
    found, ends = [None] * len(examples), lm.ends()
    for indices in similar(examples, batch):
        inputs = collate(lm.eval(), [examples[i] for i in indices])
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if lm.config.head == "lm":
            new = lm.generate(ids, mask, max_new_tokens=max_new_tokens)[:, 1 if lm.encoder else ids.shape[1]:].tolist()
            said = [lm.tokenizer.decode(itertools.takewhile(lambda token: token not in ends, row)) for row in new]
        else:
            said = lm(ids, mask, inputs.get("token_type_ids")).float().cpu()
        for i, one in zip(indices, said):
            found[i] = one if lm.config.head in ("lm", "classify") else one[:len(examples[i]["input_ids"])]
    return found


SCRATCH = dict(steps=None, epochs=10, vocab=4096, dropout=0.3, lr=0.01, adam_lr=2e-3, size="nano", batch=32)


class LanguageModelling(Task):
    """Texts one after the other, with end-of-text between them; or chats, where the assistant's words are learnt."""
    head, family, roles, longest = "lm", "qwen3", ("messages", "text"), 2**31
    scratch = dict(eval_every=250)

    def epochs(self, lm, rows, block):
        """Of texts, consecutive blocks: all of them, or whole ones, always as many, from a random first token on. A
        block of a language model has the next token too."""
        if any("messages" in row for row in rows):
            return super().epochs(lm, rows, block)
        texts, parts, causal = [row["text"] for row in rows if row["text"]], [], self.head == "lm"
        for text in texts:
            parts += [torch.tensor([*lm.ends()][:1], dtype=torch.int32)] * (causal and bool(parts)) + [
                text.tokens(lm.tokenizer) if isinstance(text, MappedText) else
                torch.tensor(lm.tokenizer.encode(text, special=causal), dtype=torch.int32) if len(text) <= PIECE else
                torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in piecewise(lm.tokenizer, sliced(text))])]
        ids = parts[0] if len(parts) == 1 else torch.cat([torch.zeros(0, dtype=torch.int32), *parts])
        size = sum(len(text.encode("utf-8", errors="replace") if isinstance(text, str) else text) for text in texts)
        special = torch.tensor([] if causal else lm.tokenizer.encode(""), dtype=torch.long)
        step, end, share = limit(lm, block) - len(special), len(ids) - causal, size / max(len(ids), 1)

        def example(part: Tensor) -> dict:
            return {"input_ids": part, "bytes": share * (len(part) - 1)} if causal else {
                "input_ids": torch.cat((special[:1], part, special[1:])), "guess": True}

        def epoch(generator) -> Blocks:
            if generator is None:
                return Blocks(ids, 0, end, step, causal, example)
            count = max(end // step - 1, min(end // step, 1))
            first = int(torch.randint(max(min(step, end - count * step + 1), 1), (), generator=generator))
            return Blocks(ids, first, first + count * step, step, causal, example)

        return epoch

    def examples(self, lm, row, block):
        if "messages" not in row:
            yield from super().examples(lm, row, block)
            return
        ids, labels, done, messages = [], [], "", row["messages"]
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, whole = (chat_prompt(lm.tokenizer, messages[:i + n], n == 0) for n in (0, 1))
                require(prompt.startswith(done) and whole.startswith(prompt), "messages: the chat template does not "
                        "write a conversation as the beginning of a longer one")
                texts = prompt[len(done):], whole[len(prompt):]
                asked, said = (lm.tokenizer.encode(text, special=False) for text in texts)
                ids, labels, done = ids + asked + said, labels + [-100] * len(asked) + said, whole
        require(ids, f"messages: {str(messages)[:60]!r} has nothing that the assistant says")
        yield {"input_ids": ids[:limit(lm, block)], "labels": labels[:limit(lm, block)]}


class MaskFilling(LanguageModelling):
    """Texts one after the other, where some tokens are to be guessed."""
    head, family, roles, longest, scratch = "mlm", "bert", ("text",), 512, SCRATCH | dict(dropout=0.0)

    def examples(self, lm, row, block):
        yield text_example(lm, block, row["text"].replace("<mask>", mask_token(lm)[0]))

    def answer(self, lm, windows):
        """The five likeliest tokens in the place of each mask."""
        (example, logits), = windows
        ids, (name, mask) = example["input_ids"], mask_token(lm)
        require(mask in ids, f"{example['row']['text'][:60]!r}: expected {name} or <mask> in it")
        return [dict(token_str=lm.tokenizer.decode([token]), score=score,
                     sequence=lm.tokenizer.decode(ids[:c] + [token] + ids[c + 1:]))
                for c in range(len(ids)) if ids[c] == mask
                for score, token in zip(*(x.tolist() for x in logits[c].softmax(-1).topk(5)))]


class Writing(Task):
    """Translation, summarisation: a source and what to write of it."""
    head, family, inputs, roles, longest = "lm", "t5", ("source",), ("source", "target"), 2**31
    scratch = SCRATCH | dict(dropout=0.1)

    def examples(self, lm, row, block):
        example, end = text_example(lm, block, row["source"]), [*lm.ends()][:1]
        if "target" in row:
            labels = lm.tokenizer.encode(row["target"])
            labels = labels[:-1] if labels[-1:] == end else labels
            example["labels"] = labels[:limit(lm, block) - 1] + end
            start = int(lm._prompt(torch.zeros(1, 1, dtype=torch.long)))
            example["decoder_input_ids"] = [start, *example["labels"][:-1]]
        yield example

    def report(self, lm, examples, batch):
        """Perplexity; and BLEU and ROUGE of what the model writes, each if its library is installed."""
        figures, true = self.figures(lm, examples, batch), [example["row"]["target"] for example in examples]
        bleu, rouge = (importlib.util.find_spec(name) for name in ("sacrebleu", "rouge_score"))
        said = outputs(lm, examples, batch) if bleu or rouge else []
        if bleu:
            import sacrebleu
            figures["BLEU"] = sacrebleu.corpus_bleu(said, [true]).score
        if rouge:
            from rouge_score.rouge_scorer import RougeScorer
            scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
            scores = [scorer.score(*pair) for pair in zip(true, said)]
            figures |= {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in scores[0]}
        return figures


class Classification(Task):
    """Texts, or pairs of texts, and their label: one of several classes, a list of them, or a number."""
    head, inputs, roles = "classify", ("text", "pair"), ("text", "pair", "label")
    scratch = SCRATCH | dict(epochs=4)

    def examples(self, lm, row, block):
        (example,), label, problem = super().examples(lm, row, block), row.get("label"), lm.config.problem_type
        if label is not None and problem == "regression":
            require(isinstance(label, float) or isinstance(label, str) and re.fullmatch(r"-?\d+", label),
                    f"label {label!r}: expected a number, as the model is a regression")
            example["labels"] = float(label)
        elif label is not None and problem == "multi_label_classification":
            ids = {label_id(lm, name) for name in ([label] if isinstance(label, str) else label)}
            example["labels"] = [float(i in ids) for i in range(lm.config.num_labels)]
        elif label is not None:
            example["labels"] = label_id(lm, label)
        yield example

    def answer(self, lm, windows):
        (_, logits), = windows
        problem, alone = lm.config.problem_type, lm.config.num_labels == 1
        alone |= problem == "multi_label_classification"
        scores = logits if problem == "regression" else logits.sigmoid() if alone else logits.softmax(-1)
        return [{"label": lm.config.id2label[i], "score": score}
                for score, i in zip(*(x.tolist() for x in scores.sort(descending=True)))]

    def figures(self, lm, examples, batch):
        """Accuracy, and the mean of the F1 of each class that occurs."""
        logits, problem = torch.stack(outputs(lm, examples, batch)), lm.config.problem_type
        labels = torch.tensor([example["labels"] for example in examples])
        if problem == "regression":
            pair = torch.stack((logits.flatten(), labels.flatten()))
            return {"mean squared error": F.mse_loss(*pair).item(), "correlation": pair.corrcoef()[0, 1].item()}
        if problem == "multi_label_classification":
            said, true = logits > 0, labels > 0
        else:
            said, true = (F.one_hot(classes, lm.config.num_labels).bool() for classes in (logits.argmax(-1), labels))
        counts = zip(*(part.sum(0).tolist() for part in (said & true, said, true)))
        scores = [f1(*count) for count in counts if any(count)]
        return {"accuracy": (said == true).all(-1).float().mean().item(), "macro F1": sum(scores) / max(len(scores), 1)}


def f1(right: float, said: float, true: float) -> float:
    return 2 * right / (said + true) if said + true else 0.0


def label_id(lm: TinyLM, name) -> int:
    ids = {label: i for i, label in lm.config.id2label.items()}
    require(str(name) in ids, f"label {name!r}: expected one of {', '.join(ids)[:200]}")
    return ids[str(name)]


def label_changes(rows: list, known: dict | None) -> dict:
    """id2label and problem_type as the labels are, for a Config; labels that a checkpoint knows keep their numbers."""
    labels = [row["label"] for row in rows if "label" in row]
    if any(isinstance(label, float) for label in labels):
        return dict(id2label={0: "LABEL_0"}, problem_type="regression")
    several = any(isinstance(label, list) for label in labels)
    names = {str(name) for label in labels for name in (label if isinstance(label, list) else [label])}
    names |= {tag for row in rows for tag in row.get("tags", ())}
    if not names <= set((known or {}).values()):
        known = dict(enumerate(sorted(names, key=lambda name: (int(name) if name.isdecimal() else math.inf, name))))
    problem = f"{'multi' if several else 'single'}_label_classification" if labels else None
    return dict(id2label=known, problem_type=problem) if names else {}


def class_weights(config: Config, examples: list) -> Tensor:
    """Weights (labels,) by which all classes count alike, whatever their share of the examples."""
    require(config.problem_type in (None, "single_label_classification") and config.id2label,
            "--class-weights: expected one label for each text or word")
    labels = torch.cat([torch.as_tensor(example["labels"]).flatten() for example in examples])
    counts = torch.bincount(labels[labels != -100], minlength=config.num_labels)
    return counts.sum() / (len(counts) * counts.clamp(min=1)).float()


class Tagging(Task):
    """Words and their tags; the first token of each word has the word's."""
    head, inputs, roles, scratch = "tokens", ("words",), ("words", "tags"), SCRATCH

    def examples(self, lm, row, block):
        words, tags = row["words"] if isinstance(row["words"], list) else row["words"].split(" "), row.get("tags")
        require(tags is None or len(tags) == len(words),
                f"{len(tags or ())} tags for the {len(words)} words {' '.join(words)[:60]!r}")
        example = text_example(lm, block, " ".join(words))
        word_at, first = [i for i, word in enumerate(words) for _ in word + " "], {}  # word -> its first column
        for c, offset in enumerate(example["offsets"]):
            if offset and offset[1] > offset[0]:  # a token may begin with the space before it
                first.setdefault(word_at[offset[1] - 1], c)
        if tags is not None:
            example |= {"first": first, "labels": [-100] * len(example["input_ids"])}
            for word, c in first.items():
                example["labels"][c] = label_id(lm, tags[word])
        yield example

    def answer(self, lm, windows):
        """Entities: neighbouring tokens of one kind, with the mean of their scores."""
        (example, logits), = windows
        columns = [c for c, offset in enumerate(example["offsets"]) if offset]
        scores, tags = logits.softmax(-1)[columns].max(-1)
        found, places = [], [example["offsets"][c] for c in columns]
        for kind, first, end in spans([lm.config.id2label[int(tag)] for tag in tags]):
            start, stop = places[first][0], places[end - 1][1]
            found.append(dict(entity_group=kind, word=example["row"]["words"][start:stop].strip(),
                              score=scores[first:end].mean().item(), start=start, end=stop))
        return found

    def figures(self, lm, examples, batch):
        pairs, counts = [], Counter()
        for example, logits in zip(examples, outputs(lm, examples, batch)):
            said = [lm.config.id2label[int(logits[c].argmax())] for c in example["first"].values()]
            true = [example["row"]["tags"][word] for word in example["first"]]
            pairs += zip(said, true)
            said, true = set(spans(said)), set(spans(true))
            counts.update(right=len(said & true), said=len(said), true=len(true))
        return {"entity F1": f1(*(counts[name] for name in ("right", "said", "true"))),
                "accuracy": sum(said == true for said, true in pairs) / max(len(pairs), 1)}


def spans(tags: list) -> list:
    """(kind, first, behind the last) of each run of tags of one kind; B- begins another."""
    kinds = [tag[2:] if tag[:2] in ("B-", "I-") else tag for tag in tags]
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1] or tags[i][:2] == "B-"]
    return [(kinds[i], i, end) for i, end in zip(starts, [*starts[1:], len(kinds)]) if kinds[i] != "O"]


class QuestionAnswering(Task):
    """Questions whose answer stands in a context; a long one is read in windows that overlap. The label of a window
    without the answer is its first column twice."""
    head, inputs, roles = "qa", ("question", "context"), ("question", "context", "answer")
    scratch, init, longest = SCRATCH, dict(lr=3e-4, epochs=6), 384

    def examples(self, lm, row, block):
        encoding = lm.tokenizer.encoding(row["question"], row["context"])
        inside = [c for c, part in enumerate(encoding.sequence_ids) if part == 1]
        before = [c for c in range(len(encoding.ids)) if not inside or c < inside[0]]
        after = [c for c in range(len(encoding.ids)) if inside and c > inside[-1]]
        room = limit(lm, block) - len(before) - len(after)
        require(room > 1, f"question {row['question'][:60]!r}: too long for a context behind it in {block} tokens")
        shared = min(128, room // 2)
        for first in range(0, max(len(inside) - shared, 1), room - shared):
            example = columns_example(lm, encoding, before + inside[first:first + room] + after, 1)
            yield example | ({"labels": self.columns(example["offsets"], row)} if "answer" in row else {})

    def columns(self, offsets: list, row: dict) -> list:
        """First and last column of a row's first answer, if the window has the whole of it."""
        text, start = row["answer"][0] if row["answer"] else ("", -1)
        start = row["context"].find(text) if start is None else start
        places = [(c, *offset) for c, offset in enumerate(offsets) if offset]
        inside = [c for c, first, last in places if last > start and first < start + len(text)]
        whole = start >= 0 and inside and places[0][1] <= start and start + len(text) <= places[-1][2]
        return [inside[0], inside[-1]] if whole else [0, 0]

    def answer(self, lm, windows):
        """The likeliest one of all windows. Its score is the probability of its first column times that of its last,
        among the context's columns and the first one, which stands for none."""
        found = []
        for example, logits in windows:
            context, offsets = example["row"]["context"], example["offsets"]
            inside = torch.tensor([offset is not None for offset in offsets])
            shown = inside.clone()
            shown[0] = True
            p = logits.masked_fill(~shown[:, None], -math.inf).softmax(0) * inside[:, None]
            scores = (p[:, :1] * p[:, 1]).triu().tril(29)  # of at most 30 tokens
            first, last = divmod(int(scores.argmax()), len(offsets))
            (start, _), (_, end) = offsets[first] or (0, 0), offsets[last] or (0, 0)
            while 0 < start < end and context[start - 1:start + 1].isalnum():  # whole words
                start -= 1
            while start < end < len(context) and context[end - 1:end + 1].isalnum():
                end += 1
            found.append(dict(answer=context[start:end].strip(), score=scores[first, last].item(), start=start,
                              end=end))
        return [max(found, key=lambda answer: answer["score"])]

    def figures(self, lm, examples, batch):
        rows = {example["number"]: example["row"] for example in examples}.values()
        pairs = [(found["answer"], [text for text, _ in row["answer"]] or [""])
                 for (found,), row in zip(self.answers(lm, examples, batch), rows)]
        scores = {"span F1": overlap, "exact match": lambda said, text: plain(said) == plain(text)}
        return {name: sum(max(score(said, text) for text in true) for said, true in pairs) / len(pairs)
                for name, score in scores.items()}


def plain(text: str) -> list:
    """Words without case, punctuation and articles, as SQuAD compares them (Rajpurkar et al. 2016)."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def overlap(said: str, true: str) -> float:
    """F1 of the words of two answers."""
    said, true = plain(said), plain(true)
    return f1((Counter(said) & Counter(true)).total(), len(said), len(true)) if said and true else float(said == true)


class Embedding(Task):
    """A vector for each text, as the files of sentence-transformers say: pooled, and normalised where modules.json has
    it; without files, the mean."""
    poolings = {  # name -> states (seq, hidden) as one vector
        "pooling_mode_cls_token": lambda states: states[0],
        "pooling_mode_mean_tokens": lambda states: states.mean(0),
        "pooling_mode_max_tokens": lambda states: states.amax(0),
        "pooling_mode_mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
        "pooling_mode_lasttoken": lambda states: states[-1],
    }

    def examples(self, lm, row, block):
        said = read_json(lm.folder / "sentence_bert_config.json", {})
        yield text_example(lm, said.get("max_seq_length") or block, row["text"])

    def answer(self, lm, windows):
        (_, states), = windows
        said, file = read_json(lm.folder / "1_Pooling/config.json", {}), lm.folder / "modules.json"
        modules = re.findall(r"sentence_transformers[\w.]*\.(\w+)", file.read_text("utf-8") if file.exists() else "")
        require(set(modules) <= {"Transformer", "Pooling", "Normalize"}, f"{file}: {', '.join(modules)}, expected no "
                "more than Transformer, Pooling and Normalize")
        chosen = [pool for name, pool in self.poolings.items() if said.get(name)]
        require(chosen or not said, f"{lm.folder / '1_Pooling/config.json'}: expected one of "
                f"{', '.join(self.poolings)}")
        vector = torch.cat([pool(states) for pool in chosen or [self.poolings["pooling_mode_mean_tokens"]]])
        return [{"embedding": (F.normalize(vector, dim=0) if "Normalize" in modules else vector).tolist()}]


TASKS = dict(lm=LanguageModelling(), mlm=MaskFilling(), classify=Classification(), tokens=Tagging(),
             qa=QuestionAnswering(), seq2seq=Writing(), embed=Embedding())
TRAINABLE = tuple(name for name, task in TASKS.items() if task.head)
LEAST = ("nats/token", "mean squared error")  # figures of which less is better


def task_of(config: Config) -> str:
    return "seq2seq" if config.num_encoder_layers else config.head or "embed"


# ---------------------------------------------------------------------------------------------------------------------
# The training loop
# ---------------------------------------------------------------------------------------------------------------------

def train_bpe(texts: list, vocab: int, encoder: bool = False) -> Tokenizer:
    """A byte-level BPE of `vocab` tokens, trained by the `tokenizers` library; an encoder's has BERT's specials."""
    try:
        from tokenizers import ByteLevelBPETokenizer, processors
    except ImportError:
        raise Error("--vocab needs `pip install tokenizers`; without it, tokens of decoders are bytes") from None
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"] if encoder else list(ByteTokenizer.specials)
    backend = ByteLevelBPETokenizer(add_prefix_space=encoder)
    texts = (re.sub(r"\S{1000}", r"\g<0> ", piece)  # a word that never ends would take for ever
             for text in texts for piece in sliced(text))
    backend.train_from_iterator(texts, max(vocab, 256 + len(special)), show_progress=False, special_tokens=special)
    named = tokenizer_config(*special[:2])
    if encoder:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
        named = tokenizer_config("[SEP]", "[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
                                 model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    return Tokenizer({"tokenizer.json": backend.to_str().encode("utf-8"), "tokenizer_config.json": named})


def new_model(rows: list, options: TrainOptions) -> TinyLM:
    """A model of the task's family for the rows; what adds to the residual stream starts at zero, so that training
    starts smoothly."""
    task = TASKS[options.task]
    encoder, row = task.family == "bert", FAMILIES[task.family]
    texts = [str(as_text(row[role])[:BIG // 4]) for row in rows for role in READ_ALOUD if role in row]
    tokenizer = train_bpe(texts, options.vocab, encoder) if options.vocab or encoder else ByteTokenizer()
    size = SIZES[options.size]
    ours = size | dict(
        vocab_size=-(-tokenizer.size // 64) * 64, tie_word_embeddings=True,
        num_encoder_layers=size["num_hidden_layers"],
        head_dim=size["hidden_size"] // size["num_attention_heads"], max_position_embeddings=max(options.block, 1024),
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id)
    raw = {row.fields[name][0]: value for name, value in ours.items() if name in row.fields}
    config = config_from_hf({"model_type": task.family} | raw, head=task.head)
    torch.manual_seed(options.seed)
    lm = TinyLM(replace(config, **label_changes(rows, None), **dropouts(config, options.dropout)))
    for block in (module for module in lm.modules() if isinstance(module, Block)):
        nn.init.zeros_(block.attention.o.weight), nn.init.zeros_(block.mlp.down.weight)
    if config.scale_logits:  # then an embedding is as large as a state
        nn.init.normal_(lm.embed.weight)
    lm.tokenizer = tokenizer
    return lm


def dropouts(config: Config, p: float | None) -> dict:
    """Changes of a Config; attention's own, which keeps the fast kernels out, is raised only where all are one (T5)."""
    if p is None:
        return {}
    return dict(hidden_dropout=p, embedding_dropout=p, head_dropout=p,
                attention_dropout=p if config.position == "relative" else min(p, config.attention_dropout))


def opened_model(folder: Path, rows: list, options: TrainOptions) -> TinyLM:
    """A checkpoint in fp32, with the task's head and the rows' labels."""
    head, file = TASKS[options.task].head, folder / "config.json"
    head = "config" if head == "lm" else head  # no language model begins with a head at random
    config = config_from_hf(read_json(file), str(file), head)
    torch.manual_seed(options.seed)  # of a new head
    changes = label_changes(rows, config.id2label) | dropouts(config, options.dropout)
    lm = TinyLM.from_pretrained(folder, torch.float32, head=head, **changes)
    require(task_of(lm.config) == options.task, f"{folder}: a model for {task_of(lm.config)}, expected one for "
            f"--task {options.task}")
    require(lm.tokenizer, f"{folder / 'tokenizer.json'}: no such file")
    if lm.config.causal and lm.config.pad_token_id is None:  # by which a classifier finds a text's end
        pad = lm.tokenizer.pad_token_id
        lm.config = replace(lm.config, pad_token_id=pad if pad is not None else [*lm.ends(), 0][0])
    return lm


def prepared_model(rows: list, options: TrainOptions, resume: bool) -> TinyLM:
    """The model, new or opened, with what is to be trained of it."""
    folder = options.init or Path(options.out) / "last"
    lm = opened_model(Path(folder), rows, options) if options.init or resume else new_model(rows, options)
    lm.to(usable_device(options.device))
    if options.freeze:
        freeze(lm, options.freeze)
    if options.lora:
        add_adapters(lm, options.lora)
    for block in (module for module in lm.modules() if options.checkpoint and isinstance(module, Block)):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if world()[1] > 1:
        sharded(lm, options.parallel)
    return lm


def rate(step: int, steps: int, options: TrainOptions) -> float:
    """Share of the peak learning rate: linear warm-up, then stable, then linear decay to zero."""
    return min(1.0, (step + 1) / max(options.warmup * steps, 1), (steps - step) / max(options.decay * steps, 1))


def peak_flops(device) -> float | None:
    """What a CUDA device could do in bfloat16 at most, where it is known."""
    if device.type != "cuda":
        return None
    said = torch.cuda.get_device_properties(device)
    per_cycle = {(8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192}.get((said.major, said.minor))
    return per_cycle and per_cycle * said.multi_processor_count * said.clock_rate * 1e3


class Progress:
    """A live line on a terminal; elsewhere a plain one now and then. The loss is fetched only when a line is due."""

    def __init__(self, lm: TinyLM, steps: int, first: int):
        self.steps, self.first, self.tokens, self.live = steps, first, 0, sys.stderr.isatty()
        self.begin, self.shown, self.peak = time.monotonic(), -math.inf, peak_flops(lm.device)
        self.flops = 6 * sum(p.numel() for name, p in lm.named_parameters() if "_embed" not in name)

    def line(self, step: int, loss: Tensor, lr: float, tokens: int):
        now, self.tokens = time.monotonic(), self.tokens + tokens
        if now - self.shown > (0.2 if self.live else 10) or step == self.steps:
            self.shown, spent = now, now - self.begin
            eta = int(spent / (step - self.first) * (self.steps - step))
            speed = f"{self.tokens / spent:,.0f} tok/s"
            if self.peak:  # model flops utilisation (Chowdhery et al. 2022), without attention's own products
                speed += f"  MFU {self.tokens / spent * self.flops / self.peak:.1%}"
            self.note(f"step {step}/{self.steps}  loss {loss.item():.3f}  lr {lr:.2e}  {speed}  ETA {eta // 60}:"
                      f"{eta % 60:02d}", "" if self.live else "\n")

    def note(self, text: str, end: str = "\n"):
        if world()[0] == 0:
            print("\r\x1b[K" * self.live + text, end=end, file=sys.stderr, flush=True)


def save(folder: Path, lm: TinyLM, options: TrainOptions, optimizer=None, notes: dict | None = None):
    """A checkpoint for everyone; with an optimizer, beside it all that `--resume` needs, in one file that is replaced
    at once; under torchrun that names the folder into which each process wrote its own part. Raises Error where it
    cannot be written; each file is then the whole former one."""
    tensors = {f"model/{name}": p for name, p in lm.named_parameters() if optimizer and p.requires_grad}
    for i, state in optimizer.state_dict()["state"].items() if optimizer else ():
        tensors |= {f"optimizer/{i}/{key}": tensor for key, tensor in state.items()}
    before = {*folder.glob("training-*")}
    try:
        if optimizer and world()[1] > 1:
            tensors, notes = {}, notes | {"shards": save_shards(folder, tensors, lm.device)}
        if world()[0] == 0:
            lm.save_pretrained(folder)
        else:
            lm.state_dict()  # in which all processes take part
        if options.lora:
            save_adapter(folder / "adapter", lm, options)
        if optimizer and world()[0] == 0:
            write_tensors(folder / "training.safetensors", tensors, {"training": json.dumps(notes)})
            for path in before:
                shutil.rmtree(path, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        for path in {*folder.rglob("*.tmp"), *folder.glob("training-*")} - before:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise Error(f"{folder}: not saved ({error}); what was saved there before is as it was") from None


def save_shards(folder: Path, tensors: dict, device) -> str:
    """A new folder of safetensors, each with what one process has of the tensors; its name."""
    import torch.distributed.checkpoint as dcp
    number = summed(torch.tensor(time.time_ns() * (world()[0] == 0), device=device), world()[1])
    path = folder / f"training-{number}"
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(path), save_distributed=True))
    except dcp.api.CheckpointException as error:
        raise OSError(cause(error)) from None
    return path.name


def cause(error) -> str:
    """What went wrong on the first process where something did, as torch.distributed.checkpoint says it."""
    return str(next(iter(error.failures.values()))[0])


@contextlib.contextmanager
def locked(folder: Path):
    """No second run trains into the folder. A run that is killed leaves no lock behind."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Error(f"--out {folder}: another run trains into this folder") from None
    finally:
        if fcntl:
            os.close(handle)


def saved(folder: Path) -> dict:
    """The notes that `save` has for `--resume`."""
    file = folder / "training.safetensors"
    notes = json.loads((open_tensors(file).metadata() or {}).get("training", "null"))
    require(notes, f"{file}: not written by tinylm's training")
    return notes


@torch.no_grad()
def restore(lm: TinyLM, optimizer, folder: Path, notes: dict):
    """Parameters and the optimizer's state as they were saved, by however many processes."""
    params, state = [p for group in optimizer.param_groups for p in group["params"]], {}

    def owner(name: str) -> Tensor:
        kind, name, *_ = name.split("/")
        return params[int(name)] if kind == "optimizer" else lm.get_parameter(name)

    if shards := notes.pop("shards", None):
        tensors = load_shards(folder / Path(shards).name, owner)
    else:
        file = open_tensors(folder / "training.safetensors")
        tensors = {name: like(owner(name), file.get_tensor(name)) for name in file.keys()}
    for name, tensor in tensors.items():
        kind, number, *key = name.split("/")
        if kind == "optimizer":
            state.setdefault(int(number), {})[key[0]] = tensor
        else:
            owner(name).copy_(tensor)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def load_shards(path: Path, owner: Callable) -> dict:
    """The tensors of `save_shards`, each shared out as its parameter, `owner(name)`, is now."""
    import torch.distributed.checkpoint as dcp
    try:
        reader, tensors = dcp.HuggingFaceStorageReader(str(path)), {}
        for name, said in reader.read_metadata().state_dict_metadata.items():
            p, size = owner(name), tuple(said.size)
            require(size in ((), p.shape), f"{path}: {name} has shape {size}, expected {tuple(p.shape)}")
            tensors[name] = torch.empty_like(p) if size else torch.zeros(())
        dcp.load(tensors, storage_reader=reader, no_dist=world()[1] == 1)
    except (SafetensorError, dcp.api.CheckpointException) as error:
        raise Error(f"{path}: not readable ({cause(error) if hasattr(error, 'failures') else error})") from None
    return tensors


def train(data, options: TrainOptions, resume: bool = False) -> TinyLM:
    """Train on `data` (see `read_rows`) from scratch or from `options.init`; or go on where `options.out`/last stopped:
    bit for bit the run that was not interrupted, since data order and dropout depend on seed and step alone."""
    asked, options, out, task = asdict(options), options.filled(), Path(options.out), TASKS[options.task]
    notes = saved(out / "last") if resume else None
    require(not out.exists() or out.is_dir(), f"--out {out}: is a file, expected a folder")
    rows, held = read_rows(Path(data), options), read_rows(Path(options.val), options) if options.val else None
    hashed = hashlib.sha256(repr((rows, held)).encode("utf-8", errors="replace")).hexdigest()
    for name, value in notes["options"].items() if resume else ():
        require(name == "out" or asked.get(name) == value,
                f"--resume: {flag(name)} was {value}, not {asked.get(name)}, in the run to go on with")
    require(not resume or notes["data"] == hashed, "--resume: the data is not that of the run to go on with")
    if held is None:
        rows, held = split_rows(rows)
    named = [{role: row[role] for role in ("label", "tags") if role in row} for row in held]  # some may be there only
    lm = prepared_model(rows + named, options, resume)
    optimizer = make_optimizer(lm, options)
    batches = Batches(lm, task.epochs(lm, rows, options.block), options)
    require(batches.per_epoch, f"{data}: expected more than --block {options.block} tokens to train on")
    held = task.epochs(lm, held, options.block)(None) if held else []
    weights = class_weights(lm.config, batches.epoch(None)).to(lm.device) if options.class_weights else None
    steps = options.steps or math.ceil(options.epochs * batches.per_epoch)
    if resume:
        restore(lm, optimizer, out / "last", notes)
    notes = notes or dict(options=asked, data=hashed, step=0, best=None, stale=0)
    if options.compile:
        lm.compile(fullgraph=True)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.set_flush_denormal(True)  # a CPU takes a hundred times as long over them
    keep_memory()
    progress = Progress(lm, steps, notes["step"])
    total, trained = (sum(p.numel() for p in lm.parameters() if p.requires_grad >= least) for least in (False, True))
    progress.note(f"{total:,} parameters, {trained:,} of them trained; {batches.per_epoch:,} batches to train on, "
                  f"{len(held):,} sequences held back; {lm.device}")
    with locked(out) if world()[0] == 0 else contextlib.nullcontext():
        train_steps(lm, optimizer, batches, held, weights, steps, notes, options, progress)
    return lm.eval()


def keep_memory():
    """Tell glibc to keep what is freed: pages that are new in every step cost up to a fifth of it on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 2**30)


def train_steps(lm, optimizer, batches, held, weights, steps: int, notes: dict, options: TrainOptions, progress):
    """The loop, from the step that the notes name to the last, or to an interruption."""
    every, last = options.eval_every or min(batches.per_epoch, steps), Path(options.out) / "last"
    peaks, stop = [group["lr"] for group in optimizer.param_groups], False
    with interruptible() as interrupted:
        while notes["step"] < steps and not (stop or 0 < options.patience <= notes["stale"]):
            torch.manual_seed(options.seed * 1_000_003 + notes["step"] + 2**40 * world()[0])
            scale, batch = rate(notes["step"], steps, options), batches.draw(notes["step"])
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * scale
            loss = train_step(lm, optimizer, batch, options.clip, options.accumulate, options.bf16, weights,
                              jump(notes))
            notes["step"] += 1
            due = notes["step"] % every == 0 or notes["step"] == steps
            if due or notes["step"] % 16 == 0 or not loss.is_cuda:  # a look at a GPU waits for it
                watch(loss.item(), notes, progress)
                stop = bool(summed(loss.new_tensor(interrupted.is_set()), world()[1], "MAX"))
            progress.line(notes["step"], loss, options.lr * scale, batch["input_ids"].numel() * world()[1])
            if due:
                validate(lm, held, notes, options, progress)
            if due or stop:
                save(last, lm, options, optimizer, notes)
    if notes["step"] < steps:
        progress.note(f"stopped at step {notes['step']}: " + (
            f"{last} is saved; --resume goes on" if stop else
            f"no better validation in the last {notes['stale']}"))


def watch(loss: float, notes: dict, progress: Progress):
    """Stop at a loss that is no number, before anything is saved; say when one jumped, which changed nothing."""
    step = notes["step"]
    require(math.isfinite(loss), f"step {step}: the loss is {loss}, and what was saved before is kept; expected a "
            "number (try a lower --lr and --adam-lr)")
    if loss > jump(notes):
        progress.note(f"step {step}: the loss jumped from about {notes['usual']:.3f} to {loss:.3f}; left out")
    notes["usual"] = 0.9 * notes.get("usual", loss) + 0.1 * loss


def jump(notes: dict) -> float:
    """A loss above it is no usual one."""
    return 2 * notes.get("usual", math.inf) + 1


def validate(lm: TinyLM, held: list, notes: dict, options: TrainOptions, progress: Progress):
    """Score what was held back, keep the best, show a sample of what a decoder writes."""
    better, task = True, TASKS[options.task]
    if held:
        figures = task.figures(lm, held, options.batch)
        name, figure = next(iter(figures.items()))
        better = notes["best"] is None or (figure < notes["best"] if name in LEAST else figure > notes["best"])
        notes |= dict(best=figure, stale=0) if better else dict(stale=notes["stale"] + 1)
        progress.note(f"step {notes['step']}  validation " + "  ".join(
            f"{figure:.4f} {name}" for name, figure in figures.items()) + "  best" * better)
    if better:
        save(Path(options.out) / "best", lm, options)
    if options.task == "lm" and held and world()[1] == 1:
        text = lm.tokenizer.decode(held[0]["input_ids"][:1])
        with contextlib.suppress(Error):  # e.g. of so many tokens: it is only a sample
            text += "".join(lm.eval().stream(text, 120, temperature=0.8, top_p=0.95, seed=notes["step"]))
        progress.note("  | " + text.replace("\n", "\n  | "))


@contextlib.contextmanager
def interruptible():
    """An event that the first Ctrl-C or SIGTERM sets; a second one ends the program as ever."""
    event, before = threading.Event(), {}

    def handle(number, _):
        signal.signal(number, signal.default_int_handler)
        event.set()

    if threading.current_thread() is threading.main_thread():  # no other one may set handlers
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

WEIGHTS = Path(__file__).resolve().parent / "weights"  # the model shipped beside this file


def add_options(parser, owner, *names: str, **defaults):
    """Fields of a dataclass, or those named, as options of a command. What is not said is not there."""
    for f in fields(owner):
        if f.name in names or not names:
            hint = get_type_hints(owner)[f.name]
            while get_args(hint):  # of `int | None`, int; of choices, the first
                hint = get_args(hint)[0]
            kind = hint if isinstance(hint, type) else type(hint)
            kind = dict(action="store_true") if kind is bool else dict(type=kind, metavar=f.name.upper())
            default = defaults.get(f.name, f.default)
            shown = "" if default in (None, "", False) else f" (default: {default})"
            parser.add_argument(flag(f.name), default=defaults.get(f.name, argparse.SUPPRESS),
                                help=f.metadata.get("help", "") + shown, **kind)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tinylm", description="A whole language-model library in one file.")
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("train", help="train a model from scratch, or fine-tune one, for a task")
    sub.add_argument("data", help="text, jsonl, csv, tsv or SQuAD's json, or a folder of these")
    add_options(sub, TrainOptions)
    sub.add_argument("--resume", action="store_true", help="go on where --out/last stopped, with its options")

    sub = commands.add_parser("eval", help="the figures of a checkpoint's task on data")
    sub.add_argument("folder", help="a checkpoint")
    sub.add_argument("data", help="as for train")
    add_options(sub, TrainOptions, *COLUMNS, "batch", "block", "device")
    sub.add_argument("--json", action="store_true", help="print them as JSON")

    sub = commands.add_parser("run", help="whatever a checkpoint's head is for: labels, answers, texts, embeddings")
    sub.add_argument("folder", help="a checkpoint")
    sub.add_argument("inputs", nargs="*", help="texts; without any, or for a -, the lines of standard input")
    sub.add_argument("--context", help="the text in which all questions find their answer")
    add_options(sub, Sampling, "max_new_tokens")
    add_options(sub, TrainOptions, "batch", "device", batch=32)
    sub.add_argument("--json", action="store_true", help="an object per line")

    for name, text, defaults in (("sample", "continue a prompt", dict(max_new_tokens=300, temperature=0.8, top_p=0.95)),
                                 ("chat", "talk with an instruction-tuned model", dict(max_new_tokens=512))):
        sub = commands.add_parser(name, help=text)
        if name == "sample":
            sub.add_argument("folder", nargs="?", default=str(WEIGHTS), help="a checkpoint (default: the shipped one)")
            sub.add_argument("--prompt", default="ROMEO:", help="text to continue (default: ROMEO:)")
        else:
            sub.add_argument("folder", help="a checkpoint with a chat template")
            sub.add_argument("--system", help="the system message")
        add_options(sub, Sampling, "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
                    **defaults)
        sub.add_argument("--stop", action="append", help="end before this text; may be given again")
        sub.add_argument("--seed", type=int)
        sub.add_argument("--compile", action="store_true", help="torch.compile the decode step")
        add_options(sub, TrainOptions, "device")
    return parser


def main(argv: list | None = None) -> int:
    """`tinylm.py train | eval | run | sample | chat`; an Error is one line on stderr and exit code 1."""
    parser = make_parser()
    known, more = parser.parse_known_args(argv)
    options = vars(known)
    if more and (known.command != "run" or any(text.startswith("-") and text != "-" for text in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # inputs behind options
        options["inputs"] += more
    for stream in (sys.stdin, sys.stdout):  # text that is no UTF-8 is read and shown as well as it can be
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.reconfigure(errors="replace")
    try:
        COMMANDS[options.pop("command")](options)
    except (Error, OSError) as error:
        print(f"tinylm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_train(options: dict):
    data, resume, last = options.pop("data"), options.pop("resume"), Path(options.get("out", TrainOptions.out)) / "last"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0":  # torchrun begins again after a fault
        resume |= (last / "training.safetensors").exists()
    if resume:  # what is not said again is as it was
        options = saved(last)["options"] | options
    options = TrainOptions(**options)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # under torchrun
        cuda = usable_device(options.device).type == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(restarts, store)  # where nothing of the processes before a restart is found
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
    try:
        train(data, options, resume)
    finally:
        if world()[1] > 1:
            dist.destroy_process_group()


def opened(options: dict) -> TinyLM:
    """The checkpoint that a command names, with a tokenizer."""
    folder = Path(options.pop("folder"))
    lm = TinyLM.from_pretrained(folder, device=usable_device(options.pop("device", None)))
    require(lm.tokenizer, f"{folder / 'tokenizer.json'}: no such file")
    lm.folder = folder
    return lm


def run_eval(options: dict):
    lm, as_json, data = opened(options), options.pop("json"), options.pop("data")
    name = task_of(lm.config)
    require(name in TRAINABLE, f"{lm.folder}: expected a model with a task's head")
    options, task = TrainOptions(task=name, **options).filled(), TASKS[name]
    examples = task.epochs(lm, read_rows(Path(data), options), options.block)(None)
    require(len(examples), f"{data}: nothing to evaluate")
    figures = task.report(lm, examples, options.batch)
    print(json.dumps(figures) if as_json else "\n".join(f"{name}  {figure:.4f}" for name, figure in figures.items()))


def run_run(options: dict):
    """A line for each input: what the head says, the likeliest first, with scores. A tab divides a question from its
    context, a text from its pair."""
    lm, context, as_json, batch = opened(options), options["context"], options["json"], options["batch"]
    require(batch > 0, f"--batch {batch}: expected a positive number")
    require(context is None or len(TASKS[task_of(lm.config)].inputs) > 1, "--context: the model reads one text alone")
    task, lines = TASKS[task_of(lm.config)], (line.rstrip("\r\n") for line in sys.stdin)
    texts = itertools.chain.from_iterable(lines if text == "-" else [text] for text in options["inputs"] or ["-"])
    while some := list(itertools.islice(texts, batch)):
        rows = [dict(zip(task.inputs, [text, context] if context else text.split("\t", len(task.inputs) - 1)))
                for text in some]
        for text, row in zip(some, rows):
            require("context" in row or task.head != "qa",
                    f"{text[:60]!r}: expected --context, or the question, a tab and the context")
        examples = Task.epochs(task, lm, rows, task.longest)(None)
        for text, found in zip(some, task.answers(lm, examples, batch, max_new_tokens=options.get("max_new_tokens"))):
            print(json.dumps({"input": text, "output": found}, ensure_ascii=False) if as_json else
                  "  ".join(map(answer_line, found[:5])), flush=True)


def answer_line(answer: dict) -> str:
    """What an answer says, and its score; or its numbers."""
    texts = [value for name, value in answer.items() if isinstance(value, str) and name != "sequence"]
    texts += [f"{answer['score']:.4f}"] if "score" in answer else []
    return " ".join(texts) if texts else json.dumps(*answer.values())


def run_sample(options: dict):
    lm, prompt = opened(options), options.pop("prompt")
    print(prompt, end="", flush=True)
    show(lm.stream(prompt, **options))


def run_chat(options: dict):
    """Questions from standard input, one a line; answers to standard output."""
    lm, system = opened(options), options.pop("system")
    messages = [{"role": "system", "content": system}] * bool(system)
    while True:
        print("> " * sys.stdin.isatty(), end="", flush=True)
        question = sys.stdin.readline()
        if not question:
            return
        if question.strip():
            messages.append({"role": "user", "content": question.strip()})
            messages.append({"role": "assistant", "content": show(lm.chat(messages, **options))})


def show(pieces) -> str:
    """Print text as it comes; all of it."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


COMMANDS = {"train": run_train, "eval": run_eval, "run": run_run, "sample": run_sample, "chat": run_chat}

if __name__ == "__main__":
    sys.exit(main())
