"""Reads data files: text, JSON, tables, CoNLL, parquet, single files or folders of them. Needs no torch.

    rows = read_rows("reviews.csv", DataOptions(task="classify"))    # [{"text": ..., "label": ...}, ...]

A record is a dict of the file's columns. A row is a record as a task reads it: a dict of roles (text, label, ...).
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
from typing import Annotated, BinaryIO, Literal, NamedTuple, TextIO

import onnxlm
from onnxlm import cell_list, check_fields, json_lines, lookup, require, table_records

# Tasks that read plain text; all others need columns.
PLAIN_TASKS = ("lm", "mlm")
# Task -> the roles of its rows: the inputs first, then the target.
TASK_ROLES = {
    "lm": ("messages", "text"),
    "classify": ("text", "pair", "label"),
    "tokens": ("words", "tags"),
    "qa": ("question", "context", "answer"),
    "seq2seq": ("source", "target"),
    "mlm": ("text",),
}


def option(default, help: str):
    """A dataclass field with the help text of its command-line option."""
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
    """Which columns hold the text and the labels, how the files are read, and which rows validate."""

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
        """The names of --label-names; a label's number is its index."""
        with contextlib.suppress(ValueError):
            names = json.loads(self.label_names)
            if isinstance(names, list):
                return [str(name) for name in names]
        return [name.strip() for name in self.label_names.split(",")] if self.label_names else []


