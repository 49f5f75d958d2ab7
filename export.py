"""From a checkpoint to deployment: safetensors and a verified ONNX graph in one folder that every loader takes.

    python export.py --onnx                           # the shipped model
    python export.py SmolLM2-135M-Instruct --onnx --out smollm2 --prompt "The capital of France is"

    from export import OnnxLM                         # numpy, onnxruntime and tokenizers; torch is not imported
    for piece in OnnxLM("smollm2").stream("The capital of France is"): print(piece, end="")

The graph is traced from the model of tinylm.py itself: only its three leaves (`rms_norm`, `rotate`, `attend`) are
swapped for single ONNX operators, which ONNX Runtime has fast kernels for on CPU and CUDA and would not find by
itself in their written-out form. Names and axes are those of optimum and transformers.js.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

WEIGHTS = Path(__file__).resolve().parent / "weights"  # the model shipped beside this file
MARK = ".tinylm-export"                                # this file says: the next export may replace the folder
OPSET = 23                                             # the first with Attention, RotaryEmbedding, RMSNormalization
BLOCK = {4: 32, 8: 64}                                 # bits -> weights in a row that share a scale, at most
SHARES = (1.1, 1.05, 1, 0.95, 0.9, 0.85, 0.8, 0.75)    # of a block's range, tried for the least error
PARTS = ("blocks", "scales", "zero_points")            # tensors that a rounded matrix is stored in
EXTERNAL_ABOVE = 2**31 - 2**26                         # bytes; a protobuf file ends at 2 GiB
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
WINDOW, WINDOWS, MEASURED = 256, 40, 8                 # tokens, windows to round for and, of these, to measure on
POOLING = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json")


@dataclass(frozen=True)
class Precision:
    """How the numbers of a graph are stored."""
    suffix: str              # of its files' names in onnx/
    tolerance: float         # largest difference from torch with the same weights, relative to the largest value,
                             # before the products with rounded weights are told to compute in 8 bits
    dtype: str = "float32"   # of what flows through it, and of weights that are not rounded
    bits: int = 0            # of its matrices, but 8 for embedding and head; 0: as dtype
    exact: bool = False      # greedy decoding must say what torch says
    cache: str = ""          # dtype of keys and values in a decoder's cache, where it is another
    cuda: bool = False       # all its nodes run there: ONNX Runtime groups queries on CUDA in 16 bits only


PRECISIONS = {
    "fp32": Precision("", 2e-4, exact=True, cuda=True),
    "fp16": Precision("_fp16", 0.2, "float16", cuda=True),
    "int8": Precision("_quantized", 1e-3, bits=8),
    "int4": Precision("_q4", 1e-3, bits=4),
    "q4f16": Precision("_q4f16", 0.2, "float16", bits=4, cuda=True),
}


class Error(ValueError):
    """What the caller gave cannot be used, or what was written failed its check: one line that says which."""


def require(ok, message: str):
    if not ok:
        raise Error(message)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def number(value, low, high, kind=Real) -> bool:
    """Is it a number from low to high (not a bool, which Python counts among the ints)?"""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


# ---------------------------------------------------------------------------------------------------------------------
# Running an exported folder: no torch here
# ---------------------------------------------------------------------------------------------------------------------

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
        self.inputs, self.types = {i.name: i.shape for i in inputs}, {i.name: i.type for i in inputs}
        self.outputs = {o.name: o.shape for o in self.session.get_outputs()}
        self.notes = self.session.get_modelmeta().custom_metadata_map
        self.limit = int(self.notes.get("max_position_embeddings", 2**31))

    def buffer(self, name: str, *shape):
        """Memory of an input's type on the graph's device; what it holds is not said."""
        dtype = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}.get(self.types[name], np.float32)
        return self.values.ortvalue_from_shape_and_type(shape, dtype, self.device)

    def __call__(self, into: dict = {}, **feeds) -> list:
        """All outputs, on the graph's device; `into`: an output's name -> the value that it is written to. What the
        graph does not take is left out."""
        binding = self.session.io_binding()
        try:
            feeds = {name: self.values.ortvalue_from_numpy(np.asarray(x, order="C"), self.device)
                     if isinstance(x, np.ndarray) else x for name, x in feeds.items() if name in self.inputs}
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

    folder: what `export_onnx` wrote; precision: a key of PRECISIONS; providers: ONNX Runtime's names, tried in order
    (None: CUDA where there is a driver and the precision is for it, else CPU); threads: of the CPU (None: ONNX
    Runtime's choice, one per core).
    Raises Error where a file is missing or where a provider that was asked for does not load.
    """

    def __init__(self, folder, precision: str = "fp32", providers=None, threads: int | None = None):
        import onnxruntime as ort
        require(precision in PRECISIONS, f"precision = {precision!r}, expected one of {', '.join(PRECISIONS)}")
        self.folder = Path(folder)
        said = {key: value for key, value in self._json("generation_config.json").items() if value is not None}
        self.config = read_json(self.folder / "config.json") | said
        stems = ("encoder_model", "decoder_model_merged") if self.config.get("is_encoder_decoder") else ("model",)
        stored = PRECISIONS[precision]
        paths = [self.folder / "onnx" / f"{stem}{stored.suffix}.onnx" for stem in stems]
        for path in paths:
            require(path.exists(), f"{path}: no such file; write it with `python export.py FOLDER --onnx --precision "
                    f"{precision}`")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        asked, providers = providers, providers or ([CUDA, CPU] if stored.cuda and has_cuda(ort) else [CPU])
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]  # or (name, options)
        for name in names:
            require(name in ort.get_available_providers(), f"providers: {name} is not in this onnxruntime (it has "
                    f"{', '.join(ort.get_available_providers())})")
        *encoder, self.session = (Session(path, options, providers) for path in paths)
        self.encoder, self.provider = encoder[0] if encoder else None, self.session.provider
        require(not asked or self.provider == names[0], f"providers: {names[0]} did not load; onnxruntime fell back to "
                f"{self.provider}")
        self.past = {name: shape for name, shape in self.session.inputs.items() if name.startswith("past_key_values.")}
        self.shared = "shared_cache" in self.session.notes
        self.vocab_size = self.config["vocab_size"]

    @functools.cached_property
    def tokenizer(self):
        """`encode(text)` and `decode(ids)` of the folder's tokenizer.json."""
        return Tokenizer(self.folder / "tokenizer.json")

    @property
    def job(self) -> str:
        """What the model is for, a key of JOBS, read off its graph's outputs."""
        (name, shape), *_ = self.session.outputs.items()
        if self.past or name != "logits":
            return {"start_logits": "qa", "last_hidden_state": "embed"}.get(name, "generate")
        return "classify" if len(shape) == 2 else "fill" if shape[-1] == self.vocab_size else "tokens"

    def source(self, input_ids, mask) -> dict:
        """What the decoder's graph takes of a source (batch, source): hidden states and mask."""
        states, = self.encoder(input_ids=input_ids, attention_mask=mask)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def cache(self, batch: int, length: int = 0) -> list:
        """A cache's buffers; the graphs that say `shared_cache` write into those of their length in place."""
        return [self.session.buffer(name, batch, heads, length, width) for name, (_, heads, _, width)
                in self.past.items()]

    def step(self, input_ids, mask, past=None, source=None, keep: int = 0):
        """One call of a graph with a cache: (logits, present). Ids (batch, seq), mask (batch, past + seq), past as
        returned, or of the `cache`; behind an encoder its `source`; logits of all columns, or of the last `keep`."""
        first = past is None
        past = self.cache(len(input_ids)) if first else past
        shared = self.shared and past[0].shape()[2] >= mask.shape[1]
        into = dict(zip([*self.session.outputs][1:], past)) if shared else {}
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -(keep or input_ids.shape[1]):]
        feeds = dict(zip(self.past, past)) | (source or {})
        logits, *present = self.session(into, input_ids=input_ids, attention_mask=mask, position_ids=positions,
                                        use_cache_branch=np.array([not first]), **feeds)
        return logits.numpy(), present

    def __call__(self, input_ids, attention_mask=None, token_type_ids=None, decoder_input_ids=None) -> np.ndarray:
        """What tinylm's `forward` returns, for ids (batch, seq); the mask marks padding on either side."""
        input_ids, mask = self._checked(input_ids, attention_mask)
        if self.encoder:
            require(decoder_input_ids is not None, "decoder_input_ids = None, expected ids (batch, target)")
            ids, ones = self._checked(decoder_input_ids, name="decoder_input_ids")
            return self.step(ids, ones, source=self.source(input_ids, mask))[0]
        if self.past:
            return self.step(input_ids, mask)[0]
        types = np.zeros_like(input_ids) if token_type_ids is None else np.asarray(token_type_ids, np.int64)
        require(token_type_ids is None or "token_type_ids" in self.session.inputs and types.shape == input_ids.shape,
                f"token_type_ids: shape {types.shape}, " + (f"expected {input_ids.shape}" if "token_type_ids" in
                self.session.inputs else "but the model has no token types"))
        outputs = [x.numpy() for x in self.session(input_ids=input_ids, attention_mask=mask, token_type_ids=types)]
        return np.stack(outputs, -1) if len(outputs) > 1 else outputs[0]

    def generate(self, input_ids, attention_mask=None, max_new_tokens: int | None = None, **options) -> np.ndarray:
        """Continue every row: (batch, seq + new), with the pad id after a row's end; behind an encoder (batch, 1 +
        new), beginning with decoder_start_token_id. Options as in `decode`."""
        new = [*self.decode(input_ids, attention_mask, max_new_tokens, **options)]
        prompt = self._prompt(input_ids) if self.encoder else np.asarray(input_ids)
        return np.stack([*prompt.T, *new], axis=1)

    def stream(self, text, max_new_tokens: int | None = None, stop=None, **options):
        """The continuation of a text (or of its ids), piece by piece, whole characters only, up to a stop string."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        tokens, prompt = self.tokens(ids, max_new_tokens, **options), () if self.encoder else ids
        return text_pieces(self.tokenizer, tokens, stop_strings(stop), prompt)

    def tokens(self, ids: list, max_new_tokens: int | None = None, eos_token_id="config", **options):
        """The new ids after those of one row, one by one, without the one that ends the text."""
        ends = self.ends(eos_token_id)
        options = {"num_beams": 1} | options
        for token, in self.decode([ids or [*ends, 0][:1]], None, max_new_tokens, ends, **options):
            if token not in ends:
                yield int(token)

    def ends(self, eos_token_id="config") -> tuple:
        """Ids that end a text: those given; for "config" those of the folder."""
        if isinstance(eos_token_id, str) and eos_token_id == "config":
            eos_token_id = self.config.get("eos_token_id")
        ids = () if eos_token_id is None else tuple(np.ravel(eos_token_id).tolist())
        require(all(number(i, -1, 2**31, Integral) for i in ids), f"eos_token_id = {eos_token_id!r}, expected integers")
        return ids

    def sampling(self, **given) -> SimpleNamespace:
        """tinylm's `sampling`: as given, else as the folder's generation_config.json says, else plainly."""
        said, longest = {name: default for name, (default, *_) in RANGES.items()}, self.config.get("max_length")
        said["bad_words_ids"] = ()
        if self.encoder and number(longest, 2, 2**31, Integral):
            said["max_new_tokens"] = longest - 1
        known = {*said}
        for source in ({name: self.config.get(name) for name in FROM_FILE}, given):
            said |= {name: value for name, value in source.items() if value is not None}
        unknown, words = sorted(said.keys() - known), said["bad_words_ids"]
        require(not unknown, f"{', '.join(unknown)}: no such option of a generation under ONNX Runtime")
        for name, (_, low, high) in RANGES.items():
            value, kind = said[name], Integral if isinstance(low, int) else Real
            require(value is None or number(value, low, high, kind), f"{name} = {value!r}, expected "
                    f"{'an integer' if kind is Integral else 'a number'} from {low:g} to {high:g}")
        require(isinstance(words, (list, tuple)) and all(isinstance(w, (list, tuple)) and w and all(
            number(i, 0, 2**31, Integral) for i in w) for w in words), f"bad_words_ids = {words!r}, expected lists of "
            "ids")
        require(said["num_beams"] == 1, f"num_beams = {said['num_beams']}: there is no beam search under ONNX Runtime; "
                "give num_beams=1 for greedy decoding or sampling")
        said["temperature"] *= said["temperature"] >= 1e-5  # below, a division would overflow
        return SimpleNamespace(**said)

    def decode(self, input_ids, attention_mask=None, max_new_tokens=None, eos_token_id="config", stop=None, seed=None,
               **sampling):
        """Yield the new ids (batch,) of every step, until all rows have ended. The options are those of tinylm's
        `generate`, and the same seed draws the same text: the noise is a function of seed, row, step and token."""
        knobs = self.sampling(max_new_tokens=max_new_tokens, **sampling)
        ends, stop = self.ends(eos_token_id), stop_strings(stop)
        (input_ids, mask), source = self._checked(input_ids, attention_mask), None
        require(seed is None or number(seed, -2**63, 2**63 - 1, Integral), f"seed = {seed!r}, expected an integer of "
                "64 bits")
        seed = int(np.random.randint(2**31) if seed is None else seed)
        pad = next(i for i in (self.config.get("pad_token_id"), *ends, 0) if i is not None and i >= 0)
        pad = min(pad, self.vocab_size - 1)
        if self.encoder:
            source = self.source(input_ids, mask)
            input_ids = self._prompt(input_ids)
            mask = np.ones_like(input_ids)
        batch, seq = input_ids.shape
        limit = self.session.limit
        require(seq + knobs.max_new_tokens <= limit, f"max_new_tokens = {knobs.max_new_tokens} after {seq} tokens, "
                f"expected at most {limit} in all")
        texts = [row[real].tolist() for row, real in zip(input_ids, mask.astype(bool))]  # prompts, and what follows
        starts, ended = [*map(len, texts)], np.zeros(batch, bool)
        order = mask.argsort(1, kind="stable")  # every row's last token goes to the last column
        input_ids, mask = (np.take_along_axis(x, order, 1) for x in (input_ids, mask))
        longest = np.concatenate([mask, np.ones((batch, knobs.max_new_tokens), np.int64)], 1)
        past = self.cache(batch, seq + knobs.max_new_tokens) if self.shared else None
        for count in range(knobs.max_new_tokens):
            logits, past = self.step(input_ids, mask, past, source, keep=1)
            logits = constrain(logits[:, -1], texts, knobs, ends, count)
            token = np.where(ended, pad, sample(logits, knobs, seed, count))
            yield token
            for row, (text, id) in enumerate(zip(texts, token.tolist())):
                text.append(id)
                ended[row] |= id in ends or any(
                    s in self.tokenizer.decode(text[starts[row]:][-2 * len(s.encode()) - 8:]) for s in stop)
            if ended.all():
                return
            input_ids, mask = token[:, None], longest[:, :seq + count + 1]

    def run(self, texts, pairs=None, batch: int = 32, **options) -> list:
        """What the model is for: for each text (and its pair: of a question the context) what `tinylm.py run` says of
        it, a list of {"label", "score"}, {"entity_group", "word", "score", "start", "end"}, {"answer", "score",
        "start", "end"}, {"token_str", "score", "sequence"}, {"embedding"} or {"generated_text"}; the latter
        greedy, unless the options, those of `decode`, say otherwise. Runs in batches of texts of like length."""
        pairs = [None] * len(texts) if pairs is None else pairs
        require(len(pairs) == len(texts), f"pairs: {len(pairs)} of them, expected the {len(texts)} of texts")
        job, results = JOBS[self.job], {}
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]) - len(pairs[i] or ""))
        for at in range(0, len(order), batch):
            rows = order[at:at + batch]
            results |= zip(rows, job(self, [texts[i] for i in rows], [pairs[i] for i in rows], **options))
        return [results[i] for i in range(len(texts))]

    def _json(self, name: str) -> dict:
        return read_json(self.folder / name) if (self.folder / name).exists() else {}

    def _prompt(self, input_ids) -> np.ndarray:
        """What a decoder behind an encoder begins with, (batch, 1)."""
        return np.full((len(input_ids), 1), self.config["decoder_start_token_id"])

    def _checked(self, input_ids, mask=None, name: str = "input_ids") -> tuple:
        input_ids = np.asarray(input_ids)
        require(input_ids.ndim == 2 and input_ids.size and np.issubdtype(input_ids.dtype, np.integer),
                f"{name}: {input_ids.dtype} of shape {input_ids.shape}, expected ids (batch, seq)")
        limit = (self.session if self.encoder is None or name != "input_ids" else self.encoder).limit
        require(input_ids.shape[1] <= limit, f"{name}: {input_ids.shape[1]} tokens, but the model has only {limit} "
                "positions")
        mask = np.ones_like(input_ids) if mask is None else np.asarray(mask)
        require(mask.shape == input_ids.shape and mask.any(1).all(), f"attention_mask: shape {mask.shape}, expected "
                f"{input_ids.shape} and a token in every row")
        require(0 <= input_ids.min() and input_ids.max() < self.vocab_size, f"{name}: ids {input_ids.min()} to "
                f"{input_ids.max()}, expected 0 to vocab_size - 1 = {self.vocab_size - 1}")
        return input_ids.astype(np.int64), mask.astype(np.int64)


# ---- what a model is for: (lm, texts, pairs) -> for each a list of dicts, as tinylm's commands give it ---------------

LONGEST = 512  # tokens that are read, where the model has no limit of its own


def read(lm: OnnxLM, encodings: list) -> tuple:
    """What the model says of encodings, and their mask (batch, longest), padded on the right."""
    empty, fills = ([*lm.ends(), 0][:1], [1], [0]), (max(lm.config.get("pad_token_id") or 0, 0), 0, 0)
    parts = [(e.ids, e.attention_mask, e.type_ids) if e.ids else empty for e in encodings]
    width = max(len(ids) for ids, *_ in parts)
    rows = [[part + [fill] * (width - len(part)) for part, fill in zip(row, fills)] for row in parts]
    ids, mask, types = (np.array(part) for part in zip(*rows))
    return lm(ids, mask, types if lm.config.get("type_vocab_size", 0) > 1 else None), mask


def encodings(lm: OnnxLM, texts, pairs, limit: int = LONGEST, stride: int | None = None) -> list:
    """Of texts, or of pairs, cut to `limit` ids; with a stride only the second one is cut, into windows that share so
    many ids, and those after the first are its `overflowing`."""
    backend, how = lm.tokenizer.backend, {} if stride is None else dict(stride=stride, strategy="only_second")
    backend.enable_truncation(min(lm.session.limit, limit), **how)
    try:
        return backend.encode_batch([text if pair is None else (text, pair) for text, pair in zip(texts, pairs)])
    except Exception as error:  # the library raises plain Exception
        raise Error(f"tokenizer: {first_line(error)}") from None
    finally:
        backend.no_truncation()


def labels(lm: OnnxLM) -> list:
    names = lm.config.get("id2label") or {}
    return [names.get(str(i), f"LABEL_{i}") for i in range(lm.session.outputs["logits"][-1])]


def classify(lm: OnnxLM, texts, pairs):
    """A share of one, a share each (multi-label, or one label), or the number itself; the best first."""
    names, kind = labels(lm), lm.config.get("problem_type")
    score = softmax if len(names) > 1 and kind != "multi_label_classification" else lambda x: 1 / (1 + np.exp(-x))
    logits, _ = read(lm, encodings(lm, texts, pairs))
    for row in logits if kind == "regression" else score(logits):
        yield [{"label": names[i], "score": float(row[i])} for i in np.argsort(-row, kind="stable")]


def tag(lm: OnnxLM, texts, pairs):
    """Entities: neighbouring tokens of one kind (B- begins another), with the mean of their scores."""
    names, found = labels(lm), encodings(lm, texts, pairs)
    for text, encoding, p in zip(texts, found, softmax(read(lm, found)[0])):
        groups, last = [], None
        for i in (i for i, part in enumerate(encoding.sequence_ids) if part is not None):
            name = names[p[i].argmax()]
            kind = name[2:] if name[:2] in ("B-", "I-") else name
            if kind != last or name[:2] == "B-":
                groups.append((kind, []))
            groups[-1][1].append(i)
            last = kind
        spans = [(kind, p[places].max(-1).mean(), encoding.offsets[places[0]][0], encoding.offsets[places[-1]][1])
                 for kind, places in groups if kind != "O"]
        yield [dict(entity_group=kind, word=text[start:end].strip(), score=float(score), start=start, end=end)
               for kind, score, start, end in spans]


def answer(lm: OnnxLM, texts, pairs, longest: int = 30, window: int = 384):
    """The likeliest span of whole words in any window of the context. Its score is the probability of its first column
    times that of its last, among the context's columns and the first one, which stands for none."""
    for question, context in zip(texts, pairs):
        require(context, f"{question[:60]!r}: expected a context, its pair")
        room = min(lm.session.limit, window) - len(encodings(lm, [question], [""])[0].ids)
        require(room > 1, f"question {question[:60]!r}: leaves no room for the context")
        first, = encodings(lm, [question], [context], window, min(128, room // 2))
        windows, best = [first, *first.overflowing], None
        for encoding, logits in zip(windows, read(lm, windows)[0]):
            parts = encoding.sequence_ids + [None] * (len(logits) - len(encoding.ids))
            inside = np.array([part == 1 for part in parts])
            shown = inside | (np.arange(len(inside)) == 0)
            begins, ends = softmax(np.where(shown, logits.T, -np.inf)) * inside
            spans = np.tril(np.triu(np.outer(begins, ends)), longest - 1)
            i, j = np.unravel_index(spans.argmax(), spans.shape)
            if best is None or spans[i, j] > best["score"]:
                start, end = (encoding.offsets[i][0], encoding.offsets[j][1]) if inside[i] else (0, 0)
                while 0 < start < end and context[start - 1:start + 1].isalnum():
                    start -= 1
                while start < end < len(context) and context[end - 1:end + 1].isalnum():
                    end += 1
                best = {"answer": context[start:end].strip(), "score": float(spans[i, j]), "start": start, "end": end}
        yield [best]


def fill(lm: OnnxLM, texts, pairs, top_k: int = 5):
    """The likeliest tokens in the place of each <mask> (or what the tokenizer calls it)."""
    token, known = lm._json("tokenizer_config.json").get("mask_token"), lm.tokenizer.backend.token_to_id
    names = token["content"] if isinstance(token, dict) else token, "[MASK]", "<mask>"  # BERT's own does not name it
    name = next((name for name in names if name and known(name) is not None), None)
    require(name, f"{lm.folder / 'tokenizer_config.json'}: no mask_token")
    mask = known(name)
    found = encodings(lm, [text.replace("<mask>", name) for text in texts], pairs)
    for text, encoding, row in zip(texts, found, read(lm, found)[0]):
        ids, places = encoding.ids, [i for i, id in enumerate(encoding.ids) if id == mask]
        require(places, f"{text[:60]!r}: expected {name} or <mask> in it")
        likely = [(at, i, p[i]) for at, p in zip(places, softmax(row[places]))
                  for i in np.argsort(-p, kind="stable")[:top_k]]
        yield [{"token_str": lm.tokenizer.decode([i]), "score": float(score),
                "sequence": lm.tokenizer.decode(ids[:at] + [i] + ids[at + 1:])} for at, i, score in likely]


POOLINGS = {  # of sentence-transformers: states (batch, seq, hidden) and their mask (batch, seq, 1) -> vectors
    "pooling_mode_cls_token": lambda x, mask: x[:, 0],
    "pooling_mode_mean_tokens": lambda x, mask: (x * mask).sum(1) / mask.sum(1),
    "pooling_mode_max_tokens": lambda x, mask: np.where(mask, x, -np.inf).max(1),
    "pooling_mode_mean_sqrt_len_tokens": lambda x, mask: (x * mask).sum(1) / mask.sum(1) ** 0.5,
    "pooling_mode_lasttoken": lambda x, mask: x[np.arange(len(x)), mask[..., 0].sum(1) - 1],
}


def embed(lm: OnnxLM, texts, pairs):
    """Vectors as the files of sentence-transformers say: pooled (else the mean), normalised if modules.json has it."""
    pooling, file = lm._json("1_Pooling/config.json"), lm.folder / "modules.json"
    modules = re.findall(r"sentence_transformers[\w.]*\.(\w+)", file.read_text("utf-8") if file.exists() else "")
    require(set(modules) <= {"Transformer", "Pooling", "Normalize"}, f"{file}: {', '.join(modules)}, expected no more "
            "than Transformer, Pooling and Normalize")
    chosen = [pool for name, pool in POOLINGS.items() if pooling.get(name)] or [POOLINGS["pooling_mode_mean_tokens"]]
    require(any(map(pooling.get, POOLINGS)) or not pooling, f"{lm.folder / '1_Pooling/config.json'}: expected one of "
            f"{', '.join(POOLINGS)}")
    longest = lm._json("sentence_bert_config.json").get("max_seq_length") or LONGEST
    states, mask = read(lm, encodings(lm, texts, pairs, longest))
    vectors = np.concatenate([pool(states, mask[..., None]).astype(np.float32) for pool in chosen], -1)
    if "Normalize" in modules:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    yield from ([{"embedding": vector.tolist()}] for vector in vectors)


def write(lm: OnnxLM, texts, pairs, **options):
    for encoding in encodings(lm, texts, pairs, 2**31):
        yield [{"generated_text": "".join(lm.stream(encoding.ids, **options))}]


JOBS = {"classify": classify, "tokens": tag, "qa": answer, "fill": fill, "embed": embed, "generate": write}


class Tokenizer:
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: Path):
        require(path.exists(), f"{path}: no such file; use generate with token ids")
        try:
            from tokenizers import Tokenizer as Backend
            self.backend = Backend.from_file(str(path))
        except ImportError:
            raise Error(f"{path}: reading it needs `pip install tokenizers`") from None
        except Exception as error:  # the library raises plain Exception
            raise Error(f"{path}: not a readable tokenizer ({error})") from None
        self.backend.no_truncation(), self.backend.no_padding()  # settings of somebody's training, stored along

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text.encode("utf-8", "replace").decode("utf-8")).ids

    def decode(self, ids) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


RANGES = {  # of tinylm's `Sampling`, without beams: name -> default, least, most; whole numbers where the least is one
    "max_new_tokens": (128, 1, 2**31), "temperature": (0.0, 0.0, 1e9), "top_k": (None, 0, 2**31),
    "top_p": (None, 0.0, 1), "min_p": (None, 0.0, 1), "repetition_penalty": (1.0, 1e-9, 1e9),
    "no_repeat_ngram_size": (0, 0, 2**31), "min_length": (0, 0, 2**31), "forced_bos_token_id": (None, 0, 2**31),
    "forced_eos_token_id": (None, 0, 2**31), "num_beams": (1, 1, 2**16),
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


def constrain(logits, texts: list, knobs: SimpleNamespace, ends: tuple, count: int) -> np.ndarray:
    """Logits (batch, vocab), changed in place: tinylm's `constrain`, after the ids so far of each row."""
    for row, ids in zip(logits, texts):
        if knobs.repetition_penalty != 1:
            seen = np.unique(ids)
            penalty = knobs.repetition_penalty
            row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        if n := knobs.no_repeat_ngram_size:
            newest = ids[len(ids) - n + 1:]
            row[[ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i:i + n - 1] == newest]] = -np.inf
        for *before, last in knobs.bad_words_ids:
            if last < len(row) and len(ids) >= len(before) and ids[len(ids) - len(before):] == before:
                row[last] = -np.inf
        if len(ids) < knobs.min_length:
            row[[i for i in ends if 0 <= i < len(row)]] = -np.inf
        for token, when in ((knobs.forced_bos_token_id, len(ids) == 1),
                            (knobs.forced_eos_token_id, count == knobs.max_new_tokens - 1)):
            if token is not None and when:
                row[:] = -np.inf
                row[token] = 0
    return logits


