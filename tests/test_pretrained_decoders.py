"""Every decoder family against `transformers`: logits, padding, greedy tokens, and checkpoints there and back."""

import json
import shutil

import pytest
import torch
from families import (
    CASES,
    FAMILIES,
    LENGTH,
    Case,
    common,
    difference,
    gemma3,
    gpt2,
    load_oracle,
    prompts,
    ragged,
    rewrite_config,
    rewrite_tensors,
    rope,
    save,
)
from helpers import LAYOUTS, assert_same_weights, every, refuses
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import train
from tinylm import TinyLM

BY_NAME = {case.name: case for case in CASES}
LLAMA, GPT2 = BY_NAME["llama"], BY_NAME["gpt2"]


def refuses_to_load(folder, *words):
    refuses(lambda: TinyLM.from_pretrained(folder), *words)


# ---- what a model computes ------------------------------------------------------------------------------------------


@every(CASES)
@pytest.mark.parametrize("dialect", ["v5", "legacy"])
def test_logits_are_those_of_transformers(case, dialect, folder):
    """The prompt is longer than the sliding windows, and than max_position_embeddings of the dynamic rope."""
    ids = prompts(case, 2, LENGTH)
    ours = TinyLM.from_pretrained(folder(case, dialect))
    assert not ours.training and all(weight.dtype == torch.float32 for weight in ours.parameters())
    with torch.no_grad():
        logits = ours(ids)
        assert type(logits) is torch.Tensor
        assert difference(logits, load_oracle(folder(case, dialect))(ids).logits) < 1e-4


@every(CASES)
@pytest.mark.parametrize("padding", LAYOUTS)
@torch.no_grad()
def test_padded_rows_get_what_they_get_alone(case, padding, folder):
    ours = TinyLM.from_pretrained(folder(case))
    rows = [prompts(case, n, seed=n) for n in (5, LENGTH, 11)]
    batch, mask = ragged(rows, LAYOUTS[padding])
    logits = ours(batch, mask)
    for row, keep, prompt in zip(logits, mask.bool(), rows, strict=True):
        assert difference(row[keep], ours(prompt[None])[0]) < 1e-5


@every(CASES)
@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(case, folder):
    """Alone and in padded batches. The dynamic rope starts inside of max_position_embeddings and leaves it."""
    ours, oracle = TinyLM.from_pretrained(folder(case)), load_oracle(folder(case))
    rows = [prompts(case, n, seed=n) for n in (6, LENGTH, 14)]
    theirs = [
        oracle.generate(
            row[None],
            attention_mask=torch.ones_like(row[None]),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(row) :]
        for row in rows
    ]
    for row, new in zip(rows, theirs, strict=True):
        out = ours.generate(row[None], max_new_tokens=12, eos_token_id=())
        assert out[0].tolist() == row.tolist() + new.tolist()
    for padding in LAYOUTS.values():
        batch, mask = ragged(rows, padding)
        out = ours.generate(batch, mask, max_new_tokens=12, eos_token_id=())
        assert torch.equal(out[:, : batch.shape[1]], batch)
        assert out[:, batch.shape[1] :].tolist() == [new.tolist() for new in theirs]


def test_the_first_names_of_longrope(copy, folder):
    """Phi-3's first files say "su", and "yarn", of the same two lists."""
    case = BY_NAME["phi3-long"]
    expected = TinyLM.from_pretrained(folder(case))
    for kind in ("su", "yarn"):

        def rename(raw, kind=kind):
            rope = raw.pop("rope_parameters")
            raw["rope_theta"] = rope.pop("rope_theta")
            factors = {name: rope[name] for name in ("short_factor", "long_factor")}
            return raw | {"rope_scaling": {"type": kind} | factors}

        path = copy(case)
        rewrite_config(path, rename)
        assert TinyLM.from_pretrained(path).config == expected.config
        shutil.rmtree(path)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@every(CASES)
