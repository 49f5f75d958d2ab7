"""Two files are made to be copied alone: tinylm.py needs torch, einops and safetensors, onnxlm.py needs numpy,
onnxruntime and tokenizers. Importing them is cheap."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from families import CASES, ENCODERS, SEQ2SEQ

import onnxlm

# In front of a script: only the standard library and what is listed is found, as if nothing else were installed.
ALONE = """
import sys

class Only:
    finders = sys.meta_path[:]

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ALLOWED or name.startswith("_sysconfigdata"):
            return next((spec for f in self.finders if (spec := f.find_spec(name, path, target))), None)

sys.meta_path[:] = [Only()]
sys.path.insert(0, "")
"""
WHOLE_LIFE = """
import sys
import torch
from PLACE import tinylm

Config, MuonAdamW, TinyLM, train_step = tinylm.Config, tinylm.MuonAdamW, tinylm.TinyLM, tinylm.train_step

text = "what is vendored must work alone: größer 🙂\\n" * 40
torch.manual_seed(0)
lm = TinyLM(Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
optimizer = MuonAdamW(lm)
ids = torch.tensor([lm.tokenizer.encode(text)[:128]])
losses = [float(train_step(lm, optimizer, ids)) for _ in range(20)]
assert losses[-1] < losses[0] / 2, losses
lm.eval().save("copy")
copy = TinyLM.load("copy")
assert torch.equal(copy(ids), lm(ids))
assert copy.tokenizer.decode(copy.tokenizer.encode(text)) == text
assert copy.generate(ids[:, :8], max_new_tokens=5, temperature=1.0, seed=1).shape == (1, 13)
assert isinstance("".join(copy.stream("what is", max_new_tokens=5)), str)
foreign = {name.split(".")[0] for name in sys.modules} & {"numpy", "tokenizers", "transformers", "onnx", "tqdm"}
assert not foreign, foreign
"""


def requirements(*packages):
    """The top-level modules of packages and of what they require, optional extras left out."""
    modules_of = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            modules_of.setdefault(canonical(distribution), set()).add(module)
    found, queue = set(), list(packages)
    while queue:
        package = canonical(queue.pop())
        if package in found or package not in modules_of:
            continue
        found.add(package)
        for line in importlib.metadata.requires(package) or ():
            if "extra ==" not in line:
                queue.append(re.match(r"[\w.-]+", line)[0])
    return set().union(*(modules_of[package] for package in found))


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def python(script, folder):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def vendored(tmp_path):
    shutil.copy(ROOT / "tinylm.py", tmp_path)
    return tmp_path


def alone(script, folder, *packages, also):
    """Runs a script where only the standard library, packages with what they require, and modules `also` are found."""
    allowed = set(sys.stdlib_module_names) | requirements(*packages) | set(also)
    assert not allowed & {"transformers", "onnx"}
    run = python(f"ALLOWED = {sorted(allowed)!r}\n{ALONE}{script}", folder)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_alone_in_an_empty_folder(vendored):
    """Imports, trains, resumes, samples, saves and loads, where only its three requirements can be imported."""
    script = WHOLE_LIFE.replace("from PLACE import tinylm", "import tinylm")
    alone(script, vendored, "torch", "einops", "safetensors", also=["tinylm"])


def test_alone_in_a_package(tmp_path):
    """`from .vendor import tinylm`: nothing in the file asks for itself by its name."""
    vendor = tmp_path / "app" / "vendor"
    vendor.mkdir(parents=True)
    for folder in (vendor.parent, vendor):
        (folder / "__init__.py").touch()
    shutil.copy(ROOT / "tinylm.py", vendor)
    (vendor.parent / "work.py").write_text(WHOLE_LIFE.replace("PLACE", ".vendor"))
    alone("import app.work", tmp_path, "torch", "einops", "safetensors", also=["app"])


# One text of each kind of folder, a question with its context among them, from Python and as a command.
RUNTIME = """
import contextlib, io, json, runpy
from app.vendor import onnxlm

for folder, text in FOLDERS.items():
    parts = text.split("\\t")
    lm = onnxlm.OnnxLM(folder, providers=["CPUExecutionProvider"])
    [answers] = lm.run(parts[:1], parts[1:] or None)
    sys.argv = ["onnxlm.py", folder, text, "--json"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_path("onnxlm.py", run_name="__main__")
    print(json.dumps([folder, answers, json.loads(printed.getvalue())]))
assert "torch" not in sys.modules
"""
KINDS = {
    "bert-bare": "w9 w17 w30",
    "roberta-mlm": "w9 <mask> w30",
    "distilbert-classify": "w9 w17 w30",
    "electra-tokens": "w9 w17 w30",
    "bert-qa": "w9 w17\tw50 w9 w51 w52",
    "qwen3": "w9 w17 w30",
    "qwen3-classify": "w9 w17 w30",
    "t5": "w9 w17 w30",
}


def test_runtime_alone(exported_folder, tmp_path):
    """Every kind of exported folder, where numpy, onnxruntime and tokenizers are all that is installed: the answers
    are those given here."""
    vendor = tmp_path / "app" / "vendor"
    vendor.mkdir(parents=True)
    for folder in (tmp_path, vendor):
        shutil.copy(ROOT / "onnxlm.py", folder)
    folders = {str(exported_folder(name)): text for name, text in KINDS.items()}
    (runtime,) = {"onnxruntime", "onnxruntime-gpu"} & set(
        importlib.metadata.packages_distributions()["onnxruntime"]
    )
    packages = ("numpy", runtime, "tokenizers")
    printed = alone(
        f"FOLDERS = {folders!r}\n{RUNTIME}", tmp_path, *packages, also=["app", "onnxlm"]
    )
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [folder for folder, *_ in lines] == list(folders)
    for folder, answers, line in lines:
        text = folders[folder]
        parts = text.split("\t")
        lm = onnxlm.OnnxLM(folder, providers=["CPUExecutionProvider"])
        assert [answers] == lm.run(parts[:1], parts[1:] or None), folder
        assert line == {"input": text, "output": answers}, folder


def says(script, folder, *packages, also):
    """The one line on stderr of a script whose Error is its exit message, where no more is installed than `packages`."""
    allowed = set(sys.stdlib_module_names) | requirements(*packages) | set(also)
    run = python(f"ALLOWED = {sorted(allowed)!r}\n{ALONE}{script}", folder)
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    return run.stderr


OPENED = """
import tinylm
tinylm.TinyLM(tinylm.Config(hidden_size=32, num_hidden_layers=1)).save("m")
open("m/tokenizer.json", "w").write("{}")
open("m.gguf", "w").write("not GGUF")
try:
    tinylm.TinyLM.from_pretrained("m")
except tinylm.Error as error:
    sys.exit(str(error))
"""


def test_what_is_missing_is_named(vendored):
    """Without pretrained.py a checkpoint is one line that says what to copy, as a GGUF file is without gguf_file.py;
    without `tokenizers` a checkpoint with a tokenizer.json says what to install."""
    said = says(OPENED, vendored, "torch", "einops", "safetensors", also=["tinylm"])
    assert "pretrained.py is missing: copy it beside tinylm.py" in said
    for name in ("pretrained.py", "onnxlm.py"):
        shutil.copy(ROOT / name, vendored)
    packages = ("torch", "einops", "safetensors", "numpy")
    three = ["tinylm", "pretrained", "onnxlm"]
    said = says(OPENED, vendored, *packages, also=three)
    assert "pip install tokenizers" in said
    opened = OPENED.replace('from_pretrained("m")', 'from_pretrained("m.gguf")')
    said = says(opened, vendored, *packages, also=three)
    assert said.strip() == "gguf_file.py is missing: copy it beside tinylm.py"
    shutil.copy(ROOT / "gguf_file.py", vendored)
    said = says(opened, vendored, *packages, also=[*three, "gguf_file"])
    assert said.strip() == "m.gguf: reading it needs `pip install gguf`"


# Every family's folder through the three files, and what was saved through them again.
THREE_FILES = """
import torch
from PLACE import pretrained, tinylm

for i, folder in enumerate(FOLDERS):
    lm = tinylm.TinyLM.from_pretrained(folder)
    lm.save_pretrained(f"copy-{i}")
    again = tinylm.TinyLM.from_pretrained(f"copy-{i}")
    assert again.config == lm.config
    for name, tensor in lm.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), (folder, name)
assert tinylm.TinyLM.from_pretrained(SHIPPED).tokenizer.encode("hello")
assert pretrained.load_tokenizer(SHIPPED).decode(pretrained.load_tokenizer(SHIPPED).encode("hello")) == "hello"
slow = {"transformers", "onnx", "onnxruntime", "train", "data", "gguf", "sympy"}  # sympy: with torch._dynamo
assert not {name.split(".")[0] for name in sys.modules} & slow
"""


@pytest.mark.parametrize("place", ["top", "package"])
def test_three_files_load_and_save_every_family(folder, tmp_path, place):
    """tinylm.py, pretrained.py and onnxlm.py side by side, in a folder and inside somebody's package."""
    cases = {case.name.partition("-")[0]: case for case in CASES + ENCODERS + SEQ2SEQ}
    folders = [str(folder(case)) for case in cases.values()]
    target = tmp_path if place == "top" else tmp_path / "app" / "vendor"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tinylm.py", "pretrained.py", "onnxlm.py"):
        shutil.copy(ROOT / name, target)
    script = THREE_FILES.replace(
        "from PLACE import pretrained, tinylm", "import pretrained, tinylm"
    )
    if place == "package":
        script = THREE_FILES.replace("PLACE", "app.vendor")
    script = f"FOLDERS, SHIPPED = {folders!r}, {str(ROOT / 'weights')!r}\n{script}"
    packages = ("torch", "einops", "safetensors", "numpy", "tokenizers")
    alone(script, tmp_path, *packages, also=["app", "tinylm", "pretrained", "onnxlm"])


def test_importing_is_cheap(vendored):
    """Under 0.3 s on top of torch, and none of the large modules that only some calls need."""
    script = """
import sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import tinylm
print(time.perf_counter() - start, *(set(sys.modules) - before))
"""
    runs = [python("import sys; sys.path.insert(0, '')" + script, vendored) for _ in range(2)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert (
        min(float(run.stdout.split()[0]) for run in runs) < 0.3
    )  # the best of two: other programs run too
    new = runs[0].stdout.split()[1:]
    for heavy in (
        "torch._dynamo",
        "torch._inductor",
        "onnx",
        "onnxruntime",
        "tokenizers",
        "transformers",
        "jinja2",
    ):
        assert not any(name == heavy or name.startswith(heavy + ".") for name in new), heavy
