"""Sentences per second of MiniLM (BERT, 22 M parameters): batches of 32 texts of 64 tokens, fp32, 2 threads.

    python tests/bench/encoder.py [--rounds 15]

OnnxLM, tinylm and transformers take turns in one process, and the median of the rounds counts. All must give the same
hidden states. Bar: OnnxLM at least 1.3 times transformers.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
BATCH, LENGTH, THREADS = 32, 64, 2


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    import conftest
    import torch
    from transformers import AutoModel

    from export import OnnxLM, export_onnx
    from tinylm import TinyLM

    torch.set_num_threads(THREADS)
    minilm = conftest.fetch_minilm()
    ids = torch.randint(1000, 30000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, LENGTH - 9 :] = 0  # as in a batch of texts of like length
    oracle, lm = AutoModel.from_pretrained(minilm).eval(), TinyLM.from_pretrained(minilm)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        export_onnx(lm, f"{scratch}/onnx")
        onnx_lm = OnnxLM(f"{scratch}/onnx", providers=["CPUExecutionProvider"], threads=THREADS)
        arrays = ids.numpy(), mask.numpy()
        contenders = {
            "transformers": lambda: oracle(ids, mask).last_hidden_state,
            "tinylm": lambda: lm(ids, mask),
            "OnnxLM": lambda: torch.from_numpy(onnx_lm(*arrays)),
        }
        states = {name: call()[mask.bool()] for name, call in contenders.items()}
        rates = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                rates[name].append(BATCH / (time.perf_counter() - start))
    reference = states["transformers"]
    print("| contender | sentences/s | times transformers | difference |\n|---|---:|---:|---:|")
    speed, missed = {name: statistics.median(rate) for name, rate in rates.items()}, False
    for name in contenders:
        error = ((states[name] - reference).abs().max() / reference.abs().max()).item()
        missed |= error > 1e-4
        print(
            f"| {name} | {speed[name]:.1f} | {speed[name] / speed['transformers']:.2f} | {error:.1e} |"
        )
    ratio = speed["OnnxLM"] / speed["transformers"]
    print(f"\nOnnxLM over transformers: {ratio:.2f} (bar: 1.3){'' if ratio >= 1.3 else '  MISSED'}")
    return int(missed or ratio < 1.3)


if __name__ == "__main__":
    sys.exit(main())
