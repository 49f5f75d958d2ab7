"""Encoders and classifiers against `transformers`: every head, padding, token types, checkpoints and swapped heads."""

import json

import pytest
import torch
from families import (
    CLASSIFIERS,
    ENCODERS,
    LENGTH,
    Case,
    common,
    difference,
    electra,
    load_oracle,
    prompts,
    ragged,
    rewrite_config,
    rewrite_tensors,
    save,
    save_word_tokenizer,
)
from helpers import LAYOUTS, assert_same_weights, every, refuses
from safetensors.torch import load_file

import onnxlm
import pretrained
import train
from tinylm import Config, TinyLM

EVERY = ENCODERS + CLASSIFIERS
BY_NAME = {case.name: case for case in EVERY}
BARE, MLM, CLASSIFY = (BY_NAME[f"bert-{head}"] for head in ("bare", "mlm", "classify"))
KEPT = (
    "architectures",
    "id2label",
    "label2id",
    "problem_type",
    "classifier_dropout",
    "seq_classif_dropout",
    "qa_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "hidden_act",
    "activation",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "embedding_size",
    "type_vocab_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "vocab_size",
)


def types(case, *shape, seed=2):
    """Random token types, or None where the family has none, or a single one."""
    count = case.fields.get("type_vocab_size", 0)
    return (
        torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))
        if count > 1
        else None
    )


def output(oracle, ids, mask=None, token_type_ids=None):
    """The one tensor that tinylm gives, of what transformers gives."""
    out = oracle(
        ids,
        attention_mask=mask,
        **{} if token_type_ids is None else dict(token_type_ids=token_type_ids),
    )
    if "start_logits" in out:
        return torch.stack((out.start_logits, out.end_logits), dim=-1)
    return out.logits if "logits" in out else out.last_hidden_state


# ---- what a model computes ------------------------------------------------------------------------------------------


@every(EVERY)
@torch.no_grad()
def test_output_is_that_of_transformers(case, folder, oracle):
    ids, kinds = prompts(case, 2, LENGTH), types(case, 2, LENGTH)
    ours = TinyLM.from_pretrained(folder(case))
    assert ours.config.head == case.head and not ours.training
    out = ours(ids) if kinds is None else ours(ids, token_type_ids=kinds)
    assert type(out) is torch.Tensor
    assert difference(out, output(oracle(case), ids, None, kinds)) < 1e-5


@every([case for case in EVERY if case.head == "classify" or case.head is None])
@torch.no_grad()
def test_token_types_are_zero_unless_given(case, folder, oracle):
    ids = prompts(case, 2, LENGTH)
    assert difference(TinyLM.from_pretrained(folder(case))(ids), output(oracle(case), ids)) < 1e-5


@every(EVERY)
@torch.no_grad()
def test_right_padded_batch_is_that_of_transformers(case, folder, oracle):
    """The padding is the pad token, as a tokenizer leaves it; what a padded place gets is of no account."""
    rows, pad = (
        [prompts(case, n, seed=n) for n in (5, LENGTH, 11)],
        oracle(case).config.pad_token_id,
    )
    batch, mask = ragged(rows, LAYOUTS["right"])
    batch, kinds = batch.masked_fill(mask == 0, pad), types(case, *batch.shape)
    ours, theirs = (
        TinyLM.from_pretrained(folder(case))(batch, mask, kinds),
        output(oracle(case), batch, mask, kinds),
    )
    if case.head != "classify":
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    assert difference(ours, theirs) < 1e-5


@every(EVERY)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_padded_rows_get_what_they_get_alone(case, layout, folder):
    """Positions are per row: the first real token has position 0, and is the one that classifies, wherever it stands."""
    ours, rows = (
        TinyLM.from_pretrained(folder(case)),
        [prompts(case, n, seed=n) for n in (5, LENGTH, 11)],
    )
    batch, mask = ragged(rows, LAYOUTS[layout])
    kinds = types(case, *batch.shape)
    out = ours(batch, mask, kinds)
    alone = [
        ours(row[None], token_type_ids=None if kinds is None else kinds[i][keep][None])[0]
        for i, (row, keep) in enumerate(zip(rows, mask.bool(), strict=True))
    ]
    if (
        case.head == "classify"
    ):  # a single score may be so near to zero that it is compared with those of the other rows
        assert difference(out, torch.stack(alone)) < 1e-5
    else:
        assert all(difference(out[i][keep], alone[i]) < 1e-5 for i, keep in enumerate(mask.bool()))


