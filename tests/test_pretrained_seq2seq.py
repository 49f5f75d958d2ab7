"""Encoder-decoders against `transformers`: logits, caches, checkpoints, and beam search token for token (of decoders too)."""

import functools
import json
import math

import pytest
import torch
from families import (
    CASES,
    LENGTH,
    SENTIMENTS,
    SEQ2SEQ,
    Case,
    difference,
    load_oracle,
    prompts,
    ragged,
    rewrite_config,
    rewrite_tensors,
    save,
    t5,
)
from helpers import CPU, LAYOUTS, assert_same_weights, every, refuses, surprise
from safetensors.torch import load_file
from transformers import GenerationConfig

from export import OnnxLM, export_onnx
from tinylm import TinyLM, train_step

BY_NAME = {case.name: case for case in SEQ2SEQ + CASES}
T5, FLAN, BART, MARIAN = (BY_NAME[name] for name in ("t5", "t5-v1.1", "bart", "marian"))
SOME = [BY_NAME[name] for name in ("t5", "t5-v1.1", "bart", "mbart", "marian")]
DECODERS = [BY_NAME[name] for name in ("llama", "gpt2")]
NEW = 14  # tokens that are generated, unless a row ends


def sources(case):
    return [prompts(case, n, seed=n) for n in (5, LENGTH, 11)]


# ---- logits ---------------------------------------------------------------------------------------------------------


@every(SEQ2SEQ)
@torch.no_grad()
def test_logits_are_those_of_transformers(case, folder, oracle):
    ids, target = prompts(case, 2, LENGTH), prompts(case, 2, LENGTH + 4, seed=3)
    ours = TinyLM.from_pretrained(folder(case))
    assert ours.config.head == "lm" and not ours.training
    logits = ours(ids, decoder_input_ids=target)
    assert type(logits) is torch.Tensor
    assert difference(logits, oracle(case)(ids, decoder_input_ids=target).logits) < 1e-5


@every(SEQ2SEQ)
@torch.no_grad()
def test_padded_sources(case, folder, oracle):
    """Right padded as in transformers; on either side, what each row gets alone."""
    ours, rows, target = (
        TinyLM.from_pretrained(folder(case)),
        sources(case),
        prompts(case, 3, 8, seed=3),
    )
    batch, mask = ragged(rows, LAYOUTS["right"])
    theirs = oracle(case)(batch, attention_mask=mask, decoder_input_ids=target).logits
    assert difference(ours(batch, mask, decoder_input_ids=target), theirs) < 1e-5
    for layout in LAYOUTS.values():
        batch, mask = ragged(rows, layout)
        logits = ours(batch, mask, decoder_input_ids=target)
        for row, new, out in zip(rows, target, logits, strict=True):
            assert difference(out, ours(row[None], decoder_input_ids=new[None])[0]) < 1e-5


@every(SEQ2SEQ)
def test_every_weight_learns(case, folder):
    """Guards weights that nothing uses. A bias of the logits is a buffer: it stays what it is."""
    ours = TinyLM.from_pretrained(folder(case))
    target = prompts(case, 2, LENGTH, seed=3)
    ours(prompts(case, 2, LENGTH), decoder_input_ids=target).square().sum().backward()
    assert not [
        name
        for name, weight in ours.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]


# ---- greedy ---------------------------------------------------------------------------------------------------------


@every(SEQ2SEQ)
@torch.no_grad()
def test_cached_decoding_gives_the_uncached_tokens(case, folder):
    """Each token is the best one by the logits of one whole pass. BART's last is forced to be its end."""
    ours = TinyLM.from_pretrained(folder(case))
    batch, mask = ragged(sources(case), LAYOUTS["mixed"])
    out = ours.generate(batch, mask, max_new_tokens=NEW, eos_token_id=())
    assert out.shape == (3, 1 + NEW) and out.dtype == torch.long
    assert (out[:, 0] == case.fields.get("decoder_start_token_id", 2)).all()
    best = ours(batch, mask, decoder_input_ids=out[:, :-1]).argmax(-1)
    assert torch.equal(best[:, :-1], out[:, 1:-1]) and len(out.unique()) > 6


@every([BART, T5])
def test_the_source_is_read_once(case, folder):
    """The encoder, and the keys and values of the cross attention, are computed once, not for every token."""
    ours, calls = TinyLM.from_pretrained(folder(case)), []
    for name in ("encoder.layers.0", "layers.0.cross_attention.kv"):
        ours.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    ours.generate(prompts(case, 2, 5), max_new_tokens=6, eos_token_id=())
    assert sorted(calls) == ["encoder.layers.0", "layers.0.cross_attention.kv"]


