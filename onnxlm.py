"""Runs an exported folder under ONNX Runtime: numpy, onnxruntime and tokenizers; no torch. Copy it into your app.

from onnxlm import OnnxLM
for piece in OnnxLM("smollm2").stream("The capital of France is"): print(piece, end="")

python onnxlm.py FOLDER INPUT...
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import csv
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
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Literal,
    NamedTuple,
    TextIO,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# Precision -> the end of its file names in onnx/.
SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_quantized",
    "int4": "_q4",
    "q4f16": "_q4f16",
}
# The end of a graph's name, before that of its precision, that the CPU is better served by.
ON_CPU = "_cpu"
# Precisions whose nodes all have a CUDA kernel: GroupQueryAttention has one in 16 bits only.
CUDA_PRECISIONS = ("fp32", "fp16", "q4f16")
# Other providers are compared with the CPU before they are used.
VERIFIED_PROVIDERS = {CPU, CUDA, "TensorrtExecutionProvider"}
# Older versions run some graphs wrongly.
MIN_ONNXRUNTIME = (1, 24)


class Error(ValueError):
    """Invalid input, or an export that failed its check. One line: the argument or file, its value, what was expected."""


def require(ok, message: str):
    if not ok:
        raise Error(message)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def print_status(text: str, end: str = "\n"):
    """Prints a line on stderr, on a terminal in the place of a line of progress."""
    print("\r\x1b[K" * sys.stderr.isatty() + text, end=end, file=sys.stderr, flush=True)


def is_number_in(value, low, high, kind=numbers.Real) -> bool:
    """Whether it is a number from low to high; a bool, which Python counts among the ints, is not."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


Size = Annotated[int, 1, 2**31]
Count = Annotated[int, 0, 2**31]
Id = Annotated[int, -1, 2**31]
Share = Annotated[float, 0, 1]


def matches_annotation(annotation, value) -> tuple[bool, str]:
    """Returns (whether the value fits the annotation, a phrase for what is allowed)."""
    if get_origin(annotation) in (Union, UnionType):
        parts = [matches_annotation(part, value) for part in get_args(annotation)]
        return any(fits for fits, _ in parts), " or ".join(text for _, text in parts if text)
    if get_origin(annotation) is Annotated:
        kind, low, high = get_args(annotation)
        limits = "of 64 bits" if low == -(2**63) else f"from {low:g} to {high:g}"
        if kind is float:
            return is_number_in(value, low, high), f"a number {limits}"
        return is_number_in(value, low, high, numbers.Integral), f"an integer {limits}"
    if get_origin(annotation) is Literal or annotation is bool:
        choices = get_args(annotation) or (True, False)
        return value in choices, " or ".join(map(str, choices))
    is_none = annotation is NoneType
    return isinstance(value, annotation), "" if is_none else f"a {annotation.__name__}"


def check_fields(owner, spelled: Callable = str):
    """Raises Error for a dataclass field that does not fit its annotation; `spelled` turns a field's name into the
    form that the error shows."""
    for name, annotation in get_type_hints(type(owner), include_extras=True).items():
        fits, expected = matches_annotation(annotation, getattr(owner, name))
        require(fits, f"{spelled(name)} = {getattr(owner, name)!r}, expected {expected}")


def read_json(path: Path, missing: dict | list | None = None):
    """The JSON object in a file. `missing` is returned where there is no file; a list means that an array is expected."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if missing is not None:
            return missing
        raise Error(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Error(f"{path}: not readable as JSON ({error})") from None
    kind, expected = ("array", list) if isinstance(missing, list) else ("object", dict)
    require(isinstance(content, expected), f"{path}: expected a JSON {kind}")
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
        outputs = self.session.get_outputs()
        self.types = {x.name: x.type for x in (*inputs, *outputs)}
        self.outputs = {o.name: o.shape for o in outputs}
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        self.limit = int(self.metadata.get("max_position_embeddings", 2**31))
        # Longer rows have other rotary positions (longrope).
        self.original = int(self.metadata.get("original_max_position_embeddings", 2**31))

    def buffer(self, name: str, *shape):
        """Uninitialized memory of the type of an input or output, on the graph's device."""
        dtype = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}.get(
            self.types[name], np.float32
        )
        return self.ort_value.ortvalue_from_shape_and_type(shape, dtype, self.device)

    def value(self, array):
        """An array on the graph's device."""
        return self.ort_value.ortvalue_from_numpy(np.asarray(array, order="C"), self.device)

    def bind(self, past: dict, present: dict):
        """A binding of a cache that stays from call to call: values by the names of inputs and of outputs."""
        binding = self.session.io_binding()
        for name, x in past.items():
            binding.bind_ortvalue_input(name, x)
        for name, x in present.items():
            binding.bind_ortvalue_output(name, x)
        return binding

    def run(self, binding, **feeds):
        """Runs the graph on what is bound and on `feeds`, arrays or OrtValues, without those that it does not take."""
        try:
            # They have to live until the graph has run.
            values = {
                name: self.value(x) if isinstance(x, np.ndarray) else x
                for name, x in feeds.items()
                if name in self.inputs
            }
            for name, x in values.items():
                binding.bind_ortvalue_input(name, x)
            self.session.run_with_iobinding(binding)
        except Exception as error:
            # For example more tokens than there are learned positions.
            raise Error(f"onnxruntime: {first_line(error)}") from None

    def __call__(self, **feeds) -> list:
        """Runs the graph and returns all outputs on its device."""
        binding = self.session.io_binding()
        for name in self.outputs:
            binding.bind_output(name, self.device)
        self.run(binding, **feeds)
        return binding.get_outputs()


class Cache(list):
    """Buffers that a graph writes keys and values into in place, and their binding, once it was made."""

    binding = None


def has_cuda(ort) -> bool:
    """Whether this is a CUDA build of ONNX Runtime and there is a driver for it."""
    if CUDA not in ort.get_available_providers():
        return False
    with contextlib.suppress(OSError):
        if ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuInit(0) == 0:
            ort.preload_dlls()
            return True
    return False


def as_ids_array(name: str, ids) -> np.ndarray:
    """Ids (batch, seq) as an array, from an array or lists of one length."""
    expected = "token ids (batch, seq): an array or lists of one length"
    require(not isinstance(ids, str), f"{name}: a text, expected {expected}; stream takes a text")
    try:
        return np.asarray(ids)
    except ValueError:
        raise Error(
            f"{name}: rows of different lengths, expected {expected}; pad them and give an attention_mask"
        ) from None


class OnnxLM:
    """An exported model under ONNX Runtime: numpy in, numpy out.

    folder: written by `export_onnx`; precision: a key of SUFFIXES (None: the first that the folder has); providers:
    ONNX Runtime's names, tried in order (None: CUDA if there is a driver and the precision runs on it, else CPU);
    threads: CPU threads (None: one per core). Raises Error for a missing file, or a requested provider that does not
    load.
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
        # Tasks read both from one dict.
        self.config = config | {
            name: value for name, value in self.generation_config.items() if value is not None
        }
        stems = ("model",)
        if is_seq2seq(self.config):
            stems = ("encoder_model", "decoder_model_merged")
        self.precision, paths = self._graphs(stems, precision)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        asked = bool(providers)
        if not asked:
            cuda = self.precision in CUDA_PRECISIONS and has_cuda(ort)
            providers = [CUDA, CPU] if cuda else [CPU]
        # A provider is a name or (name, options).
        names = [x if isinstance(x, str) else x[0] for x in providers]
        for name in names:
            require(
                name in ort.get_available_providers(),
                f"providers: {name} is not in this onnxruntime (it has "
                f"{', '.join(ort.get_available_providers())})",
            )
        if names[0] == CPU:
            for i, path in enumerate(paths):
                own = path.with_name(path.name.replace(stems[i], stems[i] + ON_CPU))
                paths[i] = own if own.exists() else path
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
        self.remembered = remembered(self.folder)
        if not {*names} <= VERIFIED_PROVIDERS:
            self._compare_with_cpu(threads)

    def _graphs(self, stems: tuple, precision: str | None) -> tuple[str, list[Path]]:
        """The requested precision, or the first one in the folder, and its files."""
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
        """Raises Error if a batch, or a cached step after it, gives other outputs than on a CPU."""
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
        """Encodes a source (batch, source): the decoder graph's inputs, hidden states and mask."""
        (states,) = self.encoder(input_ids=input_ids, attention_mask=mask)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def cache(self, batch: int, length: int = 0) -> list:
        """An empty cache. Graphs marked `shared_cache` write into buffers of the full length in place."""
        buffers = [
            self.session.buffer(name, batch, heads, length, width)
            for name, (_, heads, _, width) in self.past.items()
        ]
        return Cache(buffers) if self.shared else buffers

    def step(
        self, input_ids, mask, past: list | None = None, source: dict | None = None, keep: int = 0
    ) -> tuple[np.ndarray, list]:
        """Runs a graph with a cache once and returns (logits, present).

        input_ids (batch, seq); mask (batch, past + seq); past: from `cache` or the previous call; source: from `source`,
        behind an encoder. Logits are those of all columns, or of the last `keep`.
        """
        batch, seq = input_ids.shape
        new = mask[:, -seq:].astype(bool)
        if self.shared and mask.shape[1] > seq > 1 and not (batch == 1 and new.all()):
            return self._step_by_column(input_ids, mask, past, keep)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -(keep or seq) :]
        feeds = dict(input_ids=input_ids, attention_mask=mask, position_ids=positions)
        if isinstance(past, Cache) and past[0].shape()[2] >= mask.shape[1]:
            return self._step_in_place(past, feeds), past
        first_call = past is None
        if first_call:
            past = self.cache(batch)
        feeds |= dict(zip(self.past, past)) | (source or {})
        logits, *present = self.session(**feeds, use_cache_branch=np.array([not first_call]))
        return logits.numpy(), present

    def _step_in_place(self, past: Cache, feeds: dict) -> np.ndarray:
        """`step` with buffers that are bound once: to bind each of them anew takes as long as a layer computes."""
        name, *present = self.session.outputs
        if past.binding is None:
            past.binding = self.session.bind(dict(zip(self.past, past)), dict(zip(present, past)))
        shape = *feeds["position_ids"].shape, self.session.outputs[name][-1]
        logits = self.session.buffer(name, *shape)
        past.binding.bind_ortvalue_output(name, logits)
        self.session.run(past.binding, **feeds)
        return logits.numpy()

    def _step_by_column(self, input_ids, mask, past: list, keep: int) -> tuple[np.ndarray, list]:
        """`step` one column at a time, since the graph's operator takes several tokens after a past only for a single
        row without padding. Logits of padding are zeros."""
        batch, seq = input_ids.shape
        logits = np.zeros((batch, seq, self.vocab_size), np.float32)
        before = mask.shape[1] - seq
        for column in range(seq):
            real = mask[:, before + column]
            require(
                real.all() or not real.any(),
                "attention_mask: after a past this graph takes new tokens of which a column is padding in "
                "all rows or in none; give rows of other lengths one by one",
            )
            if real.any():
                ids, seen = input_ids[:, column : column + 1], mask[:, : before + column + 1]
                found, past = self.step(ids, seen, past)
                logits[:, column] = found[:, 0]
        return logits[:, -keep:], past

    def __call__(
        self, input_ids, attention_mask=None, token_type_ids=None, decoder_input_ids=None
    ) -> np.ndarray:
        """The output of tinylm's `forward` for ids (batch, seq). The mask marks padding on either side."""
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

    # The name in the protocol of the tasks.
    forward = __call__

    def truncate(self, past: list, mask, count: int) -> tuple[list, np.ndarray]:
        """A cache of one row and its mask (1, columns) without the newest `count` columns."""
        if not count:
            return past, mask
        if not self.shared and "attention_mask" in self.session.inputs:
            # The columns stay, masked, which spares a copy.
            mask[:, -count:] = 0
            return past, mask
        if not self.shared:
            past = [
                x if ".encoder." in name else self.session.value(x.numpy()[:, :, :-count])
                for name, x in zip(self.past, past)
            ]
        # What a shared buffer holds is what the mask covers.
        return past, mask[:, :-count]

    def gather(self, past: list, rows: list) -> list:
        """A cache whose row i is row rows[i] (beam search). The encoder's keys are the same for all beams."""
        if rows == list(range(len(rows))):
            return past
        new = []
        for name, value in zip(self.past, past):
            if ".encoder." not in name:
                value = self.session.value(value.numpy()[rows])
            new.append(value)
        return Cache(new) if self.shared else new

    def generate(
        self,
        input_ids,
        attention_mask=None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        **options,
    ) -> np.ndarray:
        """Continues every row of ids (batch, seq). Returns (batch, seq + new), with the pad id after a row's end; behind
        an encoder (batch, 1 + new), beginning with decoder_start_token_id. The options are those of tinylm's
        `generate`, fields of `GenerationConfig`, and the same seed draws the same text. Raises Error for arguments out
        of range and for logits that are not finite."""
        input_ids = as_ids_array("input_ids", input_ids)
        start = 1 if self.encoder else math.prod(input_ids.shape[1:])
        config = self.make_generation_config(start, max_new_tokens, max_length, **options)
        search = None
        choose = sample
        if config.num_beams > 1:
            search = BeamSearch(config, len(input_ids))
            choose = functools.partial(choose_beams, search=search)
        steps = list(generate_steps(self, input_ids, attention_mask, config, choose))
        if search:
            texts = search.best()
            width = max(map(len, texts))
            rows = [text + [config.pad_token_id] * (width - len(text)) for text in texts]
        else:
            rows = np.stack([token for token, _ in steps], axis=1)
        start = np.repeat(start_ids(self, input_ids), config.num_return_sequences, 0)
        return np.concatenate([start, rows], axis=1)

    def stream(
        self,
        text: str | list[int],
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        **options,
    ) -> Iterator[str]:
        """The continuation of a text (or of its ids) piece by piece: whole characters only, up to a stop string. Takes
        the options of `generate`, except for beams."""
        steps = self.steps(text, max_new_tokens, max_length, **options)
        return (piece for _, piece in steps if piece)

    def steps(
        self,
        text: str | list[int],
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        **options,
    ) -> Iterator[tuple[int, str]]:
        """The new ids behind a text one by one, each with the text that it makes known; see `stream`."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        # Something has to come before the first token.
        ids = ids or [*self.ends(), 0][:1]
        start = 1 if self.encoder else len(ids)
        options["num_beams"] = 1
        config = self.make_generation_config(start, max_new_tokens, max_length, **options)
        require(
            config.num_return_sequences == 1, "stream: one text, expected num_return_sequences = 1"
        )
        steps = generate_steps(self, np.array([ids]), None, config, with_text=True)
        return ((int(token[0]), pieces[0]) for token, pieces in steps)

    def chat(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        variables: dict | None = None,
        **options,
    ) -> Iterator[str]:
        """Streams the answer to a conversation. `messages`, `tools` and the template's `variables` are those of
        `Tokenizer.apply_chat_template`. The answer ends at the end token of the config or of the tokenizer."""
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

    def make_generation_config(
        self, prompt: int = 0, /, max_new_tokens=None, max_length=None, **given
    ) -> GenerationConfig:
        """The options of a generation: those given, else those of generation_config.json, else the defaults, of which
        max_new_tokens is cut to what the model takes after a prompt of so many tokens."""
        given["max_new_tokens"] = count_new_tokens(max_new_tokens, max_length, prompt)
        defaults = generation_defaults(self.generation_config, self.encoder is not None)
        made = make_generation_config(given, defaults, self.config)
        return cut_to_fit(made, given, self.session.limit - prompt)

    def run(
        self, texts: list[str] | str, pairs: list | str | None = None, batch: int = 32, **options
    ) -> list[list[dict]]:
        """What the model is for, of each text: see `run` below; options as of the task's function."""
        return run(self, texts, pairs, batch, **options)

    def _checked(self, input_ids, mask=None, name: str = "input_ids") -> tuple:
        input_ids = as_ids_array(name, input_ids)
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
# A folder of NAME.jinja.
EXTRA_TEMPLATES = "additional_chat_templates"

