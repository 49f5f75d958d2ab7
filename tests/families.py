"""Tiny, odd-shaped `transformers` models of every family and head: the oracles that tinylm is compared with.

No two sizes of a config are equal by accident, `head_dim` differs from hidden / heads where the family allows it, and
every parameter carries noise, so that a swapped, transposed or ignored tensor changes the logits.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import pretrained

LENGTH = 23  # of the prompts: longer than every sliding window here, and than the positions of the dynamic case
AUTO = {
    None: AutoModel,
    "lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "mlm": AutoModelForMaskedLM,
    "classify": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "qa": AutoModelForQuestionAnswering,
    "discriminator": AutoModelForPreTraining,
}


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    fields: dict = field(hash=False)
    head: str | None = "lm"  # a key of AUTO; None is the bare model

    def __str__(self):
        return self.name


def common(**changes):
    """Sizes that every family with rotary positions takes; tokens 0 to 2 are special."""
    sizes = dict(
        vocab_size=211,
        hidden_size=60,
        intermediate_size=82,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return sizes | changes


def rope(kind="default", theta=1000.0, **rest):
    return dict(rope_type=kind, rope_theta=theta, **rest)


def gpt2(**changes):
    sizes = dict(
        vocab_size=211,
        n_embd=60,
        n_layer=2,
        n_head=5,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )  # so that a training step is comparable
    return sizes | changes


def gemma3(**changes):
    local = dict(full_attention=rope(theta=5000.0), sliding_attention=rope(theta=100.0))
    fields = dict(
        num_hidden_layers=3,
        head_dim=14,
        query_pre_attn_scalar=19,
        sliding_window=6,
        rope_parameters=local,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return common(**fields | changes)


def olmo3(**changes):
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return common(**dict(num_hidden_layers=3, sliding_window=6, layer_types=types) | changes)


GRANITE = dict(
    embedding_multiplier=1.7,
    attention_multiplier=0.31,
    residual_multiplier=0.6,
    logits_scaling=2.3,
)


def neox(**changes):
    sizes = dict(rope_parameters=rope(theta=1000.0, partial_rotary_factor=0.4))
    fields = common(**sizes | changes)
    del fields["num_key_value_heads"]
    return fields


def longrope(channels, **rest):
    short, long = ([1 + step * i for i in range(channels)] for step in (0.3, 1.7))
    return rope("longrope", short_factor=short, long_factor=long, **rest)


def moe(**changes):
    return common(**dict(num_experts_per_tok=2, num_hidden_layers=2) | changes)


def family_of(name):
    """The family that a case's name begins with: a new one needs a row in pretrained.py and a case here."""
    return max((family for family in pretrained.FAMILIES if name.startswith(family)), key=len)


