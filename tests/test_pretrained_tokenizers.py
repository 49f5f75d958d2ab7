"""Tokenizers and chat templates: what transformers makes of the same files is what we make of them."""

import json

import pytest
from helpers import byte_backend, write_tokenizer
from templates import CALLING, DOCUMENTS, PARTS, PLAIN, SNIPPETS, TEMPLATES, TOOLS

import onnxlm
import pretrained
import tinylm
from tinylm import Config, TinyLM

jinja2 = pytest.importorskip("jinja2")
transformers = pytest.importorskip("transformers")


def same_text(tokenizers, messages, **options):
    """All three give the same text, or all refuse."""
    theirs, *ours = tokenizers
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
def test_templates_write_what_transformers_writes(name, tokenizers):
    """Guards {% generation %}, {% break %}, tojson, strftime_now, tools, documents and thoughts of public models."""
    written = 0
    for messages in (PLAIN, PLAIN[:1], CALLING, PARTS):
        for options in (
            {},
            {"add_generation_prompt": True},
            {"tools": TOOLS, "enable_thinking": False, "add_generation_prompt": True},
            {"documents": DOCUMENTS, "citation_mode": "fast", "date_string": "1 May 2025"},
        ):
            text = same_text(tokenizers, messages, chat_template=TEMPLATES[name], **options)
            written += text is not None
    assert written >= 4


@pytest.mark.parametrize("template", SNIPPETS)
def test_templates_have_the_environment_of_transformers(template, tokenizers):
    for messages in (PLAIN, CALLING):
        same_text(
            tokenizers,
            messages,
            chat_template=template,
            enable_thinking=True,
            custom={"a": (1, 2.5)},
        )


