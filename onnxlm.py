"""Runs an exported folder under ONNX Runtime: numpy, onnxruntime and tokenizers; no torch. Copy it into your app.

from onnxlm import OnnxLM
for piece in OnnxLM("smollm2").stream("The capital of France is"): print(piece, end="")

python onnxlm.py FOLDER INPUT...
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import io
import itertools
import json
import math
import numbers
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
SUFFIXES = {  # precision -> end of its files' names in onnx/
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_quantized",
    "int4": "_q4",
    "q4f16": "_q4f16",
}
CUDA_PRECISIONS = (
    "fp32",
    "fp16",
    "q4f16",
)  # whose nodes all run there: queries are grouped on CUDA in 16 bits only
VERIFIED_PROVIDERS = {CPU, CUDA, "TensorrtExecutionProvider"}  # others are compared with the CPU
MIN_ONNXRUNTIME = (1, 24)  # before, onnxruntime runs some graphs wrongly


class Error(ValueError):
    """What the caller gave cannot be used, or what was written failed its check: one line that says which."""


def require(ok, message: str):
    if not ok:
        raise Error(message)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_number_in(value, low, high, kind=numbers.Real) -> bool:
    """Is it a number from low to high (not a bool, which Python counts among the ints)?"""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


Size = Annotated[int, 1, 2**31]
Count = Annotated[int, 0, 2**31]
Id = Annotated[int, -1, 2**31]
Share = Annotated[float, 0, 1]


def matches_annotation(hint, value) -> tuple[bool, str]:
    """Does an annotation allow a value, and what does it: a number of a range, choices, or instances of a class."""
    if get_origin(hint) in (Union, UnionType):
        parts = [matches_annotation(part, value) for part in get_args(hint)]
        return any(fine for fine, _ in parts), " or ".join(text for _, text in parts if text)
    if get_origin(hint) is Annotated:
        kind, low, high = get_args(hint)
        limits = "of 64 bits" if low == -(2**63) else f"from {low:g} to {high:g}"
        if kind is float:
            return is_number_in(value, low, high), f"a number {limits}"
        return is_number_in(value, low, high, numbers.Integral), f"an integer {limits}"
    if get_origin(hint) is Literal or hint is bool:
        choices = get_args(hint) or (True, False)
        return value in choices, " or ".join(map(str, choices))
    return isinstance(value, hint), "" if hint is NoneType else f"a {hint.__name__}"


def check_fields(owner, spelled: Callable = str):
    """Refuse a dataclass whose fields are not as annotated; `spelled`: how an error spells a field's name."""
    for name, hint in get_type_hints(type(owner), include_extras=True).items():
        fine, expected = matches_annotation(hint, getattr(owner, name))
        require(fine, f"{spelled(name)} = {getattr(owner, name)!r}, expected {expected}")


def read_json(path: Path, missing: dict | list | None = None):
    """A file's JSON object; `missing`: what stands for a file that is not there, a list where a list is expected."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise Error(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Error(f"{path}: not readable as JSON ({error})") from None
    kind = "array" if isinstance(missing, list) else "object"
    fine = isinstance(content, list if kind == "array" else dict)
    require(fine, f"{path}: expected a JSON {kind}")
    return content


class Session:
    """One graph under ONNX Runtime: arrays or OrtValues in, OrtValues out."""

    def __init__(self, path: Path, options, providers: list):
        import onnxruntime as ort

        try:
            self.session = ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise Error(f"{path}: onnxruntime cannot load it ({first_line(error)})") from None
        self.ort_value = ort.OrtValue
        self.provider = self.session.get_providers()[0]
        self.device = "cuda" if self.provider in (CUDA, "TensorrtExecutionProvider") else "cpu"
        inputs = self.session.get_inputs()
        self.inputs = {i.name: i.shape for i in inputs}
        self.types = {i.name: i.type for i in inputs}
        self.outputs = {o.name: o.shape for o in self.session.get_outputs()}
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        self.limit = int(self.metadata.get("max_position_embeddings", 2**31))

    def buffer(self, name: str, *shape):
        """Memory of an input's type on the graph's device; uninitialized."""
        dtype = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}.get(
            self.types[name], np.float32
        )
        return self.ort_value.ortvalue_from_shape_and_type(shape, dtype, self.device)

    def value(self, array):
        """An array on the graph's device."""
        return self.ort_value.ortvalue_from_numpy(np.asarray(array, order="C"), self.device)

    def __call__(self, into: dict = {}, **feeds) -> list:
        """All outputs, on the graph's device; `into`: an output's name -> the value that it is written to. What the
        graph does not take is left out."""
        binding = self.session.io_binding()
        try:
            feeds = {
                name: self.value(x) if isinstance(x, np.ndarray) else x
                for name, x in feeds.items()
                if name in self.inputs
            }
            for name, x in feeds.items():
                binding.bind_ortvalue_input(name, x)
            for name in self.outputs:
                if name in into:
                    binding.bind_ortvalue_output(name, into[name])
                else:
                    binding.bind_output(name, self.device)
            self.session.run_with_iobinding(binding)
        except Exception as error:  # e.g. more tokens than there are learned positions
            raise Error(f"onnxruntime: {first_line(error)}") from None
        return binding.get_outputs()


def has_cuda(ort) -> bool:
    """Is there a CUDA build of ONNX Runtime and a driver for it?"""
    if CUDA not in ort.get_available_providers():
        return False
    with contextlib.suppress(OSError):
        if ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuInit(0) == 0:
            ort.preload_dlls()
            return True
    return False


