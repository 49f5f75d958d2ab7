"""GGUF files, as llama.cpp writes them: config.json, tensors under the names of a family's tables, and a tokenizer.

    lm = TinyLM.from_pretrained("model.gguf")    # opens it here

Copy it beside pretrained.py. It imports gguf, whose reader, dequantisers and names of tensors it uses.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

try:  # copied into a package, or installed
    from . import pretrained
except ImportError:  # beside each other
    import pretrained

onnxlm = pretrained.onnxlm
tinylm = pretrained.tinylm
Error = pretrained.Error
require = pretrained.require
QWEN2_WORDS = pretrained.QWEN2_WORDS

# general.architecture -> model_type
FAMILIES = pretrained.name_map("""
    llama qwen2 qwen3 qwen3moe=qwen3_moe gemma gemma2 gemma3=gemma3_text granite smollm3 olmo2 phi3 starcoder2 gpt2
""")
# Config field -> key behind the architecture's name
FIELDS = pretrained.name_map("""
    num_hidden_layers=block_count max_position_embeddings=context_length hidden_size=embedding_length
    intermediate_size=feed_forward_length num_attention_heads=attention.head_count
    num_key_value_heads=attention.head_count_kv head_dim=attention.key_length rope_theta=rope.freq_base
    sliding_window=attention.sliding_window attn_logit_softcapping final_logit_softcapping
    num_experts=expert_count num_experts_per_tok=expert_used_count embedding_multiplier=embedding_scale
    residual_multiplier=residual_scale logits_scaling=logit_scale attention_multiplier=attention.scale
