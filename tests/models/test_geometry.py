"""Promise: images are resized, cut, ordered and numbered by the released rules, within the token budget."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from srpo_jax.models import geometry
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig

VISION = VisionConfig(1, 8, 8, 2, 3, 4, 2, 2, 16, (), 8)  # 4-pixel patches, windows of 2 x 2 units
TEXT = TextConfig(40, 8, 8, 1, 2, 1, 4, 1e4, (1, 1, 0), 1e-6, False, 64)
CONFIG = ModelConfig(TEXT, VISION, image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4)

side = st.integers(1, 3000)


@given(side, side, st.sampled_from([8, 28]), st.integers(64, 4000), st.integers(4000, 2_000_000))
def test_resized_size_equals_transformers(height, width, factor, low, high):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200 times"):
            geometry.resized_size(height, width, factor, low, high)
    else:
        ours = geometry.resized_size(height, width, factor, low, high)
        assert ours == smart_resize(height, width, factor, low, high)


def test_empty_image_is_refused():
    with pytest.raises(ValueError, match="empty"):
        geometry.resized_size(0, 10, 28, 784, 7840)


picture_size = st.tuples(st.integers(200, 900), st.integers(200, 900))


@given(st.lists(picture_size, min_size=1, max_size=5), st.integers(5, 80))
def test_budget_is_kept_and_small_images_are_spared(sizes, per_image):
    factor, low, high, budget = 28, 28 * 28, 2_000_000, per_image * len(sizes)
    before = [h * w // factor**2 for h, w in geometry.fit_images(sizes, factor, low, high)]
    after = [h * w // factor**2 for h, w in geometry.fit_images(sizes, factor, low, high, budget)]
    assert sum(after) <= budget
    assert (after == before) == (sum(before) <= budget)
    kept = [b for b, a in zip(before, after, strict=True) if a == b]
    shrunk = [b for b, a in zip(before, after, strict=True) if a < b]
    assert len(kept) + len(shrunk) == len(sizes)
    assert max(kept, default=0) < min(shrunk, default=high)


def test_a_budget_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="max_image_tokens=2"):
        geometry.fit_images([(56, 56)] * 3, 28, 784, 10**6, 2)
    with pytest.raises(ValueError, match="narrow"):
        geometry.fit_images([(28, 2800)], 28, 784, 10**6, 4)


def test_budget_shrinks_only_the_largest():
    sizes = [(56, 56), (560, 560), (84, 84)]
    fitted = geometry.fit_images(sizes, 28, 784, 10**7, 60)
    assert fitted[0] == (56, 56)
    assert fitted[2] == (84, 84)
    assert 30 <= fitted[1][0] * fitted[1][1] // 784 <= 60 - 4 - 9
    assert geometry.fit_images([(280, 280)], 28, 784 * 64, 10**7, 16) == [(112, 112)]  # over min_pixels, too


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_windows_hold_every_unit_once(rows, columns, size):
    order = geometry.window_units(rows, columns, size)
    assert sorted(order[order >= 0]) == list(range(rows * columns))
    windows = order.reshape(-1, size**2)
    assert (windows >= 0).any(axis=1).all()
    for window in windows:
        units = window[window >= 0]
        assert len({(u // columns // size, u % columns // size) for u in units}) == 1


def images_of(grids):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(r * c * 4, VISION.patch_dim)).astype(np.float32) for r, c in grids]


def test_slots_find_each_merged_feature():
    grids = [(3, 3), (1, 2), (4, 1)]
    patches = images_of(grids)
    vision, slots = geometry.lay_out_images(patches, grids, VISION)
    assert len(vision.patches) % VISION.window_patches == 0
    by_unit = [field.reshape(-1, 4, *field.shape[1:]) for field in vision]
    for number, (image, grid, slot) in enumerate(zip(patches, grids, slots, strict=True), start=1):
        np.testing.assert_array_equal(by_unit[0][slot].reshape(image.shape), image)
        wanted = geometry.patch_positions(*grid, VISION.spatial_merge_size)
        np.testing.assert_array_equal(by_unit[1][slot].reshape(-1, 2), wanted)
        assert (by_unit[2][slot] == number).all()
    assert (vision.images > 0).sum() == sum(len(image) for image in patches)
    windows = vision.images.reshape(-1, VISION.window_patches)
    assert all(len(set(window[window > 0])) == 1 for window in windows)


def test_patches_must_fill_the_grid():
    with pytest.raises(ValueError, match="image 1"):
        geometry.lay_out_images(images_of([(2, 2)]), [(2, 3)], VISION)


def test_positions_of_text_and_images():
    tokens = np.array([1, 3, *[5] * 6, 4, 3, *[5] * 1, 4, 7, 8])
    positions = geometry.mrope_positions(tokens, [(2, 3), (1, 1)], CONFIG)
    time = [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8, 9, 10]
    height = [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9, 10]
    width = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    np.testing.assert_array_equal(positions, [time, height, width])
    assert positions.dtype == np.int32


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        ([1, 5, 5], [(1, 3)], "2 image tokens"),
        ([1, 5, 5], [], "2 image tokens"),
        ([5, 1, 5], [(1, 2)], "interrupted"),
        ([1, 6], [], "video"),
    ],
)
def test_tokens_must_match_the_images(tokens, grids, message):
    with pytest.raises(ValueError, match=message):
        geometry.mrope_positions(np.array(tokens), grids, CONFIG)


def test_window_smaller_than_a_unit_is_refused():
    with pytest.raises(ValueError, match="window_size"):
        dataclasses.replace(VISION, window_size=4)
