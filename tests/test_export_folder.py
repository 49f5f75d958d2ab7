"""The way out: the exported folder, its graph, and ONNX Runtime's tokens against torch and transformers."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from families import (
    CASES,
    FAMILIES,
    assert_same_text,
    difference,
    load_oracle,
    prompts,
    ragged,
    some_slow,
)

import export
import onnxlm
import tinylm
from export import OnnxLM, export_onnx
from tinylm import Config, TinyLM

SPECIAL = [
    case
    for case in CASES
    if case.name in ("llama-yarn-tuned", "llama-dynamic", "gpt2-inner", "phi3-window")
]
CPU = ["CPUExecutionProvider"]


@pytest.fixture(scope="session")
def exported(exported_folder):
    """exported(case) -> the folder that export.py wrote from the oracle."""
    return lambda case: exported_folder(case.name)


def numpy(*tensors):
    return [tensor.numpy() for tensor in tensors]


# ---- the graph, family by family ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", some_slow(FAMILIES + SPECIAL), ids=str)
def test_logits_and_tokens_are_those_of_transformers(case, folder, exported):
    """From a checkpoint that transformers wrote, through the export, under ONNX Runtime; rows padded on either side."""
    oracle, lm, onnx_lm = (
        load_oracle(folder(case)),
        TinyLM.from_pretrained(folder(case)),
        OnnxLM(exported(case), providers=CPU),
    )
    ids = prompts(case, 2, 15)
    with torch.no_grad():
        assert difference(torch.from_numpy(onnx_lm(*numpy(ids))), oracle(ids).logits) < 1e-4
    rows = [prompts(case, n, seed=n) for n in (11, 4, 7)]
    batch, mask = ragged(rows, ["left", "right", "both"])
    options = dict(max_new_tokens=9, eos_token_id=())
    tokens = onnx_lm.generate(*numpy(batch, mask), **options)
    assert tokens.tolist() == lm.generate(batch, mask, **options).tolist()
    for row, prompt in zip(tokens, rows, strict=True):
        theirs = oracle.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.no_grad():
            logits = oracle(theirs).logits[0]
        ours = [*prompt.tolist(), *row[batch.shape[1] :].tolist()]
        assert_same_text(ours, theirs[0].tolist(), logits, len(prompt))


@pytest.mark.parametrize("case", some_slow(FAMILIES), ids=str)
def test_graph_has_single_operators_and_each_weight_once(case, folder, exported):
    """Guards attention, rotary positions and norms that leave the trace written out, and a tied head stored twice."""
    path, lm = exported(case) / "onnx" / "model.onnx", TinyLM.from_pretrained(folder(case))
    graph = onnx.load(path).graph
    onnx.checker.check_model(path, full_check=True)
    found, layers = Counter(node.op_type for node in graph.node), lm.config.num_hidden_layers
    skip = found[
        "SkipSimplifiedLayerNormalization"
    ]  # a sum of the residual stream and the norm after it
    assert {node.op_type for node in graph.node if node.domain} <= {
        "SkipSimplifiedLayerNormalization"
    }
    assert lm.config.norm == "layer" or lm.config.norm_position == "output" or skip == 2 * layers
    assert found["Attention"] == layers and not found["Softmax"]
    assert found["RotaryEmbedding"] == (2 * layers if lm.config.position == "rope" else 0)
    norms = sum(name.endswith("norm.weight") for name in lm.state_dict())
    assert (
        skip + found["RMSNormalization" if lm.config.norm == "rms" else "LayerNormalization"]
        == norms
    )
    stored = sum(
        np.prod(tensor.dims)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    )
    assert stored == pytest.approx(sum(p.numel() for p in lm.parameters()), rel=0.01)


def test_names_and_axes_are_those_of_optimum(exported):
    case = FAMILIES[1]
    graph = onnx.load(exported(case) / "onnx" / "model.onnx").graph
    shape = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    kv, width = (
        case.fields["num_key_value_heads"],
        case.fields["hidden_size"] // case.fields["num_attention_heads"],
    )
    assert shape["input_ids"] == shape["position_ids"] == ["batch_size", "sequence_length"]
    assert shape["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shape["logits"] == ["batch_size", "sequence_length", case.fields["vocab_size"]]
    for i in range(case.fields["num_hidden_layers"]):
        for part in ("key", "value"):
            assert shape[f"past_key_values.{i}.{part}"] == [
                "batch_size",
                kv,
                "past_sequence_length",
                width,
            ]
            assert shape[f"present.{i}.{part}"][0::3] == ["batch_size", width]
    assert len(shape) == 4 + 4 * case.fields["num_hidden_layers"]


def test_file_names_no_machine(exported):
    """Guards the stack traces that the exporter leaves in a file's metadata."""
    content = (exported(FAMILIES[1]) / "onnx" / "model.onnx").read_bytes()
    for trace in (
        b"site-packages",
        b"stack_trace",
        b"pkg.torch",
        str(ROOT).encode(),
        sys.prefix.encode(),
    ):
        assert trace not in content, trace


