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
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import numpy as np

WEIGHTS = Path(__file__).resolve().parent / "weights"  # the model shipped beside this file
FILES = {"fp32": "model.onnx"}                         # precision -> file in the folder's onnx/
MARK = ".tinylm-export"                                # this file says: the next export may replace the folder
OPSET = 23                                             # the first with Attention, RotaryEmbedding, RMSNormalization
TOLERANCE = 2e-4                                       # largest difference of logits, relative to the largest logit
EXTERNAL_ABOVE = 2**31 - 2**26                         # bytes; a protobuf file ends at 2 GiB
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


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

class OnnxLM:
    """An exported decoder under ONNX Runtime: numpy in, numpy out.

    folder: what `export_onnx` wrote; precision: a key of FILES; providers: ONNX Runtime's names, tried in order (None:
    CUDA where there is a driver, else CPU); threads: of the CPU (None: ONNX Runtime's choice, one per core).
    Raises Error where a file is missing or where a provider that was asked for does not load.
    """

    def __init__(self, folder, precision: str = "fp32", providers=None, threads: int | None = None):
        import onnxruntime as ort
        require(precision in FILES, f"precision = {precision!r}, expected one of {', '.join(FILES)}")
        self.folder = Path(folder)
        path = self.folder / "onnx" / FILES[precision]
        require(path.exists(), f"{path}: no such file; write it with `python export.py FOLDER --onnx`")
        generation = self.folder / "generation_config.json"
        self.config = read_json(self.folder / "config.json")
        self.config |= read_json(generation) if generation.exists() else {}
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        asked, providers = providers, providers or ([CUDA, CPU] if has_cuda(ort) else [CPU])
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]  # or (name, options)
        for name in names:
            require(name in ort.get_available_providers(), f"providers: {name} is not in this onnxruntime (it has "
                    f"{', '.join(ort.get_available_providers())})")
        try:
            self.session = ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise Error(f"{path}: onnxruntime cannot load it ({first_line(error)})") from None
        self.provider = self.session.get_providers()[0]
        require(not asked or self.provider == names[0], f"providers: {names[0]} did not load; onnxruntime fell back to "
                f"{self.provider}")
        self.past = {i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past_key_values.")}
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.vocab_size = self.session.get_outputs()[0].shape[-1]
        self._tokenizer = None

    @property
    def tokenizer(self):
        """`encode(text)` and `decode(ids)` of the folder's tokenizer.json."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.folder / "tokenizer.json")
        return self._tokenizer

    def step(self, input_ids, mask, past=None):
        """One call of the graph: (logits, present). Ids (batch, seq), mask (batch, past + seq), past as returned."""
        import onnxruntime as ort
        if past is None:
            past = [ort.OrtValue.ortvalue_from_numpy(np.zeros((len(mask), heads, 0, width), np.float32))
                    for _, heads, _, width in self.past.values()]
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -input_ids.shape[1]:]
        feeds = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for name, x in feeds.items()}
        try:
            logits, *present = self.session.run_with_ort_values(self.outputs, feeds | dict(zip(self.past, past)))
        except Exception as error:  # e.g. more tokens than there are learned positions
            raise Error(f"onnxruntime: {first_line(error)}") from None
        return logits.numpy(), present

    def __call__(self, input_ids, attention_mask=None) -> np.ndarray:
        """Logits (batch, seq, vocab) for ids (batch, seq); the mask marks padding on either side."""
        return self.step(*self._checked(input_ids, attention_mask))[0]

    def generate(self, input_ids, attention_mask=None, max_new_tokens: int = 128, **options) -> np.ndarray:
        """Continue every row: (batch, seq + new), with the pad id after a row's end. Options as in `decode`."""
        new = [*self.decode(input_ids, attention_mask, max_new_tokens, **options)]
        return np.stack([*np.asarray(input_ids).T, *new], axis=1)

    def stream(self, text, max_new_tokens: int = 128, stop=None, **options):
        """The continuation of a text (or of its ids), piece by piece, whole characters only, up to a stop string."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        return text_pieces(self.tokenizer, self.tokens(ids, max_new_tokens, **options), stop_strings(stop), ids)

    def tokens(self, ids: list, max_new_tokens: int = 128, eos_token_id="config", **options):
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

    def decode(self, input_ids, attention_mask=None, max_new_tokens=128, eos_token_id="config", stop=None, seed=None,
               **sampling):
        """Yield the new ids (batch,) of every step, until all rows have ended. The options are those of tinylm's
        `generate`, and the same seed draws the same text: the noise is a function of seed, row, step and token."""
        knobs, ends, stop = Sampling(**sampling), np.array(self.ends(eos_token_id), int), stop_strings(stop)
        input_ids, mask = self._checked(input_ids, attention_mask)
        require(number(max_new_tokens, 1, 2**31, Integral), f"max_new_tokens = {max_new_tokens!r}, expected a positive "
                "integer")
        require(seed is None or number(seed, -2**63, 2**63, Integral), f"seed = {seed!r}, expected an integer")
        seed = int(np.random.randint(2**31) if seed is None else seed)
        pad = self.config.get("pad_token_id")
        pad = pad if pad is not None else ends[0] if ends.size else 0
        (batch, seq), past, columns = input_ids.shape, None, []
        ended, seen = np.zeros(batch, bool), np.zeros((batch, self.vocab_size), bool)
        rows, real = np.nonzero(mask)
        seen[rows, input_ids[rows, real]] = True
        last = (mask * np.arange(1, seq + 1)).argmax(1)  # each row's last token
        longest = np.concatenate([mask, np.ones((batch, max_new_tokens), np.int64)], 1)
        for count in range(max_new_tokens):
            logits, past = self.step(input_ids, mask, past)
            logits = logits[np.arange(batch), last]
            if knobs.repetition_penalty != 1:
                punished = np.where(logits > 0, logits / knobs.repetition_penalty, logits * knobs.repetition_penalty)
                logits = np.where(seen, punished, logits)
            token = np.where(ended, pad, sample(logits, knobs, seed, count))
            yield token
            ended |= (token[:, None] == ends).any(1)
            columns.append(token)
            for row in range(batch if stop else 0):
                ended[row] |= any(s in self.tokenizer.decode([c[row] for c in columns[-2 * len(s.encode()) - 8:]])
                                  for s in stop)
            if ended.all():
                return
            seen[np.arange(batch), token] = True
            input_ids, mask, last = token[:, None], longest[:, :seq + count + 1], -1

    def _checked(self, input_ids, mask) -> tuple:
        input_ids = np.asarray(input_ids)
        require(input_ids.ndim == 2 and input_ids.size and np.issubdtype(input_ids.dtype, np.integer),
                f"input_ids: {input_ids.dtype} of shape {input_ids.shape}, expected ids (batch, seq)")
        mask = np.ones_like(input_ids) if mask is None else np.asarray(mask)
        require(mask.shape == input_ids.shape and mask.any(1).all(), f"attention_mask: shape {mask.shape}, expected "
                f"{input_ids.shape} and a token in every row")
        require(0 <= input_ids.min() and input_ids.max() < self.vocab_size, f"input_ids: ids {input_ids.min()} to "
                f"{input_ids.max()}, expected 0 to vocab_size - 1 = {self.vocab_size - 1}")
        return input_ids.astype(np.int64), mask.astype(np.int64)


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

    def decode(self, ids) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


@dataclass(frozen=True)
class Sampling:
    """tinylm's `Sampling`: how a token is drawn, in the order penalty, temperature, top-k, top-p, min-p."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, low, high in (("temperature", 0, 1e9), ("top_p", 0, 1), ("min_p", 0, 1), ("top_k", 0, 2**31),
                                ("repetition_penalty", 1e-9, 1e9)):
            value, kind = getattr(self, name), Integral if name == "top_k" else Real
            optional = value is None and getattr(Sampling, name) is None
            require(optional or number(value, low, high, kind), f"{name} = {value!r}, expected "
                    f"{'an integer' if kind is Integral else 'a number'} from {low:g} to {high:g}")