class OnnxLM:
    """An exported model under ONNX Runtime: numpy in, numpy out.

    folder: what `export_onnx` wrote; precision: a key of SUFFIXES (None: the first that is there); providers: ONNX
    Runtime's names, tried in order (None: CUDA where there is a driver and the precision is for it, else CPU);
    threads: of the CPU (None: ONNX Runtime's choice, one per core).
    Raises Error where a file is missing or where a provider that was asked for does not load.
    """

    def __init__(
        self,
        folder: str | Path,
        precision: str | None = None,
        providers: list | None = None,
        threads: int | None = None,
    ):
        import onnxruntime as ort

        version = tuple(int(part) for part in re.findall(r"\d+", ort.__version__)[:2])
        require(
            version >= MIN_ONNXRUNTIME,
            f"onnxruntime {ort.__version__}: runs some graphs wrongly, expected at least "
            f"{'.'.join(map(str, MIN_ONNXRUNTIME))}; pip install --upgrade onnxruntime",
        )
        require(
            precision is None or precision in SUFFIXES,
            f"precision = {precision!r}, expected one of {', '.join(SUFFIXES)}",
        )
        self.folder = Path(folder)
        config = read_json(self.folder / "config.json")
        self.generation_config = read_generation_config(self.folder, config)
        # tasks read both in one dict
        self.config = config | {
            name: value for name, value in self.generation_config.items() if value is not None
        }
        stems = ("model",)
        if self.config.get("is_encoder_decoder"):
            stems = ("encoder_model", "decoder_model_merged")
        self.precision, paths = self._graphs(stems, precision)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        asked = bool(providers)
        if not asked:
            cuda = self.precision in CUDA_PRECISIONS and has_cuda(ort)
            providers = [CUDA, CPU] if cuda else [CPU]
        names = [x if isinstance(x, str) else x[0] for x in providers]  # or (name, options)
        for name in names:
            require(
                name in ort.get_available_providers(),
                f"providers: {name} is not in this onnxruntime (it has "
                f"{', '.join(ort.get_available_providers())})",
            )
        *encoder, self.session = (Session(path, options, providers) for path in paths)
        self.encoder, self.provider = encoder[0] if encoder else None, self.session.provider
        require(
            not asked or self.provider == names[0],
            f"providers: {names[0]} did not load; onnxruntime fell back to {self.provider}",
        )
        self.past = {
            name: shape
            for name, shape in self.session.inputs.items()
            if name.startswith("past_key_values.")
        }
        self.shared = "shared_cache" in self.session.metadata
        self.vocab_size = self.config["vocab_size"]
        self.max_length = (self.encoder or self.session).limit
        self.task = task_of(self.config, self.folder)
        self.block = trained_block(self.folder)
        if not {*names} <= VERIFIED_PROVIDERS:
            self._compare_with_cpu(threads)

    def _graphs(self, stems: tuple, precision: str | None) -> tuple[str, list[Path]]:
        """The precision, else the first that is there, and its files."""
        missing = []
        for name in [precision] if precision else SUFFIXES:
            paths = [self.folder / "onnx" / f"{stem}{SUFFIXES[name]}.onnx" for stem in stems]
            if all(path.exists() for path in paths):
                return name, paths
            missing += [path for path in paths if not path.exists()]
        raise Error(
            f"{missing[0]}: no such file; write it with `python export.py FOLDER --onnx --precision "
            f"{precision or 'fp32'}`"
        )

    def _compare_with_cpu(self, threads: int | None, tolerance: float = 0.02):
        """Raise Error where a batch, and with a cache a step after it, differ from those on a CPU."""
        other = OnnxLM(self.folder, self.precision, [CPU], threads)
        ids = (np.arange(16).reshape(2, 8) * 7 + 1) % self.vocab_size
        mask = np.ones_like(ids)
        results = []
        for lm in (self, other):
            if lm.past:
                source = lm.source(ids, mask) if lm.encoder else None
                first, past = lm.step(ids[:, :-1], mask[:, :-1], source=source)
                results.append([first, lm.step(ids[:, -1:], mask, past, source)[0]])
            else:
                results.append([lm(ids)])
        for ours, theirs in zip(*results):
            error = np.abs(ours - theirs).max() / np.abs(theirs).max()
            require(
                error <= tolerance,
                f"providers: {self.provider} differs from {other.provider} by {error:.1e} of the "
                f"largest output, expected at most {tolerance:.0e}; use another provider",
            )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """`encode(text)` and `decode(ids)` of the folder's tokenizer.json."""
        return load_tokenizer(self.folder)

    def source(self, input_ids, mask) -> dict:
        """What the decoder's graph takes of a source (batch, source): hidden states and mask."""
        (states,) = self.encoder(input_ids=input_ids, attention_mask=mask)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def cache(self, batch: int, length: int = 0) -> list:
        """A cache's buffers; the graphs marked `shared_cache` write into those of their length in place."""
        return [
            self.session.buffer(name, batch, heads, length, width)
            for name, (_, heads, _, width) in self.past.items()
        ]

    def step(
        self, input_ids, mask, past: list | None = None, source: dict | None = None, keep: int = 0
    ) -> tuple[np.ndarray, list]:
        """One call of a graph with a cache: (logits, present). Ids (batch, seq), mask (batch, past + seq), past as
        returned, or of the `cache`; behind an encoder its `source`; logits of all columns, or of the last `keep`."""
        batch, seq = input_ids.shape
        new = mask[:, -seq:].astype(bool)
        if self.shared and mask.shape[1] > seq > 1 and not (batch == 1 and new.all()):
            return self._step_by_column(input_ids, mask, past, keep)
        first_call = past is None
        if first_call:
            past = self.cache(batch)
        shared = self.shared and past[0].shape()[2] >= mask.shape[1]
        into = dict(zip([*self.session.outputs][1:], past)) if shared else {}
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -(keep or seq) :]
        feeds = dict(zip(self.past, past)) | (source or {})
        logits, *present = self.session(
            into,
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache_branch=np.array([not first_call]),
            **feeds,
        )
        return logits.numpy(), present

    def _step_by_column(self, input_ids, mask, past: list, keep: int) -> tuple[np.ndarray, list]:
        """`step` where the graph's operator takes several new tokens after a past of one row without padding only: a
        column at a time. Logits of padding are zeros."""
        batch, seq = input_ids.shape
        logits = np.zeros((batch, seq, self.vocab_size), np.float32)
        before = mask.shape[1] - seq
        for column in range(seq):
            real = mask[:, before + column]
            require(
                real.all() or not real.any(),
                "attention_mask: after a past this graph takes new tokens of which a column is padding in "
                "all rows or in none; give rows of other lengths one by one, or use the fp32 graph",
            )
            if real.any():
                ids, seen = input_ids[:, column : column + 1], mask[:, : before + column + 1]
                found, past = self.step(ids, seen, past)
                logits[:, column] = found[:, 0]
        return logits[:, -keep:], past

    def __call__(
        self, input_ids, attention_mask=None, token_type_ids=None, decoder_input_ids=None
    ) -> np.ndarray:
        """What tinylm's `forward` returns, for ids (batch, seq); the mask marks padding on either side."""
        input_ids, mask = self._checked(input_ids, attention_mask)
        if self.encoder:
            require(
                decoder_input_ids is not None,
                "decoder_input_ids = None, expected ids (batch, target)",
            )
            ids, ones = self._checked(decoder_input_ids, name="decoder_input_ids")
            return self.step(ids, ones, source=self.source(input_ids, mask))[0]
        if self.past:
            return self.step(input_ids, mask)[0]
        types = np.zeros_like(input_ids)
        if token_type_ids is not None:
            types = np.asarray(token_type_ids, np.int64)
            require(
                "token_type_ids" in self.session.inputs,
                "token_type_ids: the model has no token types",
            )
            require(
                types.shape == input_ids.shape,
                f"token_type_ids: shape {types.shape}, expected {input_ids.shape}",
            )
        outputs = self.session(input_ids=input_ids, attention_mask=mask, token_type_ids=types)
        outputs = [x.numpy() for x in outputs]
        return np.stack(outputs, -1) if len(outputs) > 1 else outputs[0]

    forward = __call__  # what the functions of the tasks call

    def gather(self, past: list, rows: list) -> list:
        """A cache whose row i is what row rows[i] was (beam search); an encoder's keys are the same for all beams."""
        if rows == list(range(len(rows))):
            return past
        new = []
        for name, value in zip(self.past, past):
            if ".encoder." not in name:
                value = self.session.value(value.numpy()[rows])
            new.append(value)
        return new

    def generate(
        self, input_ids, attention_mask=None, max_new_tokens: int | None = None, **options
    ) -> np.ndarray:
        """Continue every row of ids (batch, seq): (batch, seq + new), with the pad id after a row's end; behind an
        encoder (batch, 1 + new), beginning with decoder_start_token_id. The options are those of tinylm's `generate`,
        fields of `GenerationConfig`, and the same seed draws the same text: the noise is a function of seed, row, step
        and token. Raises Error for arguments out of range and for logits that are not finite."""
        config = self.make_generation_config(max_new_tokens=max_new_tokens, **options)
        search = BeamSearch(config, len(input_ids)) if config.num_beams > 1 else None
        require(
            not search or not (config.temperature or config.stop),
            f"num_beams = {config.num_beams} goes with temperature 0 and no stop strings",
        )
        choose = functools.partial(choose_beams, search=search) if search else sample
        new = list(generate_steps(self, input_ids, attention_mask, config, choose))
        if search:
            texts = search.best()
            width = max(map(len, texts))
            rows = [text + [config.pad_token_id] * (width - len(text)) for text in texts]
        else:
            rows = np.stack(new, axis=1)
        return np.concatenate([start_ids(self, input_ids), rows], axis=1)

    def stream(self, text, max_new_tokens: int | None = None, **options) -> Iterator[str]:
        """The continuation of a text (or of its ids), piece by piece, whole characters only, up to a stop string; with
        the options of `generate`, but for beams."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        config = self.make_generation_config(max_new_tokens=max_new_tokens, **options)
        tokens = self.tokens(ids, max_new_tokens, **options | {"stop": ()})
        return stream_text(self.tokenizer, tokens, config.stop, () if self.encoder else ids)

    def tokens(self, ids: list, max_new_tokens: int | None = None, **options) -> Iterator[int]:
        """The new ids behind those of one row, one by one, without the one that ends the text."""
        options |= {"max_new_tokens": max_new_tokens, "num_beams": 1}
        config = self.make_generation_config(**options)
        row = np.array([ids or [*config.eos_token_id, 0][:1]])
        for (token,) in generate_steps(self, row, None, config):
            if token not in config.eos_token_id:
                yield int(token)

    def chat(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        variables: dict | None = None,
        **options,
    ) -> Iterator[str]:
        """The answer to a conversation, as `stream` gives it; see `Tokenizer.apply_chat_template` for `messages`,
        `tools` and the template's `variables`. It ends where the config or the tokenizer says so."""
        text = self.tokenizer.apply_chat_template(messages, tools, True, **(variables or {}))
        ids, limit = self.tokenizer.encode(text, special=False), self.session.limit
        require(
            len(ids) <= limit, f"chat: {len(ids)} tokens, but the model has only {limit} positions"
        )
        ends = (*self.ends(), *as_ids("eos_token_id", self.tokenizer.eos_token_id))
        return self.stream(ids, **{"eos_token_id": ends} | options)

    def ends(self) -> tuple:
        """The ids that end a text."""
        ids = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        return as_ids("eos_token_id", ids)

    def make_generation_config(self, **given) -> GenerationConfig:
        """How to generate: as given, else as generation_config.json says, else plainly."""
        defaults = generation_defaults(self.generation_config, self.encoder is not None)
        return make_generation_config(given, defaults, self.config)

    def run(
        self, texts: list[str], pairs: list | None = None, batch: int = 32, **options
    ) -> list[list[dict]]:
        """What the model is for, of each text: see `run` below; options as of the task's function."""
        return run(self, texts, pairs, batch, **options)

    def _checked(self, input_ids, mask=None, name: str = "input_ids") -> tuple:
        input_ids = np.asarray(input_ids)
        require(
            input_ids.ndim == 2 and input_ids.size and np.issubdtype(input_ids.dtype, np.integer),
            f"{name}: {input_ids.dtype} of shape {input_ids.shape}, expected ids (batch, seq)",
        )
        limit = self.max_length if name == "input_ids" else self.session.limit
        require(
            input_ids.shape[1] <= limit,
            f"{name}: {input_ids.shape[1]} tokens, but the model has only {limit} positions",
        )
        mask = np.ones_like(input_ids) if mask is None else np.asarray(mask)
        require(
            mask.shape == input_ids.shape and mask.any(1).all(),
            f"attention_mask: shape {mask.shape}, expected "
            f"{input_ids.shape} and a token in every row",
        )
        require(
            0 <= input_ids.min() and input_ids.max() < self.vocab_size,
            f"{name}: ids {input_ids.min()} to "
            f"{input_ids.max()}, expected 0 to vocab_size - 1 = {self.vocab_size - 1}",
        )
        return input_ids.astype(np.int64), mask.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers and chat templates
# ---------------------------------------------------------------------------------------------------------------------

TOKENIZER_FILES = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
    vocab.json merges.txt vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model source.spm target.spm""".split()
EXTRA_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja

SPECIAL_TOKENS = """bos_token eos_token unk_token sep_token pad_token cls_token
    mask_token""".split()  # in transformers' order
SENTENCEPIECE = "bos=<s> eos=</s> unk=<unk>"
ROBERTA = "bos=<s> eos=</s> unk=<unk> sep=</s> pad=<pad> cls=<s> mask=<mask>"
CLASS_TOKENS = {  # tokenizer class of transformers -> the special tokens that it has where no file says otherwise
    "BertTokenizer": "unk=[UNK] sep=[SEP] pad=[PAD] cls=[CLS] mask=[MASK]",
    "RobertaTokenizer": ROBERTA,
    "XLMRobertaTokenizer": ROBERTA,
    "MBartTokenizer": ROBERTA,
    "LlamaTokenizer": SENTENCEPIECE,
    "CodeLlamaTokenizer": SENTENCEPIECE,
    "GPT2Tokenizer": "bos=<|endoftext|> eos=<|endoftext|> unk=<|endoftext|>",
    "GPTNeoXTokenizer": "bos=<|endoftext|> eos=<|endoftext|> unk=<|endoftext|> pad=<|padding|>",
    "Qwen2Tokenizer": "eos=<|endoftext|> unk=<|endoftext|> pad=<|endoftext|>",
    "T5Tokenizer": "eos=</s> unk=<unk> pad=<pad>",
    "GemmaTokenizer": "bos=<bos> eos=<eos> unk=<unk> pad=<pad> mask=<mask>",
}
SAME_TOKENIZERS = {  # a second name of a class -> the class
    "DistilBertTokenizer": "BertTokenizer",
    "ElectraTokenizer": "BertTokenizer",
    "BartTokenizer": "RobertaTokenizer",
}
MODEL_TOKENIZERS = {  # tokenizer class -> model types that have it; "": whatever tokenizer.json says
    "BertTokenizer": "bert distilbert electra",
    "RobertaTokenizer": "roberta bart",
    "XLMRobertaTokenizer": "xlm-roberta",
    "MBartTokenizer": "mbart",
    "GPT2Tokenizer": "gpt2 starcoder2",
    "Qwen2Tokenizer": "qwen2 qwen3",
    "GemmaTokenizer": "gemma gemma2 gemma3_text",
    "T5Tokenizer": "t5",
    "": "mistral olmo2 phi3",
}


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of those of a folder's files that a tokenizer and its chat templates are made of."""
    names = [*TOKENIZER_FILES]
    names += [
        f"{EXTRA_TEMPLATES}/{path.name}" for path in folder.glob(f"{EXTRA_TEMPLATES}/*.jinja")
    ]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def parse_json_file(files: dict[str, bytes], name: str) -> dict:
    """The JSON object of one of the files; {} where it is not there."""
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise Error(f"{name}: not readable as JSON ({error})") from None
    require(isinstance(content, dict), f"{name}: expected a JSON object")
    return content


