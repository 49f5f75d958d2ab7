"""Fine-tuning MiniLM on rt-polarity, tinylm's command against a plain transformers loop, in one run: time and accuracy.
Then a classifier from scratch, and the other jobs, each beside what one has without training.

    python tests/bench/finetune.py [sentiment] [scratch] [qa] [tags] [summary] [mlm] [translation]
    python tests/bench/finetune.py --peer [--rows N] [--seeds N] [sentiment] [tags] [qa] [translation]

With --peer each task beside transformers' Trainer: the same rows, start and epochs, the mean over the seeds of what is
held out, for Trainer at each of two learning rates. The last tenth of each file of rt-polarity, the last fifth of xquad's paragraphs, the last tenth of scitldr's training
file and 500 of the English texts are held out. `summary` needs `pip install rouge_score`, `translation` sacrebleu,
`--peer` transformers with accelerate, seqeval and sacrebleu.
"""

import argparse
import json
import os
import random
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from conftest import CACHE, fetch_minilm, move, wheel_contents

torch.set_num_threads(os.cpu_count())  # which conftest lowers for small models

DATA = ROOT.parent / "shared" / "data"
CATALOGUES = (  # wheels of programs that are translated into French; their code is not used
    "pretix==2026.8.0",
    "gramps==6.0.8",
    "misago==0.39.6",
    "mayan-edms==4.12.2",
)


def rt_polarity(folder):
    """Rows in jsonl, to train on and held out."""
    parts = {"train": [], "test": []}
    for label in ("pos", "neg"):
        lines = (
            (DATA / "rt-polarity" / f"rt-polarity.{label}")
            .read_text(encoding="latin-1")
            .strip()
            .split("\n")
        )
        cut = len(lines) - len(lines) // 10
        for part, some in (("train", lines[:cut]), ("test", lines[cut:])):
            parts[part] += [json.dumps({"text": line.strip(), "label": label}) for line in some]
    return [write(folder / f"{name}.jsonl", "\n".join(rows)) for name, rows in parts.items()]


def xquad(folder):
    """Paragraphs in SQuAD's json: four fifths, and the last fifth."""
    paragraphs = [
        p
        for article in json.loads((DATA / "xquad" / "xquad.en.json").read_text())["data"]
        for p in article["paragraphs"]
    ]
    cut = len(paragraphs) * 4 // 5
    return [
        write(folder / f"xquad-{name}.json", json.dumps({"data": [{"paragraphs": some}]}))
        for name, some in (("train", paragraphs[:cut]), ("test", paragraphs[cut:]))
    ]


def scitldr(folder):
    """Abstracts of papers and what they say in a sentence: jsonl to train on and held out."""
    rows = (DATA / "scitldr" / "train.jsonl").read_text(encoding="utf-8").strip().split("\n")
    cut = len(rows) - len(rows) // 10
    return [
        write(folder / f"scitldr-{name}.jsonl", "\n".join(some))
        for name, some in (("train", rows[:cut]), ("test", rows[cut:]))
    ]


def punctuation(path):
    """Beside a file of scitldr one of its words in lower case and without punctuation, whose tags say what stood behind
    each: a comma, a full stop or nothing."""
    rows = []
    for row in rows_of(path):
        words = [
            (re.sub(r"\W+$", "", word).lower(), word[-1])
            for word in " ".join(row["source"]).split()
        ]
        words = [
            (word, {",": "B-COMMA", ".": "B-PERIOD"}.get(end, "O")) for word, end in words if word
        ]
        rows.append(
            json.dumps({"tokens": [word for word, _ in words], "tags": [tag for _, tag in words]})
        )
    return write(path.with_name("tags-" + path.name), "\n".join(rows))


def english_french(folder):
    """What programs say, in English and in French: short lines without markup and placeholders, in jsonl to train on and
    held out. No English text is in both. Made once, in the cache of the tests' models."""
    done = CACHE / "english-french.jsonl"
    if not done.exists():
        pairs = {}
        for wheel in CATALOGUES:
            with wheel_contents(wheel) as work:
                for path in sorted(work.rglob("fr/LC_MESSAGES/*.mo")):
                    for texts in messages(path):
                        if all(map(is_plain, texts)) and texts[0].lower() != texts[1].lower():
                            pairs.setdefault(re.sub(r"\W+", " ", texts[0].lower()).strip(), texts)
        rows = [json.dumps(dict(zip(("source", "target"), texts))) for texts in pairs.values()]
        random.Random(0).shuffle(rows)
        move(write(done.with_suffix(".tmp"), "\n".join(rows)), done)
    rows = done.read_text(encoding="utf-8").split("\n")
    return [
        write(folder / f"french-{name}.jsonl", "\n".join(some))
        for name, some in (("train", rows[500:]), ("test", rows[:500]))
    ]