@pytest.mark.parametrize("case", [BART], ids=str)
def test_compiled_decoding_gives_the_eager_tokens(case, folder, monkeypatch):
    """Two batches of different lengths; no code is generated, for speed."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    ours = TinyLM.from_pretrained(folder(case))
    for rows in (sources(case), sources(case)[::2]):
        batch, mask = ragged(rows, ["right", "left", "both"][: len(rows)])
        eager = ours.generate(batch, mask, max_new_tokens=6)
        assert torch.equal(ours.generate(batch, mask, max_new_tokens=6, compile=True), eager)
    torch._dynamo.reset()


# ---- beams ----------------------------------------------------------------------------------------------------------

KNOBS = [
    dict(),
    dict(no_repeat_ngram_size=2),
    dict(no_repeat_ngram_size=3),
    dict(num_beams=2),
    dict(num_beams=3, length_penalty=0.5),
    dict(num_beams=3, length_penalty=2.0),
    dict(num_beams=3, early_stopping=True),
    dict(num_beams=5),
    dict(num_beams=5, length_penalty=2.0, early_stopping="never"),
    dict(num_beams=5, early_stopping="never"),
    dict(num_beams=2, no_repeat_ngram_size=2),
    dict(num_beams=3, no_repeat_ngram_size=3, length_penalty=0.5),
    dict(num_beams=5, no_repeat_ngram_size=2, early_stopping=True),
]
GRID = [
    dict(num_beams=beams, length_penalty=penalty, early_stopping=early)
    for beams in (2, 3, 5)
    for penalty in (0.5, 1.0, 2.0)
    for early in (False, True, "never")
]
END = {"t5": 1, "mt5": 1, "marian": 0}  # else 2
STAND_IN = {
    "t5": 114,
    "t5-v1.1": 19,
    "bart": 159,
    "mbart": 87,
    "marian": 71,
    "llama": 160,
    "gpt2": 123,
}  # see ending


def label(generation_config):
    return "-".join(f"{key}={value}" for key, value in generation_config.items()) or "greedy"


def new_until(tokens, end):
    """Up to the first end, which is kept."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """ending(case) -> the oracle's folder, but the end has changed places with a token that some rows say and others
    don't, so that rows and beams end early."""

    @functools.cache
    def make(case):
        path = save(case, tmp_path_factory.mktemp(f"{case}-ending"))
        one, other = END.get(case.family, 2), STAND_IN[case.name]

        def change(tensors):
            for key, tensor in tensors.items():
                if tensor.shape[0] == 211 or key == "final_logits_bias":
                    rows = tensor.T if key == "final_logits_bias" else tensor
                    rows[[one, other]] = rows[[other, one]]
            return tensors

        rewrite_tensors(path, change)
        return path

    return make


@pytest.fixture(scope="module")
def theirs(ending):
    """theirs(case, knobs) -> the new tokens that transformers gives to each row alone, up to its end."""

    @functools.cache
    def load(case):
        return load_oracle(ending(case), case.head)

    @functools.cache
    def generate(case, generation_config):
        oracle, end, new = load(case), END.get(case.family, 2), []
        for row in sources(case):
            out = oracle.generate(
                row[None],
                attention_mask=torch.ones_like(row[None]),
                do_sample=False,
                max_new_tokens=NEW,
                pad_token_id=oracle.config.pad_token_id or 0,
                **dict(generation_config),
            )[0]
            new.append(new_until(out.tolist()[1 if case.head == "seq2seq" else len(row) :], end))
        return new

    return lambda case, generation_config: generate(case, tuple(generation_config.items()))


def assert_tokens(ours, case, rows, layout, expected, **generation_config):
    """Each row of the batch has its tokens, and then the pad token up to the end of the longest."""
    batch, mask = ragged(rows, layout)
    out = ours.generate(batch, mask, max_new_tokens=NEW, **generation_config)
    if case.head != "seq2seq":
        assert torch.equal(out[:, : batch.shape[1]], batch)
    else:
        assert (out[:, 0] == ours.config.decoder_start_token_id).all()
    new = out[:, 1 if case.head == "seq2seq" else batch.shape[1] :].tolist()
    pad = ours.config.pad_token_id
    if pad is None:  # GPT-2 has none: its end is as good, in transformers too
        pad = generation_config.get("eos_token_id", [ours.config.eos_token_id])[0]
    width = max(map(len, expected))
    assert [row[:width] for row in new] == [
        tokens + [pad] * (width - len(tokens)) for tokens in expected
    ]
    assert all(set(row[width:]) <= {pad} for row in new), "nothing but padding may follow"