@every([BARE, BY_NAME["electra-tokens"]])
@torch.no_grad()
def test_every_position_can_be_used(case, folder, oracle):
    ids = prompts(case, 2, case.fields["max_position_embeddings"])
    assert difference(TinyLM.from_pretrained(folder(case))(ids), output(oracle(case), ids)) < 1e-5


@every([BY_NAME["roberta-bare"], BY_NAME["xlm-roberta-mlm"], BY_NAME["roberta_silu-qa"]])
@torch.no_grad()
def test_roberta_counts_positions_from_its_pad_token(case, folder, oracle):
    """Positions begin after pad_token_id, which is 0 in one case, so that many fewer tokens fit."""
    room = case.fields["max_position_embeddings"] - case.fields["pad_token_id"] - 1
    ours, ids = TinyLM.from_pretrained(folder(case)), prompts(case, 1, room)
    assert difference(ours(ids), output(oracle(case), ids)) < 1e-5
    refuses(lambda: ours(prompts(case, 1, room + 1)), room + 1)


@every(CLASSIFIERS)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_decoders_classify_by_the_last_real_token(case, masked, folder, oracle):
    """Which transformers finds by its id, that is not the pad token's: whether no mask was given, or one of ones, as a
    tokenizer makes it of a text that ends in such a token itself."""
    ids = prompts(case, 3, 9)
    ids[0, 6:], ids[1, 8:], ids[2, 4] = 0, 0, 0
    ours, mask = TinyLM.from_pretrained(folder(case)), torch.ones_like(ids) if masked else None
    assert difference(ours(ids, mask), output(oracle(case), ids, mask)) < 1e-5
    assert difference(ours(ids[:1]), ours(ids[:1, :6])) < 1e-5


@every(CLASSIFIERS)
@torch.no_grad()
def test_a_row_of_pads_alone_is_classified_as_transformers_does(case, folder, oracle):
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert difference(TinyLM.from_pretrained(folder(case))(ids), output(oracle(case), ids)) < 1e-4


@torch.no_grad()
def test_half_precision_is_close(folder, oracle):
    ids, case = prompts(CLASSIFY, 2, LENGTH), CLASSIFY
    ours = TinyLM.from_pretrained(folder(case), dtype=torch.bfloat16)
    assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16} and ours(
        ids
    ).dtype == torch.bfloat16
    assert difference(ours(ids).float(), output(oracle(case), ids)) < 0.1


@every([MLM, BY_NAME["roberta-classify"], BY_NAME["distilbert-qa"], BY_NAME["electra-tokens"]])
def test_every_weight_of_the_head_and_below_learns(case, folder):
    """Guards heads that are computed without a gradient, and weights that nothing uses."""
    ours = TinyLM.from_pretrained(folder(case))
    kinds = types(case, 2, LENGTH)
    ours(prompts(case, 2, LENGTH), token_type_ids=kinds).square().sum().backward()
    unused = [
        name
        for name, weight in ours.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]
    assert not unused


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@every(EVERY)
@torch.no_grad()
def test_saved_folder_is_the_same_model_here_and_in_transformers(case, folder, oracle, tmp_path):
    """Load, save, load is bitwise equal; transformers misses no tensor, finds none too many, and keeps the labels."""
    ours = TinyLM.from_pretrained(folder(case))
    ours.save_pretrained(tmp_path)
    again = TinyLM.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert_same_weights(again, ours)
    before, after = oracle(case), load_oracle(tmp_path, case.head)
    assert type(after) is type(before)
    assert_same_weights(after, before)
    ids = prompts(case, 2, LENGTH)
    assert (
        difference(output(after, ids), output(before, ids)) < 1e-6
    )  # one sum may run in another order
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        load_file(folder(case) / "model.safetensors")
    )
    for name in KEPT:
        assert getattr(after.config, name, None) == getattr(before.config, name, None), name


@every([case for case in EVERY if case.head in ("classify", "tokens")])
def test_labels_are_in_the_config(case, folder):
    config = TinyLM.from_pretrained(folder(case)).config
    assert config.id2label == case.fields["id2label"] and config.num_labels == len(
        case.fields["id2label"]
    )
    assert config.problem_type == case.fields.get("problem_type")


