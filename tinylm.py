"""tinylm: a whole language-model library in one file.

    from tinylm import Config, TinyLM, train_step
    lm = TinyLM.from_pretrained("SmolLM2-135M-Instruct")          # GPT-2, Llama, Mistral, Qwen, Gemma, ...: see FAMILIES
    for piece in lm.stream("The capital of France is", max_new_tokens=20): print(piece, end="")
    lm.save_pretrained("copy")                                     # transformers, vLLM and llama.cpp load it unchanged
    lm = TinyLM(Config(hidden_size=256, num_hidden_layers=4))      # or start from nothing: python tinylm.py train FILE

It needs torch, einops and safetensors; `tokenizers` only for checkpoints that bring a tokenizer.json of their own.
Read it from top to bottom: config, families, blocks, cache, model, checkpoints, tokens, sampling, training, commands.
Every leaf (`rms_norm`, `rotate`, `attend`, `MLP`, ...) is looked up when it is called: replace one in place and train.

Sources: Vaswani et al. 2017 (the transformer); Su et al. 2021 (rotary positions); Zhang & Sennrich 2019 (RMS norm);
Shazeer 2020 (gated MLP); Ainslie et al. 2023 (grouped queries); Jordan 2024 (Muon). Reference implementation of
every family: Hugging Face transformers.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor, nn

# Axes: b batch, s query positions, t key positions, h query heads, g key-value heads, d head width.


class Error(ValueError):
    """What the caller gave cannot be used: one line that names it, its value and what was expected."""


def require(ok, message: str):
    if not ok:
        raise Error(message)


def number(value, low, high, kind=(int, float)) -> bool:
    """Is it a number from low to high (not a bool, which Python counts among the ints)?"""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
CHOICES = {
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "output", "sandwich"),
    "position": ("rope", "learned"),
    "qk_norm": (None, "head", "full"),
    "hidden_act": tuple(ACTIVATIONS),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
RANGES = {name: (1, 2**31 - 1, int) for name in (  # field -> least, most, kind; None passes where it is the default
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "sliding_window")}
RANGES |= {name: (1e-30, 1e30, (int, float)) for name in (
    "norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "initializer_range")}
RANGES |= {"num_hidden_layers": (1, 9999, int), "partial_rotary_factor": (0, 1, (int, float)),
           "attention_dropout": (0, 0.99, (int, float)), "hidden_dropout": (0, 0.99, (int, float))}
ROPE_KEYS = {  # rope_type -> (keys it needs, keys it may have)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
}


@dataclass(frozen=True)
class Config:
    """What a model is made of, in the names of Hugging Face `config.json`. The defaults are Qwen3's architecture.

    Raises Error where a value is out of its range.
    """
    vocab_size: int = 320                         # rows of the embedding; bytes and two specials, padded to 64
    hidden_size: int = 256                        # width of the residual stream
    intermediate_size: int | None = None          # width inside the MLP; None: 8/3 of hidden (gated), 4 times (plain)
    num_hidden_layers: int = 4
    num_attention_heads: int = 4                  # query heads
    num_key_value_heads: int | None = None        # None: as many as query heads; fewer: grouped queries
    head_dim: int | None = None                   # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 1024           # the longest sequence it is made for
    norm: str = "rms"                             # rms | layer
    norm_eps: float = 1e-6
    norm_offset: float = 0.0                      # added to the RMS norm's weight (Gemma: 1)
    norm_position: str = "pre"                    # x + f(norm(x)) | output: x + norm(f(x)) | sandwich: both
    position: str = "rope"                        # rope | learned
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None              # {"rope_type": a key of ROPE_KEYS, "factor": ...}
    rope_local_base_freq: float | None = None     # theta of the sliding layers, unscaled; None: as the full ones
    partial_rotary_factor: float = 1.0            # the part of each head that rotates
    sliding_window: int | None = None             # keys seen by a sliding layer, itself included
    layer_types: tuple | None = None              # full_attention | sliding_attention per layer; None: all alike
    qk_norm: str | None = "head"                  # norm of q and k: over each head | full: over all heads | None
    attention_bias: bool = False                  # bias of q, k, v
    attention_output_bias: bool | None = None     # bias of o; None: as attention_bias
    query_pre_attn_scalar: float | None = None    # scores are q.k / sqrt(this); None: head_dim
    attn_logit_softcapping: float | None = None   # c tanh(scores / c)
    final_logit_softcapping: float | None = None  # c tanh(logits / c)
    hidden_act: str = "silu"
    gated: bool = True                            # act(gate(x)) * up(x), else act(up(x))
    mlp_bias: bool = False
    scale_embedding: bool = False                 # embeddings times sqrt(hidden_size)
    tie_word_embeddings: bool = True              # the head is the embedding
    attention_dropout: float = 0.0                # of attention weights, in training
    hidden_dropout: float = 0.0                   # of what each sub-layer adds, in training
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None
    pad_token_id: int | None = None
    model_type: str | None = None                 # row of FAMILIES to save as; None: the first that can express it

    def __post_init__(self):
        for f in fields(self):
            value, (low, high, kind) = getattr(self, f.name), RANGES.get(f.name, (None, None, None))
            if kind and value is not None:
                require(number(value, low, high, kind), f"config: {f.name} = {value!r}, expected "
                        f"{'an integer' if kind is int else 'a number'} from {low:g} to {high:g}")
            if f.type.startswith("bool"):
                require(value in (True, False, f.default), f"config: {f.name} = {value!r}, expected true or false")
            if f.name in CHOICES:
                require(value in CHOICES[f.name], f"config: {f.name} = {value!r} is not supported (supported: "
                        f"{', '.join(map(str, CHOICES[f.name]))})")
        require(self.model_type in (None, *FAMILIES), f"config: model_type = {self.model_type!r} is not supported "
                f"(supported: {', '.join(FAMILIES)})")
        heads, window = self.num_attention_heads, self.sliding_window
        require(self.head_dim or self.hidden_size % heads == 0, f"config: hidden_size = {self.hidden_size} is no "
                f"multiple of num_attention_heads = {heads}; give head_dim")
        self._fill("head_dim", self.hidden_size // heads)
        self._fill("num_key_value_heads", heads)
        self._fill("attention_output_bias", self.attention_bias)
        self._fill("intermediate_size", -(-self.hidden_size * 8 // 3 // 64) * 64 if self.gated else 4 * self.hidden_size)
        self._fill("layer_types", (LAYER_TYPES[window is not None],) * self.num_hidden_layers)
        for name in ("layer_types", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        require(heads % self.num_key_value_heads == 0, f"config: num_attention_heads = {heads} is no multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}")
        require(len(self.layer_types) == self.num_hidden_layers, f"config: layer_types has {len(self.layer_types)} "
                f"entries, expected num_hidden_layers = {self.num_hidden_layers}")
        for name in set(self.layer_types):
            require(name in LAYER_TYPES, f"config: layer_types has {name!r}, which is not supported (supported: "
                    f"{', '.join(LAYER_TYPES)})")
            require(name != LAYER_TYPES[1] or window, f"config: layer_types has {name!r}, but sliding_window = None")
        if self.position == "rope":
            self._check_rope()

    def _fill(self, name: str, value):
        """What None stands for."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_rope(self):
        require(self.rotary_dim in range(2, self.head_dim + 1, 2), f"config: head_dim = {self.head_dim} with "
                f"partial_rotary_factor = {self.partial_rotary_factor} rotates {self.rotary_dim} channels, expected an "
                "even number of them")
        scaling = self.rope_scaling or {"rope_type": "default"}
        require(isinstance(scaling, dict), f"config: rope_scaling = {scaling!r}, expected an object with rope_type")
        kind = scaling.get("rope_type", scaling.get("type"))
        require(kind in ROPE_KEYS, f"config: rope_scaling has rope_type = {kind!r}, which is not supported (supported: "
                f"{', '.join(ROPE_KEYS)})")
        needs, may = ROPE_KEYS[kind]
        for key in needs:
            require(number(scaling.get(key), 1e-6, 1e6), f"config: rope_scaling of type {kind!r} has {key} = "
                    f"{scaling.get(key)!r}, expected a positive number")
        for key in set(scaling) - {*needs, *may, "type", "rope_type", "original_max_position_embeddings"}:
            raise Error(f"config: rope_scaling has {key} = {scaling[key]!r}, which type {kind!r} does not support")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def qkv_sizes(self) -> tuple:
        """Rows of q, k and v in the fused projection."""
        return tuple(n * self.head_dim for n in (self.num_attention_heads,) + 2 * (self.num_key_value_heads,))


# ---------------------------------------------------------------------------------------------------------------------
# Families: rows of data. How a config.json reads as a Config, and which tensors are ours under which names.
# ---------------------------------------------------------------------------------------------------------------------

class Transposed(str):
    """The name of a module whose weight is stored (in, out), as GPT-2's Conv1D does."""


