"""Searches find what a comparison of all pairs finds, also of what is all alike; no group is ever divided between splits."""

from __future__ import annotations

import io
import random
import string

import numpy as np
import PIL.Image
import pytest
import scipy.sparse.csgraph
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz
from rapidfuzz.utils import default_process

from srpo_jax.data import scenes, similarity

PICTURES = [record.images[0] for record in scenes.records("train", 48)[::2]]


def test_copies_are_near_and_strangers_are_not():
    """Another size, a compression, a lighter copy: within 24 of 256 bits. Pictures of other scenes: beyond 32."""
    hashes = np.stack([similarity.image_hash(picture) for picture in PICTURES])
    index = similarity.ImageIndex(hashes, 32)
    assert [index.near(hash).tolist() for hash in hashes] == [[i] for i in range(len(hashes))]
    for picture in PICTURES[:6]:
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=60)
        copies = [PIL.Image.open(buffer), picture.resize((200, 200)), picture.point(lambda v: min(255, v + 12))]
        made = similarity.ImageIndex(np.stack([similarity.image_hash(copy) for copy in copies]), 24)
        assert made.near(similarity.image_hash(picture)).tolist() == [0, 1, 2]


def some_hashes(seed: int, n: int, flips: int, bias: float) -> np.ndarray:
    """Strangers, whose bits are 1 in a share of `bias`, and copies of them in which up to `flips` bits differ."""
    rng = np.random.default_rng(seed)
    bits = rng.random((n, 256)) < bias
    copies = bits[rng.integers(0, n, n // 2)]
    for row in copies:
        row[rng.choice(256, rng.integers(0, flips + 1), replace=False)] ^= True
    return np.packbits(rng.permutation(np.concatenate([bits, copies])), axis=1)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([1, 9, 300, 700]),
    st.sampled_from([0.5, 0.97]),
    st.sampled_from([0, 5, 16, 31]),
)
def test_near_pictures_are_those_of_a_comparison_of_all_pairs(seed, n, bias, distance):
    hashes = some_hashes(seed, n, min(2 * distance, 40), bias)
    bits = np.unpackbits(hashes, axis=1).astype(np.float32)
    differ = bits @ (1 - bits).T + (1 - bits) @ bits.T
    index = similarity.ImageIndex(hashes, distance)
    for i in range(0, len(hashes), max(1, len(hashes) // 50)):
        assert index.near(hashes[i]).tolist() == np.flatnonzero(differ[i] <= distance).tolist()
    _, expected = scipy.sparse.csgraph.connected_components(differ <= distance, directed=False)
    groups = similarity.image_groups(hashes, distance)
    assert groups.tolist() == [expected.tolist().index(label) for label in expected]


def some_texts(seed: int, n: int, letters: str, length: int, changes: int) -> list[str]:
    """Strangers of about a length, and copies with up to so many letters inserted, deleted or replaced."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices(letters, k=length + rng.randint(-2, 2))) for _ in range(n)]
    for text in rng.choices(texts, k=n):
        copy = list(text)
        for _ in range(rng.randint(0, changes)):
            place = rng.randrange(len(copy) + 1)
            copy[place : place + rng.randint(0, 1)] = rng.choice(["", rng.choice(letters)])
        texts.append("".join(copy))
    return rng.sample(texts, len(texts))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from(["ab", "abcdefghij  ", "aB!é漢 "]),
    st.sampled_from([2, 9, 20, 45]),
    st.sampled_from([1, 50, 75.5, 90, 97, 100]),
)
def test_near_texts_are_those_of_a_comparison_of_all_pairs(seed, letters, length, similar):
    texts = some_texts(seed, 60, letters, length, 6)
    plain = [default_process(text) for text in texts]
    index = similarity.TextIndex(texts, similar)
    for text, own in zip(texts[:30], plain[:30], strict=True):
        assert sorted(index.near(text)) == [i for i, one in enumerate(plain) if fuzz.ratio(own, one) >= similar]


def test_searches_compare_few_of_many_strangers():
    """What makes the two tests above say something: strangers are not looked at."""
    hashes = some_hashes(0, 700, 0, 0.5)
    index = similarity.ImageIndex(hashes, 16)
    assert max(len(index._candidates(hash)) for hash in hashes[:50]) < len(hashes) / 10
    texts = some_texts(0, 2000, string.ascii_lowercase, 45, 0)
    index = similarity.TextIndex(texts, 90)
    looked = [sum(map(len, index._candidates(default_process(text)))) for text in texts[:50]]
    assert max(looked) < len(texts) / 10


def test_texts_are_near_whatever_case_and_punctuation():
    texts = ["Suggest a pose here.", "How do I bake bread?", "suggest a POSE here!", "Suggest a prose here.", "?!", ""]
    for similar, expected in ((100, [0, 2]), (90, [0, 2, 3])):
        index = similarity.TextIndex(texts, similar)
        assert sorted(index.near(texts[0])) == expected
        assert sorted(index.near("...")) == [4, 5]
    for wrong in (0, 101, float("nan")):
        with pytest.raises(ValueError, match="similarity"):
            similarity.TextIndex(texts, wrong)


things = st.integers(1, 25).flatmap(
    lambda n: st.tuples(
        st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=60),
        st.lists(st.sampled_from("ab"), min_size=n, max_size=n),
        st.integers(0, n),
    )
)


@given(things, st.sampled_from([None, 1, 2, 3]))
def test_a_repeat_goes_and_the_first_stays(drawn, most):
    """As the rule reads: each in turn is compared with all earlier ones that stay."""
    links, groups, given_ = drawn
    near = {frozenset(link) for link in links}
    stays, gone = [], set()
    for one in range(len(groups)):
        like = [i for i in stays if frozenset((i, one)) in near]
        close = [i for i in like if groups[i] == groups[one]]
        if one >= given_ and (close or (most is not None and len(like) >= most)):
            gone.add(one)
        else:
            stays.append(one)
    found = similarity.repeated(
        lambda i: [j for j in range(len(groups)) if frozenset((i, j)) in near], groups, most, given_
    )
    assert set(found) == gone
    assert all(first not in gone and first < one and frozenset((first, one)) in near for one, first in found.items())


def test_what_is_all_alike_is_looked_at_once():
    """50,000 equal hashes, 5,000 that differ in a bit or two, 50,000 equal texts: no step for each pair."""
    hashes = np.zeros((50_000, 32), np.uint8)
    assert not similarity.image_groups(hashes, 48).any()
    asked = []
    index = similarity.ImageIndex(hashes, 16)
    copies = similarity.repeated(lambda i: asked.append(i) or index.near(hashes[i]).tolist(), range(len(hashes)))
    assert set(copies.values()) == {0} and asked == [0]
    blank = some_hashes(0, 1, 0, 0.5).repeat(5_000, axis=0)
    blank[:, :2] ^= np.arange(5_000, dtype=np.uint16).view(np.uint8).reshape(-1, 2) & 0x11
    assert not similarity.image_groups(blank, 16).any()
    texts = similarity.TextIndex(["What is there?"] * 50_000, 90)
    asked.clear()
    found = similarity.repeated(lambda i: asked.append(i) or texts.near("What is here?"), range(50_000), 2)
    assert len(found) == 49_998 and asked == [0, 1]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.integers(0, 5),
    st.sampled_from([{"train": 1.0}, {"train": 0.8, "test": 0.2}, {"a": 0.5, "b": 0.5}]),
)
def test_a_group_is_never_divided_and_shares_are_kept(numbers, seed, shares):
    n, groups = len(numbers), [f"g{number}" for number in numbers]
    splits = similarity.split_groups(groups, shares, seed)
    assert len(set(zip(groups, splits, strict=True))) == len(set(groups))
    largest = max(groups.count(group) for group in groups)
    assert all(abs(splits.count(split) - share * n) <= largest * len(shares) for split, share in shares.items())
    assert splits == similarity.split_groups(groups, shares, seed)


def test_shares_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="together 1"):
        similarity.split_groups(["a"], {"train": 0.8, "test": 0.1})
