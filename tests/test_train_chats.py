"""Training on chats: tokens of a whole chat as transformers has them, and labels for the assistant's turns alone."""

import json

import pytest
import transformers
from helpers import write_tokenizer
from templates import CALLING, PLAIN, TEMPLATES, TOOLS

import pretrained
import tinylm
import train
from tinylm import Config, TinyLM


def learnt(tokenizer, example):
    return tokenizer.decode([i for i in example["labels"] if i >= 0], special=True)


@pytest.mark.filterwarnings("ignore:messages. the chat template does not read")
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_learnt_as_transformers_tokenises_them(name, tokenizers):
    """Guards turns that were tokenised one by one, and templates that were refused because they rewrite earlier turns."""
    theirs, ours, _ = tokenizers
    for messages, tools in (
        (PLAIN, None),
        (PLAIN[:2], None),
        (CALLING, TOOLS),
        (CALLING[1:], None),
    ):
        options = {"chat_template": TEMPLATES[name]}
        try:
            expected = theirs.apply_chat_template(messages, tools, return_dict=False, **options)
        except Exception:
            with pytest.raises(tinylm.Error):
                train.chat_example(ours, messages, tools, **options)
            continue
        found = train.chat_example(ours, messages, tools, **options)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if isinstance(found, list):
            assert len(found) == len(turns) > 1
            for i, example in zip(turns, found):
                part = theirs.apply_chat_template(
                    messages[: i + 1], tools, return_dict=False, **options
                )
                assert example["input_ids"] == part
                assert learnt(ours, example).count((messages[i]["content"] or "").strip()[-6:])
        else:
            assert found["input_ids"] == expected
            for i in turns:
                assert (messages[i]["content"] or "").strip()[-6:] in learnt(ours, found)
            for message in messages:
                if message["role"] in ("user", "system", "tool"):
                    assert message["content"].strip() not in learnt(ours, found)


TURNS = {  # template -> what is learnt of PLAIN, for each example
    "CHATML": ["<think>\nWell.\n</think>\n\nHello!\n<|im_end|>\nYes.<|im_end|>\n"],
    "QWEN3": [
        "<think>\nWell.\n</think>\n\nHello!\n<|im_end|>\n",
        "<think>\nShort.\n</think>\n\nYes.<|im_end|>\n",
    ],
    "PHI3": ["<think>\nWell.\n</think>\n\nHello!\n<|end|>\nYes.<|end|>\n</s>"],
    "ZEPHYR": ["<think>\nWell.\n</think>\n\nHello!\n</s>\nYes.</s>\n"],
    "MISTRAL": [" <think>\nWell.\n</think>\n\nHello!</s> Yes.</s>"],
    "SMOLLM3": [
        "<|im_start|>assistant\n<think>\nWell.\n</think>\n\nHello!\n<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    ],
}


@pytest.mark.parametrize("name", TURNS)
def test_what_is_learnt_are_the_assistants_turns_and_their_ends(name, tokenizers):
    _, ours, _ = tokenizers
    found = train.chat_example(ours, PLAIN, chat_template=TEMPLATES[name])
    found = found if isinstance(found, list) else [found]
    assert [learnt(ours, example) for example in found] == TURNS[name]


def test_tools_that_a_template_does_not_read_are_said(tokenizers):
    with pytest.warns(UserWarning, match="does not read tool_calls"):
        train.chat_example(
            tokenizers[1],
            [PLAIN[0], {**CALLING[2], "content": ""}],
            chat_template=TEMPLATES["CHATML"],
        )


def test_words_of_a_chat_keep_no_stray_mark(tmp_path):
    """Guards `▁Yes` for `Yes`: tokenizers that mark the first word saw each turn as a text of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "<unk> <s> </s> U: A: ▁U: ▁A: \n Hello Yes ▁Hello ▁Yes ▁".split(" ")
    pieces = sorted({char for word in words[3:] for char in word} - set(words))
    backend = Tokenizer(
        models.Unigram([(w, -1.0 if len(w) > 1 else -9.0) for w in words + pieces], 0)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.add_special_tokens(["<s>", "</s>"])
    template = (
        "{% for m in messages %}{{ ('U:\\n' if m.role == 'user' else 'A:\\n') + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:\\n' }}{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    write_tokenizer(tmp_path, backend, config, chat_template_jinja=template)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = pretrained.load_tokenizer(tmp_path)
    found = train.chat_example(ours, messages)
    assert found["input_ids"] == theirs.apply_chat_template(messages, return_dict=False)
    tokens = theirs.convert_ids_to_tokens([i for i in found["labels"] if i >= 0])
    assert tokens == ["Yes", "</s>"]


def test_chat_learns_the_assistants_words_only(monkeypatch):
    """By the template, token for token; a U+2028 in a string ends no row."""
    lm = TinyLM(Config(vocab_size=320))
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    class Chatting(tinylm.ByteTokenizer):
        files = {"tokenizer_config.json": json.dumps({"chat_template": template}).encode()}

    lm.tokenizer = Chatting()
    messages = [
        dict(role=role, content=content)
        for role, content in (
            ("user", "hi\u2028there"),
            ("assistant", "yes"),
            ("user", "and"),
            ("assistant", "no"),
        )
    ]
    example = next(train.TASKS["lm"].examples(lm, {"messages": messages}, 256))
    text = bytes(example["input_ids"]).decode()
    assert text == "<user>hi\u2028there</s><assistant>yes</s><user>and</s><assistant>no</s>"
    learnt = [token for token in example["labels"] if token != -100]
    assert bytes(learnt).decode() == "yes</s>no</s>"
    rows = [{"messages": messages}, {"messages": messages[2:]}]
    options = train.TrainOptions(block=28)  # which ends before the first chat's assistant speaks
    (example,) = train.TASKS["lm"].epochs(lm, rows, options.block)(None)
    assert example["number"] == 1
    assert train.describe_cuts(options, (rows, [example])) == [
        "2 of 2 texts are longer than --block 28 and are cut, 1 of them before anything to learn: left out"
    ]