@every(SOME + DECODERS)
@pytest.mark.parametrize("generation_config", KNOBS, ids=label)
def test_tokens_are_those_of_transformers(case, generation_config, ending, theirs):
    """Greedy and beams, each row alone and in a batch that is padded on either side."""
    ours, rows, expected = (
        TinyLM.from_pretrained(ending(case)),
        sources(case),
        theirs(case, generation_config),
    )
    for row, tokens in zip(rows, expected, strict=True):
        out = ours.generate(row[None], max_new_tokens=NEW, **generation_config)[0].tolist()
        assert (
            new_until(out[1 if case.head == "seq2seq" else len(row) :], END.get(case.family, 2))
            == tokens
        )
    assert_tokens(ours, case, rows, LAYOUTS["mixed"], expected, **generation_config)


@pytest.mark.parametrize("generation_config", GRID, ids=label)
def test_grid_of_beam_knobs(generation_config, ending, theirs):
    assert_tokens(
        TinyLM.from_pretrained(ending(BART)),
        BART,
        sources(BART),
        LAYOUTS["mixed"],
        theirs(BART, generation_config),
        **generation_config,
    )


def test_what_is_compared_really_happens(theirs):
    """Some rows end early and others don't, in greedy and in beam search, and each knob changes some tokens."""
    for case in SOME + DECODERS:
        lengths = [
            len(row) for generation_config in KNOBS for row in theirs(case, generation_config)
        ]
        assert min(lengths) < NEW - 2 and len(set(lengths)) > 2, (case, lengths)
        for beams in (1, 3):
            ends = [
                len(row)
                for generation_config in KNOBS
                if generation_config.get("num_beams", 1) == beams
                for row in theirs(case, generation_config)
            ]
            assert len(set(ends)) > 1, (case, beams, ends)

    def changes(one, other):
        return any(theirs(case, one) != theirs(case, other) for case in SOME + DECODERS)

    for generation_config in KNOBS[1:]:
        for key in generation_config:
            assert changes(
                generation_config,
                {rest: value for rest, value in generation_config.items() if rest != key},
            ), (generation_config, key)
    assert len({json.dumps(theirs(BART, generation_config)) for generation_config in GRID}) > 5


@every([T5, BART, *DECODERS])
def test_several_ends(case, folder, oracle):
    """Each is an end to every row and beam; twice as many candidates are looked at than with one."""
    rows = sources(case)
    greedy = [
        TinyLM.from_pretrained(folder(case)).generate(
            row[None], max_new_tokens=NEW, eos_token_id=()
        )[0, -NEW:]
        for row in rows
    ]
    ends = [greedy[0][3].item(), greedy[1][6].item(), greedy[2][1].item()]
    options = dict(max_new_tokens=NEW, num_beams=3, eos_token_id=ends)
    expected = []
    for row in rows:
        out = (
            oracle(case)
            .generate(
                row[None],
                attention_mask=torch.ones_like(row[None]),
                do_sample=False,
                pad_token_id=0,
                **options,
            )[0]
            .tolist()
        )
        new = out[1 if case.head == "seq2seq" else len(row) :]
        first = next((i for i, token in enumerate(new) if token in ends), len(new))
        expected.append(new[: first + 1])
    assert len({len(row) for row in expected}) > 1 and min(map(len, expected)) < NEW
    assert_tokens(
        TinyLM.from_pretrained(folder(case)),
        case,
        rows,
        LAYOUTS["mixed"],
        expected,
        num_beams=3,
        eos_token_id=ends,
    )


# ---- generation_config.json -----------------------------------------------------------------------------------------


def rewrite_generation(folder, **changes):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FILES = {  # of the published checkpoints, with shorter lengths
    "facebook/bart-large-cnn": (
        "bart",
        dict(
            bos_token_id=0,
            decoder_start_token_id=2,
            early_stopping=True,
            eos_token_id=2,
            forced_bos_token_id=0,
            forced_eos_token_id=2,
            length_penalty=2.0,
            max_length=13,
            min_length=6,
            no_repeat_ngram_size=3,
            num_beams=4,
            pad_token_id=1,
        ),
    ),
    "facebook/mbart-large-50-many-to-many-mmt": (
        "mbart",
        dict(
            bos_token_id=0,
            decoder_start_token_id=2,
            early_stopping=True,
            eos_token_id=2,
            forced_bos_token_id=77,
            forced_eos_token_id=2,
            max_length=12,
            num_beams=5,
            pad_token_id=1,
        ),
    ),
    "Helsinki-NLP/opus-mt-en-de": (
        "marian",
        dict(
            bad_words_ids=[[210]],
            bos_token_id=0,
            decoder_start_token_id=210,
            eos_token_id=0,
            forced_eos_token_id=0,
            max_length=15,
            num_beams=4,
            pad_token_id=210,
            renormalize_logits=True,
        ),
    ),
    "google-t5/t5-small": ("t5", dict(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)),
}


