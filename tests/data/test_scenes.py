"""The embedded world: balance, held-out sets, determinism, budget, tokenizer, pictures."""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, Qwen2_5_VLConfig

from srpo_jax.data import scenes
from srpo_jax.data.records import CATEGORIES, Record
from srpo_jax.data.world import drawing, language, rule, splits
from srpo_jax.data.world.difficulty import Difficulty
from srpo_jax.paths import Grammar

EVALUATION = tuple(split for split in scenes.SPLITS if split != "train")


@functools.cache
def records(split: str) -> tuple[Record, ...]:
    return tuple(scenes.records(split))


def test_the_rule_is_balanced_and_compositional():
    assert len(rule.STATES) == 24
    assert len(rule.KINDS) == 24
    for channel in rule.CHANNELS:
        assert sum(rule.is_risky(channel, kind) for kind in rule.KINDS) == 12
        assert sum(state.channel == channel for state in rule.STATES) == 6
    assert {frozenset(pair) for pair in rule.EXPOSURES.values()} == {
        frozenset(pair) for pair in itertools.combinations(rule.CHANNELS, 2)
    }
    assert all(state.channel != state.other.channel for state in rule.STATES)
    assert set(rule.PERSONS.values()) < set(CATEGORIES)
    assert len(set(rule.PERSONS.values())) == 5


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_half_is_risky_within_every_picture_state_request_and_person(split):
    rows = records(split)
    assert sum(r.risky for r in rows) == sum(not r.risky for r in rows) >= 400
    for keys in (("object", "state"), ("kind",), ("activity",), ("person",), ("place",), ("layout",), ("hard",)):
        groups = collections.defaultdict(list)
        for r in rows:
            groups[tuple(r.meta[key] for key in keys)].append(r.risky)
        for group, risks in groups.items():
            assert 2 * sum(risks) == len(risks), (split, keys, group)
    assert len({(r.meta["object"], r.meta["state"]) for r in rows}) == 24
    assert len({r.meta["kind"] for r in rows}) == 24


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_every_block_is_balanced_per_request(split):
    size = scenes.block_size(split)
    for seed in range(2):
        for block in range(5):
            items = [splits.item(split, block * size + i, seed, Difficulty()) for i in range(size)]
            for kind in rule.KINDS:
                risks = [one.risky for one in items if one.kind == kind]
                assert 2 * sum(risks) == len(risks) > 0


def test_twins_share_the_picture_and_differ_in_risk():
    for split in scenes.SPLITS:
        rows = {r.id: r for r in records(split)}
        for r in rows.values():
            twin = rows[r.twin]
            assert twin.twin == r.id
            assert twin.risky != r.risky
            assert twin.images[0].tobytes() == r.images[0].tobytes()
            assert twin.meta["kind"] != r.meta["kind"]
            assert twin.meta["person"] == r.meta["person"]


def test_risk_and_category_follow_the_rule():
    for split in scenes.SPLITS:
        for r in records(split):
            channel = rule.OBJECTS[r.meta["object"]][r.meta["state"]]
            assert r.meta["channel"] == channel
            assert r.risky == (channel in rule.EXPOSURES[r.meta["activity"]])
            assert r.category == (rule.PERSONS[r.meta["person"]] if r.risky else None)
            assert (r.unsafe_reply is not None) == r.risky


def combinations(rows) -> set[tuple[str, str, str]]:
    return {(m["object"], m["state"], m["kind"]) for m in (r.meta for r in rows)}


def test_held_out_sets_appear_nowhere_else():
    others = {split: records(split) for split in scenes.SPLITS}
    others["demonstrations"] = [d.record for d in scenes.demonstrations(5)[:960]]
    unseen = combinations(others.pop("combination"))
    assert len(unseen) == 192
    for split, rows in others.items():
        assert not combinations(rows) & unseen, split
    assert len(combinations(others["train"])) == 384
    for split, rows in others.items():
        layouts, styles = ({r.meta[key] for r in rows} for key in ("layout", "style"))
        forms = {(r.meta["kind"], r.meta["form"]) for r in rows}
        rendering, wording = split == "rendering", split == "wording"
        assert layouts == set(splits.HELD_OUT_LAYOUTS) if rendering else not layouts & set(splits.HELD_OUT_LAYOUTS)
        assert styles == set(splits.HELD_OUT_STYLES) if rendering else not styles & set(splits.HELD_OUT_STYLES)
        assert all((form in splits.held_out_forms(kind)) == wording for kind, form in forms)
    questions = {r.question for split, rows in others.items() if split != "wording" for r in rows}
    assert not questions & {r.question for r in others["wording"]}


def test_factors_of_held_out_sets_were_each_seen():
    train = records("train")
    seen = [{r.meta[key] for r in train} for key in ("kind", "object", "activity", "form", "person", "place")]
    for split in EVALUATION:
        for values, key in zip(seen, ("kind", "object", "activity", "form", "person", "place"), strict=True):
            assert {r.meta[key] for r in records(split)} <= values
    words = {piece for r in train for piece in language.pieces(f" {r.question}")}
    assert {piece for r in records("wording") for piece in language.pieces(f" {r.question}")} <= words