@dataclass(frozen=True)
class Family:
    """One `model_type`. Tables are read one way to load and the other way to save."""
    architecture: str                             # for config.json
    tensors: dict                                 # our module -> theirs, or a tuple of theirs fused along the rows
    fields: dict                                  # our config field -> their key
    fixed: dict = field(default_factory=dict)     # our config fields which the family always has
    defaults: dict = field(default_factory=dict)  # their key -> what transformers takes where config.json is silent
    only: dict = field(default_factory=dict)      # their key -> the one value supported, where None will not do
    alias: dict = field(default_factory=dict)     # their key -> {old value: what it means}
    drop: tuple = ()                              # their tensors that carry nothing


NEUTRAL = dict(qk_norm=None)  # where Config's default is an architecture of its own, what most families have
INERT = set("""architectures torch_dtype dtype transformers_version use_cache initializer_range pretraining_tp model_type
    attention_dropout embd_pdrop resid_pdrop attn_pdrop hidden_dropout residual_dropout embedding_dropout
    summary_type summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels task_specific_params
    id2label label2id problem_type return_dict chunk_size_feed_forward gradient_checkpointing output_attentions
    output_hidden_states cache_implementation num_labels original_max_position_embeddings n_ctx reorder_and_upcast_attn
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    tokenizer_class sep_token_id decoder_start_token_id unk_token_id sliding_window_pattern max_window_layers
    unsloth_version auto_map is_llama_config transformers.js_config attention_softmax_in_fp32
    scale_attention_softmax_in_fp32""".split())
COMMON = {name: name for name in """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings hidden_act rope_theta rope_scaling tie_word_embeddings
    attention_dropout bos_token_id eos_token_id pad_token_id""".split()} | dict(norm_eps="rms_norm_eps")
BIASES = dict(attention_bias="attention_bias", attention_output_bias="attention_bias")
SLIDING = dict(sliding_window="sliding_window")

LAYER = "model.layers.{}."
LLAMA = {
    "embed": "model.embed_tokens",
    "layers.{}.attention_norm": LAYER + "input_layernorm",
    "layers.{}.attention.qkv": tuple(LAYER + f"self_attn.{n}_proj" for n in "qkv"),
    "layers.{}.attention.q_norm": LAYER + "self_attn.q_norm",
    "layers.{}.attention.k_norm": LAYER + "self_attn.k_norm",
    "layers.{}.attention.o": LAYER + "self_attn.o_proj",
    "layers.{}.mlp_norm": LAYER + "post_attention_layernorm",
    "layers.{}.mlp.gate_up": (LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj"),
    "layers.{}.mlp.down": LAYER + "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
GEMMA2 = LLAMA | {
    "layers.{}.attention_output_norm": LAYER + "post_attention_layernorm",
    "layers.{}.mlp_norm": LAYER + "pre_feedforward_layernorm",
    "layers.{}.mlp_output_norm": LAYER + "post_feedforward_layernorm",
}
GPT2 = {
    "embed": "transformer.wte",
    "position_embed": "transformer.wpe",
    "layers.{}.attention_norm": "transformer.h.{}.ln_1",
    "layers.{}.attention.qkv": Transposed("transformer.h.{}.attn.c_attn"),
    "layers.{}.attention.o": Transposed("transformer.h.{}.attn.c_proj"),
    "layers.{}.mlp_norm": "transformer.h.{}.ln_2",
    "layers.{}.mlp.up": Transposed("transformer.h.{}.mlp.c_fc"),
    "layers.{}.mlp.down": Transposed("transformer.h.{}.mlp.c_proj"),
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
ROTARY_BUFFER = (LAYER + "self_attn.rotary_emb.inv_freq",)
GEMMA_FIXED = dict(norm_offset=1.0, scale_embedding=True)
GEMMA2_FIELDS = COMMON | BIASES | SLIDING | dict(
    hidden_act="hidden_activation", layer_types="layer_types", query_pre_attn_scalar="query_pre_attn_scalar",
    attn_logit_softcapping="attn_logit_softcapping", final_logit_softcapping="final_logit_softcapping")
GEMMA2_DEFAULTS = dict(head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, pad_token_id=0,
                       eos_token_id=1, bos_token_id=2, sliding_window=4096, sliding_window_pattern=2)
QWEN_DEFAULTS = dict(tie_word_embeddings=False, max_position_embeddings=32768, sliding_window=4096,
                     use_sliding_window=False, max_window_layers=28)

FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", LLAMA, COMMON | BIASES | SLIDING | dict(layer_types="layer_types"),
                    fixed=dict(qk_norm="head"), defaults=QWEN_DEFAULTS | dict(head_dim=128)),
    "llama": Family("LlamaForCausalLM", LLAMA, COMMON | BIASES | dict(mlp_bias="mlp_bias"),
                    defaults=dict(tie_word_embeddings=False, max_position_embeddings=2048, bos_token_id=1,
                                  eos_token_id=2), drop=ROTARY_BUFFER),
    "mistral": Family("MistralForCausalLM", LLAMA, COMMON | SLIDING, drop=ROTARY_BUFFER,
                      defaults=dict(tie_word_embeddings=False, max_position_embeddings=131072, sliding_window=4096,
                                    num_key_value_heads=8, bos_token_id=1, eos_token_id=2)),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA, COMMON | SLIDING | dict(layer_types="layer_types"),
                    fixed=dict(attention_bias=True, attention_output_bias=False), defaults=QWEN_DEFAULTS),
    "gemma": Family("GemmaForCausalLM", LLAMA, COMMON | BIASES, fixed=GEMMA_FIXED,
                    defaults=dict(head_dim=256, hidden_act="gelu_pytorch_tanh", max_position_embeddings=8192,
                                  pad_token_id=0, eos_token_id=1, bos_token_id=2),
                    only=dict(hidden_activation="gelu_pytorch_tanh"),
                    alias=dict(hidden_act={"gelu": "gelu_pytorch_tanh"})),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA2, GEMMA2_FIELDS, fixed=GEMMA_FIXED | dict(norm_position="sandwich"),
                     defaults=GEMMA2_DEFAULTS | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                                                     max_position_embeddings=8192),
                     only=dict(hidden_act="gelu_pytorch_tanh")),
    "gemma3_text": Family("Gemma3ForCausalLM", GEMMA2,
                          {k: v for k, v in GEMMA2_FIELDS.items() if k != "attn_logit_softcapping"}
                          | dict(rope_local_base_freq="rope_local_base_freq"),
                          fixed=GEMMA_FIXED | dict(norm_position="sandwich", qk_norm="head"),
                          defaults=GEMMA2_DEFAULTS | dict(sliding_window_pattern=6, max_position_embeddings=131072,
                                                          rope_theta=1000000.0, rope_local_base_freq=10000.0),
                          only=dict(hidden_act="gelu_pytorch_tanh")),
    "gpt2": Family("GPT2LMHeadModel", GPT2,
                   dict(vocab_size="vocab_size", hidden_size="n_embd", num_hidden_layers="n_layer",
                        num_attention_heads="n_head", intermediate_size="n_inner", norm_eps="layer_norm_epsilon",
                        max_position_embeddings="n_positions", hidden_act="activation_function",
                        tie_word_embeddings="tie_word_embeddings", attention_dropout="attn_pdrop",
                        hidden_dropout="resid_pdrop", bos_token_id="bos_token_id", eos_token_id="eos_token_id",
                        pad_token_id="pad_token_id"),
                   fixed=dict(norm="layer", position="learned", gated=False, attention_bias=True, mlp_bias=True),
                   defaults=dict(n_positions=1024, layer_norm_epsilon=1e-5, activation_function="gelu_new",
                                 attn_pdrop=0.1, resid_pdrop=0.1, bos_token_id=50256, eos_token_id=50256),
                   only=dict(scale_attn_weights=True),
                   drop=("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias")),
    # Three more that need nothing new.
    "phi3": Family("Phi3ForCausalLM",
                   LLAMA | {"layers.{}.attention.qkv": LAYER + "self_attn.qkv_proj",
                            "layers.{}.mlp.gate_up": LAYER + "mlp.gate_up_proj"},
                   COMMON | SLIDING | dict(hidden_dropout="resid_pdrop", partial_rotary_factor="partial_rotary_factor"),
                   defaults=dict(rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=4096,
                                 bos_token_id=1, eos_token_id=32000, pad_token_id=32000),
                   only=dict(rope_scaling=None)),
    "olmo2": Family("Olmo2ForCausalLM",
                    GEMMA2 | {"layers.{}.mlp_norm": "", "layers.{}.attention_norm": ""}, COMMON | BIASES,
                    fixed=dict(norm_position="output", qk_norm="full"),
                    defaults=dict(rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=2048,
                                  eos_token_id=50279, pad_token_id=1)),
    "starcoder2": Family("Starcoder2ForCausalLM",
                         LLAMA | {"layers.{}.mlp.up": LAYER + "mlp.c_fc", "layers.{}.mlp.down": LAYER + "mlp.c_proj"},
                         COMMON | SLIDING | dict(
                             norm_eps="norm_epsilon", attention_bias="use_bias", attention_output_bias="use_bias",
                             mlp_bias="use_bias", hidden_dropout="residual_dropout"),
                         fixed=dict(norm="layer", gated=False),
                         defaults=dict(use_bias=True, norm_epsilon=1e-5, hidden_act="gelu_pytorch_tanh",
                                       num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=50256,
                                       eos_token_id=50256), only=dict(activation_function="gelu", layer_norm_epsilon=1e-5, mlp_type="default",
                                   norm_type="layer_norm", scale_attn_weights=True)),
}
# What no other family can express (an architecture changed on the fly) keeps our own names; only tinylm loads it.
FAMILIES["tinylm"] = Family("TinyLM", {}, {f.name: f.name for f in fields(Config) if f.name != "model_type"})


