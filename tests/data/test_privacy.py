"""What is personal in a text is found and taken out of logs; the rest stays as it is."""

from __future__ import annotations

import PIL.Image
import PIL.ImageDraw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo_jax.data import scenes
from srpo_jax.data.privacy import count_faces, personal_data, redact

PERSONAL = {
    "jane.doe+x@mail.example.org": "e-mail address",
    "+44 20 7946 0958": "telephone number",
    "+1 212-555-2368": "telephone number",
    "4111 1111 1111 1111": "payment card",
    "DE89 3704 0044 0532 0130 00": "bank account",
    "93.184.216.34": "IP address",
    "sk-proj-abcdefghijklmnop1234": "key",
    "hf_abcdefghijklmnopqrstu": "key",
    "AKIAIOSFODNN7EXAMPLE": "key",
}
HARMLESS = (
    "Step 4: the risk is 3 of 10.",
    "Version 1.2.3 of 2026-01-02",
    "a 1234567890123456 card",
    "127.0.0.1",
    "Dangerous Behavior",
)


@pytest.mark.parametrize(("text", "kind"), PERSONAL.items())
def test_personal_data_is_found_within_a_sentence(text, kind):
    sentence = f"Please write to {text} at once."
    [span] = personal_data(sentence)
    assert span.kind == kind and sentence[span.start : span.end] == text
    assert redact(sentence) == f"Please write to [{kind}] at once."


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_not_personal_stays(text):
    assert redact(text) == text


@given(
    st.text(max_size=80), st.sampled_from([t for t, k in PERSONAL.items() if k in ("key", "e-mail address")]), st.text()
)
def test_keys_and_addresses_never_survive_whatever_stands_around_them(before, personal, after):
    assert personal not in redact(f"{before} {personal} {after}")


@given(st.text(), st.sampled_from(sorted(PERSONAL)), st.text())
def test_spans_are_in_order_and_apart(before, personal, after):
    text = f"{before}{personal}{after}"
    ends = [edge for span in personal_data(text) for edge in span[:2]]
    assert ends == sorted(ends) and all(0 <= edge <= len(text) for edge in ends)


def test_a_drawn_face_is_counted_and_the_world_has_none():
    """A frontal face, drawn: head, brows, eyes, nose, mouth in their proportions and shades."""
    face = PIL.Image.new("L", (320, 320), 90)
    pen = PIL.ImageDraw.Draw(face)
    pen.ellipse((90, 50, 230, 260), fill=200)
    for x in (125, 180):
        pen.rectangle((x - 8, 118, x + 28, 126), fill=70)
        pen.ellipse((x - 4, 130, x + 24, 146), fill=50)
    pen.polygon([(160, 140), (148, 190), (172, 190)], fill=170)
    pen.ellipse((130, 205, 190, 225), fill=100)
    face = face.convert("RGB")
    assert count_faces(face) == 1
    assert sum(count_faces(record.images[0]) for record in scenes.records("train", 20)[::2]) == 0