# In transformers' order.
SPECIAL_TOKENS = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
SENTENCEPIECE = "bos=<s> eos=</s> unk=<unk>"
ROBERTA = "bos=<s> eos=</s> unk=<unk> sep=</s> pad=<pad> cls=<s> mask=<mask>"
# Tokenizer class of transformers -> its special tokens where no file names others.
CLASS_TOKENS = {
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
# Another name of a tokenizer class -> the class.
SAME_TOKENIZERS = {
    "DistilBertTokenizer": "BertTokenizer",
    "ElectraTokenizer": "BertTokenizer",
    "BartTokenizer": "RobertaTokenizer",
}
# Tokenizer class -> the model types that have it; "": tokenizer.json alone decides.
MODEL_TOKENIZERS = {
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
    """Name -> content of the files in a folder that define its tokenizer and chat templates."""
    names = [*TOKENIZER_FILES]
    names += [
        f"{EXTRA_TEMPLATES}/{path.name}" for path in folder.glob(f"{EXTRA_TEMPLATES}/*.jinja")
    ]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def parse_json_file(files: dict[str, bytes], name: str) -> dict:
    """The JSON object in one of the files; {} if it is missing."""
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise Error(f"{name}: not readable as JSON ({error})") from None
    require(isinstance(content, dict), f"{name}: expected a JSON object")
    return content


def tokenizer_class(files: dict[str, bytes], hf_config: dict) -> str:
    """The class that transformers' AutoTokenizer takes; "" where tokenizer.json alone decides."""
    declared = parse_json_file(files, "tokenizer_config.json").get("tokenizer_class")
    declared = str(declared or hf_config.get("tokenizer_class") or "").removesuffix("Fast")
    declared = SAME_TOKENIZERS.get(declared, declared)
    model_type = hf_config.get("model_type")
    rows = MODEL_TOKENIZERS.items()
    registered = next((name for name, types in rows if model_type in types.split()), None)
    if declared == "LlamaTokenizer" and model_type != "qwen2":
        # Llama 3 names the class of Llama 2.
        if b'"ByteLevel"' in files.get("tokenizer.json", b""):
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
    removes one. `padding`: tokenizer.json's entry of that name."""
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
    """The text with a question mark for each lone surrogate, which UTF-8 can't encode."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


class Tokenizer:
    """A tokenizer.json, run by the `tokenizers` library.

    files: name -> content; what else a checkpoint has of a tokenizer travels along; hf_config: its config.json.
    special_tokens: name -> text, e.g. "eos_token" -> "</s>"; size: how many tokens there are; truncation_side: where a
    long text is cut; model_max_length: tokens that the model reads, as the files say it.
    """

    def __init__(self, files: dict[str, bytes], hf_config: dict | None = None):
        from tokenizers import Tokenizer as Backend

        self.files = files
        self.backend = Backend.from_str(files["tokenizer.json"].decode("utf-8"))
        self.special_tokens = special_tokens(files, hf_config, self.backend.padding)
        truncation = self.backend.truncation
        # The file's truncation and padding are leftovers of a batch.
        self.backend.no_truncation()
        self.backend.no_padding()
        config = parse_json_file(files, "tokenizer_config.json")
        self.backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        side = config.get("truncation_side") or (truncation or {}).get("direction") or "right"
        require(
            side in ("left", "right"),
            f"tokenizer_config.json: truncation_side = {side!r}, expected left or right",
        )
        self.truncation_side = side
        self.model_max_length = config.get("model_max_length", config.get("max_len"))
        self.size = self.backend.get_vocab_size()
        self.eos_token_id = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        self.pad_token_id = self.backend.token_to_id(self.special_tokens.get("pad_token", ""))

    def encode(self, text: str, pair: str | None = None, special: bool = True) -> list[int]:
        """The ids of one or two texts, with the special tokens around them if `special`."""
        return self.encoding(text, pair, special).ids

    def encoding(self, text: str, pair: str | None = None, special: bool = True):
        """The `tokenizers` library's Encoding: ids, type_ids, sequence_ids (0 or 1 for the text, None for a special
        token), offsets in the text, special_tokens_mask."""
        pair = None if pair is None else without_surrogates(pair)
        return self.backend.encode(without_surrogates(text), pair, add_special_tokens=special)

    def batch(self, texts: list[str]):
        """The ids of texts without special tokens, computed on all processors."""
        texts = [without_surrogates(text) for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)

    def decode(self, ids, special: bool = False) -> str:
        """The text of ids, with their special tokens if `special`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def apply_chat_template(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        **variables,
    ) -> str:
        """Renders a conversation with the checkpoint's chat template, as transformers'
        `apply_chat_template(..., tokenize=False)` does.

        messages: {"role", "content", ...}; tools: JSON schemas; variables: other names that the template reads
        (`documents`, `enable_thinking`, ...); `chat_template` is the name of one of several templates, or a template.
        Raises Error if there is no template, or if it refuses the conversation, writes too much or takes too long.
        """
        return render_chat(self, messages, tools, add_generation_prompt, **variables)[0]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of an exported folder."""
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
    """Returns (text, the (start, end) of each part of it that a {% generation %} block wrote)."""
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
    except Exception as error:
        # A template's code can raise anything.
        reason = " ".join(str(error).split())[:500]
        raise Error(
            f"chat: the checkpoint's chat template failed ({type(error).__name__}: {reason})"
        ) from None
    return "".join(pieces), generated


def find_chat_template(
    files: dict[str, bytes], chosen: str | None = None, tools: list[dict] | None = None
):
    """Chooses a template as transformers does: the one named `chosen` (or `chosen` itself, if there is none of that
    name), else tool_use if there are tools, else default."""
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
            # A single template has no name.
            templates = templates["default"]
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
        # A numpy scalar.
        value = value.item()
    for kind in (bool, str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else f"<{type(value).__name__}>"


def template_message(message: dict) -> dict:
    """A message as transformers passes it on: without null fields, and with reasoning under the names that templates read."""
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
    """Text written inside {% generation %}."""


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
    are_ids = all(is_number_in(i, -1, 2**31, numbers.Integral) for i in ids)
    require(are_ids, f"{name} = {value!r}, expected integers")
    return tuple(map(int, ids))


def stop_strings(stop) -> tuple:
    """One string, several or None as a tuple."""
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    are_texts = all(isinstance(text, str) and text for text in stop)
    require(are_texts, f"stop = {stop!r}, expected strings that are not empty")
    return stop


@dataclass(frozen=True)
class GenerationConfig:
    """Options of `generate`, in Hugging Face's names. `active` names those that are not left at their no-op value.

    Raises Error where a value is out of its range.
    """

    max_new_tokens: Size = 128
    # 0 takes the likeliest token.
    temperature: Annotated[float, 0, 1e9] = 0.0
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, 1e-9, 1e9] = 1.0
    # The ids that end a row; without any it never ends.
    eos_token_id: int | str | tuple | list | None = ()
    # Fills a row after its end. None: the first id that ends it, or 0.
    pad_token_id: Id | None = None
    # A row ends once its new text contains one of these strings.
    stop: str | tuple | list = ()
    seed: Annotated[int, -(2**63), 2**63 - 1] | None = None
    no_repeat_ngram_size: Count = 0
    # Tokens before a row may end, including the prompt.
    min_length: Count = 0
    # Sequences of ids that must not be written.
    bad_words_ids: tuple | list = ()
    # The first token after a decoder's start token, and the last one.
    forced_bos_token_id: Count | None = None
    forced_eos_token_id: Count | None = None
    # Above 1: beam search.
    num_beams: Annotated[int, 1, 2**16] = 1
    # A finished beam's score is its log-probability / length**length_penalty.
    length_penalty: Annotated[float, -1e3, 1e3] = 1.0
    # When to stop a row that has num_beams finished texts: True at once, False unless a better one is likely,
    # "never" unless one is possible.
    early_stopping: Literal[True, False, "never"] = False
    # Beam search: normalize scores again after the logits processors.
    renormalize_logits: bool = False
    # Texts for each row: so many samples, or the best of its beams.
    num_return_sequences: Annotated[int, 1, 2**16] = 1
    # Prompt lookup decoding: ids that a step drafts, at most, and of an n-gram that a draft follows (None: 2).
    prompt_lookup_num_tokens: Annotated[int, 1, 2**16] | None = None
    max_matching_ngram_size: Size | None = None

    def __post_init__(self):
        check_fields(self)
        ends = as_ids("eos_token_id", self.eos_token_id)
        words = self.bad_words_ids
        are_lists = all(isinstance(word, (list, tuple)) and word for word in words)
        require(are_lists, f"bad_words_ids = {words!r}, expected lists of ids that are not empty")
        words = [as_ids("bad_words_ids", word) for word in words]
        pads = (self.pad_token_id, *ends, 0)
        count = self.num_return_sequences
        vars(self).update(
            eos_token_id=ends,
            stop=stop_strings(self.stop),
            bad_words_ids=tuple(word for word in words if word not in [(end,) for end in ends]),
            pad_token_id=next(id for id in pads if id is not None and id >= 0),
            # Below this, dividing by it would overflow, and the draw is the likeliest token anyway.
            temperature=self.temperature if self.temperature >= 1e-5 else 0.0,
            top_k=self.top_k or None,
            top_p=None if self.top_p == 1 else self.top_p,
            min_p=self.min_p or None,
        )
        active = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        vars(self).update(active=frozenset(active))
        require(
            count == 1 or self.temperature or count <= self.num_beams,
            f"num_return_sequences = {count}, expected 1 without sampling, or at most num_beams",
        )
        if self.num_beams > 1:
            plain = not (self.temperature or self.stop)
            require(plain, f"num_beams = {self.num_beams}, expected 1 with a temperature or stop")
        if self.prompt_lookup_num_tokens:
            one = self.num_beams == count == 1
            require(
                one,
                f"prompt_lookup_num_tokens = {self.prompt_lookup_num_tokens}, expected none with "
                f"num_beams or num_return_sequences",
            )


# Read from generation_config.json.
FROM_FILE = set(
    """max_new_tokens repetition_penalty no_repeat_ngram_size min_length bad_words_ids
    forced_bos_token_id forced_eos_token_id num_beams renormalize_logits length_penalty
    early_stopping stop_strings prompt_lookup_num_tokens max_matching_ngram_size""".split()
)
# Options that would change greedy output -> their no-op value, beside None.
UNSUPPORTED = {
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
# All options of generation that config.json may have too.
GENERATION = {*FROM_FILE, *UNSUPPORTED} | set(
    """max_length do_sample diversity_penalty temperature top_k top_p min_p top_h epsilon_cutoff
    eta_cutoff force_bos_token_to_be_generated decoder_start_token_id bos_token_id eos_token_id
    pad_token_id""".split()
)
# Options of transformers that do not change the text.
NOT_OF_THE_TEXT = set(
    """assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind cache_config cache_implementation compile_config
    continuous_batching_config disable_compile is_assistant low_memory max_cache_len
    num_assistant_tokens num_assistant_tokens_schedule output_attentions
    output_hidden_states output_logits output_scores prefill_chunk_size
    remove_invalid_values return_dict_in_generate speculation_type target_lookbehind
    transformers_version use_cache use_mtp""".split()
)


def read_generation_config(folder: Path, config: dict) -> dict:
    """A folder's generation_config.json, or the generation options in its config.json, as transformers 4 wrote them.
    Warns once of unknown fields."""
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
    """generation_config.json as fields of GenerationConfig. Raises Error for unsupported options."""
    for name, harmless in UNSUPPORTED.items():
        fine = file.get(name) in (None, harmless)
        require(fine, f"generation_config.json: {name} = {file.get(name)!r} is not supported")
    options = {name: file[name] for name in ("eos_token_id", "pad_token_id") if name in file}
    if seq2seq and is_number_in(file.get("max_length"), 2, 2**31, numbers.Integral):
        options["max_new_tokens"] = file["max_length"] - 1
    names = (*FROM_FILE, *SAMPLING)
    options |= {name: file[name] for name in names if file.get(name) is not None}
    if "stop_strings" in options:
        options["stop"] = options.pop("stop_strings")
    return options


# The options that sampling needs. generation_config.json sets them, but only an argument asks for sampling.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def make_generation_config(given: dict, defaults: dict, config: dict) -> GenerationConfig:
    """The arguments `given`, else the `defaults` of generation_config.json, else the ids of config.json.

    An `eos_token_id` of None among the arguments means that a row never ends. `do_sample` is as in transformers: True
    samples with the defaults' temperature, top_k and top_p, False does not sample.
    """
    options = {name: config.get(name) for name in ("eos_token_id", "pad_token_id")} | defaults
    sampling = {name: options.pop(name) for name in SAMPLING if name in options}
    if given.get("eos_token_id", 0) is None:
        options["eos_token_id"] = None
    given = {name: value for name, value in given.items() if value is not None}
    do_sample = given.pop("do_sample", None)
    require(do_sample in (None, True, False), f"do_sample = {do_sample!r}, expected True or False")
    if do_sample:
        options |= {"temperature": 1.0, "top_k": 50} | sampling
    if "stop_strings" in given:
        given = {"stop": given.pop("stop_strings")} | given
    unknown = sorted((options | given).keys() - {f.name for f in fields(GenerationConfig)})
    require(not unknown, f"{', '.join(unknown)}: no such option of a generation")
    made = GenerationConfig(
        **options | given | ({"temperature": 0.0} if do_sample is False else {})
    )
    unused = [name for name in (*SAMPLING, "seed") if given.get(name) and not made.temperature]
    if unused:
        names = ", ".join(unused)
        text = f"{names}: no effect, as nothing is sampled without a temperature or do_sample=True"
        warnings.warn(text, stacklevel=4)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        token, vocab = getattr(made, name), config["vocab_size"]
        require(token is None or token < vocab, f"{name} = {token}, expected less than {vocab}")
    return made


def cut_to_fit(made: GenerationConfig, given: dict, room: int) -> GenerationConfig:
    """Options of which max_new_tokens, where it was not given, is at most `room`."""
    if given.get("max_new_tokens") is None and 0 < room < made.max_new_tokens:
        return replace(made, max_new_tokens=room)
    return made


def count_new_tokens(max_new_tokens, max_length, prompt: int) -> int | None:
    """max_new_tokens, else as many as `max_length` leaves after a prompt of so many tokens."""
    if max_length is None or max_new_tokens is not None:
        return max_new_tokens
    fits = is_number_in(max_length, prompt + 1, 2**31, numbers.Integral)
    require(
        fits, f"max_length = {max_length!r}, expected more than the {prompt} tokens of the prompt"
    )
    return max_length - prompt


def uniform(seed: int, step: int, batch: int, vocab: int) -> np.ndarray:
    """Numbers in (0, 1), (batch, vocab), a function of seed, row, step and column alone (Salmon et al. 2011,
    counter-based random numbers)."""

    def hash32(x):  # full avalanche of 32 bits (Wellons' two-round prospector)
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(15))

    rows, columns = (np.arange(n, dtype=np.uint32) for n in (batch, vocab))
    # Sums and products of arrays wrap around at 32 bits; those of scalars would warn.
    start = np.array([[seed & 0xFFFFFFFF], [step & 0xFFFFFFFF]], np.uint32)
    state = hash32(hash32(hash32(start[0]) + rows) + start[1])
    bits = hash32(state[:, None] + columns * np.uint32(0x9E3779B9))
    return ((bits >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) / np.float32(2**23)


# Logits processors take logits or log-probabilities (batch, vocab) and the state after the ids so far, change the
# logits in place and return them.


def penalize_repetition(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    for row, ids in zip(logits, state.texts):
        seen = np.unique(ids)
        scores = row[seen]
        penalty = np.float32(config.repetition_penalty)
        row[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
    return logits


def forbid_repeated_ngrams(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    n = config.no_repeat_ngram_size
    for row, ids in zip(logits, state.texts):
        newest = ids[len(ids) - n + 1 :]
        starts = range(len(ids) - n + 1)
        row[[ids[i + n - 1] for i in starts if ids[i : i + n - 1] == newest]] = -np.inf
    return logits


def forbid_bad_words(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    for *before, last in config.bad_words_ids:
        for row, ids in zip(logits, state.texts):
            same = len(ids) >= len(before) and ids[len(ids) - len(before) :] == before
            if same and 0 <= last < len(row):
                row[last] = -np.inf
    return logits


def forbid_early_end(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    ends = [i for i in config.eos_token_id if 0 <= i < logits.shape[-1]]
    for row, ids in zip(logits, state.texts):
        if len(ids) < config.min_length:
            row[ends] = -np.inf
    return logits


def force_token(row, token: int):
    row[:] = -np.inf
    row[token] = 0


def force_first(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    for row, ids in zip(logits, state.texts):
        if len(ids) == 1:
            force_token(row, config.forced_bos_token_id)
    return logits


def force_last(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    for row in logits if state.count == config.max_new_tokens - 1 else ():
        force_token(row, config.forced_eos_token_id)
    return logits


def scale_by_temperature(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    return logits / np.float32(config.temperature)


def keep_top_k(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    k = min(config.top_k, logits.shape[-1])
    least = np.partition(logits, -k, axis=-1)[:, -k]
    return np.where(logits < least[:, None], -np.inf, logits)


def keep_top_p(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    order = np.argsort(-logits, axis=-1, kind="stable")
    p = softmax(np.take_along_axis(logits, order, -1))
    # Drop a token where the likelier ones reach top_p without it.
    outside = p.cumsum(-1) - p >= config.top_p
    outside[:, 0] = False
    dropped = np.empty_like(outside)
    np.put_along_axis(dropped, order, outside, -1)
    return np.where(dropped, -np.inf, logits)


def keep_min_p(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    p = softmax(logits)
    return np.where(p < config.min_p * p.max(-1, keepdims=True), -np.inf, logits)


# Option -> its processor, in transformers' order: those that always apply, and those of sampling.
PROCESSORS = {
    "repetition_penalty": penalize_repetition,
    "no_repeat_ngram_size": forbid_repeated_ngrams,
    "bad_words_ids": forbid_bad_words,
    "min_length": forbid_early_end,
    "forced_bos_token_id": force_first,
    "forced_eos_token_id": force_last,
}
SAMPLERS = {
    "temperature": scale_by_temperature,
    "top_k": keep_top_k,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
}


def process_logits(logits, state: DecodeState, config: GenerationConfig, processors=PROCESSORS):
    """Logits or log-probabilities (batch, vocab) after the processors of all active options."""
    for option, process in processors.items():
        if option in config.active:
            logits = process(logits, state, config)
    return logits


def sample(logits, state: DecodeState, config: GenerationConfig) -> np.ndarray:
    """The next id (batch,) of each row of logits (batch, vocab): the likeliest, or at a temperature one drawn by the
    Gumbel trick."""
    logits = process_logits(logits, state, config)
    if "temperature" not in config.active:
        return logits.argmax(-1)
    logits = process_logits(logits, state, config, SAMPLERS)
    noise = uniform(state.seed, state.count, *logits.shape)
    return (logits - np.log(-np.log(noise))).argmax(-1)


def softmax(x) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class BeamSearch:
    """Beam search as transformers does it: candidates that end in a step compete by their score for as many places as
    there are beams."""

    def __init__(self, config: GenerationConfig, batch: int):
        n = config.num_beams
        self.config = config
        # Candidates of a row to look at in each step.
        self.candidates = max(2, 1 + len(config.eos_token_id)) * n
        # New ids of each beam, and their log-probabilities. At first only one beam of a row counts.
        self.texts = [[] for _ in range(batch * n)]
        self.sums = [0.0, *[-1e9] * (n - 1)] * batch
        # (score, ids) of each row's finished texts, the best first, and whether it may still find a better one.
        self.finished = [[] for _ in range(batch)]
        self.open = [True] * batch

    def advance(self, sums: list, places: list, vocab: int) -> list[int]:
        """Continue with the best candidates of each row: their sums (batch, candidates), the best first, and places
        (batch, candidates), beam * vocab + token. Returns which old beam each new one (batch * beams,) continues."""
        beams = []
        for row, candidates in enumerate(zip(sums, places)):
            beams += self.advance_row(row, *candidates, vocab)
        parents, self.sums, self.texts = map(list, zip(*beams))
        return parents

    def advance_row(self, row: int, sums: list, places: list, vocab: int) -> list:
        """(old beam, sum, ids) of the beams that a row continues with."""
        config, finished, beams = self.config, self.finished[row], []
        length = len(self.texts[0]) + 1
        last = length == config.max_new_tokens
        for rank, (total, place) in enumerate(zip(sums, places)):
            beam, token = row * config.num_beams + place // vocab, place % vocab
            ids = [*self.texts[beam], token]
            ends = token in config.eos_token_id
            if (ends or last) and self.open[row] and rank < config.num_beams:
                finished.append((total / length**config.length_penalty, ids))
            if not ends:
                beams.append((beam, total, ids))
        # Where nearly every token ends a text, the remaining beams can never win.
        while len(beams) < config.num_beams:
            beams.append((beam, -math.inf, ids))
        finished.sort(key=lambda pair: -pair[0])
        del finished[config.num_beams :]
        patient = config.early_stopping == "never" and config.length_penalty > 0
        longest = config.max_new_tokens if patient else length
        best_possible = beams[0][1] / longest**config.length_penalty
        if len(finished) == config.num_beams:
            better = best_possible > finished[-1][0]
            self.open[row] &= config.early_stopping is not True and better
        self.open[row] &= not last
        return beams[: config.num_beams]

    def best(self) -> list:
        """The new ids of the num_return_sequences best texts of each row, of different lengths."""
        count = self.config.num_return_sequences
        return [ids for finished in self.finished for _, ids in finished[:count]]


def choose_beams(
    logits, state: DecodeState, config: GenerationConfig, search: BeamSearch
) -> np.ndarray:
    """The next id of each beam (batch * beams,), in place of `sample`. The state continues from the best beams."""
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
    parents = search.advance(sums.tolist(), places.tolist(), logits.shape[-1])
    state.reorder(parents)
    state.done |= not any(search.open)
    return np.array([ids[-1] for ids in search.texts])


class PromptLookup:
    """Drafts the next ids of a text: those behind an earlier place where its newest ids stood (Saxena 2023, prompt lookup
    decoding). A step reads the draft too and accepts what it draws itself, so drafts change its speed, not the text.

    A draft is as long as pays, by how often the next id continued a match of the same length, and by the seconds that
    wider steps took. Where nothing repeats that is no draft at all.
    """

    # Longer matches are not told apart.
    LONGEST = 8
    # Earlier places that are compared with the newest ids, at most.
    PLACES = 100

    def __init__(self, config: GenerationConfig, ids: list):
        self.longest, self.ends = config.prompt_lookup_num_tokens, config.eos_token_id
        self.ngram = config.max_matching_ngram_size or 2
        self.ids = []
        # n-gram -> the columns behind it.
        self.places = {}
        # The match of the newest ids: the column behind it, and its length.
        self.place, self.matched = 0, 0
        # How often the next id continued a match of n ids. Short matches are chance until they have proved otherwise.
        self.shares = [n * n / (n * n + 8) for n in range(self.LONGEST + 1)]
        # What a step of one id takes, and each further id.
        self.seconds, self.more = None, None
        for id in ids:
            self.append(id)

    def append(self, id: int):
        """Adds the next id of the text."""
        if self.matched:
            hit = self.ids[self.place] == id
            self.shares[self.matched] += (hit - self.shares[self.matched]) / 16
            self.matched = min(self.matched + 1, self.LONGEST) if hit else 0
            self.place += 1
        for n in range(1, min(self.ngram, len(self.ids)) + 1):
            self.places.setdefault(tuple(self.ids[-n:]), []).append(len(self.ids))
        self.ids.append(id)

    def find(self):
        """Matches the newest ids with an earlier place: the longest match, the latest of several."""
        for n in range(self.ngram, 0, -1):
            places = self.places.get(tuple(self.ids[-n:]), ())[-self.PLACES :]
            if places:
                self.matched, self.place = max((self.match(place), place) for place in places)
                return

    def match(self, place: int) -> int:
        """How many of the newest ids stand before a column, too."""
        n = 0
        while n < min(place, self.LONGEST) and self.ids[place - 1 - n] == self.ids[-1 - n]:
            n += 1
        return n

    def draft(self, room: int, static: bool = False) -> list:
        """The next ids, at most `room`. static: a step with a draft always reads as many columns as the longest needs."""
        if not self.matched:
            self.find()
        if not self.matched or self.seconds is None or static and room < self.longest:
            return []
        # Less than a twentieth would be lost in what is not measured.
        best, count = 1.05 / self.seconds, 0
        chance = expected = 1.0
        for n in range(1, min(self.longest, room) + 1):
            chance *= self.shares[min(self.matched + n - 1, self.LONGEST)]
            expected += chance
            rate = expected / (self.seconds + self.more * (self.longest if static else n))
            if rate > best:
                best, count = rate, n
        ids = []
        for column in range(self.place, self.place + count):
            # Behind the text the draft repeats itself.
            known = column < len(self.ids)
            ids.append(self.ids[column] if known else ids[column - len(self.ids)])
            if ids[-1] in self.ends:
                break
        return ids

    def measure(self, width: int, seconds: float):
        """Learns what a step of so many ids takes (normalized least mean squares). Interruptions count little."""
        if self.seconds is None:
            self.seconds, self.more = seconds, seconds / 8
        further = width - 1
        expected = self.seconds + self.more * further
        change = (min(seconds, 1.25 * expected) - expected) / (1 + further**2) / 4
        self.seconds += change
        self.more = max(self.more + change * further, 0.0)


class DecodeState:
    """All that changes while a batch is generated: the ids of each row, including the prompt; whether it has ended; the
    number of tokens written; and which rows the next step continues from (beam search)."""

    def __init__(self, prompt, mask, config: GenerationConfig):
        self.texts = [row[real].tolist() for row, real in zip(prompt, mask.astype(bool))]
        self.done = np.zeros(len(prompt), bool)
        self.count = 0
        self.seed = np.random.randint(2**31) if config.seed is None else int(config.seed)
        self.rows = list(range(len(prompt)))

    def append(self, token, ends: tuple):
        """Adds the new ids (batch,) to the rows."""
        for ids, new in zip(self.texts, token.tolist()):
            ids.append(new)
        self.done |= np.isin(token, ends)
        self.count += 1

    def reorder(self, rows: list):
        """Row i continues from what row rows[i] held."""
        self.texts = [list(self.texts[row]) for row in rows]
        self.rows = rows


def start_ids(lm: OnnxLM, input_ids) -> np.ndarray:
    """The ids before the new tokens: the prompt's, or behind an encoder the start token (batch, 1)."""
    if lm.encoder is None:
        return np.asarray(input_ids)
    ids = as_ids("decoder_start_token_id", lm.generation_config.get("decoder_start_token_id"))
    return np.full((len(input_ids), 1), [*ids, lm.config["decoder_start_token_id"]][0])


NOT_FINITE = (
    "the model's logits are not finite (its numbers overflow): try another dtype or precision"
)


def make_lookup(config: GenerationConfig, rows: int, rope: dict, ids: list) -> PromptLookup:
    """What drafts the ids behind those of one row. rope: the scaling of its rotary positions."""
    count = config.prompt_lookup_num_tokens
    require(rows == 1, f"prompt_lookup_num_tokens = {count}: {rows} rows, expected one at a time")
    require(
        rope.get("rope_type") != "dynamic",
        f"prompt_lookup_num_tokens = {count}: expected none, as dynamic rotary positions depend on a step's length",
    )
    return PromptLookup(config, ids)


def generate_steps(
    lm: OnnxLM,
    input_ids,
    attention_mask,
    config: GenerationConfig,
    choose=sample,
    with_text=False,
):
    """Yields for each step the new ids (batch,), and with stop strings or `with_text` the text that the step adds to
    each row, until all rows have ended.

    Raises Error where logits are not finite.
    """
    (input_ids, mask), source = lm._checked(input_ids, attention_mask), {}
    lookup = None
    if config.prompt_lookup_num_tokens:
        rope = lm.config.get("rope_scaling") or lm.config.get("rope_parameters") or {}
        ids = input_ids[mask.astype(bool)].tolist()
        lookup = make_lookup(config, len(input_ids), rope, ids)
    seq, limit = 1 if lm.encoder else input_ids.shape[1], lm.session.limit
    require(
        seq + config.max_new_tokens <= limit,
        f"max_new_tokens = {config.max_new_tokens} after {seq} tokens, expected at most {limit} in all",
    )
    if lm.encoder:
        source = lm.source(input_ids, mask)
        input_ids = start_ids(lm, input_ids)
        mask = np.ones_like(input_ids)
    copies = max(config.num_beams, config.num_return_sequences)
    if copies > 1:
        input_ids, mask = (np.repeat(x, copies, 0) for x in (input_ids, mask))
        for name, x in source.items():
            source[name] = np.repeat(x if isinstance(x, np.ndarray) else x.numpy(), copies, 0)
    state = DecodeState(input_ids, mask, config)
    texts = []
    for ids in state.texts if config.stop or with_text else ():
        texts.append(TextStream(lm.tokenizer, config, () if lm.encoder else ids))
    # Move the padding in front of every row, so that the last column is each row's newest token.
    order = mask.argsort(1, kind="stable")
    input_ids, mask = (np.take_along_axis(x, order, 1) for x in (input_ids, mask))
    past = lm.cache(len(mask), seq + config.max_new_tokens) if lm.shared else None
    pad = min(config.pad_token_id, lm.vocab_size - 1)
    draft = []
    while state.count < config.max_new_tokens:
        start = time.perf_counter()
        logits, past = lm.step(input_ids, mask, past, source, keep=1 + len(draft))
        if lookup and state.count:
            lookup.measure(1 + len(draft), time.perf_counter() - start)
        # The columns of the newest token and of its draft, until the text goes on otherwise.
        for column, drafted in enumerate([*draft, None], -1 - len(draft)):
            newest = logits[:, column]
            require((np.isfinite(newest.max(-1)) | state.done).all(), NOT_FINITE)
            token = np.where(state.done, pad, choose(newest, state, config))
            if config.num_beams > 1:
                past = lm.gather(past, state.rows)
            state.append(token, config.eos_token_id)
            last = state.count == config.max_new_tokens
            pieces = [text.append(id, last) for text, id in zip(texts, token.tolist())]
            yield token, pieces
            for row, text in enumerate(texts):
                state.done[row] |= text.ended
            if state.done.all():
                return
            if lookup:
                lookup.append(int(token[0]))
            if token[0] != drafted:
                break
        past, mask = lm.truncate(past, mask, -1 - column)
        input_ids, draft = token[:, None], []
        lengths = [len(ids) for ids in state.texts]
        if lm.session.original + 1 in lengths:
            # Its earlier keys change too, so everything is read again.
            past = None
            rows = [[0] * (max(lengths) - len(ids)) + ids for ids in state.texts]
            input_ids = np.array(rows)
            mask = (np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]) * 1
            continue
        if lookup:
            room = config.max_new_tokens - state.count - 1
            if lengths[0] <= lm.session.original:
                room = min(room, lm.session.original - lengths[0])
            draft = lookup.draft(room)
            input_ids = np.array([[*token.tolist(), *draft]])
        mask = np.concatenate([mask, np.ones_like(input_ids)], axis=1)


