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
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path

import numpy as np

WEIGHTS = Path(__file__).resolve().parent / "weights"  # the model shipped beside this file
SUFFIX = {"fp32": ""}                                  # precision -> what the names of its files in onnx/ end with
MARK = ".tinylm-export"                                # this file says: the next export may replace the folder
OPSET = 23                                             # the first with Attention, RotaryEmbedding, RMSNormalization
TOLERANCE = 2e-4                                       # largest difference of logits, relative to the largest logit
EXTERNAL_ABOVE = 2**31 - 2**26                         # bytes; a protobuf file ends at 2 GiB
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
POOLING = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json")


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
        self.value, self.provider = ort.OrtValue.ortvalue_from_numpy, self.session.get_providers()[0]
        self.inputs = {i.name: i.shape for i in self.session.get_inputs()}
        self.outputs = {o.name: o.shape for o in self.session.get_outputs()}
        self.limit = int(self.session.get_modelmeta().custom_metadata_map.get("max_position_embeddings", 2**31))

    def __call__(self, **feeds) -> list:
        """All outputs. What the graph does not take is left out."""
        feeds = {name: self.value(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
                 for name, x in feeds.items() if name in self.inputs}
        try:
            return self.session.run_with_ort_values([*self.outputs], feeds)
        except Exception as error:  # e.g. more tokens than there are learned positions
            raise Error(f"onnxruntime: {first_line(error)}") from None


class OnnxLM:
    """An exported model under ONNX Runtime: numpy in, numpy out.

    folder: what `export_onnx` wrote; precision: a key of SUFFIX; providers: ONNX Runtime's names, tried in order (None:
    CUDA where there is a driver, else CPU); threads: of the CPU (None: ONNX Runtime's choice, one per core).
    Raises Error where a file is missing or where a provider that was asked for does not load.
    """

    def __init__(self, folder, precision: str = "fp32", providers=None, threads: int | None = None):
        import onnxruntime as ort
        require(precision in SUFFIX, f"precision = {precision!r}, expected one of {', '.join(SUFFIX)}")
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json") | self._json("generation_config.json")
        stems = ("encoder_model", "decoder_model_merged") if self.config.get("is_encoder_decoder") else ("model",)
        paths = [self.folder / "onnx" / f"{stem}{SUFFIX[precision]}.onnx" for stem in stems]
        for path in paths:
            require(path.exists(), f"{path}: no such file; write it with `python export.py FOLDER --onnx`")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        asked, providers = providers, providers or ([CUDA, CPU] if has_cuda(ort) else [CPU])
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]  # or (name, options)
        for name in names:
            require(name in ort.get_available_providers(), f"providers: {name} is not in this onnxruntime (it has "
                    f"{', '.join(ort.get_available_providers())})")
        *encoder, self.session = (Session(path, options, providers) for path in paths)
        self.encoder, self.provider = encoder[0] if encoder else None, self.session.provider
        require(not asked or self.provider == names[0], f"providers: {names[0]} did not load; onnxruntime fell back to "
                f"{self.provider}")
        self.past = {name: shape for name, shape in self.session.inputs.items() if name.startswith("past_key_values.")}
        self.vocab_size, self._tokenizer = self.config["vocab_size"], None

    @property
    def tokenizer(self):
        """`encode(text)` and `decode(ids)` of the folder's tokenizer.json."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.folder / "tokenizer.json")
        return self._tokenizer

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

    def step(self, input_ids, mask, past=None, source=None):
        """One call of a graph with a cache: (logits, present). Ids (batch, seq), mask (batch, past + seq), past as
        returned; behind an encoder its `source`."""
        first = past is None
        if first:
            empty = ((len(input_ids), heads, 0, width) for _, heads, _, width in self.past.values())
            past = [np.zeros(shape, np.float32) for shape in empty]
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -input_ids.shape[1]:]
        feeds = dict(zip(self.past, past)) | (source or {})
        logits, *present = self.session(input_ids=input_ids, attention_mask=mask, position_ids=positions,
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

    def sampling(self, **given) -> Sampling:
        """tinylm's `sampling`: as given, else as the folder's generation_config.json says, else plainly."""
        for key in UNSUPPORTED & set(self.config):
            require(self.config[key] in (None, 0, 1, []), f"generation_config.json: {key} = {self.config[key]!r} is "
                    "not supported")
        said = {name: self.config.get(name) for name in FROM_FILE}
        if self.encoder and said["max_new_tokens"] is None and self.config.get("max_length"):
            said["max_new_tokens"] = self.config["max_length"] - 1
        said |= {name: value for name, value in given.items() if value is not None or name not in said}
        unknown = sorted(set(said) - {f.name for f in fields(Sampling)})
        require(not unknown, f"{', '.join(unknown)}: no such option of a generation under ONNX Runtime")
        knobs = Sampling(**{name: value for name, value in said.items() if value is not None or name not in FROM_FILE})
        require(knobs.num_beams == 1, f"num_beams = {knobs.num_beams}: there is no beam search under ONNX Runtime; "
                "give num_beams=1 for greedy decoding or sampling")
        return knobs

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
        pad = self.config.get("pad_token_id")
        pad = pad if pad is not None else ends[0] if ends else 0
        if self.encoder:
            source = self.source(input_ids, mask)
            input_ids = self._prompt(input_ids)
            mask = np.ones_like(input_ids)
        (batch, seq), past = input_ids.shape, None
        texts = [row[real].tolist() for row, real in zip(input_ids, mask.astype(bool))]  # prompts, and what follows
        starts, ended = [*map(len, texts)], np.zeros(batch, bool)
        last = (mask * np.arange(1, seq + 1)).argmax(1)  # each row's last token
        longest = np.concatenate([mask, np.ones((batch, knobs.max_new_tokens), np.int64)], 1)
        for count in range(knobs.max_new_tokens):
            logits, past = self.step(input_ids, mask, past, source)
            logits = constrain(logits[np.arange(batch), last], texts, knobs, ends, count)
            token = np.where(ended, pad, sample(logits, knobs, seed, count))
            yield token
            for row, (text, id) in enumerate(zip(texts, token.tolist())):
                text.append(id)
                ended[row] |= id in ends or any(
                    s in self.tokenizer.decode(text[starts[row]:][-2 * len(s.encode()) - 8:]) for s in stop)
            if ended.all():
                return
            input_ids, mask, last = token[:, None], longest[:, :seq + count + 1], -1

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
    width, fills = max(len(e.ids) for e in encodings), (lm.config.get("pad_token_id") or 0, 0, 0)
    rows = [[part + [fill] * (width - len(part)) for part, fill in zip((e.ids, e.attention_mask, e.type_ids), fills)]
            for e in encodings]
    ids, mask, types = (np.array(part) for part in zip(*rows))
    return lm(ids, mask, types if lm.config.get("type_vocab_size", 0) > 1 else None), mask


def encodings(lm: OnnxLM, texts, pairs, limit: int = LONGEST, stride: int | None = None) -> list:
    return lm.tokenizer.encodings(texts, pairs, min(lm.session.limit, limit), stride)


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
    token = lm._json("tokenizer_config.json").get("mask_token")
    name = token["content"] if isinstance(token, dict) else token
    require(name, f"{lm.folder / 'tokenizer_config.json'}: no mask_token")
    mask = lm.tokenizer.backend.token_to_id(name)
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
    pooling, modules = lm._json("1_Pooling/config.json"), lm.folder / "modules.json"
    chosen = [pool for name, pool in POOLINGS.items() if pooling.get(name)] or [POOLINGS["pooling_mode_mean_tokens"]]
    longest = lm._json("sentence_bert_config.json").get("max_seq_length") or LONGEST
    states, mask = read(lm, encodings(lm, texts, pairs, longest))
    vectors = np.concatenate([pool(states, mask[..., None]).astype(np.float32) for pool in chosen], -1)
    if modules.exists() and "Normalize" in modules.read_text(encoding="utf-8"):
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    yield from ([{"embedding": vector.tolist()}] for vector in vectors)


def write(lm: OnnxLM, texts, pairs, **options):
    for text in texts:
        yield [{"generated_text": "".join(lm.stream(text, **dict(num_beams=1) | options))}]


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
        return self.backend.encode(text).ids

    def encodings(self, texts: list, pairs: list, limit: int, stride: int | None = None) -> list:
        """Of texts, or of pairs, cut to `limit` ids; with a stride only the second one is cut, into windows that share
        so many ids, and those after the first are its `overflowing`."""
        how = {} if stride is None else dict(stride=stride, strategy="only_second")
        self.backend.enable_truncation(limit, **how)
        try:
            both = zip(texts, pairs)
            return self.backend.encode_batch([text if pair is None else (text, pair) for text, pair in both])
        except Exception as error:  # the library raises plain Exception
            raise Error(f"tokenizer: {first_line(error)}") from None
        finally:
            self.backend.no_truncation()

    def decode(self, ids) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


FROM_FILE = ("max_new_tokens", "no_repeat_ngram_size", "min_length", "bad_words_ids", "forced_bos_token_id",
             "forced_eos_token_id", "num_beams")  # tinylm's, where they are not about beams
UNSUPPORTED = {"num_beam_groups", "penalty_alpha", "typical_p", "encoder_no_repeat_ngram_size", "suppress_tokens",
               "begin_suppress_tokens", "exponential_decay_length_penalty", "encoder_repetition_penalty",
               "sequence_bias", "guidance_scale", "min_new_tokens", "epsilon_cutoff", "eta_cutoff", "constraints",
               "force_words_ids"}


@dataclass(frozen=True)
class Sampling:
    """tinylm's `Sampling`, without beams."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    bad_words_ids: tuple = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    num_beams: int = 1

    def __post_init__(self):
        for name, low, high in (("max_new_tokens", 1, 2**31), ("top_k", 0, 2**31), ("no_repeat_ngram_size", 0, 2**31),
                                ("min_length", 0, 2**31), ("forced_bos_token_id", 0, 2**31), ("num_beams", 1, 2**16),
                                ("forced_eos_token_id", 0, 2**31), ("temperature", 0.0, 1e9), ("top_p", 0.0, 1),
                                ("min_p", 0.0, 1), ("repetition_penalty", 1e-9, 1e9)):
            value, kind = getattr(self, name), Integral if isinstance(low, int) else Real
            require(number(value, low, high, kind) or value is None is getattr(Sampling, name), f"{name} = {value!r}, "
                    f"expected {'an integer' if kind is Integral else 'a number'} from {low:g} to {high:g}")
        words = self.bad_words_ids
        require(isinstance(words, (list, tuple)) and all(isinstance(w, (list, tuple)) and w and all(
            number(i, 0, 2**31, Integral) for i in w) for w in words), f"bad_words_ids = {words!r}, expected lists of "
            "ids")
        if self.temperature < 1e-5:
            object.__setattr__(self, "temperature", 0.0)


