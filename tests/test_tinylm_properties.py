"""Properties that hold for any architecture and any lengths: the cache, padding and batches change no logits, bfloat16
and a saved copy hardly any or none."""

import pytest
import torch
from families import difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinylm import ACTIVATIONS, Config, KVCache, TinyLM

EQUAL = 2e-5


@st.composite
def configs(draw, causal=True):
    """Odd sizes, and any of what makes families differ."""
    one = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    heads, groups = one((1, 1), (2, 1), (3, 3), (4, 2), (6, 3))
    layers, position = (
        one(1, 2, 3),
        one("rope", "rope", "rope", "learned", "sinusoidal", "relative", "learned_relative"),
    )
    groups, width = heads if "relative" in position else groups, one(8, 12, 14)
    scaling = one(
        None,
        None,
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    )
    window = one(None, None, 1, 3, 6) if "relative" not in position else None
    norm_position = one("pre", "post", "output", "sandwich")
    kinds = (
        tuple(one("full_attention", "sliding_attention") for _ in range(layers)) if window else None
    )
    return Config(
        vocab_size=61,
        hidden_size=12 * heads,
        intermediate_size=one(7, 33),
        num_hidden_layers=layers,
        causal=causal,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        max_position_embeddings=64,
        norm=one("rms", "layer"),
        norm_offset=one(0.0, 1.0),
        position=position,
        position_offset=one(0, 2),
        norm_position=norm_position,
        norm_bias=one(True, False),
        first_norm=one(True, True, False),
        use_parallel_residual=norm_position != "post" and one(True, False),
        residual_multiplier=one(1.0, 0.7),
        attention_multiplier=one(None, 0.4),
        embedding_multiplier=one(1.0, 1.3),
        logits_scaling=one(1.0, 2.0),
        no_rope_layers=one(None, [i % 2 for i in range(layers)]),
        rope_scaling=scaling if position == "rope" else None,
        partial_rotary_factor=1.0 if width == 14 else one(1.0, 0.5),
        rope_local_base_freq=one(None, 50.0),
        sliding_window=window,
        layer_types=kinds,
        qk_norm=one(None, "head", "full"),
        attention_bias=one(True, False),
        mlp_bias=one(True, False),
        attn_logit_softcapping=None if "relative" in position else one(None, 2.0),
        hidden_act=one(*ACTIVATIONS),
        final_logit_softcapping=one(None, 3.0),
        gated=one(True, False),
        embedding_size=one(None, 10),
        type_vocab_size=one(0, 2),
        scale_embedding=one(True, False),
        embedding_norm=one(True, False),
        tie_word_embeddings=False,
        scale_logits=one(True, False),
        head="lm" if causal else None,
    )


def made(config, seed):
    """A model whose every weight counts."""
    lm = TinyLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in lm.parameters():
        weight.data += torch.randn(weight.shape, generator=generator) * (
            0.3 if weight.ndim > 1 else 0.2
        )
    return lm


def prop(**strategies):
    """The same examples in every run."""
    quiet = settings(
        max_examples=120,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: quiet(given(seed=st.integers(0, 99), **strategies)(test))


def tokens(seed, *shape):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = st.lists(st.integers(1, 17), min_size=1, max_size=4)
SIDES = st.lists(st.integers(0, 5), min_size=4, max_size=4)


def padded(rows, before):
    """A batch of rows, with so many padding columns before each, and its mask; what is padded holds tokens too."""
    width = max(len(row) + n for row, n in zip(rows, before))
    batch, mask = tokens(7, len(rows), width), torch.zeros(len(rows), width, dtype=torch.long)
    for i, (row, n) in enumerate(zip(rows, before)):
        batch[i, n : n + len(row)], mask[i, n : n + len(row)] = row, 1
    return batch, mask


@prop(config=configs(), chunks=LENGTHS, batch=st.integers(1, 3))
def test_cached_in_any_chunks_is_uncached(config, chunks, batch, seed):
    lm, ids = made(config, seed), tokens(seed, batch, min(sum(chunks), 60))
    cache = KVCache(config, batch, ids.shape[1] + 3)
    parts = [lm(part, cache=cache) for part in ids.split(chunks[0], dim=1)]
    assert difference(torch.cat(parts, dim=1), lm(ids)) < EQUAL


@prop(config=st.booleans().flatmap(configs), lengths=LENGTHS, before=SIDES)
def test_rows_of_a_padded_batch_are_what_they_are_alone(config, lengths, before, seed):
    """Padding at the left, at the right or both, with other rows beside it or none."""
    lm, rows = made(config, seed), [tokens(seed + i, n) for i, n in enumerate(lengths)]
    batch, mask = padded(rows, before)
    for row, out, keep in zip(rows, lm(batch, mask), mask.bool()):
        assert difference(out[keep], lm(row[None])[0]) < EQUAL


@prop(config=configs(), lengths=LENGTHS, before=SIDES)
def test_generation_of_a_padded_batch_is_that_of_each_row(config, lengths, before, seed):
    lm, rows = made(config, seed), [tokens(seed + i, n) for i, n in enumerate(lengths)]
    options = dict(max_new_tokens=4, eos_token_id=None)
    batch, mask = padded(rows, before)
    together = lm.generate(batch, mask, **options)[:, batch.shape[1] :]
    for row, new in zip(
        rows, together
    ):  # ties of nearly equal logits may fall either way: the new ids are forced
        logits = lm(torch.cat((row, new))[None])[0, len(row) - 1 : -1]
        chosen, best = logits.gather(1, new[:, None])[:, 0], logits.amax(-1)
        assert (best - chosen).max() <= EQUAL * logits.abs().max()


@prop(config=st.booleans().flatmap(configs), length=st.integers(1, 20))
def test_bfloat16_is_close(config, length, seed):
    """Measured on models near their initialisation, where rounding is not chaotic."""
    lm, ids = TinyLM(config).eval().requires_grad_(False), tokens(seed, 2, length)
    exact, rounded = lm(ids), lm.bfloat16()(ids).float()
    assert (exact - rounded).abs().mean() < 0.1 * exact.abs().mean().clamp(min=1e-3)


@pytest.mark.slow
@prop(config=configs())
def test_a_saved_copy_is_the_same_model(config, seed, tmp_path_factory):
    folder, lm, ids = tmp_path_factory.mktemp("copy"), made(config, seed), tokens(seed, 2, 9)
    lm.save_pretrained(folder)
    again = TinyLM.from_pretrained(folder)
    assert all(
        torch.equal(weight, again.state_dict()[name]) for name, weight in lm.state_dict().items()
    )
    assert difference(again(ids), lm(ids)) < EQUAL
