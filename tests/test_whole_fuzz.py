"""Hostile and broken input: whatever a file or an argument holds, the end is a result or one line of error, within
seconds and bounded memory, with nothing executed and nothing half-written."""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from families import CASES, ENCODERS, SEQ2SEQ, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import onnxlm
import pretrained
import tinylm
from tinylm import Config, TinyLM
from train import main

SECONDS, MEMORY = (
    20,
    2**30,
)  # of a machine that has other work too; all take a second or two of an idle one
BY_NAME = {case.name: case for case in (*CASES, *ENCODERS, *SEQ2SEQ)}
ODD = [
    "",
    "x",
    "\x00",
    "\n",
    "é" * 40,
    "../x",
    "/etc/passwd",
    "{{ 7 * 7 }}",
    "1e999",
    "9" * 5000,
    "__class__",
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    64,
    2**16,
    2**31 - 1,
    2**31,
    2**63,
    10**30,
    0.0,
    -0.5,
    0.5,
    1e-300,
    1e300,
    float("inf"),
    float("nan"),
    True,
    False,
    None,
]


def fuzz(examples, **strategies):
    """The same `examples` in every run."""
    quiet = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: quiet(given(**strategies)(test))


class Late(BaseException):
    """Nothing catches it."""


@contextlib.contextmanager
def bounded():
    """More SECONDS, or so much more MEMORY, is a failure."""

    def late(*_):
        raise Late(f"not done in {SECONDS} s")

    before, handler = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        signal.signal(signal.SIGALRM, late),
    )
    signal.setitimer(
        signal.ITIMER_REAL, SECONDS, 1
    )  # again, where the first is swallowed (by a callback of the gc)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def ends(call):
    """What a call returns, or its one line of error. Anything else fails."""
    with bounded():
        try:
            return call()
        except tinylm.Error as error:
            assert one_line(str(error))
            return error


def one_line(text):
    return text and len(text.splitlines()) == 1 and len(text) < 1500