def test_labels_without_names(copy, oracle):
    """`num_labels` alone is no field of the files that are written today, but of older ones."""
    path = copy(CLASSIFY)
    rewrite_config(
        path,
        lambda config: (
            {name: value for name, value in config.items() if "label" not in name}
            | {"num_labels": 3}
        ),
    )
    config = TinyLM.from_pretrained(path).config
    assert config.num_labels == 3
    two = BY_NAME["bert-qa"]
    ids = prompts(two, 1, 4)
    path = copy(two)
    assert TinyLM.from_pretrained(path)(ids).shape == (1, 4, 2)


@pytest.mark.parametrize(
    "field, value",
    [
        ("classifier_dropout", 0.3),
        ("classifier_dropout", None),
        ("hidden_dropout_prob", 0.25),
        ("problem_type", "regression"),
        ("problem_type", "multi_label_classification"),
    ],
)
def test_what_training_depends_on_is_kept(field, value, copy, tmp_path):
    path = copy(CLASSIFY)
    rewrite_config(path, lambda config: config | {field: value})
    TinyLM.from_pretrained(path).save_pretrained(tmp_path / "again")
    assert getattr(load_oracle(tmp_path / "again", "classify").config, field) == value


@torch.no_grad()
def test_electras_discriminator_is_a_token_classifier(tmp_path):
    """Whose second logit is ELECTRA's, against 0. Training moves both; what is saved is their difference."""
    case = Case("electra-discriminator", "electra", electra(hidden_act="relu"), "discriminator")
    path = save(case, tmp_path / "hf")
    save_word_tokenizer(path)
    ours, oracle = TinyLM.from_pretrained(path), load_oracle(path, "discriminator")
    assert ours.config.head == "tokens" and ours.config.num_labels == 2
    ids = prompts(case, 2, LENGTH)
    logits = ours(ids)
    assert difference(logits[..., 1], oracle(ids).logits) < 1e-5 and not logits[..., 0].any()
    ours.save_pretrained(tmp_path / "again")
    assert_same_weights(load_oracle(tmp_path / "again", "discriminator"), oracle)
    assert_same_weights(TinyLM.from_pretrained(tmp_path / "again"), ours)
    assert onnxlm.task_of(json.loads((tmp_path / "again" / "config.json").read_text())) == "tokens"
    text = " ".join(f"w{i}" for i in ids[0].tolist())
    replaced = [i for i, logit in enumerate(oracle(ids_of(text)).logits[0, 1:-1]) if logit > 0]
    (entities,) = onnxlm.run(train.TorchRunner(ours, path), [text])
    words = [word for entity in entities for word in entity["word"].split()]
    assert words == [text.split()[i] for i in replaced]
    ours.head.out.weight += torch.randn(2, 60, generator=torch.Generator().manual_seed(0))
    logits = ours(ids)
    ours.save_pretrained(tmp_path / "tuned")
    theirs = load_oracle(tmp_path / "tuned", "discriminator")(ids).logits
    assert difference(logits[..., 1] - logits[..., 0], theirs) < 1e-5
    # another head of the same body
    fresh = TinyLM.from_pretrained(path, head="tokens")
    assert fresh.config.head_act is None
    fresh.save_pretrained(tmp_path / "tokens")
    assert load_oracle(tmp_path / "tokens", "tokens")


def ids_of(text):
    return torch.tensor([[1, *(int(word[1:]) for word in text.split()), 2]])


# ---- published files ------------------------------------------------------------------------------------------------

