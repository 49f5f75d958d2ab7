"""Encoders, heads and encoder-decoders on their way out: graphs, answers, and the command without torch."""

import functools
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from families import (
    CLASSIFIERS,
    ENCODERS,
    SEQ2SEQ,
    difference,
    load_oracle,
    prompts,
    ragged,
)

import onnxlm
import train
from export import OnnxLM, export_onnx
from tinylm import TinyLM

CPU = ["CPUExecutionProvider"]
CASES = {case.name: case for case in ENCODERS + CLASSIFIERS + SEQ2SEQ}
READERS = [
    "bert-bare",
    "roberta-mlm",
    "distilbert-classify",
    "electra-tokens",
    "bert-qa",
    "qwen3-classify",
]
SLOW = ["t5-v1.1", "mbart"]
WRITERS = ["t5", "marian", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module")
def exported(exported_folder):
    """exported(name) -> (the model in torch, under ONNX Runtime, the folder of the export)."""

    @functools.cache
    def load(name):
        out = exported_folder(name)
        return TinyLM.from_pretrained(f"{out}.source"), OnnxLM(out, providers=CPU), out

    return load


def batch(case):
    return ragged([prompts(case, n, seed=n) for n in (11, 4, 7)], ["left", "right", "both"])


@pytest.mark.parametrize("name", READERS)
def test_what_reads_says_what_transformers_says(name, folder, exported):
    case, (lm, onnx_lm, _) = CASES[name], exported(name)
    ids, mask = batch(case)
    kinds = (
        {"token_type_ids": torch.arange(ids.numel()).view(ids.shape) % 3}
        if lm.config.type_vocab_size == 3
        else {}
    )
    with torch.no_grad():
        ours, theirs = (
            onnx_lm(*(x.numpy() for x in (ids, mask, *kinds.values()))),
            lm(ids, mask, **kinds),
        )
        kept = mask.bool() if theirs.ndim == 3 else slice(None)
        assert difference(torch.from_numpy(ours)[kept], theirs[kept]) < 1e-4
        ids, kinds = prompts(case, 2, 9), {key: kind[:2, :9] for key, kind in kinds.items()}
        said = load_oracle(folder(case), case.head)(ids, **kinds)
        theirs = (
            torch.stack((said.start_logits, said.end_logits), -1) if case.head == "qa" else said[0]
        )
        ours = onnx_lm(ids.numpy(), None, *(kind.numpy() for kind in kinds.values()))
        assert difference(torch.from_numpy(ours), theirs) < 1e-4


@pytest.mark.parametrize("name", WRITERS)
def test_what_writes_writes_what_torch_writes(name, folder, exported):
    """Logits of transformers; tokens of torch, from a ragged source, with all that changes logits."""
    case, (lm, onnx_lm, _) = CASES[name], exported(name)
    ids, mask = batch(case)
    target = prompts(case, 3, 8, seed=5)
    row, real = ids[1:2], mask[1:2]  # padded on the right, as transformers takes it
    with torch.no_grad():
        oracle = load_oracle(folder(case), "seq2seq")
        theirs = oracle(input_ids=row, attention_mask=real, decoder_input_ids=target[:1]).logits
    ours = onnx_lm(row.numpy(), real.numpy(), decoder_input_ids=target[:1].numpy())
    assert difference(torch.from_numpy(ours), theirs) < 1e-4
    for options in (
        dict(),
        dict(no_repeat_ngram_size=2, min_length=9),
        dict(temperature=0.9, top_k=20, seed=4),
        dict(
            repetition_penalty=1.4,
            bad_words_ids=[[7], [8, 9]],
            forced_bos_token_id=5,
            forced_eos_token_id=6,
        ),
        dict(num_beams=3),
        dict(num_beams=2, eos_token_id=[*range(20, 40)], length_penalty=2.0),
        dict(num_beams=4, early_stopping=True, no_repeat_ngram_size=2, min_length=5),
        dict(num_beams=2, bad_words_ids=[[7]], renormalize_logits=True, forced_bos_token_id=5),
    ):
        options = dict(max_new_tokens=14, num_beams=1) | options
        ours = onnx_lm.generate(ids.numpy(), mask.numpy(), **options)
        assert ours.tolist() == lm.generate(ids, mask, **options).tolist(), options


def test_names_are_those_of_optimum_and_the_source_is_read_once(exported):
    """As transformers.js calls it: empty pasts first, then the cached source, whatever states are given with it."""
    lm, onnx_lm, out = exported("marian")
    assert sorted(path.name for path in (out / "onnx").iterdir()) == [
        "decoder_model_merged.onnx",
        "encoder_model.onnx",
    ]
    past = [
        f"{i}.{side}.{part}"
        for i in range(2)
        for side in ("decoder", "encoder")
        for part in ("key", "value")
    ]
    assert {*onnx_lm.session.inputs} == {
        "input_ids",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "use_cache_branch",
        *(f"past_key_values.{n}" for n in past),
    }
    assert [*onnx_lm.session.outputs] == ["logits", *(f"present.{n}" for n in past)]
    ids, mask = (x.numpy() for x in batch(CASES["marian"]))
    start, ones = np.full((3, 1), 210), np.ones((3, 2), np.int64)
    source = onnx_lm.source(ids, mask)
    _, present = onnx_lm.step(start, ones[:, :1], source=source)
    assert [x.shape()[2] for x in present[:4]] == [1, 1, ids.shape[1], ids.shape[1]]
    logits = onnx_lm.step(start, ones, present, source)[0]
    other = source | {"encoder_hidden_states": np.zeros((3, ids.shape[1], 60), np.float32)}
    assert (onnx_lm.step(start, ones, present, other)[0] == logits).all()
    stored = sum(
        np.prod(t.dims)
        for path in (out / "onnx").iterdir()
        for t in onnx.load(path).graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
    )
    parameters = sum(p.numel() for p in lm.parameters()) + lm.embed.weight.numel()
    assert stored == pytest.approx(
        parameters, rel=0.01
    )  # each weight once in a file, the embedding in both


@pytest.mark.parametrize("name", READERS[:5] + ["t5"])
def test_run_says_what_the_command_of_tinylm_says(name, folder, exported, capsys):
    inputs = ["w9 w17 w30 w8", "w5 w6 w7 w11 w12 w13 w99"]
    inputs = {
        "bert-qa": [text + "\tw50 w9 w51 w52 w8 w53" for text in inputs],
        "roberta-mlm": ["w9 <mask> w30", "<mask> w8 w7 <mask> w3"],
    }.get(name, inputs)
    _, _, out = exported(name)
    capsys.readouterr()
    assert train.main(["run", str(out), *inputs, "--json", "--max-new-tokens", "20"]) == 0
    theirs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert onnxlm.main([str(out), *inputs, "--json", "--max-new-tokens", "20"]) == 0
    ours = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(ours) == 2 and all(row["output"] for row in ours)
    for row, other in zip(ours, theirs, strict=True):
        assert row["input"] == other["input"]
        for one, two in zip(row["output"], other["output"], strict=True):
            assert {k: v for k, v in one.items() if isinstance(v, (str, int))} == {
                k: v for k, v in two.items() if isinstance(v, (str, int))
            }
            for key in {"score", "embedding"} & set(two):
                assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5)