def sample(logits, knobs: SimpleNamespace, seed: int, step: int) -> np.ndarray:
    """One id per row of logits (batch, vocab): tinylm's `sample` in numpy."""
    if knobs.temperature == 0:
        return logits.argmax(-1)
    logits = logits / np.float32(knobs.temperature)
    if knobs.top_k:
        k = min(int(knobs.top_k), logits.shape[-1])
        least = np.partition(logits, -k, axis=-1)[:, -k]
        logits = np.where(logits < least[:, None], -np.inf, logits)
    if knobs.top_p is not None and knobs.top_p < 1:
        order = np.argsort(-logits, axis=-1, kind="stable")
        p = softmax(np.take_along_axis(logits, order, -1))
        outside = p.cumsum(-1) - p >= knobs.top_p
        outside[:, 0] = False
        rows = np.arange(len(logits))[:, None]
        logits[rows, order] = np.where(outside, -np.inf, logits[rows, order])
    if knobs.min_p:
        p = softmax(logits)
        logits = np.where(p < knobs.min_p * p.max(-1, keepdims=True), -np.inf, logits)
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
    require(all(isinstance(s, str) and s for s in stop), f"stop = {stop!r}, expected strings that are not empty")
    return stop


def text_pieces(tokenizer, tokens, stop: tuple = (), prompt=()):
    """tinylm's `text_pieces`: the text of ids after those of a prompt, whole characters only, and nothing from a stop
    string on. What is new is what a text has more than one without the newest ids: a decoder may strip a text's first
    space, so that ids alone do not say their text."""
    ids, done, shown, held = list(prompt), 0, len(prompt), ""

    def more():
        return tokenizer.decode(ids[done:])[len(tokenizer.decode(ids[done:shown])):]

    for token in tokens:
        ids.append(token)
        new = more()
        if new.endswith("\ufffd"):  # a character whose bytes are not all there
            continue
        done, shown = shown if new else done, len(ids)  # ids without a text are no beginning to compare with
        held += new
        cut = min((held.find(s) for s in stop if s in held), default=-1)
        if cut >= 0:
            yield held[:cut]
            return
        keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > keep:
            yield held[:len(held) - keep]
            held = held[len(held) - keep:]
    if rest := held + more():
        yield rest


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Error(f"{path}: not readable as JSON ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tracing: the model's leaves as single operators. From here on torch is needed.
# ---------------------------------------------------------------------------------------------------------------------

def operator(name: str, inputs: tuple, like, *shapes, rest=None, **attributes):
    """One node of the ONNX graph in the place of a traced function. Its outputs have the dtype of `like`, those after
    the first that of `rest` if given, and the `shapes`, or the one shape of `like`."""
    import torch
    shapes = shapes or (like.shape,)
    dtypes = [like.dtype, *[(like if rest is None else rest).dtype] * (len(shapes) - 1)]
    out = torch.onnx.ops.symbolic_multi_out(name, inputs, attributes, dtypes=dtypes, shapes=shapes,
                                            version=1 if "::" in name else OPSET)
    return out if len(shapes) > 1 else out[0]


def onnx_rms_norm(x, weight, eps):
    return operator("RMSNormalization", (x, weight.to(x.dtype)), x, axis=-1, epsilon=eps)


def onnx_rotate(x, cos, sin, head_dim):
    width = 2 * cos.shape[-1]
    part = {} if width == head_dim else {"rotary_embedding_dim": width}
    return operator("RotaryEmbedding", (x, cos.to(x.dtype), sin.to(x.dtype)), x, num_heads=x.shape[-1] // head_dim,
                    **part)


def onnx_attend(q, k, v, mask, head_dim, scale, softcap=None, dropout=0.0, cache=None, layer=0, causal=True):
    """With heads folded, as the model has them: the operator unfolds them, and appends to the past, by itself. Keys of
    a source come unfolded, as they are kept between calls."""
    from einops import rearrange
    mask = mask.expand(*mask.shape[:2], q.shape[1], mask.shape[3])
    options = dict(scale=scale, **({"softcap": softcap} if softcap else {}))
    if k.ndim == 4:
        q = rearrange(q, "b s (h d) -> b h s d", d=head_dim)
        return rearrange(operator("Attention", (q, k, v, mask), q, **options), "b h s d -> b s (h d)")
    options |= dict(q_num_heads=q.shape[-1] // head_dim, kv_num_heads=k.shape[-1] // head_dim)
    if cache is None:
        return operator("Attention", (q, k, v, mask), q, **options)
    return cache.append(layer, "Attention", (q, k, v, mask), k.shape[1], q, **options)


def grouped_attention(self, x, rope, mask, cache, layer):
    """tinylm's `Attention.forward` as ONNX Runtime's own operator: it rotates by the tables of all positions, writes
    keys and values behind those of the past, in place where past and present are one buffer, and masks by lengths."""
    from torch import nn
    qkv = self.qkv(x)
    like, inputs = qkv[..., :self.sizes[0]], (qkv, None, None)
    if not isinstance(self.q_norm, nn.Identity):
        q, k, v = qkv.split(self.sizes, dim=-1)
        inputs = self.q_norm(q), self.k_norm(k), v
    heads, groups, _ = (size // self.head_dim for size in self.sizes)
    more = dict(softcap=self.softcap) if self.softcap else {}
    more |= dict(local_window_size=cache.windows[layer]) if cache.windows[layer] else {}
    scales = ()
    if cache.scales:
        scales = None, None, None, *cache.scales[layer]
        more |= dict(kv_cache_bit_width=8, k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL")
    return self.o(cache.append(layer, "com.microsoft::GroupQueryAttention", inputs, x.shape[1], like,
                               (*cache.lengths, *rope, *scales), num_heads=heads, kv_num_heads=groups,
                               scale=self.scale, do_rotary=1, **more))


def onnx_linear(x, weight, bias, blocks: Blocks | None):
    """tinylm's `linear` on rounded weights, which `put_blocks` puts in the place of the traced ones."""
    import torch
    if blocks is None:
        return torch.nn.functional.linear(x, weight, bias)
    rows, columns = weight.shape
    y = operator("com.microsoft::MatMulNBits", (x, weight, weight, weight), x, (*x.shape[:-1], rows), N=rows, K=columns,
                 bits=blocks.bits, block_size=blocks.codes.shape[-1])
    return y if bias is None else y + bias


def onnx_embedding(table, ids):
    """Rows of a rounded table, which may be a tied head's too; written out, since the ONNX Runtime of browsers has no
    single operator for it."""
    codes, scales, zeros = (getattr(table, part).index_select(0, ids.flatten()) for part in PARTS)
    rows = (codes.to(scales.dtype) - zeros[..., None].to(scales.dtype)) * scales[..., None]
    return rows.flatten(1).unflatten(0, ids.shape)


def rotary_tables(self, positions):
    """tinylm's `Rotary.forward` where the attention looks up its positions by itself."""
    return self.cos, self.sin


class Past:
    """The cache of an exported graph, in the place of tinylm's KVCache: past comes in, present goes out, longer."""

    def __init__(self, past: list, positions, lengths: tuple = (), windows: tuple = (), scales: tuple = ()):
        self.past, self.positions, self.lengths, self.windows, self.present = past, positions, lengths, windows, []
        self.scales = scales  # of keys and values of 8 bits, by layer

    def append(self, layer: int, name: str, inputs: tuple, new: int, like, more: tuple = (), **attributes):
        """An attention operator of a layer, after which its cache has `new` more columns."""
        past = self.past[2 * layer:2 * layer + 2]
        batch, heads, length, width = past[0].shape
        longer = batch, heads, length + new, width
        x, *present = operator(name, (*inputs, *past, *more), like, like.shape, longer, longer, rest=past[0],
                               **attributes)
        self.present += present
        return x

    def extend(self, mask):
        """Positions of the queries and of the keys; the mask spans past and new tokens."""
        import tinylm
        return self.positions, tinylm.count_positions(mask)[1]


@dataclass(frozen=True)
class Graph:
    """A graph to trace: `forward(lm, inputs by name)` lists its outputs."""
    stem: str      # of its file
    forward: object
    inputs: dict   # name -> dtype and axes: sizes, or names where the size varies
    outputs: list
    grouped: bool = False  # its attention is ONNX Runtime's GroupQueryAttention


def key_values(config, prefix: str, sides: dict, dtype: str = "float32") -> dict:
    """Names of keys and values -> dtype and axes; sides: what names say of whose they are -> the name of their axis."""
    heads, width = config.num_key_value_heads, config.head_dim
    return {f"{prefix}.{layer}{side}.{part}": (dtype, "batch_size", heads, length, width)
            for layer in range(config.num_hidden_layers) for side, length in sides.items() for part in ("key", "value")}


SIZES = {"batch_size": 2, "sequence_length": 6, "past_sequence_length": 5, "total_sequence_length": 11,
         "logits_length": 3, "encoder_sequence_length": 7, "eos_tokens": 4}  # axes that vary: no two alike, none 0 or 1
IDS = ("int64", "batch_size", "sequence_length")
KNOBS = {"temperature": ("float32",), "top_k": ("int64",), "top_p": ("float32",), "seed": ("int64",),
         "eos_token_id": ("int64", "eos_tokens")}
SOURCE_IDS = ("int64", "batch_size", "encoder_sequence_length")


def groups_queries(config, stored: Precision) -> bool:
    """Does GroupQueryAttention compute it? In fp32 it has no CUDA kernel."""
    scaling = config.rope_scaling or {}
    fixed = config.position == "rope" and scaling.get("rope_type", scaling.get("type")) != "dynamic"
    return not stored.exact and fixed and config.head_dim % 16 == 0 and config.rotary_dim % 16 == 0


def decoder_graph(config, stored: Precision) -> list:
    """With a cache: the mask spans past and new tokens, and positions follow from it. `position_ids`, which all loaders
    give, says by its columns how many logits are asked for: those of the last ones."""
    past = key_values(config, "past_key_values", {"": "past_sequence_length"}, stored.cache or stored.dtype)

    def forward(lm, feed):
        return decoder_step(lm, feed, [feed[name] for name in past], stored)

    inputs = {"input_ids": IDS, "attention_mask": ("int64", "batch_size", "total_sequence_length"),
              "position_ids": ("int64", "batch_size", "logits_length")}
    return [Graph("model", forward, inputs | past, ["logits", *key_values(config, "present", {"": ""})],
                  groups_queries(config, stored))]


def decoder_step(lm, feed: dict, past: list, stored: Precision) -> list:
    """Logits in float32, of as many last columns as position_ids has, and the cache after a call."""
    import torch
    import tinylm
    ids, mask, lengths, config = feed["input_ids"], feed["attention_mask"], (), lm.config
    seq, kept = ids.shape[1], feed["position_ids"].shape[1]
    positions, last = tinylm.count_positions(mask)[0][:, -seq:], torch.arange(seq - kept, seq)
    columns = last[None].expand(ids.shape[0], kept)
    if groups_queries(config, stored):  # it takes rows that begin with their first token: padding goes behind
        new = mask[:, -seq:]
        columns = tinylm.count_positions(new)[0].index_select(1, last)
        ids = ids.gather(1, new.argsort(1, descending=True))
        total = operator("Gather", (operator("Shape", (mask,), mask, (2,)), torch.tensor(1)), mask, ())
        lengths = (mask.sum(1) - 1).int(), total.int()
    windows = tuple(kind == "sliding_attention" and config.sliding_window for kind in config.layer_types)
    scales = tuple((block.attention.k_scale, block.attention.v_scale) for block in lm.layers if stored.cache)
    cache = Past(past, positions, lengths, windows, scales)
    return [lm(ids, mask, cache=cache, columns=columns).float(), *cache.present]


def generate_graph(config, stored: Precision) -> Graph:
    """What `in_a_loop` repeats: a step of the decoder, the choice of a token, and whether all rows have ended."""
    import torch
    past = key_values(config, "past", {"": "past_sequence_length"}, stored.cache or stored.dtype)

    def forward(lm, feed):
        ids, text, ended, ends = (feed[name] for name in ("ids", "text", "ended", "eos_token_id"))
        step = dict(input_ids=ids, attention_mask=torch.ones_like(text), position_ids=ids[:, :1])
        logits, *present = decoder_step(lm, step, [feed[name] for name in past], stored)
        knobs = [feed[name] for name in ("temperature", "top_k", "top_p", "seed", "step")]
        token = torch.cond(knobs[0] > 0, choose, lambda logits, *_: logits.argmax(-1), (logits[:, 0], *knobs))
        pad = lm.said("pad_token_id")
        pad = ends[0] if pad is None or pad < 0 else min(pad, config.vocab_size - 1)
        token = torch.where(ended, pad, token)
        ended = ended | (token[:, None] == ends).any(-1)
        return [~ended.all(), token[:, None], torch.cat((text, token[:, None]), 1), ended, *present]

    inputs = {"step": ("int64",), "ids": IDS, "text": ("int64", "batch_size", "total_sequence_length"),
              "ended": ("bool", "batch_size")} | past
    return Graph("generate", forward, inputs | KNOBS, ["go_on", "new_ids", "new_text", "have_ended",
                 *key_values(config, "present", {"": ""})], groups_queries(config, stored))


def choose(logits, temperature, top_k, top_p, seed, step):
    """tinylm's `sample` (batch, vocab) -> (batch,), where every knob is a tensor."""
    import torch
    import tinylm
    ordered, order = (logits / temperature).sort(descending=True)
    rank = torch.arange(logits.shape[1])
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), -math.inf)
    p = ordered.softmax(-1)
    outside = (top_p < 1) & (rank > 0) & (p.cumsum(-1) - p >= top_p)
    noise = tinylm.uniform(seed, step, *logits.shape).gather(1, order)
    best = (ordered.masked_fill(outside, -math.inf) - (-noise.log()).log()).argmax(-1, keepdim=True)
    return order.gather(1, best)[:, 0]


def in_a_loop(model, config, stored: Precision):
    """A traced `generate_graph` as the body of an ONNX Loop: from ids and knobs to whole sequences in one call."""
    import onnx_ir as ir
    body, given = model.graph, {}
    for value in [value for value in body.inputs if value.name in KNOBS]:  # the body sees them from outside
        body.inputs.remove(value)
        given[value.name] = ir.val(value.name, value.dtype, value.shape)
        ir.convenience.replace_all_uses_with(value, given[value.name])
    body.inputs.insert(1, ir.val("going_on", ir.DataType.BOOL, []))
    weights = list(body.initializers.values())
    body.initializers.clear()
    heads = ir.tensor(np.array([config.num_key_value_heads, 0, config.head_dim]), name="no_past")
    weights.append(ir.val(heads.name, const_value=heads, type=ir.TensorType(heads.dtype), shape=heads.shape))
    prompt = ir.val("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    steps = ir.val("max_new_tokens", ir.DataType.INT64, [])
    nothing, false = np.zeros(1, stored.cache or stored.dtype), np.zeros(1, bool)
    batch = ir.node("Shape", [prompt], {"end": 1})
    shape = ir.node("Concat", [batch.outputs[0], weights[-1]], {"axis": 0})
    empty = ir.node("ConstantOfShape", shape.outputs, {"value": ir.tensor(nothing)})
    ended = ir.node("ConstantOfShape", batch.outputs, {"value": ir.tensor(false)})
    past = [empty.outputs[0]] * (2 * config.num_hidden_layers)
    loop = ir.node("Loop", [steps, None, prompt, prompt, ended.outputs[0], *past], {"body": body},
                   num_outputs=3 + len(past))
    nodes, text = [batch, shape, empty, ended, loop], loop.outputs[1]
    for i, value in enumerate(value for node in nodes for value in node.outputs):
        value.name = f"loop.{i}"  # no name of the body's
    text.name, text.type = "sequences", ir.TensorType(ir.DataType.INT64)
    text.shape = ir.Shape(["batch_size", "total_sequence_length"])
    graph = ir.Graph([prompt, steps, *given.values()], [text], nodes=nodes, initializers=weights,
                     opset_imports=body.opset_imports, name="tinylm")
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def encoder_graph(config, stored: Precision) -> list:
    """Whatever reads a text in one call: no cache."""
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * bool(config.type_vocab_size)

    def forward(lm, feed):
        outputs = lm(**feed)
        return [x.float() for x in (outputs.unbind(-1) if config.head == "qa" else [outputs])]

    outputs = {"qa": ["start_logits", "end_logits"], None: ["last_hidden_state"]}.get(config.head, ["logits"])
    return [Graph("model", forward, dict.fromkeys(names, IDS), outputs)]


def encoder_decoder_graphs(config, stored: Precision) -> list:
    """The encoder, and the decoder with two caches: of what it said, and of the source, filled by the first call."""
    from unittest import mock
    import torch
    import tinylm
    from einops import rearrange
    sides = {".decoder": "past_sequence_length", ".encoder": "encoder_sequence_length"}  # the latter may be 0 at first
    past, outputs = key_values(config, "past_key_values", sides, stored.dtype), [*key_values(config, "present", sides)]

    def encode(lm, feed):
        return [lm.encoder.states(lm.embed(feed["input_ids"]), feed["attention_mask"])]

    def decode(lm, feed):
        own, kept = ([feed[name] for name in past if side in name] for side in sides)

        def source():
            states = feed["encoder_hidden_states"]
            parts = (part for block in lm.layers for part in block.cross_attention.keys_values(states))
            return [rearrange(part, "b s (h d) -> b h s d", d=config.head_dim).contiguous() for part in parts]

        with mock.patch.object(tinylm, "linear", torch.nn.functional.linear):  # a branch takes no operator of our own
            kept = torch.cond(feed["use_cache_branch"], lambda: [x.clone() for x in kept], source)
        ids, mask = feed["input_ids"], feed["encoder_attention_mask"].bool()[:, None, None, :]
        ones = torch.ones(1, own[0].shape[2] + ids.shape[1], dtype=torch.long)
        cache = Past(own, torch.arange(ones.shape[1])[None, -ids.shape[1]:])
        logits = lm(ids, ones, cache=cache, context=(list(zip(kept[::2], kept[1::2])), mask)).float()
        present = dict(zip([n for n in outputs if ".decoder." in n], cache.present))
        present |= zip([n for n in outputs if ".encoder." in n], kept)
        return [logits, *map(present.get, outputs)]

    states = (stored.dtype, "batch_size", "encoder_sequence_length", config.hidden_size)
    inputs = {"encoder_attention_mask": SOURCE_IDS, "input_ids": IDS, "encoder_hidden_states": states} | past
    sources = dict.fromkeys(["input_ids", "attention_mask"], SOURCE_IDS)
    return [Graph("encoder_model", encode, sources, ["last_hidden_state"]),
            Graph("decoder_model_merged", decode, inputs | {"use_cache_branch": ("bool", 1)}, ["logits", *outputs])]


def graphs_of(config, stored: Precision) -> list:
    """What a model is exported as."""
    if config.num_encoder_layers:
        return encoder_decoder_graphs(config, stored)
    return (decoder_graph if config.causal and config.head == "lm" else encoder_graph)(config, stored)


def trace(lm, graph: Graph, blocks: dict = {}):
    """An onnx_ir.Model; blocks: the rounded weights of `lm` by their names."""
    import logging
    import warnings
    from unittest import mock
    import onnx_ir as ir
    import torch
    import tinylm
    leaves = mock.patch.multiple(tinylm, rms_norm=onnx_rms_norm, rotate=onnx_rotate, attend=onnx_attend)

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = lm

        def forward(self, tensors):
            rounded = {id(weight): blocks[name] for name, weight in lm.named_parameters() if name in blocks}
            linear = lambda x, weight, bias=None: onnx_linear(x, weight, bias, rounded.get(id(weight)))  # noqa: E731
            with mock.patch.object(tinylm, "linear", linear):
                return graph.forward(self.lm, dict(zip(graph.inputs, tensors)))

    dims = {axis: torch.export.Dim(axis) for axis in SIZES}
    arguments = [torch.ones([SIZES.get(axis, axis) for axis in axes], dtype=getattr(torch, dtype))
                 for dtype, *axes in graph.inputs.values()]
    shapes = [{i: dims[axis] for i, axis in enumerate(axes) if axis in dims} for _, *axes in graph.inputs.values()]
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # "no torchvision"
    with torch.no_grad(), leaves, contextlib.ExitStack() as patches, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that axes share names, as they should, and torch's own deprecations
        if "embed.weight" in blocks:
            for part, array in zip(PARTS, blocks["embed.weight"].arrays(str(lm.dtype).removeprefix("torch."))):
                lm.embed.register_buffer(part, torch.from_numpy(array), persistent=False)
            patches.enter_context(mock.patch.object(lm.embed, "forward", lambda ids: onnx_embedding(lm.embed, ids)))
        if graph.grouped:
            patches.enter_context(mock.patch.object(tinylm.Attention, "forward", grouped_attention))
            for rotary in lm.rotary.values():
                positions = torch.arange(lm.config.max_position_embeddings)[None]
                rotary.cos, rotary.sin = (x[0].to(lm.dtype) for x in rotary(positions))
            patches.enter_context(mock.patch.object(tinylm.Rotary, "forward", rotary_tables))
        program = torch.onnx.export(
            Traced().eval(), (arguments,), dynamo=True, opset_version=OPSET, verbose=False, dynamic_shapes=(shapes,),
            input_names=[*graph.inputs], output_names=graph.outputs)
    model = tidy(program.model)
    put_blocks(model.graph, blocks)
    for value in (*model.graph.inputs, *model.graph.outputs):  # the axes of optimum, whose callers ask for all logits
        value.shape = ir.Shape("sequence_length" if str(dim) == "logits_length" else dim for dim in value.shape)
    if graph.grouped:
        model.metadata_props["shared_cache"] = "1"  # present may be written in place, where past has the room
    if graph.grouped or lm.config.position in tinylm.LIMITED:
        model.metadata_props["max_position_embeddings"] = str(lm.config.max_position_embeddings)
    return model


def put_blocks(graph, blocks: dict):
    """Rounded weights in the place of the traced ones: bytes, scales and zero points, each stored once."""
    import onnx_ir as ir
    for node in list(ir.traversal.RecursiveGraphIterator(graph)):
        if node.op_type != "MatMulNBits":
            continue
        weight = node.inputs[1]
        names = [weight.name.removesuffix("weight") + part for part in PARTS]
        if names[0] not in graph.initializers:  # a tied table's are there already
            for name, array in zip(names, blocks[weight.name].arrays(weight.dtype.numpy())):
                graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        for place, name in enumerate(names, 1):
            node.replace_input_with(place, graph.initializers[name])
        if not weight.uses():
            del graph.initializers[weight.name]


def tidy(model):
    """Give every weight the name of its module; drop dead nodes and the stack traces, which name this machine."""
    import ast
    import onnx_ir.passes.common as passes
    graph = model.graph
    for node in graph:  # a transposed weight has lost its name: its node knows the modules around it
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if node.op_type == "MatMul" and node.inputs[1].is_initializer() and scopes:
            rename(graph, node.inputs[1], ast.literal_eval(scopes)[-2] + ".weight")
        if node.op_type == "RMSNormalization":
            fuse_norm(graph, node)
    for value in list(graph.initializers.values()):
        rename(graph, value, value.name.removeprefix("lm."))
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    for thing in (model, graph, *graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)):
        thing.metadata_props.clear()
    graph.name, model.producer_name, model.producer_version = "tinylm", "tinylm", None
    for node in graph:
        node.name = node.outputs[0].name
    return model


def fuse_norm(graph, norm):
    """The sum of the residual stream and the norm after it as one operator, which ONNX Runtime has on CPU and CUDA
    (its own optimizer finds it for layer norms only). A sum with a bias, which has one axis, is none."""
    import onnx_ir as ir
    add = norm.inputs[0].producer()
    if add is None or add.op_type != "Add" or any(x.shape is None or len(x.shape) != 3 for x in add.inputs):
        return
    fused = ir.Node("com.microsoft", "SkipSimplifiedLayerNormalization", [*add.inputs, norm.inputs[1]],
                    [norm.attributes["epsilon"]], num_outputs=4)
    fused.outputs[1].name = fused.outputs[2].name = ""
    graph.opset_imports["com.microsoft"] = 1
    ir.convenience.replace_nodes_and_values(graph, norm, [norm, add], [fused], [norm.outputs[0], add.outputs[0]],
                                            fused.outputs[::3])


def rename(graph, value, name: str):
    """An initializer under another name, unless an earlier one has that."""
    if name not in graph.initializers:
        value.name = name


# ---------------------------------------------------------------------------------------------------------------------
# Rounding weights
# ---------------------------------------------------------------------------------------------------------------------

class Blocks(NamedTuple):
    """A matrix of whole numbers 0 to 2^bits - 1, a scale and a zero point for each block of them in a row."""
    codes: object   # (rows, blocks, block)
    scales: object  # (rows, blocks, 1)
    zeros: object
    bits: int

    def weight(self):
        return ((self.codes - self.zeros) * self.scales).flatten(1)

    def arrays(self, dtype) -> tuple:
        """Codes, scales and zero points, as ONNX Runtime has them: two codes of 4 bits in a byte, the first one low."""
        codes, zeros = (x.numpy().astype(np.uint8) for x in (self.codes, self.zeros[..., 0]))
        if self.bits == 4:
            zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
            codes, zeros = (x[..., ::2] | x[..., 1::2] << 4 for x in (codes, zeros))
        return codes, self.scales[..., 0].numpy().astype(dtype), zeros


def nearest(weight, bits: int, moments=None) -> Blocks:
    """Blocks for a weight (rows, columns). With the second moments (columns, columns) of the inputs it meets, ranges
    and zeros are those of least weighted error, and what rounding a column does to the outputs is made up for by the
    columns after it, the weightiest first (GPTQ, Frantar et al. 2022)."""
    import torch
    top, blocks = 2**bits - 1, weight.float().unflatten(1, (-1, math.gcd(weight.shape[1], BLOCK[bits])))
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=1e-6)
    middle, least = (-low / (high - low) * top).round(), None
    importance = 1 if moments is None else moments.diagonal().view(blocks.shape[1:])
    for share, shift in ((1, 0),) if moments is None else itertools.product(SHARES, (0, -1, 1)):
        scale = ((high - low) * (share / top)).half().float().clamp(min=1e-7)
        zero = (middle + shift).clamp(0, top)
        codes = (blocks / scale + zero).round().clamp(0, top)
        error = (((codes - zero) * scale - blocks).square() * importance).sum(-1, keepdim=True)
        found = error, scale, zero
        least = found if least is None else [torch.where(error < least[0], *both) for both in zip(found, least)]
    _, scales, zeros = least
    codes = (blocks / scales + zeros).round().clamp(0, top)
    if moments is not None:  # codes for these scales, the scales that suit those best, and codes for these
        factor = factored(moments)
        steps = compensated(weight, scales, zeros, factor, top) - zeros
        better = ((steps * blocks * importance).sum(-1, keepdim=True)
                  / (steps.square() * importance).sum(-1, keepdim=True).clamp(min=1e-12)).half().float()
        scales = torch.where(better > 1e-7, better, scales)
        codes = compensated(weight, scales, zeros, factor, top)
    return Blocks(codes, scales, zeros, bits)


def factored(moments) -> tuple:
    """The order of columns, the weightiest first, and the upper Cholesky factor of the damped moments' inverse."""
    import torch
    order = moments.diagonal().argsort(descending=True)
    moments = moments + 0.03 * moments.diagonal().mean() * torch.eye(len(moments))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order]))
    return order, torch.linalg.cholesky(inverse, upper=True)