OLD = dict(
    gradient_checkpointing=False,
    position_embedding_type="absolute",
    use_cache=True,
    transformers_version="4.6.0.dev0",
    initializer_range=0.02,
    model_type=None,
)
PUBLISHED = {  # what config.json of the published checkpoints holds beside the sizes; none of it changes the output
    "google-bert/bert-base-uncased": (
        BY_NAME["bert-mlm"],
        dict(
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            pad_token_id=0,
            attention_probs_dropout_prob=0.1,
            hidden_dropout_prob=0.1,
        ),
    ),
    "dslim/bert-base-NER": (
        BY_NAME["bert-tokens"],
        dict(
            _num_labels=9,
            directionality="bidi",
            max_length=512,
            output_past=True,
            pooler_fc_size=768,
            pooler_num_attention_heads=12,
            pooler_num_fc_layers=3,
            pooler_size_per_head=128,
            pooler_type="first_token_transform",
            pad_token_id=0,
        ),
    ),
    "FacebookAI/roberta-base": (
        BY_NAME["roberta-mlm"],
        dict(eos_token_id=2, bos_token_id=0, pad_token_id=1),
    ),
    "FacebookAI/xlm-roberta-base": (
        BY_NAME["xlm-roberta-mlm"],
        dict(output_past=True, pad_token_id=1),
    ),
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": (
        BY_NAME["distilbert_relu-classify"],
        dict(
            finetuning_task="sst-2",
            output_past=True,
            qa_dropout=0.1,
            seq_classif_dropout=0.2,
            tie_weights_=True,
            sinusoidal_pos_embds=False,
            dropout=0.1,
            attention_dropout=0.1,
        ),
    ),
    "google/electra-small-discriminator": (
        BY_NAME["electra-bare"],
        dict(
            summary_activation="gelu",
            summary_last_dropout=0.1,
            summary_type="first",
            summary_use_proj=True,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_config_json_as_published(name, copy, oracle):
    """Strictness must not refuse the very checkpoints that a family is for."""
    case, more = PUBLISHED[name]
    path = copy(case)
    kind = json.loads((path / "config.json").read_text())["architectures"]
    plain = OLD | case.fields | more | {"model_type": case.family, "architectures": kind}
    rewrite_config(path, lambda _: json.loads(json.dumps(plain)))
    ids = prompts(case, 2, LENGTH)
    assert (
        difference(TinyLM.from_pretrained(path)(ids), output(load_oracle(path, case.head), ids))
        < 1e-5
    )
    assert difference(TinyLM.from_pretrained(path)(ids), output(oracle(case), ids)) < 1e-5


def test_published_bert_tensors(copy, folder):
    """The first BERT calls a norm's weights gamma and beta, and brings a pooler and a head that no one asks for."""

    def publish(tensors):
        tensors = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for name, value in tensors.items()
        }
        return tensors | {
            "bert.pooler.dense.weight": torch.rand(60, 60),
            "bert.pooler.dense.bias": torch.rand(60),
            "cls.seq_relationship.weight": torch.rand(2, 60),
            "cls.seq_relationship.bias": torch.rand(2),
            "cls.predictions.decoder.weight": tensors[
                "bert.embeddings.word_embeddings.weight"
            ].clone(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
            "bert.embeddings.position_ids": torch.arange(37)[None],
        }

    path = copy(MLM)
    rewrite_tensors(path, publish)
    assert_same_weights(TinyLM.from_pretrained(path), TinyLM.from_pretrained(folder(MLM)))


def test_published_roberta_tensors(copy, folder):
    case = BY_NAME["roberta-mlm"]
    path = copy(case)
    rewrite_tensors(
        path,
        lambda tensors: (
            tensors
            | {
                "roberta.pooler.dense.weight": torch.rand(60, 60),
                "roberta.pooler.dense.bias": torch.rand(60),
                "lm_head.decoder.weight": tensors[
                    "roberta.embeddings.word_embeddings.weight"
                ].clone(),
                "lm_head.decoder.bias": tensors["lm_head.bias"].clone(),
                "roberta.embeddings.position_ids": torch.arange(37)[None],
            }
        ),
    )
    assert_same_weights(TinyLM.from_pretrained(path), TinyLM.from_pretrained(folder(case)))


def test_tied_decoder_that_differs_is_no_tied_decoder(copy):
    path, name = copy(MLM), "cls.predictions.decoder.weight"
    rewrite_tensors(path, lambda tensors: tensors | {name: torch.rand(211, 60)})
    refuses(lambda: TinyLM.from_pretrained(path), "model.safetensors", name)


# ---- another head ---------------------------------------------------------------------------------------------------

FRUIT = {0: "apple", 1: "pear", 2: "plum", 3: "fig"}


def body(lm):
    return {
        name: value
        for name, value in lm.state_dict().items()
        if not name.startswith(("head.", "pooler."))
    }


@pytest.mark.parametrize(
    "name",
    [
        "bert-bare",
        "bert-mlm",
        "bert-qa",
        "roberta-bare",
        "roberta-mlm",
        "xlm-roberta-mlm",
        "distilbert-mlm",
        "electra-bare",
        "electra_relu-mlm",
    ],
)
@pytest.mark.parametrize("head", ["classify", "tokens", "qa"])
@torch.no_grad()
def test_another_head_on_the_same_encoder(name, head, folder, tmp_path):
    case = BY_NAME[name]
    before = TinyLM.from_pretrained(folder(case))
    labels = {} if head == "qa" else dict(id2label=FRUIT)
    torch.manual_seed(3)
    after = TinyLM.from_pretrained(folder(case), head=head, **labels)
    assert after.config.head == head and after.config.num_labels == (2 if head == "qa" else 4)
    assert body(after).keys() == body(before).keys()
    assert all(torch.equal(value, body(before)[key]) for key, value in body(after).items())
    ids = prompts(case, 2, LENGTH)
    out = after(ids)
    assert out.shape == {"classify": (2, 4), "tokens": (2, LENGTH, 4), "qa": (2, LENGTH, 2)}[head]
    after.save_pretrained(tmp_path)
    theirs = load_oracle(tmp_path, head)
    assert difference(out, output(theirs, ids)) < 1e-5
    if labels:
        assert theirs.config.id2label == FRUIT
        assert theirs.config.label2id == {name: i for i, name in FRUIT.items()}


def test_a_fresh_head_is_random_and_what_is_there_is_loaded(folder):
    """A bare BERT brings the pooler of its classifier; a masked LM does not."""
    fresh = {}
    for case in (BARE, MLM):
        for seed in (1, 2):
            torch.manual_seed(seed)
            lm = TinyLM.from_pretrained(folder(case), head="classify", **dict(id2label=FRUIT))
            fresh[case, seed] = lm.state_dict()
        last = fresh[case, 1]["head.out.weight"]
        assert (
            last.shape == (4, 60)
            and 0 < last.std() < 0.1
            and not fresh[case, 1]["head.out.bias"].any()
        )
        assert not torch.equal(last, fresh[case, 2]["head.out.weight"]), "the seed decides"
    pooler = load_file(folder(BARE) / "model.safetensors")["pooler.dense.weight"]
    assert torch.equal(fresh[BARE, 1]["head.dense.weight"], pooler)
    assert not torch.equal(fresh[MLM, 1]["head.dense.weight"], fresh[MLM, 2]["head.dense.weight"])


@pytest.mark.parametrize("head", ["mlm", "classify", "tokens", "qa", None])
def test_a_bias_under_two_names_is_its_own_heads(head, copy):
    """Guards another head's bias for which the masked head's, stored a second time, was taken."""
    path, bias = copy(MLM), "cls.predictions.bias"
    twin = {"cls.predictions.decoder.bias": torch.ones(211)}
    rewrite_tensors(path, lambda tensors: tensors | twin | {bias: torch.ones(211)})
    lm = TinyLM.from_pretrained(path, head=head)
    assert lm.config.head == head
    if head is not None:
        assert bool(lm.state_dict()["head.out.bias"].all()) == (head == "mlm")


def test_the_same_head_is_loaded(folder):
    assert_same_weights(
        TinyLM.from_pretrained(folder(CLASSIFY), head="classify"),
        TinyLM.from_pretrained(folder(CLASSIFY)),
    )


@every([MLM, CLASSIFY, BY_NAME["distilbert-tokens"]])
@torch.no_grad()
def test_the_head_taken_off(case, folder):
    """The hidden states of the same encoder, whatever stood on it."""
    ids, ours = prompts(case, 2, LENGTH), TinyLM.from_pretrained(folder(case), head=None)
    states = load_oracle(folder(case), case.head)(ids, output_hidden_states=True).hidden_states[-1]
    assert ours.config.head is None and difference(ours(ids), states) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_a_classifier_made_of_a_decoder(family, folder, tmp_path):
    case = Case(f"{family}-base", family, common(head_dim=16))
    after = TinyLM.from_pretrained(folder(case), head="classify", id2label=FRUIT)
    ids = prompts(case, 2, LENGTH)
    assert after(ids).shape == (2, 4)
    after.save_pretrained(tmp_path)
    assert difference(after(ids), output(load_oracle(tmp_path, "classify"), ids)) < 1e-5


def test_unknown_head(folder):
    refuses(lambda: TinyLM.from_pretrained(folder(BARE), head="poet"), "head", "poet")
    refuses(
        lambda: TinyLM.from_pretrained(folder(BY_NAME["llama-classify"]), head="mlm"), "head", "mlm"
    )


# ---- what must be refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("bert-mlm", "cls.predictions.transform.dense.bias"),
        ("bert-classify", "bert.pooler.dense.weight"),
        ("bert-classify", "classifier.bias"),
        ("roberta-classify", "classifier.out_proj.weight"),
        ("distilbert-classify", "pre_classifier.weight"),
        ("electra-bare", "embeddings_project.bias"),
        ("electra-mlm", "generator_lm_head.bias"),
        ("bert-tokens", "bert.embeddings.token_type_embeddings.weight"),
        ("xlm-roberta-qa", "qa_outputs.bias"),
        ("llama-classify", "score.weight"),
        ("bert-bare", "encoder.layer.1.attention.self.key.bias"),
    ],
)
def test_missing_tensor(name, tensor, copy):
    path = copy(BY_NAME[name])
    rewrite_tensors(
        path, lambda tensors: {key: value for key, value in tensors.items() if key != tensor}
    )
    refuses(lambda: TinyLM.from_pretrained(path), "model.safetensors", tensor)


