"""Promises of configuration: every file resolves, mistakes raise where they are made and name the field."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import ml_collections
import pytest

from srpo_jax import config as configs
from srpo_jax.judges import rules
from srpo_jax.training.loop import RunConfig
from srpo_jax.training.workdir import open_workdir
from srpo_jax.trees import pack_rows

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(file: Path) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_configuration_resolves_and_survives_its_work_directory(file, tmp_path):
    """What the work directory keeps as JSON resolves to the same run."""
    config = load(file)
    run = configs.run_config(config)
    assert isinstance(run, RunConfig)
    assert run.optim.steps == run.updates * max(1, run.rounds)
    again = configs.default_config()
    with again.unlocked():
        stored = (open_workdir(tmp_path, config) / "config.json").read_text()
        again.update(ml_collections.ConfigDict(json.loads(stored)))
    assert configs.run_config(again) == run
    header = file.read_text().split('"""')[1]
    assert "python scripts/" in header and "--workdir=" in header  # its command


def test_the_defaults_resolve():
    configs.run_config(configs.default_config())


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(checkpoint_evry=5),
        lambda c: c.explore.update(temprature=0.5),
        lambda c: c.data.update(paht="x"),
        lambda c: c.policy.update(checkpoint_evry=5),
        lambda c: c.eval.update(split="x"),
        lambda c: c.update_from_flattened_dict({"optim.lr": 0.1}),
        lambda c: setattr(c.loss, "lamda", 0.1),
    ],
)
def test_an_unknown_field_raises_where_it_is_set(change):
    with pytest.raises((KeyError, AttributeError), match=r"(checkpoint_evry|temprature|paht|split|lr|lamda).*locked"):
        change(configs.default_config())


def test_an_unknown_field_of_an_unlocked_section_is_named_too():
    config = configs.default_config()
    with config.unlocked():
        config.explore.temprature = 0.5
    with pytest.raises(configs.ConfigError, match=r"config\.explore has no field temprature; it takes favourable, k,"):
        configs.run_config(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("explore.favourable", "nice", r"config\.explore: favourable='nice'"),
        ("optim.warmup", 101, r"config\.optim: .*warmup=101 of 100 steps"),
        ("pack.unknown", "guess", r"config\.pack: unknown='guess'"),
        ("explore.max_tokens", 300, r"config\.pack\.branch ends at 256.*max_tokens=300"),
        ("explore.k", 5, r"config\.pack\.branches ends at 24.*can need 30"),
        ("pack.substitutes", True, r"config\.pack\.branches ends at 24.*can need 30"),
        ("pack.row", 200, r"config\.pack\.row ends at 200.*can need 255"),
        ("pack.rows", (4, 20), r"config\.pack\.rows ends at 20.*can need 24"),
        ("pack.trunk", (256,), r"config\.pack\.trunk ends at 256, config\.explore\.trunk at 4096"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(field, value, message):
    config = configs.default_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(configs.ConfigError, match=message):
        configs.run_config(config)


def test_rows_that_are_accepted_hold_every_exploration():
    """The bound of the rows is tight and safe: the longest branches need all of them, no mixture needs more."""
    for row, longest, count in ((256, 256, 24), (256, 129, 24), (256, 128, 24), (200, 51, 24)):
        config = configs.default_config()
        config.explore.update(max_tokens=longest)
        config.pack.update(row=row, rows=(1,))
        with pytest.raises(configs.ConfigError) as error:
            configs.run_config(config)
        bound = int(str(error.value).split("can need ")[1].split(";")[0])
        assert len(pack_rows([longest - 1] * count, row)) == bound
        for short in range(1, longest):
            mixed = [longest - 1] * (count // 2) + [short] * (count - count // 2)
            assert len(pack_rows(mixed, row)) <= bound


def test_training_on_references_needs_no_room_for_branches():
    config = configs.default_config()
    config.update(rounds=0)
    config.pack.update(rows=(0,), branches=(0,), branch=(1,))
    assert configs.run_config(config).pack.rows == (0,)


def own_data(**changes):
    config = configs.default_config()
    config.data.update(name="jsonl", path="records.jsonl")
    config.update_from_flattened_dict(changes)
    return config


def test_a_judge_of_the_user_is_found_and_the_rules_stay_with_their_world(monkeypatch, tmp_path):
    (tmp_path / "my_judge.py").write_text("def judge(record, path): ...\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert configs.build_judge(own_data(judge="my_judge:judge")).__module__ == "my_judge"
    assert configs.build_judge(configs.default_config()) is rules.judge
    with pytest.raises(configs.ConfigError, match=r"embedded world only.*package\.module:function.*rounds=0"):
        configs.build_judge(own_data())


@pytest.mark.parametrize(
    "path",
    ["", "no_such_module:judge", "srpo_jax.judges.rules", "srpo_jax.judges.rules:no_such", ".rules:judge", ":judge"],
)
def test_a_judge_that_is_not_there_is_named(path):
    with pytest.raises(configs.ConfigError, match=r"config\.judge='.*' is no 'package\.module:function'.*PYTHONPATH"):
        configs.build_judge(own_data(judge=path))


def test_a_judge_must_be_a_function():
    with pytest.raises(configs.ConfigError, match=r"config\.judge='os:sep' is a str, not a function"):
        configs.build_judge(own_data(judge="os:sep"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.path": ""}, r"config\.data\.name='jsonl', path=''"),
        ({"data.path": "/no/such/file.jsonl"}, r"config\.data\.path='/no/such/file\.jsonl': no such file"),
        ({"data.name": "csv"}, r"config\.data\.name='csv'.*'scenes', or 'jsonl' or 'datasets'"),
    ],
)
def test_data_that_is_not_there_is_named(changes, message):
    with pytest.raises(configs.ConfigError, match=message):
        configs.build_records(own_data(**changes))


def test_the_first_n_records():
    config = configs.default_config()
    config.data.n = 4
    assert [r.risky for r in configs.build_records(config)] == [True, False, True, False]
