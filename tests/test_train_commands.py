"""The commands eval, run, sample and chat on tiny models of bytes."""

import io
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import tinylm
import train
from tinylm import Config, TinyLM

SIZES = dict(vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if loud %}!{% endif %}"
)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    names = {0: "bad", 1: "good", 2: "so so"}
    lm = TinyLM(Config(**SIZES, head="classify", id2label=names, causal=False))
    folder = tmp_path_factory.mktemp("classify")
    lm.save_pretrained(folder / "lm")
    rows = [{"text": "x" * (1 + i % 7), "label": ["bad", "good"][i % 2]} for i in range(20)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "lm", folder / "data.jsonl", rows


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("chat") / "lm"
    TinyLM(Config(**SIZES)).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_eval_has_a_table_of_classes_and_the_loss(classifier, capsys):
    folder, data, rows = classifier
    assert train.main(["eval", str(folder), str(data), "--json", "--confusion"]) == 0
    figures = json.loads(capsys.readouterr().out)
    lm = TinyLM.from_pretrained(folder)
    ids = {"bad": 0, "good": 1}
    logits = torch.cat([lm(torch.tensor([lm.tokenizer.encode(row["text"])])) for row in rows])
    true, said = torch.tensor([ids[row["label"]] for row in rows]), logits.argmax(-1)
    assert figures["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, true).item(), rel=1e-4
    )
    for name, i in (("bad", 0), ("good", 1), ("so so", 2)):
        both, found = int(((said == i) & (true == i)).sum()), int((said == i).sum())
        row = figures["classes"][name]
        assert row["support"] == int((true == i).sum())
        assert row["precision"] == pytest.approx(both / max(found, 1))
        assert row["recall"] == pytest.approx(both / max(row["support"], 1))
        assert sum(line[name] for line in figures["confusion"].values()) == found
    assert train.main(["eval", str(folder), str(data)]) == 0
    out = capsys.readouterr().out
    assert "confusion" not in out and "precision  recall" in out and "so so" in out


def test_chat_has_commands(talker, monkeypatch, capsys):
    seen = []

    def chat(self, messages, variables=None, **options):
        seen.append(([*messages], variables))
        if messages[-1]["content"] == "stop":
            yield "half"
            raise KeyboardInterrupt
        yield "yes"

    monkeypatch.setattr(TinyLM, "chat", chat)
    lines = ["a", "stop", "b", "/reset", "c", "/system be brief", "d", "/exit", "e"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert train.main(["chat", str(talker), "--system", "s", "--set", "loud=true"]) == 0
    assert capsys.readouterr().out == "yes\nhalf\nyes\nyes\nyes\n"
    texts = [[message["content"] for message in messages] for messages, _ in seen]
    assert texts == [
        ["s", "a"],
        ["s", "a", "yes", "stop"],
        ["s", "a", "yes", "stop", "half", "b"],
        ["s", "c"],
        ["be brief", "d"],
    ]
    assert seen[0][1] == {"loud": True}


def test_run_uses_the_chat_template(talker, capsys):
    assert train.main(["run", str(talker), "hi", "--max-new-tokens", "5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["output"][0]["generated_text"]
    lm = TinyLM.from_pretrained(talker)
    expected = lm.chat([{"role": "user", "content": "hi"}], max_new_tokens=5)
    assert said == "".join(expected)


def test_head_ends_sample_quietly(talker):
    command = (
        f"{sys.executable} train.py sample {talker} --max-new-tokens 60 --prompt abc | head -c 2"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "ab" and done.stderr == ""


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    assert "{train,eval,run,sample,chat,export}" in capsys.readouterr().out


def test_variables_of_a_template_on_the_command_line(tmp_path, capsys, monkeypatch):
    """--set NAME=VALUE: JSON where it is JSON, else text."""
    size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    lm = tinylm.TinyLM(tinylm.Config(**size))
    template = b"{{ raise_exception([enable_thinking, name, none, limit] | tojson) }}"
    lm.tokenizer = tinylm.ByteTokenizer({"chat_template.jinja": template})
    lm.save_pretrained(tmp_path)
    arguments = ["chat", str(tmp_path), "--device", "cpu", "--set", "enable_thinking=false"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert train.main([*arguments, "--set", "name=a=b", "--set", "limit=[1]"]) == 1
    assert '[false, "a=b", null, [1]]' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*arguments, "--set", "name"])
    assert "expected NAME=VALUE" in capsys.readouterr().err