@pytest.mark.parametrize(
    "name, tensor, shape",
    [
        ("bert-classify", "classifier.out_proj.weight", (3, 60)),
        ("electra_relu-bare", "embeddings_project.weight", (60, 60)),
        ("distilbert-bare", "embeddings.token_type_embeddings.weight", (2, 60)),
        ("roberta-tokens", "roberta.encoder.layer.2.output.dense.bias", (60,)),
        ("llama-classify", "score.bias", (4,)),
        ("bert-bare", "encoder.layer.0.crossattention.self.key.weight", (60, 60)),
    ],
)
def test_unexpected_tensor(name, tensor, shape, copy):
    path = copy(BY_NAME[name])
    rewrite_tensors(path, lambda tensors: tensors | {tensor: torch.zeros(shape)})
    refuses(lambda: TinyLM.from_pretrained(path), "model.safetensors", tensor)


@pytest.mark.parametrize(
    "name, tensor, shape",
    [
        ("bert-classify", "classifier.weight", (2, 60)),
        ("bert-classify", "bert.pooler.dense.weight", (60, 1)),
        ("roberta-bare", "embeddings.position_embeddings.weight", (38, 60)),
        ("electra-mlm", "electra.embeddings_project.weight", (26, 60)),
        ("llama-classify", "score.weight", (60, 4)),
    ],
)
def test_misshaped_tensor(name, tensor, shape, copy):
    path = copy(BY_NAME[name])
    rewrite_tensors(path, lambda tensors: tensors | {tensor: torch.zeros(shape)})
    refuses(lambda: TinyLM.from_pretrained(path), "model.safetensors", tensor, shape[0])


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("bert-mlm", "position_embedding_type", "relative_key"),
        ("roberta-bare", "position_embedding_type", "relative_key"),
        ("electra-qa", "position_embedding_type", "relative_key_query"),
        ("bert-mlm", "is_decoder", True),
        ("roberta-classify", "is_decoder", True),
        ("bert-bare", "add_cross_attention", True),
        ("bert-tokens", "hidden_act", "foo"),
        ("distilbert-tokens", "activation", "foo"),
        ("bert-classify", "quantization_config", "x"),
        ("bert-classify", "problem_type", "poetry"),
        ("bert-classify", "num_attention_heads", 7),
        ("bert-classify", "type_vocab_size", "3"),
        ("bert-classify", "architectures", ["BertForMultipleChoice"]),
        ("bert-classify", "id2label", {"x": "y"}),
        ("electra-bare", "embedding_size", 0),
        ("bert-bare", "layer_norm_eps", "1e-12"),
    ],
)
def test_config_field_that_is_not_supported(name, field, value, copy):
    """The message names the file, the field and the value."""
    path = copy(BY_NAME[name])
    rewrite_config(path, lambda config: config | {field: value})
    shown = value[0] if isinstance(value, list) else "" if isinstance(value, dict) else value
    refuses(lambda: TinyLM.from_pretrained(path), "config.json", field, shown)


