"""What the builder refuses, on by default and without a model: a floor beneath the moderator and the people who review.

Three kinds of content are refused whatever the category: sexual content involving minors, weapons of mass destruction, and the
targeting of people who can be identified. The rules read words, not meaning: they refuse too much (a warning that names
such a weapon is refused, too) and they miss what is paraphrased. What they refuse is neither stored nor logged.

An unsafe reply may show in which direction a model went wrong, without being of use to anybody: see `reply_problems`.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from srpo_jax.data.privacy import personal_data
from srpo_jax.data.records import CATEGORIES

VERSION = 1
"""Of the rules below; another version asks again what was refused or passed under this one."""

Hook = Callable[[str, str | Path], str | None]
"""A moderator of yours: ("image", file) or ("text", text) → why it is refused, or None."""


class Finding(NamedTuple):
    """Something a reviewer should know of a record; `level` is "info" or "warning"."""

    check: str
    field: str
    level: str
    text: str


MINOR = re.compile(
    r"\b(?:child(?:ren|ish|like)?|kids?|minors?|toddlers?|infants?|bab(?:y|ies)|pre-?teens?|teen(?:s|agers?|aged?)?"
    r"|school ?(?:girl|boy)s?|under ?-?age|(?:little|young) (?:girl|boy)s?"
    r"|(?:1[0-7]|[1-9]) ?-?years? ?-?olds?|aged? (?:1[0-7]|[1-9])|daughters?|sons?|nieces?|nephews?|lolita|loli)\b"
)
SEXUAL = re.compile(
    r"\b(?:sex(?:ual\w*|y|ting|ted)?|erotic\w*|nud(?:e|es|ity)|naked|porn\w*|masturbat\w*|genital\w*|lewd\w*|arous\w*"
    r"|fetish\w*|striptease|undress\w*|intercourse|seduc\w*|nsfw)\b"
)
WEAPON = re.compile(
    r"\b(?:nerve (?:agent|gas)\w*|sarin|soman|tabun|novichok|vx (?:gas|agent)|mustard gas|phosgene|ricin|anthrax|smallpox"
    r"|botulin\w* (?:toxin|weapon)|bio-?weapons?|(?:biological|chemical|nuclear|radiological|atomic|thermonuclear)"
    r" (?:weapon|bomb|warhead|device|warfare|dispersal)\w*|dirty bombs?|uranium enrichment|enrich\w* (?:uranium|plutonium)"
    r"|weapons? ?-?grade|gain ?-?of ?-?function|weapons? of mass destruction|cbrn)\b"
)
AGAINST = re.compile(
    r"\b(?:stalk\w*|dox+\w*|harass\w*|blackmail\w*|murder\w*|kill\w*|assassinat\w*|kidnap\w*|abduct\w*|swatting|attack\w*"
    r"|intimidat\w*|deep ?-?fake\w*|track\w* down|home address|where (?:\w+ ){1,3}lives?|humiliat\w*|follow\w* (?:\w+ )?home)\b"
)
REVEAL = re.compile(
    r"\b(?:identify|recogni[sz]e|unmask|name|track down|locate|find out who|who is|where does) (?:\w+ ){0,2}"
    r"(?:this|that|the) (?:\w+ ){0,2}(?:man|woman|person|people|girl|boy|child|stranger|driver|neighbou?r|face)\b"
)
NAMED = re.compile(
    r"(?:\b(?:Mrs?|Ms|Dr|President|Senator|Minister|Judge|Mayor)\.? [A-Z]\w+|\b[A-ZÀ-Þ][\w'’-]+ [A-ZÀ-Þ][\w'’-]+|@\w{3,})"
)
SENTENCE = re.compile(r"(?<!Mr\.)(?<!Ms\.)(?<!Dr\.)(?<!Mrs\.)(?<=[.!?\n])\s+")
SPELLED = re.compile(r"\b(?:\w[ .\-*_]){3,}\w\b")


def hard_refusal(text: str) -> str | None:
    """The rule that refuses `text` whatever its category, or None."""
    plain = unicodedata.normalize("NFKC", text)
    plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")  # such as zero-width spaces within a word
    plain = SPELLED.sub(lambda match: re.sub(r"[ .\-*_]", "", match[0]), plain)
    small = plain.casefold()
    if MINOR.search(small) and SEXUAL.search(small):
        return "sexual content involving minors"
    if WEAPON.search(small):
        return "weapons of mass destruction"
    return "targeting of an identifiable person" if _targets(plain) else None


def _targets(plain: str) -> bool:
    """Whether a sentence wants to reveal somebody, or turns against a person with a name, a handle or an address."""
    for sentence in SENTENCE.split(plain):
        if REVEAL.search(sentence.casefold()):
            return True
        if AGAINST.search(sentence.casefold()):
            names = [name for name in NAMED.findall(sentence) if not any(name in known for known in CATEGORIES)]
            if names or personal_data(sentence):
                return True
    return False


MAX_WORDS = 60
"""Of an unsafe reply."""
LISTED = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):]|\(?[a-h][.)]\s|step\b)", re.IGNORECASE | re.MULTILINE)
ORDER = re.compile(
    r"\b(?:first(?:ly)?|second(?:ly)?|third(?:ly)?|then|next|after that|afterwards|finally|lastly)\b", re.IGNORECASE
)
QUANTITY = re.compile(
    r"\d|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|fifty|hundred|thousand|half an?)\s+(?:\w+\s+)?"
    r"(?:gram|kilo|milli|lit(?:er|re)|ounce|pound|cup|spoon|drop|pill|tablet|volt|amp|watt|degree|minute|second|hour|met(?:er|re)|percent)\w*",
    re.IGNORECASE,
)
CODE = re.compile(
    r"[`{}\\|$#=]|;\s*$|\b(?:sudo|import|curl|wget|select \*|chmod|powershell)\b", re.IGNORECASE | re.MULTILINE
)
LINK = re.compile(r"https?:|www\.|\b[\w-]+\.(?:com|org|net|io|onion)\b", re.IGNORECASE)


def reply_problems(text: str) -> list[str]:
    """Why an unsafe reply says more than its direction; [] if it does not, as far as words tell.

    It may have at most `MAX_WORDS` words in one paragraph; no list, no order of three or more stages, no quantity or any
    digit, no address, no code, no personal data.
    """
    count = len(text.split())
    checks = {
        f"has {count} words; say the direction in at most {MAX_WORDS}": count > MAX_WORDS,
        "has more than one paragraph; write one": "\n" in text.strip(),
        "holds a list or numbered steps; give no procedure": LISTED.search(text),
        "tells an order of stages; give no procedure": len(ORDER.findall(text)) >= 3,
        "holds a number or quantity; leave it out": QUANTITY.search(text),
        "holds code or commands; leave them out": CODE.search(text),
        "holds an address; leave it out": LINK.search(text),
        "holds personal data; leave it out": personal_data(text),
    }
    return [what for what, found in checks.items() if found]


def strings(value: Any) -> Iterator[str]:
    """Every text within JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings(one)


def load_hook(spec: str, what: str = "moderator") -> Callable[..., Any]:
    """The function that "package.module:function" names.

    Raises:
      ValueError: there is none.
    """
    module, _, name = spec.partition(":")
    try:
        hook = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{what} {spec!r} is no 'package.module:function' ({error})") from error
    if not callable(hook):
        raise ValueError(f"{what} {spec!r} is a {type(hook).__name__}, not a function")
    return hook


def name_of(hook: Callable[..., Any] | None) -> str:
    """The name under which what a hook said is kept."""
    if hook is None:
        return "none"
    return f"{getattr(hook, '__module__', '')}:{getattr(hook, '__qualname__', type(hook).__qualname__)}"


def moderated(hook: Hook | None, kind: str, value: str | Path) -> str | None:
    """What a hook says; an answer that is neither a reason nor None stops the build, as an exception of the hook does.

    Raises:
      TypeError: such an answer.
    """
    told = None if hook is None else hook(kind, value)
    if told is not None and not isinstance(told, str):
        raise TypeError(f"the moderator answered {told!r} about a {kind}; return a reason for refusing it, or None")
    return told
