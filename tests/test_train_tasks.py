"""Fine-tuning and training from scratch for every task, through the commands; what is saved against transformers."""

import csv
import io
import json
import math
import random
import shutil
import sys

import pytest
import torch
from families import ENCODERS, difference, load_oracle
from helpers import same_files
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    pipeline,
)

import data as datafiles
import tinylm
import train
from tinylm import Config, TinyLM, train_step
from train import main

FILL = "the film is a story of people with some music and scenes that go on".split()
GOOD, BAD = "great lovely superb moving".split(), "awful dull boring flat".split()
NAMES, CITIES = "Ann Bob Carl Dora".split(), "Paris Rome Oslo Bonn".split()
NUMBERS = dict(eins="one", zwei="two", drei="three", vier="four")


def sentence(draw, good):
    words = draw.choices(FILL, k=draw.randint(3, 12))
    words.insert(draw.randrange(len(words)), draw.choice(GOOD if good else BAD))
    return " ".join(words)


def rows_of(task, count=120):
    draw, rows = random.Random(0), []
    for i in range(count):
        name, city, good = draw.choice(NAMES), draw.choice(CITIES), i % 2
        context = f"yesterday {name} went to {city} by train " + " ".join(
            draw.choices(FILL, k=draw.randint(4, 30))
        )
        words = draw.choices(list(NUMBERS), k=3)
        rows.append(
            {
                "classify": {
                    "review": sentence(draw, good),
                    "sentiment": ["negative", "positive"][good],
                },
                "tokens": {
                    "tokens": f"yesterday {name} Smith went to {city} by train".split(),
                    "ner_tags": ["O", "B-PER", "I-PER", "O", "O", "B-LOC", "O", "O"],
                },
                "qa": {
                    "question": "Where did they go?",
                    "context": context,
                    "answers": {"text": [city], "answer_start": [context.index(city)]},
                },
                "seq2seq": {
                    "source": " ".join(words),
                    "target": " ".join(NUMBERS[word] for word in words),
                },
                "mlm": {"text": sentence(draw, good)},
                "lm": {"text": sentence(draw, good)},
            }[task]
        )
    return rows


def write(path, rows):
    """A file of its suffix's format."""
    if path.suffix == ".jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    else:
        out = io.StringIO()
        table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader(), table.writerows(rows)
        text = out.getvalue()
    path.write_text(text, encoding="utf-8")
    return path


