"""Training from scratch on texts: the command, what it writes, and resuming bit for bit."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from families import difference, load_oracle
from helpers import NANO, TEXT, finished, run_command, same_files
from transformers import AutoTokenizer

from tinylm import TinyLM
from train import main


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """An uninterrupted run with dropout, so that every state that a resume must restore is in use."""
    out = tmp_path_factory.mktemp("trained")
    run = finished(
        run_command(
            "train", text, "--out", out, *NANO, "--steps", 60, "--eval-every", 15, "--dropout", 0.1
        )
    )
    return out, run.stderr


def test_training_reports_and_improves(trained):
    """On a pipe it is plain lines: no carriage return. Validation is in nats and in bits per byte."""
    _, log = trained
    assert "\r" not in log and re.search(r"tok/s", log) and re.search(r"ETA", log)
    found = re.findall(r"step (\d+)\s+validation ([\d.]+) nats/token\s+([\d.]+) bits/byte", log)
    assert [int(step) for step, *_ in found] == [15, 30, 45, 60]
    nats = [float(value) for _, value, _ in found]
    assert nats[-1] < nats[0] < 5.0
    for _, value, bits in found:  # tokens are bytes here
        assert float(bits) == pytest.approx(float(value) / 0.693147, abs=1e-3)


def test_nothing_is_pickled(trained):
    out, _ = trained
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {out, out / "best", out / "last"}
    known = {".json", ".safetensors", ".jinja", ".txt", ".jsonl", ".md", ".svg"}
    assert {path.suffix for path in files} <= known


@pytest.mark.parametrize("which", ["best", "last"])
def test_checkpoint_is_a_qwen3_that_transformers_continues_identically(which, trained):
    folder = trained[0] / which
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"
    ours, oracle, tokenizer = (
        TinyLM.from_pretrained(folder),
        load_oracle(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = torch.tensor([ours.tokenizer.encode("Zeile 3: größer 🙂")])
    assert tokenizer("Zeile 3: größer 🙂", return_tensors="pt").input_ids.tolist() == ids.tolist()
    with torch.no_grad():
        assert difference(ours(ids), oracle(ids).logits) < 1e-5
    theirs = oracle.generate(ids, max_new_tokens=20, do_sample=False)
    assert ours.generate(ids, max_new_tokens=20).tolist() == theirs.tolist()
    assert ours.tokenizer.decode(theirs[0]) == tokenizer.decode(theirs[0], skip_special_tokens=True)


def test_best_has_the_lowest_validation_loss(text, tmp_path):
    """Guards a best that is just the last: with these rates the loss gets worse after the first steps."""
    out = tmp_path / "out"
    log = finished(
        run_command(
            "train",
            text,
            "--out",
            out,
            *NANO,
            "--steps",
            24,
            "--eval-every",
            8,
            "--lr",
            3.0,
            "--adam-lr",
            3.0,
            "--warmup",
            0.9,
            "--decay",
            0.0,
        )
    ).stderr
    nats = [float(value) for value in re.findall(r"validation ([\d.]+) nats", log)]
    assert len(nats) == 3 and min(nats) < nats[-1]
    assert not same_files(out / "best" / "model.safetensors", out / "last" / "model.safetensors")


@pytest.mark.slow
def test_interrupted_and_resumed_is_the_uninterrupted_run(text, trained, tmp_path):
    """Ctrl-C saves and leaves quietly; --resume then ends with the same bits: weights, optimizer, best."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        ROOT / "train.py",
        "train",
        text,
        "--out",
        out,
        *NANO,
        "--steps",
        "60",
        "--eval-every",
        "15",
        "--dropout",
        "0.1",
    ]
    run = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    for line in run.stderr:
        if re.search(r"step 15\s+validation", line):
            run.send_signal(signal.SIGINT)
            break
    rest = run.stderr.read()
    assert run.wait(60) == 130 and "Traceback" not in rest
    assert not same_files(
        out / "last" / "model.safetensors", trained[0] / "last" / "model.safetensors"
    ), "too late"
    TinyLM.from_pretrained(out / "last")
    log = finished(
        run_command("train", text, "--out", out, "--resume")
    ).stderr  # options are those of the run
    for file in trained[0].rglob("*.safetensors"):
        assert same_files(file, out / file.relative_to(trained[0])), file
    final = r"step 60\s+validation .*"
    assert re.search(final, log)[0] == re.search(final, trained[1])[0]