def has_cuda(ort) -> bool:
    """Is there a CUDA build of ONNX Runtime and a driver for it?"""
    if CUDA not in ort.get_available_providers():
        return False
    with contextlib.suppress(OSError):
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        ort.preload_dlls()
        return True
    return False


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
    """Names of keys and values -> dtype and axes; sides: what the names say of whose they are -> the name of their axis."""
    return {f"{prefix}.{layer}{side}.{part}": ("float32", "batch_size", config.num_key_value_heads, length, config.head_dim)
            for layer in range(config.num_hidden_layers) for side, length in sides.items() for part in ("key", "value")}


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
    sides = {".decoder": "past_sequence_length", ".encoder": "encoder_sequence_length"}
    past, outputs = key_values(config, "past_key_values", sides), [*key_values(config, "present", sides)]

    def encode(lm, feed):
        return [lm.encoder.states(lm.embed(feed["input_ids"]), feed["attention_mask"])]

    def decode(lm, feed):
        own, kept = ([feed[name] for name in past if side in name] for side in sides)

        def source():
            parts = (part for block in lm.layers for part in block.cross_attention.keys_values(feed["encoder_hidden_states"]))
            return [rearrange(part, "b s (h d) -> b h s d", d=config.head_dim).contiguous() for part in parts]

        kept = torch.cond(feed["use_cache_branch"], lambda: [x.clone() for x in kept], source)
        cache, mask = Past(own), feed["encoder_attention_mask"].bool()[:, None, None, :]
        logits = lm(feed["input_ids"], cache=cache, context=(list(zip(kept[::2], kept[1::2])), mask))
        present = dict(zip([n for n in outputs if ".decoder." in n], cache.present))
        present |= zip([n for n in outputs if ".encoder." in n], kept)
        return [logits, *map(present.get, outputs)]

    states = ("float32", "batch_size", "encoder_sequence_length", config.hidden_size)
    inputs = {"encoder_attention_mask": SOURCE_IDS, "input_ids": IDS, "encoder_hidden_states": states} | past
    return [Graph("encoder_model", encode, {"input_ids": SOURCE_IDS, "attention_mask": SOURCE_IDS}, ["last_hidden_state"]),
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

    limit = lm.config.max_position_embeddings
    dims, sizes = {}, {}
    for axis in {axis for _, *axes in graph.inputs.values() for axis in axes if isinstance(axis, str)}:
        dims[axis], sizes[axis] = torch.export.Dim(axis), len(axis)  # different, so that no size is taken for another
    arguments = [torch.ones([sizes.get(axis, axis) for axis in axes], dtype=getattr(torch, dtype))
                 for dtype, *axes in graph.inputs.values()]
    shapes = [{i: dims[axis] for i, axis in enumerate(axes) if axis in dims} for _, *axes in graph.inputs.values()]
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # "no torchvision"
    leaves = mock.patch.multiple(tinylm, rms_norm=onnx_rms_norm, rotate=onnx_rotate, attend=onnx_attend)
    with torch.no_grad(), leaves, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that axes share names, as they should, and torch's own deprecations
        program = torch.onnx.export(
            Traced().eval(), (arguments,), dynamo=True, opset_version=OPSET, verbose=False, dynamic_shapes=(shapes,),
            input_names=[*graph.inputs], output_names=graph.outputs)
    return tidy(program.model)


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
    graph.name, model.producer_name, model.producer_version = "decoder", "tinylm", None
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
    graph.insert_before(norm, ir.Node("com.microsoft", "SkipSimplifiedLayerNormalization", [*add.inputs, norm.inputs[1]],
                                      [norm.attributes["epsilon"]], outputs=outputs))
    ir.convenience.replace_all_uses_with([norm.outputs[0], add.outputs[0]], outputs[::3])
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

def verify(lm, folder: Path, precision: str, new_tokens: int = 32) -> dict:
    """Largest difference of logits relative to the largest logit, per check. Raises Error where one is too large or
    where greedy tokens differ."""
    import torch
    onnx_lm = OnnxLM(folder, precision, providers=[CPU])
    vocab, rng = lm.config.vocab_size, np.random.default_rng(0)
    limit = min(lm.config.max_position_embeddings, 64)
    long, short = max(2, limit // 4), max(1, limit // 8)
    ids, other = rng.integers(0, vocab, (1, long)), rng.integers(0, vocab, (1, short))

    def reference(x):
        with torch.no_grad():
            return lm(torch.from_numpy(x)).float().numpy()

    def difference(a, b):
        return float(np.abs(a - b).max() / np.abs(b).max())

    expected, mask = reference(ids), np.ones_like(ids)
    found = {"prefill": difference(onnx_lm(ids), expected)}
    _, past = onnx_lm.step(ids[:, :-1], mask[:, :-1])
    found["decode"] = difference(onnx_lm.step(ids[:, -1:], mask, past)[0], expected[:, -1:])
    for side, columns in (("left", slice(long - short, long)), ("right", slice(short))):
        padded, real = np.repeat(ids, 2, 0), np.repeat(mask, 2, 0)
        real[1], real[1, columns], padded[1, columns] = 0, 1, other
        logits = onnx_lm(padded, real)
        found[f"{side} padding"] = max(difference(logits[:1], expected), difference(logits[1:, columns], reference(other)))
    for name, value in found.items():
        require(value <= TOLERANCE, f"verify: {precision} {name} differs from torch by {value:.1e} of the largest logit, "
                f"expected at most {TOLERANCE:.0e}")
    new = min(new_tokens, lm.config.max_position_embeddings - long)
    ours = onnx_lm.generate(ids, max_new_tokens=new, eos_token_id=())
    theirs = lm.generate(torch.from_numpy(ids), max_new_tokens=new, eos_token_id=()).numpy()
    agree = int((ours == theirs)[0, long:].cumprod().sum())
    require(agree == new, f"verify: {precision} greedy tokens differ from torch after {agree} of {new}")
    return found | {"greedy tokens": new}


# ---------------------------------------------------------------------------------------------------------------------
# Exporting
# ---------------------------------------------------------------------------------------------------------------------

def export_onnx(lm_or_folder, out, onnx: bool = True, safetensors: bool = True, log=None) -> dict:
    """Write the folder `out` from a TinyLM or a checkpoint folder: config, tokenizer and model.safetensors in the stored
    dtype, and onnx/model.onnx in fp32 with genai_config.json. Returns what `verify` found. The folder appears whole,
    after its check, or not at all; an earlier export in its place is replaced.

    Raises Error (or tinylm's) where the checkpoint cannot be read or a check fails.
    """
    import torch
    import tinylm
    out, log, found = Path(out).resolve(), log or (lambda text: None), {}
    require(not out.exists() or out.is_dir() and (not any(out.iterdir()) or (out / MARK).exists()),
            f"{out}: exists and is no ONNX export; name another folder with --out")
    if isinstance(lm_or_folder, tinylm.TinyLM):
        lm = copy.deepcopy(lm_or_folder)
    else:
        require(out != Path(lm_or_folder).resolve(), f"{out}: is the checkpoint itself; name another folder")
        log(f"loading {lm_or_folder}")
        lm = tinylm.TinyLM.from_pretrained(lm_or_folder)
    work = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        work.mkdir(parents=True)
        lm.save_pretrained(work)
        (work / MARK).write_text("")
        log(f"model.safetensors {megabytes(work / 'model.safetensors')}")
        if onnx:
            lm = lm.to("cpu", torch.float32).eval()
            path = work / "onnx" / FILES["fp32"]
            path.parent.mkdir()
            log(f"tracing {sum(p.numel() for p in lm.parameters()):,} parameters")
            try:
                write_graph(trace(lm), path)
            except Exception as error:  # the exporter's own have no common base
                raise Error(f"onnx: the trace failed ({first_line(error)})") from error
            log(f"onnx/{path.name} {megabytes(path)}")
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
        "filename": f"onnx/{FILES['fp32']}", "head_size": config.head_dim, "hidden_size": config.hidden_size,
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
    parser = argparse.ArgumentParser(prog="tinylm-export", description="Turn a checkpoint into safetensors and an ONNX "
                                     "graph in one folder, verified against torch, and let it write a text.")
    parser.add_argument("folder", nargs="?", default=str(WEIGHTS), help="a checkpoint (default: the shipped one)")
    parser.add_argument("--onnx", action="store_true", help="write onnx/model.onnx, beside model.safetensors")
    parser.add_argument("--safetensors", action="store_true", help="write model.safetensors alone, without --onnx")
    parser.add_argument("--out", default="exported", help="folder to write (default: exported)")
    parser.add_argument("--prompt", help="text that the exported model continues, greedily (default: 'ROMEO:', sampled)")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    options = parser.parse_args(argv)
    if not (options.onnx or options.safetensors):
        parser.error("nothing to do: give --onnx, --safetensors or both")
    begin = time.monotonic()
    try:
        export_onnx(options.folder, options.out, onnx=options.onnx,
                    log=lambda text: print(f"[{time.monotonic() - begin:5.1f} s] {text}", flush=True))
        print(f"[{time.monotonic() - begin:5.1f} s] wrote {options.out}", flush=True)
        if options.onnx:
            sampled = {} if options.prompt else {"temperature": 0.7, "seed": 1}
            show(OnnxLM(options.out), options.prompt or "ROMEO:", options.max_new_tokens, **sampled)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever it is, of whichever library: one line
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        print(f"tinylm-export: error: {kind}{first_line(error)}", file=sys.stderr)
        return 1
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
