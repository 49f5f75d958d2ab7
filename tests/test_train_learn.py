"""What is learnt reaches the model: hard batches, other labels, several labels, splits and the choice of `best`, rows
that are partly empty, pipes, saves over other saves, long texts in pieces."""

import io
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from helpers import TINY, finished, refuses, run_command
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from sklearn.model_selection import train_test_split

import data as datafiles
import onnxlm
import tinylm
import train
from data import read_rows
from tinylm import Config, TinyLM
from train import TrainOptions

FILL = "the box came late but our order was fine and cheap this week too".split()
MARKS = ["never", "perhaps", "surely", "again"]
CLASSIFY = TrainOptions(task="classify")
FAST = ["--task", "classify", "--size", "pico", "--vocab", 300, "--dropout", 0]
NOTHING_LEARNT = ["--steps", 1, "--lr", 1e-9, "--adam-lr", 1e-9]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentence(draw, mark):
    words = draw.choices(FILL, k=7)
    words[draw.randrange(7)] = mark
    return " ".join(words)


def rows_of(names, count=60, column="label"):
    draw = random.Random(0)
    return [
        {"text": sentence(draw, MARKS[i % len(names)]), column: names[i % len(names)]}
        for i in range(count)
    ]


def labels_of(folder):
    return json.loads((folder / "config.json").read_text())["id2label"]


# ---- rare and hard rows ------------------------------------------------------------------------------------------


def test_a_hard_batch_is_learnt_with_a_clipped_gradient():
    """Guards batches of a rare class or of a large target, which a rule against jumps of the loss left out."""
    torch.manual_seed(0)
    config = Config(**TINY, vocab_size=64, head="classify", id2label={0: "x"})
    ours, theirs = (TinyLM(config) for _ in range(2))
    ours.config = theirs.config = tinylm.replace(config, problem_type="regression")
    theirs.load_state_dict(ours.state_dict())
    easy, hard = (
        dict(input_ids=torch.arange(12)[None], labels=torch.tensor([y])) for y in (0.1, 1e4)
    )
    optimizers = [torch.optim.SGD(lm.parameters(), lr=0.1) for lm in (ours, theirs)]
    for batch in (easy, easy, hard):
        tinylm.train_step(ours, optimizers[0], batch)
        loss = (theirs(batch["input_ids"])[0, 0] - batch["labels"][0]) ** 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert loss > 1e7
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_no_finite_loss():
    """The run stops at what a step returns, before such weights are saved."""
    lm = TinyLM(Config(**TINY, vocab_size=64))
    lm.embed.weight.register_hook(lambda gradient: gradient * math.inf)
    loss = tinylm.train_step(lm, torch.optim.SGD(lm.parameters(), lr=0.1), torch.arange(12)[None])
    assert not loss.isfinite()


@pytest.mark.slow
def test_three_large_targets_of_a_hundred_are_learnt(tmp_path):
    """Guards a regression that said 1.0 for 9.5."""
    draw = random.Random(0)
    rows = []
    for i in range(400):
        mark, label = ("huge", 9.5) if i % 33 == 0 else ("small", 0.5)
        rows.append({"text": sentence(draw, mark), "label": label})
    data = write(tmp_path / "a.jsonl", rows)
    out = tmp_path / "out"
    options = [*FAST, "--vocab", 4096, "--batch", 4, "--epochs", 8, "--regression"]
    finished(run_command("train", data, *options, "--out", out))
    run = finished(run_command("run", out / "last", rows[0]["text"], rows[1]["text"]))
    large, small = (float(line.split()[-1]) for line in run.stdout.splitlines())
    assert large > 7 and abs(small - 0.5) < 1.5


# ---- heads and labels --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(labels, task) -> the folder of a random BERT whose head has these labels."""
    made = {}

    def build(labels, task="classify"):
        key = (*labels, task)
        if key not in made:
            rows = rows_of(["a", "b"])
            if task == "tokens":
                rows = [dict(words=row["text"].split(), tags=["a"] * 7) for row in rows]
            lm = train.new_model(rows, TrainOptions(task=task, size="pico", vocab=300).filled())
            lm.config = tinylm.replace(lm.config, id2label=dict(enumerate(labels)))
            if len(labels) == 1:
                lm.config = tinylm.replace(lm.config, problem_type="regression")
            lm.head = tinylm.Head(lm.config)
            lm.apply(lm._init)
            made[key] = tmp_path_factory.mktemp("base")
            lm.save_pretrained(made[key])
        return made[key]

    return build