def test_resume_with_other_options_is_refused(text, trained, tmp_path, capsys):
    assert main(["train", str(text), "--out", str(trained[0]), "--resume", "--batch", "8"]) == 1
    error = capsys.readouterr().err
    assert "--batch" in error and error.count("\n") == 1
    assert main(["train", str(text), "--out", str(tmp_path / "none"), "--resume"]) == 1
    assert "none" in capsys.readouterr().err


@pytest.mark.slow
def test_jsonl_and_a_vocabulary_of_its_own(tmp_path):
    """Rows of jsonl, a byte-level BPE trained on them, and a sample from what that made."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text(
        "\n".join(json.dumps({"text": line, "id": 1}) for line in TEXT.splitlines()),
        encoding="utf-8",
    )
    finished(run_command("train", data, "--out", out, *NANO, "--steps", 4, "--vocab", 300))
    ours, theirs = TinyLM.from_pretrained(out / "best"), AutoTokenizer.from_pretrained(out / "best")
    line = TEXT.splitlines()[3]
    ids = ours.tokenizer.encode(line)
    assert len(ids) < len(line.encode()) and max(ids) < 300 <= ours.config.vocab_size
    assert ids == theirs.encode(line) and ours.tokenizer.decode(ids) == line == theirs.decode(ids)
    for text in ("unseen: Ω≈ç√∫", "\x00\n\t  x"):
        assert ours.tokenizer.decode(ours.tokenizer.encode(text)) == text
    run = finished(
        run_command("sample", out / "best", "--prompt", line, "--max-new-tokens", 5, "--seed", 1)
    )
    assert (
        run.stdout.startswith(line)
        and run.stdout
        == finished(
            run_command(
                "sample", out / "best", "--prompt", line, "--max-new-tokens", 5, "--seed", 1
            )
        ).stdout
    )


def test_folder_of_texts(tmp_path):
    """Every text file below the folder is read, so what only the last one holds is known."""
    for i, part in enumerate((TEXT, TEXT)):
        (tmp_path / "data" / str(i)).mkdir(parents=True)
        (tmp_path / "data" / str(i) / "part.txt").write_text(part, encoding="utf-8")
    assert (
        main(
            ["train", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *NANO, "--steps", "2"]
        )
        == 0
    )
    assert (tmp_path / "out" / "last" / "model.safetensors").exists()


BAD = {
    "missing file": ["nowhere.txt"],
    "empty file": ["empty.txt"],
    "shorter than a block": ["short.txt"],
    "jsonl without text": ["bad.jsonl"],
    "empty folder": ["folder"],
    "--steps": ["good.txt", "--steps", "0"],
    "--batch": ["good.txt", "--batch", "-4"],
    "--block": ["good.txt", "--block", "0"],
    "--lr": ["good.txt", "--lr", "nan"],
    "--size": ["good.txt", "--size", "giant"],
    "--vocab": ["good.txt", "--vocab", "100"],
    "--accumulate": ["good.txt", "--batch", "4", "--accumulate", "3"],
    "--dropout": ["good.txt", "--dropout", "1.5"],
    "--eval-every": ["good.txt", "--eval-every", "0"],
    "--device": ["good.txt", "--device", "abacus"],
    "--weight-decay": ["good.txt", "--weight-decay", "-1"],
    "--out": ["good.txt", "--out", "good.txt"],
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(what, tmp_path, capsys, monkeypatch):
    """One line that names the file or the option; nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text(TEXT)
    Path("empty.txt").touch()
    Path("short.txt").write_text("short")
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"content": "not so"}\n')
    Path("folder").mkdir()
    data, *options = BAD[what]
    assert main(["train", data, "--steps", "2", "--block", "32", *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and (what if what.startswith("-") else data) in error
    assert not Path("out").exists()


def test_errors_of_the_command_have_no_traceback(tmp_path):
    for arguments in (
        ["train", tmp_path / "nowhere.txt"],
        ["sample", tmp_path],
        ["chat", tmp_path / "nowhere"],
    ):
        run = run_command(*arguments)
        assert run.returncode == 1 and run.stdout == ""
        assert (
            "Traceback" not in run.stderr
            and run.stderr.count("\n") == 1
            and str(tmp_path) in run.stderr
        )