def tokenizer_class(files: dict[str, bytes], hf_config: dict) -> str:
    """The class of transformers that its AutoTokenizer takes; "" where it goes by tokenizer.json alone."""
    declared = parse_json_file(files, "tokenizer_config.json").get("tokenizer_class")
    declared = str(declared or hf_config.get("tokenizer_class") or "").removesuffix("Fast")
    declared = SAME_TOKENIZERS.get(declared, declared)
    model_type = hf_config.get("model_type")
    rows = MODEL_TOKENIZERS.items()
    registered = next((name for name, types in rows if model_type in types.split()), None)
    if declared == "LlamaTokenizer" and model_type != "qwen2":
        if b'"ByteLevel"' in files.get("tokenizer.json", b""):  # Llama 3
            return ""
    if declared and registered == "":
        return ""
    if registered and (not declared or model_type == "qwen2"):
        return registered
    return declared if declared in CLASS_TOKENS else ""


def special_tokens(
    files: dict[str, bytes], hf_config: dict | None = None, padding: dict | None = None
) -> dict[str, str]:
    """Name -> text of the special tokens (bos_token, ...) that the files name or that the tokenizer's class has; null
    takes one away. `padding`: what tokenizer.json says of it."""
    named = parse_json_file(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in named:
        named = named | parse_json_file(files, "special_tokens_map.json")
    words = CLASS_TOKENS.get(tokenizer_class(files, hf_config or {}), "").split()
    tokens = {f"{name}_token": text for name, text in (word.split("=") for word in words)}
    tokens |= {name: value for name, value in named.items() if name.endswith("_token")}
    extra = named.get("extra_special_tokens")
    if isinstance(extra, dict):
        tokens |= extra
    if padding:
        tokens.setdefault("pad_token", padding["pad_token"])
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in tokens.items()
    }
    names = dict.fromkeys([*SPECIAL_TOKENS, *texts])
    return {name: texts[name] for name in names if isinstance(texts.get(name), str)}