def messages(path):
    """The texts of a compiled gettext catalogue, and their translations."""
    data = path.read_bytes()
    columns = []
    count, *tables = struct.unpack("<3I", data[8:20])
    for table in tables:
        places = struct.iter_unpack("<II", data[table : table + 8 * count])
        columns.append([data[start : start + size].decode() for size, start in places])
    for english, french in zip(*columns):
        yield english.split("\4")[-1].strip(), french.strip()  # before \4 stands a context


def is_plain(text):
    return 2 <= len(text.split()) <= 20 and not re.search(r"[][%{}<>&$|\\_=#@/\n\0]|\(s\)", text)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def tinylm(*arguments):
    """Seconds, and what the command printed."""
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, arguments)], capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    return time.perf_counter() - start, run.stdout + run.stderr


def last(figure, log):
    """Its last value, as training ("0.8 accuracy") or `eval` ("accuracy  0.8") prints it."""
    return float(next(filter(None, re.findall(rf"([\d.]+) {figure}|{figure}  ([\d.]+)", log)[-1])))


def transformers_loop(minilm, train, test, batch=32, lr=1e-4):
    """One epoch of AdamW with a linear schedule and batches of similar length; (seconds, accuracy)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
    sets = []
    for path in (train, test):
        rows = rows_of(path)
        random.Random(0).shuffle(
            rows
        )  # the file is sorted by label: texts of one length would be of one label too
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=256)["input_ids"]
        sets.append(
            sorted(
                zip(ids, (int(row["label"] == "pos") for row in rows)),
                key=lambda pair: len(pair[0]),
            )
        )
    cut = [[pairs[i : i + batch] for i in range(0, len(pairs), batch)] for pairs in sets]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(cut[0]))

    def padded(pairs):
        ids, labels = zip(*pairs)
        return tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt"), torch.tensor(labels)

    model.train()
    for i in torch.randperm(len(cut[0])).tolist():
        inputs, labels = padded(cut[0][i])
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(**inputs).logits.argmax(-1) == labels).sum())
            for inputs, labels in map(padded, cut[1])
        )
    return time.perf_counter() - start, right / len(sets[1])


def sentiment(folder):
    minilm, (train, test) = fetch_minilm(), rt_polarity(folder)
    ours, log = tinylm(
        "train",
        train,
        "--task",
        "classify",
        "--init",
        minilm,
        "--val",
        test,
        "--epochs",
        1,
        "--batch",
        24,
        "--dropout",
        0,
        "--out",
        folder / "sentiment",
    )
    print(
        f"tinylm, MiniLM, one epoch: {ours:.0f} s, accuracy {last('accuracy', log):.4f}", flush=True
    )
    theirs, accuracy = transformers_loop(minilm, train, test)
    print(f"transformers, MiniLM, one epoch: {theirs:.0f} s, accuracy {accuracy:.4f}")
    print(f"tinylm takes {ours / theirs:.2f} of the time")


def scratch(folder):
    train, test = rt_polarity(folder)
    seconds, log = tinylm(
        "train", train, "--task", "classify", "--val", test, "--out", folder / "scratch"
    )
    best = max(float(value) for value in re.findall(r"validation ([\d.]+) accuracy", log))
    print(f"tinylm, from scratch: {seconds:.0f} s, accuracy {best:.4f}")


def lexical(test):
    """Span F1 of the sentence that shares most words with the question."""
    from train import overlap, plain

    scores = []
    for paragraph in (
        p for article in json.loads(test.read_text())["data"] for p in article["paragraphs"]
    ):
        sentences = re.split(r"(?<=[.!?])\s+", paragraph["context"])
        for qa in paragraph["qas"]:
            asked = set(plain(qa["question"]))
            said = max(sentences, key=lambda sentence: len(asked & set(plain(sentence))))
            scores.append(max(overlap(said, answer["text"]) for answer in qa["answers"]))
    return sum(scores) / len(scores)


def qa(folder):
    minilm, (train, test) = fetch_minilm(), xquad(folder)
    tinylm(
        "train",
        train,
        "--task",
        "qa",
        "--init",
        minilm,
        "--steps",
        1,
        "--lr",
        1e-12,
        "--adam-lr",
        1e-12,
        "--out",
        folder / "untrained",
    )
    untrained = last("span F1", tinylm("eval", folder / "untrained" / "last", test)[1])
    seconds, log = tinylm(
        "train", train, "--task", "qa", "--init", minilm, "--val", test, "--out", folder / "qa"
    )
    _, log = tinylm("eval", folder / "qa" / "best", test)
    _, german = tinylm("eval", folder / "qa" / "best", DATA / "xquad" / "xquad.de.json")
    print(
        f"tinylm, MiniLM on xquad: {seconds:.0f} s, span F1 {last('span F1', log):.4f}, exact match "
        f"{last('exact match', log):.4f}; untrained head {untrained:.4f}, sentence that shares most words "
        f"{lexical(test):.4f}; German {last('span F1', german):.4f}"
    )


def tags(folder):
    minilm, (train, test) = fetch_minilm(), map(punctuation, scitldr(folder))
    seconds, log = tinylm(
        "train",
        train,
        "--task",
        "tokens",
        "--init",
        minilm,
        "--val",
        test,
        "--epochs",
        1,
        "--out",
        folder / "tags",
    )
    every = [tag for row in rows_of(test) for tag in row["tags"]]
    print(
        f"tinylm, MiniLM on scitldr's punctuation: {seconds:.0f} s, F1 {last('entity F1', log):.4f}, accuracy "
        f"{last('accuracy', log):.4f}; no punctuation at all {every.count('O') / len(every):.4f}"
    )


def summary(folder):
    from rouge_score.rouge_scorer import RougeScorer

    train, test = scitldr(folder)
    seconds, log = tinylm(
        "train", train, "--task", "seq2seq", "--val", test, "--out", folder / "summary"
    )
    begin = time.perf_counter()
    _, log = tinylm("eval", folder / "summary" / "best", test)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    rows = rows_of(test)
    lead = [scorer.score(" ".join(row["target"]), row["source"][0]) for row in rows]
    first = (
        sum(score[name].fmeasure for score in lead) / len(lead) for name in ("rouge1", "rougeL")
    )
    print(
        f"tinylm, summaries from scratch: {seconds:.0f} s, perplexity {last('perplexity', log):.1f}, ROUGE-1 "
        f"{last('rouge1', log):.4f}, ROUGE-L {last('rougeL', log):.4f} (eval {time.perf_counter() - begin:.0f} s); "
        "the first sentence {:.4f}, {:.4f}".format(*first)
    )


def mlm(folder):
    minilm, files = fetch_minilm(), rt_polarity(folder)
    train, test = (
        write(
            file.with_suffix(".txt"),
            "\n".join(row["text"] for row in rows_of(file)),
        )
        for file in files
    )
    seconds, log = tinylm(
        "train", train, "--task", "mlm", "--init", minilm, "--val", test, "--out", folder / "mlm"
    )
    found = [float(value) for value in re.findall(r"([\d.]+) perplexity", log)]
    print(
        f"tinylm, MiniLM on reviews, masked: {seconds:.0f} s, perplexity {found[-1]:.1f}, after each epoch {found}"
    )


def translation(folder):
    from sacrebleu import corpus_bleu

    train, test = english_french(folder)
    best = folder / "translation" / "best"
    seconds, log = tinylm(
        "train",
        train,
        "--task",
        "seq2seq",
        "--val",
        test,
        "--out",
        best.parent,
    )
    steps = int(re.findall(r"(\d+) steps in", log)[-1])
    evaluating, log = tinylm("eval", best, test)
    true = [row["target"] for row in rows_of(test)]
    alike = corpus_bleu(most_alike(train, test), [true]).score
    print(
        f"tinylm, English to French from scratch: {seconds:.0f} s, {steps} steps, perplexity "
        f"{last('perplexity', log):.1f}, BLEU {last('BLEU', log):.1f} (eval {evaluating:.0f} s); "
        f"the French of the English text most alike {alike:.1f}"
    )
    some = [row["source"] for row in rows_of(test)[:8]]
    for source, written in zip(some, tinylm("run", best, *some)[1].strip().split("\n")):
        print(f"  {source}  ->  {written}", flush=True)


def most_alike(train, test):
    """For each text held out the French of the one in training that shares most words with it."""
    known = [(words(row["source"]), row["target"]) for row in rows_of(train)]
    found = []
    for asked in (words(row["source"]) for row in rows_of(test)):
        found.append(
            max(known, key=lambda pair: len(asked & pair[0]) / max(len(asked | pair[0]), 1))[1]
        )
    return found


def words(text):
    return set(re.findall(r"\w+", text.lower()))


# ---------------------------------------------------------------------------------------------------------------------
# --peer: transformers' Trainer on the same rows, from the same start, for as many epochs
# ---------------------------------------------------------------------------------------------------------------------
SEPARATE = dict(padding=False, truncation=True, max_length=512)


def trainer(model, rows, collator, seed, lr, epochs, batch, folder):
    """Trains as Trainer does by itself, but for the learning rate and the size of a batch."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=batch,
        num_train_epochs=epochs,
        learning_rate=lr,
        warmup_steps=0.06,
        weight_decay=0.01,
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
    )
    training = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    training.remove_callback(PrinterCallback)
    training.train()
    return model.eval()


