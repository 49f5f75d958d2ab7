"""The programs around tinylm.py: train and fine-tune on plain files, evaluate, run, sample, chat.

python train.py my.txt --steps 1000              # the same as `train.py train my.txt`
python train.py eval | run | sample | chat ...   # `python train.py --help`
"""

from __future__ import annotations

import argparse
import array
import codecs
import collections
import contextlib
import contextvars
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import string
import sys
import threading
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

try:
    import fcntl
except ImportError:  # Windows, where nothing locks a folder
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import onnxlm
import tinylm
from onnxlm import Window, encode_windows, mask_token, question_windows, strict_json, tag_spans
from tinylm import (
    LIMITED,
    ByteTokenizer,
    Config,
    Count,
    Dropout,
    Error,
    GenerationConfig,
    Linear,
    MuonAdamW,
    Size,
    TinyLM,
    __version__,
    all_reduce,
    describe_model,
    full_tensor,
    label_weight,
    loss_sum,
    open_tensors,
    rank_and_world_size,
    read_json,
    require,
    shard_like,
    start_ids,
    target_labels,
    tokenizer_config,
    train_step,
    usable_device,
    write_file,
    write_json,
    write_tensors,
)

if __package__:  # installed
    from . import data as datafiles
    from . import pretrained
else:  # beside each other
    import data as datafiles
    import pretrained

MappedText, flag, option = datafiles.MappedText, datafiles.flag, datafiles.option


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

Rate = Annotated[float, 1e-12, 1e12]


@dataclass(frozen=True)
class TrainOptions(datafiles.DataOptions):
    """Options of `tinylm train`; the command line is made of these fields. None stands for the default of the start
    (`STARTS`) and the task (`TASKS`), which `filled` puts in its place."""

    # what, from where, to where
    init: str = option("", "checkpoint to fine-tune; without one, a model from scratch")
    out: str = option("out", "folder for the checkpoints `best` and `last`")
    overwrite: bool = option(False, "replace the run that --out holds")
    block: Annotated[int, 8, 2**31] = option(256, "tokens per sequence, at most")
    max_answer_length: Size | None = option(
        None, "tokens of an answer to a question, at most; else as many as the longest has"
    )
    # model
    size: Literal[(*SIZES, None)] = option(
        None, "of a new model: pico, nano, small, medium or large"
    )
    vocab: Count | None = option(None, "train a byte-level BPE of this many tokens; 0: bytes")
    dropout: Dropout | None = option(None, "of embeddings and sub-layers; else as the config says")
    lora: Annotated[int, 0, 2**16] = option(
        0, "train adapters of this rank and a new head only; saved merged, and beside it for PEFT"
    )
    freeze: str = option(
        "",
        "what is not trained: embeddings, body (all but the head), or N: embeddings and the first N layers",
    )
    # optimizer
    steps: Size | None = option(None, "optimizer steps")
    epochs: Annotated[float, 1e-6, 1e6] | None = option(
        None, "passes over the data, in place of --steps"
    )
    batch: Size | None = option(None, "sequences per step")
    accumulate: Size = option(1, "parts in which a step's batch is run, to save memory")
    lr: Rate | None = option(
        None, "peak learning rate of Muon (matrices); in fine-tuning, of what was pretrained"
    )
    adam_lr: Rate | None = option(
        None, "peak learning rate of AdamW (all other weights); in fine-tuning, of a new head"
    )
    weight_decay: Annotated[float, 0, 1e3] | None = option(None, "weight decay of the matrices")
    warmup: Dropout | None = option(None, "share of the steps in which the learning rates rise")
    decay: Dropout | None = option(
        None, "share of the steps, at the end, in which the learning rates fall to zero"
    )
    clip: Rate = option(1.0, "largest norm of the gradient")
    class_weights: bool = option(False, "rare classes count as much as frequent ones")
    seed: Count = option(0, "of weights, data order and dropout")
    # run
    eval_every: Size | None = option(
        None, "steps between validations and checkpoints (default: an epoch)"
    )
    metric: str = option(
        "",
        "figure that `best` and --patience go by, as `eval` names it; a tie goes to the lower loss (default: the first, "
        "macro F1 with --class-weights)",
    )
    patience: Count = option(
        0,
        "stop after this many validations without a better one (5 at least, as long as the figure is always the same); "
        "0: never",
    )
    device: str = option("", "cpu, cuda, mps, ... (default: cuda if there is one)")
    parallel: Literal["fsdp", "ddp"] = option(
        "fsdp", "under torchrun: fsdp shards the weights, ddp keeps a copy on each process"
    )
    checkpoint: bool = option(False, "recompute each layer in the backward pass, to save memory")
    bf16: bool = option(False, "bfloat16 autocast on the CPU too (on CUDA it is always on)")
    compile: bool = option(False, "torch.compile the model")
    tensorboard: bool = option(False, "also write TensorBoard events, into --out/tensorboard")
    quiet: bool = option(False, "print only the result")

    def __post_init__(self):
        super().__post_init__()
        for name, ok, expected in (
            (
                "vocab",
                not self.vocab or self.vocab >= ByteTokenizer.size,
                f"at least {ByteTokenizer.size} (all bytes and two specials), or 0 for bytes",
            ),
            (
                "freeze",
                self.freeze in ("", "embeddings", "body") or self.freeze.isdecimal(),
                "embeddings, body or a number of layers",
            ),
            (
                "freeze",
                not (self.lora and self.freeze),
                "no --lora, which freezes all but the adapters by itself",
            ),
            ("size", not (self.init and self.size), "no --init, whose size is as it is"),
            ("vocab", not (self.init and self.vocab), "no --init, whose tokens are as they are"),
            ("lora", not self.lora or self.init, "a pretrained model, --init FOLDER"),
            ("epochs", self.steps is None or self.epochs is None, "it or --steps, not both"),
        ):
            require(ok, f"{flag(name)} {getattr(self, name)}: expected {expected}")

    def filled(self) -> TrainOptions:
        """With what the start (from scratch, pretrained, adapters) and the task say of the options that are None."""
        start = "lora" if self.lora else "init" if self.init else "scratch"
        defaults = STARTS[start] | getattr(TASKS[self.task], start, {})
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if {"steps", "epochs"} & set(given):  # either takes the other's place
            defaults |= dict(steps=None, epochs=None)
        options = replace(self, **defaults | given)
        require(
            options.batch % (rank_and_world_size()[1] * options.accumulate) == 0,
            f"--batch {options.batch}: expected a multiple "
            f"of --accumulate {options.accumulate} (times {rank_and_world_size()[1]} processes)",
        )
        return options


STARTS = {  # where a training starts -> its defaults
    "scratch": dict(
        steps=1000,
        lr=0.02,
        adam_lr=4e-3,
        weight_decay=0.1,
        warmup=0.02,
        decay=0.6,
        dropout=0.0,
        vocab=0,
        size="small",
        batch=16,
    ),
    "init": dict(
        epochs=3, lr=1e-4, adam_lr=5e-4, weight_decay=0.01, warmup=0.06, decay=0.94, batch=16
    ),
    "lora": dict(
        epochs=3, lr=1e-3, adam_lr=1e-3, weight_decay=0.0, warmup=0.06, decay=0.94, batch=16
    ),
}
SIZES = {
    "pico": dict(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192
    ),
    "nano": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4),
    "small": dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=3),
    "medium": dict(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4
    ),
    "large": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Examples: dicts of a model's inputs and labels, one text's, without padding; and batches of them
# ---------------------------------------------------------------------------------------------------------------------
PIECE = 2**17  # characters, or bytes, of a text that are tokenised at once
LONGEST_PIECE = 2**21  # a text that has no seam in so many characters is cut anywhere
# Characters before a seam with which it is tried: of different parity, as runs of one have tokens of 2, 4, 8, ...
NEAR, FAR = 61, 151
BEFORE_SEAM = (NEAR, 98, FAR)
# Where to look for one: before a word, behind punctuation, anywhere.
SEAMS = (r"(?<=\w)(?=\s\w)", r"(?<=[^\w\s])(?=\w)", r"(?s)(?=.)")


def mapped_tokens(text: MappedText, tokenizer) -> Tensor:
    """Ids (tokens,): of bytes the file's own; else of a file beside it, made once, and again if it is torn."""
    if isinstance(tokenizer, ByteTokenizer):
        ids = torch.from_file(str(text.path), False, text.size, dtype=torch.uint8)
        return ids[text.first : text.last]
    made_of = tokenizer.files["tokenizer.json"] + repr(text).encode() + b"seamless"
    key = hashlib.sha256(made_of).hexdigest()[:16]
    cache = text.path.with_name(f".{text.path.name}.{key}.tokens")

    def stored() -> Tensor | None:
        count = cache.stat().st_size // 4 if cache.exists() else 0
        ids = torch.from_file(str(cache), False, count, dtype=torch.int32) if count else None
        return ids[:-1] if count and ids[-1] == count - 1 else None  # it ends with its length

    if rank_and_world_size()[0] == 0 and stored() is None:
        write_file(cache, lambda path: tokenise(text, tokenizer, path))
    if rank_and_world_size()[1] > 1:
        dist.barrier()
    return stored()


def tokenise(text: MappedText, tokenizer, path: Path):
    decoder, left, count = codecs.getincrementaldecoder("utf-8")("replace"), len(text), 0

    def pieces():
        nonlocal left
        with open(text.path, "rb") as source:
            source.seek(text.first)
            while left:
                piece = source.read(min(PIECE, left))
                left -= len(piece)
                yield decoder.decode(piece)

    with open(path, "wb") as file:
        for i, ids in enumerate(piecewise(tokenizer, pieces())):
            count += len(ids)
            file.write(ids.tobytes())
            if i % 16 == 0 or not left:
                log(f"{text.path}: {1 - left / len(text):.0%} tokenised")
        file.write(array.array("i", [count]).tobytes())


def piecewise(tokenizer, parts):
    """Ids of a long text, which comes in parts, as arrays: the same as of the whole text at once, for which the library
    takes 200 bytes for each of the text's."""
    pieces = overlapping(tokenizer, parts)
    while some := list(itertools.islice(pieces, 16)):
        for (_, known), ids in zip(some, tokenizer.batch([text for text, _ in some])):
            yield array.array("i", ids[known:])


def overlapping(tokenizer, parts):
    """Yield (piece, known): a piece of the text, which begins with the end of the one before, and how many of its ids
    belong to that end."""
    text = ""
    known = 0
    for part in parts:
        text += part
        cut = find_seam(tokenizer, text)
        if cut is None and len(text) > LONGEST_PIECE:
            cut = len(text)
        if cut:
            yield text[:cut], known
            known = len(tokenizer.encode(text[cut - NEAR : cut], special=False))
            text = text[cut - NEAR :]
    if text:
        yield text, known


def find_seam(tokenizer, text: str) -> int | None:
    """A position near the end where the text can be cut: the ids before it do not depend on what follows, nor those
    behind it on how much of the text is before them."""

    def fits(cut: int) -> bool:
        following = []
        for count in BEFORE_SEAM:
            before = tokenizer.encode(text[cut - count : cut], special=False)
            whole = tokenizer.encode(text[cut - count : cut + NEAR], special=False)
            if whole[: len(before)] != before:
                return False
            following.append(whole[len(before) :])
        return all(ids == following[0] for ids in following)

    last = len(text) - NEAR
    for pattern in SEAMS:
        found = re.compile(pattern).finditer(text, max(FAR, last - 2**14), max(last, 0))
        for match in reversed(collections.deque(found, 64)):
            if fits(match.start()):
                return match.start()
    return None


def sliced(text: str):
    return (text[i : i + PIECE] for i in range(0, len(text), PIECE))