@pytest.mark.parametrize("published", FILES)
def test_generation_config_as_published(published, ending, tmp_path):
    """Called without a knob, tinylm does what the file says, as long as it says, as transformers does."""
    case, fields = BY_NAME[FILES[published][0]], FILES[published][1]
    TinyLM.from_pretrained(ending(case)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps(fields | {"transformers_version": "4.31.0"})
    )
    ours, oracle = TinyLM.from_pretrained(tmp_path), load_oracle(tmp_path, "seq2seq")
    for row in sources(case):
        expected = new_until(
            oracle.generate(row[None], attention_mask=torch.ones_like(row[None]))[0, 1:].tolist(),
            fields["eos_token_id"],
        )
        out = ours.generate(row[None])[0].tolist()
        assert out[0] == fields["decoder_start_token_id"]
        assert out[1:] == expected and len(out) <= fields.get("max_length", 21)
        if "forced_bos_token_id" in fields:
            assert out[1] == fields["forced_bos_token_id"]


@every([T5, BART, MARIAN])
def test_forced_and_forbidden_tokens_of_the_file(case, copy):
    """Two bad words: one is a single token that would come, one ends a pair that would come."""
    path, rows = copy(case), sources(case)
    free = [
        TinyLM.from_pretrained(path)
        .generate(row[None], max_new_tokens=NEW, eos_token_id=())[0, 1:]
        .tolist()
        for row in rows
    ]
    end = END.get(case.family, 2)
    rewrite_generation(
        path,
        forced_bos_token_id=99,
        forced_eos_token_id=end,
        num_beams=3,
        no_repeat_ngram_size=2,
        bad_words_ids=[[free[0][1]], [end], free[1][2:4], [99, free[2][0]]],
    )
    oracle = load_oracle(path, "seq2seq")
    expected = [
        new_until(
            oracle.generate(
                row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=NEW
            )[0, 1:].tolist(),
            end,
        )
        for row in rows
    ]
    assert all(row[0] == 99 and row[-1] == end for row in expected), (
        "an end that is a bad word is an end all the same"
    )
    oracle.generation_config.bad_words_ids = None
    assert any(
        oracle.generate(row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=NEW)[
            0, 1:
        ].tolist()
        != tokens
        for row, tokens in zip(rows, expected, strict=True)
    ), "the bad words must matter"
    assert_tokens(TinyLM.from_pretrained(path), case, rows, LAYOUTS["mixed"], expected)


def test_an_argument_beats_the_file(copy):
    path, row = copy(BART), sources(BART)[1]
    plain = TinyLM.from_pretrained(path).generate(row[None], max_new_tokens=NEW)
    rewrite_generation(
        path, num_beams=3, no_repeat_ngram_size=1, early_stopping=True
    )  # no token comes twice
    ours = TinyLM.from_pretrained(path)
    assert torch.equal(
        ours.generate(row[None], max_new_tokens=NEW, num_beams=1, no_repeat_ngram_size=0), plain
    )
    assert not torch.equal(ours.generate(row[None], max_new_tokens=NEW), plain)


def test_without_the_file_config_json_says_it(copy):
    """As the checkpoints of version 4 have it."""
    path = copy(BART)
    (path / "generation_config.json").unlink()
    rewrite_config(
        path,
        lambda config: config | dict(num_beams=3, no_repeat_ngram_size=2, forced_bos_token_id=55),
    )
    ours, oracle = TinyLM.from_pretrained(path), load_oracle(path, "seq2seq")
    for row in sources(BART):
        expected = oracle.generate(
            row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=NEW
        )
        assert ours.generate(row[None], max_new_tokens=NEW).tolist() == expected.tolist()
        assert expected[0, 1] == 55


def test_mbart_starts_with_bos_where_no_start_is_given(copy):
    path = copy(BY_NAME["mbart"])
    rewrite_config(path, lambda config: config | {"decoder_start_token_id": None})
    rewrite_generation(path, decoder_start_token_id=None)
    out = TinyLM.from_pretrained(path).generate(sources(BART)[0][None], max_new_tokens=NEW)
    expected = load_oracle(path, "seq2seq").generate(sources(BART)[0][None], max_new_tokens=NEW)
    assert out.tolist() == expected.tolist() and out[0, 0] == 0


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_beam_groups", 2),
        ("penalty_alpha", 0.6),
        ("typical_p", 0.5),
        ("encoder_no_repeat_ngram_size", 2),
        ("suppress_tokens", [5]),
        ("exponential_decay_length_penalty", [3, 1.5]),
    ],
)
def test_a_default_that_would_change_the_tokens_is_not_ignored(field, value, copy):
    path = copy(BART)
    rewrite_generation(path, **{field: value})
    refuses(
        lambda: TinyLM.from_pretrained(path).generate(sources(BART)[0][None], max_new_tokens=3),
        "generation_config.json",
        field,
    )


