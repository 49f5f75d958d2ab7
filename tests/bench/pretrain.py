"""Seconds to nanoGPT's loss: its published CPU recipe for tinyshakespeare, and tinylm's command on the same bytes, in
one run; then our step against that of a plain transformers Qwen3; then what saving memory saves.

    python tests/bench/train.py [loss] [levers] [step] [memory]

Whole processes are timed, from `python` to the saved checkpoint. tinylm runs before and behind nanoGPT, so that other
programs on the machine disturb both; seconds of the processor are printed beside those of the clock.
"""

import json
import math
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
BAR = 2.738  # bits/byte of the last tenth that nanoGPT's recipe reaches (1.898 nats for each character, a byte here)
OURS = "--size pico --vocab 1024 --block 64 --batch 16 --steps 110 --lr 0.03 --adam-lr 0.01 --eval-every 110".split()
LEVERS = {  # what differs from it
    "bytes": ["--vocab", "0", "--steps", "320", "--eval-every", "320"],
    "4 layers": ["--size", "nano", "--steps", "80", "--eval-every", "80"],
    "twice the steps of half the batch": ["--batch", "8", "--steps", "200", "--eval-every", "200"],
    "lr 0.02, adam-lr 0.004": ["--lr", "0.02", "--adam-lr", "0.004"],
    "longer decay": ["--decay", "0.9"],
    "Muon as slow as AdamW": ["--lr", "0.003"],
    "compile": ["--compile"],
}


def timed(*command):
    """(seconds of the clock, seconds of the processor, what it printed) of a python process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise SystemExit(run.stderr)
    return (
        time.perf_counter() - start,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        run.stdout + run.stderr,
    )


def tinylm(*options):
    with tempfile.TemporaryDirectory() as out:
        return timed(ROOT / "train.py", "train", DATA, "--out", out, *OURS, *options)


def bits(log):
    return float(re.findall(r"([\d.]+) bits/byte", log)[-1])


def levers():
    """What each choice of our recipe does: seconds of the processor, and the loss."""
    for name, options in {"as it is": [], **LEVERS}.items():
        clock, processor, log = tinylm(*options)
        print(
            f"{name:36} {clock:6.1f} s {processor:6.1f} s of the processor {bits(log):.4f} bits/byte",
            flush=True,
        )


def loss():
    found = {}
    for name in ("tinylm", "nanoGPT", "tinylm"):
        clock, processor, log = tinylm() if name == "tinylm" else timed(__file__, "nanogpt")
        reached = bits(log)
        found.setdefault(name, []).append((clock, processor))
        print(
            f"{name}: {clock:.1f} s, {processor:.1f} s of the processor, {reached:.4f} bits/byte"
            f"{' > ' + str(BAR) if reached > BAR else ''}",
            flush=True,
        )
    ours, theirs = (
        [sum(column) / len(column) for column in zip(*found[name])]
        for name in ("tinylm", "nanoGPT")
    )
    print(
        f"tinylm takes 1/{theirs[0] / ours[0]:.1f} of the time, 1/{theirs[1] / ours[1]:.1f} of the processor's"
    )


def nanogpt(layers=4, heads=4, width=128, block=64, batch=12, steps=2000, warmup=100):
    """nanoGPT's recipe from its published facts: GPT-2's block without biases, AdamW 1e-3, cosine to 1e-4."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
            self.qkv, self.o = (
                nn.Linear(width, 3 * width, bias=False),
                nn.Linear(width, width, bias=False),
            )
            self.up, self.down = (
                nn.Linear(width, 4 * width, bias=False),
                nn.Linear(4 * width, width, bias=False),
            )

        def forward(self, x):
            q, k, v = (
                part.unflatten(-1, (heads, -1)).transpose(1, 2)
                for part in self.qkv(self.norms[0](x)).chunk(3, -1)
            )
            x = x + self.o(
                F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            )
            return x + self.down(F.gelu(self.up(self.norms[1](x))))

    text = DATA.read_text()
    chars = {char: i for i, char in enumerate(sorted(set(text)))}
    data = torch.tensor([chars[char] for char in text])
    train, held = data[: int(len(data) * 0.9)], data[int(len(data) * 0.9) :]
    torch.manual_seed(1337)
    model = nn.ModuleDict(
        dict(
            embed=nn.Embedding(len(chars), width),
            places=nn.Embedding(block, width),
            blocks=nn.Sequential(*(Block() for _ in range(layers))),
            norm=nn.LayerNorm(width, bias=False),
        )
    )
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(
                p,
                std=0.02 / math.sqrt(2 * layers)
                if name.endswith(("o.weight", "down.weight"))
                else 0.02,
            )

    def loss(ids, **options):
        x = model["embed"](ids[:, :-1]) + model["places"].weight[: ids.shape[1] - 1]
        logits = model["norm"](model["blocks"](x)) @ model["embed"].weight.T
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), **options)

    groups = [
        dict(
            params=[p for p in model.parameters() if (p.ndim == 2) == matrix],
            weight_decay=0.1 * matrix,
        )
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for step in range(steps):
        share = min(1.0, (step - warmup) / (steps - warmup))
        lr = (
            1e-3 * (step + 1) / (warmup + 1)
            if step < warmup
            else 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * share))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(train) - block, (batch,))
        loss(torch.stack([train[i : i + block + 1] for i in starts])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        parts = [held[i : i + block + 1] for i in range(0, len(held) - 1, block)]
        parts = [torch.stack([part for part in parts if len(part) == block + 1]), parts[-1][None]]
        total = sum(loss(part, reduction="sum").item() for part in parts)
    print(f"{total / (len(held) - 1) / math.log(2):.5f} bits/byte")


SHAPES = [
    dict(width=128, batch=12, block=64, vocab=320),
    dict(width=256, batch=8, block=256, vocab=4096),
    dict(width=512, batch=8, block=256, vocab=4096),
]
STEPPERS = ("transformers, AdamW", "tinylm, AdamW", "tinylm, Muon and AdamW")


def step(rounds=10):
    """Forward, backward and update: a plain transformers Qwen3 with AdamW, and ours with the same and with Muon, each in
    a process of its own, in turns; the median of the milliseconds."""
    for shape in SHAPES:
        workers = {
            name: subprocess.Popen(
                [sys.executable, __file__, "stepper", name, json.dumps(shape)],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for name in STEPPERS
        }
        times = {name: [] for name in workers}
        for round in range(rounds + 2):
            for name, worker in workers.items():
                print(file=worker.stdin, flush=True)
                times[name] += [float(worker.stdout.readline())] * (round > 1)
        peaks = {name: int(worker.communicate()[0]) / 1024 for name, worker in workers.items()}
        base = statistics.median(times[STEPPERS[0]])
        print(*(f"{name} {value}" for name, value in shape.items()), sep=", ")
        for name, found in times.items():
            print(
                f"{name}: {statistics.median(found):.0f} ms, {statistics.median(found) / base:.2f} of transformers'; "
                f"resident at most {peaks[name]:.0f} MB",
                flush=True,
            )


def stepper(name, width, batch, block, vocab, layers=4, heads=4):
    """A contender's process: a line comes in, five steps are taken, their mean time in milliseconds goes out; at the end
    the kilobytes it had at most."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import tinylm
    import train

    torch.manual_seed(0)
    model, ids = (
        Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=vocab,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                head_dim=width // heads,
                intermediate_size=3 * width,
                tie_word_embeddings=True,
            )
        ).train(),
        torch.randint(vocab, (batch, block + 1)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if "tinylm" in name:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = tinylm.TinyLM.from_pretrained(folder)
        optimizer = (
            tinylm.MuonAdamW(model, 1e-3, 1e-4)
            if "Muon" in name
            else torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        )
        train.keep_memory()  # as `tinylm.py train` does

    def transformers_step():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten()
        ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(5):
            tinylm.train_step(model, optimizer, ids) if "tinylm" in name else transformers_step()
        print((time.perf_counter() - start) * 200, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


PEAKS = {  # what is measured -> (options, logits above which they are made in chunks)
    "all logits of 4,096 tokens, vocabulary of 65,536": ({"vocab": 65536, "batch": 16}, math.inf),
    "a chunk of logits at a time": ({"vocab": 65536, "batch": 16}, 0),
    "activations of 8 layers of 512, 16 x 256 tokens": ({"batch": 16, "size": "medium"}, math.inf),
    "--checkpoint": ({"batch": 16, "size": "medium", "checkpoint": True}, math.inf),
}


def memory():
    """Peak memory of a forward and a backward pass above what is there before, each in a process of its own."""
    for name in PEAKS:
        _, processor, log = timed(__file__, "peak", name)
        print(f"{name}: {log.strip()}", flush=True)


def peak(name):
    import torch

    import tinylm
    import train

    (changes, tinylm.CHUNKED_LOSS_MIN_LOGITS), vocab = PEAKS[name], 512
    options = dict(batch=8, block=256) | changes
    vocab = options.pop("vocab", 512)
    options = train.TrainOptions(**options).filled()
    lm = train.build_model([{"text": "x"}], options, False).train()
    lm.embed = torch.nn.Embedding(vocab, lm.config.hidden_size)
    lm.config = tinylm.replace(lm.config, vocab_size=vocab)
    ids = torch.randint(vocab, (options.batch, options.block + 1))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    tinylm.loss_sum(lm, {"input_ids": ids}).backward()
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{more:.0f} MB, {time.process_time() - start:.1f} s of the processor")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        sys.exit(peak(sys.argv[2]))
    if sys.argv[1:2] == ["stepper"]:
        sys.exit(stepper(sys.argv[2], **json.loads(sys.argv[3])))
    for name in sys.argv[1:] or ("loss", "step", "memory"):
        dict(loss=loss, levers=levers, nanogpt=nanogpt, step=step, memory=memory)[name]()
