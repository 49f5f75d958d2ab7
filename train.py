"""The programs around tinylm.py: train and fine-tune on plain files, evaluate, run, sample, chat.

python train.py my.txt --steps 1000              # the same as `train.py train my.txt`
python train.py eval | run | sample | chat ...   # `python train.py --help`
"""

from __future__ import annotations

import argparse
import array
import codecs
import contextlib
import csv
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
import shutil
import signal
import string
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

try:
    import fcntl
except ImportError:  # Windows, where nothing locks a folder
    fcntl = None

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinylm import (
    FAMILIES,
    LIMITED,
    Block,
    ByteTokenizer,
    Config,
    Count,
    Dropout,
    Error,
    GenerationConfig,
    Linear,
    MuonAdamW,
    Rate,
    Size,
    TinyLM,
    Tokenizer,
    Transposed,
    __version__,
    all_reduce,
    check,
    config_from_hf,
    full_tensor,
    fused_sizes,
    label_weight,
    loss_sum,
    open_tensors,
    rank_and_world_size,
    read_json,
    require,
    shard_like,
    sources,
    target_labels,
    to_checkpoint,
    tokenizer_config,
    train_step,
    usable_device,
    write_file,
    write_json,
    write_tensors,
)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------
def option(default, help: str):
    """A field of TrainOptions, and what the command line says of it."""
    return field(default=default, metadata=dict(help=help))


@dataclass(frozen=True)
class TrainOptions:
    """Options of `tinylm.py train`; the command line is made of these fields. None is what `TASKS` and `STARTS` say."""

    task: Literal[TRAINABLE] = option("lm", "lm, classify, tokens, qa, seq2seq or mlm")
    init: str = option("", "checkpoint to fine-tune; without one, a model from scratch")
    out: str = option("out", "folder for the checkpoints `best` and `last`")
    val: str = option(
        "", "file to validate on; without one, the last tenth of the data (of each class)"
    )
    text: str = option(
        "", "column of the text, of its words, or of the source; by default its usual name"
    )
    label: str = option(
        "", "column of the label, a list of labels, a number, or a tag for each word"
    )
    target: str = option("", "column of the text to write")
    question: str = option("", "column of the question")
    context: str = option("", "column of the text that has the answer")
    size: Literal[(*SIZES, None)] = option(None, "pico, nano, small, medium or large, from scratch")
    epochs: Annotated[float, 1e-6, 1e6] | None = option(
        None, "passes over the data, in place of --steps"
    )
    steps: Size | None = option(None, "optimizer steps")
    batch: Size | None = option(None, "sequences per step")
    block: Annotated[int, 8, 2**31] = option(256, "tokens per sequence, at most")
    vocab: Count | None = option(None, "train a byte-level BPE of this many tokens; 0: bytes")
    lr: Rate | None = option(
        None, "peak learning rate of Muon (matrices); in fine-tuning, of the body"
    )
    adam_lr: Rate | None = option(None, "that of AdamW (all else); in fine-tuning, of a new head")
    weight_decay: Annotated[float, 0, 1e3] | None = option(None, "of the matrices")
    dropout: Dropout | None = option(None, "of embeddings and sub-layers; else as the config says")
    warmup: Dropout | None = option(None, "share of the steps in which the rates rise")
    decay: Dropout | None = option(
        None, "share of the steps in which they fall to zero, at the end"
    )
    clip: Rate = option(1.0, "largest norm of the gradient")
    accumulate: Size = option(1, "parts in which a step's batch is run, to save memory")
    parallel: Literal["fsdp", "ddp"] = option(
        "fsdp", "under torchrun: fsdp (each process has a part of the weights) or ddp (has all)"
    )
    checkpoint: bool = option(False, "run each layer again in the backward pass, to save memory")
    lora: Annotated[int, 0, 2**16] = option(
        0, "train adapters of this rank and a new head only; saved merged, and for PEFT"
    )
    freeze: str = option(
        "",
        "what stays as it is: embeddings, body (all but the head), or them and the first N layers",
    )
    class_weights: bool = option(False, "rare classes count as much as frequent ones")
    patience: Count = option(0, "stop after so many validations without a better one; 0: never")
    eval_every: Size | None = option(
        None, "steps between validations and checkpoints; else an epoch's"
    )
    seed: Count = option(0, "of weights, data order and dropout")
    device: str = option("", "cpu, cuda, ...; cuda where there is one")
    bf16: bool = option(False, "bfloat16 autocast on the CPU too (on CUDA it is always on)")
    compile: bool = option(False, "torch.compile the model")

    def __post_init__(self):
        check(self, flag)
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
        said = STARTS[start] | getattr(TASKS[self.task], start, {})
        given = {name: value for name, value in asdict(self).items() if value is not None}
        length = {"steps", "epochs"}
        said = {
            name: value
            for name, value in said.items()
            if name not in length or not length & set(given)
        }
        options = replace(self, **said | given)
        require(
            options.batch % (rank_and_world_size()[1] * options.accumulate) == 0,
            f"--batch {options.batch}: expected a multiple "
            f"of --accumulate {options.accumulate} (times {rank_and_world_size()[1]} processes)",
        )
        return options


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
NEW_HEADS = ("classify", "tokens", "qa")  # heads that fine-tuning begins at random


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers, adapters, sharding
# ---------------------------------------------------------------------------------------------------------------------
def make_optimizer(lm: TinyLM, options: TrainOptions) -> torch.optim.Optimizer:
    """Muon and AdamW from scratch; in fine-tuning AdamW, with one rate for what was pretrained and another for a new
    head, where only matrices decay."""
    require(
        any(p.requires_grad for p in lm.parameters()),
        f"--freeze {options.freeze}: nothing is left to train",
    )
    if not options.init:
        return MuonAdamW(lm, options.lr, options.adam_lr, options.weight_decay)
    groups = {}
    for name, p in lm.named_parameters():
        if p.requires_grad:
            rate = (
                options.adam_lr
                if name.startswith("head.") and lm.config.head in NEW_HEADS
                else options.lr
            )
            groups.setdefault((rate, options.weight_decay if p.ndim == 2 else 0.0), []).append(p)
    return torch.optim.AdamW(
        [
            dict(params=params, lr=rate, weight_decay=decay)
            for (rate, decay), params in groups.items()
        ],
        fused=True,
    )


def sharded(lm: TinyLM, parallel: str = "fsdp"):
    """Spread a model over all processes: fsdp shards its weights, gradients and the optimizer's state, ddp keeps a copy
    on each (shards over one process each). The state dict stays the plain model's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape, cuda = (
        (rank_and_world_size()[1],) if parallel == "fsdp" else (rank_and_world_size()[1], 1),
        lm.device.type == "cuda",
    )
    mesh = init_device_mesh(
        lm.device.type, shape, mesh_dim_names=("copies", "shards")[-len(shape) :]
    )
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if cuda else MixedPrecisionPolicy()
    if lm.encoder is None:  # behind an encoder, parts of a layer are called by themselves
        for block in lm.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(lm, mesh=mesh, mp_policy=policy)
    lm.register_state_dict_post_hook(
        lambda _, state, *__: state.update(
            {name: full_tensor(x).cpu() for name, x in state.items()}
        )
    )  # one at a time: a device may not hold them all


class LoRA(Linear):
    """A frozen projection, and for each part fused in it a trained one of low rank: W x + 2 B A x (Hu et al. 2021; 2 is
    alpha / rank). Its state dict is the merged projection's, so that a checkpoint needs no adapters."""

    def __init__(self, base: Linear, sizes: tuple, rank: int):
        nn.Module.__init__(self)
        self.weight, self.bias, self.sizes = base.weight, base.bias, sizes
        self.in_features, self.out_features = base.in_features, base.out_features
        self.a = nn.Parameter(
            torch.randn(len(sizes) * rank, base.in_features) * base.in_features**-0.5
        )
        self.b = nn.Parameter(torch.zeros(sum(sizes), rank))

    def parts(self) -> list:
        """(A, B) of each part."""
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
    """Freeze all but a new head, and give every projection of the layers an adapter."""
    for name, p in lm.named_parameters():
        p.requires_grad_(name.startswith("head.") and lm.config.head in NEW_HEADS)
    for name, module in list(lm.named_modules()):
        if isinstance(module, Linear) and "layers." in name:
            fused = len(sources(name + ".weight", lm.config.model_type, lm.config.head)[0]) > 1
            sizes = fused_sizes(name + ".weight", lm.config) if fused else (module.out_features,)
            lm.set_submodule(name, LoRA(module, sizes, rank).to(lm.device))


def save_adapter(folder: Path, lm: TinyLM, options: TrainOptions):
    """adapter_config.json and adapter_model.safetensors as PEFT names them, after the family's own modules."""
    config, tensors, targets, transposed = lm.config, {}, set(), False
    for name, module in lm.named_modules():
        if isinstance(module, LoRA):
            names, kind = sources(name + ".weight", config.model_type, config.head)
            transposed |= kind is Transposed
            for theirs, pair in zip(names, module.parts()):
                theirs = theirs.removesuffix(".weight")
                targets.add(
                    theirs.split(
                        f".{next(part for part in theirs.split('.') if part.isdigit())}.", 1
                    )[1]
                )
                tensors |= {
                    f"{theirs}.lora_{side}.weight": tensor for side, tensor in zip("AB", pair)
                }
    head = {
        f"head.{name}": full_tensor(p) for name, p in lm.head.named_parameters() if p.requires_grad
    }
    head = to_checkpoint(head, config, config.model_type)
    if rank_and_world_size()[0] > 0:
        return
    kinds = {
        "lm": "SEQ_2_SEQ_LM" if config.num_encoder_layers else "CAUSAL_LM",
        "classify": "SEQ_CLS",
        "tokens": "TOKEN_CLS",
        "qa": "QUESTION_ANS",
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
            modules_to_save=sorted(
                {  # PEFT wraps a classifier as one
                    name.partition(".")[0]
                    if name.startswith("classifier.")
                    else name.rpartition(".")[0]
                    for name in head
                }
            )
            or None,
        ),
    )


