"""Hugging Face folders in both directions: tokenizers, families as rows of data, config.json, checkpoints, the hub.

    from pretrained import config_from_hf, load_tokenizer
    lm = TinyLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")    # calls load_model here
    lm.save_pretrained("copy")                                            # calls save_model here

Copy it beside tinylm.py and onnxlm.py. The reference implementation of every family is Hugging Face transformers.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import warnings
from collections.abc import Callable, KeysView
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

try:  # copied into a package
    from . import onnxlm, tinylm
except ImportError:  # beside each other, or installed
    import onnxlm
    import tinylm

Config = tinylm.Config
require = tinylm.require
is_number_in = tinylm.is_number_in
read_json = tinylm.read_json
added_token = tinylm.added_token


class Error(tinylm.Error, onnxlm.Error):
    """Both files can be copied alone, so each has an Error of its own. Where both are loaded, either catches it."""


onnxlm.Error = Error  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: one complete tokenizer.json from all files of a folder
# ---------------------------------------------------------------------------------------------------------------------
def load_tokenizer(folder: str | Path) -> onnxlm.Tokenizer | tinylm.ByteTokenizer | None:
    """The tokenizer of a checkpoint folder as transformers' AutoTokenizer reads it, or None where there is none.

    Its `files` hold a tokenizer.json that describes it completely, even if the folder's own does not. Our own byte
    tokenizer needs no library. Raises Error for files that cannot be read.
    """
    folder = Path(folder)
    files = onnxlm.read_tokenizer_files(folder)
    if files.get("tokenizer.json") == tinylm.ByteTokenizer().files["tokenizer.json"]:
        del files["tokenizer.json"]
        return tinylm.ByteTokenizer(files)
    names = ("tokenizer.json", "vocab.txt", "merges.txt")
    vocabulary = next((name for name in names if name in files), None)
    if vocabulary is None or vocabulary == "merges.txt" and "vocab.json" not in files:
        for name in files:
            require(
                not name.endswith((".model", ".spm")),
                f"{folder / name}: a SentencePiece model alone, expected a tokenizer.json; where transformers can convert "
                f"it, AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) writes one",
            )
        return None
    try:
        hf_config = read_json(folder / "config.json", {})
        return onnxlm.Tokenizer(complete_tokenizer_json(files, hf_config), hf_config)
    except ImportError:
        raise Error(f"{folder / vocabulary}: reading it needs `pip install tokenizers`") from None
    except tinylm.Error as error:
        raise Error(f"{folder}: {error}") from None
    except Exception as error:  # the library raises plain Exception
        raise Error(f"{folder / vocabulary}: not a readable tokenizer ({error})") from None


def complete_tokenizer_json(files: dict[str, bytes], hf_config: dict) -> dict[str, bytes]:
    """Returns the files with a tokenizer.json that says everything AutoTokenizer takes from all of them: tokens that only
    other files name and, for some tokenizer classes, options of tokenizer_config.json that override tokenizer.json."""
    from tokenizers import Tokenizer as Backend

    config = onnxlm.parse_json_file(files, "tokenizer_config.json")
    tokenizer_class = onnxlm.tokenizer_class(files, hf_config)
    if "tokenizer.json" in files:
        config = {k: v for k, v in config.items() if k not in ("add_bos_token", "add_eos_token")}
    else:
        tokenizer_class, files = convert_vocabulary(files, tokenizer_class, config)
    spec = json.loads(files["tokenizer.json"])
    model = spec["model"]
    stored_tokens = spec.get("added_tokens") or []
    model_type, pipeline = CLASS_PIPELINES.get(tokenizer_class, ("", None))
    if model_type != model.get("type"):
        tokenizer_class = ""
        pipeline = None
    special = onnxlm.special_tokens(files, hf_config, spec.get("padding"))
    added = find_added_tokens(files, special, stored_tokens, tokenizer_class)
    ids = assign_ids(model["vocab"], added)
    # Without its words the tokenizer is cheap to load and to compare.
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    backend = Backend.from_str(json.dumps(spec | {"model": empty, "added_tokens": []}))
    before = backend.to_str()
    if pipeline:
        model = model | pipeline(backend, tokenizer_class, config, special)
        template = post_processor(tokenizer_class, config, special, ids)
        backend.post_processor = template or backend.post_processor
    unchanged = added == {token["content"]: added_token(token) for token in stored_tokens}
    # A key that is null, empty or false may as well be missing.
    unchanged &= all((spec["model"].get(key) or None) == (model[key] or None) for key in model)
    if unchanged and backend.to_str() == before:
        return files
    spec = json.loads(backend.to_str()) | {"model": model}
    spec["added_tokens"] = [{"id": ids[text]} | token for text, token in added.items()]
    return files | {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode("utf-8")}


def convert_vocabulary(
    files: dict[str, bytes], tokenizer_class: str, config: dict
) -> tuple[str, dict]:
    """(tokenizer class, files with a tokenizer.json) of a folder with vocab.txt, or vocab.json and merges.txt."""
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
    tokenizer_class = tokenizer_class or ("" if declared else default)
    require(
        CLASS_PIPELINES.get(tokenizer_class, (None,))[0] == model["type"],
        f"tokenizer_class = {declared or tokenizer_class!r} without a tokenizer.json is not supported",
    )
    named = {"tokenizer_config.json": json.dumps({"tokenizer_class": tokenizer_class}).encode()}
    return tokenizer_class, named | files | {
        "tokenizer.json": json.dumps({"model": model}).encode()
    }


def find_added_tokens(
    files: dict[str, bytes], special: dict[str, str], stored_tokens: list, tokenizer_class: str
) -> dict[str, dict]:
    """Text -> `added_token` of the tokens beside the vocabulary, in transformers' order: those of tokenizer.json (unless
    a tokenizer class rebuilds them), those that other files list by id, the special tokens."""
    config = onnxlm.parse_json_file(files, "tokenizer_config.json")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = config.get("added_tokens_decoder") or {}
    by_id = {int(i): added_token(token) for i, token in listed.items()}
    # Without an added_tokens_decoder the older files count too.
    if "added_tokens_decoder" not in config:
        named = onnxlm.parse_json_file(files, "special_tokens_map.json")
        config = config | named
        extra = extra or named.get("additional_special_tokens") or []
        if isinstance(extra, list):
            extra = [*extra, *(named.get("extra_special_tokens") or [])]
        texts = {*special.values(), *map(str, extra)}
        for text, i in onnxlm.parse_json_file(files, "added_tokens.json").items():
            by_id[i] = added_token(text, special=text in texts)
        by_id |= {token["id"]: added_token(token) for token in stored_tokens}
    # Extra tokens with names of their own are among the special tokens already.
    if isinstance(extra, dict):
        extra = []
    if tokenizer_class == "T5Tokenizer" and not config.get("additional_special_tokens"):
        extra = [*extra, *(f"<extra_id_{i}>" for i in range(config.get("extra_ids", 100)))]
    found = {}
    if not tokenizer_class:
        found = {token["content"]: added_token(token) for token in stored_tokens}
    found |= {by_id[i]["content"]: by_id[i] for i in sorted(by_id)}
    named = [config[n] if isinstance(config.get(n), dict) else text for n, text in special.items()]
    for value in filter(None, [*named, *extra]):
        token = added_token(value, special=True)
        found.setdefault(token["content"], token)
    marked = {token["content"] for token in stored_tokens if token["special"]}
    for text, token in found.items():
        token["special"] |= text in special.values() or text in marked
    return found


def assign_ids(vocabulary: dict | list, added: dict) -> dict[str, int]:
    """Token -> id. The library appends added tokens that the vocabulary lacks."""
    if isinstance(vocabulary, list):
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    ids = dict(vocabulary)
    free = len(vocabulary)
    for text in added:
        free = max(free, ids.setdefault(text, free) + 1)
    return ids


# Some tokenizer classes of transformers follow tokenizer_config.json where tokenizer.json says otherwise. A pipeline
# (backend: the library's tokenizer, tokenizer_class, config, special tokens) sets the backend's steps before and after
# the model, and returns the options that it changes in the model.
QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bert_pipeline(backend, tokenizer_class: str, config: dict, special: dict) -> dict:
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return {
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "unk_token": special["unk_token"],
    }


def byte_level_pipeline(backend, tokenizer_class: str, config: dict, special: dict) -> dict:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    qwen = tokenizer_class == "Qwen2Tokenizer"
    prefix = bool(config.get("add_prefix_space"))
    words = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not qwen)
    if qwen:
        split = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
        words = pre_tokenizers.Sequence([split, words])
    backend.normalizer = normalizers.NFC() if qwen else None
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    return tinylm.BPE_OPTIONS


def sentencepiece_pipeline(backend, tokenizer_class: str, config: dict, special: dict) -> dict:
    from tokenizers import decoders, normalizers, pre_tokenizers

    gemma = tokenizer_class == "GemmaTokenizer"
    prefix = not gemma and config.get("add_prefix_space") in (None, True)
    scheme = "never"
    if prefix:
        scheme = "always" if config.get("legacy") else "first"
    words = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1))
    if gemma:
        words = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.normalizer = normalizers.Replace(" ", "▁") if gemma else None
    backend.pre_tokenizer = words
    backend.decoder = decoders.Sequence(steps)
    unknown = special.get("unk_token") if gemma else None
    return tinylm.BPE_OPTIONS | {"fuse_unk": True, "byte_fallback": True, "unk_token": unknown}


def unigram_pipeline(backend, tokenizer_class: str, config: dict, special: dict) -> dict:
    """Keeps the character map that was converted from SentencePiece."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    steps = backend.normalizer
    steps = steps if isinstance(steps, normalizers.Sequence) else [steps]
    charsmaps = [step for step in steps if isinstance(step, normalizers.Precompiled)]
    t5 = tokenizer_class == "T5Tokenizer"
    scheme = "always" if t5 or config.get("add_prefix_space", True) else "never"
    words = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.normalizer = next(iter(charsmaps), None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return {"byte_fallback": False, "unk_id": 2 if t5 else 3}


# tokenizer class -> (type of its model in tokenizer.json, its pipeline)
CLASS_PIPELINES = {
    "BertTokenizer": ("WordPiece", bert_pipeline),
    "RobertaTokenizer": ("BPE", byte_level_pipeline),
    "GPT2Tokenizer": ("BPE", byte_level_pipeline),
    "Qwen2Tokenizer": ("BPE", byte_level_pipeline),
    "LlamaTokenizer": ("BPE", sentencepiece_pipeline),
    "GemmaTokenizer": ("BPE", sentencepiece_pipeline),
    "XLMRobertaTokenizer": ("Unigram", unigram_pipeline),
    "T5Tokenizer": ("Unigram", unigram_pipeline),
}


def post_processor(tokenizer_class: str, config: dict, special: dict, ids: dict[str, int]):
    """The step that puts a tokenizer class's special tokens around texts; None: keep that of tokenizer.json."""
    from tokenizers import processors

    bos, eos, cls, sep = (special.get(f"{name}_token") for name in ("bos", "eos", "cls", "sep"))
    start = [bos] if bos and config.get("add_bos_token") else []
    end = [eos] if eos and config.get("add_eos_token") else []
    if tokenizer_class == "RobertaTokenizer":
        trim = config.get("trim_offsets", True)
        prefix = bool(config.get("add_prefix_space"))
        return processors.RobertaProcessing((sep, ids[sep]), (cls, ids[cls]), trim, prefix)
    if tokenizer_class == "BertTokenizer":
        pair = [cls, "$A", sep, "$B:1", f"{sep}:1"]
    elif tokenizer_class == "XLMRobertaTokenizer":
        pair = [bos, "$A", eos, eos, "$B", eos]
    elif tokenizer_class == "T5Tokenizer":
        pair = ["$A", eos, "$B", eos]
    elif start or end:
        pair = [*start, "$A", *end, *(f"{piece}:1" for piece in (*start, "$B", *end))]
    else:
        return None
    # A single text gets what a pair has around its first text.
    single = pair[: (len(pair) + 1) // 2]
    around = [(text, ids[text]) for text in (bos, eos, cls, sep) if text in single]
    return processors.TemplateProcessing(single, pair, around)


# ---------------------------------------------------------------------------------------------------------------------
# Families: how a config.json reads as a Config, and under which names our tensors are stored
# ---------------------------------------------------------------------------------------------------------------------
class StoredName(str):
    """Name of a module or tensor in a checkpoint. `load` turns a stored tensor into ours, `save` turns ours back; both
    take the tensor and the Config."""

    load = save = staticmethod(lambda x, config: x)
    # A checkpoint may lack it; it is zero then.
    optional = False
    # Axis along which several of them are the parts of one tensor of ours
    axis = 0


class Transposed(StoredName):
    """A module whose weight is stored (in, out), as GPT-2's Conv1D does."""

    load = save = staticmethod(lambda x, config: x.t() if x.ndim == 2 else x)


class RowVector(StoredName):
    """A vector that is stored as a matrix (1, n)."""

    load = staticmethod(lambda x, config: x[0])
    save = staticmethod(lambda x, config: x[None])
    optional = True


class HeadByHead(StoredName):
    """A fused projection that is stored head by head: q, k and v of a head, then those of the next one (GPT-NeoX)."""

    @staticmethod
    def load(x: Tensor, config: Config) -> Tensor:
        return x.unflatten(0, (-1, 3, config.head_dim)).transpose(0, 1).flatten(0, 2)

    @staticmethod
    def save(x: Tensor, config: Config) -> Tensor:
        return x.unflatten(0, (3, -1, config.head_dim)).transpose(0, 1).flatten(0, 2)


class Columns(StoredName):
    """A module whose weight is some columns of ours."""

    axis = 1


class SecondRow(StoredName):
    """One output that is the second of two of ours: ELECTRA's logit of a replaced token, against 0 for an original one."""

    load = staticmethod(lambda x, config: torch.cat((torch.zeros_like(x), x)))
    save = staticmethod(lambda x, config: x[1:] - x[:1])


class Unused(StoredName):
    """A module that is kept only so that it can be saved again."""

    optional = True


def name_map(text: str) -> dict[str, str]:
    """Our names -> theirs, from words `ours=theirs`, or single words where both are the same."""
    words = (word.partition("=") for word in text.split())
    return {ours: theirs or ours for ours, _, theirs in words}


def tensor_map(prefix: str, layer: str, modules: dict, in_layer: type = StoredName) -> dict:
    """Our modules -> tuples of StoredName. Several, written `theirs+theirs`, are the rows of one module of ours.

    All stored names begin with `prefix`; those in a layer go on with `layer` ({} is its number) and have the class
    `in_layer`.
    """
    table = {}
    for ours, theirs in modules.items():
        if ours.startswith("layers."):
            ours = ours.replace("layers", "layers.{}", 1)
            names = [in_layer(prefix + layer + name) for name in theirs.split("+")]
        else:
            names = [StoredName(prefix + name) for name in theirs.split("+")]
        table[ours] = tuple(names)
    return table


class HeadTable(NamedTuple):
    """A head of a family: our modules -> tuples of one StoredName, the Config fields that come with it, and what the
    body's stored names begin with behind this head."""

    tensors: dict
    config: dict
    body: str = ""


def head_table(
    modules: str = "", name_type: type = StoredName, body: str = "", **config
) -> HeadTable:
    """A HeadTable from words `ours=theirs` and Config fields."""
    tensors = {ours: (name_type(theirs),) for ours, theirs in name_map(modules).items()}
    return HeadTable(tensors, config, body)


LM_ONLY = {"lm": head_table("head.out=lm_head")}
DECODER_HEADS = LM_ONLY | {"classify": head_table("head.out=score"), None: head_table()}
# head -> end of the class name in transformers
CLASS_ENDINGS = {
    "lm": "ForCausalLM",
    "mlm": "ForMaskedLM",
    "classify": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "qa": "ForQuestionAnswering",
    None: "Model",
}


@dataclass(frozen=True)
class Family:
    """One `model_type`. Its tables are read one way to load and the other way to save.

    A key is a field of config.json. Each key of transformers' config class must stand in `fields`, `aliases`,
    `defaults`, `only` or NO_EFFECT: all others are ignored with a warning.
    """

    # Start of the class names in transformers
    stem: str
    # Our modules -> stored names, from tensor_map
    tensors: dict
    # Config field -> key
    fields: dict
    # head -> HeadTable; a table whose config has a `head` is another kind of that one
    heads: dict = field(default_factory=lambda: DECODER_HEADS)
    # Start of the body's stored names, left out where a body is stored without a head
    prefix: str = "model."
    # Config fields that are the same in every checkpoint
    fixed: dict = field(default_factory=dict)
    # key -> its value where config.json lacks it, if that is not None or Config's own default
    defaults: dict = field(default_factory=dict)
    # key that is not read -> the only supported value
    only: dict = field(default_factory=dict)
    # Second name of a key -> the key (transformers' attribute_map)
    aliases: dict = field(default_factory=dict)
    # What the tables cannot say: config.json with its defaults -> Config fields, and a Config -> keys
    read: Callable[[dict], dict] = lambda raw: {}
    write: Callable[[Config], dict] = lambda config: {}
    # Patterns of stored tensors that may be dropped
    drop: str = "model.layers.*.self_attn.rotary_emb.inv_freq"
    # Stored tensor -> the tensor that it repeats, in checkpoints that have both
    copies: dict = field(default_factory=dict)
    # An output that is not stored is the embedding, even if config.json says tie_word_embeddings = false.
    unstored_head_is_tied: bool = False
    # head -> end of the class name, where it is not that of CLASS_ENDINGS
    class_endings: dict = field(default_factory=dict)

    def architecture(self, head) -> str:
        return self.stem + (CLASS_ENDINGS | self.class_endings)[head]

    def head_key(self, config: Config):
        """The key of `heads` for a Config: of two kinds of a head, the one that has a dense layer if the Config has."""
        for key, table in self.heads.items():
            dense = "head.dense" in table.tensors
            if table.config.get("head", key) == config.head and dense == bool(config.head_act):
                return key
        return config.head

    def head_of(self, architecture: str | None):
        """The head of a transformers class. An unknown class counts as the language model if the family has one."""
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
COMMON = name_map("""
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings
    hidden_act tie_word_embeddings attention_dropout bos_token_id eos_token_id pad_token_id problem_type
""")
ROTARY = COMMON | name_map("""
    num_key_value_heads head_dim rope_theta rope_scaling norm_eps=rms_norm_eps
""")
BIASES = name_map("attention_bias attention_output_bias=attention_bias")
SLIDING = name_map("sliding_window layer_types")
LLAMA = name_map("""
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
""")
# A norm after attention and MLP, and with SANDWICH one before them too
OUTPUT_NORMS = name_map("""
    layers.attention_output_norm=post_attention_layernorm
    layers.mlp_output_norm=post_feedforward_layernorm
""")
SANDWICH = OUTPUT_NORMS | name_map("layers.mlp_norm=pre_feedforward_layernorm")
GPT2 = name_map("""
    embed=wte
    position_embed=wpe
    norm=ln_f
    layers.attention_norm=ln_1
    layers.attention.qkv=attn.c_attn
    layers.attention.o=attn.c_proj
    layers.mlp_norm=ln_2
    layers.mlp.up=mlp.c_fc
    layers.mlp.down=mlp.c_proj
""")
GPT_NEOX = name_map("""
    embed=embed_in
    norm=final_layer_norm
    layers.attention_norm=input_layernorm
    layers.attention.o=attention.dense
    layers.mlp_norm=post_attention_layernorm
    layers.mlp.up=mlp.dense_h_to_4h
    layers.mlp.down=mlp.dense_4h_to_h
""")
QUERY_KEY_VALUE = "gpt_neox.layers.{}.attention.query_key_value"
LLAMA_DEFAULTS = dict(tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
QWEN_DEFAULTS = dict(
    tie_word_embeddings=False,
    max_position_embeddings=32768,
    sliding_window=4096,
    use_sliding_window=False,
    max_window_layers=28,
    num_key_value_heads=32,
)
OLMO_DEFAULTS = dict(
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=2048,
    eos_token_id=50279,
    pad_token_id=1,
)
GEMMA_DEFAULTS = dict(head_dim=256, pad_token_id=0, eos_token_id=1, bos_token_id=2)
GEMMA2_DEFAULTS = GEMMA_DEFAULTS | dict(
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    sliding_window=4096,
    num_key_value_heads=4,
)
GEMMA_FIXED = dict(norm_offset=1.0, scale_embedding=True)
GEMMA2_FIELDS = name_map(
    "hidden_act=hidden_activation query_pre_attn_scalar final_logit_softcapping"
)
CAUSAL_ATTENTION = dict(use_bidirectional_attention=False)


def llama_like(changes: dict = {}) -> dict:
    """Llama's tensors, with changes."""
    return tensor_map("model.", "layers.{}.", LLAMA | changes)


EXPERT = "model.layers.{}."
EXPERTS = name_map("num_experts_per_tok output_router_logits router_aux_loss_coef")


def experts(router: str, gate: str, up: str, module: str = "mlp") -> dict:
    """Changes of Llama's names for a mixture of experts: `*` is an expert's number."""
    path = f"{module}.experts.*."
    return {
        "layers.mlp.router": router,
        "layers.mlp.gate_up": f"{path}{gate}+{path}{up}",
    }


def layer_types(raw: dict, slides: Callable[[int], bool]) -> list | None:
    """The layer_types of config.json; where it has none, those of the family's rule (layer number -> does it slide?)."""
    layers = raw.get("num_hidden_layers")
    by_rule = raw.get("layer_types") is None and raw["sliding_window"] is not None
    if not by_rule or not is_number_in(layers, 1, 9999, int):
        return raw.get("layer_types")
    return [tinylm.LAYER_TYPES[bool(slides(i))] for i in range(layers)]


def read_qwen(raw: dict) -> dict:
    """The window counts only with use_sliding_window, and for the layers from max_window_layers on."""
    if not raw["use_sliding_window"]:
        raw = raw | {"sliding_window": None}
    first = raw["max_window_layers"] or 0
    types = layer_types(raw, lambda i: i >= first)
    return dict(sliding_window=raw["sliding_window"], layer_types=types)


def write_qwen(config: Config) -> dict:
    return {"use_sliding_window": config.sliding_window is not None}


def read_gemma(raw: dict) -> dict:
    """The first files say "gelu" and mean its approximation."""
    return {"hidden_act": "gelu_pytorch_tanh"} if raw["hidden_act"] == "gelu" else {}


def read_gemma2(raw: dict) -> dict:
    """Every second layer is a full one."""
    return {"layer_types": layer_types(raw, lambda i: (i + 1) % 2)}


def read_gemma3(raw: dict) -> dict:
    """Every sixth layer is a full one, or as sliding_window_pattern says. An encoder's window is halved to each side."""
    both = bool(raw["use_bidirectional_attention"])
    types = layer_types(raw, lambda i: (i + 1) % raw["sliding_window_pattern"])
    window = raw["sliding_window"] // 2 + 1 if both else raw["sliding_window"]
    return dict(layer_types=types, causal=not both, sliding_window=window)


def write_gemma3(config: Config) -> dict:
    window = config.sliding_window
    if window is not None and not config.causal:
        window = 2 * (window - 1)
    return dict(use_bidirectional_attention=not config.causal, sliding_window=window)


def read_phi3(raw: dict) -> dict:
    """transformers takes no other scaling here."""
    kind = (raw["rope_scaling"] or {}).get("rope_type", "longrope")
    require(kind == "longrope", f"rope_scaling has rope_type = {kind!r}, expected 'longrope'")
    return {}


def write_phi3(config: Config) -> dict:
    original = (config.rope_scaling or {}).get(tinylm.ORIGINAL)
    return {tinylm.ORIGINAL: original or config.max_position_embeddings}


def read_qwen3_moe(raw: dict) -> dict:
    """The window counts only with use_sliding_window, then for all layers."""
    return {"sliding_window": raw["sliding_window"] if raw["use_sliding_window"] else None}


def read_smollm3(raw: dict) -> dict:
    """Every fourth layer has no positions, or as no_rope_layer_interval or no_rope_layers says."""
    layers, interval = raw["num_hidden_layers"], raw["no_rope_layer_interval"]
    rotates = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(layers)]
    types = raw.get("layer_types") or [
        tinylm.LAYER_TYPES[raw["use_sliding_window"] and bool(raw["sliding_window"]) and not rope]
        for rope in rotates
    ]
    window = raw["sliding_window"] if "sliding_attention" in types else None
    return dict(no_rope_layers=rotates[:layers], layer_types=types[:layers], sliding_window=window)


def read_olmo3(raw: dict) -> dict:
    """Every fourth layer is a full one."""
    return {"layer_types": layer_types(raw, lambda i: (i + 1) % 4)}


def write_olmo3(config: Config) -> dict:
    """Without these, transformers gives sliding layers its own default theta."""
    full = (
        {"rope_type": "default"} | (config.rope_scaling or {}) | {"rope_theta": config.rope_theta}
    )
    sliding = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
    return {"rope_parameters": dict(zip(tinylm.LAYER_TYPES, (full, sliding)))}


FAMILIES = {
    # The first family that can express a config is the one that an unnamed architecture is saved as.
    "qwen3": Family(
        "Qwen3",
        tensors=llama_like(),
        fields=ROTARY | BIASES | SLIDING,
        fixed=dict(qk_norm="head"),
        defaults=QWEN_DEFAULTS | dict(head_dim=128),
        read=read_qwen,
        write=write_qwen,
    ),
    "llama": Family(
        "Llama",
        tensors=llama_like(),
        fields=ROTARY | BIASES | name_map("mlp_bias"),
        defaults=LLAMA_DEFAULTS | dict(max_position_embeddings=2048),
    ),
    "mistral": Family(
        "Mistral",
        tensors=llama_like(),
        fields=ROTARY | name_map("sliding_window"),
        defaults=LLAMA_DEFAULTS
        | dict(max_position_embeddings=131072, sliding_window=4096, num_key_value_heads=8),
    ),
    "qwen2": Family(
        "Qwen2",
        tensors=llama_like(),
        fields=ROTARY | SLIDING,
        fixed=dict(attention_bias=True, attention_output_bias=False),
        defaults=QWEN_DEFAULTS,
        read=read_qwen,
        write=write_qwen,
    ),
    "gemma": Family(
        "Gemma",
        tensors=llama_like(),
        fields=ROTARY | BIASES,
        fixed=GEMMA_FIXED,
        defaults=GEMMA_DEFAULTS
        | dict(
            hidden_act="gelu_pytorch_tanh", max_position_embeddings=8192, num_key_value_heads=16
        ),
        only=CAUSAL_ATTENTION,
        read=read_gemma,
    ),
    "gemma2": Family(
        "Gemma2",
        tensors=llama_like(SANDWICH),
        fields=ROTARY | BIASES | SLIDING | GEMMA2_FIELDS | name_map("attn_logit_softcapping"),
        fixed=GEMMA_FIXED | dict(norm_position="sandwich"),
        defaults=GEMMA2_DEFAULTS
        | dict(
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, max_position_embeddings=8192
        ),
        only=CAUSAL_ATTENTION,
        read=read_gemma2,
    ),
    "gemma3_text": Family(
        "Gemma3",
        tensors=llama_like(SANDWICH),
        fields=ROTARY | BIASES | SLIDING | GEMMA2_FIELDS | name_map("rope_local_base_freq"),
        heads=DECODER_HEADS | {"classify": head_table("head.out=score", classifier_pooling="last")},
        fixed=GEMMA_FIXED | dict(norm_position="sandwich", qk_norm="head"),
        defaults=GEMMA2_DEFAULTS
        | dict(
            max_position_embeddings=131072,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            sliding_window_pattern=6,
            use_bidirectional_attention=False,
        ),
        only=dict(attn_logit_softcapping=None),
        read=read_gemma3,
        write=write_gemma3,
        class_endings={None: "TextModel", "classify": "TextForSequenceClassification"},
    ),
    "gpt2": Family(
        "GPT2",
        tensors=tensor_map("transformer.", "h.{}.", GPT2, in_layer=Transposed),
        fields=COMMON
        | name_map("""
            hidden_size=n_embd num_hidden_layers=n_layer num_attention_heads=n_head intermediate_size=n_inner
            norm_eps=layer_norm_epsilon max_position_embeddings=n_positions hidden_act=activation_function
            attention_dropout=attn_pdrop hidden_dropout=resid_pdrop embedding_dropout=embd_pdrop
        """),
        prefix="transformer.",
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
        only=dict(
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        ),
        aliases=name_map("""
            hidden_size=n_embd max_position_embeddings=n_positions num_attention_heads=n_head
            num_hidden_layers=n_layer
        """),
        drop="transformer.h.*.attn.bias transformer.h.*.attn.masked_bias",
        class_endings={"lm": "LMHeadModel"},
    ),
    "phi3": Family(
        "Phi3",
        tensors=llama_like(
            name_map("layers.attention.qkv=self_attn.qkv_proj layers.mlp.gate_up=mlp.gate_up_proj")
        ),
        fields=ROTARY
        | name_map("""
            sliding_window partial_rotary_factor hidden_dropout=resid_pdrop embedding_dropout=embd_pdrop
        """),
        defaults=LLAMA_DEFAULTS
        | dict(
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            eos_token_id=32000,
            pad_token_id=32000,
        ),
        read=read_phi3,
        write=write_phi3,
    ),
    "olmo2": Family(
        "Olmo2",
        tensors=llama_like(OUTPUT_NORMS),
        fields=ROTARY | BIASES,
        fixed=dict(norm_position="output", qk_norm="full"),
        defaults=OLMO_DEFAULTS,
    ),
    "olmo3": Family(
        "Olmo3",
        tensors=llama_like(OUTPUT_NORMS),
        fields=ROTARY | BIASES | SLIDING | name_map("rope_local_base_freq"),
        fixed=dict(norm_position="output", qk_norm="full"),
        defaults=OLMO_DEFAULTS
        | dict(rope_theta=5e5, rope_local_base_freq=5e5, sliding_window=4096),
        read=read_olmo3,
        write=write_olmo3,
    ),
    "smollm3": Family(
        "SmolLM3",
        tensors=llama_like(),
        fields=ROTARY | BIASES | SLIDING | name_map("mlp_bias no_rope_layers"),
        defaults=dict(
            max_position_embeddings=32768,
            num_key_value_heads=4,
            rope_theta=2e6,
            bos_token_id=128000,
            eos_token_id=128001,
            pad_token_id=128004,
            sliding_window=None,
            use_sliding_window=False,
            no_rope_layer_interval=4,
        ),
        read=read_smollm3,
        write=lambda config: {"use_sliding_window": "sliding_attention" in config.layer_types},
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        tensors=llama_like(experts("mlp.gate", "gate_proj", "up_proj"))
        | {"layers.{}.mlp.down": (Columns(EXPERT + "mlp.experts.*.down_proj"),)},
        fields=ROTARY
        | BIASES
        | EXPERTS
        | name_map(
            "intermediate_size=moe_intermediate_size sliding_window norm_topk_prob num_experts"
        ),
        fixed=dict(qk_norm="head"),
        defaults=dict(
            tie_word_embeddings=False,
            max_position_embeddings=32768,
            num_key_value_heads=4,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            sliding_window=4096,
            use_sliding_window=False,
        ),
        only=dict(decoder_sparse_step=1, mlp_only_layers=[]),
        aliases=name_map("num_local_experts=num_experts"),
        read=read_qwen3_moe,
        write=write_qwen,
    ),
    "mixtral": Family(
        "Mixtral",
        tensors=llama_like(experts("block_sparse_moe.gate", "w1", "w3", "block_sparse_moe"))
        | {"layers.{}.mlp.down": (Columns(EXPERT + "block_sparse_moe.experts.*.w2"),)},
        fields=ROTARY | EXPERTS | name_map("sliding_window num_experts=num_local_experts"),
        defaults=LLAMA_DEFAULTS
        | dict(
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            max_position_embeddings=131072,
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        only=dict(router_jitter_noise=0.0),
        aliases=name_map("num_experts=num_local_experts"),
    ),
    "granite": Family(
        "Granite",
        tensors=llama_like(),
        fields=ROTARY
        | BIASES
        | name_map("""
            mlp_bias embedding_multiplier attention_multiplier residual_multiplier logits_scaling
        """),
        heads=LM_ONLY | {None: head_table()},
        defaults=LLAMA_DEFAULTS | dict(max_position_embeddings=2048, attention_multiplier=1.0),
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        tensors=tensor_map("gpt_neox.", "layers.{}.", GPT_NEOX)
        | {"layers.{}.attention.qkv": (HeadByHead(QUERY_KEY_VALUE),)},
        fields=COMMON
        | BIASES
        | name_map("""
            norm_eps=layer_norm_eps rope_theta=rotary_emb_base partial_rotary_factor=rotary_pct rope_scaling
            use_parallel_residual hidden_dropout embedding_dropout=hidden_dropout
        """),
        heads={
            "lm": head_table("head.out=embed_out"),
            "classify": head_table("head.out=score"),
            None: head_table(),
        },
        prefix="gpt_neox.",
        fixed=dict(norm="layer", gated=False, mlp_bias=True),
        defaults=dict(
            hidden_act="gelu",
            max_position_embeddings=2048,
            layer_norm_eps=1e-5,
            rotary_pct=0.25,
            use_parallel_residual=True,
            attention_bias=True,
            is_decoder=False,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=2,
        ),
        only=dict(head_dim=None),
        drop="""
            gpt_neox.layers.*.attention.rotary_emb.inv_freq gpt_neox.layers.*.attention.bias
            gpt_neox.layers.*.attention.masked_bias
        """,
    ),
    "starcoder2": Family(
        "Starcoder2",
        tensors=llama_like(name_map("layers.mlp.up=mlp.c_fc layers.mlp.down=mlp.c_proj")),
        fields=ROTARY
        | name_map("""
            sliding_window norm_eps=norm_epsilon attention_bias=use_bias attention_output_bias=use_bias
            mlp_bias=use_bias hidden_dropout=residual_dropout embedding_dropout
        """),
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
    head_bias=True,
)
EMBEDDINGS = name_map("""
    embed=embeddings.word_embeddings
    position_embed=embeddings.position_embeddings
    type_embed=embeddings.token_type_embeddings
    embedding_norm=embeddings.LayerNorm
    embedding_project=embeddings_project
""")
BERT = EMBEDDINGS | name_map("""
    layers.attention.qkv=attention.self.query+attention.self.key+attention.self.value
    layers.attention.o=attention.output.dense
    layers.attention_norm=attention.output.LayerNorm
    layers.mlp.up=intermediate.dense
    layers.mlp.down=output.dense
    layers.mlp_norm=output.LayerNorm
""")
DISTILBERT = EMBEDDINGS | name_map("""
    layers.attention.qkv=attention.q_lin+attention.k_lin+attention.v_lin
    layers.attention.o=attention.out_lin
    layers.attention_norm=sa_layer_norm
    layers.mlp.up=ffn.lin1
    layers.mlp.down=ffn.lin2
    layers.mlp_norm=output_layer_norm
""")
MPNET = BERT | name_map("""
    relative_bias=encoder.relative_attention_bias
    layers.attention.qkv=attention.attn.q+attention.attn.k+attention.attn.v
    layers.attention.o=attention.attn.o
    layers.attention_norm=attention.LayerNorm
""")
MODERNBERT = name_map("""
    embed=embeddings.tok_embeddings
    embedding_norm=embeddings.norm
    norm=final_norm
    layers.attention_norm=attn_norm
    layers.attention.qkv=attn.Wqkv
    layers.attention.o=attn.Wo
    layers.mlp_norm=mlp_norm
    layers.mlp.gate_up=mlp.Wi
    layers.mlp.down=mlp.Wo
""")
MPNET_FIELDS = COMMON | name_map("""
    norm_eps=layer_norm_eps attention_dropout=attention_probs_dropout_prob
    hidden_dropout=hidden_dropout_prob embedding_dropout=hidden_dropout_prob head_dropout=classifier_dropout
""")
BERT_FIELDS = MPNET_FIELDS | name_map("type_vocab_size")
BERT_DEFAULTS = dict(
    hidden_act="gelu",
    max_position_embeddings=512,
    type_vocab_size=2,
    pad_token_id=0,
    layer_norm_eps=1e-12,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)
# position_embedding_type: transformers 4 could do more than "absolute", transformers 5 no longer reads it.
BERT_ONLY = dict(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
TIED = dict(tie_word_embeddings=True)
# As head_act: the head has the activation of the layers.
LAYERS_ACT = "hidden_act"


def encoder_heads(mlm: HeadTable, classify: HeadTable, bare: HeadTable | None = None) -> dict:
    return {
        "mlm": mlm,
        "classify": classify,
        "tokens": head_table("head.out=classifier"),
        "qa": head_table("head.out=qa_outputs"),
        None: bare or head_table(),
    }


def read_roberta(raw: dict) -> dict:
    """The table of positions begins with unused rows, up to and including that of the pad id."""
    offset = raw["pad_token_id"] + 1
    positions = raw["max_position_embeddings"] - offset
    return dict(position_offset=offset, max_position_embeddings=positions)


def write_roberta(config: Config) -> dict:
    return {"max_position_embeddings": config.max_position_embeddings + config.position_offset}


def roberta_heads(prefix: str) -> dict:
    return encoder_heads(
        mlm=head_table(
            """
            head.dense=lm_head.dense head.norm=lm_head.layer_norm head.out=lm_head.decoder
            head.out.bias=lm_head.bias
            """,
            head_act="gelu",
            head_norm=True,
        ),
        classify=head_table(
            "head.dense=classifier.dense head.out=classifier.out_proj", head_act="tanh"
        ),
        bare=head_table(f"head.dense={prefix}pooler.dense", Unused, head_act="tanh"),
    )


def read_modernbert(raw: dict) -> dict:
    """Every third layer is a full one. The window of the others is halved to each side."""
    require(raw["rope_scaling"] is None, f"rope_scaling = {raw['rope_scaling']!r}, expected none")
    window = raw["local_attention"] // 2 + 1
    rule = lambda i: i % raw["global_attn_every_n_layers"]  # noqa: E731
    return dict(
        sliding_window=window, layer_types=layer_types(raw | {"sliding_window": window}, rule)
    )


def write_modernbert(config: Config) -> dict:
    window = config.sliding_window or 1
    return dict(local_attention=2 * (window - 1), classifier_activation=config.head_act or "gelu")


def roberta(stem: str) -> Family:
    return Family(
        stem,
        tensors=tensor_map("roberta.", "encoder.layer.{}.", BERT),
        fields=BERT_FIELDS,
        heads=roberta_heads("roberta."),
        prefix="roberta.",
        fixed=ENCODER,
        defaults=BERT_DEFAULTS | dict(pad_token_id=1, bos_token_id=0, eos_token_id=2),
        only=BERT_ONLY | TIED,
        read=read_roberta,
        write=write_roberta,
        drop="roberta.embeddings.position_ids",
        copies={"lm_head.decoder.bias": "lm_head.bias"},
    )


MODERNBERT_HEAD = "head.dense=head.dense head.norm=head.norm "
# ELECTRA's discriminator finds replaced tokens: a token classifier.
DISCRIMINATOR = HeadTable(
    {
        "head.dense": (StoredName("discriminator_predictions.dense"),),
        "head.out": (SecondRow("discriminator_predictions.dense_prediction"),),
    },
    dict(head="tokens", head_act=LAYERS_ACT, id2label={0: "O", 1: "REPLACED"}, head_dropout=0.0),
)
FAMILIES |= {
    "bert": Family(
        "Bert",
        tensors=tensor_map("bert.", "encoder.layer.{}.", BERT),
        fields=BERT_FIELDS,
        heads=encoder_heads(
            mlm=head_table(
                """
                head.dense=cls.predictions.transform.dense head.norm=cls.predictions.transform.LayerNorm
                head.out=cls.predictions.decoder head.out.bias=cls.predictions.bias
                """,
                head_act=LAYERS_ACT,
                head_norm=True,
            ),
            classify=head_table(
                "head.dense=bert.pooler.dense head.out=classifier", head_act="tanh"
            ),
            bare=head_table("head.dense=bert.pooler.dense", Unused, head_act="tanh"),
        ),
        prefix="bert.",
        fixed=ENCODER,
        defaults=BERT_DEFAULTS,
        only=BERT_ONLY | TIED,
        drop="bert.embeddings.position_ids cls.seq_relationship.*",
        copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    ),
    "roberta": roberta("Roberta"),
    "xlm-roberta": roberta("XLMRoberta"),
    "camembert": roberta("Camembert"),
    "mpnet": Family(
        "MPNet",
        tensors=tensor_map("mpnet.", "encoder.layer.{}.", MPNET),
        fields=MPNET_FIELDS,
        heads=roberta_heads("mpnet."),
        prefix="mpnet.",
        fixed=ENCODER | dict(position="learned_relative", position_offset=2),
        defaults={key: value for key, value in BERT_DEFAULTS.items() if key != "type_vocab_size"}
        | dict(pad_token_id=1, bos_token_id=0, eos_token_id=2),
        # transformers computes with 32, no matter how long the table is.
        only=TIED | dict(relative_attention_num_buckets=32),
        read=lambda raw: {"max_position_embeddings": raw["max_position_embeddings"] - 2},
        write=write_roberta,
        drop="mpnet.embeddings.position_ids",
        copies={"lm_head.decoder.bias": "lm_head.bias"},
    ),
    "modernbert": Family(
        "ModernBert",
        tensors=tensor_map("model.", "layers.{}.", MODERNBERT),
        fields=COMMON
        | BIASES
        | name_map("""
            norm_eps norm_bias mlp_bias layer_types embedding_dropout hidden_act=hidden_activation
            sliding_window=local_attention rope_scaling rope_theta=global_rope_theta
            rope_local_base_freq=local_rope_theta classifier_pooling head_act=classifier_activation
            head_dense_bias=classifier_bias head_bias=decoder_bias head_dropout=classifier_dropout
        """),
        heads={
            "mlm": head_table(
                MODERNBERT_HEAD + "head.out=decoder", head_norm=True, head_dropout=0.0
            )
        }
        | {
            head: head_table(
                MODERNBERT_HEAD + "head.out=classifier", head_norm=True, head_bias=True
            )
            for head in ("classify", "tokens", "qa")
        }
        | {None: head_table(head_act=None, head_dense_bias=False)},
        fixed=dict(causal=False, norm="layer", first_norm=False, embedding_norm=True),
        defaults=dict(
            hidden_activation="gelu",
            max_position_embeddings=8192,
            norm_eps=1e-5,
            norm_bias=False,
            global_rope_theta=160000.0,
            local_rope_theta=10000.0,
            local_attention=128,
            global_attn_every_n_layers=3,
            classifier_pooling="cls",
            classifier_activation="gelu",
            classifier_bias=False,
            classifier_dropout=0.0,
            decoder_bias=True,
            cls_token_id=50281,
            bos_token_id=50281,
            eos_token_id=50282,
            pad_token_id=50283,
        ),
        only=dict(head_dim=None, sliding_window=None),
        read=read_modernbert,
        write=write_modernbert,
        drop="",
    ),
    "distilbert": Family(
        "DistilBert",
        tensors=tensor_map("distilbert.", "transformer.layer.{}.", DISTILBERT),
        fields=COMMON
        | name_map("""
            hidden_size=dim num_hidden_layers=n_layers num_attention_heads=n_heads intermediate_size=hidden_dim
            hidden_act=activation hidden_dropout=dropout embedding_dropout=dropout head_dropout=seq_classif_dropout
        """),
        heads=encoder_heads(
            mlm=head_table(
                "head.dense=vocab_transform head.norm=vocab_layer_norm head.out=vocab_projector",
                head_act=LAYERS_ACT,
                head_norm=True,
            ),
            classify=head_table("head.dense=pre_classifier head.out=classifier", head_act="relu"),
        ),
        prefix="distilbert.",
        fixed=ENCODER | dict(norm_eps=1e-12),
        defaults=dict(
            activation="gelu",
            max_position_embeddings=512,
            pad_token_id=0,
            dropout=0.1,
            attention_dropout=0.1,
            seq_classif_dropout=0.2,
        ),
        aliases=name_map("hidden_size=dim num_attention_heads=n_heads num_hidden_layers=n_layers"),
        drop="distilbert.embeddings.position_ids",
    ),
    "electra": Family(
        "Electra",
        tensors=tensor_map("electra.", "encoder.layer.{}.", BERT),
        fields=BERT_FIELDS | name_map("embedding_size"),
        heads=encoder_heads(
            mlm=head_table(
                """
                head.dense=generator_predictions.dense head.norm=generator_predictions.LayerNorm
                head.out=generator_lm_head
                """,
                head_act="gelu",
                head_norm=True,
            ),
            classify=head_table(
                "head.dense=classifier.dense head.out=classifier.out_proj", head_act="gelu"
            ),
        )
        | {"discriminator": DISCRIMINATOR},
        prefix="electra.",
        fixed=ENCODER,
        defaults=BERT_DEFAULTS | dict(embedding_size=128),
        only=BERT_ONLY,
        drop="electra.embeddings.position_ids",
        class_endings={"discriminator": "ForPreTraining"},
    ),
}

# ---- Encoder-decoders ----
BART = name_map("""
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
""")
T5_ATTENTION = name_map("""
    relative_bias=block.0.layer.0.SelfAttention.relative_attention_bias
    norm=final_layer_norm
    layers.attention.qkv=0.SelfAttention.q+0.SelfAttention.k+0.SelfAttention.v
    layers.attention.o=0.SelfAttention.o
    layers.attention_norm=0.layer_norm
    layers.cross_attention.q=1.EncDecAttention.q
    layers.cross_attention.kv=1.EncDecAttention.k+1.EncDecAttention.v
    layers.cross_attention.o=1.EncDecAttention.o
    layers.cross_attention_norm=1.layer_norm
""")
CLASSIFICATION_HEAD = "head.dense=classification_head.dense head.out=classification_head.out_proj"
# feed_forward_proj -> (gated, hidden_act)
T5_ACTIVATIONS = {
    **{name: (False, name) for name in tinylm.ACTIVATIONS},
    **{f"gated-{name}": (True, name) for name in tinylm.ACTIVATIONS},
    "gated-gelu": (True, "gelu_new"),
}


def encoder_decoder(embedding: str, encoder: dict, decoder: dict) -> dict:
    """The tensors of two stacks with one embedding."""
    encoder = {f"encoder.{ours}": theirs for ours, theirs in encoder.items()}
    return {"embed": (StoredName(embedding),)} | encoder | decoder


def t5_stack(side: str, mlp: int) -> dict:
    """Encoder or decoder of T5, whose sub-layers are numbered: the MLP has the number `mlp`."""
    modules = name_map(f"""
        layers.mlp.up={mlp}.DenseReluDense.wi
        layers.mlp.gate_up={mlp}.DenseReluDense.wi_0+{mlp}.DenseReluDense.wi_1
        layers.mlp.down={mlp}.DenseReluDense.wo
        layers.mlp_norm={mlp}.layer_norm
    """)
    return tensor_map(f"{side}.", "block.{}.layer.", T5_ATTENTION | modules)


def read_t5(raw: dict) -> dict:
    """feed_forward_proj says whether the MLP is gated. The logits are scaled unless tie_word_embeddings is false."""
    name = raw["feed_forward_proj"]
    require(
        name in T5_ACTIVATIONS,
        f"feed_forward_proj = {name!r}, expected one of {', '.join(T5_ACTIVATIONS)}",
    )
    gated, act = T5_ACTIVATIONS[name]
    for key, value in (("is_gated_act", gated), ("dense_act_fn", act)):
        require(raw[key] in (None, value), f"{key} = {raw[key]!r}, expected {value} with {name}")
    scaled = raw["scale_decoder_outputs"]
    layers = raw["num_decoder_layers"]
    return dict(
        gated=gated,
        hidden_act=act,
        scale_logits=raw.get("tie_word_embeddings") is not False if scaled is None else scaled,
        num_hidden_layers=raw.get("num_layers") if layers is None else layers,
    )


def read_mt5(raw: dict) -> dict:
    """Its logits are never scaled."""
    return read_t5(raw | {"scale_decoder_outputs": False})


def write_t5(config: Config) -> dict:
    wanted = config.gated, config.hidden_act
    names = [name for name, meaning in T5_ACTIVATIONS.items() if meaning == wanted]
    return {"feed_forward_proj": names[0] if names else config.hidden_act}


def read_marian(raw: dict) -> dict:
    size = raw["decoder_vocab_size"]
    expected = raw.get("vocab_size")
    require(size in (None, expected), f"decoder_vocab_size = {size!r}, expected {expected}")
    return {}


def read_m2m100(raw: dict) -> dict:
    """Its sinusoids begin after the pad id, and reach the largest period one channel earlier than Marian's."""
    half = raw["d_model"] // 2
    require(raw["d_model"] % 2 == 0 and half > 1, f"d_model = {raw['d_model']}, expected it even")
    return dict(position_offset=raw["pad_token_id"] + 1, rope_theta=10000 ** (half / (half - 1)))


def bart_like(
    stem: str,
    lm_ending: str = "ForConditionalGeneration",
    lm: HeadTable | None = None,
    heads: dict = {},
    **rest,
) -> Family:
    sides = "model.encoder.", "model.decoder."
    output = {
        "head.out": (StoredName("lm_head"),),
        "head.out.bias": (RowVector("final_logits_bias"),),
    }
    return Family(
        stem,
        tensors=encoder_decoder(
            "model.shared", *(tensor_map(side, "layers.{}.", BART) for side in sides)
        ),
        fields=COMMON
        | name_map("""
            scale_embedding decoder_start_token_id hidden_size=d_model hidden_act=activation_function
            num_hidden_layers=decoder_layers num_encoder_layers=encoder_layers
            num_attention_heads=decoder_attention_heads encoder_attention_heads
            intermediate_size=decoder_ffn_dim encoder_intermediate_size=encoder_ffn_dim
            hidden_dropout=dropout embedding_dropout=dropout
        """),
        heads={"lm": lm or HeadTable(output, {})} | heads,
        aliases=name_map("""
            hidden_size=d_model num_attention_heads=encoder_attention_heads num_hidden_layers=encoder_layers
        """),
        copies={f"{side}embed_tokens.weight": "model.shared.weight" for side in sides},
        class_endings={"lm": lm_ending},
        **rest,
    )


def t5_like(stem: str, defaults: dict = {}, fields: dict = {}, **rest) -> Family:
    return Family(
        stem,
        tensors=encoder_decoder("shared", t5_stack("encoder", mlp=1), t5_stack("decoder", mlp=2)),
        fields=COMMON
        | name_map("""
            decoder_start_token_id relative_attention_num_buckets relative_attention_max_distance
            hidden_size=d_model head_dim=d_kv intermediate_size=d_ff num_encoder_layers=num_layers
            num_hidden_layers=num_decoder_layers num_attention_heads=num_heads norm_eps=layer_norm_epsilon
            head_dropout=dropout_rate hidden_dropout=dropout_rate embedding_dropout=dropout_rate
            attention_dropout=dropout_rate hidden_act=feed_forward_proj
        """)
        | fields,
        heads=LM_ONLY
        | {
            "classify": head_table(
                CLASSIFICATION_HEAD,
                body="transformer.",
                head_act="tanh",
                head_bias=True,
                head_dropout=0.0,
            )
        },
        prefix="",
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
        )
        | defaults,
        only=SEQ2SEQ_ONLY,
        aliases=name_map("""
            hidden_size=d_model head_dim=d_kv num_attention_heads=num_heads num_hidden_layers=num_layers
        """),
        write=write_t5,
        drop="*decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
        copies=dict.fromkeys(
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"
        ),
        unstored_head_is_tied=True,
        class_endings={"lm": "ForConditionalGeneration"},
        **rest,
    )


SEQ2SEQ = ENCODER | dict(causal=True, norm_eps=1e-5, position_offset=2)
SEQ2SEQ_ONLY = dict(is_decoder=False)
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
        heads={"classify": head_table(CLASSIFICATION_HEAD, head_act="tanh")},
        fixed=SEQ2SEQ,
        defaults=BART_DEFAULTS | dict(decoder_start_token_id=2),
        only=SEQ2SEQ_ONLY,
    ),
    "mbart": bart_like(
        "MBart",
        fixed=SEQ2SEQ | dict(norm_position="pre", final_norm=True),
        defaults=BART_DEFAULTS,
        only=SEQ2SEQ_ONLY,
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
        only=SEQ2SEQ_ONLY | dict(share_encoder_decoder_embeddings=True),
        read=read_marian,
        drop="model.encoder.embed_positions.weight model.decoder.embed_positions.weight",
    ),
    "m2m_100": bart_like(
        "M2M100",
        lm=LM_ONLY["lm"],
        fixed=SEQ2SEQ
        | dict(
            position="sinusoidal",
            embedding_norm=False,
            norm_position="pre",
            final_norm=True,
            head_bias=False,
        ),
        defaults=dict(
            activation_function="relu",
            max_position_embeddings=1024,
            scale_embedding=True,
            dropout=0.1,
            attention_dropout=0.1,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
        ),
        only=SEQ2SEQ_ONLY,
        read=read_m2m100,
        drop="model.encoder.embed_positions.weight* model.decoder.embed_positions.weight*",
    ),
    "t5": t5_like(
        "T5",
        fields=name_map("scale_logits=scale_decoder_outputs"),
        defaults=dict(scale_decoder_outputs=None),
        read=read_t5,
    ),
    "mt5": t5_like("MT5", defaults=dict(feed_forward_proj="gated-gelu"), read=read_mt5),
    # An architecture that no other family can express keeps our own names; only tinylm loads it.
    "tinylm": Family(
        "TinyLM",
        tensors={},
        fields={f.name: f.name for f in fields(Config) if f.name not in ("model_type", "id2label")},
        heads=dict.fromkeys(CLASS_ENDINGS, head_table()),
        prefix="",
        class_endings=dict.fromkeys(CLASS_ENDINGS, ""),
    ),
}

# ---- config.json ----
# Keys that change no output. First those of transformers' classes, then those of older files and other tools.
NO_EFFECT = set(
    """
    activation_dropout architectures attn_implementation chunk_size_feed_forward classifier_dropout
    decoder_layerdrop deterministic_flash_attn dtype encoder_layerdrop id2label init_std
    initializer_cutoff_factor initializer_factor initializer_range label2id mlp_dropout model_type num_labels output_attentions output_hidden_states pretraining_tp qa_dropout
    reorder_and_upcast_attn return_dict sinusoidal_pos_embds sparse_pred_ignore_index sparse_prediction
    summary_activation summary_first_dropout
    summary_last_dropout summary_proj_to_labels summary_type summary_use_proj torch_dtype
    transformers_version use_cache

    auto_map cache_implementation directionality extra_pos_embeddings finetuning_task
    gradient_checkpointing is_llama_config n_ctx n_positions output_past pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type prefix
    reference_compile repad_logits_with_grad sep_token_id
    task_specific_params tie_weights_ tinylm_replaced tokenizer_class transformers.js_config unk_token_id
    """.split()
)
# Keys that transformers reads in any family -> the only supported value: other weights, configs inside of the config.
COMMON_ONLY = dict.fromkeys(
    """quantization quantization_config compression_config transformers_weights per_layer_config
    text_config decoder generator""".split()
)
# Keys that it reads in any family with a causal mask and a cache.
CAUSAL_ONLY = dict(
    is_causal=True, attention_chunk_size=None, kv_sharing_modes=None, sliding_window=None
)


def normalize_hf_config(family: Family, raw: dict, place: str) -> dict:
    """A config.json with the family's defaults and one name and one form of everything.

    Warns once of all keys that are ignored. Raises Error, beginning with `place`, for a value that is not supported.
    """
    raw = family.defaults | raw
    merge_aliases(family, raw, place)
    ignored = []
    if "rope_scaling" in family.fields:
        ignored += flatten_rope(family, raw, place)
    if is_number_in(raw.get("num_labels"), 1, 2**16, int) and not raw.get("id2label"):
        raw["id2label"] = {i: f"LABEL_{i}" for i in range(raw["num_labels"])}
    only = supported_values(family, raw)
    expected = NO_EFFECT | onnxlm.GENERATION | {*family.fields.values(), *family.defaults}
    for key, value in raw.items():
        if key in only:
            require(
                value in (None, only[key]),
                f"{place}: {key} = {value!r} is not supported (supported: {only[key]!r})",
            )
        elif key not in expected and key[:1] != "_" and value not in (None, False, "", [], {}):
            ignored.append(key)
    refuse_remote_code(family, raw, place)
    if ignored:
        names = ", ".join(ignored)[:1000]
        warnings.warn(f"{place}: ignored, as it changes nothing here: {names}", stacklevel=3)
    return raw


def merge_aliases(family: Family, raw: dict, place: str):
    """Moves the values of second names of a key to the key. Both may be there with the same value."""
    for alias, key in family.aliases.items():
        value = raw.pop(alias, None)
        current = raw.get(key)
        if current is None or current == family.defaults.get(key):
            raw[key] = current if value is None else value
        # Distilled encoder-decoders have a wrong num_hidden_layers; their tensors tell.
        require(
            value in (None, raw[key]) or alias == "num_hidden_layers",
            f"{place}: {alias} = {value!r} and {key} = {current!r}, expected the same",
        )


def supported_values(family: Family, raw: dict) -> dict:
    """Keys that transformers reads for the family and this file does not -> the only supported value, beside null."""
    only = COMMON_ONLY | {"is_encoder_decoder": "num_encoder_layers" in family.fields}
    if family.fixed.get("causal", True):
        layer_type = tinylm.LAYER_TYPES[raw.get("sliding_window") is not None]
        only |= CAUSAL_ONLY | {"layer_types": [layer_type] * len(raw.get("layer_types") or ())}
    read = family.fields.values()
    return {key: value for key, value in only.items() if key not in read} | family.only


def refuse_remote_code(family: Family, raw: dict, place: str):
    """Refuses a model class in the repository, unless transformers has it by now: a class of the same name."""
    own = [*map(family.architecture, CLASS_ENDINGS)]
    for auto_class, code in (raw.get("auto_map") or {}).items():
        require(
            not auto_class.startswith("AutoModel") or str(code).split(".")[-1] in own,
            f"{place}: auto_map has {auto_class} = {code!r}, expected no model code of its own",
        )


def flatten_rope(family: Family, raw: dict, place: str) -> list:
    """Rewrites rotary positions in place as `rope_theta`, `partial_rotary_factor` and `rope_scaling` for the rest.

    As in transformers, `rope_scaling` takes precedence over the `rope_parameters` of version 5, and keys inside of them
    over keys beside them, except for the original length. Returns the keys that the rope_type ignores.
    """
    rope = raw.pop("rope_parameters", None) or {}
    scaling = raw.get("rope_scaling") or {}
    for value in (rope, scaling):
        require(isinstance(value, dict), f"{place}: rope_scaling = {value!r}, expected an object")
    original_beside = raw.pop(tinylm.ORIGINAL, None)
    local = family.fields.get("rope_local_base_freq")
    if local in family.defaults:
        rope = full_attention_rope(raw, rope, local, place) | scaling
        # In this family transformers reads neither.
        original_beside = None
        rope.pop("truncate", None)
    elif scaling:
        rope = scaling
    rope = {key: value for key, value in rope.items() if value is not None}
    for name in ("rope_theta", "partial_rotary_factor"):
        key = family.fields.get(name, name)
        raw[key] = rope.pop(name, raw.get(key))
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(
        rope.pop("type", kind) == kind,
        f"{place}: rope_scaling has rope_type = {kind!r} and another type",
    )
    # Phi-3's first names of it
    if "long_factor" in rope and kind in ("su", "yarn"):
        kind = rope["rope_type"] = "longrope"
    # Config refuses an unknown type.
    if not isinstance(kind, str) or kind not in tinylm.ROPE_KEYS:
        raw["rope_scaling"] = rope | {"rope_type": kind}
        return []
    if kind in tinylm.ROPE_OPTIONS:
        if original_beside is not None:
            rope[tinylm.ORIGINAL] = original_beside
        complete_rope(rope, kind, raw["max_position_embeddings"], place)
    used = {"rope_type", *tinylm.ROPE_KEYS[kind], *tinylm.ROPE_OPTIONS.get(kind, ())}
    kept = {key: value for key, value in rope.items() if key in used}
    raw["rope_scaling"] = None if kind == "default" else kept | {"rope_type": kind}
    return [f"{key} of rope_scaling" for key in rope if key not in used]


def complete_rope(rope: dict, kind: str, length: int, place: str):
    """Checks a scaling that depends on the original length, and adds the factor that yarn may leave out."""
    original = rope.get(tinylm.ORIGINAL, length)
    require(
        is_number_in(original, 1, 2**31),
        f"{place}: {tinylm.ORIGINAL} = {original!r}, expected a size",
    )
    if kind == "yarn":
        rope.setdefault("factor", length / original)
    elif kind == "longrope":
        rope[tinylm.ORIGINAL] = original
    else:
        low, high = rope.get("low_freq_factor", 0), rope.get("high_freq_factor", 1e9)
        require(low < high, f"{place}: low_freq_factor = {low}, expected less than {high}")


def full_attention_rope(raw: dict, rope: dict, local: str, place: str) -> dict:
    """The part of Gemma 3's `rope_parameters` for full layers; its sliding layers only have a theta, written to raw as
    `local`."""
    unknown = [key for key in rope if key not in tinylm.LAYER_TYPES]
    require(not unknown, f"{place}: rope_parameters has {unknown}, expected {tinylm.LAYER_TYPES}")
    full, sliding = (dict(rope.get(layer_type) or {}) for layer_type in tinylm.LAYER_TYPES)
    raw[local] = sliding.pop("rope_theta", raw[local])
    scaled = {key: value for key, value in sliding.items() if value != "default"}
    require(
        not scaled,
        f"{place}: rope_parameters of sliding_attention = {scaled} is not supported "
        "(supported: rope_type 'default')",
    )
    return full


# model_type of a model with a text model inside -> the text model's type and sizes, where its text_config lacks them
MULTIMODAL = {
    "gemma3": dict(
        model_type="gemma3_text",
        vocab_size=262208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
    ),
    "llava": dict(
        model_type="llama",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "mistral3": dict(
        model_type="mistral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
}
SHARED_KEYS = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", *COMMON_ONLY)


def text_config(raw: dict, file: str) -> dict:
    """The config of the text model in a multimodal config.json. Any other config.json is returned as it is."""
    if raw.get("model_type") not in [*MULTIMODAL]:
        return raw
    text = raw.get("text_config")
    require(isinstance(text, dict), f"{file}: text_config = {text!r}, expected an object")
    shared = {key: raw[key] for key in SHARED_KEYS if key in raw and key != "text_config"}
    return MULTIMODAL[raw["model_type"]] | text | shared | {"architectures": None}


def text_names(names: KeysView[str], place: Path) -> dict[str, str]:
    """Stored name -> its name in a text model. Other tensors of a multimodal model are left out, with one warning."""
    found = {}
    for name in names:
        inner = name.removeprefix("model.")
        if inner.startswith("language_model."):
            rest = inner.removeprefix("language_model.")
            found[name] = (
                rest if rest.startswith("lm_head.") else f"model.{rest.removeprefix('model.')}"
            )
        elif name.startswith("lm_head."):
            found[name] = name
    if all(name.startswith("lm_head.") for name in found):
        return {name: name for name in names}
    parts = sorted({name.removeprefix("model.").split(".")[0] for name in names - found.keys()})
    if parts:
        warnings.warn(f"{place}: only the text model is read, not {', '.join(parts)}", stacklevel=4)
    return found


# Cleared, so that a key that is missing in config.json does not get our own default.
NO_DEFAULTS = dict.fromkeys(
    ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "qk_norm")
)


def config_from_hf(raw: dict, file: str = "config.json", head="config") -> Config:
    """The Config that a config.json describes, as transformers 4 or 5 wrote it, with the head of its `architectures` or
    another one (a key of the family's heads).

    Warns of keys that are ignored because they change nothing. Raises Error, beginning with `file`, for an unknown
    model_type and for any key that changes the outputs in a way that is not supported.
    """
    raw = text_config(raw, file)
    name = raw.get("model_type")
    require(
        name in [*FAMILIES],
        f"{file}: model_type = {name!r} is not supported (supported: "
        f"{', '.join((*FAMILIES, *MULTIMODAL))})",
    )
    family = FAMILIES[name]
    try:
        if head == "config":
            architectures = raw.get("architectures") or [None]
            head = raw.get("head", "lm") if name == "tinylm" else family.head_of(architectures[0])
        require(
            head in family.heads,
            f"{file}: head = {head!r} is not supported for {name} (supported: "
            f"{', '.join(map(str, family.heads))})",
        )
        raw = normalize_hf_config(family, raw, f"{file}, model_type {name}")
        given = {ours: raw[key] for ours, key in family.fields.items() if raw.get(key) is not None}
        own = family.heads[head].config
        values = NO_DEFAULTS | given | family.fixed | family.read(raw) | {"head": head} | own
        if values.get("head_act") == LAYERS_ACT:
            values["head_act"] = values["hidden_act"]
        if raw.get("id2label"):
            values["id2label"] = raw["id2label"]
        return Config(**values | dict(model_type=name))
    except tinylm.Error as error:
        if str(error).startswith(file):
            raise
        # Config names its own field: name the key instead.
        ours, _, rest = str(error).removeprefix("config: ").partition(" ")
        raise Error(f"{file}: {family.fields.get(ours, ours)} {rest}") from None
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise Error(f"{file}: a field has a value of the wrong kind ({error})") from None


def config_to_hf(config: Config) -> dict:
    """The config.json of a Config, in the flat form that transformers 4 and 5 both read.

    Without a `model_type` it is that of the first family that can express it. Raises Error if the named family cannot.
    """
    for name in [config.model_type] if config.model_type else FAMILIES:
        family = FAMILIES[name]
        head = family.head_key(config)
        raw = {
            "architectures": [family.architecture(head)],
            "model_type": name,
            "initializer_range": config.initializer_range,
        }
        raw |= {key: getattr(config, ours) for ours, key in family.fields.items()}
        raw |= family.write(config)
        if config.id2label:
            raw["id2label"] = {str(i): label for i, label in config.id2label.items()}
            raw["label2id"] = {label: i for i, label in config.id2label.items()}
        if config.num_encoder_layers:
            raw["is_encoder_decoder"] = True
        try:
            require_same(config_from_hf(raw, "config", head), config)
            return raw
        except tinylm.Error as error:
            reason = error
    raise Error(f"{reason} cannot be written as model_type {name!r}")


def require_same(back: Config, config: Config):
    """Raises Error unless a config that was written and read again is the same, apart from what only training uses."""
    training = ("hidden_dropout", "embedding_dropout", "head_dropout", "initializer_range")
    lost = [
        f"{f.name} = {getattr(config, f.name)!r}"
        for f in fields(Config)
        if f.name not in ("model_type", *training)
        and getattr(back, f.name) != getattr(config, f.name)
    ]
    require(not lost, f"config: {', '.join(lost)}")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: the tensor tables at work, in both directions
# ---------------------------------------------------------------------------------------------------------------------
# Patterns of the files that are downloaded.
CHECKPOINT_FILES = """
    config.json generation_config.json model*.safetensors model.safetensors.index.json tokenizer.json
    tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json merges.txt
    *.model *.jinja modules.json *sentence*.json */config.json [0-9]*_*/model.safetensors
""".split()


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """The checkpoint folder of that name; otherwise a repository of the Hugging Face hub, in `huggingface_hub`'s cache.

    Files that are not in the cache are downloaded unless HF_HUB_OFFLINE is set. `revision`: a branch, tag or commit.
    Raises Error if there is neither.
    """
    name = str(name)
    if name.endswith(".gguf") and os.path.isfile(name):
        return Path(name)
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]{,95}(/[\w-][\w.-]{,95})?", name):
        require(os.path.isdir(name), f"{name}: no such folder")
        best = os.path.join(name, "best")
        require(
            os.path.exists(os.path.join(name, "config.json")) or not os.path.isdir(best),
            f"{name}: the folder of a run, expected a checkpoint in it: {best}",
        )
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


def stored_names(name: str, config: Config) -> tuple[StoredName, ...]:
    """The tensors of a checkpoint of the family that make up our tensor `name`."""
    family = FAMILIES[config.model_type]
    if not family.tensors:
        return (StoredName(name),)
    head = family.heads[family.head_key(config)]
    table = family.tensors | head.tensors
    if name in table:
        return table[name]
    # Otherwise the table has the module.
    module, _, parameter = name.rpartition(".")
    layer = next((part for part in module.split(".") if part.isdigit()), "")
    names = table.get(module.replace(f".{layer}.", ".{}."))
    require(
        names,
        f"{name}: model_type {config.model_type!r} has no such tensor; use model_type 'tinylm'",
    )
    start = "" if name.startswith("head.") else head.body
    return tuple(type(n)(f"{start}{n.format(layer)}.{parameter}") for n in names)


def every_expert(names: tuple[StoredName, ...], config: Config) -> tuple[StoredName, ...]:
    """Names with the number of each expert in the place of `*`."""
    experts = range(config.num_experts)
    return tuple(
        type(name)(name.replace("*", str(number)))
        for name in names
        for number in (experts if "*" in name else [0])
    )


def fused_sizes(name: str, config: Config) -> tuple:
    """Rows of each part of a fused projection of ours."""
    config = config.encoder if name.startswith("encoder.") else config
    sizes = {
        "qkv": config.qkv_sizes,
        "kv": config.qkv_sizes[1:],
        "gate_up": (config.intermediate_size,) * 2,
    }
    return sizes[name.split(".")[-2]]


def to_stored(name: str, tensor: Tensor, config: Config) -> dict[StoredName, Tensor]:
    """Our tensor as the family stores it, fused parts separated."""
    names = stored_names(name, config)
    parts = [tensor]
    if any("*" in name for name in names):
        names = every_expert(names, config)
        parts = tensor.chunk(len(names), names[0].axis)
    elif len(names) > 1:
        parts = tensor.split(fused_sizes(name, config))
    return {n: n.save(part, config) for n, part in zip(names, parts)}


def to_checkpoint(state: dict, config: Config) -> dict[str, Tensor]:
    """Our state dict as the family stores it."""
    prefix = FAMILIES[config.model_type].prefix if config.head is None else ""
    return {
        n.removeprefix(prefix): part.contiguous()
        for name, tensor in state.items()
        for n, part in to_stored(name, tensor, config).items()
    }


class Checkpoint:
    """The tensors of a folder or of an opened file as our state dict. Every tensor of ours must be there and fit, and none
    may be left over."""

    def __init__(self, source, config: Config, dtype, device):
        self.family = FAMILIES[config.model_type]
        self.head = self.family.head_key(config)
        self.dtype = dtype
        self.device = device
        # The file that lists all tensors: errors name it
        self.place, files = self.tensor_files(source)
        # Name in the tables -> (file, the opened file, name in the file)
        self.stored = self.canonical_names(files)
        (self.embedding,) = stored_names("embed.weight", config)
        self.output = self.output_name()
        body = self.family.heads[self.head].body
        self.copies = {
            body + name: body + original for name, original in self.family.copies.items()
        }
        # A tensor that is tied or repeated may be stored under either name.
        tied = {self.output: self.embedding} if config.tie_word_embeddings else {}
        for name, original in (self.copies | tied).items():
            if name in self.stored:
                self.stored.setdefault(original, self.stored[name])
        layers = max(config.num_hidden_layers, config.num_encoder_layers)
        number = len(self.stored)
        require(layers <= number, f"{self.place}: {number} tensors, expected {layers} layers")
        stored_dtype = getattr(source, "dtype", None)
        self.dtype = dtype or stored_dtype or self.fetch(self.embedding).dtype
        self.config = replace(config, tie_word_embeddings=self.is_tied(config))

    @staticmethod
    def tensor_files(source) -> tuple:
        """(the file that lists all tensors, tensor name -> its file: the path of a safetensors file, or an opened file)"""
        if not isinstance(source, Path):
            return source, dict.fromkeys(source.keys(), source)
        folder = source
        single = folder / "model.safetensors"
        index = folder / "model.safetensors.index.json"
        if single.exists():
            return single, dict.fromkeys(tinylm.open_tensors(single).keys(), single)
        others = sorted(
            p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5")
        )
        require(
            index.exists(),
            f"{folder}: no model.safetensors and no model.safetensors.index.json"
            + (f" ({', '.join(others)}: of a folder only safetensors is read)" if others else ""),
        )
        files = read_json(index).get("weight_map")
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

    def canonical_names(self, files: dict) -> dict:
        """Stored tensors by their names in the tables: with the prefix that bare bodies leave out, as they are called
        behind this head, and without the first BERT's gamma and beta."""
        opened = {
            file: tinylm.open_tensors(file) if isinstance(file, Path) else file
            for file in dict.fromkeys(files.values())
        }
        heads = self.head_tensors()
        names = text_names(files.keys(), self.place)
        bare = not any(name.startswith(self.family.prefix) for name in names.values())
        bodies = {table.body for table in self.family.heads.values()}
        body = self.family.heads[self.head].body
        stored = {}
        for name, new in names.items():
            file = files[name]
            new = new.replace("LayerNorm.gamma", "LayerNorm.weight")
            new = new.replace("LayerNorm.beta", "LayerNorm.bias")
            if new not in heads:
                for other in bodies:
                    new = new.removeprefix(other)
                new = body + (self.family.prefix if bare else "") + new
            stored[new] = file, opened[file], name
        return stored

    def head_tensors(self, except_head="none") -> set:
        """Names of the tensors of all heads but one."""
        names = set()
        for head, table in self.family.heads.items():
            for ours, (name,) in table.tensors.items() if head != except_head else ():
                names |= {name} if ours.endswith(".bias") else {f"{name}.weight", f"{name}.bias"}
        return names

    def output_name(self) -> str | None:
        """Name of the language model's output, which may be tied to the embedding."""
        for head in {"lm", "mlm"} & self.family.heads.keys():
            for name in self.family.heads[head].tensors.get("head.out", ()):
                return f"{name}.weight"
        return None

    def is_tied(self, config: Config) -> bool:
        """Is the output the embedding? One that is stored with other values is not, even if config.json says so."""
        if config.tied and self.output in self.stored:
            tied = torch.equal(self.fetch(self.output), self.fetch(self.embedding))
            require(
                tied or "tie_word_embeddings" not in self.family.only,
                f"{self.place}: tensor {self.output} differs from the embedding, "
                f"but model_type {config.model_type!r} ties them",
            )
            return tied
        unstored = self.output not in self.stored
        return config.tie_word_embeddings or unstored and self.family.unstored_head_is_tied

    def fetch(self, name: str, shape: tuple | None = None) -> Tensor:
        """A stored tensor, in the model's dtype on its device. Raises Error unless it is there with that shape."""
        require(
            name in self.stored,
            f"{self.place}: tensor {name} is missing"
            + (f", expected with shape {tuple(shape)}" if shape else ""),
        )
        file, opened, name_in_file = self.stored[name]
        try:
            tensor = opened.get_tensor(name_in_file)
        except SafetensorError as error:
            raise Error(f"{file}: tensor {name_in_file} is not readable ({error})") from None
        floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        require(
            tensor.dtype in floats and shape in (None, tensor.shape),
            f"{file}: tensor {name_in_file} has shape "
            f"{tuple(tensor.shape)} and dtype {tensor.dtype}, expected floats of shape {tuple(shape or ())}",
        )
        return tensor.to(self.device, self.dtype)

    def state(self, lm: tinylm.TinyLM, fresh: dict) -> dict:
        """The state dict of a model. `fresh`: our tensors for a new head, where the checkpoint has none."""
        state = {}
        used = set()
        for name, tensor in lm.state_dict().items():
            parts = to_stored(name, tensor, self.config)
            used |= parts.keys()
            missing = not parts.keys() & self.stored.keys()
            if missing and (name in fresh or any(n.optional for n in parts)):
                new = fresh.get(name, torch.zeros(tensor.shape))
                state[name] = new.to(self.device, self.dtype)
            else:
                found = [n.load(self.fetch(n, p.shape), self.config) for n, p in parts.items()]
                axis = next(iter(parts)).axis
                state[name] = torch.cat(found, axis) if len(found) > 1 else found[0].contiguous()
        self.check_copies(used)
        self.check_unexpected(used)
        return state

    def check_copies(self, used: set):
        for name in self.copies.keys() & self.stored.keys():
            original = self.copies[name]
            require(
                original not in used or torch.equal(self.fetch(name), self.fetch(original)),
                f"{self.place}: tensor {name} differs from the one that it should repeat, {original}",
            )

    def check_unexpected(self, used: set):
        """Refuses tensors that no part of the model uses, and no other head."""
        allowed = used | self.copies.keys() | self.head_tensors(self.head)
        if self.config.tied:
            allowed.add(self.output)
        patterns = self.family.drop.split()
        for name in sorted(self.stored.keys() - allowed):
            file, _, name_in_file = self.stored[name]
            require(
                any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns),
                f"{file}: tensor {name_in_file} is unexpected for model_type {self.config.model_type!r}",
            )


def open_source(path: Path):
    """A checkpoint's folder as it is, or its single file opened: an object with `keys` and `get_tensor`, as a safetensors
    file has them, and with the `dtype` of its tensors, `hf_config` and `tokenizer`."""
    if path.is_dir():
        return path
    try:
        return tinylm.beside("gguf_file").GGUF(path)
    except ImportError as error:
        raise Error(f"{path}: reading it needs `pip install {error.name}`") from None


def read_config(source) -> dict:
    """The config.json of a checkpoint folder, or what an opened file has in its place."""
    return read_json(source / "config.json") if isinstance(source, Path) else source.hf_config()


def load_model(cls, name, dtype, device, head, revision, changes: dict) -> tinylm.TinyLM:
    """TinyLM.from_pretrained."""
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
    source = open_source(folder)
    file = str(folder / "config.json" if source is folder else folder)
    raw = read_config(source)
    tinylm.check_replaced(raw, file)
    config = replace(config_from_hf(raw, file, head), **changes)
    checkpoint = Checkpoint(source, config, dtype, device)
    # A replaced part may have tensors that no checkpoint has; on the meta device they would be lost.
    with torch.device("cpu" if tinylm.replaced_leaves() else "meta"):
        lm = cls(checkpoint.config)
    fresh = {}
    if head != "config":
        lm.head = tinylm.Head(lm.config).apply(lm._init)
        fresh = lm.head.state_dict(prefix="head.")
    lm.load_state_dict(checkpoint.state(lm, fresh), assign=True)
    lm.folder = folder
    lm.tokenizer = load_tokenizer(folder) if source is folder else source.tokenizer(raw)
    lm.generation_config = onnxlm.read_generation_config(folder, raw)
    return lm.to(device).eval()


def save_model(lm: tinylm.TinyLM, folder: Path):
    """TinyLM.save_pretrained."""
    described = tinylm.describe_model(lm)
    replaced = "tinylm_replaced" in described
    config = replace(lm.config, model_type="tinylm") if replaced else lm.config
    raw = config_to_hf(config) | described
    tensors = to_checkpoint(lm.state_dict(), replace(config, model_type=raw["model_type"]))
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    ids = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    files = lm.tokenizer.files if lm.tokenizer else {}
    generation = json.dumps(lm.generation_config or ids, indent=2, sort_keys=True) + "\n"
    files = files | {"generation_config.json": generation.encode("utf-8")}
    tinylm.write_checkpoint(folder, raw, tensors, files)
