"""Exports that are evaluated on the user's data, exports without weights, and exports from Python."""

import copy
import json
import re

import pytest
import torch
from conftest import ROOT  # noqa: F401
from helpers import CPU, finished, refuses, run_command

import tinylm
import train
from export import OnnxLM, evaluate, export_onnx
from tinylm import Config, TinyLM

ROWS = [
    {"id": i, "review": f"{'good' if i % 2 else 'bad'} film, no {i}", "stars": "ab"[i % 2]}
    for i in range(40)
]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A classifier, in its training's folder, and the file that it was trained on."""
    folder = tmp_path_factory.mktemp("reviews")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = dict(task="classify", size="pico", steps=30, batch=8, vocab=300, quiet=True)
    return train.train(str(data), train.TrainOptions(out=str(folder / "out"), **options)), data


@pytest.fixture(scope="module")
def evaluated(reviews, tmp_path_factory):
    """Its export in two precisions with a table, and what was printed."""
    lm, data = reviews
    out = tmp_path_factory.mktemp("evaluated") / "shipped"
    words = ["--precision", "int8", "fp32", "--eval", data, "--max-drop", 0.5, "--weights", "none"]
    return out, finished(run_command("export", lm.folder, "--onnx", "--out", out, *words)).stdout


def cells(line):
    return [cell.strip() for cell in line.strip("| \n").split(" | ")]


def test_the_table_is_printed_and_in_the_model_card(reviews, evaluated):
    lm, data = reviews
    out, printed = evaluated
    card = (out / "README.md").read_text()
    assert "no model.safetensors" in card
    assert card.startswith((lm.folder / "README.md").read_text().rstrip())
    assert (out / "loss.svg").read_bytes() == (lm.folder / "loss.svg").read_bytes()
    lines = [line for line in card.partition("## Graphs")[2].splitlines() if line[:1] == "|"]
    header, _, *rows = map(cells, lines)
    assert header == ["precision", "size", "accuracy", "changed", "texts/s", "beside fp32"]
    table = {row[0]: dict(zip(header, row)) for row in rows}
    assert [*table] == ["torch", "int8", "fp32"]
    for name, row in table.items():
        more = ["--precision", name] if name != "torch" else []
        folder = out if more else lm.folder
        found = json.loads(finished(run_command("eval", folder, data, "--json", *more)).stdout)
        assert row["accuracy"] == f"{found['accuracy']:.4f}"
        assert float(row["texts/s"].replace(",", "")) > 0
        numbers = re.escape(row["size"]) + r" +" + row["accuracy"]
        assert re.search(rf"{name} +{numbers}", printed)
    assert table["fp32"]["changed"] == "0 of 40" and table["fp32"]["beside fp32"] == "1.00"
    size = (out / "onnx" / "model_quantized.onnx").stat().st_size
    assert table["int8"]["size"] == f"{size / 1e6:.1f} MB"


def test_changed_rows_are_those_that_run_decides_otherwise(reviews, tmp_path, monkeypatch):
    """Guards flips that cancel out in the accuracy."""
    lm, data = reviews
    forward = train.ExportedLM.forward
    # of one label the other
    monkeypatch.setattr(train.ExportedLM, "forward", lambda *x, **y: -forward(*x, **y))
    found = export_onnx(lm, tmp_path / "out", eval_data=ROWS)["fp32"]["eval"]
    assert found["changed"] == "40 of 40"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# out\n") and "40 of 40" in card


