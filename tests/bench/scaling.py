"""How cost grows: decoding with the context and with the rows at once, tokenising with the text, export with the weights.

    python tests/bench/scaling.py [context] [rows] [tokenising] [export] [--genai-python PYTHON] [--exported FOLDER]
                                  [--sizes N ...] [--tokens 8] [--rounds 1] [--only NAME ...] [--draw FOLDER]

SmolLM2-135M on 2 threads, a process for each contender and size, in turns; medians over the rounds. Peak memory is that
of the whole process (VmHWM), loading included. `--sizes` gives other sizes to one part: tokens, rows, megabytes of text,
or folders of checkpoints. `--draw` writes FOLDER/scaling-PART.svg. `--points FILE` keeps what was measured, so that sizes
can be measured in several runs and drawn together (`--sizes` without any measures nothing); peers belong to one run.

After the table stands each contender beside its peer at every size. What rises by more than a tenth from the first size
to the last is marked; on busy cores times need more rounds than one for that to mean much.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from decode import PROMPT, TESTS, THREADS, Contender, Unavailable, read_by

ROWS_CONTEXT = 128  # tokens before, with many rows
# part -> (what its size is, sizes)
PARTS = {
    "context": ("tokens before", (128, 1000, 4000, 8000)),
    "rows": ("rows at once", (1, 4, 16, 32)),
    "tokenising": ("text (MB)", (0.1, 1, 10)),
    "export": ("weights (millions)", ("weights", "minilm", "smollm2")),
}
PROMPT_RATE, RATE, MEMORY = "prompt tokens/s", "new tokens/s", "peak memory (MB)"
TEXT_RATE, SECONDS = "MB/s", "seconds"


# ---- contenders: each makes a function of a size that returns figures. They import what they need. -------------------


def decoding(steps):
    """steps: (ids, count) -> yields as each of the new tokens is known."""
    # Warms up.
    list(steps([PROMPT * 10], 2))

    def measure(context, rows, tokens):
        ids = [[PROMPT[i % len(PROMPT)] for i in range(context)]] * rows
        times = [time.perf_counter(), *(time.perf_counter() for _ in steps(ids, tokens + 1))]
        first, *others = (after - before for before, after in zip(times, times[1:]))
        return {PROMPT_RATE: rows * context / first, RATE: rows / statistics.median(others)}

    return measure


def transformers(folder):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def steps(ids, count):
        ids, past = torch.tensor(ids), None
        for _ in range(count):
            out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids, past = out.logits.argmax(-1), out.past_key_values
            yield

    return decoding(steps)


def tinylm(folder):
    import torch

    from tinylm import TinyLM, generate_steps

    torch.set_num_threads(THREADS)
    lm = TinyLM.from_pretrained(folder, dtype=torch.float32)

    def steps(ids, count):
        config = lm.make_generation_config(max_new_tokens=count, eos_token_id=())
        return generate_steps(lm, torch.tensor(ids), None, config)

    return decoding(steps)


def onnx(folder, precision="fp32"):
    import numpy

    from onnxlm import CPU, OnnxLM, generate_steps

    lm = OnnxLM(folder, precision, providers=[CPU], threads=THREADS)

    def steps(ids, count):
        config = lm.make_generation_config(max_new_tokens=count, eos_token_id=())
        return generate_steps(lm, numpy.array(ids), None, config)

    return decoding(steps)


def genai(folder):
    import onnxruntime_genai

    model = onnxruntime_genai.Model(folder)

    def steps(ids, count):
        options, length = onnxruntime_genai.GeneratorParams(model), len(ids[0]) + count
        options.set_search_options(do_sample=False, max_length=length, batch_size=len(ids))
        generator = onnxruntime_genai.Generator(model, options)
        generator.append_tokens(ids)
        for _ in range(count):
            generator.generate_next_token()
            yield

    return decoding(steps)


def tokenising(encode):
    sources = Path(os.__file__).parent.rglob("*.py")
    sources = sorted(path for path in sources if "site-packages" not in path.parts)
    whole = "\n".join(path.read_text(errors="replace") for path in sources)
    encode(whole[-1000:])

    def measure(megabytes):
        text = whole[: int(megabytes * 1e6)]
        start = time.perf_counter()
        encode(text)
        return {TEXT_RATE: megabytes / (time.perf_counter() - start)}

    return measure


def of_runtime(folder):
    from onnxlm import load_tokenizer

    return tokenising(load_tokenizer(folder).encode)


def of_training(folder):
    from onnxlm import load_tokenizer
    from train import token_ids

    tokenizer = load_tokenizer(folder)
    return tokenising(lambda text: token_ids(tokenizer, text, special=False))


def of_transformers(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenising(lambda text: tokenizer(text, verbose=False))


def export(_, precision="fp32"):
    from export import export_onnx
    from tinylm import TinyLM

    def measure(folder):
        lm = TinyLM.from_pretrained(folder)
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            export_onnx(lm, out, precisions=[precision])
            seconds = time.perf_counter() - start
        return {SECONDS: seconds, "size": sum(p.numel() for p in lm.parameters()) / 1e6}

    return measure


# name -> (what makes it, its parts, its peer, its colour)
DECODING = ("context", "rows")
CONTENDERS = {
    "OnnxLM": (onnx, DECODING, "genai", "#1f77b4"),
    "genai": (genai, DECODING, None, "#d62728"),
    "OnnxLM int4": (functools.partial(onnx, precision="int4"), DECODING, "genai int4", "#6baed6"),
    "genai int4": (genai, DECODING, None, "#ff9896"),
    "tinylm": (tinylm, DECODING, "transformers", "#2ca02c"),
    "transformers": (transformers, DECODING, None, "#7f7f7f"),
    "OnnxLM.tokenizer": (of_runtime, ["tokenising"], "transformers' tokenizer", "#1f77b4"),
    "tinylm train": (of_training, ["tokenising"], "transformers' tokenizer", "#2ca02c"),
    "transformers' tokenizer": (of_transformers, ["tokenising"], None, "#7f7f7f"),
    "export fp32": (export, ["export"], None, "#1f77b4"),
    "export int8": (functools.partial(export, precision="int8"), ["export"], None, "#6baed6"),
}


def work(name, folder):
    """A contender's process: a line with the size comes in, a line with figures goes out."""
    sys.path.insert(0, str(TESTS.parent))
    measure = CONTENDERS[name][0](folder)
    for line in sys.stdin:
        request = json.loads(line)
        figures = measure(**request) if request else {}
        status = Path("/proc/self/status").read_text().split()
        figures[MEMORY] = int(status[status.index("VmHWM:") + 1]) / 1000
        print(json.dumps([figures]), flush=True)