def test_loading_prints_nothing(exported):
    """Guards outputs declared with wrong shapes: ONNX Runtime warns of each at every load."""
    script = f"from export import OnnxLM; OnnxLM({str(exported(FAMILIES[1]))!r}, providers={CPU})"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == run.stdout == "", run.stderr


# ---- OnnxLM ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model of bytes, in torch and exported."""
    torch.manual_seed(3)
    lm = TinyLM(
        Config(
            hidden_size=48,
            num_attention_heads=3,
            num_hidden_layers=2,
            initializer_range=0.3,
            eos_token_id=256,
            pad_token_id=257,
        )
    ).eval()
    out = tmp_path_factory.mktemp("small") / "out"
    found = export_onnx(lm, out)["fp32"]
    assert found["greedy tokens"] == 32 and all(
        value < 2e-4 for name, value in found.items() if name != "greedy tokens"
    )
    return lm, OnnxLM(out, providers=CPU), out


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=9),
        dict(temperature=1.2, top_p=0.8),
        dict(repetition_penalty=1.7),
        dict(temperature=1.0, min_p=0.05),
        dict(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_same_seed_same_tokens_as_torch(options, small):
    """The noise is a function of seed, row, step and token: sampling agrees between torch and numpy, row by row."""
    lm, onnx_lm, _ = small
    ids = torch.randint(0, 256, (3, 6), generator=torch.Generator().manual_seed(1))
    ours = onnx_lm.generate(*numpy(ids), max_new_tokens=24, seed=5, **options)
    assert ours.tolist() == lm.generate(ids, max_new_tokens=24, seed=5, **options).tolist()
    if options.get("temperature"):
        assert (
            onnx_lm.generate(*numpy(ids), max_new_tokens=24, seed=6, **options).tolist()
            != ours.tolist()
        )


def test_stream_is_that_of_torch(small):
    lm, onnx_lm, _ = small
    for options in (dict(seed=1, temperature=1.0), dict(seed=2, temperature=1.0, stop=["e", "tz"])):
        assert "".join(onnx_lm.stream("größer", 60, **options)) == "".join(
            lm.stream("größer", max_new_tokens=60, **options)
        )


def test_beams_are_those_of_torch(small):
    """Guards a cache that is not reordered with its beams; rows padded on either side."""
    lm, onnx_lm, _ = small
    batch, mask = ragged([torch.arange(n, n + 9) for n in (3, 90, 40)], ["left", "right", "both"])
    batch, mask = (torch.cat((x, x.roll(1, 0)), 0) for x in (batch, mask))
    for options in (
        dict(num_beams=3),
        dict(num_beams=4, eos_token_id=[*range(90, 130)], early_stopping=True),
        dict(num_beams=2, no_repeat_ngram_size=1, length_penalty=3.0, repetition_penalty=1.3),
    ):
        ours = onnx_lm.generate(*numpy(batch, mask), max_new_tokens=12, **options)
        assert ours.tolist() == lm.generate(batch, mask, max_new_tokens=12, **options).tolist()


def test_eight_threads_write_what_each_writes_alone(small):
    """One OnnxLM, as a web server has it."""
    onnx_lm, calls = small[1], []
    for i in range(16):
        ids = np.arange(2 * (3 + i % 7)).reshape(2, -1) + i
        options = dict(max_new_tokens=3 + i, seed=i, temperature=float(i % 2))
        calls += [
            lambda ids=ids, options=options: onnx_lm.generate(ids, **options).tolist(),
            lambda i=i, ids=ids: onnx_lm.generate(ids, max_new_tokens=2 + i, num_beams=2).tolist(),
            lambda i=i, options=options: [*onnx_lm.stream("ab" * (1 + i), **options, stop="e")],
        ]
    alone = [call() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        assert [future.result() for future in [pool.submit(call) for call in calls]] == alone


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.0), dict(num_beams=2)], ids=str)
def test_logits_that_are_not_finite_are_an_error(options, small, monkeypatch):
    """Guards token 0 for ever, where a graph's numbers overflow."""
    onnx_lm, step = small[1], OnnxLM.step

    def overflow(self, *arguments, **named):
        logits, past = step(self, *arguments, **named)
        logits[..., 7] = np.nan
        return logits, past

    monkeypatch.setattr(OnnxLM, "step", overflow)
    with pytest.raises(ValueError, match="^the model's logits are not finite"):
        onnx_lm.generate(np.array([[1, 2]]), max_new_tokens=4, **options)