def has_cuda(ort) -> bool:
    """Is there a CUDA build of ONNX Runtime and a driver for it?"""
    if CUDA not in ort.get_available_providers():
        return False
    with contextlib.suppress(OSError):
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        ort.preload_dlls()
        return True
    return False


def constrain(logits, texts: list, knobs: Sampling, ends: tuple, count: int) -> np.ndarray:
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


def sample(logits, knobs: Sampling, seed: int, step: int) -> np.ndarray:
    """One id per row of logits (batch, vocab): tinylm's `sample` in numpy."""
    if knobs.temperature == 0:
        return logits.argmax(-1)
    logits = logits / np.float32(knobs.temperature)
    if knobs.top_k:
        least = np.sort(logits, axis=-1)[:, -min(int(knobs.top_k), logits.shape[-1])]
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
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
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

def operator(name: str, inputs: tuple, like, *more_shapes, **attributes):
    """One node of the ONNX graph in the place of a traced function. Its outputs have the dtype of `like`; the first
    has its shape too, those after it have `more_shapes`."""
    import torch
    shapes = [like.shape, *more_shapes]
    out = torch.onnx.ops.symbolic_multi_out(name, inputs, attributes, dtypes=[like.dtype] * len(shapes), shapes=shapes,
                                            version=OPSET)
    return out if more_shapes else out[0]


