"""Training from scratch: the command, what it writes, resuming bit for bit, and `train_step` on its own."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from families import FAMILIES, difference, load_oracle, prompts, ragged
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tinylm import Config, TinyLM, train_step
from train import main

TEXT = "".join(f"Zeile {i % 17}: größer, naïve — 日本 🙂 {i * i % 23}\n" for i in range(160))
TINY = ["--size", "nano", "--batch", "4", "--block", "32"]


def tinylm(*arguments):
    """The command in this process: its exit status and what it prints."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main([*map(str, arguments)])
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=error.getvalue())


def finished(run):
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """An uninterrupted run with dropout, so that every state that a resume must restore is in use."""
    out = tmp_path_factory.mktemp("trained")
    run = finished(
        tinylm(
            "train", text, "--out", out, *TINY, "--steps", 60, "--eval-every", 15, "--dropout", 0.1
        )
    )
    return out, run.stderr


def same_files(one, other):
    one, other = load_file(one), load_file(other)
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# ---- the command ----------------------------------------------------------------------------------------------------


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
        tinylm(
            "train",
            text,
            "--out",
            out,
            *TINY,
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
        *TINY,
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
    assert run.wait(60) in (0, 130) and "Traceback" not in rest
    assert not same_files(
        out / "last" / "model.safetensors", trained[0] / "last" / "model.safetensors"
    ), "too late"
    TinyLM.from_pretrained(out / "last")
    log = finished(
        tinylm("train", text, "--out", out, "--resume")
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
    finished(tinylm("train", data, "--out", out, *TINY, "--steps", 4, "--vocab", 300))
    ours, theirs = TinyLM.from_pretrained(out / "best"), AutoTokenizer.from_pretrained(out / "best")
    line = TEXT.splitlines()[3]
    ids = ours.tokenizer.encode(line)
    assert len(ids) < len(line.encode()) and max(ids) < 300 <= ours.config.vocab_size
    assert ids == theirs.encode(line) and ours.tokenizer.decode(ids) == line == theirs.decode(ids)
    for text in ("unseen: Ω≈ç√∫", "\x00\n\t  x"):
        assert ours.tokenizer.decode(ours.tokenizer.encode(text)) == text
    run = finished(
        tinylm("sample", out / "best", "--prompt", line, "--max-new-tokens", 5, "--seed", 1)
    )
    assert (
        run.stdout.startswith(line)
        and run.stdout
        == finished(
            tinylm("sample", out / "best", "--prompt", line, "--max-new-tokens", 5, "--seed", 1)
        ).stdout
    )


def test_folder_of_texts(tmp_path):
    """Every text file below the folder is read, so what only the last one holds is known."""
    for i, part in enumerate((TEXT, TEXT)):
        (tmp_path / "data" / str(i)).mkdir(parents=True)
        (tmp_path / "data" / str(i) / "part.txt").write_text(part, encoding="utf-8")
    assert (
        main(
            ["train", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *TINY, "--steps", "2"]
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
        run = tinylm(*arguments)
        assert run.returncode == 1 and run.stdout == ""
        assert (
            "Traceback" not in run.stderr
            and run.stderr.count("\n") == 1
            and str(tmp_path) in run.stderr
        )


# ---- train_step -----------------------------------------------------------------------------------------------------


def overfit(batch, steps=150):
    torch.manual_seed(0)
    lm = TinyLM(Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    losses = [train_step(lm, optimizer, batch) for _ in range(steps)]
    assert all(
        isinstance(loss, torch.Tensor) and loss.shape == () and not loss.requires_grad
        for loss in losses
    )
    assert losses[0] > 3.5 and losses[-1] < 0.05
    return lm.eval()


def test_train_step_overfits_a_batch():
    batch = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    lm = overfit(batch)
    assert torch.equal(lm.generate(batch[:, :8], max_new_tokens=8, eos_token_id=()), batch)


def test_train_step_overfits_a_padded_batch_with_labels():
    """Only what is labelled is learnt: the other tokens, replaced in the prompt, come out at chance."""
    rows = [
        torch.randint(64, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 16, 12)
    ]
    batch, mask = ragged(rows, ["left", "right", "right"])
    batch = batch % 64
    labels = batch.masked_fill(mask == 0, -100)
    labels[1, :8] = -100
    lm = overfit(dict(input_ids=batch, attention_mask=mask, labels=labels))
    with torch.no_grad():
        right = lm(batch, mask)[:, :-1].argmax(-1) == labels[:, 1:]
    assert right[
        (labels[:, 1:] != -100) & (mask[:, :-1] == 1)
    ].all()  # behind padding there is nothing to learn from
    with torch.no_grad():
        assert (lm(batch, mask)[1, :7].argmax(-1) == batch[1, 1:8]).float().mean() < 0.5


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_a_step_is_the_step_of_transformers(case, folder, tmp_path):
    """The loss, and every weight after a step of SGD, in a padded batch with labels: gradients flow as there."""
    ours, oracle = TinyLM.from_pretrained(folder(case)), load_oracle(folder(case))
    batch, mask = ragged([prompts(case, n, seed=n) for n in (12, 7)], ["right", "right"])
    labels = batch.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    ours_optimizer, theirs = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (ours, oracle))
    loss = train_step(
        ours, ours_optimizer, dict(input_ids=batch, attention_mask=mask, labels=labels)
    )
    reference = oracle(input_ids=batch, attention_mask=mask, labels=labels).loss
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    reference.backward()
    torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
    theirs.step()
    ours.save_pretrained(tmp_path)
    ours, before = load_oracle(tmp_path).state_dict(), load_oracle(folder(case)).state_dict()
    moved = oracle.state_dict()
    scale = max((moved[name] - before[name]).abs().max() for name in moved)
    for name in moved:
        assert ((ours[name] - moved[name]).abs().max() / scale).item() < 1e-4, name


@pytest.mark.parametrize("labelled", [False, True])
def test_accumulation_is_one_large_batch(labelled, folder):
    """Parts weigh by their labels, and a part that has none adds nothing (its mean would be 0 / 0)."""
    case = FAMILIES[1]
    batch = {"input_ids": prompts(case, 4, 12)}
    if labelled:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][0, :7] = batch["labels"][2:] = -100
    models = [TinyLM.from_pretrained(folder(case)) for _ in range(2)]
    losses = [
        train_step(lm, torch.optim.SGD(lm.parameters(), lr=1.0), batch, accumulate=parts)
        for lm, parts in zip(models, (1, 4))
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for one, other in zip(*(lm.parameters() for lm in models)):
        assert torch.isfinite(other).all() and (one - other).abs().max() < 1e-5