CASES = [
    Case(name, family_of(name), fields)
    for name, fields in {
        "gpt2": gpt2(),
        "gpt2-inner": gpt2(
            n_inner=101, activation_function="gelu", layer_norm_epsilon=1e-3, n_layer=3
        ),
        "gpt2-relu": gpt2(activation_function="relu"),
        "llama": common(rope_parameters=rope()),
        "llama-biases": common(attention_bias=True, mlp_bias=True, head_dim=14, rms_norm_eps=1e-2),
        "llama-tied": common(
            tie_word_embeddings=True, head_dim=8, num_key_value_heads=3, hidden_act="gelu"
        ),
        "llama-mha": common(
            num_key_value_heads=6, num_hidden_layers=3, hidden_act="gelu_pytorch_tanh"
        ),
        "llama-mqa": common(num_key_value_heads=1, head_dim=22, hidden_act="relu"),
        "llama-linear": common(rope_parameters=rope("linear", factor=2.5)),
        "llama-dynamic": common(
            max_position_embeddings=16, rope_parameters=rope("dynamic", factor=3.0)
        ),
        "llama-llama3": common(
            head_dim=20,
            rope_parameters=rope(
                "llama3",
                10000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        "llama-yarn": common(
            head_dim=20,
            rope_parameters=rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=16),
        ),
        "llama-yarn-tuned": common(
            head_dim=20,
            rope_parameters=rope(
                "yarn",
                100.0,
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=2.0,
                beta_slow=0.25,
                attention_factor=0.7,
            ),
        ),
        "mistral": common(sliding_window=7, head_dim=14),
        "mistral-full": common(sliding_window=None, rope_parameters=rope(theta=1e6)),
        "qwen2": common(),
        "qwen2-window": common(
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
            tie_word_embeddings=True,
        ),
        "qwen3": common(head_dim=16),
        "qwen3-tied": common(head_dim=8, tie_word_embeddings=True, num_key_value_heads=3),
        "qwen3-biases": common(
            head_dim=16,
            attention_bias=True,
            rms_norm_eps=1e-2,
            rope_parameters=rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=16),
        ),
        "qwen3-window": common(
            head_dim=16, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
        "gemma": common(head_dim=14),
        "gemma-mqa": common(
            head_dim=18, num_key_value_heads=1, rms_norm_eps=1e-2, rope_parameters=rope(theta=50.0)
        ),
        "gemma2": common(
            num_hidden_layers=3,
            head_dim=14,
            sliding_window=6,
            query_pre_attn_scalar=19,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=4.0,
        ),
        "gemma2-uncapped": common(
            head_dim=14,
            sliding_window=6,
            query_pre_attn_scalar=14,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
        "gemma3_text": gemma3(),
        "gemma3_text-linear": gemma3(
            rope_parameters=dict(
                full_attention=rope("linear", 5000.0, factor=8.0),
                sliding_attention=rope(theta=100.0),
            )
        ),
        "gemma3_text-capped": gemma3(final_logit_softcapping=4.0),
        "phi3": common(),
        "phi3-window": common(sliding_window=7, num_key_value_heads=3, tie_word_embeddings=True),
        "phi3-long": common(
            max_position_embeddings=64,
            original_max_position_embeddings=16,
            rope_parameters=longrope(5),
            num_key_value_heads=3,
        ),
        "phi3-short": common(
            max_position_embeddings=128,
            original_max_position_embeddings=64,
            rope_parameters=longrope(4, partial_rotary_factor=0.8, attention_factor=1.3),
        ),
        "qwen3_moe": moe(moe_intermediate_size=28, head_dim=16, num_experts=5),
        "qwen3_moe-normed": moe(
            moe_intermediate_size=32,
            num_experts=4,
            norm_topk_prob=True,
            attention_bias=True,
            num_experts_per_tok=1,
            tie_word_embeddings=True,
        ),
        "mixtral": moe(num_local_experts=4, intermediate_size=36),
        "mixtral-window": moe(
            num_local_experts=3, intermediate_size=32, sliding_window=6, num_experts_per_tok=3
        ),
        "olmo2": common(),
        "olmo2-biases": common(
            attention_bias=True,
            num_key_value_heads=3,
            rms_norm_eps=1e-2,
            rope_parameters=rope("linear", factor=2.5),
        ),
        "olmo3": olmo3(),
        "olmo3-yarn": olmo3(
            rope_parameters=dict(
                full_attention=rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=16),
                sliding_attention=rope(theta=70.0),
            ),
            num_key_value_heads=3,
            rms_norm_eps=1e-2,
        ),
        "smollm3": common(num_hidden_layers=5, tie_word_embeddings=False),
        "smollm3-window": common(
            num_hidden_layers=4,
            no_rope_layers=[0, 1, 0, 1],
            head_dim=16,
            use_sliding_window=True,
            sliding_window=6,
            attention_bias=True,
            mlp_bias=True,
        ),
        "granite": common(**GRANITE),
        "granite-tied": common(
            tie_word_embeddings=True, num_key_value_heads=3, attention_bias=True, **GRANITE
        ),
        "gpt_neox": neox(),
        "gpt_neox-serial": neox(
            use_parallel_residual=False,
            attention_bias=False,
            rope_parameters=rope(theta=50.0, partial_rotary_factor=1.0),
            tie_word_embeddings=True,
            hidden_act="relu",
        ),
        "starcoder2": common(),
        "starcoder2-window": common(
            sliding_window=7, use_bias=False, tie_word_embeddings=False, norm_epsilon=1e-3
        ),
    }.items()
]

FAMILIES = [
    case for case in CASES if case.name == case.family
]  # one case of each, where one is enough


SPECIAL = [
    case
    for case in CASES
    if case.name
    in ("llama-yarn-tuned", "llama-dynamic", "gpt2-inner", "phi3-window", "phi3-long", "phi3-short")
]

QUICK = {"gpt2", "llama", "qwen3", "gemma3_text", "llama-dynamic", "phi3-window"}


def some_slow(cases):
    """Those that have in them what the others have, and the others marked as slow."""
    return [c if c.name in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in cases]


# ---- encoders and classifiers ---------------------------------------------------------------------------------------


def labels(*names, **rest):
    return dict(
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, **rest
    )


SENTIMENTS = labels("negative", "neutral", "positive")
TOPICS = labels("sport", "politics", "science", "art", problem_type="multi_label_classification")
SCORE = labels("stars", problem_type="regression")
NAMES = labels("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def bert(**changes):
    sizes = dict(
        vocab_size=211,
        hidden_size=60,
        intermediate_size=82,
        num_hidden_layers=2,
        num_attention_heads=5,
        max_position_embeddings=37,
        type_vocab_size=3,
    )
    return sizes | changes


def roberta(**changes):
    return bert(
        **dict(bos_token_id=0, pad_token_id=1, eos_token_id=2, layer_norm_eps=1e-5) | changes
    )


def distilbert(**changes):
    sizes = dict(
        vocab_size=211, dim=60, hidden_dim=82, n_layers=2, n_heads=5, max_position_embeddings=37
    )
    return sizes | changes


def electra(**changes):
    return bert(**dict(embedding_size=26) | changes)


def mpnet(**changes):
    fields = roberta(**changes)
    del fields["type_vocab_size"]
    return fields


def modernbert(**changes):
    """A window of three keys to each side, shorter than the prompts."""
    rotations = dict(full_attention=rope(theta=5000.0), sliding_attention=rope(theta=100.0))
    sizes = dict(
        vocab_size=211,
        hidden_size=60,
        intermediate_size=82,
        num_hidden_layers=4,
        num_attention_heads=5,
        max_position_embeddings=37,
        local_attention=6,
        norm_eps=1e-3,
        rope_parameters=rotations,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        cls_token_id=1,
        sep_token_id=2,
    )
    return sizes | changes


def heads(name, fields, **more):
    """A case for each head: `more` has the labels of classify, where they are not the sentiments."""
    more = dict(classify=SENTIMENTS, tokens=NAMES) | more
    return [
        Case(f"{name}-{head or 'bare'}", family_of(name), fields | more.get(head, {}), head)
        for head in (None, "mlm", "classify", "tokens", "qa")
    ]


ENCODERS = [
    *heads("bert", bert()),
    *heads("roberta", roberta(type_vocab_size=1), classify=TOPICS),
    *heads("xlm-roberta", roberta(num_attention_heads=6, type_vocab_size=2, layer_norm_eps=1e-3)),
    *heads("distilbert", distilbert(), classify=SCORE),
    *heads("electra", electra(), classify=TOPICS),
    *heads("camembert", roberta(type_vocab_size=1), classify=SCORE),
    *heads("mpnet", mpnet(), classify=TOPICS),
    *heads("modernbert", modernbert(), classify=TOPICS),
    *heads(
        "modernbert_mean",
        modernbert(
            classifier_pooling="mean",
            norm_bias=True,
            attention_bias=True,
            mlp_bias=True,
            classifier_bias=True,
            decoder_bias=False,
            classifier_activation="relu",
            hidden_activation="silu",
            layer_types=["sliding_attention", "full_attention"],
            num_hidden_layers=2,
        ),
        classify=SCORE,
    ),
    # An activation that the head must take over (BERT, DistilBERT), or must not (the others have GELU or tanh in theirs)
    *heads(
        "bert_relu",
        bert(hidden_act="relu", layer_norm_eps=1e-2, num_hidden_layers=2),
        classify=SCORE,
    ),
    *heads(
        "roberta_silu",
        roberta(hidden_act="silu", layer_norm_eps=1e-2, pad_token_id=0, bos_token_id=1),
    ),
    *heads(
        "distilbert_relu",
        distilbert(activation="relu", n_heads=6, n_layers=2),
        classify=labels("no", "yes"),
    ),
    *heads("electra_relu", electra(embedding_size=60, hidden_act="relu", num_hidden_layers=2)),
]

ENCODERS += [
    Case("gemma3_text_both-bare", "gemma3_text", gemma3(use_bidirectional_attention=True), None),
]

CLASSIFIERS = [
    Case(f"{family}-classify", family, fields, "classify")
    for family, fields in {
        "gpt2": gpt2(pad_token_id=0, **SENTIMENTS),
        "llama": common(rope_parameters=rope(), **TOPICS),
        "qwen2": common(num_key_value_heads=3, **SCORE),
        "qwen3": common(head_dim=16, **SENTIMENTS),
        "gemma3_text": gemma3(**SENTIMENTS),
    }.items()
]


# ---- encoder-decoders -----------------------------------------------------------------------------------------------


def t5(**changes):
    """The prompts are longer than the distance from which on all is one bucket."""
    sizes = dict(
        vocab_size=211,
        d_model=60,
        d_kv=14,
        d_ff=82,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=5,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=17,
        decoder_start_token_id=0,
    )
    return sizes | changes


def bart(**changes):
    sizes = dict(
        vocab_size=211,
        d_model=60,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=5,
        decoder_attention_heads=6,
        encoder_ffn_dim=82,
        decoder_ffn_dim=71,
        max_position_embeddings=43,
    )
    return sizes | changes


def marian(**changes):
    return bart(
        **dict(
            pad_token_id=210,
            decoder_start_token_id=210,
            eos_token_id=0,
            forced_eos_token_id=0,
            activation_function="swish",
            scale_embedding=True,
        )
        | changes
    )


SEQ2SEQ = [
    Case(name, family_of(name), fields, "seq2seq")
    for name, fields in {
        "t5": t5(),
        "t5-v1.1": t5(
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            num_layers=4,
            num_decoder_layers=3,
            layer_norm_epsilon=1e-3,
            num_heads=3,
        ),
        "t5-silu": t5(
            feed_forward_proj="gated-silu",
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
        ),
        "bart": bart(),
        "bart-scaled": bart(
            activation_function="relu",
            scale_embedding=True,
            decoder_start_token_id=0,
            encoder_layers=2,
            decoder_layers=3,
        ),
        "mbart": bart(decoder_start_token_id=4, scale_embedding=True, activation_function="relu"),
        "mbart-gelu": bart(decoder_start_token_id=2, encoder_layers=1, decoder_attention_heads=4),
        "mt5": t5(feed_forward_proj="gated-gelu"),
        "m2m_100": bart(decoder_start_token_id=2),
        "m2m_100-odd": bart(
            d_model=66,
            decoder_attention_heads=3,
            encoder_attention_heads=6,
            scale_embedding=False,
            activation_function="gelu",
            decoder_start_token_id=2,
            encoder_layers=2,
        ),
        "marian": marian(),
        "marian-odd": marian(
            d_model=45, decoder_attention_heads=3, activation_function="gelu", scale_embedding=False
        ),
    }.items()
]

# Names of encoders, heads and encoder-decoders that have in them what the others have.
READERS = [
    "bert-bare",
    "roberta-mlm",
    "distilbert-classify",
    "electra-tokens",
    "bert-qa",
    "qwen3-classify",
    "modernbert-qa",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("modernbert_mean-classify", "mpnet-tokens", "gemma3_text_both-bare")
    ),
]
WRITERS = [
    "t5",
    "marian",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5-v1.1", "mbart", "m2m_100")),
]


# ---- making, saving and loading them --------------------------------------------------------------------------------

BART_GAINS = [
    ("out_proj.weight", 0.7),
    ("fc2.weight", 0.7),
    ("embed_positions", 5.0),
    ("encoder_attn.q", 2.0),
    ("encoder_attn.k", 2.0),
    ("encoder_attn.v", 1.5),
    ("encoder_attn.out_proj.weight", 1.5),
    ("bias", 0.3),
]
T5_GAINS = [
    ("Attention.q.weight", 0.4),
    ("EncDecAttention.v", 2.0),
    ("EncDecAttention.o", 2.0),
    ("relative_attention_bias", 10.0),
    ("shared", 8.0),
]
SEEDS = {
    "t5": 4,
    "t5-v1.1": 4,
    "bart": 2,
    "bart-scaled": 3,
    "mbart": 4,
    "mbart-gelu": 1,
    "marian": 3,
    "marian-odd": 2,
    "m2m_100-odd": 2,
}


def awaken(oracle, seed):
    """Encoder-decoders of plain noise say one token for ever, whatever they read: louder positions and sources, and a
    last norm with signs, so that a token is not its own best successor, make them say something."""
    t5 = hasattr(oracle, "shared")
    for name, parameter in oracle.named_parameters():
        for part, gain in T5_GAINS if t5 else BART_GAINS:
            if (
                part in name
                and parameter.requires_grad
                and not (part == "bias" and parameter.ndim > 1)
            ):
                parameter.data *= gain
    decoder = oracle.get_decoder()
    names = [name for name in ("final_layer_norm", "layer_norm") if hasattr(decoder, name)]
    norm = getattr(decoder, names[0]) if names else decoder.layers[-1].final_layer_norm
    norm.weight.data *= (
        torch.randint(2, norm.weight.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    )


def model(case):
    """A random model in fp32. Each tensor keeps its own mean (norms stay near one or zero) and gets its own noise."""
    seed = SEEDS.get(case.name, 0)
    config = AutoConfig.for_model(
        case.family, **copy.deepcopy(case.fields)
    )  # which writes into what it gets
    oracle = (
        AUTO[case.head].from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    )
    untied = case.family == "mt5" or case.fields.get("tie_word_embeddings") is False
    if case.family in ("t5", "mt5") and case.head == "seq2seq" and untied:
        # transformers ties it all the same
        oracle.lm_head.weight = torch.nn.Parameter(oracle.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(seed)
    for parameter in oracle.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.requires_grad:  # Marian's sinusoids stay what they are
            parameter.data = noise * 0.15 if parameter.ndim > 1 else parameter.data + noise * 0.3
    if hasattr(oracle, "final_logits_bias"):
        oracle.final_logits_bias.normal_(0, 0.5, generator=generator)
    if case.head == "seq2seq":
        awaken(oracle, seed)
    return oracle


def save(case, folder, dialect="v5", **options):
    """Writes the oracle as transformers does, with the `config.json` of its version 5 or of version 4 and earlier."""
    model(case).save_pretrained(folder, **options)
    if dialect == "legacy":
        rewrite_config(folder, legacy)
    return Path(folder)


def save_word_tokenizer(folder):
    """Words w0, w1, ... of the vocabulary, between specials, for one text and for two."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "[UNK]": 4} | {
        f"w{i}": i for i in range(5, 200)
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"mask_token": "[MASK]", "pad_token": "[PAD]"})
    )


def rewrite_config(folder, change):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2))


def rewrite_tensors(folder, change):
    path = Path(folder, "model.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def legacy(config):
    """The same model in the older dialect: flat rope fields, `torch_dtype`, a rule in the place of `layer_types`."""
    config = dict(config, transformers_version="4.37.0", torch_dtype=config["dtype"])
    del config["dtype"]
    if config["model_type"] == "olmo3":  # it never had another
        return config
    if "rope_parameters" not in config:
        return dict(config, n_ctx=config.get("n_positions"))
    parameters = config.pop("rope_parameters")
    if "full_attention" in parameters:
        config["sliding_window_pattern"] = config.pop("layer_types").index("full_attention") + 1
        config.pop("_sliding_window_pattern", None)
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    elif "layer_types" in config:
        plain = {key: value for key, value in config.items() if key != "layer_types"}
        if AutoConfig.for_model(**plain).layer_types == config["layer_types"]:
            config = plain
    if config["model_type"] == "gpt_neox":
        config["rotary_pct"] = parameters["partial_rotary_factor"]
        config["rotary_emb_base"] = parameters["rope_theta"]
        return config
    if config["model_type"] == "phi3":
        config["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    parameters = {key: value for key, value in parameters.items() if key != "partial_rotary_factor"}
    config["rope_theta"], kind = parameters.pop("rope_theta"), parameters.pop("rope_type")
    name = "type" if config["model_type"] == "llama" else "rope_type"  # the oldest files say "type"
    config["rope_scaling"] = None if kind == "default" else {name: kind, **parameters}
    return config


def load_oracle(folder, head="lm"):
    """What transformers makes of a folder; fails if it had to leave out or make up a tensor."""
    oracle, info = AUTO[head].from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return oracle.eval()


def prompts(case, *shape, seed=1):
    """Random tokens, none of them special."""
    return torch.randint(
        3, case.fields["vocab_size"], shape, generator=torch.Generator().manual_seed(seed)
    )


def difference(ours, theirs):
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def ragged(tokens, layout):
    """A batch and its mask from a list of 1-D prompts: `layout` has "left", "right" or "both" for each row.

    Padded places hold real tokens, not zeros, so that a place that leaks is seen.
    """
    width = max(map(len, tokens)) + 2
    batch = torch.randint(3, 200, (len(tokens), width), generator=torch.Generator().manual_seed(9))
    mask = torch.zeros_like(batch)
    for row, (prompt, side) in enumerate(zip(tokens, layout, strict=True)):
        start = {"left": width - len(prompt), "right": 0, "both": 1}[side]
        batch[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = 1
    return batch, mask


def assert_same_text(ours, expected, logits, start, tolerance=1e-4):
    """Where builds and processors may round differently: the ids after `start` are those expected, up to the first
    step at which the two best of the logits (seq, vocab), of the expected ids, are closer than the tolerance, relative
    to the largest."""
    logits = torch.as_tensor(logits)[start - 1 : len(expected) - 1].float()
    best = logits.topk(2).values
    close = best[:, 0] - best[:, 1] < tolerance * logits.abs().max()
    sure = start + int(close.float().argmax() if close.any() else len(close))
    assert list(ours)[:sure] == list(expected)[:sure]
