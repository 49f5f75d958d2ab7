"""Predictions in torch: from Python, from file to file, and the evaluation of what is exported."""

import csv
import io
import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT  # noqa: F401
from families import READERS
from helpers import CPU, assert_same_weights, finished, refuses, run_command

import data as datafiles
import onnxlm
import train
from export import OnnxLM, export_onnx
from tinylm import Config, TinyLM
from train import TrainOptions, predict

NAMES = READERS[:5] + ["t5"]
SMALL = dict(vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
ROWS = [
    {"id": i, "review": f"{'good' if i % 2 else 'bad'} film, no {i}", "stars": i % 2}
    for i in range(24)
]


def texts_of(name):
    """Texts of words, and their pairs."""
    texts = ["w9 w17 w30 w8", "w5 w6 w7 w11 w12 w13 w99", "w8"]
    if name == "roberta-mlm":
        texts = [f"{text} <mask> w3" for text in texts]
    return texts, ["w50 w9 w51 w52 w8 w53"] * 3 if name.endswith("qa") else None


def close(one, two):
    """The same, but for the last digits of a number."""
    if isinstance(one, (list, dict)):
        keys = one if isinstance(one, dict) else range(len(one))
        return len(one) == len(two) and all(close(one[key], two[key]) for key in keys)
    same = pytest.approx(two, rel=1e-3, abs=1e-5) if isinstance(two, float) else two
    return one == same


def table(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def options(out, **more):
    more = dict(task="classify", size="pico", steps=4, batch=4, vocab=270) | more
    return TrainOptions(out=str(out), quiet=True, **more)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A classifier, trained on the columns review and stars."""
    return train.train(ROWS, options(tmp_path_factory.mktemp("reviews") / "out")).folder


# ---- from Python -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_predict_is_what_onnxlm_runs(name, exported_pair):
    lm, onnx_lm, out = exported_pair(name)
    texts, pairs = texts_of(name)
    more = dict(max_new_tokens=9) if name == "t5" else {}
    expected = onnx_lm.run(texts, pairs, **more)
    assert close(predict(lm, texts, pairs, **more), expected)
    assert close(predict(out, iter(texts), pairs, batch=2, **more), expected)
    if pairs:  # one context for all
        assert close(predict(lm, texts, pairs[0]), expected)


def test_a_string_is_one_text(exported_pair):
    """Guards a result for each of its characters."""
    lm, onnx_lm, _ = exported_pair("distilbert-classify")
    assert onnx_lm.run("w9 w17") == onnx_lm.run(["w9 w17"])
    assert len(predict(lm, "w9 w17")) == 1
    _, reader, _ = exported_pair("bert-qa")
    assert reader.run("w9", "w50 w9") == reader.run(["w9"], ["w50 w9"])


def test_rows_are_read_by_the_columns_of_the_training(reviews):
    """Guards a column that has a more usual name than the one that was learnt from."""
    texts = [row["review"] for row in ROWS]
    expected = predict(reviews, texts)
    rows = [row | {"text": "other"} for row in ROWS]
    assert predict(reviews, rows) == expected
    assert close(predict(reviews, rows, text="text")[:1], predict(reviews, ["other"]))
    assert predict(reviews, [{"text": texts[0]}, {"text": None}]) == [expected[0], []]
    refuses(lambda: predict(reviews, [{"film": "x"}]), "row 1", "no column", "film", "--text")
    refuses(lambda: predict(reviews, [{"review": 3}]), "row 1", "review = '3'")
    refuses(lambda: predict(reviews, ["x"], text="review"), "text", "rows")
    refuses(lambda: predict(reviews, rows, ["x"] * len(rows)), "pairs")


def test_a_pair_is_read_where_the_training_had_one(reviews, tmp_path):
    """Guards a second text that a model of single texts gets, and one that is left out."""
    pairs = [row | {"hypothesis": f"no {row['id']}"} for row in ROWS]
    assert predict(reviews, pairs) == predict(reviews, ROWS)
    folder = train.train(pairs[:3] + ROWS[3:], options(tmp_path / "out", steps=12)).folder
    expected = predict(
        folder, [row["review"] for row in pairs], [row["hypothesis"] for row in pairs]
    )
    assert close(predict(folder, pairs), expected)
    alone = predict(folder, [row["review"] for row in pairs])
    gaps = [abs(one[0]["score"] - two[0]["score"]) for one, two in zip(alone, expected)]
    assert max(gaps) > 3e-5
    refuses(lambda: predict(folder, ROWS), "no column hypothesis", "--pair names it")
    export_onnx(folder, tmp_path / "exported")
    path = table(tmp_path / "pairs.csv", pairs)
    assert onnxlm.main([str(tmp_path / "exported"), str(path), "--out", f"{path}.tsv"]) == 0
    with open(f"{path}.tsv", encoding="utf-8", newline="") as file:
        found = [float(row["score"]) for row in csv.DictReader(file, delimiter="\t")]
    assert found == pytest.approx([answer[0]["score"] for answer in expected], abs=1e-5)


def test_a_data_frame_is_rows(reviews, tmp_path):
    """In a training and in a prediction; a missing value is an empty row."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    assert predict(reviews, frame) == predict(reviews, ROWS)
    assert predict(reviews, frame["review"]) == predict(reviews, ROWS)
    frame.loc[1, "review"] = None
    assert predict(reviews, frame)[1] == []
    lm = train.train({"train": frame, "validation": frame}, options(tmp_path / "a"))
    ours = train.train(
        {"train": ROWS[:1] + ROWS[2:], "validation": ROWS[:1] + ROWS[2:]}, options(tmp_path / "b")
    )
    assert_same_weights(lm, ours)
    assert train.train(frame, options(tmp_path / "c")).config.id2label == {0: "0", 1: "1"}


def test_train_returns_the_best_model(tmp_path, monkeypatch):
    """Guards the last one, which may be worse."""
    scores = iter([0.2, 0.9, 0.4, 0.3])
    monkeypatch.setattr(
        train.Classification, "figures", lambda *_: {"accuracy": next(scores), "loss": 1.0}
    )
    lm = train.train(ROWS, options(tmp_path, eval_every=1, lr=0.1))
    assert lm.figures["accuracy"] == 0.9 and lm.folder == tmp_path / "best" and not lm.training
    assert_same_weights(lm, TinyLM.from_pretrained(tmp_path / "best"))
    last = TinyLM.from_pretrained(tmp_path / "last")
    assert not torch.equal(lm.embed.weight, last.embed.weight)
    assert predict(lm, ["good"]) == predict(tmp_path / "best", ["good"])


# ---- from file to file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".csv.gz"])
def test_a_file_gets_predictions_beside_its_columns(suffix, reviews, tmp_path):
    import gzip

    path = tmp_path / f"rows{suffix}"
    text = table(tmp_path / "plain.csv", ROWS).read_text()
    if suffix == ".tsv":
        text = text.replace(", no", " no").replace('"', "").replace(",", "\t")
    if suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
    text = json.dumps(ROWS) if suffix == ".json" else text
    path.write_bytes(gzip.compress(text.encode()) if suffix == ".csv.gz" else text.encode())
    run = finished(run_command("run", reviews, path, "--out", tmp_path / "out.csv"))
    assert "24 rows with prediction, score" in run.stderr and not run.stdout
    found = read(tmp_path / "out.csv")
    assert [*found[0]] == ["id", "review", "stars", "prediction", "score"]
    expected = predict(reviews, [row["review"] for row in found])
    for row, known, (first, *_) in zip(found, ROWS, expected, strict=True):
        assert (row["id"], row["stars"]) == (str(known["id"]), str(known["stars"]))
        assert row["prediction"] == first["label"]
        assert float(row["score"]) == pytest.approx(first["score"], rel=1e-5)


def test_parquet_to_parquet(reviews, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row | {"stars": None if row["id"] < 3 else 0.5} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    finished(
        run_command("run", reviews, tmp_path / "rows.parquet", "--out", tmp_path / "b.parquet")
    )
    found = parquet.read_table(tmp_path / "b.parquet")
    assert [str(kind) for kind in found.schema.types] == "int64 string double string double".split()
    found = found.to_pylist()
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert all(row["prediction"] in ("0", "1") and 0.5 <= row["score"] <= 1 for row in found)


@pytest.mark.parametrize("name", NAMES)
def test_onnxlm_writes_the_file_that_tinylm_writes(name, exported_pair, tmp_path):
    """What every task writes, with the embedded text as the last column of the input."""
    lm, _, out = exported_pair(name)
    texts, pairs = texts_of(name)
    rows = [{"text": text, "n": [1, {"a": None}]} for text in texts]
    if pairs:
        rows = [{"question": text, "context": pair} for text, pair in zip(texts, pairs)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--max-new-tokens", 9]
    finished(run_command("run", out, tmp_path / "rows.jsonl", "--out", tmp_path / "a.jsonl", *more))
    for end in ("jsonl", "csv"):
        files = [str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / f"b.{end}")]
        assert onnxlm.main([str(out), *files, *map(str, more)]) == 0
    theirs, ours = (
        [json.loads(line) for line in (tmp_path / f"{file}.jsonl").read_text().splitlines()]
        for file in "ab"
    )
    assert close(ours, theirs)
    answers = predict(lm, texts, pairs, **(dict(max_new_tokens=9) if name == "t5" else {}))
    for row, given, answer, cells in zip(theirs, rows, answers, read(tmp_path / "b.csv")):
        assert {name: row.pop(name) for name in given} == given
        new = {
            "bert-bare": lambda: answer[0],
            "electra-tokens": lambda: {"prediction": answer},
            "distilbert-classify": lambda: {"prediction": answer[0]["score"]},  # regression
            "t5": lambda: {"prediction": answer[0]["generated_text"]},
        }.get(name, lambda: dict(zip(("prediction", "score"), answer[0].values())))()
        assert close(row, new)
        for column, value in row.items():
            cell = cells[column]
            assert close(json.loads(cell) if isinstance(value, list) else cell, value) or (
                isinstance(value, float) and close(float(cell), value)
            )
        assert "n" not in given or json.loads(cells["n"]) == given["n"]


def test_several_labels_numbers_and_masks_have_columns(tmp_path):
    """Guards several labels of which one is shown, and a number that is taken as a score."""
    torch.manual_seed(0)
    names = {0: "a", 1: "b", 2: "c"}
    kinds = {
        "several": dict(id2label=names, problem_type="multi_label_classification"),
        "number": dict(id2label={0: "LABEL_0"}, problem_type="regression"),
    }
    table(tmp_path / "rows.csv", [{"text": "x" * (1 + i)} for i in range(12)])
    for kind, more in kinds.items():
        lm = TinyLM(Config(**SMALL, **more, head="classify", causal=False, initializer_range=0.5))
        lm.save_pretrained(tmp_path / kind)
        out = tmp_path / f"{kind}.jsonl"
        finished(run_command("run", tmp_path / kind, tmp_path / "rows.csv", "--out", out))
        found = [json.loads(line) for line in out.read_text().splitlines()]
        for row, answer in zip(found, predict(lm, [row["text"] for row in found]), strict=True):
            scores = {each["label"]: each["score"] for each in answer}
            likely = {name: score for name, score in scores.items() if score > 0.5}
            if kind == "number":
                assert row["prediction"] == pytest.approx(scores["LABEL_0"], rel=1e-4)
                assert "score" not in row
            else:
                assert row["prediction"] == [*likely]
                assert row["score"] == pytest.approx([*likely.values()], rel=1e-4)


def test_rows_keep_their_order_and_gaps_and_names_do_not_clash(reviews, tmp_path):
    """Guards rows without a text that are lost, so that files no longer fit together."""
    rows = [
        {"review": ROWS[i]["review"] if i % 3 else "", "score": i, "text": "x"} for i in range(9)
    ]
    path = table(tmp_path / "rows.csv", rows)
    run = finished(run_command("run", reviews, path, "--out", tmp_path / "out.csv", "--batch", 2))
    assert "3 of 9 rows have no text" in run.stderr and "prediction_2, score_2" in run.stderr
    found = read(tmp_path / "out.csv")
    assert [row["score"] for row in found] == [str(i) for i in range(9)]
    assert [i for i, row in enumerate(found) if row["prediction_2"] == row["score_2"] == ""] == [
        0,
        3,
        6,
    ]
    # a further column beside those of an earlier prediction
    finished(run_command("run", reviews, tmp_path / "out.csv", "--out", tmp_path / "more.csv"))
    assert {"prediction", "score_2", "prediction_3"} & {*read(tmp_path / "more.csv")[0]} == {
        "score_2",
        "prediction_3",
    }
    run = finished(run_command("run", reviews, path, "--text", "text", "--out", tmp_path / "b.csv"))
    assert len({row["score_2"] for row in read(tmp_path / "b.csv")}) == 1


def test_a_file_is_written_whole_or_not_at_all_and_in_parts(reviews, tmp_path, monkeypatch):
    """Guards a former file that is lost to an error, and large ones that lie in memory."""
    path = table(tmp_path / "rows.csv", ROWS)
    path.write_text(path.read_text() + '24,"never closed')
    out = tmp_path / "out.csv"
    out.write_text("before")
    monkeypatch.setattr(onnxlm, "read_all", None)  # nothing is run before all is read
    run = run_command("run", reviews, path, "--out", out)
    assert run.returncode == 1 and "line 26" in run.stderr and run.stderr.count("\n") == 1
    monkeypatch.undo()
    sizes = []
    read_all = onnxlm.read_all

    def fail_at_last(reader, texts, *more):
        sizes.append(len(texts))
        if len(sizes) == 4:
            raise OSError("no space left on device")
        return read_all(reader, texts, *more)

    table(path, ROWS)
    monkeypatch.setattr(onnxlm, "CHUNK", 2)
    monkeypatch.setattr(onnxlm, "read_all", fail_at_last)
    assert run_command("run", reviews, path, "--out", out, "--batch", 3).returncode == 1
    assert sizes == [6] * 4 and out.read_text() == "before"
    assert {file.name for file in tmp_path.iterdir()} == {"rows.csv", "out.csv"}


def test_what_is_no_text_is_asked_about(reviews, tmp_path, monkeypatch):
    """Guards the name of a file that is classified."""
    path = table(tmp_path / "rows.csv", ROWS)
    other = tmp_path / "other.csv"
    for words, said in (
        ([path], ["rows.csv: is a file", "--out FILE", "- to read lines"]),
        ([path, "--out", path], ["is the input"]),
        ([path, "--out", tmp_path / "a.xlsx"], ["a.xlsx", ".csv, .tsv, .jsonl"]),
        ([path, "--out", tmp_path / "no" / "a.csv"], ["is no folder"]),
        ([path, "--out", other, "--json"], ["--json"]),
        ([path, "--out", other, "--text", "film"], ["no column film", "review"]),
        (["good", "--out", other], ["good: no such file"]),
        ([path, path, "--out", other], ["2 inputs"]),
        (["good", "--text", "review"], ["--text review", "--out"]),
    ):
        run = run_command("run", reviews, *words)
        assert run.returncode == 1 and run.stderr.count("\n") == 1 and not run.stdout
        assert all(word in run.stderr for word in said), run.stderr
    assert not other.exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("good film\nbad film\n"))
    assert finished(run_command("run", reviews, "-")).stdout.count("\n") == 2
    (tmp_path / "lines.txt").write_text("good film\n\nbad film\n")
    finished(run_command("run", reviews, tmp_path / "lines.txt", "--out", other))
    assert [row["text"] for row in read(other)] == ["good film", "bad film"]


def test_a_text_that_is_cut_is_said_once(reviews, exported_pair, tmp_path):
    """Guards an opinion at the end of a long text that is lost without a word."""
    rows = [row | {"review": row["review"] * (1 + 99 * (row["id"] < 5))} for row in ROWS]
    path = table(tmp_path / "rows.csv", rows)
    notice = "5 of 24 texts are longer than 256 tokens, and the end is not read"
    more = ["--out", tmp_path / "out.csv", "--batch", 2]
    for run in (
        run_command("run", reviews, path, *more),
        run_command("run", reviews, *(row["review"] for row in rows)),
        run_command("eval", reviews, path),
    ):
        assert finished(run).stderr.count(notice) == 1
    with pytest.warns(UserWarning, match=notice) as record:
        predict(reviews, rows)
    assert len(record) == 1 and record[0].filename == __file__
    _, onnx_lm, _ = exported_pair("distilbert-classify")
    with pytest.warns(UserWarning, match="1 of 2 texts is longer than"):
        onnx_lm.run(["w9 " * 600, "w8"])


def test_an_instruction_and_its_input_are_one_source(exported_pair, tmp_path):
    """Guards alpaca's `input`, read alone where a file has no output yet."""
    _, _, out = exported_pair("t5")
    rows = [{"instruction": "w9 w8", "input": "w30"}, {"instruction": "w9", "input": ""}]
    path = table(tmp_path / "rows.csv", rows)
    finished(run_command("run", out, path, "--out", tmp_path / "a.csv", "--max-new-tokens", 9))
    found = [row["prediction"] for row in read(tmp_path / "a.csv")]
    answers = predict(out, ["w9 w8\n\nw30", "w9"], max_new_tokens=9)
    assert found == [answer[0]["generated_text"] for answer in answers]


# ---- lists in the cells of a table -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, tags",
    [
        ("EU rejects", "B-ORG O"),
        ("['EU', 'rejects']", "['B-ORG', 'O']"),
        ('["EU", "rejects"]', '["B-ORG", "O"]'),
        ("['EU' 'rejects']", "['B-ORG'\n 'O']"),  # numpy's
        ("[EU] rejects", "B-ORG O"),
    ],
)
def test_lists_in_cells_are_lists(words, tags, tmp_path):
    """Guards tags that begin with a bracket and end with a comma."""
    path = table(tmp_path / "a.csv", [{"tokens": words, "ner_tags": tags}])
    (row,) = datafiles.read_rows(path, TrainOptions(task="tokens"))
    assert row["words"] == (["[EU]", "rejects"] if "[EU]" in words else ["EU", "rejects"])
    assert row["tags"] == ["B-ORG", "O"]


@pytest.mark.parametrize(
    "task, row, word",
    [
        ("tokens", {"words": "EU rejects", "tags": "[B-ORG, O]"}, "tags = '[B-ORG, O]'"),
        ("tokens", {"words": "[EU, rejects]", "tags": "B-ORG O"}, "words = '[EU, rejects]'"),
        (
            "qa",
            {"question": "Who?", "context": "Ada", "answers": "{'text': array(['Ada'])}"},
            "answers = ",
        ),
        ("lm", {"messages": "[{'role': user}]"}, "messages = "),
    ],
)
def test_cells_that_spell_no_list_are_refused(task, row, word, tmp_path):
    path = table(tmp_path / "a.csv", [row])
    refuses(lambda: datafiles.read_rows(path, TrainOptions(task=task)), "line 2", word)


def test_answers_and_messages_in_cells(tmp_path):
    path = table(
        tmp_path / "a.csv",
        [
            {"question": "Who?", "context": "Ada, Bob", "answers": answers}
            for answers in (
                "['Bob', 'Ada']",
                "{'text': ['Bob', 'Ada'], 'answer_start': [5, 0]}",
                "[{'text': 'Bob', 'answer_start': 5}, {'text': 'Ada', 'answer_start': 0}]",
            )
        ],
    )
    rows = datafiles.read_rows(path, TrainOptions(task="qa"))
    assert [row["answer"] for row in rows] == [[("Bob", 5), ("Ada", 0)]] * 3
    chat = [{"role": "user", "content": "it's"}, {"role": "assistant", "content": "yes"}]
    path = table(tmp_path / "b.csv", [{"messages": str(chat)}, {"messages": json.dumps(chat)}])
    assert [row["messages"] for row in datafiles.read_rows(path, TrainOptions())] == [chat] * 2


# ---- what is exported --------------------------------------------------------------------------------------------

EVALUATED = {  # case -> rows for its task
    "qwen3-classify": [
        {"text": f"w9 w{i}", "label": ["negative", "neutral", "positive"][i % 3]}
        for i in range(5, 25)
    ],
    "distilbert-classify": [{"text": f"w9 w{i}", "label": i / 3} for i in range(5, 25)],
    "electra-tokens": [
        {"tokens": ["w9", f"w{i}", "w8"], "tags": ["O", "B-PER", ["I-PER", "B-LOC"][i % 2]]}
        for i in range(5, 17)
    ],
    "bert-qa": [
        {"question": f"w{i}", "context": f"w50 w9 w{i} w52 w8", "answer": f"w{i} w52"}
        for i in range(60, 72)
    ],
    "roberta-mlm": [{"text": "w9 w8 w7 w6 w5 " * 20}],
    "t5": [{"source": f"w9 w{i}", "target": f"w{i} w8"} for i in range(5, 15)],
    "qwen3": [{"text": "w9 w8 w7 w6 w5 " * 20}],
}


@pytest.mark.parametrize("name", EVALUATED)
def test_figures_of_a_graph_are_those_of_the_model(name, exported_folder, tmp_path):
    """Guards --precision that evaluates torch, and a folder without weights that cannot be evaluated."""
    out = shutil.copytree(exported_folder(name), tmp_path / "out")
    rows = EVALUATED[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--json", "--batch", "4", "--block", "16"]
    theirs = json.loads(finished(run_command("eval", out, tmp_path / "rows.jsonl", *more)).stdout)
    (out / "model.safetensors").unlink()
    more += ["--precision", "fp32"]
    ours = json.loads(finished(run_command("eval", out, tmp_path / "rows.jsonl", *more)).stdout)
    assert len(ours) >= 2 and close(ours, theirs)
    run = run_command("eval", out, tmp_path / "rows.jsonl")
    assert run.returncode == 1 and "graphs only" in run.stderr and "--precision" in run.stderr
    run = run_command("eval", out, tmp_path / "rows.jsonl", "--precision", "int8")
    assert run.returncode == 1 and "model_quantized.onnx: no such file" in run.stderr.replace(
        "encoder_", ""
    )


def test_run_of_a_graph_is_that_of_the_model(exported_folder):
    out = exported_folder("distilbert-classify")
    ours, theirs = (
        finished(run_command("run", out, "w9 w8", "--json", *more)).stdout
        for more in (["--precision", "fp32"], [])
    )
    assert close(json.loads(ours), json.loads(theirs))
    assert close(json.loads(ours)["output"], OnnxLM(out, providers=CPU).run("w9 w8")[0])