def outputs_of(model, tokenizer, features, batch=32):
    """The logits of each of the features, without padding."""
    found = []
    for i in range(0, len(features), batch):
        some = [
            {name: row[name] for name in MODEL_INPUTS if name in row}
            for row in features[i : i + batch]
        ]
        inputs = tokenizer.pad(some, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        logits = outputs.logits if "logits" in outputs else torch.stack(outputs[:2], -1)
        found += [x[: len(row["input_ids"])].numpy() for x, row in zip(logits, some)]
    return found


MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def peer_sentiment(start, train, test, seed, lr, folder):
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
    )

    tokenizer = AutoTokenizer.from_pretrained(start)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=2)
    sets = []
    for path in (train, test):
        rows = rows_of(path)
        inputs = tokenizer([row["text"] for row in rows], **SEPARATE)
        labels = [int(row["label"] == "pos") for row in rows]
        sets.append(
            [{k: inputs[k][i] for k in inputs} | {"labels": labels[i]} for i in range(len(rows))]
        )
    model = trainer(model, sets[0], DataCollatorWithPadding(tokenizer), seed, lr, 1, 24, folder)
    found = outputs_of(model, tokenizer, sets[1])
    right = [int(x.argmax()) == row["labels"] for x, row in zip(found, sets[1])]
    return {"accuracy": sum(right) / len(right)}