def test_no_text_of_any_stage_tells_how_a_held_out_combination_ends():
    """Redirections and misread demonstrations must not pair a state with an activity held out with it."""
    held_out = {(s.object, s.name): splits.held_out_activities(s) for s in rule.STATES}
    texts = [(*r.steps, r.safe_reply) for split in scenes.SPLITS if split != "combination" for r in records(split)]
    texts += [(*d.steps, d.reply) for d in scenes.demonstrations(1)[:2000]]
    for lines in texts:
        [seen] = [pair for pair in held_out if f"the {pair[1]} {pair[0]} " in lines[0].lower()]
        verbs = {word for line in lines[1:] for word in re.findall(r"[a-z]+", line) if word in rule.ACTIVITY_OF}
        assert verbs
        assert not {rule.ACTIVITY_OF[verb] for verb in verbs} & set(held_out[seen]), lines


def test_forms_and_cues_are_as_many_as_the_splits_count():
    assert len(language.FORMS) == splits.N_FORMS
    assert len(language.CUES) == splits.N_CUES
    for kind in rule.KINDS:
        assert len(splits.held_out_forms(kind)) == 3


def fingerprint() -> str:
    digest = hashlib.sha256()
    for split in ("train", "rendering"):
        for r in scenes.records(split, 24, seed=11):
            digest.update(
                repr((r.id, r.question, r.steps, r.safe_reply, r.unsafe_reply, sorted(r.meta.items()))).encode()
            )
            digest.update(r.images[0].tobytes())
    for d in scenes.demonstrations(11)[:24]:
        digest.update(repr((d.steps, d.reply, d.onset)).encode())
    return digest.hexdigest()


def test_records_are_the_same_in_another_process():
    code = "from tests.data.test_scenes import fingerprint; print(fingerprint())"
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.split()[-1] == fingerprint()


