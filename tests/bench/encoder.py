"""MiniLM (BERT, 22 M parameters) beside transformers and beside ONNX Runtime's own dynamic quantization.

    python tests/bench/encoder.py [--rounds 15] [--threads 2]

Texts per second, in batches of 1 x 16, 1 x 128 and 32 x 64 tokens. The contenders take turns in one process, and the
median of the rounds counts. "dynamic" is `onnxruntime.quantization.quantize_dynamic` of our fp32 graph. With --sentences
FILE..., a sentence a line (the bar is for rt-polarity.pos and rt-polarity.neg), follows the least cosine between an
embedding and that of fp32. Bars: in each shape fp32 at least 1.3 times transformers and int8 at least as fast as
dynamic; a least cosine of int8 of 0.995.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
SHAPES = (1, 16), (1, 128), (32, 64)


def dynamic(folder: Path):
    """Adds ONNX Runtime's dynamic quantization of a folder's fp32 graph, as a folder of its own."""
    import shutil

    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = folder.with_name("dynamic")
    shutil.copytree(folder, out)
    logging.disable(logging.WARNING)
    quantize_dynamic(
        folder / "onnx" / "model.onnx",
        out / "onnx" / "model.onnx",
        weight_type=QuantType.QInt8,
        # It breaks the Attention of opset 23.
        op_types_to_quantize=["MatMul", "Gather"],
    )
    return out


def least_cosine(lm, other, sentences: list) -> float:
    """The least over the sentences between the embeddings of two models."""
    found = []
    for model in (lm, other):
        vectors = np.array([first["embedding"] for first, *_ in model.run(sentences)])
        found.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return float((found[0] * found[1]).sum(1).min())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sentences", type=Path, nargs="+", default=[])
    options = parser.parse_args()
    import conftest
    import torch
    from transformers import AutoModel

    from export import OnnxLM, export_onnx
    from tinylm import TinyLM

    torch.set_num_threads(options.threads)
    minilm = conftest.fetch_minilm()
    oracle, lm = AutoModel.from_pretrained(minilm).eval(), TinyLM.from_pretrained(minilm)
    missed = False
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = Path(scratch) / "onnx"
        export_onnx(minilm, folder, precisions=["fp32", "int8", "int4"])
        load = lambda folder, name: OnnxLM(  # noqa: E731
            folder, name, providers=["CPUExecutionProvider"], threads=options.threads
        )
        exported = {name: load(folder, name) for name in ("fp32", "int8", "int4")}
        exported["dynamic"] = load(dynamic(folder), "fp32")
        print("| texts x tokens | contender | texts/s | times fp32 | times transformers |")
        print("|---|---|---:|---:|---:|")
        for batch, length in SHAPES:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(1000, 30000, (batch, length), generator=generator)
            mask = torch.ones_like(ids)
            # As in a batch of texts of like length.
            mask[1::2, length - 9 :] = 0
            arrays = ids.numpy(), mask.numpy()
            contenders = {
                "transformers": lambda: oracle(ids, mask).last_hidden_state,
                "tinylm": lambda: lm(ids, mask),
            }
            for name, onnx_lm in exported.items():
                contenders[name] = lambda onnx_lm=onnx_lm: torch.from_numpy(onnx_lm(*arrays))
            states = {name: call()[mask.bool()] for name, call in contenders.items()}
            reference = states["transformers"]
            for name in ("tinylm", "fp32"):
                error = (states[name] - reference).abs().max() / reference.abs().max()
                if error > 1e-4:
                    print(f"{name} differs from transformers by {error:.1e}  MISSED")
                    missed = True
            times = {name: [] for name in contenders}
            for _ in range(options.rounds * (4 if batch == 1 else 1)):
                for name, call in contenders.items():
                    start = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - start)
            speed = {name: batch / statistics.median(x) for name, x in times.items()}
            for name, rate in speed.items():
                print(
                    f"| {batch} x {length} | {name} | {rate:.1f} | {rate / speed['fp32']:.2f} | "
                    f"{rate / speed['transformers']:.2f} |"
                )
            bars = [("int8", "dynamic", 1.0), ("fp32", "transformers", 1.3)]
            for ours, theirs, bar in bars:
                ratio = speed[ours] / speed[theirs]
                verdict = "" if ratio >= bar else "  MISSED"
                print(f"{ours} over {theirs}: {ratio:.2f} (bar: {bar}){verdict}")
                missed |= ratio < bar
        sentences = read_sentences(options.sentences)
        for name, onnx_lm in exported.items():
            if sentences and name != "fp32":
                cosine = least_cosine(exported["fp32"], onnx_lm, sentences)
                verdict = "  MISSED" if name == "int8" and cosine < 0.995 else ""
                print(f"{name}: least cosine {cosine:.4f}{verdict}")
                missed |= bool(verdict)
    return int(missed)


def read_sentences(paths: list) -> list:
    """100 lines of each file, from all over it."""
    sentences = []
    for path in paths:
        # rt-polarity is Latin-1.
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        sentences += lines[:: max(1, len(lines) // 100)][:100]
    return sentences


if __name__ == "__main__":
    sys.exit(main())
