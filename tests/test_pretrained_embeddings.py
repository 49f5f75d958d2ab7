"""Folders of sentence-transformers, old and new: its vectors, from torch and from the exported folder."""

import importlib.util
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from families import save_word_tokenizer
from helpers import CPU

import onnxlm
import tinylm
import train
from export import OnnxLM, export_onnx
from tinylm import TinyLM
from train import main

pytest.importorskip("sentence_transformers")

TEXTS = ["w5 w6 w7", "W9", " ".join(f"w{5 + i}" for i in range(60)), "w11 w190 w12"]


def make(folder, kind="bert"):
    """A tiny model of random weights with a tokenizer."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(intermediate_size=48, max_position_embeddings=40)
    if kind == "bert":
        transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    elif kind == "gemma3":
        config = transformers.Gemma3TextConfig(
            **sizes | dict(num_hidden_layers=2, sliding_window=6, query_pre_attn_scalar=20),
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=0,
            use_bidirectional_attention=True,
            layer_types=["sliding_attention", "full_attention"],
        )
        transformers.Gemma3TextModel(config).save_pretrained(folder)
    else:
        config = transformers.Qwen3Config(
            **sizes, num_key_value_heads=1, head_dim=16, pad_token_id=0, tie_word_embeddings=True
        )
        transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    save_word_tokenizer(folder)
    names = {"mask_token": "[MASK]", "pad_token": "[PAD]", "tokenizer_class": "TokenizersBackend"}
    put(folder, "tokenizer_config.json", names)
    return folder


def put(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def modules(folder, *entries, prefix="sentence_transformers.models."):
    """modules.json with entries (class, folder)."""
    rows = [("Transformer", ""), *entries]
    put(
        folder,
        "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": prefix + kind}
            for i, (kind, path) in enumerate(rows)
        ],
    )


def old_pooling(**modes):
    def edit(folder):
        modules(folder, ("Pooling", "1_Pooling"))
        content = {"word_embedding_dimension": 32}
        content |= {f"pooling_mode_{name}": value for name, value in modes.items()}
        put(folder, "1_Pooling/config.json", content)

    return edit


def new_pooling(*modes, path="pool", **more):
    def edit(folder):
        modules(
            folder, ("Pooling", path), prefix="sentence_transformers.sentence_transformer.modules."
        )
        entries = json.loads((folder / "modules.json").read_text())
        entries[0]["type"] = "sentence_transformers.base.modules.transformer.Transformer"
        put(folder, "modules.json", entries)
        mode = modes[0] if len(modes) == 1 else list(modes)
        put(folder, f"{path}/config.json", {"embedding_dimension": 32, "pooling_mode": mode} | more)

    return edit


def saved(*layers, **options):
    """What sentence-transformers itself saves, with layers behind the pooling."""

    def edit(folder):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        torch.manual_seed(1)
        body = Transformer(str(folder), max_seq_length=20)
        made = [layer() for layer in layers]
        whole = SentenceTransformer(
            modules=[body, Pooling(32, "mean"), *made], device="cpu", **options
        )
        whole.save_pretrained(str(folder))

    return edit


def dense_of(width, out):
    from sentence_transformers.sentence_transformer.modules import Dense

    return Dense(width, out, bias=False, activation_function=torch.nn.Identity())


def dense(activation, bias=True):
    from sentence_transformers.sentence_transformer.modules import Dense

    return lambda: Dense(32, 24, bias=bias, activation_function=activation)


def norm():
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    layer = LayerNorm(24)
    torch.nn.init.normal_(layer.norm.weight), torch.nn.init.normal_(layer.norm.bias)
    return layer


def normalize():
    from sentence_transformers.sentence_transformer.modules import Normalize

    return Normalize()


def prompted(**more):
    def edit(folder):
        new_pooling("mean", "lasttoken", "weightedmean", "cls", include_prompt=False)(folder)
        prompts = {"query": "w20 w21 w22 ", "other": "w23 "}
        put(folder, "config_sentence_transformers.json", {"prompts": prompts} | more)

    return edit


def limited(file, **content):
    def edit(folder):
        old_pooling(mean_tokens=True)(folder)
        known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        put(folder, file, known | content)

    return edit


CASES = {
    "mean": old_pooling(mean_tokens=True),
    "none named": old_pooling(mean_tokens=False),
    "old, all": old_pooling(
        mean_tokens=True,
        cls_token=True,
        max_tokens=True,
        mean_sqrt_len_tokens=True,
        weightedmean_tokens=True,
        lasttoken=True,
    ),
    "new": new_pooling("cls"),
    "new, in its own order": new_pooling("weightedmean", "max", "mean", path="nested"),
    "dense": saved(dense(torch.nn.Tanh()), normalize),
    "dense without bias, layer norm": saved(dense(torch.nn.GELU(), bias=False), norm),
    "dense, several": saved(dense(torch.nn.Identity()), norm, truncate_dim=7),
    "default prompt": prompted(default_prompt_name="query"),
    "max_seq_length": limited("sentence_bert_config.json", max_seq_length=9),
    "of roberta's name": limited("sentence_roberta_config.json", max_seq_length=9),
    "in tokenizer_config.json": limited("tokenizer_config.json", model_max_length=11),
    "do_lower_case": limited("sentence_bert_config.json", do_lower_case=True),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(a tiny BERT, what the export makes of it)."""
    folder = make(tmp_path_factory.mktemp("bert") / "model")
    export_onnx(folder, folder.parent / "out")
    return folder, folder.parent / "out"


