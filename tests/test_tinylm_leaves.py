"""Leaves replaced in place, inputs of every kind, and one model in many threads."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import tinylm
from tinylm import Config, MuonAdamW, TinyLM, train_step

SMALL = Config(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
SEQ2SEQ = tinylm.replace(SMALL, num_encoder_layers=1, position="learned")


class SquaredReLU(nn.Module):
    """An MLP with names of its own, and a buffer that no checkpoint has."""

    def __init__(self, config):
        super().__init__()
        self.inner = nn.Linear(config.hidden_size, 48)
        self.outer = nn.Linear(48, config.hidden_size)
        self.register_buffer("two", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        return self.outer(self.inner(x).relu() ** self.two)


class ScaledNorm(nn.Module):
    def __init__(self, config, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * x / (1 + x.square().mean(-1, keepdim=True))


class ParallelBlock(tinylm.Block):
    def forward(self, x, rope, mask, cache=None, layer=0, cross_kv=None, encoder_mask=None):
        y = self.attention_norm(x)
        return x + self.attention(y, rope, mask, cache, layer) + self.mlp(y)


class Mixer(nn.Module):
    """A block without attention and MLP."""

    def __init__(self, config):
        super().__init__()
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, *_):
        return x + self.mix(x)


def negative_attend(*arguments, attend=tinylm.attend, **options):
    return -attend(*arguments, **options)


def test_a_block_may_have_no_attention_and_no_mlp(monkeypatch):
    monkeypatch.setattr(tinylm, "Block", Mixer)
    lm = TinyLM(SMALL)
    assert lm(torch.arange(6)[None]).shape == (1, 6, 320)


LEAVES = {
    "MLP": SquaredReLU,
    "Norm": ScaledNorm,
    "Block": ParallelBlock,
    "attend": negative_attend,
}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_replaced_leaf_trains_and_is_saved_and_loaded_with_its_name(leaf, tmp_path, monkeypatch):
    """A model with another MLP was loaded again without it, and silently computed something else."""
    ids = torch.arange(40).view(2, 20)
    monkeypatch.setattr(tinylm, leaf, LEAVES[leaf])
    lm = TinyLM(SMALL)
    optimizer = MuonAdamW(lm)
    losses = [train_step(lm, optimizer, ids).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    expected = lm.eval()(ids)
    lm.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "tinylm"
    assert raw["tinylm_replaced"] == {leaf: f"{__name__}.{LEAVES[leaf].__name__}"}
    again = TinyLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids), expected)
    assert torch.equal(again.generate(ids, max_new_tokens=3), lm.generate(ids, max_new_tokens=3))
    monkeypatch.undo()
    with pytest.raises(
        tinylm.Error, match=f"config.json: saved with {leaf} replaced by .*{leaf}|stock"
    ):
        TinyLM.from_pretrained(tmp_path)
    monkeypatch.setattr(tinylm, leaf, lambda *_: None)
    with pytest.raises(tinylm.Error, match="<lambda>"):
        TinyLM.from_pretrained(tmp_path)


def test_a_llama_with_another_mlp_is_no_llama(tmp_path, monkeypatch):
    """Saved as model_type llama, transformers would load it and compute something else."""
    config = tinylm.replace(SMALL, qk_norm=None, tie_word_embeddings=False, model_type="llama")
    monkeypatch.setattr(tinylm, "attend", negative_attend)
    lm = TinyLM(config)
    lm.save_pretrained(tmp_path / "replaced")
    monkeypatch.undo()
    lm.save_pretrained(tmp_path / "stock")  # a function counts where it is called
    kinds = [
        json.loads((tmp_path / name / "config.json").read_text())["model_type"]
        for name in ("replaced", "stock")
    ]
    assert kinds == ["tinylm", "llama"]
    assert "tinylm_replaced" not in (tmp_path / "stock" / "config.json").read_text()


def test_classes_are_those_that_the_model_was_made_of(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tinylm, "MLP", SquaredReLU)
        lm = TinyLM(SMALL)
    lm.save_pretrained(tmp_path)
    assert "SquaredReLU" in (tmp_path / "config.json").read_text()


def test_a_replaced_linear_is_not_left_out_of_the_loss(monkeypatch):
    """Where logits are made in chunks, the head's product is not the leaf's."""
    monkeypatch.setattr(tinylm, "CHUNKED_LOSS_MIN_LOGITS", 0)
    lm = TinyLM(SMALL).eval()
    batch = {"input_ids": torch.arange(20)[None]}
    stock = tinylm.loss_sum(lm, batch).item()
    monkeypatch.setattr(
        tinylm, "linear", lambda x, weight, bias=None: x.new_zeros(*x.shape[:-1], len(weight))
    )
    assert tinylm.loss_sum(lm, batch).item() == pytest.approx(19 * np.log(320)) != stock


@pytest.mark.parametrize("as_given", [torch.Tensor.tolist, lambda x: x.numpy().astype(np.uint16)])
def test_ids_as_lists_and_arrays(as_given):
    lm, seq2seq = TinyLM(SMALL).eval(), TinyLM(SEQ2SEQ).eval()
    ids, mask = torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.long)
    given = as_given(ids), as_given(mask)
    assert torch.equal(lm(*given), lm(ids, mask))
    assert torch.equal(
        lm.generate(*given, max_new_tokens=2), lm.generate(ids, mask, max_new_tokens=2)
    )
    assert torch.equal(seq2seq(*given, decoder_input_ids=given[0]), seq2seq(ids, mask, None, ids))
    assert torch.equal(seq2seq.encode(*given)[0][0][0], seq2seq.encode(ids, mask)[0][0][0])


@pytest.mark.parametrize("wrong", ["hello", ["hello"], [[1], [2, 3]], [[1.5]], [[400]], [1], None])
def test_what_is_no_ids_is_refused_in_one_line(wrong):
    lm = TinyLM(SMALL).eval()
    for call in (lm, lm.generate):
        with pytest.raises(tinylm.Error, match="input_ids") as error:
            call(wrong)
        assert isinstance(wrong, list) or wrong is None or "stream" in str(error.value)


def test_habits_from_transformers(tmp_path):
    lm = TinyLM(SMALL)
    lm.to(torch.bfloat16).save_pretrained(tmp_path)
    for given in ({}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": "bfloat16"}):
        assert TinyLM.from_pretrained(tmp_path, **given).dtype == torch.bfloat16
    for given in ({"torch_dtype": torch.float32}, {"torch_dtype": "float32"}):
        assert TinyLM.from_pretrained(tmp_path, **given).dtype == torch.float32
    for given, names in (
        ({"device_map": "auto"}, "device="),
        ({"attn_implementation": "sdpa"}, "attn_implementation"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "nonsense"}, "nonsense"),
    ):
        with pytest.raises(tinylm.Error, match=names):
            TinyLM.from_pretrained(tmp_path, **given)


def test_ids_are_looked_at_once_in_a_call(monkeypatch):
    """Their least and largest were taken four times in a step, and in every step of a text."""
    looks = []

    def spy(name, real):
        def look(tensor, *arguments, **options):
            if tensor.dtype == torch.long:
                looks.append(name)
            return real(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, look)

    for name in ("min", "max", "aminmax", "amin"):
        spy(name, getattr(torch.Tensor, name))
    ids = torch.arange(8).view(2, 4)
    for lm, more in (
        (TinyLM(SMALL).eval(), {}),
        (TinyLM(SEQ2SEQ).eval(), {"decoder_input_ids": ids}),
    ):
        lm(ids, **more)
        assert not looks
        lm.generate(ids, max_new_tokens=5)
        assert len(looks) <= 1
        looks.clear()


@pytest.mark.parametrize("config", [SMALL, SEQ2SEQ], ids=["decoder", "seq2seq"])
def test_eight_threads_get_what_each_gets_alone(config):
    torch.manual_seed(0)
    lm = TinyLM(config).eval()
    torch.nn.init.normal_(lm.embed.weight)

    def work(i):
        ids = (torch.arange(3 + 2 * i) * 7 + i)[None] % 256
        more = {} if lm.encoder is None else {"decoder_input_ids": ids}
        with torch.no_grad():
            logits = lm(ids, **more)
        options = {"max_new_tokens": 6, "temperature": 0.8, "seed": i}
        return logits, lm.generate(ids, **options), "".join(lm.stream(f"text {i}" * i, **options))

    alone = [work(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for (logits, ids, text), found in zip(alone, pool.map(work, range(8))):
            assert torch.equal(found[0], logits)
            assert torch.equal(found[1], ids) and found[2] == text


def test_the_loss_does_not_change_the_model_that_others_read(monkeypatch):
    """Logits in chunks took the head off the shared model while they were made."""
    monkeypatch.setattr(tinylm, "CHUNKED_LOSS_MIN_LOGITS", 0)
    lm = TinyLM(SMALL).eval()
    ids = torch.arange(12)[None]
    expected = lm(ids)
    seen = []

    def read_by_another(*_):
        if not seen:
            seen.append(None)
            seen.append(lm(ids))

    lm.layers[1].register_forward_hook(read_by_another)
    tinylm.loss_sum(lm, {"input_ids": ids})
    assert torch.equal(seen[1], expected)


def test_help_says_what_is_public():
    """It was 15,000 lines."""
    import pydoc

    assert len(pydoc.plain(pydoc.render_doc(tinylm)).splitlines()) < 3000
    assert all(hasattr(tinylm, name) for name in tinylm.__all__) and tinylm.__version__


@pytest.mark.parametrize(
    "changes, field",
    [
        (dict(embedding_size=16), "embedding_size"),
        (dict(use_parallel_residual=True, norm_position="post"), "use_parallel_residual"),
        (dict(no_rope_layers=[2]), "no_rope_layers"),
    ],
)
def test_fields_that_do_not_go_together(changes, field):
    with pytest.raises(tinylm.Error, match=f"^config: {field} = "):
        Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **changes)
