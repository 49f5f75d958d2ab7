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
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

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


class Error(ValueError):
    """What the caller gave cannot be used, or what was written failed its check: one line that says which."""


def require(ok, message: str):
    if not ok:
        raise Error(message)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_number_in(value, low, high, kind=Real) -> bool:
    """Is it a number from low to high (not a bool, which Python counts among the ints)?"""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


class Session:
    """One graph under ONNX Runtime: arrays or OrtValues in, OrtValues out."""

    def __init__(self, path: Path, options, providers: list):
        import onnxruntime as ort

        try:
            self.session = ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise Error(f"{path}: onnxruntime cannot load it ({first_line(error)})") from None
        self.values, self.provider = ort.OrtValue, self.session.get_providers()[0]
        self.device = "cuda" if self.provider in (CUDA, "TensorrtExecutionProvider") else "cpu"
        inputs = self.session.get_inputs()
        self.inputs, self.types = (
            {i.name: i.shape for i in inputs},
            {i.name: i.type for i in inputs},
        )
        self.outputs = {o.name: o.shape for o in self.session.get_outputs()}
        self.notes = self.session.get_modelmeta().custom_metadata_map
        self.limit = int(self.notes.get("max_position_embeddings", 2**31))

    def buffer(self, name: str, *shape):
        """Memory of an input's type on the graph's device; what it holds is not said."""
        dtype = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}.get(
            self.types[name], np.float32
        )
        return self.values.ortvalue_from_shape_and_type(shape, dtype, self.device)

    def __call__(self, into: dict = {}, **feeds) -> list:
        """All outputs, on the graph's device; `into`: an output's name -> the value that it is written to. What the
        graph does not take is left out."""
        binding = self.session.io_binding()
        try:
            feeds = {
                name: self.values.ortvalue_from_numpy(np.asarray(x, order="C"), self.device)
                if isinstance(x, np.ndarray)
                else x
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


class OnnxLM:
    """An exported model under ONNX Runtime: numpy in, numpy out.

    folder: what `export_onnx` wrote; precision: a key of SUFFIXES; providers: ONNX Runtime's names, tried in order
    (None: CUDA where there is a driver and the precision is for it, else CPU); threads: of the CPU (None: ONNX
    Runtime's choice, one per core).
    Raises Error where a file is missing or where a provider that was asked for does not load.
    """

    def __init__(self, folder, precision: str = "fp32", providers=None, threads: int | None = None):
        import onnxruntime as ort

        require(
            precision in SUFFIXES,
            f"precision = {precision!r}, expected one of {', '.join(SUFFIXES)}",
        )
        self.folder = Path(folder)
        generation_config = read_json(self.folder / "generation_config.json", {})
        said = {key: value for key, value in generation_config.items() if value is not None}
        self.config = read_json(self.folder / "config.json") | said
        stems = (
            ("encoder_model", "decoder_model_merged")
            if self.config.get("is_encoder_decoder")
            else ("model",)
        )
        paths = [self.folder / "onnx" / f"{stem}{SUFFIXES[precision]}.onnx" for stem in stems]
        for path in paths:
            require(
                path.exists(),
                f"{path}: no such file; write it with `python export.py FOLDER --onnx --precision "
                f"{precision}`",
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        asked, providers = (
            providers,
            providers or ([CUDA, CPU] if precision in CUDA_PRECISIONS and has_cuda(ort) else [CPU]),
        )
        names = [
            provider if isinstance(provider, str) else provider[0] for provider in providers
        ]  # or (name, options)
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
        self.shared = "shared_cache" in self.session.notes
        self.vocab_size = self.config["vocab_size"]
        self.max_length = (self.encoder or self.session).limit
        self.task = task_of(self.config, self.folder)

    @functools.cached_property
    def tokenizer(self):
        """`encode(text)` and `decode(ids)` of the folder's tokenizer.json."""
        return load_tokenizer(self.folder)

    def source(self, input_ids, mask) -> dict:
        """What the decoder's graph takes of a source (batch, source): hidden states and mask."""
        (states,) = self.encoder(input_ids=input_ids, attention_mask=mask)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def cache(self, batch: int, length: int = 0) -> list:
        """A cache's buffers; the graphs that say `shared_cache` write into those of their length in place."""
        return [
            self.session.buffer(name, batch, heads, length, width)
            for name, (_, heads, _, width) in self.past.items()
        ]

    def step(self, input_ids, mask, past=None, source=None, keep: int = 0):
        """One call of a graph with a cache: (logits, present). Ids (batch, seq), mask (batch, past + seq), past as
        returned, or of the `cache`; behind an encoder its `source`; logits of all columns, or of the last `keep`."""
        first = past is None
        past = self.cache(len(input_ids)) if first else past
        shared = self.shared and past[0].shape()[2] >= mask.shape[1]
        into = dict(zip([*self.session.outputs][1:], past)) if shared else {}
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -(keep or input_ids.shape[1]) :]
        feeds = dict(zip(self.past, past)) | (source or {})
        logits, *present = self.session(
            into,
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache_branch=np.array([not first]),
            **feeds,
        )
        return logits.numpy(), present

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
        types = (
            np.zeros_like(input_ids)
            if token_type_ids is None
            else np.asarray(token_type_ids, np.int64)
        )
        require(
            token_type_ids is None
            or "token_type_ids" in self.session.inputs
            and types.shape == input_ids.shape,
            f"token_type_ids: shape {types.shape}, "
            + (
                f"expected {input_ids.shape}"
                if "token_type_ids" in self.session.inputs
                else "but the model has no token types"
            ),
        )
        outputs = [
            x.numpy()
            for x in self.session(input_ids=input_ids, attention_mask=mask, token_type_ids=types)
        ]
        return np.stack(outputs, -1) if len(outputs) > 1 else outputs[0]

    def generate(
        self, input_ids, attention_mask=None, max_new_tokens: int | None = None, **options
    ) -> np.ndarray:
        """Continue every row: (batch, seq + new), with the pad id after a row's end; behind an encoder (batch, 1 +
        new), beginning with decoder_start_token_id. Options as in `decode`."""
        new = [*self.decode(input_ids, attention_mask, max_new_tokens, **options)]
        prompt = self._prompt(input_ids) if self.encoder else np.asarray(input_ids)
        return np.stack([*prompt.T, *new], axis=1)

    def stream(self, text, max_new_tokens: int | None = None, stop=None, **options):
        """The continuation of a text (or of its ids), piece by piece, whole characters only, up to a stop string."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        tokens, prompt = self.tokens(ids, max_new_tokens, **options), () if self.encoder else ids
        return stream_text(self.tokenizer, tokens, stop_strings(stop), prompt)

    def tokens(
        self, ids: list, max_new_tokens: int | None = None, eos_token_id="config", **options
    ):
        """The new ids after those of one row, one by one, without the one that ends the text."""
        ends = self.ends(eos_token_id)
        options = {"num_beams": 1} | options
        for (token,) in self.decode([ids or [*ends, 0][:1]], None, max_new_tokens, ends, **options):
            if token not in ends:
                yield int(token)

    def ends(self, eos_token_id="config") -> tuple:
        """Ids that end a text: those given; for "config" those of the folder."""
        if isinstance(eos_token_id, str) and eos_token_id == "config":
            eos_token_id = self.config.get("eos_token_id")
        ids = () if eos_token_id is None else tuple(np.ravel(eos_token_id).tolist())
        require(
            all(is_number_in(i, -1, 2**31, Integral) for i in ids),
            f"eos_token_id = {eos_token_id!r}, expected integers",
        )
        return ids

    def sampling(self, **given) -> SimpleNamespace:
        """tinylm's `sampling`: as given, else as the folder's generation_config.json says, else plainly."""
        said, longest = (
            {name: default for name, (default, *_) in RANGES.items()},
            self.config.get("max_length"),
        )
        said["bad_words_ids"] = ()
        if self.encoder and is_number_in(longest, 2, 2**31, Integral):
            said["max_new_tokens"] = longest - 1
        known = {*said}
        for source in ({name: self.config.get(name) for name in FROM_FILE}, given):
            said |= {name: value for name, value in source.items() if value is not None}
        unknown, words = sorted(said.keys() - known), said["bad_words_ids"]
        require(
            not unknown, f"{', '.join(unknown)}: no such option of a generation under ONNX Runtime"
        )
        for name, (_, low, high) in RANGES.items():
            value, kind = said[name], Integral if isinstance(low, int) else Real
            require(
                value is None or is_number_in(value, low, high, kind),
                f"{name} = {value!r}, expected "
                f"{'an integer' if kind is Integral else 'a number'} from {low:g} to {high:g}",
            )
        require(
            isinstance(words, (list, tuple))
            and all(
                isinstance(w, (list, tuple))
                and w
                and all(is_number_in(i, 0, 2**31, Integral) for i in w)
                for w in words
            ),
            f"bad_words_ids = {words!r}, expected lists of ids",
        )
        require(
            said["num_beams"] == 1,
            f"num_beams = {said['num_beams']}: there is no beam search under ONNX Runtime; "
            "give num_beams=1 for greedy decoding or sampling",
        )
        said["temperature"] *= said["temperature"] >= 1e-5  # below, a division would overflow
        return SimpleNamespace(**said)

    def decode(
        self,
        input_ids,
        attention_mask=None,
        max_new_tokens=None,
        eos_token_id="config",
        stop=None,
        seed=None,
        **sampling,
    ):
        """Yield the new ids (batch,) of every step, until all rows have ended. The options are those of tinylm's
        `generate`, and the same seed draws the same text: the noise is a function of seed, row, step and token."""
        generation_config = self.sampling(max_new_tokens=max_new_tokens, **sampling)
        ends, stop = self.ends(eos_token_id), stop_strings(stop)
        (input_ids, mask), source = self._checked(input_ids, attention_mask), None
        require(
            seed is None or is_number_in(seed, -(2**63), 2**63 - 1, Integral),
            f"seed = {seed!r}, expected an integer of 64 bits",
        )
        seed = int(np.random.randint(2**31) if seed is None else seed)
        pad = next(
            i for i in (self.config.get("pad_token_id"), *ends, 0) if i is not None and i >= 0
        )
        pad = min(pad, self.vocab_size - 1)
        if self.encoder:
            source = self.source(input_ids, mask)
            input_ids = self._prompt(input_ids)
            mask = np.ones_like(input_ids)
        batch, seq = input_ids.shape
        limit = self.session.limit
        require(
            seq + generation_config.max_new_tokens <= limit,
            f"max_new_tokens = {generation_config.max_new_tokens} after {seq} tokens, "
            f"expected at most {limit} in all",
        )
        texts = [
            row[real].tolist() for row, real in zip(input_ids, mask.astype(bool))
        ]  # prompts, and what follows
        starts, ended = [*map(len, texts)], np.zeros(batch, bool)
        order = mask.argsort(1, kind="stable")  # every row's last token goes to the last column
        input_ids, mask = (np.take_along_axis(x, order, 1) for x in (input_ids, mask))
        longest = np.concatenate(
            [mask, np.ones((batch, generation_config.max_new_tokens), np.int64)], 1
        )
        past = self.cache(batch, seq + generation_config.max_new_tokens) if self.shared else None
        for count in range(generation_config.max_new_tokens):
            logits, past = self.step(input_ids, mask, past, source, keep=1)
            logits = process_logits(logits[:, -1], texts, generation_config, ends, count)
            token = np.where(ended, pad, sample(logits, generation_config, seed, count))
            yield token
            for row, (text, id) in enumerate(zip(texts, token.tolist())):
                text.append(id)
                ended[row] |= id in ends or any(
                    s in self.tokenizer.decode(text[starts[row] :][-2 * len(s.encode()) - 8 :])
                    for s in stop
                )
            if ended.all():
                return
            input_ids, mask = token[:, None], longest[:, : seq + count + 1]

    def forward(self, input_ids, attention_mask, token_type_ids=None) -> np.ndarray:
        return self(input_ids, attention_mask, token_type_ids)

    def run(self, texts, pairs=None, batch: int = 32, **options) -> list[list[dict]]:
        """What the model is for, of each text: see `run` below; options as of the task's function."""
        return run(self, texts, pairs, batch, **options)

    def _prompt(self, input_ids) -> np.ndarray:
        """What a decoder behind an encoder begins with, (batch, 1)."""
        return np.full((len(input_ids), 1), self.config["decoder_start_token_id"])

    def _checked(self, input_ids, mask=None, name: str = "input_ids") -> tuple:
        input_ids = np.asarray(input_ids)
        require(
            input_ids.ndim == 2 and input_ids.size and np.issubdtype(input_ids.dtype, np.integer),
            f"{name}: {input_ids.dtype} of shape {input_ids.shape}, expected ids (batch, seq)",
        )
        limit = (
            self.session if self.encoder is None or name != "input_ids" else self.encoder
        ).limit
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


# ---- after the logits: what a model's outputs mean, for OnnxLM and, through an adapter, for a model in torch ---------
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
    tokenizer, text: str, pair: str | None = None, limit: int = LONGEST, stride: int | None = None
) -> list[Window]:
    """A text, or two, between specials in at most `limit` tokens: cut at the end, of two texts first of the longer one;
    with a stride the second one is divided into windows that share so many tokens."""
    encoding = tokenizer.encoding(text, pair)
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


