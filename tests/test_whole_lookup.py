"""Prompt lookup decoding: the very same text, in fewer steps."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from families import CASES, load_oracle, prompts
from helpers import CPU, refuses, run_command

import tinylm
from onnxlm import GenerationConfig, OnnxLM, PromptLookup
from tinylm import TinyLM

BY_NAME = {case.name: case for case in CASES}
IDS = torch.tensor([list(b"0123456789")])


@pytest.fixture
def widths(monkeypatch):
    """The columns of each step, where steps of all widths take the same time: the longest drafts there are."""
    found = []

    def measure(self, width, seconds):
        found.append(width)
        self.seconds, self.more = 1.0, 0.0

    monkeypatch.setattr(PromptLookup, "measure", measure)
    return found


def both(lm, ids, widths=None, **options):
    """The new ids without and with drafts; their steps are fewer."""
    ids = ids if isinstance(lm, TinyLM) else ids.numpy()
    plain = lm.generate(ids, **options).tolist()
    if widths is not None:
        widths.clear()
    drafted = lm.generate(ids, **options, prompt_lookup_num_tokens=7).tolist()
    return plain, drafted


def assert_same_texts(lm, case, widths):
    """The texts behind three prompts are the same without and with drafts, of which some are accepted."""
    steps = 0
    for seed in (1, 3, 4):
        ids = prompts(case, 1, 5, seed=seed).repeat(1, 2)
        plain, drafted = both(lm, ids, widths, max_new_tokens=25, eos_token_id=())
        assert drafted == plain
        steps += len(widths)
    # A step for each token but the first; longrope reads a text once again, which may not be counted.
    assert steps < 3 * 24 - 4


OPTIONS = [
    dict(),
    dict(temperature=0.3, seed=1),
    dict(temperature=0.2, top_k=9, top_p=0.9, min_p=0.01, seed=2),
    dict(repetition_penalty=1.1),
    dict(no_repeat_ngram_size=9),
    dict(bad_words_ids=[[101], [32, 116]]),
    dict(forced_eos_token_id=3, max_new_tokens=33),
    dict(max_new_tokens=1),
    dict(max_new_tokens=2),
    dict(max_new_tokens=3),
    dict(max_matching_ngram_size=4),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_text_is_the_same(options, small_export, widths):
    """Greedy and sampled, under processors that depend on the ids before each drafted place."""
    options = dict(max_new_tokens=60, eos_token_id=()) | options
    for lm in small_export[:2]:
        plain, drafted = both(lm, IDS, widths, **options)
        assert drafted == plain
        if options["max_new_tokens"] > 30:
            # Without drafts each token but the first is a step.
            assert max(widths) > 4 and len(widths) < options["max_new_tokens"] - 1


def test_the_text_is_the_same_however_long_steps_take(small_export, monkeypatch):
    """Drafts of every length, accepted and not."""
    noise = np.random.default_rng(1)

    def measure(self, width, seconds):
        self.seconds, self.more = 1.0, noise.choice([0, 0.1, 0.5, 5])

    monkeypatch.setattr(PromptLookup, "measure", measure)
    for seed in range(4):
        for lm in small_export[:2]:
            plain, drafted = both(lm, IDS, max_new_tokens=60, temperature=0.4, seed=seed)
            assert drafted == plain


def test_a_text_ends_inside_a_draft(small_export, widths):
    """At an end token, whose place min_length moves, and at a stop string."""
    lm, onnx_lm, _ = small_export
    free = lm.generate(IDS, max_new_tokens=60, eos_token_id=())[0, IDS.shape[1] :].tolist()
    ended = 0
    for place in (20, 31, 44):
        options = dict(eos_token_id=free[place], max_new_tokens=60)
        for model in (lm, onnx_lm):
            for more in ({}, dict(min_length=IDS.shape[1] + place)):
                plain, drafted = both(model, IDS, **options | more)
                assert drafted == plain
                ended += drafted[0][-1] == free[place]
    assert ended >= 6
    stop = tinylm.ByteTokenizer().decode(free[25:28])
    for model in (lm, onnx_lm):
        for options in (dict(), dict(stop=stop), dict(stop=stop, temperature=0.2, seed=3)):
            texts = [
                list(model.stream(IDS[0].tolist(), 60, **options, prompt_lookup_num_tokens=count))
                for count in (None, 7)
            ]
            assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3_text", "phi3-long", "phi3-window", "mixtral"]
)
def test_families_give_the_same_text(name, folder, widths):
    """Sliding windows, learned positions, experts, and longrope, whose keys are read again on the way."""
    case = BY_NAME[name]
    lm = TinyLM.from_pretrained(folder(case))
    assert_same_texts(lm, case, widths)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3-long", "phi3-window"])
def test_exported_families_give_the_same_text(name, exported_pair, widths):
    _, onnx_lm, _ = exported_pair(name)
    assert_same_texts(onnx_lm, BY_NAME[name], widths)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_behind_an_encoder(name, exported_pair, widths):
    """The source is looked up too."""
    lm, onnx_lm, _ = exported_pair(name)
    ids = torch.arange(5, 14)[None].repeat(1, 2)
    for model in (lm, onnx_lm):
        plain, drafted = both(model, ids, widths, max_new_tokens=24, eos_token_id=())
        assert drafted == plain and len(widths) < 23


@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_caches_written_in_place_are_cut_back(precision, rounded, widths):
    """Rounded graphs compute one row and several by other kernels: the tokens are compared up to a near tie."""
    lm = OnnxLM(rounded("qwen3")[1], precision, providers=CPU)
    plain, drafted = both(lm, IDS, widths, max_new_tokens=60, eos_token_id=())
    assert len(widths) < 59
    for column, (ours, other) in enumerate(zip(plain[0], drafted[0])):
        if ours != other:
            best = lm(np.array([plain[0][:column]]))[0, -1]
            assert abs(best[ours] - best[other]) < 0.05 * np.ptp(best)
            break


def test_the_greedy_text_is_that_of_transformers(folder, widths):
    case = BY_NAME["llama"]
    lm, ids = TinyLM.from_pretrained(folder(case)), prompts(case, 1, 6).repeat(1, 2)
    oracle = load_oracle(folder(case))
    options = dict(max_new_tokens=9, prompt_lookup_num_tokens=4, max_matching_ngram_size=3)
    theirs = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, **options
    )
    assert lm.generate(ids, eos_token_id=(), **options).tolist() == theirs.tolist()
    lm.generation_config = options
    widths.clear()
    assert lm.generate(ids, eos_token_id=()).tolist() == theirs.tolist() and widths


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_have_two_widths(backend, small_export, widths, monkeypatch):
    """No recompile from step to step, prompt to prompt or seed to seed."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    lm = small_export[0]
    monkeypatch.setattr(lm, "_compiled", {})
    monkeypatch.setattr(lm, "_states", {})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids in (IDS, IDS[:, 4:]):
            for seed in (1, 2):
                options = dict(max_new_tokens=50, temperature=0.2, seed=seed, eos_token_id=())
                plain = lm.generate(ids, **options)
                widths.clear()
                drafted = lm.generate(ids, **options, compile=True, prompt_lookup_num_tokens=7)
                assert torch.equal(drafted, plain)
                assert {*widths} == {1, 8} and len(widths) < 49
    torch._dynamo.reset()


