"""Small models of ours, of every kind that rounding treats differently, and the precisions that each is exported in."""

from pathlib import Path

import torch

from export import PRECISIONS
from tinylm import Config, TinyLM

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "LICENSE").read_text() * 3  # to round for; it doesn't change
SIZES = dict(
    vocab_size=320,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    initializer_range=0.2,
    eos_token_id=256,
    pad_token_id=257,
)
MODELS = {
    "qwen3": dict(num_key_value_heads=2, head_dim=32),
    "window": dict(qk_norm=None, sliding_window=6, attention_bias=True, tie_word_embeddings=False),
    "softcap": dict(
        qk_norm=None,
        norm_position="sandwich",
        norm_offset=1.0,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=15.0,
        scale_embedding=True,
        hidden_act="gelu_pytorch_tanh",
    ),
    "half rotary": dict(head_dim=32, partial_rotary_factor=0.5, model_type="tinylm"),
    "narrow": dict(hidden_size=72, intermediate_size=90, head_dim=32),
    "dynamic": dict(
        qk_norm=None, max_position_embeddings=64, rope_scaling=dict(rope_type="dynamic", factor=2.0)
    ),
    "gpt2": dict(
        norm="layer",
        position="learned",
        gated=False,
        attention_bias=True,
        mlp_bias=True,
        qk_norm=None,
    ),
}
EXPORTS = {
    "qwen3": [*PRECISIONS],
    "window": ["int8"],
    "softcap": ["int4"],
    "half rotary": ["q4f16"],
    "narrow": ["int8", "q4f16"],
    "dynamic": ["int4"],
    "gpt2": ["q4f16"],
}
SLOW = ("dynamic", "gpt2", "narrow", "half rotary", "softcap")
SMALL_CACHES = {
    "qwen3": ["fp16", "q4f16"],
    "window": ["int8"],
    "softcap": ["int4"],
    "half rotary": ["q4f16"],
}
# Exported with the whole of generation in one graph too.
LOOPS = {("qwen3", "fp32"), ("qwen3", "int4")}


def model(name):
    torch.manual_seed(4)
    lm = TinyLM(Config(**SIZES | MODELS[name])).eval().requires_grad_(False)
    for norm in (p for n, p in lm.named_parameters() if "norm" in n):
        norm.add_(torch.randn_like(norm) * 0.1)
    return lm
