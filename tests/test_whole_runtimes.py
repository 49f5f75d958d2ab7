"""The exported folder, unchanged, in the runtimes that people have: each in an environment of its own, made once."""

import copy
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.parse
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import CACHE, ROOT
from families import assert_same_text

from export import PRECISIONS, WEIGHTS, OnnxLM, export_onnx
from onnxlm import MIN_ONNXRUNTIME
from tinylm import TinyLM

pytestmark = pytest.mark.slow
SCRIPTS = ROOT / "tests" / "interop"
# to round for: its own would take a minute to write
TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")[:1024] * 3
IDS, NEW = list(b"ROMEO:"), 20
NPM = ["onnxruntime-node@1.30.0", "@huggingface/transformers@4.3.1"]
GENAI = "onnxruntime-genai==0.18.0"
OPTIMUM = (  # before the packages of this environment: the newest of each that go with it
    "optimum==2.1.0 optimum-onnx==0.1.0 transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2 requests urllib3 "
    "certifi charset-normalizer idna"
).split()
TOLERANCES = {  # of the largest logit: other builds and processors round differently
    "fp32": 1e-3,
    "fp16": 0.02,
    "int8": 0.05,
    "int4": 0.05,
    "q4f16": 0.05,
}
OLDEST = "onnxruntime=={}.{}.*".format(*MIN_ONNXRUNTIME)
LLAMA = "llama-cpp-python==0.3.36"  # whose source package has llama.cpp and its scripts


@pytest.fixture(scope="session")
def shipped():
    """The first layers of the shipped model: what another runtime does wrong, it does wrong in two."""
    lm = TinyLM.from_pretrained(WEIGHTS)
    return first_layers(lm, 2)


def first_layers(lm, count):
    lm.layers = lm.layers[:count]
    types = lm.config.layer_types[:count]
    lm.config = replace(lm.config, num_hidden_layers=count, layer_types=types)
    return lm


@pytest.fixture(scope="session")
def folder(shipped, once):
    """It in every precision."""
    options = dict(precisions=[*PRECISIONS], generate=True, text=TEXT)
    return once("interop", lambda out: export_onnx(shipped, out, **options))


@functools.cache
def environment(name):
    """A folder with node_modules, a virtual environment or llama.cpp's source; skips with the reason where it cannot
    be had."""
    place = CACHE / f"interop-{name}"
    if name == "node":
        if not shutil.which("npm"):
            pytest.skip("npm is not installed")
        made = [
            [
                "npm",
                "install",
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
                "--prefix",
                str(place),
                *NPM,
            ]
        ]
    elif (
        name == "llama"
    ):  # its script runs in this environment, which has torch, with one more package
        pip = [sys.executable, "-m", "pip"]
        made = [
            [*pip, "install", "--quiet", "--target", place, "sentencepiece==0.2.1"],
            [
                *pip,
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary",
                ":all:",
                "--dest",
                place,
                LLAMA,
            ],
        ]
    elif name == "optimum":
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        made = [[*pip, "--target", place, *OPTIMUM]]
    else:
        made = [
            [sys.executable, "-m", "venv", place],
            [place / "bin" / "python", "-m", "pip", "install", "--quiet", GENAI],
        ]
    done = place / "done"
    if not done.exists():
        for command in made:
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                pytest.skip(f"{name}: {(run.stderr.strip().splitlines() or ['failed'])[-1]}")
        done.touch()
    return place


def said(*command, path=""):
    """What a program writes last; path: where Python looks first."""
    run = subprocess.run(
        [*map(str, command), json.dumps(IDS), str(NEW)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(path)},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


@functools.cache
def expected(folder, precision):
    """The text that this environment's onnxruntime writes, and the logits of all its columns."""
    onnx_lm = OnnxLM(folder, precision, providers=["CPUExecutionProvider"])
    ids = onnx_lm.generate(np.array([IDS]), max_new_tokens=NEW, eos_token_id=())
    return ids[0].tolist(), onnx_lm(ids)[0]


def check(ids, folder, precision, logits=None):
    """What another build wrote, and its logits behind the prompt."""
    ours, all_logits = expected(folder, precision)
    assert len(ids) == len(ours)
    if logits is not None:
        last = all_logits[len(IDS) - 1]
        assert np.abs(np.array(logits) - last).max() < TOLERANCES[precision] * np.abs(last).max()
    assert_same_text(ids, ours, all_logits, len(IDS), TOLERANCES[precision])


def in_node(script):
    """Node finds packages beside the script."""
    return shutil.copy(SCRIPTS / script, environment("node"))


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_one_call_of_onnxruntime_node_writes_the_text(precision, folder):
    path = folder / "onnx" / f"generate{PRECISIONS[precision].suffix}.onnx"
    check(said("node", in_node("generate.mjs"), path), folder, precision)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """generate.cpp, with the headers that this machine or Debian has and the library in Python's onnxruntime."""
    work = tmp_path_factory.mktemp("cpp")
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if not (library and shutil.which("g++")):
        pytest.skip("no g++, or no libonnxruntime.so in this onnxruntime")
    places = (
        path.parent
        for top in ("/usr/include", "/usr/local/include")
        for path in Path(top).rglob("onnxruntime_cxx_api.h")
    )
    headers = next(places, None) or debian_headers(work)
    (work / "libonnxruntime.so.1").symlink_to(library)
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-I",
            headers,
            SCRIPTS / "generate.cpp",
            work / "libonnxruntime.so.1",
            f"-Wl,-rpath,{work}",
            "-o",
            work / "generate",
        ],
        check=True,
    )
    return work / "generate"


