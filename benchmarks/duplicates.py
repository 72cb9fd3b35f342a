"""Near-duplicates among many records: seconds and memory of the searches, against a comparison of all pairs.

    python benchmarks/duplicates.py [--pictures=1000,10000,100000] [--questions=1000,10000,50000] [--pairs=10000] [--json=FILE]

For each number, in a process of its own:

1. Copies of pictures: hashes of random bits, every tenth a copy of another with up to 12 bits changed; which of them go
   (16 bits) and how they are grouped (48 bits).
2. Repeated questions: 6 to 16 words drawn by Zipf's law from 3,000, every tenth a copy of another with a word changed; which
   of them go (similarity 90).
3. Up to --pairs of them: what goes, by comparing all pairs, with numpy and rapidfuzz; the results must be the same.
4. What is all alike: the same hash, or question, as many times.

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

PICTURES = flags.DEFINE_list("pictures", ["1000", "10000", "100000"], "Numbers of pictures.")
QUESTIONS = flags.DEFINE_list("questions", ["1000", "10000", "50000"], "Numbers of questions.")
PAIRS = flags.DEFINE_integer("pairs", 10_000, "Most of them of which all pairs are compared.")
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


def all_pairs_of_hashes(hashes):
    """What goes, each compared with all that come after it."""
    words = hashes.view(np.uint64)

    def later(i):
        bits = np.bitwise_count(words[i + 1 :] ^ words[i]).sum(axis=1, dtype=np.int16)
        return (i + 1 + np.flatnonzero(bits <= COPIES)).tolist()

    return repeated(later, range(len(words)))


def all_pairs_of_texts(texts):
    """What goes, each compared with all that come after it."""
    plain = [default_process(text) for text in texts]

    def later(i):
        if i + 1 == len(plain):
            return []
        scores = process.cdist(plain[i : i + 1], plain[i + 1 :], scorer=fuzz.ratio, score_cutoff=ALIKE)
        return (i + 1 + np.flatnonzero(scores[0])).tolist()

    return repeated(later, range(len(plain)))


def measure_pictures(n, pairs, told):
    """Puts figures of `n` hashes into `told`."""
    hashes = hashes_of(n)
    begin = memory()
    gone = timed(told, "that_go_s", lambda: copies(hashes))
    told["that_go"], told["that_go_mb"] = len(gone), memory() - begin
    groups = timed(told, "groups_s", lambda: image_groups(hashes, RELATED))
    told["groups"], told["groups_mb"] = len(set(groups.tolist())), memory() - begin
    if n <= pairs:
        assert timed(told, "all_pairs_s", lambda: all_pairs_of_hashes(hashes)) == gone
    same = hashes[:1].repeat(n, axis=0)
    timed(told, "all_alike_s", lambda: (copies(same), image_groups(same, RELATED)))


def measure_questions(n, pairs, told):
    """Puts figures of `n` texts into `told`."""
    texts = texts_of(n)
    begin = memory()
    gone = timed(told, "that_go_s", lambda: repeats(texts))
    told["that_go"], told["that_go_mb"] = len(gone), memory() - begin
    if n <= pairs:
        assert timed(told, "all_pairs_s", lambda: all_pairs_of_texts(texts)) == gone
    timed(told, "all_alike_s", lambda: repeats(texts[:1] * n))


def memory():
    """Megabytes of this process at its peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def in_its_own(kind, n, pairs, out):
    """Runs in a process of its own; puts figures into a queue."""
    told = {kind: n}
    (measure_pictures if kind == "pictures" else measure_questions)(n, pairs, told)
    out.put(told)


def main(_):
    context, results = multiprocessing.get_context("spawn"), []
    for kind, sizes in (("pictures", PICTURES.value), ("questions", QUESTIONS.value)):
        for size in sizes:
            out = context.Queue()
            child = context.Process(target=in_its_own, args=(kind, int(size), PAIRS.value, out))
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(f"{size} {kind}: the process ended with {child.exitcode}")
            results.append(out.get())
            print(json.dumps(results[-1]), flush=True)
    if SAVE.value:
        write_json(SAVE.value, results)


if __name__ == "__main__":
    cli.run(main)