def onnx_rms_norm(x, weight, eps):
    return operator("RMSNormalization", (x, weight), x, axis=-1, epsilon=eps)


def onnx_rotate(x, cos, sin, head_dim):
    width = 2 * cos.shape[-1]
    part = {} if width == head_dim else {"rotary_embedding_dim": width}
    return operator("RotaryEmbedding", (x, cos, sin), x, num_heads=x.shape[-1] // head_dim, **part)


def onnx_attend(q, k, v, mask, head_dim, scale, softcap=None, dropout=0.0, cache=None, layer=0, causal=True):
    """With heads folded, as the model has them: the operator unfolds them, and appends to the past, by itself. Keys of
    a source come unfolded, as they are kept between calls."""
    from einops import rearrange
    mask = None if mask is None else mask.expand(*mask.shape[:2], q.shape[1], mask.shape[3])
    options = dict(scale=scale, **({"softcap": softcap} if softcap else {}))
    if k.ndim == 4:
        q = rearrange(q, "b s (h d) -> b h s d", d=head_dim)
        return rearrange(operator("Attention", (q, k, v, mask), q, **options), "b h s d -> b s (h d)")
    options |= dict(q_num_heads=q.shape[-1] // head_dim, kv_num_heads=k.shape[-1] // head_dim)
    if cache is None:
        return operator("Attention", (q, k, v, mask), q, **options)
    past = cache.past[2 * layer:2 * layer + 2]
    longer = (*past[0].shape[:2], past[0].shape[2] + k.shape[1], head_dim)
    x, *present = operator("Attention", (q, k, v, mask, *past), q, longer, longer, **options)
    cache.present += present
    return x


class Past:
    """The cache of an exported graph, in the place of tinylm's KVCache: past comes in, present goes out, longer."""

    def __init__(self, past: list, positions=None):
        self.past, self.positions, self.present = past, positions, []

    def extend(self, mask):
        """Positions of the queries and of the keys. The mask spans past and new tokens, or, where no positions are
        given, the new ones, none of which is padding."""
        import torch
        import tinylm
        if self.positions is not None:
            return self.positions, tinylm.count_positions(mask)[1]
        old = self.past[0].shape[2]
        keys = torch.arange(old + mask.shape[1])[None]
        return keys[:, old:], keys


@dataclass(frozen=True)
class Graph:
    """A graph to trace: `forward(lm, inputs by name)` lists its outputs."""
    stem: str      # of its file
    forward: object
    inputs: dict   # name -> dtype and axes: sizes, or names where the size varies
    outputs: list


def key_values(config, prefix: str, sides: dict) -> dict:
    """Names of keys and values -> dtype and axes; sides: what names say of whose they are -> the name of their axis."""
    heads, width = config.num_key_value_heads, config.head_dim
    return {f"{prefix}.{layer}{side}.{part}": ("float32", "batch_size", heads, length, width)
            for layer in range(config.num_hidden_layers) for side, length in sides.items() for part in ("key", "value")}


SIZES = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 5, "total_sequence_length": 8,
         "encoder_sequence_length": 7}  # axes that vary, and an example: no two alike, and none 0 or 1
IDS = ("int64", "batch_size", "sequence_length")
SOURCE_IDS = ("int64", "batch_size", "encoder_sequence_length")


def decoder_graph(config) -> list:
    """With a cache: the mask spans past and new tokens."""
    past = key_values(config, "past_key_values", {"": "past_sequence_length"})

    def forward(lm, feed):
        cache = Past([feed[name] for name in past], feed["position_ids"])
        return [lm(feed["input_ids"], feed["attention_mask"], cache=cache), *cache.present]

    inputs = {"input_ids": IDS, "attention_mask": ("int64", "batch_size", "total_sequence_length"), "position_ids": IDS}
    return [Graph("model", forward, inputs | past, ["logits", *key_values(config, "present", {"": ""})])]


def encoder_graph(config) -> list:
    """Whatever reads a text in one call: no cache."""
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * bool(config.type_vocab_size)

    def forward(lm, feed):
        outputs = lm(**feed)
        return list(outputs.unbind(-1)) if config.head == "qa" else [outputs]

    outputs = {"qa": ["start_logits", "end_logits"], None: ["last_hidden_state"]}.get(config.head, ["logits"])
    return [Graph("model", forward, dict.fromkeys(names, IDS), outputs)]


def encoder_decoder_graphs(config) -> list:
    """The encoder, and the decoder with two caches: of what it said, and of the source, filled by the first call."""
    import torch
    from einops import rearrange
    sides = {".decoder": "past_sequence_length", ".encoder": "encoder_sequence_length"}  # the latter may be 0 at first
    past, outputs = key_values(config, "past_key_values", sides), [*key_values(config, "present", sides)]

    def encode(lm, feed):
        return [lm.encoder.states(lm.embed(feed["input_ids"]), feed["attention_mask"])]

    def decode(lm, feed):
        own, kept = ([feed[name] for name in past if side in name] for side in sides)

        def source():
            states = feed["encoder_hidden_states"]
            parts = (part for block in lm.layers for part in block.cross_attention.keys_values(states))
            return [rearrange(part, "b s (h d) -> b h s d", d=config.head_dim).contiguous() for part in parts]

        kept = torch.cond(feed["use_cache_branch"], lambda: [x.clone() for x in kept], source)
        cache, mask = Past(own), feed["encoder_attention_mask"].bool()[:, None, None, :]
        logits = lm(feed["input_ids"], cache=cache, context=(list(zip(kept[::2], kept[1::2])), mask))
        present = dict(zip([n for n in outputs if ".decoder." in n], cache.present))
        present |= zip([n for n in outputs if ".encoder." in n], kept)
        return [logits, *map(present.get, outputs)]

    states = ("float32", "batch_size", "encoder_sequence_length", config.hidden_size)
    inputs = {"encoder_attention_mask": SOURCE_IDS, "input_ids": IDS, "encoder_hidden_states": states} | past
    sources = dict.fromkeys(["input_ids", "attention_mask"], SOURCE_IDS)
    return [Graph("encoder_model", encode, sources, ["last_hidden_state"]),
            Graph("decoder_model_merged", decode, inputs | {"use_cache_branch": ("bool", 1)}, ["logits", *outputs])]


def trace(lm, graph: Graph):
    """An onnx_ir.Model."""
    import logging
    import warnings
    from unittest import mock
    import torch
    import tinylm

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = lm

        def forward(self, tensors):
            return graph.forward(self.lm, dict(zip(graph.inputs, tensors)))

    dims = {axis: torch.export.Dim(axis) for axis in SIZES}
    arguments = [torch.ones([SIZES.get(axis, axis) for axis in axes], dtype=getattr(torch, dtype))
                 for dtype, *axes in graph.inputs.values()]
    shapes = [{i: dims[axis] for i, axis in enumerate(axes) if axis in dims} for _, *axes in graph.inputs.values()]
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # "no torchvision"
    leaves = mock.patch.multiple(tinylm, rms_norm=onnx_rms_norm, rotate=onnx_rotate, attend=onnx_attend)
    with torch.no_grad(), leaves, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that axes share names, as they should, and torch's own deprecations
        program = torch.onnx.export(
            Traced().eval(), (arguments,), dynamo=True, opset_version=OPSET, verbose=False, dynamic_shapes=(shapes,),
            input_names=[*graph.inputs], output_names=graph.outputs)
    model = tidy(program.model)
    if lm.config.position in tinylm.LIMITED:
        model.metadata_props["max_position_embeddings"] = str(lm.config.max_position_embeddings)
    return model


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
    names = norm.outputs[0].name, "", "", add.outputs[0].name
    outputs = [ir.Value(name=name, type=norm.outputs[0].type, shape=norm.outputs[0].shape) for name in names]
    graph.opset_imports["com.microsoft"] = 1
    inputs, epsilon = [*add.inputs, norm.inputs[1]], [norm.attributes["epsilon"]]
    graph.insert_before(norm, ir.Node("com.microsoft", "SkipSimplifiedLayerNormalization", inputs, epsilon,
                                      outputs=outputs))
    ir.convenience.replace_all_uses_with([norm.outputs[0], add.outputs[0]], outputs[::3], replace_graph_outputs=True)
    graph.remove([norm, add], safe=True)


def rename(graph, value, name: str):
    """An initializer under another name, unless an earlier one has that."""
    if name not in graph.initializers:
        graph.initializers.pop(value.name)
        value.name = value.const_value.name = name
        graph.initializers[name] = value


def write_graph(model, path: Path):
    import onnx_ir as ir
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, path, **({"external_data": path.name + "_data"} if size > EXTERNAL_ABOVE else {}))


