"""Fine-tuning and training from scratch for every task, through the commands; what is saved against transformers."""

import csv
import io
import json
import random
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

import tinylm
from families import difference, load_oracle
from test_train import same_files
from tinylm import Config, TinyLM, main, train_step

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
        context = f"yesterday {name} went to {city} by train " + " ".join(draw.choices(FILL, k=draw.randint(4, 30)))
        words = draw.choices(list(NUMBERS), k=3)
        rows.append({
            "classify": {"review": sentence(draw, good), "sentiment": ["negative", "positive"][good]},
            "tokens": {"tokens": f"yesterday {name} Smith went to {city} by train".split(),
                       "ner_tags": ["O", "B-PER", "I-PER", "O", "O", "B-LOC", "O", "O"]},
            "qa": {"question": "Where did they go?", "context": context,
                   "answers": {"text": [city], "answer_start": [context.index(city)]}},
            "seq2seq": {"source": " ".join(words), "target": " ".join(NUMBERS[word] for word in words)},
            "mlm": {"text": sentence(draw, good)},
            "lm": {"text": sentence(draw, good)},
        }[task])
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


SHORT = {"classify": 4, "tokens": 5, "qa": 12, "seq2seq": 25, "mlm": 2}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """scratch(task) -> (its data, the folder of a tiny model trained on it from nothing), trained once."""
    made = {}

    def train(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            data = write(folder / f"data.{'csv' if task == 'classify' else 'jsonl'}", rows_of(task, 200))
            command("train", data, "--task", task, "--size", "nano", "--epochs", SHORT[task], "--block", 48,
                    "--batch", 16, "--vocab", 600, "--dropout", 0, "--out", folder / "out")
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
        assert [a["score"] for a in ours] == pytest.approx([a["score"] for a in reference], abs=1e-5)
    assert AutoConfig.from_pretrained(folder).id2label == {0: "negative", 1: "positive"}


def test_scratch_tagger_is_that_of_the_pipeline(scratch, capsys):
    data, folder = scratch("tokens")
    assert figures(folder, data, capsys)["entity F1"] > 0.9
    text = "yesterday Ann Smith went to Rome by train"
    reference = pipeline("token-classification", str(folder), aggregation_strategy="simple", device="cpu")(text)
    ours, = answers(folder, text, capsys=capsys)
    assert [(a["entity_group"], a["end"]) for a in ours] == [(a["entity_group"], a["end"]) for a in reference]
    assert [a["word"] for a in ours] == ["Ann Smith", "Rome"]
    assert [a["score"] for a in ours] == pytest.approx([float(a["score"]) for a in reference], abs=1e-5)


def test_scratch_mask_filler_is_that_of_the_pipeline(scratch, capsys):
    _, folder = scratch("mlm")
    text = "the film is [MASK] story"
    reference = pipeline("fill-mask", str(folder), top_k=5, device="cpu")(text)
    for asked in (text, text.replace("[MASK]", "<mask>")):
        ours, = answers(folder, asked, capsys=capsys)
        assert [a["token_str"] for a in ours] == [a["token_str"] for a in reference]
        assert [a["score"] for a in ours] == pytest.approx([a["score"] for a in reference], abs=1e-5)
        assert [a["sequence"] for a in ours] == [a["sequence"] for a in reference]


def test_scratch_answers_are_those_of_transformers(scratch, capsys):
    """By the rule of the pipeline that transformers had: softmax over a window's context and first token."""
    data, folder = scratch("qa")
    assert figures(folder, data, capsys)["span F1"] > 0.5
    question, context = "Where did they go?", "yesterday Bob went to Oslo by train and people"
    ours, = answers(folder, question, "--context", context, capsys=capsys)
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(question, context, return_tensors="pt")
    with torch.no_grad():
        out = model(**batch)
    inside = torch.tensor([part == 1 for part in batch.sequence_ids(0)])
    shown = inside.clone()
    shown[0] = True
    start, end = (x[0].masked_fill(~shown, -1e4).softmax(-1) * inside for x in (out.start_logits, out.end_logits))
    scores = (start[:, None] * end).triu().tril(29)
    assert ours[0]["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    assert context[ours[0]["start"]:ours[0]["end"]].strip() == ours[0]["answer"]
    tabbed, = answers(folder, f"{question}\t{context}", capsys=capsys)
    assert tabbed == ours


def test_scratch_translation_is_that_of_transformers(scratch, capsys):
    _, folder = scratch("seq2seq")
    text = "eins zwei drei"
    assert answers(folder, text, capsys=capsys)[0] == [{"generated_text": "one two three"}]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = model.generate(tokenizer(text, return_tensors="pt").input_ids, do_sample=False, max_new_tokens=20)
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
    adapter, notes = (load_file(best / "adapter" / "adapter_model.safetensors"),
                      json.loads((best / "adapter" / "adapter_config.json").read_text()))
    assert notes["r"] == 4 and notes["task_type"] == "SEQ_CLS" and notes["lora_alpha"] == 8
    names = {name.removesuffix(".lora_A.weight") for name in adapter if ".lora_A." in name}
    assert len(names) == 4 * 6
    for name in names:
        a, b = (adapter[f"{name}.lora_{kind}.weight"] for kind in "AB")
        plain = name.removeprefix("base_model.model.")
        assert b.abs().max() > 0
        assert torch.allclose(merged[plain + ".weight"], before[plain + ".weight"] + b @ a * 2, atol=1e-6), plain
        assert plain.split(".", 4)[-1] in notes["target_modules"]
    tuned = {name.removeprefix("base_model.model.") + ".weight" for name in names}
    for name in set(before) & set(merged) - tuned:
        assert torch.equal(before[name], merged[name]), name
    assert torch.equal(adapter["base_model.model.classifier.weight"], merged["classifier.weight"])


@pytest.mark.parametrize("options, moved", [(("--freeze", "embeddings"), {"layer"}), (("--freeze", "body"), set()),
                                            (("--freeze", "4"), set()), ((), {"layer", "embeddings"})],
                         ids=["embeddings", "body", "blocks", "nothing"])
def test_what_is_frozen_stays(options, moved, body, tmp_path):
    data = write(tmp_path / "data.csv", rows_of("classify"))
    best = tune(body, data, tmp_path / "out", "--steps", 2, *options)
    after, before = load_file(best / "model.safetensors"), load_file(body / "model.safetensors")
    changed = {name for name in set(after) & set(before) if not torch.equal(after[name], before[name])}
    assert {part for part in ("layer", "embeddings") if any(f".{part}." in name for name in changed)} == moved


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
            patch.setattr(tinylm, "train_step", interrupted)
            assert main(["train", str(data), "--task", task, "--init", str(body), "--block", "48", "--out",
                         str(tmp_path / task / "cut"), *map(str, options)]) == 130
        command("train", data, "--out", tmp_path / task / "cut", "--resume")
        for which in ("best", "last"):
            assert same_files(*(tmp_path / task / out / which / "model.safetensors" for out in ("whole", "cut"))), task
        write(data, rows_of(task, 61))
        assert main(["train", str(data), "--out", str(tmp_path / task / "cut"), "--resume"]) == 1


def test_chat_learns_the_assistants_words_only(monkeypatch):
    """By the template, token for token; a U+2028 in a string ends no row."""
    lm = TinyLM(Config(vocab_size=320))
    template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}")

    class Chatting(tinylm.ByteTokenizer):
        files = {"tokenizer_config.json": json.dumps({"chat_template": template}).encode()}

    lm.tokenizer = Chatting()
    messages = [dict(role=role, content=content) for role, content in (
        ("user", "hi\u2028there"), ("assistant", "yes"), ("user", "and"), ("assistant", "no"))]
    example = next(tinylm.TASKS["lm"].examples(lm, {"messages": messages}, 256))
    text = bytes(example["input_ids"]).decode()
    assert text == "<user>hi\u2028there</s><assistant>yes</s><user>and</s><assistant>no</s>"
    learnt = [token for token in example["labels"] if token != -100]
    assert bytes(learnt).decode() == "yes</s>no</s>"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_rows_of_every_format_are_the_same(suffix, tmp_path):
    rows = [{"text": 'a "quoted",\ttext\nof two lines\u2028here', "label": "x"}, {"text": "größer", "label": "y"}]
    path = write(tmp_path / f"data{suffix}", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert tinylm.read_rows(path, tinylm.TrainOptions(task="classify")) == rows


@pytest.mark.parametrize("labels, problem, count", [
    (["a", "b", "c"], "single_label_classification", 3), ([["a"], ["b", "c"], []], "multi_label_classification", 3),
    ([0.5, 1.5, 2], "regression", 1), ([10, 9, 1], "single_label_classification", 3)], ids=str)
def test_labels_show_the_problem_and_train(labels, problem, count, body, tmp_path, capsys):
    rows = [dict(text=sentence(random.Random(i), i % 2), label=labels[i % 3]) for i in range(30)]
    data = write(tmp_path / "data.jsonl", rows)
    best = tune(body, data, tmp_path / "out", "--steps", 2)
    config = json.loads((best / "config.json").read_text())
    assert config["problem_type"] == problem and len(config["id2label"]) == count
    if labels[0] == 10:
        assert config["id2label"] == {"0": "1", "1": "9", "2": "10"}
    theirs = pipeline("text-classification", str(best), top_k=None, device="cpu")(["a great film"])[0]
    ours, = answers(best, "a great film", capsys=capsys)
    assert [(a["label"]) for a in ours] == [a["label"] for a in theirs]
    assert [a["score"] for a in ours] == pytest.approx([a["score"] for a in theirs], abs=1e-5)
    assert figures(best, data, capsys)


def test_long_contexts_answer_from_any_window(body, tmp_path):
    """Windows overlap and cover the context; the answer's columns say its text in those that have it."""
    lm = TinyLM.from_pretrained(body, head="qa")
    context = " ".join([*(f"word{i}" for i in range(200)), "Bonn is the answer", *(f"tail{i}" for i in range(60))])
    row = dict(question="Where?", context=context, answer=[("Bonn", context.index("Bonn"))])
    examples = [*tinylm.TASKS["qa"].examples(lm, row, 64)]
    assert len(examples) > 5 and all(len(example["input_ids"]) <= 64 for example in examples)
    seen = {c for example in examples for span in example["offsets"] if span for c in range(*span)}
    assert all(c in seen for c, char in enumerate(context) if char != " ")
    found = [(example["offsets"][first][0], example["offsets"][last][1]) for example in examples
             for first, last in [example["labels"]] if first]
    assert found and all(context[start:end].strip() == "Bonn" for start, end in found)


def test_early_stopping_and_class_weights(body, tmp_path, capsys):
    rows = [row for i, row in enumerate(rows_of("classify")) if i % 2 or i % 10 == 0]
    data = write(tmp_path / "data.csv", rows)
    tune(body, data, tmp_path / "out", "--steps", 40, "--eval-every", 2, "--lr", 1e-9, "--adam-lr", 1e-9,
         "--patience", 2, "--class-weights")
    assert "no better validation" in capsys.readouterr().err
    weights = tinylm.class_weights(Config(head="classify"), [dict(labels=0)] * 3 + [dict(labels=1)])
    assert weights.tolist() == pytest.approx([4 / 6, 2.0])


def test_embeddings_are_those_that_are_documented(minilm, capsys):
    ours = [torch.tensor(a[0]["embedding"]) for a in answers(
        minilm, "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.", capsys=capsys)]
    assert [float(ours[0] @ other) for other in ours] == pytest.approx([1.0, 0.6660, 0.1046], abs=6e-5)


def test_lines_of_standard_input_and_options_behind_inputs(scratch, capsys, monkeypatch):
    _, folder = scratch("classify")
    monkeypatch.setattr(sys, "stdin", io.StringIO("great\nawful\n"))
    command("run", folder)
    lines = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys, "stdin", io.StringIO("awful\n"))
    command("run", folder, "great", "--batch", 1, "-")
    assert capsys.readouterr().out.splitlines() == lines
    assert lines[0].startswith("positive") and lines[1].startswith("negative")


BAD_ROWS = {
    "no column": ([{"review": "x"}], "label"), "null": ([{"text": None, "label": "x"}], "text"),
    "a number": ([{"text": 3, "label": "x"}], "text = '3'"), "an object": ([{"text": "x", "label": {"a": 1}}], "label"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_are_one_line(what, tmp_path, capsys):
    rows, named = BAD_ROWS[what]
    data = write(tmp_path / "data.jsonl", rows)
    assert main(["train", str(data), "--task", "classify", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(data) in error and named in error and not (tmp_path / "out").exists()


def test_step_takes_an_empty_mask():
    lm = TinyLM(Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    batch = dict(input_ids=torch.randint(64, (2, 8)), attention_mask=None)
    assert torch.isfinite(train_step(lm, torch.optim.SGD(lm.parameters(), lr=0.1), batch))


def test_classifying_step_is_the_step_of_transformers(body, tmp_path):
    """The loss of a padded batch."""
    data = write(tmp_path / "data.csv", rows_of("classify"))
    best = tune(body, data, tmp_path / "out", "--steps", 1)
    lm, oracle = TinyLM.from_pretrained(best, hidden_dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0), \
        load_oracle(best, "classify")
    ids = torch.randint(5, 300, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5])
    labels = torch.tensor([0, 1, 1])
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
    loss = train_step(lm, torch.optim.SGD(lm.parameters(), lr=0.0), batch)
    assert loss.item() == pytest.approx(oracle(ids, mask, labels=labels).loss.item(), rel=1e-5)
    assert difference(lm.eval()(ids, mask), oracle(ids, mask).logits) < 1e-4
