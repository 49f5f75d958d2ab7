"""What training costs: memory that is saved without a change, one graph for the compiler, kernels that are taken."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from families import FAMILIES, SEQ2SEQ, prompts
from test_train_scratch import TEXT, same_files

import data as datafiles
import tinylm
import train
from tinylm import Config, MuonAdamW, TinyLM, loss_sum, train_step
from train import TrainOptions, main


def gradients(lm, batch):
    lm.zero_grad()
    loss = loss_sum(lm.train(), batch)
    loss.backward()
    return loss.item(), {
        name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None
    }


def same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5) and one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert (grad - other[1][name]).abs().max() <= 1e-4 * max(grad.abs().max(), 1e-3), name


@pytest.mark.parametrize("case", [*FAMILIES[::4], SEQ2SEQ[0], SEQ2SEQ[-1]], ids=str)
@pytest.mark.parametrize("labelled", [False, True])
def test_logits_in_chunks_have_the_same_gradients(case, labelled, folder, monkeypatch):
    lm = TinyLM.from_pretrained(folder(case))
    batch = {"input_ids": prompts(case, 3, 12)}
    if lm.encoder is not None:
        batch |= dict(
            labels=prompts(case, 3, 7, seed=1), decoder_input_ids=prompts(case, 3, 7, seed=2)
        )
    elif labelled:
        batch["labels"] = batch["input_ids"].masked_fill(torch.arange(12) < 5, -100)
    lm.config = tinylm.replace(lm.config, hidden_dropout=0.0)
    for module in lm.modules():
        module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        module.dropout = (
            0.0 if isinstance(module, tinylm.Attention) else getattr(module, "dropout", None)
        )
    whole = gradients(lm, batch)
    monkeypatch.setattr(tinylm, "CHUNKED_LOSS_MIN_LOGITS", 0)
    same(whole, gradients(lm, batch))


def test_a_head_of_several_layers_is_run_whole(monkeypatch):
    """Guards a loss in chunks that leaves out the layers before the output."""
    lm = TinyLM(
        Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            head_act="gelu",
        )
    )
    batch = {"input_ids": torch.randint(64, (2, 16))}
    whole = gradients(lm, batch)
    monkeypatch.setattr(tinylm, "CHUNKED_LOSS_MIN_LOGITS", 0)
    same(whole, gradients(lm, batch))


def test_checkpointed_layers_have_the_same_gradients():
    """With dropout: the second forward pass draws what the first one drew."""
    batch, found = {"input_ids": torch.randint(64, (2, 16))}, []
    for checkpoint in (False, True):
        options = TrainOptions(size="nano", dropout=0.1, checkpoint=checkpoint).filled()
        lm = train.build_model([{"text": "x"}], options, False)
        torch.manual_seed(0)
        for layer in lm.layers:
            torch.nn.init.normal_(layer.mlp.down.weight, std=0.1)
        torch.manual_seed(1)
        found.append(gradients(lm, batch))
    same(*found)


def test_the_forward_pass_of_a_step_is_one_graph():
    """Zero graph breaks, loss included, in float32 and in bfloat16."""
    lm = TinyLM(
        Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ).train()
    ids = torch.randint(64, (2, 16))
    for bf16 in (False, True):
        found = torch._dynamo.explain(lambda ids: loss_sum(lm, {"input_ids": ids}, bf16=bf16))(ids)
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
        torch._dynamo.reset()


def test_attention_of_a_step_has_no_mask(monkeypatch):
    """is_causal and None, by which the flash kernels are taken; with padding there is a mask."""
    calls, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, mask=None, dropout_p=0.0, is_causal=False, **options):
        calls.append((mask is None, is_causal))
        return real(q, k, v, mask, dropout_p, is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    lm = TinyLM(Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    batch = torch.randint(64, (2, 16))
    optimizer = MuonAdamW(lm)
    train_step(lm, optimizer, batch)
    assert calls == [(True, True)] * 2
    assert optimizer.adamw.param_groups[0]["fused"]
    train_step(
        lm,
        optimizer,
        dict(input_ids=batch, attention_mask=(torch.arange(16) < 9).long().expand(2, -1)),
    )
    assert calls[2:] == [(False, False)] * 2


def test_bfloat16_keeps_weights_and_their_averages_in_float32():
    lm = TinyLM(Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    optimizer = MuonAdamW(lm)
    seen = []
    lm.layers[0].mlp.down.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    losses = [
        train_step(lm, optimizer, torch.arange(64).view(4, 16), bf16=True).item() for _ in range(30)
    ]
    assert seen[0] == torch.bfloat16 and losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in lm.parameters())
    assert all(
        value.dtype == torch.float32
        for state in optimizer.state.values()
        for value in state.values()
    )


def test_a_step_equals_that_of_torchs_muon():
    """torch.optim.Muon, whose products are rounded to bfloat16."""
    lms = [
        TinyLM(Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        for _ in range(2)
    ]
    lms[1].load_state_dict(lms[0].state_dict())
    matrices = [p for p in lms[1].layers.parameters() if p.ndim == 2]
    optimizers = MuonAdamW(lms[0], lr=0.01), torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1)
    before = {name: p.clone() for name, p in lms[0].layers.named_parameters() if p.ndim == 2}
    for lm, optimizer in zip(lms, optimizers):
        loss_sum(lm, {"input_ids": torch.arange(64).view(4, 16)}).backward()
        optimizer.step()
    for name, p in before.items():
        ours, theirs = (lm.layers.get_parameter(name) - p for lm in lms)
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max(), name


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
    monkeypatch.setattr(
        datafiles, "split_rows", lambda rows, real=datafiles.split_rows: at(rows, real, monkeypatch)
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


def at(rows, split, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(datafiles, "MMAP_MIN_BYTES", 2**26)
        return split(rows)


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
    assert "not that of the run" in capsys.readouterr().err