class TextStream:
    """Turns the new ids of a row into text, one by one: whole characters only, and nothing from a stop string on. Stop
    strings are searched for in the text with its special tokens, which are not shown.

    New text = decode(all ids) minus decode(all but the newest): a decoder may strip a leading space.
    """

    def __init__(self, tokenizer, config: GenerationConfig, prompt=()):
        self.tokenizer = tokenizer
        self.ends, self.stop = config.eos_token_id, config.stop
        self.ids = list(prompt)
        # Ids from `start` on are decoded; the text of those before `known` is out already.
        self.start, self.known = 0, len(self.ids)
        # (text with special tokens, text to show) that may begin a stop string.
        self.held = []
        self.ended = False

    def new_text(self, special: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.known], special)
        return self.tokenizer.decode(self.ids[self.start :], special)[len(before) :]

    def append(self, token: int, last: bool = False) -> str:
        """The text to show once an id has come; after the `last` one, all that is left."""
        if self.ended:
            return ""
        text = ""
        if token in self.ends:
            last = True
        else:
            self.ids.append(token)
            text = self.known_text()
        if last and not self.ended:
            self.ended = True
            held = "".join(shown for _, shown in self.held)
            text += held + self.new_text(False)
        return text

    def known_text(self) -> str:
        """The new text that is complete and cannot begin a stop string."""
        full = self.new_text(bool(self.stop))
        # The bytes of the last character are not complete.
        if full.endswith("\ufffd"):
            return ""
        shown = self.new_text(False) if self.stop else full
        # Ids without text are no context to decode the next ones in.
        if shown:
            self.start = self.known
        self.known = len(self.ids)
        if not self.stop:
            return shown
        self.held.append((full, shown))
        text = "".join(full for full, _ in self.held)
        cut = min((text.find(stop) for stop in self.stop if stop in text), default=-1)
        self.ended = cut >= 0
        if not self.ended:
            begins = [
                n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])
            ]
            cut = len(text) - max(begins, default=0)
        return self.release(cut)

    def release(self, cut: int) -> str:
        """The held text before a character. Where a stop string has come, the rest is dropped."""
        out = []
        while self.held and (len(self.held[0][0]) <= cut or self.ended):
            full, shown = self.held.pop(0)
            out.append(shown if len(full) <= cut else os.path.commonprefix([shown, full[:cut]]))
            cut = max(cut - len(full), 0)
        return "".join(out)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: from texts to windows of tokens, and from outputs to labels, entities, answers, texts