def config_from_hf(raw: dict, source: str = "config.json") -> Config:
    """The Config that a `config.json` describes, in the dialect of transformers 4 or 5.

    Raises Error for an unknown model_type, and for any field that would change what the model computes and that this
    file does not support.
    """
    name = raw.get("model_type")
    require(name in FAMILIES, f"{source}: model_type = {name!r} is not supported (supported: {', '.join(FAMILIES)})")
    row = FAMILIES[name]
    raw = row.defaults | _flat_rope(raw, source)
    if raw.get("use_sliding_window") is False:
        raw["sliding_window"] = None
    window, period = raw.get("sliding_window"), raw.get("_sliding_window_pattern", raw.get("sliding_window_pattern"))
    if raw.get("layer_types") is None and window is not None and "layer_types" in row.fields:
        first = raw.get("max_window_layers") or 0
        raw["layer_types"] = [LAYER_TYPES[i >= first and not (period and (i + 1) % period == 0)]
                              for i in range(raw.get("num_hidden_layers", 0))]
    for key, value in raw.items():
        value = row.alias.get(key, {}).get(value, value) if isinstance(value, str) else value
        raw[key] = value
        if key in row.only and value not in (None, row.only[key]):
            raise Error(f"{source}: {key} = {value!r} is not supported for {name} (supported: {row.only[key]!r})")
        known = key in row.fields.values() or key in row.only or key in INERT or key == "use_sliding_window"
        if not known and not key.startswith("_") and value not in (None, False, [], {}, ""):
            raise Error(f"{source}: {key} = {value!r} is not supported for {name}; remove the field if it does not "
                        "change what the model computes")
    values = NEUTRAL | {ours: raw[theirs] for ours, theirs in row.fields.items() if theirs in raw} | row.fixed
    for key in ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size"):
        require(number(values.get(key), 1, 2**31, int), f"{source}: {row.fields[key]} = {values.get(key)!r}, expected a "
                "positive integer")
    defaulted = {f.name for f in fields(Config) if f.default is not None and f.default is not MISSING}
    try:  # null means the default, but for the fields where it says something of its own
        return Config(**{k: v for k, v in values.items() if v is not None or k not in defaulted - {"qk_norm"}},
                      model_type=name)
    except Error as error:  # which names our field: name theirs
        ours, rest = str(error).removeprefix("config: ").split(" ", 1)
        raise Error(f"{source}: {row.fields.get(ours, ours)} {rest}") from None
    except TypeError as error:
        raise Error(f"{source}: a field has a value of the wrong kind ({error})") from None


def _flat_rope(raw: dict, source: str) -> dict:
    """transformers 5 nests `rope_parameters`, per layer type where these differ; take it back to the flat names."""
    raw = dict(raw)
    rope = raw.pop("rope_parameters", None)
    if not rope:
        return raw
    require(isinstance(rope, dict), f"{source}: rope_parameters = {rope!r}, expected an object with rope_type")
    full, local = (rope.get(kind) for kind in LAYER_TYPES) if set(rope) & set(LAYER_TYPES) else (rope, None)
    full = dict(full or {})
    if local:
        local = dict(local)
        raw["rope_local_base_freq"] = local.pop("rope_theta", None)
        require(local in ({}, {"rope_type": "default"}), f"{source}: rope_parameters of sliding_attention = {local} is "
                "not supported (supported: rope_type 'default')")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in full:
            raw[key] = full.pop(key)
    raw["rope_scaling"] = full if full.get("rope_type", full.get("type", "default")) != "default" else None
    return raw