def freeze(lm: TinyLM, what: str):
    """Keep the embeddings as they are; for a number so many layers of each stack too; for "body" all but the head."""
    layers = 0 if what == "embeddings" else 2**31 if what == "body" else int(what)
    for name, p in lm.named_parameters():
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), -1)
        p.requires_grad_(
            not ("embed" in name or 0 <= layer < layers or what == "body" and parts[0] != "head")
        )


# ---------------------------------------------------------------------------------------------------------------------
# Data: files to rows, rows to examples, examples to batches. A row maps roles (text, label, ...) to values; an example
# is a dict of a model's inputs and labels, one text's, without padding.
# ---------------------------------------------------------------------------------------------------------------------
def as_text(value) -> str:
    value = " ".join(value) if isinstance(value, list) else value
    if not isinstance(value, (str, MappedText)):
        raise TypeError
    return value


def as_label(value):
    """A class's name, a list of them, or a number that is no class: one with a decimal point."""
    if isinstance(value, list):
        return [str(item) for item in value]
    if isinstance(value, str):
        return (
            float(value)
            if value.count(".") == 1 and value.replace(".", "").lstrip("-").isdecimal()
            else value
        )
    return value if isinstance(value, float) else str(int(value))


def as_answers(value) -> list:
    """[(text, where it starts or None)] of SQuAD's answers, of {"text": [...], "answer_start": [...]}, or of texts."""
    if isinstance(value, dict):
        value = [
            {"text": text, "answer_start": start}
            for text, start in zip(value["text"], value["answer_start"])
        ]
    value = [value] if isinstance(value, str) else value
    return [
        (item, None)
        if isinstance(item, str)
        else (as_text(item["text"]), int(item["answer_start"]))
        for item in value
    ]


def as_list(value) -> list:
    return [str(item) for item in (value.split() if isinstance(value, str) else [*value])]


def as_messages(value) -> list:
    return [{name: as_text(message[name]) for name in ("role", "content")} for message in value]


ROLES = {  # role -> (the option that names its column, the usual names, how it reads, what that is)
    "messages": ("", "messages conversations", as_messages, "a list of role and content"),
    "text": (
        "text",
        "text sentence review content sentence1 premise question1 comment tweet",
        as_text,
        "a string",
    ),
    "pair": ("", "sentence2 hypothesis question2", as_text, "a string"),
    "words": ("text", "tokens words text sentence", as_list, "a list of words"),
    "source": ("text", "source text document article dialogue input abstract", as_text, "a string"),
    "label": (
        "label",
        "label labels class category sentiment stars rating score",
        as_label,
        "a label or a list",
    ),
    "tags": ("label", "ner_tags tags pos_tags labels label", as_list, "a list of tags"),
    "target": ("target", "target summary translation tldr highlights output", as_text, "a string"),
    "question": ("question", "question query", as_text, "a string"),
    "context": ("context", "context passage paragraph document text", as_text, "a string"),
    "answer": ("", "answers answer", as_answers, "an answer"),
}
COLUMNS = tuple(dict.fromkeys(option for option, *_ in ROLES.values() if option))
OPTIONAL = ("messages", "pair")
TOKENIZER_ROLES = (
    "text",
    "pair",
    "words",
    "source",
    "target",
    "question",
    "context",
)  # what a tokenizer is trained on
VAL_FRACTION = (
    0.1  # the share of the data that is validated on; of texts at most BIG / 64 characters
)
MMAP_MIN_BYTES = 2**26  # bytes of a text file above which it is not read into memory
PIECE = 2**17  # characters, or bytes, of a text that are tokenised at once


class MappedText:
    """A large file's text, or some bytes of it, that stays on the disk; `tokens` are memory-mapped too."""

    def __init__(self, path: Path, first: int = 0, last: int | None = None):
        self.path, self.size, self.changed = path, path.stat().st_size, path.stat().st_mtime_ns
        self.first, self.last = first, self.size if last is None else last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, part: slice) -> MappedText:
        first, last, _ = part.indices(len(self))
        return MappedText(self.path, self.first + first, self.first + last)

    def __str__(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.first)
            return file.read(len(self)).decode("utf-8", errors="replace")

    def __repr__(self) -> str:  # changes with the file
        return f"{self.path.name} {self.size} {self.changed} {self.first} {self.last}"

    def tokens(self, tokenizer) -> Tensor:
        """Ids (tokens,): of bytes the file's own; else of a file beside it, made once, and again if it is torn."""
        if isinstance(tokenizer, ByteTokenizer):
            return torch.from_file(str(self.path), False, self.size, dtype=torch.uint8)[
                self.first : self.last
            ]
        key = hashlib.sha256(tokenizer.files["tokenizer.json"] + repr(self).encode()).hexdigest()[
            :16
        ]
        cache = self.path.with_name(f".{self.path.name}.{key}.tokens")

        def stored() -> Tensor | None:
            count = cache.stat().st_size // 4 if cache.exists() else 0
            ids = torch.from_file(str(cache), False, count, dtype=torch.int32) if count else None
            return ids[:-1] if count and ids[-1] == count - 1 else None  # it ends with its length

        if rank_and_world_size()[0] == 0 and stored() is None:
            write_file(cache, lambda path: self.tokenise(tokenizer, path))
        if rank_and_world_size()[1] > 1:
            dist.barrier()
        return stored()

    def tokenise(self, tokenizer, path: Path):
        decoder, left, count = codecs.getincrementaldecoder("utf-8")("replace"), len(self), 0

        def pieces():
            nonlocal left
            with open(self.path, "rb") as text:
                text.seek(self.first)
                while left:
                    piece = text.read(min(PIECE, left))
                    left -= len(piece)
                    yield decoder.decode(piece)

        with open(path, "wb") as file:
            for i, ids in enumerate(piecewise(tokenizer, pieces())):
                count += len(ids)
                file.write(ids.tobytes())
                if i % 16 == 0 or not left:
                    print(f"{self.path}: {1 - left / len(self):.0%} tokenised", file=sys.stderr)
            file.write(array.array("i", [count]).tobytes())


def piecewise(tokenizer, pieces):
    """Ids of a long text, an array for each of its pieces: of a whole one at once the library takes 200 bytes for each
    of the text's."""
    pieces = iter(pieces)
    while some := list(itertools.islice(pieces, 16)):
        yield from (array.array("i", ids) for ids in tokenizer.batch(some))


def sliced(text: str):
    return (text[i : i + PIECE] for i in range(0, len(text), PIECE))