def request_of(part, size, tokens):
    if part == "context":
        return {"context": int(size), "rows": 1, "tokens": tokens}
    if part == "rows":
        return {"context": ROWS_CONTEXT, "rows": int(size), "tokens": tokens}
    return {"megabytes": float(size)} if part == "tokenising" else {"folder": str(size)}


def measure_size(part, size, options, smollm2, scratch):
    """Yields (contender, size, figures): those that can run take turns."""
    request, running = json.dumps(request_of(part, size, options.tokens)), {}
    for name in options.only or CONTENDERS:
        if part not in CONTENDERS[name][1]:
            continue
        folder, python = smollm2, sys.executable
        try:
            if part in DECODING:
                folder, python = read_by(name, smollm2, scratch, options)
            contender = Contender(name, folder, python, scratch / f"{name}.log", __file__)
            contender.ask("null")  # until it is loaded
            running[contender] = []
        except Unavailable as reason:
            print(f"{name} is skipped: {reason}", file=sys.stderr)
    for i in range(options.rounds):
        for contender in list(running)[:: -1 if i % 2 else 1]:
            try:
                running[contender] += contender.ask(request)
            except Unavailable as reason:
                print(f"{contender.name} is skipped at {size}: {reason}", file=sys.stderr)
                del running[contender]
    for contender, rounds in running.items():
        contender.close()
        figures = {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        yield contender.name, figures.pop("size", size), figures


def report(part, points):
    """points: {contender: {size: figures}}. Prints the table, and each contender beside its peer."""
    names = list(next(iter(next(iter(points.values())).values())))
    print(
        f"\n| {PARTS[part][0]} | contender | {' | '.join(names)} |\n|---:|---|{'---:|' * len(names)}"
    )
    for size in sorted({size for sizes in points.values() for size in sizes}):
        for contender, sizes in points.items():
            if size in sizes:
                cells = " | ".join(f"{sizes[size][name]:,.4g}" for name in names)
                print(f"| {size:,.4g} | {contender} | {cells} |")
    print()
    for contender, sizes in points.items():
        theirs = points.get(CONTENDERS[contender][2], {})
        both = sorted(set(sizes) & set(theirs))
        for name in names if both else ():
            # of time or of memory
            costs = [sizes[size][name] / theirs[size][name] for size in both]
            costs = [1 / cost if name.endswith("/s") else cost for cost in costs]
            what = "memory" if name == MEMORY else f"time ({name})"
            shown = ", ".join(f"{cost:.2f} at {size:,.4g}" for cost, size in zip(costs, both))
            verdict = "  GROWS FASTER" if costs[-1] > 1.1 * costs[0] else ""
            print(f"{contender} over {CONTENDERS[contender][2]}, {what}: {shown}{verdict}")


def draw(part, points, file):
    """The SVG picture of a part: a panel for each figure."""
    import train

    names = next(iter(next(iter(points.values())).values()))
    train.CURVES |= {name: (row[3], 2, True) for name, row in CONTENDERS.items()}
    panels = []
    for name in names:
        curves = {
            contender: [(size, figures[name]) for size, figures in sorted(sizes.items())]
            for contender, sizes in points.items()
        }
        panels.append(train.Panel(name, curves, x=PARTS[part][0], low=0))
    file.write_text(train.draw_svg(panels))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--genai-python", default=sys.executable, help="a Python that has genai")
    parser.add_argument("--exported", type=Path, help="an export with fp32 and int4 (or makes one)")
    parser.add_argument("--sizes", nargs="*", help="other sizes, of one part; none: only draw")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="fewer contenders")
    parser.add_argument("--points", type=Path, help="a JSON file that keeps what was measured")
    parser.add_argument("--draw", type=Path, help="the folder of the pictures")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    if options.worker:
        return work(*options.worker)
    if {*options.parts} - {*PARTS} or options.sizes and len(options.parts) != 1:
        parser.error(f"expected parts out of {', '.join(PARTS)}, and one part with --sizes")
    os.environ |= {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    import conftest

    smollm2, kept = conftest.fetch_smollm2(), []
    folders = {"weights": TESTS.parent / "weights", "minilm": conftest.fetch_minilm()}
    folders["smollm2"] = smollm2
    if options.points and options.points.exists():
        kept = json.loads(options.points.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        for part in options.parts or PARTS:
            for size in PARTS[part][1] if options.sizes is None else options.sizes:
                size = folders.get(size, size) if part == "export" else float(size)
                new = list(measure_size(part, size, options, smollm2, Path(scratch)))
                again = [[part, name, size] for name, size, _ in new]
                kept = [point for point in kept if point[:3] not in again]
                kept += [[part, *point] for point in new]
                if options.points:
                    options.points.write_text(json.dumps(kept, indent=1))
            points = {
                name: {size: figures for *key, size, figures in kept if key == [part, name]}
                for name in CONTENDERS
            }
            points = {name: sizes for name, sizes in points.items() if sizes}
            if points:
                report(part, points)
                if options.draw:
                    draw(part, points, options.draw / f"scaling-{part}.svg")


if __name__ == "__main__":
    sys.exit(main())