def token_ids(tokenizer, text: str | MappedText, special: bool) -> Tensor:
    """A text's ids (tokens,); `special`: with the special tokens around them where it is short."""
    if isinstance(text, MappedText):
        return mapped_tokens(text, tokenizer)
    if len(text) <= PIECE:
        return torch.tensor(tokenizer.encode(text, special=special), dtype=torch.int32)
    pieces = progress_bar(sliced(text), "tokenising", -(-len(text) // PIECE))
    ids = piecewise(tokenizer, pieces)
    return torch.cat([torch.tensor(piece, dtype=torch.int32) for piece in ids])


def token_stream(lm: TinyLM, texts: list, causal: bool) -> Tensor:
    """The ids of all texts, one after the other; of a language model with end-of-text between them."""
    parts = []
    for text in texts:
        if causal and parts:
            parts.append(torch.tensor([*lm.ends()][:1], dtype=torch.int32))
        parts.append(token_ids(lm.tokenizer, text, special=causal))
    if len(parts) == 1:  # which may be memory-mapped
        return parts[0]
    return torch.cat([torch.zeros(0, dtype=torch.int32), *parts])


def utf8_size(text: str | MappedText) -> int:
    return len(text) if isinstance(text, MappedText) else len(text.encode("utf-8", "replace"))


@dataclass
class Blocks:
    """Consecutive blocks of `step` tokens of a stream, each made into an example when asked for; `more` tokens of the
    next block go with it."""

    ids: Tensor
    first: int
    last: int
    step: int
    more: int
    example: Callable

    def __len__(self) -> int:
        return max(-(-(self.last - self.first) // self.step), 0)

    def __getitem__(self, k: int) -> dict:
        if k >= len(self):
            raise IndexError
        first = self.first + k * self.step
        return self.example(self.ids[first : min(first + self.step, self.last) + self.more].long())


def limit(lm: TinyLM, block: int) -> int:
    """Tokens that a text may have."""
    return min(block, lm.config.max_position_embeddings) if lm.config.position in LIMITED else block


def text_example(lm: TinyLM, block: int, text: str, pair: str | None = None) -> dict:
    """A text, or two, between specials: as much as fits."""
    (window,) = encode_windows(lm.tokenizer, text, pair, limit(lm, block))
    return window_example(lm, window) | {"cut": window.cut}


def window_example(lm: TinyLM, window: Window) -> dict:
    example = {"input_ids": window.ids or [*lm.ends(), 0][:1], "window": window}
    if lm.config.type_vocab_size > 1:
        example["token_type_ids"] = window.type_ids or [0]
    return example


def chat_example(
    tokenizer, messages: list[dict], tools: list[dict] | None = None, **variables
) -> dict | list[dict]:
    """A conversation as {"input_ids", "labels"}: the ids of transformers' `apply_chat_template(messages, tokenize=True)`,
    and -100 for what is not learnt. Learnt is what {% generation %} marks, else the characters that the assistant's
    turns add, with what ends them.

    A template that writes earlier turns otherwise than the last (many leave out the thoughts of all others) gives a
    list: an example for each turn of the assistant, which ends with it.
    """
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    require(turns, f"messages: {str(messages)[:60]!r} has nothing that the assistant says")
    warn_of_unread_fields(tokenizer, messages, tools, variables)

    def render(part: list, prompt: bool = False) -> str:
        return onnxlm.render_chat(tokenizer, part, tools, prompt, **variables)[0] if part else ""

    text, generated = onnxlm.render_chat(tokenizer, messages, tools, **variables)
    if generated:
        return labelled(tokenizer, text, generated)
    end_token = tokenizer.special_tokens.get("eos_token", "")
    spans, examples, is_prefix = [], [], True
    for i in turns:
        prompt, whole = render(messages[:i], True), render(messages[: i + 1])
        if i == 0 or not whole.startswith(prompt):
            other = render([*messages[:i], {"role": "assistant", "content": "\ue000"}])
            prompt = os.path.commonprefix([whole, other])
        examples.append((whole, (len(prompt), len(whole))))
        if (
            i < len(messages) - 1
        ):  # what ends the text alone, as Phi-3's last token, is not the turn's
            followed = render(messages[: i + 1], True)
            if not followed.startswith(whole):
                whole = os.path.commonprefix([whole.removesuffix(end_token), followed])
        is_prefix &= text.startswith(whole)
        spans.append((len(prompt), len(whole)))
    if is_prefix:
        return labelled(tokenizer, text, spans)
    return [labelled(tokenizer, whole, [span]) for whole, span in examples]


def labelled(tokenizer, text: str, spans: list[tuple[int, int]]) -> dict:
    """A text's ids, and as labels those of the tokens that have a character of the spans (from, to)."""
    encoding = tokenizer.encoding(text, special=False)
    labels = [-100] * len(encoding.ids)
    for first, last in spans:
        inside = [c for c, (a, b) in enumerate(encoding.offsets) if a < last and b > first]
        for c in range(inside[0], inside[-1] + 1) if inside else ():
            labels[c] = encoding.ids[c]
    return {"input_ids": encoding.ids, "labels": labels}


def warn_of_unread_fields(tokenizer, messages: list, tools: list | None, variables: dict):
    """Say it where the template does not know of tools, which then nothing is learnt of."""
    template = onnxlm.find_chat_template(tokenizer.files, variables.get("chat_template"), tools)
    calls = any(message.get("tool_calls") for message in messages)
    for name, given in (("tools", tools), ("tool_calls", calls)):
        if given and name not in str(template):
            warnings.warn(f"messages: the chat template does not read {name}", stacklevel=3)


class Batches:
    """An epoch's examples in batches of similar length, shuffled twice; all of it depends on seed and step alone, so
    that a resumed run goes on. Each of several processes has its part of every batch."""

    def __init__(self, lm: TinyLM, epoch, options: TrainOptions):
        self.lm = lm
        self.epoch = epoch
        self.batch = options.batch
        self.seed = options.seed
        self.number = None  # of the epoch that is drawn from
        self.rank, self.world = rank_and_world_size()
        # rows of a last batch that is not full
        least = self.world * options.accumulate if self.world > 1 else 1
        self.per_epoch = (len(epoch(torch.Generator())) + self.batch - least) // self.batch

    def draw(self, step: int) -> dict:
        number, i = divmod(step, self.per_epoch)
        if number != self.number:
            self.number = number
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self.examples = self.epoch(generator)
            self.order = torch.randperm(len(self.examples), generator=generator)
            if not isinstance(self.examples, Blocks):  # equal lengths stay shuffled
                lengths = torch.tensor([len(example["input_ids"]) for example in self.examples])
                self.order = self.order[lengths[self.order].argsort(stable=True)]
            self.turns = torch.randperm(self.per_epoch, generator=generator)
        rows = self.order[self.turns[i] * self.batch :][: self.batch]
        examples = [self.examples[j] for j in rows[self.rank :: self.world].tolist()]
        return collate(self.lm, examples, self.seed * 1_000_003 + step)


def collate(lm: TinyLM, examples: list, seed: int = 0) -> dict:
    """Examples as a batch, padded on the right to the longest; what a masked model is to guess depends on the seed."""
    pad = max(lm.config.pad_token_id or 0, 0)
    paddings = dict(input_ids=pad, token_type_ids=0, decoder_input_ids=pad, labels=-100)
    batch = {}
    for name, padding in paddings.items():
        values = [torch.as_tensor(example[name]) for example in examples if name in example]
        if values and values[0].ndim == 0:
            batch[name] = torch.stack(values)
        elif values:
            batch[name] = nn.utils.rnn.pad_sequence(values, True, padding)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    if lengths.min() < lengths.max():
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    if "guess" in examples[0]:
        batch |= masked(lm, batch["input_ids"].long(), torch.Generator().manual_seed(seed))
    for name, tensor in batch.items():
        tensor = tensor if tensor.is_floating_point() else tensor.long()
        if lm.device.type == "cuda":  # from pinned memory, so that nothing waits for the copy
            batch[name] = tensor.pin_memory().to(lm.device, non_blocking=True)
        else:
            batch[name] = tensor.to(lm.device)
    return batch


def masked(lm: TinyLM, ids: Tensor, generator: torch.Generator) -> dict:
    """15% of the tokens to be guessed: 80% of them masked, 10% replaced, 10% as they are (Devlin et al. 2019)."""
    special = torch.isin(ids, torch.tensor([*lm.tokenizer.encode(""), lm.config.pad_token_id or 0]))
    dice = torch.rand(ids.shape, generator=generator)
    chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & ~special
    other = torch.randint(lm.tokenizer.size, ids.shape, generator=generator)
    shown = torch.where(dice < 0.9, other, ids)
    shown = shown.masked_fill(dice < 0.8, mask_token(lm.tokenizer)[1])
    return {"input_ids": torch.where(chosen, shown, ids), "labels": ids.masked_fill(~chosen, -100)}


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: how a row becomes examples, and how good a model is at them. What its outputs mean is said by onnxlm.py.
# ---------------------------------------------------------------------------------------------------------------------
class TorchRunner:
    """A TinyLM as `onnxlm.run` takes it: numpy in, numpy out."""

    def __init__(self, lm: TinyLM, folder: Path | None = None):
        self.lm = lm.eval()
        self.tokenizer = lm.tokenizer
        self.folder = folder
        overrides = {key: value for key, value in lm.generation_config.items() if value is not None}
        self.config = pretrained.config_to_hf(lm.config) | overrides
        self.max_length = limit(lm, 2**31)
        self.task = onnxlm.task_of(self.config, None if lm.config.head else folder)
        self.remembered = onnxlm.remembered(folder) | getattr(lm, "remembered", {})

    @torch.no_grad()
    def forward(self, ids, mask, types=None) -> np.ndarray:
        arrays = (
            None if x is None else torch.from_numpy(x).to(self.lm.device)
            for x in (ids, mask, types)
        )
        return self.lm(*arrays).float().cpu().numpy()

    def generate(self, ids, mask, **options) -> np.ndarray:
        arrays = (torch.from_numpy(x).to(self.lm.device) for x in (ids, mask))
        return self.lm.generate(*arrays, **options).cpu().numpy()


class ExportedLM(TinyLM):
    """An exported graph behind the interface of TinyLM, without weights: an evaluation of it runs in ONNX Runtime."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, folder: Path, precision: str, providers: list | None = None):
        graph = onnxlm.OnnxLM(folder, precision, providers)
        file = folder / "config.json"
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            super().__init__(pretrained.config_from_hf(read_json(file), str(file), "config"))
        self.graph = graph
        self.folder, self.remembered = folder, graph.remembered
        self.tokenizer, self.generation_config = graph.tokenizer, graph.generation_config

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        decoder_input_ids=None,
        columns=None,
    ):
        inputs = (input_ids, attention_mask, token_type_ids, decoder_input_ids)
        arrays = (None if x is None else x.numpy() for x in inputs)
        logits = torch.from_numpy(self.graph(*arrays))
        if columns is not None:
            logits = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[2]))
        return logits

    def generate(self, input_ids, attention_mask=None, **options):
        mask = None if attention_mask is None else attention_mask.numpy()
        return torch.from_numpy(self.graph.generate(input_ids.numpy(), mask, **options))


class Task:
    """What is common: each row makes its own examples; a model is as good as its loss is low."""

    head, family = None, "bert"  # of a model from scratch
    inputs = ("text",)  # roles of a row that the model reads
    scratch, init = {}, {}  # what differs from STARTS

    def examples(self, lm: TinyLM, row: dict, block: int):
        """Yield the examples of a row: one, or a window at a time of a long text."""
        yield text_example(lm, block, *(row[name] for name in self.inputs if name in row))

    def text_and_pair(self, row: dict) -> tuple[str, str | None]:
        """Returns the texts of a row that `run` reads."""
        values = [row.get(name) for name in self.inputs]
        texts = [" ".join(value) if isinstance(value, list) else value for value in values]
        return (*texts, None)[:2]

    def remember(self, lm: TinyLM, rows: list, examples: list, options: TrainOptions) -> dict:
        """What a reader of the model has to know of its training, beside the options; for `lm.remembered`."""
        return {}

    def figures(self, lm: TinyLM, examples: list, batch: int) -> dict:
        """Name -> figure; the first one chooses the best checkpoint."""
        total = weight = 0.0
        for i, indices in enumerate(progress_bar(similar(examples, batch), "evaluating")):
            inputs = collate(lm.eval(), [examples[j] for j in indices], seed=i)
            with torch.no_grad():
                total += loss_sum(lm, inputs).item()
            weight += label_weight(target_labels(lm, inputs)).item()
        nats = total / max(weight, 1)
        figures = {"nats/token": nats}
        if size := sum(example.get("bytes", 0) for example in examples):
            figures["bits/byte"] = total / size / math.log(2)
        return figures | {"perplexity": math.exp(min(nats, 700))}

    def report(self, lm: TinyLM, examples: list, batch: int) -> dict:
        """The figures where `eval` has more time."""
        return self.figures(lm, examples, batch)

    def epochs(self, lm: TinyLM, rows: list, block: int) -> Callable:
        """A function that gives the examples of an epoch: of a random generator, which may shift where blocks begin; of
        None, all of them in order."""
        examples = [
            example | {"row": row, "number": number}
            for number, row in enumerate(progress_bar(rows, "tokenising"))
            for example in self.examples(lm, row, block)
        ]
        return lambda generator: examples


def similar(examples: list, batch: int) -> list:
    """Indices of examples in batches of like length, the longest first."""
    return onnxlm.batches_by_length([len(row["input_ids"]) for row in examples], batch)


def readings(task: Task, reader: onnxlm.Reader, examples: list, batch: int) -> Iterable:
    """Yields (row, text, pair, windows, outputs) for each row of the examples, as `run` reads it."""
    rows = [*{example["number"]: example["row"] for example in examples}.values()]
    inputs = [task.text_and_pair(row) for row in rows]
    lengths = [len(text) + len(pair or "") for text, pair in inputs]
    for indices in progress_bar(onnxlm.batches_by_length(lengths, batch), "evaluating"):
        texts, pairs = zip(*(inputs[i] for i in indices))
        for i, found in zip(indices, reader.read(texts, pairs, batch)):
            yield rows[i], *inputs[i], *found


def outputs(lm: TinyLM, examples: list, batch: int) -> list:
    """What the head says of each example, as an array without padding."""
    runner = TorchRunner(lm)
    found = [None] * len(examples)
    for indices in progress_bar(similar(examples, batch), "evaluating"):
        windows = [examples[i]["window"] for i in indices]
        for i, output in zip(indices, onnxlm.read(runner, windows, batch)):
            found[i] = output
    return found


SCRATCH = dict(
    steps=None, epochs=10, vocab=4096, dropout=0.3, lr=0.01, adam_lr=2e-3, size="nano", batch=32
)


class LanguageModelling(Task):
    """Texts one after the other, with end-of-text between them; or chats, where the assistant's words are learnt."""

    head, family = "lm", "qwen3"
    scratch = dict(eval_every=250)

    def epochs(self, lm, rows, block):
        """Of texts, consecutive blocks: all of them, or whole ones, always as many, from a random first token on. A
        block of a language model has the next token too."""
        if any("messages" in row for row in rows):
            return super().epochs(lm, rows, block)
        causal = self.head == "lm"
        texts = [row["text"] for row in rows if row["text"]]
        ids = token_stream(lm, texts, causal)
        special = torch.tensor([] if causal else lm.tokenizer.encode(""), dtype=torch.long)
        step = limit(lm, block) - len(special)
        end = len(ids) - causal
        bytes_per_token = sum(map(utf8_size, texts)) / max(len(ids), 1)

        def example(part: Tensor) -> dict:
            if causal:
                return {"input_ids": part, "bytes": bytes_per_token * (len(part) - 1)}
            return {"input_ids": torch.cat((special[:1], part, special[1:])), "guess": True}

        def epoch(generator) -> Blocks:
            if generator is None:
                return Blocks(ids, 0, end, step, causal, example)
            count = max(end // step - 1, min(end // step, 1))
            starts = max(min(step, end - count * step + 1), 1)
            first = int(torch.randint(starts, (), generator=generator))
            return Blocks(ids, first, first + count * step, step, causal, example)

        return epoch

    def examples(self, lm, row, block):
        if "messages" not in row:
            yield from super().examples(lm, row, block)
            return
        size = limit(lm, block)
        found = chat_example(
            lm.tokenizer, row["messages"], row.get("tools"), **row.get("variables", {})
        )
        for example in found if isinstance(found, list) else [found]:
            cut = {name: values[:size] for name, values in example.items()}
            if any(label != -100 for label in cut["labels"][1:]):  # else nothing of it is learnt
                yield cut | {"cut": len(example["input_ids"]) > size}


class MaskFilling(LanguageModelling):
    """Texts one after the other, where some tokens are to be guessed."""

    head, family = "mlm", "bert"
    scratch = SCRATCH | dict(dropout=0.0)


class Writing(Task):
    """Translation, summarisation: a source and what to write of it."""

    head, family, inputs = "lm", "mbart", ("source",)
    scratch = SCRATCH | dict(
        size="pico", vocab=2048, batch=64, lr=0.02, adam_lr=4e-3, dropout=0.1, epochs=6
    )

    def examples(self, lm, row, block):
        end = [*lm.ends()][:1]
        labels = lm.tokenizer.encode(row["target"])
        labels = labels[:-1] if labels[-1:] == end else labels
        room = limit(lm, block) - 1
        start = int(start_ids(lm, torch.zeros(1, 1, dtype=torch.long)))
        example = text_example(lm, block, row["source"])
        example["cut"] |= len(labels) > room
        labels = labels[:room] + end
        yield example | {"labels": labels, "decoder_input_ids": [start, *labels[:-1]]}

    def remember(self, lm, rows, examples, options):
        """Lets generation_config.json allow the longest target and a quarter more, and the shortest."""
        lengths = [len(example["labels"]) for example in examples]
        needed = min(max(lengths) * 5 // 4, limit(lm, 2**31) - 1) + 1
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        # Saved by default, unless there are other settings.
        ids = {name: getattr(lm.config, name) for name in names}
        ids = {name: id for name, id in ids.items() if id is not None}
        config = lm.generation_config = dict(lm.generation_config or ids)
        config["max_length"] = max(needed, config.get("max_length") or 0)
        if config.get("min_length"):
            config["min_length"] = min(config["min_length"], min(lengths))
        return {}

    def report(self, lm, examples, batch):
        """Perplexity; and BLEU and ROUGE of what the model writes, each if its library is installed."""
        figures = self.figures(lm, examples, batch)
        bleu, rouge = (importlib.util.find_spec(name) for name in ("sacrebleu", "rouge_score"))
        if not bleu:
            log("BLEU needs `pip install sacrebleu`")
        if not rouge:
            log("ROUGE needs `pip install rouge_score`")
        if not (bleu or rouge):
            return figures
        longest = max(len(example["labels"]) for example in examples)
        longest = min(longest, limit(lm, 2**31) - 1)
        options = {}
        if longest > lm.make_generation_config().max_new_tokens:
            log(f"texts are written in up to {longest:,} tokens, as the longest target has")
            options["max_new_tokens"] = longest
        reader = onnxlm.Writer(TorchRunner(lm), **options)
        true, written = [], []
        for row, *_, texts in readings(self, reader, examples, batch):
            true.append(row["target"])
            written += texts
        for line in reader.notices():
            log(line)
        if bleu:
            figures |= bleu_score(written, true)
        return figures | (rouge_scores(written, true) if rouge else {})


def bleu_score(written: list[str], true: list[str]) -> dict:
    """sacrebleu's BLEU, with the tokenizer for the references' script. The figure's name gives the tokenizer if it is not
    the default, and eff:yes if no reference has four words: BLEU of 4-grams would be 0 there, so shorter n-grams count."""
    from sacrebleu.metrics import BLEU

    tokenizer = bleu_tokenizer(true)
    metric = BLEU(tokenize=tokenizer)
    short = max(len(metric.tokenizer(text).split()) for text in true) < metric.max_ngram_order
    if short:
        metric = BLEU(tokenize=tokenizer, effective_order=True)
    said = [f"tok:{tokenizer}"] * (tokenizer != "13a") + ["eff:yes"] * short
    name = f"BLEU ({', '.join(said)})" if said else "BLEU"
    return {name: metric.corpus_score(written, [true]).score}


def bleu_tokenizer(texts: list[str]) -> str:
    """The name of sacrebleu's tokenizer for the script of most of the texts."""
    text = "".join(texts)
    letters = sum(map(str.isalpha, text))
    unspaced = len(re.findall(f"[{onnxlm.UNSPACED}]", text))
    # A word has about four letters in scripts with spaces.
    if 4 * unspaced <= letters:
        return "13a"
    kana = len(re.findall("[\u3041-\u30ff]", text))
    if 20 * kana > unspaced:
        installed = all(map(importlib.util.find_spec, ("MeCab", "ipadic")))
        return "ja-mecab" if installed else "char"
    han = len(re.findall("[\u3400-\u9fff\U00020000-\U0003ffff]", text))
    return "zh" if 2 * han > unspaced else "char"


def rouge_scores(written: list[str], true: list[str]) -> dict:
    """The means of rouge_score's F measures, for words of every script."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=RougeWords())
    scores = [scorer.score(*pair) for pair in zip(true, written)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in scores[0]}


class RougeWords:
    """rouge_score's tokenizer with stemming, for every script: its own drops what is not ASCII. In scripts without spaces
    each letter is a word."""

    def __init__(self):
        from nltk.stem.porter import PorterStemmer

        self.stem = functools.cache(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        words = [word for word in all_words(text.lower()) if any(map(str.isalnum, word))]
        return [self.stem(word) if word.isascii() and len(word) > 3 else word for word in words]


def all_words(text: str) -> list[str]:
    """The words and signs of a text, and the letters of scripts without spaces."""
    spans = (onnxlm.split_letters(text, *match.span()) for match in re.finditer(r"\S+", text))
    return [text[start:end] for start, end in itertools.chain.from_iterable(spans)]


class Classification(Task):
    """Texts, or pairs of texts, and their label: one of several classes, a list of them, or a number."""

    head, inputs = "classify", ("text", "pair")
    scratch = SCRATCH | dict(epochs=4)

    def examples(self, lm, row, block):
        (example,) = super().examples(lm, row, block)
        label = row["label"]
        if lm.config.problem_type == "regression":
            example["labels"] = float(label)
        elif lm.config.problem_type == "multi_label_classification":
            if isinstance(label, dict):
                count = lm.config.num_labels
                require(
                    len(label) == count,
                    f"labels {', '.join(label)[:200]}: expected {count} of them",
                )
            else:
                label = dict.fromkeys([label] if isinstance(label, str) else label, 1)
            hot = {label_id(lm, name): on for name, on in label.items()}
            example["labels"] = [float(hot.get(i, 0)) for i in range(lm.config.num_labels)]
        else:
            example["labels"] = label_id(lm, label)
        yield example

    def figures(self, lm, examples, batch):
        """Accuracy, the mean of the F1 of each class that occurs, and the loss."""
        figures = self.report(lm, examples, batch)
        return {name: figure for name, figure in figures.items() if not isinstance(figure, dict)}

    def report(self, lm, examples, batch):
        """The figures, and for each class precision, recall, F1 and support; of single labels also the confusion
        matrix: true class -> predicted class -> count."""
        logits = np.stack(outputs(lm, examples, batch))
        problem = lm.config.problem_type
        labels = np.array([example["labels"] for example in examples])
        if problem == "regression":
            predicted = logits.flatten()
            return {
                "mean squared error": float(((predicted - labels) ** 2).mean()),
                "correlation": correlation(predicted, labels),
            }
        names = [lm.config.id2label[i] for i in range(lm.config.num_labels)]
        several = problem == "multi_label_classification"
        if several:
            predicted, true = logits > 0, labels > 0
            losses = np.logaddexp(0, np.where(true, -logits, logits)).mean(-1)
        else:
            classes = np.arange(len(names))
            predicted, true = logits.argmax(-1)[:, None] == classes, labels[:, None] == classes
            losses = np.logaddexp.reduce(logits, -1) - logits[true]
        right, found, support = (
            part.sum(0).tolist() for part in (predicted & true, predicted, true)
        )
        table = {}
        for i, name in enumerate(names):
            table[name] = {
                "precision": right[i] / max(found[i], 1),
                "recall": right[i] / max(support[i], 1),
                "F1": f1(right[i], found[i], support[i]),
                "support": support[i],
            }
        scores = [f1(*count) for count in zip(right, found, support) if any(count)]
        figures = {
            "accuracy": float((predicted == true).all(-1).mean()),
            "macro F1": float(sum(scores) / max(len(scores), 1)),
            "loss": float(losses.mean()),
            "classes": table,
        }
        if not several:
            counts = (true.T.astype(int) @ predicted.astype(int)).tolist()
            figures["confusion"] = {name: dict(zip(names, row)) for name, row in zip(names, counts)}
        return figures


def correlation(predicted: np.ndarray, labels: np.ndarray) -> float | None:
    """Pearson's correlation; None of constants."""
    for name, values in (("labels", labels), ("predictions", predicted)):
        if values.min() == values.max():
            log(f"correlation: none, since all {name} are {values[0]:g}")
            return None
    return float(np.corrcoef(predicted, labels)[0, 1])


def label_id(lm: TinyLM, name) -> int:
    """The number of a label, which may be spelled in another case or with other spaces."""
    ids = {label: i for i, label in lm.config.id2label.items()}
    found = datafiles.find_name(str(name), ids)
    hint = "; --label-names names numbers" * str(name).isdecimal()
    require(found is not None, f"label {name!r}: expected one of {', '.join(ids)[:200]}{hint}")
    return ids[found]


def label_changes(rows: list, names: list[str]) -> dict:
    """id2label and problem_type as the labels of the rows are, for a Config: first the `names` that are given, then
    others, numbers first."""
    labels = [row["label"] for row in rows if "label" in row]
    if any(isinstance(label, float) for label in labels):
        return dict(id2label={0: "LABEL_0"}, problem_type="regression")
    found = {tag: None for row in rows for tag in row.get("tags", ())}
    for label in labels:
        found |= dict.fromkeys([label] if isinstance(label, str) else label)
    if not any(isinstance(label, dict) for label in labels):  # whose order is that of the data
        by_number = lambda name: (int(name) if name.isdecimal() else math.inf, name)
        found = sorted(found, key=by_number)
    if not found:
        return {}
    several = any(isinstance(label, (list, dict)) for label in labels)
    problem = f"{'multi' if several else 'single'}_label_classification" if labels else None
    id2label = dict(enumerate(dict.fromkeys([*names, *found])))
    return dict(id2label=id2label, problem_type=problem)


def is_numbered(id2label: dict) -> bool:
    """Are the labels their own numbers, 0 or LABEL_0?"""
    return all(datafiles.name_key(name) == str(i) for i, name in id2label.items())


def same_labels(new: dict, known: dict, names: list[str]) -> dict | None:
    """The labels of a checkpoint by its numbers, as the data spells them, where both have the same ones; else None.
    `names` says what the labels of a checkpoint mean that has only numbers, LABEL_0, ..."""
    if new["problem_type"] == "regression":
        return known if len(known) == 1 else None
    ours = {*new["id2label"].values()}
    if ours == {*known.values()}:
        return known
    if names and len(ours) == len(known) and is_numbered(known):
        return new["id2label"]
    spelled = {datafiles.name_key(name): name for name in ours}
    keys = {i: datafiles.name_key(name) for i, name in known.items()}
    if {*keys.values()} != spelled.keys() or not len(keys) == len(spelled) == len(ours):
        return None
    if new["problem_type"] is None:  # B- and I- of tags mean something, b- and i- don't
        return known
    return {i: spelled[key] for i, key in keys.items()}


def class_weights(config: Config, examples: list) -> Tensor:
    """Weights (labels,) by which all classes count alike, whatever their share of the examples."""
    require(
        config.problem_type in (None, "single_label_classification") and config.id2label,
        "--class-weights: expected one label for each text or word",
    )
    labels = torch.cat([torch.as_tensor(example["labels"]).flatten() for example in examples])
    counts = torch.bincount(labels[labels != -100], minlength=config.num_labels)
    return counts.sum() / (len(counts) * counts.clamp(min=1)).float()


class Tagging(Task):
    """Words and their tags; the first token of each word has the word's. A long text is read in windows that overlap."""

    head, inputs, scratch = "tokens", ("words",), SCRATCH

    def examples(self, lm, row, block):
        windows, places = onnxlm.word_windows(lm.tokenizer, row["words"], limit(lm, block))
        examples = [window_example(lm, window) for window in windows]
        for example in examples:
            example["labels"] = [-100] * len(example["input_ids"])
        for word, (number, column) in places.items():
            examples[number]["labels"][column] = label_id(lm, row["tags"][word])
        yield from examples

    def remember(self, lm, rows, examples, options):
        return {"words": onnxlm.words_of_training([row["words"] for row in rows])}

    def figures(self, lm, examples, batch):
        """The F1 of the entities that `run` finds in the words with spaces between them, the share of words with the right
        tag, and the loss."""
        reader = onnxlm.Tagger(TorchRunner(lm))
        names = [lm.config.id2label[i] for i in range(lm.config.num_labels)]
        number = functools.cache(functools.partial(label_id, lm))
        counts = Counter()
        losses = []
        for row, *reading in readings(self, reader, examples, batch):
            text, _, windows, outputs = reading
            true = [number(tag) for tag in row["tags"]]
            starts = itertools.accumulate((len(word) + 1 for word in row["words"]), initial=0)
            spans = [(start, start + len(word)) for start, word in zip(starts, row["words"])]
            logits = reader.word_logits(text, windows, outputs)
            for (start, end), tag in zip(spans, true):
                if end > start and start in logits:
                    counts["tags"] += int(logits[start].argmax()) == tag
                    losses.append(float(np.logaddexp.reduce(logits[start]) - logits[start][tag]))
            entities = {
                (kind, spans[first][0], spans[last - 1][1])
                for kind, first, last in tag_spans([names[tag] for tag in true], names)
            }
            found = reader.decide(*reading)
            found = {(entity["entity_group"], entity["start"], entity["end"]) for entity in found}
            counts.update(
                right=len(found & entities),
                predicted=len(found),
                true=len(entities),
                words=len(true),
            )
        return {
            "entity F1": f1(*(counts[name] for name in ("right", "predicted", "true"))),
            "accuracy": counts["tags"] / max(counts["words"], 1),
            "loss": sum(losses) / max(len(losses), 1),
        }


class QuestionAnswering(Task):
    """Questions whose answer is a part of a context; a long one is read in windows that overlap. Column 0, twice, is the
    label of a window without the answer."""

    head, inputs = "qa", ("question", "context")
    scratch, init = SCRATCH, dict(lr=3e-4, epochs=6)

    def examples(self, lm, row, block):
        windows = question_windows(lm.tokenizer, row["question"], row["context"], limit(lm, block))
        labels = [self.columns(window, row) for window in windows]
        divided = bool(row["answer"]) and not any(first for first, _ in labels)
        for window, columns in zip(windows, labels):
            # If no window has the whole answer, the windows would teach that there is none.
            columns = [-100, -100] if divided else columns
            yield window_example(lm, window) | {"labels": columns, "divided": divided}

    def columns(self, window: Window, row: dict) -> list:
        """First and last column of a row's first answer, if the window has the whole of it."""
        text, start = row["answer"][0] if row["answer"] else ("", -1)
        end = start + len(text)
        places = [
            (c, *offset)
            for c, (part, offset) in enumerate(zip(window.sequence_ids, window.offsets))
            if part == 1
        ]
        inside = [c for c, first, last in places if last > start and first < end]
        whole = start >= 0 and inside and places[0][1] <= start and end <= places[-1][2]
        return [inside[0], inside[-1]] if whole else [0, 0]

    def epochs(self, lm, rows, block):
        """Leaves out windows without labels in training."""
        every = super().epochs(lm, rows, block)(None)
        learnt = [example for example in every if example["labels"][0] != -100]
        return lambda generator: every if generator is None else learnt

    def remember(self, lm, rows, examples, options):
        lengths = [last - first + 1 for first, last in (example["labels"] for example in examples)]
        return {
            "max_answer_length": options.max_answer_length or max(onnxlm.LONGEST_ANSWER, *lengths),
            "handle_impossible_answer": any(not row["answer"] for row in rows),
        }

    def figures(self, lm, examples, batch):
        """F1 and exact match as in SQuAD 2's script: of all questions, and if some have no answer, of both kinds; and the
        loss."""
        reader = onnxlm.Answerer(TorchRunner(lm))
        # Whether a question has an answer -> pairs of F1 and exact match.
        scores = {True: [], False: []}
        losses = []
        for row, *reading in readings(self, reader, examples, batch):
            (found,) = reader.decide(*reading)
            true = [text for text, _ in row["answer"] if plain(text)] or [""]
            exact = max(plain(found["answer"]) == plain(text) for text in true)
            score = max(overlap(found["answer"], text) for text in true)
            scores[bool(row["answer"])].append((score, exact))
            for window, logits in zip(*reading[2:]):
                for column, ends in zip(self.columns(window, row), logits.T):
                    losses.append(float(np.logaddexp.reduce(ends) - ends[column]))
        kinds = {"": scores[True] + scores[False]}
        if scores[False]:
            kinds |= {"HasAns ": scores[True], "NoAns ": scores[False]}
        figures = {}
        for kind, found in kinds.items():
            for name, values in zip(("span F1", "exact match"), zip(*found)):
                figures[kind + name] = sum(values) / len(values)
        return figures | {"loss": sum(losses) / max(len(losses), 1)}


def plain(text: str) -> list:
    """The words of an answer without case, punctuation and articles, as in SQuAD's script (Rajpurkar et al. 2016); in
    scripts without spaces the letters, as in MLQA's (Lewis et al. 2020)."""
    text = text.lower()
    if not re.search(f"[{onnxlm.UNSPACED}]", text):
        text = "".join(char for char in text if char not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()
    marks = (char for char in text if unicodedata.category(char)[0] == "P")
    return all_words(text.translate(dict.fromkeys(map(ord, {*marks, *string.punctuation}))))


def overlap(predicted: str, true: str) -> float:
    """F1 of the words of two answers."""
    predicted, true = plain(predicted), plain(true)
    if not predicted or not true:
        return float(predicted == true)
    return f1((Counter(predicted) & Counter(true)).total(), len(predicted), len(true))


def f1(right: float, predicted: float, true: float) -> float:
    return 2 * right / (predicted + true) if predicted + true else 0.0


TASKS = dict(
    lm=LanguageModelling(),
    mlm=MaskFilling(),
    classify=Classification(),
    tokens=Tagging(),
    qa=QuestionAnswering(),
    seq2seq=Writing(),
)
LOSSES = ("loss", "nats/token", "mean squared error")
LOWER_IS_BETTER = (*LOSSES, "bits/byte", "perplexity")  # figures of which less is better


def task_of(config: Config) -> str:
    writes = config.num_encoder_layers and config.head == "lm"
    return "seq2seq" if writes else config.head or "embed"


# ---------------------------------------------------------------------------------------------------------------------
# Models: from scratch or pretrained, frozen parts, adapters, shards
# ---------------------------------------------------------------------------------------------------------------------
def build_model(
    rows: list, options: TrainOptions, resume: bool, notices: list | None = None
) -> TinyLM:
    """The model to train: from scratch, from a checkpoint, or of a run to resume; its frozen parts, adapters and shards
    as the options ask. A line about its head is added to the notices."""
    folder = options.init or Path(options.out) / "last"
    if options.init or resume:
        lm = load_for_finetuning(folder, rows, options, notices)
    else:
        lm = new_model(rows, options)
    lm.to(usable_device(options.device))
    if options.freeze:
        freeze(lm, options.freeze)
    if options.lora:
        add_adapters(lm, options.lora)
    if options.checkpoint:
        for block in blocks(lm):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if rank_and_world_size()[1] > 1:
        shard(lm, options.parallel)
    return lm


def load_for_finetuning(
    name, rows: list, options: TrainOptions, notices: list | None = None
) -> TinyLM:
    """A checkpoint (its folder, or its name on the hub) in fp32, with the task's head and the labels of the rows."""
    folder = pretrained.find_checkpoint(name)
    file = folder if folder.is_file() else folder / "config.json"
    raw = pretrained.read_config(pretrained.open_source(folder))
    head = TASKS[options.task].head
    # A language model's head comes with the checkpoint: a random one is never meant.
    head = "config" if head == "lm" else head
    # from_pretrained warns of the same fields.
    with warnings.catch_warnings(action="ignore"):
        config = pretrained.config_from_hf(raw, str(file), head)
    # for the weights of a new head
    torch.manual_seed(options.seed)
    changes = dropouts(config, options.dropout)
    lm = TinyLM.from_pretrained(folder, torch.float32, head=head, **changes)
    line = fit_head(lm, name, onnxlm.task_of(raw), rows, options)
    if line and notices is not None:
        notices.append(line)
    require(
        task_of(lm.config) == options.task,
        f"{folder}: a model for {task_of(lm.config)}, expected one for --task {options.task}",
    )
    require(lm.tokenizer, f"{folder / 'tokenizer.json'}: no such file")
    if lm.config.causal and lm.config.pad_token_id is None:
        # A causal classifier reads the last token that is no padding.
        pad = lm.tokenizer.pad_token_id
        lm.config = replace(lm.config, pad_token_id=pad if pad is not None else [*lm.ends(), 0][0])
    return lm


def other_labels(name, known: dict, changes: dict) -> str:
    """A phrase that compares the labels of a checkpoint with those of the data."""
    new = changes["id2label"]
    theirs = ", ".join(known.values())[:200]
    if changes["problem_type"] == "regression":
        return f"{name} has the labels {theirs}, the data numbers"
    text = f"{name} has the labels {theirs}, the data {', '.join(new.values())[:200]}"
    if len(new) == len(known) and (is_numbered(known) or is_numbered(new)):
        text += "; --label-names says what the numbers mean"
    return text


def fit_head(lm: TinyLM, name, task: str, rows: list, options: TrainOptions) -> str:
    """Gives a model the labels of the rows. The head stays if it has the same labels; otherwise its last layer is new.
    `name` is the checkpoint's, `task` the one that it was trained for. Returns a line that says what was done."""
    kept = task == options.task
    reason = f"{name} is a model for {task}"
    if changes := label_changes(rows, options.names):
        known = lm.config.id2label
        labels = same_labels(changes, known, options.names)
        if kept and labels is None:
            reason = other_labels(name, known, changes)
        kept &= labels is not None
        lm.config = replace(lm.config, **changes | (dict(id2label=labels) if kept else {}))
        if not kept:
            torch.manual_seed(options.seed)
            lm.head.out = type(lm.head)(lm.config).apply(lm._init).out
    if lm.config.head not in NEW_HEADS:
        return ""
    said = f"the head of {name} stays" if kept else f"a new head ({reason})"
    return f"{options.task}: {said}"


def dropouts(config: Config, p: float | None) -> dict:
    """The fields of a Config for a dropout of p. Attention's is not raised, as fast kernels have none, unless one field of
    the checkpoint sets all of them (T5)."""
    if p is None:
        return {}
    return dict(
        hidden_dropout=p,
        embedding_dropout=p,
        head_dropout=p,
        attention_dropout=p if config.position == "relative" else min(p, config.attention_dropout),
    )


# Roles of a row whose texts train a tokenizer.
TOKENIZER_ROLES = ("text", "pair", "words", "source", "target", "question", "context")


def new_model(rows: list, options: TrainOptions) -> TinyLM:
    """A model from scratch, of the task's family, for the rows. Projections that add to the residual stream start at
    zero: every layer then starts as the identity, and training is stable from the first step."""
    task = TASKS[options.task]
    family = pretrained.FAMILIES[task.family]
    encoder = task.family == "bert"
    texts = [
        str(datafiles.as_text(row[role])[: datafiles.MMAP_MIN_BYTES // 4])
        for row in rows
        for role in TOKENIZER_ROLES
        if role in row
    ]
    tokenizer = ByteTokenizer()
    if options.vocab or encoder:
        tokenizer = train_bpe(texts, options.vocab, encoder)
    size = SIZES[options.size]
    ours = dict(num_key_value_heads=size["num_attention_heads"]) | size
    ours |= dict(
        vocab_size=-(-tokenizer.size // 64) * 64,
        tie_word_embeddings=True,
        num_encoder_layers=size["num_hidden_layers"],
        head_dim=size["hidden_size"] // size["num_attention_heads"],
        max_position_embeddings=max(options.block, 1024),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    raw = {family.fields[name]: value for name, value in ours.items() if name in family.fields}
    config = pretrained.config_from_hf({"model_type": task.family} | raw, head=task.head)
    torch.manual_seed(options.seed)
    changes = label_changes(rows, options.names) | dropouts(config, options.dropout)
    lm = TinyLM(replace(config, **changes))
    for name, p in lm.named_parameters():
        if RESIDUAL_OUTPUT.search(name):
            nn.init.zeros_(p)
    lm.tokenizer = tokenizer
    return lm


# Names of weights whose product is added to the residual stream. A replaced MLP may have several, or none.
RESIDUAL_OUTPUT = re.compile(r"\.(attention\.o|mlp(\..+)?\.down)(\.weight)?$")


def blocks(lm: TinyLM) -> list[nn.Module]:
    """The layers of all stacks."""
    return [*lm.layers, *(lm.encoder.layers if lm.encoder is not None else ())]


def train_bpe(texts: list, vocab: int, encoder: bool = False) -> onnxlm.Tokenizer:
    """A byte-level BPE of `vocab` tokens, trained by the `tokenizers` library; with BERT's special tokens for an encoder."""
    try:
        from tokenizers import ByteLevelBPETokenizer, processors
    except ImportError:
        raise Error(
            "--vocab needs `pip install tokenizers`; without it, tokens of decoders are bytes"
        ) from None
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"] if encoder else list(ByteTokenizer.specials)
    backend = ByteLevelBPETokenizer(add_prefix_space=encoder)
    live = sys.stderr.isatty() and not QUIET.get()
    size = sum(map(len, texts))
    # takes some seconds
    if size > 2**22:
        log(f"training a BPE of {vocab:,} tokens on {size:,} characters")
    # Long words are split: the trainer's time grows with the square of their length.
    texts = (re.sub(r"\S{1000}", r"\g<0> ", piece) for text in texts for piece in sliced(text))
    backend.train_from_iterator(
        texts,
        max(vocab, 256 + len(special)),
        # A rarer token is hardly learnt, and keeps its parts from being learnt.
        min_frequency=10,
        show_progress=live,
        special_tokens=special,
    )
    named = tokenizer_config(*special[:2])
    if encoder:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
        named = tokenizer_config(
            "[SEP]",
            "[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token="[MASK]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
    return onnxlm.Tokenizer(
        {"tokenizer.json": backend.to_str().encode("utf-8"), "tokenizer_config.json": named}
    )


def freeze(lm: TinyLM, what: str):
    """Freezes the embeddings, and with them for "body" all but the head, for a number the first layers of each stack."""
    layers = int(what) if what.isdecimal() else 0
    for name, p in lm.named_parameters():
        if what == "body":
            frozen = not name.startswith("head.")
        else:
            layer = re.search(r"\.(\d+)\.", name)
            frozen = layer is not None and int(layer[1]) < layers
        p.requires_grad_(not frozen and "embed" not in name)


class LoRA(Linear):
    """A frozen projection W with a trained adapter of low rank: W x + 2 B A x (Hu et al. 2021; 2 is alpha / rank). Each
    part of a fused projection has an adapter. The state dict is that of the merged projection."""

    def __init__(self, base: Linear, sizes: tuple, rank: int):
        nn.Module.__init__(self)
        self.weight, self.bias = base.weight, base.bias
        self.sizes = sizes
        self.in_features, self.out_features = base.in_features, base.out_features
        self.a = nn.Parameter(
            torch.randn(len(sizes) * rank, base.in_features) * base.in_features**-0.5
        )
        self.b = nn.Parameter(torch.zeros(sum(sizes), rank))

    def parts(self) -> list:
        """A (rank, in) and B (out, rank) of each part."""
        return list(
            zip(full_tensor(self.a).chunk(len(self.sizes)), full_tensor(self.b).split(self.sizes))
        )

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.a).chunk(len(self.sizes), dim=-1)
        return super().forward(x) + 2 * torch.cat(
            [F.linear(part, b) for part, (_, b) in zip(low, self.parts())], -1
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = (
            full_tensor(self.weight) + 2 * torch.cat([b @ a for a, b in self.parts()])
        ).detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()


def add_adapters(lm: TinyLM, rank: int):
    """Freezes all but a new head, and adds an adapter to every projection of the layers."""
    for name, p in lm.named_parameters():
        p.requires_grad_(in_new_head(lm, name))
    for name, module in list(lm.named_modules()):
        if isinstance(module, Linear) and "layers." in name:
            weight = name + ".weight"
            names = pretrained.stored_names(weight, lm.config)
            # Experts stay as they are, as PEFT leaves them.
            if any("*" in name for name in names):
                continue
            fused = len(names) > 1
            sizes = pretrained.fused_sizes(weight, lm.config) if fused else (module.out_features,)
            lm.set_submodule(name, LoRA(module, sizes, rank).to(lm.device))


def save_adapter(folder: Path, lm: TinyLM, options: TrainOptions):
    """Writes adapter_config.json and adapter_model.safetensors for PEFT, which names tensors after the family's modules."""
    config = lm.config
    tensors = {}
    # names of projections within a layer
    targets = set()
    transposed = False
    for name, module in lm.named_modules():
        if isinstance(module, LoRA):
            names = pretrained.stored_names(name + ".weight", config)
            transposed |= isinstance(names[0], pretrained.Transposed)
            for stored, pair in zip(names, module.parts()):
                theirs = stored.removesuffix(".weight")
                targets.add(re.split(r"\.\d+\.", theirs, maxsplit=1)[1])
                for side, tensor in zip("AB", pair):
                    if side == "B" and isinstance(stored, pretrained.HeadByHead):
                        tensor = stored.save(tensor, config)
                    tensors[f"{theirs}.lora_{side}.weight"] = tensor
    head = {
        f"head.{name}": full_tensor(p) for name, p in lm.head.named_parameters() if p.requires_grad
    }
    head = pretrained.to_checkpoint(head, config)
    if rank_and_world_size()[0] > 0:
        return
    kinds = {
        "lm": "SEQ_2_SEQ_LM" if config.num_encoder_layers else "CAUSAL_LM",
        "classify": "SEQ_CLS",
        "tokens": "TOKEN_CLS",
        "qa": "QUESTION_ANS",
    }
    # PEFT wraps a classifier of several layers as one module.
    heads = {
        name.split(".")[0] if name.startswith("classifier.") else name.rpartition(".")[0]
        for name in head
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{name}": tensor for name, tensor in (tensors | head).items()},
        {"format": "pt"},
    )
    write_json(
        folder / "adapter_config.json",
        dict(
            peft_type="LORA",
            task_type=kinds.get(config.head),
            base_model_name_or_path=options.init,
            inference_mode=True,
            r=options.lora,
            lora_alpha=2 * options.lora,
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=transposed,
            target_modules=sorted(targets),
            modules_to_save=sorted(heads) or None,
        ),
    )


def shard(lm: TinyLM, parallel: str = "fsdp"):
    """Spreads a model over all processes: fsdp shards weights, gradients and the optimizer's state; ddp keeps a copy on
    each, as a single shard. The state dict stays that of the plain model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    world = rank_and_world_size()[1]
    sizes = {"shards": world} if parallel == "fsdp" else {"copies": world, "shards": 1}
    mesh = init_device_mesh(lm.device.type, (*sizes.values(),), mesh_dim_names=(*sizes,))
    policy = MixedPrecisionPolicy()
    if lm.device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    # Behind an encoder, parts of a layer are called by themselves, without its hooks.
    if lm.encoder is None:
        for block in lm.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(lm, mesh=mesh, mp_policy=policy)

    def gather(_, state: dict, *__):
        # one at a time: a device may not hold them all
        for name, x in state.items():
            state[name] = full_tensor(x).cpu()

    lm.register_state_dict_post_hook(gather)


# Heads that fine-tuning may begin at random.
NEW_HEADS = ("classify", "tokens", "qa")


def in_new_head(lm: TinyLM, parameter: str) -> bool:
    return parameter.startswith("head.") and lm.config.head in NEW_HEADS


def make_optimizer(lm: TinyLM, options: TrainOptions) -> torch.optim.Optimizer:
    """From scratch, Muon and AdamW. In fine-tuning, AdamW: a new head has a rate of its own, and only matrices decay."""
    require(
        any(p.requires_grad for p in lm.parameters()),
        f"--freeze {options.freeze}: nothing is left to train",
    )
    if not options.init:
        return MuonAdamW(lm, options.lr, options.adam_lr, options.weight_decay)
    groups = {}
    for name, p in lm.named_parameters():
        if p.requires_grad:
            rate = options.adam_lr if in_new_head(lm, name) else options.lr
            decay = options.weight_decay if p.ndim == 2 else 0.0
            group = groups.setdefault((rate, decay), dict(params=[], lr=rate, weight_decay=decay))
            group["params"].append(p)
    return torch.optim.AdamW([*groups.values()], fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# What a run shows and records
# ---------------------------------------------------------------------------------------------------------------------
# --quiet: nothing on stderr.
QUIET = contextvars.ContextVar("QUIET", default=False)


def log(text: str, end: str = "\n"):
    """Prints a line on stderr, from the first process only."""
    if rank_and_world_size()[0] == 0 and not QUIET.get():
        onnxlm.print_status(text, end)


def progress_bar(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """onnxlm's progress bar over the items, from the first process only."""
    silent = QUIET.get() or rank_and_world_size()[0] != 0
    return onnxlm.progress_bar(total, what, items, silent=silent)


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def count_parameters(lm: TinyLM) -> tuple[int, int]:
    """The parameters of the model, without adapters, and those that are trained, adapters included."""
    adapters = [p for m in lm.modules() if isinstance(m, LoRA) for p in (m.a, m.b)]
    total = sum(p.numel() for p in lm.parameters()) - sum(p.numel() for p in adapters)
    return total, sum(p.numel() for p in lm.parameters() if p.requires_grad)


def describe_parameters(lm: TinyLM, options: TrainOptions) -> str:
    total, trained = count_parameters(lm)
    if not options.lora:
        part = "all" if trained == total else f"{trained:,}"
        return f"{total:,} parameters, {part} of them trained"
    head = " and a new head" if lm.config.head in NEW_HEADS else ""
    return f"{total:,} parameters, trained by {trained:,} in adapters of rank {options.lora}{head}"


def peak_flops(device) -> float | None:
    """Peak bfloat16 operations per second of a CUDA device, if it is known."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    # compute capability -> operations per cycle of one multiprocessor
    per_cycle = {(8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192}.get(
        (properties.major, properties.minor)
    )
    return per_cycle and per_cycle * properties.multi_processor_count * properties.clock_rate * 1e3


class Progress:
    """The training's progress on stderr: a live line on a terminal, else a line every ten seconds. It reads the loss
    only when it prints, so that a GPU need not wait."""

    def __init__(self, lm: TinyLM, steps: int, first: int):
        self.steps = steps
        self.first = first
        self.tokens = 0
        self.live = sys.stderr.isatty()
        self.begin = time.monotonic()
        self.printed = -math.inf
        self.warm = None
        self.peak = peak_flops(lm.device)
        # Forward and backward passes cost 6 operations for each parameter and token.
        self.flops = 6 * sum(p.numel() for name, p in lm.named_parameters() if "_embed" not in name)

    def line(self, step: int, loss: Tensor, lr: float, tokens: int):
        """Count a step of so many tokens, and print a line if one is due."""
        now = time.monotonic()
        self.tokens += tokens
        self.estimate(step, now)
        if now - self.printed > (0.2 if self.live else 10) or step == self.steps:
            self.printed = now
            eta = (now - self.begin) / (step - self.first) * (self.steps - step)
            speed = f"{self.speed():,.0f} tok/s"
            if self.peak:
                # model flops utilisation (Chowdhery et al. 2022), without attention's own products
                speed += f"  MFU {self.speed() * self.flops / self.peak:.1%}"
            log(
                f"step {step}/{self.steps}  loss {loss.item():.3f}  lr {lr:.2e}  {speed}  ETA {format_duration(eta)}",
                "" if self.live else "\n",
            )

    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / max(time.monotonic() - self.begin, 1e-9)

    def estimate(self, step: int, now: float):
        """After five steps, print how long a long run will take. The first step compiles and warms up: it is left out."""
        if step == self.first + 1:
            self.warm = now
        if step == self.first + 5:
            left = (now - self.warm) / 4 * (self.steps - step)
            if left > 60:
                log(
                    f"{self.steps - step:,} more steps will take about {format_duration(left)}, plus validations"
                )


def format_figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


class RunRecord:
    """The figures of a run, in metrics.jsonl and for TensorBoard. Only the first process writes. The record of a former
    run in the folder is kept until this run has saved a checkpoint."""

    def __init__(self, out: Path, step: int, options: TrainOptions):
        self.file = out / "metrics.jsonl"
        self.rows = []
        self.writer = None
        self.first = rank_and_world_size()[0] == 0
        if step and self.file.exists():
            # A killed run may have written rows after its last checkpoint: these steps are done again.
            lines = self.file.read_text(encoding="utf-8").splitlines()
            rows = (json.loads(line) for line in lines if line.endswith("}"))
            self.rows = [row for row in rows if row["step"] <= step]
        # rows in the file; None while it holds the former record
        self.written = None
        self.seconds = self.rows[-1]["seconds"] if self.rows else 0.0
        self.begin = time.monotonic()
        # seconds that samples and pictures took
        self.extra_seconds = 0.0
        if options.tensorboard and self.first:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise Error("--tensorboard needs `pip install tensorboard`") from None
            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def spent(self) -> float:
        """Seconds of training, including those before a resume."""
        return self.seconds + time.monotonic() - self.begin

    @contextlib.contextmanager
    def extra(self):
        """Measures what is not training; yields the seconds left for it: it may take a twentieth of the training time
        so far."""
        begin = time.monotonic()
        try:
            yield self.spent() / 20 - self.extra_seconds
        finally:
            self.extra_seconds += time.monotonic() - begin

    def add(self, step: int, figures: dict):
        self.rows.append({"step": step, "seconds": round(self.spent(), 3)} | figures)
        validation = figures.get("validation", {})
        scalars = {name: value for name, value in figures.items() if name != "validation"}
        scalars |= {f"validation/{name}": value for name, value in validation.items()}
        for name, value in scalars.items() if self.writer else ():
            if value is not None:
                self.writer.add_scalar(name.replace(" ", "_"), value, step)
        if self.written is not None:
            self.flush()

    def flush(self):
        """Write the rows that are not yet in the file; the first time, all of them."""
        if not self.first:
            return
        rows = self.rows[self.written or 0 :]
        with open(self.file, "w" if self.written is None else "a", encoding="utf-8") as file:
            file.writelines(strict_json(row) + "\n" for row in rows)
        self.written = len(self.rows)
        if self.writer:
            self.writer.flush()


# ---------------------------------------------------------------------------------------------------------------------
# The model card and its picture
# ---------------------------------------------------------------------------------------------------------------------
def write_card(
    folder: Path,
    lm: TinyLM,
    options: TrainOptions,
    run_state: dict,
    record: RunRecord,
    notices: list[str],
    finished: bool,
):
    """README.md and loss.svg beside the best checkpoint."""
    if not record.first or "best_step" not in run_state:
        return
    panels = make_panels(record.rows, options, run_state.get("best_step"))
    with record.extra() as seconds:
        # matplotlib takes about half a second
        by_matplotlib = importlib.util.find_spec("matplotlib") and (finished or seconds > 0.5)
        picture = draw_by_matplotlib(panels) if by_matplotlib else draw_svg(panels)
    card = model_card(lm, options, run_state, notices)
    try:
        for name, text in {"README.md": card, "loss.svg": picture}.items():
            # a label may hold half a surrogate pair
            content = text.encode("utf-8", errors="replace")
            write_file(folder / name, lambda path, content=content: path.write_bytes(content))
    except OSError as error:
        raise Error(f"{folder}: no model card written ({error})") from None


# task -> transformers' class, the hub's name of the task
AUTO_CLASSES = {
    "lm": ("AutoModelForCausalLM", "text-generation"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "classify": ("AutoModelForSequenceClassification", "text-classification"),
    "tokens": ("AutoModelForTokenClassification", "token-classification"),
    "qa": ("AutoModelForQuestionAnswering", "question-answering"),
    "mlm": ("AutoModelForMaskedLM", "fill-mask"),
}
# Options that do not change what is learnt.
NOT_OF_THE_RUN = {"out", "overwrite", "quiet", "tensorboard"}


def model_card(lm: TinyLM, options: TrainOptions, run_state: dict, notices: list[str]) -> str:
    """README.md as the hub reads it: front matter, data, figures, options, how to load the model."""
    auto, tag = AUTO_CLASSES[options.task]
    replaced = describe_model(lm).get("tinylm_replaced", {})
    stock = lm.config.model_type != "tinylm" and not replaced
    front = [
        "---",
        f"library_name: {'transformers' if stock else 'tinylm'}",
        f"pipeline_tag: {tag}",
    ]
    front += ["tags:", "- tinylm"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", options.init) and not Path(options.init).exists():
        front.append(f"base_model: {options.init}")
    front += ["---", ""]
    name = lm.config.model_type if stock else "tinylm"
    start = f"Fine-tuned from `{options.init}`" if options.init else "Trained from scratch"
    lines = [f"# A {name} for {tag.replace('-', ' ')}", ""]
    lines += [f"{start} with tinylm: {describe_parameters(lm, options)}.", "", "## Data", ""]
    lines += [*(f"- {line}" for line in notices), "", "## Figures", ""]
    if figures := run_state.get("figures"):
        lines += [f"On the rows to validate on, after step {run_state['best_step']:,}:", ""]
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {name} | {format_figure(value)} |" for name, value in figures.items()]
    else:
        lines += ["There were no rows to validate on."]
    lines += ["", "![loss](loss.svg)", "", "## Options", ""]
    lines += ["| option | value |", "|---|---|", *option_lines(options, run_state), ""]
    use = 'sample . --prompt "..."' if options.task == "lm" else 'run . "..."'
    if options.task == "lm" and onnxlm.has_chat_template(lm.tokenizer):
        use = "chat ."
    return "\n".join([*front, *lines, *loading_lines(auto, stock, replaced, use)])


def option_lines(options: TrainOptions, run_state: dict) -> Iterable[str]:
    """A line of the card's table for each option in effect; those that were given are marked."""
    unused = NOT_OF_THE_RUN | {name for name in ("lora", "patience") if not getattr(options, name)}
    if rank_and_world_size()[1] == 1:
        unused.add("parallel")
    for f in fields(options):
        value = getattr(options, f.name)
        off = value is None or value is False or value == ""
        if not off and f.name not in unused:
            given = " (given)" if run_state["options"].get(f.name) != f.default else ""
            yield f"| {flag(f.name)} | {'yes' if value is True else value}{given} |"


def loading_lines(auto: str, stock: bool, replaced: dict[str, str], use: str) -> Iterable[str]:
    """How to load the model from its folder: in transformers, in tinylm and by the command. Where leaves were replaced,
    they must be replaced again before it is loaded, which the command cannot do."""
    yield from ("## How to load it", "")
    if stock:
        yield from ("```python", f"from transformers import {auto}, AutoTokenizer", "")
        yield f'model = {auto}.from_pretrained(".")'
        yield from ('tokenizer = AutoTokenizer.from_pretrained(".")', "```", "")
    yield from ("```python", "import tinylm" if replaced else "from tinylm import TinyLM")
    for leaf, by in replaced.items():
        name = getattr(getattr(tinylm, leaf), "__qualname__", "")
        module = by.removesuffix(f".{name}")
        if module in (by, "__main__") or not re.fullmatch(r"[\w.]+", name):
            yield f"# tinylm.{leaf} was {by} in training"
        else:
            yield from (f"import {module}", f"tinylm.{leaf} = {by}")
    yield ""
    yield f'model = {"tinylm." if replaced else ""}TinyLM.from_pretrained(".")'
    yield from ("```", "")
    if not replaced:
        yield from ("```sh", f"tinylm {use}", "```", "")


@dataclass(frozen=True)
class Panel:
    """A diagram over the steps of a run, or over `x`: name -> points (step, value); best: the point of the best
    checkpoint; low: where the axis of the values begins (None: below the least)."""

    title: str
    curves: dict[str, list[tuple[float, float]]]
    best: tuple[int, float] | None = None
    x: str = "step"
    low: float | None = None


def make_panels(rows: list[dict], options: TrainOptions, best_step: int | None) -> list[Panel]:
    """The losses of a run's record, in training and on the rows to validate on; and the figure that `best` goes by, if
    it is no loss."""
    validations = [(row["step"], row["validation"]) for row in rows if row.get("validation")]
    names = validations[0][1] if validations else {}
    loss = next((name for name in LOSSES if name in names), "loss")
    chosen = chosen_figure(names, options) if names else loss

    def points(name: str) -> list[tuple[int, float]]:
        found = [(step, figures.get(name)) for step, figures in validations]
        return [(step, value) for step, value in found if finite(value)]

    def panel(title: str, name: str, curves: dict) -> Panel:
        curves = curves | {"validation": points(name)}
        best = next((p for p in curves["validation"] if p[0] == best_step), None)
        return Panel(title, curves, best if name == chosen else None)

    training = [(row["step"], row["loss"]) for row in rows if finite(row.get("loss"))]
    title = loss if loss in ("loss", "mean squared error") else f"loss ({loss})"
    panels = [panel(title, loss, {"training": training, "training, smoothed": smooth(training)})]
    if chosen != loss:
        panels.append(panel(chosen, chosen, {}))
    return [panel for panel in panels if any(panel.curves.values())]


def finite(value) -> bool:
    return value is not None and math.isfinite(value)


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of a twentieth of the points around each, of some more where there are few."""
    reach = max(len(points) // 40, min(len(points) // 8, 5))
    found = []
    for i, (step, _) in enumerate(points):
        window = [value for _, value in points[max(i - reach, 0) : i + reach + 1]]
        found.append((step, sum(window) / len(window)))
    return found


# curve -> colour, width of the line, whether few points are marked
CURVES = {
    "training": ("#a6c8e4", 1, False),
    "training, smoothed": ("#1f77b4", 2, False),
    "validation": ("#d62728", 2, True),
}


def draw_by_matplotlib(panels: list[Panel]) -> str:
    """An SVG picture of the panels, side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels) or 5, 3.75), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name, points in panel.curves.items():
            if points:
                colour, width, marked = CURVES[name]
                marker = "o" if marked and len(points) <= 30 else None
                axes.plot(*zip(*points), color=colour, lw=width, marker=marker, ms=4, label=name)
        if panel.best:
            label = f"best: {panel.best[1]:.4g} at step {panel.best[0]:,}"
            style = dict(marker="*", ms=14, ls="none", color=CURVES["validation"][0])
            axes.plot(*panel.best, label=label, **style)
        axes.set_xlabel(panel.x)
        axes.set_ylabel(panel.title)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=panel.low)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    file = io.StringIO()
    # without the date and random names, the same figures give the same file
    with matplotlib.rc_context({"svg.hashsalt": "tinylm"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def draw_svg(panels: list[Panel], width: int = 480, height: int = 360) -> str:
    """The same picture without matplotlib."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(panels)} {height}" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, panel in enumerate(panels):
        part = panel_lines(panel, width, height)
        lines += [f'<g transform="translate({i * width},0)">', *part, "</g>"]
    return "\n".join([*lines, "</svg>", ""])


def panel_lines(panel: Panel, width: int, height: int) -> Iterable[str]:
    """Yields the SVG elements of a panel: grid, axes, curves, the best point, the legend."""
    left, right, top, bottom = 76, width - 28, 16, height - 52
    points = [point for curve in panel.curves.values() for point in curve]
    last = max(step for step, _ in points)
    low, high = (bound(value for _, value in points) for bound in (min, max))
    margin = (high - low) / 20 or abs(high) / 20 or 1
    low, high = low - margin if panel.low is None else panel.low, high + margin

    def x_of(step: float) -> float:
        return left + (right - left) * step / last

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    for step, text in ticks(0, last):
        x = f"{x_of(step):.1f}"
        yield f'<path d="M{x},{top}V{bottom}" stroke="#e0e0e0"/>'
        yield f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{text}</text>'
    for value, text in ticks(low, high):
        y = y_of(value)
        yield f'<path d="M{left},{y:.1f}H{right}" stroke="#e0e0e0"/>'
        yield f'<text x="{left - 8}" y="{y + 4.5:.1f}" text-anchor="end">{text}</text>'
    yield f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="black"/>'
    middle = (top + bottom) / 2
    yield f'<text x="{(left + right) / 2}" y="{height - 12}" text-anchor="middle">{panel.x}</text>'
    yield f'<text transform="translate(18,{middle}) rotate(-90)" text-anchor="middle">{panel.title}</text>'

    legend = []
    for name, curve in panel.curves.items():
        colour, thickness, marked = CURVES[name]
        places = [f"{x_of(step):.1f},{y_of(value):.1f}" for step, value in curve]
        if places:
            yield f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="{thickness}"/>'
            mark = f'<path d="M2,-4h24" stroke="{colour}" stroke-width="{thickness}"/>'
            if marked and len(curve) <= 30:
                dot = f'<circle r="3" fill="{colour}"/>'
                yield from (f'<g transform="translate({place})">{dot}</g>' for place in places)
                mark += f'<g transform="translate(14,-4)">{dot}</g>'
            legend.append((mark, name))
    if panel.best:
        step, value = panel.best
        colour, *_ = CURVES["validation"]
        yield f'<g transform="translate({x_of(step):.1f},{y_of(value):.1f})">{star(colour)}</g>'
        mark = f'<g transform="translate(14,-4)">{star(colour)}</g>'
        legend.append((mark, f"best: {value:.4g} at step {step:,}"))

    # In the corner with the least of the curves. The width is an estimate: there is no font to measure.
    wide = 48 + 7.5 * max(len(text) for _, text in legend)
    tall = 20 * len(legend)
    corners = itertools.product((top + 6, bottom - 6 - tall), (right - 4 - wide, left + 10))
    sections = [pair for curve in panel.curves.values() for pair in itertools.pairwise(curve)]
    drawn = points + [
        (a + (b - a) * part / 16, u + (v - u) * part / 16)
        for (a, u), (b, v) in sections
        for part in range(17)
    ]

    def covered(corner: tuple[float, float]) -> int:
        y, x = corner
        inside = (x < x_of(step) < x + wide and y < y_of(value) < y + tall for step, value in drawn)
        return sum(inside)

    y, x = min(corners, key=covered)
    for i, (mark, text) in enumerate(legend, 1):
        yield f'<g transform="translate({x:.1f},{y + 20 * i - 5:.1f})">{mark}<text x="34">{text}</text></g>'


def ticks(low: float, high: float, most: int = 7) -> list[tuple[float, str]]:
    """Round numbers from low to high and their labels: so many at most, apart by 1, 2 or 5 times a power of ten."""
    least = (high - low) / most
    power = 10 ** math.floor(math.log10(least))
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    decimals = max(-math.floor(math.log10(apart)), 0)
    values = (i * apart for i in range(math.ceil(low / apart), math.floor(high / apart) + 1))
    return [(value, f"{value:,.{decimals}f}") for value in values]


def star(colour: str) -> str:
    """A star with five points around the origin."""
    points = []
    for i in range(10):
        radius = 3.5 if i % 2 else 8.5
        angle = math.pi * i / 5
        points.append(f"{radius * math.sin(angle):.1f},{-radius * math.cos(angle):.1f}")
    return f'<polygon points="{" ".join(points)}" fill="{colour}"/>'


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: `best` to use, `last` to resume from
# ---------------------------------------------------------------------------------------------------------------------
# Options that are saved beside a model, for `run` and `eval`.
REMEMBERED = ("task", *datafiles.COLUMNS, "label_names", "block", "regression", "classes")


def save(
    folder: Path, lm: TinyLM, options: TrainOptions, optimizer=None, run_state: dict | None = None
):
    """Writes a checkpoint, and with an optimizer training.safetensors, with all that `--resume` needs. Under torchrun that
    file names a folder with the part of each process. Raises Error if it cannot be written; each file is then the whole
    former one."""
    tensors = {
        f"model/{name}": p for name, p in lm.named_parameters() if optimizer and p.requires_grad
    }
    for name, p in lm.named_parameters() if optimizer else ():
        state = optimizer.state.get(p, {})
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in state.items()}
    before = {*folder.glob("training-*")}
    try:
        if optimizer and rank_and_world_size()[1] > 1:
            tensors, run_state = {}, run_state | {"shards": save_shards(folder, tensors, lm.device)}
        if rank_and_world_size()[0] == 0:
            lm.save_pretrained(folder)
            settings = {name: getattr(options, name) for name in REMEMBERED}
            write_json(folder / onnxlm.TRAINING, settings | getattr(lm, "remembered", {}))
        else:
            # All processes take part in gathering the weights.
            lm.state_dict()
        if options.lora:
            save_adapter(folder / "adapter", lm, options)
        elif (folder / "adapter" / "adapter_config.json").exists():
            # a former run's
            shutil.rmtree(folder / "adapter", ignore_errors=True)
        if optimizer and rank_and_world_size()[0] == 0:
            write_tensors(
                folder / "training.safetensors", tensors, {"training": json.dumps(run_state)}
            )
            for path in before:
                shutil.rmtree(path, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        for path in {*folder.rglob("*.tmp"), *folder.glob("training-*")} - before:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise Error(
            f"{folder}: not saved ({error}); what was saved there before is as it was"
        ) from None


def save_shards(folder: Path, tensors: dict, device) -> str:
    """Writes a new folder of safetensors, one for each process with its part of the tensors. Returns its name."""
    import torch.distributed.checkpoint as dcp

    rank, world = rank_and_world_size()
    # the same number on all processes: the first one's time
    number = all_reduce(torch.tensor(time.time_ns() * (rank == 0), device=device), world)
    path = folder / f"training-{number}"
    try:
        dcp.save(
            tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        )
    except dcp.api.CheckpointException as error:
        raise OSError(first_failure(error)) from None
    return path.name


def first_failure(error) -> str:
    """The error of the first process that failed, from torch.distributed.checkpoint's exception."""
    return str(next(iter(error.failures.values()))[0])


# Options that may differ when a run is resumed.
MAY_CHANGE = NOT_OF_THE_RUN | {"steps", "epochs", "eval_every", "patience", "device", "compile"}
# Options that may name a file or folder.
PATHS = ("init", "val")


def load_resume_metadata(folder: Path) -> dict:
    """The state of a run as `save` wrote it for `--resume`: its options, the step, the data, the best figures."""
    file = folder / "training.safetensors"
    run_state = json.loads((open_tensors(file).metadata() or {}).get("training", "null"))
    require(run_state, f"{file}: not written by tinylm's training")
    return run_state


def resumed_options(last: Path, given: dict) -> dict:
    """Options for `--resume`: those of the run, except for the `given` ones. A run that was started in another folder
    still finds its files."""
    run_state = load_resume_metadata(last)
    known = {f.name for f in fields(TrainOptions)}
    options = {name: value for name, value in run_state["options"].items() if name in known}
    for name in PATHS:
        path = os.path.join(run_state.get("cwd", ""), options[name])
        if options[name] and not os.path.exists(options[name]) and os.path.exists(path):
            options[name] = path
    if {"steps", "epochs"} & set(given):
        # each excludes the other
        options |= dict(steps=None, epochs=None)
    return options | dict(quiet=False, overwrite=False, out=str(last.parent)) | given


def check_same_options(run_state: dict, given: dict):
    """Refuses to resume a run with other options than MAY_CHANGE."""
    before = run_state["options"]
    for name, value in before.items():
        same = given.get(name) == value
        if not same and name in PATHS and value and given[name]:
            paths = (os.path.join(run_state.get("cwd", ""), value), given[name])
            same = len({os.path.realpath(path) for path in paths}) == 1
        if not same and name not in MAY_CHANGE:
            now = option_value(name, given)
            raise Error(
                f"--resume: {flag(name)} is {now}, expected {option_value(name, before)}, as in the run"
            )


def option_value(name: str, options: dict) -> str:
    """The value of an option as the command line has it; of one that was not given, its default."""
    value = options.get(name)
    if value is None:
        known = {f.name: options[f.name] for f in fields(TrainOptions) if f.name in options}
        value = getattr(TrainOptions(**known).filled(), name, None)
    if value in (None, ""):
        return "not given"
    return {True: "given", False: "not given"}[value] if isinstance(value, bool) else str(value)


def data_place(data) -> str | None:
    """The path of the data, from which `--resume` reads it again; None for standard input and for rows in Python."""
    is_path = isinstance(data, (str, Path)) and str(data) != "-"
    return os.path.abspath(data) if is_path else None


@torch.no_grad()
def restore(lm: TinyLM, optimizer, folder: Path, run_state: dict):
    """Loads parameters and the optimizer's state, which any number of processes may have saved."""

    def parameter(name: str) -> Tensor:
        return lm.get_parameter(name.split("/")[1])

    if shards := run_state.pop("shards", None):
        tensors = load_shards(folder / Path(shards).name, parameter)
    else:
        file = open_tensors(folder / "training.safetensors")
        tensors = {name: shard_like(parameter(name), file.get_tensor(name)) for name in file.keys()}
    for name, tensor in tensors.items():
        p = parameter(name)
        if name.startswith("model/"):
            p.copy_(tensor)
        else:
            optimizer.state[p][name.split("/")[2]] = tensor.to(p.device)


def load_shards(path: Path, parameter: Callable) -> dict:
    """The tensors of `save_shards`, each sharded as its parameter, `parameter(name)`, is now."""
    import torch.distributed.checkpoint as dcp

    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        tensors = {}
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            p = parameter(name)
            size = tuple(stored.size)
            require(
                size in ((), p.shape), f"{path}: {name} has shape {size}, expected {tuple(p.shape)}"
            )
            tensors[name] = torch.empty_like(p) if size else torch.zeros(())
        dcp.load(tensors, storage_reader=reader, no_dist=rank_and_world_size()[1] == 1)
    except (SafetensorError, dcp.api.CheckpointException) as error:
        reason = first_failure(error) if hasattr(error, "failures") else error
        raise Error(f"{path}: not readable ({reason})") from None
    return tensors


@contextlib.contextmanager
def locked(folder: Path):
    """Locks the folder against a second run. The system removes the lock of a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Error(f"--out {folder}: another run trains into this folder") from None
    finally:
        if fcntl:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop
# ---------------------------------------------------------------------------------------------------------------------
def train(data, options: TrainOptions, resume: bool = False) -> TinyLM:
    """Trains on `data` (a path, or rows: see `read_rows`; {"train": rows, "validation": rows}) from scratch or from
    `options.init`. With `resume` it goes on where `options.out`/last stopped, bit for bit as if it had not been
    interrupted: data order and dropout depend on seed and step alone. `data` may then be None for the run's own files.

    Returns the best model in eval mode, as saved in `options.out`/best, with the attributes `figures` (of its validation)
    and `folder`; under torchrun the last model. Raises Error for data or options that do
    not fit, and if `options.out` holds a run without `resume` or `overwrite`; KeyboardInterrupt after Ctrl-C or SIGTERM,
    once `last` is saved.
    """
    lm, run_state = train_model(data, options, resume)
    folder = Path(options.out) / "best"
    if "best_step" in run_state and rank_and_world_size()[1] == 1:
        device = lm.device
        del lm
        lm = open_checkpoint(folder, device)
    lm.folder = folder
    lm.figures = run_state.get("figures") or {}
    return lm


def train_model(data, options: TrainOptions, resume: bool) -> tuple[TinyLM, dict]:
    """Returns the last model and the run's state."""
    quiet = QUIET.set(options.quiet)
    try:
        return train_quietly(data, options, resume)
    finally:
        QUIET.reset(quiet)


def train_quietly(data, options: TrainOptions, resume: bool) -> tuple[TinyLM, dict]:
    given = asdict(options)
    options = options.filled()
    out = Path(options.out)
    task = TASKS[options.task]
    # lines to print before the first step, and for the model card
    notices = []
    require(not out.exists() or out.is_dir(), f"--out {out}: is a file, expected a folder")
    run_state = load_resume_metadata(out / "last") if resume else None
    if resume:
        check_same_options(run_state, given)
        data = run_state.get("place") if data is None else data
        lost = "--resume: the run's data came from no file; expected the same data again"
        require(data is not None, lost)
        if isinstance(data, str) and data == run_state.get("place"):
            moved = f"--resume: {data}, the run's data, is not there; expected its new place"
            require(os.path.exists(data), moved)
    require(data is not None, "train: no data; expected a file, a folder or - for standard input")
    if not isinstance(data, (str, Path, dict)):
        data = [record for _, record in datafiles.numbered(data)]
    held_run = [path for path in (out / "last", out / "best") if (path / "config.json").exists()]
    require(
        resume or options.overwrite or not held_run,
        f"--out {out}: holds a run; expected --resume to go on with it, --overwrite to replace it, or another --out",
    )
    columns = {}  # option -> column
    rows, val_rows = datafiles.read_splits(data, options, notices, options.seed, columns)
    data_hash = hashlib.sha256(repr((rows, val_rows)).encode("utf-8", errors="replace")).hexdigest()
    require(
        not resume or run_state["data"] == data_hash,
        f"--resume: {data_place(data) or 'the data'} is not the data of the run, or has changed",
    )
    notices.append(describe_rows(rows, val_rows, options))
    # Classes count even if only rows to validate on have them; but the texts of these train no tokenizer.
    named = [{role: row[role] for role in ("label", "tags") if role in row} for row in val_rows]
    lm = build_model(rows + named, options, resume, notices)
    optimizer = make_optimizer(lm, options)
    batches = Batches(lm, task.epochs(lm, rows, options.block), options)
    require(
        batches.per_epoch,
        f"{data if isinstance(data, (str, Path)) else 'data'}: expected more than --block {options.block} tokens to train on",
    )
    lm.remembered = {"block": options.block} | columns
    lm.remembered |= task.remember(lm, rows, batches.epoch(None), options)
    val_examples = task.epochs(lm, val_rows, options.block)(None) if val_rows else []
    notices += describe_cuts(options, (rows, batches.epoch(None)), (val_rows, val_examples))
    if options.metric:  # what a validation will give, before the first step
        require(val_examples, f"--metric {options.metric}: nothing is held back to validate on")
        chosen_figure(figures_of_few(lm, val_examples, options), options)
    weights = None
    if options.class_weights:
        weights = class_weights(lm.config, batches.epoch(None)).to(lm.device)
    steps = options.steps or math.ceil(options.epochs * batches.per_epoch)
    if resume:
        restore(lm, optimizer, out / "last", run_state)
    run_state = run_state or dict(data=data_hash, step=0, stale=0)
    run_state |= dict(options=given, place=data_place(data), cwd=os.getcwd())
    if options.compile:
        lm.compile(fullgraph=True)
    # TF32 on CUDA
    torch.set_float32_matmul_precision("high")
    # A CPU computes denormal numbers a hundred times as slowly.
    torch.set_flush_denormal(True)
    keep_memory()
    for line in notices:
        log(line)
    log(
        f"{describe_parameters(lm, options)}; {batches.per_epoch:,} batches to train on, "
        f"{len(val_examples):,} sequences held back; {lm.device}"
    )
    with locked(out) if rank_and_world_size()[0] == 0 else contextlib.nullcontext():
        record = RunRecord(out, run_state["step"], options)
        if run_state["step"] >= steps:
            log(f"{out}: this run is finished; --resume --steps N with N above {steps} goes on")
        train_steps(
            lm,
            optimizer,
            batches,
            val_examples,
            weights,
            steps,
            run_state,
            options,
            record,
            notices,
        )
    figures = run_state.get("figures") or {}
    if rank_and_world_size()[0] == 0:
        result = "  ".join(f"{format_figure(value)} {name}" for name, value in figures.items())
        result = f"{result or 'nothing was held back'}; {run_state['step']} steps in {format_duration(record.spent())}"
        print(f"{out / 'best'}: {result}", flush=True)
    return lm.eval(), run_state


def describe_rows(rows: list, val_rows: list, options: TrainOptions) -> str:
    """The task, the rows, and what there is to learn. Raises Error where that is one class only."""
    every = rows + val_rows
    task = options.task
    text = f"{task}: {len(rows):,} rows to train on, {len(val_rows):,} to validate on"
    labels = [row["label"] for row in every if "label" in row]
    tags = [tag for row in every for tag in row.get("tags", ())]
    if labels and isinstance(labels[0], float):
        return f"{text}; regression, from {min(labels):g} to {max(labels):g}"
    if labels or tags:
        several = any(isinstance(label, (list, dict)) for label in labels)
        counts = Counter(tags)
        for label in labels:
            counts.update([label] if isinstance(label, str) else label)
        require(
            several or len(counts) > 1,
            f"--task {task}: one {'tag' if tags else 'class'} only ({', '.join(counts)}), expected two or more",
        )
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(20))
        more = f", and {len(counts) - 20} more" if len(counts) > 20 else ""
        text += f"; {len(counts)} {'tags' if tags else 'labels' if several else 'classes'}: {shown}{more}"
        cases = {}
        for name in counts:
            cases.setdefault(name.lower(), []).append(name)
        alike = [" and ".join(names) for names in cases.values() if len(names) > 1]
        if alike:
            text += f"; they differ in case only: {', '.join(alike)}"
        return text
    if "messages" in every[0]:
        return f"{task}: {len(rows):,} conversations to train on, {len(val_rows):,} to validate on"
    if set(every[0]) == {"text"}:
        sizes = (sum(len(row["text"]) for row in part) for part in (rows, val_rows))
        return "{}: {:,} characters to train on, {:,} to validate on".format(task, *sizes)
    return text


def describe_cuts(options: TrainOptions, *parts: tuple[list, list]) -> list[str]:
    """How many texts are longer than a block, of rows and their examples."""
    total = cut = left_out = divided = 0
    for rows, examples in parts:
        if not isinstance(examples, list):  # a stream of tokens
            continue
        total += len(rows)
        left_out += len(rows) - len({example["number"] for example in examples})
        cut += len({example["number"] for example in examples if example.get("cut")})
        divided += len({example["number"] for example in examples if example.get("divided")})
    lines = []
    if cut + left_out:
        size = f"--block {options.block}"
        lines.append(f"{cut + left_out:,} of {total:,} texts are longer than {size} and are cut")
    if left_out:
        lines[0] += f", {left_out:,} of them before anything to learn: left out"
    if divided:
        lines.append(
            f"the answers to {divided:,} of {total:,} questions are in no window of --block {options.block} as a whole: "
            "nothing is learnt of them"
        )
    return lines


def keep_memory():
    """Tells glibc to keep freed memory: on a CPU, new pages in every step would take up to a fifth of the time."""
    # Other C libraries have no mallopt.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        for parameter in (-1, -3):
            ctypes.CDLL(None).mallopt(parameter, 2**30)


def train_steps(
    lm,
    optimizer,
    batches: Batches,
    val_examples: list,
    weights: Tensor | None,
    steps: int,
    run_state: dict,
    options: TrainOptions,
    record: RunRecord,
    notices: list[str],
):
    """The loop, from the step after the last one done to the end. Raises KeyboardInterrupt where it is interrupted, once
    `last` is saved."""
    every = options.eval_every or min(batches.per_epoch, steps)
    best, last = (Path(options.out) / name for name in ("best", "last"))
    peaks = [group["lr"] for group in optimizer.param_groups]
    stop = False
    rank, world = rank_and_world_size()
    progress = Progress(lm, steps, run_state["step"])
    log_every = max(steps // 1000, 16 if lm.device.type == "cuda" else 1)
    with interruptible() as interrupted:
        while run_state["step"] < steps and not (stop or out_of_patience(run_state, options)):
            torch.manual_seed(options.seed * 1_000_003 + run_state["step"] + 2**40 * rank)
            batch = batches.draw(run_state["step"])
            scale = lr_multiplier(run_state["step"], steps, options)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * scale
            loss = train_step(
                lm, optimizer, batch, options.clip, options.accumulate, options.bf16, weights
            )
            run_state["step"] += 1
            step = run_state["step"]
            due = step % every == 0 or step == steps
            logged = due or step % log_every == 0
            # Reading the loss waits for the GPU.
            if logged or step % 16 == 0 or not loss.is_cuda:
                check_loss(loss.item(), step)
                flag_set = loss.new_tensor(interrupted.is_set())
                stop = bool(all_reduce(flag_set, world, "MAX"))
            progress.line(step, loss, options.lr * scale, batch["input_ids"].numel() * world)
            row = {}
            if logged:
                row = dict(loss=loss.item(), lr=options.lr * scale, adam_lr=options.adam_lr * scale)
                row["tokens_per_second"] = round(progress.speed())
            if due:
                better, figures = validate(lm, val_examples, run_state, options)
                row |= {"validation": figures} if figures else {}
                if better:
                    save(best, lm, options)
                show_sample(lm, val_examples, options, step, record)
            if row:
                record.add(step, row)
            if due or stop:
                save(last, lm, options, optimizer, run_state)
                record.flush()
                finished = stop or step == steps or out_of_patience(run_state, options)
                write_card(best, lm, options, run_state, record, notices, finished)
    if stop or interrupted.is_set():
        raise KeyboardInterrupt(describe_stop(run_state, steps, options) if rank == 0 else "")
    if run_state["step"] < steps:
        log(
            f"stopped at step {run_state['step']}: no better validation in the last {run_state['stale']}"
        )


def describe_stop(run_state: dict, steps: int, options: TrainOptions) -> str:
    """A line for an interrupted run: what is saved where, and the command that goes on."""
    out = Path(options.out)
    best = "before the first validation"
    if "best_step" in run_state:
        best = f"{out / 'best'} is of step {run_state['best_step']:,}"
    text = f"stopped at step {run_state['step']:,} of {steps:,}, {best}; {out / 'last'} is saved"
    if run_state["step"] < steps:
        data = "" if run_state["place"] else "DATA "
        text += f"; `tinylm train {data}--resume --out {shlex.quote(options.out)}` goes on"
    return text


def lr_multiplier(step: int, steps: int, options: TrainOptions) -> float:
    """The learning rate as a share of its peak: warmup-stable-decay, linear at both ends."""
    return min(
        1.0,
        (step + 1) / max(options.warmup * steps, 1),
        (steps - step) / max(options.decay * steps, 1),
    )


def check_loss(loss: float, step: int):
    """Raises Error for a loss that is no number, before anything is saved."""
    require(
        math.isfinite(loss),
        f"step {step}: the loss is {loss}, and what was saved before is kept; expected a "
        "number (try a lower --lr and --adam-lr)",
    )


def figures_of_few(lm: TinyLM, val_examples, options: TrainOptions) -> dict:
    """The figures that a validation will have: those of an example, of questions one with an answer and one without."""
    few = [val_examples[0]]
    if options.task == "qa":
        few = [*{bool(example["row"]["answer"]): example for example in val_examples}.values()]
    quiet = QUIET.set(True)
    try:
        return TASKS[options.task].figures(lm, few, len(few))
    finally:
        QUIET.reset(quiet)


# Validations without a better one that a run has at least, as long as all of them give the same figure.
MIN_PATIENCE = 5


def out_of_patience(run_state: dict, options: TrainOptions) -> bool:
    """A figure that has always been the same, such as the accuracy of a model that says the most frequent class, shows
    nothing yet: the loss alone, which falls slowly and unevenly there, gets more time."""
    at_least = 0 if run_state.get("moved", True) else MIN_PATIENCE
    return 0 < options.patience and run_state["stale"] >= max(options.patience, at_least)


def chosen_figure(figures: dict, options: TrainOptions) -> str:
    """The name of the figure that `best` and --patience go by."""
    if not options.metric:
        weighted = options.class_weights and "macro F1" in figures
        return "macro F1" if weighted else next(iter(figures))
    plain = [re.sub(r"\W|_", "", name).lower() for name in (options.metric, *figures)]
    expected = f"expected one of {', '.join(figures)}"
    require(plain[0] in plain[1:], f"--metric {options.metric}: {expected}")
    return [*figures][plain.index(plain[0], 1) - 1]


def merit(figures: dict, options: TrainOptions) -> tuple[float, float]:
    """What validations are compared by, more is better: the chosen figure, and the loss, which decides between equal
    ones, such as the F1 of a model that finds nothing yet. A figure that is none is the worst."""
    name = chosen_figure(figures, options)
    loss = next((loss for loss in LOSSES if loss in figures), name)

    def signed(name: str) -> float:
        value = figures[name]
        if value is None or math.isnan(value):
            return -math.inf
        return -value if name in LOWER_IS_BETTER else value

    return signed(name), signed(loss)


def validate(
    lm: TinyLM, val_examples: list, run_state: dict, options: TrainOptions
) -> tuple[bool, dict]:
    """Returns (whether this validation is the best so far, its figures)."""
    better = True
    figures = {}
    if not val_examples:
        run_state["best_step"] = run_state["step"]
    else:
        figures = TASKS[options.task].figures(lm, val_examples, options.batch)
        best = run_state.get("figures")
        figure = figures[chosen_figure(figures, options)]
        run_state.setdefault("first", figure)
        run_state["moved"] = run_state.get("moved", False) or figure != run_state["first"]
        better = not best or merit(figures, options) > merit(best, options)
        if better:
            run_state |= dict(stale=0, figures=figures, best_step=run_state["step"])
        else:
            run_state["stale"] += 1
        shown = "  ".join(f"{format_figure(value)} {name}" for name, value in figures.items())
        log(f"step {run_state['step']}  validation {shown}" + "  best" * better)
    return better, figures


def show_sample(
    lm: TinyLM, val_examples: list, options: TrainOptions, step: int, record: RunRecord
):
    """Prints what a language model writes: its answer in the first conversation to validate on, or what follows the first
    token of the text to validate on. It stops when the time for samples is used up (see `RunRecord.extra`)."""
    if options.task != "lm" or not val_examples or rank_and_world_size()[1] > 1 or QUIET.get():
        return
    with record.extra() as seconds:
        deadline = time.monotonic() + seconds
        if seconds < 0.1:
            return
        lm.eval()
        row = val_examples[0].get("row", {})
        if "messages" in row:
            roles = [message.get("role") for message in row["messages"]]
            prompt = row["messages"][: roles.index("assistant")]
            text = "".join(f"{m['role']}: {str(m.get('content'))[:200]}\n" for m in prompt[-1:])
            text += "assistant: "
        else:
            prompt = text = lm.tokenizer.decode(val_examples[0]["input_ids"][:1])
        begun = text
        # A prompt may have more tokens than the model has positions, or be none for the template.
        with contextlib.suppress(Error, onnxlm.Error):
            if "messages" in row:
                variables = row.get("variables", {})
                pieces = lm.chat(prompt, row.get("tools"), variables, max_new_tokens=120)
            else:
                pieces = lm.stream(prompt, 120, temperature=0.8, top_p=0.95, seed=step)
            for piece in pieces:
                text += piece
                if time.monotonic() > deadline:
                    text += " ..."
                    break
        if text != begun:
            log("  | " + text.replace("\n", "\n  | "))


@contextlib.contextmanager
def interruptible():
    """Yields an event that the first Ctrl-C or SIGTERM sets. The second one raises KeyboardInterrupt at once."""
    event = threading.Event()
    # signal -> its former handler
    before = {}

    def handle(number, _):
        signal.signal(number, signal.default_int_handler)
        event.set()
        if rank_and_world_size()[0] == 0 and not QUIET.get():
            # print is not reentrant, and the handler may run within one
            with contextlib.suppress(OSError):
                text = "stopping after this step; once more stops at once, without saving\n"
                os.write(2, ("\n" * sys.stderr.isatty() + text).encode())

    # Python lets only the main thread set handlers.
    if threading.current_thread() is threading.main_thread():
        before = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
# The model shipped beside this file.
WEIGHTS = Path(__file__).resolve().parent / "weights"


def add_options(parser, owner, *names: str, shown: dict | None = None, **defaults):
    """Adds the fields of a dataclass, or those named, as options of a command. Options that are not given are absent
    from the result. `shown`: defaults that the help names and that are filled in later."""
    for f in fields(owner):
        if f.name in names or not names:
            hint = get_type_hints(owner)[f.name]
            # `int | None` is read as int, choices as the type of the first
            while get_args(hint):
                hint = get_args(hint)[0]
            kind = hint if isinstance(hint, type) else type(hint)
            reading = dict(type=kind, metavar=f.name.upper())
            if kind is bool:
                reading = dict(action="store_true")
            default = defaults.get(f.name, f.default)
            default = (shown or {}).get(f.name) if default is None else default
            text = f.metadata.get("help", "")
            if default is not None and default is not False and default != "":
                text += f" (default: {default})"
            given = defaults.get(f.name, argparse.SUPPRESS)
            parser.add_argument(flag(f.name), default=given, help=text, **reading)


def make_parser(defaults: dict | None = None) -> argparse.ArgumentParser:
    """The command line. `defaults`: those that the help names for options of `train` that are filled in later."""
    parser = argparse.ArgumentParser(
        prog="tinylm", description="Train and fine-tune language models, run them and ship them."
    )
    parser.add_argument("--version", action="version", version=f"tinylm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser(
        "train", help="train a model from scratch, or fine-tune one, for a task"
    )
    sub.add_argument(
        "data",
        nargs="?",
        help=".txt, .jsonl, .json, .csv, .tsv, .parquet, CoNLL, each .gz too; a folder of these; or - for standard "
        "input. With --resume it may be left out",
    )
    add_options(sub, TrainOptions, shown=defaults)
    sub.add_argument(
        "--resume",
        action="store_true",
        help="go on where --out/last stopped, with its data and options",
    )

    sub = commands.add_parser("eval", help="evaluate a checkpoint on data")
    sub.add_argument("folder", help="a checkpoint")
    sub.add_argument("data", help="as for train")
    add_options(
        sub,
        TrainOptions,
        *(*datafiles.COLUMNS, "label_names", "max_answer_length"),
        *("delimiter", "encoding", "batch", "block", "device"),
    )
    onnxlm.add_precision(sub, "evaluate the graph of an exported folder")
    sub.add_argument("--json", action="store_true", help="print the figures as JSON")
    sub.add_argument(
        "--confusion", action="store_true", help="print the confusion matrix of the classes too"
    )

    sub = commands.add_parser(
        "run", help="use a checkpoint: labels, tags, answers, texts or embeddings, by its head"
    )
    onnxlm.add_run_options(sub, "run the graph of an exported folder")
    add_options(sub, TrainOptions, "delimiter", "encoding", "device")

    sub = commands.add_parser("sample", help="continue a prompt")
    sub.add_argument(
        "folder", nargs="?", default=str(WEIGHTS), help="a checkpoint (default: the shipped one)"
    )
    sub.add_argument("--prompt", default="ROMEO:", help="text to continue (default: ROMEO:)")
    add_generation_options(sub, max_new_tokens=300, temperature=0.8, top_p=0.95)

    sub = commands.add_parser("chat", help="talk with an instruction-tuned model")
    sub.add_argument("folder", help="a checkpoint with a chat template")
    sub.add_argument("--system", help="the system message")
    sub.add_argument(
        "--set",
        action="append",
        type=template_variable,
        metavar="NAME=VALUE",
        help="a variable of the chat template, such as enable_thinking=false; may be given again",
    )
    add_generation_options(sub, max_new_tokens=512)

    commands.add_parser("export", help="turn a checkpoint into ONNX graphs, by export.py")
    return parser


def add_generation_options(parser, **defaults):
    names = """max_new_tokens temperature top_k top_p min_p repetition_penalty
        prompt_lookup_num_tokens""".split()
    add_options(parser, GenerationConfig, *names, **defaults)
    parser.add_argument("--stop", action="append", help="end before this text; may be given again")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--compile", action="store_true", help="torch.compile the decode step")
    add_options(parser, TrainOptions, "device")


def template_variable(text: str) -> tuple[str, object]:
    """Splits NAME=VALUE; the value is read as JSON if it is JSON."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=VALUE")
    with contextlib.suppress(ValueError):
        return name, json.loads(value)
    return name, value


def main(argv: list | None = None) -> int:
    """`tinylm train | eval | run | sample | chat | export`. Returns the exit status: 1 for an Error, which is one line on
    stderr, 130 for an interruption."""
    onnxlm.use_utf8()
    argv = sys.argv[1:] if argv is None else [*map(str, argv)]
    if argv[:1] == ["export"]:
        return export_command().main(argv[1:])
    if argv and argv[0] not in COMMANDS and (argv[0] == "-" or not argv[0].startswith("-")):
        # `train.py my.txt`
        argv = ["train", *argv]
    parser = make_parser(defaults_of(argv) if {"-h", "--help"} & set(argv) else None)
    known, more = parser.parse_known_args(argv)
    options = vars(known)
    if more and (
        known.command != "run" or any(text.startswith("-") and text != "-" for text in more)
    ):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        # inputs after options
        options["inputs"] += more
    try:
        with onnxlm.plain_warnings("tinylm"):
            COMMANDS[options.pop("command")](options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe.
        onnxlm.close_stdout()
        return 141
    except (Error, onnxlm.Error, OSError) as error:
        onnxlm.print_status(f"tinylm: error: {error}")
        return 1
    except KeyboardInterrupt as interruption:
        if str(interruption):
            onnxlm.print_status(f"tinylm: {interruption}")
        return 130
    return 0


def defaults_of(argv: list[str]) -> dict:
    """The defaults that the help of `train` names: those of the task and the start (from scratch, --init, --lora) in the
    arguments; if they name no start, those of each."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--task", default="lm")
    parser.add_argument("--init", default="")
    parser.add_argument("--lora", default="0")
    given, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    task = given.task if given.task in TASKS else "lm"
    lora = int(given.lora) if given.lora.isdecimal() else 0
    starts = {
        "from scratch": TrainOptions(task=task),
        "with --init": TrainOptions(task=task, init="x"),
        "with --lora": TrainOptions(task=task, init="x", lora=1),
    }
    if given.init or lora:
        start = starts["with --lora" if lora else "with --init"]
        return asdict(start.filled()) | {"init": "", "lora": 0}
    found = {}
    for start, options in starts.items():
        for name in STARTS["scratch"] | STARTS["init"]:
            value = getattr(options.filled(), name)
            values = found.setdefault(name, {})
            if value is not None and (start != "with --lora" or values.get("with --init") != value):
                values[start] = value
    return {name: one_or_each(values) for name, values in found.items()}


def one_or_each(values: dict):
    """The value that all starts have, or each with its start."""
    if {"from scratch", "with --init"} <= values.keys() and len({*values.values()}) == 1:
        return values["from scratch"]
    return ", ".join(f"{value} {start}" for start, value in values.items())


def export_command():
    """The module export.py, in a clone or as installed."""
    return importlib.import_module(".export" if __package__ else "export", __package__)


def run_train(options: dict):
    data, resume = options.pop("data"), options.pop("resume")
    last = Path(options.get("out", TrainOptions.out)) / "last"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0":
        # torchrun has started the processes again after a fault
        resume |= (last / "training.safetensors").exists()
        options |= {"overwrite": True}
    if resume:
        options = resumed_options(last, options)
    options = TrainOptions(**options)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # under torchrun
        cuda = usable_device(options.device).type == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, size = next(dist.rendezvous("env://"))
        # Keys of their own, so that nothing is found of the processes before a restart.
        store = dist.PrefixStore(restarts, store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
        if rank > 0:
            warnings.simplefilter("ignore")
    try:
        train_model(data, options, resume)
    finally:
        if rank_and_world_size()[1] > 1:
            dist.destroy_process_group()


def opened(options: dict) -> TinyLM:
    """Opens the checkpoint that a command names, or with --precision its graph."""
    folder = pretrained.find_checkpoint(options.pop("folder"))
    device, precision = options.pop("device", None), options.pop("precision", None)
    if precision is None:
        return open_checkpoint(folder, device)
    return ExportedLM(folder, precision, PROVIDERS.get(device))


# Device -> ONNX Runtime's providers.
PROVIDERS = {"cpu": [onnxlm.CPU], "cuda": [onnxlm.CUDA]}


def open_checkpoint(folder: Path, device=None) -> TinyLM:
    """Opens a checkpoint in eval mode with its tokenizer and what its training left. Raises Error without a tokenizer."""
    require(
        any(folder.glob("*.safetensors*")) or not (folder / "onnx").is_dir(),
        f"{folder}: no model.safetensors, graphs only; `eval` and `run` take them with --precision",
    )
    head = None if onnxlm.is_embedder(folder) else "config"
    lm = TinyLM.from_pretrained(folder, device=usable_device(device), head=head)
    require(lm.tokenizer, f"{folder / 'tokenizer.json'}: no such file")
    lm.folder, lm.remembered = folder, onnxlm.remembered(folder)
    return lm


class Evaluation:
    """Data of a model's task, read as in its training, to evaluate the model and its graphs on.

    data: see `read_rows`; a folder is read from its test split. given: fields of TrainOptions. Raises Error for a model
    without a task, and for data that does not fit it.
    """

    def __init__(self, lm: TinyLM, data, **given):
        name = task_of(lm.config)
        folder = getattr(lm, "folder", "the model")
        require(name in TASKS, f"{folder}: expected a model with a task's head")
        self.task = TASKS[name]
        known = dict(getattr(lm, "remembered", {}))
        settings = {key: value for key, value in known.items() if key in REMEMBERED}
        settings = {key: value for key, value in settings.items() if key not in datafiles.COLUMNS}
        settings |= dict(regression=lm.config.problem_type == "regression", task=name)
        settings["classes"] = not settings["regression"]
        if "block" not in settings and name not in ("lm", "mlm"):
            settings["block"] = max(onnxlm.TASKS[name](TorchRunner(lm)).limit, 8)
        self.options = TrainOptions(**settings | given).filled()
        # The readers take their limits from it.
        self.remembered = known | {"block": self.options.block}
        if self.options.max_answer_length:
            self.remembered["max_answer_length"] = self.options.max_answer_length
        splits = ("test", "validation", "train")
        self.rows = datafiles.read_rows(data, self.options, splits, known=known)
        self.examples = self.task.epochs(lm, self.rows, self.options.block)(None)
        require(len(self.examples), f"{data}: nothing to evaluate")
        if isinstance(self.examples, list):
            cut = sum(example.get("cut", False) for example in self.examples)
            most = limit(lm, self.options.block)
            if cut:
                log(onnxlm.cut_notice(cut, len(self.rows), most, lm.tokenizer))

    def report(self, lm: TinyLM) -> dict:
        """Returns name -> figure, with tables and what takes longer (BLEU)."""
        lm.remembered = self.remembered
        return self.task.report(lm, self.examples, self.options.batch)

    def figures(self, lm: TinyLM) -> dict:
        """Returns name -> figure, as a validation in training does."""
        lm.remembered = self.remembered
        return self.task.figures(lm, self.examples, self.options.batch)

    def decisions(self, lm: TinyLM) -> list | None:
        """Returns the prediction of `run` for each row, without scores; None for a task that predicts numbers or
        tokens, where no two models agree exactly."""
        if isinstance(self.task, LanguageModelling) or lm.config.problem_type == "regression":
            return None
        lm.remembered = self.remembered
        reader = onnxlm.TASKS[task_of(lm.config)](TorchRunner(lm))
        texts, pairs = zip(*map(self.task.text_and_pair, self.rows))
        with progress_bar(None, "running", len(texts)) as bar:
            found = onnxlm.read_all(reader, texts, pairs, self.options.batch, bar.update)
        return [without_scores(reader.cells(result)["prediction"]) for result in found]


def without_scores(prediction):
    if isinstance(prediction, list) and prediction and isinstance(prediction[0], dict):
        return [{name: x for name, x in part.items() if name != "score"} for part in prediction]
    return sorted(prediction) if isinstance(prediction, list) else prediction


def run_eval(options: dict):
    lm = opened(options)
    as_json, confusion, data = (options.pop(name) for name in ("json", "confusion", "data"))
    figures = Evaluation(lm, data, **options).report(lm)
    if not confusion:
        figures.pop("confusion", None)
    if as_json:
        print(strict_json(figures))
        return
    for name, figure in figures.items():
        if isinstance(figure, dict):
            print(f"\n{name}")
            print(*table_lines(figure), sep="\n")
        else:
            print(f"{name}  {format_figure(figure)}")


def table_lines(table: dict[str, dict]) -> list[str]:
    """Rows of numbers, by name, under the names of their columns."""
    columns = [*next(iter(table.values()))]
    rows = [["", *columns]]
    for name, values in table.items():
        cells = [f"{x:.4f}" if isinstance(x, float) else str(x) for x in values.values()]
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def run_run(options: dict):
    """Prints a line of results for each input, or writes the file --out."""
    lm = opened(options)
    model = lm.graph if isinstance(lm, ExportedLM) else TorchRunner(lm, lm.folder)
    reading = {name: options.pop(name, "") for name in ("delimiter", "encoding")}
    notices = []

    def rows(path: Path, columns: dict):
        if path.suffix.lower() == ".txt":  # a text in each line
            return onnxlm.input_rows(model, onnxlm.file_records(path), columns)
        data = run_options(model, columns, **reading)
        return input_rows(model, datafiles.file_records(path, data, path, notices), data)

    tables = onnxlm.TABLES | {".parquet": datafiles.open_parquet}
    bar = functools.partial(progress_bar, None, "running")
    onnxlm.run_command(model, rows=rows, tables=tables, bar=bar, **options)
    for line in notices:
        log(line)


def run_options(model, columns: dict, **more) -> datafiles.DataOptions:
    """Options to read rows for a prediction; columns: option -> column or None."""
    columns = {name: column for name, column in columns.items() if column}
    # Rows to embed are texts, as those of masked language modelling.
    task = "mlm" if model.task == "embed" else model.task
    return datafiles.DataOptions(task=task, **columns, **more)


def input_rows(model, records: Iterable, options: datafiles.DataOptions) -> Iterable:
    """Yields (record, text, pair) for each (place, record), see `onnxlm.input_rows`. Columns are chosen by the first
    record."""
    records = iter(records)
    first = [*itertools.islice(records, 1)]

    def view(record):
        """Joins alpaca's instruction and input to one source, even if the record has no output yet."""
        if options.task != "seq2seq" or not isinstance(record, dict):
            return record
        return datafiles.from_instruction({"output": ""} | record, options)

    columns = {}
    for place, record in first:
        chosen = datafiles.choose_columns(
            place, view(record), options, model.remembered, inputs=True
        )
        columns = datafiles.by_option(chosen)
    return onnxlm.input_rows(model, itertools.chain(first, records), columns, view)


def predict(
    model: TinyLM | str | Path, texts, pairs=None, batch: int = 32, device=None, **options
) -> list[list[dict]]:
    """Returns what `OnnxLM.run` returns, computed in torch: for each text (and its pair) a list of dicts, the likeliest
    first.

    model: a TinyLM, or a checkpoint by its folder or its name on the hub. texts: a text, a list of texts, or rows (dicts
    or a pandas DataFrame). Rows are read from the columns of the training, or from those that the options text, pair,
    question and context name; a row without a text gets an empty list. pairs: a list, or one pair for all texts.
    options: those of the task's reader, such as max_new_tokens. Raises Error for a missing column or a value that is no
    text.
    """
    lm = model
    if not isinstance(model, TinyLM):
        lm = open_checkpoint(pretrained.find_checkpoint(model), device)
    runner = TorchRunner(lm, getattr(lm, "folder", None))
    names = ("text", "pair", "question", "context")
    columns = {name: options.pop(name) for name in names if name in options}
    if isinstance(texts, str) or not hasattr(texts, "iterrows"):
        texts = [texts] if isinstance(texts, str) else [*texts]
        if not any(isinstance(text, dict) for text in texts):
            require(not columns, f"{', '.join(columns)}: columns, expected with rows")
            return onnxlm.run(runner, texts, pairs, batch, **options)
    require(pairs is None, "pairs: expected none with rows, whose columns have them")
    data = run_options(runner, columns)
    rows = [*input_rows(runner, datafiles.numbered(texts), data)]
    there = [(text, pair) for _, text, pair in rows if text is not None]
    texts, pairs = ([*part] for part in zip(*there)) if there else ([], [])
    found = iter(onnxlm.run(runner, texts, pairs, batch, **options))
    return [[] if text is None else next(found) for _, text, _ in rows]


def run_sample(options: dict):
    lm = opened(options)
    prompt = options.pop("prompt")
    pieces = iter(lm.stream(prompt, **options))
    # An error, as of an option out of range, comes before anything is printed.
    first = next(pieces, "")
    print_pieces(itertools.chain((prompt, first), pieces))


CHAT_COMMANDS = "/reset starts over, /system TEXT starts over with that system message, /exit ends"


def run_chat(options: dict):
    """Reads questions from standard input, one a line, and prints the answers. Ctrl-C ends an answer."""
    lm = opened(options)
    system = options.pop("system")
    variables = dict(options.pop("set") or ())
    messages = system_messages(system)
    interactive = sys.stdin.isatty()
    if interactive:
        # With readline, `input` can edit its line and has a history. Windows has none.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print(CHAT_COMMANDS, file=sys.stderr)
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except EOFError:
            return
        command, _, text = question.partition(" ")
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            system = text.strip() if command == "/system" else system
            messages = system_messages(system)
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                answer = print_pieces(
                    lm.chat(messages, variables=variables, **options), interruptible=True
                )
                messages.append({"role": "assistant", "content": answer})
            except Error as error:
                # such as a conversation that is too long
                print(f"{error}; {CHAT_COMMANDS}", file=sys.stderr)
                messages.pop()
                if not interactive:
                    raise


def system_messages(text: str | None) -> list[dict]:
    return [{"role": "system", "content": text}] if text else []


def print_pieces(pieces, interruptible: bool = False) -> str:
    """Prints pieces of text as they come, to the end or, if interruptible, until Ctrl-C. Returns the text."""
    text = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        if not interruptible:
            raise
    print()
    return text


COMMANDS = {
    "train": run_train,
    "eval": run_eval,
    "run": run_run,
    "sample": run_sample,
    "chat": run_chat,
}
if __name__ == "__main__":
    sys.exit(main())
