"""What a run leaves behind, and that a second one destroys nothing of it."""

import json
import re
import sys
import xml.dom.minidom

import pytest
import torch
from conftest import ROOT  # noqa: F401
from helpers import same_files
from transformers import AutoModelForCausalLM, AutoTokenizer

import onnxlm
import train
from export import export_onnx
from tinylm import ByteTokenizer, Config, TinyLM
from train import main

pytestmark = pytest.mark.usefixtures("silent")
TINY = ["--size", "pico", "--batch", "4", "--block", "16", "--eval-every", "2"]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The folder of a run of four steps; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(["train", text, "--out", out, *TINY, "--steps", "4"]) == 0
    return out


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_metrics_are_a_line_for_each_step(finished):
    rows = metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(
        {"loss", "lr", "adam_lr", "tokens_per_second", "seconds"} <= set(row) for row in rows
    )
    assert [row["step"] for row in rows if "validation" in row] == [2, 4]
    assert rows[-1]["validation"]["nats/token"] > 0


def test_metrics_go_on_over_a_resume(text, finished, tmp_path, capsys):
    """--steps extends a finished run; what was written behind the last checkpoint is written again, once."""
    out = tmp_path / "out"
    assert main(["train", text, "--out", out, *TINY, "--steps", "4"]) == 0
    assert metrics(out)[3]["loss"] == metrics(finished)[3]["loss"]
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0, "seconds": 1.0}\n{"step": 6, "lo')
    before = contents(out)
    capsys.readouterr()
    assert main(["train", text, "--out", out, "--resume"]) == 0
    said = capsys.readouterr()
    assert "this run is finished" in said.err and "--resume --steps" in said.err
    assert str(out / "best") in said.out
    assert {name for name in contents(out) if contents(out)[name] != before.get(name)} <= {
        out / "metrics.jsonl"
    }
    assert main(["train", text, "--out", out, "--resume", "--steps", "6"]) == 0
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[4]["loss"] != 1.0
    assert rows[0]["seconds"] < rows[3]["seconds"] < rows[5]["seconds"]
    assert "training, smoothed" in (out / "best" / "loss.svg").read_text()


def test_a_second_run_never_destroys_the_first(text, finished, tmp_path, capsys):
    before = contents(finished)
    assert main(["train", text, "--out", finished, *TINY, "--steps", "2"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in (str(finished), "--resume", "--overwrite", "--out"))
    assert contents(finished) == before
    out = tmp_path / "out"
    assert main(["train", text, "--out", out, *TINY, "--steps", "2", "--seed", "1"]) == 0
    assert main(["train", text, "--out", out, *TINY, "--steps", "4", "--overwrite"]) == 0
    for which in ("best", "last"):
        assert same_files(*(x / which / "model.safetensors" for x in (out, finished)))
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4]


def test_the_model_card_says_what_it_is_and_how_to_load_it(finished, text, monkeypatch):
    card = (finished / "best" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "pipeline_tag: text-generation" in front and "library_name: transformers" in front
    for words in (str(text), "| nats/token |", "| --steps | 4 (given) |", "![loss](loss.svg)"):
        assert words in card
    monkeypatch.chdir(finished / "best")
    theirs, ours = (found for found in re.findall("```python\n(.*?)```", card, re.DOTALL))
    names = {}
    exec(theirs, names)
    assert isinstance(names["tokenizer"], type(AutoTokenizer.from_pretrained(".")))
    assert isinstance(names["model"], type(AutoModelForCausalLM.from_pretrained(".")))
    exec(ours, names)
    assert isinstance(names["model"], TinyLM)
    picture = xml.dom.minidom.parse("loss.svg").toxml()
    assert all(name in picture for name in ("training", "validation", "loss (nats/token)"))


def test_results_on_stdout_progress_on_stderr(text, tmp_path, capsys):
    """The last line: where the model is, its figure, the time. --quiet leaves no other."""
    for quiet in (["--quiet"], []):
        out = tmp_path / f"out{len(quiet)}"
        assert main(["train", text, "--out", out, *TINY, "--steps", "2", *quiet]) == 0
        said = capsys.readouterr()
        figures = r"[\d.]+ nats/token  [\d.]+ bits/byte  [\d.]+ perplexity"
        line = rf"{re.escape(str(out / 'best'))}: {figures}; 2 steps in \d+:\d\d\n"
        assert re.fullmatch(line, said.out), said.out
        assert bool(said.err) != bool(quiet)


def test_tensorboard_is_asked_for_by_name(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    command = ["train", text, "--out", tmp_path / "out", *TINY, "--steps", "2", "--tensorboard"]
    assert main(command) == 1
    assert "pip install tensorboard" in capsys.readouterr().err

    class SummaryWriter:
        written = []

        def __init__(self, folder, purge_step):
            self.folder = folder

        def add_scalar(self, *values):
            self.written.append(values)

        def flush(self):
            pass

    module = type(sys)("tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert main(command) == 0
    assert {(name, step) for name, _, step in SummaryWriter.written} >= {
        ("loss", 1),
        ("adam_lr", 2),
        ("validation/nats/token", 2),
    }


def test_eval_remembers_the_columns_of_the_training(tmp_path, capsys):
    rows = [{"body": f"{'good' if i % 2 else 'bad'} {i}", "verdict": i % 2} for i in range(20)]
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["--text", "body", "--label", "verdict"]
    command = ["train", data, "--out", out, "--task", "classify", *TINY, *columns]
    assert main([*command, "--steps", "2", "--vocab", "270"]) == 0
    known = onnxlm.remembered(out / "best")
    assert (known["task"], known["text"], known["label"]) == ("classify", "body", "verdict")
    assert known["block"] == 16 and onnxlm.remembered(tmp_path) == {}
    capsys.readouterr()
    assert main(["eval", out / "best", data]) == 0
    assert "accuracy" in capsys.readouterr().out
    said = []
    for text in ("good " * 30, "good " * 30 + "bad " * 30):  # alike in what --block has of them
        assert main(["run", out / "best", "--json", text]) == 0
        said.append(json.loads(capsys.readouterr().out)["output"])
    assert said[0] == said[1]


def test_a_strange_field_of_a_pretrained_model_is_said_once(tmp_path, recwarn):
    lm = TinyLM(Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    lm.tokenizer = ByteTokenizer()
    lm.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unheard_of": 1}))
    train.load_for_finetuning(tmp_path, [{"text": "x"}], train.TrainOptions(init="x"))
    assert len([said for said in recwarn if "unheard_of" in str(said.message)]) == 1


def test_help_shows_the_defaults_that_a_task_takes(capsys):
    for arguments, words in (
        ([], ["--lr LR", "(default: 0.02 from scratch, 0.0001 with --init, 0.001 with --lora)"]),
        ([], ["(default: 1000 from scratch)", "(default: 3 with --init)", "(default: 16)"]),
        (["--task", "qa", "--init", "x"], ["(default: 0.0003)", "(default: 6)"]),
        (["--init", "x", "--lora", "8"], ["(default: 0.001)", "(default: 3)"]),
        (["--task", "classify"], ["(default: 4096 from scratch)", "(default: nano from scratch)"]),
    ):
        with pytest.raises(SystemExit):
            main(["train", *arguments, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert all(word in said for word in words), said


def test_long_stages_are_watched(monkeypatch, capsys):
    """After two seconds, how far they are; nothing of a short one."""
    assert [*train.progress_bar(range(3), "counting")] == [0, 1, 2]
    assert capsys.readouterr().err == ""
    now = iter(range(0, 1000, 11))
    monkeypatch.setattr("tqdm.std.time", lambda: next(now))
    assert [*train.progress_bar(range(4), "counting")] == [0, 1, 2, 3]
    assert re.search(r"counting:\s+50%.* 2/4 ", capsys.readouterr().err)


def test_rows_in_memory_train(tmp_path):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": i % 2} for i in range(20)]
    options = train.TrainOptions(
        task="classify",
        size="pico",
        steps=2,
        vocab=270,
        batch=4,
        out=str(tmp_path / "a"),
        quiet=True,
    )
    lm = train.train(rows, options)
    assert lm.config.id2label == {0: "0", 1: "1"}
    again = train.train(
        {"train": rows, "validation": rows[:4]}, train.replace(options, out=str(tmp_path / "b"))
    )
    assert not torch.equal(again.embed.weight, lm.embed.weight)


def test_what_is_exported_reads_as_much_as_was_trained_on(tmp_path, capsys):
    """Guards `train.py run` cut at --block beside an exported folder that read on: other scores for long texts."""
    rows = [{"text": "good " * 3 + f"w{i}", "label": "pos"} for i in range(8)]
    rows += [{"text": "bad " * 3 + f"w{i}", "label": "neg"} for i in range(8)]
    out = tmp_path / "out"
    options = dict(task="classify", size="pico", steps=2, batch=4, block=16, vocab=300)
    train.train(rows, train.TrainOptions(out=str(out), quiet=True, **options))
    export_onnx(out / "best", tmp_path / "exported")
    text = "good bad " * 40
    capsys.readouterr()
    lines = []
    for command in (
        lambda: train.main(["run", str(out / "best"), text]),
        lambda: onnxlm.main([str(tmp_path / "exported"), text]),
    ):
        assert command() == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] != ""
