"""Items of the world put into words and pixels: SSUI records with their reference path."""

from __future__ import annotations

from typing import Any

from srpo_jax.data.records import Record
from srpo_jax.data.world import rule
from srpo_jax.data.world.difficulty import Difficulty
from srpo_jax.data.world.drawing import draw
from srpo_jax.data.world.language import Sentences, alternatives, question
from srpo_jax.data.world.splits import Item


def record(item: Item, difficulty: Difficulty) -> Record:
    """The record of an item: drawn picture, question, true six-step path, safe reply, unsafe reply if risky, facts."""
    sentences = Sentences(item, item.picture.state, item.stream("reference"), recall=difficulty.long_steps)
    alternative = choose_alternative(item, item.picture.state)
    risky = item.risky
    steps = (
        sentences.visual(),
        sentences.textual(),
        sentences.synthesis(risky=risky),
        sentences.intent(risky=risky),
        sentences.consequence(risky=risky),
        sentences.strategy(risky=risky, alternative=alternative),
    )
    help_ = sentences.compliance()
    return Record(
        id=item.id,
        images=(draw(item.picture),),
        question=question(item),
        risky=risky,
        category=rule.PERSONS[item.person] if risky else None,
        steps=steps,
        safe_reply=sentences.redirection(alternative=alternative) if risky else help_,
        unsafe_reply=help_ if risky else None,
        twin=item.twin,
        meta=facts(item),
    )


def choose_alternative(item: Item, state: rule.State) -> str | None:
    """What a redirection offers: None, the request at the place's refuge, or a verb that is harmless with `state`."""
    stream = item.stream("alternative")
    return None if stream.random() < 0.5 else stream.choice(alternatives(state))


def facts(item: Item) -> dict[str, Any]:
    """What judges and reports may know of an item (`docs/world.md` describes every key)."""
    picture = item.picture
    return {
        "world": "scenes",
        "split": item.split,
        "index": item.index,
        "object": picture.state.object,
        "state": picture.state.name,
        "channel": picture.state.channel,
        "place": picture.place,
        "refuge": rule.REFUGES[picture.place],
        "kind": item.kind,
        "activity": item.activity,
        "person": item.person,
        "form": item.form,
        "cue": item.cue,
        "layout": picture.layout,
        "style": picture.style,
        "hard": picture.hard,
        "clarity": picture.clarity,
        "second": picture.second,
    }