# ---------------------------------------------------------------------------------------------------------------------
#
# A `model` is an OnnxLM, or train.py's adapter of a torch model. It has forward(ids, mask, types) -> array,
# generate(ids, mask, **options) -> ids, tokenizer, config (the dict of config.json), max_length, task, folder (or None)
# and remembered (the dict of tinylm_training.json, or {}).

# Tokens per window if neither the model's files nor its training set a limit.
DEFAULT_LIMIT = 512
# Tokens that neighbouring windows share, at most.
MAX_STRIDE = 128
# Tokens of an answer, at most, unless the training had longer ones.
LONGEST_ANSWER = 30
# Likeliest starts and ends of an answer that are paired, as in transformers' run_qa.
N_BEST = 20
# Words that begin or end with punctuation, at most, in tinylm_training.json.
MAX_ATTACHED = 2000

# Letters of scripts without spaces between words: Thai to Tibetan, Myanmar, Khmer, Tai, kana, Han, Yi.
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0fbc\u1000-\u109f\u1780-\u17d3\u1950-\u19df\u1a20-\u1aad"
    "\u3005-\u3007\u3041-\u30ff\u3105-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf"
    "\ua9e0-\ua9fe\uaa60-\uaadf\uf900-\ufaff\uff66-\uff9f\U00016fe0-\U0001b2ff\U00020000-\U0003ffff"
)
# Words that keep the mark at their end: U.S. and J., and those that end with one of -%&/*_.
ABBREVIATION = re.compile(r"\.\w+\.$|^[A-ZÀ-ÞΑ-ΩА-Я]\.$|[-%&/*_]$")
HANGUL = "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"


class Window(NamedTuple):
    """Tokens of a text, or of a pair, that a model reads at once. The lists have one entry per token."""

    ids: list
    type_ids: list
    # The token's text, 0 or 1; None for special tokens.
    sequence_ids: list
    # (start, end) in the token's text.
    offsets: list
    # The token's index in the encoding of the whole text.
    columns: list
    # Whether a part of the text is in no window.
    cut: bool = False