def peer_tags(start, train, test, seed, lr, folder):
    """As transformers' run_ner: the first piece of a word has its label."""
    from seqeval.metrics import accuracy_score, f1_score
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
    )

    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = [rows_of(path) for path in (train, test)]
    names = sorted({tag for row in rows[0] + rows[1] for tag in row["tags"]})
    torch.manual_seed(seed)
    model = AutoModelForTokenClassification.from_pretrained(start, num_labels=len(names))
    sets = []
    for some in rows:
        inputs = tokenizer([row["tokens"] for row in some], is_split_into_words=True, **SEPARATE)
        features = [{k: inputs[k][i] for k in inputs} for i in range(len(some))]
        for i, (feature, row) in enumerate(zip(features, some)):
            words = inputs.word_ids(i)
            feature["first"] = {
                word: c for c, word in reversed([*enumerate(words)]) if word is not None
            }
            feature["labels"] = [-100] * len(words)
            for word, c in feature["first"].items():
                feature["labels"][c] = names.index(row["tags"][word])
        sets.append(features)
    collate = DataCollatorForTokenClassification(tokenizer)
    learnt = [{k: v for k, v in row.items() if k != "first"} for row in sets[0]]
    model = trainer(model, learnt, collate, seed, lr, 1, 16, folder)
    predicted = []
    for logits, feature, row in zip(outputs_of(model, tokenizer, sets[1]), sets[1], rows[1]):
        tags = ["O"] * len(row["tags"])
        for word, c in feature["first"].items():
            tags[word] = names[int(logits[c].argmax())]
        predicted.append(tags)
    true = [row["tags"] for row in rows[1]]
    return {"entity F1": f1_score(true, predicted), "accuracy": accuracy_score(true, predicted)}


