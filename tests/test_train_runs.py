"""Runs as a user meets them: interrupted and resumed, their card and picture, what they print on the way."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import xml.dom.minidom
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import TINY, finished, run_command, same_files
from safetensors.torch import load_file

import export
import onnxlm
import tinylm
import train
from tinylm import ByteTokenizer, Config, TinyLM
from train import TrainOptions, main

SMALL = ["--size", "pico", "--batch", "4", "--block", "16"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(TinyLM, "stream", lambda *_, **__: ())


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of eight steps that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finished(run_command("train", text, "--out", out, *SMALL, "--steps", 8, "--eval-every", 4))
    return out


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Sends a signal in the middle of that step."""
    steps = iter(range(1, 1000))

    def train_step(*arguments):
        if next(steps) == step:
            os.kill(os.getpid(), number)
        return tinylm.train_step(*arguments)

    monkeypatch.setattr(train, "train_step", train_step)


def rows_file(path, count=24):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": i % 2} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def card_of(folder):
    return (folder / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted and resumed
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interruption_is_saved_said_and_fails(
    number, text, whole, tmp_path, monkeypatch, silent
):
    """Before the first validation it printed "nothing was held back" and returned 0, so that `train && export` went
    on. Without DATA, --resume goes on to the same bits."""
    out = tmp_path / "out"
    command = ["train", text, "--out", out, *SMALL, "--steps", 8, "--eval-every", 4]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, number)
        run = run_command(*command)
    assert run.returncode == 130 and run.stdout == ""
    line = run.stderr.splitlines()[-1]
    assert line.startswith("tinylm: stopped at step 2 of 8, before the first validation")
    assert f"{out / 'last'} is saved" in line and f"`tinylm train --resume --out {out}`" in line
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["last"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, number)  # the sixth
        run = run_command("train", "--resume", "--out", out)
    assert run.returncode == 130 and run.stdout == ""
    assert f"stopped at step 6 of 8, {out / 'best'} is of step 4" in run.stderr
    finished(run_command("train", "--resume", "--out", out))
    for which in ("best", "last"):
        assert same_files(*(folder / which / "model.safetensors" for folder in (out, whole)))


def test_an_interrupted_training_in_python_raises(text, tmp_path, monkeypatch, silent):
    interrupt_at(monkeypatch, 1)
    options = TrainOptions(size="pico", block=16, batch=4, steps=4, out=str(tmp_path), quiet=True)
    rows = [{"text": text.read_text()}]
    with pytest.raises(KeyboardInterrupt, match="last is saved; `tinylm train DATA --resume"):
        train.train(rows, options)
    with pytest.raises(tinylm.Error, match="came from no file"):
        train.train(None, options, resume=True)
    assert train.train(rows, options, resume=True).figures
    with pytest.raises(tinylm.Error, match="no data"):
        train.train(None, options)


def test_a_run_goes_on_from_another_folder_under_another_name(tmp_path, monkeypatch, silent):
    """Data, --val and --init are where they were; the run is where --out says."""
    lm = TinyLM(Config(**TINY, eos_token_id=256, pad_token_id=257))
    lm.tokenizer = ByteTokenizer()
    lm.save_pretrained(tmp_path / "base")
    rows_file(tmp_path / "data.jsonl"), rows_file(tmp_path / "val.jsonl", 6)
    monkeypatch.chdir(tmp_path)
    options = ["--task", "classify", "--init", "base", "--val", "val.jsonl", "--batch", "4"]
    finished(run_command("train", "data.jsonl", "--out", "one", *options, "--steps", 2))
    os.mkdir("elsewhere")
    os.rename("one", "elsewhere/two")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = finished(run_command("train", "--resume", "--steps", 3, "--out", "two"))
    assert run.stdout.startswith("two/best: ") and not Path("one").exists()
    run = run_command(
        "train", "../data.jsonl", "--resume", "--out", "two", *options[:2], "--init", "../base"
    )
    assert run.returncode == 0, run.stderr
    run = run_command("train", "--resume", "--out", "two", "--init", "two/best")
    assert "--init is two/best, expected " in run.stderr
    (tmp_path / "data.jsonl").unlink()
    run = run_command("train", "--resume", "--out", "two")
    assert run.returncode == 1 and "data.jsonl, the run's data, is not there" in run.stderr