def like_lengths(windows: list, batch: int):
    """Indices of windows in batches of like length, the longest first."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def read(model, windows: list, batch: int = 32) -> list:
    """The model's output for each window, without padding: of a classifier (labels,), else (tokens, ...)."""
    outputs: list = [None] * len(windows)
    for rows in like_lengths(windows, batch):
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
ACTIVATIONS = {  # of its Dense: the class of torch -> what it computes
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
        self.tokenizer, self.folder = model.tokenizer, model.folder or Path(os.devnull)
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
        activation.startswith("torch.") and name in ACTIVATIONS,
        f"{folder / 'config.json'}: activation_function = {activation!r}, "
        f"expected one of {', '.join(ACTIVATIONS)}",
    )
    require(
        source == target == "sentence_embedding",
        f"{folder / 'config.json'}: {source} to {target}, expected a layer of sentence_embedding",
    )
    matrix, bias = weights["linear.weight"], weights.get("linear.bias", np.float32(0))
    return lambda x: ACTIVATIONS[name](matrix @ x + bias).astype(np.float32)


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
    """What follows a text, or what is written of a source; greedy unless the options of `generate` say otherwise."""
    limit = model.max_length if model.task == "seq2seq" else 2**31
    windows = [encode_windows(model.tokenizer, text, None, limit)[0] for text in texts]
    for text in write_windows(model, windows, len(windows), **options):
        yield [{"generated_text": text}]


