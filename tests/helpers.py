"""Functions, models and texts that several test files use. Fixtures are in conftest.py, the oracles in families.py."""

import collections
import contextlib
import io
import json
import math
import re
from types import SimpleNamespace

import numpy as np
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


def run_qa_answer(context, features, logits, negative, longest, n_best=20):
    """postprocess_qa_predictions of transformers' examples, of one question: the text that it predicts."""
    null, candidates = None, []
    for offsets, ends in zip(features, logits):
        first_logits, last_logits = ends.T
        score = first_logits[0] + last_logits[0]
        if null is None or null["score"] > score:
            null = dict(offsets=(0, 0), score=score)
        for first in np.argsort(first_logits)[-1 : -n_best - 1 : -1].tolist():
            for last in np.argsort(last_logits)[-1 : -n_best - 1 : -1].tolist():
                if offsets[first] is None or offsets[last] is None:
                    continue
                if last < first or last - first + 1 > longest:
                    continue
                span = offsets[first][0], offsets[last][1]
                candidates.append(dict(offsets=span, score=first_logits[first] + last_logits[last]))
    best = max(candidates, key=lambda candidate: candidate["score"], default=None)
    if best is None:
        return None
    if negative and null["score"] - best["score"] > 0:
        return ""
    return context[slice(*best["offsets"])]


# SQuAD 2's evaluate-v2.0.py.


def squad_normal(text):
    text = "".join(
        char for char in text.lower() if char not in set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    )
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text, flags=re.UNICODE).split())


def squad_f1(gold, predicted):
    gold, predicted = squad_normal(gold).split(), squad_normal(predicted).split()
    same = sum((collections.Counter(gold) & collections.Counter(predicted)).values())
    if not gold or not predicted:
        return int(gold == predicted)
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall) if same else 0


def squad_scores(rows, predicted):
    """Name -> figure, of the rows' answers and the texts predicted."""
    scores = collections.defaultdict(list)
    for row, text in zip(rows, predicted, strict=True):
        gold = [each for each in row["answers"]["text"] if squad_normal(each)] or [""]
        exact = max(int(squad_normal(each) == squad_normal(text)) for each in gold)
        f1 = max(squad_f1(each, text) for each in gold)
        for kind in ("", "HasAns " if row["answers"]["text"] else "NoAns "):
            scores[kind + "exact match"].append(exact)
            scores[kind + "span F1"].append(f1)
    return {name: sum(values) / len(values) for name, values in scores.items()}