def command(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


SHORT = {"classify": 4, "tokens": 5, "qa": 12, "seq2seq": 15, "mlm": 2}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """scratch(task) -> (its data, the folder of a tiny model trained on it from nothing), trained once."""
    made = {}

    def train(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            data = write(
                folder / f"data.{'csv' if task == 'classify' else 'jsonl'}", rows_of(task, 200)
            )
            command(
                "train",
                data,
                "--task",
                task,
                "--size",
                "pico" if task == "seq2seq" else "nano",
                "--epochs",
                SHORT[task],
                "--block",
                48,
                "--batch",
                16,
                "--vocab",
                600,
                "--dropout",
                0,
                "--out",
                folder / "out",
            )
            made[task] = data, folder / "out" / "best"
        return made[task]

    return train


def figures(folder, data, capsys):
    capsys.readouterr()
    command("eval", folder, data, "--json", "--block", 48)
    return json.loads(capsys.readouterr().out)


def answers(folder, *inputs, capsys):
    capsys.readouterr()
    command("run", folder, *inputs, "--json")
    return [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]


# ---- from nothing, to what transformers runs ------------------------------------------------------------------------


def test_scratch_classifier_is_that_of_the_pipeline(scratch, capsys):
    data, folder = scratch("classify")
    assert figures(folder, data, capsys)["accuracy"] > 0.9
    texts = ["a great film", "the story is awful, and so dull that people went", ""]
    theirs = pipeline("text-classification", str(folder), top_k=None, device="cpu")(texts)
    for ours, reference in zip(answers(folder, *texts, capsys=capsys), theirs):
        assert [a["label"] for a in ours] == [a["label"] for a in reference]
        assert [a["score"] for a in ours] == pytest.approx(
            [a["score"] for a in reference], abs=1e-5
        )
    assert AutoConfig.from_pretrained(folder).id2label == {0: "negative", 1: "positive"}


def test_scratch_tagger_is_that_of_the_pipeline(scratch, capsys):
    data, folder = scratch("tokens")
    assert figures(folder, data, capsys)["entity F1"] > 0.9
    text = "yesterday Ann Smith went to Rome by train"
    reference = pipeline(
        "token-classification", str(folder), aggregation_strategy="simple", device="cpu"
    )(text)
    (ours,) = answers(folder, text, capsys=capsys)
    assert [(a["entity_group"], a["end"]) for a in ours] == [
        (a["entity_group"], a["end"]) for a in reference
    ]
    assert [a["word"] for a in ours] == ["Ann Smith", "Rome"]
    assert [a["score"] for a in ours] == pytest.approx(
        [float(a["score"]) for a in reference], abs=1e-5
    )


def test_scratch_mask_filler_is_that_of_the_pipeline(scratch, capsys):
    _, folder = scratch("mlm")
    text = "the film is [MASK] story"
    reference = pipeline("fill-mask", str(folder), top_k=5, device="cpu")(text)
    for asked in (text, text.replace("[MASK]", "<mask>")):
        (ours,) = answers(folder, asked, capsys=capsys)
        assert [a["token_str"] for a in ours] == [a["token_str"] for a in reference]
        assert [a["score"] for a in ours] == pytest.approx(
            [a["score"] for a in reference], abs=1e-5
        )
        assert [a["sequence"] for a in ours] == [a["sequence"] for a in reference]


@pytest.mark.slow
def test_scratch_answers_are_those_of_transformers(scratch, capsys):
    """By the rule of the pipeline that transformers had: softmax over a window's context and first token."""
    data, folder = scratch("qa")
    assert figures(folder, data, capsys)["span F1"] > 0.5
    question, context = "Where did they go?", "yesterday Bob went to Oslo by train and people"
    (ours,) = answers(folder, question, "--context", context, capsys=capsys)
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    batch = tokenizer(question, context, return_tensors="pt")
    with torch.no_grad():
        out = model(**batch)
    inside = torch.tensor([part == 1 for part in batch.sequence_ids(0)])
    shown = inside.clone()
    shown[0] = True
    start, end = (
        x[0].masked_fill(~shown, -1e4).softmax(-1) * inside
        for x in (out.start_logits, out.end_logits)
    )
    scores = (start[:, None] * end).triu().tril(29)
    assert ours[0]["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    assert context[ours[0]["start"] : ours[0]["end"]].strip() == ours[0]["answer"]
    (tabbed,) = answers(folder, f"{question}\t{context}", capsys=capsys)
    assert tabbed == ours


@pytest.mark.slow
def test_scratch_translation_is_that_of_transformers(scratch, capsys):
    _, folder = scratch("seq2seq")
    text = "eins zwei drei"
    assert answers(folder, text, capsys=capsys)[0] == [{"generated_text": "one two three"}]
    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = model.generate(
        tokenizer(text, return_tensors="pt").input_ids, do_sample=False, max_new_tokens=20
    )
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "one two three"


# ---- from a pretrained model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def body(scratch):
    """A small pretrained encoder to fine-tune."""
    return scratch("mlm")[1]


def tune(body, data, out, *options, task="classify"):
    command("train", data, "--task", task, "--init", body, "--out", out, "--block", 48, *options)
    return out / "best"


def test_lora_is_merged_and_kept_as_peft_names_it(body, tmp_path):
    """W + B A alpha / rank, by hand from the adapter's file, is the checkpoint's weight; the rest is as it was."""
    data = write(tmp_path / "data.csv", rows_of("classify"))
    best = tune(body, data, tmp_path / "out", "--lora", 4, "--epochs", 1)
    merged, before = load_file(best / "model.safetensors"), load_file(body / "model.safetensors")
    adapter, notes = (
        load_file(best / "adapter" / "adapter_model.safetensors"),
        json.loads((best / "adapter" / "adapter_config.json").read_text()),
    )
    assert notes["r"] == 4 and notes["task_type"] == "SEQ_CLS" and notes["lora_alpha"] == 8
    names = {name.removesuffix(".lora_A.weight") for name in adapter if ".lora_A." in name}
    assert len(names) == 4 * 6
    for name in names:
        a, b = (adapter[f"{name}.lora_{kind}.weight"] for kind in "AB")
        plain = name.removeprefix("base_model.model.")
        assert b.abs().max() > 0
        assert torch.allclose(
            merged[plain + ".weight"], before[plain + ".weight"] + b @ a * 2, atol=1e-6
        ), plain
        assert plain.split(".", 4)[-1] in notes["target_modules"]
    tuned = {name.removeprefix("base_model.model.") + ".weight" for name in names}
    for name in set(before) & set(merged) - tuned:
        assert torch.equal(before[name], merged[name]), name
    assert torch.equal(adapter["base_model.model.classifier.weight"], merged["classifier.weight"])


@pytest.mark.parametrize(
    "options, moved",
    [
        (("--freeze", "embeddings"), {"layer"}),
        (("--freeze", "body"), set()),
        (("--freeze", "4"), set()),
        ((), {"layer", "embeddings"}),
    ],
    ids=["embeddings", "body", "blocks", "nothing"],
)
def test_what_is_frozen_stays(options, moved, body, tmp_path):
    data = write(tmp_path / "data.csv", rows_of("classify"))
    best = tune(body, data, tmp_path / "out", "--steps", 2, *options)
    after, before = load_file(best / "model.safetensors"), load_file(body / "model.safetensors")
    changed = {
        name for name in set(after) & set(before) if not torch.equal(after[name], before[name])
    }
    assert {
        part for part in ("layer", "embeddings") if any(f".{part}." in name for name in changed)
    } == moved


def test_resumed_is_the_uninterrupted_run(body, tmp_path, monkeypatch):
    """Bit for bit, with dropout and adapters, for every task; and not on other data."""
    for task, options in (("classify", ("--lora", 4)), ("tokens", ()), ("qa", ()), ("mlm", ())):
        data = write(tmp_path / f"{task}.jsonl", rows_of(task, 60))
        options = ("--steps", 6, "--eval-every", 3, "--batch", 4, "--dropout", 0.1, *options)
        tune(body, data, tmp_path / task / "whole", *options, task=task)
        step, calls = tinylm.train_step, []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", interrupted)
            assert (
                main(
                    [
                        "train",
                        str(data),
                        "--task",
                        task,
                        "--init",
                        str(body),
                        "--block",
                        "48",
                        "--out",
                        str(tmp_path / task / "cut"),
                        *map(str, options),
                    ]
                )
                == 130
            )
        command("train", data, "--out", tmp_path / task / "cut", "--resume")
        for which in ("best", "last"):
            assert same_files(
                *(tmp_path / task / out / which / "model.safetensors" for out in ("whole", "cut"))
            ), task
        write(data, rows_of(task, 61))
        assert main(["train", str(data), "--out", str(tmp_path / task / "cut"), "--resume"]) == 1


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_rows_of_every_format_are_the_same(suffix, tmp_path):
    rows = [
        {"text": 'a "quoted",\ttext\nof two lines\u2028here', "label": "x"},
        {"text": "größer", "label": "y"},
    ]
    path = write(tmp_path / f"data{suffix}", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert datafiles.read_rows(path, train.TrainOptions(task="classify")) == rows


@pytest.mark.parametrize(
    "labels, problem, count",
    [
        (["a", "b", "c"], "single_label_classification", 3),
        ([["a"], ["b", "c"], []], "multi_label_classification", 3),
        ([0.5, 1.5, 2], "regression", 1),
        ([10, 9, 1], "single_label_classification", 3),
    ],
    ids=str,
)
def test_labels_show_the_problem_and_train(labels, problem, count, body, tmp_path, capsys):
    rows = [dict(text=sentence(random.Random(i), i % 2), label=labels[i % 3]) for i in range(30)]
    data = write(tmp_path / "data.jsonl", rows)
    best = tune(body, data, tmp_path / "out", "--steps", 2)
    config = json.loads((best / "config.json").read_text())
    assert config["problem_type"] == problem and len(config["id2label"]) == count
    if labels[0] == 10:
        assert config["id2label"] == {"0": "1", "1": "9", "2": "10"}
    theirs = pipeline("text-classification", str(best), top_k=None, device="cpu")(["a great film"])[
        0
    ]
    (ours,) = answers(best, "a great film", capsys=capsys)
    assert [(a["label"]) for a in ours] == [a["label"] for a in theirs]
    assert [a["score"] for a in ours] == pytest.approx([a["score"] for a in theirs], abs=1e-5)
    assert figures(best, data, capsys)


def test_long_contexts_answer_from_any_window(body, tmp_path):
    """Windows overlap and cover the context; the answer's columns say its text in those that have it."""
    lm = TinyLM.from_pretrained(body, head="qa")
    context = " ".join(
        [*(f"word{i}" for i in range(200)), "Bonn is the answer", *(f"tail{i}" for i in range(60))]
    )
    row = dict(question="Where?", context=context, answer=[("Bonn", context.index("Bonn"))])
    examples = [*train.TASKS["qa"].examples(lm, row, 64)]
    assert len(examples) > 5 and all(len(example["input_ids"]) <= 64 for example in examples)
    windows = [example["window"] for example in examples]
    seen = {
        c
        for window in windows
        for part, span in zip(window.sequence_ids, window.offsets)
        if part == 1
        for c in range(*span)
    }
    assert all(c in seen for c, char in enumerate(context) if char != " ")
    found = [
        (example["window"].offsets[first][0], example["window"].offsets[last][1])
        for example in examples
        for first, last in [example["labels"]]
        if first
    ]
    assert found and all(context[start:end].strip() == "Bonn" for start, end in found)


def test_early_stopping_and_class_weights(body, tmp_path, capsys):
    rows = [row for i, row in enumerate(rows_of("classify")) if i % 2 or i % 10 == 0]
    data = write(tmp_path / "data.csv", rows)
    tune(
        body,
        data,
        tmp_path / "out",
        "--steps",
        40,
        "--eval-every",
        2,
        "--lr",
        1e-9,
        "--adam-lr",
        1e-9,
        "--patience",
        2,
        "--class-weights",
    )
    assert "no better validation" in capsys.readouterr().err
    weights = train.class_weights(Config(head="classify"), [dict(labels=0)] * 3 + [dict(labels=1)])
    assert weights.tolist() == pytest.approx([4 / 6, 2.0])


def test_embeddings_are_those_that_are_documented(minilm, capsys):
    ours = [
        torch.tensor(a[0]["embedding"])
        for a in answers(
            minilm,
            "The weather is lovely today.",
            "It's so sunny outside!",
            "He drove to the stadium.",
            capsys=capsys,
        )
    ]
    assert [float(ours[0] @ other) for other in ours] == pytest.approx(
        [1.0, 0.6660, 0.1046], abs=6e-5
    )


def test_lines_of_standard_input_and_options_behind_inputs(scratch, capsys, monkeypatch):
    _, folder = scratch("classify")
    capsys.readouterr()  # of the training, where it is the first
    monkeypatch.setattr(sys, "stdin", io.StringIO("great\nawful\n"))
    command("run", folder)
    lines = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys, "stdin", io.StringIO("awful\n"))
    command("run", folder, "great", "--batch", 1, "-")
    assert capsys.readouterr().out.splitlines() == lines
    assert lines[0].startswith("positive") and lines[1].startswith("negative")


BAD_ROWS = {
    "no column": ([{"review": "x"}], "label"),
    "null": ([{"text": None, "label": "x"}], "text"),
    "a number": ([{"text": 3, "label": "x"}], "text = '3'"),
    "an object": ([{"text": "x", "label": {"a": 1}}], "label"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_are_one_line(what, tmp_path, capsys):
    rows, named = BAD_ROWS[what]
    data = write(tmp_path / "data.jsonl", rows)
    assert main(["train", str(data), "--task", "classify", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and str(data) in error
        and named in error
        and not (tmp_path / "out").exists()
    )


def test_classifying_step_is_the_step_of_transformers(body, tmp_path):
    """The loss of a padded batch."""
    data = write(tmp_path / "data.csv", rows_of("classify"))
    best = tune(body, data, tmp_path / "out", "--steps", 1)
    lm, oracle = (
        TinyLM.from_pretrained(
            best, hidden_dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0
        ),
        load_oracle(best, "classify"),
    )
    ids = torch.randint(5, 300, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5])
    labels = torch.tensor([0, 1, 1])
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
    loss = train_step(lm, torch.optim.SGD(lm.parameters(), lr=0.0), batch)
    assert loss.item() == pytest.approx(oracle(ids, mask, labels=labels).loss.item(), rel=1e-5)
    assert difference(lm.eval()(ids, mask), oracle(ids, mask).logits) < 1e-4


# ---- what was wrong once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["lm", "seq2seq", "mlm"])
def test_from_nothing_all_words_are_alike(task):
    """Guards a translator that began by saying its input back, with a loss of 10.8."""
    options = train.TrainOptions(task=task, size="pico", vocab=300, batch=4).filled()
    rows = rows_of(task, 20)
    lm = train.new_model(rows, options).eval()
    examples = train.TASKS[task].epochs(lm, rows, 64)(None)
    nats = next(iter(train.TASKS[task].figures(lm, examples, 8).values()))
    assert nats == pytest.approx(math.log(lm.config.vocab_size), abs=0.5)


def test_a_label_that_only_validation_has(tmp_path):
    """Guards a training that stops at a rare tag in the rows held back."""
    rows = rows_of("tokens", 20)
    rows[-1]["ner_tags"][0] = "B-RARE"
    data = write(tmp_path / "data.jsonl", rows)
    command(
        "train",
        data,
        "--task",
        "tokens",
        "--size",
        "pico",
        "--steps",
        1,
        "--vocab",
        300,
        "--out",
        tmp_path / "out",
    )
    assert "B-RARE" in TinyLM.from_pretrained(tmp_path / "out" / "best").config.id2label.values()


@pytest.mark.parametrize(
    "task, options",
    [
        ("seq2seq", ["--dropout", 0.2]),  # T5's only rate is attention's too
        ("lm", ["--block", 128]),  # a sample longer than the positions there are
    ],
)
def test_trains_to_the_end(task, options, tmp_path):
    data = write(tmp_path / "data.jsonl", rows_of(task, 60))
    command(
        "train",
        data,
        "--task",
        task,
        "--size",
        "pico",
        "--steps",
        1,
        "--batch",
        4,
        "--out",
        tmp_path / "out",
        *options,
    )
    assert (tmp_path / "out" / "last" / "model.safetensors").exists()


def test_several_labels_or_none(body, tmp_path):
    """Guards a division by the number of classes that occur: none."""
    rows = [
        dict(text=sentence(random.Random(i), i % 2), label=[] if i > 20 else ["a"])
        for i in range(30)
    ]
    tune(
        body,
        write(tmp_path / "data.jsonl", rows),
        tmp_path / "out",
        "--steps",
        1,
        "--lr",
        1e-9,
        "--adam-lr",
        1e-9,
    )


WRONG = {
    "weights of words": ("lm", ["--class-weights"], "--class-weights"),
    "nothing to train": ("lm", ["--freeze", "body"], "--freeze body: nothing is left to train"),
    "a short block": ("lm", ["--block", 2], "--block = 2"),
    "a size of its own": ("classify", ["--init", "x", "--size", "nano"], "--size nano"),
    "tokens of its own": ("classify", ["--init", "x", "--vocab", 300], "--vocab 300"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_options_are_one_line(what, tmp_path, capsys):
    task, options, words = WRONG[what]
    data = write(tmp_path / "data.jsonl", rows_of(task, 60))
    assert (
        main(
            [
                "train",
                str(data),
                "--task",
                task,
                "--steps",
                "1",
                "--out",
                str(tmp_path / "out"),
                *map(str, options),
            ]
        )
        == 1
    )
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1] and "Traceback" not in error


def test_texts_and_chats_do_not_mix(tmp_path, capsys):
    rows = [
        {"text": "x"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    for order in (rows, rows[::-1]):
        assert (
            main(
                [
                    "train",
                    str(write(tmp_path / "data.jsonl", order)),
                    "--out",
                    str(tmp_path / "out"),
                ]
            )
            == 1
        )
        assert "texts and messages" in capsys.readouterr().err


def test_a_comma_too_many_is_one_line(tmp_path, capsys):
    """Guards a text that ends at its own comma, and what stands behind it as the label."""
    (tmp_path / "data.csv").write_text("text,label\nfine,a\nhello, you,b\n")
    assert (
        main(
            [
                "train",
                str(tmp_path / "data.csv"),
                "--task",
                "classify",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 1
    )
    assert "data.csv, line 3: more fields than columns" in capsys.readouterr().err


def test_nothing_to_evaluate_and_nothing_for_a_context(scratch, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    lm = TinyLM(Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    lm.save_pretrained(tmp_path / "lm")
    assert main(["eval", str(tmp_path / "lm"), str(tmp_path / "a.txt")]) == 1
    assert main(["run", str(scratch("tokens")[1]), "x", "--context", "y"]) == 1
    error = capsys.readouterr().err
    assert "nothing to evaluate" in error and "--context: the model reads one text alone" in error


def test_masks_that_no_file_names(scratch, tmp_path, capsys):
    """As in BERT's own tokenizer_config.json."""
    _, folder = scratch("mlm")
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 512}')
    assert answers(out, "the film is <mask>", capsys=capsys) == answers(
        folder, "the film is <mask>", capsys=capsys
    )


def test_adapters_of_a_deep_classifier_wrap_it_as_one(folder, tmp_path):
    """PEFT wraps `classifier` by itself: a module inside of it could not be loaded."""
    case = next(case for case in ENCODERS if case.name == "roberta-classify")
    lm = TinyLM.from_pretrained(folder(case))
    train.add_adapters(lm, 2)
    train.save_adapter(tmp_path, lm, train.TrainOptions(task="classify", init="x", lora=2))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == [
        "classifier"
    ]
    assert "lora" in str(lm).lower()


def test_rows_are_padded_where_no_id_pads():
    lm = TinyLM(
        Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=-1,
        )
    )
    batch = train.collate(lm, [dict(input_ids=[1, 2, 3]), dict(input_ids=[4])])
    assert lm(batch["input_ids"], batch["attention_mask"]).isfinite().all()
