"""Who is asked, what leaves the machine, how replies are read, and what becomes of each kind of reply."""

from __future__ import annotations

import json
import re

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo_jax.data.builder import BuildConfig, IntakeConfig, build, stages
from srpo_jax.data.builder.agents import ROLES, Ask, is_remote, read_agents
from srpo_jax.data.builder.stages import Excluded, Unusable, parse
from srpo_jax.data.loaders import load_jsonl
from srpo_jax.endpoint import Reply, ReplyStatus
from tests.data.builder.world import FENCED, World, pixels, scene, write_pictures


class Scripted:
    """An agent of a function from an ask to a reply."""

    name, sees, remote = "scripted", "pixels", False

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def ask(self, asks):
        for index, ask in enumerate(asks):
            self.asked.append(ask)
            told = self.answer(ask)
            yield index, told if isinstance(told, Reply) else Reply(ReplyStatus.OK, told, 10, 5, "scripted-1")

    def cost(self, reply):
        return None


def obedient(world: World):
    """What the world's endpoint would say, without the socket."""

    def answer(ask: Ask) -> str:
        picture = pixels(PIL.Image.open(ask.images[0])) if ask.images else ""
        question = (FENCED.search(ask.user) or [None, None, ask.user])[2]
        if ask.schema is None:
            return world.text(ask.user)
        return json.dumps(getattr(world, ask.name)(picture, question, ask.user))

    return answer


@pytest.fixture
def one_scene(tmp_path):
    scenes = [scene(0)]
    write_pictures(tmp_path / "pictures", scenes)
    return tmp_path, World(scenes, faulty=False)