@pytest.mark.parametrize("dialect", ["v5", "legacy"])
def test_saved_folder_is_the_same_model_here_and_in_transformers(case, dialect, folder, tmp_path):
    """Load, save, load is bitwise equal; transformers misses no tensor of what we save and leaves none over."""
    ours = TinyLM.from_pretrained(folder(case, dialect))
    ours.save_pretrained(tmp_path)
    again = TinyLM.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert_same_weights(again, ours)
    before, after = load_oracle(folder(case)), load_oracle(tmp_path)
    assert_same_weights(after, before)
    ids = prompts(case, 2, LENGTH)
    with torch.no_grad():
        assert torch.equal(after(ids).logits, before(ids).logits)
    # What is tied is stored once, and nothing is stored that transformers would not store.
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        load_file(folder(case) / "model.safetensors")
    )


TEXT_SIZES = common(head_dim=14)
VISION_SIZES = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
) | dict(image_size=28, patch_size=14)


@pytest.mark.parametrize(
    "kind, text, vision",
    [
        ("gemma3", gemma3(), "siglip_vision_model"),
        ("mistral3", TEXT_SIZES | dict(model_type="mistral", sliding_window=None), "pixtral"),
        ("llava", TEXT_SIZES | dict(model_type="llama"), "clip_vision_model"),
    ],
)
def test_the_text_model_of_a_multimodal_folder(kind, text, vision, tmp_path):
    """Its tensors have another prefix, and its config lies inside: all of them were refused. It is saved as the text
    model alone."""
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=VISION_SIZES | dict(model_type=vision)
    )
    torch.manual_seed(0)
    oracle = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for parameter in oracle.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.1
    oracle.save_pretrained(tmp_path / "whole")
    with pytest.warns(UserWarning, match="only the text model is read, not .*vision"):
        ours = TinyLM.from_pretrained(tmp_path / "whole")
    ids = torch.randint(3, 200, (2, LENGTH))
    with torch.no_grad():
        expected = oracle(input_ids=ids).logits
        assert difference(ours(ids), expected) < 1e-4
        ours.save_pretrained(tmp_path / "text")
        assert difference(load_oracle(tmp_path / "text")(ids).logits, expected) < 1e-4
    assert_same_weights(TinyLM.from_pretrained(tmp_path / "text"), ours)


@pytest.mark.parametrize("name", ["gpt_neox", "qwen3_moe"])
def test_adapters_have_the_rows_of_the_stored_projections(name, folder, tmp_path):
    """GPT-NeoX stores q, k and v head by head; experts, which lie in one tensor, get no adapters."""
    path = folder(BY_NAME[name])
    lm = TinyLM.from_pretrained(path)
    train.add_adapters(lm, 2)
    for module in lm.modules():
        if isinstance(module, train.LoRA):
            torch.nn.init.normal_(module.b)
    train.save_adapter(tmp_path, lm, train.TrainOptions(init=str(path), lora=2))
    lm.save_pretrained(tmp_path / "merged")
    merged, before = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", path))
    (file,) = tmp_path.rglob("adapter_model.safetensors")
    adapter = load_file(file)
    assert not any("mlp.experts" in key for key in adapter)
    for key in before:
        a, b = (adapter.get(f"base_model.model.{key[:-7]}.lora_{side}.weight") for side in "AB")
        change = 0 if a is None else 2 * b @ a
        assert torch.allclose(merged[key], before[key] + change, atol=1e-5), key
    assert len(adapter) == 2 * lm.config.num_hidden_layers * 4


@every(FAMILIES)
def test_sharded_checkpoint(case, folder, tmp_path):
    save(case, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(TinyLM.from_pretrained(tmp_path), TinyLM.from_pretrained(folder(case)))


@every([LLAMA, BY_NAME["gemma"]])
def test_dtype_is_the_checkpoints_unless_given(case, copy):
    path = copy(case)
    rewrite_tensors(path, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    rewrite_config(path, lambda config: config | {"dtype": "bfloat16"})
    assert {weight.dtype for weight in TinyLM.from_pretrained(path).parameters()} == {
        torch.bfloat16
    }
    ours, ids = TinyLM.from_pretrained(path, dtype=torch.float32), prompts(case, 2, LENGTH)
    with torch.no_grad():
        assert difference(ours(ids), load_oracle(path)(ids).logits) < 1e-4


def test_saving_over_a_checkpoint_replaces_it(copy):
    path = copy(LLAMA)
    ours = TinyLM.from_pretrained(path)
    with torch.no_grad():
        next(ours.parameters()).add_(1)
    ours.save_pretrained(path)
    assert_same_weights(TinyLM.from_pretrained(path), ours)


# ---- published files ------------------------------------------------------------------------------------------------

PUBLISHED = {  # what config.json of the published checkpoints holds beside the sizes; none of it changes the logits
    "openai-community/gpt2": Case(
        "gpt2-published",
        "gpt2",
        gpt2(
            n_ctx=64,
            attn_pdrop=0.1,
            summary_activation=None,
            summary_first_dropout=0.1,
            summary_type="cls_index",
            summary_proj_to_labels=True,
            summary_use_proj=True,
            task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        ),
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Case(
        "smollm2-published",
        "llama",
        common(
            is_llama_config=True,
            rope_interleaved=False,
            rope_scaling=None,
            rope_theta=100000,
            pretraining_tp=1,
            use_cache=True,
            tie_word_embeddings=True,
            **{
                "transformers.js_config": {
                    "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}
                }
            },
        ),
    ),
    "meta-llama/Llama-3.2-1B-Instruct": Case(
        "llama3-published",
        "llama",
        common(
            attention_bias=False,
            eos_token_id=[2, 3, 4],
            head_dim=10,
            mlp_bias=False,
            rope_theta=500000.0,
            rope_scaling=dict(
                factor=32.0,
                high_freq_factor=4.0,
                low_freq_factor=1.0,
                rope_type="llama3",
                original_max_position_embeddings=16,
            ),
            tie_word_embeddings=True,
        ),
    ),
    "Qwen/Qwen2.5-0.5B": Case(
        "qwen2-published",
        "qwen2",
        common(
            max_window_layers=2,
            rope_theta=1000000.0,
            sliding_window=8,
            use_mrope=False,
            use_sliding_window=False,
        ),
    ),
    "google/gemma-2b": Case(
        "gemma-published",
        "gemma",
        common(
            hidden_act="gelu",
            hidden_activation=None,
            head_dim=14,
            rope_scaling=None,
            rope_theta=10000.0,
        ),
    ),
    "google/gemma-2-2b": Case(
        "gemma2-published",
        "gemma2",
        common(
            attn_logit_softcapping=50.0,
            cache_implementation="hybrid",
            final_logit_softcapping=30.0,
            head_dim=14,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=19,
            rope_theta=10000.0,
            sliding_window=8,
        ),
    ),
    "google/gemma-3-1b-it": Case(
        "gemma3-published",
        "gemma3_text",
        common(
            attn_logit_softcapping=None,
            cache_implementation="hybrid",
            eos_token_id=[1, 106],
            final_logit_softcapping=None,
            head_dim=14,
            query_pre_attn_scalar=19,
            rope_local_base_freq=10000,
            rope_scaling=None,
            rope_theta=1000000,
            sliding_window=8,
            sliding_window_pattern=6,
            num_hidden_layers=7,
        ),
    ),
    "google/gemma-3-270m": Case(
        "gemma3-270m-published",
        "gemma3_text",
        common(
            _sliding_window_pattern=6,
            layer_types=["sliding_attention", "full_attention"],
            use_bidirectional_attention=False,
            rope_local_base_freq=10000.0,
            rope_scaling=None,
            rope_theta=1000000.0,
            head_dim=14,
            query_pre_attn_scalar=19,
            sliding_window=8,
        ),
    ),
    "microsoft/Phi-3-mini-4k-instruct": Case(
        "phi3-published",
        "phi3",
        common(
            attention_bias=False,
            embd_pdrop=0.0,
            original_max_position_embeddings=64,
            resid_pdrop=0.0,
            rope_scaling=None,
            rope_theta=10000.0,
            sliding_window=8,
            auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        ),
    ),
    "bigcode/starcoder2-3b": Case(
        "starcoder2-published",
        "starcoder2",
        common(
            activation_function="gelu",
            attention_dropout=0.1,
            attention_softmax_in_fp32=True,
            embedding_dropout=0.1,
            layer_norm_epsilon=1e-5,
            mlp_type="default",
            norm_epsilon=1e-5,
            norm_type="layer_norm",
            residual_dropout=0.1,
            rope_theta=999999.4420358813,
            scale_attention_softmax_in_fp32=True,
            scale_attn_weights=True,
            sliding_window=8,
            use_bias=True,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_json_as_published(name, tmp_path):
    """Strictness must not refuse the very checkpoints that a family is for."""
    case = PUBLISHED[name]
    save(case, tmp_path)
    plain = {
        "model_type": case.family,
        "architectures": ["X"],
        "torch_dtype": "bfloat16",
        **case.fields,
    }
    rewrite_config(tmp_path, lambda config: plain | {"transformers_version": "4.45.0"})
    ids = prompts(case, 2, LENGTH)
    with torch.no_grad():
        assert (
            difference(
                TinyLM.from_pretrained(tmp_path, dtype=torch.float32)(ids),
                load_oracle(tmp_path)(ids).logits,
            )
            < 1e-4
        )


def test_published_gpt2_tensors(copy, folder):
    """The published file names no "transformer." and holds the causal masks as tensors."""

    def publish(tensors):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return tensors | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}

    path = copy(GPT2)
    rewrite_tensors(path, publish)
    assert_same_weights(TinyLM.from_pretrained(path), TinyLM.from_pretrained(folder(GPT2)))


def test_old_llama_rotary_buffers_are_left_out(copy, folder):
    path = copy(LLAMA)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(5) for i in range(2)}
    rewrite_tensors(path, lambda tensors: tensors | buffers)
    assert_same_weights(TinyLM.from_pretrained(path), TinyLM.from_pretrained(folder(LLAMA)))


def test_tied_head_that_is_stored_all_the_same(copy, folder):
    """Older tools wrote a tied head twice. A second copy that differs is no tied head, as transformers has it."""
    case = BY_NAME["llama-tied"]
    path = copy(case)
    rewrite_tensors(
        path,
        lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    )
    assert_same_weights(TinyLM.from_pretrained(path), TinyLM.from_pretrained(folder(case)))
    rewrite_tensors(
        path, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}
    )
    ids, lm = prompts(case, 2, LENGTH), TinyLM.from_pretrained(path)
    with torch.no_grad():
        assert difference(lm(ids), load_oracle(path)(ids).logits) < 1e-4


# ---- what must be refused -------------------------------------------------------------------------------------------


def test_missing_tensor(copy):
    path, name = copy(LLAMA), "model.layers.1.self_attn.k_proj.weight"
    rewrite_tensors(
        path, lambda tensors: {key: value for key, value in tensors.items() if key != name}
    )
    refuses_to_load(path, "model.safetensors", name)


def test_unexpected_tensor(copy):
    path, name = copy(LLAMA), "model.layers.1.self_attn.k_proj.bias"
    rewrite_tensors(path, lambda tensors: tensors | {name: torch.zeros(20)})
    refuses_to_load(path, "model.safetensors", name)


def test_tensor_of_a_layer_too_many(copy):
    path = copy(LLAMA)
    rewrite_config(path, lambda config: config | {"num_hidden_layers": 1})
    refuses_to_load(path, "model.safetensors", "model.layers.1.")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.layers.1.self_attn.k_proj.weight", (20, 61)),
        ("model.layers.1.self_attn.k_proj.weight", (40, 60)),
        ("model.layers.0.mlp.down_proj.weight", (82, 60)),
        ("model.norm.weight", (1,)),
        ("model.embed_tokens.weight", (212, 60)),
        ("lm_head.weight", (1, 60)),
    ],
)
def test_misshaped_tensor(name, shape, copy):
    """Shapes that broadcast, or that fit after a transposition, are wrong shapes too."""
    path = copy(LLAMA)
    rewrite_tensors(path, lambda tensors: tensors | {name: torch.zeros(shape)})
    refuses_to_load(path, "model.safetensors", name, shape[0])


def test_fused_tensors_whose_sizes_only_add_up(copy):
    """Guards the fused projection: swapped sizes of q and k have the right sum and are wrong all the same."""

    def swap(tensors):
        prefix = "model.layers.0.self_attn."
        q, k = tensors[prefix + "q_proj.weight"], tensors[prefix + "k_proj.weight"]
        return tensors | {prefix + "q_proj.weight": k.clone(), prefix + "k_proj.weight": q.clone()}

    path = copy(LLAMA)
    rewrite_tensors(path, swap)
    refuses_to_load(path, "model.safetensors", "model.layers.0.self_attn.")


def test_missing_shard(tmp_path):
    save(LLAMA, tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    refuses_to_load(tmp_path, shard.name)


def test_shard_without_a_tensor_that_the_index_promises(tmp_path):
    save(LLAMA, tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file(
        {name: t for name, t in tensors.items() if name != lost}, shard, metadata={"format": "pt"}
    )
    refuses_to_load(tmp_path, lost)


def test_truncated_weights(copy):
    path = copy(LLAMA)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuses_to_load(path, "model.safetensors")


def test_pickled_weights_only(copy):
    path = copy(LLAMA)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    refuses_to_load(path, "pytorch_model.bin", "safetensors")


def test_folder_without_weights(copy):
    path = copy(LLAMA)
    (path / "model.safetensors").unlink()
    refuses_to_load(path, "model.safetensors")


def test_folder_without_config(copy):
    path = copy(LLAMA)
    (path / "config.json").unlink()
    refuses_to_load(path, "config.json")
    shutil.rmtree(path)
    refuses_to_load(path, path)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"model_type": 3}', "{}"])
def test_broken_config(text, copy):
    path = copy(LLAMA)
    (path / "config.json").write_text(text)
    refuses_to_load(path, "config.json")


def test_unknown_model_type(copy):
    path = copy(LLAMA)
    rewrite_config(path, lambda config: config | {"model_type": "mamba"})
    refuses_to_load(path, "config.json", "model_type", "mamba", *(case.family for case in FAMILIES))


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("llama", "hidden_act", "foo"),
        ("gpt2", "activation_function", "foo"),
        ("gemma2", "hidden_activation", "foo"),
        ("llama", "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("llama", "is_causal", False),
        ("llama", "sliding_window", 7),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "add_cross_attention", True),
        ("qwen3", "layer_types", ["full_attention"] * 2 + ["linear_attention"]),
        ("mistral", "num_key_value_heads", 4),
        ("llama", "hidden_size", "60"),
        ("llama", "num_hidden_layers", 0),
        ("llama", "num_hidden_layers", None),
        ("llama", "rms_norm_eps", "1e-6"),
        ("llama", "head_dim", 15),
        ("llama", "tie_word_embeddings", "no"),
        ("llama", "attention_bias", "yes"),
    ],
)
def test_config_field_that_is_not_supported(family, field, value, copy):
    """The message names the file, the field and the value. An attention bias that is "yes" is no bias to guess at."""
    path = copy(BY_NAME[family])
    rewrite_config(path, lambda config: config | {field: value})
    shown = (
        value
        if isinstance(value, (str, int))
        else "linear_attention"
        if field == "layer_types"
        else ""
    )
    refuses_to_load(path, "config.json", field, shown)


@pytest.mark.parametrize(
    "parameters, words",
    [
        (
            rope(
                "longrope",
                short_factor=[1.0] * 5,
                long_factor=[2.0] * 4,
                original_max_position_embeddings=32,
            ),
            ["longrope", "long_factor of 5 positive numbers"],
        ),
        (rope("foo", factor=2.0), ["foo"]),
        (rope("linear"), ["factor"]),
        (rope("linear", factor="2"), ["factor", "2"]),
        (
            rope("llama3", factor=2.0, low_freq_factor=1.0, original_max_position_embeddings=32),
            ["high_freq_factor"],
        ),
        (dict(rope_type="default", rope_theta=-1.0), ["rope_theta", -1.0]),
    ],
)
@pytest.mark.parametrize("dialect", ["v5", "legacy"])
def test_rope_that_is_not_supported(dialect, parameters, words, copy):
    def change(config):
        if dialect == "v5":
            return config | {"rope_parameters": parameters}
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        return config | {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling}

    path = copy(LLAMA, dialect)
    rewrite_config(path, change)
    refuses_to_load(path, "config.json", *words)


VARIANTS = [  # (family, what differs from its first case): fields that change the logits in transformers
    ("gpt2", dict(tie_word_embeddings=False)),
    ("gpt2", dict(reorder_and_upcast_attn=True)),
    ("gpt2", dict(activation_function="silu")),
    ("gpt2", dict(activation_function="gelu_fast")),
    ("llama", dict(hidden_act="gelu_new")),
    ("llama", dict(hidden_act="quick_gelu")),
    ("llama", dict(hidden_act="relu2")),
    ("llama", dict(rope_parameters=rope(partial_rotary_factor=0.5), head_dim=16)),
    (
        "llama",
        dict(
            rope_parameters=rope(
                "yarn", 100.0, factor=4.0, original_max_position_embeddings=16, truncate=False
            ),
            head_dim=20,
        ),
    ),
    (
        "llama",
        dict(
            rope_parameters=rope(
                "yarn",
                100.0,
                factor=4.0,
                original_max_position_embeddings=16,
                mscale=0.7,
                mscale_all_dim=1.3,
            ),
            head_dim=20,
        ),
    ),
    (
        "llama",
        dict(
            rope_parameters=rope("yarn", 100.0, factor=4.0), head_dim=20, max_position_embeddings=20
        ),
    ),
    (
        "llama",
        dict(
            rope_parameters=rope("dynamic", factor=2.0, original_max_position_embeddings=8),
            max_position_embeddings=16,
        ),
    ),
    ("qwen2", dict(hidden_act="relu")),
    ("qwen2", dict(use_sliding_window=False, sliding_window=5, max_window_layers=1)),
    (
        "qwen2",
        dict(
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    ("qwen2", dict(layer_types=["full_attention"] * 2, use_sliding_window=True, sliding_window=5)),
    (
        "qwen3",
        dict(
            layer_types=["full_attention"] * 2,
            max_window_layers=0,
            use_sliding_window=True,
            sliding_window=5,
        ),
    ),
    ("gemma", dict(attention_bias=True)),
    ("gemma", dict(tie_word_embeddings=False)),
    ("gemma", dict(hidden_act="gelu")),
    ("gemma", dict(hidden_act="relu")),
    ("gemma2", dict(attention_bias=True)),
    ("gemma2", dict(tie_word_embeddings=False)),
    ("gemma2", dict(hidden_activation="silu")),
    ("gemma2", dict(layer_types=["full_attention"] * 3)),
    ("gemma2", dict(rope_parameters=rope("linear", factor=2.0))),
    ("gemma3_text", dict(attn_logit_softcapping=3.0)),  # which transformers ignores here
    ("gemma3_text", dict(attention_bias=True)),
    ("gemma3_text", dict(hidden_activation="relu")),
    (
        "gemma3_text",
        dict(
            rope_parameters=dict(
                full_attention=rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=16),
                sliding_attention=rope("linear", 100.0, factor=2.0),
            )
        ),
    ),
    ("gemma3_text", dict(layer_types=["full_attention"] * 3)),
    ("phi3", dict(rope_parameters=rope(partial_rotary_factor=0.4))),
    ("phi3", dict(hidden_act="gelu")),
    ("olmo2", dict(tie_word_embeddings=True)),
    ("olmo2", dict(hidden_act="relu")),
    ("starcoder2", dict(hidden_act="gelu")),
    ("starcoder2", dict(rope_parameters=rope("linear", factor=2.0))),
]


@pytest.mark.parametrize(
    "family, fields",
    VARIANTS,
    ids=lambda value: (
        value
        if isinstance(value, str)
        else "+".join(f"{key}={json.dumps(entry)}" for key, entry in value.items())[:60]
    ),
)
def test_right_or_refused_but_never_wrong(family, fields, tmp_path):
    """A field that matters is either computed as transformers computes it or named in an error."""
    case = Case("variant", family, BY_NAME[family].fields | fields)
    save(case, tmp_path)
    ids = prompts(case, 2, LENGTH)
    try:
        ours = TinyLM.from_pretrained(tmp_path)
    except ValueError as error:
        assert "config.json" in str(error) and "\n" not in str(error)
        words = set(fields) | {"rope_scaling"} | set(fields.get("rope_parameters", {}))
        assert any(word in str(error) for word in words), error
        return
    with torch.no_grad():
        assert difference(ours(ids), load_oracle(tmp_path)(ids).logits) < 1e-4
    ours.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert difference(ours(ids), load_oracle(tmp_path / "again")(ids).logits) < 1e-4