def theirs(folder, texts=TEXTS, **options):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts, **options)


def in_torch(folder):
    lm = train.opened({"folder": str(folder)})
    return train.TorchRunner(lm, folder)


def ours(model, texts=TEXTS, **options):
    return np.array([row["embedding"] for (row,) in onnxlm.run(model, texts, **options)])


def in_both(folder, exported, out):
    """The model in torch, and the exported graph with the folder's files."""
    shutil.copytree(exported, out)
    shutil.copyfile(folder / "tokenizer_config.json", out / "tokenizer_config.json")
    for name in onnxlm.sentence_files(folder):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    return in_torch(folder), OnnxLM(out, providers=CPU)


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_those_of_sentence_transformers(name, bert, tmp_path):
    folder = shutil.copytree(bert[0], tmp_path / "st")
    CASES[name](folder)
    expected = theirs(folder)
    for model in in_both(folder, bert[1], tmp_path / "out"):
        assert model.task == "embed"
        found = ours(model)
        assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-5


def test_prompts_are_chosen(bert, tmp_path, capsys):
    folder = shutil.copytree(bert[0], tmp_path / "st")
    prompted()(folder)
    models = in_both(folder, bert[1], tmp_path / "out")
    for options in ({}, {"prompt_name": "query"}, {"prompt_name": "other"}, {"prompt": "w30 w31 "}):
        expected = theirs(folder, **options)
        for model in models:
            assert np.abs(ours(model, **options) - expected).max() < 1e-5
    with pytest.raises(onnxlm.Error, match="^prompt_name = 'none', expected one of query, "):
        ours(models[1], prompt_name="none")
    assert train.main(["run", str(folder), "w9", "--prompt-name", "query", "--json"]) == 0
    first = capsys.readouterr().out
    assert onnxlm.main([str(tmp_path / "out"), "w9", "--prompt-name", "query", "--json"]) == 0
    pair = [json.loads(text)["output"][0]["embedding"] for text in (first, capsys.readouterr().out)]
    assert np.allclose(*pair, atol=1e-5)


def test_a_decoder_embeds(tmp_path):
    """As Qwen3-Embedding: a ForCausalLM with modules.json, whose last token counts."""
    folder = make(tmp_path / "st", "qwen3")
    new_pooling("lasttoken")(folder)
    expected = theirs(folder)
    export_onnx(folder, tmp_path / "out")
    for model in (in_torch(folder), OnnxLM(tmp_path / "out", providers=CPU)):
        assert np.abs(ours(model) - expected).max() < 1e-5


def test_embeddinggemma_embeds(tmp_path):
    """A Gemma 3 that looks both ways, in windows shorter than the texts, with two Dense layers and prompts."""
    folder = make(tmp_path / "st", "gemma3")
    back = lambda: dense_of(24, 32)  # noqa: E731
    saved(lambda: dense_of(32, 24), back, normalize, prompts={"query": "w20 w21 "})(folder)
    export_onnx(folder, tmp_path / "out")
    for options in ({}, {"prompt_name": "query"}):
        expected = theirs(folder, **options)
        for model in (in_torch(folder), OnnxLM(tmp_path / "out", providers=CPU)):
            assert np.abs(ours(model, **options) - expected).max() < 1e-5


def rename_type(name):
    return lambda folder: modules(folder, ("Pooling", "1_Pooling"), (name, "2"))


def pickled(folder):
    saved(dense(torch.nn.Tanh()))(folder)
    (folder / "2_Dense" / "model.safetensors").unlink()