MNLI = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]
KEPT = [  # labels of the checkpoint, of the data, --label-names -> by the checkpoint's number, as the data spells them
    (MNLI, MNLI[::-1], "", MNLI),
    (MNLI, ["entailment", "neutral", "contradiction"], "", [name.lower() for name in MNLI]),
    (["not entailment", "entailment"], ["entailment", "Not  Entailment"], "", None),
    (["LABEL_0", "LABEL_1"], [1, 0], "", ["0", "1"]),
    (["LABEL_0", "LABEL_1", "LABEL_2"], [2, 0, 1], "bad,so so,good", ["bad", "so so", "good"]),
    (["LABEL_0", "LABEL_1"], ["pos", "neg"], "neg,pos", ["neg", "pos"]),
    (["a", "b"], ["A", "a", "b", "B"], "", False),  # two spellings are two labels
    (MNLI, ["neutral", "entailment"], "", False),
    (MNLI, ["neutral", "entailment"], ",".join(MNLI), MNLI),
    (["negative", "positive"], ["horrible", "great"], "", False),
    (["LABEL_0", "LABEL_1"], ["neg", "pos"], "", False),
    (["neg", "pos"], [0, 1], "", False),  # which is which?
    (["neg", "pos"], [0, 1], "neg,pos", ["neg", "pos"]),
    (["a", "b", "c"], [["a"], ["b", "c"]], "", ["a", "b", "c"]),
    (MNLI, [0.5, 1.5], "", False),
    (["score"], [0.5, 1.5], "", ["score"]),
    (["score"], ["a", "b"], "", False),
]


@pytest.mark.parametrize("known, given, names, expected", KEPT, ids=str)
def test_a_head_stays_for_the_same_labels_and_is_new_for_others(
    known, given, names, expected, base
):
    """Guards labels that changed places, and two other labels on the rows of two former ones."""
    folder = base(known)
    options = TrainOptions(task="classify", init=str(folder), label_names=names).filled()
    rows = read_rows(rows_of(given), options, notices=[])
    said = []
    lm = train.load_for_finetuning(folder, rows, options, said)
    before = TinyLM.from_pretrained(folder)
    if expected is None:
        expected = ["Not  Entailment", "entailment"]
    stays = expected is not False
    assert len(said) == 1 and ("stays" in said[0]) == stays and ("a new head" in said[0]) != stays
    if stays:
        assert [*lm.config.id2label.values()] == expected
    else:
        assert lm.config.num_labels == (1 if isinstance(given[0], float) else len(given))
    state = lm.state_dict()
    for name, tensor in before.state_dict().items():  # all but the last layer stays anyway
        same = tensor.shape == state[name].shape and torch.equal(tensor, state[name])
        assert same == (
            stays or not name.startswith("head.out.") or name.endswith("bias") and same
        ), name
    for row in rows:  # each label has its number
        train.TASKS["classify"].examples(lm, row, 64).__next__()


def test_a_new_head_keeps_what_transformers_keeps(base, tmp_path):
    """The pooler of BERT is no part of the labels' layer."""
    folder = base(MNLI)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, ignore_mismatched_sizes=True
    )
    options = TrainOptions(task="classify", init=str(folder)).filled()
    train.load_for_finetuning(folder, rows_of(["x", "y"]), options).save_pretrained(tmp_path)
    ours = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert ours[name].shape == tensor.shape
        assert name.startswith("classifier.") or torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("task, other", [("classify", "tokens"), ("tokens", "classify")])
