"""Sampling, ends, stop strings and streams, against the logits processors of `transformers`."""

import functools
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import CASES, load_oracle, prompts, ragged
from helpers import refuses, surprise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
)
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import tinylm
from tinylm import ByteTokenizer, Config, GenerationConfig, TextStream, TinyLM

LLAMA = next(case for case in CASES if case.name == "llama")
DRAWS = 8192
KNOBS = [
    dict(temperature=1.0),
    dict(temperature=0.5),
    dict(temperature=1.7),
    dict(temperature=1.0, top_k=7),
    dict(temperature=1.0, top_p=0.8),
    dict(temperature=1.0, min_p=0.2),
    dict(temperature=1.0, repetition_penalty=1.8),
    dict(temperature=0.7, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
    dict(temperature=1.3, top_p=0.6, min_p=0.3),
    dict(temperature=1.0, top_k=500, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_p=0.0),
    dict(temperature=1.0, top_k=1),
    dict(temperature=1.0, min_p=1.0),
]


@pytest.fixture
def lm(folder):
    return TinyLM.from_pretrained(folder(LLAMA))


def name(generation_config):
    return "-".join(f"{key}={value}" for key, value in generation_config.items())


def probabilities(
    logits, ids, temperature, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0
):
    """What transformers would draw the next token from."""
    steps = LogitsProcessorList()
    if repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    steps.append(TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    if min_p:
        steps.append(MinPLogitsWarper(min_p))
    return steps(ids, logits).softmax(-1)


# ---- which tokens, and how often ------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation_config", KNOBS, ids=name)
@torch.no_grad()
def test_samples_follow_the_distribution_of_transformers(generation_config, lm, folder):
    ids = torch.tensor([[5, 9, 5, 77, 140]])
    p = probabilities(load_oracle(folder(LLAMA))(ids).logits[:, -1], ids, **generation_config)[0]
    new = lm.generate(
        ids.expand(DRAWS, -1), max_new_tokens=1, eos_token_id=(), seed=7, **generation_config
    )[:, -1]
    counts = torch.bincount(new, minlength=len(p))
    assert counts[p == 0].sum() == 0, "drawn, though filtered out"
    assert surprise(counts, p) < 5


def test_greedy_repetition_penalty_is_that_of_transformers(lm, folder):
    """Guards padding that counts as seen: here it holds the very tokens that come next."""
    oracle, rows = load_oracle(folder(LLAMA)), [prompts(LLAMA, n, seed=n) for n in (4, 9)]
    options = dict(
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.5,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = [
        oracle.generate(row[None], attention_mask=torch.ones_like(row[None]), **options)[
            0, len(row) :
        ]
        for row in rows
    ]
    batch, mask = ragged(rows, ["left", "right"])
    for row, keep, new in zip(batch, mask.bool(), theirs, strict=True):
        row[~keep] = new[: (~keep).sum()]
    ours = lm.generate(batch, mask, max_new_tokens=12, eos_token_id=(), repetition_penalty=1.5)[
        :, batch.shape[1] :
    ]
    assert ours.tolist() == [new.tolist() for new in theirs]


def uniform_lm():
    """Every token is as likely as every other, at every step."""
    lm = TinyLM(
        Config(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).eval()
    for weight in lm.parameters():
        weight.data.zero_()
    return lm


def test_rows_steps_and_seeds_are_independent():
    """Guards counter-based noise: pairs of draws next to each other in any direction show no pattern."""
    lm, ids = uniform_lm(), torch.zeros(4096, 1, dtype=torch.long)
    draws = [
        lm.generate(ids, max_new_tokens=3, eos_token_id=(), temperature=1.0, seed=seed)[:, 1:]
        for seed in (3, 4)
    ]
    pairs = {
        "steps": (draws[0][:, 0], draws[0][:, 1]),
        "steps apart": (draws[0][:, 0], draws[0][:, 2]),
        "rows": (draws[0][:-1, 0], draws[0][1:, 0]),
        "seeds": (draws[0][:, 0], draws[1][:, 0]),
        "a seed and the next row": (draws[0][1:, 0], draws[1][:-1, 0]),
        "a row and the next step": (draws[0][1:, 0], draws[0][:-1, 1]),
    }
    for what, (one, other) in pairs.items():
        counts = torch.bincount(one * 16 + other, minlength=256)
        assert surprise(counts, torch.full((256,), 1 / 256)) < 5, what


# ---- seeds and rows -------------------------------------------------------------------------------------------------

SAMPLED = dict(max_new_tokens=16, eos_token_id=(), temperature=1.0)


def test_same_seed_same_tokens(lm):
    ids = prompts(LLAMA, 2, 6)
    first = lm.generate(ids, **SAMPLED, seed=1)
    torch.randn(3)  # the seed alone decides, not the state of torch's generator
    assert torch.equal(lm.generate(ids, **SAMPLED, seed=1), first)
    assert not torch.equal(lm.generate(ids, **SAMPLED, seed=2), first)
    assert torch.equal(lm.generate(ids, **SAMPLED, seed=0), lm.generate(ids, **SAMPLED, seed=0))
    assert not torch.equal(lm.generate(ids, **SAMPLED), lm.generate(ids, **SAMPLED)), (
        "without a seed, draws differ"
    )


def test_generating_leaves_the_global_generator_alone(lm):
    state = torch.get_rng_state()
    lm.generate(prompts(LLAMA, 2, 6), **SAMPLED, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_the_same_prompt_differ(lm):
    rows = lm.generate(prompts(LLAMA, 1, 6).expand(4, -1), **SAMPLED, seed=1)
    assert len({tuple(row.tolist()) for row in rows}) == 4


def test_a_row_draws_what_it_draws_alone(lm):
    rows = [prompts(LLAMA, n, seed=n) for n in (9, 4, 6)]
    batch, mask = ragged(rows, ["right", "left", "left"])
    alone = lm.generate(rows[0][None], **SAMPLED, seed=5)[0, 9:]
    assert torch.equal(lm.generate(batch, mask, **SAMPLED, seed=5)[0, batch.shape[1] :], alone)


def test_numbers_of_new_tokens(lm):
    ids = prompts(LLAMA, 2, 6)
    full = lm.generate(ids, max_new_tokens=7, eos_token_id=())
    assert full.shape == (2, 13) and full.dtype == torch.long and torch.equal(full[:, :6], ids)
    assert torch.equal(lm.generate(ids, max_new_tokens=1, eos_token_id=()), full[:, :7])


# ---- ends -----------------------------------------------------------------------------------------------------------


def new_until(tokens, ends):
    """Up to the first end, which is kept."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


@pytest.mark.parametrize(
    "generation_config", [dict(), dict(temperature=1.0, seed=3)], ids=["greedy", "sampled"]
)
def test_rows_end_at_eos_and_are_padded_after_it(generation_config, lm):
    rows = [prompts(LLAMA, n, seed=n) for n in (9, 4, 6)]
    batch, mask = ragged(rows, ["right", "left", "left"])
    free = lm.generate(batch, mask, max_new_tokens=16, eos_token_id=(), **generation_config)[
        :, batch.shape[1] :
    ].tolist()
    ends = [free[0][3], free[1][8]]  # a list of ids, each of them an end in every row
    out = lm.generate(batch, mask, max_new_tokens=16, eos_token_id=ends, **generation_config)
    new, texts = out[:, batch.shape[1] :].tolist(), [new_until(row, ends) for row in free]
    assert len({len(text) for text in texts}) > 1 and torch.equal(out[:, : batch.shape[1]], batch)
    for row, text in zip(new, texts, strict=True):
        assert row == text + [LLAMA.fields["pad_token_id"]] * (len(row) - len(text))
        assert max(map(len, texts)) <= len(row) <= 16
    one = lm.generate(batch, mask, max_new_tokens=16, eos_token_id=ends[0], **generation_config)[
        0, batch.shape[1] :
    ].tolist()
    text = new_until(free[0], ends[:1])
    assert one == text + [0] * (len(one) - len(text)), "a single id is an end too"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("listed", [False, True])
def test_eos_of_the_checkpoint(file, listed, copy):
    """generation_config.json says it where there is one, else config.json; one id or a list of ids."""
    path = copy(LLAMA)
    ids = prompts(LLAMA, 1, 6)
    free = (
        TinyLM.from_pretrained(path).generate(ids, max_new_tokens=16, eos_token_id=())[0].tolist()
    )
    eos = free[6 + 4]
    if file == "config.json":
        (path / "generation_config.json").unlink()
    content = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(content | {"eos_token_id": [eos, 210] if listed else eos}))
    out = TinyLM.from_pretrained(path).generate(ids, max_new_tokens=16)[0].tolist()
    text = free[:6] + new_until(free[6:], [eos])
    assert out == text + [0] * (len(out) - len(text)) and len(text) <= 11


# ---- text -----------------------------------------------------------------------------------------------------------

LOOP = "aé🙂日ж!"  # characters of one to four bytes, and no byte twice


@pytest.fixture(scope="module")
def reciter(tmp_path_factory):
    """A checkpoint that recites LOOP: attention and MLP add nothing, and the head knows each byte's successor."""
    loop = list(LOOP.encode())
    oracle = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            eos_token_id=256,
            pad_token_id=257,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        oracle.model.layers[0].self_attn.o_proj.weight.zero_()
        oracle.model.layers[0].mlp.down_proj.weight.zero_()
        oracle.model.embed_tokens.weight.normal_(generator=generator)
        oracle.lm_head.weight.zero_()
        for byte, successor in zip(loop, loop[1:] + loop[:1], strict=True):
            oracle.lm_head.weight[successor] = oracle.model.embed_tokens.weight[byte]
    path = tmp_path_factory.mktemp("reciter")
    TinyLM(Config(vocab_size=320)).save_pretrained(
        path
    )  # for its byte tokenizer; the rest is replaced
    oracle.save_pretrained(path)
    lm = TinyLM.from_pretrained(path)
    assert (
        lm.tokenizer.decode(lm.generate(torch.tensor([loop]), max_new_tokens=2 * len(loop))[0])
        == LOOP * 3
    )
    return path


def test_byte_tokenizer_round_trips_and_is_that_of_transformers(reciter):
    """What we write as tokenizer.json encodes and decodes the same in transformers."""
    ours, theirs = TinyLM.from_pretrained(reciter).tokenizer, AutoTokenizer.from_pretrained(reciter)
    for text in (
        LOOP,
        "",
        " two  spaces\r\n\ttab",
        "naïve — „größer“",
        "\x00\x7f",
        "क्षि 👩‍👩‍👧 e\u0301",
    ):
        ids = ours.encode(text)
        assert ids == list(text.encode()) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 13, 40])
def test_stream_is_generate_in_pieces(new_tokens, reciter):
    lm = TinyLM.from_pretrained(reciter)
    pieces = list(lm.stream(LOOP, max_new_tokens=new_tokens))
    ids = lm.generate(torch.tensor([lm.tokenizer.encode(LOOP)]), max_new_tokens=new_tokens)[0]
    assert "".join(pieces) == lm.tokenizer.decode(ids[len(LOOP.encode()) :])
    assert all(pieces)
    whole = (
        pieces if new_tokens not in (2, 40) else pieces[:-1]
    )  # 2 and 40 end inside of a character
    assert not any("\ufffd" in piece for piece in whole)
    if new_tokens == 13:
        assert pieces == list(LOOP)  # each character as soon as it is there


def test_stream_draws_what_generate_draws(reciter):
    lm, options = TinyLM.from_pretrained(reciter), dict(max_new_tokens=60, temperature=9.0, seed=4)
    ids = lm.generate(torch.tensor([[97]]), **options)[0, 1:].tolist()
    assert "".join(lm.stream("a", **options)) == lm.tokenizer.decode(new_until(ids, [256]))


def test_stream_keeps_the_first_space(tmp_path):
    """Guards a space lost to decoders that strip the first one of a text, as SentencePiece's do."""
    lm, prompt = (
        TinyLM(Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)),
        "w1 w3 w5",
    )
    lm.save_pretrained(tmp_path)
    words = {"<unk>": 0} | {f"\u2581w{i}" if i % 2 else f"x{i}": i for i in range(1, 64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lm, spaces = TinyLM.from_pretrained(tmp_path), 0
    for seed in range(4):
        options = dict(max_new_tokens=6, temperature=9.0, seed=seed)
        whole = lm.generate(torch.tensor([[1, 3, 5]]), **options)[0]
        assert prompt + "".join(lm.stream(prompt, **options)) == lm.tokenizer.decode(whole)
        spaces += int(whole[3] % 2)
    assert spaces  # of what was to be lost


def test_stream_comes_as_it_is_made(reciter):
    """The first piece does not wait for the last token."""
    lm = TinyLM.from_pretrained(reciter)
    calls = []
    lm.register_forward_hook(lambda *_: calls.append(1))
    stream = lm.stream("!", max_new_tokens=50)
    assert next(stream) == "a" and len(calls) <= 2


@pytest.mark.parametrize(
    "stop, text",
    [
        ("日", "aé🙂"),
        (["ж!", "zzz"], "aé🙂日"),
        (["日ж", "🙂日ж!"], "aé🙂"),
        ("!aé", LOOP[:-1]),
        (["!ab", "!x"], LOOP * 2),
        ("a", ""),
        (LOOP + "a", ""),
    ],
)
def test_stop_strings(stop, text, reciter):
    """A stop string may begin and end anywhere in a token; nothing of it is shown, and what only looks like its
    beginning is. In a batch each row stops for itself; `generate` keeps the tokens of the stop string."""
    lm = TinyLM.from_pretrained(reciter)
    length = 2 * len(LOOP.encode())
    assert "".join(lm.stream("!", max_new_tokens=length, stop=stop)) == text
    ids = torch.tensor([[ord("!")], [ord("a")]])
    new = lm.generate(ids, max_new_tokens=length, stop=stop)[0, 1:]
    shown, stops = lm.tokenizer.decode(new), [stop] if isinstance(stop, str) else stop
    if text == LOOP * 2:
        assert shown == text
    else:
        assert shown.startswith(text) and any(shown == text + s for s in stops)
        assert set(new[len(shown.encode()) :].tolist()) <= {257}, "pad after the stop string"


def test_tokenizer_travels_with_the_checkpoint(reciter, tmp_path):
    lm = TinyLM.from_pretrained(reciter)
    lm.save_pretrained(tmp_path)
    again = TinyLM.from_pretrained(tmp_path)
    assert again.tokenizer.encode(LOOP) == lm.tokenizer.encode(LOOP)
    assert "".join(again.stream("!", max_new_tokens=13)) == LOOP
    assert AutoTokenizer.from_pretrained(tmp_path).decode(lm.tokenizer.encode(LOOP)) == LOOP


# ---- what must be refused -------------------------------------------------------------------------------------------

BAD = [
    dict(temperature=-1.0),
    dict(temperature=math.nan),
    dict(temperature="hot"),
    dict(top_k=-1),
    dict(top_k=2.5),
    dict(top_p=1.5),
    dict(top_p=-0.1),
    dict(top_p=math.nan),
    dict(min_p=2.0),
    dict(min_p=-0.5),
    dict(repetition_penalty=0.0),
    dict(repetition_penalty=-1.0),
    dict(repetition_penalty=math.inf),
    dict(max_new_tokens=-1),
    dict(max_new_tokens=2.5),
    dict(stop=""),
    dict(stop=[3]),
    dict(seed="x"),
    dict(eos_token_id="</s>"),
    dict(eos_token_id=[1.5]),
]


@pytest.mark.parametrize("options", BAD, ids=name)
def test_bad_options(options, reciter):
    ((field, value),) = options.items()
    lm = TinyLM.from_pretrained(reciter)
    shown = "" if isinstance(value, list) else str(value)
    refuses(
        lambda: lm.generate(torch.tensor([[97, 98]]), **dict(max_new_tokens=2) | options),
        field,
        shown,
    )
    refuses(lambda: list(lm.stream("ab", **dict(max_new_tokens=2) | options)), field, shown)


@pytest.mark.parametrize(
    "ids, mask, word",
    [
        (torch.zeros(3, dtype=torch.long), None, "input_ids"),
        (torch.zeros(2, 0, dtype=torch.long), None, "input_ids"),
        (torch.zeros(2, 3), None, "input_ids"),
        (torch.full((1, 3), 211), None, "211"),
        (torch.full((1, 3), -1), None, "-1"),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.long), "attention_mask"),
        (
            torch.ones(2, 3, dtype=torch.long),
            torch.tensor([[1, 1, 1], [0, 0, 0]]),
            "attention_mask",
        ),
    ],
)
def test_bad_tensors(ids, mask, word, lm):
    refuses(lambda: lm.generate(ids, mask, max_new_tokens=2), word)


def test_text_without_a_tokenizer(lm):
    refuses(lambda: list(lm.stream("text", max_new_tokens=2)), "tokenizer.json")
    refuses(
        lambda: lm.generate(torch.tensor([[5]]), max_new_tokens=2, stop="x"),
        "stop",
        "tokenizer.json",
    )


def test_learned_positions_run_out(folder):
    """GPT-2 has a position for each of its 64 tokens and no more: an error, not an index out of range."""
    lm = TinyLM.from_pretrained(folder(next(case for case in CASES if case.name == "gpt2")))
    refuses(lambda: lm(torch.zeros(1, 65, dtype=torch.long)), "65", "64")
    refuses(
        lambda: lm.generate(torch.zeros(1, 60, dtype=torch.long), max_new_tokens=8),
        "max_new_tokens",
        "64",
    )
    assert lm.generate(
        torch.zeros(1, 60, dtype=torch.long), max_new_tokens=4, eos_token_id=()
    ).shape == (1, 64)


# ---- where a text ends: special tokens, files, chats ----------------------------------------------------------------


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """A random model of bytes with special tokens <|s258|> to <|s319|>, and what it says after "abc" is two of them."""
    path = tmp_path_factory.mktemp("special")
    torch.manual_seed(0)
    config = Config(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    lm = TinyLM(config).eval()
    for weight in lm.parameters():
        weight.data.mul_(15 if weight.ndim > 1 else 1)
    lm.save_pretrained(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<|s{i}|>" for i in range(258, 320)])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def prompt_before_special(lm):
    """A prompt after which a special token comes within a few tokens, those tokens, and its place among them."""
    for first in range(97, 123):
        ids = torch.tensor([[first, 98, 99]])
        new = lm.generate(ids, max_new_tokens=8, eos_token_id=())[0, 3:].tolist()
        place = next((i for i, token in enumerate(new) if token >= 258), 9)
        if 0 < place < 6:
            return ids, new, place
    raise AssertionError("no special token is written")


def test_a_special_token_can_be_a_stop_string(special):
    """Guards stop strings that are looked for in a text without its special tokens: `stop=["<|im_end|>"]` ran on."""
    lm = TinyLM.from_pretrained(special)
    ids, new, place = prompt_before_special(lm)
    options = dict(max_new_tokens=8, eos_token_id=(), stop=[f"<|s{new[place]}|>"])
    assert lm.generate(ids, **options)[0, 3:].tolist() == new[: place + 1]
    shown = lm.tokenizer.decode(ids[0].tolist() + new[:place])
    assert shown == lm.tokenizer.decode(ids[0]) + "".join(lm.stream(ids[0].tolist(), **options))
    # as the first thing after the prompt
    ids = torch.cat((ids, torch.tensor([new[:place]])), 1)
    assert lm.generate(ids, **options)[0, ids.shape[1] :].tolist() == new[place : place + 1]
    assert "".join(lm.stream(ids[0].tolist(), **options)) == ""


def test_a_stop_string_that_begins_in_a_special_token(special):
    """A stop string may reach over the end of a special token into the text behind it."""
    tokenizer = TinyLM.from_pretrained(special).tokenizer
    ids = [97, 300, 98, 99, 300, 98]

    def shown(*stop):
        text = TextStream(tokenizer, GenerationConfig(stop=stop))
        return "".join(text.append(id, i == len(ids)) for i, id in enumerate(ids, 1))

    for stop, text in (("0|>bc", "a"), ("<|s300|>b", "a"), ("c<", "ab"), ("bc<|s300|>", "a")):
        assert shown(stop) == text, stop
    assert shown("<|s301|>", "cb") == "abcb"
    assert shown() == "abcb"


def test_stop_strings_of_the_file(reciter, tmp_path):
    """Guards `stop_strings` in generation_config.json that was ignored; an argument goes before it."""
    lm = TinyLM.from_pretrained(reciter)
    lm.generation_config = lm.generation_config | {"stop_strings": ["日"]}
    assert "".join(lm.stream("!", max_new_tokens=30)) == "aé🙂"
    assert "".join(lm.stream("!", max_new_tokens=30, stop="é")) == "a"
    assert len(lm.generate(torch.tensor([[33]]), max_new_tokens=30)[0]) == 1 + len(
        "aé🙂日".encode()
    )


def test_a_chat_ends_at_the_tokenizers_end_of_turn(reciter, tmp_path):
    """Guards a chat that runs on where config.json names another end than the tokenizer."""
    lm = TinyLM.from_pretrained(reciter)
    lm.tokenizer.apply_chat_template = lambda *_, **__: "!"
    say = [{"role": "user", "content": "hi"}]
    lm.tokenizer.eos_token_id = "日".encode()[0]
    assert "".join(lm.chat(say, max_new_tokens=30)) == "aé🙂"
    assert "".join(lm.chat(say, max_new_tokens=13, eos_token_id=None)) == LOOP


# ---- generation_config.json, as transformers reads it ---------------------------------------------------------------

FIELDS = [
    dict(bad_words_ids=[["eos"]]),  # transformers drops it: a text ends all the same
    dict(bad_words_ids=[["eos"], ["first"]]),
    dict(bad_words_ids=[["first", "second"]]),
    dict(no_repeat_ngram_size=1),
    dict(repetition_penalty=3.0),
    dict(min_length=9),
    dict(min_new_tokens=5),
    dict(num_beams=3),
    dict(num_beams=3, length_penalty=0.3),
    dict(num_beams=3, early_stopping=True, renormalize_logits=True),
    dict(forced_eos_token_id=7),
    dict(suppress_tokens=["first"]),
    dict(begin_suppress_tokens=["first"]),
    dict(encoder_repetition_penalty=1.0),
    dict(exponential_decay_length_penalty=[0, 99.0]),
    dict(sequence_bias=[[["first"], -9.0]]),
    dict(guidance_scale=1),
    dict(num_return_sequences=1, num_beam_groups=1, typical_p=1.0, penalty_alpha=0.0),
    dict(do_sample=False, temperature=0.2, top_k=3, top_p=0.5, min_p=0.4, top_h=0.3),
    dict(epsilon_cutoff=0.3, eta_cutoff=0.3, use_cache=True, remove_invalid_values=True),
    dict(output_attentions=False, cache_implementation=None, max_time=None, stop_strings=None),
    dict(low_memory=None, is_assistant=False, renormalize_logits=True, token_healing=False),
]


@pytest.mark.parametrize("fields", FIELDS, ids=name)
def test_a_field_is_read_as_by_transformers_or_refused(fields, lm, folder):
    """Never silently other tokens; and a default is no reason to refuse."""
    oracle, ids = load_oracle(folder(LLAMA)), prompts(LLAMA, 1, 6)
    free = lm.generate(ids, max_new_tokens=9, eos_token_id=())[0, 6:].tolist()
    eos = free[3]
    names = {"eos": eos, "first": free[0], "second": free[1]}

    def named(value):
        if isinstance(value, list):
            return [named(part) for part in value]
        return names.get(value, value) if isinstance(value, str) else value

    fields = {key: named(value) for key, value in fields.items()}
    options = dict(eos_token_id=eos, pad_token_id=0, max_new_tokens=9)
    theirs = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), **dict(do_sample=False) | fields | options
    )
    lm.generation_config = fields | options
    try:
        ours = lm.generate(ids)
    except ValueError as error:
        assert "generation_config.json" in str(error) and any(key in str(error) for key in fields)
        plain = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, **options
        )
        assert plain.tolist() != theirs.tolist() or "min_new_tokens" in fields, "a needless refusal"
    else:
        assert new_until(ours[0, 6:].tolist(), [eos]) == new_until(theirs[0, 6:].tolist(), [eos])


def test_unknown_fields_are_one_warning(copy):
    path = copy(LLAMA)
    file = path / "generation_config.json"
    more = {"my_field": 1, "_commit_hash": "x", "other": [2], "use_cache": True, "max_length": 99}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    with pytest.warns(UserWarning) as warned:
        TinyLM.from_pretrained(path)
    (text,) = {str(w.message) for w in warned if "generation_config.json" in str(w.message)}
    assert text.endswith("my_field, other")


# ---- numbers that overflow, threads, compiled states ----------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.0, seed=1), dict(num_beams=2)])
def test_logits_that_are_not_finite_are_an_error(options, folder):
    """Guards token 0 for ever: a weight that is NaN, and a token whose logits alone overflow."""
    lm, ids = TinyLM.from_pretrained(folder(LLAMA)), prompts(LLAMA, 1, 6)
    lm.generate(ids, max_new_tokens=3, **options)
    lm.embed.weight.data[int(ids[0, 2])] = math.nan
    refuses(lambda: lm.generate(ids, max_new_tokens=3, **options), "not finite")
    lm.tokenizer = ByteTokenizer()
    refuses(lambda: list(lm.stream(ids[0].tolist(), max_new_tokens=3)), "not finite")


def in_threads(calls):
    """What each call returns, all at once in eight threads."""
    with ThreadPoolExecutor(8) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_eight_threads_give_what_each_gives_alone(reciter):
    lm, calls = TinyLM.from_pretrained(reciter), []
    for i in range(16):
        ids = torch.tensor([list(LOOP.encode())[i % 3 :][: 3 + i % 7]])
        options = dict(max_new_tokens=4 + i, temperature=float(i % 2), seed=i, num_beams=1)
        beams = dict(max_new_tokens=3 + i, num_beams=1 + i % 3)
        calls += [
            lambda ids=ids, options=options: lm.generate(ids, **options).tolist(),
            lambda ids=ids, beams=beams: lm.generate(ids, **beams).tolist(),
            lambda i=i, options=options: [*lm.stream(LOOP[i % 4 :], **options, stop="日")],
        ]
    alone = [call() for call in calls]
    assert in_threads(calls) == alone


def test_a_second_generation_leaves_the_first_alone(folder, monkeypatch):
    """Guards compiled states, which are kept for the next text of their shape: not while they are in use."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    lm = TinyLM.from_pretrained(folder(LLAMA))
    lm.tokenizer = ByteTokenizer()
    options = dict(max_new_tokens=9, eos_token_id=(), compile=True)
    alone = [[*lm.stream(text, **options)] for text in ("abc", "xyz")]
    (state,) = lm._states.values()
    first, second = (lm.stream(text, **options) for text in ("abc", "xyz"))
    mixed = [[], []]
    for one, other in zip(first, second, strict=False):
        mixed[0].append(one)
        mixed[1].append(other)
    mixed[0] += first
    mixed[1] += second
    assert ["".join(text)[:4] for text in mixed] == ["".join(text)[:4] for text in alone]
    assert [[*lm.stream(text, **options)] for text in ("abc", "xyz")] == alone
    assert len(lm._states) == 1
    torch._dynamo.reset()


def test_generation_takes_ids_of_32_bits_and_the_penalty_of_its_file():
    torch.manual_seed(0)
    lm = TinyLM(Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    ids, options = torch.tensor([[3, 5]]), dict(max_new_tokens=12, eos_token_id=())
    plain, penalised = (
        lm.generate(ids.int(), **options, **more).tolist()
        for more in ({}, dict(repetition_penalty=5.0))
    )
    assert plain == lm.generate(ids, **options).tolist() != penalised
    lm.generation_config = {"repetition_penalty": 5.0}
    assert lm.generate(ids, **options).tolist() == penalised
    assert lm.generate(ids, no_repeat_ngram_size=1000, **options).tolist() == penalised
    with pytest.raises(tinylm.Error, match="^bad_words_ids = "):
        lm.generate(ids, bad_words_ids=[[]], **options)


# ---- the arguments of transformers' generate ------------------------------------------------------------------------


def test_max_length_counts_the_prompt(lm, folder):
    """As in transformers: max_new_tokens goes before it, and a prompt that is as long is an error."""
    ids = prompts(LLAMA, 5)[None]
    plain = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = load_oracle(folder(LLAMA)).generate(ids, max_length=9, **plain)
    options = dict(eos_token_id=())
    assert lm.generate(ids, max_length=9, **options).tolist() == theirs.tolist()
    assert lm.generate(ids, max_length=9, max_new_tokens=2, **options).shape == (1, 7)
    refuses(lambda: lm.generate(ids, max_length=5, **options), "max_length", "5")


def test_do_sample_takes_what_the_file_says(lm):
    """Guards options of generation_config.json that `do_sample=True` left out: top_k 1 makes the draw greedy."""
    ids = prompts(LLAMA, 5)[None].repeat(32, 1)
    options = dict(max_new_tokens=3, seed=3, eos_token_id=())
    sampled = lm.generate(ids, do_sample=True, **options)
    assert torch.equal(sampled, lm.generate(ids, temperature=1.0, top_k=50, **options))
    lm.generation_config = lm.generation_config | dict(top_k=1, temperature=0.7, do_sample=True)
    greedy = lm.generate(ids, max_new_tokens=3, eos_token_id=())
    assert torch.equal(lm.generate(ids, do_sample=True, **options), greedy)
    with pytest.warns(UserWarning, match="no effect"):
        assert torch.equal(lm.generate(ids, temperature=0.7, do_sample=False, **options), greedy)


@pytest.mark.parametrize("option", ["top_k", "top_p", "min_p", "seed"])
def test_options_of_sampling_need_sampling(option, lm):
    """Guards options without a temperature that were greedy without a word."""
    with pytest.warns(UserWarning, match=f"^{option}: no effect"):
        lm.generate(
            prompts(LLAMA, 5)[None],
            max_new_tokens=1,
            **{option: 1 if "p" not in option[-1] else 0.5},
        )


def test_several_texts_for_each_row(lm, folder):
    """num_return_sequences: the best beams, as transformers has them; different samples; not the same text twice."""
    ids = torch.stack([prompts(LLAMA, 5, seed=n) for n in (1, 2)])
    beams = dict(num_beams=4, num_return_sequences=3, max_new_tokens=5)
    plain = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = load_oracle(folder(LLAMA)).generate(ids, **beams, **plain)
    assert lm.generate(ids, **beams, eos_token_id=()).tolist() == theirs.tolist()
    samples = lm.generate(ids, temperature=1.0, seed=1, num_return_sequences=3, max_new_tokens=5)
    assert samples.shape == (6, 10) and len({tuple(row) for row in samples.tolist()}) == 6
    assert torch.equal(samples[:, :5], ids.repeat_interleave(3, 0))
    refuses(lambda: lm.generate(ids, num_return_sequences=2), "num_return_sequences", "2")
    refuses(lambda: [*lm.stream("a", temperature=1.0, num_return_sequences=2)], "stream")


@pytest.mark.parametrize(
    "ids", ["a text", ["a"], [["a"]], [[1, 2], [3]], [1, 2], 3, [], [[]], [[1.5]]]
)
def test_ids_that_are_none_are_one_line(ids, lm):
    """Guards torch's own words for a text or for rows of different lengths."""
    refuses(lambda: lm.generate(ids, max_new_tokens=1), "input_ids", "ids (batch, seq)")
