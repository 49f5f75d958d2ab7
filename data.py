"""What is in people's files: records (dicts of columns), and rows, which map roles (text, label, ...) to values.

    rows = read_rows("reviews.csv", DataOptions(task="classify"))    # [{"text": ..., "label": ...}, ...]

Text, JSON, tables, CoNLL, parquet, single files or folders of them; no torch.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import json
import math
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, TextIO

import onnxlm
from onnxlm import cell_list, check_fields, json_lines, lookup, require, table_records

TASK_ROLES = {  # task -> roles of its rows: what the model reads, what there is to learn
    "lm": ("messages", "text"),
    "classify": ("text", "pair", "label"),
    "tokens": ("words", "tags"),
    "qa": ("question", "context", "answer"),
    "seq2seq": ("source", "target"),
    "mlm": ("text",),
}


def option(default, help: str):
    """A field of TrainOptions, and what the command line says of it."""
    return field(default=default, metadata=dict(help=help))


def is_encoding(name: str) -> bool:
    try:
        return not name or bool(codecs.lookup(name))
    except LookupError:
        return False


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class DataOptions:
    """Which columns of which files are read as what."""

    task: Literal[(*TASK_ROLES,)] = option("lm", f"{', '.join(TASK_ROLES)}")
    val: str = option("", "file to validate on; without one, --val-share of the data")
    val_share: Annotated[float, 0, 0.9] | None = option(
        None,
        "share of the rows to validate on, drawn with the seed from each class or range of numbers; of running text the "
        "end (default: 0.1, of running text 1 MB at most)",
    )
    text: str = option(
        "", "column of the text, of its words, or of the source; by default its usual name"
    )
    pair: str = option("", "column of a second text")
    label: str = option(
        "",
        "column of the label, a list of labels, a number, or a tag for each word; a,b,c: columns of 0 and 1",
    )
    label_names: str = option(
        "",
        "names of the labels or tags 0, 1, 2, ... as a,b,c (or a JSON list), where the data has numbers, or lists of 0 "
        "and 1",
    )
    target: str = option("", "column of the text to write")
    question: str = option("", "column of the question")
    context: str = option("", "column of the text that has the answer")
    regression: bool = option(False, "labels are numbers")
    classes: bool = option(False, "labels are names, numbers with a point too")
    delimiter: str = option("", "between the columns of a table; by default as its header shows")
    encoding: str = option(
        "", "of text files; by default UTF-8, else UTF-16 by its mark, or cp1252"
    )

    def __post_init__(self):
        check_fields(self, flag)
        for name, ok, expected in (
            ("regression", not (self.regression and self.classes), "it or --classes, not both"),
            (
                "delimiter",
                self.delimiter in ("\\t", "tab") or len(self.delimiter) < 2,
                "one character, or tab",
            ),
            ("encoding", is_encoding(self.encoding), "a name that Python knows"),
            (
                "label_names",
                all(self.names) and len({*self.names}) == len(self.names),
                "names with a comma between them, each once",
            ),
        ):
            require(ok, f"{flag(name)} {getattr(self, name)}: expected {expected}")

    @property
    def names(self) -> list[str]:
        """--label-names, in the order of their numbers."""
        with contextlib.suppress(ValueError):
            names = json.loads(self.label_names)
            if isinstance(names, list):
                return [str(name) for name in names]
        return [name.strip() for name in self.label_names.split(",")] if self.label_names else []


# ---------------------------------------------------------------------------------------------------------------------
# Files: what is in them, as records (dicts of columns)
# ---------------------------------------------------------------------------------------------------------------------
FORMATS = {  # a file's suffix, in any case and without .gz -> how it is read
    ".txt": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "table",
    ".tsv": "table",
    ".conll": "conll",
    ".conllu": "conll",
    ".iob": "conll",
    ".parquet": "arrow",
    ".arrow": "arrow",
}
NOT_READ = {  # suffix -> what to do about it
    ".xlsx": "a workbook, save its sheet as .csv",
    ".xls": "a workbook, save its sheet as .csv",
    ".ods": "a workbook, save its sheet as .csv",
    ".pkl": "a pickle, which can run code; write the table with to_parquet or to_csv",
    ".pickle": "a pickle, which can run code; write the table with to_parquet or to_csv",
    ".zip": "an archive, unpack it first",
    ".tar": "an archive, unpack it first",
    ".tgz": "an archive, unpack it first",
    ".bz2": "compressed, unpack it or use .gz",
    ".xz": "compressed, unpack it or use .gz",
    ".zst": "compressed, unpack it or use .gz",
}
NO_DATA = re.compile(  # files that lie beside data and are none
    r"(readme|licen[cs]e|copying|changelog|contributing|citation)(\.\w+)?|cache-.*"
    r"|(metadata|state|dataset_dict|dataset_infos?)\.json",
    re.IGNORECASE,
)
SPLIT_NAME = re.compile(  # of a file without its suffix, or of a folder
    r"(train|validation|valid|val|dev|test)(ing|set|data|split)?([^a-z].*)?", re.IGNORECASE
)
SPLITS = {"train": "train", "test": "test"}  # all other names of splits mean validation
MMAP_MIN_BYTES = 2**26  # bytes of a text file above which it is not read into memory


def suffix_of(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def data_files(folder: Path) -> dict[str, list[Path]]:
    """Split (train, validation, test) -> a folder's files, sorted by name. Hidden files and what is no data are left
    out; a file belongs to the split that its name, or that of a folder around it, begins with."""
    splits = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if suffix_of(file) not in FORMATS or hidden or NO_DATA.fullmatch(file.name):
            continue
        if file.is_dir():
            continue
        stem = file.name.partition(".")[0]
        names = (SPLIT_NAME.fullmatch(part) for part in (stem, *reversed(parts[:-1])))
        name = next((match[1].lower() for match in names if match), "train")
        splits.setdefault(SPLITS.get(name, "validation"), []).append(file)
    return splits


def class_folder(file: Path, root: Path) -> str | None:
    """The folder of a text below the root that is no split's: pos/1.txt, train/neg/2.txt."""
    parts = [part for part in file.relative_to(root).parts[:-1] if not SPLIT_NAME.fullmatch(part)]
    return parts[-1] if parts else None