# ---- sampling -------------------------------------------------------------------------------------------------------

SAMPLED = dict(max_new_tokens=NEW, eos_token_id=(), temperature=1.0)


@every([T5, BART, MARIAN])
def test_same_seed_same_tokens(case, folder):
    ours = TinyLM.from_pretrained(folder(case))
    rows = sources(case)
    batch, mask = ragged(rows, LAYOUTS["mixed"])
    first = ours.generate(batch, mask, **SAMPLED, seed=5)
    torch.randn(3)
    assert torch.equal(ours.generate(batch, mask, **SAMPLED, seed=5), first)
    assert not torch.equal(ours.generate(batch, mask, **SAMPLED, seed=6), first)
    assert not torch.equal(ours.generate(batch, mask, **SAMPLED | dict(temperature=0.0)), first)
    assert torch.equal(ours.generate(rows[0][None], **SAMPLED, seed=5)[0], first[0]), (
        "a row draws what it draws alone"
    )


@torch.no_grad()
def test_samples_follow_the_distribution_of_transformers(folder, oracle):
    ids, start = sources(T5)[0][None], torch.tensor([[0]])
    p = (oracle(T5)(ids, decoder_input_ids=start).logits[0, -1] / 0.2).softmax(-1)
    new = TinyLM.from_pretrained(folder(T5)).generate(
        ids.expand(4096, -1), max_new_tokens=1, eos_token_id=(), temperature=0.2, seed=7
    )
    assert p.max() > 4 / len(p)  # far from uniform
    assert surprise(torch.bincount(new[:, 1], minlength=len(p)), p) < 5


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@every(SEQ2SEQ)
@torch.no_grad()
def test_saved_folder_is_the_same_model_here_and_in_transformers(case, folder, oracle, tmp_path):
    """Load, save, load is bitwise equal; transformers misses no tensor, finds none too many, and generates the same."""
    ours = TinyLM.from_pretrained(folder(case))
    ours.save_pretrained(tmp_path)
    again = TinyLM.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert_same_weights(again, ours)
    before, after = oracle(case), load_oracle(tmp_path, "seq2seq")
    assert_same_weights(after, before)
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        load_file(folder(case) / "model.safetensors")
    )
    ids, target = prompts(case, 2, LENGTH), prompts(case, 2, 6, seed=3)
    assert (
        difference(
            after(ids, decoder_input_ids=target).logits,
            before(ids, decoder_input_ids=target).logits,
        )
        < 1e-6
    )
    for name in (
        "decoder_start_token_id",
        "forced_eos_token_id",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
    ):
        assert getattr(after.generation_config, name) == getattr(before.generation_config, name), (
            name
        )
    for name in (
        "dropout",
        "dropout_rate",
        "attention_dropout",
        "activation_dropout",
        "activation_function",
        "feed_forward_proj",
        "scale_embedding",
        "id2label",
        "architectures",
    ):
        assert getattr(after.config, name, None) == getattr(before.config, name, None), name
    if (
        case.name != "t5-silu"
    ):  # transformers cannot generate with more decoder layers than encoder layers
        options = dict(max_new_tokens=6, num_beams=2)
        assert after.generate(ids, **options).tolist() == before.generate(ids, **options).tolist()


def test_defaults_of_generation_are_saved(copy, tmp_path):
    path = copy(BART)
    fields = dict(
        num_beams=4,
        length_penalty=2.0,
        forced_bos_token_id=0,
        bad_words_ids=[[9]],
        no_repeat_ngram_size=3,
    )
    rewrite_generation(path, **fields)
    TinyLM.from_pretrained(path).save_pretrained(tmp_path / "again")
    saved = GenerationConfig.from_pretrained(tmp_path / "again")
    assert {name: getattr(saved, name) for name in fields} == fields


