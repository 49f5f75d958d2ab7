"""The key-value cache: cached logits are the uncached ones, however the tokens come; and a compiled step stays one."""

import functools
import shutil

import pytest
import torch
from families import CASES, FAMILIES, LENGTH, difference, prompts, ragged, some_slow

import tinylm
from tinylm import KVCache, TinyLM

BY_NAME = {case.name: case for case in CASES}
CHUNKS = {
    "token by token": [1] * LENGTH,
    "prefill, then tokens": [LENGTH - 3, 1, 1, 1],
    "chunks": [4, 1, 7, 2, LENGTH - 14],
    "chunks longer than the window": [9, LENGTH - 9],
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture
def lm(case, folder):
    return TinyLM.from_pretrained(folder(case)).requires_grad_(False)


def length(case):
    """Past its original length a dynamic rope turns every key anew at every length, and longrope once: there, no cache
    is exact, and generate reads a text again."""
    limits = {
        "llama-dynamic": "max_position_embeddings",
        "phi3-long": "original_max_position_embeddings",
    }
    return case.fields[limits[case.name]] if case.name in limits else LENGTH


def cached(lm, ids, mask, sizes, room=5):
    """Logits of ids (batch, seq) that come in chunks of the given sizes."""
    assert sum(sizes) == ids.shape[1]
    cache = KVCache(lm.config, len(ids), ids.shape[1] + room, lm.dtype, lm.device)
    chunks = zip(
        ids.split(sizes, 1),
        mask.split(sizes, 1) if mask is not None else [None] * len(sizes),
        strict=True,
    )
    return torch.cat([lm(chunk, chunk_mask, cache=cache) for chunk, chunk_mask in chunks], dim=1)


def cut(sizes, total):
    """The same chunks for a shorter or longer prompt."""
    sizes = list(sizes)
    while sum(sizes) > total:
        sizes.pop()
    return sizes + [total - sum(sizes)] * (total > sum(sizes))


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_cached_logits_are_the_uncached_ones(case, lm, sizes):
    ids = prompts(case, 2, length(case))
    assert difference(cached(lm, ids, None, cut(sizes, ids.shape[1])), lm(ids)) < 1e-5


@pytest.mark.parametrize(
    "layout", [["left"] * 3, ["right"] * 3, ["left", "both", "right"]], ids="-".join
)
def test_ragged_batch_in_chunks(case, lm, layout):
    """The borders of the chunks fall into the padding of some rows and into the tokens of others."""
    rows = [prompts(case, n, seed=n) for n in (6, length(case), 3)]
    batch, mask = ragged(rows, layout)
    for sizes in ([batch.shape[1]], [2, 3, batch.shape[1] - 5], [1] * batch.shape[1]):
        logits = cached(lm, batch, mask, sizes)
        for row, keep, prompt in zip(logits, mask.bool(), rows, strict=True):
            assert difference(row[keep], lm(prompt[None])[0]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_after_a_ragged_prefill(case, lm, side):
    """New tokens stand after the padding of a right-padded prompt, and are its next positions all the same."""
    total = length(case)
    rows = [prompts(case, n, seed=n) for n in (total - 4, 2, 7)]
    new = prompts(case, 3, 4, seed=5)
    batch, mask = ragged(rows, [side] * 3)
    batch, mask = torch.cat((batch, new), 1), torch.cat((mask, torch.ones_like(new)), 1)
    logits = cached(lm, batch, mask, [batch.shape[1] - 4, 1, 1, 1, 1])[:, -4:]
    for row, prompt, tail in zip(logits, rows, new, strict=True):
        assert difference(row, lm(torch.cat((prompt, tail))[None])[0, -4:]) < 1e-5


def test_a_row_does_not_see_its_neighbours_or_what_the_cache_held_before(case, lm):
    """Guards in-place caches: a used cache, reset, gives bitwise what a new one gives."""
    cache = KVCache(lm.config, 2, length(case), lm.dtype, lm.device)
    first, second = prompts(case, 2, length(case), seed=1), prompts(case, 2, 5, seed=2)
    lm(first, cache=cache)
    again = lm(second, cache=cache.reset())
    fresh = lm(second, cache=KVCache(lm.config, 2, length(case), lm.dtype, lm.device))
    assert torch.equal(again, fresh)


def test_the_first_tokens_see_no_unwritten_columns(folder, monkeypatch):
    """A prompt costs what it costs without a cache: no mask unless a row is padded, and no keys but its own."""
    lm = TinyLM.from_pretrained(folder(BY_NAME["qwen3"]))
    ids, attend, calls = prompts(BY_NAME["qwen3"], 2, 7), tinylm.attend, []

    def see(q, k, v, mask, *arguments):
        calls.append(None if mask is None else mask.shape[-1])
        return attend(q, k, v, mask, *arguments)

    monkeypatch.setattr(tinylm, "attend", see)
    lm.generate(ids, max_new_tokens=1)
    assert {*calls} == {None}
    calls.clear()
    batch, mask = ragged([ids[0], ids[1, :4]], ["left", "left"])
    lm.generate(batch, mask, max_new_tokens=1)
    assert {*calls} == {batch.shape[1]}


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """Counts the graphs that torch.compile made since the last call; any recompile is an error."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()

    def count():
        found = counters["stats"]["unique_graphs"]
        counters.clear()
        return found

    with torch._dynamo.config.patch(error_on_recompile=True):
        yield count
    torch._dynamo.reset()


def generate_twice(case, folder, graphs):
    """Two batches of different lengths in one bucket: the long one first, so that what it leaves behind is seen."""
    lm = TinyLM.from_pretrained(folder(case))
    options = dict(max_new_tokens=6, eos_token_id=())
    for step, prompt_length in enumerate((LENGTH - 6, 4, 7)):
        rows = [prompts(case, n, seed=n) for n in (prompt_length, 3)]
        batch, mask = ragged(rows, ["left", "right"])
        assert torch.equal(
            lm.generate(batch, mask, **options, compile=True), lm.generate(batch, mask, **options)
        )
        assert graphs() == (1 if step == 0 else 0)


@pytest.mark.parametrize(
    "case", some_slow(FAMILIES + [BY_NAME["llama-dynamic"], BY_NAME["gemma3_text-linear"]]), ids=str
)
def test_decode_step_is_one_graph(case, folder, graphs, monkeypatch):
    """No break in the graph and no recompile, across steps and prompt lengths. No code is generated, for speed."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    generate_twice(case, folder, graphs)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)
@pytest.mark.parametrize("case", [BY_NAME["qwen3"]], ids=str)
def test_compiled_decoding_gives_the_eager_tokens(case, folder, graphs):
    generate_twice(case, folder, graphs)


def test_compiled_sampling_gives_the_eager_tokens(folder, graphs, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case = BY_NAME["qwen3"]
    lm, ids = TinyLM.from_pretrained(folder(case)), prompts(case, 3, 5)
    options = dict(
        max_new_tokens=9,
        eos_token_id=(),
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
    )
    for seed in (1, 2):  # another seed is the same graph
        assert torch.equal(
            lm.generate(ids, **options, seed=seed, compile=True),
            lm.generate(ids, **options, seed=seed),
        )
    assert graphs() == 1
