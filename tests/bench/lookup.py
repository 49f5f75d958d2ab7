"""How much faster SmolLM2-135M writes with prompt lookup decoding: 2 threads, without and with it in turns, in one process.

    python tests/bench/lookup.py [FOLDER] [--precision fp32 int8 int4 torch] [--tokens 200] [--rounds 3] [--only NAME ...]

FOLDER: an export of SmolLM2 (without one, it is exported first, which takes minutes); torch: TinyLM in fp32, not
compiled. Texts that repeat their context are
greedy: a file with a class renamed, a list continued, a quotation. Free ones are sampled, and the same seed draws the
same text. For each, the median over the rounds of the ratio of both turns of a round counts, prompt included; `repeated`
is the share of the new tokens that stand, with the three before them, further up too.

Bars, for the mean ratio of a kind of text: repeating ones at least 2 in fp32 and 1.5 in int8 and int4; free ones 0.97. In
fp32 and torch both texts are the same. Rounded graphs compute one row and several by other kernels, so a near tie may fall
otherwise there; then the ratio compares two texts of one length.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "bench")]

THREADS = 2
COUNT = 10  # prompt_lookup_num_tokens
BARS = {
    "repeats": {"fp32": 2.0, "torch": 2.0, "int8": 1.5, "int4": 1.5},
    "free": dict.fromkeys(["fp32", "torch", "int8", "int4"], 0.97),
}

CODE = '''class Account:
    """A bank account with an owner and a balance."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        self.history.append(("withdraw", amount))

    def transfer(self, other, amount):
        self.withdraw(amount)
        other.deposit(amount)
'''
ARTICLE = """The lighthouse at Cape Hollow was built in 1874 by a crew of forty masons who carried every stone up the \
cliff on their backs. Its lamp burned whale oil for twenty years, then kerosene, and since 1931 electric light. The last \
keeper, a widow named Ingrid Solberg, lived there alone for thirty-one winters and wrote down the weather twice a day in \
blue notebooks. When the station was automated in 1969, she moved to the village below, but every evening she climbed \
the path to see whether the light had come on. The notebooks are now in the county museum, where meteorologists use \
them to study how storms on this coast have changed."""
COUNTRIES = "France Germany Italy Spain Portugal Austria Belgium".split()
LINE = (
    "- [{0}](https://example.org/wiki/{0}): the history, geography, economy and culture of {0}, with maps, photographs "
    "and a list of its largest cities\n"
)
TEXTS = {
    "repeats": {
        "a file with a class renamed": f"Here is a Python file:\n\n```python\n{CODE}```\n\nHere is the same file, with the "
        "class Account renamed to Wallet and nothing else changed:\n\n```python\n"
        + CODE.partition("        self.balance")[0].rstrip().replace("Account", "Wallet"),
        "a list continued": "".join(map(LINE.format, COUNTRIES)) + "- [",
        "a quotation": f"Read this text:\n\n{ARTICLE}\n\nHere is the whole text again, word by word:\n\nThe lighthouse at",
    },
    "free": {
        "a story": "Once upon a time, in a village by the sea,",
        "a letter": "Dear Margaret,\n\nthank you for your letter from Lisbon. Since you left,",
        "an essay": "Why do people build cities? In this essay I argue that",
    },
}
OPTIONS = {"repeats": {}, "free": dict(temperature=0.8, top_k=50, seed=1)}


def repeated(prompt, new, n=4):
    """The share of the new tokens that end an n-gram that stands further up too."""
    text, seen, found = [*prompt, *new], set(), 0
    for end in range(n, len(text) + 1):
        gram = tuple(text[end - n : end])
        found += end > len(prompt) and gram in seen
        seen.add(gram)
    return found / len(new)


def compare(lm, prompt, tokens, rounds, options):
    """Median tokens/s without and with drafts, the median ratio, and the new ids of both."""
    ids, rates, new = np.array([lm.tokenizer.encode(prompt)]), ([], []), [None, None]
    for turn in range(rounds + 1):
        for i, count in enumerate((None, COUNT)):
            start = time.perf_counter()
            out = lm.generate(
                ids,
                max_new_tokens=tokens if turn else 8,
                eos_token_id=(),
                prompt_lookup_num_tokens=count,
                **options,
            )
            # The first turn warms up.
            if turn:
                rates[i].append(tokens / (time.perf_counter() - start))
                new[i] = out[0, ids.shape[1] :].tolist()
    ratio = statistics.median(after / before for before, after in zip(*rates))
    return *map(statistics.median, rates), ratio, repeated(ids[0].tolist(), new[0]), new


def open_model(folder, precision):
    from conftest import fetch_smollm2

    if precision == "torch":
        import torch

        from tinylm import TinyLM

        torch.set_num_threads(THREADS)
        return TinyLM.from_pretrained(fetch_smollm2(), dtype="float32")
    from onnxlm import CPU, OnnxLM

    if folder is None:
        from decode import exported

        folder = exported(fetch_smollm2(), Path(tempfile.gettempdir()) / "tinylm-bench-smollm2")
    return OnnxLM(folder, precision, providers=[CPU], threads=THREADS)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="kinds of text, or parts of their names")
    args = parser.parse_args()
    missed = []
    for precision in args.precision:
        lm = open_model(args.folder, precision)
        for kind, texts in TEXTS.items():
            ratios = []
            for name, prompt in texts.items():
                if args.only and not any(word in f"{kind} {name}" for word in args.only):
                    continue
                found = compare(lm, prompt, args.tokens, args.rounds, OPTIONS[kind])
                plain, drafted, ratio, share, (one, other) = found
                same = next(
                    (i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), len(one)
                )
                ratios.append(ratio)
                print(
                    f"{precision:5} {name:28} {plain:6.1f} -> {drafted:6.1f} tokens/s  {ratio:5.2f}  "
                    f"repeated {share:4.0%}  {same} of {len(one)} tokens the same",
                    flush=True,
                )
                if precision in ("fp32", "torch") and same < len(one):
                    missed.append(f"{precision}, {name}: another text")
            if ratios:
                mean, bar = statistics.geometric_mean(ratios), BARS[kind].get(precision, 0)
                print(f"{precision:5} {kind:28} {mean:.2f} times as fast (bar {bar})", flush=True)
                if mean < bar:
                    missed.append(f"{precision}, {kind}: {mean:.2f}, expected {bar}")
    print("\n".join(missed) or "all bars met")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
