"""Hugging Face folders in both directions: families as rows of data, config.json, checkpoints, the hub, tokenizers.

    from pretrained import config_from_hf, load_tokenizer
    lm = TinyLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")    # calls load_model here
    lm.save_pretrained("copy")                                            # calls save_model here

Copy it beside tinylm.py and onnxlm.py. Reference implementation of every family: Hugging Face transformers.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

try:  # copied into a package
    from . import onnxlm, tinylm
except ImportError:  # beside each other, or installed
    import onnxlm
    import tinylm

Config, require = tinylm.Config, tinylm.require


class Error(tinylm.Error, onnxlm.Error):
    """Both files can be copied alone, so each has an Error of its own. Where both are loaded, either catches it."""


onnxlm.Error = Error  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: the one tokenizer.json that a folder's files mean
# ---------------------------------------------------------------------------------------------------------------------
def load_tokenizer(folder: str | Path) -> onnxlm.Tokenizer | tinylm.ByteTokenizer | None:
    """The tokenizer of a checkpoint folder as transformers' AutoTokenizer reads it, or None if it has none. Where that is
    not what tokenizer.json says alone, the tokenizer's `files` have one that says it. A byte tokenizer of ours needs no
    library."""
    folder = Path(folder)
    files = onnxlm.read_tokenizer_files(folder)
    if files.get("tokenizer.json") == tinylm.ByteTokenizer().files["tokenizer.json"]:
        del files["tokenizer.json"]
        return tinylm.ByteTokenizer(files)
    names = ("tokenizer.json", "vocab.txt", "merges.txt")
    source = next((name for name in names if name in files), None)
    if source is None or source == "merges.txt" and "vocab.json" not in files:
        for name in files:
            require(
                not name.endswith((".model", ".spm")),
                f"{folder / name}: a SentencePiece model alone, expected a tokenizer.json; where transformers can convert "
                f"it, AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) writes one",
            )
        return None
    try:
        hf_config = tinylm.read_json(folder / "config.json", {})
        return onnxlm.Tokenizer(resolve_tokenizer(files, hf_config), hf_config)
    except ImportError:
        raise Error(f"{folder / source}: reading it needs `pip install tokenizers`") from None
    except tinylm.Error as error:
        raise Error(f"{folder}: {error}") from None
    except Exception as error:  # the library raises plain Exception
        raise Error(f"{folder / source}: not a readable tokenizer ({error})") from None


def resolve_tokenizer(files: dict[str, bytes], hf_config: dict) -> dict[str, bytes]:
    """The files, with a tokenizer.json that says all that transformers' AutoTokenizer reads from them: the tokens that
    only other files name; of some classes, the flags of tokenizer_config.json in place of what tokenizer.json says."""
    from tokenizers import Tokenizer as Backend

    config = onnxlm.parse_json_file(files, "tokenizer_config.json")
    kind = onnxlm.tokenizer_class(files, hf_config)
    if "tokenizer.json" in files:
        config = {k: v for k, v in config.items() if k not in ("add_bos_token", "add_eos_token")}
    else:
        kind, files = kind_of_vocabulary(files, kind, config)
    spec = json.loads(files["tokenizer.json"])
    model, before = spec["model"], spec.get("added_tokens") or []
    model_type, pipeline = CLASS_PIPELINES.get(kind, ("", None))
    if model_type != model.get("type"):
        kind, pipeline = "", None
    tokens = onnxlm.special_tokens(files, hf_config, spec.get("padding"))
    added = find_added_tokens(files, tokens, before, kind)
    ids = token_ids(model["vocab"], added)
    # All but the words, as the library itself writes it.
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    backend = Backend.from_str(json.dumps(spec | {"model": empty, "added_tokens": []}))
    written = backend.to_str()
    if pipeline:
        model = model | pipeline(backend, kind, config, tokens)
        backend.post_processor = around_texts(kind, config, tokens, ids) or backend.post_processor
    same = added == {token["content"]: tinylm.added_token(token) for token in before}
    # What is null, empty or false need not be there.
    same &= all((spec["model"].get(name) or None) == (model[name] or None) for name in model)
    if same and backend.to_str() == written:
        return files
    spec = json.loads(backend.to_str()) | {"model": model}
    spec["added_tokens"] = [{"id": ids[text]} | token for text, token in added.items()]
    return files | {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode("utf-8")}


def kind_of_vocabulary(files: dict[str, bytes], kind: str, config: dict) -> tuple[str, dict]:
    """(tokenizer class, files with a tokenizer.json) of a folder that has a vocabulary in other files."""
    declared = config.get("tokenizer_class")
    if "vocab.txt" in files:
        default = "BertTokenizer"
        lines = files["vocab.txt"].decode("utf-8").removesuffix("\n").split("\n")
        model = {"type": "WordPiece", "vocab": {line.rstrip(): i for i, line in enumerate(lines)}}
    else:
        default = "GPT2Tokenizer"
        lines = files["merges.txt"].decode("utf-8").split("\n")
        merges = [line.rstrip("\r") for line in lines if line.strip() and line[:8] != "#version"]
        model = {"type": "BPE", "vocab": json.loads(files["vocab.json"]), "merges": merges}
    kind = kind or ("" if declared else default)
    require(
        CLASS_PIPELINES.get(kind, (None,))[0] == model["type"],
        f"tokenizer_class = {declared or kind!r} without a tokenizer.json is not supported",
    )
    files = {"tokenizer_config.json": json.dumps({"tokenizer_class": kind}).encode()} | files
    return kind, files | {"tokenizer.json": json.dumps({"model": model}).encode()}


def find_added_tokens(
    files: dict[str, bytes], tokens: dict[str, str], before: list, kind: str
) -> dict[str, dict]:
    """Text -> `added_token` of what stands beside the vocabulary, in transformers' order: what tokenizer.json has, unless
    the class makes its own (`kind`), what other files have by id, the special tokens."""
    config = onnxlm.parse_json_file(files, "tokenizer_config.json")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    by_id = {
        int(i): tinylm.added_token(v) for i, v in (config.get("added_tokens_decoder") or {}).items()
    }
    if "added_tokens_decoder" not in config:  # older files, else ignored
        named = onnxlm.parse_json_file(files, "special_tokens_map.json")
        config = config | named
        extra = extra or named.get("additional_special_tokens") or []
        if isinstance(extra, list):
            extra = [*extra, *(named.get("extra_special_tokens") or [])]
        special = {*tokens.values(), *map(str, extra)}
        for text, i in onnxlm.parse_json_file(files, "added_tokens.json").items():
            by_id[i] = tinylm.added_token(text, special=text in special)
        by_id |= {token["id"]: tinylm.added_token(token) for token in before}
    if isinstance(extra, dict):  # names of their own, which are among the tokens already
        extra = []
    if kind == "T5Tokenizer" and not config.get("additional_special_tokens"):
        extra = [*extra, *(f"<extra_id_{i}>" for i in range(config.get("extra_ids", 100)))]
    found = {} if kind else {token["content"]: tinylm.added_token(token) for token in before}
    found |= {by_id[i]["content"]: by_id[i] for i in sorted(by_id)}
    named = [config[n] if isinstance(config.get(n), dict) else text for n, text in tokens.items()]
    for value in filter(None, [*named, *extra]):
        token = tinylm.added_token(value, special=True)
        found.setdefault(token["content"], token)
    special = {*tokens.values(), *(token["content"] for token in before if token["special"])}
    for text, token in found.items():
        token["special"] |= text in special
    return found


def token_ids(vocabulary: dict | list, added: dict) -> dict[str, int]:
    """Token -> id, where the library numbers what is added."""
    if isinstance(vocabulary, list):
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    ids, free = dict(vocabulary), len(vocabulary)
    for text in added:
        free = max(free, ids.setdefault(text, free) + 1)
    return ids


# Classes of transformers go by tokenizer_config.json where tokenizer.json says otherwise. Their pipelines (the library's
# tokenizer, class, config, special tokens) set what stands before and behind the model and return what they change of it.
QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bert_pipeline(backend, kind, config, tokens) -> dict:
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    model = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return model | {"unk_token": tokens["unk_token"]}


def byte_level_pipeline(backend, kind, config, tokens) -> dict:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    qwen = kind == "Qwen2Tokenizer"
    prefix = bool(config.get("add_prefix_space"))
    words = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not qwen)
    if qwen:
        split = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
        words = pre_tokenizers.Sequence([split, words])
    backend.normalizer = normalizers.NFC() if qwen else None
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    return tinylm.BPE_OPTIONS


def sentencepiece_pipeline(backend, kind, config, tokens) -> dict:
    from tokenizers import decoders, normalizers, pre_tokenizers

    gemma = kind == "GemmaTokenizer"
    prefix = not gemma and config.get("add_prefix_space") in (None, True)
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    words = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1))
    if gemma:
        words = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.normalizer = normalizers.Replace(" ", "▁") if gemma else None
    backend.pre_tokenizer = words
    backend.decoder = decoders.Sequence(steps)
    unknown = tokens.get("unk_token") if gemma else None
    return tinylm.BPE_OPTIONS | {"fuse_unk": True, "byte_fallback": True, "unk_token": unknown}


def unigram_pipeline(backend, kind, config, tokens) -> dict:
    """A normalizer that comes from SentencePiece stays."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    parts = backend.normalizer
    parts = parts if isinstance(parts, normalizers.Sequence) else [parts]
    charsmaps = [part for part in parts if isinstance(part, normalizers.Precompiled)]
    t5 = kind == "T5Tokenizer"
    scheme = "always" if t5 or config.get("add_prefix_space", True) else "never"
    words = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.normalizer = next(iter(charsmaps), None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return {"byte_fallback": False, "unk_id": 2 if t5 else 3}


CLASS_PIPELINES = {  # class -> (type of its model in tokenizer.json, its pipeline)
    "BertTokenizer": ("WordPiece", bert_pipeline),
    "RobertaTokenizer": ("BPE", byte_level_pipeline),
    "GPT2Tokenizer": ("BPE", byte_level_pipeline),
    "Qwen2Tokenizer": ("BPE", byte_level_pipeline),
    "LlamaTokenizer": ("BPE", sentencepiece_pipeline),
    "GemmaTokenizer": ("BPE", sentencepiece_pipeline),
    "XLMRobertaTokenizer": ("Unigram", unigram_pipeline),
    "T5Tokenizer": ("Unigram", unigram_pipeline),
}


def around_texts(kind: str, config: dict, tokens: dict[str, str], ids: dict[str, int]):
    """The post-processor that puts a class's special tokens around texts; None: tokenizer.json's. ids: text -> id."""
    from tokenizers import processors

    bos, eos, cls, sep = (tokens.get(f"{name}_token") for name in ("bos", "eos", "cls", "sep"))
    start = [bos] if bos and config.get("add_bos_token") else []
    end = [eos] if eos and config.get("add_eos_token") else []
    if kind == "RobertaTokenizer":
        trim, prefix = config.get("trim_offsets", True), bool(config.get("add_prefix_space"))
        return processors.RobertaProcessing((sep, ids[sep]), (cls, ids[cls]), trim, prefix)
    if kind == "BertTokenizer":
        pair = [cls, "$A", sep, "$B:1", f"{sep}:1"]
    elif kind == "XLMRobertaTokenizer":
        pair = [bos, "$A", eos, eos, "$B", eos]
    elif kind == "T5Tokenizer":
        pair = ["$A", eos, "$B", eos]
    elif start or end:
        pair = [*start, "$A", *end, *(f"{piece}:1" for piece in (*start, "$B", *end))]
    else:
        return None
    single = pair[: (len(pair) + 1) // 2]  # a text alone has what stands around the first
    special = [(text, ids[text]) for text in (bos, eos, cls, sep) if text in single]
    return processors.TemplateProcessing(single, pair, special)


# ---------------------------------------------------------------------------------------------------------------------
# Families: rows of data. How a config.json reads as a Config, and which tensors are ours under which names.
# ---------------------------------------------------------------------------------------------------------------------
class Name(str):
    """Of a module or a tensor in a family's checkpoints; how ours reads from it, and is written to it."""

    read = write = staticmethod(lambda x: x)


class Transposed(Name):
    """Of a module whose weight is stored (in, out), as GPT-2's Conv1D does."""

    read = write = staticmethod(lambda x: x.t() if x.ndim == 2 else x)


class Row(Name):
    """Of a vector that is stored (1, n), or not at all where it is zero."""

    read, write = staticmethod(lambda x: x[0]), staticmethod(lambda x: x[None])


class Unused(Name):
    """Of a module that only travels along, and is zero where it is not stored."""


def name_map(*texts: str) -> dict[str, str]:
    """Our names -> theirs, of words `ours=theirs`, or of one word where both are the same. The last one counts."""
    words = (word.partition("=") for text in texts for word in text.split())
    return {ours: theirs if sign else ours for ours, sign, theirs in words}


def tensor_map(prefix: str, layer: str, *texts: str, inside: type = Name) -> dict:
    """Our modules -> a tuple of theirs, fused along the rows in ours, of words `ours=theirs+theirs`.

    Theirs stand behind the prefix, and those of a layer behind `layer` too, with {} for its number.
    """
    table = {}
    for ours, theirs in name_map(*texts).items():
        kind, place = Name, prefix
        if ours.startswith("layers."):
            ours, kind, place = ours.replace("layers", "layers.{}", 1), inside, prefix + layer
        table[ours] = tuple(kind(place + name) for name in theirs.split("+") if name)
    return table


CLASS = {  # head -> end of its class's name
    "lm": "ForCausalLM",
    "mlm": "ForMaskedLM",
    "classify": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "qa": "ForQuestionAnswering",
    None: "Model",
}


def head_row(*texts: str, kind: type = Name, **config_fields) -> tuple[dict, dict]:
    """A head's tensors, of words `ours=theirs`, and the config fields that it has."""
    return {ours: (kind(theirs),) for ours, theirs in name_map(*texts).items()}, config_fields


LM_ONLY = {"lm": head_row("head.out=lm_head")}
DECODER_HEADS = LM_ONLY | {"classify": head_row("head.out=score"), None: head_row()}


def nothing(_) -> dict:
    """What most families read, and write, beside their table of fields."""
    return {}


@dataclass(frozen=True)
class Family:
    """One `model_type`. Tables are read one way to load and the other way to save."""

    stem: str  # of its classes' names
    tensors: dict  # as from tensor_map
    fields: dict  # our config field -> their key
    heads: dict = field(default_factory=lambda: DECODER_HEADS)  # as from head_row
    prefix: str = "model."  # of the body's tensors, where there is a head
    fixed: dict = field(default_factory=dict)  # our config fields which the family always has
    defaults: dict = field(default_factory=dict)  # their key -> what transformers takes without it
    only: dict = field(default_factory=dict)  # their key -> the one value that is supported
    read: Callable[[dict], dict] = (
        nothing  # a config.json with defaults -> more of our config fields
    )
    write: Callable[[Config], dict] = nothing  # and back
    drop: str = (
        "model.layers.*.self_attn.rotary_emb.inv_freq"  # patterns of tensors that carry nothing
    )
    copies: dict = field(default_factory=dict)  # a tensor -> the one that it repeats, if stored
    aliases: dict = field(default_factory=dict)  # a second name of a key -> the key
    unstored_head_is_tied: bool = False  # whatever config.json says of it
    classes: dict = field(default_factory=dict)  # head -> end of its class's name, if not CLASS's

    def architecture(self, head) -> str:
        return self.stem + (CLASS | self.classes)[head]

    def head_of(self, architecture: str | None):
        """The head of a class of transformers. One we do not know counts as the language model, where there is one."""
        for head in self.heads:
            if self.architecture(head) == architecture:
                return head
        known = ", ".join(map(self.architecture, self.heads))
        require(
            architecture is None or "lm" in self.heads,
            f"config: architectures = {architecture!r} is not supported (supported: {known}); "
            "name a head to open its body",
        )
        return "lm" if "lm" in self.heads else None


# ---- Decoders ----
FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings hidden_act
    tie_word_embeddings attention_dropout bos_token_id eos_token_id pad_token_id problem_type """
ROTARY = FIELDS + "num_key_value_heads head_dim rope_theta rope_scaling norm_eps=rms_norm_eps "
BIASES = "attention_bias attention_output_bias=attention_bias "
LLAMA = """
    embed=embed_tokens
    norm=norm
    layers.attention_norm=input_layernorm
    layers.attention.qkv=self_attn.q_proj+self_attn.k_proj+self_attn.v_proj
    layers.attention.q_norm=self_attn.q_norm
    layers.attention.k_norm=self_attn.k_norm
    layers.attention.o=self_attn.o_proj
    layers.mlp_norm=post_attention_layernorm
    layers.mlp.gate_up=mlp.gate_proj+mlp.up_proj
    layers.mlp.down=mlp.down_proj
"""
SANDWICH = """
    layers.attention_output_norm=post_attention_layernorm
    layers.mlp_output_norm=post_feedforward_layernorm
"""
GPT2 = """
    embed=wte
    position_embed=wpe
    norm=ln_f
    layers.attention_norm=ln_1
    layers.attention.qkv=attn.c_attn
    layers.attention.o=attn.c_proj
    layers.mlp_norm=ln_2
    layers.mlp.up=mlp.c_fc
    layers.mlp.down=mlp.c_proj
"""
LLAMA_DEFAULTS = dict(tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
QWEN_DEFAULTS = dict(
    tie_word_embeddings=False,
    max_position_embeddings=32768,
    sliding_window=4096,
    use_sliding_window=False,
    max_window_layers=28,
    num_key_value_heads=32,
)
GEMMA_DEFAULTS = dict(head_dim=256, pad_token_id=0, eos_token_id=1, bos_token_id=2)
GEMMA_FIXED = dict(norm_offset=1.0, scale_embedding=True)


def llama_like(*changes: str) -> dict:
    """Llama's tensors, but for some."""
    return tensor_map("model.", "layers.{}.", LLAMA, *changes)


def read_gemma(raw: dict) -> dict:
    """The first files say "gelu" and mean its approximation."""
    return {"hidden_act": "gelu_pytorch_tanh"} if raw["hidden_act"] == "gelu" else {}


def gemma(stem: str, fields: str, defaults: dict, **rest) -> Family:
    """Gemma 2 and later."""
    usual = dict(
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        sliding_window=4096,
        num_key_value_heads=4,
    )
    common = "hidden_act=hidden_activation sliding_window layer_types query_pre_attn_scalar final_logit_softcapping"
    return Family(
        stem,
        llama_like("layers.mlp_norm=pre_feedforward_layernorm", SANDWICH),
        name_map(ROTARY, BIASES, common, fields),
        defaults=GEMMA_DEFAULTS | usual | defaults,
        only=dict(hidden_act="gelu_pytorch_tanh"),
        **rest,
    )


FAMILIES = {
    "qwen3": Family(
        "Qwen3",
        llama_like(),
        name_map(ROTARY, BIASES, "sliding_window layer_types"),
        fixed=dict(qk_norm="head"),
        defaults=QWEN_DEFAULTS | dict(head_dim=128),
    ),
    "llama": Family(
        "Llama",
        llama_like(),
        name_map(ROTARY, BIASES, "mlp_bias"),
        defaults=LLAMA_DEFAULTS | dict(max_position_embeddings=2048),
    ),
    "mistral": Family(
        "Mistral",
        llama_like(),
        name_map(ROTARY, "sliding_window"),
        defaults=LLAMA_DEFAULTS
        | dict(max_position_embeddings=131072, sliding_window=4096, num_key_value_heads=8),
    ),
    "qwen2": Family(
        "Qwen2",
        llama_like(),
        name_map(ROTARY, "sliding_window layer_types"),
        fixed=dict(attention_bias=True, attention_output_bias=False),
        defaults=QWEN_DEFAULTS,
    ),
    "gemma": Family(
        "Gemma",
        llama_like(),
        name_map(ROTARY, BIASES),
        fixed=GEMMA_FIXED,
        defaults=GEMMA_DEFAULTS
        | dict(
            hidden_act="gelu_pytorch_tanh", max_position_embeddings=8192, num_key_value_heads=16
        ),
        only=dict(hidden_activation="gelu_pytorch_tanh"),
        read=read_gemma,
    ),
    "gemma2": gemma(
        "Gemma2",
        "attn_logit_softcapping",
        fixed=GEMMA_FIXED | dict(norm_position="sandwich"),
        defaults=dict(
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            max_position_embeddings=8192,
            sliding_window_pattern=2,
        ),
    ),
    "gemma3_text": gemma(
        "Gemma3",
        "rope_local_base_freq",
        fixed=GEMMA_FIXED | dict(norm_position="sandwich", qk_norm="head"),
        heads=LM_ONLY,
        defaults=dict(
            max_position_embeddings=131072,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            sliding_window_pattern=6,
        ),
    ),
    "gpt2": Family(
        "GPT2",
        tensor_map("transformer.", "h.{}.", GPT2, inside=Transposed),
        name_map(
            FIELDS,
            """hidden_size=n_embd num_hidden_layers=n_layer num_attention_heads=n_head intermediate_size=n_inner
            norm_eps=layer_norm_epsilon max_position_embeddings=n_positions hidden_act=activation_function
            attention_dropout=attn_pdrop hidden_dropout=resid_pdrop embedding_dropout=embd_pdrop""",
        ),
        prefix="transformer.",
        aliases=name_map(
            """hidden_size=n_embd max_position_embeddings=n_positions num_attention_heads=n_head
            num_hidden_layers=n_layer"""
        ),
        classes={"lm": "LMHeadModel"},
        fixed=dict(
            norm="layer", position="learned", gated=False, attention_bias=True, mlp_bias=True
        ),
        defaults=dict(
            n_positions=1024,
            layer_norm_epsilon=1e-5,
            activation_function="gelu_new",
            attn_pdrop=0.1,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            bos_token_id=50256,
            eos_token_id=50256,
        ),
        only=dict(scale_attn_weights=True),
        drop="transformer.h.*.attn.bias transformer.h.*.attn.masked_bias",
    ),
    "phi3": Family(
        "Phi3",
        llama_like("layers.attention.qkv=self_attn.qkv_proj layers.mlp.gate_up=mlp.gate_up_proj"),
        name_map(
            ROTARY,
            """sliding_window partial_rotary_factor hidden_dropout=resid_pdrop
            embedding_dropout=embd_pdrop""",
        ),
        defaults=LLAMA_DEFAULTS
        | dict(
            rms_norm_eps=1e-5, max_position_embeddings=4096, eos_token_id=32000, pad_token_id=32000
        ),
        only=dict(rope_scaling=None),
    ),
    "olmo2": Family(
        "Olmo2",
        llama_like("layers.attention_norm= layers.mlp_norm=", SANDWICH),
        name_map(ROTARY, BIASES),
        LM_ONLY,
        fixed=dict(norm_position="output", qk_norm="full"),
        defaults=dict(
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            max_position_embeddings=2048,
            eos_token_id=50279,
            pad_token_id=1,
        ),
    ),
    "starcoder2": Family(
        "Starcoder2",
        llama_like("layers.mlp.up=mlp.c_fc layers.mlp.down=mlp.c_proj"),
        name_map(
            ROTARY,
            """sliding_window norm_eps=norm_epsilon attention_bias=use_bias attention_output_bias=use_bias
            mlp_bias=use_bias hidden_dropout=residual_dropout embedding_dropout""",
        ),
        fixed=dict(norm="layer", gated=False),
        defaults=dict(
            use_bias=True,
            norm_epsilon=1e-5,
            hidden_act="gelu_pytorch_tanh",
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=50256,
            eos_token_id=50256,
        ),
        only=dict(
            activation_function="gelu",
            layer_norm_epsilon=1e-5,
            mlp_type="default",
            norm_type="layer_norm",
            scale_attn_weights=True,
        ),
    ),
}

# ---- Encoders: one body and five heads, under the names of each family ----
ENCODER = dict(
    causal=False,
    norm="layer",
    norm_position="post",
    final_norm=False,
    embedding_norm=True,
    position="learned",
    gated=False,
    attention_bias=True,
    mlp_bias=True,
)
EMBEDDINGS = """
    embed=embeddings.word_embeddings
    position_embed=embeddings.position_embeddings
    type_embed=embeddings.token_type_embeddings
    embedding_norm=embeddings.LayerNorm
    embedding_project=embeddings_project
"""
BERT = """
    layers.attention.qkv=attention.self.query+attention.self.key+attention.self.value
    layers.attention.o=attention.output.dense
    layers.attention_norm=attention.output.LayerNorm
    layers.mlp.up=intermediate.dense
    layers.mlp.down=output.dense
    layers.mlp_norm=output.LayerNorm
"""
DISTILBERT = """
    layers.attention.qkv=attention.q_lin+attention.k_lin+attention.v_lin
    layers.attention.o=attention.out_lin
    layers.attention_norm=sa_layer_norm
    layers.mlp.up=ffn.lin1
    layers.mlp.down=ffn.lin2
    layers.mlp_norm=output_layer_norm
"""
BERT_FIELDS = name_map(
    FIELDS,
    """type_vocab_size norm_eps=layer_norm_eps attention_dropout=attention_probs_dropout_prob
    hidden_dropout=hidden_dropout_prob embedding_dropout=hidden_dropout_prob head_dropout=classifier_dropout""",
)
BERT_DEFAULTS = dict(
    hidden_act="gelu",
    max_position_embeddings=512,
    type_vocab_size=2,
    pad_token_id=0,
    layer_norm_eps=1e-12,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)
TIED = dict(tie_word_embeddings=True)
ABSOLUTE = dict(position_embedding_type="absolute")
SAME = "hidden_act"  # the activation of a head that has the layers' own


def encoder_heads(mlm: tuple, classify: tuple, bare: tuple = ({}, {})) -> dict:
    heads = {
        "mlm": mlm,
        "classify": classify,
        "tokens": head_row("head.out=classifier"),
        "qa": head_row("head.out=qa_outputs"),
    }
    biased = {head: (rows, fields | {"head_bias": True}) for head, (rows, fields) in heads.items()}
    return {None: bare} | biased


def read_roberta(raw: dict) -> dict:
    """Its table of positions begins with unused rows, up to that of the pad id."""
    offset = raw["pad_token_id"] + 1
    positions = raw["max_position_embeddings"] - offset
    return dict(position_offset=offset, max_position_embeddings=positions)


def write_roberta(config: Config) -> dict:
    return {"max_position_embeddings": config.max_position_embeddings + config.position_offset}


def roberta(stem: str) -> Family:
    return Family(
        stem,
        tensor_map("roberta.", "encoder.layer.{}.", EMBEDDINGS, BERT),
        BERT_FIELDS,
        encoder_heads(
            head_row(
                """head.dense=lm_head.dense head.norm=lm_head.layer_norm head.out=lm_head.decoder
                head.out.bias=lm_head.bias""",
                head_act="gelu",
                head_norm=True,
            ),
            head_row("head.dense=classifier.dense head.out=classifier.out_proj", head_act="tanh"),
            head_row("head.dense=roberta.pooler.dense", kind=Unused, head_act="tanh"),
        ),
        "roberta.",
        fixed=ENCODER,
        defaults=BERT_DEFAULTS | dict(pad_token_id=1, bos_token_id=0, eos_token_id=2),
        only=TIED | ABSOLUTE,
        read=read_roberta,
        write=write_roberta,
        copies={"lm_head.decoder.bias": "lm_head.bias"},
        drop="roberta.embeddings.position_ids",
    )


FAMILIES |= {
    "bert": Family(
        "Bert",
        tensor_map("bert.", "encoder.layer.{}.", EMBEDDINGS, BERT),
        BERT_FIELDS,
        encoder_heads(
            head_row(
                """head.dense=cls.predictions.transform.dense head.norm=cls.predictions.transform.LayerNorm
                head.out=cls.predictions.decoder head.out.bias=cls.predictions.bias""",
                head_act=SAME,
                head_norm=True,
            ),
            head_row("head.dense=bert.pooler.dense head.out=classifier", head_act="tanh"),
            head_row("head.dense=bert.pooler.dense", kind=Unused, head_act="tanh"),
        ),
        "bert.",
        fixed=ENCODER,
        defaults=BERT_DEFAULTS,
        only=TIED | ABSOLUTE,
        copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        drop="bert.embeddings.position_ids cls.seq_relationship.*",
    ),
    "roberta": roberta("Roberta"),
    "xlm-roberta": roberta("XLMRoberta"),
    "distilbert": Family(
        "DistilBert",
        tensor_map("distilbert.", "transformer.layer.{}.", EMBEDDINGS, DISTILBERT),
        name_map(
            FIELDS,
            """hidden_size=dim num_hidden_layers=n_layers num_attention_heads=n_heads intermediate_size=hidden_dim
            hidden_act=activation hidden_dropout=dropout embedding_dropout=dropout head_dropout=seq_classif_dropout""",
        ),
        encoder_heads(
            head_row(
                "head.dense=vocab_transform head.norm=vocab_layer_norm head.out=vocab_projector",
                head_act=SAME,
                head_norm=True,
            ),
            head_row("head.dense=pre_classifier head.out=classifier", head_act="relu"),
        ),
        "distilbert.",
        aliases=name_map("hidden_size=dim num_attention_heads=n_heads num_hidden_layers=n_layers"),
        fixed=ENCODER | dict(norm_eps=1e-12),
        defaults=dict(
            activation="gelu",
            max_position_embeddings=512,
            pad_token_id=0,
            dropout=0.1,
            attention_dropout=0.1,
            seq_classif_dropout=0.2,
        ),
        only=ABSOLUTE,
        drop="distilbert.embeddings.position_ids",
    ),
    "electra": Family(
        "Electra",
        tensor_map("electra.", "encoder.layer.{}.", EMBEDDINGS, BERT),
        BERT_FIELDS | name_map("embedding_size"),
        encoder_heads(
            head_row(
                """head.dense=generator_predictions.dense head.norm=generator_predictions.LayerNorm
                head.out=generator_lm_head""",
                head_act="gelu",
                head_norm=True,
            ),
            head_row("head.dense=classifier.dense head.out=classifier.out_proj", head_act="gelu"),
        ),
        "electra.",
        fixed=ENCODER,
        defaults=BERT_DEFAULTS | dict(embedding_size=128),
        only=ABSOLUTE,
        drop="electra.embeddings.position_ids discriminator_predictions.*",
    ),
}

# ---- Encoder-decoders ----
BART = """
    position_embed=embed_positions
    embedding_norm=layernorm_embedding
    norm=layer_norm
    layers.attention.qkv=self_attn.q_proj+self_attn.k_proj+self_attn.v_proj
    layers.attention.o=self_attn.out_proj
    layers.attention_norm=self_attn_layer_norm
    layers.cross_attention.q=encoder_attn.q_proj
    layers.cross_attention.kv=encoder_attn.k_proj+encoder_attn.v_proj
    layers.cross_attention.o=encoder_attn.out_proj
    layers.cross_attention_norm=encoder_attn_layer_norm
    layers.mlp.up=fc1
    layers.mlp.down=fc2
    layers.mlp_norm=final_layer_norm
"""
T5 = """
    relative_bias=block.0.layer.0.SelfAttention.relative_attention_bias
    norm=final_layer_norm
    layers.attention.qkv=0.SelfAttention.q+0.SelfAttention.k+0.SelfAttention.v
    layers.attention.o=0.SelfAttention.o
    layers.attention_norm=0.layer_norm
    layers.cross_attention.q=1.EncDecAttention.q
    layers.cross_attention.kv=1.EncDecAttention.k+1.EncDecAttention.v
    layers.cross_attention.o=1.EncDecAttention.o
    layers.cross_attention_norm=1.layer_norm
    layers.mlp.up=MLP.DenseReluDense.wi
    layers.mlp.gate_up=MLP.DenseReluDense.wi_0+MLP.DenseReluDense.wi_1
    layers.mlp.down=MLP.DenseReluDense.wo
    layers.mlp_norm=MLP.layer_norm
"""
T5_ACTIVATIONS = {  # feed_forward_proj -> gated, hidden_act
    **{name: (False, name) for name in tinylm.ACTIVATIONS},
    **{f"gated-{name}": (True, name) for name in tinylm.ACTIVATIONS},
    "gated-gelu": (True, "gelu_new"),
}


def two_stacks(embed: str, encoder: dict, decoder: dict) -> dict:
    encoder = {f"encoder.{ours}": theirs for ours, theirs in encoder.items()}
    return {"embed": (Name(embed),)} | encoder | decoder


def read_t5(raw: dict) -> dict:
    """Its activation says whether the MLP is gated; the logits are scaled unless it says that they are not tied."""
    name = raw["feed_forward_proj"]
    require(
        name in T5_ACTIVATIONS,
        f"feed_forward_proj = {name!r}, expected one of {', '.join(T5_ACTIVATIONS)}",
    )
    gated, act = T5_ACTIVATIONS[name]
    for key, value in (("is_gated_act", gated), ("dense_act_fn", act)):
        require(raw[key] in (None, value), f"{key} = {raw[key]!r}, expected {value} with {name}")
    scaled = raw.get("tie_word_embeddings") is not False
    if raw["scale_decoder_outputs"] is not None:
        scaled = raw["scale_decoder_outputs"]
    layers = raw["num_decoder_layers"]
    return dict(
        gated=gated,
        hidden_act=act,
        scale_logits=scaled,
        num_hidden_layers=raw.get("num_layers") if layers is None else layers,
    )


def write_t5(config: Config) -> dict:
    wanted = config.gated, config.hidden_act
    names = [name for name, meaning in T5_ACTIVATIONS.items() if meaning == wanted]
    return {"feed_forward_proj": names[0] if names else config.hidden_act}


def read_marian(raw: dict) -> dict:
    size, expected = raw["decoder_vocab_size"], raw.get("vocab_size")
    require(size in (None, expected), f"decoder_vocab_size = {size!r}, expected {expected}")
    return {}


def bart_like(stem: str, end="ForConditionalGeneration", **rest) -> Family:
    stacks = (tensor_map(f"model.{side}.", "layers.{}.", BART) for side in ("encoder", "decoder"))
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    head = {"head.out": (Name("lm_head"),), "head.out.bias": (Row("final_logits_bias"),)}
    return Family(
        stem,
        two_stacks("model.shared", *stacks),
        name_map(
            FIELDS,
            """scale_embedding decoder_start_token_id hidden_size=d_model hidden_act=activation_function
            num_hidden_layers=decoder_layers num_encoder_layers=encoder_layers
            num_attention_heads=decoder_attention_heads encoder_attention_heads
            intermediate_size=decoder_ffn_dim encoder_intermediate_size=encoder_ffn_dim
            hidden_dropout=dropout embedding_dropout=dropout""",
        ),
        {"lm": (head, {})},
        copies=dict.fromkeys(copies, "model.shared.weight"),
        aliases=name_map(
            """hidden_size=d_model num_attention_heads=encoder_attention_heads
            num_hidden_layers=encoder_layers"""
        ),
        classes={"lm": end},
        **rest,
    )


SEQ2SEQ = ENCODER | dict(causal=True, norm_eps=1e-5, head_bias=True, position_offset=2)
BART_DEFAULTS = dict(
    activation_function="gelu",
    dropout=0.1,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    forced_eos_token_id=2,
)
FAMILIES |= {
    "bart": bart_like(
        "Bart",
        fixed=SEQ2SEQ,
        defaults=BART_DEFAULTS | dict(decoder_start_token_id=2),
        only=dict(normalize_embedding=True),
    ),
    "mbart": bart_like(
        "MBart",
        fixed=SEQ2SEQ | dict(norm_position="pre", final_norm=True),
        defaults=BART_DEFAULTS,
        only=dict(normalize_embedding=True, normalize_before=True, add_final_layer_norm=True),
    ),
    "marian": bart_like(
        "Marian",
        "MTModel",
        fixed=SEQ2SEQ | dict(position="sinusoidal", embedding_norm=False, position_offset=0),
        defaults=BART_DEFAULTS
        | dict(
            pad_token_id=58100,
            decoder_start_token_id=58100,
            eos_token_id=0,
            forced_eos_token_id=0,
            bos_token_id=None,
            decoder_vocab_size=None,
        ),
        only=dict(share_encoder_decoder_embeddings=True, static_position_embeddings=True),
        read=read_marian,
        drop="model.encoder.embed_positions.weight model.decoder.embed_positions.weight",
    ),
    "t5": Family(
        "T5",
        two_stacks(
            "shared",
            tensor_map("encoder.", "block.{}.layer.", T5.replace("MLP", "1")),
            tensor_map("decoder.", "block.{}.layer.", T5.replace("MLP", "2")),
        ),
        name_map(
            FIELDS,
            """decoder_start_token_id relative_attention_num_buckets relative_attention_max_distance hidden_size=d_model
            head_dim=d_kv intermediate_size=d_ff num_encoder_layers=num_layers num_hidden_layers=num_decoder_layers
            num_attention_heads=num_heads norm_eps=layer_norm_epsilon head_dropout=dropout_rate
            hidden_dropout=dropout_rate embedding_dropout=dropout_rate attention_dropout=dropout_rate
            scale_logits=scale_decoder_outputs hidden_act=feed_forward_proj""",
        ),
        LM_ONLY,
        "",
        fixed=dict(position="relative", query_pre_attn_scalar=1),
        defaults=dict(
            num_decoder_layers=None,
            d_kv=64,
            feed_forward_proj="relu",
            is_gated_act=None,
            dense_act_fn=None,
            dropout_rate=0.1,
            pad_token_id=0,
            eos_token_id=1,
            scale_decoder_outputs=None,
        ),
        read=read_t5,
        write=write_t5,
        copies=dict.fromkeys(
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"
        ),
        aliases=name_map(
            """hidden_size=d_model head_dim=d_kv num_attention_heads=num_heads
            num_hidden_layers=num_layers"""
        ),
        unstored_head_is_tied=True,
        classes={"lm": "ForConditionalGeneration"},
        drop="decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ),
    # What no other family can express (an architecture changed on the fly) keeps our own names; only tinylm loads it.
    "tinylm": Family(
        "TinyLM",
        {},
        {f.name: f.name for f in fields(Config) if f.name not in ("model_type", "id2label")},
        dict.fromkeys(CLASS, ({}, {})),
        "",
        classes=dict.fromkeys(CLASS, ""),
    ),
}

# ---- config.json ----
# Fields that no class of transformers computes with, or none of those of the rows above.
INERT = set(
    """adapters architectures attention_softmax_in_fp32 attn_implementation auto_map cache_implementation
    chunk_size_feed_forward directionality dtype extra_pos_embeddings finetuning_task gradient_checkpointing id2label
    init_std initializer_factor initializer_range is_llama_config label2id max_window_layers model_type n_ctx n_positions
    num_labels original_max_position_embeddings prefix pretraining_tp reorder_and_upcast_attn return_dict
    scale_attention_softmax_in_fp32 sep_token_id sinusoidal_pos_embds task_specific_params tie_weights_ tokenizer_class
    tinylm_replaced torch_dtype transformers.js_config transformers_version unk_token_id use_cache use_sliding_window""".split()
)
INERT_NAMES = "_[!r]* *dropout *dropout_* *pdrop *layerdrop output_past output_hidden_states output_attentions pooler_* summary_*"
# Fields by which a model of transformers computes something else: refused where a row does not read them.
MECHANISMS = """
    alibi rope_* *_rope *_rope_* *mrope* *rotary* *dynamic_ntk* *logn_attn* position_embedding* position_bias* pos_att_type
    static_position_embeddings sinusoidal_embeddings *learned_position* relative_* max_relative_positions
    sliding_* [!_]*_sliding_* layer_types layers_block_type *bidirectional* causal is_causal is_decoder is_encoder_decoder
    prefix_lm *cross_attention* attention_type attn_type attention_chunk* attention_window* window_size local_att* global_att*
    num_random_blocks num_landmarks keep_window_size *kv_shar* *attention_sink* learnable_sink*
    *head_dim *key_value_heads *kv_heads n_head_kv multi_query kv_channels *_lora_rank clip_qkv swa_* *softcap* *soft_cap
    bias *_bias add_bias_* attn_scale attn_config attn_temperature* attention_*multiplier attention_value_scale attention_k_*
    query_pre_attn_scalar scale_attn* lambda_std_dev enable_shape enable_pronunciation *heads_per_layer *_groups pruned_heads gating new_decoder_architecture num_ln_*
    *qk_norm* *qk_layernorm* query_norm key_norm *norm_before* pre_norm post_norm *use_*_norm norm_type normalization_type
    normalize_before normalize_embedding layernorm_embedding add_final_layer_norm _remove_* apply_residual* gated_norm_rank
    *_multiplier *_multipliers *mup_* logit_scale logits_scaling residual_scale* embedding_scale scale_emb* scale_depth
    *rescale_* *parallel_attn* *parallel_residual* feed_forward_proj mlp_type mlp_only_layers mlp_layer_types swiglu_*
    *sparsity* altup_* laurel_* *per_layer* ffn_config text_config vision_config audio_config encoder_config decoder_config
    *embedding_size embedding_rank word_embed_proj_dim *type_vocab_size* use_task_id use_lang_emb num_hidden_groups tie_encoder_*
    *expert* moe_* *_moe* router_* topk_group mamba_* ssm_* linear_*_dim linear_num_* linear_att* conv_* *_conv_* state_size
    lru_width encoder decoder *_2d_position* index_head* index_n* index_topk* indexer_* entity_* hash_* num_hash ngram* *_ngram* hc_* token_dropout quantization* compression_config
"""
INERT_NAMES, MECHANISMS = (
    re.compile("|".join(map(fnmatch.translate, names.split())))
    for names in (INERT_NAMES, MECHANISMS)
)
# Of these, numbers that change nothing where they are one.
NEUTRAL_AT_ONE = """partial_rotary_factor rotary_pct attention_value_scale residual_scale embedding_multiplier
    embedding_scale logit_scale logits_scaling residual_multiplier scale_emb""".split()


def normalize_hf_config(row: Family, raw: dict, source: str) -> dict:
    """A config.json with the family's defaults, in today's words, and nothing in it that is not supported.

    Warns once of all fields that nobody gives a meaning; raises Error for one that has another meaning than ours.
    """
    raw, ignored = row.defaults | raw, []
    for name, key in row.aliases.items():
        value, known = raw.pop(name, None), raw.get(key)
        if known is None or known == row.defaults.get(key):
            raw[key] = known if value is None else value
        require(
            value in (None, raw[key]) or name == "num_hidden_layers",  # which the tensors tell
            f"{source}: {name} = {value!r} and {key} = {known!r}, expected the same",
        )
    if "rope_scaling" in row.fields:
        flat_rope(row, raw, source, ignored)
    if "use_sliding_window" in row.defaults and not raw["use_sliding_window"]:
        raw["sliding_window"] = None
    if "layer_types" in row.fields and raw.get("layer_types") is None:
        raw["layer_types"] = layer_types(raw)
    if tinylm.is_number_in(raw.get("num_labels"), 1, 2**16, int) and not raw.get("id2label"):
        raw["id2label"] = {i: f"LABEL_{i}" for i in range(raw["num_labels"])}
    refuse_unsupported(row, raw, source, ignored)
    if ignored:
        names = ", ".join(ignored)[:1000]
        warnings.warn(f"{source}: ignored, as it means nothing here: {names}", stacklevel=4)
    return raw


def layer_types(raw: dict) -> list | None:
    """Which layers slide, of the rules that stood for the list in older files: from one on (Qwen), all but every n-th
    (Gemma)."""
    if raw.get("sliding_window") is None or raw.get("num_hidden_layers") is None:
        return None
    first, period = raw.get("max_window_layers") or 0, raw.get("sliding_window_pattern")
    kinds = []
    for i in range(min(raw["num_hidden_layers"], 9999)):
        full = i < first or period and (i + 1) % period == 0
        kinds.append(tinylm.LAYER_TYPES[not full])
    return kinds


def refuse_unsupported(row: Family, raw: dict, source: str, ignored: list):
    """Refuse fields that change what a model computes and that the row does not read; add those unheard of to
    `ignored`."""
    read = INERT | onnxlm.GENERATION | row.defaults.keys() | set(row.fields.values())
    hidden, heads = (raw.get(row.fields[name]) for name in ("hidden_size", "num_attention_heads"))
    whole = tinylm.is_number_in(hidden, 1, 2**31, int) and tinylm.is_number_in(heads, 1, 2**31, int)
    causal, position = row.fixed.get("causal", True), row.fixed.get("position", "rope")
    seq2seq = "num_encoder_layers" in row.fields
    kind = tinylm.LAYER_TYPES[raw.get("sliding_window") is not None]
    neutral = dict.fromkeys(NEUTRAL_AT_ONE, 1) | row.fixed
    neutral |= {
        "causal": causal,
        "is_decoder": causal and not seq2seq,
        "is_encoder_decoder": seq2seq,
        "layer_types": [kind] * len(raw.get("layer_types") or ()),
        "num_key_value_heads": heads,
        "head_dim": whole and hidden // heads,
        "embedding_size": hidden,
        "position_embedding_type": {"rope": "rope", "learned": "absolute"}.get(position),
    }
    only = row.only | ({"is_causal": True} if causal else {})
    for key, value in raw.items():
        if key in only:
            fine, supported = value in (None, only[key]), only[key]
        elif key in read or value in (None, False, "", [], {}):
            continue
        elif MECHANISMS.fullmatch(key):
            fine, supported = value == neutral.get(key), neutral.get(key)
        else:
            if not INERT_NAMES.fullmatch(key):
                ignored.append(key)
            continue
        require(fine, f"{source}: {key} = {value!r} is not supported (supported: {supported!r})")


ROPE_UNUSED = {
    *tinylm.ROPE_OPTIONS["yarn"],
    *sum(tinylm.ROPE_KEYS.values(), ()),
    "finetuned",
}  # by some types


def flat_rope(row: Family, raw: dict, source: str, ignored: list):
    """Rotary positions in one dialect, in place: `rope_theta`, `partial_rotary_factor`, `rope_scaling` for the rest.

    As transformers has it: `rope_scaling` goes before the `rope_parameters` of version 5, and what stands inside of
    these before what stands beside them, but for the original length. Adds to `ignored` what the rope_type ignores.
    """
    rope, scaling = raw.pop("rope_parameters", None) or {}, raw.get("rope_scaling") or {}
    for value in (rope, scaling):
        require(isinstance(value, dict), f"{source}: rope_scaling = {value!r}, expected an object")
    beside = raw.get(tinylm.ORIGINAL)
    if "rope_local_base_freq" in row.defaults:
        rope, beside = nested_rope(raw, rope, source) | scaling, None
        rope.pop("truncate", None)  # which transformers looks for elsewhere
    elif scaling:
        rope = scaling
    rope = {key: value for key, value in rope.items() if value is not None}
    for key in ("rope_theta", "partial_rotary_factor"):
        raw[key] = rope.pop(key, raw.get(key))
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(
        rope.pop("type", kind) == kind,
        f"{source}: rope_scaling has rope_type = {kind!r} and another type",
    )
    if not isinstance(kind, str) or kind not in tinylm.ROPE_KEYS:  # which Config refuses
        raw["rope_scaling"] = rope | {"rope_type": kind}
        return
    if kind in tinylm.ROPE_OPTIONS:
        length = raw["max_position_embeddings"]
        if beside is not None:
            rope[tinylm.ORIGINAL] = beside
        original = rope.get(tinylm.ORIGINAL, length)
        require(
            tinylm.is_number_in(original, 1, 2**31),
            f"{source}: {tinylm.ORIGINAL} = {original!r}, expected a size",
        )
        if kind == "yarn":
            rope.setdefault("factor", length / original)
        else:
            low, high = rope.get("low_freq_factor", 0), rope.get("high_freq_factor", 1e9)
            require(low < high, f"{source}: low_freq_factor = {low}, expected less than {high}")
    used = {"rope_type", *tinylm.ROPE_KEYS[kind], *tinylm.ROPE_OPTIONS.get(kind, ())}
    for key in rope.keys() - used:
        known = key in ROPE_UNUSED or (key, rope[key]) == ("attn_factor", 1)
        require(
            known, f"{source}: rope_scaling has {key} = {rope[key]!r}, not supported in {kind!r}"
        )
        ignored.append(f"{key} of rope_scaling")
    told = {key: value for key, value in rope.items() if key in used}
    raw["rope_scaling"] = None if kind == "default" else told | {"rope_type": kind}


def nested_rope(raw: dict, rope: dict, source: str) -> dict:
    """Gemma 3 has `rope_parameters` for each type of layers: those of the full ones; the others have but a theta."""
    strange = [key for key in rope if key not in tinylm.LAYER_TYPES]
    require(not strange, f"{source}: rope_parameters has {strange}, expected {tinylm.LAYER_TYPES}")
    full, local = (dict(rope.get(kind) or {"rope_type": "default"}) for kind in tinylm.LAYER_TYPES)
    raw["rope_local_base_freq"] = local.pop("rope_theta", raw["rope_local_base_freq"])
    require(
        local in ({}, {"rope_type": "default"}),
        f"{source}: rope_parameters of sliding_attention = {local} is not supported "
        "(supported: rope_type 'default')",
    )
    return full


UNSET = dict(  # where Config's default is an architecture or a size of its own
    vocab_size=None,
    hidden_size=None,
    num_hidden_layers=None,
    num_attention_heads=None,
    qk_norm=None,
)


def config_from_hf(raw: dict, source: str = "config.json", head="config") -> Config:
    """The Config that a `config.json` describes, in the dialect of transformers 4 or 5, with the head of its
    `architectures` or another one.

    Warns of fields that nobody gives a meaning. Raises Error for an unknown model_type, and for any field that would
    change what the model computes and that this file does not support.
    """
    name = raw.get("model_type")
    require(
        name in [*FAMILIES],
        f"{source}: model_type = {name!r} is not supported (supported: {', '.join(FAMILIES)})",
    )
    row = FAMILIES[name]
    try:
        if head == "config":
            architectures = raw.get("architectures") or [None]
            head = raw.get("head", "lm") if name == "tinylm" else row.head_of(architectures[0])
        require(
            head in row.heads,
            f"{source}: head = {head!r} is not supported for {name} (supported: "
            f"{', '.join(map(str, row.heads))})",
        )
        raw = normalize_hf_config(row, raw, f"{source}, model_type {name}")
        given = {ours: raw[key] for ours, key in row.fields.items() if raw.get(key) is not None}
        values = UNSET | given | row.fixed | row.read(raw) | row.heads[head][1]
        if values.get("head_act") == SAME:
            values["head_act"] = values["hidden_act"]
        if raw.get("id2label"):
            values["id2label"] = raw["id2label"]
        return Config(**values | dict(head=head, model_type=name))
    except tinylm.Error as error:  # where it names our field, name theirs
        ours, _, rest = str(error).removeprefix("config: ").partition(" ")
        text = f"{source}: {row.fields.get(ours, ours)} {rest}"
        raise (error if str(error).startswith(source) else Error(text)) from None
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise Error(f"{source}: a field has a value of the wrong kind ({error})") from None


def config_to_hf(config: Config) -> dict:
    """The `config.json` of a config, in the flat dialect that transformers 4 and 5 both read.

    Without a `model_type` it is the first family that can express it. Raises Error where the named family cannot.
    """
    for name in [config.model_type] if config.model_type else FAMILIES:
        row = FAMILIES[name]
        raw = {
            "architectures": [row.architecture(config.head)],
            "model_type": name,
            "initializer_range": config.initializer_range,
        }
        raw |= {key: getattr(config, ours) for ours, key in row.fields.items()} | row.write(config)
        if config.id2label:
            raw["id2label"] = {str(i): label for i, label in config.id2label.items()}
            raw["label2id"] = {label: i for i, label in config.id2label.items()}
        if "use_sliding_window" in row.defaults:
            raw["use_sliding_window"] = config.sliding_window is not None
        if config.num_encoder_layers:
            raw["is_encoder_decoder"] = True
        try:
            require_same(config_from_hf(raw, "config", config.head), config)
            return raw
        except tinylm.Error as error:
            reason = error
    raise Error(f"{reason} cannot be written as model_type {name!r}")


def require_same(back: Config, config: Config):
    """What is written right reads back as the same, but for what only training uses."""
    unwritten = (
        "model_type",
        "hidden_dropout",
        "embedding_dropout",
        "head_dropout",
        "initializer_range",
    )
    lost = [
        f"{f.name} = {getattr(config, f.name)!r}"
        for f in fields(Config)
        if f.name not in unwritten and getattr(back, f.name) != getattr(config, f.name)
    ]
    require(not lost, f"config: {', '.join(lost)}")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: the tensor tables at work, in both directions
CHECKPOINT_FILES = """config.json generation_config.json model*.safetensors model.safetensors.index.json tokenizer.json
tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json merges.txt *.model *.jinja modules.json
*sentence*.json */config.json [0-9]*_*/model.safetensors""".split()


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: one of that name, else a repository of the Hugging Face hub, in `huggingface_hub`'s
    cache; what is not there yet is downloaded, unless HF_HUB_OFFLINE is set. `revision`: a branch, tag or commit.

    Raises Error where there is neither.
    """
    name = str(name)
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]{,95}(/[\w-][\w.-]{,95})?", name):
        require(os.path.isdir(name), f"{name}: no such folder")
        require(
            revision is None, f"revision = {revision!r}: {name} is a folder, not a name on the hub"
        )
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise Error(
            f"{name}: no such folder; to have it from the Hugging Face hub, pip install huggingface_hub, "
            f"or download it elsewhere: hf download {name} --local-dir {name}"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=CHECKPOINT_FILES))
    except (OSError, ValueError) as error:
        raise Error(
            f"{name}: no such folder, and the Hugging Face hub does not give it ({error})"
        ) from None


def sources(name: str, model_type: str, head: str | None) -> tuple[tuple, type]:
    """Which tensors of a family's checkpoint make up our tensor `name`, and the kind of their names."""
    row, (module, kind) = FAMILIES[model_type], name.rsplit(".", 1)
    if not row.tensors:
        return (name,), Name
    layer = next((part for part in module.split(".") if part.isdigit()), "")
    table = row.tensors | row.heads[head][0]
    # of a tensor, or of a module
    theirs = table.get(name) or table.get(module.replace(f".{layer}.", ".{}."))
    require(
        theirs, f"{name}: model_type {model_type!r} has no such tensor; use model_type 'tinylm'"
    )
    return tuple(n.format(layer) + f".{kind}" * (name not in table) for n in theirs), type(
        theirs[0]
    )


def fused_sizes(name: str, config: Config) -> tuple:
    """Rows that each part has in a fused projection of ours."""
    config = config.encoder if name.startswith("encoder.") else config
    sizes = {
        "qkv": config.qkv_sizes,
        "kv": config.qkv_sizes[1:],
        "gate_up": (config.intermediate_size,) * 2,
    }
    return sizes[name.split(".")[-2]]


def stored_form(name: str, tensor: Tensor, config: Config, model_type: str) -> tuple[dict, type]:
    """Our tensor under a family's names, its fused parts apart, and the kind of the names."""
    theirs, kind = sources(name, model_type, config.head)
    parts = tensor.split(fused_sizes(name, config)) if len(theirs) > 1 else [tensor]
    return {n: kind.write(part) for n, part in zip(theirs, parts)}, kind


def to_checkpoint(state: dict, config: Config, model_type: str) -> dict:
    """Our state dict in the form of a family's checkpoints."""
    prefix = FAMILIES[model_type].prefix if config.head is None else ""
    return {
        n.removeprefix(prefix): part.contiguous()
        for name, tensor in state.items()
        for n, part in stored_form(name, tensor, config, model_type)[0].items()
    }


class Checkpoint:
    """The tensors in a folder, as our state dict: each one is found and fits, and none is left over."""

    def __init__(self, folder: Path, config: Config, dtype, device):
        self.row, self.dtype, self.device = FAMILIES[config.model_type], dtype, device
        self.place, files = self.files(folder)
        self.stored = self.named(files)  # name in the table -> (file, the opened one, name there)
        (self.embedding,), _ = sources("embed.weight", config.model_type, config.head)
        self.output = self.tied_output()
        # A tensor that is tied, or stored twice, may stand under one of its names only.
        tied = {self.output: self.embedding} if config.tie_word_embeddings else {}
        for name, original in (self.row.copies | tied).items():
            if name in self.stored:
                self.stored.setdefault(original, self.stored[name])
        layers = max(config.num_hidden_layers, config.num_encoder_layers)
        number = len(self.stored)
        require(layers <= number, f"{self.place}: {number} tensors, expected {layers} layers")
        self.dtype = dtype or self.fetch(self.embedding).dtype
        self.config = replace(config, tie_word_embeddings=self.is_tied(config))

    def named(self, files: dict) -> dict:
        """The stored tensors under today's names, behind the prefix that bare models leave out."""
        opened = {file: tinylm.open_tensors(file) for file in sorted({*files.values()})}
        heads = self.head_tensors()
        bare = not any(name.startswith(self.row.prefix) for name in files)
        stored = {}
        for name, file in files.items():
            new = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            new = new.replace("LayerNorm.beta", "LayerNorm.bias")
            if bare and new not in heads:
                new = self.row.prefix + new
            stored[new] = file, opened[file], name
        return stored

    def tied_output(self) -> str | None:
        """The name of the language model's output, which may be tied to the embedding."""
        for head in {"lm", "mlm"} & self.row.heads.keys():
            for name in self.row.heads[head][0].get("head.out", ()):
                return f"{name}.weight"
        return None

    def is_tied(self, config: Config) -> bool:
        """An output that is stored is tied in name only, unless it equals the embedding."""
        if config.tied and self.output in self.stored:
            tied = torch.equal(self.fetch(self.output), self.fetch(self.embedding))
            require(
                tied or "tie_word_embeddings" not in self.row.only,
                f"{self.place}: tensor {self.output} differs from the embedding, "
                f"but model_type {config.model_type!r} ties them",
            )
            return tied
        unstored = self.output not in self.stored
        return config.tie_word_embeddings or unstored and self.row.unstored_head_is_tied

    @staticmethod
    def files(folder: Path) -> tuple[Path, dict]:
        """The file that says it, and the safetensors file of every tensor."""
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.exists():
            return single, dict.fromkeys(tinylm.open_tensors(single).keys(), single)
        others = sorted(
            p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5")
        )
        require(
            index.exists(),
            f"{folder}: no model.safetensors and no model.safetensors.index.json"
            + (f" ({', '.join(others)}: only safetensors is read)" if others else ""),
        )
        files = tinylm.read_json(index).get("weight_map")
        require(
            isinstance(files, dict) and files,
            f"{index}: weight_map = {files!r}, expected tensor names and their files",
        )
        for name, file in files.items():
            require(
                isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors"),
                f"{index}: {name} lies in {file!r}, expected the name of a .safetensors file in this folder",
            )
        return index, {name: folder / file for name, file in files.items()}

    def head_tensors(self, but="none") -> set:
        """Names of the heads' own tensors, but for those of the head `but`."""
        names = set()
        for head, (table, _) in self.row.heads.items():
            for ours, (name,) in table.items() if head != but else ():
                ends = {name} if ours.endswith(".bias") else {f"{name}.weight", f"{name}.bias"}
                names |= ends
        return names

    def fetch(self, name: str, shape: tuple | None = None) -> Tensor:
        require(
            name in self.stored,
            f"{self.place}: tensor {name} is missing"
            + (f", expected with shape {tuple(shape)}" if shape else ""),
        )
        file, opened, stored = self.stored[name]
        try:
            tensor = opened.get_tensor(stored)
        except SafetensorError as error:
            raise Error(f"{file}: tensor {stored} is not readable ({error})") from None
        plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        require(
            tensor.dtype in plain and shape in (None, tensor.shape),
            f"{file}: tensor {stored} has shape "
            f"{tuple(tensor.shape)} and dtype {tensor.dtype}, expected floats of shape {tuple(shape or ())}",
        )
        return tensor.to(self.device, self.dtype)

    def state(self, lm: tinylm.TinyLM, fresh: dict) -> dict:
        """The state dict of a model; `fresh` stands in for tensors of its head that are not stored."""
        row, state, used = self.row, {}, set()
        for name, tensor in lm.state_dict().items():
            parts, kind = stored_form(name, tensor, self.config, self.config.model_type)
            used |= parts.keys()
            if not parts.keys() & self.stored.keys() and (name in fresh or kind in (Row, Unused)):
                new = fresh.get(name, torch.zeros(tensor.shape))
                state[name] = new.to(self.device, self.dtype)
            else:
                found = [
                    kind.read(self.fetch(n, part.shape)).contiguous() for n, part in parts.items()
                ]
                state[name] = found[0] if len(found) == 1 else torch.cat(found)
        for name in row.copies.keys() & self.stored.keys():
            original = row.copies[name]
            require(
                original not in used or torch.equal(self.fetch(name), self.fetch(original)),
                f"{self.place}: tensor {name} differs from the one that it should repeat, {original}",
            )
        spare = row.copies.keys() | self.head_tensors(self.config.head)
        if self.config.tied:
            spare.add(self.output)
        for name in sorted(self.stored.keys() - used - spare):
            file, _, stored = self.stored[name]
            fine = any(fnmatch.fnmatchcase(name, pattern) for pattern in row.drop.split())
            model_type = self.config.model_type
            require(fine, f"{file}: tensor {stored} is unexpected for model_type {model_type!r}")
        return state


def load_model(cls, name, dtype, device, head, revision, changes: dict) -> tinylm.TinyLM:
    """What `TinyLM.from_pretrained` does."""
    dtype = tinylm.parse_dtype(changes.pop("torch_dtype", dtype))
    require(
        "device_map" not in changes,
        'device_map: a model lies on one device; name it with device=, such as device="cuda"',
    )
    unknown = sorted(changes.keys() - {f.name for f in fields(Config)})
    require(
        not unknown,
        f"from_pretrained: {', '.join(unknown)}: no such argument, and no such field of Config",
    )
    folder = find_checkpoint(name, revision)
    device = tinylm.usable_device(device or "cpu")
    source = str(folder / "config.json")
    raw = tinylm.read_json(folder / "config.json")
    tinylm.check_replaced(raw, source)
    config = replace(config_from_hf(raw, source, head), **changes)
    checkpoint = Checkpoint(folder, config, dtype, device)
    # A leaf of somebody else's may keep tensors that no checkpoint has, and that a meta device would lose.
    with torch.device("cpu" if tinylm.replaced_leaves() else "meta"):
        lm = cls(checkpoint.config)
    fresh = {}
    if head != "config":
        lm.head = tinylm.Head(lm.config).apply(lm._init)
        fresh = lm.head.state_dict(prefix="head.")
    lm.load_state_dict(checkpoint.state(lm, fresh), assign=True)
    lm.folder = folder
    lm.tokenizer = load_tokenizer(folder)
    lm.generation_config = onnxlm.read_generation_config(folder, raw)
    return lm.to(device).eval()


def save_model(lm: tinylm.TinyLM, folder: Path):
    """What `TinyLM.save_pretrained` does."""
    described = tinylm.describe_model(lm)
    replaced = "tinylm_replaced" in described
    config = replace(lm.config, model_type="tinylm") if replaced else lm.config
    raw = config_to_hf(config) | described
    tensors = to_checkpoint(lm.state_dict(), config, raw["model_type"])
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    ids = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    files = lm.tokenizer.files if lm.tokenizer else {}
    generation = json.dumps(lm.generation_config or ids, indent=2, sort_keys=True) + "\n"
    files = files | {"generation_config.json": generation.encode("utf-8")}
    tinylm.write_checkpoint(folder, raw, tensors, files)