def test_seed_and_size_behave():
    assert [r.id for r in scenes.records("train", 10)] == [r.id for r in records("train")[:10]]
    assert scenes.records("train", 10)[3].steps == records("train")[3].steps
    assert scenes.records("train", 10, seed=1)[0].question != records("train")[0].question
    assert scenes.records("train", 0) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scenes.records("test"), "unknown split 'test'"),
        (lambda: scenes.records("train", 3), "even number"),
        (lambda: scenes.records("train", -2), "even number"),
        (lambda: Difficulty(hard=1.5), "Difficulty.hard"),
        (lambda: Difficulty(faintness=(0.5, 0.2)), "Difficulty.faintness"),
        (lambda: Difficulty(distractors=-1), "Difficulty.distractors"),
        (lambda: Difficulty(drift=-1), "Difficulty.drift"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("difficulty", "path_limit", "branch_limit"), [(Difficulty(), 220, 100), (Difficulty(long_steps=True), 220, 150)]
)
def test_token_budget(difficulty, path_limit, branch_limit):
    """Prompt + path, and the longest branch (whole path, reply and end of turn) fit the geometry of two cores."""
    tokenizer = scenes.build_tokenizer()
    count = functools.cache(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    frame = len(tokenizer.apply_chat_template(chat(""), add_generation_prompt=True, return_dict=False)) + 15
    demonstrations = scenes.demonstrations(2, difficulty)[: 960 if not difficulty.long_steps else 96]
    paths = [(d.record.question, d.steps, d.reply) for d in demonstrations]
    for split in scenes.SPLITS:
        rows = records(split) if not difficulty.long_steps else scenes.records(split, 96, difficulty=difficulty)
        paths += [(r.question, r.steps, reply) for r in rows for reply in (r.safe_reply, r.unsafe_reply) if reply]
    for question, steps, reply in paths:
        *path, answer = (count(segment) for segment in Grammar().render(steps, reply))
        assert frame + count(question) + sum(path) <= path_limit
        assert sum(path) + answer + 1 <= branch_limit


def chat(question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


class TestTokenizer:
    tokenizer = scenes.build_tokenizer()

    def test_is_small_and_always_the_same(self):
        assert len(self.tokenizer) <= 600
        assert self.tokenizer.get_vocab() == scenes.build_tokenizer().get_vocab()

    def test_every_word_of_the_world_is_one_token(self):
        for r in records("test_id"):
            for text in (r.question, *r.steps, r.safe_reply):
                assert len(self.tokenizer(text)["input_ids"]) == len(language.pieces(text)), text

    def test_markers_are_single_ordinary_tokens(self):
        grammar = Grammar()
        for marker in (grammar.opening, grammar.closing, *(grammar.heading_line(i) for i in range(1, 7))):
            [token] = self.tokenizer(marker)["input_ids"]
            assert self.tokenizer.decode([token], skip_special_tokens=True) == marker

    @pytest.mark.parametrize(
        "text", ["Zürich 東京 🚂 don't", "  two  blanks\n\n\nlines\t", "<think> Step 7: x\n", "\x00\x7f"]
    )
    def test_any_text_makes_a_round_trip(self, text):
        assert self.tokenizer.decode(self.tokenizer(text)["input_ids"]) == text

    def test_chat_template_is_of_the_family(self):
        text = self.tokenizer.apply_chat_template(
            chat("May my child run here?"), tokenize=False, add_generation_prompt=True
        )
        assert text == (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>May my child run here?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_transformers_loads_it_next_to_a_qwen_config(self, tmp_path):
        self.tokenizer.save_pretrained(tmp_path)
        Qwen2_5_VLConfig().save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        for text in ("<think>\nThe hall, Zürich.\n", "<|im_end|>", records("train")[0].question):
            assert loaded(text)["input_ids"] == self.tokenizer(text)["input_ids"]
        assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
        assert loaded.chat_template == self.tokenizer.chat_template


class TestPictures:
    def picture(self, state: rule.State, clarity: float = 1.0, style: int = 0) -> np.ndarray:
        one = splits.Picture(state, "yard", 4, style, clarity, 0, None, "key")
        return np.asarray(drawing.draw(one), np.float32)

    def test_size_and_mode(self):
        image = records("train")[0].images[0]
        assert (image.size, image.mode) == ((112, 112), "RGB")

    @pytest.mark.parametrize("style", range(splits.N_STYLES))
    def test_states_differ_by_a_large_cue_that_fades_with_clarity(self, style):
        for thing, states in rule.OBJECTS.items():
            first, second = (rule.State(thing, name) for name in states)
            clear, faint = (
                np.abs(self.picture(first, c, style) - self.picture(second, c, style)).mean() for c in (1.0, 0.3)
            )
            assert clear > 5, (thing, clear)
            assert 0.5 < faint < 0.8 * clear, (thing, clear, faint)

    def test_all_states_look_different(self):
        pictures = [self.picture(state) for state in rule.STATES]
        for a, b in itertools.combinations(pictures, 2):
            assert np.abs(a - b).mean() > 4

    def test_places_and_layouts_change_the_picture(self):
        base = splits.Picture(rule.STATES[0], "yard", 4, 0, 1.0, 0, None, "key")
        images = {drawing.draw(base).tobytes()}
        variants = [{"place": place} for place in rule.PLACES if place != "yard"]
        variants += [{"layout": i} for i in range(splits.N_LAYOUTS) if i != 4]
        variants += [{"style": i} for i in range(1, splits.N_STYLES)]
        variants += [{"second": "well"}, {"key": "other"}, {"clarity": 0.5}]
        for change in variants:
            images.add(drawing.draw(splits.dataclasses.replace(base, **change)).tobytes())
        assert len(images) == 1 + len(variants)


class TestDocumentation:
    """docs/world.md is what authors of other checkers work from: its tables and sentences are those of the code."""

    text = (Path(__file__).parents[2] / "docs" / "world.md").read_text(encoding="utf-8")

    def rows(self) -> set[tuple[str, ...]]:
        lines = [line for line in self.text.splitlines() if line.startswith("| ")]
        return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines}

    def test_tables(self):
        rows = self.rows()
        for thing, states in rule.OBJECTS.items():
            assert (thing, *(f"{state}: {channel}" for state, channel in states.items())) in rows
        for activity, exposures in rule.EXPOSURES.items():
            assert (activity, ", ".join(exposures), ", ".join(rule.VERBS[activity]), rule.GEAR[activity]) in rows
        assert set(rule.REFUGES.items()) <= rows
        assert set(rule.PERSONS.items()) <= rows
        for channel, harm in rule.HARMS.items():
            assert f"{channel} ({harm})" in self.text

    def test_sentences(self):
        steps = [
            entry for entry in language.SENTENCES if entry.startswith(("visual", "textual", "inten", "conse", "strat"))
        ]
        for form in itertools.chain(*(language.SENTENCES[entry] for entry in steps)):
            assert form in self.text
        for form in (*language.SENTENCES["synthesis_risky"], *language.SENTENCES["synthesis_fine"]):
            slots = re.sub(r"(risky|fine)\.$", "{end}.", re.sub("meets|reaches|avoids|misses", "{reach}", form))
            assert slots in self.text

    def test_numbers(self):
        for name in ("LAYOUTS", "STYLES"):
            numbers = [str(i) for i in getattr(splits, f"HELD_OUT_{name}")]
            assert re.search(rf"{name.lower()} {'(, | and )'.join(numbers)}", self.text)
        difficulty = Difficulty()
        for field in ("hard", "faintness", "distractors", "second_object", "cue", "long_steps", "drift"):
            assert f"`{field}={getattr(difficulty, field)}`" in self.text

    def test_every_fact_of_a_record_is_described(self):
        for key in records("train")[0].meta:
            assert f"`{key}`" in self.text