@every([BART, T5, FLAN, BY_NAME["mt5"]])
@torch.no_grad()
def test_encoder_decoders_classify(case, tmp_path):
    """As bart-large-mnli: the decoder reads the text again, and the state of its last end decides. Guards the scale of
    T5's logits in a classifier, and names that T5's body has only there."""
    case = Case(f"{case.family}-classify", case.family, case.fields | SENTIMENTS, "classify")
    ours = TinyLM.from_pretrained(save(case, tmp_path / "hf"))
    pad, end = ours.config.pad_token_id, torch.tensor([END.get(case.family, 2)])
    rows = [torch.cat((row, end)) for row in sources(case)]
    oracle = load_oracle(tmp_path / "hf", "classify")
    alone = torch.cat([oracle(row[None]).logits for row in rows])
    for layout in LAYOUTS.values():
        batch, mask = ragged(rows, layout)
        assert difference(ours(batch.masked_fill(mask == 0, pad), mask), alone) < 1e-5
    ours.save_pretrained(tmp_path / "again")
    assert_same_weights(load_oracle(tmp_path / "again", "classify"), oracle)
    ids = rows[0][None].repeat(2, 1)
    batch = {"input_ids": ids, "labels": torch.tensor([0, 2])}
    with torch.enable_grad():
        loss = train_step(ours, torch.optim.SGD(ours.parameters(), lr=0.1), batch)
    assert loss.isfinite() and ours.eval()(ids).isfinite().all()


@pytest.mark.slow
@every([BART, T5])
@torch.no_grad()
def test_classifiers_with_a_decoder_are_exported(case, folder, tmp_path):
    ours = TinyLM.from_pretrained(folder(case), head="classify")
    export_onnx(ours, tmp_path, precisions=["fp32", "int8"], safetensors=False)
    exported = OnnxLM(tmp_path, providers=CPU)
    assert exported.task == "classify"
    batch, mask = ragged(sources(case), LAYOUTS["mixed"])
    logits = torch.from_numpy(exported(batch.numpy(), mask.numpy()))
    assert difference(logits, ours(batch, mask)) < 1e-4


@torch.no_grad()
def test_a_classifier_begins_with_a_t5_that_writes(folder, tmp_path):
    """And back: the names of the body change with the head."""
    ours = TinyLM.from_pretrained(folder(T5), head="classify")
    ids = prompts(T5, 2, 7)
    writer = TinyLM.from_pretrained(folder(T5))
    ours.save_pretrained(tmp_path)
    again = TinyLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids), ours(ids))
    assert all(
        name.startswith(("transformer.", "classification_head."))
        for name in load_file(tmp_path / "model.safetensors")
    )
    back = TinyLM.from_pretrained(tmp_path, head="lm")
    assert torch.equal(back(ids, decoder_input_ids=ids), writer(ids, decoder_input_ids=ids))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_t5_as_published(tied, scaled, tmp_path):
    """`tie_word_embeddings` says whether the output is scaled; whether it is tied, the tensors say."""
    case = Case("t5-published", "t5", t5(feed_forward_proj="gated-gelu", tie_word_embeddings=tied))
    save(Case(case.name, case.family, case.fields, "seq2seq"), tmp_path)
    plain = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "n_positions": 512,
        "output_past": True,
        "initializer_factor": 1.0,
        "dropout_rate": 0.1,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "use_cache": True,
        "transformers_version": "4.23.1",
        "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
    }
    tie = {} if scaled else {"tie_word_embeddings": False}
    fields = {key: value for key, value in case.fields.items() if key != "tie_word_embeddings"}
    rewrite_config(tmp_path, lambda _: plain | fields | tie)
    ids, target = prompts(case, 2, LENGTH), prompts(case, 2, 9, seed=3)
    theirs = load_oracle(tmp_path, "seq2seq")
    assert (
        theirs.config.scale_decoder_outputs is scaled
        and (theirs.lm_head.weight is theirs.shared.weight) is tied
    )
    ours, expected = TinyLM.from_pretrained(tmp_path), theirs(ids, decoder_input_ids=target).logits
    assert difference(ours(ids, decoder_input_ids=target), expected) < 1e-5
    ours.save_pretrained(tmp_path / "again")
    after = load_oracle(tmp_path / "again", "seq2seq")
    assert difference(after(ids, decoder_input_ids=target).logits, expected) < 1e-6