def test_long_contexts_are_read_in_windows(exported):
    _, onnx_lm, _ = exported("bert-qa")  # of 37 positions
    context = " ".join(f"w{5 + i * 7 % 190}" for i in range(90))
    ((found,),) = onnx_lm.run(["w9 w8"], [context])
    assert found["answer"] == context[found["start"] : found["end"]] != ""
    with pytest.raises(ValueError, match="expected a context"):
        onnx_lm.run(["w9 w8"])


def test_run_needs_no_torch(exported):
    script = f"""
import sys
for name in ("torch", "tinylm", "onnx", "transformers", "safetensors", "einops"):
    sys.modules[name] = None
import onnxlm
import onnxlm
onnxlm.main([{str(exported("distilbert-classify")[2])!r}, "w9 w8"])
onnxlm.main([{str(exported("t5")[2])!r}, "w9"])
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 2, run.stderr


@pytest.mark.slow
def test_minilm_embeds_as_in_torch(minilm, tmp_path, capsys):
    """Pooling and normalisation travel with the export."""
    export_onnx(minilm, tmp_path / "out")
    texts = ["This is an example sentence", "Each sentence is converted"]
    vectors = np.array(
        [row["embedding"] for (row,) in OnnxLM(tmp_path / "out", providers=CPU).run(texts)]
    )
    train.main(["run", str(minilm), *texts, "--json"])
    theirs = [
        json.loads(line)["output"][0]["embedding"] for line in capsys.readouterr().out.splitlines()
    ]
    assert vectors.shape == (2, 384) and np.allclose(vectors, theirs, atol=1e-5)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_tab_divides_only_what_has_two_parts(exported, capsys, monkeypatch):
    """Guards a text cut at its tab, and lines cut at a form feed."""
    _, onnx_lm, out = exported("electra-tokens")
    text = "w5 w6\tw7\x0cw8"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text + "\n\nw9\n"))
    assert onnxlm.main([str(out), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["input"] for line in lines] == [text, "w9"]
    assert [line["output"] for line in lines] == onnx_lm.run([text, "w9"])


def test_an_empty_text_is_a_text(exported, tmp_path):
    """Guards a batch lost to a text of no tokens, where a tokenizer has no specials."""
    _, _, folder = exported("qwen3-classify")
    out = shutil.copytree(folder, tmp_path / "out")
    content = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    found = OnnxLM(out, providers=CPU).run(["", "w5 w6"])
    assert len(found) == 2 and all(answer["score"] >= 0 for answer in found[0])
