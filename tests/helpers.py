"""Functions, models and texts that several test files use. Fixtures are in conftest.py, the oracles in families.py."""

import collections
import contextlib
import heapq
import io
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import tinylm
import train

CPU = ["CPUExecutionProvider"]
TINY = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
LAYOUTS = {"left": ["left"] * 3, "right": ["right"] * 3, "mixed": ["right", "left", "both"]}
# Text to train on, of single bytes and characters of two to four bytes, and the options of a short training.
TEXT = "".join(f"Zeile {i % 17}: größer, naïve — 日本 🙂 {i * i % 23}\n" for i in range(160))
NANO = ["--size", "nano", "--batch", "4", "--block", "32"]


def every(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def numpy(*tensors):
    return [tensor.numpy() for tensor in tensors]


def refuses(call, *words):
    """The call fails with one line that has every word."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def surprise(counts, p):
    """Pearson's chi-square of counts against probabilities, in standard deviations above what chance gives."""
    rare = p * counts.sum() < 5  # pooled into one cell
    counts, p = (torch.cat((x[~rare], x[rare].sum()[None])).double() for x in (counts, p))
    expected = p * counts.sum()
    keep = expected > 0
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = max(keep.sum() - 1, 1)
    return ((statistic - freedom) / math.sqrt(2 * freedom)).item()


def run_command(*arguments):
    """The command in this process: its exit status and what it prints."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = train.main([*map(str, arguments)])
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=error.getvalue())


def finished(run):
    assert run.returncode == 0, run.stderr
    return run


def same_files(one, other):
    one, other = load_file(one), load_file(other)
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def write_tokenizer(folder, backend=None, config=None, **files):
    """A folder of tokenizer files; a `_` in a name is a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    if backend is not None:
        text = backend if isinstance(backend, str) else backend.to_str()
        (folder / "tokenizer.json").write_text(text)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        content = content if isinstance(content, str) else json.dumps(content)
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_text(content)
    return folder


def byte_backend(*added):
    """Byte-level BPE without merges, with these special tokens."""
    from tokenizers import Tokenizer

    text = tinylm.ByteTokenizer().files["tokenizer.json"].decode()
    backend = Tokenizer.from_str(text)
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", *added])
    return backend


def run_qa_answer(context, features, logits, may_be_none, longest, n_best=20):
    """What transformers' run_qa answers to a question, or None where none of its spans fits.

    features: a text's place in the context for each column of a window, or None outside of it. logits: (columns, 2). A
    span joins one of the n_best likeliest starts to one of the n_best likeliest ends of its window; the largest sum of
    logits wins. Nothing is the answer where the first column's sum is larger than that in every window.
    """
    spans, none = {}, []
    for places, ends in zip(features, logits):
        none.append(ends[0].sum())
        first, last = (heapq.nlargest(n_best, range(len(ends)), key=side.item) for side in ends.T)
        for start, end in itertools.product(first, last):
            if places[start] and places[end] and 0 <= end - start < longest:
                spans[ends[start, 0] + ends[end, 1]] = places[start][0], places[end][1]
    if not spans:
        return None
    best = max(spans)
    return "" if may_be_none and min(none) > best else context[slice(*spans[best])]


def squad_scores(rows, predicted):
    """Name -> figure, of the rows' answers and the texts predicted. SQuAD 2 adds to the figures of SQuAD 1 that a
    question without an answer has the answer ""."""
    from torchmetrics.functional.text import squad  # takes two seconds to import

    scores = collections.defaultdict(list)
    for row, text in zip(rows, predicted, strict=True):
        true = row["answers"]["text"]
        found = squad(
            dict(id="", prediction_text=text), dict(id="", answers=dict(text=true or [""]))
        )
        for kind in ("", "HasAns " if true else "NoAns "):
            scores[kind + "exact match"].append(found["exact_match"].item() / 100)
            scores[kind + "span F1"].append(found["f1"].item() / 100)
    return {name: sum(values) / len(values) for name, values in scores.items()}