PUBLISHED = {  # what config.json of the published checkpoints holds beside the sizes; none of it changes the logits
    "facebook/bart-large-cnn": (
        BART,
        dict(
            _num_labels=3,
            add_bias_logits=False,
            add_final_layer_norm=False,
            attention_dropout=0.0,
            bos_token_id=0,
            classif_dropout=0.0,
            classifier_dropout=0.0,
            decoder_layerdrop=0.0,
            decoder_start_token_id=2,
            early_stopping=True,
            encoder_layerdrop=0.0,
            eos_token_id=2,
            force_bos_token_to_be_generated=True,
            forced_bos_token_id=0,
            forced_eos_token_id=2,
            gradient_checkpointing=False,
            id2label={"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
            init_std=0.02,
            is_encoder_decoder=True,
            label2id={"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
            length_penalty=2.0,
            max_length=142,
            min_length=56,
            no_repeat_ngram_size=3,
            normalize_before=False,
            num_beams=4,
            num_hidden_layers=3,
            output_past=True,
            pad_token_id=1,
            prefix=" ",
            scale_embedding=False,
            task_specific_params={"summarization": {"num_beams": 4}},
            use_cache=True,
        ),
    ),
    "Helsinki-NLP/opus-mt-en-de": (
        MARIAN,
        dict(
            _num_labels=3,
            add_bias_logits=False,
            add_final_layer_norm=False,
            bad_words_ids=[[210]],
            bos_token_id=0,
            classif_dropout=0.0,
            decoder_vocab_size=211,
            extra_pos_embeddings=211,
            gradient_checkpointing=False,
            is_encoder_decoder=True,
            max_length=512,
            normalize_before=False,
            normalize_embedding=False,
            num_beams=6,
            num_hidden_layers=3,
            share_encoder_decoder_embeddings=True,
            static_position_embeddings=True,
            use_cache=True,
        ),
    ),
    "facebook/mbart-large-50-many-to-many-mmt": (
        BY_NAME["mbart"],
        dict(
            _num_labels=3,
            add_bias_logits=False,
            add_final_layer_norm=True,
            early_stopping=True,
            forced_eos_token_id=2,
            is_encoder_decoder=True,
            max_length=200,
            normalize_before=True,
            normalize_embedding=True,
            num_beams=5,
            num_hidden_layers=3,
            output_past=True,
            static_position_embeddings=False,
            tokenizer_class="MBart50Tokenizer",
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_config_json_as_published(name, copy, oracle):
    """Strictness must not refuse the very checkpoints that a family is for."""
    case, more = PUBLISHED[name]
    path = copy(case)
    kind = json.loads((path / "config.json").read_text())["architectures"]
    rewrite_config(
        path,
        lambda _: (
            case.fields
            | more
            | {
                "model_type": case.family,
                "architectures": kind,
                "transformers_version": "4.7.0",
                "torch_dtype": "float32",
            }
        ),
    )
    ids, target = prompts(case, 2, LENGTH), prompts(case, 2, 6, seed=3)
    logits = TinyLM.from_pretrained(path)(ids, decoder_input_ids=target)
    for theirs in (oracle(case), load_oracle(path, "seq2seq")):
        assert difference(logits, theirs(ids, decoder_input_ids=target).logits) < 1e-5


@every([T5, FLAN, BART, BY_NAME["mbart"], MARIAN])
def test_published_tensors(case, copy, folder):
    """Older files hold every copy of what is tied, tables that can be computed, and a bias that nothing reads."""

    def publish(tensors):
        prefix = "" if case.family == "t5" else "model."
        shared = tensors[prefix + "shared.weight"]
        more = {
            prefix + f"{part}.embed_tokens.weight": shared.clone()
            for part in ("encoder", "decoder")
        }
        if "lm_head.weight" not in tensors:
            more["lm_head.weight"] = shared.clone()
        if case.family == "t5":
            more["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = (
                torch.rand(12, 5)
            )
        if case.family == "marian":
            place, half = torch.arange(43)[:, None], torch.arange(0, 60, 2)
            angle = place / 10000 ** (half / 60)
            table = torch.cat((angle.sin(), angle.cos()), 1)
            more |= {
                f"model.{part}.embed_positions.weight": table.clone()
                for part in ("encoder", "decoder")
            }
        return tensors | more

    path = copy(case)
    rewrite_tensors(path, publish)
    assert_same_weights(TinyLM.from_pretrained(path), TinyLM.from_pretrained(folder(case)))


@torch.no_grad()
def test_a_bias_of_the_logits_that_is_not_stored_is_zero(copy):
    path = copy(BART)
    rewrite_tensors(
        path,
        lambda tensors: {name: t for name, t in tensors.items() if name != "final_logits_bias"},
    )
    ids, target = prompts(BART, 2, 5), prompts(BART, 2, 6, seed=3)
    theirs = load_oracle(path, "seq2seq")(ids, decoder_input_ids=target).logits
    assert difference(TinyLM.from_pretrained(path)(ids, decoder_input_ids=target), theirs) < 1e-5


# ---- what must be refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("t5", "shared.weight"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k.weight"),
        ("t5-v1.1", "decoder.block.0.layer.2.DenseReluDense.wi_1.weight"),
        ("bart", "model.decoder.layernorm_embedding.bias"),
        ("bart", "model.encoder.embed_positions.weight"),
        ("bart", "model.decoder.layers.0.encoder_attn_layer_norm.weight"),
        ("mbart", "model.encoder.layer_norm.weight"),
        ("marian", "model.decoder.layers.1.encoder_attn.v_proj.bias"),
    ],
)
def test_missing_tensor(name, tensor, copy):
    path = copy(BY_NAME[name])
    rewrite_tensors(
        path, lambda tensors: {key: value for key, value in tensors.items() if key != tensor}
    )
    refuses(lambda: TinyLM.from_pretrained(path), "model.safetensors", tensor)


@pytest.mark.parametrize(
    "name, tensor, shape",
    [
        ("t5", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", (12, 5)),
        ("t5", "encoder.block.0.layer.0.SelfAttention.q.bias", (70,)),
        ("bart", "model.encoder.layer_norm.weight", (60,)),
        ("bart", "model.encoder.layers.0.encoder_attn.q_proj.weight", (60, 60)),
        ("marian", "model.encoder.layernorm_embedding.weight", (60,)),
        ("bart", "model.decoder.layers.2.fc1.bias", (71,)),
    ],
)
def test_unexpected_tensor(name, tensor, shape, copy):
    path = copy(BY_NAME[name])
    rewrite_tensors(path, lambda tensors: tensors | {tensor: torch.zeros(shape)})
    refuses(lambda: TinyLM.from_pretrained(path), "model.safetensors", tensor)


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("marian", "share_encoder_decoder_embeddings", False),
        ("marian", "decoder_vocab_size", 100),
        ("bart", "is_decoder", True),
        ("bart", "activation_function", "foo"),
        ("t5", "feed_forward_proj", "gated-foo"),
        ("t5", "feed_forward_proj", "a-b-c"),
        ("t5", "relative_attention_num_buckets", 0),
        ("bart", "decoder_layers", 0),
        ("bart", "encoder_attention_heads", 7),
        ("bart", "scale_embedding", "yes"),
        ("t5", "d_kv", 0),
        ("bart", "is_encoder_decoder", 3),
        ("t5", "dense_act_fn", "tanh"),
    ],
)
def test_config_field_that_is_not_supported(name, field, value, copy):
    path = copy(BY_NAME[name])
    rewrite_config(path, lambda config: config | {field: value})
    refuses(lambda: TinyLM.from_pretrained(path), "config.json", field, value)


IDS = torch.full((2, 4), 7)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("bart", dict(decoder_input_ids=None), ["decoder_input_ids"]),
        ("bart", dict(decoder_input_ids=IDS[:1]), ["decoder_input_ids"]),
        ("bart", dict(decoder_input_ids=IDS[0]), ["decoder_input_ids"]),
        ("bart", dict(decoder_input_ids=IDS + 211), ["decoder_input_ids", 218]),
        ("bart", dict(decoder_input_ids=IDS.float()), ["decoder_input_ids"]),
        ("bart", dict(decoder_input_ids=torch.full((2, 44), 7)), [44, 43]),
        ("marian", dict(decoder_input_ids=torch.full((2, 44), 7)), [44, 43]),
        ("bart", dict(input_ids=torch.full((2, 44), 7)), [44, 43]),
        ("t5", dict(token_type_ids=torch.zeros_like(IDS)), ["token_type_ids"]),
    ],
)
def test_bad_input(name, options, words, folder):
    lm = TinyLM.from_pretrained(folder(BY_NAME[name]))
    refuses(lambda: lm(**dict(input_ids=IDS, decoder_input_ids=IDS) | options), *words)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=0),
        dict(num_beams=2.5),
        dict(num_beams="3"),
        dict(length_penalty="x"),
        dict(length_penalty=math.nan),
        dict(early_stopping="always"),
        dict(no_repeat_ngram_size=-1),
        dict(no_repeat_ngram_size=1.5),
        dict(max_new_tokens=43),
    ],
    ids=label,
)
def test_bad_options(options, folder):
    """The last needs 44 places of BART's 43: the start token takes one."""
    lm = TinyLM.from_pretrained(folder(BART))
    ((field, value),) = options.items()
    refuses(lambda: lm.generate(IDS, **dict(max_new_tokens=2) | options), field, value)


def test_as_many_tokens_as_there_are_positions(folder, oracle):
    """The last token needs no position: it is not read any more."""
    options = dict(max_new_tokens=42, num_beams=2, eos_token_id=None)
    expected = oracle(BART).generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert torch.equal(
        TinyLM.from_pretrained(folder(BART)).generate(IDS, **options | dict(eos_token_id=())),
        expected,
    )
