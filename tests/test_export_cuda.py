"""What a machine without a GPU can say of CUDA: ONNX Runtime has a CUDA kernel for every node that an export writes."""

import functools
import itertools
import re
import tempfile
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
from families import FAMILIES, READERS, SPECIAL, WRITERS, some_slow
from rounding import LOOPS

from export import CUDA_PRECISIONS, PRECISIONS

ANY = "bfloat16 bool float16 float32 int32 int64 uint8"
FLOATS, NUMBERS = "bfloat16 float16 float32", "bfloat16 float16 float32 int32 int64"
# Operator -> types of its first data input, from docs/OperatorKernels.md of onnxruntime, CUDAExecutionProvider: what is
# there for opset 23, and no more operators than the graphs here have. Shapes and control flow run beside the device.
KERNELS = {
    "": {
        **dict.fromkeys("Add Div Mul Sub Max Min Neg Abs Pow".split(), NUMBERS),
        **dict.fromkeys(
            "Attention RMSNormalization RotaryEmbedding Gelu LayerNormalization MatMul Relu Sigmoid Softmax "
            "Tanh".split(),
            FLOATS,
        ),
        **dict.fromkeys("Cos Sin Log Reciprocal".split(), "float16 float32"),
        **dict.fromkeys(
            "Cast Concat Expand Gather GatherElements Identity If Reshape ScatterElements Slice Split Squeeze "
            "Transpose Unsqueeze".split(),
            ANY,
        ),
        **dict.fromkeys(
            "Equal Greater GreaterOrEqual Less LessOrEqual".split(), "float16 float32 int32 int64"
        ),
        **dict.fromkeys("And Not Or Where".split(), "bool"),
        "Shape": ANY + " int8",
        "ArgMax": "float16 float32",
        "Clip": "float16 float32 int64",
        "CumSum": "float16 float32 int32 int64",
        "GatherND": "bfloat16 bool float16 float32 int64",
        "Range": "float32 int32 int64",
        **dict.fromkeys(
            "ReduceMax ReduceMin ReduceSum TopK".split(), "float16 float32 int32 int64"
        ),
    },
    "com.microsoft": {
        **dict.fromkeys(("SkipSimplifiedLayerNormalization", "SkipLayerNormalization"), FLOATS),
        "GroupQueryAttention": "bfloat16 float16",
        "MatMulNBits": FLOATS,
        **dict.fromkeys(
            ("FastGelu", "FusedMatMul"), FLOATS
        ),  # these and the next are ONNX Runtime's own fusions
        **dict.fromkeys(("BiasGelu", "QuickGelu"), "float16 float32"),
    },
}
CACHES = {"int8"}  # of keys and values, beside the type of the queries
ON_CPU = {
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
}  # the hash that draws: only where text is sampled
CONTROL = {"Loop", "If"}  # they run beside the device, what is in them on it
NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.UINT64: "uint64",
    ir.DataType.BOOL: "bool",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT8: "int8",
}
# The C++ classes of the provider's kernels, where they are not called as the operator, or (None) have no name to find.
CLASSES = {
    "RMSNormalization": "RMSNorm",
    "LayerNormalization": "LayerNorm",
    "Identity": "IdentityOp",
    "SkipSimplifiedLayerNormalization": "SkipLayerNorm",
    "SkipLayerNormalization": "SkipLayerNorm",
    "Split": "Split_18",
    "Max": None,
    "Min": None,
    "Shape": None,
    "FusedMatMul": None,
}
MANGLED = {
    "float32": "f",
    "float16": "NS_9MLFloat16E",
    "bfloat16": "NS_8BFloat16E",
    "int32": "i",
    "int64": "l",
    "bool": "b",
    "uint8": "h",
}
KINDS = READERS + WRITERS + some_slow(FAMILIES + SPECIAL)


@pytest.mark.parametrize("name", KINDS, ids=str)
def test_every_node_has_a_cuda_kernel(name, exported_folder):
    for path in (exported_folder(name) / "onnx").glob("*.onnx"):
        if not path.stem.endswith("_cpu"):  # fp32's for the CPU
            assert not without_kernel(ir.load(path))


@pytest.mark.parametrize("cache", ["", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", CUDA_PRECISIONS)
def test_precisions_for_cuda_run_there(precision, cache, rounded, small_cache):
    if cache and PRECISIONS[precision].exact:
        pytest.skip("its attention has no cache in 8 bits")
    onnx = (small_cache("qwen3") if cache else rounded("qwen3")[1]) / "onnx"
    suffix = PRECISIONS[precision].suffix
    assert not without_kernel(ir.load(onnx / f"model{suffix}.onnx"))
    if cache or ("qwen3", precision) in LOOPS:
        loop = without_kernel(ir.load(onnx / f"generate{suffix}.onnx"))
        assert {name for name, types in loop if types != {"uint64"}} <= ON_CPU


@functools.cache
def kernel_classes() -> set:
    """Mangled names of the classes in the installed CUDA provider."""
    file = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not file.exists():
        pytest.skip("onnxruntime is installed without its CUDA provider")
    return set(re.findall(rb"N11onnxruntime(?:7contrib)?4cuda\d+\w+", file.read_bytes()))


@pytest.mark.parametrize(
    "domain, operator",
    [(domain, name) for domain in KERNELS for name in KERNELS[domain] if CLASSES.get(name, name)],
)
def test_the_table_agrees_with_the_installed_library(domain, operator):
    """A kernel is a class, a template of the type of its data or none."""
    name = CLASSES.get(operator, operator)
    prefix = f"N11onnxruntime{'7contrib' * bool(domain)}4cuda{len(name)}{name}"
    has = lambda kind: any(found.startswith((prefix + kind).encode()) for found in kernel_classes())  # noqa: E731
    assert has("I") or has("E")
    if (
        has("If") or has("I" + MANGLED["float16"])
    ) and operator != "Where":  # whose first input is a condition
        assert all(has("I" + MANGLED[kind]) for kind in KERNELS[domain][operator].split())
    if operator == "GroupQueryAttention":  # which is why fp32 does without it
        assert not has("If") and all(has(f"INS_9MLFloat16E{cache}E") for cache in ("S3_", "a"))


def optimised(model):
    """The graph as ONNX Runtime changes it before it runs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    )  # beyond: for CPUs alone
    options.log_severity_level = 3  # it warns that the file is for this machine
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/after.onnx"
        ir.save(ir.external_data.load_to_model(model), f"{folder}/before.onnx")
        onnxruntime.InferenceSession(f"{folder}/before.onnx", options, ["CPUExecutionProvider"])
        return ir.load(options.optimized_model_filepath)


def without_kernel(model):
    """Nodes without a CUDA kernel, before and after ONNX Runtime's own changes: (operator, types of its first
    input)."""
    found = []
    both = (
        ir.traversal.RecursiveGraphIterator(graph)
        for graph in (model.graph, optimised(model).graph)
    )
    for node in itertools.chain(*both):
        kernels = KERNELS[node.domain]
        types = {
            NAMES[value.dtype]
            for value in node.inputs[:1]
            if value is not None and value.dtype is not None
        }
        if (
            node.op_type == "GroupQueryAttention"
            and NAMES[node.inputs[3].dtype] not in types | CACHES
        ):
            found.append((node.op_type, NAMES[node.inputs[3].dtype]))
        if node.op_type not in CONTROL and not types <= set(kernels.get(node.op_type, "").split()):
            found.append((node.op_type, types))
    return found