def write_windows(model, windows: list, batch: int, **options) -> list[str]:
    """The text that the model writes after each window, or of it."""
    texts: list = [None] * len(windows)
    ends = options.get("eos_token_id", model.config.get("eos_token_id"))
    ends = set(() if ends is None else np.ravel(ends).tolist())
    for rows in like_lengths(windows, batch):
        ids, mask, _ = pad([windows[i] for i in rows], model)
        start = 1 if model.task == "seq2seq" else ids.shape[1]
        for i, new in zip(rows, model.generate(ids, mask, **options)[:, start:].tolist()):
            new = [*itertools.takewhile(lambda token: token not in ends, new)]
            prompt = [] if model.task == "seq2seq" else windows[i].ids
            before = model.tokenizer.decode(prompt)  # a decoder may strip a text's first space
            text = model.tokenizer.decode(prompt + new)[len(before) :]
            for string in stop_strings(options.get("stop")):
                text = text.partition(string)[0]
            texts[i] = text
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


def run(model, texts, pairs=None, batch: int = 32, **options) -> list:
    """A list of dicts for each text (and its pair: of a question the context), the likeliest first: {"label", "score"},
    {"entity_group", "word", "score", "start", "end"}, {"answer", "score", "start", "end"}, {"token_str", "score",
    "sequence"}, {"embedding"} or {"generated_text"}. Runs in batches of texts of like length."""
    texts = list(texts)
    pairs = [None] * len(texts) if pairs is None else list(pairs)
    require(
        len(pairs) == len(texts), f"pairs: {len(pairs)} of them, expected the {len(texts)} of texts"
    )
    require(
        is_number_in(batch, 1, 2**31, Integral), f"batch = {batch!r}, expected a positive number"
    )
    results: dict = {}
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]) - len(pairs[i] or ""))
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        found = TASKS[model.task](
            model, [texts[i] for i in rows], [pairs[i] for i in rows], **options
        )
        results.update(zip(rows, found))
    return [results[i] for i in range(len(texts))]