def without_surrogates(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which UTF-8 can't encode."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


class Tokenizer:
    """A tokenizer.json, run by the `tokenizers` library.

    files: name -> content; what else a checkpoint has of a tokenizer travels along; hf_config: its config.json.
    special_tokens: name -> text, e.g. "eos_token" -> "</s>"; size: how many tokens there are.
    """

    def __init__(self, files: dict[str, bytes], hf_config: dict | None = None):
        from tokenizers import Tokenizer as Backend

        self.files = files
        self.backend = Backend.from_str(files["tokenizer.json"].decode("utf-8"))
        self.special_tokens = special_tokens(files, hf_config, self.backend.padding)
        self.backend.no_truncation()  # what the file says of both is about somebody's batches
        self.backend.no_padding()
        config = parse_json_file(files, "tokenizer_config.json")
        self.backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        self.size = self.backend.get_vocab_size()
        self.eos_token_id = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        self.pad_token_id = self.backend.token_to_id(self.special_tokens.get("pad_token", ""))

    def encode(self, text: str, pair: str | None = None, special: bool = True) -> list[int]:
        """Ids of a text or of two; `special`: with the tokens that the model wants around them."""
        return self.encoding(text, pair, special).ids

    def encoding(self, text: str, pair: str | None = None, special: bool = True):
        """The `tokenizers` library's Encoding: ids, type_ids, sequence_ids (which text; None: a special token), offsets
        in the text, special_tokens_mask."""
        pair = None if pair is None else without_surrogates(pair)
        return self.backend.encode(without_surrogates(text), pair, add_special_tokens=special)

    def batch(self, texts: list[str]):
        """Ids of texts without special tokens around them, on all processors."""
        texts = [without_surrogates(text) for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)

    def decode(self, ids, special: bool = False) -> str:
        """The text of ids; `special`: with the special tokens that are among them."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def apply_chat_template(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        **variables,
    ) -> str:
        """A conversation as the text that the checkpoint's chat template makes of it: what transformers'
        `apply_chat_template(..., tokenize=False)` returns.

        messages: {"role", "content", ...}; tools: JSON schemas; variables: what else the template reads (`documents`,
        `enable_thinking`, ...); `chat_template` names one of several or is one.
        Raises Error where there is no template, where it refuses the conversation, and where it runs away.
        """
        return render_chat(self, messages, tools, add_generation_prompt, **variables)[0]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder that was exported."""
    path = Path(folder) / "tokenizer.json"
    require(path.exists(), f"{path}: no such file; use generate with token ids")
    config = path.with_name("config.json")
    try:
        return Tokenizer(
            read_tokenizer_files(path.parent), read_json(config) if config.exists() else {}
        )
    except ImportError:
        raise Error(f"{path}: reading it needs `pip install tokenizers`") from None
    except Error as error:
        raise Error(f"{folder}: {error}") from None
    except Exception as error:  # the library raises plain Exception
        raise Error(f"{path}: not a readable tokenizer ({error})") from None


MAX_TEMPLATE_SECONDS = 2  # between two pieces of a chat template's text


def render_chat(
    tokenizer,
    messages: list[dict],
    tools: list[dict] | None = None,
    add_generation_prompt: bool = False,
    chat_template: str | None = None,
    **variables,
) -> tuple[str, list[tuple[int, int]]]:
    """(text, the parts of it from which character to which that stood in {% generation %})."""
    unsupported = {"tokenize", "continue_final_message", "return_dict", "return_tensors"}
    for name in unsupported & set(variables):
        require(not variables[name], f"apply_chat_template: {name} is not supported")
    require(messages, "messages: expected at least one")
    for message in messages:
        require(isinstance(message, dict), f"messages: {str(message)[:60]!r}, expected a dict")
    for tool in tools or ():
        require(isinstance(tool, dict), f"tools: {str(tool)[:60]!r}, expected a JSON schema")
    template = find_chat_template(tokenizer.files, chat_template, tools)
    names = tokenizer.special_tokens | {"documents": None} | variables
    names |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
    names = plain_data(names | {"messages": messages})
    names["messages"] = [template_message(message) for message in names["messages"]]
    limit = 2**20 + 8 * len(str(names))
    pieces, size, generated = [], 0, []
    started = time.monotonic()
    try:
        require(
            isinstance(template, str) and len(template) <= limit,
            f"expected a text of at most {limit} characters",
        )
        for piece in compile_template(template).generate(names):
            if isinstance(piece, GeneratedText):
                generated.append((size, size + len(piece)))
            pieces.append(piece)
            size += len(piece)
            require(size <= limit, f"it writes more than {limit} characters")
            spent = time.monotonic() - started
            require(
                spent < MAX_TEMPLATE_SECONDS, f"it takes more than {MAX_TEMPLATE_SECONDS} seconds"
            )
    except ImportError:
        raise Error("chat templates need `pip install 'jinja2>=3.1.6'`") from None
    except Exception as error:  # whatever a template's code raises
        reason = " ".join(str(error).split())[:500]
        raise Error(
            f"chat: the checkpoint's chat template failed ({type(error).__name__}: {reason})"
        ) from None
    return "".join(pieces), generated


def find_chat_template(
    files: dict[str, bytes], chosen: str | None = None, tools: list[dict] | None = None
):
    """The template to use of those in the files, as transformers chooses: the one named `chosen` (else it is a template
    itself), tool_use where there are tools, default."""
    templates = parse_json_file(files, "tokenizer_config.json").get("chat_template")
    if isinstance(templates, list):
        pairs = [entry for entry in templates if isinstance(entry, dict) and "name" in entry]
        templates = {entry["name"]: entry.get("template") for entry in pairs}
    found = {
        Path(name).stem: content
        for name, content in files.items()
        if name.startswith(EXTRA_TEMPLATES)
    }
    if "chat_template.jinja" in files:
        found["default"] = files["chat_template.jinja"]
    if found:
        templates = {name: text.decode("utf-8", errors="replace") for name, text in found.items()}
        if [*found] == ["default"]:
            templates = templates["default"]  # the only one has no name
    if not isinstance(templates, dict):
        require(
            templates or chosen,
            "chat: the checkpoint has no chat_template in tokenizer_config.json and no chat_template.jinja",
        )
        return templates if chosen is None else chosen
    if chosen is not None:
        return templates.get(chosen, chosen)
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    require(
        templates.get("default"),
        f"chat: the checkpoint has chat templates named {', '.join(map(str, templates))}, but no default",
    )
    return templates["default"]


def plain_data(value):
    """A copy made of JSON's types only, whose methods the sandbox knows. Other objects become their class's name."""
    if isinstance(value, dict):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain_data(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if hasattr(value, "item") and not getattr(value, "shape", None):
        value = value.item()  # a number of numpy's
    for kind in (bool, str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else f"<{type(value).__name__}>"


def template_message(message: dict) -> dict:
    """A message as transformers hands it on: without what is null, and with thoughts under the names that are read."""
    message = {name: value for name, value in message.items() if value is not None}
    names = [name for name in ("reasoning_content", "thinking", "reasoning") if name in message]
    if names:
        thoughts = message[names[0]]
        message = {"thinking": thoughts} | message | {"reasoning_content": thoughts}
    return message


@functools.lru_cache(maxsize=16)
def compile_template(template: str):
    return template_environment().from_string(template)


class GeneratedText(str):
    """What {% generation %} writes."""


@functools.lru_cache(maxsize=1)
def template_environment():
    """The environment in which transformers runs chat templates: jinja2's immutable sandbox, its filters and functions,
    and {% generation %}.

    The sandbox keeps a template from Python's internals, from files and from changing what it is given. `render_chat`
    bounds the length of the text and the time between two pieces of it; a template that computes for long without
    writing anything is not interrupted.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < (3, 1, 6):  # older sandboxes can be escaped
        raise ImportError(jinja2.__version__)

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("write")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def write(self, caller):
            return GeneratedText(caller())

    class Namespace(jinja2.utils.Namespace):
        """Refuses names that begin with an underscore, which could reach Python's internals."""

        def __init__(*arguments, **options):
            # so that `self` can be an option
            self, *arguments = arguments
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*arguments, **options).items():
                self[name] = value

        def __setitem__(self, name, value):
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace takes no name like {name!r}")
            super().__setitem__(name, value)

    class Dict:
        __call__ = staticmethod(dict)
        fromkeys = staticmethod(dict.fromkeys)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        options = dict(indent=indent, separators=separators, sort_keys=sort_keys)
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(format):
        return datetime.datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals |= {"dict": Dict(), "namespace": Namespace}
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# Generation, mirrored in tinylm.py: equal in source where no tensor is concerned, else in results
# ---------------------------------------------------------------------------------------------------------------------
def as_ids(name: str, value) -> tuple:
    """One id, several or None as a tuple."""
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    fine = all(is_number_in(i, -1, 2**31, numbers.Integral) for i in ids)
    require(fine, f"{name} = {value!r}, expected integers")
    return tuple(map(int, ids))


def stop_strings(stop) -> tuple:
    """One string, several or None as a tuple."""
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    fine = all(isinstance(text, str) and text for text in stop)
    require(fine, f"stop = {stop!r}, expected strings that are not empty")
    return stop


@dataclass(frozen=True)
class GenerationConfig:
    """How a text is generated, in the words of Hugging Face; what changes logits does so in its order.

    Raises Error where a value is out of its range.
    """

    max_new_tokens: Size = 128
    temperature: Annotated[float, 0, 1e9] = 0.0  # 0: the likeliest
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, 1e-9, 1e9] = 1.0
    eos_token_id: int | str | tuple | list = ()  # ids that end a row; none: it never ends
    pad_token_id: Id | None = None  # stands after a row's end; None: the first that ends it, or 0
    stop: str | tuple | list = ()  # strings: a row ends once its new text has one
    seed: Annotated[int, -(2**63), 2**63 - 1] | None = None
    no_repeat_ngram_size: Count = 0
    min_length: Count = 0  # tokens before a row may end, the prompt's included
    bad_words_ids: tuple | list = ()  # sequences of ids that must not come
    forced_bos_token_id: Count | None = None  # what a decoder says after its start token
    forced_eos_token_id: Count | None = None  # what it says last
    num_beams: Annotated[int, 1, 2**16] = 1  # above 1: the likeliest text that such a search finds
    length_penalty: Annotated[float, -1e3, 1e3] = 1.0  # score: log-probability / length**this
    # of a row, once it has num_beams finds: at once; unless a better one is likely; or possible
    early_stopping: Literal[True, False, "never"] = False
    renormalize_logits: bool = False  # of beams, after what changes logits

    def __post_init__(self):
        check_fields(self)
        ends = as_ids("eos_token_id", self.eos_token_id)
        words = self.bad_words_ids
        fine = all(isinstance(word, (list, tuple)) and word for word in words)
        require(fine, f"bad_words_ids = {words!r}, expected lists of ids that are not empty")
        words = [as_ids("bad_words_ids", word) for word in words]
        pads = (self.pad_token_id, *ends, 0)
        vars(self).update(
            eos_token_id=ends,
            stop=stop_strings(self.stop),
            bad_words_ids=tuple(word for word in words if word not in [(end,) for end in ends]),
            pad_token_id=next(id for id in pads if id is not None and id >= 0),
            # below, a division would overflow, and the draw is the likeliest anyway
            temperature=self.temperature if self.temperature >= 1e-5 else 0.0,
        )


# What generation_config.json may say. As transformers does, but for what samples: that only an argument asks for.
FROM_FILE = set(
    """max_new_tokens repetition_penalty no_repeat_ngram_size min_length bad_words_ids
    forced_bos_token_id forced_eos_token_id num_beams renormalize_logits length_penalty
    early_stopping stop_strings""".split()
)
UNSUPPORTED = {  # what would change a greedy text -> the value, beside None, that doesn't
    **dict.fromkeys(
        """dola_layers exponential_decay_length_penalty max_time
        watermarking_config""".split()
    ),
    **dict.fromkeys(
        """begin_suppress_tokens constraints force_words_ids sequence_bias
        suppress_tokens""".split(),
        [],
    ),
    **dict.fromkeys(
        "encoder_no_repeat_ngram_size min_new_tokens penalty_alpha token_healing".split(), 0
    ),
    **dict.fromkeys(
        """encoder_repetition_penalty guidance_scale num_beam_groups num_return_sequences
        typical_p""".split(),
        1,
    ),
}
GENERATION = {*FROM_FILE, *UNSUPPORTED} | set(  # what may stand in config.json, too
    """max_length do_sample diversity_penalty temperature top_k top_p min_p top_h epsilon_cutoff
    eta_cutoff force_bos_token_to_be_generated decoder_start_token_id bos_token_id eos_token_id
    pad_token_id""".split()
)
NOT_OF_THE_TEXT = set(  # what transformers knows, and what changes no text
    """assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind cache_config cache_implementation compile_config
    continuous_batching_config disable_compile is_assistant low_memory max_cache_len
    max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule output_attentions
    output_hidden_states output_logits output_scores prefill_chunk_size prompt_lookup_num_tokens
    remove_invalid_values return_dict_in_generate speculation_type target_lookbehind
    transformers_version use_cache use_mtp""".split()
)


def read_generation_config(folder: Path, config: dict) -> dict:
    """A folder's generation_config.json; where it has none, what its config.json says of generation, as checkpoints of
    transformers 4 have it. Fields that nobody gives a meaning are warned of."""
    file = folder / "generation_config.json"
    if file.exists():
        found = read_json(file)
        unknown = sorted(n for n in found.keys() - GENERATION - NOT_OF_THE_TEXT if n[:1] != "_")
        if unknown:
            warnings.warn(f"{file}: ignored, as unknown: {', '.join(unknown)}", stacklevel=2)
        return found
    found = {name: value for name, value in config.items() if name in GENERATION}
    if config.get("force_bos_token_to_be_generated"):
        found["forced_bos_token_id"] = config.get("bos_token_id")
    return found


def generation_defaults(file: dict, seq2seq: bool = False) -> dict:
    """What generation_config.json says, as fields of GenerationConfig."""
    for name, harmless in UNSUPPORTED.items():
        fine = file.get(name) in (None, harmless)
        require(fine, f"generation_config.json: {name} = {file.get(name)!r} is not supported")
    options = {name: file[name] for name in ("eos_token_id", "pad_token_id") if name in file}
    if seq2seq and is_number_in(file.get("max_length"), 2, 2**31, numbers.Integral):
        options["max_new_tokens"] = file["max_length"] - 1
    options |= {name: file[name] for name in FROM_FILE if file.get(name) is not None}
    if "stop_strings" in options:
        options["stop"] = options.pop("stop_strings")
    return options


def make_generation_config(given: dict, defaults: dict, config: dict) -> GenerationConfig:
    """The arguments `given`, else the `defaults` (fields of GenerationConfig), else the ids of config.json. An
    `eos_token_id` of None among the arguments: a row never ends."""
    options = {name: config.get(name) for name in ("eos_token_id", "pad_token_id")} | defaults
    if given.get("eos_token_id", 0) is None:
        options["eos_token_id"] = None
    # transformers' name of `stop`
    given = {"stop": given.get("stop_strings")} | given
    given.pop("stop_strings", None)
    options |= {name: value for name, value in given.items() if value is not None}
    unknown = sorted(options.keys() - {f.name for f in fields(GenerationConfig)})
    require(not unknown, f"{', '.join(unknown)}: no such option of a generation")
    options["eos_token_id"] = as_ids("eos_token_id", options["eos_token_id"])
    made = GenerationConfig(**options)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        token, vocab = getattr(made, name), config["vocab_size"]
        require(token is None or token < vocab, f"{name} = {token}, expected less than {vocab}")
    return made


def uniform(seed: int, step: int, batch: int, vocab: int) -> np.ndarray:
    """Numbers in (0, 1), (batch, vocab), a function of seed, row, step and column alone (Salmon et al. 2011,
    counter-based random numbers)."""

    def hash32(x):  # full avalanche of the lowest 32 bits (Wellons' two-round prospector)
        x = x & 0xFFFFFFFF
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 15)

    rows, columns = np.arange(batch), np.arange(vocab)
    state = hash32(hash32(hash32(np.array([seed], np.int64)) + rows) + step)
    bits = hash32(state[:, None] + columns * 0x9E3779B9)
    return ((bits >> 9).astype(np.float32) + np.float32(0.5)) / np.float32(2**23)


# Logits processors: logits or log-probabilities (batch, vocab), the state after the ids so far, the config; in place.


def penalize_repetition(logits, state: DecodeState, config: GenerationConfig):
    if config.repetition_penalty == 1:
        return
    for row, ids in zip(logits, state.texts):
        seen = np.unique(ids)
        scores = row[seen]
        penalty = np.float32(config.repetition_penalty)
        row[seen] = np.where(scores > 0, scores / penalty, scores * penalty)