def encode_windows(
    tokenizer,
    text: str,
    pair: str | None = None,
    limit: int = DEFAULT_LIMIT,
    stride: int | None = None,
    special: bool = True,
) -> list[Window]:
    """Encodes a text, or a pair, as windows of at most `limit` tokens, with special tokens if `special`.

    Without a stride there is one window: a longer text is truncated on the tokenizer's `truncation_side`, the longer of
    two texts first. With a stride nothing is truncated: the last text is divided into windows that share `stride`
    tokens, each behind the whole first text. Raises Error if the first text leaves no room for that.
    """
    encoding = tokenizer.encoding(text, pair, special)
    # Token indices of the special tokens, of the text and of its pair.
    specials, first, second = (
        [column for column, part in enumerate(encoding.sequence_ids) if part == wanted]
        for wanted in (None, 0, 1)
    )
    left = getattr(tokenizer, "truncation_side", "right") == "left"
    room = limit - len(specials)
    cut = len(encoding.ids) > limit and stride is None
    if len(encoding.ids) <= limit:
        kept = [range(len(encoding.ids))]
    elif cut:
        shorter, longer = sorted((first, second), key=len)
        shorter = truncate(shorter, room // 2, left)
        kept = [specials + shorter + truncate(longer, room - len(shorter), left)]
    else:
        fixed, divided = ([], first) if pair is None else (first, second)
        room -= len(fixed)
        require(
            room > stride, f"{text[:60]!r}: leaves no room for the text behind it in {limit} tokens"
        )
        starts = range(0, max(len(divided) - stride, 1), room - stride)
        spans = [(start, min(start + room, len(divided))) for start in starts]
        # Counted from the end, so that the last window is full instead of the first.
        if left:
            spans = [(len(divided) - end, len(divided) - start) for start, end in reversed(spans)]
        kept = [specials + fixed + divided[start:end] for start, end in spans]
    lists = encoding.ids, encoding.type_ids, encoding.sequence_ids, encoding.offsets
    windows = []
    for columns in map(sorted, kept):
        values = [[values[column] for column in columns] for values in lists]
        windows.append(Window(*values, columns, cut))
    return windows


def truncate(columns: list, count: int, left: bool) -> list:
    """Returns the first `count` columns, or the last ones if the text is truncated on its left."""
    count = max(count, 0)
    return columns[max(len(columns) - count, 0) :] if left else columns[:count]


def stride_of(tokenizer, limit: int, *texts: str) -> int:
    """Returns the tokens that neighbouring windows share: at most half of the room that `texts` and the special tokens
    leave."""
    return min(MAX_STRIDE, max(limit - len(tokenizer.encode(*texts)), 0) // 2)


def widest_context(windows: list[Window]) -> dict[int, tuple[int, int]]:
    """Returns token of the whole text -> (window, column) of its copy with the most context: the number of tokens on
    its shorter side."""
    best: dict = {}
    for number, window in enumerate(windows):
        inside = [column for column, part in enumerate(window.sequence_ids) if part is not None]
        for i, column in enumerate(inside):
            context, token = min(i, len(inside) - 1 - i), window.columns[column]
            if token not in best or context > best[token][0]:
                best[token] = (context, number, column)
    return {token: best[token][1:] for token in sorted(best)}


def reading_limit(model, task_limit: int = 2**31) -> int:
    """Returns the tokens of a window: as many as in training, else the smallest limit in the model's files (or
    DEFAULT_LIMIT), at most `task_limit`."""
    limits = (
        getattr(model.tokenizer, "model_max_length", None),
        model.config.get("max_position_embeddings"),
    )
    known = [n for n in limits if is_number_in(n, 1, 2**31 - 1)] or [DEFAULT_LIMIT]
    return min(model.remembered.get("block") or min(*known, task_limit), model.max_length)


def pad(windows: list, model) -> tuple:
    """Returns ids, mask and token types (batch, longest) of windows, padded on the right; types are None for a model
    without them. A window without tokens, as some tokenizers make of an empty text, becomes an end token."""
    empty = np.ravel(model.config.get("eos_token_id") or 0)[:1].tolist()
    shape = len(windows), max(len(window.ids or empty) for window in windows)
    ids = np.full(shape, max(model.config.get("pad_token_id") or 0, 0))
    mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, window in enumerate(windows):
        tokens = window.ids or empty
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        types[row, : len(window.type_ids)] = window.type_ids
    return ids, mask, types if (model.config.get("type_vocab_size") or 0) > 1 else None


def batches_by_length(lengths: list[int], batch: int) -> list[list[int]]:
    """Returns the indices of `lengths` in batches of similar length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def read(model, windows: list, batch: int = 32) -> list:
    """Runs the model on windows. Returns its output for each, without padding: (labels,) from a classifier, else
    (tokens, ...). Raises Error if it is not finite."""
    outputs: list = [None] * len(windows)
    for rows in batches_by_length([len(window.ids) for window in windows], batch):
        ids, mask, types = pad([windows[i] for i in rows], model)
        found = model.forward(ids, mask, types)
        for i, output, count in zip(rows, found, mask.sum(1)):
            outputs[i] = output[:count] if found.ndim == 3 else output
            require(np.isfinite(outputs[i]).all(), NOT_FINITE)
    return outputs


class Reader:
    """One task: how a text becomes windows, and how the model's outputs become results. `run` and `tinylm eval` share
    it, so that both decide alike.

    limit: tokens per window (None: see `reading_limit`).
    """

    # See `reading_limit`.
    task_limit = 2**31

    def __init__(self, model, limit: int | None = None):
        require(
            limit is None or is_number_in(limit, 1, 2**31, numbers.Integral),
            f"limit = {limit!r}, expected a positive number",
        )
        self.model = model
        self.limit = min(limit or reading_limit(model, self.task_limit), model.max_length)
        # Texts read so far, and how many of them were truncated; for `notices`.
        self.texts = self.cut = 0

    def windows(self, text: str, pair: str | None) -> list[Window]:
        """Encodes a text and its pair, if any."""
        return encode_windows(self.model.tokenizer, text, pair, self.limit)

    def outputs(self, windows: list, batch: int) -> list:
        """Runs the model on windows and returns one output for each."""
        return read(self.model, windows, batch)

    def decide(self, text: str, pair: str | None, windows: list, outputs: list) -> list[dict]:
        """Returns the results of one text from the outputs of its windows, the likeliest first."""
        raise NotImplementedError

    def read(self, texts: list, pairs: list, batch: int) -> list[tuple]:
        """Returns (windows, outputs) of each text and its pair (or None)."""
        windows = [self.windows(text, pair) for text, pair in zip(texts, pairs)]
        outputs = iter(self.outputs([window for some in windows for window in some], batch))
        self.texts += len(texts)
        self.cut += sum(any(window.cut for window in some) for some in windows)
        return [(some, [*itertools.islice(outputs, len(some))]) for some in windows]

    def run(self, texts: list, pairs: list, batch: int) -> list[list[dict]]:
        """Returns the results (see `decide`) of each text and its pair (or None)."""
        found = self.read(texts, pairs, batch)
        return [
            self.decide(text, pair, windows, outputs)
            for text, pair, (windows, outputs) in zip(texts, pairs, found)
        ]

    def columns(self) -> dict:
        """Returns the columns that a table of results has -> their types."""
        return {"prediction": str, "score": float}

    def cells(self, found: list[dict]) -> dict:
        """Returns the values of these columns for one text's results; here, those of the likeliest."""
        return dict(zip(self.columns(), found[0].values()))

    def notices(self) -> list[str]:
        """Returns remarks on the results so far, one line each: truncated texts and the like."""
        return [cut_notice(self.cut, self.texts, self.limit, self.model.tokenizer)] * bool(self.cut)


def cut_notice(cut: int, texts: int, limit: int, tokenizer) -> str:
    left = getattr(tokenizer, "truncation_side", "right") == "left"
    return (
        f"{cut:,} of {texts:,} texts {'is' if cut == 1 else 'are'} longer than {limit:,} tokens, "
        f"and the {'beginning' if left else 'end'} is not read"
    )


def label_names(config: dict, count: int) -> list:
    names = config.get("id2label") or {}
    return [names.get(str(i), f"LABEL_{i}") for i in range(count)]


def label_scores(logits, config: dict) -> np.ndarray:
    """Converts logits (..., labels) to scores: the numbers themselves for regression, a sigmoid each for several labels
    or a single one, else a softmax."""
    kind = config.get("problem_type")
    if kind == "regression":
        return logits
    if kind == "multi_label_classification" or logits.shape[-1] == 1:
        return 1 / (1 + np.exp(-logits))
    return softmax(logits)


class Classifier(Reader):
    """All labels with their scores."""

    def columns(self):
        kind = self.model.config.get("problem_type")
        if kind == "regression":
            return {"prediction": float}
        several = kind == "multi_label_classification"
        return {"prediction": list[str], "score": list[float]} if several else super().columns()

    def cells(self, found):
        kind = self.columns()["prediction"]
        if kind is float:
            return {"prediction": found[0]["score"]}
        if kind is str:
            return super().cells(found)
        labels = [row.values() for row in found if row["score"] > 0.5]
        return dict(zip(self.columns(), map(list, zip(*labels) if labels else ((), ()))))

    def decide(self, text, pair, windows, outputs):
        (logits,) = outputs
        config = self.model.config
        scores, names = label_scores(logits, config), label_names(config, len(logits))
        # Sorted by logits: several scores may round to 1 in float32.
        order = np.argsort(-logits, kind="stable")
        return [{"label": names[i], "score": float(scores[i])} for i in order]


class Tagger(Reader):
    """Entities: neighbouring words of one kind, with the mean of their scores. A word's tag is read at its first token,
    as in training."""

    def windows(self, text, pair):
        words = [text[start:end] for start, end in self.words(text)]
        return word_windows(self.model.tokenizer, words, self.limit)[0]

    def columns(self):
        return {"prediction": list[dict]}

    def cells(self, found):
        return {"prediction": found}

    def words(self, text: str) -> list[tuple[int, int]]:
        return split_words(text, self.model.remembered)

    def notices(self):
        names = [*(self.model.config.get("id2label") or {}).values()]
        numbers = bool(names) and all(str(name).isdecimal() for name in names)
        text = "the model's tags are numbers (id2label in config.json): which one means no entity is unknown"
        return super().notices() + [text] * numbers

    def word_logits(self, text: str, windows: list, outputs: list) -> dict[int, np.ndarray]:
        """Returns start of a word -> logits of its tag. Words without tokens are left out."""
        spans = self.words(text)
        places = first_tokens([text[start:end] for start, end in spans], windows)
        return {spans[word][0]: outputs[at][column] for word, (at, column) in places.items()}

    def decide(self, text, pair, windows, outputs):
        spans, logits = self.words(text), self.word_logits(text, windows, outputs)
        names = label_names(self.model.config, outputs[0].shape[-1])
        tags, scores = ["O"] * len(spans), [0.0] * len(spans)
        for word, (start, _) in enumerate(spans):
            if start in logits:
                likely = softmax(logits[start])
                tags[word], scores[word] = names[likely.argmax()], float(likely.max())
        entities = []
        for kind, first, last in tag_spans(tags, names):
            start, end = spans[first][0], spans[last - 1][1]
            score = sum(scores[first:last]) / (last - first)
            entity = {"entity_group": kind, "word": text[start:end], "score": score}
            entities.append(entity | {"start": start, "end": end})
        return entities


def word_windows(tokenizer, words: list[str], limit: int) -> tuple[list[Window], dict]:
    """Encodes words joined by spaces. Returns (windows, see `first_tokens`)."""
    stride = stride_of(tokenizer, limit, "")
    windows = encode_windows(tokenizer, " ".join(words), None, limit, stride)
    return windows, first_tokens(words, windows)


def first_tokens(words: list[str], windows: list[Window]) -> dict[int, tuple[int, int]]:
    """Returns word -> (window, column) of its first token, in the window where that has the most context. Words without
    tokens are left out."""
    text = " ".join(words)
    word_at = [i for i, word in enumerate(words) for _ in word + " "]
    first: dict = {}
    for number, column in widest_context(windows).values():
        start, end = windows[number].offsets[column]
        # The token's end decides, since it may begin with the space before its word; one of spaces alone is no word's.
        if text[start:end].strip():
            first.setdefault(word_at[end - 1], (number, column))
    return first


def split_words(text: str, training: dict) -> list[tuple[int, int]]:
    """Divides a text as the words of the training were divided (see `words_of_training`; `training` is the dict of
    tinylm_training.json). Returns (start, end) of each word.

    Words end at spaces, and at punctuation if that was a word of its own in training. Text without spaces is divided
    into letters, unless the words of the training were longer.
    """
    known = training.get("words") or {}
    attached, longest = known.get("attached", []), known.get("longest_unspaced", 1)
    chunks = [match.span() for match in re.finditer(r"\S+", text)]
    # A comma or full stop between spaces: the text is already divided into words.
    divided = any(text[start:end] in (",", ".") for start, end in chunks)
    whole = divided or attached is True
    attached = set() if whole else {*attached}
    clitics = sorted((word for word in attached if word[0] in "'\u2019"), key=len, reverse=True)
    words: list = []
    for start, end in chunks:
        parts = [(start, end)]
        if not whole:
            parts = split_punctuation(text, start, end, attached, clitics)
        for first, last in parts:
            if len(re.findall(f"[{UNSPACED}]", text[first:last])) > longest:
                words += split_letters(text, first, last)
            else:
                words.append((first, last))
    return words


def split_letters(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Divides text without spaces into letters, each with its combining marks. A word of another script stays whole."""
    pieces: list = []
    # Whether the last piece is a word of another script.
    inside = False
    for i, char in enumerate(text[start:end], start):
        mark, unspaced = unicodedata.category(char)[0] == "M", re.match(f"[{UNSPACED}]", char)
        other = not unspaced and char.isalnum()
        if pieces and (mark or other and inside):
            pieces[-1] = pieces[-1][0], i + 1
        else:
            pieces.append((i, i + 1))
        inside = other or mark and inside
    return pieces


def split_punctuation(
    text: str, start: int, end: int, attached: set, clitics: list
) -> list[tuple[int, int]]:
    """Splits punctuation off both ends of a word, and clitics ('s) off its end. Returns the (start, end) of each piece.

    Abbreviations (U.S., J.) and words in `attached`, those that training had with their punctuation, stay whole.
    """
    before, behind = [], []
    while end - start > 1 and text[start:end] not in attached:
        clitic = next((x for x in clitics if text[start + 1 : end].endswith(x)), "")
        if is_mark(text[start]) and text[start] not in "@#&%-":
            before.append((start, start + 1))
            start += 1
        elif clitic:
            behind.append((end - len(clitic), end))
            end -= len(clitic)
        elif is_mark(text[end - 1]) and not ABBREVIATION.search(text[start:end]):
            behind.append((end - 1, end))
            end -= 1
        else:
            break
    return [*before, (start, end), *reversed(behind)]


def is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "P"


def words_of_training(rows: list[list[str]]) -> dict:
    """Returns the facts about the words of a training that `split_words` needs, for tinylm_training.json.

    "attached": words that begin or end with punctuation, the most frequent first; or True if commas and full stops were
    mostly part of a word. "longest_unspaced": the most letters of scripts without spaces in one word.
    """
    counts = Counter(word for words in rows for word in words)
    attached = {
        word for word in counts if len(word) > 1 and (is_mark(word[0]) or is_mark(word[-1]))
    }
    apart = sum(counts[mark] for mark in ",.!?")
    joined = sum(counts[word] for word in attached if word[-1] == ",")
    joined += sum(words[-1] in attached and words[-1][-1] in ".!?" for words in rows if words)
    letters = max((len(re.findall(f"[{UNSPACED}]", word)) for word in counts), default=0)
    frequent = sorted(attached, key=lambda word: (-counts[word], word))[:MAX_ATTACHED]
    return {"attached": True if joined > apart else frequent, "longest_unspaced": max(letters, 1)}


def marks_ends(names) -> bool:
    """Whether a model's tags also mark ends or single words (IOBES, BILOU, BMES), unlike IOB."""
    marked = {(name[0], name[2:]) for name in names if re.fullmatch(r"[BIMELSUW]-.+", name)}
    closed = {kind for mark, kind in marked if mark in "ELSUW"}
    single = all(name == "O" or name[:2] in ("S-", "U-") for name in names)
    return bool(closed) and (single or any(("B", kind) in marked for kind in closed))


def tag_spans(tags: list, names=None) -> list:
    """Returns (kind, start, end) of each entity among the tags of a text's words.

    names: all tags of the model, which tell the scheme. In IOBES, BILOU and BMES an entity is complete (B I E, B I L,
    B M E) or single (S, U, W), as in seqeval's strict mode. Otherwise it is a run of one kind other than O, and B-
    begins another.
    """
    if marks_ends(tags if names is None else names):
        return closed_spans(tags)
    kinds = [tag[2:] if tag[:2] in ("B-", "I-") else tag for tag in tags]
    starts = [
        i for i in range(len(tags)) if i == 0 or kinds[i] != kinds[i - 1] or tags[i][:2] == "B-"
    ]
    ends = [*starts[1:], len(tags)]
    return [(kinds[start], start, end) for start, end in zip(starts, ends) if kinds[start] != "O"]


def closed_spans(tags: list) -> list:
    """Returns `tag_spans` for IOBES, BILOU and BMES."""
    spans = []
    # Kind and first word of an entity that is not yet closed.
    begun: tuple = ("", 0)
    for i, tag in enumerate(tags):
        mark, kind = tag[:1] if tag[1:2] == "-" else "O", tag[2:]
        if mark in "SUW":
            spans.append((kind, i, i + 1))
        elif mark == "B":
            begun = (kind, i)
            continue
        elif kind == begun[0] and mark in "IM":
            continue
        elif kind == begun[0] and mark in "EL":
            spans.append((kind, begun[1], i + 1))
        begun = ("", 0)
    return spans


class Answerer(Reader):
    """The likeliest span of the context, or no answer.

    max_answer_length: tokens of an answer, at most (None: as in training, or LONGEST_ANSWER).
    """

    task_limit = 384

    def __init__(self, model, limit=None, max_answer_length: int | None = None):
        super().__init__(model, limit)
        known = model.remembered.get("max_answer_length")
        known = known if is_number_in(known, 1, 2**31, int) else LONGEST_ANSWER
        self.max_answer_length = known if max_answer_length is None else max_answer_length
        require(
            is_number_in(self.max_answer_length, 1, 2**31, numbers.Integral),
            f"max_answer_length = {max_answer_length!r}, expected a positive number",
        )
        self.may_be_none = model.remembered.get("handle_impossible_answer", True)

    def windows(self, text, pair):
        require(pair, f"{text[:60]!r}: expected a context, its pair")
        return question_windows(self.model.tokenizer, text, pair, self.limit)

    def decide(self, text, pair, windows, outputs):
        return [best_answer(pair, windows, outputs, self.max_answer_length, self.may_be_none)]


def question_windows(tokenizer, question: str, context: str, limit: int) -> list[Window]:
    """Encodes a question and its context as windows: the question before each part of the context. Raises Error if the
    question leaves no room for it."""
    stride = stride_of(tokenizer, limit, question, "")
    require(
        stride > 0, f"question {question[:60]!r}: leaves no room for the context in {limit} tokens"
    )
    return encode_windows(tokenizer, question, context, limit, stride)


def best_answer(
    context: str, windows: list, outputs: list, longest: int, may_be_none: bool = True
) -> dict:
    """Returns the span of at most `longest` tokens with the largest sum of start and end logits over all windows, as
    transformers' run_qa and SQuAD 2's script decide.

    outputs: start and end logits (tokens, 2) of each window. The first column stands for no answer: the answer is "" if
    it `may_be_none` and that column has a larger sum in every window. The score is the probability of the start times
    that of the end, among the window's context and the first column. A span is widened to whole words in scripts with
    spaces.
    """
    # (sum of logits, window, (start logits, end logits, is context), first column, last column)
    best, no_answer = None, None
    for window, logits in zip(windows, outputs):
        begins, ends = logits.T.astype(np.float32)
        inside = np.array([part == 1 for part in window.sequence_ids])
        found = likeliest_span(begins, ends, inside, longest)
        if found and (best is None or found[0] > best[0]):
            best = found[0], window, (begins, ends, inside), *found[1:]
        total = begins[0] + ends[0]
        if no_answer is None or total < no_answer[0]:
            no_answer = total, window, (begins, ends, inside), 0, 0
    chosen = best
    if best is None or may_be_none and no_answer[0] > best[0]:
        chosen = no_answer
    _, window, (begins, ends, inside), first, last = chosen
    candidates = inside.copy()
    candidates[0] = True
    begins, ends = (softmax(np.where(candidates, x, -np.inf)) for x in (begins, ends))
    start = end = 0
    if chosen is best:
        start, end = whole_words(context, window.offsets[first][0], window.offsets[last][1])
    score = float(begins[first] * ends[last])
    return {"answer": context[start:end], "score": score, "start": start, "end": end}


def likeliest_span(begins, ends, inside, longest: int) -> tuple | None:
    """Returns (sum of logits, first column, last column) of the likeliest span in the context, or None. All columns are
    tried only if no pair of the N_BEST likeliest fits."""
    everything = np.arange(len(begins))
    ranked = np.argsort(begins)[::-1][:N_BEST], np.argsort(ends)[::-1][:N_BEST]
    for first, last in (ranked, (everything, everything)):
        first, last = first[:, None], last[None]
        fits = inside[first] & inside[last] & (last >= first) & (last - first < longest)
        sums = np.where(fits, begins[first] + ends[last], -np.inf)
        row, column = np.unravel_index(sums.argmax(), sums.shape)
        if fits[row, column]:
            return sums[row, column], int(first[row, 0]), int(last[0, column])
    return None


def whole_words(context: str, start: int, end: int) -> tuple[int, int]:
    """Strips spaces from a span's ends and widens it to whole words."""
    while start < end and context[start].isspace():
        start += 1
    while start < end and context[end - 1].isspace():
        end -= 1
    while 0 < start < end and in_a_word(context[start - 1 : start + 1]):
        start -= 1
    while start < end < len(context) and in_a_word(context[end - 1 : end + 1]):
        end += 1
    return start, end


def in_a_word(chars: str) -> bool:
    """Whether two neighbouring characters belong to one word. Always False for scripts without spaces, where nobody
    knows, and for Hangul, where particles follow the word that is the answer."""
    letters = all(unicodedata.category(char)[0] in "LMN" for char in chars)
    return letters and not re.search(f"[{UNSPACED}{HANGUL}]", chars)


def mask_token(tokenizer) -> tuple[str, int]:
    """Returns (text, id) of the mask token."""
    # A tokenizer of bytes has no backend.
    backend = getattr(tokenizer, "backend", None)
    named = tokenizer.special_tokens.get("mask_token")
    # BERT's own files do not name it.
    for name in (named, "[MASK]", "<mask>"):
        token = backend.token_to_id(name) if backend and name else None
        if token is not None:
            return name, token
    raise Error("tokenizer_config.json: no mask_token")


class MaskFiller(Reader):
    """The `top_k` likeliest tokens for each <mask> of a text, or mask token of the tokenizer."""

    def __init__(self, model, limit=None, top_k: int = 5):
        super().__init__(model, limit)
        self.top_k = top_k
        self.name, self.mask = mask_token(model.tokenizer)

    def windows(self, text, pair):
        text, tokenizer = text.replace("<mask>", self.name), self.model.tokenizer
        stride = stride_of(tokenizer, self.limit, "")
        return encode_windows(tokenizer, text, None, self.limit, stride)

    def decide(self, text, pair, windows, outputs):
        found = []
        for number, column in widest_context(windows).values():
            ids = windows[number].ids
            if ids[column] != self.mask:
                continue
            scores = softmax(outputs[number][column])
            for token in np.argsort(-scores, kind="stable")[: self.top_k].tolist():
                filled = [*ids[:column], token, *ids[column + 1 :]]
                found.append(
                    {
                        "token_str": self.model.tokenizer.decode([token]),
                        "score": float(scores[token]),
                        "sequence": self.model.tokenizer.decode(filled),
                    }
                )
        require(found, f"{text[:60]!r}: expected {self.name} or <mask> in it")
        return found

    def cells(self, found):
        likeliest = found[:: self.top_k]
        tokens = " ".join(row["token_str"].strip() for row in likeliest)
        return {"prediction": tokens, "score": math.prod(row["score"] for row in likeliest)}


# sentence-transformers' poolings, in its order: (states (tokens, hidden), weights (tokens, 1)) -> vector.
POOLINGS = {
    "cls": lambda x, weights: x[0],
    "max": lambda x, weights: x.max(0),
    "mean": lambda x, weights: x.mean(0),
    "mean_sqrt_len_tokens": lambda x, weights: x.sum(0) / len(x) ** 0.5,
    "weightedmean": lambda x, weights: (x * weights).sum(0) / weights.sum(),
    "lasttoken": lambda x, weights: x[-1],
}
# The activations of its Dense module, by torch class.
DENSE_ACTIVATIONS = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "SiLU": lambda x: x / (1 + np.exp(-x)),
    "GELU": lambda x: x * (0.5 + 0.5 * np.vectorize(math.erf)(x * 0.5**0.5)),
}
SENTENCE_CONFIGS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")


class SentenceModules:
    """The modules of sentence-transformers behind the encoder, read from the files in the model's folder: prompts,
    pooling and further layers. Without files, mean pooling. Raises Error for unsupported modules and settings.
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
        # Functions from vector to vector.
        self.layers: list = []
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
        """Reads the limit of tokens and whether texts are lower-cased. Raises Error for other settings that would change
        the vector."""
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
            limit = reading_limit(model)
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
        """Returns the prompt put before every text: `prompt`, else the one named, else the default one or ""."""
        name = prompt_name if prompt_name is not None else self.default_prompt
        require(
            prompt is not None or name is None or name in self.prompts,
            f"prompt_name = {name!r}, expected one of {', '.join(self.prompts)}",
        )
        return (self.prompts.get(name) if prompt is None else prompt) or ""

    def prompt_tokens(self, prompt: str) -> int:
        """Returns the number of leading tokens, those of the prompt, that are not pooled."""
        if self.include_prompt or not prompt:
            return 0
        ids = encode_windows(self.tokenizer, prompt, None, self.limit)[0].ids
        special = map(self.tokenizer.backend.token_to_id, self.tokenizer.special_tokens.values())
        return len(ids) - (ids[-1] in [*special])

    def pool(self, states: np.ndarray, skip: int = 0) -> np.ndarray:
        """Returns the vector of hidden states (tokens, hidden); the first `skip` tokens are left out."""
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
    """Whether the folder is a sentence-transformers model that embeds (and is not a CrossEncoder)."""
    main = read_json(folder / "config_sentence_transformers.json", {}) if folder else {}
    return (
        folder is not None
        and (folder / "modules.json").exists()
        and main.get("model_type", "SentenceTransformer") != "CrossEncoder"
    )


def sentence_modules(folder: Path) -> list[tuple[str, str]]:
    """Returns (class, path relative to the folder) of each module in modules.json. Raises Error for a class or an order
    that is not supported."""
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
    """Returns the names of sentence-transformers' files in a folder, which are copied with the model."""
    names = ["modules.json", "config_sentence_transformers.json"]
    names += [f"sentence_{name}_config.json" for name in SENTENCE_CONFIGS]
    for _, path in sentence_modules(folder)[1:]:
        names += [f"{path}/config.json", f"{path}/model.safetensors"]
    return [name for name in names if (folder / name).is_file()]


def dense_layer(folder: Path, config: dict):
    """Returns sentence-transformers' Dense module, a linear layer with an activation, as a function of a vector."""
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
    """Returns name -> tensor in fp32. The file is 8 bytes with the length of the header, the header in JSON, and the
    numbers of all tensors."""
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
        # bfloat16 is the upper half of a float32.
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array.astype(np.float32).reshape(entry["shape"])
    return tensors


def lower_case(tokenizer):
    """Returns a copy of the tokenizer that lower-cases texts first."""
    from tokenizers import normalizers

    tokenizer = copy.copy(tokenizer)
    backend = tokenizer.backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    further = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *further])
    return tokenizer


class Embedder(Reader):
    """One vector per text, as sentence-transformers computes it.

    prompt: text before each text; prompt_name: the name of a prompt in config_sentence_transformers.json.
    """

    def __init__(self, model, prompt: str | None = None, prompt_name: str | None = None):
        if getattr(model, "sentence_modules", None) is None:
            model.sentence_modules = SentenceModules(model)
        self.modules: SentenceModules = model.sentence_modules
        super().__init__(model, self.modules.limit)
        self.prompt = self.modules.prompt(prompt, prompt_name)
        self.skip = self.modules.prompt_tokens(self.prompt)

    def windows(self, text, pair):
        return encode_windows(self.modules.tokenizer, self.prompt + text, None, self.limit)

    def decide(self, text, pair, windows, outputs):
        (states,) = outputs
        return [{"embedding": self.modules.pool(states, self.skip).tolist()}]

    def columns(self):
        return {"embedding": list[float]}


class Writer(Reader):
    """Text that a model generates: the continuation of a text, the answer to it if the tokenizer has a chat template, or
    the target of a source (seq2seq).

    options: those of `generate`; greedy by default.
    """

    def __init__(self, model, limit=None, **options):
        super().__init__(model, limit)
        self.options = options
        # Lengths of generated texts that have no end token.
        self.unfinished: list = []
        tokenizer = model.tokenizer
        self.behind_source = model.task == "seq2seq"
        self.chat = not self.behind_source and has_chat_template(tokenizer)
        # `generate` reports a prompt that is too long; only a source is truncated.
        self.limit = 2**31
        if self.behind_source:
            self.limit = min(limit or model.remembered.get("block") or 2**31, model.max_length)
        ends = as_ids("eos_token_id", model.config.get("eos_token_id"))
        if self.chat:
            ends = (*ends, *as_ids("eos_token_id", tokenizer.eos_token_id))
            self.options = {"eos_token_id": ends} | options
        ends = self.options.get("eos_token_id", ends)
        stop = stop_strings(options.get("stop") or model.config.get("stop_strings"))
        self.ending = GenerationConfig(
            eos_token_id=[*np.ravel(() if ends is None else ends)], stop=stop
        )

    def windows(self, text, pair):
        tokenizer = self.model.tokenizer
        if self.chat:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        return encode_windows(tokenizer, text, None, self.limit, special=not self.chat)

    def outputs(self, windows, batch):
        texts: list = [None] * len(windows)
        asked = self.model.config | self.options
        if asked.get("prompt_lookup_num_tokens"):
            # It reads one text at a time.
            batch = 1
        for rows in batches_by_length([len(window.ids) for window in windows], batch):
            ids, mask, _ = pad([windows[i] for i in rows], self.model)
            start = 1 if self.behind_source else ids.shape[1]
            written = self.model.generate(ids, mask, **self.options)[:, start:].tolist()
            for i, new in zip(rows, written):
                texts[i] = self.text(windows[i].ids, new)
        return texts

    def text(self, ids: list, new: list) -> str:
        """Decodes the new ids behind the `ids` of a prompt (or of a source), up to the end token or a stop string."""
        tokenizer, ending = self.model.tokenizer, self.ending
        stream = TextStream(tokenizer, ending, [] if self.behind_source else ids)
        pieces = [stream.append(id, n == len(new)) for n, id in enumerate(new, 1)]
        ended = any(id in ending.eos_token_id for id in new)
        ended |= bool(ending.stop) and any(x in tokenizer.decode(new, True) for x in ending.stop)
        if not ended and (self.behind_source or self.chat):
            self.unfinished.append(len(new))
        return "".join(pieces)

    def decide(self, text, pair, windows, outputs):
        return [{"generated_text": written} for written in outputs]

    def columns(self):
        return {"prediction": str}

    def notices(self):
        found = super().notices()
        if self.unfinished:
            count, longest = len(self.unfinished), max(self.unfinished)
            found.append(
                f"{count:,} of {self.texts:,} texts did not end within {longest:,} tokens; max_new_tokens allows more"
            )
        return found


def has_chat_template(tokenizer) -> bool:
    config = parse_json_file(tokenizer.files, "tokenizer_config.json")
    return bool(config.get("chat_template")) or "chat_template.jinja" in tokenizer.files


TASKS = {
    "lm": Writer,
    "seq2seq": Writer,
    "classify": Classifier,
    "tokens": Tagger,
    "qa": Answerer,
    "mlm": MaskFiller,
    "embed": Embedder,
}
# Tasks that read two texts.
PAIRS = ("classify", "qa")
# The file that a training leaves beside a model: its task, columns, block.
TRAINING = "tinylm_training.json"
# End of a class name in transformers -> task.
ARCHITECTURES = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tokens",
    "ElectraForPreTraining": "tokens",
    "ForQuestionAnswering": "qa",
    "ForQuestionAnsweringSimple": "qa",
    "ForMaskedLM": "mlm",
    "ForCausalLM": "lm",
    "LMHeadModel": "lm",
    "Model": "embed",
}


