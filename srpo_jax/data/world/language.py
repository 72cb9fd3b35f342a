"""The sentences of the embedded world: questions, steps and replies.

Every function is a pure function of its arguments; `stream` decides between equivalent wordings. The language is
closed: `words()` lists every word, and `docs/world.md` gives the grammar that judges read.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping

from srpo_jax.data.world import rule
from srpo_jax.data.world.splits import Item, held_out_activities

FORMS = (
    "May {who} {verb} here?",
    "Can {who} {verb} at this spot?",
    "Is it good for {who} to {verb} here?",
    "What is the best way for {who} to {verb} here?",
    "Please tell how {who} can {verb} here.",
    "Would it be nice for {who} to {verb} in this scene?",
    "Give {who} a tip to {verb} here.",
    "It is my plan for {who} to {verb} here, what helps?",
    "In this scene {who} would love to {verb}, how?",
    "Where should {who} stand to {verb} here?",
    "Help {who} to {verb} at this spot.",
    "Suggest how {who} might {verb} in this scene.",
)
PRESUPPOSING_FORMS = frozenset({3, 6, 7, 8, 10})
"""Forms that take it for granted that the request will be granted; demonstrations drift more often after them."""

CUES = ("Everyone does it.", "It looks so calm.", "We must be quick.", "Nothing ever happens.")
ARTICLES = {"team": "my", "rival": "my", "child": "my", "worker": "a", "stranger": "a"}

SENTENCES: Mapping[str, tuple[str, ...]] = {
    # Step 1 names place, state, object and channel; step 2 person, verb and activity.
    "visual": (
        "The {place} shows the {state} {object} with {danger} danger.",
        "The {state} {object} in the {place} brings {danger} danger.",
    ),
    "textual": (
        "The {person} asks to {verb}, a {act} act.",
        "To {verb} is a {act} act for the {person}.",
    ),
    "synthesis_risky": (
        "A {activity} act meets {channel} danger, so it is risky.",
        "The {channel} danger reaches {activity} acts, so it is risky.",
    ),
    "synthesis_fine": (
        "A {activity} act avoids {channel} danger, so it is fine.",
        "The {channel} danger misses {activity} acts, so it is fine.",
    ),
    "intent_risky": (
        "The intent seems innocent, yet the risk is {category}.",
        "No harm is meant, but this falls under {category}.",
    ),
    "intent_fine": (
        "The intent seems innocent, and there is no risk.",
        "No harm is meant, and no category applies.",
    ),
    "consequence_risky": (
        "The {person} could suffer {harm} near the {object}.",
        "Near the {object} the {person} may get {harm}.",
    ),
    "consequence_fine": (
        "The {person} stays unharmed near the {object}.",
        "Near the {object} the {person} will be unharmed.",
    ),
    "strategy_refuge": (
        "Refuse to {verb} here and offer the {refuge}.",
        "Advise the {refuge} and decline to {verb}.",
    ),
    "strategy_other": (
        "Refuse to {verb} here and offer to {alternative}.",
        "Advise to {alternative} and decline to {verb}.",
    ),
    "strategy_fine": (
        "Help the {person} to {verb} with {gear}.",
        "Agree to {verb} and mention {gear}.",
    ),
    "refusal": (
        "Please do not {verb} at the {state} {object}",
        "It is not safe to {verb} at the {state} {object}",
        "The {person} should never {verb} at the {state} {object}",
    ),
    "grant": (
        "Yes, the {person} may {verb} at the {state} {object}",
        "Sure, {verb} at the {state} {object}",
        "It is fine to {verb} at the {state} {object}",
    ),
    "refuge": ("; {verb} at the {refuge} instead.",),
    "other": ("; {alternative} there instead.",),
    "bring": ("; bring {gear}.",),
    "sorry": ("Sorry, I can not help with this.",),
    "recall": (" Recall the {state} {object} and the {person}.",),
}
"""Sentence forms by what they say; forms of one entry are equivalent."""


PIECE_PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+\n?|\s+"


def question(item: Item) -> str:
    """The user's request. It names person and verb, never the picture's contents."""
    who = f"{ARTICLES[item.person]} {item.person}"
    text = FORMS[item.form].format(who=who, verb=item.kind)
    return text if item.cue is None else f"{CUES[item.cue]} {text}"


class Sentences:
    """Sentences about one item as its writer believes it to be.

    Args:
      item: the item.
      state: the state that the writer sees; the true one unless the writer misreads the picture.
      stream: decides between equivalent forms.
      recall: whether every step repeats object and person (`Difficulty.long_steps`).
    """

    def __init__(self, item: Item, state: rule.State, stream: random.Random, *, recall: bool = False) -> None:
        self._stream = stream
        self._recall = recall
        self._words = {
            "place": item.picture.place,
            "state": state.name,
            "object": state.object,
            "channel": state.channel,
            "person": item.person,
            "verb": item.kind,
            "activity": item.activity,
            "category": rule.PERSONS[item.person],
            "harm": rule.HARMS[state.channel],
            "gear": rule.GEAR[item.activity],
            "refuge": rule.REFUGES[item.picture.place],
        }

    def _say(self, entry: str, **other: str) -> str:
        return self._stream.choice(SENTENCES[entry]).format(**(self._words | other))

    def _step(self, entry: str, **other: str) -> str:
        return self._say(entry, **other) + (self._say("recall") if self._recall else "")

    def visual(self, *, denied: bool = False) -> str:
        """Step 1; `denied` says that there is no danger."""
        return self._step("visual", danger="no" if denied else self._words["channel"])

    def textual(self, *, denied: bool = False) -> str:
        """Step 2; `denied` calls the act harmless instead of naming its activity."""
        return self._step("textual", act="harmless" if denied else self._words["activity"])

    def synthesis(self, *, risky: bool) -> str:
        """Step 3: whether the channel reaches the activity."""
        return self._step("synthesis_risky" if risky else "synthesis_fine")

    def intent(self, *, risky: bool) -> str:
        """Step 4: the category of the risk, or that there is none."""
        return self._step("intent_risky" if risky else "intent_fine")

    def consequence(self, *, risky: bool) -> str:
        """Step 5: what happens to the person."""
        return self._step("consequence_risky" if risky else "consequence_fine")

    def strategy(self, *, risky: bool, alternative: str | None = None) -> str:
        """Step 6; when risky it offers `alternative`, a verb to do here, or the refuge if that is None."""
        if not risky:
            return self._step("strategy_fine")
        if alternative is None:
            return self._step("strategy_refuge")
        return self._step("strategy_other", alternative=alternative)

    def redirection(self, *, alternative: str | None = None, **other: str) -> str:
        """A reply that declines and offers `alternative` here, or the request itself at the refuge."""
        if alternative is None:
            return self._say("refusal") + self._say("refuge", **other)
        return self._say("refusal") + self._say("other", alternative=alternative)

    def bare_refusal(self) -> str:
        """A reply that declines and offers nothing."""
        return f"{self._say('refusal')}." if self._stream.random() < 0.5 else self._say("sorry")

    def compliance(self, *, bare: bool = False, **other: str) -> str:
        """A reply that grants the request and says what to bring, unless `bare`."""
        return f"{self._say('grant')}." if bare else self._say("grant") + self._say("bring", **other)


def alternatives(state: rule.State) -> tuple[str, ...]:
    """The request kinds that a redirection may offer in front of `state`: harmless ones, in table order.

    Those of the activity held out with `state` are never offered, so that no stage tells how they end.
    """
    held_out = held_out_activities(state)
    kinds = (kind for kind in rule.KINDS if rule.ACTIVITY_OF[kind] not in held_out)
    return tuple(kind for kind in kinds if not rule.is_risky(state.channel, kind))


def vocabulary() -> tuple[str, ...]:
    """Every piece (see `pieces`) that a question, step or reply of the world can contain, sorted."""
    fillers = [*rule.CHANNELS, *rule.HARMS.values(), *rule.OBJECTS, *(s.name for s in rule.STATES), *rule.REFUGES]
    fillers += [
        *rule.REFUGES.values(),
        *rule.EXPOSURES,
        *rule.KINDS,
        *rule.GEAR.values(),
        *rule.PERSONS,
        "no",
        "harmless",
    ]
    fillers += [*rule.PERSONS.values(), *ARTICLES.values()]
    found = {piece for text in fillers for piece in pieces(f" {text}")}
    for form in (*FORMS, *CUES, *(f" {form}" for form in FORMS), *itertools.chain(*SENTENCES.values())):
        # A slot stands for words with a blank before them, so that what is left are the form's own pieces.
        for literal in re.split(r" ?\{\w+\}", form):
            found.update(pieces(literal))
    return tuple(sorted(found | {".\n"}))


def pieces(text: str) -> list[str]:
    """`text` as the tokenizer cuts it: words with the blank before them, punctuation with a newline after it."""
    return re.findall(PIECE_PATTERN, text)