VARIANTS = [  # (case, what differs from it): fields that change the output in transformers
    ("bert-mlm", dict(tie_word_embeddings=False)),
    ("distilbert-mlm", dict(tie_word_embeddings=False)),
    ("electra-mlm", dict(tie_word_embeddings=False)),
    ("bert-mlm", dict(hidden_act="gelu_new")),
    ("roberta-mlm", dict(hidden_act="gelu_pytorch_tanh")),
    ("distilbert-bare", dict(sinusoidal_pos_embds=True)),
    ("bert-bare", dict(type_vocab_size=1)),
    ("roberta-bare", dict(pad_token_id=5)),
    ("llama-classify", dict(rope_parameters=None, attention_bias=True)),
    ("electra-classify", dict(hidden_act="silu")),
]


@pytest.mark.parametrize(
    "name, fields",
    VARIANTS,
    ids=lambda value: (
        value
        if isinstance(value, str)
        else "+".join(f"{key}={entry}" for key, entry in value.items())
    ),
)
@torch.no_grad()
def test_right_or_refused_but_never_wrong(name, fields, tmp_path):
    """A field that matters is either computed as transformers computes it or named in an error."""
    case = BY_NAME[name]
    case = Case("variant", case.family, case.fields | fields, case.head)
    save(case, tmp_path)
    ids = prompts(case, 2, LENGTH)
    ids[ids == case.fields.get("pad_token_id", 0)] = 7  # no prompt holds a pad token
    try:
        ours = TinyLM.from_pretrained(tmp_path)
    except ValueError as error:
        assert (
            "config.json" in str(error)
            and "\n" not in str(error)
            and any(field in str(error) for field in fields)
        )
        return
    theirs = output(load_oracle(tmp_path, case.head), ids)
    assert difference(ours(ids), theirs) < 1e-5
    ours.save_pretrained(tmp_path / "again")
    assert difference(output(load_oracle(tmp_path / "again", case.head), ids), theirs) < 1e-5