# ---------------------------------------------------------------------------------------------------------------------
# Verifying: the file that was written, against torch
# ---------------------------------------------------------------------------------------------------------------------

def verify(lm, folder: Path, precision: str) -> dict:
    """Largest difference from torch, relative to the largest value, per check; of ids the number of equal ones. Raises
    Error where one is too large or where ids differ."""
    import torch

    def reference(ids, mask=None, types=None, **more):
        given = [None if x is None else torch.from_numpy(x) for x in (ids, mask, types)]
        with torch.no_grad():
            return lm(*given, **{name: torch.from_numpy(x) for name, x in more.items()}).float().numpy()

    found = {}
    for name, ours, theirs in kind_of(lm.config).checks(lm, OnnxLM(folder, precision, providers=[CPU]), reference):
        if np.issubdtype(theirs.dtype, np.integer):
            agree = int((ours == theirs).all(0).cumprod().sum()) if ours.shape == theirs.shape else 0
            require(agree == theirs.shape[1], f"verify: {precision} {name} differ from torch after {agree} of "
                    f"{theirs.shape[1]}")
            found[name] = agree
        else:
            error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            found[name] = max(error, found.get(name, 0.0))
            require(error <= TOLERANCE, f"verify: {precision} {name} differs from torch by {error:.1e} of the largest "
                    f"value, expected at most {TOLERANCE:.0e}")
    return found


