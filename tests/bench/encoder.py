"""MiniLM (BERT, 22 M parameters) beside transformers and beside ONNX Runtime's own dynamic quantization.

    python tests/bench/encoder.py [--rounds 9] [--sentences FILE ...]

Texts per second, in batches of 1 x 16, 1 x 128 and 32 x 64 tokens, on 2 threads. Each contender lives in a process of
its own, since ONNX Runtime's threads wait busily and would take torch's cores; they take turns of a quarter of a second,
and the median of the rounds counts. "dynamic" is `onnxruntime.quantization.quantize_dynamic` of our fp32 graph. With
--sentences (a sentence a line; the bar is for rt-polarity.pos and rt-polarity.neg), follows the least cosine between an
embedding and that of fp32, in batches of 32. Bars: in each shape fp32 at least 1.3 times transformers and int8 at least
as fast as dynamic; a least cosine of int8 of 0.995.
"""

import argparse
import functools
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from decode import TESTS, THREADS, Contender, misses

SHAPES = (1, 16), (1, 128), (32, 64)
TURN = 0.25  # seconds


# ---- contenders: each makes a function of ids and mask that returns the states. They import what they need. ----------


def transformers(folder):
    import torch
    from transformers import AutoModel

    torch.set_num_threads(THREADS)
    model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def states(ids, mask):
        return model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state

    return states


def tinylm(folder):
    import torch

    from tinylm import TinyLM

    torch.set_num_threads(THREADS)
    lm = TinyLM.from_pretrained(folder)

    @torch.no_grad()
    def states(ids, mask):
        return lm(torch.from_numpy(ids), torch.from_numpy(mask))

    return states


def onnx(folder, precision="fp32"):
    from onnxlm import CPU, OnnxLM

    return OnnxLM(folder, precision, providers=[CPU], threads=THREADS)


# name -> (what makes it, the folder that it reads)
CONTENDERS = {
    "transformers": (transformers, "checkpoint"),
    "tinylm": (tinylm, "checkpoint"),
    "fp32": (onnx, "exported"),
    "int8": (functools.partial(onnx, precision="int8"), "exported"),
    "int4": (functools.partial(onnx, precision="int4"), "exported"),
    "dynamic": (onnx, "dynamic"),
}


def work(name, folder):
    """A contender's process: a line with a shape and a file comes in, to which it writes the states of all tokens; a line
    with seconds goes out."""
    sys.path.insert(0, str(TESTS.parent))
    states = CONTENDERS[name][0](folder)
    for line in sys.stdin:
        batch, length, file = json.loads(line)
        ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
        mask = np.ones_like(ids)
        # As in a batch of texts of like length.
        mask[1::2, length - 9 :] = 0
        np.save(file, np.asarray(states(ids, mask))[mask > 0])
        times = []
        while sum(times) < TURN:
            start = time.perf_counter()
            states(ids, mask)
            times.append(time.perf_counter() - start)
        print(json.dumps([statistics.median(times)]), flush=True)


def dynamic(folder: Path, out: Path):
    """ONNX Runtime's dynamic quantization of a folder's fp32 graph, as a folder of its own."""
    import shutil

    from onnxruntime.quantization import QuantType, quantize_dynamic

    shutil.copytree(folder, out)
    logging.disable(logging.WARNING)
    quantize_dynamic(
        folder / "onnx" / "model.onnx",
        out / "onnx" / "model.onnx",
        weight_type=QuantType.QInt8,
        # It breaks the Attention of opset 23.
        op_types_to_quantize=["MatMul", "Gather"],
    )


def measure(contenders: list, shape: tuple, rounds: int, scratch: Path) -> bool:
    """Prints the rows of a shape; returns whether a bar is missed."""
    batch, length = shape
    times = {contender.name: [] for contender in contenders}
    files = {name: scratch / f"{name}.npy" for name in times}
    for _ in range(rounds):
        for contender in contenders:
            request = *shape, str(files[contender.name])
            times[contender.name] += contender.ask(json.dumps(request))
    states = {name: np.load(file) for name, file in files.items()}
    speed = {name: batch / statistics.median(x) for name, x in times.items()}
    for name, rate in speed.items():
        print(
            f"| {batch} x {length} | {name} | {rate:.1f} | {rate / speed['fp32']:.2f} | "
            f"{rate / speed['transformers']:.2f} |"
        )
    missed = False
    for name in ("tinylm", "fp32"):
        expected = states["transformers"]
        error = np.abs(states[name] - expected).max() / np.abs(expected).max()
        if not error <= 1e-4:
            print(f"{name} differs from transformers by {error:.1e}  MISSED")
            missed = True
    bars = [("int8", "dynamic", 1.0), ("fp32", "transformers", 1.3)]
    return misses(speed, bars) or missed


def least_cosine(lm, other, sentences: list) -> float:
    """The least over the sentences between the embeddings of two models."""
    found = []
    for model in (lm, other):
        vectors = np.array([first["embedding"] for first, *_ in model.run(sentences)])
        found.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return float((found[0] * found[1]).sum(1).min())


def read_sentences(paths: list) -> list:
    """100 lines of each file, from all over it."""
    sentences = []
    for path in paths:
        # rt-polarity is Latin-1.
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        sentences += lines[:: max(1, len(lines) // 100)][:100]
    return sentences


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sentences", type=Path, nargs="+", default=[])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(*options.worker)
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    import conftest

    from export import export_onnx

    missed = False
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"checkpoint": conftest.fetch_minilm()}
        folders |= {name: Path(scratch, name) for name in ("exported", "dynamic")}
        export_onnx(folders["checkpoint"], folders["exported"], precisions=["fp32", "int8", "int4"])
        dynamic(folders["exported"], folders["dynamic"])
        contenders = [
            Contender(name, folders[kind], sys.executable, f"{scratch}/{name}.log", __file__)
            for name, (_, kind) in CONTENDERS.items()
        ]
        print("| texts x tokens | contender | texts/s | times fp32 | times transformers |")
        print("|---|---|---:|---:|---:|")
        for shape in SHAPES:
            missed |= measure(contenders, shape, options.rounds, Path(scratch))
        for contender in contenders:
            contender.close()
        sentences = read_sentences(options.sentences)
        exact = onnx(folders["exported"])
        for name in ("int8", "int4", "dynamic") if sentences else ():
            make, kind = CONTENDERS[name]
            cosine = least_cosine(exact, make(folders[kind]), sentences)
            verdict = "  MISSED" if name == "int8" and cosine < 0.995 else ""
            print(f"{name}: least cosine {cosine:.4f}{verdict}")
            missed |= bool(verdict)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