# ---- drafts -----------------------------------------------------------------------------------------------------------


def lookup(ids, count=5, **options):
    found = PromptLookup(GenerationConfig(prompt_lookup_num_tokens=count, **options), ids)
    found.seconds, found.more = 1.0, 0.0
    return found


def test_a_draft_follows_the_longest_match():
    """The latest of several; it goes on into itself, ends with an end token, and is no longer than there is room."""
    assert lookup([1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 1, 2, 3]).draft(9) == [4, 5, 9, 2, 3]
    assert lookup([2, 3, 4, 9, 2, 3, 5, 9, 2, 3]).draft(9)[0] == 5
    assert lookup([7, 1, 2, 1, 2], count=7).draft(9) == [1, 2, 1, 2, 1, 2, 1]
    assert lookup([1, 2, 3, 4, 5, 1, 2], eos_token_id=4).draft(9) == [3, 4]
    assert lookup([1, 2, 3, 4, 5, 1, 2]).draft(2) == [3, 4]
    assert lookup([1, 2, 3, 4, 5, 1, 2]).draft(0) == []
    assert lookup([1, 2, 3, 4]).draft(9) == lookup([]).draft(9) == []


def test_a_draft_is_as_long_as_pays():
    """By what steps take, and by how often matches were continued."""
    text = [*range(20, 40), 1, *range(20, 30)]
    lengths = []
    for more in (0, 0.2, 0.5, 2.0):
        found = lookup(text, count=9)
        found.more = more
        lengths.append(len(found.draft(99)))
    assert lengths[0] == 9 and lengths == sorted(lengths, reverse=True) and lengths[-1] == 0
    found = lookup(text, count=9)
    found.more = 0.2
    # What comes is never what stood behind the match: no draft pays any more, but for the lengths that never failed.
    for n in range(60):
        for id in (20, 100 + n):
            found.draft(9)
            found.append(id)
    found.append(20)
    assert found.draft(9) == []


def test_the_cost_of_steps_is_learned():
    found = lookup([])
    found.seconds = None
    for _ in range(40):
        for width, seconds in ((1, 6.0), (4, 9.0), (8, 13.0), (1, 6.0)):
            found.measure(width, seconds)
    found.measure(1, 1000.0)
    assert 5 < found.seconds < 9 and 0.8 < found.more < 1.2


# ---- what is refused, and where it can be asked for -------------------------------------------------------------------


def test_what_is_not_supported_is_one_line(small_export, folder, rounded):
    lm, onnx_lm, _ = small_export
    for model, ids in ((lm, IDS), (onnx_lm, IDS.numpy())):
        for value in (0, -1, 1.5, "x"):
            refuses(lambda: model.generate(ids, prompt_lookup_num_tokens=value), value)
        refuses(lambda: model.generate(ids, max_matching_ngram_size=0), "max_matching_ngram_size")
        several = dict(num_beams=2), dict(num_return_sequences=2, temperature=1.0)
        for options in several:
            call = lambda: model.generate(ids, prompt_lookup_num_tokens=3, **options)
            refuses(call, "prompt_lookup_num_tokens = 3", "num_beams")
        two = ids.repeat(2, 1) if model is lm else ids.repeat(2, 0)
        refuses(lambda: model.generate(two, prompt_lookup_num_tokens=3), "2 rows, expected one")
    dynamic = TinyLM.from_pretrained(folder(BY_NAME["llama-dynamic"]))
    ids = prompts(BY_NAME["llama-dynamic"], 1, 5)
    refuses(lambda: dynamic.generate(ids, prompt_lookup_num_tokens=3), "dynamic")


def test_files_and_commands_ask_for_it(small_export, tmp_path, widths):
    """generation_config.json, which several texts at once obey too; and the command line."""
    _, onnx_lm, out = small_export
    out = shutil.copytree(out, tmp_path / "out")
    file = out / "generation_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"prompt_lookup_num_tokens": 5}))
    asked = OnnxLM(out, providers=CPU)
    texts = ["one two three, one two", "abcabc", "zz"]
    assert asked.run(texts, max_new_tokens=20) == onnx_lm.run(texts, max_new_tokens=20)
    assert max(widths) > 1
    widths.clear()
    options = ["--prompt", texts[0], "--max-new-tokens", 40, "--temperature", 0.2, "--seed", 1]
    plain = run_command("sample", small_export[2], *options)
    assert not widths
    drafted = run_command("sample", small_export[2], *options, "--prompt-lookup-num-tokens", 6)
    assert drafted.stdout == plain.stdout and max(widths) > 1
