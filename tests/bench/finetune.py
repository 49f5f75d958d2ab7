"""Fine-tuning MiniLM on rt-polarity, tinylm's command against a plain transformers loop, in one run: time and accuracy.
Then a classifier from scratch, and the other jobs, each beside what one has without training.

    python tests/bench/finetune.py [sentiment] [scratch] [qa] [tags] [summary] [mlm] [translation]

The last tenth of each file of rt-polarity, the last fifth of xquad's paragraphs, the last tenth of scitldr's training
file and 500 of the English texts are held out. `summary` needs `pip install rouge_score`, `translation` sacrebleu.
"""

import json
import os
import random
import re
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
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    for name in sys.argv[1:] or JOBS:
        with tempfile.TemporaryDirectory() as work:
            JOBS[name](Path(work))