def is_seq2seq(config: dict) -> bool:
    """Whether a decoder writes behind an encoder; BART's classifier has both, and writes nothing."""
    name = (config.get("architectures") or [""])[0]
    return bool(config.get("is_encoder_decoder")) and not name.endswith("ForSequenceClassification")


def task_of(config: dict, folder: Path | None = None) -> str:
    """Returns a model's task, a key of TASKS, from its config.json; "embed" for a sentence-transformers folder."""
    if is_embedder(folder):
        return "embed"
    if is_seq2seq(config):
        return "seq2seq"
    if config.get("model_type") == "tinylm":
        return config.get("head", "lm") or "embed"
    name = (config.get("architectures") or [""])[0]
    return next((task for end, task in ARCHITECTURES.items() if name.endswith(end)), "lm")


def remembered(folder: str | Path | None) -> dict:
    """Returns the dict of tinylm_training.json, or {} for a model that we did not train."""
    found = read_json(Path(folder) / TRAINING, {}) if folder else {}
    if not is_number_in(found.get("block"), 1, 2**31, int):
        found.pop("block", None)
    return found


def run(
    model,
    texts: list[str] | str,
    pairs: list | str | None = None,
    batch: int = 32,
    **options,
) -> list[list[dict]]:
    """Runs the model's task on texts and returns a list of results for each, the likeliest first.

    texts: a list, or a string for one text. pairs: the second text of each (the context of a question), or a string for
    the same one everywhere. options: those of the task's reader (`TASKS`).

    A result is {"label", "score"}, {"entity_group", "word", "score", "start", "end"}, {"answer", "score", "start",
    "end"}, {"token_str", "score", "sequence"}, {"embedding"} or {"generated_text"}. Warns of texts that are truncated
    and of generated texts without an end. Raises Error for invalid arguments.
    """
    reader = TASKS[model.task](model, **options)
    results = read_all(reader, texts, pairs, batch)
    for notice in reader.notices():
        warnings.warn(notice, stacklevel=3)
    return results