def command(capsys, *arguments):
    """The exit code of the command line, which says what is wrong, if anything is, in one line."""
    capsys.readouterr()
    with bounded():
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own, after a usage
            code = stop.code
    said = capsys.readouterr().err
    assert code in (0, 1, 2) and "Traceback" not in said
    assert code != 1 or one_line(said.strip().splitlines()[-1]) and "tinylm: error: " in said
    return code


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of good tiny checkpoints by name: ours, and those of some families; all with our byte tokenizer."""
    folders = {}
    for name in (
        "ours",
        "gpt2",
        "qwen2",
        "gemma3_text",
        "bert-classify",
        "roberta-mlm",
        "t5",
        "marian",
    ):
        folders[name] = tmp_path_factory.mktemp(name)
        ours = TinyLM(
            Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
        )
        ours.save_pretrained(folders[name])
        if name != "ours":
            save(BY_NAME[name], folders[name])
    return folders


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """place(folder) -> a fresh copy of it, in the place of the last one."""
    base = tmp_path_factory.mktemp("mutated")

    def copy(folder):
        shutil.rmtree(base / "it", ignore_errors=True)
        return Path(shutil.copytree(folder, base / "it"))

    return copy


def use(folder):
    """Load a checkpoint and try all that it can do."""
    lm = TinyLM.from_pretrained(folder)
    ids = torch.tensor([[3, 5, 7]])
    if lm.config.head == "lm":
        for options in (dict(), dict(temperature=1.0, top_p=0.9, seed=1), dict(num_beams=2)):
            lm.generate(ids, max_new_tokens=2, **options)
        if lm.tokenizer:
            list(lm.stream("ab", max_new_tokens=2))
    else:
        lm(ids)
    lm.save_pretrained(folder.with_name("again"))


FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
]


@fuzz(
    120,
    name=st.sampled_from(["ours", "gpt2", "bert-classify"]),
    file=st.sampled_from(FILES),
    data=st.data(),
)
def test_bytes_that_are_cut_flipped_or_put_in(name, file, data, made, place):
    folder = place(made[name])
    content = bytearray((folder / file).read_bytes())
    at = data.draw(st.integers(0, min(len(content) - 1, 4000)))  # headers are where a flip hurts
    how = data.draw(st.sampled_from(["cut", "flip", "put", "empty"]))
    if how == "cut":
        del content[at:]
    elif how == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "put":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    (folder / file).write_bytes(b"" if how == "empty" else content)
    ends(lambda: use(folder))


def values():
    """Of JSON: odd numbers and texts, alone or in lists and objects."""
    leaves = st.sampled_from([*NUMBERS, *ODD])
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*ODD, "rope_type", "factor", "rope_theta", "0", "full_attention"]),
                inner,
                max_size=3,
            )
        ),
        max_leaves=4,
    )


FIELDS = sorted(
    {key for row in pretrained.FAMILIES.values() for key in row.fields.values()}
    | {
        "model_type",
        "architectures",
        "rope_parameters",
        "num_labels",
        "sliding_window_pattern",
        "max_window_layers",
        "use_sliding_window",
        "a_field_of_tomorrow",
        "original_max_position_embeddings",
    }
    | {key for row in pretrained.FAMILIES.values() for key in row.only}
)


@pytest.mark.slow
@fuzz(
    250,
    name=st.sampled_from(
        ["ours", "gpt2", "qwen2", "gemma3_text", "bert-classify", "roberta-mlm", "t5", "marian"]
    ),
    changes=st.dictionaries(st.sampled_from(FIELDS), values(), min_size=1, max_size=2),
)
def test_absurd_values_in_config_json(name, changes, made, place):
    folder = place(made[name])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    ends(lambda: use(folder))


@pytest.mark.parametrize(
    "changes",
    [
        dict(pad_token_id=-1),
        dict(eos_token_id=-1, pad_token_id=None),
        dict(eos_token_id=9999, pad_token_id=9999),
    ],
    ids=str,
)
def test_ids_that_no_token_has(changes, made, place):
    """Guards a pad id of -1, which old files have for none, as an index of something."""
    folder = place(made["ours"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "generation_config.json").unlink()
    lm = TinyLM.from_pretrained(folder)
    for options in (dict(), dict(num_beams=2), dict(stop="x", eos_token_id=[*range(200)])):
        assert len(lm.generate(torch.tensor([[3], [5]]), max_new_tokens=4, **options)) == 2


@fuzz(
    60,
    changes=st.dictionaries(
        st.sampled_from(sorted(onnxlm.GENERATION)), values(), min_size=1, max_size=3
    ),
    name=st.sampled_from(["ours", "t5"]),
)
def test_absurd_values_in_generation_config_json(name, changes, made, place):
    folder = place(made[name])
    (folder / "generation_config.json").write_text(json.dumps(changes))
    ends(lambda: use(folder))


@pytest.mark.parametrize(
    "field",
    [
        "num_hidden_layers",
        "hidden_size",
        "head_dim",
        "vocab_size",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "sliding_window",
        "num_labels",
    ],
)
@pytest.mark.parametrize("value", [9999, 2**20, 2**31, 10**12])
def test_giant_sizes(field, value, made, place):
    """Refused before anything of that size is made."""
    for name in ("ours", "qwen2"):
        folder = place(made[name])
        config = json.loads((folder / "config.json").read_text())
        more = (
            dict(use_sliding_window=True, sliding_window=4, layer_types=None)
            if name == "qwen2"
            else {}
        )
        (folder / "config.json").write_text(json.dumps(config | more | {field: value}))
        ends(lambda: use(folder))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100000,
        '{"a":' * 100000,
        '{"model_type": ' + "[" * 900 + "]" * 900 + "}",
        "nul",
        '{"model_type": "llama"',
        '{"id2label": {' + ",".join(f'"{i}": "x"' for i in range(100000)) + "}}",
        '"' + "x" * 10**7 + '"',
        '{"model_type": "' + "x" * 10**7 + '"}',
        "\ufeff{}",
        "NaN",
        "1" * 5000,
    ],
)
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ],
)
def test_nested_and_giant_json(file, text, made, place):
    folder = place(made["ours"])
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(text)
    ends(lambda: use(folder))


@fuzz(
    60,
    changes=st.dictionaries(
        st.integers(0, 30),
        st.sampled_from(
            [
                "nan",
                "inf",
                "int64",
                "bool",
                "float16",
                "bfloat16",
                "float64",
                "float8_e4m3fn",
                "empty",
                "scalar",
                "more",
            ]
        ),
        min_size=1,
        max_size=3,
    ),
    name=st.sampled_from(["ours", "gpt2", "bert-classify", "t5"]),
)
def test_tensors_of_other_dtypes_shapes_and_values(name, changes, made, place):
    folder = place(made[name])
    tensors = load_file(folder / "model.safetensors")
    for place_, change in changes.items():
        key = sorted(tensors)[place_ % len(tensors)]
        if change in ("nan", "inf"):
            tensors[key] = torch.full_like(tensors[key], float(change))
        elif change in ("empty", "scalar"):
            tensors[key] = torch.zeros((0,) if change == "empty" else ())
        elif change == "more":
            tensors[key + ".more"] = torch.zeros(1)
        else:
            tensors[key] = tensors[key].clone().to(getattr(torch, change))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ends(lambda: use(folder))


@fuzz(
    40,
    file=st.sampled_from(
        [
            "../ours.safetensors",
            "/etc/passwd",
            "x/../model-1.safetensors",
            "model-2.safetensors",
            "model-1.safetensors\x00",
            "",
            ".",
            "config.json",
            None,
            3,
            ["model-1.safetensors"],
            "link.safetensors",
            "folder.safetensors",
            "\u202e.safetensors",
        ]
    ),
    data=st.data(),
)
def test_tricks_in_the_index_of_shards(file, data, made, place):
    """No shard outside of the folder is named by an index."""
    folder = place(made["ours"])
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    os.symlink("/dev/zero", folder / "link.safetensors")
    (folder / "folder.safetensors").mkdir()
    names = sorted(load_file(folder / "model-1.safetensors"))
    files = dict.fromkeys(names, "model-1.safetensors") | {
        data.draw(st.sampled_from([*names, "more"])): file
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert isinstance(ends(lambda: use(folder)), tinylm.Error)


# ---- chat templates -------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ' ~ marker) }}",
    "{{ messages.__class__.__base__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('x') }}",
    "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__['os'].popen('touch x').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ messages.append(3) }}",
    "{{ ''|attr('__class__') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ range(10 ** 12) }}",
    "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
    "{{ 'x' * 10 ** 8 }}",
]
BROKEN = [
    "{{",
    "{% for %}",
    "{{ 1 / 0 }}",
    "{{ messages[9].content }}",
    "{{ messages + 1 }}",
    "{{ raise_exception(3) }}",
    "{{ undefined.x }}",
    "{{ messages|nosuch }}",
    "(" * 5000,
    "{{ " + "(" * 5000 + " }}",
    "{% if 1 %}" * 5000,
    "{{ messages|tojson(indent=-1, x=2) }}",
    "{{ strftime_now(3) }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "\x00",
    "{{ '\ud83d' }}",
    3,
    [],
    [{"name": "default"}],
    [3],
    {"default": "x"},
    "x" * 10**7,
]


@pytest.fixture
def chatty(made, place):
    """chatty(template) -> a model with that chat template."""

    def make(template):
        folder = place(made["ours"])
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(
            json.dumps(tokenizer)
        )  # not our own file: `tokenizers` reads it
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template, "eos_token": "<|pad|>"})
        )
        return TinyLM.from_pretrained(folder)

    return make


@pytest.mark.parametrize(
    "template", ESCAPES + ENDLESS + BROKEN, ids=lambda template: str(template)[:50]
)
def test_chat_templates(template, chatty, tmp_path, monkeypatch):
    """They run in jinja2's sandbox, and what they write is bounded."""
    pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    before = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    lm = chatty(template)
    ends(lambda: "".join(lm.chat([{"role": "user", "content": "hi"}], max_new_tokens=2)))
    assert not list(tmp_path.iterdir()), "something was executed"
    assert (sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)) == before


