"""What pip installs: on which platforms, which modules under which names, with the model that the commands name."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

PLATFORMS = {
    "linux": "x86_64-unknown-linux-gnu",
    "linux-arm": "aarch64-unknown-linux-gnu",
    "mac": "aarch64-apple-darwin",
    "windows": "x86_64-pc-windows-msvc",
}

# Each command once, in one process, from a folder with modules of the user's own.
COMMANDS = """
import io, sys
from importlib.metadata import entry_points

[script] = entry_points(group="console_scripts", name="tinylm")
main = script.load()

def tinylm(*arguments, stdin=""):
    sys.stdin = io.StringIO(stdin)
    assert not main(list(arguments)), arguments

try:
    main(["--version"])
except SystemExit as end:
    assert end.code == 0
tinylm("train", "my.txt", "--steps", "2", "--size", "pico", "--block", "16", "--batch", "2")
tinylm("eval", "out/best", "my.txt", "--json")
tinylm("run", "out/best", "Once", "--max-new-tokens", "2")
tinylm("sample", "--max-new-tokens", "2")
open("out/best/chat_template.jinja", "w").write("{% for m in messages %}{{ m.content }}{% endfor %}")
tinylm("chat", "out/best", "--max-new-tokens", "2", stdin="hello\\n")
tinylm("export", "--safetensors", "--out", "shipped")

import train, export, tinylm as library, onnxlm
assert train.MINE and export.MINE
open("bad.gguf", "w").write("not GGUF")
try:
    library.TinyLM.from_pretrained("bad.gguf")
except library.Error as error:
    assert "not a readable GGUF file" in str(error)
print(library.__file__, onnxlm.__file__)
"""

# The public API as somebody writes it who lets mypy look at his code. (torch itself is left out: reading it takes mypy
# half a minute.)
APP = """
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import onnxlm
import tinylm
from tinylm import Config, MuonAdamW, TinyLM, pretrained, train_step
from tinylm.train import TrainOptions, predict, train

config: Config = Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
width: int = config.hidden_size
lm: TinyLM = TinyLM(config)
optimizer = MuonAdamW(lm)
ids = torch.zeros(2, 8, dtype=torch.long)
loss = train_step(lm, optimizer, ids)
loss = train_step(lm, optimizer, {"input_ids": ids, "labels": ids})
logits = lm(ids)
new = lm.generate(ids, max_new_tokens=4, temperature=0.8, seed=1)
pieces: Iterator[str] = lm.stream("Once", max_new_tokens=4)
answer: str = "".join(lm.chat([{"role": "user", "content": "hello"}]))
lm.save_pretrained("copy")
lm = TinyLM.from_pretrained(Path("copy"))
config = pretrained.config_from_hf({"model_type": "qwen3"})
tokenizer = pretrained.load_tokenizer("copy")
if tokenizer is not None:
    tokens: list[int] = tokenizer.encode("hello")
    text: str = tokenizer.decode(tokens)
    text = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
model = onnxlm.OnnxLM("exported")
array: np.ndarray = model.generate(np.zeros((1, 4), np.int64), max_new_tokens=4)
for piece in model.stream("Once", max_new_tokens=4):
    text = piece + text
try:
    best: TinyLM = train("data.txt", TrainOptions(steps=10))
    found: list[list[dict]] = predict(best, ["a text"], batch=8)
except (tinylm.Error, onnxlm.Error) as error:
    text = str(error)
"""


@pytest.mark.parametrize(
    "platform, python",
    [
        ("linux", "3.11"),
        ("linux", "3.14"),
        ("linux-arm", "3.11"),
        ("mac", "3.11"),
        ("windows", "3.14"),
    ],
)
def test_every_platform_has_wheels(platform, python):
    """onnxruntime-gpu has none for macOS, nor for Linux on ARM: the plain package is taken there."""
    uv = shutil.which(
        "uv", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    )
    if uv is None:
        pytest.skip("uv is not installed")
    options = "--extra export --no-build --no-annotate --no-header --quiet"
    run = subprocess.run(
        [uv, "pip", "compile", "pyproject.toml", *options.split()]
        + ["--python-platform", PLATFORMS[platform], "--python-version", python],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ
        | {"MACOSX_DEPLOYMENT_TARGET": "14.0", "UV_HTTP_RETRIES": "0"}
        | ({"SSL_CERT_FILE": os.environ["PIP_CERT"]} if "PIP_CERT" in os.environ else {}),
    )
    if "Failed to fetch" in run.stderr or "error sending request" in run.stderr:
        pytest.skip(f"the package index is not reachable: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    packages = {line.split("==")[0] for line in run.stdout.splitlines()}
    runtime = "onnxruntime-gpu" if platform in ("linux", "windows") else "onnxruntime"
    assert packages & {"onnxruntime", "onnxruntime-gpu"} == {runtime}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What a wheel of this checkout puts into site-packages."""
    builder = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("site-packages")
    [wheel] = builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_a_wheel_takes_only_names_of_its_own(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"tinylm", "onnxlm"}
    ours = {path.stem for path in ROOT.glob("*.py")} - {"tinylm", "onnxlm"}
    assert {path.stem for path in (installed / "tinylm").glob("*.py")} == ours | {"__init__"}


def test_the_runtime_is_a_module(installed, tmp_path):
    """A package without __main__ cannot be run by `python -m onnxlm`."""
    run = subprocess.run(
        [sys.executable, "-m", "onnxlm", "nosuch", "text"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    assert run.returncode == 1 and run.stderr.startswith("onnxlm: error: nosuch"), run.stderr


@pytest.mark.slow
def test_installed_commands(installed, tmp_path):
    """Every command runs from an empty folder, the shipped model is there, and a user's train.py stays the user's."""
    for name in ("train", "export"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "my.txt").write_text("what is packed must be there when it is unpacked\n" * 20)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMANDS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("tinylm 0.") and "ROMEO:" in run.stdout
    library, runtime = run.stdout.split()[-2:]
    assert library == str(installed / "tinylm" / "__init__.py")
    assert runtime == str(installed / "onnxlm" / "__init__.py")
    tokenizers = [folder / "tokenizer.json" for folder in (tmp_path / "shipped", ROOT / "weights")]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


@pytest.mark.slow
def test_annotations_reach_type_checkers(installed, tmp_path):
    """mypy accepts right calls of the public API, and sees the wrong type of an argument."""
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n"
    )
    (tmp_path / "right.py").write_text(APP)
    (tmp_path / "wrong.py").write_text("import tinylm\ntinylm.Config(hidden_size='64')\n")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--cache-dir",
            str(tmp_path / "cache"),
            "right.py",
            "wrong.py",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"MYPYPATH": str(installed)},
    )
    errors = run.stdout.strip().splitlines()[:-1]
    assert len(errors) == 1 and errors[0].startswith("wrong.py:2: error: Argument"), run.stdout