def test_a_chat_is_that_of_torch_and_ends_at_the_tokenizers_end(small, tmp_path):
    """Guards a chat that runs on where config.json names another end than the tokenizer; and a stop string that is a
    special token."""
    out = shutil.copytree(small[2], tmp_path / "out")
    file = out / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    lm, onnx_lm = TinyLM.from_pretrained(out), OnnxLM(out, providers=CPU)
    say = [{"role": "user", "content": "ROMEO:"}]
    options = dict(max_new_tokens=30, temperature=1.0, seed=2)
    whole = onnx_lm.generate(np.array([[*b"ROMEO:"]]), eos_token_id=(), **options)[0, 6:].tolist()
    assert "".join(onnx_lm.chat(say, **options)) == "".join(lm.chat(say, **options))
    end = next(token for token in whole if whole.index(token) > 5)
    lm.tokenizer.eos_token_id = onnx_lm.tokenizer.eos_token_id = end
    text = "".join(onnx_lm.chat(say, **options))
    assert text == "".join(lm.chat(say, **options))
    assert len(text) < len("".join(onnx_lm.chat(say, eos_token_id=None, **options)))


def test_eos_ends_a_row_and_pads_it(small):
    lm, onnx_lm, _ = small
    ids = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(1))
    free = lm.generate(ids, max_new_tokens=12, eos_token_id=())
    end = int(free[0, 8])
    ours = onnx_lm.generate(*numpy(ids), max_new_tokens=12, eos_token_id=end)
    assert ours.tolist() == lm.generate(ids, max_new_tokens=12, eos_token_id=end).tolist()
    assert end in ours[0] and ours.shape[1] <= free.shape[1]


def test_runs_without_torch(small):
    """An app has numpy, onnxruntime and tokenizers: importing torch, tinylm or onnx would be an error there."""
    script = f"""
import sys
for name in ("torch", "tinylm", "onnx", "transformers", "safetensors", "einops"):
    sys.modules[name] = None
import numpy
from onnxlm import OnnxLM
lm = OnnxLM({str(small[2])!r}, providers={CPU})
assert lm(numpy.array([[1, 2, 3]])).shape == (1, 3, 320)
assert lm.generate(numpy.array([[1, 2, 3]]), max_new_tokens=4).shape[0] == 1
print("".join(lm.stream("hi", max_new_tokens=4, temperature=1.0, seed=1)).encode())
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(precision="int3"), "precision = 'int3'"),
        (dict(providers=["FooExecutionProvider"]), "FooExecutionProvider"),
    ],
)
def test_bad_arguments_are_named(arguments, words, small):
    with pytest.raises(ValueError, match=words):
        OnnxLM(small[2], **arguments)


@pytest.mark.parametrize("version", ["1.23.2", "1.9.0"])
def test_an_old_onnxruntime_is_refused(version, small, monkeypatch):
    """Guards text that 1.23 writes wrongly, without a word."""
    monkeypatch.setattr("onnxruntime.__version__", version)
    words = f"^onnxruntime {version}: runs some graphs wrongly, expected at least 1.24; pip install"
    with pytest.raises(ValueError, match=words):
        OnnxLM(small[2], providers=CPU)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1),
        dict(temperature=True),
        dict(temperature="hot"),
        dict(top_k=-1),
        dict(top_k=2.5),
        dict(top_p=1.5),
        dict(min_p=-0.1),
        dict(repetition_penalty=0),
        dict(seed=1.5),
        dict(stop=""),
        dict(stop=[3]),
        dict(max_new_tokens=0),
        dict(max_new_tokens=1.5),
        dict(eos_token_id="end"),
        dict(eos_token_id=[0.5]),
    ],
    ids=str,
)
def test_bad_options_are_named_as_torch_names_them(options, small):
    """Guards options that numpy takes silently, or fails over somewhere inside."""
    lm, onnx_lm, _ = small
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=f"^{name} = .*expected ") as ours:
        onnx_lm.generate(np.array([[1, 2]]), **options)
    with pytest.raises(ValueError) as theirs:
        lm.generate(torch.tensor([[1, 2]]), **options)
    assert str(ours.value) == str(theirs.value)


def test_too_many_tokens_for_learned_positions_is_one_line(exported):
    """Guards an exception of onnxruntime's own from the middle of a generation."""
    case = next(case for case in FAMILIES if case.family == "gpt2")
    lm = OnnxLM(exported(case), providers=CPU)
    with pytest.raises(
        ValueError, match=r"^max_new_tokens = 5000 after 3 tokens, expected at most \d+ in all$"
    ):
        lm.generate(np.ones((1, 3), np.int64), max_new_tokens=5000, eos_token_id=())