def unanswerable(folder):
    """xquad's questions, and for every third one the same question on a paragraph of another article, which does not
    answer it: jsonl to train on and held out."""
    paths = []
    for path in xquad(folder):
        paragraphs = json.loads(path.read_text())["data"][0]["paragraphs"]
        rows = []
        for i, paragraph in enumerate(paragraphs):
            for j, qa in enumerate(paragraph["qas"]):
                answers = {
                    "text": [answer["text"] for answer in qa["answers"]],
                    "answer_start": [answer["answer_start"] for answer in qa["answers"]],
                }
                row = {
                    "question": qa["question"],
                    "context": paragraph["context"],
                    "answers": answers,
                }
                rows.append(row)
                if j % 3 == 0:
                    other = paragraphs[(i + len(paragraphs) // 2) % len(paragraphs)]["context"]
                    rows.append(
                        row | {"context": other, "answers": {"text": [], "answer_start": []}}
                    )
        random.Random(0).shuffle(rows)
        paths.append(write(path.with_suffix(".jsonl"), "\n".join(map(json.dumps, rows))))
    return paths


def peer_qa(start, train, test, seed, lr, folder):
    """As transformers' run_qa with version_2_with_negative, its features and its postprocessing; SQuAD 2's script."""
    from helpers import run_qa_answer, squad_scores
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding

    tokenizer = AutoTokenizer.from_pretrained(start)
    torch.manual_seed(seed)
    model = AutoModelForQuestionAnswering.from_pretrained(start)
    sets = []
    for path in (train, test):
        features = []
        for number, row in enumerate(rows_of(path)):
            inputs = tokenizer(
                row["question"],
                row["context"],
                truncation="only_second",
                max_length=384,
                stride=128,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            for i, offsets in enumerate(inputs["offset_mapping"]):
                parts = inputs.sequence_ids(i)
                places = [pair if part == 1 else None for pair, part in zip(offsets, parts)]
                feature = {name: inputs[name][i] for name in MODEL_INPUTS if name in inputs}
                first, last = answer_columns(row["answers"], places)
                feature |= {"start_positions": first, "end_positions": last}
                features.append((number, places, feature))
        sets.append(features)
    learnt = [feature for _, _, feature in sets[0]]
    model = trainer(model, learnt, DataCollatorWithPadding(tokenizer), seed, lr, 6, 16, folder)
    logits = outputs_of(model, tokenizer, [feature for _, _, feature in sets[1]])
    rows, grouped = rows_of(test), {}
    for (number, places, _), ends in zip(sets[1], logits):
        grouped.setdefault(number, ([], []))
        grouped[number][0].append(places)
        grouped[number][1].append(ends)
    predicted = [
        run_qa_answer(row["context"], *grouped[number], may_be_none=True, longest=30) or ""
        for number, row in enumerate(rows)
    ]
    return squad_scores(rows, predicted)


def answer_columns(answers, places):
    """First and last column of the first answer; 0 and 0 where the feature has not the whole of it."""
    if not answers["text"]:
        return 0, 0
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    inside = [c for c, place in enumerate(places) if place and place[1] > start and place[0] < end]
    shown = [place for place in places if place]
    if not inside or shown[0][0] > start or shown[-1][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def peer_translation(start, train, test, seed, lr, folder):
    from sacrebleu import corpus_bleu
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_pretrained(start)
    rows = rows_of(train)
    sources, targets = ([row[name] for row in rows] for name in ("source", "target"))
    inputs = tokenizer(sources, **SEPARATE)
    labels = tokenizer(targets, **SEPARATE)["input_ids"]
    end = tokenizer.eos_token_id
    labels = [ids if ids[-1:] == [end] else ids + [end] for ids in labels]
    learnt = [
        {name: inputs[name][i] for name in ("input_ids", "attention_mask")} | {"labels": labels[i]}
        for i in range(len(rows))
    ]
    first = model.config.decoder_start_token_id

    def collate(features):
        # MBart's own way would begin with the last token of the target, as in its languages.
        padded = tokenizer.pad(
            [{k: row[k] for k in row if k != "labels"} for row in features], return_tensors="pt"
        )
        rows = [torch.tensor(row["labels"]) for row in features]
        labels = torch.nn.utils.rnn.pad_sequence(rows, True, -100)
        before = labels.new_full((len(labels), 1), first)
        shifted = torch.cat([before, labels[:, :-1].clamp(min=0)], 1)
        return padded | {"labels": labels, "decoder_input_ids": shifted}

    model = trainer(model, learnt, collate, seed, lr, 6, 64, folder)
    rows, written = rows_of(test), []
    for i in range(0, len(rows), 64):
        some = tokenizer(
            [row["source"] for row in rows[i : i + 64]], padding=True, return_tensors="pt"
        )
        some = {name: some[name] for name in ("input_ids", "attention_mask")}
        ids = model.generate(**some, max_new_tokens=100, do_sample=False, num_beams=1)
        written += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return {"BLEU": corpus_bleu(written, [[row["target"] for row in rows]]).score}


def untrained(train, folder, seed):
    """The model from scratch from which `tinylm train --task seq2seq` begins."""
    import data
    from train import TrainOptions, new_model

    options = TrainOptions(task="seq2seq", seed=seed).filled()
    new_model(data.read_rows(train, options, notices=[]), options).save_pretrained(folder / "start")
    return folder / "start"


PEERS = {  # task -> (its data, the task's name and options for tinylm, the peer, its rates, the figures)
    "sentiment": (
        rt_polarity,
        "classify --epochs 1 --batch 24 --dropout 0",
        peer_sentiment,
        (5e-5, 1e-4),
        ("accuracy",),
    ),
    "tags": (
        lambda folder: [punctuation(path) for path in scitldr(folder)],
        "tokens --epochs 1 --batch 16 --block 512",
        peer_tags,
        (5e-5, 1e-4),
        ("entity F1", "accuracy"),
    ),
    "qa": (
        unanswerable,
        "qa --epochs 6 --batch 16 --block 384",
        peer_qa,
        (5e-5, 3e-4),
        ("exact match", "span F1", "HasAns exact match", "NoAns exact match"),
    ),
    "translation": (english_french, "seq2seq", peer_translation, (5e-4, 2e-3), ("BLEU",)),
}


def compare(name, folder, limit, seeds):
    """Prints a line for tinylm and for Trainer at each rate: the mean and spread of the figures, and the time."""
    import transformers

    data, options, peer, rates, shown = PEERS[name]
    paths = data(folder)
    if limit:
        for path, count in zip(paths, (limit, max(limit // 4, 20))):
            write(path, "\n".join(evenly(path.read_text(encoding="utf-8").split("\n"), count)))
    train, test = paths
    scratch = name == "translation"
    start = fetch_minilm()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task, *options = options.split()
    if not scratch:
        options += ["--init", start]

    def ours(seed):
        out = folder / f"ours-{seed}"
        fixed = ["--task", task, "--val-share", 0, "--seed", seed, "--out", out, "--quiet"]
        tinylm("train", train, *fixed, *options)
        printed = tinylm("eval", out / "last", test, "--json")[1]
        return json.loads(next(line for line in printed.split("\n") if line.startswith("{")))

    report("tinylm", name, ours, seeds, shown)
    for lr in rates:

        def theirs(seed, lr=lr):
            first = untrained(train, folder, seed) if scratch else start
            return peer(first, train, test, seed, lr, folder)

        report(f"Trainer, lr {lr:g}", name, theirs, seeds, shown)


def evenly(rows, count):
    """At most `count` of the rows, from all of the file, which may be sorted by class."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def report(who, name, run, seeds, shown):
    found, begin = [], time.perf_counter()
    for seed in range(seeds):
        found.append(run(seed))
    seconds = (time.perf_counter() - begin) / seeds
    cells = []
    for figure in shown:
        values = [each[figure] for each in found if figure in each]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{figure} {statistics.mean(values):.4f} (sd {spread:.4f})")
    print(f"{name}: {who}: {', '.join(cells)}; {seconds:.0f} s a run", flush=True)


JOBS = dict(
    sentiment=sentiment,
    scratch=scratch,
    qa=qa,
    tags=tags,
    summary=summary,
    mlm=mlm,
    translation=translation,
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(JOBS))
    parser.add_argument("--peer", action="store_true", help="beside transformers' Trainer")
    parser.add_argument("--rows", type=int, default=0, help="with --peer: rows to train on")
    parser.add_argument("--seeds", type=int, default=3, help="with --peer: runs of each")
    given = parser.parse_args()
    jobs = PEERS if given.peer else JOBS
    if unknown := [name for name in given.names if name not in jobs]:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(jobs)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    for name in given.names or jobs:
        with tempfile.TemporaryDirectory() as work:
            if given.peer:
                compare(name, Path(work), given.rows, given.seeds)
            else:
                JOBS[name](Path(work))
