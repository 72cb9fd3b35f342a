"""Near-duplicates are found whatever the block, and no group is ever divided between splits."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_jax.data import scenes, similarity

PICTURES = [record.images[0] for record in scenes.records("train", 48)[::2]]
links = st.integers(1, 30).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40))
)


def test_copies_are_near_and_strangers_are_not():
    """Another size, a compression, a lighter copy: within 24 of 256 bits. Pictures of other scenes: beyond 32."""
    hashes = np.stack([similarity.image_hash(picture) for picture in PICTURES])
    assert not [*similarity.near_images(hashes, 32)]
    for picture in PICTURES[:6]:
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=60)
        copies = [PIL.Image.open(buffer), picture.resize((200, 200)), picture.point(lambda v: min(255, v + 12))]
        for copy in copies:
            pair = np.stack([similarity.image_hash(picture), similarity.image_hash(copy)])
            assert [*similarity.near_images(pair, 24)] == [(0, 1)]


@settings(deadline=None)
@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20), st.integers(0, 256), st.integers(1, 7))
def test_every_pair_is_compared_in_blocks_of_any_size(rows, distance, block):
    hashes = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32)
    bits = np.unpackbits(hashes, axis=1)
    n = len(rows)
    expected = {(i, j) for i in range(n) for j in range(i + 1, n) if (bits[i] != bits[j]).sum() <= distance}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "BLOCK", block)
        assert set(similarity.near_images(hashes, distance)) == expected


def test_texts_are_near_whatever_case_and_punctuation(monkeypatch):
    texts = ["Suggest a pose here.", "How do I bake bread?", "suggest a POSE here!", "Suggest a prose here."]
    for block in (1, 2, 100):
        monkeypatch.setattr(similarity, "BLOCK", block)
        assert set(similarity.near_texts(texts, 100)) == {(0, 2)}
        assert set(similarity.near_texts(texts, 90)) == {(0, 2), (0, 3), (2, 3)}


@given(links)
def test_groups_are_what_the_links_connect(drawn):
    n, pairs = drawn
    groups = similarity.connected(n, pairs)
    assert all(groups[i] == groups[j] for i, j in pairs)
    assert all(groups[group] == group and (groups[:group] != group).all() for group in set(groups.tolist()))
    # No fewer groups than links must leave: each link joins two of them at most.
    assert len(set(groups.tolist())) >= n - len({frozenset(pair) for pair in pairs if pair[0] != pair[1]})


@given(links, st.integers(0, 5), st.sampled_from([{"train": 1.0}, {"train": 0.8, "test": 0.2}, {"a": 0.5, "b": 0.5}]))
def test_a_group_is_never_divided_and_shares_are_kept(drawn, seed, shares):
    n, pairs = drawn
    groups = [f"g{group}" for group in similarity.connected(n, pairs)]
    splits = similarity.split_groups(groups, shares, seed)
    assert all(splits[i] == splits[j] for i, j in pairs)
    largest = max(groups.count(group) for group in groups)
    assert all(abs(splits.count(split) - share * n) <= largest * len(shares) for split, share in shares.items())
    assert splits == similarity.split_groups(groups, shares, seed)


def test_shares_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="together 1"):
        similarity.split_groups(["a"], {"train": 0.8, "test": 0.1})