def test_another_option_is_refused_with_the_value_of_the_run(text, whole):
    """The value of an option that was not given was "None"."""
    for given, line in (
        (["--lr", "0.5"], "--lr is 0.5, expected 0.02"),
        (["--bf16"], "--bf16 is given, expected not given"),
        (["--size", "nano"], "--size is nano, expected pico"),
        (["--val", text], f"--val is {text}, expected not given"),
    ):
        run = run_command("train", "--resume", "--out", whole, *given)
        assert run.returncode == 1
        assert run.stderr == f"tinylm: error: --resume: {line}, as in the run\n"


# ----------------------------------------------------------------------------------------------------------------------
# The model card and its picture
# ----------------------------------------------------------------------------------------------------------------------
def test_the_card_names_what_was_set(tmp_path, silent):
    """0 was no value; --parallel stood there with one process."""
    data = rows_file(tmp_path / "data.jsonl")
    zeros = ["--dropout", 0, "--weight-decay", 0, "--warmup", 0, "--steps", 2, "--vocab", 270]
    finished(
        run_command("train", data, "--out", tmp_path / "a", "--task", "classify", *SMALL, *zeros)
    )
    card = card_of(tmp_path / "a" / "best")
    for words in ("| --dropout | 0.0 (given) |", "| --weight-decay | 0.0 (given) |"):
        assert words in card
    assert "| --seed | 0 |" in card and "| --block | 16 (given) |" in card
    assert not any(f"--{name} |" in card for name in ("parallel", "lora", "patience", "out", "val"))
    lm = TinyLM.from_pretrained(tmp_path / "a" / "best")
    total = f"{sum(p.numel() for p in lm.parameters()):,} parameters"
    assert f"Trained from scratch with tinylm: {total}, " in card

    options = ["--task", "classify", "--init", tmp_path / "a" / "best", "--lora", 2, "--steps", 2]
    run = finished(run_command("train", data, "--out", tmp_path / "b", *options))
    adapter = load_file(tmp_path / "b" / "best" / "adapter" / "adapter_model.safetensors")
    trained = sum(tensor.numel() for tensor in adapter.values())
    card = card_of(tmp_path / "b" / "best")
    assert f"{total}, trained by {trained:,} in" in card and f"{total}, trained by" in run.stderr
    assert "in adapters of rank 2 and a new head" in card and "| --lora | 2 (given) |" in card


MOE = """
import torch
import tinylm


class Experts(torch.nn.Module):
    "Each token goes through one of four MLPs."

    def __init__(self, config):
        super().__init__()
        self.router = tinylm.Linear(config.hidden_size, 4, bias=False)
        self.inner = torch.nn.Parameter(torch.randn(4, config.hidden_size, 16) * 0.02)
        self.outer = torch.nn.Parameter(torch.randn(4, 16, config.hidden_size) * 0.02)

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        return torch.einsum("bsh,ehi,eio,bse->bso", x, self.inner, self.outer, gates)
"""


