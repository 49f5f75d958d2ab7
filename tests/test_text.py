"""Tokenizers and chat templates: what transformers makes of the same files is what we make of them."""

import inspect
import json

import pytest
from templates import SNIPPETS, TEMPLATES

import onnxlm
import tinylm
import train

jinja2 = pytest.importorskip("jinja2")
transformers = pytest.importorskip("transformers")

CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Malmö", "days": 2}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a <city>.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": ["integer", "null"]}},
            },
        },
    }
]
PLAIN = [
    {"role": "user", "content": " Hi é <|im_end|> "},
    {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nHello!\n"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Yes.", "reasoning": "Short."},
]
CALLING = [
    {"role": "system", "content": "Be brief. /no_think"},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "thinking": "I must look."},
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "three degrees"},
    {"role": "assistant", "content": "It is 3 C.", "name": None},
]
PARTS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": "c"},
]
DOCUMENTS = [{"title": "A", "text": "first"}, {"title": "B", "text": "second"}]


def write(folder, backend=None, config=None, **files):
    """A folder of tokenizer files; a `_` in a name is a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    if backend is not None:
        text = backend if isinstance(backend, str) else backend.to_str()
        (folder / "tokenizer.json").write_text(text)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        content = content if isinstance(content, str) else json.dumps(content)
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_text(content)
    return folder


def byte_backend(*added):
    """Byte-level BPE without merges, with these special tokens."""
    from tokenizers import Tokenizer

    text = tinylm.ByteTokenizer().files["tokenizer.json"].decode()
    backend = Tokenizer.from_str(text)
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", *added])
    return backend


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers' tokenizer, ours, the runtime's) of one folder."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "pad_token": None,
        "add_bos_token": True,
        "model_max_length": 99,
    }
    folder = write(tmp_path_factory.mktemp("pair"), byte_backend(), config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return theirs, tinylm.load_tokenizer(folder), onnxlm.load_tokenizer(folder)


def same_text(pair, messages, **options):
    """All three give the same text, or all refuse."""
    theirs, *ours = pair
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        for tokenizer, module in zip(ours, (tinylm, onnxlm)):
            with pytest.raises(module.Error) as caught:
                tokenizer.apply_chat_template(messages, **options)
            assert len(str(caught.value).splitlines()) == 1, error
        return None
    for tokenizer in ours:
        assert tokenizer.apply_chat_template(messages, **options) == expected
    return expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_write_what_transformers_writes(name, pair):
    """Guards {% generation %}, {% break %}, tojson, strftime_now, tools, documents and thoughts of public models."""
    written = 0
    for messages in (PLAIN, PLAIN[:1], CALLING, PARTS):
        for options in (
            {},
            {"add_generation_prompt": True},
            {"tools": TOOLS, "enable_thinking": False, "add_generation_prompt": True},
            {"documents": DOCUMENTS, "citation_mode": "fast", "date_string": "1 May 2025"},
        ):
            text = same_text(pair, messages, chat_template=TEMPLATES[name], **options)
            written += text is not None
    assert written >= 4


@pytest.mark.parametrize("template", SNIPPETS)
def test_templates_have_the_environment_of_transformers(template, pair):
    for messages in (PLAIN, CALLING):
        same_text(
            pair, messages, chat_template=template, enable_thinking=True, custom={"a": (1, 2.5)}
        )


def test_generated_parts_are_marked_as_in_transformers(pair):
    """What {% generation %} marks, as return_assistant_tokens_mask has it."""
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}é{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}|{% endfor %}"
    )
    theirs, ours, _ = pair
    expected = theirs.apply_chat_template(
        PLAIN, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    text, parts = tinylm.render_chat(ours, PLAIN, chat_template=template)
    encoding = ours.encoding(text, special=False)
    marked = [int(any(a <= o[0] < b for a, b in parts)) for o in encoding.offsets]
    assert encoding.ids == expected["input_ids"] and marked == expected["assistant_masks"]


def test_templates_refuse_what_they_cannot_pass_on(pair):
    _, ours, _ = pair
    for arguments, word in (
        (([],), "messages"),
        ((["hi"],), "messages"),
        ((PLAIN, [print]), "tools"),
        ((PLAIN,), "chat_template"),
    ):
        with pytest.raises(tinylm.Error, match=word):
            ours.apply_chat_template(*arguments)
    with pytest.raises(tinylm.Error, match="continue_final_message"):
        ours.apply_chat_template(PLAIN, continue_final_message=True, chat_template="x")


MIRRORED = (
    "read_tokenizer_files parse_json_file tokenizer_class special_tokens Tokenizer render_chat find_chat_template "
    "plain_data template_message GeneratedText compile_template template_environment"
).split()


@pytest.mark.parametrize("name", MIRRORED)
def test_the_runtime_has_the_same_source(name):
    assert inspect.getsource(getattr(tinylm, name)) == inspect.getsource(getattr(onnxlm, name))


def test_the_runtime_has_the_same_tables():
    for name in ("TOKENIZER_FILES", "CLASS_TOKENS", "MODEL_TOKENIZERS", "MAX_TEMPLATE_SECONDS"):
        assert getattr(tinylm, name) == getattr(onnxlm, name)


# ---- training on chats ----------------------------------------------------------------------------------------------


def learnt(tokenizer, example):
    return tokenizer.decode([i for i in example["labels"] if i >= 0], special=True)


@pytest.mark.filterwarnings("ignore:messages. the chat template does not read")
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_learnt_as_transformers_tokenises_them(name, pair):
    """Guards turns that were tokenised one by one, and templates that were refused because they rewrite earlier turns."""
    theirs, ours, _ = pair
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
def test_what_is_learnt_are_the_assistants_turns_and_their_ends(name, pair):
    _, ours, _ = pair
    found = train.chat_example(ours, PLAIN, chat_template=TEMPLATES[name])
    found = found if isinstance(found, list) else [found]
    assert [learnt(ours, example) for example in found] == TURNS[name]


def test_rows_of_chats_keep_their_fields():
    """Guards thoughts, tool calls, names and tools that were dropped without a word; ShareGPT is read too."""
    row = {"messages": CALLING, "tools": json.dumps(TOOLS), "id": 3, "documents": DOCUMENTS}
    (read,) = train.read_rows([row], train.TrainOptions())
    assert read == {"messages": CALLING, "tools": TOOLS, "variables": {"documents": DOCUMENTS}}
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "yes", "name": "x"},
        ],
    }
    (read,) = train.read_rows([row], train.TrainOptions())
    assert read["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", "name": "x"},
    ]
    (read,) = train.read_rows([{"messages": json.dumps(PARTS)}], train.TrainOptions())
    assert read["messages"] == PARTS


@pytest.mark.parametrize(
    "message, word",
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "image_url"),
        ({"from": "moderator", "value": "hi"}, "moderator"),
        ({"role": "assistant", "content": "a", "weight": 0}, "weight"),
        ({"role": "user", "content": 3}, "role and content"),
        ({"role": "user"}, "role and content"),
        ("hi", "role and content"),
    ],
)
def test_fields_of_chats_that_no_template_takes_are_named(message, word):
    with pytest.raises(tinylm.Error, match=word):
        train.read_rows([{"messages": [message]}], train.TrainOptions())


def test_tools_that_a_template_does_not_read_are_said(pair):
    with pytest.warns(UserWarning, match="does not read tool_calls"):
        train.chat_example(
            pair[1], [PLAIN[0], {**CALLING[2], "content": ""}], chat_template=TEMPLATES["CHATML"]
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
    write(tmp_path, backend, config, chat_template_jinja=template)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = tinylm.load_tokenizer(tmp_path)
    found = train.chat_example(ours, messages)
    assert found["input_ids"] == theirs.apply_chat_template(messages, return_dict=False)
    tokens = theirs.convert_ids_to_tokens([i for i in found["labels"] if i >= 0])
    assert tokens == ["Yes", "</s>"]
