"""Files to rows: formats, encodings, folders, labels, and what is never trained on by accident."""

import gzip
import io
import json
import random
import sys

import pytest
from conftest import ROOT  # noqa: F401
from templates import CALLING, DOCUMENTS, PARTS, TOOLS

import data as datafiles
import tinylm
import train
from data import read_records, read_rows
from train import TrainOptions, main

ROWS = [
    {"text": "bad film; awful", "label": "neg"},
    {"text": 'good, really "great"\nsecond line', "label": "pos"},
    {"text": "größer — naïve", "label": "neg"},
]
CLASSIFY = TrainOptions(task="classify")


def table(rows, delimiter=","):
    import csv

    file = io.StringIO()
    writer = csv.DictWriter(file, [*rows[0]], delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def by_index(rows):
    return {str(n): row for n, row in enumerate(rows)}


def by_column(rows):
    return {name: {str(n): row[name] for n, row in enumerate(rows)} for name in rows[0]}


CONTENTS = {  # file name -> bytes that say ROWS
    "comma.csv": table(ROWS).encode(),
    "semicolon.csv": table(ROWS, ";").encode("utf-8-sig"),
    "tabs in a.csv": table(ROWS, "\t").encode(),
    "a.tsv": table(ROWS, "\t").encode(),
    "A.CSV": table(ROWS).replace("\n", "\r\n").encode(),
    "bar.csv": table(ROWS, "|").encode(),
    "utf16.csv": table(ROWS, "\t").encode("utf-16"),
    "cp1252.csv": table(ROWS).encode("cp1252"),
    "packed.csv.gz": gzip.compress(table(ROWS).encode()),
    "a.jsonl": lines(ROWS).encode("utf-8-sig"),
    "a.ndjson": ("\n" + lines(ROWS) + "\n\n").encode(),
    "packed.jsonl.gz": gzip.compress(lines(ROWS).encode()),
    "lines.json": lines(ROWS).encode(),
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "data.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "rows.json": json.dumps({"name": "x", "rows": ROWS}).encode(),
    "pandas index.json": json.dumps(by_index(ROWS)).encode(),
    "pandas columns.json": json.dumps(by_column(ROWS)).encode(),
    "pandas split.json": json.dumps(
        dict(columns=[*ROWS[0]], index=[0, 1, 2], data=[[*row.values()] for row in ROWS])
    ).encode(),
    "pandas table.json": json.dumps({"schema": {"fields": []}, "data": ROWS}).encode(),
    "lists.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode(),
    "no suffix": table(ROWS).encode(),
    "other.suffix": lines(ROWS).encode(),
    "spaced.csv": table(ROWS).replace("text,label", " text , label ").encode(),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_rows_of_every_file_are_the_same(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert read_rows(tmp_path / name, CLASSIFY) == ROWS
    said = capsys.readouterr().err
    assert "columns text, label" in said and ("cp1252" in said) == name.startswith("cp1252")
    assert [*read_records(tmp_path / name, "classify")] == ROWS


def test_records_of_standard_input_and_of_memory(monkeypatch):
    for text in (lines(ROWS), table(ROWS, ";")):
        stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_rows("-", CLASSIFY) == ROWS
    assert read_rows(iter(ROWS), CLASSIFY) == ROWS
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a plain\r\ntext")))
    assert read_rows("-", TrainOptions()) == [{"text": "a plain\ntext"}]


def test_delimiter_and_encoding_can_be_said(tmp_path):
    (tmp_path / "a.csv").write_bytes("text:label\nfür, x:да\n".encode("koi8-r", "replace"))
    options = TrainOptions(task="classify", delimiter=":", encoding="koi8-r")
    assert read_rows(tmp_path / "a.csv", options) == [{"text": "f?r, x", "label": "да"}]
    (tmp_path / "b.txt").write_text("text\tlabel\na\tb\n")
    options = TrainOptions(task="classify", delimiter="\\t")
    assert read_rows(tmp_path / "b.txt", options) == [{"text": "a", "label": "b"}]
    for wrong in (dict(delimiter="::"), dict(encoding="klingon")):
        with pytest.raises(train.Error, match=f"--{[*wrong][0]}"):
            TrainOptions(**wrong)


def test_tabs_without_quotes(tmp_path):
    """As GLUE has them: a quote is a character like others."""
    (tmp_path / "a.tsv").write_text('text\tlabel\n"Yes\tpos\nthe 5" disk\tneg\n')
    rows = read_rows(tmp_path / "a.tsv", CLASSIFY)
    assert [row["text"] for row in rows] == ['"Yes', 'the 5" disk']


def test_nested_columns_by_a_dotted_name(tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text(lines([{"translation": {"en": "Hello", "fr": "Bonjour"}}]))
    options = TrainOptions(task="seq2seq", text="translation.en", target="translation.fr")
    assert read_rows(data, options) == [{"source": "Hello", "target": "Bonjour"}]
    with pytest.raises(train.Error, match="translation.en, translation.fr"):
        read_rows(data, TrainOptions(task="seq2seq"))
    data.write_text(lines([{"data": {"text": "x"}, "meta": {"label": "y"}}]))
    with pytest.raises(train.Error, match="columns: data.text, meta.label"):
        read_rows(data, CLASSIFY)


def test_conll_columns(tmp_path):
    """Words first, tags last; a plain text for a task that reads texts."""
    text = "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\n"
    (tmp_path / "a.txt").write_text(text)
    expected = [(["EU", "rejects"], ["B-ORG", "O"]), (["Peter"], ["B-PER"])]
    rows = read_rows(tmp_path / "a.txt", TrainOptions(task="tokens"))
    assert [(row["words"], row["tags"]) for row in rows] == expected
    records = [*read_records(tmp_path / "a.txt")]
    assert [(record["tokens"], record["tags"]) for record in records] == expected
    assert read_rows(tmp_path / "a.txt", TrainOptions()) == [{"text": text}]
    universal = "# text = I am\n1-2\tI'm\t_\n1\tI\ti\tPRON\n2\tam\tbe\tAUX\n"
    (tmp_path / "a.conllu").write_text(universal)
    (row,) = read_rows(tmp_path / "a.conllu", TrainOptions(task="tokens"))
    assert row == {"words": ["I", "am"], "tags": ["PRON", "AUX"]}


def test_alpaca_is_a_source_and_a_target_or_a_chat():
    """Guards sources that were empty: alpaca's `input` is one column of three."""
    rows = [
        {"instruction": "Say hi", "input": "", "output": "hi"},
        {"instruction": "Translate", "input": "Hund", "output": "dog"},
    ]
    sources = [row["source"] for row in read_rows(rows, TrainOptions(task="seq2seq"))]
    assert sources == ["Say hi", "Translate\n\nHund"]
    chats = [row["messages"] for row in read_rows(rows, TrainOptions())]
    assert [(m["role"], m["content"]) for m in chats[1]] == [
        ("user", "Translate\n\nHund"),
        ("assistant", "dog"),
    ]


# ---- never trained on by accident --------------------------------------------------------------------------------

noise = random.Random(0).randbytes(400).replace(b"\0", b"x")
NO_TEXT = {
    "a.txt": b"text\0 with a zero byte",
    "noise.txt": noise,
    "b.txt": b"PK\x03\x04 a workbook under another name",
    "c.txt": "größer".encode() + b"\xff\x81 and more",
    "d.txt.gz": b"\x1f\x8b broken",
    "e.csv": "text,label\na,b\n".encode("utf-16-le"),
    "f.xlsx": b"PK\x03\x04",
    "g.pkl": b"\x80\x05",
    "h.zip": b"PK\x03\x04",
    "i.csv": b'text,label\nfine,a\n"never closed,b\nx,c\n',
    "j.json": b'{"a": ',
    "k.json": b"3",
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_one_line(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(NO_TEXT[name])
    for task in ("lm", "classify"):
        out = tmp_path / "out"
        assert main(["train", tmp_path / name, "--task", task, "--out", out]) == 1
        error = capsys.readouterr().err
        assert str(tmp_path / name) in error and error.count("\n") == 1, error
        assert not out.exists()


def test_a_large_file_that_is_no_text(tmp_path, monkeypatch):
    """Guards bytes that are memory-mapped unseen."""
    monkeypatch.setattr(datafiles, "MMAP_MIN_BYTES", 100)
    for name in ("a.txt", "noise.txt"):
        (tmp_path / name).write_bytes(NO_TEXT[name] + b"x" * 200)
        with pytest.raises(train.Error, match=name):
            read_rows(tmp_path / name, TrainOptions())
    (tmp_path / "fine.txt").write_text("größer " * 100)
    (row,) = read_rows(tmp_path / "fine.txt", TrainOptions())
    assert isinstance(row["text"], train.MappedText)


def test_parquet_needs_a_library_that_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(train.Error, match="a.parquet: needs `pip install pyarrow`"):
        read_rows(tmp_path / "a.parquet", CLASSIFY)


def test_parquet_and_what_datasets_saves(tmp_path):
    """Labels come back by their names, as the schema has them."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet", CLASSIFY) == ROWS
    numbered = [row | {"label": ("neg", "pos").index(row["label"])} for row in ROWS]
    feature = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    noted = json.dumps({"info": {"features": {"label": feature}}})
    rows = arrow.Table.from_pylist(numbered).replace_schema_metadata({"huggingface": noted})
    saved = tmp_path / "saved"
    for split in ("train", "test"):
        (saved / split).mkdir(parents=True)
        file = saved / split / "data-00000-of-00001.arrow"
        with arrow.ipc.new_stream(str(file), rows.schema) as writer:
            writer.write_table(rows)
        (saved / split / "state.json").write_text("{}")
        (saved / split / "dataset_info.json").write_text("{}")
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read_rows(saved, CLASSIFY) == ROWS
    (tmp_path / "b.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(train.Error, match="b.parquet: not readable"):
        read_rows(tmp_path / "b.parquet", CLASSIFY)


# ---- folders -----------------------------------------------------------------------------------------------------


def files(folder, contents):
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_splits_are_what_their_names_say(tmp_path, capsys):
    named = {"train-00000-of-00002": "a", "train_2": "b", "dev": "c", "test": "d"}
    data = files(
        tmp_path, {f"{name}.csv": f"text,label\nx,{label}\n" for name, label in named.items()}
    )
    said = []
    rows, held = datafiles.read_splits(data, CLASSIFY, said)
    assert [row["label"] for row in rows] == ["a", "b"] and [row["label"] for row in held] == ["c"]
    assert any("test split is not read" in line for line in said)
    assert [record["label"] for record in read_records(data, split="test")] == ["d"]
    for name, split in {
        "val": "validation",
        "Validation_1": "validation",
        "valid": "validation",
        "data/test": "test",
        "train/part-1": "train",
        "values": "train",
        "devices": "train",
        "testimony": "train",
    }.items():
        (found,) = datafiles.data_files(files(tmp_path / split / name / "x", {f"{name}.txt": "x"}))
        assert found == split, name


def test_a_readme_and_hidden_files_are_no_data(tmp_path):
    names = ["README.md", "LICENSE", "metadata.json", ".DS_Store.txt", ".git/a.txt", "a.png"]
    files(tmp_path, {name: "x" for name in names} | {"a.txt": "text", "notes.md": "notes"})
    assert [record["text"] for record in read_records(tmp_path)] == ["text", "notes"]


def test_folders_of_classes(tmp_path):
    files(tmp_path, {"train/pos/1.txt": "good", "train/neg/1.txt": "bad", "test/pos/2.txt": "x"})
    assert read_rows(tmp_path, CLASSIFY) == [
        {"text": "bad", "label": "neg"},
        {"text": "good", "label": "pos"},
    ]
    assert {"label" in row for row in read_rows(tmp_path, TrainOptions())} == {False}


# ---- labels ------------------------------------------------------------------------------------------------------


def settled(labels, capsys, **options):
    rows = [dict(text="x", label=label) for label in labels]
    read = read_rows(rows, TrainOptions(task="classify", **options))
    return [row["label"] for row in read], capsys.readouterr().err


def test_labels_are_classes_or_numbers_and_it_is_said(capsys):
    assert settled([" pos", "neg "], capsys)[0] == ["pos", "neg"]
    labels, said = settled(["0.0", "1.0", "0.0"], capsys)
    assert labels == ["0", "1", "0"] and "--regression" in said
    assert settled([0.0, 1.0], capsys, regression=True)[0] == [0.0, 1.0]
    assert settled(["1", "2"], capsys, regression=True)[0] == [1.0, 2.0]
    assert settled([0.5, 1.0, 2], capsys)[0] == [0.5, 1.0, 2.0]
    assert settled(["0.5", "1"], capsys)[0] == [0.5, 1.0]
    assert settled(["0.5", "1"], capsys, classes=True)[0] == ["0.5", "1"]
    assert settled([1, "pos", True], capsys)[0] == ["1", "pos", "1"]
    for labels, options in (([0.5, "pos"], {}), (["pos"], dict(regression=True))):
        with pytest.raises(train.Error, match="label 'pos'"):
            settled(labels, capsys, **options)
    with pytest.raises(train.Error, match="--regression"):
        TrainOptions(regression=True, classes=True)


def test_rows_with_something_empty_are_left_out_and_counted(capsys):
    rows = [
        *ROWS,
        {"text": "x", "label": ""},
        {"text": "x", "label": None},
        {"text": " ", "label": "a"},
        {"text": "x", "label": float("nan")},
    ]
    assert read_rows(rows, CLASSIFY) == ROWS
    assert "4 rows dropped: label is empty (3), text is empty (1)" in capsys.readouterr().err


def test_an_answer_that_is_not_in_its_context(capsys):
    """Guards questions that were learnt to have no answer."""
    context = "Ada wrote it in 1843."
    rows = [
        {"question": "Who?", "context": context, "answer": "Bob"},
        {"question": "Who?", "context": context, "answer": "Ada"},
        {
            "question": "Who?",
            "context": context,
            "answers": {"text": ["1843"], "answer_start": [0]},
        },
        {"question": "Where?", "context": context, "answers": {"text": [], "answer_start": []}},
    ]
    options = TrainOptions(task="qa")
    found = [read_rows([row], options)[0]["answer"] for row in rows[1:]]
    assert found == [[("Ada", 0)], [("1843", 16)], []]
    with pytest.raises(train.Error, match="the answer does not stand in its context"):
        read_rows(rows[:1], options)


def test_what_is_learnt_is_said_before_training(tmp_path, capsys):
    """Task, rows, classes with counts, columns, texts that are cut; one class only is an error."""
    data = tmp_path / "reviews.csv"
    rows = [
        {"review": "word " * (5 + i), "stars": ("Good", "bad", "bad")[i % 3]} for i in range(30)
    ]
    data.write_text(table(rows))
    options = ["--task", "classify", "--size", "pico", "--steps", "1", "--block", "16"]
    out = tmp_path / "out"
    assert main(["train", data, "--out", out, "--vocab", "300", *options]) == 0
    said = capsys.readouterr()
    for words in (
        "30 rows, columns text = review, label = stars",
        "classify: 27 rows to train on, 3 to validate on; 2 classes: bad 20, Good 10",
        "21 of 30 texts are longer than --block 16 and are cut",
    ):
        assert words in said.err
    data.write_text(table([row | {"stars": "bad"} for row in rows]))
    assert main(["train", data, "--out", tmp_path / "other", *options]) == 1
    assert "one class only (bad)" in capsys.readouterr().err


def test_rows_of_chats_keep_their_fields():
    """Guards thoughts, tool calls, names and tools that were dropped without a word; ShareGPT is read too."""
    row = {"messages": CALLING, "tools": json.dumps(TOOLS), "id": 3, "documents": DOCUMENTS}
    (read,) = datafiles.read_rows([row], train.TrainOptions())
    assert read == {"messages": CALLING, "tools": TOOLS, "variables": {"documents": DOCUMENTS}}
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "yes", "name": "x"},
        ],
    }
    (read,) = datafiles.read_rows([row], train.TrainOptions())
    assert read["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", "name": "x"},
    ]
    (read,) = datafiles.read_rows([{"messages": json.dumps(PARTS)}], train.TrainOptions())
    assert read["messages"] == PARTS


@pytest.mark.parametrize(
    "message, word",
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "image_url"),
        ({"from": "moderator", "value": "hi"}, "moderator"),
        ({"role": "assistant", "content": "a", "weight": 0}, "weight"),
        ({"role": "user", "content": 3}, "role and content"),
        ({"role": "user"}, "role and content"),
        ("hi", "role and content"),
    ],
)
def test_fields_of_chats_that_no_template_takes_are_named(message, word):
    with pytest.raises(tinylm.Error, match=word):
        datafiles.read_rows([{"messages": [message]}], train.TrainOptions())


@pytest.mark.parametrize("column, value", [("system", ["be brief"]), ("chat_template_kwargs", [1])])
def test_a_wrong_value_beside_messages_is_named(column, value):
    """Guards a system prompt that was dropped silently, and variables whose error blamed the messages."""
    record = {"messages": [{"role": "user", "content": "hi"}], column: value}
    with pytest.raises(tinylm.Error, match=f"{column} = "):
        datafiles.read_rows([record], train.TrainOptions())