def test_a_replaced_mlp_trains_and_its_card_loads_it(text, tmp_path, monkeypatch, silent):
    """One without `down` ended in an AttributeError; the card named transformers, which cannot load it."""
    (tmp_path / "experts.py").write_text(MOE)
    monkeypatch.syspath_prepend(tmp_path)
    import experts

    options = dict(size="pico", block=16, batch=4, steps=2, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(tinylm, "MLP", experts.Experts)
        train.train(text, TrainOptions(out=str(tmp_path / "a"), **options))
        rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": i % 2} for i in range(20)]
        options |= dict(task="classify", vocab=270, checkpoint=True)
        train.train(rows, TrainOptions(out=str(tmp_path / "b"), **options))
    card = card_of(tmp_path / "a" / "best")
    assert "library_name: tinylm" in card and "transformers import" not in card
    assert "tinylm sample" not in card  # the command knows no experts
    [snippet] = re.findall("```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "a" / "best")
    monkeypatch.setattr(tinylm, "MLP", tinylm.MLP)  # put back after the snippet
    names = {}
    exec(snippet, names)
    assert isinstance(names["model"].layers[0].mlp, experts.Experts)


def test_down_projections_of_experts_start_at_zero(monkeypatch):
    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.experts = torch.nn.ModuleList(MLP(config) for _ in range(2))

    MLP = tinylm.MLP
    monkeypatch.setattr(tinylm, "MLP", Experts)
    lm = train.new_model([{"text": "x"}], TrainOptions(size="pico").filled())
    zero = [name for name, p in lm.named_parameters() if not p.any()]
    expected = ["attention.o.weight", *(f"mlp.experts.{i}.down.weight" for i in range(2))]
    assert [name for name in zero if "layers.0." in name] == [f"layers.0.{n}" for n in expected]


def record_of(task):
    """Rows of a run's record as each task writes them."""
    figures = {
        "lm": {"nats/token": 2.0, "bits/byte": 3.0, "perplexity": 7.4},
        "classify": {"accuracy": 0.8, "macro F1": 0.8, "loss": 0.4},
        "regression": {"mean squared error": 4.0, "correlation": None},
        "tokens": {"entity F1": 0.5, "accuracy": 0.9, "loss": 0.2},
        "qa": {"span F1": 0.5, "exact match": 0.4, "loss": 2.0},
        "seq2seq": {"nats/token": 2.0, "perplexity": 7.4},
        "mlm": {"nats/token": 2.0, "perplexity": 7.4},
    }[task]
    rows = [{"step": step, "loss": 5 / step, "lr": 0.1} for step in range(1, 101)]
    for row in rows[19::20]:
        validation = {
            name: value and value * (1 + row["step"] / 1000) for name, value in figures.items()
        }
        row["validation"] = validation
    rows[4]["loss"] = None
    return rows


DRAWN = {  # task -> titles of its panels, the last one with the best point
    "lm": ["loss (nats/token)"],
    "classify": ["loss", "accuracy"],
    "regression": ["mean squared error"],
    "tokens": ["loss", "entity F1"],
    "qa": ["loss", "span F1"],
    "seq2seq": ["loss (nats/token)"],
    "mlm": ["loss (nats/token)"],
}


@pytest.mark.parametrize("task", DRAWN)
def test_the_picture_has_both_curves_of_every_task(task):
    """Validation was drawn for language models only, without titles and ticks."""
    regression = task == "regression"
    options = TrainOptions(task="classify" if regression else task, regression=regression)
    panels = train.make_panels(record_of(task), options, 60)
    assert [panel.title for panel in panels] == DRAWN[task]
    assert all(len(panel.curves["validation"]) == 5 for panel in panels)
    assert [panel.best is not None for panel in panels] == [False] * (len(panels) - 1) + [True]
    assert panels[-1].best[0] == 60
    svg = train.draw_svg(panels)
    picture = xml.dom.minidom.parseString(svg)
    texts = [node.firstChild.data for node in picture.getElementsByTagName("text")]
    assert texts.count("step") == len(panels) and set(DRAWN[task]) <= set(texts)
    assert {"0", "20", "100", "training", "training, smoothed", "validation"} <= set(texts)
    assert any(re.fullmatch(r"best: [\d.]+ at step 60", text) for text in texts)
    assert len(picture.getElementsByTagName("polyline")) == 3 + (len(panels) - 1)
    assert len(picture.getElementsByTagName("polygon")) == 2  # the best point, and in the legend
    numbers = [
        float(x) for x in re.findall(r"-?\d+\.\d", "".join(re.findall(r'points="(.*?)"', svg)))
    ]
    assert numbers and all(-10 <= x <= 480 for x in numbers)


def test_ticks_are_round_numbers():
    assert [text for _, text in train.ticks(0, 3000)] == [f"{500 * i:,}" for i in range(7)]
    assert [text for _, text in train.ticks(0.63, 0.85)] == ["0.65", "0.70", "0.75", "0.80", "0.85"]
    for low, high in ((0, 1), (3, 3.001), (-5, 1e6), (0, 7), (1e-9, 2e-9)):
        values = [value for value, _ in train.ticks(low, high)]
        assert 2 <= len(values) <= 8 and low <= values[0] and values[-1] <= high * (1 + 1e-9)


def test_a_flat_or_short_run_is_drawn_too():
    rows = [{"step": 1, "loss": 0.5, "validation": {"accuracy": 0.0, "loss": 0.5}}]
    panels = train.make_panels(rows, TrainOptions(task="classify"), 1)
    xml.dom.minidom.parseString(train.draw_svg(panels))


def test_matplotlib_draws_the_same():
    pytest.importorskip("matplotlib")
    for task, titles in DRAWN.items():
        regression = task == "regression"
        options = TrainOptions(task="classify" if regression else task, regression=regression)
        panels = train.make_panels(record_of(task), options, 60)
        picture = train.draw_by_matplotlib(panels)
        xml.dom.minidom.parseString(picture)
        assert all(f"<!-- {title} -->" in picture for title in titles)
        assert "<!-- step -->" in picture and "<!-- training, smoothed -->" in picture
        assert picture == train.draw_by_matplotlib(panels)


def test_matplotlib_is_used_where_it_is_installed(text, tmp_path, monkeypatch, silent):
    """For the last picture; before, where it costs no more than a twentieth of the time."""
    find_spec = importlib.util.find_spec
    found = lambda name: True if name == "matplotlib" else find_spec(name)
    monkeypatch.setattr(train.importlib.util, "find_spec", found)
    drawn = []
    monkeypatch.setattr(
        train, "draw_by_matplotlib", lambda panels: drawn.append(panels) or "<svg/>"
    )
    options = [*SMALL, "--steps", 4, "--eval-every", 1]
    finished(run_command("train", text, "--out", tmp_path / "out", *options))
    assert len(drawn) == 1 and (tmp_path / "out" / "best" / "loss.svg").read_text() == "<svg/>"


# ----------------------------------------------------------------------------------------------------------------------
# The sample on the way
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A model of bytes with a chat template."""
    torch.manual_seed(0)
    lm = TinyLM(Config(**TINY, eos_token_id=256, pad_token_id=257))
    lm.tokenizer = ByteTokenizer()
    folder = tmp_path_factory.mktemp("chat")
    lm.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_chat_model_shows_an_answer(chat_model, tmp_path, monkeypatch):
    """It continued the first token of a conversation as prose."""
    asked = []

    def chat(lm, messages, tools, variables, **options):
        asked.append(messages)
        return iter(["fine", "."])

    monkeypatch.setattr(TinyLM, "chat", chat)
    monkeypatch.setattr(train.RunRecord, "spent", lambda _: 100.0)
    first = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How are you?"}]
    rows = [{"messages": [*first, {"role": "assistant", "content": "Well."}]} for _ in range(12)]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--init", chat_model, "--steps", 2, "--eval-every", 2, "--batch", 2]
    run = finished(run_command("train", data, "--out", tmp_path / "out", *options))
    assert "  | user: How are you?\n  | assistant: fine.\n" in run.stderr
    assert asked == [first]
    assert "tinylm chat ." in card_of(tmp_path / "out" / "best")


def test_samples_take_a_twentieth_of_the_time(tmp_path, capsys, monkeypatch):
    """Samples took most of a short training's time."""
    lm = TinyLM(Config(**TINY))
    lm.tokenizer = ByteTokenizer()

    def stream(*_, **__):
        while True:
            time.sleep(0.01)
            yield "x"

    monkeypatch.setattr(TinyLM, "stream", stream)
    held = [{"input_ids": torch.tensor([97, 98])}]
    record = train.RunRecord(tmp_path, 0, TrainOptions())
    record.seconds = 4.0  # of a run before
    begin = time.monotonic()
    train.show_sample(lm, held, TrainOptions(), 1, record)
    first = time.monotonic() - begin
    assert 0.15 < first < 1 and capsys.readouterr().err.endswith(" ...\n")
    train.show_sample(lm, held, TrainOptions(), 2, record)
    assert capsys.readouterr().err == "" and record.extra_seconds < record.spent() / 20 + 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Messages
# ----------------------------------------------------------------------------------------------------------------------
def test_the_folder_of_a_run_is_no_checkpoint(whole, text):
    for command in (["eval", whole, text], ["run", whole, "x"], ["export", whole, "--onnx"]):
        run = run_command(*command)
        assert run.returncode == 1 and run.stderr.count("\n") == 1
        assert f"{whole}: the folder of a run" in run.stderr and str(whole / "best") in run.stderr


@pytest.mark.parametrize("device", ["mps", "cuda:99", "meta", "gpu"])
def test_a_device_that_is_not_there_is_one_line(device):
    run = run_command("sample", "--device", device, "--max-new-tokens", 1)
    assert run.returncode == 1 and run.stdout == ""
    line = rf"tinylm: error: --device {device} cannot be used here, expected cpu( or \w+)?\n"
    assert re.fullmatch(line, run.stderr)


def test_a_sample_prints_nothing_before_an_error():
    run = run_command("sample", "--prompt", "Once", "--top-p", 3)
    assert run.returncode == 1 and run.stdout == "" and "top_p = 3.0" in run.stderr
    run = finished(run_command("sample", "--prompt", "Once", "--max-new-tokens", 2))
    assert run.stdout.startswith("Once")


def test_missing_metrics_are_named(tmp_path, monkeypatch, silent):
    """eval printed a perplexity alone and did not say why."""
    rows = [{"source": f"count {i}", "target": f"{i}"} for i in range(24)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", "seq2seq", "--size", "pico", "--vocab", 270, "--batch", 4, "--steps", 1]
    finished(run_command("train", data, "--out", tmp_path / "out", *options))
    find_spec = importlib.util.find_spec
    missing = lambda name: None if name in ("sacrebleu", "rouge_score") else find_spec(name)
    monkeypatch.setattr(train.importlib.util, "find_spec", missing)
    run = finished(run_command("eval", tmp_path / "out" / "best", data))
    assert "BLEU needs `pip install sacrebleu`" in run.stderr
    assert "ROUGE needs `pip install rouge_score`" in run.stderr and "perplexity" in run.stdout


def test_a_figure_has_one_name_everywhere(whole):
    """Nats and bits were "nats/token", "nats per character" and "bits per byte"."""
    names = {"nats/token", "bits/byte", "perplexity"}
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert names == set(rows[-1]["validation"])
    assert all(f"| {name} |" in card_of(whole / "best") for name in names)
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "tests/bench").glob("*.py"),
    ]
    for page in pages:
        assert not re.search(r"(nats|bits)\s+per", page.read_text()), page


@pytest.mark.parametrize("command", ["tinylm", "onnxlm", "tinylm export"])
def test_a_warning_is_one_line(command, tmp_path, small_export, capsys):
    """Python prints the file and a line of source too."""
    folder = tmp_path / "model"
    shutil.copytree(small_export[2] if command == "onnxlm" else ROOT / "weights", folder)
    name = "generation_config.json" if command == "onnxlm" else "config.json"
    raw = json.loads((folder / name).read_text()) | {"unheard_of": 1}
    (folder / name).write_text(json.dumps(raw))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status = {
            "tinylm": lambda: main(["sample", str(folder), "--max-new-tokens", "1"]),
            "onnxlm": lambda: onnxlm.main([str(folder), "x", "--max-new-tokens", "1"]),
            "tinylm export": lambda: main(
                ["export", str(folder), "--safetensors", "--out", str(tmp_path / "out")]
            ),
        }[command]()
    error = capsys.readouterr().err
    assert status == 0 and re.fullmatch(rf"{command}: warning: .*unheard_of.*\n", error), error


def test_the_runtime_is_a_module_in_a_clone():
    run = subprocess.run(
        [sys.executable, "-m", "onnxlm", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout.startswith("usage: onnxlm ")


def test_an_export_into_a_pipe_is_not_silent(monkeypatch, capsys):
    """139 s of int4 without a line."""
    with export.stage_log(silence=0.1) as log:
        log("rounding")
        deadline = time.monotonic() + 10
        while "still working" not in (printed := capsys.readouterr().out):
            assert time.monotonic() < deadline and printed
            time.sleep(0.15)
    lines = []
    now = iter(range(0, 1000, 11))
    monkeypatch.setattr("tqdm.std.time", lambda: next(now))
    with export.progress("rounding to 4 bits", 4, lines.append) as bar:
        for _ in range(4):
            bar.update()
    assert any(line.startswith("rounding to 4 bits:  50% 2/4") for line in lines)


def test_a_bar_does_not_replace_the_logits(monkeypatch):
    """tqdm's `update` returns True where it draws, and as the result of a hook that replaced what the model says."""
    lm = TinyLM(Config(**TINY)).eval()
    now = iter(range(0, 10**6, 11))
    monkeypatch.setattr("tqdm.std.time", lambda: next(now))
    lines = []
    ids = export.calibration_ids(lm, None, lines.append)
    assert ids.shape == (export.WINDOWS, export.WINDOW) and len(lines) > 2


def test_an_instruct_model_is_asked_a_question(chat_model, tmp_path, capsys):
    """It was to continue "ROMEO:"."""
    command = ["export", str(chat_model), "--onnx", "--out", str(tmp_path / "out")]
    assert main([*command, "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "ROMEO:" not in printed and "\nWhat is the capital of France?\n" in printed
    lm = onnxlm.OnnxLM(tmp_path / "out")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = "".join(lm.chat(messages, max_new_tokens=4))
    assert answer in printed