def read_all(
    reader: Reader,
    texts: list[str] | str,
    pairs: list | str | None,
    batch: int,
    advance: Callable = lambda count: None,
) -> list[list[dict]]:
    """Returns a reader's results for each text and its pair (see `run`), run in batches of similar length; calls
    `advance` with the size of each batch."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    one_for_all = pairs is None or isinstance(pairs, str)
    pairs = [pairs] * len(texts) if one_for_all else list(pairs)
    require(
        len(pairs) == len(texts), f"pairs: {len(pairs)} of them, expected the {len(texts)} of texts"
    )
    require(
        is_number_in(batch, 1, 2**31, numbers.Integral),
        f"batch = {batch!r}, expected a positive number",
    )
    for text in (*texts, *(pair for pair in pairs if pair is not None)):
        require(isinstance(text, str), f"texts: {str(text)[:60]!r}, expected a text")
    pairs = [pair if pair and pair.strip() else None for pair in pairs]
    results: dict = {}
    lengths = [len(text) + len(pair or "") for text, pair in zip(texts, pairs)]
    for rows in batches_by_length(lengths, batch):
        found = reader.run([texts[i] for i in rows], [pairs[i] for i in rows], batch)
        results.update(zip(rows, found))
        advance(len(rows))
    return [results[i] for i in range(len(texts))]


# ---------------------------------------------------------------------------------------------------------------------
# Files: rows, and the same rows with results
# ---------------------------------------------------------------------------------------------------------------------
# Batches of rows in memory at a time.
CHUNK = 64


def file_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields (place, record) of a UTF-8 file: a table, JSON lines, or a .txt with a text per line."""
    kinds = {
        ".csv": table_records,
        ".tsv": functools.partial(table_records, usual="\t"),
        ".jsonl": json_lines,
        ".ndjson": json_lines,
        ".txt": text_lines,
    }
    kind = kinds.get(path.suffix.lower())
    require(kind, f"{path}: expected one of {', '.join(kinds)}")
    with open(path, encoding="utf-8-sig") as text:
        try:
            yield from kind(str(path), text)
        except UnicodeError as error:
            raise Error(f"{path}: not UTF-8 ({error.reason})") from None


def text_lines(name: str, text: TextIO) -> Iterator[tuple[str, dict]]:
    for n, line in enumerate(text, 1):
        if line.strip():
            yield f"{name}, line {n}", {"text": line.rstrip("\n")}


