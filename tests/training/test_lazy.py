"""Promises of reading records when they are wanted: the same updates as from memory, in whatever processes they are read;
broken records are passed over, counted, named, and end the run above the threshold."""

import dataclasses

import jax
import numpy as np
import pytest

from srpo_jax import sharding
from srpo_jax.data import scenes
from srpo_jax.data.formats import convert
from srpo_jax.data.loaders import open_records
from srpo_jax.data.sft import SftRecord
from srpo_jax.exploration.explorer import ExploreConfig
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.paths import STYLES
from srpo_jax.training.data import BatchConfig, BrokenRecordsError, RecordTrees, round_records, step_batches
from srpo_jax.training.loop import RunConfig, train
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.state import OptimConfig
from srpo_jax.training.step import ComputeConfig
from srpo_jax.trees import PackConfig, ReasoningTree

PACK = PackConfig(trunk=(144,), path=(112,), rows=(8,), row=20, branches=(0,), branch=(1,), patches=(16,))


def stored(folder, records, form="arrayrecord", schema="ssui"):
    to = "parquet" if form == "datasets" else form
    convert(len(records), lambda i: [records[i]], to, folder, schema=schema, origin={"source": "world"}, shard=4)
    return folder / "data.jsonl" if form == "jsonl" else folder


@pytest.fixture(scope="module")
def records():
    return scenes.records("train", 10)


@pytest.fixture(scope="module")
def file(records, tmp_path_factory):
    return stored(tmp_path_factory.mktemp("world") / "out", records, "jsonl")


def damaged(file, *lines: int, max_broken: int = 0):
    """The records of a copy of `file` in which these lines, from 0, are cut in the middle."""
    copy = file.with_name(f"damaged-{'-'.join(map(str, lines))}.jsonl")
    kept = file.read_text(encoding="utf-8").splitlines()
    copy.write_text("\n".join(x[:50] if i in lines else x for i, x in enumerate(kept)), encoding="utf-8")
    return open_records(copy, "jsonl", max_broken=max_broken)


def batches(source, start=0, stop=5, **config):
    return list(step_batches(source, PACK, BatchConfig(**({"trees": 4} | config)), start, stop))


def check_same(found, expected):
    assert [(b.step, b.record_ids) for b in found] == [(b.step, b.record_ids) for b in expected]
    for one, other in zip(found, expected, strict=True):
        for x, y in zip(jax.tree.leaves(one.batches), jax.tree.leaves(other.batches), strict=True):
            np.testing.assert_array_equal(x, y)
        assert one.counters == {"broken": 0, **other.counters}


@pytest.mark.parametrize("form", ["jsonl", "datasets", "arrayrecord"])
def test_updates_are_those_of_records_in_memory(form, records, tiny_policy, tmp_path):
    path = stored(tmp_path / "out", records, form)
    lazy = RecordTrees(open_records(path, form), tiny_policy.processor, PACK)
    eager = [ReasoningTree(make_trunk(record, tiny_policy.processor), ()) for record in records]
    check_same(batches(lazy), batches(eager))


def test_updates_are_the_same_whatever_processes_read_them_and_wherever_they_begin(file, tiny_policy):
    lazy = RecordTrees(damaged(file, 3, max_broken=1), tiny_policy.processor, PACK)
    whole, found = batches(lazy, 0, 6), batches(lazy, 2, 6, workers=2)
    check_same(found, whole[2:])
    assert sum(batch.counters["broken"] for batch in found) > 0


def test_the_next_whole_record_takes_the_place_of_a_broken_one(file, records, tiny_policy):
    whole = RecordTrees(open_records(file, "jsonl"), tiny_policy.processor, PACK)
    broken = RecordTrees(damaged(file, 3, 4, 9, max_broken=3), tiny_policy.processor, PACK)
    names = [record.id for record in records]
    instead = {names[3]: names[5], names[4]: names[5], names[9]: names[0]}
    met = {names[3]: {3, 4}, names[4]: {4}, names[9]: {9}}
    for one, other in zip(batches(broken), batches(whole), strict=True):
        assert sorted(one.record_ids) == sorted(instead.get(name, name) for name in other.record_ids)
        assert one.counters["broken"] == len(set().union(*(met.get(name, set()) for name in other.record_ids)))


def test_more_broken_records_than_allowed_end_the_run_and_are_named(file, tiny_policy):
    source = RecordTrees(damaged(file, 3, 8, max_broken=1), tiny_policy.processor, PACK)
    with pytest.raises(BrokenRecordsError, match=r"2 broken records, data.max_broken allows 1") as error:
        batches(source)
    assert "line 4: not valid JSON" in str(error.value) and "line 9: not valid JSON" in str(error.value)


def test_data_without_a_whole_record_end_the_run_whatever_is_allowed(file, tiny_policy):
    source = RecordTrees(damaged(file, *range(10), max_broken=99), tiny_policy.processor, PACK)
    with pytest.raises(BrokenRecordsError, match="10 broken records"):
        batches(source)


def test_broken_pictures_and_records_that_do_not_fit_count_as_broken(file, records, tiny_policy, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    for pack, why in ((PACK, "cut.png"), (dataclasses.replace(PACK, path=(8,)), "tokens of path and reply")):
        source = open_records(file, "jsonl")
        if why == "cut.png":
            source._build = lambda row: dataclasses.replace(records[0], images=(tmp_path / "cut.png",))
        with pytest.raises(BrokenRecordsError, match=why):
            batches(RecordTrees(source, tiny_policy.processor, pack))


def test_a_round_explores_the_next_records_of_a_shuffled_order(file, records):
    names = [record.id for record in records]
    lazy = open_records(file, "jsonl")
    rounds = [[r.id for r in round_records(lazy, 4, 7, round_)] for round_ in range(5)]
    assert rounds == [[r.id for r in round_records(records, 4, 7, round_)] for round_ in range(5)]
    assert sorted(rounds[0] + rounds[1] + rounds[2][:2]) == sorted(names)  # every record once per epoch
    assert rounds[0] + rounds[1] != names[:8]
    assert rounds != [[r.id for r in round_records(records, 4, 8, round_)] for round_ in range(5)]
    assert round_records(records, None, 7, 0) is records
    assert [r.id for r in round_records(lazy, None, 7, 3)] == [r.id for r in round_records(lazy, 99, 7, 3)] == names


def test_a_round_leaves_broken_records_out_up_to_the_threshold(file, records):
    assert len(round_records(damaged(file, 1, 2, max_broken=2), None, 0, 0)) == 8
    with pytest.raises(BrokenRecordsError, match="line 3: not valid JSON"):
        round_records(damaged(file, 1, 2, max_broken=1), None, 0, 0)


RUN = RunConfig(
    explore=ExploreConfig(),
    loss=LossConfig({"sft": 1.0}),
    optim=OptimConfig(1e-2, steps=2, schedule="constant"),
    pack=PACK,
    batch=BatchConfig(trees=2),
    compute=ComputeConfig(remat="none"),
    updates=2,
    rounds=0,
    trainable=("^head$",),
)


def supervised(records):
    """Free reasoning and answers alone, by turns."""
    return [
        SftRecord(r.id, r.images, r.question, r.safe_reply, r.steps[2] if i % 2 else None)
        for i, r in enumerate(records)
    ]


def test_supervised_records_train_from_a_file_as_from_memory(records, tiny_policy, tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    examples = supervised(records)
    lazy = open_records(stored(tmp_path / "sft", examples, schema="sft"), "arrayrecord", schema="sft")
    results = [train(tiny_policy, data, None, RUN, tmp_path / str(i), mesh) for i, data in enumerate((examples, lazy))]
    moved, again = (jax.tree.leaves(params) for params in results)
    for one, other in zip(moved, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(moved, jax.tree.leaves(tiny_policy.params), strict=True)
    )


def test_trunks_of_supervised_records_and_of_styles_are_their_text(records, tiny_policy):
    processor = tiny_policy.processor
    for record in supervised(records):
        trunk = make_trunk(record, processor)
        assert processor.decode(trunk.path) == "".join(record.segments)
        assert len(trunk.prefixes) == (0 if record.reasoning is None else 1)
    for grammar in STYLES.values():
        trunk, record = make_trunk(records[0], processor, grammar), records[0]
        assert processor.decode(trunk.path) == "".join(grammar.render(grammar.bodies(record.steps), record.safe_reply))
        assert len(trunk.prefixes) == len(grammar.titles)
