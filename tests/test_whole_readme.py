"""README.md and docs/: short enough to read, and what they name is there."""

import contextlib
import io
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import train
from onnxlm import OnnxLM

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")
}
OTHERS = set(  # options of pip, hf, torchrun, g++ and pytest
    """--index-url --repo-type --local-dir --standalone --nproc-per-node --nnodes --rdzv-backend --rdzv-endpoint
    --max-restarts --check""".split()
)


def code(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


def test_the_readme_is_read_in_a_sitting():
    assert README.count("\n") <= 200 and len(README) <= 11_000
    assert all(f"]({name}" in README for name in PAGES if name.startswith("docs/"))


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_lead_somewhere(name):
    """Tests were renamed and the pages still named the old ones."""
    page = PAGES[name]
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    for path in re.findall(r"\b(?:tests|weights|docs)/[\w*./-]*[\w*/]", page):
        assert list(ROOT.glob(path)), path


def test_options_exist():
    helps = []
    for command in ("train", "eval", "run", "sample", "chat", "export"):
        with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
            train.main([command, "--help"])
        helps.append(text.getvalue())
    benches = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/bench/*.py"))
    known = OTHERS | set(re.findall(r"--[a-z][a-z0-9-]*", " ".join(helps) + benches))
    named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", " ".join(PAGES.values()))
    assert set(named) <= known, set(named) - known


def test_processes_share_what_onnxruntime_made_of_the_weights(rounded, tmp_path, monkeypatch):
    (example,) = code("python", PAGES["docs/runtimes.md"])
    _, folder = rounded("qwen3")
    (tmp_path / "smollm2").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    ids = np.array([[5, 7, 9]])
    texts = [
        OnnxLM(path, "int4", providers=["CPUExecutionProvider"]).generate(ids, max_new_tokens=20)
        for path in ("smollm2", "smollm2-here")
    ]
    assert np.array_equal(*texts)
    weights = tmp_path / "smollm2-here" / "onnx" / "model_q4.onnx_data"
    assert weights.stat().st_size > (folder / "onnx" / "model_q4.onnx").stat().st_size


@pytest.mark.slow
def test_python_examples_run(tmp_path, smollm2, minilm):
    """Every Python example of the README, in its order, in one folder, as a script inside a clone."""
    from export import export_onnx

    for name in ("tinylm", "pretrained", "gguf_file", "onnxlm", "data", "train", "export"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "HuggingFaceTB").mkdir()
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(smollm2)
    export_onnx(smollm2, tmp_path / "smollm2", precisions=["int8"], text=README)
    (tmp_path / "rows.csv").write_text("text,label\n" + "good,pos\nbad,neg\n" * 10)
    options = ("--task", "classify", "--init", str(minilm), "--steps", "1")
    train.main(["train", str(tmp_path / "rows.csv"), *options, "--out", str(tmp_path / "reviews")])
    export_onnx(tmp_path / "reviews" / "best", tmp_path / "reviews-onnx")
    for example in code("python"):
        script = example.replace("from tinylm.", "from ")
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        for answer in re.findall(r"^print.*#  (.*)$", example, re.M):
            assert answer in done.stdout
    assert {"copy", "squared", "squared-onnx"} <= {path.name for path in tmp_path.iterdir()}