def test_generated_parts_are_marked_as_in_transformers(tokenizers):
    """What {% generation %} marks, as return_assistant_tokens_mask has it."""
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}é{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}|{% endfor %}"
    )
    theirs, ours, _ = tokenizers
    expected = theirs.apply_chat_template(
        PLAIN, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    text, parts = onnxlm.render_chat(ours, PLAIN, chat_template=template)
    encoding = ours.encoding(text, special=False)
    marked = [int(any(a <= o[0] < b for a, b in parts)) for o in encoding.offsets]
    assert encoding.ids == expected["input_ids"] and marked == expected["assistant_masks"]


def test_templates_refuse_what_they_cannot_pass_on(tokenizers):
    _, ours, _ = tokenizers
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


# ---- tokenizer files --------------------------------------------------------------------------------------------------

WORDS = [
    "the quick brown fox jumps over the lazy dog. Hello world, it's 2024 and we don't stop! " * 3,
    "Größe café naïve 中文 字 text THE END a b  c\n\nd\te " * 3,
]
SAID = [
    "Hello world",
    " the Quick  brown",
    "Größe café 中文 it's 12345",
    "a</s>\nfox</s> b<s>x",
    "[MASK] the [SEP] x <new> y <|im_end|>z",
    "",
    " ",
    "<extra_id_3> the <mask>",
    "U\n\nthe dog\n",
]


@pytest.fixture(scope="module")
def backends():
    """Small tokenizers of the kinds that model families have: WordPiece, byte-level BPE, BPE with bytes to fall back on
    (SentencePiece's), Unigram."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer

    ends = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    wordpiece.train_from_iterator(
        WORDS + [text.upper() for text in WORDS],
        WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False),
    )
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        WORDS,
        BpeTrainer(
            vocab_size=330,
            special_tokens=[*ends, "<|endoftext|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    fallback = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    fallback.normalizer = normalizers.Sequence([*prepend])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    fallback.train_from_iterator(
        WORDS, BpeTrainer(vocab_size=380, special_tokens=tokens, show_progress=False)
    )
    spec = json.loads(fallback.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    fallback = Tokenizer.from_str(json.dumps(spec))
    strip = decoders.Fuse(), decoders.Strip(" ", 1, 0)
    fallback.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), *strip]
    )
    fallback.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.train_from_iterator(
        WORDS,
        UnigramTrainer(vocab_size=90, special_tokens=ends, unk_token="<unk>", show_progress=False),
    )
    return {
        name: backend.to_str()
        for name, backend in locals().items()
        if name in ("wordpiece", "byte_level", "fallback", "unigram")
    }


FLAGS = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
NEW = {"content": "<new>", "special": True, **FLAGS}
QUICK = {"content": "quick", **FLAGS, "lstrip": False, "normalized": True, "special": False}
END = {"content": "</s>", **FLAGS, "rstrip": True, "special": False}
FILES = {  # (tokenizer, model_type, tokenizer_config.json, other files)
    "bert": ("wordpiece", "bert", {"tokenizer_class": "BertTokenizer"}),
    "bert-cased": (
        "wordpiece",
        "bert",
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": False,
            "strip_accents": False,
            "tokenize_chinese_chars": False,
        },
    ),
    "bert-no-config": ("wordpiece", "bert", None),
    "bert-no-class": ("wordpiece", "distilbert", {"do_lower_case": False}),
    "bert-other-class": (
        "wordpiece",
        "bert",
        {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False},
    ),
    "distilbert": (
        "wordpiece",
        "distilbert",
        {
            "tokenizer_class": "DistilBertTokenizerFast",
            "strip_accents": True,
            "do_lower_case": False,
        },
    ),
    "electra": (
        "wordpiece",
        "electra",
        {"tokenizer_class": "ElectraTokenizer", "additional_special_tokens": ["<new>"]},
    ),
    "added_tokens_decoder": (
        "byte_level",
        "llama",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "</s>",
            "added_tokens_decoder": {"330": NEW, "331": QUICK, "2": END},
        },
    ),
    "added_tokens.json": (
        "byte_level",
        "llama",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": ["<|im_end|>"],
        },
        {"added_tokens_json": {"<new>": 330, "<|im_end|>": 331}},
    ),
    "special_tokens_map.json": (
        "byte_level",
        "llama",
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {
            "special_tokens_map_json": {
                "bos_token": "<s>",
                "eos_token": {"content": "<|im_end|>", **FLAGS},
                "pad_token": "[PAD]",
                "additional_special_tokens": ["<new>"],
            }
        },
    ),
    "extra_special_tokens": (
        "byte_level",
        "llama",
        {
            "tokenizer_class": "TokenizersBackend",
            "extra_special_tokens": ["<new>"],
            "bos_token": None,
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", **FLAGS},
        },
    ),
    "named-extra-tokens": (
        "byte_level",
        "llama",
        {
            "tokenizer_class": "TokenizersBackend",
            "extra_special_tokens": {"image_token": "<new>"},
            "video_token": "<|im_end|>",
        },
    ),
    "flags-of-no-class": (
        "byte_level",
        "llama",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "add_bos_token": True,
            "add_prefix_space": True,
        },
    ),
    "gpt2": ("byte_level", "gpt2", {"tokenizer_class": "GPT2Tokenizer"}),
    "gpt2-prefix": (
        "byte_level",
        "gpt2",
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "add_bos_token": True},
    ),
    "smollm2": (
        "byte_level",
        "llama",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
        },
    ),
    "roberta": (
        "byte_level",
        "roberta",
        {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True},
    ),
    "bart": ("byte_level", "bart", {"tokenizer_class": "BartTokenizer"}),
    "qwen": (
        "byte_level",
        "qwen3",
        {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"},
    ),
    "qwen-as-llama": ("byte_level", "qwen2", {"tokenizer_class": "LlamaTokenizerFast"}),
    "llama3": (
        "byte_level",
        "llama",
        {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>"},
    ),
    "llama": (
        "fallback",
        "llama",
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False},
    ),
    "llama-legacy": ("fallback", "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "llama-no-prefix": (
        "fallback",
        "llama",
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "pad_token": "<new>"},
    ),
    "mistral": ("fallback", "mistral", {"tokenizer_class": "LlamaTokenizer"}),
    "phi3": ("fallback", "phi3", {"tokenizer_class": "LlamaTokenizer"}),
    "gemma": (
        "fallback",
        "gemma2",
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
    ),
    "xlm-roberta": ("unigram", "xlm-roberta", {"tokenizer_class": "XLMRobertaTokenizer"}),
    "t5": ("unigram", "t5", {"tokenizer_class": "T5Tokenizer", "extra_ids": 5}),
    "unknown-class": ("byte_level", "llama", {"tokenizer_class": "Foo", "eos_token": "</s>"}),
    "split_special_tokens": (
        "byte_level",
        "llama",
        {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True},
    ),
    "vocab.txt": (None, "bert", None),
    "vocab.txt-cased": (None, "bert", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
    "vocab.json": (None, "gpt2", None),
    "vocab.json-bos": (
        None,
        "gpt2",
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_eos_token": True},
    ),
    "vocab.json-roberta": (None, "roberta", {}),
    "vocab.json-qwen": (
        None,
        "qwen2",
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"added_tokens_json": {"<new>": 330}},
    ),
}
SAME_BYTES = {"bert", "bert-no-config", "bert-other-class", "gpt2", "llama3", "mistral", "phi3"}
SAME_BYTES |= {"flags-of-no-class", "unknown-class", "split_special_tokens"}


@pytest.mark.parametrize("name", FILES)
def test_tokenizer_files_read_as_transformers_reads_them(name, backends, tmp_path):
    """Guards tokens that only other files name, flags that contradict tokenizer.json, folders without one; what is saved
    says it all, to the runtime and to transformers."""
    kind, model_type, config, *more = FILES[name]
    more = dict(*more)
    if kind is None and "vocab.txt" in name:
        vocab = json.loads(backends["wordpiece"])["model"]["vocab"]
        more["vocab_txt"] = "".join(f"{token}\n" for token in sorted(vocab, key=vocab.get))
    elif kind is None:
        model = json.loads(backends["byte_level"])["model"]
        merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
        more |= {"vocab_json": model["vocab"], "merges_txt": "#version: 0.2\n" + merges}
    more["config_json"] = {"model_type": model_type}
    folder = write_tokenizer(tmp_path / "a", backends.get(kind), config, **more)
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(folder),
        pretrained.load_tokenizer(folder),
    )
    assert ours.special_tokens == theirs.special_tokens_map and ours.size == len(theirs)
    saved = write_tokenizer(tmp_path / "b", config_json={"model_type": model_type})
    for file, content in ours.files.items():
        (saved / file).write_bytes(content)
    again = onnxlm.load_tokenizer(saved), pretrained.load_tokenizer(saved)
    for text in SAID:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, special=special) == expected, text
            for tokenizer in again:
                assert tokenizer.encode(text, special=special) == expected
            assert ours.decode(expected, special) == theirs.decode(
                expected, skip_special_tokens=not special
            )
        expected, encoding = theirs(text, "the fox"), ours.encoding(text, "the fox")
        assert encoding.ids == expected["input_ids"]
        assert encoding.type_ids == expected.get("token_type_ids", encoding.type_ids)
    assert again[1].files == ours.files
    if kind:
        same = ours.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
        assert same == (name in SAME_BYTES)


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.model", "source.spm"])
def test_a_sentencepiece_model_alone_says_how_to_convert_it(file, tmp_path):
    (tmp_path / file).write_bytes(b"x")
    (tmp_path / "vocab.json").write_text("{}")  # as Marian has
    with pytest.raises(tinylm.Error, match=r"AutoTokenizer.from_pretrained\(.*save_pretrained"):
        pretrained.load_tokenizer(tmp_path)


def test_lines_of_a_vocabulary_end_at_line_feeds_alone(tmp_path):
    """Guards ids that were off by one behind a token that is a line separator."""
    vocab = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n\u2028\n\x85\nhello\n"
    write_tokenizer(tmp_path, config_json={"model_type": "bert"}, vocab_txt=vocab)
    assert pretrained.load_tokenizer(tmp_path).encode("hello") == [2, 7, 3]


def test_several_templates_are_chosen_as_transformers_chooses(tmp_path):
    """By name, tool_use where there are tools, else default; of tokenizer_config.json's list and of files."""
    listed = [{"name": name, "template": name} for name in ("default", "tool_use", "rag")]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": listed}
    for extra in ({}, {"chat_template_jinja": "of a file"}, "rag", "tool_use"):
        folder = write_tokenizer(tmp_path / str(extra)[:9], byte_backend(), config)
        if isinstance(extra, str):
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / f"{extra}.jinja").write_text("extra " + extra)
        else:
            write_tokenizer(folder, **extra)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        three = theirs, pretrained.load_tokenizer(folder), onnxlm.load_tokenizer(folder)
        for tools in (None, TOOLS):
            same_text(three, PLAIN, tools=tools)
            for chosen in ("rag", "default"):
                same_text(three, PLAIN, tools=tools, chat_template=chosen)