def config_to_hf(config: Config) -> dict:
    """The `config.json` of a config, in the flat dialect that transformers 4 and 5 both read.

    Without a `model_type` it is the first family that can express it. Raises Error where the named family cannot.
    """
    for name in [config.model_type] if config.model_type else FAMILIES:
        row = FAMILIES[name]
        raw = {"architectures": [row.architecture], "model_type": name, "initializer_range": config.initializer_range}
        raw |= {theirs: getattr(config, ours) for ours, theirs in row.fields.items()}
        if "use_sliding_window" in row.defaults:
            raw["use_sliding_window"] = config.sliding_window is not None
        try:  # written right is what reads back as the same
            back = config_from_hf(raw, "config")
        except Error as error:
            lost = str(error)
            continue
        lost = [f"{f.name} = {getattr(config, f.name)!r}" for f in fields(Config)
                if f.name not in ("model_type", "hidden_dropout", "initializer_range")
                and getattr(back, f.name) != getattr(config, f.name)]
        if not lost:
            return raw
        lost = f"config: {', '.join(lost)}"
    raise Error(f"{lost} cannot be written as model_type {name!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------

def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 (Zhang & Sennrich 2019)."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias. A single row on a CPU only waits for memory, and there the compiler's fused sum streams the
    weights twice as fast as the library's matrix product does."""
    if torch.compiler.is_dynamo_compiling() and x.device.type == "cpu" and x.shape[:-1].numel() == 1:
        y = (x.reshape(1, -1) * weight).sum(-1).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Rotary positions (Su et al. 2021): turn the pairs (i, i + r/2) of each head's first r channels, pass the others.

    x (batch, seq, heads * head_dim); cos, sin (batch, seq, r / 2).
    """
    half, x = cos.shape[-1], rearrange(x, "b s (h d) -> b s h d", d=head_dim)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    x1, x2, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return rearrange(torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1), "b s h d -> b s (h d)")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, head_dim: int, scale: float,
           softcap: float | None = None, dropout: float = 0.0, cache=None, layer: int = 0) -> Tensor:
    """softmax(q k^T scale) v with grouped queries, (batch, seq, heads * head_dim); scores are soft-capped where
    `softcap` is given (Gemma 2).

    q (batch, seq, heads * head_dim); k, v (batch, seq, kv_heads * head_dim), which join those of the layer in the
    cache; mask (batch, 1, seq, keys), True where attention is allowed, or None for the causal square, which lets the
    flash kernels in.
    """
    q, k, v = (rearrange(x, "b s (h d) -> b h s d", d=head_dim) for x in (q, k, v))
    if cache is not None:
        k, v = cache.update(layer, k, v)
    groups, s = q.shape[1] // k.shape[1], q.shape[2]
    if softcap is not None:
        if mask is None:
            mask = torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32).to(q.dtype)
        x = F.dropout(weights, dropout) @ v
    elif mask is None:
        x = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale, enable_gqa=groups > 1)
    else:  # queries that share a key head stand below each other, so that keys are read once and not expanded
        q = rearrange(q, "b (g r) s d -> b g (r s) d", r=groups)
        mask = mask.repeat(1, 1, groups, 1) if s > 1 and groups > 1 else mask
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        x = rearrange(x, "b g (r s) d -> b (g r) s d", s=s)
    return rearrange(x, "b h s d -> b s (h d)")


class Linear(nn.Linear):
    """nn.Linear through the leaf `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """Root-mean-square norm, or layer norm where the config says so, over the last axis."""

    def __init__(self, config: Config, size: int):
        super().__init__()
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return rms_norm(x, self.weight.float() + self.offset if self.offset else self.weight, self.eps)


class Rotary(nn.Module):
    """Angles of the rotary positions: (batch, seq) positions to cos and sin, each (batch, seq, rotary_dim / 2).

    Scalings: linear (kaiokendev 2023), dynamic (NTK-aware, per row: its own length stretches its base), llama3
    (Llama 3.1) and yarn (Peng et al. 2023).
    """

    def __init__(self, config: Config, theta: float, scaling: dict | None):
        super().__init__()
        scaling = scaling or {"rope_type": "default"}
        self.kind, self.theta, self.dim = scaling.get("rope_type", scaling.get("type")), theta, config.rotary_dim
        self.factor, self.limit = scaling.get("factor", 1.0), config.max_position_embeddings
        original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
        self.magnitude = 1.0
        # Explicitly on the CPU: a model is made on the meta device before its weights are read.
        inv_freq = 1.0 / theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim)
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
        self.magnitude = scaling.get("attention_factor")
        if self.magnitude is None:
            m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
            self.magnitude = magnitude(m) / magnitude(m_all) if m and m_all else magnitude(1)
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
    """Grouped-query self-attention with one fused query-key-value projection."""

    def __init__(self, config: Config):
        super().__init__()
        self.sizes, self.head_dim = config.qkv_sizes, config.head_dim
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap, self.dropout = config.attn_logit_softcapping, config.attention_dropout
        self.qkv = Linear(config.hidden_size, sum(self.sizes), bias=config.attention_bias)
        self.o = Linear(self.sizes[0], config.hidden_size, bias=config.attention_output_bias)
        q_width, k_width = {None: (0, 0), "head": (self.head_dim,) * 2, "full": self.sizes[:2]}[config.qk_norm]
        self.q_norm = Norm(config, q_width) if q_width else None
        self.k_norm = Norm(config, k_width) if k_width else None

    def forward(self, x: Tensor, rope: tuple | None, mask: Tensor | None, cache=None, layer: int = 0) -> Tensor:
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        if self.q_norm is not None:
            q, k = (norm(x.unflatten(-1, (-1, len(norm.weight)))).flatten(-2)
                    for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        if rope is not None:
            q, k = (rotate(x, *rope, self.head_dim) for x in (q, k))
        dropout = self.dropout if self.training else 0.0
        return self.o(attend(q, k, v, mask, self.head_dim, self.scale, self.softcap, dropout, cache, layer))


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
    """Attention and MLP, each added to the residual stream, normed before (pre), after (output) or both (sandwich)."""

    def __init__(self, config: Config):
        super().__init__()
        before, after = config.norm_position != "output", config.norm_position != "pre"
        self.attention_norm = Norm(config, config.hidden_size) if before else nn.Identity()
        self.attention = Attention(config)
        self.attention_output_norm = Norm(config, config.hidden_size) if after else nn.Identity()
        self.mlp_norm = Norm(config, config.hidden_size) if before else nn.Identity()
        self.mlp = MLP(config)
        self.mlp_output_norm = Norm(config, config.hidden_size) if after else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.dropout(self.attention_output_norm(self.attention(self.attention_norm(x), *context)))
        return x + self.dropout(self.mlp_output_norm(self.mlp(self.mlp_norm(x))))


# ---------------------------------------------------------------------------------------------------------------------
# Positions and the key-value cache. One rule masks everything: a query sees the keys whose position is not after its
# own (and, in a sliding layer, less than a window before). Padding has a position after all others.
# ---------------------------------------------------------------------------------------------------------------------

NEVER = 2**30  # the position of padding and of cache columns not written yet


def count_positions(mask: Tensor, start: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """Positions of queries and of keys, each (batch, seq), from a mask of real tokens with padding anywhere."""
    positions = start + mask.long().cumsum(-1) - 1
    return positions.clamp(min=0), torch.where(mask.bool(), positions, NEVER)


def visible(positions: Tensor, key_positions: Tensor, window: int | None = None) -> Tensor:
    """The attention mask (batch, 1, seq, keys) of query and key positions, True where a query may look."""
    distance = positions[:, None, :, None] - key_positions[:, None, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


class KVCache:
    """Keys and values of every layer, (batch, kv_heads, length, head_dim), allocated once and written in place.

    All rows write the same columns, each at positions of its own, so that prompts padded on either side batch as they
    are. The write position is a tensor: a compiled decode step keeps one shape, and nothing waits for the device.
    """

    def __init__(self, config: Config, batch: int, length: int, dtype=torch.float32, device=None):
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
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


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

class TinyLM(nn.Module):
    """A decoder language model: token ids (batch, seq) to logits (batch, seq, vocab)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.tokenizer, self.generation_config = config, None, {}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.position_embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary = nn.ModuleDict({"full_attention": Rotary(config, config.rope_theta, config.rope_scaling)})
            if config.rope_local_base_freq is not None:
                self.rotary["sliding_attention"] = Rotary(config, config.rope_local_base_freq, None)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config, config.hidden_size)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("embedding_scale", torch.tensor(config.hidden_size ** 0.5, device="cpu"), persistent=False)
        if not self.embed.weight.is_meta:
            self.apply(self._init)
            self.tokenizer = ByteTokenizer() if config.vocab_size >= ByteTokenizer.size else None

    def _init(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
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

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, cache=None,
                columns: Tensor | None = None) -> Tensor:
        """Logits (batch, seq, vocab) for token ids (batch, seq).

        attention_mask (batch, seq), 1 for a token and 0 for padding on either side; a cache (its own columns only) if
        the ids continue what it holds; columns (batch, n) to get logits (batch, n, vocab) of those columns alone.
        """
        config, (batch, seq) = self.config, input_ids.shape
        require(config.position != "learned" or cache is not None or seq <= config.max_position_embeddings,
                f"input_ids: {seq} tokens, but the model has only {config.max_position_embeddings} positions")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions, key_positions = count_positions(real) if cache is None else cache.extend(real)
        masks, ropes = {}, {}
        for kind in dict.fromkeys(config.layer_types):
            window = config.sliding_window if kind == "sliding_attention" else None
            causal = cache is None and attention_mask is None and (window is None or seq <= window)
            masks[kind] = None if causal else visible(positions, key_positions, window)
            if config.position == "rope":
                ropes[kind] = (self.rotary[kind] if kind in self.rotary else self.rotary["full_attention"])(positions)
        x = self.embed(input_ids)
        if config.scale_embedding:
            x = x * self.embedding_scale.to(x.dtype)  # rounded as the reference rounds it
        if config.position == "learned":
            x = x + self.position_embed(positions)
        for layer, (block, kind) in enumerate(zip(self.layers, config.layer_types)):
            x = block(x, ropes.get(kind), masks[kind], cache, layer)
        if columns is not None:
            x = x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))
        logits = linear(self.norm(x), self.embed.weight if self.head is None else self.head.weight)
        if config.final_logit_softcapping is not None:
            logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
        return logits

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype | None = None, device=None) -> TinyLM:
        """The model in a checkpoint folder, in eval mode: config.json, model.safetensors (or its sharded index) and
        tokenizer.json where there is one. dtype None keeps the stored one.

        Raises Error where the folder lacks a file or a tensor, has one too many or of a wrong shape, or where
        config.json asks for something unsupported.
        """
        folder, device = Path(folder), usable_device(device or "cpu")
        config = config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
        with torch.device("meta"):
            lm = cls(config)
        shapes = {name: tensor.shape for name, tensor in lm.state_dict().items()}
        state = read_tensors(folder, config, shapes, dtype, device)
        lm.load_state_dict(state, assign=True)
        for parameter in lm.parameters():
            parameter.requires_grad_(True)
        lm.tokenizer = load_tokenizer(folder)
        generation = folder / "generation_config.json"
        lm.generation_config = read_json(generation) if generation.exists() else {}
        return lm.to(device).eval()

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors, generation_config.json and the tokenizer's files, each one at once.

        Raises Error where the architecture cannot be written as the config's `model_type`.
        """
        raw = config_to_hf(self.config) | {"torch_dtype": str(self.dtype).removeprefix("torch.")}
        tensors = to_checkpoint(self.state_dict(), self.config, raw["model_type"])
        ids = {f"{name}_token_id": getattr(self.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (self.tokenizer.files if self.tokenizer else {}).items():
            write_file(folder / name, lambda path: path.write_bytes(content))
        write_json(folder / "generation_config.json", self.generation_config or ids)
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        write_json(folder / "config.json", raw)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 128,
                 temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
                 min_p: float | None = None, repetition_penalty: float = 1.0, eos_token_id="config", stop=None,
                 seed: int | None = None, compile: bool = False) -> Tensor:
        """Continue every row of (batch, seq): (batch, seq + new), with the pad id after a row's end.

        Temperature 0 is greedy. eos_token_id is an id, several, or None to never end; "config" takes the
        checkpoint's; `stop` is a string or a list of them, and ends a row once its new text has one. The same seed gives the same text, whatever stands in the
        other rows. `compile` compiles the decode step (CUDA graphs on CUDA). Raises Error for arguments out of range.
        """
        steps = list(self.decode(input_ids, attention_mask, max_new_tokens, eos_token_id, stop, seed, compile,
                                 temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                                 repetition_penalty=repetition_penalty))
        new = torch.stack([token for token, _ in steps], dim=1)
        running = torch.stack([alive for _, alive in steps], dim=1).any(0).sum()  # columns until the last row ended
        return torch.cat((input_ids, new[:, :int(running)]), dim=1)

    def stream(self, text: str | list[int], max_new_tokens: int = 128, stop=None, eos_token_id="config", **options):
        """The continuation of a text (or of its ids), piece by piece, whole characters only, up to a stop string; with
        the options of `generate`."""
        require(self.tokenizer, "stream: the checkpoint has no tokenizer.json; use generate with token ids")
        ends = self.ends(eos_token_id)
        ids = (self.tokenizer.encode(text) if isinstance(text, str) else list(text)) or [*ends, 0][:1]
        steps = self.decode(torch.tensor([ids], device=self.device), None, max_new_tokens, ends, **options)
        tokens = (int(token) for token, _ in steps)
        return text_pieces(self.tokenizer, (t for t in tokens if t not in ends), stop_strings(stop))

    def chat(self, messages: list[dict], **options):
        """The answer to a conversation of {"role", "content"}, as `stream` gives it."""
        require(self.tokenizer, "chat: the checkpoint has no tokenizer.json")
        return self.stream(self.tokenizer.encode(chat_prompt(self.tokenizer, messages), special=False), **options)

    def ends(self, eos_token_id="config") -> tuple:
        """Ids that end a text: those given; for "config" those of the generation config, else those of the config."""
        if eos_token_id == "config":
            eos_token_id = self.generation_config.get("eos_token_id", self.config.eos_token_id)
        ids = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, (int, str)) else eos_token_id
        require(all(number(i, -1, 2**31, int) for i in ids), f"eos_token_id = {eos_token_id!r}, expected integers")
        return tuple(ids)

    @torch.no_grad()
    def decode(self, input_ids, attention_mask=None, max_new_tokens=128, eos_token_id="config", stop=None, seed=None,
               compile=False, **sampling):
        """Yield, per step, the new ids (batch,) and which rows (batch,) had not ended before it."""
        knobs, mask = Sampling(**sampling), torch.ones_like(input_ids) if attention_mask is None else attention_mask
        batch, seq = self._checked(input_ids, mask, max_new_tokens)
        ends, stop, device = self.ends(eos_token_id), stop_strings(stop), input_ids.device
        require(seed is None or number(seed, -2**63, 2**63, int), f"seed = {seed!r}, expected an integer")
        require(not stop or self.tokenizer, f"stop = {stop!r} needs a tokenizer.json, which the checkpoint lacks")
        pad = self.generation_config.get("pad_token_id", self.config.pad_token_id)
        pad = pad if pad is not None else ends[0] if ends else 0
        length = -(-(seq + max_new_tokens) // CACHE_BUCKET) * CACHE_BUCKET
        state, step = self._decoder(batch, length, compile)
        state.start(input_ids, mask, torch.randint(2**31, ()) if seed is None else seed)
        ends = torch.tensor(ends, dtype=torch.long, device=device)
        columns = (mask.long() * torch.arange(1, seq + 1, device=device)).argmax(-1, keepdim=True)
        look = 1 if stop or device.type == "cpu" else 16  # steps between looks at the device: a look waits for it
        rows = [[] for _ in range(batch)]
        self._step(state, input_ids, mask, columns, knobs, ends, pad)
        try:
            for i in range(1, max_new_tokens + 1):
                token, alive = state.token[:, 0].clone(), state.alive.clone()
                yield token, alive
                for row, text in enumerate(rows if stop else ()):
                    text.append(int(token[row]))
                    if any(s in self.tokenizer.decode(text[-2 * len(s.encode()) - 8:]) for s in stop):
                        state.done[row] = True
                if i == max_new_tokens or i % look == 0 and bool(state.done.all()):
                    return
                if compile and device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                step(state, state.token, state.one, None, knobs, ends, pad)
        finally:
            self._idle = state if compile else None

    def _step(self, state, ids, mask, columns, knobs, ends, pad):
        """One step, prefill or decode: nothing here waits for the device or changes shape between steps."""
        logits = self(ids, mask, cache=state.cache, columns=columns)[:, -1].float()
        if knobs.repetition_penalty != 1:
            penalized = torch.where(logits > 0, logits / knobs.repetition_penalty, logits * knobs.repetition_penalty)
            logits = torch.where(state.seen, penalized, logits)
        token = torch.where(state.done, pad, sample(logits, knobs, state.seed, state.count))
        state.alive.copy_(~state.done)
        state.done |= (token[:, None] == ends).any(-1)
        state.seen.scatter_(1, token[:, None], True)
        state.token.copy_(token[:, None])
        state.count += 1

    def _decoder(self, batch, length, compile):
        """The state of a generation and its step. A compiled step finds the tensors of the last generation again, at
        the same addresses, unless their shapes differ or it is still running."""
        if not compile:
            return Decoding(self.config, batch, length, self.dtype, self.device), self._step
        if not hasattr(self, "_compiled"):
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self._compiled, self._idle = torch.compile(self._step, fullgraph=True, dynamic=False, mode=mode), None
        state, self._idle = self._idle, None
        shape = (batch, self.config.num_key_value_heads, length, self.config.head_dim)
        like = (shape, self.dtype, self.device)
        if state is None or (tuple(state.cache.k[0].shape), state.cache.k[0].dtype, state.cache.k[0].device) != like:
            state = Decoding(self.config, batch, length, self.dtype, self.device)
            for tensor in state.tensors():
                torch._dynamo.mark_static_address(tensor, guard=False)
        return state, self._compiled

    def _checked(self, input_ids, mask, max_new_tokens) -> tuple:
        require(input_ids.ndim == 2 and input_ids.shape[1] and not input_ids.is_floating_point(), "input_ids: "
                f"{input_ids.dtype} of shape {tuple(input_ids.shape)}, expected ids (batch, seq)")
        require(mask.shape == input_ids.shape and bool(mask.any(-1).all()), f"attention_mask: shape "
                f"{tuple(mask.shape)}, expected {tuple(input_ids.shape)} and a token in every row")
        require(number(max_new_tokens, 1, 2**31, int), f"max_new_tokens = {max_new_tokens!r}, expected a positive integer")
        least, most = int(input_ids.min()), int(input_ids.max())
        require(0 <= least and most < self.config.vocab_size, f"input_ids: ids {least} to {most}, expected 0 to "
                f"vocab_size - 1 = {self.config.vocab_size - 1}")
        seq, limit = input_ids.shape[1], self.config.max_position_embeddings
        require(self.config.position != "learned" or seq + max_new_tokens <= limit, f"max_new_tokens = "
                f"{max_new_tokens} after {seq} tokens is more than the model's {limit} positions")
        return input_ids.shape


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


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Error(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Error(f"{path}: not readable as JSON ({error})") from None
    require(isinstance(content, dict), f"{path}: expected a JSON object")
    return content


def sources(name: str, model_type: str) -> tuple[tuple, type]:
    """Which tensors of a family's checkpoint make up our tensor `name`, and the kind of its row."""
    table, (module, kind) = FAMILIES[model_type].tensors, name.rsplit(".", 1)
    if not table:
        return (name,), str
    layer = next((part for part in module.split(".") if part.isdigit()), "")
    row = table.get(module.replace(f".{layer}.", ".{}.") if layer else module)
    require(row, f"{name}: model_type {model_type!r} has no such tensor; use model_type 'tinylm'")
    theirs = row if isinstance(row, tuple) else (row,)
    return tuple(f"{n.format(layer)}.{kind}" for n in theirs), type(theirs[0])


def fused_sizes(name: str, config: Config) -> tuple:
    """Rows that each part has in a fused projection of ours."""
    return config.qkv_sizes if ".qkv." in name else (config.intermediate_size,) * 2


def to_checkpoint(state: dict, config: Config, model_type: str) -> dict:
    """Our state dict under a family's names: fused tensors split, Conv1D weights transposed."""
    out = {}
    for name, tensor in state.items():
        theirs, kind = sources(name, model_type)
        parts = tensor.split(fused_sizes(name, config)) if len(theirs) > 1 else [tensor]
        out |= {n: (p.t() if kind is Transposed and p.ndim == 2 else p).contiguous() for n, p in zip(theirs, parts)}
    return out


def checkpoint_files(folder: Path) -> dict:
    """Tensor name -> the safetensors file that holds it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return {name: single for name in open_tensors(single).keys()}
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"))
    require(index.exists(), f"{folder}: no model.safetensors and no model.safetensors.index.json"
            + (f" ({', '.join(others)}: only safetensors is read)" if others else ""))
    files = read_json(index).get("weight_map")
    require(isinstance(files, dict) and files, f"{index}: weight_map = {files!r}, expected tensor names and their files")
    for name, file in files.items():
        require(isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors"),
                f"{index}: {name} lies in {file!r}, expected the name of a .safetensors file in this folder")
    return {name: folder / file for name, file in files.items()}


def open_tensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise Error(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise Error(f"{path}: not a readable safetensors file ({error})") from None


def read_tensors(folder: Path, config: Config, shapes: dict, dtype, device) -> dict:
    """Our state dict from a checkpoint: every tensor of `shapes` is found and fits, and nothing is left over."""
    row, files = FAMILIES[config.model_type], checkpoint_files(folder)
    opened = {file: open_tensors(file) for file in sorted(set(files.values()))}
    prefix = row.tensors.get("embed", "").split(".")[0] + "."
    place = min(opened) if len(opened) == 1 else folder / "model.safetensors.index.json"
    bare = bool(row.tensors) and not any(name.startswith(prefix) for name in files)  # saved without its head's wrapper

    def fetch(name, shape=None):
        stored = name.removeprefix(prefix) if bare else name
        require(stored in files, f"{place}: tensor {stored} is missing, expected with shape {tuple(shape or ())}")
        try:
            found = opened[files[stored]].get_slice(stored).get_shape()
            require(shape is None or tuple(found) == tuple(shape),
                    f"{files[stored]}: tensor {stored} has shape {tuple(found)}, expected {tuple(shape or ())}")
            return opened[files[stored]].get_tensor(stored).to(device, dtype)
        except SafetensorError as error:
            raise Error(f"{files[stored]}: tensor {stored} is not readable ({error})") from None

    state, used = {}, set()
    for name, shape in shapes.items():
        theirs, kind = sources(name, config.model_type)
        rows = fused_sizes(name, config) if len(theirs) > 1 else shape[:1]
        flip = kind is Transposed and len(shape) == 2
        parts = [fetch(n, shape[::-1] if flip else (r, *shape[1:])) for n, r in zip(theirs, rows)]
        state[name] = parts[0].t().contiguous() if flip else parts[0] if len(parts) == 1 else torch.cat(parts)
        used |= {n.removeprefix(prefix) if bare else n for n in theirs}
    head = row.tensors.get("head", "head") + ".weight"
    if config.tie_word_embeddings and head in files:  # some writers store the tied head again
        require(torch.equal(fetch(head), state["embed.weight"]),
                f"{files[head]}: tensor {head} differs from the embedding, but tie_word_embeddings = true")
        used.add(head)
    dropped = {pattern.format(i).removeprefix(prefix if bare else "")
               for pattern in row.drop for i in range(config.num_hidden_layers)}
    for name in sorted(set(files) - used - dropped):
        raise Error(f"{files[name]}: tensor {name} is unexpected for model_type {config.model_type!r}")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------

class ByteTokenizer:
    """UTF-8 bytes are their own ids; 256 ends a text and 257 pads. Its tokenizer.json is a byte-level BPE that has no
    merges, so every other library reads it too."""

    eos_token_id, pad_token_id, size = 256, 257, 258
    specials = ("<|endoftext|>", "<|pad|>")

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

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
                "tokenizer_config.json": tokenizer_config(*self.specials)}


def tokenizer_config(eos: str, pad: str) -> bytes:
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": pad,
                       "clean_up_tokenization_spaces": False}, indent=2).encode("utf-8")


class Tokenizer:
    """A checkpoint's tokenizer.json, run by the `tokenizers` library; its other files travel along in `files`."""

    def __init__(self, files: dict):
        from tokenizers import Tokenizer as Backend
        self.files, self.backend = files, Backend.from_str(files["tokenizer.json"].decode("utf-8"))
        self.size = self.backend.get_vocab_size()
        tokens = special_tokens(files)
        self.eos_token_id, self.pad_token_id = (self.backend.token_to_id(tokens.get(name) or "")
                                                for name in ("eos_token", "pad_token"))

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=special).ids

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
        return ByteTokenizer()
    try:
        return Tokenizer(files)
    except ImportError:
        raise Error(f"{folder / 'tokenizer.json'}: reading it needs `pip install tokenizers`") from None
    except Exception as error:  # the library raises plain Exception
        raise Error(f"{folder / 'tokenizer.json'}: not a readable tokenizer ({error})") from None


def chat_prompt(tokenizer, messages: list[dict]) -> str:
    """Messages ({"role", "content"}) as text, through the checkpoint's own chat template in jinja2's sandbox."""
    files = getattr(tokenizer, "files", {})
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    template = files["chat_template.jinja"].decode("utf-8") if "chat_template.jinja" in files else config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if not template:
        raise Error("chat: the checkpoint has no chat_template in tokenizer_config.json and no chat_template.jinja")
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True,
                                                        **special_tokens(files))
    except TemplateError as error:
        raise Error(f"chat: the checkpoint's chat template failed ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------

CACHE_BUCKET = 128  # cache lengths are multiples of it, so that a compiled step serves many prompt lengths


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, in the order of Hugging Face's processors: penalty, temperature, top-k, top-p, min-p."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, low, high in (("temperature", 0, 1e9), ("top_p", 0, 1), ("min_p", 0, 1), ("top_k", 0, 2**31),
                                ("repetition_penalty", 1e-9, 1e9)):
            value, kind = getattr(self, name), int if name == "top_k" else (int, float)
            require(value is None or number(value, low, high, kind), f"{name} = {value!r}, expected "
                    f"{'an integer' if kind is int else 'a number'} from {low:g} to {high:g}")


def hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash of full avalanche (Wellons' two-round prospector) of int64 values below 2^32."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


def uniform(seed: Tensor, step: Tensor, batch: int, vocab: int) -> Tensor:
    """Numbers in (0, 1), (batch, vocab), a function of seed, row, step and column alone: the same on every device and
    in every batch size (Salmon et al. 2011, counter-based random numbers)."""
    rows, columns = (torch.arange(n, device=seed.device) for n in (batch, vocab))
    state = hash32((hash32((hash32(seed & 0xFFFFFFFF) + rows) & 0xFFFFFFFF) + step) & 0xFFFFFFFF)
    bits = hash32((state[:, None] + columns * 0x9E3779B9) & 0xFFFFFFFF)
    return ((bits >> 9).float() + 0.5) / 2**23


def sample(logits: Tensor, knobs: Sampling, seed: Tensor, step: Tensor) -> Tensor:
    """One id per row of logits (batch, vocab), drawn by the Gumbel trick; the most likely at temperature 0."""
    if knobs.temperature == 0:
        return logits.argmax(-1)
    logits = logits / knobs.temperature
    if knobs.top_k:
        least = logits.topk(min(int(knobs.top_k), logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if knobs.top_p is not None and knobs.top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= knobs.top_p  # what stands before it is enough already
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    if knobs.min_p:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < knobs.min_p * p.amax(-1, keepdim=True), -math.inf)
    noise = uniform(seed, step, *logits.shape)
    return (logits - (-noise.log()).log()).argmax(-1)


class Decoding:
    """All that changes while a batch is generated: tensors of fixed shape and address."""

    def __init__(self, config: Config, batch: int, length: int, dtype, device):
        self.cache = KVCache(config, batch, length, dtype, device)
        self.token = torch.zeros((batch, 1), dtype=torch.long, device=device)      # the newest
        self.one = torch.ones((batch, 1), dtype=torch.long, device=device)         # its mask
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)            # the row has ended
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)            # it had not when token was drawn
        self.seen = torch.zeros((batch, config.vocab_size), dtype=torch.bool, device=device)
        self.seed = torch.zeros((), dtype=torch.long, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)

    def start(self, input_ids: Tensor, mask: Tensor, seed):
        self.cache.reset()
        self.done.zero_(), self.count.zero_(), self.seed.copy_(torch.as_tensor(seed))
        real = mask.bool()
        rows = torch.arange(len(real), device=real.device)[:, None].expand_as(real)
        self.seen.zero_()[rows[real], input_ids[real]] = True

    def tensors(self) -> list:
        parts = [*vars(self).values(), *vars(self.cache).values(), *self.cache.k, *self.cache.v]
        return [part for part in parts if isinstance(part, Tensor)]


def stop_strings(stop) -> tuple:
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    require(all(isinstance(s, str) and s for s in stop), f"stop = {stop!r}, expected strings that are not empty")
    return stop


def text_pieces(tokenizer, tokens, stop: tuple = ()):
    """The text of a stream of ids: whole characters only, and nothing from a stop string on."""
    ids, done, shown, held = [], 0, 0, ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids[done:])
        if text.endswith("\ufffd"):  # a character whose bytes are not all there
            continue
        held += text[len(tokenizer.decode(ids[done:shown])):]
        done, shown = shown, len(ids)
        cut = min((held.find(s) for s in stop if s in held), default=-1)
        if cut >= 0:
            yield held[:cut]
            return
        keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > keep:
            yield held[:len(held) - keep]
            held = held[len(held) - keep:]
    rest = held + tokenizer.decode(ids[done:])[len(tokenizer.decode(ids[done:shown])):]
    if rest:
        yield rest


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainOptions:
    """Options of `tinylm.py train`; the command line is made of these fields."""
    out: str = field(default="out", metadata=dict(help="folder for the checkpoints `best` and `last`"))
    size: str = field(default="small", metadata=dict(help="nano, small, medium or large"))
    steps: int = field(default=1000, metadata=dict(help="optimizer steps"))
    batch: int = field(default=16, metadata=dict(help="sequences per step"))
    block: int = field(default=256, metadata=dict(help="tokens per sequence"))
    vocab: int = field(default=0, metadata=dict(help="train a byte-level BPE of this many tokens; 0: bytes"))
    lr: float = field(default=0.02, metadata=dict(help="peak learning rate of Muon (matrices)"))
    adam_lr: float = field(default=4e-3, metadata=dict(help="peak learning rate of AdamW (all else)"))
    weight_decay: float = field(default=0.1, metadata=dict(help="of the matrices"))
    dropout: float = field(default=0.0, metadata=dict(help="of what each sub-layer adds"))
    warmup: float = field(default=0.02, metadata=dict(help="share of the steps in which the rates rise"))
    decay: float = field(default=0.6, metadata=dict(help="share of the steps in which they fall to zero, at the end"))
    clip: float = field(default=1.0, metadata=dict(help="largest norm of the gradient"))
    accumulate: int = field(default=1, metadata=dict(help="parts in which a step's batch is run, to save memory"))
    held_back: float = field(default=0.1, metadata=dict(help="share of the text, at its end, kept for validation"))
    eval_every: int = field(default=250, metadata=dict(help="steps between validations, checkpoints and samples"))
    seed: int = field(default=0, metadata=dict(help="of weights, data order and dropout"))
    device: str = field(default="", metadata=dict(help="cpu, cuda, ...; cuda where there is one"))
    bf16: bool = field(default=False, metadata=dict(help="bfloat16 autocast on the CPU too (on CUDA it is always on)"))
    compile: bool = field(default=False, metadata=dict(help="torch.compile the model"))

    def __post_init__(self):
        for names, low, high in ((("steps", "batch", "block", "accumulate", "eval_every"), 1, 2**31),
                                 (("dropout", "warmup", "decay", "held_back"), 0, 0.99),
                                 (("lr", "adam_lr", "clip"), 1e-12, 1e12), (("weight_decay",), 0, 1e3)):
            for name in names:
                require(number(getattr(self, name), low, high), f"--{name.replace('_', '-')} {getattr(self, name)}: "
                        f"expected a number from {low:g} to {high:g}")
        require(self.size in SIZES, f"--size {self.size}: expected one of {', '.join(SIZES)}")
        require(self.vocab == 0 or self.vocab >= ByteTokenizer.size, f"--vocab {self.vocab}: expected at least "
                f"{ByteTokenizer.size} (all bytes and two specials), or 0 for bytes")
        require(self.batch % self.accumulate == 0, f"--accumulate {self.accumulate}: expected a divisor of --batch "
                f"{self.batch}")


SIZES = {
    "nano": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256),
    "small": dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=512),
    "medium": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4),
    "large": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4),
}


class MuonAdamW:
    """Muon (Jordan 2024) for the matrices of the layers, AdamW for embeddings, head, norms and biases, as one."""

    def __init__(self, model: nn.Module, lr: float = 0.02, adam_lr: float = 4e-3, weight_decay: float = 0.1):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name and "head" not in name]
        others = [p for p in named.values() if not any(p is m for m in matrices)]
        fused = others[0].device.type in ("cuda", "cpu")
        self.names = {p: name for name, p in named.items()}
        self.parts = [torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0,
                                        fused=fused)]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=weight_decay))
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @property
    def param_groups(self) -> list:
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True):
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def tensors(self) -> dict:
        """The whole state, as tensors by `parameter/key`."""
        return {f"{self.names[p]}/{key}": value for part in self.parts for p, state in part.state.items()
                for key, value in state.items()}

    def load_tensors(self, tensors: dict):
        for part in self.parts:
            for p in (p for group in part.param_groups for p in group["params"]):
                prefix = self.names[p] + "/"
                part.state[p] = {key.removeprefix(prefix): value for key, value in tensors.items()
                                 if key.startswith(prefix)}


def next_token_labels(batch: dict) -> Tensor:
    """What a model should say after each token but the last (batch, seq - 1); -100 where it does not matter."""
    labels, mask = batch.get("labels", batch["input_ids"]), batch.get("attention_mask")
    if mask is not None and "labels" not in batch:
        labels = labels.masked_fill(mask == 0, -100)
    return labels[:, 1:]


def next_token_loss(model: nn.Module, batch: dict, bf16: bool = False) -> Tensor:
    """Sum of the cross-entropies, in nats, of the next tokens of a batch: `input_ids` and, where needed,
    `attention_mask` and `labels` (batch, seq; not shifted, -100 is ignored, as in Hugging Face)."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16 or ids.device.type == "cuda"):
        logits = model(ids[:, :-1], None if mask is None else mask[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), next_token_labels(batch).flatten(), reduction="sum")


def train_step(model: nn.Module, optimizer, batch, max_grad_norm: float = 1.0, accumulate: int = 1,
               bf16: bool = False) -> Tensor:
    """One update on a batch of ids (batch, seq), or on a dict as `next_token_loss` takes it, run in `accumulate` parts.
    Returns the mean loss per token, a detached scalar. The optimizer is `MuonAdamW` or any of torch.optim."""
    model.train()
    batch = batch if isinstance(batch, dict) else {"input_ids": batch}
    count, total = (next_token_labels(batch) != -100).sum().clamp(min=1), 0.0
    for rows in zip(*(tensor.chunk(accumulate) for tensor in batch.values())):
        loss = next_token_loss(model, dict(zip(batch, rows)), bf16) / count
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


class Corpus:
    """Token ids of a text file, a jsonl file with a `text` field, or a folder of these: `train`, and `val` the tail."""

    def __init__(self, path, options: TrainOptions, tokenizer=None):
        texts = read_texts(Path(path))
        kept, tail = split_tail(texts, options.held_back)
        self.tokenizer = tokenizer or (train_bpe(kept, options.vocab) if options.vocab else ByteTokenizer())
        self.seed, self.block, self.batch, self.epoch = options.seed, options.block, options.batch, None
        self.train, self.val = self.ids(kept), self.ids(tail)
        self.val_bytes = sum(len(text.encode("utf-8", errors="replace")) for text in tail)
        require(len(self.train) > self.block, f"{path}: {len(self.train)} tokens to train on, expected more than "
                f"--block {self.block}")

    def ids(self, texts: list) -> Tensor:
        """One row of ids; texts end with the end-of-text token, but for the last."""
        end, out = [self.tokenizer.eos_token_id], []
        for i, text in enumerate(texts):
            out += end * (i > 0) + self.tokenizer.encode(text)
        return torch.tensor(out, dtype=torch.int32)

    def draw(self, step: int) -> Tensor:
        """Windows (batch, block + 1) of a step. An epoch is a shuffle of consecutive blocks from a random first
        token; all of it depends on seed and step alone, so that a resumed run goes on."""
        blocks = max((len(self.train) - 1) // self.block - 1, 1)
        starts = []
        for i in range(step * self.batch, (step + 1) * self.batch):
            if i // blocks != self.epoch:
                self.epoch, order = i // blocks, torch.Generator().manual_seed(self.seed * 1_000_003 + i // blocks)
                first = torch.randint(min(self.block, len(self.train) - self.block), (), generator=order)
                self.order = first + self.block * torch.randperm(blocks, generator=order)
            starts.append(self.order[i % blocks])
        return self.train[torch.stack(starts)[:, None] + torch.arange(self.block + 1)].long()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, device, most: int = 2**18) -> tuple[float, float]:
        """Loss on the tail's first `most` tokens in consecutive blocks: (nats per token, bits per byte)."""
        model.eval()
        ids = torch.cat((self.train[-1:], self.val))[:most + 1].long()
        total = 0.0
        for rows in range(0, len(ids) - 1, self.block * self.batch):
            chunk = ids[rows:rows + self.block * self.batch + 1]
            whole = (len(chunk) - 1) // self.block
            windows = [chunk[:whole * self.block + 1].unfold(0, self.block + 1, self.block)] if whole else []
            windows += [chunk[None, whole * self.block:]] if (len(chunk) - 1) % self.block else []
            total += sum(next_token_loss(model, {"input_ids": w.to(device)}).item() for w in windows)
        count = len(ids) - 1
        return total / count, total / (self.val_bytes * count / len(self.val)) / math.log(2)


def read_texts(path: Path) -> list:
    """The texts of a file or, sorted by name, of a folder's .txt, .md and .jsonl files."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".jsonl"))
        require(files, f"{path}: no .txt, .md or .jsonl file in this folder")
        return [text for file in files for text in read_texts(file)]
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise Error(f"{path}: {error.strerror or error}") from None
    if path.suffix != ".jsonl":
        return [content]
    texts = []
    for n, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {"text": ""}
        except ValueError:
            row = None
        require(isinstance(row, dict) and isinstance(row.get("text"), str), f"{path}, line {n}: {line[:60]!r}, expected "
                "an object with a string `text`")
        texts += [row["text"]] if row["text"] else []
    return texts


def split_tail(texts: list, share: float) -> tuple[list, list]:
    """Texts before and after the point that leaves `share` of all characters behind it."""
    left, kept = int(sum(map(len, texts)) * (1 - share)), []
    for i, text in enumerate(texts):
        if len(text) > left:
            return kept + [text[:left]] * (left > 0), [text[left:], *texts[i + 1:]]
        kept.append(text)
        left -= len(text)
    return kept, []


def train_bpe(texts: list, vocab: int) -> Tokenizer:
    """A byte-level BPE of `vocab` tokens, trained by the `tokenizers` library."""
    try:
        from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise Error("--vocab needs `pip install tokenizers`; without it, tokens are bytes") from None
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(ByteTokenizer.specials), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    return Tokenizer({"tokenizer.json": backend.to_str().encode("utf-8"),
                      "tokenizer_config.json": tokenizer_config(*ByteTokenizer.specials)})


def rate(step: int, options: TrainOptions) -> float:
    """Share of the peak learning rate: linear warm-up, then stable, then linear decay to zero."""
    warmup, decay = options.warmup * options.steps, options.decay * options.steps
    return min(1.0, (step + 1) / max(warmup, 1), (options.steps - step) / max(decay, 1))


class Progress:
    """A live line on a terminal; elsewhere a plain one now and then. The loss is fetched only when a line is due."""

    def __init__(self, steps: int, first: int, tokens: int):
        self.steps, self.first, self.tokens, self.live = steps, first, tokens, sys.stderr.isatty()
        self.begin, self.shown, self.width = time.monotonic(), -math.inf, 0

    def line(self, step: int, loss: Tensor, lr: float):
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 10) and step + 1 < self.steps:
            return
        self.shown, done, spent = now, step + 1 - self.first, now - self.begin
        eta = int(spent / done * (self.steps - step - 1))
        text = (f"step {step + 1}/{self.steps}  loss {loss.item():.3f}  lr {lr:.2e}  {done * self.tokens / spent:,.0f} "
                f"tok/s  ETA {eta // 60}:{eta % 60:02d}")
        if self.live:
            print("\r" + text.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str):
        """A line that stays."""
        print("\r".ljust(self.width + 1) + "\r" + text if self.live else text, file=sys.stderr, flush=True)


def new_model(corpus: Corpus, options: TrainOptions) -> TinyLM:
    """A Qwen3 for the corpus; what adds to the residual stream starts at zero, so that training starts smoothly."""
    tokenizer = corpus.tokenizer
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(options.seed)
    lm = TinyLM(Config(vocab_size=-(-tokenizer.size // 64) * 64, max_position_embeddings=max(options.block, 1024),
                       hidden_dropout=options.dropout, model_type="qwen3", **SIZES[options.size], **ids))
    for block in lm.layers:
        nn.init.zeros_(block.attention.o.weight), nn.init.zeros_(block.mlp.down.weight)
    lm.tokenizer = tokenizer
    return lm


def save_training(folder: Path, lm: TinyLM, optimizer: MuonAdamW, progress: dict, options: TrainOptions, data: str):
    """A checkpoint for everyone, and beside it all that `--resume` needs, in one file that is replaced at once."""
    lm.save_pretrained(folder)
    tensors = {f"model/{name}": t for name, t in lm.state_dict().items()}
    tensors |= {f"optimizer/{name}": t for name, t in optimizer.tensors().items()}
    meta = json.dumps({"progress": progress, "options": asdict(options), "data": str(data)})
    write_tensors(folder / "training.safetensors", tensors, {"training": meta})


def load_training(folder: Path) -> tuple[dict, dict]:
    """Tensors and notes of `save_training`."""
    file = open_tensors(folder / "training.safetensors")
    notes = json.loads((file.metadata() or {}).get("training", "null"))
    require(notes, f"{folder / 'training.safetensors'}: not written by tinylm's training")
    return {name: file.get_tensor(name) for name in file.keys()}, notes


def train(data, options: TrainOptions, resume: bool = False) -> TinyLM:
    """Train from scratch on `data` (see `Corpus`), or go on where `options.out`/last stopped: bit for bit the run
    that was not interrupted, since data order and dropout depend on seed and step alone."""
    out, device = Path(options.out), usable_device(options.device)
    tensors, notes = load_training(out / "last") if resume else ({}, None)
    if notes and notes["options"] != (mine := asdict(options)) | {"out": notes["options"]["out"]}:
        name = next(k for k, v in notes["options"].items() if mine.get(k) != v and k != "out")
        raise Error(f"--resume: --{name.replace('_', '-')} was {notes['options'][name]}, not {mine.get(name)}, in the "
                    "run to go on with")
    require(not out.exists() or out.is_dir(), f"--out {out}: is a file, expected a folder")
    corpus = Corpus(data, options, load_tokenizer(out / "last") if resume else None)
    out.mkdir(parents=True, exist_ok=True)
    lm = new_model(corpus, options).to(device)
    optimizer = MuonAdamW(lm, options.lr, options.adam_lr, options.weight_decay)
    at = {"step": 0, "best": None}
    if resume:
        at = notes["progress"]
        lm.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
        optimizer.load_tensors({k.removeprefix("optimizer/"): v.to(device) for k, v in tensors.items()
                                if k.startswith("optimizer/")})
    if options.compile:
        lm.compile(fullgraph=True)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.set_flush_denormal(True)  # a CPU takes a hundred times as long over them
    progress = Progress(options.steps, at["step"], options.batch * options.block)
    progress.note(f"{sum(p.numel() for p in lm.parameters()):,} parameters; {len(corpus.train):,} tokens to train on, "
                  f"{len(corpus.val):,} held back; {device}")
    with interruptible() as interrupted:
        for step in range(at["step"], options.steps):
            torch.manual_seed(options.seed * 1_000_003 + step)
            scale = rate(step, options)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            batch = corpus.draw(step).to(device)
            loss = train_step(lm, optimizer, batch, options.clip, options.accumulate, options.bf16)
            at["step"] = step + 1
            progress.line(step, loss, options.lr * scale)
            due = at["step"] % options.eval_every == 0 or at["step"] == options.steps
            if due:
                validate(lm, corpus, at, out, progress, device)
            if due or interrupted.is_set():
                save_training(out / "last", lm, optimizer, at, options, data)
            if interrupted.is_set() and at["step"] < options.steps:
                progress.note(f"stopped at step {at['step']}; {out / 'last'} is saved; --resume goes on")
                break
    return lm.eval()


def validate(lm: TinyLM, corpus: Corpus, at: dict, out: Path, progress: Progress, device):
    """Score the held-back tail, keep the best, show a sample."""
    if len(corpus.val):
        nats, bits = corpus.evaluate(lm, device)
        best = at["best"] is None or nats < at["best"]
        progress.note(f"step {at['step']}  validation {nats:.4f} nats/token  {bits:.4f} bits/byte" + "  best" * best)
        if best:
            at["best"] = nats
            lm.save_pretrained(out / "best")
    else:
        lm.save_pretrained(out / "best")
    text = corpus.tokenizer.decode(corpus.train[:1].tolist())
    text += "".join(lm.eval().stream(text, 120, temperature=0.8, top_p=0.95, seed=at["step"]))
    progress.note("  | " + text.replace("\n", "\n  | "))


@contextlib.contextmanager
def interruptible():
    """An event that the first Ctrl-C or SIGTERM sets; a second one ends the program as ever."""
    event, names = threading.Event(), (signal.SIGINT, signal.SIGTERM)

    def handle(number, _):
        signal.signal(number, signal.default_int_handler)
        event.set()

    on_main = threading.current_thread() is threading.main_thread()  # no other one may set handlers
    before = {name: signal.signal(name, handle) for name in names if on_main}
    try:
        yield event
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

WEIGHTS = Path(__file__).resolve().parent / "weights"  # the model shipped beside this file


def main(argv: list | None = None) -> int:
    """`tinylm.py train | sample | chat`; an Error is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="tinylm", description="A whole language-model library in one file.")
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("train", help="train a model from scratch on text")
    sub.add_argument("data", help="a text file, a .jsonl with a `text` field, or a folder of these")
    for f in fields(TrainOptions):
        kind = dict(action="store_true") if f.default is False else dict(type=type(f.default), metavar=f.name.upper())
        sub.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                         help=f.metadata["help"] + ("" if f.default in ("", False) else f" (default: {f.default})"))
    sub.add_argument("--resume", action="store_true", help="go on where --out/last stopped, with its options")

    for name, text in (("sample", "continue a prompt"), ("chat", "talk with an instruction-tuned model")):
        sub = commands.add_parser(name, help=text)
        if name == "sample":
            sub.add_argument("folder", nargs="?", default=str(WEIGHTS), help="a checkpoint (default: the shipped one)")
            sub.add_argument("--prompt", default="ROMEO:", help="text to continue (default: ROMEO:)")
        else:
            sub.add_argument("folder", help="a checkpoint with a chat template")
            sub.add_argument("--system", help="the system message")
        sub.add_argument("--max-new-tokens", type=int, default=300 if name == "sample" else 512)
        sub.add_argument("--temperature", type=float, default=0.8 if name == "sample" else 0.0, help="0: greedy")
        sub.add_argument("--top-k", type=int)
        sub.add_argument("--top-p", type=float, default=0.95 if name == "sample" else None)
        sub.add_argument("--min-p", type=float)
        sub.add_argument("--repetition-penalty", type=float, default=1.0)
        sub.add_argument("--stop", action="append", help="end before this text; may be given again")
        sub.add_argument("--seed", type=int)
        sub.add_argument("--compile", action="store_true", help="torch.compile the decode step")
        sub.add_argument("--device", help="cpu, cuda, ...; cuda where there is one")

    options = vars(parser.parse_args(argv))
    try:
        {"train": run_train, "sample": run_sample, "chat": run_chat}[options.pop("command")](options)
    except (Error, OSError) as error:
        print(f"tinylm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_train(options: dict):
    data, resume = options.pop("data"), options.pop("resume")
    if resume:  # what is not said again is as it was
        saved = load_training(Path(options.get("out", TrainOptions.out)) / "last")[1]["options"]
        options = saved | options
    train(data, TrainOptions(**options), resume)


def run_sample(options: dict):
    lm, prompt = TinyLM.from_pretrained(options.pop("folder"), device=usable_device(options.pop("device"))), options.pop("prompt")
    print(prompt, end="", flush=True)
    show(lm.stream(prompt, **options))


def run_chat(options: dict):
    """Questions from standard input, one a line; answers to standard output."""
    lm, system = TinyLM.from_pretrained(options.pop("folder"), device=usable_device(options.pop("device"))), options.pop("system")
    messages, terminal = [{"role": "system", "content": system}] * bool(system), sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", flush=True)
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


if __name__ == "__main__":
    sys.exit(main())