# ---------------------------------------------------------------------------------------------------------------------
# Files: from a file to its records
# ---------------------------------------------------------------------------------------------------------------------
# Suffix (lower case, without .gz) -> format.
FORMATS = {
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
# Suffix -> why it is refused, and what to do instead.
REFUSED_SUFFIXES = {
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
# Files that often lie beside the data but hold none of it.
NOT_DATA = re.compile(
    r"(readme|licen[cs]e|copying|changelog|contributing|citation)(\.\w+)?|cache-.*"
    r"|(metadata|state|dataset_dict|dataset_infos?)\.json",
    re.IGNORECASE,
)
# Matches the name of a folder, or of a file without its suffix, that belongs to a split.
SPLIT_NAME = re.compile(
    r"(train|validation|valid|val|dev|test)(ing|set|data|split)?([^a-z].*)?", re.IGNORECASE
)
# First word of a split's name -> split; all other words mean validation.
SPLITS = {"train": "train", "test": "test"}
# Larger text files are memory-mapped.
MMAP_MIN_BYTES = 2**26


def suffix_of(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def data_files(folder: Path) -> dict[str, list[Path]]:
    """Returns split (train, validation, test) -> the folder's files, sorted by name, without hidden files and those
    that hold no data. The split is read from the file's name, else from the nearest folder's; by default train."""
    splits = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if suffix_of(file) not in FORMATS or hidden or NOT_DATA.fullmatch(file.name):
            continue
        # A folder may be named like a file.
        if file.is_dir():
            continue
        stem = file.name.partition(".")[0]
        names = (SPLIT_NAME.fullmatch(part) for part in (stem, *reversed(parts[:-1])))
        name = next((match[1].lower() for match in names if match), "train")
        splits.setdefault(SPLITS.get(name, "validation"), []).append(file)
    return splits


def class_folder(file: Path, root: Path) -> str | None:
    """The name of a text's folder below the root, which is its class: pos/1.txt, train/neg/2.txt. A split's folder
    is not one."""
    parts = [part for part in file.relative_to(root).parts[:-1] if not SPLIT_NAME.fullmatch(part)]
    return parts[-1] if parts else None


def read_records(
    path, task: str = "", split: str = "train", delimiter: str = "", encoding: str = ""
) -> Iterator[dict]:
    """Yields the records of a file, of one split of a folder, or of standard input ("-"), as dicts of columns.

    A plain text is one record with the column `text`. task: a key of TASK_ROLES, which decides how an ambiguous file is
    read: .txt is CoNLL for "tokens", an unknown suffix is text for "lm" and "mlm" and a table for others. Without a
    task, a .txt that looks like CoNLL is read as that. Raises Error for a file that does not match its suffix.
    """
    options = DataOptions(task=task or "lm", delimiter=delimiter, encoding=encoding)
    root = Path(path)
    for file in data_files(root).get(split, []) if root.is_dir() else [root]:
        for _, record in file_records(file, options, root, [], guess=not task):
            yield record


def file_records(file: Path, options: DataOptions, root: Path, notices: list, guess: bool = False):
    """Yields (place, record); errors name the place. `guess`: the task is unknown, so a .txt that looks like CoNLL is
    read as CoNLL. Appends remarks for the user to `notices`."""
    suffix = suffix_of(file)
    from_stdin = str(file) == "-"
    name = "standard input" if from_stdin else str(file)
    require(suffix not in REFUSED_SUFFIXES, f"{name}: {REFUSED_SUFFIXES.get(suffix)}")
    kind = FORMATS.get(suffix)
    if kind == "arrow":
        yield from arrow_records(file, suffix)
        return
    may_map = options.task in PLAIN_TASKS and kind in ("text", None)
    may_map = may_map and not options.encoding and not from_stdin
    if may_map and is_mappable(file):
        yield name, {"text": MappedText(file)}
        return
    with open_text(file, name, options.encoding, notices) as text:
        kind = detect_format(text, kind, options, guess)
        names = {} if from_stdin or kind not in ("json", "table") else names_beside(file)
        if kind == "json":
            yield from with_class_names(json_records(name, text, lines=suffix != ".json"), names)
        elif kind == "table":
            usual = "\t" if suffix == ".tsv" else ","
            delimiter = {"\\t": "\t", "tab": "\t"}.get(options.delimiter, options.delimiter)
            yield from with_class_names(table_records(name, text, delimiter, usual), names)
        elif kind == "conll":
            yield from conll_records(name, text, universal=suffix == ".conllu")
        else:
            label = class_folder(file, root)
            yield name, {"text": text.read()} | ({"label": label} if label else {})


def detect_format(text: TextIO, kind: str | None, options: DataOptions, guess: bool) -> str:
    """Returns a value of FORMATS: `kind`, the one of the suffix, unless the suffix is unknown or means only text."""
    if kind is None:
        kind = "text" if options.task in PLAIN_TASKS else "table"
        if looks_like_json_lines(text):
            kind = "json"
    if kind != "text":
        return kind
    tagged = looks_like_conll(text) if guess else options.task == "tokens"
    return "conll" if tagged else "table" if options.delimiter else "text"


class MappedText:
    """The text of a large file, or a slice of its bytes, read from disk when str() asks for it."""

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

    def __repr__(self) -> str:
        # It changes with the file, so that cached tokens of an older version are not reused.
        return f"{self.path.name} {self.size} {self.changed} {self.first} {self.last}"


def is_mappable(file: Path) -> bool:
    """Whether it is a large file whose first part is plain UTF-8."""
    if file.stat().st_size <= MMAP_MIN_BYTES:
        return False
    with open(file, "rb") as opened:
        head = opened.read(MMAP_MIN_BYTES)
    if head.startswith((codecs.BOM_UTF8, b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeError:
        return False
    return True


@contextlib.contextmanager
def open_text(file: Path, name: str, encoding: str, notices: list) -> Iterator[TextIO]:
    """Opens a file, or standard input, as seekable text whose lines end with \\n. The whole file is decoded once to find
    its encoding. Raises Error for a file that is not text."""
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
    """Returns the encoding given, else that of the byte order mark, else UTF-8, else cp1252 (with a notice, once).
    Raises Error for bytes that are not text in that encoding."""
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


# Control characters that no text contains.
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def decoded(data: BinaryIO, encoding: str) -> Iterator[str]:
    """Yields the whole text in parts of 1 MB."""
    data.seek(0)
    decoder = codecs.getincrementaldecoder(encoding)()
    while part := data.read(2**20):
        yield decoder.decode(part)
    yield decoder.decode(b"", True)


def first_lines(text: TextIO, count: int) -> list[str]:
    """Returns the first lines that are not blank, and rewinds the text."""
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
    """Whether the first 100 lines all end with a tag (O, B-ORG, ...)."""
    lines = [line.split() for line in first_lines(text, 100)]
    tags = [line[-1] for line in lines if len(line) > 1]
    tagged = all(re.fullmatch(r"O|[BIESLU]-\S+", tag) for tag in tags)
    return len(tags) > 1 and len(tags) == len(lines) and tagged


def json_records(name: str, text: TextIO, lines: bool):
    """Yields (place, record) of a JSON document, or of JSON lines (`lines`). Either is also read under the other's
    suffix."""
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
    """Returns the records of a JSON document: a list of records, alone or as an object's only list; SQuAD's articles;
    pandas' to_json with orient records, columns, index, split or table; a list per column."""
    if isinstance(content, list):
        if content and isinstance(content[0], dict) and "paragraphs" in content[0]:
            return squad_rows(name, content)
        return [{"text": item} if isinstance(item, str) else item for item in content]
    require(isinstance(content, dict), f"{name}: expected a list of records")
    # pandas: split
    if {"columns", "data"} <= set(content):
        return [dict(zip(content["columns"], values)) for values in content["data"]]
    lists = [value for value in content.values() if isinstance(value, list)]
    of_records = [value for value in lists if value and isinstance(value[0], dict)]
    if "data" in content or len(of_records) == 1 and len(lists) == 1:
        rows = content.get("data", *of_records) if "data" in content else of_records[0]
        require(isinstance(rows, list), f"{name}: data: expected a list of records")
        return json_rows(name, rows)
    # A list per column.
    if content and len(lists) == len(content):
        require(len(set(map(len, lists))) == 1, f"{name}: expected lists of equal lengths")
        return [dict(zip(content, values)) for values in zip(*lists)]
    inner = [value for value in content.values() if isinstance(value, dict)]
    # pandas: index (each row's values), or columns (each column's values).
    if content and len(inner) == len(content):
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
    """Yields (place, {"tokens", "tags"}) of each sentence. Words and tags are the first and last columns (`universal`,
    CoNLL-U: the second and fourth); an empty line ends a sentence."""
    words, tags = [], []
    for n, line in enumerate(itertools.chain(text, [""]), 1):
        fields = line.rstrip().split("\t") if "\t" in line.strip() else line.split()
        if not fields or fields == [""] or fields[0] == "-DOCSTART-":
            if words:
                yield f"{name}, line {n}", {"tokens": words, "tags": tags}
            words, tags = [], []
        elif universal:
            # Comments (#) and ranges of words (1-2) are skipped.
            if fields[0].isdecimal():
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
    """Yields (place, record) of a .parquet, or of an .arrow as `datasets` saves it, with class names for class ids."""
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
        yield from with_class_names(places, names)
    except (pyarrow.ArrowException, OSError) as error:
        raise onnxlm.Error(f"{file}: not readable ({str(error).splitlines()[0]})") from None


@contextlib.contextmanager
def open_parquet(path: Path, columns: list[str], rows: Callable, types: dict) -> Iterator[Callable]:
    """Opens a new .parquet and yields a function that appends rows, like `onnxlm.open_table`.

    columns: the names of all columns; the last ones are new. rows(): yields (record, ...) of the old columns; they are
    read once before, to find types that fit all of them. types: new column -> its Python type.
    """
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
    """Returns column -> class names from the dataset_info.json (or dataset_infos.json) that `datasets` writes beside a
    file."""
    info = onnxlm.read_json(file.with_name("dataset_info.json"), {})
    several = [*onnxlm.read_json(file.with_name("dataset_infos.json"), {}).values()]
    if not info and len(several) == 1:
        info = several[0]
    return class_names(info.get("features"))


def class_names(features: dict | None) -> dict:
    """Returns column -> class names from the features that `datasets` stores in a schema or beside a file."""
    found = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        feature = feature[0] if isinstance(feature, list) else feature
        feature = feature.get("feature", feature)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            found[column] = feature["names"]
    return found


def with_class_names(records: Iterator, names: dict) -> Iterator:
    """Yields (place, record) with class names for class ids; `names`: column -> class names."""
    for place, record in records:
        for column in names.keys() & record.keys() if isinstance(record, dict) else ():
            record[column] = class_name(record[column], names[column])
        yield place, record


def class_name(value, names: list):
    """Returns the name of a class id, or of each in a list; None for -1, which `datasets` writes for no class. The id
    may be an int, or text from a table."""
    if is_spelled_list(value):
        value = as_cell_list(value)
    if isinstance(value, list):
        return [class_name(item, names) for item in value]
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
# Values: from a column's value to a role's
# ---------------------------------------------------------------------------------------------------------------------
def as_text(value) -> str:
    value = " ".join(value) if isinstance(value, list) else value
    if not isinstance(value, (str, MappedText)):
        raise TypeError
    return value


# Several 0 and 1 in one cell: 1,0,1 or 1 0 1 or (1, 0, 1).
MULTI_HOT_CELL = re.compile(r"\s*\(?[01](\.0?)?(\s*[,;\s]\s*[01](\.0?)?)+\)?\s*")


def as_label(value):
    """Returns a class name (str), a number (float), or a list of either. `settle_labels` decides later whether numbers
    are classes. A cell of a table may spell a list, as pandas writes it."""
    # numpy scalars and arrays
    value = value.tolist() if hasattr(value, "tolist") else value
    if is_spelled_list(value) or isinstance(value, str) and MULTI_HOT_CELL.fullmatch(value):
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
    """Parses a list from a cell: JSON, Python, or numbers separated by spaces, commas or semicolons. Returns the text
    itself if it is none of these."""
    value = cell_list(text)
    if value is not None:
        return value
    numbers = [as_number(word) for word in re.split(r"[\s,;]+", text.strip(" \t\n()[]"))]
    return text if None in numbers else numbers


def as_hot(value) -> int | None:
    """Returns 0 or 1 from a number, a bool, or a cell that spells one; None for any other value."""
    if isinstance(value, str):
        return {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}.get(
            value.strip().lower()
        )
    return int(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def as_answers(value) -> list:
    """Returns [(text, start or None)] from SQuAD's list of answers, from {"text": [...], "answer_start": [...]}, or
    from texts. A table's cell may spell them."""
    if isinstance(value, str) and re.match(r"\s*([\[{]\s*['\"{]|\[\s*\])", value):
        (value,) = cell_list(f"[{value}]") or [None]
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
    """Returns words or tags from a list, a cell that spells one, or a text that spaces divide."""
    if is_spelled_list(value):
        value = as_cell_list(value)
    if isinstance(value, str) and re.fullmatch(r"\s*\[[^][]*,[^][]*\]\s*", value):
        raise TypeError  # a list without quotes
    items = value.split() if isinstance(value, str) else [*value]
    return [str(int(item)) if isinstance(item, float) else str(item) for item in items]


# ShareGPT's `from` -> role in a chat template.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def as_messages(value) -> list[dict]:
    """Returns the messages of a conversation with all their fields; a string is parsed as JSON."""
    value = cell_list(value) if isinstance(value, str) else value
    return [as_message(dict(message)) for message in value]


def as_message(message: dict) -> dict:
    """Returns a message with role and content, renamed from ShareGPT's `from` and `value`. Raises Error for content
    that is not text, and for a weight other than 1, which would exclude the message from the loss."""
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
    """Returns the columns beside `messages` that belong to the conversation: "tools", "system", and "variables" for the
    chat template (`documents` and `chat_template_kwargs`). Empty ones are left out."""
    found = {name: record.get(name) for name in ("tools", "documents", "chat_template_kwargs")}
    for name, value in found.items():
        if isinstance(value, str):
            try:
                found[name] = json.loads(value or "null")
            except ValueError:
                raise onnxlm.Error(f"{name} = {value[:60]!r}, expected JSON") from None
    tools, variables = found["tools"] or None, found["chat_template_kwargs"] or {}
    are_schemas = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    require(
        tools is None or are_schemas,
        f"tools = {str(tools)[:60]!r}, expected a list of JSON schemas",
    )
    require(
        isinstance(variables, dict),
        f"chat_template_kwargs = {str(variables)[:60]!r}, expected an object",
    )
    if found["documents"]:
        variables = variables | {"documents": found["documents"]}
    system = record.get("system")
    is_text = not system or isinstance(system, str) or is_missing(system)
    require(is_text, f"system = {str(system)[:60]!r}, expected a string")
    columns = {"tools": tools, "system": system, "variables": variables}
    return {name: value for name, value in columns.items() if value}


# ---------------------------------------------------------------------------------------------------------------------
# Rows: records as a task reads them, which map roles (text, label, ...) to values
# ---------------------------------------------------------------------------------------------------------------------
class Role(NamedTuple):
    """The column of a role. option: the option that names it; names: common names, divided by spaces, the best one
    first; read: parses its value; expected: a phrase for errors."""

    option: str
    names: str
    read: Callable
    expected: str


TEXT_COLUMNS = "text sentence review content sentence1 premise question1 comment tweet"
SOURCE_COLUMNS = "source text document article dialogue input abstract"
LABEL_COLUMNS = "label labels class category sentiment stars rating score"
TARGET_COLUMNS = "target summary translation tldr highlights output"
ROLES = {
    "messages": Role("", "messages conversations", as_messages, "a list of role and content"),
    "text": Role("text", TEXT_COLUMNS, as_text, "a string"),
    "pair": Role("pair", "sentence2 hypothesis question2", as_text, "a string"),
    "words": Role("text", "tokens words text sentence", as_list, "a list of words"),
    "source": Role("text", SOURCE_COLUMNS, as_text, "a string"),
    "label": Role("label", LABEL_COLUMNS, as_label, "a label or a list"),
    "tags": Role("label", "ner_tags tags pos_tags labels label", as_list, "a list of tags"),
    "target": Role("target", TARGET_COLUMNS, as_text, "a string"),
    "question": Role("question", "question query", as_text, "a string"),
    "context": Role("context", "context passage paragraph document text", as_text, "a string"),
    "answer": Role("", "answers answer", as_answers, "an answer"),
}
# Options that name a column.
COLUMNS = tuple(dict.fromkeys(role.option for role in ROLES.values() if role.option))
OPTIONAL_ROLES = ("messages", "pair")
# Roles that prediction does not read.
TRAINING_ROLES = ("messages", "label", "tags", "answer", "target")
# Columns that form a pair of texts where a record has both.
TEXT_PAIRS = (
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
# Labels 0.0, 1.0, ... with more values than this are numbers, not classes.
MAX_CLASSES_OF_NUMBERS = 20


class Incomplete(Exception):
    """The row is dropped, because it has nothing to learn from; the message is the reason."""


def read_splits(
    data, options: DataOptions, notices: list, seed: int = 0, known: dict | None = None
) -> tuple[list, list]:
    """Returns (rows to train on, rows to validate on). The latter come from --val, else from the data's own validation
    split, else they are --val-share of the data.

    data: a file, a folder, records in memory, or a dict of splits. Appends remarks for the user to `notices`. known:
    see `read_rows`.
    """
    # A dict of splits in memory.
    if isinstance(data, dict):
        require("train" in data, "data: expected a split `train`")
        rows = read_rows(data["train"], options, notices=notices, known=known)
        val_data = data.get("validation")
    else:
        rows = read_rows(data, options, notices=notices, known=known)
        in_folder = isinstance(data, (str, Path)) and Path(data).is_dir()
        splits = data_files(Path(data)) if in_folder else {}
        val_data = data if "validation" in splits else None
        if "test" in splits:
            notices.append(f"{data}: its test split is not read (`tinylm eval` reads it)")
    val_data = options.val or val_data
    if val_data is None:
        rows, val_rows = split_rows(rows, options.val_share, seed)
    else:
        source = options.val or (data if isinstance(data, (str, Path)) else "the data")
        expected = f"none, as {source} has rows to validate on"
        require(options.val_share is None, f"--val-share {options.val_share}: expected {expected}")
        # Validation labels are numbers or classes as the training labels are.
        if "label" in rows[0]:
            numbers = isinstance(rows[0]["label"], float)
            options = replace(options, regression=numbers, classes=not numbers)
        splits = ("validation", "test", "train") if options.val else ("validation",)
        val_rows = read_rows(val_data, options, splits, notices, dict(known or {}))
    hashes = {row_hash(row) for row in rows}
    shared = sum(row_hash(row) in hashes for row in val_rows)
    if shared:
        notices.append(
            f"{shared:,} of the {counted(len(val_rows), 'row')} to validate on are among those to train on too: "
            "the figures are better than for new data"
        )
    return rows, val_rows


def row_hash(row: dict) -> int:
    """Returns a hash that identical rows share. A row of running text may be large, so its repr is not made."""
    return hash(row["text"] if set(row) == {"text"} else repr(row))


def split_rows(rows: list, share: float | None = None, seed: int = 0) -> tuple[list, list]:
    """Returns (rows to train on, rows to validate on); `share` of them validate, by default VAL_SHARE.

    Running text is cut near its end (see `split_text`). Other rows are drawn at random, stratified by class where each
    has one label, or by range where labels are numbers.
    """
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
    # Each group's share is rounded down; the rest goes to the largest remainders.
    quotas = [(len(group) * share, group) for group in groups.values()]
    rest = round(len(rows) * share) - sum(int(quota) for quota, _ in quotas)
    chosen = set()
    for quota, group in sorted(quotas, key=lambda item: int(item[0]) - item[0]):
        # One row of each group stays with the rows to train on.
        more = rest > 0 and int(quota) + 1 < len(group)
        rest -= more
        chosen.update(group[: int(quota) + more])
    train_rows = [row for i, row in enumerate(rows) if i not in chosen]
    return train_rows, [row for i, row in enumerate(rows) if i in chosen]


def split_text(rows: list, share: float | None) -> tuple[list, list]:
    """Cuts the texts, one behind the other, so that `share` of them is behind the cut: by default VAL_SHARE, but at
    most 1/64 of MMAP_MIN_BYTES (1 MB). Returns (texts before it, texts behind it). Lengths are those of the text:
    characters, or bytes of a MappedText."""
    train_rows = []
    val_rows = []
    total = sum(len(row["text"]) for row in rows)
    cut = int(total * (1 - (VAL_SHARE if share is None else share)))
    if share is None:
        cut = max(cut, total - MMAP_MIN_BYTES // 64)
    # `cut` counts from the start of each text in turn.
    for text in (row["text"] for row in rows):
        train_rows += [{"text": text[:cut]}] * (cut > 0)
        val_rows += [{"text": text[cut:]}] * (cut < len(text))
        cut = max(cut - len(text), 0)
    return train_rows, val_rows


def read_rows(
    data,
    options: DataOptions,
    splits: tuple = ("train",),
    notices: list | None = None,
    known: dict | None = None,
) -> list[dict]:
    """Returns rows with the roles of the task. Rows with an empty value are dropped.

    data: a file, a folder, "-" for standard input, or records in memory (dicts, a pandas DataFrame). splits: a folder
    is read from the first of these that it has. notices: a list that remarks for the user are appended to; without one
    they are printed to stderr. known: option -> column, preferred to the common names where a record has it; a pair that
    it lacks beside a text is not read. The columns that are read are added to it. Raises Error for a missing column or
    a value of the wrong kind.
    """
    rows = []
    # Role -> column, of the first record that has the role.
    columns = {}
    known = {} if known is None else known
    # Reason -> number of rows.
    dropped = Counter()
    lines = notices if notices is not None else []
    name, records = open_records(data, options, splits, lines)
    for place, record in records:
        try:
            record = from_instruction(record, options)
            chosen = choose_columns(place, record, options, known)
            columns = chosen | columns
            rows.append(read_row(place, record, chosen))
        except Incomplete as reason:
            dropped[str(reason)] += 1
    known |= by_option(columns)
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


def open_records(
    data, options: DataOptions, splits: tuple, notices: list
) -> tuple[str, Iterator[tuple[str, dict]]]:
    """Returns (name of the data for errors, iterator of (place, record)); see `read_rows`."""
    if not isinstance(data, (str, Path)):
        return "rows", numbered(data)
    path = Path(data)
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
        notices.append(
            f"{path}: {counted(len(files), 'file')} of the {split} split ({names}{more})"
        )
    records = (file_records(file, options, path, notices) for file in files)
    return str(data), itertools.chain.from_iterable(records)


def numbered(records) -> Iterator[tuple[str, dict]]:
    """Yields (place, record) of records in memory: dicts, or the rows of a pandas DataFrame."""
    if hasattr(records, "iterrows"):
        records = records.astype(object).where(records.notna(), None).to_dict("records")
    return ((f"row {n}", record) for n, record in enumerate(records, 1))


def by_option(columns: dict) -> dict[str, str]:
    """Converts role -> column or columns to option -> column, as the command line has it (a,b,c for several)."""
    named = {ROLES[role].option: column for role, column in columns.items() if ROLES[role].option}
    return {name: ",".join(x) if isinstance(x, list) else x for name, x in named.items()}


def describe_column(role: str, column: str | list) -> str:
    column = " + ".join(column) if isinstance(column, list) else column
    return role if role == column else f"{role} = {column}"


def counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


def read_row(place: str, record: dict, columns: dict) -> dict:
    """Returns role -> value; columns: role -> column. Raises Incomplete for an empty value, Error for one of the wrong
    kind."""
    row = {}
    for role, column in columns.items():
        if isinstance(column, list):
            row[role] = {name: read_hot(place, record, name) for name in column}
            continue
        value = lookup(record, column)
        empty = is_missing(value) or role in ("messages", "words") and not value
        # A text may have no second one, and a question no answer.
        if empty and role == "pair":
            continue
        if empty and role == "answer":
            value = []
        elif empty:
            raise Incomplete(f"{column} is empty")
        try:
            row[role] = ROLES[role].read(value)
            if role == "messages":
                row |= chat_columns(record)
        except onnxlm.Error as error:
            raise onnxlm.Error(f"{place}: {column}: {error}") from None
        except (TypeError, ValueError, KeyError):
            shown = f"{place}: {column} = {str(value)[:60]!r}"
            raise onnxlm.Error(f"{shown}, {expected_value(role, column, value)}") from None
    if isinstance(system := row.pop("system", None), str):
        if row["messages"][0]["role"] != "system":
            row["messages"].insert(0, {"role": "system", "content": system})
    words, tags = len(row.get("words", ())), len(row.get("tags", ()))
    require(not tags or tags == words, f"{place}: {tags} tags for {words} words")
    if "answer" in row:
        row["answer"] = find_answers(row["context"], row["answer"])
    return row


def expected_value(role: str, column: str, value) -> str:
    """Describes the values that a role accepts; for an object, the options that would name one of its fields."""
    _, _, read, expected = ROLES[role]
    if not isinstance(value, dict) or read is not as_text:
        return f"expected {expected}"
    names = ", ".join(f"{column}.{name}" for name in value)
    return f"expected {expected}; {flag(ROLES[role].option)} names one of {names}"


def is_missing(value) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or isinstance(value, float) and math.isnan(value)


def read_hot(place: str, record: dict, column: str) -> int:
    """Reads 0 or 1 from one of several columns of labels."""
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
    """Returns role -> column for the roles of the task (`inputs`: only those that a prediction reads). A column is
    named by its option, else by `known`, else it has a common name. Several columns of labels are a list."""
    require(isinstance(record, dict), f"{place}: {str(record)[:60]!r}, expected an object")
    columns = {str(name).lower(): name for name in record}
    chosen = {}
    for role in TASK_ROLES[options.task]:
        # A model that was trained on single texts reads no pair.
        single = role == "pair" and known.get("text") and not known.get("pair")
        if inputs and role in TRAINING_ROLES or single and not options.pair:
            continue
        # "" for messages and answer, which no option names.
        named_by = ROLES[role].option
        given = getattr(options, named_by, "")
        several = role == "label"
        if given:
            column = find_column(record, columns, given, several)
        else:
            names = common_names(role, columns, chosen, options)
            column = next((columns[name] for name in names if name in columns), None)
            if known.get(named_by):
                column = find_column(record, columns, known[named_by], several) or column
        if column is not None:
            chosen[role] = column
        elif role not in OPTIONAL_ROLES and "messages" not in chosen:
            raise onnxlm.Error(f"{place}: {missing_column(record, role, given)}")
    return chosen


def common_names(role: str, columns: dict, chosen: dict, options: DataOptions) -> list[str]:
    """Returns the common names of a role's column, in order of preference. A record with both columns of a pair of
    texts prefers these."""
    names = ROLES[role].names.split()
    pairs = [pair for pair in TEXT_PAIRS if columns.keys() >= {*pair}]
    if options.task == "classify" and role == "text" and "text" not in columns:
        return [first for first, _ in pairs] + names
    if role == "pair":
        return [second for first, second in pairs if first == chosen["text"].lower()] + names
    return names


def find_column(record: dict, columns: dict, name: str, several: bool) -> str | list | None:
    """Returns a column as the record spells it: `name` itself, which may be nested (a.b), or in another case; with
    `several` also a list for a,b,c. None if there is none. columns: lower-case name -> name."""
    with contextlib.suppress(KeyError):
        lookup(record, name)
        return name
    if name.lower() in columns or "," not in name or not several:
        return columns.get(name.lower())
    found = [find_column(record, columns, part.strip(), several=False) for part in name.split(",")]
    return None if None in found else found


def missing_column(record: dict, role: str, given: str) -> str:
    """Describes a missing column; `given` is the name that its option gives."""
    columns, role_option = column_names(record), ROLES[role].option
    names = given or " or ".join(ROLES[role].names.split())
    text = f"no column {names} for the {role} (columns: {', '.join(columns)[:200]})"
    if role_option and not given:
        text += f"; {flag(role_option)} names it"
    if columns == ["text"]:
        text += "; a plain text has one column, expected .jsonl, .csv, .tsv, .parquet, ..."
    elif any(len(name.split()) > 3 for name in columns):
        text += "; is the first line a header?"
    return text


def column_names(record: dict) -> list[str]:
    """Returns the names of all columns; an object's fields are column.field."""
    names = []
    for name, value in record.items():
        nested = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        names += [f"{name}.{key}" for key in value] if nested and value else [str(name)]
    return names


def from_instruction(record, options: DataOptions):
    """Converts an alpaca record (instruction, input, output) to source and target, or to a chat of two turns. Returns
    any other record as it is."""
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
    """Returns [(text, start)] of the answers that the context contains; a wrong or missing start is searched for.
    Raises Incomplete if it contains none of them."""
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
    """Decides whether labels are class names, lists of names, {name: 0 or 1} or numbers, and converts them in place.
    Returns notices. Numbers with a decimal point mean regression, except for a few whole ones (0.0, 1.0, ...);
    --regression and --classes override this."""
    labels = [row["label"] for row in rows]
    if any(isinstance(label, (list, dict)) for label in labels):
        require(not options.regression, f"{name}: lists of labels, expected numbers (--regression)")
        return settle_lists(name, rows, options)
    numbers = [as_number(label) for label in labels]
    points = [isinstance(label, float) or "." in label for label in labels]
    decimal = any(number is not None and point for number, point in zip(numbers, points))
    if options.regression or decimal and not options.classes:
        expected = "a number as others; --classes takes all as names"
        if options.regression:
            expected = "--regression"
        for label, number in zip(labels, numbers):
            require(number is not None, f"{name}: label {label!r}, expected {expected}")
    whole = all(number is not None and number.is_integer() for number in numbers)
    few = len(set(numbers)) <= MAX_CLASSES_OF_NUMBERS
    regression = options.regression or decimal and not options.classes and not (whole and few)
    for row, label, number in zip(rows, labels, numbers):
        if regression:
            row["label"] = number
        elif decimal and number is not None and number.is_integer():
            row["label"] = resolve_name(name, str(int(number)), options.names)
        else:
            row["label"] = resolve_name(name, str(label), options.names)
    if decimal and not regression and not options.classes:
        return [f"{name}: labels like 0.0 are taken as classes; --regression takes them as numbers"]
    return []


def settle_lists(name: str, rows: list, options: DataOptions) -> list[str]:
    """Converts lists of labels in place: multi-hot lists (0 and 1, all of one length) to {name: 0 or 1}, others to lists
    of names. Returns notices."""
    if all(isinstance(row["label"], dict) for row in rows):
        return []
    labels = [row["label"] if isinstance(row["label"], list) else [row["label"]] for row in rows]
    items = [item for label in labels for item in label]
    lengths = sorted({len(label) for label in labels})
    kinds = {*map(type, items)}
    # Lists of 0 and 1 may also be class ids. Class ids are ints and do not repeat within a list, so bools, floats and
    # repetitions are certainly multi-hot; ints in lists of one length above 1 are likely to be.
    certain = kinds & {bool, float} or any(len({*map(str, label)}) < len(label) for label in labels)
    likely = len(lengths) == 1 < lengths[0] and kinds == {int}
    likely &= len(options.names) in (0, lengths[0])
    if items and all(as_hot(item) is not None for item in items) and (certain or likely):
        return settle_multi_hot(name, rows, labels, lengths, options.names)
    for row, label in zip(rows, labels):
        whole = [not isinstance(item, float) or item.is_integer() for item in label]
        expected = "names, or 0 and 1 for each label"
        require(all(whole), f"{name}: label {str(label)[:60]}, expected {expected}")
        texts = [str(int(item)) if isinstance(item, float) else str(item) for item in label]
        row["label"] = [resolve_name(name, text, options.names) for text in texts]
    return []


def settle_multi_hot(name: str, rows: list, labels: list, lengths: list, names: list) -> list[str]:
    """Converts multi-hot labels to {name: 0 or 1} in place; `lengths`: the different lengths of the lists, sorted.
    Returns notices."""
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
    """Converts the tags to names of --label-names in place. Raises Error for tags that are numbers without names."""
    tags = {tag for row in rows for tag in row["tags"]}
    numbers = all(tag.removeprefix("-").isdecimal() for tag in tags)
    shown = ", ".join(sorted(tags)[:10])
    require(
        options.names or not numbers,
        f"{name}: tags are numbers ({shown}); --label-names names them in order, as O,B-PER,I-PER",
    )
    named = {tag: resolve_name(name, tag, options.names) for tag in tags}
    for row in rows:
        row["tags"] = [named[tag] for tag in row["tags"]]


def resolve_name(place: str, label: str, names: list[str]) -> str:
    """Returns the name of a label among `names` (--label-names): the same name in another case or spacing, or the name
    at an index. Returns the label itself if there are no names."""
    if not names:
        return label
    if label.isdecimal() and label not in names and int(label) < len(names):
        return names[int(label)]
    found = find_name(label, names)
    shown = ", ".join(names)[:200]
    require(found is not None, f"{place}: label {label!r}, expected one of {shown} (--label-names)")
    return found


def find_name(label: str, names) -> str | None:
    """Returns the name equal to the label, else the only one that differs in case and spaces alone, else None."""
    if label in names:
        return label
    found = [name for name in names if name_key(name) == name_key(label)]
    return found[0] if len(found) == 1 else None


def name_key(label: str) -> str:
    """Returns a key that two spellings of a label share: without case and spaces. The key of LABEL_0, transformers' name
    of an unnamed class, is 0."""
    key = "".join(label.split()).casefold()
    return key.removeprefix("label_") if re.fullmatch(r"label_\d+", key) else key


def as_number(label) -> float | None:
    if isinstance(label, float):
        return label
    return (
        float(label) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", label, re.I) else None
    )