def activated(folder):
    saved(dense(torch.nn.Tanh()))(folder)
    config = json.loads((folder / "2_Dense" / "config.json").read_text())
    put(folder, "2_Dense/config.json", config | {"activation_function": "torch.nn.PReLU"})


REFUSED = {
    "module": (rename_type("LSTM"), "modules.json: .*LSTM is not supported"),
    "of others": (rename_type("x.Custom"), "modules.json: .*Custom is not supported"),
    "pooling": (new_pooling("median"), "config.json: median is not supported"),
    "field of a pooling": (new_pooling("mean", trim=3), "config.json: trim is not supported"),
    "weights": (pickled, "model.safetensors: no such file"),
    "activation": (activated, "activation_function = 'torch.nn.PReLU'"),
    "task": (
        limited("sentence_bert_config.json", transformer_task="fill-mask"),
        "transformer_task is not supported",
    ),
    "outside": (new_pooling("mean", path="../elsewhere"), "modules.json: path '../elsewhere'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name, bert, tmp_path):
    edit, words = REFUSED[name]
    folder = shutil.copytree(bert[0], tmp_path / "st" / "st")
    edit(folder)
    with pytest.raises(ValueError, match=words) as error:
        ours(in_torch(folder))
    assert "\n" not in str(error.value)


def test_a_model_without_a_folder_embeds(bert):
    """Guards a model that was made or opened through the API."""
    lm = TinyLM.from_pretrained(bert[0], head=None)
    (row,) = onnxlm.run(train.TorchRunner(lm), ["w5 w6"])
    states = lm(torch.tensor([lm.tokenizer.encode("w5 w6")]))[0]
    assert row[0]["embedding"] == pytest.approx(states.mean(0).tolist(), abs=1e-6)


def test_files_are_read_once(bert, tmp_path, monkeypatch):
    folder = shutil.copytree(bert[0], tmp_path / "st")
    saved(dense(torch.nn.Tanh()))(folder)
    model, seen = in_torch(folder), []
    read = onnxlm.read_json
    monkeypatch.setattr(onnxlm, "read_json", lambda *path: seen.append(path) or read(*path))
    ours(model), seen.append("-"), ours(model)
    assert seen[-1] == "-"


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_threads_get_what_each_gets_alone(kind, bert, tmp_path):
    """Guards truncation as a setting of the tokenizer that all threads share: other vectors, silently."""
    folder = shutil.copytree(bert[0], tmp_path / "st")
    limited("sentence_bert_config.json", max_seq_length=9)(folder)
    model = in_both(folder, bert[1], tmp_path / "out")[kind == "onnx"]
    texts = ["w5 w6", "w7 " * 20, "w8 " * 500]
    ids = [np.arange(5, 5 + n)[None] for n in (3, 9, 30)]
    call = lambda i: model.forward(ids[i], np.ones_like(ids[i]))
    alone = [(ours(model, [text]), call(i)) for i, text in enumerate(texts)]
    wrong = []

    def work(first):
        for i in range(12):
            n = (first + i) % 3
            try:
                same = np.allclose(ours(model, [texts[n]]), alone[n][0], atol=1e-6)
                if not (same and np.allclose(call(n), alone[n][1], atol=1e-6)):
                    wrong.append(n)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not importlib.util.find_spec("optimum"), reason="optimum is not installed")
def test_sentence_transformers_runs_the_exported_folder(bert, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = shutil.copytree(bert[0], tmp_path / "st")
    saved(dense(torch.nn.Tanh()), normalize)(folder)
    expected = theirs(folder)
    export_onnx(folder, tmp_path / "out")
    model = SentenceTransformer(str(tmp_path / "out"), backend="onnx", device="cpu")
    assert np.abs(model.encode(TEXTS) - expected).max() < 1e-5


def test_an_error_of_the_runtime_is_an_error_of_the_command(tmp_path):
    assert issubclass(onnxlm.Error, ValueError) and issubclass(tinylm.Error, ValueError)
    assert onnxlm.main([str(tmp_path), "x"]) == 1


def test_modules_of_sentence_transformers_that_are_not_here(minilm, tmp_path, capsys):
    """Guards embeddings without a layer that the folder asks for."""
    out = shutil.copytree(minilm, tmp_path / "out")
    modules = json.loads((out / "modules.json").read_text())
    modules.append(
        {"idx": 3, "name": "3", "path": "3_LSTM", "type": "sentence_transformers.models.LSTM"}
    )
    (out / "modules.json").write_text(json.dumps(modules))
    assert main(["run", str(out), "x"]) == 1
    assert "LSTM" in capsys.readouterr().err
