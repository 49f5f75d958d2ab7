"""The exported folder and the command that writes it: what is in it, what stays of an earlier one, and errors."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from families import (
    FAMILIES,
    difference,
    load_oracle,
    prompts,
)
from helpers import CPU, TINY

import export
from export import OnnxLM, export_onnx
from tinylm import Config, TinyLM


@pytest.mark.parametrize(
    "name, value", [("no_repeat_ngram_size", 2), ("repetition_penalty", 1.3), ("min_length", 3)]
)
def test_one_graph_has_no_constraints(name, value, tmp_path):
    """Guards a generate.onnx that says other than the folder's generation_config.json."""
    lm = TinyLM(Config(**TINY))
    lm.generation_config = {name: value}
    with pytest.raises(export.Error, match=f"^--generate: generation_config.json has {name}"):
        export_onnx(lm, tmp_path / "out", generate=True)


def test_rounding_begins_with_an_id_that_there_is(tmp_path):
    """Guards a GPT-2 of 320 ids whose config keeps 50256, and heads too narrow for grouped queries."""
    lm = TinyLM(
        Config(
            **TINY, bos_token_id=50256, head_dim=24, partial_rotary_factor=0.7, model_type="tinylm"
        )
    )
    export_onnx(lm, tmp_path / "out", precisions=["fp16"])


def test_a_checkpoint_inside_the_folder_to_write_stays(tmp_path):
    TinyLM(Config(**TINY)).save_pretrained(tmp_path / "out" / "mine")
    (tmp_path / "out" / export.MARK).touch()
    with pytest.raises(export.Error, match="holds it; name another folder"):
        export_onnx(tmp_path / "out" / "mine", tmp_path / "out")
    assert (tmp_path / "out" / "mine" / "model.safetensors").exists()


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, ROOT / "export.py", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_shipped_model_is_exported_verified_and_writes(tmp_path):
    """The first command of the README."""
    if not (ROOT / "weights" / "model.safetensors").exists():
        pytest.skip("no weights/ in this checkout")
    done = run("--onnx", "--prompt", "ROMEO:", "--max-new-tokens", 40, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verified against torch" in done.stdout and "32 greedy tokens equal" in done.stdout
    assert (
        "ROMEO:" in done.stdout and "tokens/s" in done.stdout and "ExecutionProvider" in done.stdout
    )
    files = {
        str(path.relative_to(tmp_path / "exported"))
        for path in (tmp_path / "exported").rglob("*")
        if path.is_file()
    }
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "genai_config.json",
        "onnx/model.onnx",
    } <= files
    assert load_oracle(tmp_path / "exported").config.model_type == "qwen3"


