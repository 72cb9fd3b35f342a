"""A checkpoint answers the builder's prompts, pictures included, the same alone and in company."""

from __future__ import annotations

from pathlib import Path

import pytest

import srpo_jax
from srpo_jax.data import scenes
from srpo_jax.data.builder import read_agents
from srpo_jax.data.builder.agents import Ask
from srpo_jax.endpoint import ReplyStatus
from srpo_jax.exploration.agent import LocalAgent, LocalSettings
from srpo_jax.paths import Status, parse

BASE = str(Path(srpo_jax.__file__).parent / "assets" / "base_policy")


def test_a_local_agent_answers_alone_as_in_company_and_says_what_does_not_fit(tmp_path):
    records = scenes.records("train", 6)
    asks = []
    for number, record in enumerate(records):
        file = tmp_path / f"{number}.png"
        record.images[0].save(file)
        asks.append(Ask("text_answer", "", record.question, (file,)))
    agent = LocalAgent(LocalSettings(BASE, max_tokens=200, batch=2, trunk=(96,)))
    assert not agent.remote and agent.name.startswith("local:base_policy:")
    long = Ask("text_answer", "", "May my team run here? " * 40)
    replies = dict(agent.ask([*asks[:3], long]))
    assert replies[3].status is ReplyStatus.REJECTED and "trunk" in replies[3].text
    for index in range(3):
        assert parse(replies[index].text, stopped=True).status is Status.OK
        assert replies[index].output_tokens > 20 and replies[index].model == agent.name
    [(_, alone)] = agent.ask([asks[2]])
    assert alone == replies[2]


def test_settings_name_the_field_that_is_wrong(tmp_path):
    file = tmp_path / "agents.json"
    file.write_text('{"default": {"checkpoint": "x", "max_token": 3}}')
    with pytest.raises(ValueError, match=r"agents.json, query: max_token: a checkpoint takes batch"):
        read_agents(str(file), lambda values: LocalAgent(LocalSettings.of(values)))