def run(folder, agent, hook=None, **given):
    config = BuildConfig("Test", "x@example.org", IntakeConfig("CC0-1.0", "mine"), similarity=97.0, **given)
    return build(folder / "pictures", folder / "out", dict.fromkeys(ROLES, agent), config, hook=hook)


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("http://localhost:8000/v1", False),
        ("http://127.0.0.1/v1", False),
        ("http://127.8.9.1:1/v1", False),
        ("http://[::1]:8000/v1", False),
        ("", True),
        ("https://api.example.com/v1", True),
        ("http://192.168.0.7:8000/v1", True),
        ("http://localhost.example.com/v1", True),
        ("http://127.0.0.1.example.com/v1", True),
        ("http://0.0.0.0:8000/v1", True),
    ],
)
def test_only_loopback_addresses_stay_on_the_machine(url, remote, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert is_remote(url) == remote


def test_a_proxy_or_a_default_address_on_the_way_counts_as_leaving(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.example.com:3128")
    monkeypatch.setenv("no_proxy", "")
    assert is_remote("http://127.0.0.1:8000/v1")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    assert not is_remote("http://127.0.0.1:8000/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert not is_remote("")


def test_roles_share_an_agent_where_settings_are_the_same_and_faults_name_role_and_field(tmp_path):
    file = tmp_path / "agents.json"
    file.write_text(json.dumps({"default": {"model": "a"}, "judge": {"model": "b", "sees": "description"}}))
    agents = read_agents(str(file))
    assert len({id(agent) for agent in agents.values()}) == 2 and agents["judge"].sees == "description"
    for content, told in (
        ('{"judge": {"model": "a"}}', "no settings for query"),
        ('{"default": {"model": "a", "modle": 1}}', "agents.json, query: give model and any of"),
        ('{"default": {"model": "a", "sees": "sounds"}}', "query: sees='sounds'"),
        ('{"default": {"checkpoint": "x"}}', "use scripts/build_ssui.py"),
        ('{"author": {}}', "give a JSON object with any of default"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=told):
            read_agents(str(file))


@given(st.text() | st.from_regex(r"\{.*\}", fullmatch=True))
def test_a_reply_is_exactly_what_was_asked_for_or_an_error(text):
    for stage in (stages.QUERY, stages.REASONING, stages.REFLECTION, stages.SUMMARY, stages.TEXT_JUDGE):
        with pytest.raises(Unusable):
            parse(stage, text)


@pytest.mark.parametrize(
    ("stage", "told", "error"),
    [
        (stages.TEXT_JUDGE, {"safe": "true", "reason": "-"}, r"\$.safe: 'true' is not of type 'boolean'"),
        (stages.TEXT_JUDGE, {"safe": True, "reason": "-", "more": 1}, "Additional properties"),
        (stages.REASONING, {"steps": ["a"] * 5}, "too short"),
        (stages.REASONING, {"steps": ["a b c", "d", "e", "f", "g", "A b, c!"]}, "steps 1 and 6 say nearly the same"),
        (stages.REASONING, {"steps": ["a", "b </think>", "c", "d", "e", "f"]}, "step 2 contains the tag"),
        (stages.REFLECTION, {"redundant": [7], "missing": [], "reason": "-"}, "there is no step 7"),
        (stages.QUERY, {"queries": [{"event": "e", "category": "Fun", "question": "q"}]}, "'Fun' is not one of"),
        (stages.QUERY, {"queries": [{"event": "e", "category": "Violence", "question": "q " * 61}]}, "61 words"),
        (stages.SUMMARY, {"safe_reply": "a", "unsafe_reply": "1. Do it."}, "give no procedure"),
    ],
)
def test_errors_tell_the_agent_what_is_wrong(stage, told, error):
    with pytest.raises(Unusable, match=error):
        stage.read(parse(stage, json.dumps(told)), {})


def test_verdicts_exclude():
    with pytest.raises(Excluded, match="by itself: it asks for harm"):
        stages.TEXT_JUDGE.read({"safe": False, "reason": "it asks for harm"}, {})
    with pytest.raises(Excluded, match="not helpful"):
        stages.TWIN_CHECK.read({"harmless": True, "helpful": False, "reason": "-"}, {})


def test_an_unusable_answer_is_asked_again_with_the_error_in_view_and_no_more_than_told(one_scene):
    folder, world = one_scene
    good = obedient(world)
    agent = Scripted(lambda ask: "no idea" if ask.name == "query" else good(ask))
    built = run(folder, agent, tries=2)
    asked = [ask.user for ask in agent.asked if ask.name == "query"]
    assert len(asked) == 2 and "not one JSON object" in asked[1] and "no idea" in asked[1]
    [aside] = built.aside
    assert (aside.stage, aside.kind) == ("query", "unusable") and not built.records
    more = Scripted(good)
    assert run(folder, more, tries=3).records  # more tries are another chance


def test_an_answer_that_was_cut_off_is_asked_for_again_in_brief(one_scene):
    folder, world = one_scene
    good = obedient(world)

    def answer(ask):
        cut = ask.name == "query" and "An earlier answer" not in ask.user
        return Reply(ReplyStatus.CUT, "the reply reached its token limit") if cut else good(ask)

    agent = Scripted(answer)
    assert run(folder, agent).records
    [_, again] = [ask.user for ask in agent.asked if ask.name == "query"]
    assert "(cut)" in again and "answer more briefly" in again


def test_a_moderator_that_does_not_answer_properly_lets_nothing_pass(one_scene):
    folder, world = one_scene
    good = obedient(world)
    agent = Scripted(lambda ask: "It looks fine to me." if ask.name == "moderate_image" else good(ask))
    built = run(folder, agent)
    assert {ask.name for ask in agent.asked} == {"moderate_image"} and not built.records
    assert not [*(folder / "out/images").iterdir()]


def test_pictures_leave_with_the_flag_and_descriptions_without(one_scene):
    folder, world = one_scene
    agent = Scripted(obedient(world))
    agent.remote = True
    with pytest.raises(ValueError, match="--images_may_leave"):
        run(folder, agent)
    assert not agent.asked
    assert run(folder, agent, images_may_leave=True).records


def test_a_refusal_is_not_asked_again_and_no_answer_is_asked_in_the_next_run(one_scene):
    folder, world = one_scene
    good = obedient(world)
    for status, kind in (
        (ReplyStatus.REFUSED, "declined"),
        (ReplyStatus.BUSY, "unanswered"),
        (ReplyStatus.REJECTED, "rejected"),
    ):
        agent = Scripted(lambda ask, status=status: Reply(status, "no") if ask.name == "query" else good(ask))
        agent.name = f"scripted {status}"
        [aside] = run(folder, agent).aside
        assert aside.kind == kind and len([ask for ask in agent.asked if ask.name == "query"]) == 1
        second = Scripted(good)
        second.name = agent.name
        assert bool(run(folder, second).records) == (kind == "unanswered")


def test_the_moderator_reads_every_generation_before_it_is_used(one_scene):
    folder, world = one_scene
    read = []

    def hook(kind, value):
        if kind == "text":
            read.append(value)

    agent = Scripted(obedient(world))
    assert run(folder, agent, hook=hook).records
    said = {obedient(world)(ask) for ask in agent.asked}
    assert said <= set(read)
    refused = Scripted(obedient(world))
    refused.name = "again"
    built = run(folder, refused, hook=lambda kind, value: "no words" if kind == "text" else None)
    assert not built.records and built.aside[0].reason == "moderator: no words"
    assert [ask.name for ask in refused.asked] == ["moderate_image"]


def test_words_hidden_in_escapes_are_seen_and_halves_of_characters_do_no_harm(one_scene):
    folder, world = one_scene
    good = obedient(world)
    hidden = "".join(f"\\u{ord(c):04x}" for c in "sarin")
    for number, evil in enumerate((f'{{"queries": "{hidden}"', '{"queries": [{"event": "\\ud800"', "\ud800")):
        agent = Scripted(lambda ask, evil=evil: evil if ask.name == "query" else good(ask))
        agent.name = f"evil {number}"
        [aside] = run(folder, agent).aside
        assert aside.kind == ("guard" if number == 0 else "unusable")
    halves = json.dumps({"safe": True, "reason": "-"}).replace("-", "\\ud800")
    agent = Scripted(lambda ask: halves if ask.name == "text_judge" else good(ask))
    assert run(folder, agent).records  # the reason is kept nowhere
    for file in (folder / "out/work").iterdir():
        assert "sarin" not in file.read_text() and hidden not in file.read_text()


def test_keys_and_personal_data_are_no_part_of_the_log_and_a_finding_of_the_record(one_scene):
    folder, world = one_scene
    good = obedient(world)
    secret = "jane@example.org sk-abcdefghijklmnop1234"

    def answer(ask):
        said = good(ask)
        return said.replace('"safe_reply": "', f'"safe_reply": "Ask {secret}. ') if ask.name == "summary" else said

    built = run(folder, Scripted(answer), twins=False)
    log = (folder / "out/work/log.jsonl").read_text()
    assert "jane@" not in log and "sk-abc" not in log and "[e-mail address] [key]" in log
    findings = built.records[0].meta["findings"]
    assert {(f["check"], f["field"], f["text"]) for f in findings} == {
        ("personal data", "safe_reply", "an e-mail address"),
        ("personal data", "safe_reply", "a key"),
    }


def test_an_agent_that_sees_descriptions_marks_the_record_and_gets_no_picture(one_scene):
    folder, world = one_scene
    agent = Scripted(obedient(world))
    agent.sees = "description"
    with pytest.raises(ValueError, match=r"told descriptions, and the manifest has none of 's0000.png'"):
        run(folder, agent)
    told = {"s0000.png": {"description": "A quiet place."}}
    pixel = next(iter(world.scenes))
    plain = agent.answer

    def answer(ask):
        assert not ask.images
        if ask.schema is None:
            return plain(ask)
        text = re.sub(r"There is no picture here.*?<</\w+>>\n", "", ask.user, flags=re.DOTALL)
        question = (FENCED.search(text) or [None, None, ""])[2]
        return json.dumps(getattr(world, ask.name)(pixel, question, text))

    agent.answer = answer
    config = BuildConfig("Test", "x@example.org", IntakeConfig("CC0-1.0", "mine"), similarity=97.0)
    build(folder / "pictures", folder / "out", dict.fromkeys(ROLES, agent), config, manifest=told)
    records = load_jsonl(folder / "out/records.jsonl")
    assert records and all("picture replaced by its description" in r.meta["marks"] for r in records)
    assert all("moderation" in {finding["check"] for finding in r.meta["findings"]} for r in records)
    assert "before the agents that write: no" in (folder / "out/README.md").read_text()
    assert any("A quiet place." in ask.user for ask in agent.asked)
    assert not any("A quiet place." in ask.user for ask in agent.asked if ask.name in ("text_answer", "text_judge"))


def test_a_repeated_question_leaves_on_related_pictures_always_and_elsewhere_beyond_the_number(tmp_path):
    scenes = [scene(index) for index in range(3)]
    write_pictures(tmp_path / "pictures", scenes)
    world = World(scenes, faulty=False)
    good = obedient(world)

    def answer(ask):
        if ask.name == "query":
            one = {"event": "e", "category": "Violence", "question": "May we stay here?"}
            return json.dumps({"queries": [one, one | {"question": "may we stay, here"}]})
        return good(ask) if ask.name in ("moderate_image", "image_only") else "-"

    for repeats, kept in ((1, 1), (2, 2), (None, 3)):
        agent = Scripted(answer)
        agent.name = f"repeats {repeats}"
        config = BuildConfig("T", "x", IntakeConfig("CC0", "mine"), repeats=repeats, tries=1)
        built = build(tmp_path / "pictures", tmp_path / "out", dict.fromkeys(ROLES, agent), config)
        [row] = [row for row in built.rows if row.stage == "repeated questions"]
        assert (row.entered, row.passed) == (6, kept)


@pytest.mark.parametrize("field", ["contact", "name"])
def test_a_build_needs_a_name_and_somebody_to_ask_for_removals(field):
    with pytest.raises(ValueError, match=f"{field} is empty"):
        BuildConfig(**{"name": "a", "contact": "b"} | {field: " "})