def test_special_tokens_of_a_byte_tokenizer_are_tokens():
    """Guards a template's eos_token that was learnt as thirteen bytes."""
    from tokenizers import Tokenizer

    ours = tinylm.ByteTokenizer()
    theirs = Tokenizer.from_str(ours.files["tokenizer.json"].decode())
    text = "é<|endoftext|>b<|pad|><|endoftext|>"
    encoding, expected = ours.encoding(text), theirs.encode(text)
    assert encoding.ids == ours.encode(text) == expected.ids
    assert encoding.offsets == expected.offsets
    for special in (True, False):
        assert ours.decode(encoding.ids, special) == theirs.decode(
            expected.ids, skip_special_tokens=not special
        )


def test_templates_and_tokenizers_are_shared_by_threads(tokenizers):
    """One tokenizer, eight threads: each gets what it gets alone; an endless template ends for its own thread."""
    from concurrent.futures import ThreadPoolExecutor

    _, ours, runtime = tokenizers

    def render(i: int):
        if i % 8 == 3:
            with pytest.raises(tinylm.Error, match="writes more|seconds"):
                ours.apply_chat_template(
                    PLAIN, chat_template="{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}"
                )
        messages = [*PLAIN, {"role": "user", "content": "x" * i}]
        text = (ours, runtime)[i % 2].apply_chat_template(
            messages, None, True, chat_template=TEMPLATES["QWEN3"]
        )
        return text, ours.encode(text, special=False)

    alone = [render(i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(render, range(24))] == alone


def test_a_byte_model_keeps_its_chat_template(tmp_path):
    lm = TinyLM(Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    lm.save_pretrained(tmp_path / "a")
    template = "{% if tools is not none %}wrong{% endif %}{{ messages[0].content }}"
    (tmp_path / "a" / "chat_template.jinja").write_text(template)
    TinyLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    lm = TinyLM.from_pretrained(tmp_path / "b")
    assert lm.tokenizer.apply_chat_template([dict(role="user", content="hi")]) == "hi"
