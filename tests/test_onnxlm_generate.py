"""OnnxLM writes: its tokens, streams and chats are those of torch, and what is wrong is named as there."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT
from families import FAMILIES, ragged
from helpers import CPU, TINY, numpy

import onnxlm
import tinylm
from export import OnnxLM, export_onnx
from tinylm import Config, TinyLM


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
def test_same_seed_same_tokens_as_torch(options, small_export):
    """The noise is a function of seed, row, step and token: sampling agrees between torch and numpy, row by row."""
    lm, onnx_lm, _ = small_export
    ids = torch.randint(0, 256, (3, 6), generator=torch.Generator().manual_seed(1))
    ours = onnx_lm.generate(*numpy(ids), max_new_tokens=24, seed=5, **options)
    assert ours.tolist() == lm.generate(ids, max_new_tokens=24, seed=5, **options).tolist()
    if options.get("temperature"):
        assert (
            onnx_lm.generate(*numpy(ids), max_new_tokens=24, seed=6, **options).tolist()
            != ours.tolist()
        )


def test_stream_is_that_of_torch(small_export):
    lm, onnx_lm, _ = small_export
    for options in (dict(seed=1, temperature=1.0), dict(seed=2, temperature=1.0, stop=["e", "tz"])):
        assert "".join(onnx_lm.stream("größer", 60, **options)) == "".join(
            lm.stream("größer", max_new_tokens=60, **options)
        )


def test_beams_are_those_of_torch(small_export):
    """Guards a cache that is not reordered with its beams; rows padded on either side."""
    lm, onnx_lm, _ = small_export
    batch, mask = ragged([torch.arange(n, n + 9) for n in (3, 90, 40)], ["left", "right", "both"])
    batch, mask = (torch.cat((x, x.roll(1, 0)), 0) for x in (batch, mask))
    for options in (
        dict(num_beams=3),
        dict(num_beams=4, eos_token_id=[*range(90, 130)], early_stopping=True),
        dict(num_beams=2, no_repeat_ngram_size=1, length_penalty=3.0, repetition_penalty=1.3),
    ):
        ours = onnx_lm.generate(*numpy(batch, mask), max_new_tokens=12, **options)
        assert ours.tolist() == lm.generate(batch, mask, max_new_tokens=12, **options).tolist()


def test_eight_threads_write_what_each_writes_alone(small_export):
    """One OnnxLM, as a web server has it."""
    onnx_lm, calls = small_export[1], []
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
def test_logits_that_are_not_finite_are_an_error(options, small_export, monkeypatch):
    """Guards token 0 for ever, where a graph's numbers overflow."""
    onnx_lm, step = small_export[1], OnnxLM.step

    def overflow(self, *arguments, **named):
        logits, past = step(self, *arguments, **named)
        logits[..., 7] = np.nan
        return logits, past

    monkeypatch.setattr(OnnxLM, "step", overflow)
    with pytest.raises(ValueError, match="^the model's logits are not finite"):
        onnx_lm.generate(np.array([[1, 2]]), max_new_tokens=4, **options)


def test_a_chat_is_that_of_torch_and_ends_at_the_tokenizers_end(small_export, tmp_path):
    """Guards a chat that runs on where config.json names another end than the tokenizer; and a stop string that is a
    special token."""
    out = shutil.copytree(small_export[2], tmp_path / "out")
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


def test_eos_ends_a_row_and_pads_it(small_export):
    lm, onnx_lm, _ = small_export
    ids = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(1))
    free = lm.generate(ids, max_new_tokens=12, eos_token_id=())
    end = int(free[0, 8])
    ours = onnx_lm.generate(*numpy(ids), max_new_tokens=12, eos_token_id=end)
    assert ours.tolist() == lm.generate(ids, max_new_tokens=12, eos_token_id=end).tolist()
    assert end in ours[0] and ours.shape[1] <= free.shape[1]


def test_runs_without_torch(small_export):
    """An app has numpy, onnxruntime and tokenizers: importing torch, tinylm or onnx would be an error there."""
    script = f"""
import sys
for name in ("torch", "tinylm", "onnx", "transformers", "safetensors", "einops"):
    sys.modules[name] = None
import numpy
from onnxlm import OnnxLM
lm = OnnxLM({str(small_export[2])!r}, providers={CPU})
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
def test_bad_arguments_are_named(arguments, words, small_export):
    with pytest.raises(ValueError, match=words):
        OnnxLM(small_export[2], **arguments)


@pytest.mark.parametrize("version", ["1.23.2", "1.9.0"])
def test_an_old_onnxruntime_is_refused(version, small_export, monkeypatch):
    """Guards text that 1.23 writes wrongly, without a word."""
    monkeypatch.setattr("onnxruntime.__version__", version)
    words = f"^onnxruntime {version}: runs some graphs wrongly, expected at least 1.24; pip install"
    with pytest.raises(ValueError, match=words):
        OnnxLM(small_export[2], providers=CPU)


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
def test_bad_options_are_named_as_torch_names_them(options, small_export):
    """Guards options that numpy takes silently, or fails over somewhere inside."""
    lm, onnx_lm, _ = small_export
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=f"^{name} = .*expected ") as ours:
        onnx_lm.generate(np.array([[1, 2]]), **options)
    with pytest.raises(ValueError) as theirs:
        lm.generate(torch.tensor([[1, 2]]), **options)
    assert str(ours.value) == str(theirs.value)


def test_too_many_tokens_for_learned_positions_is_one_line(exported_folder):
    """Guards an exception of onnxruntime's own from the middle of a generation."""
    case = next(case for case in FAMILIES if case.family == "gpt2")
    lm = OnnxLM(exported_folder(case), providers=CPU)
    with pytest.raises(
        ValueError, match=r"^max_new_tokens = 5000 after 3 tokens, expected at most \d+ in all$"
    ):
        lm.generate(np.ones((1, 3), np.int64), max_new_tokens=5000, eos_token_id=())
    # The default is cut to what fits.
    limit = lm.session.limit
    assert lm.generate(np.ones((1, limit - 2), np.int64), eos_token_id=()).shape == (1, limit)


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


def test_stream_keeps_the_first_space_and_the_whole_prompt(small_export, tmp_path):
    """Guards a first space lost to decoders that strip it, and a prompt cut or padded as tokenizer.json says."""
    out = shutil.copytree(small_export[2], tmp_path / "out")
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
def test_bad_ids_are_named(ids, words, small_export):
    with pytest.raises(ValueError, match=words):
        small_export[1].generate(ids)


def test_a_provider_that_does_not_load_is_an_error(small_export):
    """Guards a silent fall back to the CPU where CUDA was asked for."""
    import onnxruntime

    if onnxlm.CUDA not in onnxruntime.get_available_providers() or onnxlm.has_cuda(onnxruntime):
        pytest.skip("needs the CUDA build of onnxruntime and a machine without a GPU")
    with pytest.raises(ValueError, match="CUDAExecutionProvider did not load"):
        OnnxLM(small_export[2], providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


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


def test_a_stream_has_no_beams(small_export, tmp_path):
    """As in tinylm: the number of beams in a folder's file is not for it."""
    out = shutil.copytree(small_export[2], tmp_path / "out")
    file = out / "generation_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"num_beams": 4, "decoder_start_token_id": None})
    )
    options = dict(max_new_tokens=4)
    assert [*OnnxLM(out, providers=CPU).stream([1, 2], **options)] == [
        *OnnxLM(small_export[2], providers=CPU).stream([1, 2], **options)
    ]