class Blocks:
    """Consecutive blocks of a stream of tokens, each made when asked for; `more` tokens of the next go with it."""

    def __init__(self, ids: Tensor, first: int, last: int, step: int, more: int, example: Callable):
        self.ids, self.first, self.last, self.step, self.more, self.example = (
            ids,
            first,
            last,
            step,
            more,
            example,
        )

    def __len__(self) -> int:
        return max(-(-(self.last - self.first) // self.step), 0)

    def __getitem__(self, k: int) -> dict:
        if k >= len(self):
            raise IndexError
        first = self.first + k * self.step
        return self.example(self.ids[first : min(first + self.step, self.last) + self.more].long())


def records(file: Path):
    """(place, record) of a file: of jsonl, csv, tsv, of SQuAD's json, or one of a plain text."""
    if (
        file.suffix not in (".jsonl", ".csv", ".tsv", ".json")
        and file.stat().st_size > MMAP_MIN_BYTES
    ):
        yield str(file), {"text": MappedText(file)}
        return
    content = file.read_text(encoding="utf-8-sig", errors="replace")
    if file.suffix == ".jsonl":
        for n, line in enumerate(
            content.split("\n"), 1
        ):  # at no other end of line: a string may hold U+2028
            if line.strip():
                try:
                    yield f"{file}, line {n}", json.loads(line)
                except (ValueError, RecursionError):
                    raise Error(
                        f"{file}, line {n}: {line[:60]!r}, expected a JSON object"
                    ) from None
    elif file.suffix in (".csv", ".tsv"):
        csv.field_size_limit(2**31 - 1)
        table = csv.DictReader(
            io.StringIO(content, newline=""), delimiter="\t" if file.suffix == ".tsv" else ","
        )
        for record in table:
            require(None not in record, f"{file}, line {table.line_num}: more fields than columns")
            yield f"{file}, line {table.line_num}", record
    elif file.suffix == ".json":
        for article in read_json(file).get("data", ()):
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield (
                        f"{file}, question {question.get('id')}",
                        question | {"context": paragraph["context"]},
                    )
    else:
        yield str(file), {"text": content}


def read_rows(path: Path, options: TrainOptions) -> list:
    """Rows of a file or, sorted by name, of a folder's files, with the roles that the task needs.

    Raises Error where a column is missing or has something else in it.
    """
    suffixes = (".txt", ".md", ".jsonl", ".csv", ".tsv", ".json")
    files = sorted(p for p in path.rglob("*") if p.suffix in suffixes) if path.is_dir() else [path]
    require(files, f"{path}: no {', '.join(suffixes)} file in this folder")
    rows = []
    for file in files:
        try:
            rows += [read_row(where, record, options) for where, record in records(file)]
        except (KeyError, TypeError, AttributeError) as error:
            raise Error(
                f"{file}: expected SQuAD's json: data, paragraphs, qas ({error!r})"
            ) from None
    require(rows, f"{path}: no rows")
    require(
        len({"messages" in row for row in rows}) == 1,
        f"{path}: texts and messages, expected one kind",
    )
    return rows


def read_row(where: str, record, options: TrainOptions) -> dict:
    require(isinstance(record, dict), f"{where}: {str(record)[:60]!r}, expected an object")
    columns, row = {str(name).lower(): name for name in record}, {}
    for role in TASKS[options.task].roles:
        option, names, read, kind = ROLES[role]
        given = getattr(options, option, "")
        column = (
            given
            if given
            else next((columns[name] for name in names.split() if name in columns), None)
        )
        if column is None and (role in OPTIONAL or "messages" in row):
            continue
        require(
            column in record,
            f"{where}: no column {given or ' or '.join(names.split())} for the {role} (columns: "
            f"{', '.join(map(str, record))[:200]})",
        )
        try:
            row[role] = read(record[column])
        except (TypeError, ValueError, KeyError):
            raise Error(
                f"{where}: {column} = {str(record[column])[:60]!r}, expected {kind}"
            ) from None
    return row


def split_rows(rows: list, share: float = VAL_FRACTION) -> tuple[list, list]:
    """Rows before and after the point that leaves `share` of them behind it: of their characters where they are texts,
    of each class where they have one label."""
    if set(rows[0]) == {"text"}:
        total, kept, held = sum(len(row["text"]) for row in rows), [], []
        left = max(int(total * (1 - share)), total - MMAP_MIN_BYTES // 64)
        for text in (row["text"] for row in rows):
            kept += [{"text": text[:left]}] * (left > 0)
            held += [{"text": text[left:]}] * (left < len(text))
            left = max(left - len(text), 0)
        return kept, held
    groups = {}
    for row in rows:
        groups.setdefault(row["label"] if isinstance(row.get("label"), str) else None, []).append(
            row
        )
    cuts = [(group, len(group) - round(len(group) * share)) for group in groups.values()]
    return [row for group, cut in cuts for row in group[:cut]], [
        row for group, cut in cuts for row in group[cut:]
    ]


def limit(lm: TinyLM, block: int) -> int:
    """Tokens that a text may have."""
    return min(block, lm.config.max_position_embeddings) if lm.config.position in LIMITED else block


def text_example(lm: TinyLM, block: int, text: str, pair: str | None = None) -> dict:
    """A text, or two, between specials: as much as fits, cut at the end of the longer text."""
    encoding = lm.tokenizer.encoding(text, pair)
    columns = {
        part: [c for c, p in enumerate(encoding.sequence_ids) if p == part] for part in (None, 0, 1)
    }
    texts = [columns[0], columns[1]]
    for _ in range(len(encoding.ids) - limit(lm, block)):
        max(texts, key=len).pop()
    return columns_example(lm, encoding, sorted(columns[None] + texts[0] + texts[1]), 0)


def columns_example(lm: TinyLM, encoding, kept: list, part: int) -> dict:
    """Some columns of an encoding; `offsets` are their places in one of its texts, None elsewhere."""
    example = {
        "input_ids": [encoding.ids[c] for c in kept] or [*lm.ends(), 0][:1],
        "offsets": [
            encoding.offsets[c] if encoding.sequence_ids[c] == part else None for c in kept
        ],
    }
    if lm.config.type_vocab_size > 1:
        example["token_type_ids"] = [encoding.type_ids[c] for c in kept] or [0]
    return example


def collate(lm: TinyLM, examples: list, seed: int = 0) -> dict:
    """Examples as a batch, padded on the right to the longest; what a masked model is to guess depends on the seed."""
    pad, batch = max(lm.config.pad_token_id or 0, 0), {}
    for name, padding in dict(
        input_ids=pad, token_type_ids=0, decoder_input_ids=pad, labels=-100
    ).items():
        values = [torch.as_tensor(example[name]) for example in examples if name in example]
        if values:
            stacked = values[0].ndim == 0
            batch[name] = (
                torch.stack(values) if stacked else nn.utils.rnn.pad_sequence(values, True, padding)
            )
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    if lengths.min() < lengths.max():
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    if "guess" in examples[0]:
        batch |= masked(lm, batch["input_ids"].long(), torch.Generator().manual_seed(seed))
    batch = {
        name: tensor if tensor.is_floating_point() else tensor.long()
        for name, tensor in batch.items()
    }
    if lm.device.type == "cuda":  # from pinned memory, so that nothing waits for the copy
        return {
            name: tensor.pin_memory().to(lm.device, non_blocking=True)
            for name, tensor in batch.items()
        }
    return {name: tensor.to(lm.device) for name, tensor in batch.items()}


def masked(lm: TinyLM, ids: Tensor, generator: torch.Generator) -> dict:
    """15% of the tokens to be guessed: 80% of them masked, 10% replaced, 10% as they are (Devlin et al. 2019)."""
    special = torch.isin(ids, torch.tensor([*lm.tokenizer.encode(""), lm.config.pad_token_id or 0]))
    dice, chosen = (
        torch.rand(ids.shape, generator=generator),
        torch.rand(ids.shape, generator=generator) < 0.15,
    )
    chosen &= ~special
    other = torch.randint(lm.tokenizer.size, ids.shape, generator=generator)
    shown = torch.where(
        dice < 0.8, torch.full_like(ids, mask_token(lm)[1]), torch.where(dice < 0.9, other, ids)
    )
    return {"input_ids": torch.where(chosen, shown, ids), "labels": ids.masked_fill(~chosen, -100)}


def mask_token(lm: TinyLM) -> tuple[str, int]:
    """Text and id of the token that hides another."""
    names = (
        lm.tokenizer.special_tokens.get("mask_token"),
        "[MASK]",
        "<mask>",
    )  # BERT's own files do not name it
    backend = getattr(lm.tokenizer, "backend", None)
    found = [(name, backend.token_to_id(name)) for name in names if backend and name]
    found = [(name, token) for name, token in found if token is not None]
    require(found, "tokenizer_config.json: no mask_token")
    return found[0]


class Batches:
    """An epoch's examples in batches of similar length, shuffled twice; all of it depends on seed and step alone, so
    that a resumed run goes on. Each of several processes has its part of every batch."""

    def __init__(self, lm: TinyLM, epoch, options: TrainOptions):
        self.lm, self.epoch, self.batch, self.seed, self.number = (
            lm,
            epoch,
            options.batch,
            options.seed,
            None,
        )
        self.rank, self.world = rank_and_world_size()
        least = (
            self.world * options.accumulate if self.world > 1 else 1
        )  # rows of a last batch that is not full
        self.per_epoch = (len(epoch(torch.Generator())) + self.batch - least) // self.batch

    def draw(self, step: int) -> dict:
        number, i = divmod(step, self.per_epoch)
        if number != self.number:
            self.number, generator = (
                number,
                torch.Generator().manual_seed(self.seed * 1_000_003 + number),
            )
            self.examples = self.epoch(generator)
            self.order = torch.randperm(len(self.examples), generator=generator)
            if not isinstance(self.examples, Blocks):  # equal lengths stay shuffled
                lengths = torch.tensor([len(example["input_ids"]) for example in self.examples])
                self.order = self.order[lengths[self.order].argsort(stable=True)]
            self.turns = torch.randperm(self.per_epoch, generator=generator)
        rows = self.order[self.turns[i] * self.batch :][: self.batch][
            self.rank :: self.world
        ].tolist()
        return collate(self.lm, [self.examples[j] for j in rows], self.seed * 1_000_003 + step)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: how a row becomes examples, how what a model's head says answers it, and how good that is.
# ---------------------------------------------------------------------------------------------------------------------
class Task:
    """What is common: each row makes its own examples; a model is as good as its loss is low."""

    head, family = None, "bert"  # of a model from scratch
    inputs, roles = (
        ("text",),
        (),
    )  # of a row: what a line given to `run` has, what there is to learn from
    scratch, init = {}, {}  # what differs from STARTS
    longest = 512  # tokens of a text that `run` reads, where the model has no limit of its own

    def examples(self, lm: TinyLM, row: dict, block: int):
        """Yield the examples of a row: one, or a window at a time of a long text."""
        yield text_example(lm, block, *(row[name] for name in self.inputs if name in row))

    def answer(self, lm: TinyLM, windows: list) -> list:
        """A list of dicts, the likeliest first, from the windows (example, what the head says of it) of a row."""
        return [{"generated_text": text} for _, text in windows]

    def figures(self, lm: TinyLM, examples: list, batch: int) -> dict:
        """Name -> figure; the first one chooses the best checkpoint."""
        total = weight = 0.0
        for i, indices in enumerate(similar(examples, batch)):
            inputs = collate(lm.eval(), [examples[j] for j in indices], seed=i)
            with torch.no_grad():
                total += loss_sum(lm, inputs).item()
            weight += label_weight(target_labels(lm, inputs)).item()
        nats, size = total / max(weight, 1), sum(example.get("bytes", 0) for example in examples)
        figures = {"nats/token": nats} | ({"bits/byte": total / size / math.log(2)} if size else {})
        return figures | {"perplexity": math.exp(min(nats, 700))}

    def report(self, lm: TinyLM, examples: list, batch: int) -> dict:
        """The figures where `eval` has more time."""
        return self.figures(lm, examples, batch)

    def epochs(self, lm: TinyLM, rows: list, block: int) -> Callable:
        """A function of a random generator that gives an epoch's examples; of None, it gives all of them in order."""
        examples = [
            example | {"row": row, "number": number}
            for number, row in enumerate(rows)
            for example in self.examples(lm, row, block)
        ]
        return lambda generator: examples

    def answers(self, lm: TinyLM, examples: list, batch: int, **options) -> list:
        """The answer to each row of the examples."""
        rows = {}
        for example, said in zip(examples, outputs(lm, examples, batch, **options)):
            rows.setdefault(example["number"], []).append((example, said))
        return [self.answer(lm, windows) for windows in rows.values()]


def similar(examples: list, batch: int) -> list:
    """Indices of examples in batches of similar length, the longest first."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


@torch.no_grad()
def outputs(lm: TinyLM, examples: list, batch: int, max_new_tokens: int | None = None) -> list:
    """What the head says of each example, on the CPU and without padding; of a language model the text it writes."""
    found, ends = [None] * len(examples), lm.ends()
    for indices in similar(examples, batch):
        inputs = collate(lm.eval(), [examples[i] for i in indices])
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if lm.config.head == "lm":
            new = lm.generate(ids, mask, max_new_tokens=max_new_tokens)[
                :, 1 if lm.encoder else ids.shape[1] :
            ].tolist()
            said = [
                lm.tokenizer.decode(itertools.takewhile(lambda token: token not in ends, row))
                for row in new
            ]
        else:
            said = lm(ids, mask, inputs.get("token_type_ids")).float().cpu()
        for i, one in zip(indices, said):
            found[i] = (
                one
                if lm.config.head in ("lm", "classify")
                else one[: len(examples[i]["input_ids"])]
            )
    return found


SCRATCH = dict(
    steps=None, epochs=10, vocab=4096, dropout=0.3, lr=0.01, adam_lr=2e-3, size="nano", batch=32
)


class LanguageModelling(Task):
    """Texts one after the other, with end-of-text between them; or chats, where the assistant's words are learnt."""

    head, family, roles, longest = "lm", "qwen3", ("messages", "text"), 2**31
    scratch = dict(eval_every=250)

    def epochs(self, lm, rows, block):
        """Of texts, consecutive blocks: all of them, or whole ones, always as many, from a random first token on. A
        block of a language model has the next token too."""
        if any("messages" in row for row in rows):
            return super().epochs(lm, rows, block)
        texts, parts, causal = [row["text"] for row in rows if row["text"]], [], self.head == "lm"
        for text in texts:
            parts += [torch.tensor([*lm.ends()][:1], dtype=torch.int32)] * (
                causal and bool(parts)
            ) + [
                text.tokens(lm.tokenizer)
                if isinstance(text, MappedText)
                else torch.tensor(lm.tokenizer.encode(text, special=causal), dtype=torch.int32)
                if len(text) <= PIECE
                else torch.cat(
                    [
                        torch.tensor(ids, dtype=torch.int32)
                        for ids in piecewise(lm.tokenizer, sliced(text))
                    ]
                )
            ]
        ids = (
            parts[0] if len(parts) == 1 else torch.cat([torch.zeros(0, dtype=torch.int32), *parts])
        )
        size = sum(
            len(text.encode("utf-8", errors="replace") if isinstance(text, str) else text)
            for text in texts
        )
        special = torch.tensor([] if causal else lm.tokenizer.encode(""), dtype=torch.long)
        step, end, share = (
            limit(lm, block) - len(special),
            len(ids) - causal,
            size / max(len(ids), 1),
        )

        def example(part: Tensor) -> dict:
            return (
                {"input_ids": part, "bytes": share * (len(part) - 1)}
                if causal
                else {"input_ids": torch.cat((special[:1], part, special[1:])), "guess": True}
            )

        def epoch(generator) -> Blocks:
            if generator is None:
                return Blocks(ids, 0, end, step, causal, example)
            count = max(end // step - 1, min(end // step, 1))
            first = int(
                torch.randint(max(min(step, end - count * step + 1), 1), (), generator=generator)
            )
            return Blocks(ids, first, first + count * step, step, causal, example)

        return epoch

    def examples(self, lm, row, block):
        if "messages" not in row:
            yield from super().examples(lm, row, block)
            return
        ids, labels, done, messages = [], [], "", row["messages"]
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, whole = (
                    lm.tokenizer.apply_chat_template(messages[: i + n], None, n == 0)
                    for n in (0, 1)
                )
                require(
                    prompt.startswith(done) and whole.startswith(prompt),
                    "messages: the chat template does not "
                    "write a conversation as the beginning of a longer one",
                )
                texts = prompt[len(done) :], whole[len(prompt) :]
                asked, said = (lm.tokenizer.encode(text, special=False) for text in texts)
                ids, labels, done = ids + asked + said, labels + [-100] * len(asked) + said, whole
        require(ids, f"messages: {str(messages)[:60]!r} has nothing that the assistant says")
        yield {"input_ids": ids[: limit(lm, block)], "labels": labels[: limit(lm, block)]}


class MaskFilling(LanguageModelling):
    """Texts one after the other, where some tokens are to be guessed."""

    head, family, roles, longest, scratch = (
        "mlm",
        "bert",
        ("text",),
        512,
        SCRATCH | dict(dropout=0.0),
    )

    def examples(self, lm, row, block):
        yield text_example(lm, block, row["text"].replace("<mask>", mask_token(lm)[0]))

    def answer(self, lm, windows):
        """The five likeliest tokens in the place of each mask."""
        ((example, logits),) = windows
        ids, (name, mask) = example["input_ids"], mask_token(lm)
        require(mask in ids, f"{example['row']['text'][:60]!r}: expected {name} or <mask> in it")
        return [
            dict(
                token_str=lm.tokenizer.decode([token]),
                score=score,
                sequence=lm.tokenizer.decode(ids[:c] + [token] + ids[c + 1 :]),
            )
            for c in range(len(ids))
            if ids[c] == mask
            for score, token in zip(*(x.tolist() for x in logits[c].softmax(-1).topk(5)))
        ]


class Writing(Task):
    """Translation, summarisation: a source and what to write of it."""

    head, family, inputs, roles, longest = "lm", "t5", ("source",), ("source", "target"), 2**31
    scratch = SCRATCH | dict(dropout=0.1)

    def examples(self, lm, row, block):
        example, end = text_example(lm, block, row["source"]), [*lm.ends()][:1]
        if "target" in row:
            labels = lm.tokenizer.encode(row["target"])
            labels = labels[:-1] if labels[-1:] == end else labels
            example["labels"] = labels[: limit(lm, block) - 1] + end
            start = int(lm._prompt(torch.zeros(1, 1, dtype=torch.long)))
            example["decoder_input_ids"] = [start, *example["labels"][:-1]]
        yield example

    def report(self, lm, examples, batch):
        """Perplexity; and BLEU and ROUGE of what the model writes, each if its library is installed."""
        figures, true = (
            self.figures(lm, examples, batch),
            [example["row"]["target"] for example in examples],
        )
        bleu, rouge = (importlib.util.find_spec(name) for name in ("sacrebleu", "rouge_score"))
        said = outputs(lm, examples, batch) if bleu or rouge else []
        if bleu:
            import sacrebleu

            figures["BLEU"] = sacrebleu.corpus_bleu(said, [true]).score
        if rouge:
            from rouge_score.rouge_scorer import RougeScorer

            scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
            scores = [scorer.score(*pair) for pair in zip(true, said)]
            figures |= {
                name: sum(score[name].fmeasure for score in scores) / len(scores)
                for name in scores[0]
            }
        return figures


class Classification(Task):
    """Texts, or pairs of texts, and their label: one of several classes, a list of them, or a number."""

    head, inputs, roles = "classify", ("text", "pair"), ("text", "pair", "label")
    scratch = SCRATCH | dict(epochs=4)

    def examples(self, lm, row, block):
        (example,), label, problem = (
            super().examples(lm, row, block),
            row.get("label"),
            lm.config.problem_type,
        )
        if label is not None and problem == "regression":
            require(
                isinstance(label, float)
                or isinstance(label, str)
                and re.fullmatch(r"-?\d+", label),
                f"label {label!r}: expected a number, as the model is a regression",
            )
            example["labels"] = float(label)
        elif label is not None and problem == "multi_label_classification":
            ids = {label_id(lm, name) for name in ([label] if isinstance(label, str) else label)}
            example["labels"] = [float(i in ids) for i in range(lm.config.num_labels)]
        elif label is not None:
            example["labels"] = label_id(lm, label)
        yield example

    def answer(self, lm, windows):
        ((_, logits),) = windows
        problem, alone = lm.config.problem_type, lm.config.num_labels == 1
        alone |= problem == "multi_label_classification"
        scores = (
            logits if problem == "regression" else logits.sigmoid() if alone else logits.softmax(-1)
        )
        return [
            {"label": lm.config.id2label[i], "score": score}
            for score, i in zip(*(x.tolist() for x in scores.sort(descending=True)))
        ]

    def figures(self, lm, examples, batch):
        """Accuracy, and the mean of the F1 of each class that occurs."""
        logits, problem = torch.stack(outputs(lm, examples, batch)), lm.config.problem_type
        labels = torch.tensor([example["labels"] for example in examples])
        if problem == "regression":
            pair = torch.stack((logits.flatten(), labels.flatten()))
            return {
                "mean squared error": F.mse_loss(*pair).item(),
                "correlation": pair.corrcoef()[0, 1].item(),
            }
        if problem == "multi_label_classification":
            said, true = logits > 0, labels > 0
        else:
            said, true = (
                F.one_hot(classes, lm.config.num_labels).bool()
                for classes in (logits.argmax(-1), labels)
            )
        counts = zip(*(part.sum(0).tolist() for part in (said & true, said, true)))
        scores = [f1(*count) for count in counts if any(count)]
        return {
            "accuracy": (said == true).all(-1).float().mean().item(),
            "macro F1": sum(scores) / max(len(scores), 1),
        }


def f1(right: float, said: float, true: float) -> float:
    return 2 * right / (said + true) if said + true else 0.0


def label_id(lm: TinyLM, name) -> int:
    ids = {label: i for i, label in lm.config.id2label.items()}
    require(str(name) in ids, f"label {name!r}: expected one of {', '.join(ids)[:200]}")
    return ids[str(name)]


def label_changes(rows: list, known: dict | None) -> dict:
    """id2label and problem_type as the labels are, for a Config; labels that a checkpoint knows keep their numbers."""
    labels = [row["label"] for row in rows if "label" in row]
    if any(isinstance(label, float) for label in labels):
        return dict(id2label={0: "LABEL_0"}, problem_type="regression")
    several = any(isinstance(label, list) for label in labels)
    names = {
        str(name) for label in labels for name in (label if isinstance(label, list) else [label])
    }
    names |= {tag for row in rows for tag in row.get("tags", ())}
    if not names <= set((known or {}).values()):
        known = dict(
            enumerate(
                sorted(names, key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
            )
        )
    problem = f"{'multi' if several else 'single'}_label_classification" if labels else None
    return dict(id2label=known, problem_type=problem) if names else {}


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
    """Words and their tags; the first token of each word has the word's."""

    head, inputs, roles, scratch = "tokens", ("words",), ("words", "tags"), SCRATCH

    def examples(self, lm, row, block):
        words, tags = (
            row["words"] if isinstance(row["words"], list) else row["words"].split(" "),
            row.get("tags"),
        )
        require(
            tags is None or len(tags) == len(words),
            f"{len(tags or ())} tags for the {len(words)} words {' '.join(words)[:60]!r}",
        )
        example = text_example(lm, block, " ".join(words))
        word_at, first = (
            [i for i, word in enumerate(words) for _ in word + " "],
            {},
        )  # word -> its first column
        for c, offset in enumerate(example["offsets"]):
            if offset and offset[1] > offset[0]:  # a token may begin with the space before it
                first.setdefault(word_at[offset[1] - 1], c)
        if tags is not None:
            example |= {"first": first, "labels": [-100] * len(example["input_ids"])}
            for word, c in first.items():
                example["labels"][c] = label_id(lm, tags[word])
        yield example

    def answer(self, lm, windows):
        """Entities: neighbouring tokens of one kind, with the mean of their scores."""
        ((example, logits),) = windows
        columns = [c for c, offset in enumerate(example["offsets"]) if offset]
        scores, tags = logits.softmax(-1)[columns].max(-1)
        found, places = [], [example["offsets"][c] for c in columns]
        for kind, first, end in spans([lm.config.id2label[int(tag)] for tag in tags]):
            start, stop = places[first][0], places[end - 1][1]
            found.append(
                dict(
                    entity_group=kind,
                    word=example["row"]["words"][start:stop].strip(),
                    score=scores[first:end].mean().item(),
                    start=start,
                    end=stop,
                )
            )
        return found

    def figures(self, lm, examples, batch):
        pairs, counts = [], Counter()
        for example, logits in zip(examples, outputs(lm, examples, batch)):
            said = [lm.config.id2label[int(logits[c].argmax())] for c in example["first"].values()]
            true = [example["row"]["tags"][word] for word in example["first"]]
            pairs += zip(said, true)
            said, true = set(spans(said)), set(spans(true))
            counts.update(right=len(said & true), said=len(said), true=len(true))
        return {
            "entity F1": f1(*(counts[name] for name in ("right", "said", "true"))),
            "accuracy": sum(said == true for said, true in pairs) / max(len(pairs), 1),
        }


def spans(tags: list) -> list:
    """(kind, first, behind the last) of each run of tags of one kind; B- begins another."""
    kinds = [tag[2:] if tag[:2] in ("B-", "I-") else tag for tag in tags]
    starts = [
        i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1] or tags[i][:2] == "B-"
    ]
    return [
        (kinds[i], i, end) for i, end in zip(starts, [*starts[1:], len(kinds)]) if kinds[i] != "O"
    ]


class QuestionAnswering(Task):
    """Questions whose answer stands in a context; a long one is read in windows that overlap. The label of a window
    without the answer is its first column twice."""

    head, inputs, roles = "qa", ("question", "context"), ("question", "context", "answer")
    scratch, init, longest = SCRATCH, dict(lr=3e-4, epochs=6), 384

    def examples(self, lm, row, block):
        encoding = lm.tokenizer.encoding(row["question"], row["context"])
        inside = [c for c, part in enumerate(encoding.sequence_ids) if part == 1]
        before = [c for c in range(len(encoding.ids)) if not inside or c < inside[0]]
        after = [c for c in range(len(encoding.ids)) if inside and c > inside[-1]]
        room = limit(lm, block) - len(before) - len(after)
        require(
            room > 1,
            f"question {row['question'][:60]!r}: too long for a context behind it in {block} tokens",
        )
        shared = min(128, room // 2)
        for first in range(0, max(len(inside) - shared, 1), room - shared):
            example = columns_example(
                lm, encoding, before + inside[first : first + room] + after, 1
            )
            yield example | (
                {"labels": self.columns(example["offsets"], row)} if "answer" in row else {}
            )

    def columns(self, offsets: list, row: dict) -> list:
        """First and last column of a row's first answer, if the window has the whole of it."""
        text, start = row["answer"][0] if row["answer"] else ("", -1)
        start = row["context"].find(text) if start is None else start
        places = [(c, *offset) for c, offset in enumerate(offsets) if offset]
        inside = [c for c, first, last in places if last > start and first < start + len(text)]
        whole = (
            start >= 0 and inside and places[0][1] <= start and start + len(text) <= places[-1][2]
        )
        return [inside[0], inside[-1]] if whole else [0, 0]

    def answer(self, lm, windows):
        """The likeliest one of all windows. Its score is the probability of its first column times that of its last,
        among the context's columns and the first one, which stands for none."""
        found = []
        for example, logits in windows:
            context, offsets = example["row"]["context"], example["offsets"]
            inside = torch.tensor([offset is not None for offset in offsets])
            shown = inside.clone()
            shown[0] = True
            p = logits.masked_fill(~shown[:, None], -math.inf).softmax(0) * inside[:, None]
            scores = (p[:, :1] * p[:, 1]).triu().tril(29)  # of at most 30 tokens
            first, last = divmod(int(scores.argmax()), len(offsets))
            (start, _), (_, end) = offsets[first] or (0, 0), offsets[last] or (0, 0)
            while 0 < start < end and context[start - 1 : start + 1].isalnum():  # whole words
                start -= 1
            while start < end < len(context) and context[end - 1 : end + 1].isalnum():
                end += 1
            found.append(
                dict(
                    answer=context[start:end].strip(),
                    score=scores[first, last].item(),
                    start=start,
                    end=end,
                )
            )
        return [max(found, key=lambda answer: answer["score"])]

    def figures(self, lm, examples, batch):
        rows = {example["number"]: example["row"] for example in examples}.values()
        pairs = [
            (found["answer"], [text for text, _ in row["answer"]] or [""])
            for (found,), row in zip(self.answers(lm, examples, batch), rows)
        ]
        scores = {"span F1": overlap, "exact match": lambda said, text: plain(said) == plain(text)}
        return {
            name: sum(max(score(said, text) for text in true) for said, true in pairs) / len(pairs)
            for name, score in scores.items()
        }


def plain(text: str) -> list:
    """Words without case, punctuation and articles, as SQuAD compares them (Rajpurkar et al. 2016)."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def overlap(said: str, true: str) -> float:
    """F1 of the words of two answers."""
    said, true = plain(said), plain(true)
    return (
        f1((Counter(said) & Counter(true)).total(), len(said), len(true))
        if said and true
        else float(said == true)
    )


class Embedding(Task):
    """A vector for each text, as the files of sentence-transformers say: pooled, and normalised where modules.json has
    it; without files, the mean."""

    poolings = {  # name -> states (seq, hidden) as one vector
        "pooling_mode_cls_token": lambda states: states[0],
        "pooling_mode_mean_tokens": lambda states: states.mean(0),
        "pooling_mode_max_tokens": lambda states: states.amax(0),
        "pooling_mode_mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
        "pooling_mode_lasttoken": lambda states: states[-1],
    }

    def examples(self, lm, row, block):
        said = read_json(lm.folder / "sentence_bert_config.json", {})
        yield text_example(lm, said.get("max_seq_length") or block, row["text"])

    def answer(self, lm, windows):
        ((_, states),) = windows
        said, file = read_json(lm.folder / "1_Pooling/config.json", {}), lm.folder / "modules.json"
        modules = re.findall(
            r"sentence_transformers[\w.]*\.(\w+)", file.read_text("utf-8") if file.exists() else ""
        )
        require(
            set(modules) <= {"Transformer", "Pooling", "Normalize"},
            f"{file}: {', '.join(modules)}, expected no "
            "more than Transformer, Pooling and Normalize",
        )
        chosen = [pool for name, pool in self.poolings.items() if said.get(name)]
        require(
            chosen or not said,
            f"{lm.folder / '1_Pooling/config.json'}: expected one of {', '.join(self.poolings)}",
        )
        vector = torch.cat(
            [pool(states) for pool in chosen or [self.poolings["pooling_mode_mean_tokens"]]]
        )
        return [
            {
                "embedding": (
                    F.normalize(vector, dim=0) if "Normalize" in modules else vector
                ).tolist()
            }
        ]


TASKS = dict(
    lm=LanguageModelling(),
    mlm=MaskFilling(),
    classify=Classification(),
    tokens=Tagging(),
    qa=QuestionAnswering(),
    seq2seq=Writing(),
    embed=Embedding(),
)
TRAINABLE = tuple(name for name, task in TASKS.items() if task.head)
LOWER_IS_BETTER = ("nats/token", "mean squared error")  # figures of which less is better


def task_of(config: Config) -> str:
    return "seq2seq" if config.num_encoder_layers else config.head or "embed"


# ---------------------------------------------------------------------------------------------------------------------
# The training loop
# ---------------------------------------------------------------------------------------------------------------------
def train_bpe(texts: list, vocab: int, encoder: bool = False) -> Tokenizer:
    """A byte-level BPE of `vocab` tokens, trained by the `tokenizers` library; an encoder's has BERT's specials."""
    try:
        from tokenizers import ByteLevelBPETokenizer, processors
    except ImportError:
        raise Error(
            "--vocab needs `pip install tokenizers`; without it, tokens of decoders are bytes"
        ) from None
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"] if encoder else list(ByteTokenizer.specials)
    backend = ByteLevelBPETokenizer(add_prefix_space=encoder)
    texts = (
        re.sub(r"\S{1000}", r"\g<0> ", piece)  # a word that never ends would take for ever
        for text in texts
        for piece in sliced(text)
    )
    backend.train_from_iterator(
        texts, max(vocab, 256 + len(special)), show_progress=False, special_tokens=special
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
    return Tokenizer(
        {"tokenizer.json": backend.to_str().encode("utf-8"), "tokenizer_config.json": named}
    )


def new_model(rows: list, options: TrainOptions) -> TinyLM:
    """A model of the task's family for the rows; what adds to the residual stream starts at zero, so that training
    starts smoothly."""
    task = TASKS[options.task]
    encoder, row = task.family == "bert", FAMILIES[task.family]
    texts = [
        str(as_text(row[role])[: MMAP_MIN_BYTES // 4])
        for row in rows
        for role in TOKENIZER_ROLES
        if role in row
    ]
    tokenizer = (
        train_bpe(texts, options.vocab, encoder) if options.vocab or encoder else ByteTokenizer()
    )
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
    raw = {row.fields[name][0]: value for name, value in ours.items() if name in row.fields}
    config = config_from_hf({"model_type": task.family} | raw, head=task.head)
    torch.manual_seed(options.seed)
    lm = TinyLM(replace(config, **label_changes(rows, None), **dropouts(config, options.dropout)))
    for block in (module for module in lm.modules() if isinstance(module, Block)):
        nn.init.zeros_(block.attention.o.weight), nn.init.zeros_(block.mlp.down.weight)
    if config.scale_logits:  # then an embedding is as large as a state
        nn.init.normal_(lm.embed.weight)
    lm.tokenizer = tokenizer
    return lm


def dropouts(config: Config, p: float | None) -> dict:
    """Changes of a Config; attention's own, which keeps the fast kernels out, is raised only where all are one (T5)."""
    if p is None:
        return {}
    return dict(
        hidden_dropout=p,
        embedding_dropout=p,
        head_dropout=p,
        attention_dropout=p if config.position == "relative" else min(p, config.attention_dropout),
    )


def load_for_finetuning(folder: Path, rows: list, options: TrainOptions) -> TinyLM:
    """A checkpoint in fp32, with the task's head and the rows' labels."""
    head, file = TASKS[options.task].head, folder / "config.json"
    head = "config" if head == "lm" else head  # no language model begins with a head at random
    config = config_from_hf(read_json(file), str(file), head)
    torch.manual_seed(options.seed)  # of a new head
    changes = label_changes(rows, config.id2label) | dropouts(config, options.dropout)
    lm = TinyLM.from_pretrained(folder, torch.float32, head=head, **changes)
    require(
        task_of(lm.config) == options.task,
        f"{folder}: a model for {task_of(lm.config)}, expected one for --task {options.task}",
    )
    require(lm.tokenizer, f"{folder / 'tokenizer.json'}: no such file")
    if (
        lm.config.causal and lm.config.pad_token_id is None
    ):  # by which a classifier finds a text's end
        pad = lm.tokenizer.pad_token_id
        lm.config = replace(lm.config, pad_token_id=pad if pad is not None else [*lm.ends(), 0][0])
    return lm


def build_model(rows: list, options: TrainOptions, resume: bool) -> TinyLM:
    """The model, new or opened, with what is to be trained of it."""
    folder = options.init or Path(options.out) / "last"
    lm = (
        load_for_finetuning(Path(folder), rows, options)
        if options.init or resume
        else new_model(rows, options)
    )
    lm.to(usable_device(options.device))
    if options.freeze:
        freeze(lm, options.freeze)
    if options.lora:
        add_adapters(lm, options.lora)
    for block in (
        module for module in lm.modules() if options.checkpoint and isinstance(module, Block)
    ):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if rank_and_world_size()[1] > 1:
        sharded(lm, options.parallel)
    return lm


def lr_multiplier(step: int, steps: int, options: TrainOptions) -> float:
    """Share of the peak learning rate: linear warm-up, then stable, then linear decay to zero."""
    return min(
        1.0,
        (step + 1) / max(options.warmup * steps, 1),
        (steps - step) / max(options.decay * steps, 1),
    )


def peak_flops(device) -> float | None:
    """What a CUDA device could do in bfloat16 at most, where it is known."""
    if device.type != "cuda":
        return None
    said = torch.cuda.get_device_properties(device)
    per_cycle = {(8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192}.get(
        (said.major, said.minor)
    )
    return per_cycle and per_cycle * said.multi_processor_count * said.clock_rate * 1e3


class Progress:
    """A live line on a terminal; elsewhere a plain one now and then. The loss is fetched only when a line is due."""

    def __init__(self, lm: TinyLM, steps: int, first: int):
        self.steps, self.first, self.tokens, self.live = steps, first, 0, sys.stderr.isatty()
        self.begin, self.shown, self.peak = time.monotonic(), -math.inf, peak_flops(lm.device)
        self.flops = 6 * sum(p.numel() for name, p in lm.named_parameters() if "_embed" not in name)

    def line(self, step: int, loss: Tensor, lr: float, tokens: int):
        now, self.tokens = time.monotonic(), self.tokens + tokens
        if now - self.shown > (0.2 if self.live else 10) or step == self.steps:
            self.shown, spent = now, now - self.begin
            eta = int(spent / (step - self.first) * (self.steps - step))
            speed = f"{self.tokens / spent:,.0f} tok/s"
            if (
                self.peak
            ):  # model flops utilisation (Chowdhery et al. 2022), without attention's own products
                speed += f"  MFU {self.tokens / spent * self.flops / self.peak:.1%}"
            self.note(
                f"step {step}/{self.steps}  loss {loss.item():.3f}  lr {lr:.2e}  {speed}  ETA {eta // 60}:"
                f"{eta % 60:02d}",
                "" if self.live else "\n",
            )

    def note(self, text: str, end: str = "\n"):
        if rank_and_world_size()[0] == 0:
            print("\r\x1b[K" * self.live + text, end=end, file=sys.stderr, flush=True)


def save(
    folder: Path, lm: TinyLM, options: TrainOptions, optimizer=None, notes: dict | None = None
):
    """A checkpoint for everyone; with an optimizer, beside it all that `--resume` needs, in one file that is replaced
    at once; under torchrun that names the folder into which each process wrote its own part. Raises Error where it
    cannot be written; each file is then the whole former one."""
    tensors = {
        f"model/{name}": p for name, p in lm.named_parameters() if optimizer and p.requires_grad
    }
    for i, state in optimizer.state_dict()["state"].items() if optimizer else ():
        tensors |= {f"optimizer/{i}/{key}": tensor for key, tensor in state.items()}
    before = {*folder.glob("training-*")}
    try:
        if optimizer and rank_and_world_size()[1] > 1:
            tensors, notes = {}, notes | {"shards": save_shards(folder, tensors, lm.device)}
        if rank_and_world_size()[0] == 0:
            lm.save_pretrained(folder)
        else:
            lm.state_dict()  # in which all processes take part
        if options.lora:
            save_adapter(folder / "adapter", lm, options)
        if optimizer and rank_and_world_size()[0] == 0:
            write_tensors(folder / "training.safetensors", tensors, {"training": json.dumps(notes)})
            for path in before:
                shutil.rmtree(path, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        for path in {*folder.rglob("*.tmp"), *folder.glob("training-*")} - before:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                missing_ok=True
            )
        raise Error(
            f"{folder}: not saved ({error}); what was saved there before is as it was"
        ) from None


def save_shards(folder: Path, tensors: dict, device) -> str:
    """A new folder of safetensors, each with what one process has of the tensors; its name."""
    import torch.distributed.checkpoint as dcp

    number = all_reduce(
        torch.tensor(time.time_ns() * (rank_and_world_size()[0] == 0), device=device),
        rank_and_world_size()[1],
    )
    path = folder / f"training-{number}"
    try:
        dcp.save(
            tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        )
    except dcp.api.CheckpointException as error:
        raise OSError(cause(error)) from None
    return path.name


def cause(error) -> str:
    """What went wrong on the first process where something did, as torch.distributed.checkpoint says it."""
    return str(next(iter(error.failures.values()))[0])


@contextlib.contextmanager
def locked(folder: Path):
    """No second run trains into the folder. A run that is killed leaves no lock behind."""
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


def load_resume_metadata(folder: Path) -> dict:
    """The notes that `save` has for `--resume`."""
    file = folder / "training.safetensors"
    notes = json.loads((open_tensors(file).metadata() or {}).get("training", "null"))
    require(notes, f"{file}: not written by tinylm's training")
    return notes


@torch.no_grad()
def restore(lm: TinyLM, optimizer, folder: Path, notes: dict):
    """Parameters and the optimizer's state as they were saved, by however many processes."""
    params, state = [p for group in optimizer.param_groups for p in group["params"]], {}

    def owner(name: str) -> Tensor:
        kind, name, *_ = name.split("/")
        return params[int(name)] if kind == "optimizer" else lm.get_parameter(name)

    if shards := notes.pop("shards", None):
        tensors = load_shards(folder / Path(shards).name, owner)
    else:
        file = open_tensors(folder / "training.safetensors")
        tensors = {name: shard_like(owner(name), file.get_tensor(name)) for name in file.keys()}
    for name, tensor in tensors.items():
        kind, number, *key = name.split("/")
        if kind == "optimizer":
            state.setdefault(int(number), {})[key[0]] = tensor
        else:
            owner(name).copy_(tensor)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def load_shards(path: Path, owner: Callable) -> dict:
    """The tensors of `save_shards`, each shared out as its parameter, `owner(name)`, is now."""
    import torch.distributed.checkpoint as dcp

    try:
        reader, tensors = dcp.HuggingFaceStorageReader(str(path)), {}
        for name, said in reader.read_metadata().state_dict_metadata.items():
            p, size = owner(name), tuple(said.size)
            require(
                size in ((), p.shape), f"{path}: {name} has shape {size}, expected {tuple(p.shape)}"
            )
            tensors[name] = torch.empty_like(p) if size else torch.zeros(())
        dcp.load(tensors, storage_reader=reader, no_dist=rank_and_world_size()[1] == 1)
    except (SafetensorError, dcp.api.CheckpointException) as error:
        raise Error(
            f"{path}: not readable ({cause(error) if hasattr(error, 'failures') else error})"
        ) from None
    return tensors


def train(data, options: TrainOptions, resume: bool = False) -> TinyLM:
    """Train on `data` (see `read_rows`) from scratch or from `options.init`; or go on where `options.out`/last stopped:
    bit for bit the run that was not interrupted, since data order and dropout depend on seed and step alone."""
    asked, options, out, task = (
        asdict(options),
        options.filled(),
        Path(options.out),
        TASKS[options.task],
    )
    notes = load_resume_metadata(out / "last") if resume else None
    require(not out.exists() or out.is_dir(), f"--out {out}: is a file, expected a folder")
    rows, held = (
        read_rows(Path(data), options),
        read_rows(Path(options.val), options) if options.val else None,
    )
    hashed = hashlib.sha256(repr((rows, held)).encode("utf-8", errors="replace")).hexdigest()
    for name, value in notes["options"].items() if resume else ():
        require(
            name == "out" or asked.get(name) == value,
            f"--resume: {flag(name)} was {value}, not {asked.get(name)}, in the run to go on with",
        )
    require(
        not resume or notes["data"] == hashed,
        "--resume: the data is not that of the run to go on with",
    )
    if held is None:
        rows, held = split_rows(rows)
    named = [
        {role: row[role] for role in ("label", "tags") if role in row} for row in held
    ]  # some may be there only
    lm = build_model(rows + named, options, resume)
    optimizer = make_optimizer(lm, options)
    batches = Batches(lm, task.epochs(lm, rows, options.block), options)
    require(
        batches.per_epoch, f"{data}: expected more than --block {options.block} tokens to train on"
    )
    held = task.epochs(lm, held, options.block)(None) if held else []
    weights = (
        class_weights(lm.config, batches.epoch(None)).to(lm.device)
        if options.class_weights
        else None
    )
    steps = options.steps or math.ceil(options.epochs * batches.per_epoch)
    if resume:
        restore(lm, optimizer, out / "last", notes)
    notes = notes or dict(options=asked, data=hashed, step=0, best=None, stale=0)
    if options.compile:
        lm.compile(fullgraph=True)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.set_flush_denormal(True)  # a CPU takes a hundred times as long over them
    keep_memory()
    progress = Progress(lm, steps, notes["step"])
    total, trained = (
        sum(p.numel() for p in lm.parameters() if p.requires_grad >= least)
        for least in (False, True)
    )
    progress.note(
        f"{total:,} parameters, {trained:,} of them trained; {batches.per_epoch:,} batches to train on, "
        f"{len(held):,} sequences held back; {lm.device}"
    )
    with locked(out) if rank_and_world_size()[0] == 0 else contextlib.nullcontext():
        train_steps(lm, optimizer, batches, held, weights, steps, notes, options, progress)
    return lm.eval()


def keep_memory():
    """Tell glibc to keep what is freed: pages that are new in every step cost up to a fifth of it on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 2**30)


def train_steps(
    lm, optimizer, batches, held, weights, steps: int, notes: dict, options: TrainOptions, progress
):
    """The loop, from the step that the notes name to the last, or to an interruption."""
    every, last = options.eval_every or min(batches.per_epoch, steps), Path(options.out) / "last"
    peaks, stop = [group["lr"] for group in optimizer.param_groups], False
    with interruptible() as interrupted:
        while notes["step"] < steps and not (stop or 0 < options.patience <= notes["stale"]):
            torch.manual_seed(
                options.seed * 1_000_003 + notes["step"] + 2**40 * rank_and_world_size()[0]
            )
            scale, batch = lr_multiplier(notes["step"], steps, options), batches.draw(notes["step"])
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * scale
            loss = train_step(
                lm,
                optimizer,
                batch,
                options.clip,
                options.accumulate,
                options.bf16,
                weights,
                loss_spike_threshold(notes),
            )
            notes["step"] += 1
            due = notes["step"] % every == 0 or notes["step"] == steps
            if due or notes["step"] % 16 == 0 or not loss.is_cuda:  # a look at a GPU waits for it
                check_loss(loss.item(), notes, progress)
                stop = bool(
                    all_reduce(
                        loss.new_tensor(interrupted.is_set()), rank_and_world_size()[1], "MAX"
                    )
                )
            progress.line(
                notes["step"],
                loss,
                options.lr * scale,
                batch["input_ids"].numel() * rank_and_world_size()[1],
            )
            if due:
                validate(lm, held, notes, options, progress)
            if due or stop:
                save(last, lm, options, optimizer, notes)
    if notes["step"] < steps:
        progress.note(
            f"stopped at step {notes['step']}: "
            + (
                f"{last} is saved; --resume goes on"
                if stop
                else f"no better validation in the last {notes['stale']}"
            )
        )


def check_loss(loss: float, notes: dict, progress: Progress):
    """Stop at a loss that is no number, before anything is saved; say when one jumped, which changed nothing."""
    step = notes["step"]
    require(
        math.isfinite(loss),
        f"step {step}: the loss is {loss}, and what was saved before is kept; expected a "
        "number (try a lower --lr and --adam-lr)",
    )
    if loss > loss_spike_threshold(notes):
        progress.note(
            f"step {step}: the loss jumped from about {notes['usual']:.3f} to {loss:.3f}; left out"
        )
    notes["usual"] = 0.9 * notes.get("usual", loss) + 0.1 * loss


def loss_spike_threshold(notes: dict) -> float:
    """A loss above it is no usual one."""
    return 2 * notes.get("usual", math.inf) + 1


def validate(lm: TinyLM, held: list, notes: dict, options: TrainOptions, progress: Progress):
    """Score what was held back, keep the best, show a sample of what a decoder writes."""
    better, task = True, TASKS[options.task]
    if held:
        figures = task.figures(lm, held, options.batch)
        name, figure = next(iter(figures.items()))
        better = notes["best"] is None or (
            figure < notes["best"] if name in LOWER_IS_BETTER else figure > notes["best"]
        )
        notes |= dict(best=figure, stale=0) if better else dict(stale=notes["stale"] + 1)
        progress.note(
            f"step {notes['step']}  validation "
            + "  ".join(f"{figure:.4f} {name}" for name, figure in figures.items())
            + "  best" * better
        )
    if better:
        save(Path(options.out) / "best", lm, options)
    if options.task == "lm" and held and rank_and_world_size()[1] == 1:
        text = lm.tokenizer.decode(held[0]["input_ids"][:1])
        with contextlib.suppress(Error):  # e.g. of so many tokens: it is only a sample
            text += "".join(
                lm.eval().stream(text, 120, temperature=0.8, top_p=0.95, seed=notes["step"])
            )
        progress.note("  | " + text.replace("\n", "\n  | "))


@contextlib.contextmanager
def interruptible():
    """An event that the first Ctrl-C or SIGTERM sets; a second one ends the program as ever."""
    event, before = threading.Event(), {}

    def handle(number, _):
        signal.signal(number, signal.default_int_handler)
        event.set()

    if threading.current_thread() is threading.main_thread():  # no other one may set handlers
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
WEIGHTS = Path(__file__).resolve().parent / "weights"  # the model shipped beside this file


def add_options(parser, owner, *names: str, **defaults):
    """Fields of a dataclass, or those named, as options of a command. What is not said is not there."""
    for f in fields(owner):
        if f.name in names or not names:
            hint = get_type_hints(owner)[f.name]
            while get_args(hint):  # of `int | None`, int; of choices, the first
                hint = get_args(hint)[0]
            kind = hint if isinstance(hint, type) else type(hint)
            kind = (
                dict(action="store_true")
                if kind is bool
                else dict(type=kind, metavar=f.name.upper())
            )
            default = defaults.get(f.name, f.default)
            shown = "" if default in (None, "", False) else f" (default: {default})"
            parser.add_argument(
                flag(f.name),
                default=defaults.get(f.name, argparse.SUPPRESS),
                help=f.metadata.get("help", "") + shown,
                **kind,
            )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinylm", description="A whole language-model library in one file."
    )
    parser.add_argument("--version", action="version", version=f"tinylm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser(
        "train", help="train a model from scratch, or fine-tune one, for a task"
    )
    sub.add_argument("data", help="text, jsonl, csv, tsv or SQuAD's json, or a folder of these")
    add_options(sub, TrainOptions)
    sub.add_argument(
        "--resume", action="store_true", help="go on where --out/last stopped, with its options"
    )

    sub = commands.add_parser("eval", help="the figures of a checkpoint's task on data")
    sub.add_argument("folder", help="a checkpoint")
    sub.add_argument("data", help="as for train")
    add_options(sub, TrainOptions, *COLUMNS, "batch", "block", "device")
    sub.add_argument("--json", action="store_true", help="print them as JSON")

    sub = commands.add_parser(
        "run", help="whatever a checkpoint's head is for: labels, answers, texts, embeddings"
    )
    sub.add_argument("folder", help="a checkpoint")
    sub.add_argument(
        "inputs", nargs="*", help="texts; without any, or for a -, the lines of standard input"
    )
    sub.add_argument("--context", help="the text in which all questions find their answer")
    add_options(sub, GenerationConfig, "max_new_tokens")
    add_options(sub, TrainOptions, "batch", "device", batch=32)
    sub.add_argument("--json", action="store_true", help="an object per line")

    for name, text, defaults in (
        ("sample", "continue a prompt", dict(max_new_tokens=300, temperature=0.8, top_p=0.95)),
        ("chat", "talk with an instruction-tuned model", dict(max_new_tokens=512)),
    ):
        sub = commands.add_parser(name, help=text)
        if name == "sample":
            sub.add_argument(
                "folder",
                nargs="?",
                default=str(WEIGHTS),
                help="a checkpoint (default: the shipped one)",
            )
            sub.add_argument(
                "--prompt", default="ROMEO:", help="text to continue (default: ROMEO:)"
            )
        else:
            sub.add_argument("folder", help="a checkpoint with a chat template")
            sub.add_argument("--system", help="the system message")
        add_options(
            sub,
            GenerationConfig,
            "max_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            **defaults,
        )
        sub.add_argument("--stop", action="append", help="end before this text; may be given again")
        sub.add_argument("--seed", type=int)
        sub.add_argument("--compile", action="store_true", help="torch.compile the decode step")
        add_options(sub, TrainOptions, "device")
    return parser


def main(argv: list | None = None) -> int:
    """`tinylm.py train | eval | run | sample | chat`; an Error is one line on stderr and exit code 1."""
    argv = sys.argv[1:] if argv is None else [*map(str, argv)]
    if argv[:1] == ["export"]:
        return export_command().main(argv[1:])
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:  # `train.py my.txt`
        argv = ["train", *argv]
    parser = make_parser()
    known, more = parser.parse_known_args(argv)
    options = vars(known)
    if more and (
        known.command != "run" or any(text.startswith("-") and text != "-" for text in more)
    ):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # inputs behind options
        options["inputs"] += more
    for stream in (
        sys.stdin,
        sys.stdout,
    ):  # text that is no UTF-8 is read and shown as well as it can be
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.reconfigure(errors="replace")
    try:
        COMMANDS[options.pop("command")](options)
    except (Error, OSError) as error:
        print(f"tinylm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def export_command():
    """export.py, which lies beside this file, in a clone or as installed."""
    return importlib.import_module(".export" if __package__ else "export", __package__)


def run_train(options: dict):
    data, resume, last = (
        options.pop("data"),
        options.pop("resume"),
        Path(options.get("out", TrainOptions.out)) / "last",
    )
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0":  # torchrun begins again after a fault
        resume |= (last / "training.safetensors").exists()
    if resume:  # what is not said again is as it was
        options = load_resume_metadata(last)["options"] | options
    options = TrainOptions(**options)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # under torchrun
        cuda = usable_device(options.device).type == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(
            restarts, store
        )  # where nothing of the processes before a restart is found
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
    try:
        train(data, options, resume)
    finally:
        if rank_and_world_size()[1] > 1:
            dist.destroy_process_group()


def opened(options: dict) -> TinyLM:
    """The checkpoint that a command names, with a tokenizer."""
    folder = Path(options.pop("folder"))
    lm = TinyLM.from_pretrained(folder, device=usable_device(options.pop("device", None)))
    require(lm.tokenizer, f"{folder / 'tokenizer.json'}: no such file")
    lm.folder = folder
    return lm


def run_eval(options: dict):
    lm, as_json, data = opened(options), options.pop("json"), options.pop("data")
    name = task_of(lm.config)
    require(name in TRAINABLE, f"{lm.folder}: expected a model with a task's head")
    options, task = TrainOptions(task=name, **options).filled(), TASKS[name]
    examples = task.epochs(lm, read_rows(Path(data), options), options.block)(None)
    require(len(examples), f"{data}: nothing to evaluate")
    figures = task.report(lm, examples, options.batch)
    print(
        json.dumps(figures)
        if as_json
        else "\n".join(f"{name}  {figure:.4f}" for name, figure in figures.items())
    )


def run_run(options: dict):
    """A line for each input: what the head says, the likeliest first, with scores. A tab divides a question from its
    context, a text from its pair."""
    lm, context, as_json, batch = (
        opened(options),
        options["context"],
        options["json"],
        options["batch"],
    )
    require(batch > 0, f"--batch {batch}: expected a positive number")
    require(
        context is None or len(TASKS[task_of(lm.config)].inputs) > 1,
        "--context: the model reads one text alone",
    )
    task, lines = TASKS[task_of(lm.config)], (line.rstrip("\r\n") for line in sys.stdin)
    texts = itertools.chain.from_iterable(
        lines if text == "-" else [text] for text in options["inputs"] or ["-"]
    )
    while some := list(itertools.islice(texts, batch)):
        rows = [
            dict(
                zip(
                    task.inputs,
                    [text, context] if context else text.split("\t", len(task.inputs) - 1),
                )
            )
            for text in some
        ]
        for text, row in zip(some, rows):
            require(
                "context" in row or task.head != "qa",
                f"{text[:60]!r}: expected --context, or the question, a tab and the context",
            )
        examples = Task.epochs(task, lm, rows, task.longest)(None)
        for text, found in zip(
            some, task.answers(lm, examples, batch, max_new_tokens=options.get("max_new_tokens"))
        ):
            print(
                json.dumps({"input": text, "output": found}, ensure_ascii=False)
                if as_json
                else "  ".join(map(answer_line, found[:5])),
                flush=True,
            )


def answer_line(answer: dict) -> str:
    """What an answer says, and its score; or its numbers."""
    texts = [
        value for name, value in answer.items() if isinstance(value, str) and name != "sequence"
    ]
    texts += [f"{answer['score']:.4f}"] if "score" in answer else []
    return " ".join(texts) if texts else json.dumps(*answer.values())


def run_sample(options: dict):
    lm, prompt = opened(options), options.pop("prompt")
    print(prompt, end="", flush=True)
    show(lm.stream(prompt, **options))


def run_chat(options: dict):
    """Questions from standard input, one a line; answers to standard output."""
    lm, system = opened(options), options.pop("system")
    messages = [{"role": "system", "content": system}] * bool(system)
    while True:
        print("> " * sys.stdin.isatty(), end="", flush=True)
        question = sys.stdin.readline()
        if not question:
            return
        if question.strip():
            messages.append({"role": "user", "content": question.strip()})
            messages.append({"role": "assistant", "content": show(lm.chat(messages, **options))})


def show(pieces) -> str:
    """Print text as it comes; all of it."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
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