""")
# Architectures whose q and k llama.cpp stores with the two halves of each head interleaved
INTERLEAVED = ("llama", "granite", "smollm3")
ROPE_FACTORS = {f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short")}
# tokenizer.ggml.pre -> the pattern that splits words before BPE, or None for that of GPT-2
LLAMA3_WORDS = QWEN2_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")
DIGITS = r"\p{N}"
WORDS = {
    **dict.fromkeys(("default", "gpt-2", "mpt", "olmo", "phi-2"), None),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), LLAMA3_WORDS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), QWEN2_WORDS),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), DIGITS),
}


class Reader(gguf.GGUFReader):
    def __setattr__(self, name: str, value):
        # It slices its memory map for each token, which takes a third of the time where that is a plain array.
        super().__setattr__(name, np.asarray(value) if name == "data" else value)


class GGUF:
    """An opened GGUF file. `keys` and `get_tensor` are those of a safetensors file, with the names of a family's tables.

    Raises Error for a file that cannot be read, and for an architecture that has no row here.
    """

    # What tensors are dequantised to.
    dtype = torch.float32

    def __init__(self, path: Path):
        try:
            reader = Reader(path)
        except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
            raise Error(f"{path}: not a readable GGUF file ({error})") from None
        self.path = path
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self.get("general.architecture")
        require(
            self.architecture in [*FAMILIES],
            f"{path}: general.architecture = {self.architecture!r} is not supported (supported: {', '.join(FAMILIES)})",
        )
        require(self.get("split.count", 0) < 2, f"{path}: one of several parts; merge them first")
        self.family = pretrained.FAMILIES[FAMILIES[self.architecture]]
        self.layers = self.size(".block_count", 9999)
        self.names = self.canonical_names()

    def __str__(self) -> str:
        return str(self.path)

    def get(self, key: str, default=None):
        """A value of the metadata; a key that begins with a dot belongs to the architecture."""
        name = self.architecture + key if key.startswith(".") else key
        value = self.fields[name].contents() if name in self.fields else default
        # The decimal number that was rounded to float32
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def size(self, key: str, limit: int = 2**31) -> int:
        value = self.get(key)
        require(
            tinylm.is_number_in(value, 1, limit, int),
            f"{self}: {self.architecture}{key} = {value!r}, expected 1 to {limit}",
        )
        return value

    def canonical_names(self) -> dict[str, tuple]:
        """Name in the family's tables -> (name here, expert or None). Unknown tensors keep their names."""
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], self.layers)
        modules = self.family.tensors | self.family.heads["lm"].tensors
        known = {}
        for ours, names in modules.items():
            for layer in range(self.layers) if "{}" in ours else [0]:
                for name in names:
                    theirs = table.get_name(name.format(layer).replace(".*", ""))
                    for end in (".weight", ".bias"):
                        known[f"{theirs}{end}"] = name.format(layer) + end
        names = {}
        for theirs in self.tensors.keys() - ROPE_FACTORS:
            name = known.get(theirs, theirs)
            experts = range(len(self.tensors[theirs].data)) if "*" in name else [None]
            names |= {name.replace("*", str(i)): (theirs, i) for i in experts}
        return names

    def keys(self):
        return self.names.keys()

    def values(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise Error(f"{self}: tensor {name} is not readable ({error})") from None
        # Floats are still those of the file, which cannot be written to.
        return np.require(values, np.float32, "W")

    def get_tensor(self, name: str) -> Tensor:
        theirs, expert = self.names[name]
        x = torch.from_numpy(self.values(theirs))
        x = x if expert is None else x[expert]
        if self.architecture in INTERLEAVED and re.search(r"[qk]_proj\.", name):
            key = ".attention.head_count" + ("_kv" if "k_proj" in name else "")
            heads = self.get(key) or self.get(".attention.head_count")
            require(
                len(x) % (2 * heads) == 0,
                f"{self}: tensor {theirs} has shape {tuple(x.shape)}, expected an even number of rows for each of {heads} heads",
            )
            x = x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            x = x - 1
        gpt2 = self.architecture == "gpt2" and ".h." in name
        return x.t() if gpt2 and x.ndim == 2 else x

    def hf_config(self) -> dict:
        """The config.json that the metadata means."""
        keys = self.family.fields
        raw = {"model_type": FAMILIES[self.architecture]}
        for ours, name in FIELDS.items():
            if ours in keys and self.get(f".{name}") is not None:
                raw[keys[ours]] = self.get(f".{name}")
        eps = self.get(".attention.layer_norm_epsilon")
        raw[keys["norm_eps"]] = self.get(".attention.layer_norm_rms_epsilon", eps)
        require(
            raw[keys["norm_eps"]] is not None,
            f"{self}: {self.architecture}.attention.layer_norm_rms_epsilon is missing",
        )
        if "num_experts" in keys:
            raw[keys["intermediate_size"]] = self.get(".expert_feed_forward_length")
        require("token_embd.weight" in self.tensors, f"{self}: tensor token_embd.weight is missing")
        raw["vocab_size"] = int(self.tensors["token_embd.weight"].shape[-1])
        raw["tie_word_embeddings"] = "output.weight" not in self.tensors
        for ours, tensor in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_down")):
            if ours in keys:
                raw[keys[ours]] = f"blk.0.{tensor}.bias" in self.tensors
        heads, width = self.size(".attention.head_count"), self.size(".embedding_length")
        head_dim = raw.get("head_dim") or width // heads
        if "query_pre_attn_scalar" in keys:
            # llama.cpp knows the largest Gemmas, which have another scale, by their layers.
            large = (self.architecture, self.layers) in (("gemma2", 46), ("gemma3", 62))
            raw["query_pre_attn_scalar"] = width // heads if large else head_dim
        if "partial_rotary_factor" in keys:
            raw["partial_rotary_factor"] = self.get(".rope.dimension_count", head_dim) / head_dim
        if "rope_scaling" in keys:
            raw["rope_scaling"] = self.rope_scaling()
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            raw[f"{ours}_token_id"] = self.get(f"tokenizer.ggml.{theirs}_token_id")
        turn = self.get("tokenizer.ggml.eot_token_id")
        if turn not in (None, raw["eos_token_id"]):
            raw["eos_token_id"] = [raw["eos_token_id"], turn]
        return raw

    def rope_scaling(self) -> dict | None:
        """Also Llama 3's scaling, which is stored as one list of factors."""
        kind = self.get(".rope.scaling.type", "none")
        original = self.get(".rope.scaling.original_context_length", self.get(".context_length"))
        attention = self.get(".rope.scaling.attn_factor")
        if "rope_freqs.weight" in self.tensors:
            kind, attention = "longrope", 1.0
            short = long = self.values("rope_freqs.weight").tolist()
        elif "rope_factors_short.weight" in self.tensors:
            kind = "longrope"
            short, long = (
                self.values(f"rope_factors_{n}.weight").tolist() for n in ("short", "long")
            )
        if kind == "none":
            return None
        scaling = {"rope_type": kind, tinylm.ORIGINAL: original}
        if kind == "longrope":
            return scaling | dict(short_factor=short, long_factor=long, attention_factor=attention)
        return scaling | {"factor": self.get(".rope.scaling.factor")}

    def tokenizer(self, raw: dict) -> onnxlm.Tokenizer | None:
        """The tokenizer in the file; None with a warning where its rules are not known. `raw`: from `hf_config`."""
        kind = self.get("tokenizer.ggml.model")
        words = self.get("tokenizer.ggml.pre", "default")
        if kind is None:
            return None
        if kind not in ("gpt2", "llama") or kind == "gpt2" and words not in [*WORDS]:
            warnings.warn(
                f"{self}: no tokenizer, as tokenizer.ggml.model = {kind!r} with tokenizer.ggml.pre = {words!r} "
                "is not supported",
                stacklevel=4,
            )
            return None
        try:
            return onnxlm.Tokenizer(self.tokenizer_files(kind, words), raw)
        except ImportError:
            raise Error(f"{self}: reading it needs `pip install tokenizers`") from None
        except Exception as error:  # the library raises plain Exception
            raise Error(f"{self}: not a readable tokenizer ({error!r})") from None

    def tokenizer_files(self, kind: str, words: str) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json"""
        from tokenizers import Tokenizer as Backend
        from tokenizers import models

        read = lambda key, default=None: self.get(f"tokenizer.ggml.{key}", default)
        tokens = read("tokens")
        types = read("token_type") or [1] * len(tokens)
        vocab = {token: i for i, token in enumerate(tokens)}
        names = pretrained.name_map(
            "bos_token=bos eos_token=eos unk_token=unknown pad_token=padding"
        )
        ids = {ours: read(f"{name}_token_id") for ours, name in names.items()}
        special = {name: tokens[i] for name, i in ids.items() if i is not None}
        backend = Backend(models.BPE())
        if kind == "gpt2":
            merges = [merge.split(" ") for merge in read("merges")]
            byte_level_steps(backend, WORDS[words])
            options = {"ignore_merges": WORDS[words] == LLAMA3_WORDS}
        else:
            merges = merges_of(vocab, read("scores"))
            options = sentencepiece_steps(backend, read("add_space_prefix", True), special)
        ends = {f"add_{name}_token": read(f"add_{name}_token") for name in ("bos", "eos")}
        if ends["add_bos_token"] is None:
            ends["add_bos_token"] = kind == "llama"
        if around := pretrained.post_processor("", ends, special, vocab):
            backend.post_processor = around
        # Token types: 3 control, 4 defined by the user.
        added = [
            {"id": i} | tinylm.added_token(token, special=types[i] == 3)
            for i, token in enumerate(tokens)
            if types[i] in (3, 4)
        ]
        model = {"type": "BPE"} | tinylm.BPE_OPTIONS | options | {"vocab": vocab, "merges": merges}
        spec = json.loads(backend.to_str()) | {"added_tokens": added, "model": model}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if template := self.get("tokenizer.chat_template"):
            config["chat_template"] = template
        files = {"tokenizer.json": spec, "tokenizer_config.json": config | special}
        return {name: json.dumps(x, ensure_ascii=False).encode() for name, x in files.items()}


def byte_level_steps(backend, words: str | None):
    from tokenizers import Regex, pre_tokenizers

    qwen = words == QWEN2_WORDS
    pretrained.byte_level_pipeline(backend, "Qwen2Tokenizer" if qwen else "GPT2Tokenizer", {}, {})
    if words and not qwen:
        # GPT-2's own pattern goes after that of single digits.
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words == DIGITS)
        split = pre_tokenizers.Split(Regex(words), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])


def sentencepiece_steps(backend, prefix: bool, special: dict) -> dict:
    """Returns the options of the model. `prefix`: a space goes before each text."""
    from tokenizers import decoders, normalizers

    options = pretrained.sentencepiece_pipeline(backend, "GemmaTokenizer", {}, special)
    if prefix:
        begin, strip = normalizers.Prepend("▁"), decoders.Strip(" ", 1)
        backend.normalizer = normalizers.Sequence([begin, backend.normalizer])
        backend.decoder = decoders.Sequence([backend.decoder, strip])
    return options


def merges_of(vocab: dict[str, int], scores: list[float]) -> list:
    """SentencePiece joins the pair whose joined token has the best score: those pairs, best first."""
    merges = []
    for token in sorted(vocab, key=lambda token: (-scores[vocab[token]], vocab[token])):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [[left, right] for left, right in cuts if left in vocab and right in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges
