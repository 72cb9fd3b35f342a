"""Promises of configuration: every file resolves, mistakes raise where they are made and name the field."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import datasets
import jax
import ml_collections
import pytest
from PIL import Image

from srpo_jax import config as configs
from srpo_jax import sharding
from srpo_jax.data import scenes
from srpo_jax.data.formats import convert
from srpo_jax.data.loaders import Records
from srpo_jax.evaluation.config import build_benchmark, build_evaluator
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.judges import rules
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.hf import param_shapes
from srpo_jax.models.policy import read_config
from srpo_jax.models.processor import Processor
from srpo_jax.training.loop import RunConfig
from srpo_jax.training.workdir import open_workdir
from srpo_jax.trees import ReasoningTree, pack_rows, pack_trees

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(file: Path, *arguments: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


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
        lambda c: setattr(c.loss.srpo, "lamda", 0.1),
    ],
)
def test_an_unknown_field_raises_where_it_is_set(change):
    with pytest.raises((KeyError, AttributeError), match=r"(checkpoint_evry|temprature|paht|split|lr|lamda).*locked"):
        change(configs.default_config())


def test_an_unknown_field_of_an_unlocked_section_is_named_too():
    config = configs.default_config()
    with config.unlocked():
        config.explore.temprature = 0.5
    with pytest.raises(
        configs.ConfigError,
        match=r"config\.explore has no field temprature; it takes adaptive, favourable, gather, int8_cache,",
    ):
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
        ("pack.rows", (4, 20), r"config\.pack\.rows ends at 20.*can need 40"),
        ("pack.trunk", (256,), r"config\.pack\.trunk ends at 256, config\.explore\.trunk at 4096"),
        ("pack.key_step", 1, r"config\.pack: key_step=1: .*one has to come before it"),
        ("pack.patches", (128, 64), r"config\.pack: patches=\(128, 64\).*ascending"),
        ("loss.srpo.lambda_", -0.1, r"config\.loss: srpo: lambda_=-0\.1: it must be at least 0"),
        ("loss.srpo.reference", "pth", r"config\.loss: srpo: reference='pth': use 'path' or 'favourable'"),
        ("loss.srpo.balance", "none", r"config\.loss: srpo: balance='none': use 'prefix' or 'pair'"),
        ("loss.weights.srpo", 0.0, r"config\.loss: weights: every objective has weight 0"),
        ("loss.weights.dpo", -1.0, r"config\.loss: weights\.dpo=-1\.0"),
        ("loss.schedules.srpo", ((9, 1.0), (3, 1.0)), r"config\.loss: schedules\.srpo=.*ascending"),
        ("compute.dtype", "bf16", r"config\.compute: dtype='bf16'"),
        ("compute.remat", "all", r"config\.compute: remat='all': use 'none', 'selective' or 'full'"),
        ("lora.rank", -1, r"config\.lora: rank=-1"),
        ("batch.trees", 0, r"config\.batch: trees=0"),
        ("updates", 0, r"config\.updates=0: it must be at least 1"),
        ("rounds", -1, r"config\.rounds=-1: it must be at least 0"),
        ("checkpoint_every", 0, r"config\.checkpoint_every=0: it must be at least 1"),
        ("keep", 0, r"config\.keep=0: it must be at least 1"),
        ("max_unknown", 1.5, r"config\.max_unknown=1\.5: it is a share"),
        ("max_truncated", -0.5, r"config\.max_truncated=-0\.5: it is a share"),
        ("explore.k", 0, r"config\.explore: k=0: it must be at least 1"),
        ("explore.adaptive", 5, r"config\.explore: adaptive=5.*at most k=4"),
        ("explore.temperature", -1.0, r"config\.explore: temperature=-1\.0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(field, value, message):
    config = configs.default_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(configs.ConfigError, match=message):
        configs.run_config(config)


def test_objectives_that_learn_from_branches_alone_are_refused_without_exploration():
    config = configs.default_config()
    config.rounds = 0
    configs.run_config(config)  # srpo without branches learns the reference path
    config.loss.weights.simpo = 0.5
    with pytest.raises(
        configs.ConfigError, match=r"rounds=0 explores nothing.*gives simpo a weight.*rounds to at least 1"
    ):
        configs.run_config(config)


def test_objectives_say_what_their_batches_carry():
    config = configs.default_config()
    assert configs.run_config(config).pack.extras == ()
    config.loss.weights.update(srpo=0.5, step_dpo=1.0)
    assert configs.run_config(config).pack.extras == ("reference", "step_lengths")
    config.loss.weights.update(step_dpo=0.0, key_sentence=0.2)
    assert configs.run_config(config).pack.extras == ("key_lengths", "key_slots")
    config.loss.weights.update(step_dpo=1.0, key_sentence=0.0)
    config.pack.update(substitutes=True, branches=(30,), rows=(30,))
    with pytest.raises(configs.ConfigError, match=r"substitutes have no reference log-probs"):
        configs.run_config(config)


def test_a_path_that_is_read_again_without_its_prompt_has_rows_of_its_own():
    """Room for the longest path beside the largest tree, whatever the style of paths; a style without the step is refused."""
    config = configs.default_config()
    plain = configs.run_config(config).pack
    config.loss.weights.key_sentence = 0.2
    pack = configs.run_config(config).pack
    assert pack.rows[-1] * pack.row == plain.rows[-1] * plain.row + pack.path[-1] and pack.rows[0] == plain.rows[0] + 1
    config.update(rounds=0, style="template")
    config.pack.key_step = 3
    pack = configs.run_config(config).pack
    assert pack.rows[-1] * pack.row >= pack.trunk[-1] + pack.path[-1]
    config.style = "short"
    with pytest.raises(configs.ConfigError, match=r"config\.pack\.key_step=3: .*'short'.* end at step 1.*name another"):
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
        taken = [row] * -(-config.pack.trunk[-1] // row)
        assert len(pack_rows([longest - 1] * count, row, taken)) == bound
        for short in range(1, longest):
            mixed = [longest - 1] * (count // 2) + [short] * (count - count // 2)
            assert len(pack_rows(mixed, row, taken)) <= bound


@pytest.fixture(scope="module")
def processor():
    folder = configs.policy_path(configs.EMBEDDED)
    return Processor.load(folder, read_config(folder))


def test_training_on_references_has_no_room_for_branches(processor):
    config = configs.default_config()
    config.update(rounds=0)
    pack = configs.run_config(config).pack
    assert (pack.branches, pack.branch) == ((0,), (1,))
    bare = [ReasoningTree(make_trunk(record, processor), ()) for record in scenes.records("train", 2)]
    batch, counters = pack_trees(bare, pack)
    assert batch.pairs.shape == (2, 0, 0) and batch.targets.shape[1] == batch.rows.tokens[0].size
    lengths = [len(tree.trunk.encoded.tokens) for tree in bare]
    assert counters["tokens"] == sum(lengths) and max(lengths) <= pack.trunk[0]
    assert counters["executed_tokens"] == 2 * pack.trunk[0]


def test_no_shape_of_a_batch_is_unbounded():
    for file in FILES:
        config = load(file)
        run = configs.run_config(config)
        assert run.pack.patches and run.explore.patches and config.eval.patches


@pytest.mark.parametrize(
    ("sizes", "fits"), [((1, 4, 1), False), ((2, 2, 1), False), ((1, 2, 2), True), ((1, 1, 4), True)]
)
def test_questions_that_cannot_be_split_over_the_mesh_are_refused_with_the_remedy(sizes, fits):
    config = configs.default_config()
    config.batch.update(trees=2, accumulate=8)
    mesh = jax.sharding.AbstractMesh(sizes, ("data", "fsdp", "tensor"))
    if fits:
        configs.check_batch(configs.run_config(config), mesh)
        return
    with pytest.raises(
        configs.ConfigError, match=r"batch\.trees=2 .*4 devices; set batch\.trees=4, batch\.accumulate=4"
    ):
        configs.check_batch(configs.run_config(config), mesh)


def test_difficulty_of_the_world_is_that_of_the_configuration():
    config = configs.default_config()
    assert configs.build_difficulty(config) == scenes.Difficulty()
    config.data.n = 20
    usual = [r.question for r in configs.build_records(config)]
    config.update_from_flattened_dict({"data.difficulty.cue": 0.0, "data.difficulty.faintness": [0.3, 0.4]})
    easy = [r.question for r in configs.build_records(config)]
    assert easy != usual and easy == [r.question for r in scenes.records("train", 20, 0, scenes.Difficulty(cue=0.0))]
    section = configs.eval_section(config)
    section.n = 20
    tests = build_benchmark(section, configs.build_difficulty(config))
    assert [r.question for r in tests[:20]] == [
        r.question for r in scenes.records("test_id", 20, 0, scenes.Difficulty(cue=0.0))
    ]
    config.data.difficulty.cue = 2.0
    with pytest.raises(configs.ConfigError, match=r"config\.data\.difficulty: Difficulty\.cue is a share"):
        configs.build_records(config)


def test_evaluation_follows_the_training_data_unless_told_otherwise():
    """The embedded world is never measured in place of the user's own data."""
    assert configs.eval_section(configs.default_config()).name == "scenes"
    section = configs.eval_section(own_data())
    assert section.name == "jsonl"
    with pytest.raises(ValueError, match=r"eval\.name='jsonl', path='': .*eval\.path and eval\.evaluator.*'scenes'"):
        build_benchmark(section)
    with pytest.raises(ValueError, match=r"config\.eval\.evaluator is empty.*'package\.module:NAME'"):
        build_evaluator(section)
    assert configs.eval_section(own_data(**{"eval.name": "scenes"})).name == "scenes"


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
        (
            {"data.name": "csv"},
            r"config\.data\.name='csv'.*'scenes', or one of jsonl, datasets, arrayrecord with a path",
        ),
    ],
)
def test_data_that_is_not_there_is_named(changes, message):
    with pytest.raises(configs.ConfigError, match=message):
        configs.build_records(own_data(**changes))


def test_the_first_n_records():
    config = configs.default_config()
    config.data.n = 4
    assert [r.risky for r in configs.build_records(config)] == [True, False, True, False]


def test_pictures_of_a_data_set_lie_in_the_folder_that_was_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"images": ["a.png"], "question": "Hm?", "risky": False, "steps": ["x"] * 6, "safe_reply": "Yes."}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    config = own_data(**{"data.name": "datasets", "data.path": str(tmp_path / "saved"), "data.images": str(tmp_path)})
    [record] = configs.build_records(config)
    assert record.images == (tmp_path / "a.png",)


@pytest.mark.parametrize("tied", [True, False])
def test_own_data_names_parameters_that_tied_and_untied_checkpoints_have(tied):
    text = TextConfig(32, 16, 24, 2, 4, 2, 4, 1e4, (1, 1, 0), 1e-6, tied, 64)
    vision = VisionConfig(2, 8, 12, 2, 3, 4, 2, 2, 8, (1,), 16)
    paths = sharding.flatten(param_shapes(ModelConfig(text, vision, 1, 2, 3, 4)))
    patterns = load(next(file for file in FILES if file.stem == "own_data")).trainable
    assert all(any(re.search(pattern, path) for path in paths) for pattern in patterns)
    assert not any(re.search(pattern, path) for path in paths if path.startswith("vision/") for pattern in patterns)


def test_own_data_by_adapters_trains_them_alone():
    file = next(file for file in FILES if file.stem == "own_data")
    config = load(file, "lora")
    assert (config.lora.rank, configs.run_config(config).trainable) == (16, None)
    assert configs.run_config(load(file, "full")) == configs.run_config(load(file))
    assert configs.run_config(load(file)).trainable is not None
    with pytest.raises(ValueError, match=r"own_data\.py:qlora: use own_data\.py"):
        load(file, "qlora")


def test_a_policy_is_built_quantised_and_with_adapters():
    config = configs.default_config()
    config.policy.quantize = "int8"
    config.lora.update(rank=2, targets=("mlp/up",))
    flat = sharding.flatten(configs.build_policy(config, configs.build_mesh(config)).params)
    assert flat["layers/mlp/up/kernel"].dtype == "int8" and flat["layers/mlp/up/lora_a"].shape[-1] == 2
    assert "layers/mlp/down/lora_a" not in flat


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "brief", "rounds": 0}, r"config\.style='brief': use one of long, short, template, none"),
        ({"style": "short"}, r"config\.style='short'.*set rounds=0"),
        ({"data.schema": "sft"}, r"config\.data\.schema='sft'.*set rounds=0"),
        ({"data.schema": "sft", "style": "none", "rounds": 0}, r"which records of schema 'sft' do not have"),
        (
            {"data.name": "scenes", "data.lazy": True},
            r"lazy, max_broken and schema are for data that is read from files",
        ),
        ({"batch.workers": 2}, r"config\.batch\.workers=2 .*data\.lazy=True and rounds=0"),
        ({"batch.workers": -1}, r"workers=-1: it must be at least 0"),
        ({"data.max_broken": -1}, r"config\.data\.max_broken=-1: it must be at least 0"),
        ({"records_per_round": 0}, r"records_per_round"),
        ({"records_per_round": 2, "explore.max_age": 1}, r"explore\.max_age=1: with config\.records_per_round=2"),
    ],
)
def test_data_that_a_run_cannot_use_as_asked_is_refused(changes, message):
    config = own_data(**changes)
    if config.rounds == 0:
        config.loss.weights.update(srpo=0.0, sft=1.0)
    with pytest.raises(configs.ConfigError, match=message):
        configs.run_config(config)


def test_records_of_files_come_whole_or_by_index(tmp_path):
    records = scenes.records("train", 6)
    convert(6, lambda i: [records[i]], "jsonl", tmp_path / "out", schema="ssui", origin={"source": "world"})
    whole, lazy = (
        configs.build_records(own_data(**{"data.path": f"{tmp_path}/out/data.jsonl", "data.lazy": flag, "data.n": 4}))
        for flag in (False, True)
    )
    assert isinstance(whole, list) and isinstance(lazy, Records)
    assert [r.id for r in whole] == [r.id for r in lazy] == [r.id for r in records[:4]]