def metaspace(folder, vocab):
    """A tokenizer as SentencePiece's: a space is part of the word after it, and the first one of a text is stripped. It
    has the settings of somebody's training, too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"<unk>": 0} | {f"\u2581w{i}" if i % 2 else f"x{i}": i for i in range(1, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9, pad_id=1)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_stream_keeps_the_first_space_and_the_whole_prompt(small, tmp_path):
    """Guards a first space lost to decoders that strip it, and a prompt cut or padded as tokenizer.json says."""
    out = shutil.copytree(small[2], tmp_path / "out")
    metaspace(out, 320)
    lm = OnnxLM(out, providers=CPU)
    ids = [1, 3, 5, 7, 9]
    assert lm.tokenizer.encode("w1 w3 w5 w7 w9") == ids
    spaces = 0
    for seed in range(4):
        options = dict(max_new_tokens=6, temperature=1.5, seed=seed, eos_token_id=())
        whole = lm.generate(np.array([ids]), **options)[0]
        text = lm.tokenizer.decode(whole)
        assert text == "w1 w3 w5 w7 w9" + "".join(lm.stream("w1 w3 w5 w7 w9", **options))
        spaces += whole[5] % 2
    assert spaces  # of what was to be lost


@pytest.mark.parametrize(
    "ids, words",
    [
        (np.zeros((1, 0), np.int64), "input_ids"),
        (np.zeros(3, np.int64), "input_ids"),
        (np.array([[320]]), "vocab_size"),
        (np.array([[0.5]]), "input_ids"),
    ],
    ids=str,
)
def test_bad_ids_are_named(ids, words, small):
    with pytest.raises(ValueError, match=words):
        small[1].generate(ids)


def test_a_provider_that_does_not_load_is_an_error(small):
    """Guards a silent fall back to the CPU where CUDA was asked for."""
    import onnxruntime

    if onnxlm.CUDA not in onnxruntime.get_available_providers() or onnxlm.has_cuda(onnxruntime):
        pytest.skip("needs the CUDA build of onnxruntime and a machine without a GPU")
    with pytest.raises(ValueError, match="CUDAExecutionProvider did not load"):
        OnnxLM(small[2], providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


TINY = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    "pad", [None, *(pytest.param(pad, marks=pytest.mark.slow) for pad in (-1, 320))]
)
def test_rows_end_with_an_id_that_there_is(pad, tmp_path):
    """Guards an id that pads and is no token."""
    torch.manual_seed(0)
    lm = TinyLM(Config(**TINY, eos_token_id=256, pad_token_id=pad)).eval()
    ids = torch.tensor([[3, 5], [7, 9]])
    free = lm.generate(ids, max_new_tokens=8, eos_token_id=())
    lm.config = tinylm.replace(lm.config, eos_token_id=int(free[0, 3]))
    # in the graph of the whole text, none is as one that is no token
    export_onnx(lm, tmp_path / "out", generate=pad is not None)
    assert (
        OnnxLM(tmp_path / "out", providers=CPU).generate(ids.numpy(), max_new_tokens=8).tolist()
        == lm.generate(ids, max_new_tokens=8).tolist()
    )
    assert (
        0
        <= json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["pad_token_id"]
        < 320
    )


def test_positions_end_where_the_graph_says(tmp_path):
    """Guards an error of onnxruntime's, or zeros from CUDA's Gather, in the middle of a text."""
    lm = TinyLM(Config(**TINY | dict(hidden_size=64), max_position_embeddings=48)).eval()
    export_onnx(lm, tmp_path / "out", precisions=["fp16"])
    onnx_lm = OnnxLM(tmp_path / "out", "fp16", providers=CPU)
    assert onnx_lm.generate(
        np.ones((1, 40), np.int64), max_new_tokens=8, eos_token_id=()
    ).shape == (1, 48)
    with pytest.raises(
        ValueError, match="^max_new_tokens = 9 after 40 tokens, expected at most 48 in all$"
    ):
        onnx_lm.generate(np.ones((1, 40), np.int64), max_new_tokens=9)
    with pytest.raises(
        ValueError, match="^input_ids: 49 tokens, but the model has only 48 positions$"
    ):
        onnx_lm(np.ones((1, 49), np.int64))


@pytest.mark.parametrize(
    "name, value", [("no_repeat_ngram_size", 2), ("repetition_penalty", 1.3), ("min_length", 3)]
)
def test_one_graph_has_no_constraints(name, value, tmp_path):
    """Guards a generate.onnx that says other than the folder's generation_config.json."""
    lm = TinyLM(Config(**TINY))
    lm.generation_config = {name: value}
    with pytest.raises(export.Error, match=f"^--generate: generation_config.json has {name}"):
        export_onnx(lm, tmp_path / "out", generate=True)


