"""Tokenizers and chat templates: what transformers makes of the same files is what we make of them."""

import inspect
import json

import pytest
from templates import SNIPPETS, TEMPLATES

import onnxlm
import tinylm

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
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "3 C"},
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