def forbid_repeated_ngrams(logits, state: DecodeState, config: GenerationConfig):
    n = config.no_repeat_ngram_size
    if not n:
        return
    for row, ids in zip(logits, state.texts):
        newest = ids[len(ids) - n + 1 :]
        starts = range(len(ids) - n + 1)
        row[[ids[i + n - 1] for i in starts if ids[i : i + n - 1] == newest]] = -np.inf


def forbid_bad_words(logits, state: DecodeState, config: GenerationConfig):
    for *before, last in config.bad_words_ids:
        for row, ids in zip(logits, state.texts):
            same = len(ids) >= len(before) and ids[len(ids) - len(before) :] == before
            if same and 0 <= last < len(row):
                row[last] = -np.inf


def forbid_early_end(logits, state: DecodeState, config: GenerationConfig):
    if not config.min_length:
        return
    ends = [i for i in config.eos_token_id if 0 <= i < logits.shape[-1]]
    for row, ids in zip(logits, state.texts):
        if len(ids) < config.min_length:
            row[ends] = -np.inf


def force_tokens(logits, state: DecodeState, config: GenerationConfig):
    for row, ids in zip(logits, state.texts):
        for token, when in (
            (config.forced_bos_token_id, len(ids) == 1),
            (config.forced_eos_token_id, state.count == config.max_new_tokens - 1),
        ):
            if token is not None and when:
                row[:] = -np.inf
                row[token] = 0


def process_logits(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    """Logits or log-probabilities (batch, vocab), less what the config forbids after the ids so far; in place."""
    penalize_repetition(logits, state, config)
    forbid_repeated_ngrams(logits, state, config)
    forbid_bad_words(logits, state, config)
    forbid_early_end(logits, state, config)
    force_tokens(logits, state, config)
    return logits


def keep_top_k(logits, k: int) -> np.ndarray:
    k = min(k, logits.shape[-1])
    least = np.partition(logits, -k, axis=-1)[:, -k]
    return np.where(logits < least[:, None], -np.inf, logits)


def keep_top_p(logits, top_p: float) -> np.ndarray:
    order = np.argsort(-logits, axis=-1, kind="stable")
    p = softmax(np.take_along_axis(logits, order, -1))
    outside = p.cumsum(-1) - p >= top_p  # what stands before it is enough already
    outside[:, 0] = False
    dropped = np.empty_like(outside)
    np.put_along_axis(dropped, order, outside, -1)
    return np.where(dropped, -np.inf, logits)


def keep_min_p(logits, min_p: float) -> np.ndarray:
    p = softmax(logits)
    return np.where(p < min_p * p.max(-1, keepdims=True), -np.inf, logits)


def sample(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    """The next id (batch,) of each row of logits (batch, vocab), drawn by the Gumbel trick; at temperature 0 the
    likeliest."""
    logits = process_logits(logits, state, config)
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = logits / np.float32(config.temperature)
    if config.top_k:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None and config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p:
        logits = keep_min_p(logits, config.min_p)
    noise = uniform(state.seed, state.count, *logits.shape)
    return (logits - np.log(-np.log(noise))).argmax(-1)


def softmax(x) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class BeamSearch:
    """The likeliest continuation of each row that a search finds, step by step as transformers does it: candidates that
    end in a step compete, by their score, for as many places as there are beams."""

    def __init__(self, config: GenerationConfig, batch: int):
        n = config.num_beams
        self.config = config
        self.candidates = max(2, 1 + len(config.eos_token_id)) * n  # of a row, looked at in a step
        self.texts = [[] for _ in range(batch * n)]  # new ids of each beam
        self.sums = [0.0, *[-1e9] * (n - 1)] * batch  # log-probabilities; at first one beam counts
        self.found = [[] for _ in range(batch)]  # (score, text) of what has ended, the best first
        self.open = [True] * batch  # the row may still find a better one

    def advance(self, sums: list, places: list, vocab: int) -> list[int]:
        """Go on with the best of each row's candidates: their sums (batch, candidates), the best first, and places
        (batch, candidates), beam * vocab + token. Returns which of the old beams (batch * beams,) each new one
        continues."""
        going = []
        for row, candidates in enumerate(zip(sums, places)):
            going += self.advance_row(row, *candidates, vocab)
        beams, self.sums, self.texts = map(list, zip(*going))
        return beams

    def advance_row(self, row: int, sums: list, places: list, vocab: int) -> list:
        """(beam, sum, text) of the beams that a row goes on with."""
        config, found, going = self.config, self.found[row], []
        length = len(self.texts[0]) + 1
        last = length == config.max_new_tokens
        for rank, (total, place) in enumerate(zip(sums, places)):
            beam, token = row * config.num_beams + place // vocab, place % vocab
            text = [*self.texts[beam], token]
            ends = token in config.eos_token_id
            if (ends or last) and self.open[row] and rank < config.num_beams:
                found.append((total / length**config.length_penalty, text))
            if not ends:
                going.append((beam, total, text))
        while len(going) < config.num_beams:  # nearly every token ends a text: a beam to nowhere
            going.append((beam, -math.inf, text))
        found.sort(key=lambda pair: -pair[0])
        del found[config.num_beams :]
        patient = config.early_stopping == "never" and config.length_penalty > 0
        longest = config.max_new_tokens if patient else length
        hope = going[0][1] / longest**config.length_penalty
        if len(found) == config.num_beams:
            self.open[row] &= config.early_stopping is not True and hope > found[-1][0]
        self.open[row] &= not last
        return going[: config.num_beams]

    def best(self) -> list:
        """The new ids of each row (batch,), of different lengths."""
        return [found[0][1] for found in self.found]


def choose_beams(
    logits, state: DecodeState, config: GenerationConfig, search: BeamSearch
) -> np.ndarray:
    """The next id of each beam (batch * beams,), in the place of `sample`; the state goes on from the best beams."""
    scores = process_logits(log_softmax(logits), state, config)
    if config.renormalize_logits:
        scores = log_softmax(scores)
    totals = scores + np.array(search.sums, np.float32)[:, None]
    totals = totals.reshape(len(search.open), -1)
    count = min(search.candidates, totals.shape[1])
    places = np.argpartition(-totals, count - 1, axis=-1)[:, :count]
    order = np.argsort(-np.take_along_axis(totals, places, -1), axis=-1, kind="stable")
    places = np.take_along_axis(places, order, -1)
    sums = np.take_along_axis(totals, places, -1)
    beams = search.advance(sums.tolist(), places.tolist(), logits.shape[-1])
    state.reorder(beams)
    state.done |= not any(search.open)
    return np.array([text[-1] for text in search.texts])


class DecodeState:
    """What changes while a batch is generated: ids of each row, the prompt's included; whether it has ended; the number
    of tokens written; and where the rows of the next step go on from (beam search)."""

    def __init__(self, prompt, mask, config: GenerationConfig):
        self.texts = [row[real].tolist() for row, real in zip(prompt, mask.astype(bool))]
        self.done = np.zeros(len(prompt), bool)
        self.count = 0
        self.seed = np.random.randint(2**31) if config.seed is None else int(config.seed)
        self.rows = list(range(len(prompt)))

    def append(self, token, ends: tuple):
        """The new ids (batch,) join the text."""
        for text, id in zip(self.texts, token.tolist()):
            text.append(id)
        self.done |= np.isin(token, ends)
        self.count += 1

    def reorder(self, rows: list):
        """Row i goes on from what row rows[i] held."""
        self.texts = [list(self.texts[row]) for row in rows]
        self.rows = rows


def start_ids(lm: OnnxLM, input_ids) -> np.ndarray:
    """What new tokens stand behind: the ids, or behind an encoder the start token (batch, 1)."""
    if lm.encoder is None:
        return np.asarray(input_ids)
    said = as_ids("decoder_start_token_id", lm.generation_config.get("decoder_start_token_id"))
    return np.full((len(input_ids), 1), [*said, lm.config["decoder_start_token_id"]][0])


NOT_FINITE = (
    "the model's logits are not finite (its numbers overflow): try another dtype or precision"
)


def generate_steps(lm: OnnxLM, input_ids, attention_mask, config: GenerationConfig, choose=sample):
    """Yield, step by step, the new ids (batch,), until all rows have ended. Raises Error where logits are not finite."""
    (input_ids, mask), source = lm._checked(input_ids, attention_mask), None
    seq, limit = 1 if lm.encoder else input_ids.shape[1], lm.session.limit
    require(
        seq + config.max_new_tokens <= limit,
        f"max_new_tokens = {config.max_new_tokens} after {seq} tokens, expected at most {limit} in all",
    )
    if lm.encoder:
        source = lm.source(input_ids, mask)
        input_ids = start_ids(lm, input_ids)
        mask = np.ones_like(input_ids)
    if config.num_beams > 1:
        input_ids, mask = (np.repeat(x, config.num_beams, 0) for x in (input_ids, mask))
        source = {
            name: np.repeat(x if isinstance(x, np.ndarray) else x.numpy(), config.num_beams, 0)
            for name, x in (source or {}).items()
        }
    state = DecodeState(input_ids, mask, config)
    starts = [() if lm.encoder else text for text in state.texts]
    stops = [TextStream(lm.tokenizer, config.stop, start) for start in starts if config.stop]
    order = mask.argsort(1, kind="stable")  # every row's last token goes to the last column
    input_ids, mask = (np.take_along_axis(x, order, 1) for x in (input_ids, mask))
    written = np.ones((len(mask), config.max_new_tokens), np.int64)
    longest = np.concatenate([mask, written], axis=1)
    past = lm.cache(len(mask), seq + config.max_new_tokens) if lm.shared else None
    pad = min(config.pad_token_id, lm.vocab_size - 1)
    while state.count < config.max_new_tokens:
        logits, past = lm.step(input_ids, mask, past, source, keep=1)
        logits = logits[:, -1]
        require((np.isfinite(logits.max(-1)) | state.done).all(), NOT_FINITE)
        token = np.where(state.done, pad, choose(logits, state, config))
        if config.num_beams > 1:
            past = lm.gather(past, state.rows)
        yield token
        state.append(token, config.eos_token_id)
        for row, text in enumerate(stops):
            text.append(int(token[row]))
            state.done[row] |= text.ended
        if state.done.all():
            return
        input_ids, mask = token[:, None], longest[:, : seq + state.count]


class TextStream:
    """The text of ids that come one by one behind those of a prompt: whole characters only, and nothing from a stop
    string on. Stop strings are looked for in the text with its special tokens written out, which is not shown.

    New text is what a text has more than the same without its newest ids: a decoder may strip the first space of what
    it is given, so that ids alone do not say their text.
    """

    def __init__(self, tokenizer, stop: tuple = (), prompt=()):
        self.tokenizer, self.stop, self.ids = tokenizer, stop, list(prompt)
        self.start, self.known = 0, len(self.ids)  # ids to compare with, and ids whose text is out
        self.held = []  # (text with special tokens, text to show), which may begin a stop string
        self.ended = False  # a stop string has come

    def new_text(self, special: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.known], special)
        return self.tokenizer.decode(self.ids[self.start :], special)[len(before) :]

    def append(self, token: int) -> str:
        """What there is to show once an id has come."""
        self.ids.append(token)
        full = self.new_text(bool(self.stop))
        if full.endswith("\ufffd"):  # a character whose bytes are not all there
            return ""
        shown = self.new_text(False) if self.stop else full
        if shown:  # ids without a text are no beginning to compare with
            self.start = self.known
        self.known = len(self.ids)
        if not self.stop:
            return shown
        self.held.append((full, shown))
        text = "".join(full for full, _ in self.held)
        cut = min((text.find(stop) for stop in self.stop if stop in text), default=-1)
        self.ended = cut >= 0
        if not self.ended:  # keep back what may begin a stop string
            begins = [
                n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])
            ]
            cut = len(text) - max(begins, default=0)
        return self.release(cut)

    def release(self, cut: int) -> str:
        """What is shown of the held text before a character; where it has ended, the rest is dropped."""
        out = []
        while self.held and (len(self.held[0][0]) <= cut or self.ended):
            full, shown = self.held.pop(0)
            out.append(shown if len(full) <= cut else os.path.commonprefix([shown, full[:cut]]))
            cut = max(cut - len(full), 0)
        return "".join(out)

    def flush(self) -> str:
        """The rest, once no more ids come."""
        return "" if self.ended else "".join(shown for _, shown in self.held) + self.new_text(False)