def debian_headers(work):
    """Unpacked from its package, of a release that has one: nothing is installed."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        pytest.skip("no headers of onnxruntime, and no Debian to take them from")
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=work)
    site = run(["apt-get", "indextargets", "--format", "$(SITE)"]).stdout.split("\n")[0]
    (work / "list").write_text(f"deb {site} trixie main\n")
    for folder in ("lists/partial", "archives/partial"):
        (work / folder).mkdir(parents=True)
    apt = [
        "apt-get",
        "-qq",
        f"-oDir::Etc::SourceList={work}/list",
        "-oDir::Etc::SourceParts=-",
        f"-oDir::State::Lists={work}/lists",
        f"-oDir::Cache={work}",
        "-oAPT::Sandbox::User=root",
    ]
    for command in ([*apt, "update"], [*apt, "download", "libonnxruntime-dev"]):
        done = run(command)
        if done.returncode:
            pytest.skip(
                f"headers of onnxruntime: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
            )
    run(["dpkg-deb", "-x", next(work.glob("*.deb")), work], check=True)
    return work / "usr/include/onnxruntime"


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_one_call_of_cpp_writes_the_text(precision, folder, program):
    path = folder / "onnx" / f"generate{PRECISIONS[precision].suffix}.onnx"
    check(said(program, path), folder, precision)


@pytest.mark.parametrize(
    "precision, dtype",
    [("fp32", "fp32"), ("fp16", "fp16"), ("int8", "q8"), ("int4", "q4"), ("q4f16", "q4f16")],
)
def test_transformers_js(precision, dtype, folder):
    found = said("node", in_node("transformers.mjs"), folder, dtype)
    check(found["ids"], folder, precision, found["logits"])


@pytest.mark.parametrize("precision, dtype", [("fp32", "fp32"), ("int4", "q4")])
def test_a_page_in_chromium(precision, dtype, folder, tmp_path):
    """transformers.js and onnxruntime-web on WASM, in a browser that gets all files from a server on this machine."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not browser:
        pytest.skip("no Chromium is installed")
    said, done = [], threading.Event()

    class Server(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            top, _, rest = urllib.parse.urlparse(path).path.lstrip("/").partition("/")
            roots = {
                "node_modules": environment("node") / top,
                folder.name: folder,
                "page.html": SCRIPTS / top,
            }
            return str(roots.get(top, tmp_path / "nothing") / rest)

        def do_POST(self):
            said.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204), self.end_headers(), done.set()

        def log_message(self, *_):
            pass

    environment("node")
    query = urllib.parse.urlencode(
        dict(folder=folder.name, dtype=dtype, ids=json.dumps(IDS), count=NEW)
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{server.server_address[1]}/page.html?{query}"
        quiet = [
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
        ]
        process = subprocess.Popen(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                *quiet,
                f"--user-data-dir={tmp_path}",
                page,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert done.wait(120), "the page has said nothing"
        finally:
            process.kill(), process.wait(), server.shutdown()
    assert isinstance(said[0], list), said[0]
    check(said[0][0], folder, precision)
    check(said[0][1], folder, "fp32")


@pytest.mark.parametrize(
    "precision, int8_cache", [("fp32", False), ("int8", False), ("int8", True)]
)
def test_onnxruntime_genai(precision, int8_cache, shipped, folder, tmp_path):
    """Its own config names the file; here the same folder, exported with another precision first."""
    python = environment("genai") / "bin" / "python"
    out = folder
    if precision != "fp32":
        out = tmp_path / "out"
        export_onnx(shipped, out, precisions=[precision], int8_cache=int8_cache, text=TEXT)
    found = said(python, SCRIPTS / "genai.py", out)
    check(found["ids"], out, precision, found["logits"])


def test_onnxruntime_genai_searches_as_generation_config_says(shipped, folder, tmp_path):
    """Guards a search that only our own runtime knew of: nothing but the length is asked for."""
    lm, out = copy.copy(shipped), tmp_path / "out"
    lm.generation_config = {"repetition_penalty": 1.5}
    export_onnx(lm, out)
    found = said(environment("genai") / "bin" / "python", SCRIPTS / "genai.py", out)
    check(found["ids"], out, "fp32", found["logits"])
    assert found["ids"] != expected(folder, "fp32")[0]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_optimum(precision, folder):
    file = f"model{PRECISIONS[precision].suffix}.onnx"
    command = sys.executable, SCRIPTS / "optimum.py", folder, file
    found = said(*command, path=environment("optimum"))
    check(found["ids"], folder, precision, found["logits"])


def test_sentence_transformers_onnx_backend(minilm, tmp_path):
    """The same vectors as ours, from the same folder."""
    texts = ["A cat sits on the mat.", "Stocks fell sharply on Monday, analysts said."]
    export_onnx(minilm, tmp_path / "out")
    run = subprocess.run(
        [sys.executable, SCRIPTS / "sentences.py", tmp_path / "out", json.dumps(texts)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(environment("optimum"))},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    theirs = np.array(json.loads(run.stdout.strip().splitlines()[-1]))
    ours = OnnxLM(tmp_path / "out", providers=["CPUExecutionProvider"]).run(texts)
    assert np.abs(theirs - [vector["embedding"] for (vector,) in ours]).max() < 1e-5


def test_an_embedder_in_8_bits_in_javascript(minilm, tmp_path):
    """transformers.js in Node, and onnxruntime-web on WASM, round activations and multiply integers as we do."""
    texts = ["A cat sits on the mat.", "Stocks fell sharply on Monday, analysts said."]
    out = tmp_path / "out"
    export_onnx(minilm, out, precisions=["fp32", "int8"])
    command = "node", in_node("sentences.mjs"), out, "q8", "model_quantized.onnx", json.dumps(texts)
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for precision, least in (("int8", 0.998), ("fp32", 0.995)):
        onnx_lm = OnnxLM(out, precision, providers=["CPUExecutionProvider"])
        ours = np.array([vector["embedding"] for (vector,) in onnx_lm.run(texts)])
        for vectors in json.loads(run.stdout.strip().splitlines()[-1]):
            assert (ours * vectors).sum(-1).min() > least


@pytest.mark.parametrize("release", [OLDEST, "onnxruntime"], ids=["oldest", "newest"])
def test_the_oldest_and_the_newest_onnxruntime(release, folder):
    """Guards weights that an older release reads wrongly: 4 and 8 bits of the graph around a Loop, before 1.29."""
    environment_path = os.environ | {"PYTHONPATH": f"{onnxruntime_of(release)}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [sys.executable, SCRIPTS / "runtime.py", folder, json.dumps(IDS), str(NEW)],
        capture_output=True,
        text=True,
        env=environment_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    version = found.pop("version")
    assert release == "onnxruntime" or version.split(".")[:2] == [*map(str, MIN_ONNXRUNTIME)]
    assert set(found) == set(PRECISIONS)
    for precision, said in found.items():
        check(said["ids"], folder, precision, said["logits"])
        check(said["one_call"], folder, precision)


def onnxruntime_of(release):
    """A folder with a release of onnxruntime and nothing else, for PYTHONPATH."""
    place = CACHE / ("interop-" + release.replace("==", "-").removesuffix(".*"))
    if not (place / "done").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        run = subprocess.run([*pip, "--target", place, release], capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f"{release}: {(run.stderr.strip().splitlines() or ['failed'])[-1]}")
        (place / "done").touch()
    return place


def test_llama_cpp_converts_the_folder(smollm2, tmp_path):
    """Its own script reads the folder, tokenizer and chat template included; transformers reads back what it wrote."""
    from transformers import AutoModelForCausalLM

    place, out, gguf = environment("llama"), tmp_path / "out", tmp_path / "model.gguf"
    export_onnx(first_layers(TinyLM.from_pretrained(smollm2), 2), out, onnx=False)
    with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    script = next(tmp_path.rglob("convert_hf_to_gguf.py"))
    run = subprocess.run(
        [sys.executable, script, out, "--outtype", "f32", "--outfile", gguf],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(place)},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found, expected = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).state_dict()
        for folder, options in ((tmp_path, {"gguf_file": gguf.name}), (out, {}))
    )
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )
