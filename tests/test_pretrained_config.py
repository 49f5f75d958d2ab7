"""config.json in every dialect: what transformers computes is computed, what would change it is refused, and what
means nothing is ignored with one warning."""

import dataclasses
import functools
import inspect
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from families import (
    CASES,
    ENCODERS,
    SEQ2SEQ,
    common,
    difference,
    load_oracle,
    prompts,
    rewrite_config,
    rewrite_tensors,
    save,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import pretrained
import tinylm
from pretrained import config_from_hf
from tinylm import Config, TinyLM

NAMES = [name for name in pretrained.FAMILIES if name != "tinylm"]
RAW = {  # a config.json with nothing but sizes, for each family
    name: {"model_type": name}
    | {
        pretrained.FAMILIES[name].fields[ours]: value
        for ours, value in dict(
            vocab_size=99,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_encoder_layers=3,
            encoder_attention_heads=8,
            encoder_intermediate_size=40,
            intermediate_size=48,
        ).items()
        if ours in pretrained.FAMILIES[name].fields
    }
    for name in NAMES
}
RAW["gpt_neox"]["hidden_size"] = 256  # a quarter of each head rotates
LLAMA, BERT, BART = RAW["llama"], RAW["bert"], RAW["bart"]


def warned(call):
    """What a call returns, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in caught]


# ---- fields ---------------------------------------------------------------------------------------------------------

IGNORED = [
    (LLAMA, dict(unsloth_fixed=True, max_sequence_length=2048, use_sdpa=True)),
    (LLAMA, dict(alphabet=["A", "C", "G", "T"], tokenizer_name="x", local_rank=3, seq_length=9)),
    (LLAMA, dict(a_field_of_tomorrow="truthy", mask_token_id=4, bos_token="<s>")),
    (LLAMA, dict(tensor_parallel=2, converted_from="a folder", context_window=4096)),
    (LLAMA, dict(partial_rotary_factor=0.5, is_decoder=True, position_embedding_type="rope")),
    (LLAMA, dict(embedding_multiplier=12.0, logits_scaling=8.0, num_experts=8, alibi=True)),
    (LLAMA, dict(use_bidirectional_attention=True, attn_logit_softcapping=30.0, qk_norm=True)),
    (LLAMA, dict(rope_scaling=dict(rope_type="default", mrope_section=[1, 1]))),
    (BERT, dict(sentence_transformers=dict(activation_fn="torch.nn.modules.linear.Identity"))),
    (BERT, dict(sbert_ce_default_activation_function="torch.nn.Identity", cls_token_id=2)),
    (BERT, dict(num_key_value_heads=8, head_dim=3, embedding_size=16, sliding_window=9)),
    (BART, dict(a_field_of_tomorrow="truthy", gpu=3, normalize_before=True)),
    (RAW["gpt2"], dict(head_dim=3, rope_theta=5.0)),
    (RAW["qwen2"], dict(attention_bias=True)),
    (RAW["gemma2"], dict(sliding_window_pattern=3, hidden_act="silu")),
]


@pytest.mark.parametrize("raw, fields", IGNORED)
def test_what_the_class_does_not_have_is_ignored_with_one_warning(raw, fields):
    """Guards the fields that other tools write, for which whole hubs of checkpoints were refused, and the list of feared
    words that refused what transformers ignores."""
    config, said = warned(lambda: config_from_hf(raw | fields))
    assert config == config_from_hf(raw)
    inner = fields.get("rope_scaling", {}).keys() - {"rope_type"}
    words = inner or fields
    assert len(said) == 1 and "\n" not in said[0] and all(name in said[0] for name in words)


NEUTRAL = [
    (LLAMA, dict(layer_types=["full_attention"] * 4, rope_interleaved=False, use_alibi=False)),
    (LLAMA, dict(sliding_window=None, num_experts=0, use_mrope=False, attn_logit_softcapping=None)),
    (LLAMA, dict(is_causal=True, quantization_config=None, auto_map={"AutoConfig": "x.MyConfig"})),
    (LLAMA, dict(use_cache=False, torch_dtype="float16", _attn_implementation="eager")),
    (LLAMA, dict(rope_scaling=dict(rope_type="default"), attn_implementation="sdpa")),
    (BART, dict(num_hidden_layers=4, num_attention_heads=8)),
    (BART, dict(num_hidden_layers=9)),  # as in distilled ones; encoder_layers and the tensors tell
    (RAW["gpt2"], dict(n_ctx=9, hidden_size=64)),
    (RAW["mistral"], dict(layer_types=["sliding_attention"] * 4, sliding_window=9)),
    (RAW["gemma"], dict(use_bidirectional_attention=False)),
    (RAW["phi3"], dict(original_max_position_embeddings=4096)),
    (RAW["phi3"], dict(auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})),
    (BERT, dict(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")),
    (BART, dict(is_encoder_decoder=True, is_decoder=False, hidden_size=64)),
    (RAW["t5"], dict(is_gated_act=False, dense_act_fn="relu", is_encoder_decoder=True)),
]


@pytest.mark.parametrize("raw, fields", NEUTRAL)
def test_a_value_that_changes_nothing_is_read_in_silence(raw, fields):
    config, said = warned(lambda: config_from_hf(raw | fields))
    window = fields.get("sliding_window", config.sliding_window)
    assert config == config_from_hf(raw | dict(sliding_window=window)) and not said


REFUSED = [  # what transformers computes with in that family, or in any, and this library does not
    (LLAMA, dict(is_causal=False)),
    (LLAMA, dict(layer_types=["full_attention", "sliding_attention"] * 2)),
    (LLAMA, dict(sliding_window=16)),
    (LLAMA, dict(attention_chunk_size=16)),
    (LLAMA, dict(quantization_config={"quant_method": "gptq"})),
    (LLAMA, dict(quantization={"bits": 4})),
    (LLAMA, dict(compression_config={"quant_method": "compressed-tensors"})),
    (LLAMA, dict(per_layer_config={"0": {"rms_norm_eps": 0.5}})),
    (LLAMA, dict(transformers_weights="consolidated.safetensors")),
    (LLAMA, dict(text_config={"hidden_size": 3})),
    (LLAMA, dict(auto_map={"AutoModelForCausalLM": "modeling_mine.MyForCausalLM"})),
    (BERT, dict(auto_map={"AutoModel": "someone/bert--modeling_bert.JinaBertModel"})),
    (LLAMA, dict(is_encoder_decoder=True)),
    (BERT, dict(is_decoder=True)),
    (BERT, dict(add_cross_attention=True)),
    (BERT, dict(is_encoder_decoder=True)),
    (BERT, dict(position_embedding_type="relative_key")),
    (BART, dict(is_decoder=True)),
    (BART, dict(num_attention_heads=16)),
    (RAW["gpt2"], dict(scale_attn_by_inverse_layer_idx=True)),
    (RAW["gpt2"], dict(add_cross_attention=True)),
    (RAW["gpt2"], dict(sliding_window=16)),
    (RAW["gpt2"], dict(hidden_size=32)),
    (RAW["t5"], dict(dense_act_fn="gelu_new")),
    (RAW["gemma3_text"], dict(attn_logit_softcapping=30.0)),
]


@pytest.mark.parametrize("raw, fields", REFUSED)
def test_what_would_change_the_model_is_refused(raw, fields):
    with pytest.raises(tinylm.Error, match=next(iter(fields))) as error:
        config_from_hf(raw | fields)
    assert "\n" not in str(error.value)


def test_every_family_has_a_case():
    """The one line that a new row needs in the tests: a config in families.py."""
    assert {case.family for case in [*CASES, *ENCODERS, *SEQ2SEQ]} == {*NAMES}


@functools.cache
def read_in(path):
    """Names that a module of transformers reads from a config."""
    text = path.read_text()
    asked = re.findall(r'(?:get|has)attr\([\w.]*config, "(\w+)"', text)
    return {*re.findall(r"config\.(\w+)", text), *asked}


@pytest.mark.parametrize("name", NAMES)
def test_no_field_that_transformers_reads_is_ignored(name):
    """Each field of its class, and each that its model reads, is read, refused or known to change nothing: a field that
    a new version of transformers adds fails here."""
    kind, root = CONFIG_MAPPING[name], Path(transformers.__path__[0])
    (model,) = Path(inspect.getfile(kind)).parent.glob("modeling_*.py")
    own = {field.name for field in dataclasses.fields(kind)} | {*kind.attribute_map}
    shared = (root / "masking_utils.py", root / "cache_utils.py")
    causal = pretrained.FAMILIES[name].fixed.get("causal", True)
    read = set().union(*map(read_in, [model, *(shared if causal else ())]))
    read -= {*dir(transformers.PreTrainedConfig)}
    # Of states, pictures, models with another name in the same file, and heads that we don't have.
    read -= {"number_of_conv_states", "image_token_id", "mm_tokens_per_image", "vision_config"}
    read -= {"embedding_size", "hidden_dropout"} - own
    for field in own | read:
        try:
            _, said = warned(lambda field=field: config_from_hf(RAW[name] | {field: "strange"}))
        except tinylm.Error:
            continue
        assert not said, field


@functools.cache
def foreign_fields():
    """Field -> some value, of the config classes of all language models that transformers has."""
    found = {}
    for kind in ("CAUSAL", "MASKED", "SEQ_TO_SEQ_CAUSAL"):
        for name in getattr(modeling_auto, f"MODEL_FOR_{kind}_LM_MAPPING_NAMES"):
            for field in dataclasses.fields(CONFIG_MAPPING[name]):
                if isinstance(field.default, (bool, int, float, str)):
                    found[field.name] = field.default or 3
    # Every config class checks that these agree, and computes nothing with them.
    return {k: v for k, v in found.items() if k not in ("embed_dim", "num_heads")}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "t5"])
@torch.no_grad()
def test_what_we_ignore_transformers_ignores(name, copy, oracle):
    """The fields of all other families, one of each name, under a model_type of ours: those that are not refused change
    nothing in transformers, with a cache and without."""
    case = next(case for case in [*CASES, *ENCODERS, *SEQ2SEQ] if case.name == name)
    folder = copy(case)
    raw = json.loads((folder / "config.json").read_text())
    ignored = {}
    for field, value in foreign_fields().items():
        try:
            _, said = warned(lambda field=field, value=value: config_from_hf(raw | {field: value}))
        except tinylm.Error:
            continue
        ignored |= {field: value} if said else {}
    assert len(ignored) > 500
    rewrite_config(folder, lambda raw: raw | ignored)
    ids, changed = prompts(case, 1, 20), load_oracle(folder, case.head)
    more = dict(decoder_input_ids=ids) if case.head == "seq2seq" else {}
    assert torch.equal(changed(ids, **more).logits, oracle(case)(ids, **more).logits)
    if case.head != "mlm":
        options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = oracle(case).generate(ids, **options)
        assert torch.equal(changed.generate(ids, **options), expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_there_means_what_transformers_takes(name):
    """A config.json with nothing but sizes, and the one that transformers makes of it, are one Config."""
    full = json.loads(json.dumps(CONFIG_MAPPING[name](**RAW[name]).to_dict(), default=str))
    ours, theirs = config_from_hf(RAW[name]), config_from_hf(full | {"id2label": None})
    assert ours == theirs


def test_second_names_of_a_size():
    """As the attribute_map of transformers has them: a GPT-2 whose file says hidden_size and not n_embd."""
    for name in ("gpt2", "distilbert", "t5", "bart"):
        row, raw = pretrained.FAMILIES[name], dict(RAW[name])
        config = config_from_hf(raw)
        for alias, key in row.aliases.items():
            if key in raw:
                raw[alias] = raw.pop(key)
        assert config_from_hf(raw) == config and alias in raw


@pytest.mark.parametrize("name", NAMES)
def test_config_json_always_says_what_the_model_is_for(name):
    """`architectures` names a class of transformers, from which the head is read again."""
    for head in pretrained.FAMILIES[name].heads:
        config = config_from_hf(RAW[name], head=head)
        raw = pretrained.config_to_hf(config)
        assert hasattr(transformers, raw["architectures"][0])
        assert config_from_hf(raw) == config
        assert pretrained.FAMILIES[name].head_key(config) == head


def test_config_from_hf_takes_the_dict_alone():
    """And leaves it as it is: guards a theta that a second reading did not find."""
    local = dict(full_attention=dict(rope_theta=7.0), sliding_attention=dict(rope_theta=5.0))
    for raw in (LLAMA, RAW["gemma3_text"] | dict(rope_parameters=local)):
        before = json.dumps(raw)
        config = config_from_hf(raw)
        assert config.head == "lm" and config_from_hf(raw) == config and json.dumps(raw) == before


def test_a_model_of_no_family_keeps_its_rope():
    """Guards yarn's truncate, which is dropped where transformers does not read it, as for Gemma 3's layers of two kinds."""
    scaling = YARN | dict(truncate=False)
    config = Config(model_type="tinylm", rope_scaling=scaling, rope_local_base_freq=30.0)
    assert config_from_hf(pretrained.config_to_hf(config)) == config


# ---- a tied tensor under its other name ------------------------------------------------------------------------------

OTHER_NAMES = [  # (case, the name that is there, the one that is not)
    ("llama-tied", "lm_head", "model.embed_tokens"),
    ("gemma", "lm_head", "model.embed_tokens"),
    ("gpt2", "lm_head", "transformer.wte"),
    ("bert-mlm", "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    ("roberta-mlm", "lm_head.decoder", "roberta.embeddings.word_embeddings"),
    ("distilbert-mlm", "vocab_projector", "distilbert.embeddings.word_embeddings"),
    ("electra-mlm", "generator_lm_head", "electra.embeddings.word_embeddings"),
    ("bart", "lm_head", "model.shared"),
    ("bart", "model.decoder.embed_tokens", "model.shared"),
    ("mbart", "model.encoder.embed_tokens", "model.shared"),
    ("marian", "model.decoder.embed_tokens", "model.shared"),
    ("t5", "decoder.embed_tokens", "shared"),
    ("t5", "encoder.embed_tokens", "shared"),
    ("t5-v1.1", "decoder.embed_tokens", "shared"),
    ("t5", "lm_head", "shared"),
]


@pytest.mark.parametrize("name, there, lost", OTHER_NAMES)
def test_a_tied_weight_under_its_other_name_only(name, there, lost, copy, folder):
    """Guards what other writers leave: lm_head without embed_tokens, decoder.embed_tokens without shared."""
    case = next(case for case in [*CASES, *ENCODERS, *SEQ2SEQ] if case.name == name)
    path = copy(case)

    def rename(tensors):
        assert there + ".weight" not in tensors
        return {key.replace(lost + ".weight", there + ".weight"): t for key, t in tensors.items()}

    rewrite_tensors(path, rename)
    ours, expected = TinyLM.from_pretrained(path), TinyLM.from_pretrained(folder(case))
    assert ours.config == expected.config
    for key, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["bert-mlm", "roberta-mlm"])
def test_a_bias_under_its_other_name_only(name, copy, folder):
    case = next(case for case in ENCODERS if case.name == name)
    path, out = copy(case), {"bert-mlm": "cls.predictions", "roberta-mlm": "lm_head"}[name]
    rewrite_tensors(
        path,
        lambda tensors: {
            k.replace(out + ".bias", out + ".decoder.bias"): t for k, t in tensors.items()
        },
    )
    expected = TinyLM.from_pretrained(folder(case)).head.out.bias
    assert torch.equal(TinyLM.from_pretrained(path).head.out.bias, expected)


def test_another_head_of_a_checkpoint_whose_embedding_has_only_the_heads_name(copy, folder):
    case = next(case for case in ENCODERS if case.name == "bert-mlm")
    path = copy(case)
    lost, there = "bert.embeddings.word_embeddings", "cls.predictions.decoder"
    rewrite_tensors(path, lambda tensors: {k.replace(lost, there): t for k, t in tensors.items()})
    for head in (None, "classify"):
        lm = TinyLM.from_pretrained(path, head=head)
        expected = TinyLM.from_pretrained(folder(case)).embed.weight
        assert torch.equal(lm.embed.weight, expected)


# ---- rotary positions -----------------------------------------------------------------------------------------------

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
V5 = dict(rope_type="default", rope_theta=500.0)
DIALECTS = {
    "rope_scaling beside rope_parameters": dict(rope_parameters=V5, rope_scaling=YARN),
    "theta in rope_scaling": dict(rope_scaling=YARN | dict(rope_theta=99.0)),
    "theta in rope_scaling and beside": dict(
        rope_scaling=YARN | dict(rope_theta=9.0), rope_theta=70.0
    ),
    "theta in rope_parameters and beside": dict(rope_parameters=V5, rope_theta=70.0),
    "theta beside": dict(rope_theta=70.0, rope_scaling=YARN),
    "original length beside": dict(
        original_max_position_embeddings=8, rope_scaling=dict(type="yarn", factor=4.0)
    ),
    "original length inside and beside": dict(
        original_max_position_embeddings=8, rope_scaling=YARN
    ),
    "original length beside llama3": dict(original_max_position_embeddings=8, rope_scaling=LLAMA3),
    "original length nowhere": dict(rope_scaling=LLAMA3, rope_theta=300.0),
    "original length nowhere, yarn": dict(rope_scaling=dict(type="yarn", factor=2.0)),
    "original length of linear": dict(
        rope_scaling=dict(type="linear", factor=2.0, original_max_position_embeddings=8)
    ),
    "original length of dynamic": dict(
        rope_scaling=dict(type="dynamic", factor=2.0), original_max_position_embeddings=8
    ),
    "old type": dict(rope_scaling=dict(type="linear", factor=3)),
    "both types": dict(rope_scaling=dict(type="linear", rope_type="linear", factor=3.0)),
    "two types": dict(rope_scaling=dict(type="dynamic", rope_type="linear", factor=3.0)),
    "no type": dict(rope_scaling=dict(factor=3.0)),
    "default with a factor": dict(rope_scaling=dict(rope_type="default", factor=3.0)),
    "finetuned": dict(rope_scaling=YARN | dict(finetuned=True)),
    "attn_factor": dict(rope_scaling=YARN | dict(attn_factor=1.0)),
    "attn_factor of its own": dict(rope_scaling=YARN | dict(attn_factor=0.5)),
    "attention_factor": dict(rope_scaling=YARN | dict(attention_factor=0.5)),
    "attention_factor null": dict(rope_scaling=YARN | dict(attention_factor=None)),
    "attention_factor of linear": dict(
        rope_scaling=dict(type="linear", factor=2.0, attention_factor=0.5)
    ),
    "factor null": dict(rope_scaling=YARN | dict(factor=None)),
    "factor null, length beside": dict(
        rope_scaling=dict(type="yarn", factor=None), original_max_position_embeddings=32
    ),
    "factor below one": dict(rope_scaling=YARN | dict(factor=0.5)),
    "mscale": dict(rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=1.3)),
    "mscale alone": dict(rope_scaling=YARN | dict(mscale=0.7)),
    "not truncated": dict(rope_scaling=YARN | dict(truncate=False)),
    "betas null": dict(rope_scaling=YARN | dict(beta_fast=None, beta_slow=0)),
    "betas": dict(rope_scaling=YARN | dict(beta_fast=4, beta_slow=2)),
    "betas of a short original": dict(
        rope_scaling=YARN | dict(original_max_position_embeddings=2, beta_fast=4)
    ),
    "betas of a shorter original": dict(
        rope_scaling=YARN | dict(original_max_position_embeddings=1)
    ),
    "betas that are crossed": dict(rope_scaling=YARN | dict(beta_fast=0.5, beta_slow=8)),
    "betas that meet": dict(rope_scaling=YARN | dict(beta_fast=1, beta_slow=1, truncate=False)),
    "partial, all of it": dict(rope_parameters=V5 | dict(partial_rotary_factor=1.0)),
    "partial inside": dict(rope_parameters=V5 | dict(partial_rotary_factor=0.5)),
    "partial beside": dict(partial_rotary_factor=0.5),
    "rope_scaling null": dict(rope_scaling=None, rope_theta=70.0),
    "rope_scaling empty": dict(rope_scaling={}, rope_parameters=V5),
    "rope_parameters null": dict(rope_parameters=None, rope_theta=70.0),
    "llama3 with keys of yarn": dict(rope_scaling=LLAMA3 | dict(attention_factor=0.5, beta_fast=3)),
}
CONTRADICTORY = {"two types"}
GEMMA3 = {
    "theta of both": dict(rope_theta=70.0, rope_local_base_freq=30.0),
    "scaling of the full layers": dict(rope_scaling=dict(rope_type="linear", factor=4.0)),
    "scaling beside parameters": dict(
        rope_parameters=dict(
            full_attention=dict(rope_type="default", rope_theta=70.0),
            sliding_attention=dict(rope_type="default", rope_theta=30.0),
        ),
        rope_scaling=dict(rope_type="linear", factor=4.0),
    ),
    "one of two": dict(
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=2.0, rope_theta=70.0)),
        rope_local_base_freq=30.0,
    ),
    "yarn, length beside": dict(
        original_max_position_embeddings=8, rope_scaling=YARN | dict(truncate=False)
    ),
    "flat parameters": dict(rope_parameters=dict(rope_type="default", rope_theta=70.0)),
    "old type": dict(rope_scaling=dict(type="linear", factor=4.0)),
}
PHI3 = {
    "partial inside": dict(rope_parameters=V5 | dict(partial_rotary_factor=0.5)),
    "partial beside": dict(partial_rotary_factor=0.5),
    "partial inside and beside": dict(
        rope_parameters=V5 | dict(partial_rotary_factor=0.5), partial_rotary_factor=0.7
    ),
    "theta beside": dict(rope_theta=70.0),
}


@pytest.fixture(scope="module")
def rotating(tmp_path_factory):
    """rotating(family) -> the folder of a tiny model, and its config.json without a word of rotary positions."""
    made = {}

    def make(family):
        if family not in made:
            case = next(case for case in CASES if case.family == family)
            sizes = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, head_dim=16)
            case = dataclasses.replace(case, fields=common(**sizes, initializer_range=0.3))
            folder = save(case, tmp_path_factory.mktemp(family))
            raw = json.loads((folder / "config.json").read_text())
            made[family] = folder, {k: v for k, v in raw.items() if "rope" not in k}
        return made[family]

    return make


@pytest.mark.parametrize(
    "family, name",
    [("llama", name) for name in DIALECTS]
    + [("gemma3_text", name) for name in GEMMA3]
    + [("phi3", name) for name in PHI3],
)
def test_rope_is_that_of_transformers_or_refused(family, name, rotating):
    """Guards a rope_scaling beside rope_parameters, an original length at the top level and other ways to say it that
    were ignored without a word."""
    fields = dict(llama=DIALECTS, gemma3_text=GEMMA3, phi3=PHI3)[family][name]
    folder, raw = rotating(family)
    rewrite_config(folder, lambda _: raw | fields)
    ids = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))
    try:
        ours, said = warned(lambda: TinyLM.from_pretrained(folder))
    except tinylm.Error as error:
        assert "config.json" in str(error) and "\n" not in str(error)
        assert family != "llama" or name in CONTRADICTORY
        return
    assert name not in CONTRADICTORY or family != "llama"
    with torch.no_grad():
        expected = load_oracle(folder)(ids).logits
        assert difference(ours(ids), expected) < 1e-4
        ours.save_pretrained(folder.with_name("again"))
        assert difference(load_oracle(folder.with_name("again"))(ids).logits, expected) < 1e-4


@pytest.mark.parametrize(
    "scaling, word",
    [
        (dict(rope_type="linear", factor=None), "factor"),
        (dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=0), "original"),
        (dict(rope_type=["yarn"]), "rope_type"),
        (LLAMA3 | dict(low_freq_factor=4.0), "low_freq_factor"),
        ("linear", "rope_scaling"),
    ],
)
def test_rope_that_cannot_be_right_is_refused(scaling, word):
    with pytest.raises(tinylm.Error, match=word):
        config_from_hf(LLAMA | dict(rope_scaling=scaling))