def test_a_stream_has_no_beams(small, tmp_path):
    """As in tinylm: the number of beams in a folder's file is not for it."""
    out = shutil.copytree(small[2], tmp_path / "out")
    file = out / "generation_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"num_beams": 4, "decoder_start_token_id": None})
    )
    options = dict(max_new_tokens=4)
    assert [*OnnxLM(out, providers=CPU).stream([1, 2], **options)] == [
        *OnnxLM(small[2], providers=CPU).stream([1, 2], **options)
    ]


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


# ---- the command ----------------------------------------------------------------------------------------------------


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


def test_safetensors_alone_and_an_export_again(folder, exported, tmp_path):
    """Without --onnx there is no graph; an earlier export in the same place is replaced whole."""
    source, out = folder(FAMILIES[1]), shutil.copytree(exported(FAMILIES[1]), tmp_path / "out")
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


def test_the_speed_counts_tokens(small, tmp_path, monkeypatch, capsys):
    """Guards pieces of text taken for tokens: a character of four bytes is one piece."""
    lm = OnnxLM(small[2], providers=CPU)
    clock = iter(range(10**6))
    monkeypatch.setattr(
        export.time, "monotonic", lambda: next(clock)
    )  # one second from token to token
    monkeypatch.setattr(lm, "tokens", lambda *_, **__: iter("\U0001f600".encode() * 9))
    export.show(lm, "hi", 36)
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


# ---- leaves that somebody replaced ----------------------------------------------------------------------------------


class SquaredReLU(tinylm.MLP):
    """The README's."""

    def forward(self, x):
        return self.down(torch.relu(self.up(x)).square())


def plain_attend(
    q, k, v, mask, head_dim, scale, softcap=None, dropout=0.0, cache=None, layer=0, causal=True
):
    """Attention as somebody writes it, with twice the scale and a cache that it asks for keys and values."""
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if cache is not None:
        k, v = cache.update(layer, k, v)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (2 * scale)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def operators(folder, file="model.onnx"):
    return Counter(node.op_type for node in onnx.load(folder / "onnx" / file).graph.node)


@pytest.mark.parametrize(
    "leaf, replacement, fields",
    [
        ("MLP", SquaredReLU, dict(gated=False)),
        pytest.param("attend", plain_attend, dict(num_key_value_heads=1), marks=pytest.mark.slow),
    ],
)
def test_a_replaced_leaf_is_traced_as_it_is(leaf, replacement, fields, tmp_path, monkeypatch):
    """Guards the stock operator in the place of somebody's own leaf; what is not replaced stays a single operator."""
    monkeypatch.setattr(tinylm, leaf, replacement)
    torch.manual_seed(1)
    sizes = TINY | dict(hidden_size=32, head_dim=16, initializer_range=0.4)
    lm = TinyLM(Config(**sizes | fields)).eval().requires_grad_(False)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    ours = lm(ids)
    precisions = ["fp32", "fp16"]  # in 16 bits the stock attention would be grouped
    export_onnx(lm, tmp_path / "out", precisions=precisions)
    for precision, tolerance in zip(precisions, (1e-4, 2e-2)):
        onnx_lm = OnnxLM(tmp_path / "out", precision, providers=CPU)
        assert difference(torch.from_numpy(onnx_lm(ids.numpy())), ours) < tolerance
        held = onnx_lm.step(ids[:, :3].numpy(), np.ones((1, 3), np.int64))[1]
        last = onnx_lm.step(ids[:, 3:].numpy(), np.ones((1, 5), np.int64), held)[0]
        assert difference(torch.from_numpy(last), ours[:, 3:]) < tolerance
    found = operators(tmp_path / "out"), operators(tmp_path / "out", "model_fp16.onnx")
    assert found[0]["RotaryEmbedding"] == 2 and not found[1]["RotaryEmbedding"] or leaf == "attend"
    assert [bool(x["Attention"] + x["GroupQueryAttention"]) for x in found] == [leaf == "MLP"] * 2
    monkeypatch.undo()
    if leaf == "attend":  # it did change something
        assert difference(lm(ids), ours) > 1e-2