# Tokenizers and chat templates: mirrored in tinylm.py
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
)
EXTRA_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja

_ENDOFTEXT = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
_SENTENCEPIECE = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_ROBERTA = _SENTENCEPIECE | {
    "sep_token": "</s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_BERT = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "SEP", "PAD", "CLS", "MASK")}
CLASS_TOKENS = {  # tokenizer class of transformers -> the special tokens that it has where no file says otherwise
    "BertTokenizer": _BERT,
    "DistilBertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "MPNetTokenizer": _ROBERTA | {"unk_token": "[UNK]"},
    "RobertaTokenizer": _ROBERTA,
    "BartTokenizer": _ROBERTA,
    "XLMRobertaTokenizer": _ROBERTA,
    "MBartTokenizer": _ROBERTA,
    "LlamaTokenizer": _SENTENCEPIECE,
    "CodeLlamaTokenizer": _SENTENCEPIECE,
    "GPT2Tokenizer": _ENDOFTEXT,
    "GPTNeoXTokenizer": _ENDOFTEXT | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": _ENDOFTEXT | {"bos_token": None, "pad_token": "<|endoftext|>"},
    "T5Tokenizer": {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"},
    "GemmaTokenizer": {
        f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")
    },
}
MODEL_TOKENIZERS = {  # model_type -> tokenizer class of transformers; "": whatever tokenizer.json says
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "electra": "BertTokenizer",
    "mpnet": "MPNetTokenizer",
    "roberta": "RobertaTokenizer",
    "bart": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "mbart": "MBartTokenizer",
    "gpt2": "GPT2Tokenizer",
    "starcoder2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "t5": "T5Tokenizer",
    "mistral": "",
    "olmo2": "",
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
    registered = MODEL_TOKENIZERS.get(hf_config.get("model_type"))
    if declared == "LlamaTokenizer" and hf_config.get("model_type") not in ("qwen2", "phi3"):
        if b'"ByteLevel"' in files.get("tokenizer.json", b""):  # Llama 3
            return ""
    if declared and registered == "":
        return ""
    if registered and (not declared or hf_config["model_type"] == "qwen2"):
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
    tokens = dict(CLASS_TOKENS.get(tokenizer_class(files, hf_config or {}), {}))
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
    return {name: text for name, text in texts.items() if isinstance(text, str)}


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
        self.size = self.backend.get_vocab_size()
        self.eos_token_id = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        self.pad_token_id = self.backend.token_to_id(self.special_tokens.get("pad_token", ""))

    def encode(self, text: str, pair: str | None = None, special: bool = True) -> list[int]:
        """Ids of a text or of two; `special`: with the tokens that the model wants around them."""
        return self.encoding(text, pair, special).ids

    def encoding(self, text: str, pair: str | None = None, special: bool = True):
        """The `tokenizers` library's Encoding: ids, type_ids, sequence_ids (which text; None: a special token), offsets
        in the text, special_tokens_mask."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        if pair is not None:
            pair = pair.encode("utf-8", errors="replace").decode("utf-8")
        return self.backend.encode(text, pair, add_special_tokens=special)

    def batch(self, texts: list[str]):
        """Ids of texts without special tokens around them, on all processors."""
        texts = [text.encode("utf-8", errors="replace").decode("utf-8") for text in texts]
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


# Chat templates are programs that come with a checkpoint. They run in jinja2's sandbox, and there in bounds.
MAX_TEMPLATE_SECONDS = 2
MAX_TEMPLATE_VALUE = 2**22  # characters or items of one value
MAX_TEMPLATE_BITS = 2**12  # of one number
template_time = threading.local()  # .end: when the template that this thread renders has to be done


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
    names |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    names = plain_data(names)
    names["messages"] = [template_message(message) for message in names["messages"]]
    limit = 2**20 + 8 * len(str(names))
    template_time.end = time.monotonic() + MAX_TEMPLATE_SECONDS
    pieces, size, generated = [], 0, []
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
            require(time.monotonic() < template_time.end, "it takes too long")
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
        name.removeprefix(f"{EXTRA_TEMPLATES}/").removesuffix(".jinja"): content
        for name, content in files.items()
        if name.startswith(EXTRA_TEMPLATES)
    }
    if "chat_template.jinja" in files:
        found["default"] = files["chat_template.jinja"]
    if found:
        templates = {name: text.decode("utf-8", errors="replace") for name, text in found.items()}
    if not isinstance(templates, dict):
        templates = {"default": templates}
    if chosen is not None:
        return templates.get(chosen, chosen)
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    require(
        templates.get("default"),
        "chat: the checkpoint has no chat_template in tokenizer_config.json and no chat_template.jinja"
        + (f", only templates named {', '.join(templates)}" if found else ""),
    )
    return templates["default"]


def plain_data(value):
    """Copies of what a template may see: JSON's types, whose methods the sandbox knows; of all else its name."""
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
    """transformers' environment for chat templates; more than its sandbox, each loop, call, filter and operator looks
    whether there is time left and whether its value would be very large."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < (3, 1, 6):  # there are ways out of the sandbox of older ones
        raise ImportError(jinja2.__version__)

    def check(value, *arguments):
        """The value, if it is not too large and if what is called with the arguments will not make it so."""
        if time.monotonic() > template_time.end:
            raise TimeoutError(f"it takes more than {MAX_TEMPLATE_SECONDS} seconds")
        lengths = [len(x) for x in (value, *arguments) if isinstance(x, (str, list, tuple, dict))]
        numbers = [abs(x) for x in arguments if isinstance(x, int)]
        longest = sorted(lengths)[-2:]
        if max(lengths + numbers, default=0) > MAX_TEMPLATE_VALUE or math.prod(longest) > 2**30:
            raise SecurityError("a value is too large")
        return value

    def check_format(text: str, arguments):
        """Widths in a format make long texts of short ones."""
        if re.search(r"\d{7}|\*", text):
            raise SecurityError("a width in a format")
        check(text)

    def each(iterable):
        for item in iterable:
            yield check(item)

    def bounded(function):
        @functools.wraps(function)  # keeps what jinja2 notes on it
        def call(*arguments, **options):
            check(None, *arguments, *options.values())
            return check(function(*arguments, **options))

        return call

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("write"), [], [], body).set_lineno(line)

        def write(self, caller):
            return GeneratedText(caller())

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def _parse(self, *source):
            tree = super()._parse(*source)
            for node in [*tree.find_all((nodes.For, nodes.Concat))]:
                if isinstance(node, nodes.For):
                    node.iter = nodes.Filter(node.iter, "each", [], [], None, None)
                else:
                    joined = nodes.Concat(node.nodes)
                    node.nodes = [nodes.Filter(joined, "check", [], [], None, None)]
            return tree.set_environment(self)

        def call(self, context, function, *arguments, **options):
            target = getattr(function, "__self__", None)
            if isinstance(target, str) and function.__name__ in ("format", "format_map"):
                check_format(target, arguments)
            check(target, *arguments, *options.values())
            return check(super().call(context, function, *arguments, **options))

        def call_binop(self, context, operator, left, right):
            whole = isinstance(left, int) and isinstance(right, int)
            if operator == "%" and isinstance(left, str):
                check_format(left, right)
            elif operator == "**" and whole:
                if left.bit_length() * right > MAX_TEMPLATE_BITS:
                    raise SecurityError("a number is too large")
            elif operator == "*" and whole:
                if left.bit_length() + right.bit_length() > MAX_TEMPLATE_BITS:
                    raise SecurityError("a number is too large")
            elif operator == "*":
                count = next((x for x in (left, right) if isinstance(x, int)), 1)
                items = next((x for x in (left, right) if isinstance(x, (str, list, tuple))), ())
                if count * len(items) > MAX_TEMPLATE_VALUE:
                    raise SecurityError("a value is too large")
            return check(super().call_binop(context, operator, left, right))

    def check_name(name):
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace takes no name like {name!r}")

    class Namespace(jinja2.utils.Namespace):
        def __init__(*arguments, **options):
            self, *arguments = arguments  # so that `self` can be an option
            values = dict(*arguments, **options)
            for name in values:
                check_name(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            check_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    class Dict:
        def __call__(self, *arguments, **options):
            return dict(*arguments, **options)

        def fromkeys(self, *arguments):
            return dict.fromkeys(*arguments)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(format):
        return datetime.datetime.now().strftime(format)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.filters = {name: bounded(f) for name, f in environment.filters.items()}
    environment.filters |= {"each": each, "check": check}
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


RANGES = {  # of tinylm's `Sampling`, without beams: name -> default, least, most; whole numbers where the least is one
    "max_new_tokens": (128, 1, 2**31),
    "temperature": (0.0, 0.0, 1e9),
    "top_k": (None, 0, 2**31),
    "top_p": (None, 0.0, 1),
    "min_p": (None, 0.0, 1),
    "repetition_penalty": (1.0, 1e-9, 1e9),
    "no_repeat_ngram_size": (0, 0, 2**31),
    "min_length": (0, 0, 2**31),
    "forced_bos_token_id": (None, 0, 2**31),
    "forced_eos_token_id": (None, 0, 2**31),
    "num_beams": (1, 1, 2**16),
}
FROM_FILE = {*RANGES, "bad_words_ids"} - {"temperature", "top_k", "top_p", "min_p"}


def has_cuda(ort) -> bool:
    """Is there a CUDA build of ONNX Runtime and a driver for it?"""
    if CUDA not in ort.get_available_providers():
        return False
    with contextlib.suppress(OSError):
        if ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuInit(0) == 0:
            ort.preload_dlls()
            return True
    return False


def process_logits(
    logits, texts: list, generation_config: SimpleNamespace, ends: tuple, count: int
) -> np.ndarray:
    """Logits (batch, vocab), changed in place: tinylm's `constrain`, after the ids so far of each row."""
    for row, ids in zip(logits, texts):
        if generation_config.repetition_penalty != 1:
            seen = np.unique(ids)
            penalty = generation_config.repetition_penalty
            row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        if n := generation_config.no_repeat_ngram_size:
            newest = ids[len(ids) - n + 1 :]
            row[
                [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == newest]
            ] = -np.inf
        for *before, last in generation_config.bad_words_ids:
            if (
                last < len(row)
                and len(ids) >= len(before)
                and ids[len(ids) - len(before) :] == before
            ):
                row[last] = -np.inf
        if len(ids) < generation_config.min_length:
            row[[i for i in ends if 0 <= i < len(row)]] = -np.inf
        for token, when in (
            (generation_config.forced_bos_token_id, len(ids) == 1),
            (generation_config.forced_eos_token_id, count == generation_config.max_new_tokens - 1),
        ):
            if token is not None and when:
                row[:] = -np.inf
                row[token] = 0
    return logits


def sample(logits, generation_config: SimpleNamespace, seed: int, step: int) -> np.ndarray:
    """One id per row of logits (batch, vocab): tinylm's `sample` in numpy."""
    if generation_config.temperature == 0:
        return logits.argmax(-1)
    logits = logits / np.float32(generation_config.temperature)
    if generation_config.top_k:
        k = min(int(generation_config.top_k), logits.shape[-1])
        least = np.partition(logits, -k, axis=-1)[:, -k]
        logits = np.where(logits < least[:, None], -np.inf, logits)
    if generation_config.top_p is not None and generation_config.top_p < 1:
        order = np.argsort(-logits, axis=-1, kind="stable")
        p = softmax(np.take_along_axis(logits, order, -1))
        outside = p.cumsum(-1) - p >= generation_config.top_p
        outside[:, 0] = False
        rows = np.arange(len(logits))[:, None]
        logits[rows, order] = np.where(outside, -np.inf, logits[rows, order])
    if generation_config.min_p:
        p = softmax(logits)
        logits = np.where(p < generation_config.min_p * p.max(-1, keepdims=True), -np.inf, logits)
    return (logits - np.log(-np.log(uniform(seed, step, *logits.shape)))).argmax(-1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def uniform(seed: int, step: int, batch: int, vocab: int) -> np.ndarray:
    """tinylm's `uniform`: numbers in (0, 1), (batch, vocab), by a counter-based hash."""

    def hash32(x):
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 15)

    state = hash32(np.array([seed], np.int64) & 0xFFFFFFFF) + np.arange(batch)
    state = hash32((hash32(state & 0xFFFFFFFF) + step) & 0xFFFFFFFF)
    bits = hash32((state[:, None] + np.arange(vocab) * 0x9E3779B9) & 0xFFFFFFFF)
    return ((bits >> 9).astype(np.float32) + np.float32(0.5)) / np.float32(2**23)


def stop_strings(stop) -> tuple:
    stop = tuple(stop) if isinstance(stop, (list, tuple)) else () if stop is None else (stop,)
    require(
        all(isinstance(s, str) and s for s in stop),
        f"stop = {stop!r}, expected strings that are not empty",
    )
    return stop


def stream_text(tokenizer, tokens, stop: tuple = (), prompt=()):
    """tinylm's `text_pieces`: the text of ids after those of a prompt, whole characters only, and nothing from a stop
    string on. What is new is what a text has more than one without the newest ids: a decoder may strip a text's first
    space, so that ids alone do not say their text."""
    ids, done, shown, held = list(prompt), 0, len(prompt), ""

    def more():
        return tokenizer.decode(ids[done:])[len(tokenizer.decode(ids[done:shown])) :]

    for token in tokens:
        ids.append(token)
        new = more()
        if new.endswith("\ufffd"):  # a character whose bytes are not all there
            continue
        done, shown = (
            shown if new else done,
            len(ids),
        )  # ids without a text are no beginning to compare with
        held += new
        cut = min((held.find(s) for s in stop if s in held), default=-1)
        if cut >= 0:
            yield held[:cut]
            return
        keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if rest := held + more():
        yield rest


def read_json(path: Path, missing=None):
    """The object in a file; without the file what is given in its place."""
    if missing is not None and not path.exists():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Error(f"{path}: not readable as JSON ({error})") from None


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
    return json.dumps(values, ensure_ascii=False)


def plain_line(result: dict) -> str:
    """What a result says, and its score; or its numbers."""
    words = [
        value for name, value in result.items() if isinstance(value, str) and name != "sequence"
    ]
    words += [f"{result['score']:.4f}"] if "score" in result else []
    return " ".join(words) if words else json.dumps(*result.values())


def main(argv: list | None = None) -> int:
    """`onnxlm.py FOLDER INPUT...`; an Error is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="onnxlm", description="Run an exported folder on texts, without torch."
    )
    add_run_options(parser)
    parser.add_argument("--precision", choices=SUFFIXES, default="fp32")
    options = vars(parser.parse_intermixed_args(argv))
    try:
        run_lines(OnnxLM(options.pop("folder"), options.pop("precision")), **options)
    except KeyboardInterrupt:
        return 130
    except (Error, OSError) as error:
        print(f"onnxlm: error: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
