"""Near-duplicates among many records: seconds and memory of the searches, against a comparison of all pairs.

    python benchmarks/duplicates.py [--sizes=1000,10000,100000] [--pairs=10000] [--json=FILE]

For each number of records, in a process of its own:

1. Copies of pictures: hashes of random bits, every tenth a copy of another with up to 12 bits changed; which of them go
   (16 bits) and how they are grouped (48 bits).
2. Repeated questions: 6 to 16 words drawn by Zipf's law from 3,000, every tenth a copy of another with a word changed; which
   of them go (similarity 90).
3. Up to --pairs records: the same by comparing all pairs, with numpy and rapidfuzz; the results must be the same.
4. What is all alike: the same question, the same hash, as many times.

Words are drawn letter by letter; those of a language share more, so that more candidates are compared.
"""

import itertools
import json
import multiprocessing
import random
import resource
import string
import time

import numpy as np
from absl import flags
from rapidfuzz import fuzz, process
from rapidfuzz.utils import default_process

from srpo_jax import cli
from srpo_jax.data.similarity import ImageIndex, TextIndex, image_groups, repeated
from srpo_jax.files import write_json

SIZES = flags.DEFINE_list("sizes", ["1000", "10000", "100000"], "Numbers of records.")
PAIRS = flags.DEFINE_integer("pairs", 10_000, "Most records of which all pairs are compared.")
SAVE = flags.DEFINE_string("json", None, "Where to keep the results.")
COPIES, RELATED, ALIKE = 16, 48, 90.0


def hashes_of(n):
    """uint8[n, 32]."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (n, 32), np.uint8)
    for place in range(9, n, 10):
        bits = np.zeros(256, bool)
        bits[rng.choice(256, rng.integers(0, 13), replace=False)] = True
        hashes[place] = hashes[rng.integers(place)] ^ np.packbits(bits)
    return hashes


def texts_of(n):
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(3000)]
    weights = [*itertools.accumulate(1 / (rank + 10) for rank in range(len(words)))]
    texts: list[str] = []
    for place in range(n):
        if place % 10 == 9:
            told = texts[rng.randrange(place)].split()
            told[rng.randrange(len(told))] = rng.choice(words)
        else:
            told = rng.choices(words, cum_weights=weights, k=rng.randint(6, 16))
        texts.append(" ".join(told))
    return texts


def timed(told, name, call):
    """The result; its seconds stand in `told`."""
    begin = time.perf_counter()
    result = call()
    told[name] = round(time.perf_counter() - begin, 2)
    return result


def copies(hashes):
    index = ImageIndex(hashes, COPIES)
    return repeated(lambda i: index.near(hashes[i]).tolist(), range(len(hashes)))


def repeats(texts):
    return repeated(TextIndex(texts, ALIKE).near_own, range(len(texts)))


def all_pairs(hashes, texts):
    """What goes among pictures and questions, each compared with all that come after it."""
    words, plain = hashes.view(np.uint64), [default_process(text) for text in texts]

    def later(i):
        bits = np.bitwise_count(words[i + 1 :] ^ words[i]).sum(axis=1, dtype=np.int16)
        return (i + 1 + np.flatnonzero(bits <= COPIES)).tolist()

    def alike(i):
        scores = process.cdist(plain[i : i + 1], plain[i + 1 :], scorer=fuzz.ratio, score_cutoff=ALIKE)
        return (i + 1 + np.flatnonzero(scores[0] >= ALIKE)).tolist() if i + 1 < len(plain) else []

    return lambda: repeated(later, range(len(words))), lambda: repeated(alike, range(len(plain)))


def measure(n, pairs, out):
    """Puts the figures of `n` records into a queue."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hashes = hashes_of(n)
    told = {"records": n}
    gone = timed(told, "pictures_that_go_s", lambda: copies(hashes))
    groups = timed(told, "groups_of_pictures_s", lambda: image_groups(hashes, RELATED))
    told["pictures_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    texts = texts_of(n)
    repeated_texts = timed(told, "questions_that_go_s", lambda: repeats(texts))
    told["all_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    told |= {"pictures": len(gone), "groups": len(set(groups.tolist())), "questions": len(repeated_texts)}
    if n <= pairs:
        pictures, questions = all_pairs(hashes, texts)
        assert timed(told, "all_pairs_of_pictures_s", pictures) == gone
        assert timed(told, "all_pairs_of_questions_s", questions) == repeated_texts
    same = hashes[:1].repeat(n, axis=0)
    timed(told, "one_picture_s", lambda: (copies(same), image_groups(same, RELATED)))
    timed(told, "one_question_s", lambda: repeats(texts[:1] * n))
    out.put(told)


def main(_):
    context, results = multiprocessing.get_context("spawn"), []
    for size in SIZES.value:
        out = context.Queue()
        process_ = context.Process(target=measure, args=(int(size), PAIRS.value, out))
        process_.start()
        process_.join()
        if process_.exitcode:
            raise SystemExit(f"{size} records: the process ended with {process_.exitcode}")
        results.append(out.get())
        print(json.dumps(results[-1]), flush=True)
    if SAVE.value:
        write_json(SAVE.value, results)


if __name__ == "__main__":
    cli.run(main)