def stream_text(tokenizer, tokens, stop: tuple = (), prompt=()):
    """The text of a stream of ids behind those of a prompt, piece by piece, as `TextStream` has it."""
    text = TextStream(tokenizer, stop, prompt)
    for token in tokens:
        if piece := text.append(token):
            yield piece
        if text.ended:
            return
    if rest := text.flush():
        yield rest


# ---------------------------------------------------------------------------------------------------------------------
# After the logits: what a model's outputs mean, for OnnxLM and, through an adapter, for a model in torch
# ---------------------------------------------------------------------------------------------------------------------
#
# A `model` has forward(ids, mask, types) -> array, generate(ids, mask, **options) -> ids, tokenizer, config (a dict as in
# config.json), max_length, folder (or None) and task. A task's function takes (model, texts, pairs, **options) and yields
# a list of dicts for each text, the likeliest first.

LONGEST = 512  # tokens of a text that are read, where nothing says another limit


class Window(NamedTuple):
    """Tokens of a text, or of a pair, that a model reads at once: lists with one entry for each."""

    ids: list
    type_ids: list
    sequence_ids: list  # which text it is of, 0 or 1; None of a special one
    offsets: list  # (start, end) in its text
    cut: bool = False  # is the text longer than what the window has of it?


def encode_windows(
    tokenizer,
    text: str,
    pair: str | None = None,
    limit: int = LONGEST,
    stride: int | None = None,
    special: bool = True,
) -> list[Window]:
    """A text, or two, between special tokens (if `special`) in at most `limit` tokens: cut at the end, of two texts
    first of the longer one; with a stride the second one is divided into windows that share so many tokens."""
    encoding = tokenizer.encoding(text, pair, special)
    columns: dict = {None: [], 0: [], 1: []}
    for column, part in enumerate(encoding.sequence_ids):
        columns[part].append(column)
    special, first, second = columns.values()
    room = limit - len(special)
    if len(encoding.ids) <= limit:
        kept = [range(len(encoding.ids))]
    elif stride is None:
        shorter, longer = sorted((first, second), key=len)
        shorter = shorter[: max(room, 0) // 2] if len(shorter) > room // 2 else shorter
        kept = [special + shorter + longer[: max(room - len(shorter), 0)]]
    else:
        room -= len(first)
        require(
            room > stride, f"{text[:60]!r}: leaves no room for the text behind it in {limit} tokens"
        )
        starts = range(0, max(len(second) - stride, 1), room - stride)
        kept = [special + first + second[start : start + room] for start in starts]
    lists = encoding.ids, encoding.type_ids, encoding.sequence_ids, encoding.offsets
    windows = [[[values[c] for c in sorted(columns)] for values in lists] for columns in kept]
    return [Window(*window, cut=len(encoding.ids) > limit) for window in windows]


def pad(windows: list, model) -> tuple:
    """Ids, mask and types (batch, longest) of windows, padded on the right."""
    empty = np.ravel(model.config.get("eos_token_id") or 0)[:1].tolist()
    shape = len(windows), max(len(window.ids or empty) for window in windows)
    ids = np.full(shape, max(model.config.get("pad_token_id") or 0, 0))
    mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, window in enumerate(windows):
        tokens = window.ids or empty  # of a text of no tokens, where a tokenizer has no specials
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        types[row, : len(window.type_ids)] = window.type_ids
    return ids, mask, types if (model.config.get("type_vocab_size") or 0) > 1 else None


def batches_by_length(lengths: list[int], batch: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def read(model, windows: list, batch: int = 32) -> list:
    """The model's output for each window, without padding: of a classifier (labels,), else (tokens, ...)."""
    outputs: list = [None] * len(windows)
    for rows in batches_by_length([len(window.ids) for window in windows], batch):
        ids, mask, types = pad([windows[i] for i in rows], model)
        found = model.forward(ids, mask, types)
        for i, output, count in zip(rows, found, mask.sum(1)):
            outputs[i] = output[:count] if found.ndim == 3 else output
    return outputs


def read_texts(model, texts, pairs, limit: int = LONGEST) -> tuple:
    """Each text (and its pair) as one window, and the model's outputs for them."""
    limit = min(model.max_length, limit)
    windows = [encode_windows(model.tokenizer, *both, limit)[0] for both in zip(texts, pairs)]
    return windows, read(model, windows)


def label_names(config: dict, count: int) -> list:
    names = config.get("id2label") or {}
    return [names.get(str(i), f"LABEL_{i}") for i in range(count)]


def label_scores(logits, config: dict) -> np.ndarray:
    """Of logits (..., labels): probabilities that sum to one, one for each (of several labels, or of a single one), or
    the numbers themselves."""
    kind = config.get("problem_type")
    if kind == "regression":
        return logits
    if kind == "multi_label_classification" or logits.shape[-1] == 1:
        return 1 / (1 + np.exp(-logits))
    return softmax(logits)


def classify(model, texts, pairs, limit: int = LONGEST):
    """All labels with their scores."""
    for logits in read_texts(model, texts, pairs, limit)[1]:
        scores, names = label_scores(logits, model.config), label_names(model.config, len(logits))
        order = np.argsort(-scores, kind="stable")
        yield [{"label": names[i], "score": float(scores[i])} for i in order]


def tag(model, texts, pairs, limit: int = LONGEST):
    """Entities: neighbouring tokens of one kind, with the mean of their scores."""
    for text, window, logits in zip(texts, *read_texts(model, texts, pairs, limit)):
        columns = [c for c, part in enumerate(window.sequence_ids) if part is not None]
        names, scores = label_names(model.config, logits.shape[-1]), softmax(logits)[columns]
        entities = []
        for kind, first, end in tag_spans([names[i] for i in scores.argmax(-1)]):
            start, stop = window.offsets[columns[first]][0], window.offsets[columns[end - 1]][1]
            entities.append(
                {
                    "entity_group": kind,
                    "word": text[start:stop].strip(),
                    "score": float(scores[first:end].max(-1).mean()),
                    "start": start,
                    "end": stop,
                }
            )
        yield entities


def tag_spans(tags: list) -> list:
    """(kind, first, behind the last) of each run of tags of one kind but O; B- begins another."""
    kinds = [tag[2:] if tag[:2] in ("B-", "I-") else tag for tag in tags]
    starts = [
        i for i in range(len(tags)) if i == 0 or kinds[i] != kinds[i - 1] or tags[i][:2] == "B-"
    ]
    ends = [*starts[1:], len(tags)]
    return [(kinds[start], start, end) for start, end in zip(starts, ends) if kinds[start] != "O"]


def answer(model, texts, pairs, limit: int = 384):
    """The likeliest span in any window of the context."""
    for question, context in zip(texts, pairs):
        require(context, f"{question[:60]!r}: expected a context, its pair")
        windows = question_windows(model.tokenizer, question, context, min(model.max_length, limit))
        yield [best_span(context, windows, read(model, windows))]


def question_windows(tokenizer, question: str, context: str, limit: int) -> list[Window]:
    """A question before each part of its context; the parts share up to 128 tokens."""
    room = limit - len(tokenizer.encode(question, ""))
    require(
        room > 1, f"question {question[:60]!r}: leaves no room for the context in {limit} tokens"
    )
    return encode_windows(tokenizer, question, context, limit, min(128, room // 2))


def best_span(context: str, windows: list, outputs: list, longest: int = 30) -> dict:
    """The likeliest span of whole words, of at most `longest` tokens. Its score is the probability of its first column
    times that of its last, among the context's columns and the first one, which stands for none."""
    best = {"answer": "", "score": -1.0, "start": 0, "end": 0}
    for window, logits in zip(windows, outputs):
        inside = np.array([part == 1 for part in window.sequence_ids])
        shown = inside.copy()
        shown[0] = True
        begins, ends = softmax(np.where(shown, logits.T, -np.inf)) * inside
        scores = np.tril(np.triu(np.outer(begins, ends)), longest - 1)
        first, last = np.unravel_index(scores.argmax(), scores.shape)
        if scores[first, last] <= best["score"]:
            continue
        start, end = (
            (window.offsets[first][0], window.offsets[last][1]) if inside[first] else (0, 0)
        )
        while 0 < start < end and context[start - 1 : start + 1].isalnum():
            start -= 1
        while start < end < len(context) and context[end - 1 : end + 1].isalnum():
            end += 1
        text, score = context[start:end].strip(), float(scores[first, last])
        best = {"answer": text, "score": score, "start": start, "end": end}
    return best


def mask_token(tokenizer) -> tuple[str, int]:
    """Text and id of the token that hides another."""
    backend = getattr(tokenizer, "backend", None)  # bytes have none
    named = tokenizer.special_tokens.get("mask_token")
    for name in (named, "[MASK]", "<mask>"):  # BERT's own files do not name it
        token = backend.token_to_id(name) if backend and name else None
        if token is not None:
            return name, token
    raise Error("tokenizer_config.json: no mask_token")


def fill_mask(model, texts, pairs, top_k: int = 5, limit: int = LONGEST):
    """The likeliest tokens in the place of each <mask> (or what the tokenizer calls it)."""
    name, mask = mask_token(model.tokenizer)
    texts = [text.replace("<mask>", name) for text in texts]
    for text, window, logits in zip(texts, *read_texts(model, texts, pairs, limit)):
        require(mask in window.ids, f"{text[:60]!r}: expected {name} or <mask> in it")
        found = []
        for column in np.flatnonzero(np.array(window.ids) == mask):
            scores = softmax(logits[column])
            for token in np.argsort(-scores, kind="stable")[:top_k].tolist():
                ids = [*window.ids[:column], token, *window.ids[column + 1 :]]
                found.append(
                    {
                        "token_str": model.tokenizer.decode([token]),
                        "score": float(scores[token]),
                        "sequence": model.tokenizer.decode(ids),
                    }
                )
        yield found


POOLINGS = {  # of sentence-transformers, in its order: states (tokens, hidden) and weights (tokens, 1) -> a vector
    "cls": lambda x, weights: x[0],
    "max": lambda x, weights: x.max(0),
    "mean": lambda x, weights: x.mean(0),
    "mean_sqrt_len_tokens": lambda x, weights: x.sum(0) / len(x) ** 0.5,
    "weightedmean": lambda x, weights: (x * weights).sum(0) / weights.sum(),
    "lasttoken": lambda x, weights: x[-1],
}
DENSE_ACTIVATIONS = {  # of its Dense: the class of torch -> what it computes
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "SiLU": lambda x: x / (1 + np.exp(-x)),
    "GELU": lambda x: x * (0.5 + 0.5 * np.vectorize(math.erf)(x * 0.5**0.5)),
}
SENTENCE_CONFIGS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")


class Embedder:
    """From a text to its vector, as the files of sentence-transformers in the model's folder say it, which are read
    once; without them, the mean of the hidden states.

    Raises Error for what they say that is not supported here.
    """

    def __init__(self, model):
        self.tokenizer = model.tokenizer
        self.folder = model.folder or Path("(a model without a folder)")
        main = read_json(self.folder / "config_sentence_transformers.json", {})
        self.prompts = {"query": None, "document": None} | (main.get("prompts") or {})
        self.default_prompt = main.get("default_prompt_name")
        self.dimensions = main.get("truncate_dim")
        names = [f"sentence_{name}_config.json" for name in SENTENCE_CONFIGS]
        files = [self.folder / name for name in names if (self.folder / name).exists()]
        self._read_transformer(model, files[0] if files else Path(os.devnull))
        self.poolings, self.include_prompt = ["mean"], True
        self.layers: list = []  # vector -> vector
        for kind, name in sentence_modules(self.folder)[1:]:
            path = self.folder / name
            config = read_json(path / "config.json", {}) if name else {}
            if kind == "Pooling":
                self._read_pooling(path / "config.json", config)
            elif kind == "Dense":
                self.layers.append(dense_layer(path, config))
            elif kind == "LayerNorm":
                self.layers.append(norm_layer(path))
            elif kind == "Normalize":
                self.layers.append(lambda x: x / max(np.linalg.norm(x), 1e-12))

    def _read_transformer(self, model, file: Path):
        """How texts are cut and lower-cased."""
        config = read_json(file, {}) if file.suffix else {}
        processor = config.get("processor_kwargs") or config.get("tokenizer_args") or {}
        model_args = config.get("model_kwargs") or config.get("model_args") or {}
        harmless = {
            "attn_implementation",
            "dtype",
            "torch_dtype",
            "model_max_length",
            "padding_side",
        }
        unknown = {
            **processor,
            **model_args,
            **(config.get("config_kwargs") or {}),
        }.keys() - harmless
        unknown |= {key for key in ("config_args", "processing_kwargs") if config.get(key)}
        if config.get("transformer_task", "feature-extraction") != "feature-extraction":
            unknown.add("transformer_task")
        if (config.get("module_output_name") or "token_embeddings") != "token_embeddings":
            unknown.add("module_output_name")
        require(not unknown, f"{file}: {', '.join(sorted(unknown))} is not supported")
        limit = config.get("max_seq_length") or processor.get("model_max_length")
        if not limit:
            said = parse_json_file(model.tokenizer.files, "tokenizer_config.json")
            known = said.get("model_max_length"), model.config.get("max_position_embeddings")
            limit = min((n for n in known if n and 0 < n < 2**31), default=LONGEST)
        self.limit = min(int(limit), model.max_length)
        if config.get("do_lower_case") and hasattr(self.tokenizer, "backend"):
            self.tokenizer = lower_case(self.tokenizer)

    def _read_pooling(self, file: Path, config: dict):
        old = {
            f"pooling_mode_{name}_tokens".replace("_tokens_tokens", "_tokens"): name
            for name in POOLINGS
        }
        old |= {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
        found = [name for key, name in old.items() if config.get(key)]
        modes = config.get("pooling_mode") or sorted(found, key=[*POOLINGS].index) or "mean"
        self.poolings = [modes] if isinstance(modes, str) else list(modes)
        self.include_prompt = config.get("include_prompt", True)
        dimensions = {"word_embedding_dimension", "embedding_dimension"}
        unknown = config.keys() - dimensions - {*old, "pooling_mode", "include_prompt"}
        unknown |= set(self.poolings) - set(POOLINGS)
        require(not unknown, f"{file}: {', '.join(sorted(unknown))} is not supported")

    def prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        """The text that stands before every other."""
        name = prompt_name if prompt_name is not None else self.default_prompt
        require(
            prompt is not None or name is None or name in self.prompts,
            f"prompt_name = {name!r}, expected one of {', '.join(self.prompts)}",
        )
        return (self.prompts.get(name) if prompt is None else prompt) or ""

    def prompt_tokens(self, prompt: str) -> int:
        """Tokens before a text's own that no pooling sees."""
        if self.include_prompt or not prompt:
            return 0
        ids = encode_windows(self.tokenizer, prompt, None, self.limit)[0].ids
        special = map(self.tokenizer.backend.token_to_id, self.tokenizer.special_tokens.values())
        return len(ids) - (ids[-1] in [*special])

    def pool(self, states: np.ndarray, skip: int = 0) -> np.ndarray:
        """The vector of hidden states (tokens, hidden), of which the first `skip` do not count."""
        require(
            len(states) > skip, f"prompt: {skip} tokens leave no room for a text in {self.limit}"
        )
        weights = np.arange(1, len(states) + 1, dtype=np.float32)[skip:, None]
        states = states[skip:].astype(np.float32)
        vector = np.concatenate([POOLINGS[name](states, weights) for name in self.poolings])
        for layer in self.layers:
            vector = layer(vector)
        return vector[: self.dimensions]


def is_embedder(folder: Path | None) -> bool:
    """Is it a folder of sentence-transformers whose model embeds (and does not classify pairs)?"""
    main = read_json(folder / "config_sentence_transformers.json", {}) if folder else {}
    return (
        folder is not None
        and (folder / "modules.json").exists()
        and main.get("model_type", "SentenceTransformer") != "CrossEncoder"
    )


def sentence_modules(folder: Path) -> list[tuple[str, str]]:
    """(class, name of its folder) of each module that modules.json names; "" is the folder itself."""
    file, modules = folder / "modules.json", []
    supported = ("Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
    for entry in read_json(file, []):
        kind = re.fullmatch(r"sentence_transformers(?:\.\w+)*\.(\w+)", entry["type"])
        path = entry.get("path", "")
        allowed = supported if modules else ("Transformer",)
        require(
            kind and kind[1] in allowed,
            f"{file}: {entry['type']} is not supported here (supported: {', '.join(allowed)})",
        )
        inside = (folder / path).resolve().is_relative_to(folder.resolve())
        require(
            inside and (modules or path in ("", ".")),
            f"{file}: path {path!r}, expected "
            + ("a folder beside it" if modules else "'', the model in this folder"),
        )
        modules.append((kind[1], path))
    kinds = [kind for kind, _ in modules]
    require(
        not kinds or kinds[1:2] == ["Pooling"] and kinds.count("Pooling") == 1,
        f"{file}: {', '.join(kinds)}, expected Transformer, one Pooling and what follows it",
    )
    return modules


def sentence_files(folder: Path) -> list[str]:
    """Names of the files that sentence-transformers has in a folder beside the model, which travel with it."""
    names = ["modules.json", "config_sentence_transformers.json"]
    names += [f"sentence_{name}_config.json" for name in SENTENCE_CONFIGS]
    for _, path in sentence_modules(folder)[1:]:
        names += [f"{path}/config.json", f"{path}/model.safetensors"]
    return [name for name in names if (folder / name).is_file()]


def dense_layer(folder: Path, config: dict):
    """A linear map and an activation function."""
    weights = read_safetensors(folder / "model.safetensors")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    name = activation.rpartition(".")[2]
    source = config.get("module_input_name", "sentence_embedding")
    target = config.get("module_output_name") or source
    require(
        activation.startswith("torch.") and name in DENSE_ACTIVATIONS,
        f"{folder / 'config.json'}: activation_function = {activation!r}, "
        f"expected one of {', '.join(DENSE_ACTIVATIONS)}",
    )
    require(
        source == target == "sentence_embedding",
        f"{folder / 'config.json'}: {source} to {target}, expected a layer of sentence_embedding",
    )
    matrix, bias = weights["linear.weight"], weights.get("linear.bias", np.float32(0))
    return lambda x: DENSE_ACTIVATIONS[name](matrix @ x + bias).astype(np.float32)


def norm_layer(folder: Path):
    weights = read_safetensors(folder / "model.safetensors")

    def norm(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weights["norm.weight"] + weights[
            "norm.bias"
        ]

    return norm


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Name -> tensor, in fp32: the file is the length of a JSON header, the header and all numbers."""
    require(
        path.exists(),
        f"{path}: no such file; save the model again with a newer sentence-transformers",
    )
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    types = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        require(
            entry["dtype"] in types,
            f"{path}: {name} is {entry['dtype']}, expected {', '.join(types)}",
        )
        first, end = (start + offset for offset in entry["data_offsets"])
        array = np.frombuffer(content[first:end], types[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of an fp32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array.astype(np.float32).reshape(entry["shape"])
    return tensors


def lower_case(tokenizer):
    """A copy of the tokenizer that writes texts small first."""
    from tokenizers import normalizers

    tokenizer = copy.copy(tokenizer)
    backend = tokenizer.backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    further = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *further])
    return tokenizer


def embed(model, texts, pairs, prompt: str | None = None, prompt_name: str | None = None):
    """A vector for each text behind a prompt, or the one of that name; as sentence-transformers computes it."""
    if getattr(model, "embedder", None) is None:
        model.embedder = Embedder(model)
    embedder: Embedder = model.embedder
    prompt = embedder.prompt(prompt, prompt_name)
    windows = [
        encode_windows(embedder.tokenizer, prompt + text, None, embedder.limit)[0] for text in texts
    ]
    skip = embedder.prompt_tokens(prompt)
    for states in read(model, windows):
        yield [{"embedding": embedder.pool(states, skip).tolist()}]


def write(model, texts, pairs, **options):
    """What follows a text, or what is written of a source; through a chat template, where there is one, what answers
    it. Greedy unless the options of `generate` say otherwise."""
    tokenizer, chat = model.tokenizer, model.task == "lm" and has_chat_template(model.tokenizer)
    if chat:
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(x, add_generation_prompt=True) for x in chats]
        ends = as_ids("eos_token_id", model.config.get("eos_token_id"))
        ends = (*ends, *as_ids("eos_token_id", tokenizer.eos_token_id))
        options = {"eos_token_id": ends} | options
    limit = model.max_length if model.task == "seq2seq" else 2**31
    windows = [encode_windows(tokenizer, x, None, limit, special=not chat)[0] for x in texts]
    for text in write_windows(model, windows, len(windows), **options):
        yield [{"generated_text": text}]


def has_chat_template(tokenizer) -> bool:
    config = parse_json_file(tokenizer.files, "tokenizer_config.json")
    return bool(config.get("chat_template")) or "chat_template.jinja" in tokenizer.files


def write_windows(model, windows: list, batch: int, **options) -> list[str]:
    """The text that the model writes after each window, or of it."""
    texts: list = [None] * len(windows)
    ends = options.get("eos_token_id", model.config.get("eos_token_id"))
    ends = set(() if ends is None else np.ravel(ends).tolist())
    stop = stop_strings(options.get("stop") or model.config.get("stop_strings"))
    for rows in batches_by_length([len(window.ids) for window in windows], batch):
        ids, mask, _ = pad([windows[i] for i in rows], model)
        start = 1 if model.task == "seq2seq" else ids.shape[1]
        for i, new in zip(rows, model.generate(ids, mask, **options)[:, start:].tolist()):
            new = [*itertools.takewhile(lambda token: token not in ends, new)]
            prompt = [] if model.task == "seq2seq" else windows[i].ids
            texts[i] = "".join(stream_text(model.tokenizer, new, stop, prompt))
    return texts


TASKS = {
    "lm": write,
    "seq2seq": write,
    "classify": classify,
    "tokens": tag,
    "qa": answer,
    "mlm": fill_mask,
    "embed": embed,
}
PAIRS = ("classify", "qa")  # tasks that read two texts
CUT = ("classify", "tokens", "qa", "mlm")  # tasks that read no more of a text than was trained on
TRAINING = "tinylm_training.json"  # what a training leaves beside a model: its task, columns, block
ARCHITECTURES = {  # end of a class's name in transformers -> task
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "qa",
    "ForQuestionAnsweringSimple": "qa",
    "ForMaskedLM": "mlm",
    "ForCausalLM": "lm",
    "LMHeadModel": "lm",
    "Model": "embed",
}


def task_of(config: dict, folder: Path | None = None) -> str:
    """What a model is for, a key of TASKS, by its config.json; with sentence-transformers' modules.json to embed."""
    if is_embedder(folder):
        return "embed"
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    if config.get("model_type") == "tinylm":
        return config.get("head", "lm") or "embed"
    name = (config.get("architectures") or [""])[0]
    return next((task for end, task in ARCHITECTURES.items() if name.endswith(end)), "lm")


def remembered(folder: str | Path | None) -> dict:
    """What a training has left beside a model; {} beside another."""
    return read_json(Path(folder) / TRAINING, {}) if folder else {}


def trained_block(folder: str | Path | None) -> int | None:
    """How many tokens of a text the model was trained on, where that is known."""
    block = remembered(folder).get("block")
    return block if is_number_in(block, 1, 2**31, int) else None


def run(
    model, texts: list[str], pairs: list | None = None, batch: int = 32, **options
) -> list[list[dict]]:
    """A list of dicts for each text (and its pair: of a question the context), the likeliest first: {"label", "score"},
    {"entity_group", "word", "score", "start", "end"}, {"answer", "score", "start", "end"}, {"token_str", "score",
    "sequence"}, {"embedding"} or {"generated_text"}. Runs in batches of texts of like length."""
    texts = list(texts)
    pairs = [None] * len(texts) if pairs is None else list(pairs)
    require(
        len(pairs) == len(texts), f"pairs: {len(pairs)} of them, expected the {len(texts)} of texts"
    )
    require(
        is_number_in(batch, 1, 2**31, numbers.Integral),
        f"batch = {batch!r}, expected a positive number",
    )
    if model.task in CUT and model.block:
        options.setdefault("limit", model.block)
    results: dict = {}
    lengths = [len(text) + len(pair or "") for text, pair in zip(texts, pairs)]
    for rows in batches_by_length(lengths, batch):
        found = TASKS[model.task](
            model, [texts[i] for i in rows], [pairs[i] for i in rows], **options
        )
        results.update(zip(rows, found))
    return [results[i] for i in range(len(texts))]


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def add_run_options(parser: argparse.ArgumentParser):
    """What `onnxlm.py FOLDER` and `train.py run FOLDER` take."""
    parser.add_argument("folder", help="a model's folder")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="texts; a second one to classify, or a question's context, stands behind a tab; "
        "without any, or for a -, the lines of standard input",
    )
    parser.add_argument("--context", help="the text in which all questions find their answer")
    parser.add_argument("--batch", type=int, default=32, help="texts at a time (default: 32)")
    parser.add_argument("--json", action="store_true", help="an object per line")
    parser.add_argument("--max-new-tokens", type=int, help="of a model that writes")
    parser.add_argument("--prompt-name", help="of a model that embeds: which of its prompts")


def run_lines(model, inputs, context=None, batch: int = 32, json: bool = False, **options):
    """Print a line for each input: what the model says of it, the likeliest first, with scores."""
    two = model.task in PAIRS
    require(context is None or two, "--context: the model reads one text alone")
    for name, tasks in (("max_new_tokens", ("lm", "seq2seq")), ("prompt_name", ("embed",))):
        if model.task not in tasks or options.get(name) is None:
            options.pop(name, None)
    lines = (line.rstrip("\r\n") for line in sys.stdin)
    inputs = itertools.chain.from_iterable(
        (line for line in lines if line.strip()) if text == "-" else [text]
        for text in inputs or ["-"]
    )
    while some := list(itertools.islice(inputs, max(batch, 1))):
        parts = [text.partition("\t") if two and not context else (text, "", "") for text in some]
        pairs = [context or pair or None for *_, pair in parts]
        results = run(model, [text for text, *_ in parts], pairs, batch, **options)
        for text, found in zip(some, results):
            line = "  ".join(map(plain_line, found[:5]))
            print(json_line(input=text, output=found) if json else line, flush=True)


def json_line(**values) -> str:
    """A line that a pipe of any encoding carries."""
    return json.dumps(values)


def plain_line(result: dict) -> str:
    """What a result says, and its score; or its numbers."""
    words = [
        value for name, value in result.items() if isinstance(value, str) and name != "sequence"
    ]
    words += [f"{result['score']:.4f}"] if "score" in result else []
    return " ".join(words) if words else json.dumps(*result.values())


def use_utf8():
    """UTF-8 in the standard streams on every platform: through a pipe on Windows they have the encoding of its code
    page. A byte order mark, which PowerShell writes, is no text."""
    for stream, encoding in ((sys.stdin, "utf-8-sig"), (sys.stdout, "utf-8"), (sys.stderr, "utf-8")):
        # A stream of somebody else's, as of a notebook, or one that has been read from.
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.reconfigure(encoding=encoding, errors="replace")


def close_stdout():
    """What is still to be written goes nowhere, without a message when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list | None = None) -> int:
    """`onnxlm.py FOLDER INPUT...`; an Error is one line on stderr and exit code 1."""
    use_utf8()
    parser = argparse.ArgumentParser(
        prog="onnxlm", description="Run an exported folder on texts, without torch."
    )
    add_run_options(parser)
    parser.add_argument("--precision", choices=SUFFIXES, help="default: the first that is there")
    options = vars(parser.parse_intermixed_args(argv))
    try:
        run_lines(OnnxLM(options.pop("folder"), options.pop("precision")), **options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough, as `head`
        close_stdout()
        return 141
    except KeyboardInterrupt:
        return 130
    except (Error, OSError) as error:
        print(f"onnxlm: error: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