# ---- data files -----------------------------------------------------------------------------------------------------

LINES = [
    "text,label\n",
    "a,b\n",
    '"a',
    "a\tb\n",
    '{"text": "a b", "label": "x"}\n',
    '{"text": 3}\n',
    "{}\n",
    "[]\n",
    "null\n",
    '{"messages": [{"role": "user", "content": "a"}]}\n',
    '{"messages": [3]}\n',
    '{"text": ["a"], "tags": ["b", "c"]}\n',
    "\x00",
    "\n",
    "\r",
    "\ufeff",
    "\x1a",
    "x",
    " ",
    '{"source": "a", "target": "b"}\n',
    "9" * 5000 + "\n",
    '{"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [99]}}\n',
    '{"text": "a", "label": 1e999}\n',
    '{"text": "a", "label": []}\n',
    '{"text": "a", "label": NaN}\n',
    "[" * 3000,
]
FLAT = ["train", "--steps", 1, "--size", "pico", "--batch", 2, "--block", 64, "--device", "cpu"]


@pytest.mark.slow
@fuzz(
    40,
    parts=st.lists(st.sampled_from(LINES) | st.text(max_size=20), max_size=6),
    raw=st.binary(max_size=3),
    suffix=st.sampled_from([".txt", ".jsonl", ".csv", ".tsv", ".json", ""]),
    task=st.sampled_from(["lm", "classify", "tokens", "qa", "seq2seq", "mlm"]),
)
def test_data_files(parts, raw, suffix, task, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("data")
    file, out = folder / f"data{suffix}", folder / "out"
    file.write_bytes("".join(parts).encode("utf-8", errors="surrogatepass") + raw)
    code = command(capsys, *FLAT, file, "--task", task, "--out", out)
    assert_whole(out, code)
    shutil.rmtree(folder)


def assert_whole(out, code):
    """What a run leaves is a checkpoint that loads, or nothing."""
    assert not list(out.parent.rglob("*.tmp"))
    for part in ("best", "last"):
        if (out / part).exists() and any((out / part).iterdir()):
            TinyLM.from_pretrained(out / part)
    assert code or (out / "best").exists()


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", b"x"),
        ("a.txt", b""),
        ("a.txt", b"no newline at the end" * 9),
        ("a.txt", b"\xff\xfe\xfd" * 50),
        ("a.txt", b"\0" * 300),
        ("a.txt", b"x" * 3 * 10**5),
        ("a.csv", b"text,label\n" + b"x" * 3 * 10**5 + b",a\n"),
        ("a.csv", b'text,label\n"' + b"x\n" * 10**5),
        ("a.jsonl", b'{"text": "' + b"x" * 3 * 10**5 + b'"}'),
        ("a.jsonl", b"{" * 10**6),
        ("a.jsonl", b"[" * 10**6),
        ("a.csv", b"\xff,\xfe\n\xfd,\xfc\n" * 9),
        ("a.csv", b"text,label\na,x\nb,x\nc,x\n"),
        ("a.csv", b"text,label\na,x\n"),
        ("a.csv", b"text\na\n"),
        ("a.csv", b"text,label\na\nb\n"),
        ("a.csv", b"text,label\na,b,c,d\n" * 4),
        ("a.json", b'{"data": 3}'),
        ("a.json", b'{"data": [{"paragraphs": [{"qas": [3], "context": "x"}]}]}'),
        ("a.bin", b"\x00\x01"),
        ("a.jsonl", b'{"text": "a", "label": "x", "text": null}\n' * 5),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("task", ["lm", "classify"])
def test_odd_files(name, content, task, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert_whole(
        tmp_path / "out",
        command(capsys, *FLAT, tmp_path / name, "--task", task, "--out", tmp_path / "out"),
    )


# ---- arguments ------------------------------------------------------------------------------------------------------

ARGUMENTS = [
    text for text in [*map(str, NUMBERS), *ODD] if "\x00" not in text
]  # which no argument can hold
NUMERIC = [
    "--steps",
    "--batch",
    "--block",
    "--vocab",
    "--lr",
    "--weight-decay",
    "--dropout",
    "--warmup",
    "--decay",
    "--clip",
    "--accumulate",
    "--lora",
    "--patience",
    "--seed",
    "--epochs",
    "--eval-every",
    "--held-back",
]
SAMPLED = [
    "--temperature",
    "--top-k",
    "--top-p",
    "--min-p",
    "--repetition-penalty",
    "--seed",
    "--max-new-tokens",
]


@pytest.mark.slow
@fuzz(
    60,
    flags=st.lists(
        st.tuples(
            st.sampled_from(
                NUMERIC
                + ["--task", "--size", "--init", "--freeze", "--text", "--device", "--nosuch"]
            ),
            st.sampled_from(ARGUMENTS),
        ),
        min_size=1,
        max_size=2,
    ),
)
def test_arguments_of_train(flags, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("train")
    (folder / "a.txt").write_text("one two three\n" * 30)
    more = [
        f"{flag}={value}"
        for flag, value in flags
        if flag not in ("--steps", "--epochs", "--batch", "--block", "--vocab") or large(value)
    ]
    code = command(capsys, *FLAT, folder / "a.txt", "--out", folder / "out", *more)
    assert_whole(folder / "out", code)
    shutil.rmtree(folder)


def large(value):
    """Not a number that asks for a lot of honest work."""
    try:
        return not 3 < float(value) < 2**31
    except ValueError:
        return True


@pytest.mark.slow
@fuzz(
    100,
    flags=st.lists(
        st.tuples(
            st.sampled_from(SAMPLED + ["--prompt", "--stop", "--device"]),
            st.sampled_from(ARGUMENTS),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_arguments_of_sample(flags, made, capsys):
    flags = [
        f"{flag}={value}" for flag, value in flags if flag != "--max-new-tokens" or large(value)
    ]
    command(capsys, "sample", made["ours"], "--max-new-tokens=2", *flags)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["nosuch"],
        ["train"],
        ["train", ""],
        ["train", "/nosuch"],
        ["run", "/nosuch", "x"],
        ["run", "."],
        ["eval", ".", "."],
        ["sample", "/etc/passwd"],
        ["chat", "/dev/null"],
        ["train", "/dev/null"],
        ["sample", "x" * 5000],
        ["train", ".", "--resume", "--out", "/nosuch"],
    ],
    ids=str,
)
def test_commands(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(capsys, *arguments) or arguments == ["--help"]
    assert not list(tmp_path.iterdir())
