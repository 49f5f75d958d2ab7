"""What goes wrong while training: kills, full disks, folders that cannot be written, two runs at once, losses that are
no numbers. What was saved before always loads and goes on to the same curve."""

import json
import os
import random
import re
import resource
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from helpers import same_files
from safetensors import safe_open

import tinylm
import train
from tinylm import TinyLM
from train import main

pytestmark = pytest.mark.usefixtures("silent")
OPTIONS = [
    "--size",
    "pico",
    "--batch",
    "4",
    "--block",
    "16",
    "--steps",
    "40",
    "--eval-every",
    "2",
    "--dropout",
    "0.1",
]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    assert main(["train", str(text), "--out", str(out), *OPTIONS]) == 0
    return out


def step_of(folder):
    """Of the checkpoint to go on with."""
    with safe_open(folder / "training.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["training"])["step"]


def run_train(text, out, *more):
    return main(
        ["train", str(text), "--out", str(out), *(OPTIONS if "--resume" not in more else ()), *more]
    )


class Killed(BaseException):
    """A kill -9, as far as files can tell: nothing is tidied up behind it."""


@pytest.mark.slow
def test_killed_at_any_write_it_goes_on_to_the_same_curve(text, whole, tmp_path, monkeypatch):
    """Again and again, at a random file, before it is written, in the middle of it or before it takes its name."""
    draw, real, out, kills = random.Random(0), tinylm.write_file, tmp_path / "out", 0
    while True:
        fatal = [draw.randrange(1, 26)]

        def write_file(path, write):
            fatal[0] -= 1
            if fatal[0]:
                return real(path, write)
            temporary = path.with_name(path.name + ".tmp")
            if draw.random() < 0.7:
                write(temporary)
                os.truncate(temporary, draw.randrange(1 + temporary.stat().st_size))
            raise Killed

        monkeypatch.setattr(tinylm, "write_file", write_file)
        going_on = (out / "last" / "training.safetensors").exists()
        try:
            assert run_train(text, out, "--resume" if going_on else "--overwrite") == 0
            break
        except Killed:
            kills += 1
        if (out / "last" / "training.safetensors").exists():
            assert step_of(out / "last") % 2 == 0
            assert torch.isfinite(TinyLM.from_pretrained(out / "last").embed.weight).all()
    assert kills > 20
    for file in whole.rglob("*.safetensors"):
        assert same_files(file, out / file.relative_to(whole)), file


@pytest.mark.slow
def test_killed_by_the_system_it_goes_on_to_the_same_curve(text, whole, tmp_path):
    """kill -9 of the process itself, at two random moments."""
    out, draw, environment = (
        tmp_path / "out",
        random.Random(1),
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for _ in range(2):
        going_on = (out / "last" / "training.safetensors").exists()
        command = [
            sys.executable,
            ROOT / "train.py",
            "train",
            text,
            "--out",
            out,
            *(["--resume"] if going_on else [*OPTIONS, "--overwrite"]),
        ]
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        next(line for line in run.stderr if re.search("validation", line))
        time.sleep(2 * draw.random())
        run.kill()
        run.communicate()
        if (out / "last" / "training.safetensors").exists():
            TinyLM.from_pretrained(out / "last")
    going_on = (out / "last" / "training.safetensors").exists()
    assert run_train(text, out, "--resume" if going_on else "--overwrite") == 0
    for file in whole.rglob("*.safetensors"):
        assert same_files(file, out / file.relative_to(whole)), file


def test_a_full_disk_keeps_what_was_saved(text, tmp_path, capsys):
    """A limit on the size of files, above the model's and below the optimizer's."""
    out = tmp_path / "out"
    assert run_train(text, out, "--steps", "2") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    sizes = [
        (out / "last" / name).stat().st_size
        for name in ("model.safetensors", "training.safetensors")
    ]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] // 2, limits[1]))
    try:
        assert run_train(text, out, "--overwrite") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "best: not saved" in error and "too large" in error.lower() and sizes[1] > sizes[0]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    TinyLM.from_pretrained(out / "best")


def test_a_folder_that_cannot_be_written_is_one_line(text, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "model.safetensors.tmp")

    out = tmp_path / "out"
    assert run_train(text, out, "--steps", "2") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert run_train(text, out, "--overwrite") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(out / "best") in error and "Permission denied" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    if os.geteuid():  # root may write anywhere
        out.chmod(0o500)
        assert run_train(text, out / "new") == 1
        assert "Permission denied" in capsys.readouterr().err.splitlines()[-1]


def test_two_runs_on_one_folder_are_refused(text, tmp_path, capsys):
    with train.locked(tmp_path / "out"):
        assert run_train(text, tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--out" in error and "another run" in error and not [*(tmp_path / "out").iterdir()]
    assert run_train(text, tmp_path / "out", "--steps", "2") == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(value, text, whole, tmp_path, capsys, monkeypatch):
    """The checkpoint before it is kept, and goes on to the same curve once the reason is gone."""
    step, calls = tinylm.train_step, []

    def spoilt(model, *arguments):
        loss = step(model, *arguments)
        calls.append(loss)
        if len(calls) == 8:  # when the next checkpoint is due
            model.embed.weight.data[0] = value
            return loss * value
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", spoilt)
        assert run_train(text, tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"step 8: the loss is {value}" in error and step_of(tmp_path / "out" / "last") == 6
    assert run_train(text, tmp_path / "out", "--resume") == 0
    for file in whole.rglob("*.safetensors"):
        assert same_files(file, tmp_path / "out" / file.relative_to(whole)), file