def test_a_precision_that_falls_too_far_is_dropped(reviews, tmp_path, monkeypatch):
    """Guards a graph that is shipped although it is worse, and a folder that is lost to it."""
    lm, data = reviews
    figures = train.Evaluation.figures

    def lower(self, model):
        worse = isinstance(model, train.ExportedLM) and model.graph.precision in bad
        found = figures(self, model)
        return found | {"accuracy": found["accuracy"] - 0.02 * worse}

    monkeypatch.setattr(train.Evaluation, "figures", lower)
    bad, out, lines = {"int8"}, tmp_path / "out", []
    options = dict(eval_data=str(data), max_drop=0.01, log=lines.append)
    found = export_onnx(lm, out, precisions=["int8", "fp32"], **options)
    assert [*found] == ["fp32"] and [x.name for x in (out / "onnx").iterdir()] == ["model.onnx"]
    (line,) = (line for line in lines if "dropped" in line)
    assert line.startswith("int8 is dropped: accuracy ") and "0.0200 below torch's" in line
    assert "int8" not in (out / "README.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    bad = {"int8", "fp32"}
    refuses(lambda: export_onnx(lm, out, **options), "--max-drop 0.01", "accuracy", "nothing")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    lines.clear()
    wrong = dict(options, eval_data=[{"film": "good", "stars": "a"}])
    refuses(lambda: export_onnx(lm, out, **wrong), "row 1", "no column", "film")
    assert not any("tracing" in line for line in lines)  # before what takes long
    for wrong in (dict(max_drop=0.1), dict(max_drop=-1, eval_data=ROWS)):
        refuses(lambda wrong=wrong: export_onnx(lm, out, **wrong), "--max-drop")


def test_a_perplexity_falls_when_it_rises(tmp_path):
    """Guards a gate that is the wrong way round for a loss, and genai_config.json of a graph that is not there."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=258, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    lm = TinyLM(Config(**sizes, intermediate_size=64, initializer_range=0.3)).eval()
    data = tmp_path / "text.txt"
    data.write_text("".join(chr(97 + i * i % 23) for i in range(2000)))
    lines: list = []
    options = dict(precisions=["int4", "fp32"], eval_data=str(data), text=data.read_text() * 3)
    found = export_onnx(lm, tmp_path / "a", **options)
    table = {name: row["eval"]["nats/token"] for name, row in found.items()}
    assert (
        table["int4"] != pytest.approx(table["fp32"], abs=1e-4)
        and "changed" not in found["int4"]["eval"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Evaluation, "figures", raised(train.Evaluation.figures))
        found = export_onnx(lm, tmp_path / "b", max_drop=0.3, log=lines.append, **options)
    assert [*found] == ["fp32"] and any("above torch's" in line for line in lines)
    config = json.loads((tmp_path / "b" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "onnx/model_cpu.onnx"


def raised(figures):
    """The figures, half a nat more for int4."""

    def more(self, lm):
        found = figures(self, lm)
        worse = isinstance(lm, train.ExportedLM) and lm.graph.precision == "int4"
        return found | {"nats/token": found["nats/token"] + 0.5 * worse}

    return more


@pytest.mark.parametrize("name", ["electra-tokens", "bert-qa", "t5"])
def test_every_task_has_a_table(name, exported_pair):
    rows = {
        "electra-tokens": [
            {"tokens": ["w9", f"w{i}"], "tags": ["O", "B-PER"]} for i in range(5, 9)
        ],
        "bert-qa": [
            {"question": f"w{i}", "context": f"w50 w{i} w52", "answer": f"w{i}"} for i in range(9)
        ],
        "t5": [{"source": f"w9 w{i}", "target": f"w{i} w8"} for i in range(5, 9)],
    }[name]
    figure = {"electra-tokens": "entity F1", "bert-qa": "span F1", "t5": "nats/token"}[name]
    lm, _, out = exported_pair(name)
    found = {"fp32": {}}
    lm = copy.deepcopy(lm)
    table = evaluate(lm, out, found, train.Evaluation(lm, rows), 0.01, log=lambda line: None)
    assert [*table] == ["torch", "fp32"] and found["fp32"]["eval"] == table["fp32"]
    assert [*table["fp32"]][:3] == ["size", figure, "changed"]
    assert table["fp32"]["changed"] == f"0 of {len(rows)}"
    assert table["fp32"][figure] == pytest.approx(table["torch"][figure], abs=1e-4)


# ---- without weights ---------------------------------------------------------------------------------------------


def test_a_folder_without_weights_runs_and_grows(reviews, evaluated):
    """Guards graphs of the same weights that are thrown away, as no file of weights says so."""
    lm, data = reviews
    out, _ = evaluated
    assert {"config.json", "tokenizer.json", "onnx"} <= {path.name for path in out.iterdir()}
    assert not [*out.glob("*.safetensors")]
    expected = train.predict(lm, ["good film"])[0][0]
    found = OnnxLM(out, "fp32", providers=CPU).run("good film")[0][0]
    assert found["label"] == expected["label"]
    assert found["score"] == pytest.approx(expected["score"], rel=1e-4)
    graphs = {path.name: path.stat().st_size for path in (out / "onnx").iterdir()}
    words = ["--onnx", "--out", out, "--precision", "int4", "--weights", "none"]
    run = finished(run_command("export", lm.folder, *words))
    assert "model.onnx is kept" in run.stdout and "model_quantized.onnx is kept" in run.stdout
    now = {path.name: path.stat().st_size for path in (out / "onnx").iterdir()}
    assert now.pop("model_q4.onnx") and now == graphs
    for wrong in (["--safetensors", "--onnx"], ["--safetensors"]):
        with pytest.raises(SystemExit):
            run_command("export", lm.folder, "--out", out, "--weights", "none", *wrong)


# ---- from Python -------------------------------------------------------------------------------------------------


class SquaredReLU(tinylm.MLP):
    def forward(self, x):
        return self.down(torch.relu(self.up(x)).square())


def test_a_model_with_a_replaced_leaf_is_exported_from_python(tmp_path, monkeypatch):
    """As in the README; the graph has the leaf, and runs and is evaluated where nothing is replaced."""
    sizes = dict(vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = Config(**sizes, gated=False, initializer_range=0.3)
    torch.manual_seed(0)
    stock = TinyLM(config)
    monkeypatch.setattr(tinylm, "MLP", SquaredReLU)
    torch.manual_seed(0)
    lm = TinyLM(config).eval()
    export_onnx(lm, tmp_path / "out", safetensors=False)
    ids = torch.arange(20)[None]
    data = tmp_path / "a.txt"
    data.write_text("".join(chr(97 + i * i % 23) for i in range(600)))
    with torch.no_grad():
        theirs, others = lm(ids), stock(ids)
    expected = train.Evaluation(lm, data).figures(lm)
    monkeypatch.undo()
    ours = torch.from_numpy(OnnxLM(tmp_path / "out", providers=CPU)(ids.numpy()))
    assert (ours - theirs).abs().max() < 1e-3 < (ours - others).abs().max()
    words = ["eval", tmp_path / "out", data, "--precision", "fp32", "--json"]
    found = json.loads(finished(run_command(*words)).stdout)
    assert found["nats/token"] == pytest.approx(expected["nats/token"], rel=1e-4)