def fused_attend(
    q, k, v, mask, head_dim, scale, softcap=None, dropout=0.0, cache=None, layer=0, causal=True
):
    """Attention as somebody writes it who has PyTorch compute it."""
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if cache is not None:
        k, v = cache.update(layer, k, v)
    square = mask is None and causal
    x = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=square)
    return x.transpose(1, 2).flatten(2)


@pytest.mark.slow
def test_a_replaced_attend_gets_a_mask_for_every_query(tmp_path, monkeypatch):
    """ONNX Runtime refused an encoder's mask of one row for all queries; and norms of the keys of a source could not be
    traced."""
    monkeypatch.setattr(tinylm, "attend", fused_attend)
    lm = TinyLM(Config(**TINY, num_encoder_layers=1, position="learned", qk_norm="head")).eval()
    found = export_onnx(lm, tmp_path / "out", safetensors=False)["fp32"]
    assert max(found[name] for name in ("prefill", "left padding", "decode")) < 1e-5


def test_a_near_tie_of_greedy_tokens_is_no_difference():
    """Rounding decided which of two tokens came, and refused the export."""
    theirs, ours = np.array([[5, 1, 2, 3]]), np.array([[5, 1, 4, 3]])
    logits = np.array([[0.0, 0, 2, 0, 2 - 1e-4]])
    assert export.columns_to_compare(ours, theirs, lambda ids: logits, 2e-4) == 2
    assert export.columns_to_compare(ours, theirs, lambda ids: logits, 2e-5) == 4


def test_each_replaced_leaf_is_known(monkeypatch):
    """Whatever takes its place: a function, one that is wrapped under its name, a lambda."""
    for name in ("rms_norm", "rotate", "attend", "linear"):
        own = getattr(tinylm, name)
        assert export.is_own(own)
        assert not export.is_own(functools.wraps(own)(lambda *_: None))
    lm = TinyLM(Config(**TINY | dict(hidden_size=64)))
    stored = export.PRECISIONS["fp16"]
    assert export.groups_queries(lm, stored)

    class Mine(tinylm.Attention):
        def forward(self, *arguments):
            return super().forward(*arguments)

    monkeypatch.setattr(tinylm, "Attention", Mine)
    assert not export.groups_queries(TinyLM(lm.config), stored)
    assert export.groups_queries(lm, stored)
    monkeypatch.setattr(tinylm, "rotate", lambda *_: None)
    assert not export.groups_queries(lm, stored)


# ---- numbers that overflow ------------------------------------------------------------------------------------------


def test_values_beyond_float16_are_refused(tmp_path):
    """Guards an fp16 graph that passed on random ids and gave NaN on others: one id's embedding is enough."""
    lm = TinyLM(Config(**TINY, tie_word_embeddings=False)).eval().requires_grad_(False)
    lm.embed.weight[7] = 30000.0
    lines, texts = [], export.range_texts(lm, None)
    assert 7 in texts[-1]
    export.check_range(lm, "fp16", export.PRECISIONS["fp16"], texts, lines.append)
    assert "fp16: take care" in lines[0] and "float16 ends at 65504" in lines[0]
    lm.layers[0].mlp.down.bias = torch.nn.Parameter(torch.full((32,), 60000.0))
    words = r"^verify: fp16: layers.0\S* reaches [\d.e+]+, and float16 ends at 65504"
    with pytest.raises(export.Error, match=words):
        export_onnx(lm, tmp_path / "out", precisions=["fp16"])
    export.check_range(lm, "int8", export.PRECISIONS["int8"], texts, lines.append)
    assert len(lines) == 1 and not (tmp_path / "out").exists()
