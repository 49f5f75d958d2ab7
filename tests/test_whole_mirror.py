"""What stands in tinylm.py and in onnxlm.py: one source where no tensor is concerned, else one result."""

import ast
import inspect

import numpy as np
import pytest
import torch

import onnxlm
import tinylm
from tinylm import Config, TinyLM

# The one computes with tensors, the other with arrays: tests below hold their results equal.
OTHER_BY_PURPOSE = """Error DecodeState choose_beams forbid_bad_words forbid_early_end forbid_repeated_ngrams
    force_first force_last force_token generate_steps keep_min_p keep_top_k keep_top_p penalize_repetition
    sample scale_by_temperature start_ids uniform""".split()


def definitions(module):
    """Name -> source of what a module defines at its top."""
    source = inspect.getsource(module)
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = inspect.getsource(getattr(module, node.name))
        for target in getattr(node, "targets", ()):
            found |= {
                name.id: ast.get_source_segment(source, node)
                for name in ast.walk(target)
                if isinstance(name, ast.Name)
            }
    return found


OURS, THEIRS = definitions(tinylm), definitions(onnxlm)
MIRRORED = sorted(OURS.keys() & THEIRS.keys())


@pytest.mark.parametrize("name", MIRRORED)
def test_a_name_of_both_files_has_one_source(name):
    assert (OURS[name] != THEIRS[name]) == (name in OTHER_BY_PURPOSE)


def test_no_other_name_differs():
    assert {*OTHER_BY_PURPOSE} <= {*MIRRORED} and "GenerationConfig" in MIRRORED


def test_noise_is_the_same():
    for seed in (0, 1, -5, 2**31, 2**63 - 1, -(2**63)):
        for step in (0, 1, 700):
            ours = tinylm.uniform(torch.tensor(seed), torch.tensor(step), 3, 50)
            assert np.array_equal(ours.numpy(), onnxlm.uniform(seed, step, 3, 50))


# ---- what changes logits, and the choice of a token -----------------------------------------------------------------

VOCAB, PROMPTS = 24, [[5, 6, 7, 5, 6], [3, 3, 3], [9]]
OPTIONS = [
    dict(),
    dict(repetition_penalty=1.7),
    dict(no_repeat_ngram_size=1),
    dict(no_repeat_ngram_size=2),
    dict(no_repeat_ngram_size=3),
    dict(bad_words_ids=[[4], [6, 7], [3, 3, 3, 3], [2], [99]], eos_token_id=2),
    dict(min_length=5, eos_token_id=[2, 4, 300]),
    dict(forced_bos_token_id=11),
    dict(forced_eos_token_id=12, max_new_tokens=1),
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=5),
    dict(temperature=1.0, top_k=500),
    dict(temperature=1.0, top_p=0.6),
    dict(temperature=1.0, top_p=0.0),
    dict(temperature=2.0, min_p=0.3),
    dict(temperature=1.0, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.2, min_length=4),
]


@pytest.fixture(scope="module")
def lm():
    return TinyLM(
        Config(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )


def both_states(lm, options):
    """The state after PROMPTS, here and there."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
    config = tinylm.GenerationConfig(**options | {"seed": 5})
    ours = tinylm.DecodeState(lm, ids, (None, None), config)
    ours.begin(ids, mask, (None, None), config)
    ours.cache.extend(mask)
    there = onnxlm.GenerationConfig(**options | {"seed": 5})
    return (ours, config), (onnxlm.DecodeState(ids.numpy(), mask.numpy(), there), there)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_are_processed_and_sampled_alike(options, lm):
    logits = torch.randn(len(PROMPTS), VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    ours, theirs = both_states(lm, options)
    torch.testing.assert_close(
        tinylm.process_logits(logits.clone(), *ours),
        torch.from_numpy(onnxlm.process_logits(logits.numpy().copy(), *theirs)),
    )
    for step in range(8):
        ours[0].count.fill_(step)
        theirs[0].count = step
        tokens = tinylm.sample(logits.clone(), *ours)
        assert tokens.tolist() == onnxlm.sample(logits.numpy().copy(), *theirs).tolist()


def test_beams_are_chosen_alike(lm):
    """Guards the order of candidates: three steps of two rows with three beams."""
    config = dict(num_beams=3, eos_token_id=(2, 3), max_new_tokens=6)
    here, there = tinylm.GenerationConfig(**config), onnxlm.GenerationConfig(**config)
    ids = torch.tensor([[5], [6]]).repeat_interleave(3, 0)
    ours = tinylm.DecodeState(lm, ids, (None, None), here)
    ours.begin(ids, torch.ones_like(ids), (None, None), here)
    ours.cache.extend(torch.ones_like(ids))
    theirs = onnxlm.DecodeState(ids.numpy(), np.ones((6, 1), np.int64), there)
    searches = tinylm.BeamSearch(here, 2), onnxlm.BeamSearch(there, 2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        logits = torch.randn(6, VOCAB, generator=generator)
        tokens = tinylm.choose_beams(logits.clone(), ours, here, searches[0])
        also = onnxlm.choose_beams(logits.numpy().copy(), theirs, there, searches[1])
        assert tokens.tolist() == also.tolist()
        assert searches[0].texts == searches[1].texts
        np.testing.assert_allclose(searches[0].sums, searches[1].sums, rtol=1e-5)
    assert searches[0].open == searches[1].open