def read_records(
    path, task: str = "", split: str = "train", delimiter: str = "", encoding: str = ""
) -> Iterator[dict]:
    """The records of a file, of a folder's files of one split, or of standard input ("-"), as dicts of columns.

    A plain text is one record with the column `text`. A task for which rows have columns reads .txt as CoNLL, and files
    with other suffixes as tables. Raises Error for a file that is not what its name says.
    """
    options = DataOptions(task=task or "lm", delimiter=delimiter, encoding=encoding)
    root = Path(path)
    for file in data_files(root).get(split, []) if root.is_dir() else [root]:
        for _, record in file_records(file, options, root, [], guess=not task):
            yield record


def file_records(file: Path, options: DataOptions, root: Path, notices: list, guess: bool = False):
    """Yield (place, record) of a file, for an error to name the place. `guess`: no task says what a text is."""
    suffix = suffix_of(file)
    from_stdin = str(file) == "-"
    name = "standard input" if from_stdin else str(file)
    require(suffix not in NOT_READ, f"{name}: {NOT_READ.get(suffix)}")
    kind = FORMATS.get(suffix)
    plain = options.task in ("lm", "mlm")  # for which a text has no columns
    if kind == "arrow":
        yield from arrow_records(file, suffix)
        return
    may_map = plain and kind in ("text", None) and not options.encoding and not from_stdin
    if may_map and is_mappable(file):
        yield name, {"text": MappedText(file)}
        return
    with open_text(file, name, options.encoding, notices) as text:
        if kind is None:
            kind = "text" if plain else "table"
            if looks_like_json_lines(text):
                kind = "json"
        if kind == "text":
            tagged = looks_like_conll(text) if guess else options.task == "tokens"
            kind = "conll" if tagged else "table" if options.delimiter else "text"
        names = {} if from_stdin or kind not in ("json", "table") else names_beside(file)
        if kind == "json":
            yield from named_records(json_records(name, text, lines=suffix != ".json"), names)
        elif kind == "table":
            usual = "\t" if suffix == ".tsv" else ","
            delimiter = {"\\t": "\t", "tab": "\t"}.get(options.delimiter, options.delimiter)
            yield from named_records(table_records(name, text, delimiter, usual), names)
        elif kind == "conll":
            yield from conll_records(name, text, universal=suffix == ".conllu")
        else:
            label = class_folder(file, root) if file != root else None
            yield name, {"text": text.read()} | ({"label": label} if label else {})


class MappedText:
    """A large file's text, or some bytes of it, that stays on the disk; `tokens` are memory-mapped too."""

    def __init__(self, path: Path, first: int = 0, last: int | None = None):
        self.path, self.size, self.changed = path, path.stat().st_size, path.stat().st_mtime_ns
        self.first, self.last = first, self.size if last is None else last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, part: slice) -> MappedText:
        first, last, _ = part.indices(len(self))
        return MappedText(self.path, self.first + first, self.first + last)

    def __str__(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.first)
            return file.read(len(self)).decode("utf-8", errors="replace")

    def __repr__(self) -> str:  # changes with the file
        return f"{self.path.name} {self.size} {self.changed} {self.first} {self.last}"


