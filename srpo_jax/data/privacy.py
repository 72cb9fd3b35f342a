"""Personal data and secrets in texts, faces in pictures: found for people to look at, and taken out of logs.

What is found here is a hint, never a clearance. Texts: e-mail addresses, telephone numbers (the phonenumbers library, numbers
with their country's prefix), payment cards and bank accounts (by check digits), IP addresses, keys of known shapes. Names and
postal addresses are not found. Faces: OpenCV's frontal-face cascade, which misses profiles, small and dark faces, and sees
some that are none; hand in a detector of your own where it matters.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import phonenumbers
import PIL.Image


class Span(NamedTuple):
    """Where something personal stands in a text; `kind` says what it is."""

    start: int
    end: int
    kind: str


EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
CARD = re.compile(r"(?<![\w.])(?:\d[ -]?){12,18}\d(?!\w)")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
ADDRESS = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]\d)")
SECRET = re.compile(
    r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}|\b(?:hf|gh[pousr]|glpat|xox[abp])[_-][A-Za-z0-9_-]{16,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}|(?<=Bearer )[\w.~+/-]{16,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----)?",
    re.DOTALL,
)


def personal_data(text: str) -> list[Span]:
    """What of a text is personal or secret, in order, without overlaps."""
    found = sorted(_candidates(text), key=lambda span: (span.start, -span.end))
    kept: list[Span] = []
    for span in found:
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def _candidates(text: str) -> Iterator[Span]:
    yield from (Span(*match.span(), "key") for match in SECRET.finditer(text))
    yield from (Span(*match.span(), "e-mail address") for match in EMAIL.finditer(text))
    yield from (Span(*m.span(), "payment card") for m in CARD.finditer(text) if _luhn(re.sub(r"\D", "", m[0])))
    yield from (Span(*match.span(), "bank account") for match in IBAN.finditer(text) if _iban(match[0]))
    yield from (Span(*match.span(), "IP address") for match in ADDRESS.finditer(text) if _public(match[0]))
    yield from (Span(m.start, m.end, "telephone number") for m in phonenumbers.PhoneNumberMatcher(text, None))


def redact(text: str) -> str:
    """The text with each span of `personal_data` replaced by what it was, in brackets."""
    parts, end = [], 0
    for span in personal_data(text):
        parts += [text[end : span.start], f"[{span.kind}]"]
        end = span.end
    return "".join([*parts, text[end:]])


def _luhn(digits: str) -> bool:
    doubled = [sum(divmod(2 * int(d), 10)) if place % 2 else int(d) for place, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _iban(text: str) -> bool:
    plain = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _public(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def count_faces(picture: PIL.Image.Image) -> int:
    """Frontal faces that OpenCV's cascade sees in a picture."""
    import cv2  # 60 MB that only pictures need

    detector = cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"))
    copy = picture.convert("L")
    copy.thumbnail((640, 640))
    return len(detector.detectMultiScale(np.asarray(copy), scaleFactor=1.1, minNeighbors=6, minSize=(24, 24)))
