"""OnnxLM.run and the command of onnxlm.py, task by task: the answers of tinylm's, without torch."""

import io
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from families import READERS
from helpers import CPU

import onnxlm
import train
from export import OnnxLM


@pytest.mark.parametrize("name", READERS[:5] + ["t5"])
def test_run_says_what_the_command_of_tinylm_says(name, folder, exported_pair, capsys):
    inputs = ["w9 w17 w30 w8", "w5 w6 w7 w11 w12 w13 w99"]
    inputs = {
        "bert-qa": [text + "\tw50 w9 w51 w52 w8 w53" for text in inputs],
        "roberta-mlm": ["w9 <mask> w30", "<mask> w8 w7 <mask> w3"],
    }.get(name, inputs)
    _, _, out = exported_pair(name)
    capsys.readouterr()
    assert train.main(["run", str(out), *inputs, "--json", "--max-new-tokens", "20"]) == 0
    theirs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert onnxlm.main([str(out), *inputs, "--json", "--max-new-tokens", "20"]) == 0
    ours = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(ours) == 2 and all(row["output"] for row in ours)
    for row, other in zip(ours, theirs, strict=True):
        assert row["input"] == other["input"]
        for one, two in zip(row["output"], other["output"], strict=True):
            assert {k: v for k, v in one.items() if isinstance(v, (str, int))} == {
                k: v for k, v in two.items() if isinstance(v, (str, int))
            }
            for key in {"score", "embedding"} & set(two):
                assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5)


def test_long_contexts_are_read_in_windows(exported_pair):
    _, onnx_lm, _ = exported_pair("bert-qa")  # of 37 positions
    context = " ".join(f"w{5 + i * 7 % 190}" for i in range(90))
    ((found,),) = onnx_lm.run(["w9 w8"], [context])
    assert found["answer"] == context[found["start"] : found["end"]] != ""
    with pytest.raises(ValueError, match="expected a context"):
        onnx_lm.run(["w9 w8"])


def test_run_needs_no_torch(exported_pair, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text\nw9 w8\n")
    script = f"""
import sys
for name in ("torch", "tinylm", "onnx", "transformers", "safetensors", "einops", "pyarrow", "tqdm"):
    sys.modules[name] = None
import onnxlm
onnxlm.main([{str(exported_pair("distilbert-classify")[2])!r}, "w9 w8"])
onnxlm.main([{str(exported_pair("t5")[2])!r}, "w9"])
onnxlm.main([{str(exported_pair("distilbert-classify")[2])!r}, {str(rows)!r}, "--out", "{rows}.jsonl"])
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 2, run.stderr
    assert json.loads((tmp_path / "rows.csv.jsonl").read_text())["text"] == "w9 w8"


def test_a_tab_divides_only_what_has_two_parts(exported_pair, capsys, monkeypatch):
    """Guards a text cut at its tab, and lines cut at a form feed."""
    _, onnx_lm, out = exported_pair("electra-tokens")
    text = "w5 w6\tw7\x0cw8"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text + "\n\nw9\n"))
    assert onnxlm.main([str(out), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["input"] for line in lines] == [text, "w9"]
    assert [line["output"] for line in lines] == onnx_lm.run([text, "w9"])


def test_an_empty_text_is_a_text(exported_pair, tmp_path):
    """Guards a batch lost to a text of no tokens, where a tokenizer has no specials."""
    _, _, folder = exported_pair("qwen3-classify")
    out = shutil.copytree(folder, tmp_path / "out")
    content = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    found = OnnxLM(out, providers=CPU).run(["", "w5 w6"])
    assert len(found) == 2 and all(answer["score"] >= 0 for answer in found[0])