IDS = torch.full((2, 4), 7)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("bert-bare", dict(token_type_ids=torch.zeros(2, 3, dtype=torch.long)), ["token_type_ids"]),
        ("bert-bare", dict(token_type_ids=torch.zeros(4, dtype=torch.long)), ["token_type_ids"]),
        ("bert-bare", dict(token_type_ids=torch.full((2, 4), 3)), ["token_type_ids", 3]),
        ("bert-bare", dict(token_type_ids=torch.full((2, 4), -1)), ["token_type_ids", -1]),
        ("bert-bare", dict(token_type_ids=torch.zeros(2, 4)), ["token_type_ids"]),
        (
            "distilbert-bare",
            dict(token_type_ids=torch.ones(2, 4, dtype=torch.long)),
            ["token_type_ids"],
        ),
        (
            "llama-classify",
            dict(token_type_ids=torch.ones(2, 4, dtype=torch.long)),
            ["token_type_ids"],
        ),
        ("bert-bare", dict(attention_mask=torch.ones(2, 5, dtype=torch.long)), ["attention_mask"]),
        ("bert-bare", dict(decoder_input_ids=IDS), ["decoder_input_ids"]),
        ("bert-bare", dict(input_ids=torch.full((1, 38), 7)), [38, 37]),
        ("distilbert-qa", dict(input_ids=torch.full((1, 38), 7)), [38, 37]),
        ("bert-bare", dict(input_ids=torch.full((1, 3), 211)), [211]),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else "-".join(value) if isinstance(value, dict) else ""
    ),
)
def test_bad_input(name, options, words, folder):
    lm = TinyLM.from_pretrained(folder(BY_NAME[name]))
    refuses(lambda: lm(**dict(input_ids=IDS) | options), *words)


@every([MLM, CLASSIFY, BY_NAME["llama-classify"]])
def test_only_a_language_model_generates(case, folder):
    refuses(lambda: TinyLM.from_pretrained(folder(case)).generate(IDS, max_new_tokens=2))


def test_a_dozen_classes_come_back_in_their_order(tmp_path):
    """Guards labels that config.json has in the order of their numbers as texts: 0, 1, 10, 11, 2, ..."""
    lm = TinyLM(
        Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            head="classify",
            id2label={i: f"class {i}" for i in range(12)},
        )
    )
    lm.save_pretrained(tmp_path)
    assert TinyLM.from_pretrained(tmp_path).config.id2label == lm.config.id2label


def test_dropout_stands_where_transformers_has_it():
    """Guards a dropout before the output of language models, masked ones and answers, which have none."""
    p = dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout=0.1,
    )
    rates = {
        head: TinyLM(Config(head=head, causal=False, **p)).head.dropout.p
        for head in pretrained.CLASS_ENDINGS
    }
    assert rates == {"lm": 0.0, "mlm": 0.0, "classify": 0.1, "tokens": 0.1, "qa": 0.0, None: 0.0}
    assert TinyLM(Config(head="classify", **p)).head.dropout.p == 0.0