def compensated(weight, scales, zeros, factor: tuple, top: int):
    """The codes of `nearest`, column by column."""
    import torch
    (_, groups, _), columns, (order, upper) = scales.shape, weight.shape[1], factor
    block = columns // groups
    w, scales, zeros = (x.flatten(1).t()[order].contiguous() for x in (  # a column is a row here: memory in one piece
        weight.float(), scales.expand(-1, -1, block), zeros.expand(-1, -1, block)))
    codes, errors = torch.empty_like(w), torch.empty(block, len(weight))
    for start in range(0, columns, block):
        stop = start + block
        for i in range(start, stop):
            codes[i] = (w[i] / scales[i] + zeros[i]).round().clamp(0, top)
            error = errors[i - start] = (w[i] - (codes[i] - zeros[i]) * scales[i]) / upper[i, i]
            w[i:stop].addr_(upper[i, i:stop], error, alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return codes[order.argsort()].t().unflatten(1, (groups, block))


def round_weights(lm, bits: int, ids) -> dict:
    """Round the matrices of a model in place; their Blocks by name. Embedding, head and fused query, key and value keep
    8 bits: 4 cost more there than in all others. Keys and values of a source, made once, stay as they are. In 4 bits a
    matrix is rounded for the inputs it meets when `ids` (batch, seq) run through what was rounded before it."""
    from unittest import mock
    import torch
    import tinylm
    linear, blocks = tinylm.linear, {}
    modules = {"embed": lm.embed} | {name: m for name, m in lm.named_modules() if isinstance(m, tinylm.Linear)}
    names = {id(module.weight): name + ".weight" for name, module in modules.items()
             if module.weight is not None and module.weight.shape[1] % 32 == 0 and not name.endswith(".kv")}

    def put(weight, inputs=None):
        name = names.get(id(weight))
        if name is None or name in blocks:
            return
        wide = bits == 8 or name in ("embed.weight", "head.out.weight") or name.endswith("qkv.weight")
        moments = None if wide or inputs is None else inputs.t() @ inputs / len(inputs)
        blocks[name] = nearest(weight.data, 8 if wide else bits, moments)
        weight.data = blocks[name].weight()

    def rounded(x, weight, bias=None):
        put(weight, x.flatten(0, -2))
        return linear(x, weight, bias)

    with torch.no_grad():
        put(lm.embed.weight)
        if bits < 8 and ids is not None:
            with mock.patch.object(tinylm, "linear", rounded):
                lm(ids, decoder_input_ids=ids if lm.encoder else None, columns=torch.zeros_like(ids[:, :1]))
        for module in modules.values():
            if module.weight is not None:
                put(module.weight)
    return blocks


def scale_cache(lm, ids):
    """Give every layer the scales (1, kv_heads, 1, head_dim) by which its keys and values fit into 8 bits, as large as
    ids (batch, seq) ask for. Channels of a key that turn together share theirs, so that it holds at every position."""
    import torch
    half = lm.config.rotary_dim // 2

    def see(attention, k, v):
        turning = torch.hypot(k[..., :half], k[..., half:2 * half])
        k = torch.cat((turning, turning, k[..., 2 * half:]), -1)
        attention.k_scale, attention.v_scale = (x.abs().amax((0, 1))[None, :, None].clamp(min=1e-6) / 127
                                                for x in (k, v))
        return k, v

    with torch.no_grad(), keys_and_values(lm, see):
        lm(ids, columns=torch.zeros_like(ids[:, :1]))


def round_to_scale(attention, k, v):
    """Keys and values as a cache of 8 bits gives them back."""
    return [(x / scale[:, :, 0]).round().clamp(-128, 127) * scale[:, :, 0]
            for x, scale in ((k, attention.k_scale), (v, attention.v_scale))]


def keys_and_values(lm, change):
    """While it lasts, `change(attention, k, v)` sees keys and values (batch, seq, kv_heads, head_dim) of every layer on
    their way into tinylm's `attend`, and says what goes on."""
    from unittest import mock
    import tinylm
    attend = tinylm.attend

    def changed(q, k, v, mask, head_dim, scale, softcap, dropout, cache, layer, causal):
        k, v = change(lm.layers[layer].attention, *(x.unflatten(-1, (-1, head_dim)) for x in (k, v)))
        return attend(q, k.flatten(2), v.flatten(2), mask, head_dim, scale, softcap, dropout, cache, layer, causal)

    return mock.patch.object(tinylm, "attend", changed)


# ---------------------------------------------------------------------------------------------------------------------
# Verifying: the file that was written, against torch
# ---------------------------------------------------------------------------------------------------------------------

def verify(lm, folder: Path, precision: str, stored: Precision) -> dict:
    """Largest difference from torch, relative to the largest value, per check; of ids the number of equal ones. Raises
    Error where one is too large or, in fp32, where ids differ."""
    import torch

    def reference(ids, mask, **more):
        with torch.no_grad(), keys_and_values(lm, round_to_scale) if stored.cache else contextlib.nullcontext():
            more = {name: torch.from_numpy(x) for name, x in more.items()}
            return lm(torch.from_numpy(ids), torch.from_numpy(mask), **more).float().numpy()

    found = {}
    for name, ours, theirs in checks(lm, OnnxLM(folder, precision, providers=[CPU]), reference):
        if np.issubdtype(theirs.dtype, np.integer):
            if stored.exact:  # elsewhere a near tie of random ids says nothing; `measure` counts on real ones
                found[name] = equal_columns(ours, theirs)
                require(found[name] == theirs.shape[1], f"verify: {precision} {name} differ from torch after "
                        f"{found[name]} of {theirs.shape[1]}")
        else:
            error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            found[name] = max(error, found.get(name, 0.0))
            require(error <= stored.tolerance, f"verify: {precision} {name} differs from torch by {error:.1e} of the "
                    f"largest value, expected at most {stored.tolerance:.0e}")
    return found


def equal_columns(a, b) -> int:
    """So many columns, from the first, are equal in all rows."""
    return int((a == b).all(0).cumprod().sum()) if a.shape == b.shape else 0


def examples(lm) -> dict:
    """Name -> random ids (2, seq) and their mask: whole, or the second row padded on one side."""
    rng, limit, found = np.random.default_rng(0), min(lm.config.max_position_embeddings, 64), {}
    ids, short = rng.integers(0, lm.config.vocab_size, (2, max(2, limit // 4))), max(1, limit // 8)
    rows = {"prefill": slice(None), "left padding": slice(-short, None), "right padding": slice(short)}
    for name, real in rows.items():
        mask = np.ones_like(ids)
        mask[1], mask[1, real] = 0, 1
        found[name] = ids, mask
    return found


def checks(lm, onnx_lm, reference):
    """(name, what OnnxLM says, what torch says) of padded batches and, where text is written, of a step after others
    and of greedy tokens."""
    import torch
    for name, (ids, mask) in examples(lm).items():
        more = {"decoder_input_ids": ids[:, ::-1].copy()} if lm.encoder else {}
        if kinds := lm.config.type_vocab_size:
            more["token_type_ids"] = ids % kinds
        expected = reference(ids, mask, **more)
        seen = mask.astype(bool) if expected.ndim == 3 and not lm.encoder else slice(None)
        yield name, onnx_lm(ids, mask, **more)[seen], expected[seen]
        if onnx_lm.past and name == "left padding":
            text, real = (more["decoder_input_ids"], np.ones_like(ids)) if lm.encoder else (ids, mask)
            source, start = (onnx_lm.source(ids, mask), 1) if lm.encoder else (None, ids.shape[1])
            _, past = onnx_lm.step(text[:, :-1], real[:, :-1], source=source)
            yield "decode", onnx_lm.step(text[:, -1:], real, past, source)[0], expected[:, -1:]
            new = min(32, lm.config.max_position_embeddings - start)
            options = dict(max_new_tokens=new, eos_token_id=(), num_beams=1)
            theirs = lm.generate(*map(torch.from_numpy, (ids, mask)), **options).numpy()
            yield "greedy tokens", onnx_lm.generate(ids, mask, **options)[:, start:], theirs[:, start:]


def check_loop(lm, onnx_lm, path: Path):
    """The graph that generates says, greedily and sampled, what OnnxLM does with the one it was made of."""
    import onnxruntime as ort
    session = Session(path, ort.SessionOptions(), [CPU])
    ids = np.repeat(examples(lm)["prefill"][0][:1], 2, 0)
    new = min(24, lm.config.max_position_embeddings - ids.shape[1])
    for options in ({}, dict(temperature=0.8, top_k=40, top_p=0.95), dict(temperature=1.0)):
        ours = onnx_lm.generate(ids, max_new_tokens=new, eos_token_id=(), seed=3, num_beams=1, **options)
        knobs = dict(temperature=0.0, top_k=0, top_p=1.0) | options
        feeds = {name: np.array(value, np.float32 if isinstance(value, float) else None)
                 for name, value in knobs.items()}
        text, = session(input_ids=ids, max_new_tokens=np.array(new), seed=np.array(3), eos_token_id=np.array([-1]),
                        **feeds)
        require(np.array_equal(text.numpy(), ours), f"verify: {path.name} with {options or 'temperature 0'} differs "
                f"from OnnxLM after {equal_columns(text.numpy(), ours)} of {ours.shape[1]} columns")


# ---------------------------------------------------------------------------------------------------------------------
# Exporting
# ---------------------------------------------------------------------------------------------------------------------

def export_onnx(lm_or_folder, out, onnx: bool = True, safetensors: bool = True, log=None, precisions=("fp32",),
                text: str | None = None, generate: bool = False, int8_cache: bool = False) -> dict:
    """Write the folder `out` from a TinyLM or a checkpoint folder: config, tokenizer and model.safetensors in the
    stored dtype, and the graphs in onnx/ in each of the precisions (keys of PRECISIONS), of a decoder with
    genai_config.json for the first of them, and with `generate` onnx/generate.onnx: prefill, cache, sampling and
    stopping in one graph. Weights of 4 bits and, with `int8_cache`, keys and values (in all but fp32) are rounded for a
    text such as the model will meet; without one, for what it writes by itself. Returns what `verify` found, by
    precision. The folder appears whole, after its check, or not at all; an earlier export in its place is replaced.

    Raises Error (or tinylm's) where the checkpoint cannot be read or a check fails.
    """
    import tinylm
    out, log, found = Path(out).resolve(), log or (lambda text: None), {}
    require(not out.exists() or out.is_dir() and (not any(out.iterdir()) or (out / MARK).exists()),
            f"{out}: exists and is no ONNX export; name another folder with --out")
    for name in precisions:
        require(name in PRECISIONS, f"precision {name!r}: expected one of {', '.join(PRECISIONS)}")
    if isinstance(lm_or_folder, tinylm.TinyLM):
        lm, extras = copy.deepcopy(lm_or_folder), []
    else:
        source = Path(lm_or_folder).resolve()
        require(out not in (source, *source.parents), f"{out}: is the checkpoint itself, or holds it; name another "
                "folder")
        log(f"loading {lm_or_folder}")
        lm = tinylm.TinyLM.from_pretrained(lm_or_folder)
        extras = [name for name in POOLING if (Path(lm_or_folder) / name).exists()]
    work = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        work.mkdir(parents=True)
        lm.save_pretrained(work)
        for name in extras:
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(lm_or_folder) / name, work / name)
        (work / MARK).write_text("")
        log(f"model.safetensors {megabytes(work / 'model.safetensors')}")
        if onnx:
            found = write_graphs(lm, work, list(dict.fromkeys(precisions)), text, generate, int8_cache, log)
        if not safetensors:
            (work / "model.safetensors").unlink()
        put(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def write_graphs(lm, folder: Path, precisions: list, text: str | None, generate: bool, int8_cache: bool, log) -> dict:
    """onnx/ of a folder, each precision verified and, if there is more than fp32, measured."""
    import torch
    import tinylm
    lm, found = lm.to("cpu", torch.float32).eval(), {}
    writes = lm.config.causal and lm.config.head == "lm" and not lm.config.num_encoder_layers
    require(writes or not generate, "--generate: the model is no decoder that writes text")
    told = [name for name in ("no_repeat_ngram_size", "min_length", "bad_words_ids", "forced_bos_token_id",
                              "forced_eos_token_id") if lm.generation_config.get(name)]
    told += ["repetition_penalty"] * (lm.generation_config.get("repetition_penalty", 1) not in (None, 1))
    require(not (generate and told), f"--generate: generation_config.json has {', '.join(told)}, which the graph lacks")
    caches = [name for name in precisions if writes and groups_queries(lm.config, PRECISIONS[name])]
    require(caches or not int8_cache, f"--int8-cache: no graph of {', '.join(precisions)} groups queries")
    (folder / "onnx").mkdir()
    measured = text is not None or precisions != ["fp32"]
    ids = some_ids(lm, text, writes) if measured else None
    rounded = {0: (lm, {})}
    log(f"tracing {sum(p.numel() for p in lm.parameters()):,} parameters")
    for name in precisions:
        stored = PRECISIONS[name]
        if int8_cache and name in caches:
            stored = replace(stored, cache="int8", tolerance=0.1)  # a hair's breadth may tip what is rounded
        if stored.bits not in rounded:
            log(f"rounding to {stored.bits} bits")
            model = copy.deepcopy(lm)
            rounded[stored.bits] = model, round_weights(model, stored.bits, None if ids is None else ids[MEASURED:])
        model, blocks = rounded[stored.bits]
        if stored.cache:
            scale_cache(model, ids[MEASURED:])
        traced = copy.deepcopy(model).to(getattr(torch, stored.dtype))
        try:
            graphs = {graph.stem: trace(traced, graph, blocks) for graph in graphs_of(lm.config, stored)}
            if generate:
                graph = generate_graph(lm.config, stored)
                graphs[graph.stem] = in_a_loop(trace(traced, graph, blocks), lm.config, stored)
        except Exception as error:  # the exporter's own have no common base
            raise Error(f"onnx: the trace of {name} failed ({first_line(error)})") from error
        graphs = {folder / "onnx" / f"{stem}{stored.suffix}.onnx": model for stem, model in graphs.items()}
        write_all(graphs)
        found[name] = verify(model, folder, name, stored)
        log(f"{name} verified against torch: " + said(found[name]))
        if blocks:
            write_all(graphs, accuracy_level=4)
            rough = verify(model, folder, name, replace(stored, tolerance=math.inf))
            log(f"{name} in 8-bit arithmetic: {said(rough)}")
        for path in graphs:
            log(f"onnx/{path.name} {megabytes(path)}")
        if generate:
            check_loop(lm, OnnxLM(folder, name, providers=[CPU]), path)
            log(f"onnx/{path.name} writes what onnx/model{stored.suffix}.onnx does")
        if measured and writes:
            log(f"{name} " + measure(lm, folder, name, ids[:MEASURED]))
    if large := {path.name: True for path in (folder / "onnx").glob("*.onnx") if Path(f"{path}_data").exists()}:
        config = tinylm.read_json(folder / "config.json")  # where browsers look
        config["transformers.js_config"] = {"use_external_data_format": large}
        tinylm.write_json(folder / "config.json", config)
    if writes:
        tinylm.write_json(folder / "genai_config.json", genai_config(lm, PRECISIONS[precisions[0]]))
    return found


def write_all(graphs: dict, **attributes):
    """Write models to their paths, with attributes for the products with rounded weights."""
    import onnx_ir as ir
    for path, model in graphs.items():
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type == "MatMulNBits":
                node.attributes.update({name: ir.AttrInt64(name, value) for name, value in attributes.items()})
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        ir.save(model, path, **({"external_data": path.name + "_data"} if size > EXTERNAL_ABOVE else {}))


def said(found: dict) -> str:
    return ", ".join(f"{check} {value:.1e}" if isinstance(value, float) else f"{value} {check} equal"
                     for check, value in found.items())


def some_ids(lm, text: str | None, writes: bool):
    """Windows (windows, WINDOW) of a text, or of what a decoder writes by itself; None where there is neither."""
    import torch
    length = min(WINDOW, lm.config.max_position_embeddings)
    if text is not None:
        require(lm.tokenizer, "--text: the checkpoint has no tokenizer.json")
        ids = lm.tokenizer.encode(text)
        count = min(len(ids) // length, WINDOWS)
        require(count > MEASURED, f"--text: {len(ids)} tokens, expected at least {(MEASURED + 1) * length}")
        return torch.tensor(ids[:count * length]).view(count, length)
    if not writes:
        return None
    begin = lm.config.bos_token_id if lm.config.bos_token_id in range(lm.config.vocab_size) else 0
    return lm.generate(torch.full((WINDOWS, 1), begin), max_new_tokens=length - 1, temperature=1.0, eos_token_id=(),
                       seed=0, num_beams=1)


def measure(lm, folder: Path, precision: str, ids) -> str:
    """What a precision costs against torch in fp32, on windows of ids that it was not rounded for."""
    import torch
    onnx_lm, array, half = OnnxLM(folder, precision, providers=[CPU]), ids.numpy(), ids.shape[1] // 2

    def perplexity(model):
        rows = array if model is onnx_lm else ids
        logits = torch.cat([torch.as_tensor(model(row[None]))[0, :-1] for row in rows])
        return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).exp())

    with torch.no_grad():
        before, after = perplexity(lm), perplexity(onnx_lm)
    options = dict(max_new_tokens=max(1, min(32, half)), eos_token_id=(), num_beams=1)
    new = slice(half, None)
    ours, theirs = onnx_lm.generate(array[:, :half], **options)[:, new], lm.generate(ids[:, :half], **options)[:, new]
    agree = (ours == theirs.numpy()).cumprod(1).mean()
    begin = time.monotonic()
    onnx_lm.generate(array[:1, :1], **options)
    speed = options["max_new_tokens"] / (time.monotonic() - begin)
    return (f"perplexity {after:.3f} (torch in fp32 {before:.3f}, {after / before - 1:+.2%}), {agree:.0%} of greedy "
            f"tokens before the first that differs, {speed:.0f} tokens/s")


def put(work: Path, out: Path):
    """Rename a folder; what had the name before goes, unless the renaming fails."""
    old = work.with_suffix(".old")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(work, out)
    except BaseException:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def megabytes(path: Path) -> str:
    size = sum(p.stat().st_size for p in path.parent.glob(path.name + "*"))
    return f"{size / 1e6:.1f} MB"


def genai_config(lm, stored: Precision) -> dict:
    """The settings of onnxruntime-genai for a graph."""
    config, layers = lm.config, lm.config.num_hidden_layers
    ends = lm.ends()
    pad = lm.said("pad_token_id")
    if pad not in range(config.vocab_size) or pad in ends:  # it wants one that ends nothing: of the last, used least
        pad = next(i for i in reversed(range(config.vocab_size)) if i not in ends)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"onnx/model{stored.suffix}.onnx", "head_size": config.head_dim, "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads, "num_hidden_layers": layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")},
        "outputs": {"logits": "logits"} | {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")},
    }
    begin = config.bos_token_id if config.bos_token_id is not None else ends[0] if ends else 0
    search = {"do_sample": False, "max_length": config.max_position_embeddings, 
              "past_present_share_buffer": groups_queries(config, stored)}
    return {"model": {"type": "decoder", "vocab_size": config.vocab_size, "bos_token_id": begin,
                      "context_length": config.max_position_embeddings, "eos_token_id": list(ends) or [pad],
                      "pad_token_id": pad, "decoder": decoder}, "search": search}


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

def main(argv: list | None = None) -> int:
    """`export.py [FOLDER] --onnx` exports, `export.py run FOLDER INPUT...` runs what was exported, without torch."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run_folder(argv[1:]) if argv[:1] == ["run"] else run_export(argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever it is, of whichever library: one line
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        print(f"tinylm-export: error: {kind}{first_line(error)}", file=sys.stderr)
        return 1


def run_folder(argv: list) -> int:
    parser = argparse.ArgumentParser(prog="tinylm-export run", description="Run an exported folder on texts, without "
                                     "torch: a line of JSON for each.")
    parser.add_argument("folder", help="what the export wrote")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="texts; a second one to classify, or a question's "
                        "context, stands behind a tab; by default the lines of standard input")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--max-new-tokens", type=int, help="of a model that writes")
    options = parser.parse_intermixed_args(argv)
    inputs = options.inputs or [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    results = run_inputs(OnnxLM(options.folder, options.precision), inputs, options.max_new_tokens)
    for text, result in zip(inputs, results):
        print(json.dumps({"input": text, "output": result}, ensure_ascii=False), flush=True)
    return 0


def run_inputs(lm: OnnxLM, inputs: list, max_new_tokens: int | None) -> list:
    """What the model says of each; behind a tab stands a second text to classify, or a question's context."""
    parts = [text.partition("\t") if lm.job in ("classify", "qa") else (text, "", "") for text in inputs]
    more = {"max_new_tokens": max_new_tokens} if lm.job == "generate" else {}
    return lm.run([text for text, *_ in parts], [pair or None for *_, pair in parts], **more)


def run_export(argv: list) -> int:
    parser = argparse.ArgumentParser(prog="tinylm-export", description="Turn a checkpoint into safetensors and ONNX "
                                     "graphs in one folder, verified against torch, and try it; `run FOLDER INPUT...` "
                                     "runs it later.")
    parser.add_argument("folder", nargs="?", default=str(WEIGHTS), help="a checkpoint (default: the shipped one)")
    parser.add_argument("--onnx", action="store_true", help="write onnx/*.onnx, beside model.safetensors")
    parser.add_argument("--safetensors", action="store_true", help="write model.safetensors alone, without --onnx")
    parser.add_argument("--precision", nargs="+", choices=[*PRECISIONS, "all"], default=["fp32"], metavar="PRECISION",
                        help=f"{', '.join(PRECISIONS)} or all; loaders take the first (default: fp32)")
    parser.add_argument("--generate", action="store_true", help="also onnx/generate*.onnx: the whole of generation, "
                        "cache, sampling and stopping, in one graph and one call")
    parser.add_argument("--int8-cache", action="store_true", help="keys and values in 8 bits (in all but fp32): a "
                        "quarter of the memory, and long texts are written faster; not for optimum and transformers.js")
    parser.add_argument("--text", help="file of text such as the model will meet: weights of 4 bits are rounded for "
                        "it, and every precision is measured on it")
    parser.add_argument("--out", default="exported", help="folder to write (default: exported)")
    parser.add_argument("--prompt", help="text that the exported model continues, greedily (default: 'ROMEO:', "
                        "sampled), or reads")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    options = parser.parse_args(argv)
    if not (options.onnx or options.safetensors):
        parser.error("nothing to do: give --onnx, --safetensors or both")
    if not options.onnx and (options.generate or options.int8_cache or options.text or options.prompt):
        parser.error("--generate, --int8-cache, --text and --prompt go with --onnx")
    begin = time.monotonic()
    precisions = [*PRECISIONS] if "all" in options.precision else options.precision
    text = Path(options.text).read_text(encoding="utf-8") if options.text else None
    export_onnx(options.folder, options.out, onnx=options.onnx, precisions=precisions, text=text,
                generate=options.generate, int8_cache=options.int8_cache,
                log=lambda text: print(f"[{time.monotonic() - begin:5.1f} s] {text}", flush=True))
    print(f"[{time.monotonic() - begin:5.1f} s] wrote {options.out}", flush=True)
    if options.onnx:
        lm = OnnxLM(options.out, precisions[0])
        if lm.job == "generate" and not lm.encoder:
            sampled = {} if options.prompt else {"temperature": 0.7, "seed": 1}
            show(lm, options.prompt or "ROMEO:", options.max_new_tokens, **sampled)
        elif options.prompt:
            print(json.dumps(run_inputs(lm, [options.prompt], options.max_new_tokens)[0], ensure_ascii=False))
    return 0


def show(lm: OnnxLM, prompt: str, max_new_tokens: int, **options):
    """Print a continuation as it comes, then its speed after the first token."""
    if not (lm.folder / "tokenizer.json").exists():
        return print("no sample: the checkpoint has no tokenizer.json")
    print(f"\n{prompt}", end="", flush=True)
    times, ids = [], lm.tokenizer.encode(prompt)
    max_new_tokens = max(1, min(max_new_tokens, lm.session.limit - len(ids)))

    def timed():
        for token in lm.tokens(ids, max_new_tokens, **options):
            times.append(time.monotonic())
            yield token

    for piece in text_pieces(lm.tokenizer, timed(), prompt=ids):
        print(piece, end="", flush=True)
    speed = f", {(len(times) - 1) / (times[-1] - times[0]):.0f} tokens/s" if len(times) > 1 else ""
    print(f"\n\n{lm.provider}{speed}")


if __name__ == "__main__":
    sys.exit(main())