def json_lines(name: str, text: TextIO) -> Iterator[tuple[str, dict]]:
    """Yields (place, record) of JSON lines. Only \\n ends a line: a string may contain U+2028."""
    for n, line in enumerate(text, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                shown = repr(line.rstrip("\n")[:60])
                raise Error(f"{name}, line {n}: {shown}, expected a JSON object") from None
            yield f"{name}, line {n}", record


def table_records(
    name: str, text: TextIO, delimiter: str = "", usual: str = ","
) -> Iterator[tuple[str, dict]]:
    """Yields (place, record) of a table with a header. `text` must be seekable. Without a delimiter: `usual` if it is in
    the header, else the most frequent of , ; tab and |."""
    text.seek(0)
    header = next((line for line in text if line.strip("\n")), "")
    if not delimiter:
        delimiter = usual if usual in header else max(",;\t|", key=header.count)
    quoting = csv.QUOTE_MINIMAL
    if delimiter == "\t" and not is_quoted(text):
        quoting = csv.QUOTE_NONE
    csv.field_size_limit(2**31 - 1)
    text.seek(0)
    # A header with a space after each delimiter means that rows have them too; they are not data.
    spaced = delimiter + " " in header
    table = csv.reader(
        text, delimiter=delimiter, strict=True, quoting=quoting, skipinitialspace=spaced
    )
    columns = None
    # The first line of the record being read, for an error.
    first = 1
    try:
        for values in table:
            place = f"{name}, line {table.line_num}"
            first = table.line_num + 1
            if not values:
                continue
            if columns is None:
                columns = [column.strip() for column in values]
            else:
                require(len(values) <= len(columns), f"{place}: more fields than columns")
                yield place, dict.fromkeys(columns) | dict(zip(columns, values))
    except csv.Error as error:
        raise Error(
            f"{name}, line {first}: a quote that is not closed or doubled ({error})"
        ) from None


def is_quoted(text: TextIO) -> bool:
    """Whether quotes in a table with tabs enclose fields, as spreadsheets write them: all rows then have one length."""
    text.seek(0)
    try:
        rows = csv.reader(text, delimiter="\t", strict=True)
        return len({len(row) for row in rows if row}) == 1
    except csv.Error:
        return False


def lookup(record: dict, column: str):
    """Returns a column's value, or a nested one (translation.en); None inside a value that is not an object. Raises
    KeyError for a name that is missing."""
    if column in record:
        return record[column]
    value = record
    for name in column.split("."):
        value = value[name] if isinstance(value, dict) else None
    return value


def cell_list(cell: str) -> list | None:
    """Parses a list from a table's cell, in JSON or Python; None if it is none."""
    # numpy prints no commas between strings.
    python = re.sub(r"(['\"])\s+(?=['\"])", r"\1, ", cell.strip())
    for parse, spelled in ((json.loads, cell), (ast.literal_eval, python)):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            if isinstance(value := parse(spelled), list):
                return value
    return None


# Task -> the columns that its model reads; other tasks read "text".
INPUT_COLUMNS = {"classify": ("text", "pair"), "qa": ("question", "context")}


def input_rows(
    model, records, columns: dict = {}, view: Callable = lambda record: record
) -> Iterator[tuple[dict, str | None, str | None]]:
    """Yields (record, text, pair) for each (place, record); None for an empty text.

    columns: text, pair, question or context -> the record's column; else that of the training, else the name itself.
    view: converts a record before its columns are looked up. Raises Error for a missing column.
    """
    names = INPUT_COLUMNS.get(model.task, ("text",))
    named = {name: columns.get(name) or model.remembered.get(name) for name in names}
    # A model that was trained on single texts reads no pair.
    if model.remembered.get("text") and not named.get("pair"):
        names = [name for name in names if name != "pair"]
    for place, record in records:
        require(isinstance(record, dict), f"{place}: {str(record)[:60]!r}, expected an object")
        seen = view(record)
        texts = []
        for name in names:
            candidates = [named[name], name] if not columns.get(name) else [named[name]]
            column = next((x for x in candidates if x and has_column(seen, x)), None)
            expected = " or ".join(dict.fromkeys(filter(None, candidates)))
            require(
                column or name == "pair" and not named[name],
                f"{place}: no column {expected} (columns: {', '.join(map(str, seen))[:200]}); --{name} names it",
            )
            texts.append(
                text_in(seen, column, place, words=model.task == "tokens") if column else None
            )
        text, pair = (*texts, None)[:2]
        # A question without a context has no answer.
        if model.task == "qa" and not pair:
            text = None
        yield record, text, pair


def has_column(record: dict, column: str) -> bool:
    try:
        lookup(record, column)
    except KeyError:
        return False
    return True


def text_in(record: dict, column: str, place: str, words: bool) -> str | None:
    """Returns the text in a column, a list of words joined by spaces, or None if it is empty. `words`: a cell may spell
    a list of words."""
    value = lookup(record, column)
    # numpy scalars and arrays
    value = value.tolist() if hasattr(value, "tolist") else value
    if words and isinstance(value, str) and value.lstrip().startswith("["):
        value = cell_list(value) or value
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        value = " ".join(value)
    # NaN is not equal to itself.
    if value is None or value != value:
        return None
    require(isinstance(value, str), f"{place}: {column} = {str(value)[:60]!r}, expected a text")
    return value if value.strip() else None


@contextlib.contextmanager
def open_table(path: Path, columns: list[str], **_) -> Iterator[Callable]:
    """Opens a new .csv, .tsv or .jsonl and yields a function that appends rows. Further arguments, which a .parquet needs
    (`open_parquet` in data.py), are ignored."""
    with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
        if path.suffix.lower() in (".jsonl", ".ndjson"):

            def write(rows: list[dict]):
                file.writelines(strict_json(row, ensure_ascii=False) + "\n" for row in rows)

        else:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            table = csv.DictWriter(file, columns, delimiter=delimiter, lineterminator="\n")
            table.writeheader()

            def write(rows: list[dict]):
                for row in rows:
                    table.writerow({name: as_cell(value) for name, value in row.items()})

        yield write


def as_cell(value):
    """Returns the value for a table's cell; lists and objects become JSON."""
    return strict_json(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def strict_json(value, **options) -> str:
    """Returns strict JSON (RFC 8259): NaN and infinities become null, other objects (a date) text."""

    def finite(value):
        if isinstance(value, dict):
            return {name: finite(item) for name, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False, default=str, **options)


class BarLines:
    """The file of a progress bar where there is no terminal: each of its states becomes a line."""

    def __init__(self, print_line: Callable[[str], object]):
        self.print_line = print_line

    def write(self, text: str):
        if text.strip():
            self.print_line(text.strip())

    def flush(self):
        pass


class NoBar:
    """A progress bar where tqdm is not installed."""

    def __init__(self, items=()):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count: int = 1):
        pass


def progress_bar(
    total: int | None = None,
    what: str = "running",
    items=None,
    print_line: Callable[[str], object] = print_status,
    silent: bool = False,
):
    """tqdm's bar over the items, or one to `update`, on stderr after two seconds; if that is no terminal, a line every
    ten seconds."""
    try:
        from tqdm import tqdm
    except ImportError:
        return NoBar(items)
    style: dict = dict(mininterval=0.2)
    if not sys.stderr.isatty():
        line = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
        style = dict(mininterval=9, file=BarLines(print_line), bar_format=line)
    return tqdm(items, what, total, delay=2, leave=False, disable=silent, **style)


TABLES = {".csv": open_table, ".tsv": open_table, ".jsonl": open_table}


def run_file(
    model,
    rows: Callable,
    out: Path,
    batch: int = 32,
    tables: dict = TABLES,
    bar: Callable = progress_bar,
    **options,
):
    """Writes the rows of a file with the model's results in new columns (`Reader.columns`). Rows are streamed, and the
    file appears only once it is complete.

    rows(): yields (record, text, pair), see `input_rows`. It is called twice, so that an invalid row is found before
    the model runs. out: the file to write. tables: its suffix -> a function like `open_table`. bar(total): the progress
    bar. options: those of the task's reader.
    """
    suffix = out.suffix.lower()
    require(suffix in tables, f"--out {out}: expected one of {', '.join(tables)}")
    require(out.parent.is_dir(), f"--out {out}: {out.parent} is no folder")
    reader = TASKS[model.task](model, **options)
    columns: dict = {}
    count = empty = 0
    for record, text, _ in rows():
        columns |= dict.fromkeys(record)
        count += 1
        empty += text is None
    new = new_columns(reader.columns(), columns)
    temporary = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        types = dict(zip(new.values(), reader.columns().values()))
        with (
            tables[suffix](temporary, [*columns, *types], rows=rows, types=types) as write,
            bar(count) as shown,
        ):
            remaining = rows()
            while chunk := list(itertools.islice(remaining, CHUNK * max(batch, 1))):
                texts = [text for _, text, _ in chunk if text is not None]
                pairs = [pair for _, text, pair in chunk if text is not None]
                found = iter(read_all(reader, texts, pairs, batch, shown.update))
                write([record | cells_of(reader, new, text, found) for record, text, _ in chunk])
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    lines = [f"{out}: {count:,} rows with {', '.join(types)}"]
    if empty:
        lines.append(f"{empty:,} of {count:,} rows have no text, and nothing in these columns")
    for line in (*lines, *reader.notices()):
        print(line, file=sys.stderr)


def new_columns(names, taken) -> dict[str, str]:
    """Returns name -> name, or name -> name_2, name_3, ... for all of them if one is taken."""
    for n in itertools.count(1):
        new = {name: f"{name}_{n}" if n > 1 else name for name in names}
        if not {*new.values()} & {*taken}:
            return new


def cells_of(reader: Reader, new: dict, text: str | None, found: Iterator) -> dict:
    """Returns the new columns of one row: those of the next results in `found`, or None each if it has no text."""
    cells = dict.fromkeys(new) if text is None else reader.cells(next(found))
    return {new[name]: value for name, value in cells.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def add_precision(parser: argparse.ArgumentParser, help: str):
    parser.add_argument("--precision", choices=SUFFIXES, help=help)


def add_run_options(parser: argparse.ArgumentParser, precision: str):
    """Adds the arguments that `onnxlm.py FOLDER` and `tinylm run FOLDER` share; `precision`: help of --precision."""
    add_precision(parser, precision)
    parser.add_argument("folder", help="a model's folder")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="texts; a second one to classify, or a question's context, stands behind a tab; "
        "without any, or for a -, the lines of standard input; with --out a file",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write the rows of the file INPUT with what the model says of them in new columns (prediction, score): "
        ".csv, .tsv or .jsonl (with tinylm .parquet too)",
    )
    parser.add_argument("--text", metavar="COLUMN", help="with --out: column of the text")
    parser.add_argument("--pair", metavar="COLUMN", help="with --out: column of a second text")
    parser.add_argument("--question", metavar="COLUMN", help="with --out: column of the question")
    parser.add_argument(
        "--context",
        help="the text in which all questions find their answer; with --out the column that has it",
    )
    parser.add_argument("--batch", type=int, default=32, help="texts at a time (default: 32)")
    parser.add_argument("--json", action="store_true", help="an object per line")
    parser.add_argument("--max-new-tokens", type=int, help="of a model that writes")
    parser.add_argument(
        "--max-answer-length",
        type=int,
        help="of a model that answers questions: tokens of an answer (default: as in its training)",
    )
    parser.add_argument("--prompt-name", help="of a model that embeds: which of its prompts")


def run_command(
    model,
    inputs: list,
    out: str | None,
    rows: Callable | None = None,
    tables: dict = TABLES,
    bar: Callable = progress_bar,
    **options,
):
    """Runs `onnxlm.py` or `tinylm run`: prints a line for each input, or with `out` writes the file for one.

    rows(path, columns): yields the rows of a file, see `input_rows`; tables, bar: see `run_file`. options: the other
    arguments of `add_run_options`. Raises Error for arguments that do not go together.
    """
    # Options of some tasks; others ignore them.
    task_options = {
        "max_new_tokens": ("lm", "seq2seq"),
        "prompt_name": ("embed",),
        "max_answer_length": ("qa",),
    }
    for name, tasks in task_options.items():
        if model.task not in tasks or options.get(name) is None:
            options.pop(name, None)
    columns = {name: options.pop(name) for name in ("text", "pair", "question")}
    if not out:
        for name, column in columns.items():
            require(column is None, f"--{name} {column}: a column, expected with --out FILE")
        for text in inputs:
            require(
                not os.path.isfile(text),
                f"{text}: is a file; expected --out FILE for a prediction beside each of its rows, or - to read lines, "
                f"as in `- < {text}`",
            )
        return run_lines(model, inputs, **options)
    columns["context"] = options.pop("context")
    require(not options.pop("json"), "--json: expected without --out, whose suffix decides")
    require(len(inputs) == 1, f"--out: {len(inputs)} inputs, expected one file")
    path = Path(inputs[0])
    require(path.is_file(), f"{path}: no such file, expected one with --out")
    same = os.path.exists(out) and os.path.samefile(out, path)
    require(not same, f"--out {out}: is the input, expected another file")
    rows = rows or (lambda path, columns: input_rows(model, file_records(path), columns))
    run_file(model, lambda: rows(path, columns), Path(out), tables=tables, bar=bar, **options)


def run_lines(model, inputs, context=None, batch: int = 32, json: bool = False, **options):
    """Prints a line of results for each input, the likeliest first, with scores.

    inputs: texts, or "-" for the lines of standard input (the default); a second text follows a tab. context: the
    second text of all inputs. json: print objects. options: those of the task's reader.
    """
    reads_pairs = model.task in PAIRS
    require(context is None or reads_pairs, "--context: the model reads one text alone")
    divided = reads_pairs and not context
    lines = (line.rstrip("\r\n") for line in sys.stdin)
    inputs = itertools.chain.from_iterable(
        (line for line in lines if line.strip()) if text == "-" else [text]
        for text in inputs or ["-"]
    )
    reader = TASKS[model.task](model, **options)
    while chunk := list(itertools.islice(inputs, max(batch, 1))):
        parts = [text.partition("\t") if divided else (text, "", "") for text in chunk]
        pairs = [context or pair for *_, pair in parts]
        results = read_all(reader, [text for text, *_ in parts], pairs, batch)
        for text, found in zip(chunk, results):
            line = "  ".join(map(plain_line, found[:5]))
            print(json_line(input=text, output=found) if json else line, flush=True)
    for notice in reader.notices():
        print(notice, file=sys.stderr)


def json_line(**values) -> str:
    """Returns a JSON object in ASCII, which passes a pipe of any encoding."""
    return json.dumps(values)


def plain_line(result: dict) -> str:
    """Returns a result as words: its texts and its score, or the numbers of a vector."""
    words = [
        value for name, value in result.items() if isinstance(value, str) and name != "sequence"
    ]
    words += [f"{result['score']:.4f}"] if "score" in result else []
    return " ".join(words) if words else json.dumps(*result.values())


def use_utf8():
    """Sets the standard streams to UTF-8: Windows gives pipes its code page. A byte order mark on stdin, which
    PowerShell writes, is skipped."""
    encodings = {"stdin": "utf-8-sig", "stdout": "utf-8", "stderr": "utf-8"}
    for name, encoding in encodings.items():
        # A stream that a notebook replaced, or that has been read from, cannot be changed.
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            getattr(sys, name).reconfigure(encoding=encoding, errors="replace")


@contextlib.contextmanager
def plain_warnings(command: str):
    """Prints warnings in its context as one line on stderr (`tinylm: warning: ...`), without the source line."""

    def show(message, *_, **__):
        print_status(f"{command}: warning: {first_line(message)}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def close_stdout():
    """Sends unwritten output to /dev/null, so that Python reports no broken pipe when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list | None = None) -> int:
    """Runs `onnxlm.py FOLDER INPUT...` and returns the exit code. An Error is one line on stderr and exit code 1."""
    use_utf8()
    parser = argparse.ArgumentParser(
        prog="onnxlm", description="Run an exported folder on texts, without torch."
    )
    add_run_options(parser, "the graph to run (default: the first that is there)")
    options = vars(parser.parse_intermixed_args(argv))
    try:
        with plain_warnings("onnxlm"):
            run_command(OnnxLM(options.pop("folder"), options.pop("precision")), **options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, `head` for instance, has stopped reading.
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