def is_mappable(file: Path) -> bool:
    """Is it a large file of plain UTF-8, as far as its first part shows?"""
    if file.stat().st_size <= MMAP_MIN_BYTES:
        return False
    with open(file, "rb") as opened:
        head = opened.read(min(MMAP_MIN_BYTES, 2**26))
    if head.startswith((codecs.BOM_UTF8, b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeError:
        return False
    return True


@contextlib.contextmanager
def open_text(file: Path, name: str, encoding: str, notices: list) -> Iterator[TextIO]:
    """A file's text, or standard input's, with \\n at the ends of lines; it can be read again from the start. All of it
    is decoded once before. Raises Error for what is no text."""
    with contextlib.ExitStack() as opened:
        if str(file) == "-":
            data: BinaryIO = io.BytesIO(sys.stdin.buffer.read())
        else:
            data = opened.enter_context(open(file, "rb"))
        start = data.read(4)
        require(
            start not in (b"PK\3\4", b"PAR1") and start[:2] != b"\x80\x05",
            f"{name}: binary, expected text; its suffix does not say what it is",
        )
        data.seek(0)
        if start[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=data)
        try:
            encoding = text_encoding(data, name, encoding, notices)
        except (OSError, EOFError, zlib.error) as error:
            require(start[:2] == b"\x1f\x8b", f"{name}: not readable ({error})")
            raise onnxlm.Error(f"{name}: not readable as gzip ({error})") from None
        data.seek(0)
        yield opened.enter_context(io.TextIOWrapper(data, encoding))


def text_encoding(data: BinaryIO, name: str, encoding: str, notices: list) -> str:
    """The encoding given; else by the byte order mark, UTF-8, or cp1252, which is said once. Raises Error for bytes that
    are not text in it."""
    start = data.read(2**16)
    marks = {codecs.BOM_UTF8: "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    marked = next((name for mark, name in marks.items() if start.startswith(mark)), "")
    expected = encoding or marked or "utf-8"
    require(
        encoding or marked or b"\0" not in start,
        f"{name}: binary (a NUL byte at {start.find(bytes(1))}), expected text; of UTF-16 say --encoding utf-16",
    )
    try:
        nul = any("\0" in part for part in decoded(data, expected))
        require(not nul, f"{name}: binary (a NUL character), expected text")
        return expected
    except UnicodeError as error:
        reason = error
    require(expected == "utf-8" and not encoding, f"{name}: not {expected} ({reason})")
    with contextlib.suppress(UnicodeError):
        if not any(CONTROL.search(part) for part in decoded(data, "cp1252")):
            if not any("cp1252" in line for line in notices):
                notices.append(f"{name}: not UTF-8, read as cp1252 (--encoding names another)")
            return "cp1252"
    raise onnxlm.Error(
        f"{name}: neither UTF-8 nor cp1252 ({reason}), expected text; --encoding names it"
    )


# Control characters, which no text has.
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def decoded(data: BinaryIO, encoding: str) -> Iterator[str]:
    """A text in parts."""
    data.seek(0)
    decoder = codecs.getincrementaldecoder(encoding)()
    while part := data.read(2**20):
        yield decoder.decode(part)
    yield decoder.decode(b"", True)


def first_lines(text: TextIO, count: int) -> list[str]:
    """The first lines that are not blank; the text is then at its start again."""
    text.seek(0)
    lines = [*itertools.islice((line for line in text if line.strip()), count)]
    text.seek(0)
    return lines


def looks_like_json_lines(text: TextIO) -> bool:
    try:
        return isinstance(json.loads(*first_lines(text, 1) or [""]), dict)
    except (ValueError, RecursionError):
        return False


def looks_like_conll(text: TextIO) -> bool:
    """Do all of the first lines end with a tag (O, B-ORG, ...)?"""
    lines = [line.split() for line in first_lines(text, 100)]
    tags = [line[-1] for line in lines if len(line) > 1]
    tagged = all(re.fullmatch(r"O|[BIESLU]-\S+", tag) for tag in tags)
    return len(tags) > 1 and len(tags) == len(lines) and tagged


def json_records(name: str, text: TextIO, lines: bool):
    """Records of a JSON file, or of one object in each line; each of the two is read under the other's suffix too."""
    if not lines or "".join(first_lines(text, 1)).lstrip().startswith("["):
        try:
            content = json.loads(text.read().strip() or "[]")
        except RecursionError:
            raise onnxlm.Error(f"{name}: nested too deeply, expected records") from None
        except ValueError as error:
            if not looks_like_json_lines(text):
                raise onnxlm.Error(f"{name}: not readable as JSON ({error})") from None
        else:
            for n, record in enumerate(json_rows(name, content), 1):
                yield f"{name}, record {n}", record
            return
    yield from json_lines(name, text)


def json_rows(name: str, content) -> list:
    """The records in a JSON file: a list of them, alone or as an object's only list; SQuAD's articles; what pandas
    writes with orient columns, index, split or table; lists by column."""
    if isinstance(content, list):
        if content and isinstance(content[0], dict) and "paragraphs" in content[0]:
            return squad_rows(name, content)
        return [{"text": item} if isinstance(item, str) else item for item in content]
    require(isinstance(content, dict), f"{name}: expected a list of records")
    if {"columns", "data"} <= set(content):  # pandas: split
        return [dict(zip(content["columns"], values)) for values in content["data"]]
    lists = [value for value in content.values() if isinstance(value, list)]
    of_records = [value for value in lists if value and isinstance(value[0], dict)]
    if "data" in content or len(of_records) == 1 and len(lists) == 1:
        rows = content.get("data", *of_records) if "data" in content else of_records[0]
        require(isinstance(rows, list), f"{name}: data: expected a list of records")
        return json_rows(name, rows)
    if content and len(lists) == len(content):  # lists by column
        require(len(set(map(len, lists))) == 1, f"{name}: expected lists of equal lengths")
        return [dict(zip(content, values)) for values in zip(*lists)]
    inner = [value for value in content.values() if isinstance(value, dict)]
    if content and len(inner) == len(content):  # pandas: index, or columns
        by_index = all(key.isdecimal() for key in content) or len(content) > len(inner[0])
        if by_index and not all(key.isdecimal() for key in inner[0]):
            return inner
        return [{column: content[column].get(key) for column in content} for key in inner[0]]
    return [content]


def squad_rows(name: str, articles: list) -> list:
    try:
        return [
            question | {"context": paragraph["context"]}
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise onnxlm.Error(
            f"{name}: expected SQuAD's json: data, paragraphs, qas ({error!r})"
        ) from None


def conll_records(name: str, text: TextIO, universal: bool):
    """A sentence's words and tags: the first and last columns of its lines (of CoNLL-U the second and the fourth), with
    an empty line between sentences."""
    words, tags = [], []
    for n, line in enumerate(itertools.chain(text, [""]), 1):
        fields = line.rstrip().split("\t") if "\t" in line.strip() else line.split()
        if not fields or fields == [""] or fields[0] == "-DOCSTART-":
            if words:
                yield f"{name}, line {n}", {"tokens": words, "tags": tags}
            words, tags = [], []
        elif universal:
            if fields[0].isdecimal():  # no comment, no part of a word
                require(len(fields) > 3, f"{name}, line {n}: expected the columns of CoNLL-U")
                words.append(fields[1])
                tags.append(fields[3])
        else:
            require(
                len(fields) > 1, f"{name}, line {n}: {line[:60]!r}, expected a word and its tag"
            )
            words.append(fields[0])
            tags.append(fields[-1])


def arrow_records(file: Path, suffix: str):
    """Records of .parquet, or of .arrow as `datasets` saves it; its classes by their names."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise onnxlm.Error(f"{file}: needs `pip install pyarrow`") from None
    try:
        if suffix == ".parquet":
            parquet = pyarrow.parquet.ParquetFile(file)
            schema = parquet.schema_arrow
            batches = parquet.iter_batches()
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
            schema = batches.schema
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = class_names(noted.get("info", {}).get("features"))
        records = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        places = ((f"{file}, row {n}", record) for n, record in enumerate(records, 1))
        yield from named_records(places, names)
    except (pyarrow.ArrowException, OSError) as error:
        raise onnxlm.Error(f"{file}: not readable ({str(error).splitlines()[0]})") from None


@contextlib.contextmanager
def open_parquet(path: Path, columns: list[str], rows: Callable, types: dict) -> Iterator[Callable]:
    """A function that appends rows to a new .parquet, see `onnxlm.open_table`; rows() yields (record, ...), whose columns
    have the types that all records fit, and `types` are those of the new columns."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise onnxlm.Error(f"{path}: needs `pip install pyarrow`") from None
    text, number, place = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    entity = dict(entity_group=text, word=text, score=number, start=place, end=place)
    new = {
        str: text,
        float: number,
        list[str]: pyarrow.list_(text),
        list[float]: pyarrow.list_(pyarrow.float32()),
        list[dict]: pyarrow.list_(pyarrow.struct(entity)),
    }
    schemas = []
    records = (dict.fromkeys(columns) | record for record, *_ in rows())
    while some := [*itertools.islice(records, 4096)]:
        schemas.append(pyarrow.Table.from_pylist(some).select(columns[: -len(types)]).schema)
    try:
        schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise onnxlm.Error(f"{path}: columns of several types ({reason}); write .jsonl") from None
    for name, kind in types.items():
        schema = schema.append(pyarrow.field(name, new[kind]))
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        yield lambda rows: writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def names_beside(file: Path) -> dict:
    """Column -> names of its classes, by the dataset_info.json (or dataset_infos.json) of `datasets` beside a file."""
    info = onnxlm.read_json(file.with_name("dataset_info.json"), {})
    several = [*onnxlm.read_json(file.with_name("dataset_infos.json"), {}).values()]
    if not info and len(several) == 1:
        info = several[0]
    return class_names(info.get("features"))


def class_names(features: dict | None) -> dict:
    """Column -> names of its classes, of the features that `datasets` notes in a schema or beside a file."""
    found = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        feature = feature[0] if isinstance(feature, list) else feature
        feature = feature.get("feature", feature)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            found[column] = feature["names"]
    return found


def named_records(records: Iterator, names: dict) -> Iterator:
    """(place, record) with the names of classes in place of their numbers."""
    for place, record in records:
        for column in names.keys() & record.keys() if isinstance(record, dict) else ():
            record[column] = with_names(record[column], names[column])
        yield place, record


def with_names(value, names: list):
    """A class's name in place of its number, which a table has as text; -1 stands for none."""
    if is_spelled_list(value):
        value = as_cell_list(value)
    if isinstance(value, list):
        return [with_names(item, names) for item in value]
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value) and value not in names:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    require(
        value < len(names), f"class {value}: expected less than {len(names)}, the names there are"
    )
    return names[value] if value >= 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# Rows: records as a task reads them, which map roles (text, label, ...) to values
# ---------------------------------------------------------------------------------------------------------------------
def as_text(value) -> str:
    value = " ".join(value) if isinstance(value, list) else value
    if not isinstance(value, (str, MappedText)):
        raise TypeError
    return value


# Several 0 and 1, as 1,0,1 or 1 0 1 or (1, 0, 1).
HOT_CELL = re.compile(r"\s*\(?[01](\.0?)?(\s*[,;\s]\s*[01](\.0?)?)+\)?\s*")


def as_label(value):
    """A class's name, a number, or a list of either; `settle_labels` decides between numbers and classes. A table's
    cell may hold a list, as pandas writes it."""
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's
    if is_spelled_list(value) or isinstance(value, str) and HOT_CELL.fullmatch(value):
        value = as_cell_list(value)
    if isinstance(value, (list, tuple)):
        if not all(isinstance(item, (str, int, float)) for item in value):
            raise TypeError
        return [item.strip() if isinstance(item, str) else item for item in value]
    if isinstance(value, str):
        return value.strip()
    return value if isinstance(value, float) else str(int(value))


def is_spelled_list(value) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL))


def as_cell_list(text: str):
    """The list that a cell spells in JSON, in Python or as numbers with spaces, commas or semicolons between them; else
    the text itself."""
    value = cell_list(text)
    if value is not None:
        return value
    numbers = [as_number(word) for word in re.split(r"[\s,;]+", text.strip(" \t\n()[]"))]
    return text if None in numbers else numbers


def as_hot(value) -> int | None:
    """0 or 1, of a number, a truth value or a cell that spells one; None of another value."""
    if isinstance(value, str):
        return {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}.get(
            value.strip().lower()
        )
    return int(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def as_answers(value) -> list:
    """[(text, where it starts or None)] of SQuAD's answers, of {"text": [...], "answer_start": [...]}, or of texts."""
    if isinstance(value, dict):
        value = [
            {"text": text, "answer_start": start}
            for text, start in zip(value["text"], value["answer_start"])
        ]
    value = [value] if isinstance(value, str) else value
    return [
        (item, None)
        if isinstance(item, str)
        else (as_text(item["text"]), int(item["answer_start"]))
        for item in value
    ]


def as_list(value) -> list:
    """Words or tags: a list, a cell that spells one, or a text with spaces between them."""
    if is_spelled_list(value):
        value = as_cell_list(value)
    items = value.split() if isinstance(value, str) else [*value]
    return [str(int(item)) if isinstance(item, float) else str(item) for item in items]


SHAREGPT_ROLES = {  # who says something -> role in a chat template
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def as_messages(value) -> list[dict]:
    """The messages of a conversation, with all their fields; a string is read as JSON."""
    value = json.loads(value) if isinstance(value, str) else value
    return [as_message(dict(message)) for message in value]


def as_message(message: dict) -> dict:
    """A message with role and content; ShareGPT's `from` and `value` are these. Raises Error for a field that no chat
    template can take."""
    if "role" not in message:
        speaker, said = message.pop("from"), message.pop("value")
        names = ", ".join(SHAREGPT_ROLES)
        require(speaker in SHAREGPT_ROLES, f"from = {speaker!r}, expected one of {names}")
        message = {"role": SHAREGPT_ROLES[speaker], "content": said} | message
    content, role = message.get("content"), message["role"]
    if not isinstance(role, str) or not set(message) - {"role"}:
        raise TypeError
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            is_text = isinstance(part, dict) and isinstance(part.get("text"), str)
            require(is_text, f"content: a part of type {kind!r}, expected parts of type 'text'")
    elif content is not None and not isinstance(content, str) and role != "tool":
        raise TypeError
    weight = message.get("weight")
    require(weight in (None, 1), f"weight = {weight!r} is not supported, expected 1")
    return message


def chat_columns(record: dict) -> dict:
    """What a row says of its conversation beside the messages: `tools`, `system`, `documents` and other variables of
    the chat template (`chat_template_kwargs`)."""
    found = {name: record.get(name) for name in ("tools", "documents", "chat_template_kwargs")}
    for name, value in found.items():
        if isinstance(value, str):
            try:
                found[name] = json.loads(value or "null")
            except ValueError:
                raise onnxlm.Error(f"{name} = {value[:60]!r}, expected JSON") from None
    tools = found["tools"] or None
    are_schemas = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    require(
        tools is None or are_schemas,
        f"tools = {str(tools)[:60]!r}, expected a list of JSON schemas",
    )
    variables = dict(found["chat_template_kwargs"] or {})
    if found["documents"]:
        variables["documents"] = found["documents"]
    columns = {"tools": tools, "system": record.get("system"), "variables": variables}
    return {name: value for name, value in columns.items() if value}


ROLES = {  # role -> (the option that names its column, the usual names, how it reads, what that is)
    "messages": ("", "messages conversations", as_messages, "a list of role and content"),
    "text": (
        "text",
        "text sentence review content sentence1 premise question1 comment tweet",
        as_text,
        "a string",
    ),
    "pair": ("pair", "sentence2 hypothesis question2", as_text, "a string"),
    "words": ("text", "tokens words text sentence", as_list, "a list of words"),
    "source": ("text", "source text document article dialogue input abstract", as_text, "a string"),
    "label": (
        "label",
        "label labels class category sentiment stars rating score",
        as_label,
        "a label or a list",
    ),
    "tags": ("label", "ner_tags tags pos_tags labels label", as_list, "a list of tags"),
    "target": ("target", "target summary translation tldr highlights output", as_text, "a string"),
    "question": ("question", "question query", as_text, "a string"),
    "context": ("context", "context passage paragraph document text", as_text, "a string"),
    "answer": ("", "answers answer", as_answers, "an answer"),
}
COLUMNS = tuple(dict.fromkeys(option for option, *_ in ROLES.values() if option))
OPTIONAL = ("messages", "pair")
# Roles that the model does not read for a prediction.
NOT_READ_BY_RUN = ("messages", "label", "tags", "answer", "target")
TEXT_PAIRS = (  # columns that are a pair of texts where both are there
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("sentence_a", "sentence_b"),
    ("text_a", "text_b"),
    ("text1", "text2"),
)
VAL_SHARE = 0.1
MAX_CLASSES_OF_NUMBERS = 20  # 0.0, 1.0, ... of so many values at most are classes


class Incomplete(Exception):
    """A row that nothing can be learnt from, and why."""


def read_splits(
    data, options: DataOptions, notices: list, seed: int = 0, known: dict | None = None
) -> tuple[list, list]:
    """Rows to train on, and those to validate on: of --val, of the data's own validation split, or --val-share of
    the data. `known`: see `read_rows`."""
    if isinstance(data, dict):  # splits in memory
        require("train" in data, "data: expected a split `train`")
        rows = read_rows(data["train"], options, notices=notices, known=known)
        held = data.get("validation")
    else:
        rows = read_rows(data, options, notices=notices, known=known)
        in_folder = isinstance(data, (str, Path)) and Path(data).is_dir()
        splits = data_files(Path(data)) if in_folder else {}
        held = data if "validation" in splits else None
        if "test" in splits:
            notices.append(f"{data}: its test split is not read (`tinylm eval` reads it)")
    held = options.val or held
    if held is None:
        rows, held = split_rows(rows, options.val_share, seed)
    else:
        source = options.val or (data if isinstance(data, (str, Path)) else "the data")
        expected = f"none, as {source} has rows to validate on"
        require(options.val_share is None, f"--val-share {options.val_share}: expected {expected}")
        if "label" in rows[0]:  # are numbers there what they are here
            numbers = isinstance(rows[0]["label"], float)
            options = replace(options, regression=numbers, classes=not numbers)
        splits = ("validation", "test", "train") if options.val else ("validation",)
        held = read_rows(held, options, splits, notices, dict(known or {}))
    learnt = {identity(row) for row in rows}
    twice = sum(identity(row) in learnt for row in held)
    if twice:
        notices.append(
            f"{twice:,} of the {counted(len(held), 'row')} to validate on are among those to train on too: "
            "the figures are better than for new data"
        )
    return rows, held


def identity(row: dict) -> int:
    """A number that two identical rows have in common; a long text is not copied for it."""
    return hash(row["text"] if set(row) == {"text"} else repr(row))


def split_rows(rows: list, share: float | None = None, seed: int = 0) -> tuple[list, list]:
    """Rows to train on, and `share` of them to validate on. Of running text that is the end, by default a megabyte at
    most. Others are drawn: as many of each class as its share, where rows have one label; of each range of numbers."""
    if set(rows[0]) == {"text"}:
        return split_text(rows, share)
    share = VAL_SHARE if share is None else share
    draw = random.Random(seed)
    order = draw.sample(range(len(rows)), len(rows))
    groups = {}
    if isinstance(rows[0].get("label"), float):
        order.sort(key=lambda i: rows[i]["label"])
        size = max(round(1 / max(share, 1e-9)), 2)
        for rank, i in enumerate(order):
            groups.setdefault(rank // size, []).append(i)
        for group in groups.values():
            draw.shuffle(group)
    else:
        for i in order:
            label = rows[i].get("label")
            groups.setdefault(label if isinstance(label, str) else None, []).append(i)
    # As many as the group's share, rounded down; those that are left go to the largest remainders.
    quotas = [(len(group) * share, group) for group in groups.values()]
    left = round(len(rows) * share) - sum(int(quota) for quota, _ in quotas)
    held = set()
    for quota, group in sorted(quotas, key=lambda item: int(item[0]) - item[0]):
        more = left > 0 and int(quota) + 1 < len(group)
        left -= more
        held.update(group[: int(quota) + more])
    kept = [row for i, row in enumerate(rows) if i not in held]
    return kept, [row for i, row in enumerate(rows) if i in held]


def split_text(rows: list, share: float | None) -> tuple[list, list]:
    """Texts before and after the point that leaves `share` of their characters behind it."""
    kept = []
    held = []
    total = sum(len(row["text"]) for row in rows)
    left = int(total * (1 - (VAL_SHARE if share is None else share)))
    if share is None:
        left = max(left, total - MMAP_MIN_BYTES // 64)
    for text in (row["text"] for row in rows):
        kept += [{"text": text[:left]}] * (left > 0)
        held += [{"text": text[left:]}] * (left < len(text))
        left = max(left - len(text), 0)
    return kept, held


def read_rows(
    path,
    options: DataOptions,
    splits: tuple = ("train",),
    notices: list | None = None,
    known: dict | None = None,
) -> list[dict]:
    """Rows, with the roles that the task needs, of a file, of a folder's files of the first of the splits that it has,
    of standard input ("-"), or of records in memory, a pandas DataFrame too. Rows where something is empty are left out.
    What there is to say of it goes to stderr, or to the list `notices`. known: option -> column, which is preferred to
    the usual names where a row has it; gets the columns of the first row.

    Raises Error where a column is missing or has something else in it.
    """
    name = "rows"
    rows = []
    columns = {}  # of the first row
    known = {} if known is None else known
    dropped = Counter()  # reason -> rows
    lines = notices if notices is not None else []
    if isinstance(path, (str, Path)):
        name = str(path)
        path = Path(path)
        files = [path]
        if path.is_dir():
            found = data_files(path)
            split = next((split for split in splits if split in found), splits[0])
            require(
                found.get(split),
                f"{path}: no {', '.join(FORMATS)} file {'in this folder' if not found else f'to {split} on'}",
            )
            files = found[split]
            more = ", ..." if len(files) > 3 else ""
            names = ", ".join(str(file.relative_to(path)) for file in files[:3])
            lines.append(
                f"{path}: {counted(len(files), 'file')} of the {split} split ({names}{more})"
            )
        records = itertools.chain.from_iterable(
            file_records(file, options, path, lines) for file in files
        )
    else:
        records = numbered(path)
    for place, record in records:
        try:
            if not columns:
                columns = choose_columns(place, from_instruction(record, options), options, known)
                known |= by_option(columns)
            rows.append(read_row(place, record, options, known))
        except Incomplete as reason:
            dropped[str(reason)] += 1
    reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
    require(rows, f"{name}: no rows" + (f"; dropped: {reasons}" if dropped else ""))
    chats = {"messages" in row for row in rows}
    require(len(chats) == 1, f"{name}: texts and messages, expected one kind")
    used = ", ".join(describe_column(*item) for item in columns.items())
    left_out = f"; {counted(dropped.total(), 'row')} dropped: {reasons}" if dropped else ""
    if unanswered := sum(row.get("answer") == [] for row in rows):
        left_out += f"; {counted(unanswered, 'question')} without an answer"
    lines.append(f"{name}: {counted(len(rows), 'row')}, columns {used}{left_out}")
    if "label" in rows[0]:
        lines += settle_labels(name, rows, options)
    if "tags" in rows[0]:
        settle_tags(name, rows, options)
    for line in lines if notices is None else ():
        print(line, file=sys.stderr)
    return rows


def numbered(records) -> Iterator[tuple[str, dict]]:
    """(place, record) of records in memory: dicts, or the rows of a pandas DataFrame."""
    if hasattr(records, "iterrows"):
        records = records.astype(object).where(records.notna(), None).to_dict("records")
    return ((f"row {n}", record) for n, record in enumerate(records, 1))


def by_option(columns: dict) -> dict[str, str]:
    """Option -> column, of role -> column or columns; as on the command line."""
    named = {ROLES[role][0]: column for role, column in columns.items() if ROLES[role][0]}
    return {name: ",".join(x) if isinstance(x, list) else x for name, x in named.items()}


def describe_column(role: str, column: str | list) -> str:
    column = " + ".join(column) if isinstance(column, list) else column
    return role if role == column else f"{role} = {column}"


def counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


def read_row(place: str, record, options: DataOptions, known: dict = {}) -> dict:
    """Role -> value. Raises Incomplete for a row where one is empty, Error for one of another kind."""
    row = {}
    record = from_instruction(record, options)
    for role, column in choose_columns(place, record, options, known).items():
        if isinstance(column, list):
            row[role] = {name: read_hot(place, record, name) for name in column}
            continue
        _, _, read, kind = ROLES[role]
        value = lookup(record, column)
        nothing = is_missing(value) or role in ("messages", "words") and not value
        if nothing and role == "pair":  # a text alone
            continue
        if nothing and role == "answer":
            value = []
        elif nothing:
            raise Incomplete(f"{column} is empty")
        try:
            row[role] = read(value)
            if role == "messages":
                row |= chat_columns(record)
        except onnxlm.Error as error:
            raise onnxlm.Error(f"{place}: {column}: {error}") from None
        except (TypeError, ValueError, KeyError):
            hint = ""
            if isinstance(value, dict) and read is as_text:
                names = ", ".join(f"{column}.{name}" for name in value)
                hint = f"; {flag(ROLES[role][0] or 'text')} names one of {names}"
            raise onnxlm.Error(
                f"{place}: {column} = {str(value)[:60]!r}, expected {kind}{hint}"
            ) from None
    if isinstance(system := row.pop("system", None), str):
        if row["messages"][0]["role"] != "system":
            row["messages"].insert(0, {"role": "system", "content": system})
    words, tags = len(row.get("words", ())), len(row.get("tags", ()))
    require(not tags or tags == words, f"{place}: {tags} tags for {words} words")
    if "answer" in row:
        row["answer"] = find_answers(row["context"], row["answer"])
    return row


def is_missing(value) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or isinstance(value, float) and math.isnan(value)


def read_hot(place: str, record: dict, column: str) -> int:
    """0 or 1, in one of several columns of labels."""
    value = lookup(record, column)
    if is_missing(value):
        raise Incomplete(f"{column} is empty")
    hot = as_hot(value)
    expected = "0 or 1 in each of several columns of labels (--label)"
    require(hot is not None, f"{place}: {column} = {str(value)[:60]!r}, expected {expected}")
    return hot


def choose_columns(
    place: str, record, options: DataOptions, known: dict = {}, inputs: bool = False
) -> dict[str, str | list]:
    """Role -> the column that has it, for the roles of the task, or only those that the model reads; a list for several
    columns of labels. A column is that of its option, or `known`, or has one of the usual names."""
    require(isinstance(record, dict), f"{place}: {str(record)[:60]!r}, expected an object")
    columns = {str(name).lower(): name for name in record}
    chosen = {}
    for role in TASK_ROLES[options.task]:
        if inputs and role in NOT_READ_BY_RUN:
            continue
        option, names, _, _ = ROLES[role]
        several = role == "label"
        column = getattr(options, option, "")
        if column:
            column = find_column(record, columns, column, several)
        else:
            names = usual_names(role, columns, chosen, options)
            column = next((columns[name] for name in names if name in columns), None)
            if known.get(option):
                column = find_column(record, columns, known[option], several) or column
        if column is not None:
            chosen[role] = column
        elif role not in OPTIONAL and "messages" not in chosen:
            raise onnxlm.Error(
                f"{place}: {missing_column(record, role, getattr(options, option, ''))}"
            )
    return chosen


def usual_names(role: str, columns: dict, chosen: dict, options: DataOptions) -> list[str]:
    """The names of a role's column, the first one that is there is it."""
    names = ROLES[role][1].split()
    pairs = [pair for pair in TEXT_PAIRS if columns.keys() >= {*pair}]
    if options.task == "classify" and role == "text" and "text" not in columns:
        return [first for first, _ in pairs] + names
    if role == "pair":
        return [second for first, second in pairs if first == chosen["text"].lower()] + names
    return names


def find_column(record: dict, columns: dict, name: str, several: bool) -> str | list | None:
    """A column as its record spells it: exactly, nested, or in another case; or `several`, as a,b,c."""
    with contextlib.suppress(KeyError):
        lookup(record, name)
        return name
    if name.lower() in columns or "," not in name or not several:
        return columns.get(name.lower())
    found = [find_column(record, columns, part.strip(), several=False) for part in name.split(",")]
    return None if None in found else found


def missing_column(record: dict, role: str, given: str) -> str:
    option, names, _, _ = ROLES[role]
    columns = column_names(record)
    text = f"no column {given or ' or '.join(names.split())} for the {role} (columns: {', '.join(columns)[:200]})"
    if option and not given:
        text += f"; {flag(option)} names it"
    if columns == ["text"]:
        text += "; a plain text has one column, expected .jsonl, .csv, .tsv, .parquet, ..."
    elif any(len(name.split()) > 3 for name in columns):
        text += "; is the first line a header?"
    return text


def column_names(record: dict) -> list[str]:
    """All columns; nested ones by their dotted names."""
    names = []
    for name, value in record.items():
        nested = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        names += [f"{name}.{key}" for key in value] if nested and value else [str(name)]
    return names


def from_instruction(record, options: DataOptions):
    """alpaca's instruction, input and output as what they mean: a source and its target, or a chat of two turns."""
    if not isinstance(record, dict) or options.text or options.target:
        return record
    columns = {str(name).lower(): value for name, value in record.items()}
    asked = next((name for name in ("instruction", "prompt") if name in columns), None)
    answered = next(
        (name for name in ("output", "response", "completion") if name in columns), None
    )
    if not asked or not answered or {"messages", "conversations"} & set(columns):
        return record
    parts = columns[asked], columns.get("input")
    answer = columns[answered]
    if not all(isinstance(text, (str, type(None))) for text in (*parts, answer)):
        return record
    source = "\n\n".join(text for text in parts if text)
    if options.task == "seq2seq":
        return {"source": source, "target": answer}
    if options.task == "lm" and "text" not in columns:
        turns = {"system": columns.get("system"), "user": source, "assistant": answer}
        messages = [dict(role=role, content=text) for role, text in turns.items() if text]
        return {"messages": messages if source and answer else None}
    return record


def find_answers(context: str, answers: list) -> list:
    """Answers, each with where it stands in the context. Raises Incomplete if none stands there."""
    found = []
    answers = [(text, start) for text, start in answers if text.strip()]
    for text, start in answers:
        if start is None or context[start : start + len(text)] != text:
            start = context.find(text)
        if start >= 0:
            found.append((text, start))
    if answers and not found:
        raise Incomplete("the answer does not stand in its context")
    return found


def settle_labels(name: str, rows: list, options: DataOptions) -> list[str]:
    """Make the labels of one kind, in place: names of classes, lists of them (or {name: 0 or 1}), or numbers. Numbers
    with a decimal point are no classes, but for 0.0, 1.0, ... of a few values; --regression and --classes decide
    otherwise. Returns what there is to say of it."""
    labels = [row["label"] for row in rows]
    if any(isinstance(label, (list, dict)) for label in labels):
        require(not options.regression, f"{name}: lists of labels, expected numbers (--regression)")
        return settle_lists(name, rows, options)
    numbers = [as_number(label) for label in labels]
    points = [isinstance(label, float) or "." in label for label in labels]
    decimal = any(number is not None and point for number, point in zip(numbers, points))
    if options.regression or decimal and not options.classes:
        for label, number in zip(labels, numbers):
            what = (
                "--regression"
                if options.regression
                else "a number as others; --classes takes all as names"
            )
            require(number is not None, f"{name}: label {label!r}, expected {what}")
    whole = all(number is not None and number.is_integer() for number in numbers)
    few = len(set(numbers)) <= MAX_CLASSES_OF_NUMBERS
    regression = options.regression or decimal and not options.classes and not (whole and few)
    for row, label, number in zip(rows, labels, numbers):
        if regression:
            row["label"] = number
        elif decimal and number is not None and number.is_integer():
            row["label"] = name_of(name, str(int(number)), options.names)
        else:
            row["label"] = name_of(name, str(label), options.names)
    if decimal and not regression and not options.classes:
        return [f"{name}: labels like 0.0 are taken as classes; --regression takes them as numbers"]
    return []


def settle_lists(name: str, rows: list, options: DataOptions) -> list[str]:
    """Lists of labels as lists of names; lists of 0 and 1, all of one length, as {name: 0 or 1}."""
    if all(isinstance(row["label"], dict) for row in rows):
        return []
    labels = [row["label"] if isinstance(row["label"], list) else [row["label"]] for row in rows]
    items = [item for label in labels for item in label]
    lengths = sorted({len(label) for label in labels})
    kinds = {*map(type, items)}
    # A list of names or of numbers of classes repeats none, and no such number is a float or a truth value.
    sure = kinds & {bool, float} or any(len({*map(str, x)}) < len(x) for x in labels)
    likely = len(lengths) == 1 < lengths[0] and kinds == {int}
    likely &= len(options.names) in (0, lengths[0])
    if items and all(as_hot(item) is not None for item in items) and (sure or likely):
        return settle_hot(name, rows, labels, lengths, options.names)
    for row, label in zip(rows, labels):
        whole = [not isinstance(item, float) or item.is_integer() for item in label]
        expected = "names, or 0 and 1 for each label"
        require(all(whole), f"{name}: label {str(label)[:60]}, expected {expected}")
        texts = [str(int(item)) if isinstance(item, float) else str(item) for item in label]
        row["label"] = [name_of(name, text, options.names) for text in texts]
    return []


def settle_hot(name: str, rows: list, labels: list, lengths: list, names: list) -> list[str]:
    found = f"{name}: labels are lists of 0 and 1"
    size = lengths[0]
    require(len(lengths) == 1, f"{found}, {size} to {lengths[-1]} of them, expected one length")
    require(
        len(names) in (0, size),
        f"{found}, {size} of them, but --label-names has {len(names)} names, expected {size}",
    )
    for row, label in zip(rows, labels):
        row["label"] = dict(zip(names or map("LABEL_{}".format, range(size)), map(as_hot, label)))
    return [] if names else [f"{found}, taken as {size} labels; --label-names names them"]


def settle_tags(name: str, rows: list, options: DataOptions):
    """Numbers of tags as their names, in place."""
    tags = {tag for row in rows for tag in row["tags"]}
    numbers = all(tag.removeprefix("-").isdecimal() for tag in tags)
    shown = ", ".join(sorted(tags)[:10])
    require(
        options.names or not numbers,
        f"{name}: tags are numbers ({shown}); --label-names names them in order, as O,B-PER,I-PER",
    )
    named = {tag: name_of(name, tag, options.names) for tag in tags}
    for row in rows:
        row["tags"] = [named[tag] for tag in row["tags"]]


def name_of(place: str, label: str, names: list[str]) -> str:
    """A label by its name among the names, which may spell it otherwise or be those of numbers."""
    if not names:
        return label
    if label.isdecimal() and label not in names and int(label) < len(names):
        return names[int(label)]
    found = find_name(label, names)
    shown = ", ".join(names)[:200]
    require(found is not None, f"{place}: label {label!r}, expected one of {shown} (--label-names)")
    return found


def find_name(label: str, names) -> str | None:
    """The name that is the label: exactly, or the only one without regard to case and spaces."""
    if label in names:
        return label
    found = [name for name in names if name_key(name) == name_key(label)]
    return found[0] if len(found) == 1 else None


def name_key(label: str) -> str:
    """What two spellings of a label have in common. LABEL_0 is the name of a class without one, 0."""
    key = "".join(label.split()).casefold()
    return key.removeprefix("label_") if re.fullmatch(r"label_\d+", key) else key


def as_number(label) -> float | None:
    if isinstance(label, float):
        return label
    return (
        float(label) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", label, re.I) else None
    )