def test_a_classifier_and_a_tagger_do_not_share_their_heads(task, other, base):
    """Guards a tagger that began with the rows of a classifier, whose tensor has the same name and shape."""
    folder = base(["O", "X", "Y"], task)
    rows = rows_of(["O", "X", "Y"])
    if other == "tokens":
        rows = [dict(words=row["text"].split(), tags=["O", "X", "Y", *"OOOO"]) for row in rows]
    said = []
    options = TrainOptions(task=other, init=str(folder)).filled()
    lm = train.load_for_finetuning(folder, rows, options, said)
    before = TinyLM.from_pretrained(folder)
    assert f"is a model for {task}" in said[0]
    assert not torch.equal(lm.head.out.weight, before.head.out.weight)
    tags = ["o", "x", "y"]
    if task == "tokens":
        rows = [dict(words=["a"] * 3, tags=tags)]
        options = TrainOptions(task="tokens", init=str(folder)).filled()
        lm = train.load_for_finetuning(folder, rows, options, said := [])
        assert "stays" in said[0] and torch.equal(lm.head.out.weight, before.head.out.weight)
        assert [*lm.config.id2label.values()] == ["O", "X", "Y"]  # as B-PER is not b-per


def test_eval_takes_labels_in_another_case(base, tmp_path):
    """As a name of the model's; a number is not one by itself."""
    rows = rows_of(["Neutral", "entail ment", "CONTRADICTION"])
    data = write(tmp_path / "a.jsonl", rows)
    report = json.loads(finished(run_command("eval", base(MNLI), data, "--json")).stdout)
    assert [row["support"] for row in report["classes"].values()] == [20, 20, 20]
    data = write(tmp_path / "b.jsonl", rows_of([0, 1, 2]))
    assert "--label-names" in run_command("eval", base(MNLI), data).stderr
    finished(run_command("eval", base(MNLI), data, "--label-names", ",".join(MNLI)))


# ---- several labels ----------------------------------------------------------------------------------------------

HOT = [  # labels of the rows, --label-names -> those of the first row, or the words of an error
    ([[1, 0, 1], [0, 0, 1]], "", {"LABEL_0": 1, "LABEL_1": 0, "LABEL_2": 1}),
    ([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], "a,b,c", {"a": 1, "b": 0, "c": 1}),
    ([[True, False], [False, True]], "a, b", {"a": 1, "b": 0}),
    ([[0, 1], [1, 0]], "", {"LABEL_0": 0, "LABEL_1": 1}),
    (["[1, 0, 1]", "[0, 0, 0]"], "", {"LABEL_0": 1, "LABEL_1": 0, "LABEL_2": 1}),  # of a table
    (["[True, False]", "[True, True]"], "", {"LABEL_0": 1, "LABEL_1": 0}),
    (["[1. 0. 1.]", "[0. 0. 1.]"], "", {"LABEL_0": 1, "LABEL_1": 0, "LABEL_2": 1}),
    ([["1", "0", "1"], ["1", "1", "1"]], "", {"LABEL_0": 1, "LABEL_1": 0, "LABEL_2": 1}),
    ([np.array([1, 0, 1]), np.array([0, 0, 1])], "", {"LABEL_0": 1, "LABEL_1": 0, "LABEL_2": 1}),
    (["1,0,1", "0, 0, 1"], "", {"LABEL_0": 1, "LABEL_1": 0, "LABEL_2": 1}),
    (["1 0 1", "0 0 1"], "", {"LABEL_0": 1, "LABEL_1": 0, "LABEL_2": 1}),
    (["(1, 0)", "(0, 0)"], "", {"LABEL_0": 1, "LABEL_1": 0}),
    ([(1, 0), (0, 0)], "", {"LABEL_0": 1, "LABEL_1": 0}),
    (["['a', 'b']", "['b']"], "", ["a", "b"]),
    (["['a' 'b']", "['b']"], "", ["a", "b"]),  # of numpy
    ([[0, 2], [1]], "x,y,z", ["x", "z"]),  # numbers of classes
    ([[0], [1], [0, 1]], "", ["0"]),
    ([[1, 0, 1], [0, 1]], "", ("one length",)),
    ([[1.0, 0.0], [0.0]], "", ("one length",)),
    ([[1, 0, 1], [0, 0, 1]], "a,b", ("--label-names", "2 names", "expected 3")),
    ([[0.2, 0.8], [0.5, 0.5]], "", ("[0.2, 0.8]", "0 and 1")),
    ([[0, 5], [1]], "x,y", ("label '5'", "--label-names")),
]


@pytest.mark.parametrize("labels, names, expected", HOT, ids=str)
def test_lists_of_0_and_1_are_as_many_labels(labels, names, expected):
    """Guards two labels named 0 and 1 in place of three."""
    rows = [dict(text="x", label=label) for label in labels]
    options = TrainOptions(task="classify", label_names=names)
    if isinstance(expected, tuple):
        refuses(lambda: read_rows(rows, options, notices=[]), *expected)
    else:
        assert read_rows(rows, options, notices=[])[0]["label"] == expected