def test_a_failed_check_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    """A graph that computes something else is caught, and no folder, half or whole, stays behind."""
    right = export.onnx_rms_norm
    monkeypatch.setitem(
        export.OPERATORS, "rms_norm", lambda x, weight, eps: right(x, weight, eps + 0.1)
    )
    source, out = folder(FAMILIES[1]), tmp_path / "out"
    capsys.readouterr()  # transformers draws a bar where the folder is made
    assert export.main([str(source), "--onnx", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "differs from torch" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failed_trace_is_one_line(folder, tmp_path, monkeypatch, capsys):
    """Guards a traceback out of the exporter: whatever it raises is named in one line."""

    def broken(*_):
        raise RuntimeError("no kernel for this\nand a long story")

    monkeypatch.setitem(export.OPERATORS, "attend", broken)
    source, _ = folder(FAMILIES[1]), capsys.readouterr()
    assert export.main([str(source), "--onnx", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert (
        "the trace of fp32 failed" in error
        and error.count("\n") == 1
        and list(tmp_path.iterdir()) == []
    )


def test_bad_arguments_end_in_one_line(folder, tmp_path, capsys):
    source, _ = folder(FAMILIES[1]), capsys.readouterr()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for arguments, words in [
        ((tmp_path / "none", "--onnx", "--out", tmp_path / "out"), "none: no such folder"),
        ((source, "--onnx", "--out", tmp_path / "mine"), "is no ONNX export"),
        ((source, "--onnx", "--out", source), "is no ONNX export"),
    ]:
        assert export.main([*map(str, arguments)]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "Traceback" not in error
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious" and not (
        tmp_path / "out"
    ).exists()
    with pytest.raises(SystemExit):
        export.main([str(source)])
    assert "--onnx" in capsys.readouterr().err


def test_safetensors_alone_and_an_export_again(folder, exported_folder, tmp_path):
    """Without --onnx there is no graph; an earlier export in the same place is replaced whole."""
    source, out = (
        folder(FAMILIES[1]),
        shutil.copytree(exported_folder(FAMILIES[1]), tmp_path / "out"),
    )
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        export_onnx(out, out)
    assert export.main([str(source), "--safetensors", "--out", str(out)]) == 0
    assert not (out / "onnx").exists() and not (out / "genai_config.json").exists()
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    with torch.no_grad():
        ids = prompts(FAMILIES[1], 1, 9)
        assert difference(load_oracle(out)(ids).logits, load_oracle(source)(ids).logits) == 0


def test_safetensors_twice_replaces_the_first(folder, tmp_path):
    """Guards an export without a graph that is not recognised as one; a checkpoint of somebody's is none."""
    source, out = folder(FAMILIES[1]), tmp_path / "out"
    for _ in range(2):
        assert export.main([str(source), "--safetensors", "--out", str(out)]) == 0
    mine = shutil.copytree(source, tmp_path / "mine")
    assert export.main([str(source), "--safetensors", "--out", str(mine)]) == 1


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_half_precision_is_stored_as_it_is_and_traced_in_fp32(dtype, tmp_path):
    """Guards a trace in half precision, which failed, and a model.safetensors twice as large as the checkpoint's."""
    lm = TinyLM(Config(**TINY, initializer_range=0.3)).to(dtype).train()
    export_onnx(lm, tmp_path / "one")
    assert lm.dtype == dtype and lm.training
    export_onnx(tmp_path / "one", tmp_path / "two")
    for out in (tmp_path / "one", tmp_path / "two"):
        back = TinyLM.from_pretrained(out)
        assert back.dtype == dtype and all(
            torch.equal(a, b) for a, b in zip(back.parameters(), lm.parameters(), strict=True)
        )
        ids = torch.tensor([[1, 2, 3]])
        assert (
            difference(
                torch.from_numpy(OnnxLM(out, providers=CPU)(ids.numpy())),
                back.float()(ids).detach(),
            )
            < 1e-4
        )


def test_a_checkpoint_without_tokenizer_is_exported(tmp_path, capsys):
    """Guards exit code 1 after a good export, for want of a text to show."""
    TinyLM(Config(**TINY | dict(vocab_size=64))).save_pretrained(source := tmp_path / "source")
    assert not (source / "tokenizer.json").exists()
    assert export.main([str(source), "--onnx", "--out", str(tmp_path / "out")]) == 0
    assert (
        "no tokenizer.json" in capsys.readouterr().out
        and (tmp_path / "out" / "onnx" / "model.onnx").exists()
    )


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("no room\nfor it"), KeyError("x")], ids=repr
)
def test_any_error_is_one_line(error, folder, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise error

    monkeypatch.setattr(export, "trace_graphs", broken)
    source, _ = folder(FAMILIES[1]), capsys.readouterr()
    assert export.main([str(source), "--onnx", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().err
    assert (
        type(error).__name__ in printed
        and printed.count("\n") == 1
        and list(tmp_path.iterdir()) == []
    )


def test_a_failed_rename_keeps_the_earlier_export(folder, tmp_path, monkeypatch):
    """Guards an export moved out of the way for one that then does not get its place."""
    source, out, replace = folder(FAMILIES[1]), tmp_path / "out", os.replace
    export_onnx(source, out, onnx=False)
    (out / "note").write_text("the first")

    def failing(a, b):
        if str(a).endswith(".new"):
            raise OSError("no such luck")
        replace(a, b)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no such luck"):
        export_onnx(source, out, onnx=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (
        out / "note"
    ).read_text() == "the first"


def test_the_speed_counts_tokens(small_export, tmp_path, monkeypatch, capsys):
    """Guards pieces of text taken for tokens: a character of four bytes is one piece."""
    lm = OnnxLM(small_export[2], providers=CPU)
    clock = iter(range(10**6))
    monkeypatch.setattr(
        export.time, "monotonic", lambda: next(clock)
    )  # one second from token to token
    emoji = [
        (byte, "\U0001f600" * (i % 4 == 3)) for i, byte in enumerate("\U0001f600".encode() * 9)
    ]
    monkeypatch.setattr(lm, "steps", lambda *_, **__: iter(emoji))
    export.print_sample(lm, "hi", 36, "")
    assert "\U0001f600" in (text := capsys.readouterr().out) and text.endswith(", 1 tokens/s\n")


@pytest.mark.slow
def test_smollm2_is_exported_verified_and_knows_paris(smollm2, tmp_path):
    done = run(
        smollm2,
        "--onnx",
        "--out",
        tmp_path / "out",
        "--prompt",
        "The capital of France is",
        "--max-new-tokens",
        8,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "onnx").iterdir())
    assert (
        size < 1.01 * (tmp_path / "out" / "model.safetensors").stat().st_size
    )  # the tied head is stored once


# ---- a folder that is there already --------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """The graphs of an export are a few bytes: what is tried here is where they go."""

    def write(lm, folder, precisions, *_):
        for name in precisions:
            path = folder / "onnx" / f"model{export.PRECISIONS[name].suffix}.onnx"
            path.write_bytes(os.urandom(8))
        return {}

    monkeypatch.setattr(export, "write_graphs", write)


def test_an_export_adds_its_precisions(quick, tmp_path):
    """Guards a second run that destroys the first: other precisions of the same weights stay, of others they go."""
    lm, out, lines = TinyLM(Config(**TINY)), tmp_path / "out", []
    graphs = lambda: {path.name: path.read_bytes() for path in sorted((out / "onnx").iterdir())}
    export_onnx(lm, out, precisions=["fp16", "q4f16"])
    (out / "onnx" / "model_q4f16.onnx_data").write_bytes(b"weights")
    first = graphs()
    export_onnx(lm, out, precisions=["fp32", "fp16"], log=lines.append)
    second = graphs()
    assert [*second] == ["model.onnx", *first]
    assert second["model_fp16.onnx"] != first["model_fp16.onnx"]
    assert all(second[name] == first[name] for name in first if "q4f16" in name)
    assert [line for line in lines if "kept" in line] == [
        "onnx/model_q4f16.onnx is kept",
        "onnx/model_q4f16.onnx_data is kept",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {
        "model_q4f16.onnx": True
    }
    with torch.no_grad():
        lm.embed.weight[0] += 1
    export_onnx(lm, out, log=lines.append)
    assert [*graphs()] == ["model.onnx"]
    assert "the earlier export has other weights: its graphs are replaced" in lines


@pytest.mark.parametrize("mark", ["", "[]", "{}"])
def test_an_export_without_a_hash_is_replaced(mark, quick, tmp_path):
    lm, out = TinyLM(Config(**TINY)), tmp_path / "out"
    export_onnx(lm, out, precisions=["fp16"])
    (out / export.MARK).write_text(mark)
    export_onnx(lm, out)
    assert [path.name for path in (out / "onnx").iterdir()] == ["model.onnx"]


def test_a_failed_export_leaves_the_earlier_one(quick, tmp_path, monkeypatch):
    lm, out = TinyLM(Config(**TINY)), tmp_path / "out"
    export_onnx(lm, out)

    def failing(*_):
        raise OSError("no space left")

    monkeypatch.setattr(export, "keep_graphs", failing)
    with pytest.raises(OSError, match="no space left"):
        export_onnx(lm, out, precisions=["int8"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (out / "onnx").iterdir()] == ["model.onnx"]


# ---- genai_config.json ----------------------------------------------------------------------------------------------


def test_genai_config_has_the_search_of_generation_config():
    """Guards a search that genai_config.json left out without a word."""
    file = dict(
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        repetition_penalty=1.1,
        num_beams=4,
        length_penalty=0.8,
        early_stopping=True,
        min_length=3,
        no_repeat_ngram_size=2,
        max_length=99,
        # what it has no words for, and what says nothing
        min_p=0.1,
        bad_words_ids=[[3]],
        forced_eos_token_id=0,
        min_new_tokens=1,
        stop_strings=["x"],
        typical_p=1.0,
        suppress_tokens=None,
        use_cache=True,
        bos_token_id=1,
        transformers_version="5",
        _from_model_config=True,
    )
    search, left = export.genai_search(file, 64)
    assert search == dict(list(file.items())[:11]) | {"max_length": 64}
    assert left == [
        "min_p",
        "bad_words_ids",
        "forced_eos_token_id",
        "min_new_tokens",
        "stop_strings",
    ]
    assert export.genai_search({"early_stopping": "never"}, 64)[1] == ["early_stopping"]
    assert export.genai_search({}, 64)[0] == dict(do_sample=False, num_beams=1, max_length=64)


# ---- the check of an export ----------------------------------------------------------------------------------------


def test_a_near_tie_of_greedy_tokens_is_no_difference():
    """Rounding decided which of two tokens came, and refused the export."""
    theirs, ours = np.array([[5, 1, 2, 3]]), np.array([[5, 1, 4, 3]])
    logits = np.array([[0.0, 0, 2, 0, 2 - 1e-4]])
    assert export.columns_to_compare(ours, theirs, lambda ids: logits, 2e-4) == 2
    assert export.columns_to_compare(ours, theirs, lambda ids: logits, 2e-5) == 4


def test_values_beyond_float16_are_refused(tmp_path):
    """Guards an fp16 graph that passed on random ids and gave NaN on others: one id's embedding is enough."""
    lm = TinyLM(Config(**TINY, tie_word_embeddings=False)).eval().requires_grad_(False)
    lm.embed.weight[7] = 30000.0
    lines, texts = [], export.range_texts(lm, None)
    assert 7 in texts[-1]
    export.check_16_bit_range(lm, "fp16", export.PRECISIONS["fp16"], texts, lines.append)
    assert "fp16: take care" in lines[0] and "float16 ends at 65504" in lines[0]
    lm.layers[0].mlp.down.bias = torch.nn.Parameter(torch.full((32,), 60000.0))
    words = r"^verify: fp16: layers.0\S* reaches [\d.e+]+, and float16 ends at 65504"
    with pytest.raises(export.Error, match=words):
        export_onnx(lm, tmp_path / "out", precisions=["fp16"])
    export.check_16_bit_range(lm, "int8", export.PRECISIONS["int8"], texts, lines.append)
    assert len(lines) == 1 and not (tmp_path / "out").exists()
