"""Two processes under torchrun, on the CPU: the curve, the weights and the files of one."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from families import load_oracle
from helpers import NANO, TEXT, finished, run_command
from safetensors.torch import load_file

from tinylm import TinyLM

pytestmark = pytest.mark.slow
OPTIONS = [*NANO, "--batch", "8", "--steps", "24", "--eval-every", "6"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        TEXT + TEXT[:160], encoding="utf-8"
    )  # the last batch has rows for both, but is not full
    return path


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """What one process prints, and its folder."""
    out = tmp_path_factory.mktemp("alone")
    return finished(run_command("train", text, "--out", out, *OPTIONS)).stderr, out


def started(*arguments, processes=2, restarts=0):
    launch = [*TORCHRUN, "--max-restarts", restarts] if processes > 1 else [sys.executable]
    return subprocess.Popen(
        [*map(str, (*launch, ROOT / "train.py", *arguments))],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def worker(run):
    """A process that trains."""
    return int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[-1])


def curve(log):
    found = re.findall(r"step (\d+)\s+validation ([\d.]+) nats", log)
    return {int(step): float(nats) for step, nats in found}


def same_run(alone, log, out):
    """To 1e-4, at every validation; and in the weights."""
    expected = curve(alone[0])
    assert [*curve(log).values()] == pytest.approx(
        [expected[step] for step in curve(log)], abs=1.5e-4
    )
    one, two = (load_file(folder / "last" / "model.safetensors") for folder in (alone[1], out))
    assert list(one) == list(two)
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-3 * one[name].abs().max().clamp(min=0.1), (
            name
        )


@pytest.mark.parametrize(
    "parallel, more",
    [("fsdp", ()), ("ddp", ("--accumulate", 2))],
)
def test_two_processes_learn_what_one_learns(parallel, more, text, alone, tmp_path):
    run = started("train", text, "--out", tmp_path, "--parallel", parallel, *OPTIONS, *more)
    log = run.communicate(timeout=120)[1]
    assert run.returncode == 0, log
    assert [*curve(log)] == [6, 12, 18, 24] and log.count("step 24  validation") == 1
    same_run(alone, log, tmp_path)
    ids = torch.tensor([[90, 101, 105, 108]])
    assert (
        TinyLM.from_pretrained(tmp_path / "best").generate(ids, max_new_tokens=8).tolist()
        == load_oracle(tmp_path / "best").generate(ids, max_new_tokens=8, do_sample=False).tolist()
    )


def test_a_killed_process_is_started_again_and_goes_on(text, alone, tmp_path):
    """torchrun ends the other one and begins again: the run of one process that nothing disturbed."""
    run = started("train", text, "--out", tmp_path, *OPTIONS, restarts=1)
    next(line for line in run.stderr if "step 12  validation" in line)
    os.kill(worker(run), signal.SIGKILL)
    log = run.communicate(timeout=120)[1]
    assert run.returncode == 0 and 6 not in curve(log) and 24 in curve(log), log
    same_run(alone, log, tmp_path)


@pytest.mark.parametrize("processes", [2, 1])
def test_a_run_goes_on_with_another_number_of_processes(processes, text, alone, tmp_path):
    """Each of two writes its own part of what `--resume` needs; one reads both parts, and two share what one wrote."""
    run = started("train", text, "--out", tmp_path, *OPTIONS, processes=processes)
    next(line for line in run.stderr if "step 12  validation" in line)
    os.kill(worker(run) if processes > 1 else run.pid, signal.SIGINT)
    log = run.communicate(timeout=120)[1]
    assert log.count("is saved; `tinylm train --resume") == 1 and run.returncode in (1, 130), log
    sizes = [
        sum(tensor.numel() for tensor in load_file(file).values())
        for file in (tmp_path / "last").glob("training-*/*.safetensors")
    ]
    assert (
        len(sizes) == processes * (processes > 1)
        and 2 * max(sizes, default=0) < 1.1 * sum(sizes) + 1
    )
    run = started("train", "--out", tmp_path, "--resume", processes=3 - processes)
    log = run.communicate(timeout=120)[1]
    assert run.returncode == 0 and [*curve(log)] == [18, 24], log
    same_run(alone, log, tmp_path)
    assert len([*(tmp_path / "last").glob("training-*/")]) == 2 - processes
    finished(
        run_command("train", text, "--out", tmp_path, "--resume")
    )  # nothing is left to do, but all is read


def test_two_processes_train_the_adapters_of_one(text, alone, tmp_path):
    """Merged in the checkpoint, and bare beside it."""
    options = [
        "--init",
        alone[1] / "best",
        "--lora",
        "2",
        "--block",
        "32",
        "--batch",
        "8",
        "--epochs",
        "1",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    finished(run_command("train", text, "--out", one, *options))
    run = started("train", text, "--out", two, *options)
    log = run.communicate(timeout=120)[1]
    assert run.returncode == 0, log
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(folder / "last" / name) for folder in (two, one))
        assert list(ours) == list(theirs)
        for key in ours:
            assert (ours[key] - theirs[key]).abs().max() < 1e-3 * theirs[key].abs().max().clamp(
                min=0.1
            ), key
    before = load_file(alone[1] / "best" / "model.safetensors")
    assert not torch.equal(
        load_file(two / "last" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"],
        before["model.layers.0.mlp.down_proj.weight"],
    )