def test_columns_of_0_and_1_are_labels(tmp_path):
    """And what is said of them is what sklearn says; eval knows them without being told."""
    draw = random.Random(0)
    lines = ["comment,Toxic,insult,threat"]
    for _ in range(80):
        hot = [draw.random() < 0.5 for _ in MARKS[:3]]
        text = " ".join(["text", *(mark for mark, on in zip(MARKS, hot) if on)])
        lines.append(",".join([text, *map(str, map(int, hot))]))
    data = tmp_path / "a.csv"
    data.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    label = "toxic, insult,threat"
    finished(run_command("train", data, *FAST, "--steps", 30, "--label", label, "--out", out))
    assert [*labels_of(out / "best").values()] == ["Toxic", "insult", "threat"]
    report = json.loads(finished(run_command("eval", out / "best", data, "--json")).stdout)
    texts = [line.split(",")[0] for line in lines[1:]]
    true = np.array([[int(x) for x in line.split(",")[1:]] for line in lines[1:]])
    lm = TinyLM.from_pretrained(out / "best")
    found = onnxlm.run(train.TorchRunner(lm, out / "best"), texts)
    names = [*labels_of(out / "best").values()]
    scores = [{item["label"]: item["score"] for item in result} for result in found]
    predicted = np.array([[score[name] > 0.5 for name in names] for score in scores])
    assert report["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert report["macro F1"] == pytest.approx(f1_score(true, predicted, average="macro"))
    theirs = precision_recall_fscore_support(true, predicted, zero_division=0)
    for column, name in enumerate(("precision", "recall", "F1", "support")):
        ours = [report["classes"][label][name] for label in names]
        assert ours == pytest.approx(theirs[column].tolist()), name
    data.write_text("\n".join([*lines[:3], "x,1,2,0"]) + "\n")
    assert "insult = '2', expected 0 or 1" in run_command("eval", out / "best", data).stderr


# ---- what is held back, and the choice of the best ---------------------------------------------------------------


def test_as_many_of_each_class_are_held_back_as_sklearn_would():
    """Drawn with the seed, not the end of each class; the only row of a class stays with what is learnt."""
    draw = random.Random(0)
    names = ["a"] * 300 + ["b"] * 77 + ["c"] * 12 + ["d"] * 5 + ["e"]
    rows = [dict(text=str(i), label=name) for i, name in enumerate(names)]
    for share in (0.1, 0.25):
        kept, held = datafiles.split_rows(rows, share)
        counts = Counter(row["label"] for row in held)
        _, theirs = train_test_split(
            names[:-1], test_size=share, stratify=names[:-1], random_state=0
        )
        for name, count in Counter(theirs).items():
            assert abs(counts[name] - count) <= 1, name
        assert len(held) == round(len(rows) * share) and not counts["e"] and counts["c"]
        assert sorted(map(str, kept + held)) == sorted(map(str, rows))
    held = [datafiles.split_rows(rows, 0.1, seed)[1] for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2] and held[0] != rows[-len(held[0]) :]
    many = [dict(text=str(i), label=str(i // 4)) for i in range(600)]
    assert len(datafiles.split_rows(many)[1]) == 60
    draw.shuffle(rows)
    assert len(datafiles.split_rows([dict(words=["x"], tags=["O"])] * 50)[1]) == 5


def test_each_range_of_numbers_is_held_back():
    """Guards a file that is sorted by its number, where the largest were never learnt."""
    rows = [dict(text=str(i), label=float(i)) for i in range(200)]
    kept, held = datafiles.split_rows(rows)
    assert sorted(int(row["label"] // 10) for row in held) == [*range(20)]
    places = {int(row["label"] % 10) for row in held}
    assert len(places) > 3 and len(kept) == 180


def test_running_text_keeps_its_end_for_validation():
    text = "".join(map(str, range(1000)))
    kept, held = datafiles.split_rows([{"text": text}])
    assert kept[0]["text"] + held[0]["text"] == text and len(held[0]["text"]) == len(text) - int(
        len(text) * 0.9
    )
    _, held = datafiles.split_rows([{"text": text}], 0.5)
    assert len(held[0]["text"]) == len(text) - len(text) // 2


def test_the_share_that_is_held_back_and_rows_that_are_in_both(tmp_path):
    rows = rows_of(["a", "b"], 40)
    data = write(tmp_path / "a.jsonl", rows)
    options = [*FAST, *NOTHING_LEARNT]
    run = finished(
        run_command("train", data, *options, "--val-share", 0.5, "--out", tmp_path / "one")
    )
    assert (
        "20 rows to train on, 20 to validate on" in run.stderr and "train on too" not in run.stderr
    )
    run = finished(
        run_command("train", data, *options, "--val-share", 0, "--out", tmp_path / "two")
    )
    assert "40 rows to train on, 0 to validate on" in run.stderr
    val = write(tmp_path / "val.jsonl", [*rows[:3], *rows_of(["b", "a"], 4)])
    run = finished(run_command("train", data, *options, "--val", val, "--out", tmp_path / "three"))
    (line,) = [line for line in run.stderr.splitlines() if "train on too" in line]
    assert line.startswith("3 of the 7 rows to validate on")
    run = run_command(
        "train", data, *options, "--val", val, "--val-share", 0.5, "--out", tmp_path / "four"
    )
    assert run.returncode == 1 and "--val-share 0.5: expected none" in run.stderr


def test_a_tie_goes_to_the_lower_loss_and_a_figure_may_be_named():
    """Guards a run that stopped at the majority class, whose accuracy, or F1 of 0, is the same again and again."""
    options = TrainOptions(task="classify")
    first = {"accuracy": 0.9, "macro F1": 0.47, "loss": 0.33}
    for figures, given, better in (
        (first | {"loss": 0.31}, {}, True),
        (first | {"loss": 0.35}, {}, False),
        (first | {"accuracy": 0.89, "macro F1": 0.7, "loss": 0.3}, {}, False),
        (first | {"accuracy": 0.89, "macro F1": 0.7}, dict(class_weights=True), True),
        (first | {"accuracy": 0.89, "macro F1": 0.7}, dict(metric="macro_f1"), True),
        (first | {"accuracy": 0.95, "loss": 0.4}, dict(metric="LOSS"), False),
        (first | {"accuracy": 0.95}, dict(class_weights=True, metric="accuracy"), True),
    ):
        options = TrainOptions(task="classify", **given)
        assert (train.merit(figures, options) > train.merit(first, options)) == better, figures
    none = {"correlation": None, "mean squared error": 2.0}
    options = TrainOptions(metric="correlation")
    assert train.merit(none | {"correlation": -0.5}, options) > train.merit(none, options)
    assert train.merit(none | {"mean squared error": 1.0}, options) > train.merit(none, options)
    refuses(
        lambda: train.merit(first, TrainOptions(metric="F2")),
        "--metric F2",
        "accuracy, macro F1, loss",
    )


@pytest.mark.parametrize(
    "options, step", [([], 4), (["--metric", "macro F1"], 6), (["--class-weights"], 6)]
)
def test_best_is_the_checkpoint_of_the_chosen_figure(options, step, tmp_path, monkeypatch):
    """Over a resume too: what the best one was is kept with the checkpoint to go on with."""
    shown = {
        2: {"accuracy": 0.9, "macro F1": 0.4, "loss": 0.5},
        4: {"accuracy": 0.9, "macro F1": 0.4, "loss": 0.4},
        6: {"accuracy": 0.8, "macro F1": 0.6, "loss": 0.9},
        8: {"accuracy": 0.9, "macro F1": 0.5, "loss": 0.4},
    }
    steps = iter(shown)
    data = write(tmp_path / "a.jsonl", rows_of(["a", "b"], 40))
    monkeypatch.setattr(train.Classification, "figures", lambda *_: shown[at[0]])
    real = train.validate

    def validate(lm, held, run_state, options):
        at[0] = next(steps)
        return real(lm, held, run_state, options)

    at = [2]
    monkeypatch.setattr(train, "validate", validate)
    out = tmp_path / "out"
    finished(
        run_command("train", data, *FAST, "--steps", 4, "--eval-every", 2, "--out", out, *options)
    )
    finished(run_command("train", data, "--resume", "--steps", 8, "--out", out))
    state = train.load_resume_metadata(out / "last")
    assert state["best_step"] == step and state["figures"] == shown[step]


def test_a_run_does_not_stop_at_the_most_frequent_class(tmp_path, monkeypatch):
    """Its accuracy is the same again and again and the loss falls unevenly, until another class is learnt."""
    shown = [(0.9, 0.40), (0.9, 0.38), (0.9, 0.39), (0.9, 0.385), (1.0, 0.1), (1.0, 0.2)]
    found = iter([{"accuracy": right, "loss": loss} for right, loss in shown])
    monkeypatch.setattr(train.Classification, "figures", lambda *_: next(found))
    data = write(tmp_path / "a.jsonl", rows_of(["a", "b"], 40))
    options = [*FAST, "--steps", 9, "--eval-every", 1, "--patience", 1, "--out", tmp_path / "out"]
    run = finished(run_command("train", data, *options))
    assert "stopped at step 6: no better validation in the last 1" in run.stderr
    assert train.load_resume_metadata(tmp_path / "out" / "last")["best_step"] == 5
    monkeypatch.setattr(train.Classification, "figures", lambda *_: {"accuracy": 0.9, "loss": 0.4})
    run = finished(run_command("train", data, *options, "--overwrite"))  # nothing is ever learnt
    assert "stopped at step 6: no better validation in the last 5" in run.stderr


def test_an_unknown_metric_is_one_line_before_anything_is_learnt(tmp_path):
    data = write(tmp_path / "a.jsonl", rows_of(["a", "b"], 40))
    run = run_command("train", data, *FAST, "--metric", "bleu", "--out", tmp_path / "out")
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "--metric bleu: expected one of accuracy, macro F1, loss" in run.stderr
    run = run_command(
        "train", data, *FAST, "--val-share", 0, "--metric", "loss", "--out", tmp_path / "out"
    )
    assert run.returncode == 1 and "nothing is held back" in run.stderr


# ---- rows that are partly empty ----------------------------------------------------------------------------------

PAIRS = [  # columns -> (text, pair)
    (dict(question="q", sentence="s"), ("q", "s")),  # QNLI
    (dict(question="q", passage="p"), ("q", "p")),
    (dict(premise="p", hypothesis="h"), ("p", "h")),
    (dict(sentence="s"), ("s", None)),
    (dict(Question="q", Sentence="s"), ("q", "s")),
    (dict(text="t", question="q", sentence="s"), ("t", None)),
    (dict(premise="p", hypothesis=""), ("p", None)),
    (dict(premise="p", hypothesis=" "), ("p", None)),
    (dict(premise="p", hypothesis=None), ("p", None)),
    (dict(premise="p", hypothesis=math.nan), ("p", None)),
]


@pytest.mark.parametrize("columns, expected", PAIRS, ids=str)
def test_columns_of_pairs(columns, expected):
    (row,) = read_rows([columns | {"label": "x"}], CLASSIFY, notices=[])
    assert (row["text"], row.get("pair")) == expected
    options = TrainOptions(task="classify", text="a", pair="b")
    (row,) = read_rows([dict(a="t", b="p", label="x")], options, notices=[])
    assert (row["text"], row["pair"]) == ("t", "p")


def test_an_empty_second_text_is_none_in_training_eval_and_run(base, tmp_path):
    """Guards a separator more in training than in `run`."""
    lm = TinyLM.from_pretrained(base(["a", "b"]))
    runner = train.TorchRunner(lm)
    lm.config = tinylm.replace(lm.config, problem_type="single_label_classification")
    for pair, same in ((None, True), ("", True), ("  ", True), ("x", False)):
        (row,) = read_rows(
            [dict(sentence1="fine", sentence2=pair, label="a")], CLASSIFY, notices=[]
        )
        (example,) = train.TASKS["classify"].examples(lm, row, 64)
        assert (example["input_ids"] == lm.tokenizer.encode("fine")) == same
        (ours,), (alone,) = (onnxlm.run(runner, ["fine"], pairs) for pairs in ([pair], [None]))
        assert (ours == alone) == same


def test_questions_without_an_answer_in_a_table(tmp_path):
    """An empty cell, as pandas and spreadsheets write it."""
    data = tmp_path / "a.csv"
    data.write_text('question,context,answer\nWho?,"Ada, in 1843.",Ada\nWhere?,"Ada, in 1843.",\n')
    said = []
    rows = read_rows(data, TrainOptions(task="qa"), notices=said)
    assert [row["answer"] for row in rows] == [[("Ada", 0)], []]
    assert any("1 question without an answer" in line for line in said)
    for empty in (None, math.nan, "", [], [""], {"text": [], "answer_start": []}):
        (row,) = read_rows(
            [dict(question="q", context="c", answers=empty)], TrainOptions(task="qa"), notices=[]
        )
        assert row["answer"] == [], empty


# ---- files and pipes ---------------------------------------------------------------------------------------------


def test_a_save_removes_the_weights_of_the_former_one(tmp_path):
    """Guards shards and their index, by which other programs went; what is no file of weights stays."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = sorted({*content["weight_map"].values()})
    (tmp_path / names[0]).rename(
        tmp_path / "odd.safetensors"
    )  # a name of its own, which the index has
    weights = {
        name: "odd.safetensors" if file == names[0] else file
        for name, file in content["weight_map"].items()
    }
    index.write_text(json.dumps(content | {"weight_map": weights}))
    for name in (
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "other.safetensors",
        "notes.txt",
    ):
        (tmp_path / name).write_bytes(b"x")
    lm = TinyLM.from_pretrained(tmp_path)
    with torch.no_grad():
        lm.embed.weight.add_(1)
    lm.save_pretrained(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "other.safetensors",
        "notes.txt",
    }
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(theirs["model.embed_tokens.weight"], lm.embed.weight)
    index.write_text("{ torn")
    lm.save_pretrained(tmp_path)
    assert not index.exists()


def test_a_save_that_fails_keeps_the_former_weights(tmp_path, monkeypatch):
    lm = TinyLM(Config(**TINY, vocab_size=300))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x")

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tinylm, "write_tensors", fails)
    with pytest.raises(OSError):
        lm.save_pretrained(tmp_path)
    assert (tmp_path / "model-00001-of-00002.safetensors").exists()


def test_adapters_of_a_former_run_are_removed(base, tmp_path):
    data = write(tmp_path / "a.jsonl", rows_of(["a", "b"], 40))
    options = [
        "--task",
        "classify",
        "--init",
        base(["a", "b"]),
        *NOTHING_LEARNT,
        "--out",
        tmp_path / "out",
    ]
    finished(run_command("train", data, *options, "--lora", 2))
    assert (tmp_path / "out" / "best" / "adapter" / "adapter_config.json").exists()
    finished(run_command("train", data, *options, "--overwrite"))
    assert not (tmp_path / "out" / "best" / "adapter").exists()


@pytest.mark.parametrize("script", ["train.py", "onnxlm.py"])
def test_pipes_carry_utf8_whatever_the_platform_says(script, base, request):
    """Guards text in code page 1252, as pipes on Windows have it: read wrongly, and answers that ended in a traceback."""
    if script == "train.py":
        words = ["run", base(["süß", "東京"])]
    else:
        words = [request.getfixturevalue("small_export")[2], "--max-new-tokens", "2"]
    text = "süß, größer, 東京"

    def piped(*options):
        command = [sys.executable, ROOT / script, *words, *options]
        environment = os.environ | {"PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
        stdin = f"{text}\n".encode("utf-8-sig")  # as PowerShell writes it
        run = subprocess.run(command, input=stdin, capture_output=True, env=environment)
        assert run.returncode == 0, run.stderr.decode()
        return run.stdout.decode("utf-8")

    assert json.loads(piped("--json"))["input"] == text
    plain = piped()
    assert plain and (script == "onnxlm.py" or "süß" in plain and "東京" in plain)


def test_streams_are_utf8_in_every_program(monkeypatch):
    import export

    for main in (train.main, onnxlm.main, export.main):
        streams = {
            name: io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
            for name in ("stdin", "stdout", "stderr")
        }
        for name, stream in streams.items():
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit):
            main(["--help"])
        encodings = [stream.encoding for stream in streams.values()]
        monkeypatch.undo()
        assert encodings == ["utf-8-sig", "utf-8", "utf-8"]


# ---- long texts in pieces ----------------------------------------------------------------------------------------


def long_texts():
    draw = random.Random(0)
    words = "the quick brown fox süß größer e\u0301tude 12345 67 foo_bar don't (a) [b] x=1; --flag".split()

    def some(count):
        text = [
            draw.choice(words) + draw.choice(["", "", "", ".", "\n", "\n\n", "  ", ",", "\t"])
            for _ in range(count)
        ]
        return " ".join(text)

    chinese = "".join(
        draw.choices("东京是日本的首都我们喜欢学习语言模型天气很好今天明天。，", k=4000)
    )
    code = "\n".join("    " * draw.randrange(5) + some(4) for _ in range(300))
    return {
        "words": some(3000),
        "chinese": chinese,
        "mixed": some(500) + chinese[:2000] + some(300),
        "code": code,
    }


LONG = long_texts()


def backend(kind):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    level, meta = pre_tokenizers.ByteLevel, pre_tokenizers.Metaspace
    digits = pre_tokenizers.Split(
        Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"
    )
    before = {
        "byte-level": level(add_prefix_space=False),
        "byte-level, a space first": level(add_prefix_space=True),
        "byte-level, digits by three": pre_tokenizers.Sequence(
            [digits, level(add_prefix_space=False, use_regex=False)]
        ),
        "metaspace": meta(prepend_scheme="always"),
        "metaspace at the start": meta(prepend_scheme="first"),
        "metaspace, never": meta(prepend_scheme="never"),
        "metaspace, not split": meta(prepend_scheme="first", split=False),
        "llama's normalizer": None,
        "unigram": meta(prepend_scheme="always"),
        "BERT": pre_tokenizers.BertPreTokenizer(),
    }[kind]
    unigram = kind == "unigram"
    made = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>", fuse_unk=True))
    if before:
        made.pre_tokenizer = before
    if kind == "llama's normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(steps)
    if unigram:  # T5's
        steps = [
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), *steps])
    if kind == "BERT":
        made.normalizer = normalizers.BertNormalizer()
    common = dict(special_tokens=["<unk>"], show_progress=False)
    alphabet = level.alphabet() if kind.startswith("byte") else []
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, **common)
    if unigram:
        trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", **common)
    parts = [text[i : i + 500] for text in LONG.values() for i in range(0, len(text), 500)]
    made.train_from_iterator(parts, trainer)
    return onnxlm.Tokenizer({"tokenizer.json": made.to_str().encode()})


@pytest.mark.parametrize(
    "kind",
    [
        "byte-level",
        "byte-level, a space first",
        "byte-level, digits by three",
        "metaspace",
        "metaspace at the start",
        "metaspace, never",
        "metaspace, not split",
        "llama's normalizer",
        "unigram",
        "BERT",
    ],
)
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(kind, monkeypatch, tmp_path):
    """Guards SentencePiece's space before each piece, and words that were cut in two."""
    tokenizer = backend(kind)
    for name, text in LONG.items():
        if kind == "unigram" and name != "words":
            continue  # of a text without spaces, two ways to divide it may have sums that differ by rounding only
        whole = tokenizer.encode(text, special=False)
        for piece in (100, 1000, 5000):
            monkeypatch.setattr(train, "PIECE", piece)
            ids = train.token_ids(tokenizer, text, special=False).tolist()
            assert ids == whole, (name, piece)
            assert (
                len([*train.overlapping(tokenizer, train.sliced(text))]) > len(text) // piece // 3
            )
    path = tmp_path / "text.txt"
    path.write_text(LONG["mixed"], encoding="utf-8")
    mapped = datafiles.MappedText(path)
    whole = tokenizer.encode(LONG["mixed"], special=False)
    assert train.token_ids(tokenizer, mapped, special=False).tolist() == whole


def test_a_text_without_a_seam_is_cut_at_last(monkeypatch):
    """One character, again and again: its tokens depend on where it began."""
    tokenizer = backend("byte-level, digits by three")
    monkeypatch.setattr(train, "PIECE", 500)
    text = "7" * 20_001
    assert train.token_ids(tokenizer, text, special=False).tolist() == tokenizer.encode(
        text, special=False
    )
    monkeypatch.setattr(train, "LONGEST_PIECE", 2000)
    assert (
        tokenizer.decode(train.token_ids(tokenizer, text, special=False).tolist()).count("7")
        == 20_001
    )