def examples(lm) -> tuple:
    """Random ids (1, long), (1, short), and batches of both: {side of the padding: (ids, mask, short's columns)}."""
    rng, limit = np.random.default_rng(0), min(lm.config.max_position_embeddings, 64)
    long, short = (rng.integers(0, lm.config.vocab_size, (1, n)) for n in (max(2, limit // 4), max(1, limit // 8)))
    batches = {}
    for side, columns in (("left", slice(-short.size, None)), ("right", slice(short.size))):
        ids, mask = np.repeat(long, 2, 0), np.ones((2, long.size), np.int64)
        mask[1], mask[1, columns], ids[1, columns] = 0, 1, short
        batches[side] = ids, mask, columns
    return long, short, batches


def check_decoder(lm, onnx_lm, reference):
    import torch
    ids, other, batches = examples(lm)
    expected, mask = reference(ids), np.ones_like(ids)
    yield "prefill", onnx_lm(ids), expected
    _, past = onnx_lm.step(ids[:, :-1], mask[:, :-1])
    yield "decode", onnx_lm.step(ids[:, -1:], mask, past)[0], expected[:, -1:]
    for side, (batch, real, columns) in batches.items():
        logits = onnx_lm(batch, real)
        yield f"{side} padding", logits[:1], expected
        yield f"{side} padding", logits[1:, columns], reference(other)
    new = min(32, lm.config.max_position_embeddings - ids.size)
    options = dict(max_new_tokens=new, eos_token_id=(), num_beams=1)
    theirs = lm.generate(torch.from_numpy(ids), **options).numpy()
    yield "greedy tokens", onnx_lm.generate(ids, **options)[:, ids.size:], theirs[:, ids.size:]


def check_encoder(lm, onnx_lm, reference):
    ids, other, batches = examples(lm)
    kinds = lm.config.type_vocab_size
    types = np.random.default_rng(1).integers(0, kinds, ids.shape) if kinds else None
    expected = reference(ids, None, types)
    yield "alone", onnx_lm(ids, None, types), expected
    for side, (batch, real, columns) in batches.items():
        both = np.repeat(types, 2, 0) if kinds else None
        outputs = onnx_lm(batch, real, both)
        yield f"{side} padding", outputs[:1], expected
        rows = outputs[1:, columns] if outputs.ndim == 3 else outputs[1:]
        yield f"{side} padding", rows, reference(other, None, both[1:, columns] if kinds else None)


def check_encoder_decoder(lm, onnx_lm, reference):
    import torch
    target, _, batches = examples(lm)
    target = np.repeat(target, 2, 0)
    new = min(32, lm.config.max_position_embeddings - 1)
    options = dict(max_new_tokens=new, eos_token_id=(), num_beams=1)
    for side, (ids, mask, _) in batches.items():
        expected = reference(ids, mask, decoder_input_ids=target)
        yield f"{side} padding", onnx_lm(ids, mask, decoder_input_ids=target), expected
        source, ones = onnx_lm.source(ids, mask), np.ones_like(target)
        _, past = onnx_lm.step(target[:, :-1], ones[:, :-1], source=source)
        yield "decode", onnx_lm.step(target[:, -1:], ones, past, source)[0], expected[:, -1:]
        theirs = lm.generate(torch.from_numpy(ids), torch.from_numpy(mask), **options).numpy()
        yield "greedy tokens", onnx_lm.generate(ids, mask, **options)[:, 1:], theirs[:, 1:]


@dataclass(frozen=True)
class Kind:
    """How models of a kind are exported: `graphs(config)`, and `checks(lm, onnx_lm, reference)` of what was written."""
    graphs: object
    checks: object


def kind_of(config) -> Kind:
    if config.num_encoder_layers:
        return Kind(encoder_decoder_graphs, check_encoder_decoder)
    writes = config.causal and config.head == "lm"
    return Kind(decoder_graph, check_decoder) if writes else Kind(encoder_graph, check_encoder)


# ---------------------------------------------------------------------------------------------------------------------
# Exporting
# ---------------------------------------------------------------------------------------------------------------------

def export_onnx(lm_or_folder, out, onnx: bool = True, safetensors: bool = True, log=None) -> dict:
    """Write the folder `out` from a TinyLM or a checkpoint folder: config, tokenizer and model.safetensors in the
    stored dtype, and the graphs in onnx/ in fp32, of a decoder with genai_config.json. Returns what `verify` found. The
    folder appears whole, after its check, or not at all; an earlier export in its place is replaced.

    Raises Error (or tinylm's) where the checkpoint cannot be read or a check fails.
    """
    import torch
    import tinylm
    out, log, found = Path(out).resolve(), log or (lambda text: None), {}
    require(not out.exists() or out.is_dir() and (not any(out.iterdir()) or (out / MARK).exists()),
            f"{out}: exists and is no ONNX export; name another folder with --out")
    if isinstance(lm_or_folder, tinylm.TinyLM):
        lm, extras = copy.deepcopy(lm_or_folder), []
    else:
        require(out != Path(lm_or_folder).resolve(), f"{out}: is the checkpoint itself; name another folder")
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
            lm = lm.to("cpu", torch.float32).eval()
            (work / "onnx").mkdir()
            log(f"tracing {sum(p.numel() for p in lm.parameters()):,} parameters")
            for graph in kind_of(lm.config).graphs(lm.config):
                path = work / "onnx" / f"{graph.stem}{SUFFIX['fp32']}.onnx"
                try:
                    write_graph(trace(lm, graph), path)
                except Exception as error:  # the exporter's own have no common base
                    raise Error(f"onnx: the trace failed ({first_line(error)})") from error
                log(f"onnx/{path.name} {megabytes(path)}")
            if lm.config.head == "lm" and not lm.config.num_encoder_layers:
                tinylm.write_json(work / "genai_config.json", genai_config(lm))
            found = verify(lm, work, "fp32")
            log("verified against torch: " + ", ".join(f"{name} {value:.1e}" if isinstance(value, float) else
                                                       f"{value} {name} equal" for name, value in found.items()))
        if not safetensors:
            (work / "model.safetensors").unlink()
        put(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


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


def genai_config(lm) -> dict:
    """The settings of onnxruntime-genai for the graph."""
    config, layers = lm.config, lm.config.num_hidden_layers
    ends = lm.ends()
    pad = lm.generation_config.get("pad_token_id", config.pad_token_id)
    if pad is None or pad in ends:  # it wants one that ends nothing
        pad = next(i for i in range(config.vocab_size) if i not in ends)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"onnx/model{SUFFIX['fp32']}.onnx", "head_size": config.head_dim, "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads, "num_hidden_layers": layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")},
        "outputs": {"logits": "logits"} | {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")},
    }
    begin = config.bos_token_id if config.bos_token_id is not None else ends[0] if ends else 0
    search = {"do_sample": False, "max_length": config.max_position_embeddings, "past_present_share_buffer": False}
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
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="texts; a second one (of a question its context) "
                        "stands behind a tab; by default the lines of standard input")
    parser.add_argument("--precision", choices=SUFFIX, default="fp32")
    parser.add_argument("--max-new-tokens", type=int, help="of a model that writes")
    options = parser.parse_intermixed_args(argv)
    inputs = options.inputs or [line for line in sys.stdin.read().splitlines() if line.strip()]
    lm, halves = OnnxLM(options.folder, options.precision), [text.partition("\t") for text in inputs]
    more = {"max_new_tokens": options.max_new_tokens} if lm.job == "generate" else {}
    results = lm.run([text for text, *_ in halves], [pair or None for *_, pair in halves], **more)
    for text, result in zip(inputs, results):
        print(json.dumps({"input": text, "output": result}, ensure_ascii=False), flush=True)
    return 0


def run_export(argv: list) -> int:
    parser = argparse.ArgumentParser(prog="tinylm-export", description="Turn a checkpoint into safetensors and ONNX "
                                     "graphs in one folder, verified against torch, and try it; `run FOLDER INPUT...` "
                                     "runs it later.")
    parser.add_argument("folder", nargs="?", default=str(WEIGHTS), help="a checkpoint (default: the shipped one)")
    parser.add_argument("--onnx", action="store_true", help="write onnx/*.onnx, beside model.safetensors")
    parser.add_argument("--safetensors", action="store_true", help="write model.safetensors alone, without --onnx")
    parser.add_argument("--out", default="exported", help="folder to write (default: exported)")
    parser.add_argument("--prompt", help="text that the exported model continues, greedily (default: 'ROMEO:', "
                        "sampled), or reads")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    options = parser.parse_args(argv)
    if not (options.onnx or options.safetensors):
        parser.error("nothing to do: give --onnx, --safetensors or both")
    begin = time.monotonic()
    export_onnx(options.folder, options.out, onnx=options.onnx,
                log=lambda text: print(f"[{time.monotonic() - begin:5.1f} s] {text}", flush=True))
    print(f"[{time.monotonic() - begin:5.1f} s] wrote {options.out}", flush=True)
    if options.onnx:
        lm = OnnxLM(options.out)
        if lm.job == "generate" and not lm.encoder:
            sampled = {} if options.prompt else {"temperature": 0.7, "seed": 1}
            show(lm, options.prompt or "ROMEO:", options.max_new_tokens, **sampled)
        elif options.prompt:
            print(json.dumps(lm.run([options.prompt])[0], ensure_ascii=False))
    return 0


def show(lm: OnnxLM, prompt: str, max_new_tokens: int, **options):
    """Print a continuation as it comes, then its speed after the first token."""
    if not (lm.folder / "tokenizer.json").exists():
        return print("no sample: the checkpoint has no tokenizer.json")
    print(f"\n{prompt}", end="", flush=True)
    times, ids = [], lm.tokenizer.encode(prompt)

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
