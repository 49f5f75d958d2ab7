"""Texts as tokens on the disk: they train as those in memory, and are made again when torn."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import TEXT, same_files

import data as datafiles
from tinylm import TinyLM
from train import main


@pytest.fixture
def small(monkeypatch):
    """Files of a kilobyte count as large."""
    monkeypatch.setattr(datafiles, "MMAP_MIN_BYTES", 2**10)


def run_train(path, out, *more):
    return main(
        [
            "train",
            str(path),
            "--out",
            str(out),
            "--size",
            "pico",
            "--batch",
            "4",
            "--block",
            "32",
            "--steps",
            "6",
            "--eval-every",
            "3",
            *more,
        ]
    )


def test_bytes_on_the_disk_train_as_those_in_memory(tmp_path, monkeypatch):
    """The same bits; the whole tail is held back, as it is small."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    path.write_bytes(
        path.read_bytes().decode().encode("ascii", "replace")
    )  # that bytes are characters
    assert run_train(path, tmp_path / "memory") == 0
    monkeypatch.setattr(datafiles, "MMAP_MIN_BYTES", 2**12)
    real = datafiles.split_rows
    monkeypatch.setattr(
        datafiles, "split_rows", lambda rows, *options: at(rows, real, options, monkeypatch)
    )
    assert run_train(path, tmp_path / "disk") == 0
    for which in ("best", "last"):
        assert same_files(
            *(tmp_path / out / which / "model.safetensors" for out in ("memory", "disk"))
        )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="a process's memory is told by wait4")
def test_a_text_is_tokenised_in_little_memory(tmp_path):
    """Fifty bytes for each of the text's, at most; all at once it would be 200."""
    small = tmp_path / "small.txt"
    small.write_text(TEXT, encoding="utf-8")

    def peak(size):
        path = tmp_path / f"{size}.txt"
        path.write_text(TEXT * (size // len(TEXT)), encoding="utf-8")
        command = [
            sys.executable,
            ROOT / "train.py",
            "train",
            path,
            "--out",
            tmp_path / str(size),
            "--size",
            "pico",
            "--batch",
            "4",
            "--block",
            "32",
            "--vocab",
            "300",
            "--steps",
            "1",
            "--val",
            small,
        ]
        run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(run.pid, 0)
        assert status == 0
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    assert peak(4_000_000) - peak(100_000) < 50 * 4_000_000


def at(rows, split, options, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(datafiles, "MMAP_MIN_BYTES", 2**26)
        return split(rows, *options)


def test_tokens_on_the_disk_are_made_once_and_again_when_torn(tmp_path, small, capsys):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    assert run_train(path, tmp_path / "one", "--vocab", "300") == 0
    caches = sorted(tmp_path.glob(".*.tokens"))
    assert len(caches) == 2 and "tokenised" in capsys.readouterr().err  # to train on, and held back
    before = [cache.read_bytes() for cache in caches]
    tokenizer = TinyLM.from_pretrained(tmp_path / "one" / "best").tokenizer
    for cache in caches:
        ids = torch.frombuffer(bytearray(cache.read_bytes()), dtype=torch.int32)
        assert (
            ids[-1] == len(ids) - 1 and tokenizer.decode(ids[:-1])[3:99].strip("\ufffd") in TEXT * 3
        )
    assert (
        run_train(path, tmp_path / "one", "--resume") == 0
        and "tokenised" not in capsys.readouterr().err
    )
    for cache, content in zip(caches, before):
        cache.write_bytes(content[: len(content) // 2])
    assert run_train(path, tmp_path / "two", "--vocab", "300") == 0
    assert [
        cache.read_bytes() for cache in caches
    ] == before and "tokenised" in capsys.readouterr().err
    assert same_files(*(tmp_path / out / "last" / "model.safetensors" for out in ("one", "two")))


def test_other_data_on_the_disk_is_not_gone_on_with(tmp_path, small, capsys):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert run_train(path, tmp_path / "out") == 0
    path.write_text(TEXT + "x", encoding="utf-8")
    assert main(["train", str(path), "--out", str(tmp_path / "out"), "--resume"]) == 1
    assert "not the data of the run" in capsys.readouterr().err
