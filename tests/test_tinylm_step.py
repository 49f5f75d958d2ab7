"""The training step: the loss and every weight as in transformers, its memory, and one graph for the compiler."""

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, SEQ2SEQ, load_oracle, prompts, ragged

import tinylm
import train
from tinylm import Config, MuonAdamW, TinyLM, loss_sum, train_step
from train import TrainOptions


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


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_of_a_mixture_of_experts_is_that_of_transformers(name, padded, folder):
    """With the loss that balances the experts, over the tokens that are read. The dense form that compiled and exported
    models take has the same gradients as the one that computes only chosen experts."""
    case = next(case for case in FAMILIES if case.name == name)
    settings = dict(output_router_logits=True, router_aux_loss_coef=0.3)
    lm = TinyLM.from_pretrained(folder(case), **settings).train()
    batch, mask = ragged([prompts(case, n, seed=n) for n in (11, 5)], ["right", "right"])
    mask = mask if padded else torch.ones_like(mask)
    labels = batch.masked_fill(mask == 0, -100)
    oracle = load_oracle(folder(case)).train()
    theirs = oracle(batch, attention_mask=mask, labels=labels)
    seen = oracle(batch[:, :-1], attention_mask=mask[:, :-1], output_router_logits=True)
    count = (labels[:, 1:] != -100).sum()
    expected = (theirs.loss + 0.3 * seen.aux_loss) * count
    inputs = {"input_ids": batch, "attention_mask": mask}
    sparse = gradients(lm, inputs)
    assert sparse[0] == pytest.approx(expected.item(), rel=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        same(sparse, gradients(lm, inputs))


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


def overfit(batch, steps=150):
    torch.manual_seed(0)
    lm = TinyLM(Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    losses = [train_step(lm, optimizer, batch) for _ in range(steps)]
    assert all(
        isinstance(loss, torch.Tensor) and loss.shape == () and not loss.requires_grad
        for loss in losses
    )
    assert losses[0] > 3.5 and losses[-1] < 0.05
    return lm.eval()


def test_train_step_overfits_a_batch():
    batch = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    lm = overfit(batch)
    assert torch.equal(lm.generate(batch[:, :8], max_new_tokens=8, eos_token_id=()), batch)


def test_train_step_overfits_a_padded_batch_with_labels():
    """Only what is labelled is learnt: the other tokens, replaced in the prompt, come out at chance."""
    rows = [
        torch.randint(64, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 16, 12)
    ]
    batch, mask = ragged(rows, ["left", "right", "right"])
    batch = batch % 64
    labels = batch.masked_fill(mask == 0, -100)
    labels[1, :8] = -100
    lm = overfit(dict(input_ids=batch, attention_mask=mask, labels=labels))
    with torch.no_grad():
        right = lm(batch, mask)[:, :-1].argmax(-1) == labels[:, 1:]
    assert right[
        (labels[:, 1:] != -100) & (mask[:, :-1] == 1)
    ].all()  # behind padding there is nothing to learn from
    with torch.no_grad():
        assert (lm(batch, mask)[1, :7].argmax(-1) == batch[1, 1:8]).float().mean() < 0.5


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_a_step_is_the_step_of_transformers(case, folder, tmp_path):
    """The loss, and every weight after a step of SGD, in a padded batch with labels: gradients flow as there."""
    ours, oracle = TinyLM.from_pretrained(folder(case)), load_oracle(folder(case))
    batch, mask = ragged([prompts(case, n, seed=n) for n in (12, 7)], ["right", "right"])
    labels = batch.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    ours_optimizer, theirs = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (ours, oracle))
    loss = train_step(
        ours, ours_optimizer, dict(input_ids=batch, attention_mask=mask, labels=labels)
    )
    reference = oracle(input_ids=batch, attention_mask=mask, labels=labels).loss
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    reference.backward()
    torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
    theirs.step()
    ours.save_pretrained(tmp_path)
    ours, before = load_oracle(tmp_path).state_dict(), load_oracle(folder(case)).state_dict()
    moved = oracle.state_dict()
    scale = max((moved[name] - before[name]).abs().max() for name in moved)
    for name in moved:
        assert ((ours[name] - moved[name]).abs().max() / scale).item() < 1e-4, name


@pytest.mark.parametrize("labelled", [False, True])
def test_accumulation_is_one_large_batch(labelled, folder):
    """Parts weigh by their labels, and a part that has none adds nothing (its mean would be 0 / 0)."""
    case = FAMILIES[1]
    batch = {"input_ids": prompts(case, 4, 12)}
    if labelled:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][0, :7] = batch["labels"][2:] = -100
    models = [TinyLM.from_pretrained(folder(case)) for _ in range(2)]
    losses = [
        train_step(lm, torch.optim.SGD(lm.parameters(), lr=1.0), batch, accumulate=parts)
        for lm, parts in zip(models, (1, 4))
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for one, other in zip(*(lm.parameters() for lm in models)):
        assert torch.isfinite(other).all() and (one - other).abs().max() < 1e-5


def test_step_takes_an_empty_mask():
    lm = TinyLM(Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    batch = dict(input_ids=torch.randint(64, (2, 8)), attention_mask=None)
    assert torch.isfinite(train_step(lm, torch.optim.SGD(lm.parameters(), lr=0.1), batch))
