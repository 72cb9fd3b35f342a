"""Promises of a run: what it refuses to learn from, what moves, what it writes, whose parameters explore."""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import srpo_jax as sx
from srpo_jax import sharding
from srpo_jax.checkpoint import Checkpointer
from srpo_jax.data import scenes
from srpo_jax.data.sft import SftRecord
from srpo_jax.exploration.explorer import ExploreConfig, explore
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.files import read_jsonl
from srpo_jax.inputs import VisionInputs, batch_inputs
from srpo_jax.judges.verdict import Verdict
from srpo_jax.training import loop
from srpo_jax.training.data import BatchConfig, StepBatch, step_batches
from srpo_jax.training.loop import RunConfig, TrainingError, _check_finite, check_round, has_pair, train
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.state import OptimConfig, init_state
from srpo_jax.training.step import ComputeConfig, make_update
from srpo_jax.trees import Branch, PackConfig, ReasoningTree

LOSS_DOC = Path(__file__).resolve().parents[2] / "docs" / "loss.md"
RUN = RunConfig(
    explore=ExploreConfig(k=4, max_tokens=10, trees=4, trunk=(144,), patches=(16,)),
    loss=LossConfig(options={"srpo": {"lambda_": 0.5}}),
    optim=OptimConfig(1e-2, steps=4, schedule="constant"),
    pack=PackConfig((144,), (112,), (8, 20), 20, (24,), (10,), (16,)),
    batch=BatchConfig(trees=4),
    compute=ComputeConfig(remat="none"),
    updates=2,
    rounds=2,
    checkpoint_every=1,
    keep=9,
    max_truncated=1.0,
    max_unknown=1.0,
)
LEARN = dataclasses.replace(RUN, rounds=0)
OUTPUT = ("^head$", "^norm/")  # of all programs with a gradient, these compile fastest


def judge(record, path):
    return Verdict(safe="rest" in path.answer, effective="rest" in path.answer, reason="")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def records():
    return scenes.records("train", 4)


@pytest.fixture(scope="module")
def trees(tiny_policy, records):
    made = explore(tiny_policy, tiny_policy.params, records, RUN.explore, judge, jax.random.key(0), progress=False)
    assert any(has_pair(tree, RUN.pack) for tree in made)
    return made


@pytest.fixture(scope="module")
def finished(tiny_policy, records, mesh, tmp_path_factory):
    """Two rounds of two updates with a checkpoint after each, and the parameters that came out."""
    workdir = tmp_path_factory.mktemp("loop")
    return workdir, train(tiny_policy, records, judge, RUN, workdir, mesh)


def restored(workdir, step, policy, mesh, config=RUN):
    state = init_state(policy.params, config.optim.make(), config.trainable, mesh)
    with Checkpointer(workdir / "checkpoints", keep=9) as checkpoints:
        return checkpoints.restore(step, state)[0].all_params()


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_run_returns_the_parameters_of_its_last_checkpoint(finished, tiny_policy, mesh):
    workdir, params = finished
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [1, 2, 3, 4]
    assert_equal(params, restored(workdir, 4, tiny_policy, mesh))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, tiny_policy.params)
    # The key's bias shifts all scores of a query alike, so nothing but noise moves it.
    assert all(move for path, move in sharding.flatten(moved).items() if not path.endswith("k/bias"))


def test_a_finished_run_has_nothing_left_to_do(finished, tiny_policy, records, mesh):
    workdir, params = finished
    files = [workdir / "metrics.jsonl", *sorted((workdir / "trees").glob("*/*.jsonl"))]
    before = [file.read_bytes() for file in files]
    assert len(files) == 5
    assert_equal(train(tiny_policy, records, None, RUN, workdir, mesh), params)  # not even a judge is needed
    assert [file.read_bytes() for file in files] == before


def test_every_round_explores_with_the_newest_parameters(finished, tiny_policy, records, mesh):
    workdir, _ = finished
    stored = [list(read_jsonl(workdir / "trees" / f"round_00{r}" / "branches.jsonl")) for r in (0, 1)]

    def explored(params, round_):
        made = explore(
            tiny_policy, params, records, RUN.explore, judge, jax.random.key(0), round_=round_, progress=False
        )
        return [[(b.tokens.tolist(), [float(x) for x in b.logprobs]) for b in tree.branches] for tree in made]

    found = [[[(b["tokens"], b["logprobs"]) for b in line["branches"]] for line in lines] for lines in stored]
    assert found[0] == explored(tiny_policy.params, 0)
    assert found[1] == explored(restored(workdir, 2, tiny_policy, mesh), 1)
    assert found[1] != explored(tiny_policy.params, 1)


def test_a_round_under_way_never_explores_with_later_parameters(finished, tiny_policy, records, mesh, tmp_path):
    """Step 3 of 4 is restored, but a tree of the second round is gone: it cannot be sampled again."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    file = workdir / "trees" / "round_001" / "branches.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=rf"lacks the trees of 1 records.*{records[-1].id}"):
        train(tiny_policy, records, judge, RUN, workdir, mesh)


def test_adaptive_rounds_reuse_branches_and_resume_to_the_same_bits(tiny_policy, records, mesh, tmp_path):
    """Step 3 of 4 is restored: the branches that stay from the first round are read again, none is sampled."""
    config = dataclasses.replace(RUN, explore=dataclasses.replace(RUN.explore, adaptive=2, max_age=1))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    params = train(tiny_policy, records, judge, config, whole, mesh)
    counts = [len(line["branches"]) for line in read_jsonl(whole / "trees" / "round_000" / "branches.jsonl")]
    assert len(counts) > len(records) and sum(counts) < 4 * 6 * len(records)  # in waves, and fewer than everywhere
    lines = [(whole / "trees" / f"round_00{r}" / "branches.jsonl").read_bytes() for r in (0, 1)]
    assert len(list(read_jsonl(whole / "trees" / "round_001" / "verdicts.jsonl"))) < sum(counts)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "4")
    assert_equal(train(tiny_policy, records, judge, config, cut, mesh), params)
    assert [(cut / "trees" / f"round_00{r}" / "branches.jsonl").read_bytes() for r in (0, 1)] == lines
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_records_of_free_reasoning_are_learned_as_they_are_and_never_explored(tiny_policy, mesh, tmp_path):
    """As Think in Safety publishes them: thoughts without steps, or an answer alone; the loss is that of these tokens."""
    plain = [
        SftRecord(f"s{i}", (), "May my child run here?", "No, rest at the shed.", ["The track is busy.", None][i % 2])
        for i in range(4)
    ]
    config = dataclasses.replace(LEARN, loss=LossConfig({"sft": 1.0}), updates=1, trainable=OUTPUT)
    train(tiny_policy, plain, None, config, tmp_path / "run", mesh)
    [line] = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    expected = []
    for record in plain:
        trunk = make_trunk(record, tiny_policy.processor)
        inputs = tiny_policy.encode([{"question": record.question}])
        logits = sx.forward(tiny_policy, tiny_policy.params, batch_inputs([trunk.encoded], len(trunk.encoded.tokens)))
        scores = jax.nn.log_softmax(logits[0, trunk.ends[0] - 1 : -1])
        expected.append(-np.mean([scores[t, token] for t, token in enumerate(trunk.path)]))
        assert inputs.tokens[0, : trunk.ends[0]].tolist() == trunk.encoded.tokens[: trunk.ends[0]].tolist()
    assert line["loss"] == pytest.approx(np.mean(expected), rel=1e-4)
    with pytest.raises(TrainingError, match=r"record 's0' and its like have no steps.*rounds=0"):
        train(tiny_policy, plain, judge, dataclasses.replace(config, rounds=1), tmp_path / "explored", mesh)


def test_what_explores_a_later_round_is_on_the_disk_first(tiny_policy, records, mesh, tmp_path, monkeypatch):
    """Else a kill would leave trees of parameters that no checkpoint holds."""
    saves, explored, inner = [], [], Checkpointer.save

    def save(self, *args):
        inner(self, *args)
        saves.append(self)

    def spy(*args, round_, **options):
        explored.append((round_, [save._pending for save in saves[-1:]], (tmp_path / "checkpoints" / "2").is_dir()))
        return explore(*args, round_=round_, **options)

    monkeypatch.setattr(Checkpointer, "save", save)
    monkeypatch.setattr(loop, "explore", spy)
    train(tiny_policy, records, judge, dataclasses.replace(RUN, checkpoint_every=9), tmp_path, mesh)
    assert explored == [(0, [], False), (1, [None], True)]


def test_a_checkpoint_of_another_run_is_refused(finished, tiny_policy, records, mesh, tmp_path):
    workdir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    with pytest.raises(TrainingError, match=r"step 4.*'seed': 0.*this run \{'seed': 5.*another work directory"):
        train(tiny_policy, records, judge, dataclasses.replace(RUN, seed=5), workdir, mesh)


def test_a_resumed_run_allocates_one_state(finished, tiny_policy, records, mesh, monkeypatch):
    """It restores into shapes; a fresh state beside the restored one would need the memory twice."""
    monkeypatch.setattr(loop, "init_state", None)
    assert_equal(train(tiny_policy, records, judge, RUN, finished[0], mesh), finished[1])


def test_metrics_hold_what_the_documentation_lists(finished):
    table = re.findall(
        r"^\| (`.+?) \|", LOSS_DOC.read_text(encoding="utf-8").partition("## What is logged")[2], re.MULTILINE
    )
    names = {name for cell in table for name in re.findall(r"`([^`]+)`", cell)}
    assert len(names) > 10 and "explore/*" in names
    lines = list(read_jsonl(finished[0] / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {n for n in names if not n.endswith("*")} | {"loss/srpo", "weight/srpo"} <= line.keys()
        assert all(isinstance(value, int | float) and np.isfinite(value) for value in line.values())
        np.testing.assert_allclose(line["loss"], line["reference_loss"] + 0.5 * line["contrastive_loss"], rtol=1e-5)
        # With the first update of a round alone.
        assert any(name.startswith("explore/") for name in line) == (line["step"] in (1, 3))
    assert lines[0]["explore/branches"] == 4 * 24
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2] * 4)
    assert lines[0]["has_pairs"] > 0 and lines[0]["m_favourable"] < 0


def test_accumulated_micro_batches_are_one_batch(tiny_policy, trees, mesh):
    """The gradient of 2 × 2 trees is that of 1 × 4, also where pairs are spread unevenly. Adam's first moment holds it."""
    results = []
    optimizer = RUN.optim.make()
    for shape in ({"trees": 4}, {"trees": 2, "accumulate": 2}):
        state = init_state(tiny_policy.params, optimizer, OUTPUT, mesh)
        update = make_update(tiny_policy.graphdef, optimizer, RUN.loss, RUN.compute, mesh, state)
        [batch] = step_batches(trees, RUN.pack, BatchConfig(**shape), 0, 1)
        state, metrics = update(state, batch.batches)
        results.append((optax.tree.get(state.opt_state, "mu"), metrics))
    (one, metrics_one), (two, metrics_two) = results
    assert float(optax.tree.norm(one)) > 0.01
    for path, gradient in one.items():
        np.testing.assert_allclose(two[path], gradient, atol=1e-5 * float(np.abs(gradient).max()) + 1e-8, err_msg=path)
    for name, value in metrics_one.items():
        np.testing.assert_allclose(metrics_two[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_not_trainable_does_not_move(tiny_policy, trees, mesh, tmp_path):
    run = dataclasses.replace(LEARN, trainable=OUTPUT)
    before = {path: np.asarray(x) for path, x in sharding.flatten(tiny_policy.params).items()}
    after = sharding.flatten(train(tiny_policy, trees, None, run, tmp_path, mesh))
    assert after.keys() == before.keys()
    for path, x in before.items():
        trains = path in ("head", "norm/scale")
        assert np.array_equal(x, after[path]) != trains, path
    assert any(path.startswith("vision/") for path in before)
    with pytest.raises(ValueError, match="trainable='visoin'"):
        train(tiny_policy, trees, None, dataclasses.replace(LEARN, trainable=("visoin",)), tmp_path / "b", mesh)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_records(tiny_policy, trees, mesh, tmp_path):
    """The broken picture comes with the second update; the checkpoint of the first is whole, and the same command stops
    there again."""
    config = dataclasses.replace(LEARN, batch=BatchConfig(trees=4), updates=3)
    others = [
        dataclasses.replace(t, trunk=dataclasses.replace(t.trunk, record_id=f"copy-{i}")) for i, t in enumerate(trees)
    ]
    data = [*trees, *others]
    batches = list(step_batches(data, RUN.pack, config.batch, 0, 2))
    assert not set(batches[0].record_ids) & set(batches[1].record_ids)
    victim = batches[1].record_ids[2]
    data = [broken(t) if t.trunk.record_id == victim else t for t in data]
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"update 1: .*loss.* not finite") as error:
            train(tiny_policy, data, None, config, tmp_path, mesh)
        assert victim in str(error.value) and "learning_rate" in str(error.value)
        assert not any(name in str(error.value) for name in batches[0].record_ids)
        with Checkpointer(tmp_path / "checkpoints", keep=9) as checkpoints:
            assert checkpoints.steps() == [1]
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored(tmp_path, 1, tiny_policy, mesh)))
        assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def broken(tree: ReasoningTree) -> ReasoningTree:
    encoded = tree.trunk.encoded
    patches = np.array(encoded.vision.patches)
    patches[0, 0] = np.nan
    vision = VisionInputs(patches, encoded.vision.positions, encoded.vision.images)
    return dataclasses.replace(
        tree, trunk=dataclasses.replace(tree.trunk, encoded=dataclasses.replace(encoded, vision=vision))
    )


def test_an_update_that_is_not_finite_is_never_saved(finished, tiny_policy, mesh):
    """Finite gradients can still ruin the parameters; the norm of the update, which tells, is what it says."""
    workdir, _ = finished
    before, after = (restored(workdir, step, tiny_policy, mesh) for step in (3, 4))
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, after, before))
    *_, line = read_jsonl(workdir / "metrics.jsonl")
    np.testing.assert_allclose(line["update_norm"], moved, rtol=1e-3)
    with pytest.raises(TrainingError, match=r"update 7: update_norm not finite.*first, second"):
        _check_finite(
            {"loss": 1.0, "grad_norm": 2.0, "update_norm": np.inf}, StepBatch(7, None, ["first", "second"], {})
        )


@pytest.mark.parametrize(("verdict", "shares"), [(True, "100.0% of risky"), (False, "0.0% of risky")])
def test_a_round_without_any_pair_is_refused_before_the_first_update(
    tiny_policy, records, mesh, tmp_path, verdict, shares
):
    same = lambda record, path: Verdict(verdict, verdict, "")  # noqa: E731
    with pytest.raises(TrainingError, match=rf"round 0: no prefix.*{shares}.*explore\.k"):
        train(tiny_policy, records, same, RUN, tmp_path, mesh)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def grown(tree: ReasoningTree, *branches: tuple[str, bool | None]) -> ReasoningTree:
    made = [
        Branch(1, np.asarray([9 + i, 3], np.int32), np.zeros(2, np.float32), status, verdict)
        for i, (status, verdict) in enumerate(branches)
    ]
    return ReasoningTree(tree.trunk, tuple(made))


def statistics(**shares):
    base = {"truncated": 0.0, "unknown": 0.0, "favourable_risky": 1.0, "favourable_harmless": 0.5}
    return {f"explore/{name}": value for name, value in (base | shares).items()}


@pytest.mark.parametrize("name", ["truncated", "unknown"])
def test_too_many_branches_without_a_verdict_are_refused(trees, name):
    config = dataclasses.replace(RUN, max_truncated=0.25, max_unknown=0.25)
    tree = grown(trees[0], ("ok", True), ("ok", False))
    check_round(statistics(**{name: 0.25}), [tree], config, 3)
    with pytest.raises(TrainingError, match=rf"round 3: 26\.0% of the branches are {name}.*max_{name} is 25\.0%"):
        check_round(statistics(**{name: 0.26}), [tree], config, 3)


def test_pairs_are_counted_as_the_update_counts_them(trees):
    """A truncated branch is the other side where the configuration says so, a failed judge never is."""
    truncated = grown(trees[0], ("ok", True), ("truncated", None))
    failed = grown(trees[0], ("ok", True), ("judge_failed", None))
    strict = dataclasses.replace(RUN, pack=dataclasses.replace(RUN.pack, unknown="unfavourable"))
    check_round(statistics(), [truncated], strict, 0)
    check_round(statistics(), [failed], dataclasses.replace(RUN, loss=LossConfig({"sft": 1.0})), 0)
    for tree, config in ((truncated, RUN), (failed, strict)):
        with pytest.raises(TrainingError, match="no prefix"):
            check_round(statistics(), [tree], config, 0)
    # Nothing but favourable branches: the record's unsafe reply stands in where it has one.
    substitutes = dataclasses.replace(RUN, pack=dataclasses.replace(RUN.pack, substitutes=True))
    risky, harmless = trees[0], trees[1]
    assert risky.trunk.unsafe_reply is not None and harmless.trunk.unsafe_reply is None
    check_round(statistics(), [grown(risky, ("ok", True))], substitutes, 0)
    with pytest.raises(TrainingError, match="no prefix"):
        check_round(statistics(), [grown(harmless, ("ok", True))], substitutes, 0)


def test_exploration_and_update_compute_in_the_same_precision(tiny_policy, records, mesh, tmp_path, monkeypatch):
    """A bfloat16 checkpoint, partly frozen: explored in the configured precision, whatever the master copy has."""

    class Explored(Exception):
        pass

    def spy(policy, params, *args, **kwargs):
        seen.update(str(x.dtype) for x in jax.tree.leaves(params))
        raise Explored

    monkeypatch.setattr(loop, "explore", spy)
    half = dataclasses.replace(tiny_policy, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_policy.params))
    for dtype in ("bfloat16", "float32"):
        seen = set()
        run = dataclasses.replace(RUN, compute=ComputeConfig(dtype), trainable=("^layers",))
        with pytest.raises(Explored):
            train(half, records, judge, run, tmp_path, mesh)
        assert seen == {dtype}


def test_the_policy_that_was_given_is_still_there_afterwards(finished, tiny_policy):
    """Updates reuse the memory of their own state, never that of the caller's parameters."""
    assert finished
    assert not any(x.is_deleted() for x in jax.tree.leaves(tiny_policy.params))


def test_a_donated_policy_makes_room_for_the_run(finished, tiny_policy, records, mesh, tmp_path, monkeypatch):
    """Before the first update, and before a checkpoint is read; what stays frozen is shared, so it stays."""
    policy = dataclasses.replace(tiny_policy, params=jax.tree.map(jnp.copy, tiny_policy.params))
    given = sharding.flatten(policy.params)
    learn = dataclasses.replace(LEARN, trainable=OUTPUT, updates=1)
    deleted, inner = [], loop.make_update

    def spy(*args, **kwargs):
        deleted.append({path for path, x in given.items() if x.is_deleted()})
        return inner(*args, **kwargs)

    monkeypatch.setattr(loop, "make_update", spy)
    after = train(policy, records, None, learn, tmp_path, mesh, donate=True)
    assert deleted == [{"head", "norm/scale"}]
    policy = dataclasses.replace(tiny_policy, params=jax.tree.map(jnp.copy, tiny_policy.params))
    given = sharding.flatten(policy.params)
    assert_equal(train(policy, records, None, learn, tmp_path, mesh, donate=True), after)
    assert deleted[1:] == deleted[:1]


def test_every_trunk_is_made_once_for_all_rounds(finished, tiny_policy, records, mesh, tmp_path, monkeypatch):
    made, inner = [], loop.make_trunk

    def spy(record, *how):
        made.append(record.id)
        return inner(record, *how)

    monkeypatch.setattr(loop, "make_trunk", spy)
    monkeypatch.setattr("srpo_jax.exploration.explorer.make_trunk", spy)
    workdir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    for step in (1, 2, 3, 4):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert_equal(train(tiny_policy, records, judge, RUN, workdir, mesh), finished[1])
    assert made == [record.id for record in records]


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_record_that_does_not_fit_stops_the_run_before_it_explores_or_learns(
    tiny_policy, records, mesh, tmp_path, monkeypatch, rounds
):
    monkeypatch.setattr(loop, "explore", lambda *args, **kwargs: pytest.fail("explored"))
    monkeypatch.setattr(loop, "step_batches", lambda *args, **kwargs: pytest.fail("learned"))
    run = dataclasses.replace(RUN, rounds=rounds, pack=dataclasses.replace(RUN.pack, path=(60,)))
    with pytest.raises(ValueError, match=r"record '.*': tokens of path and reply \(pack\.path\): \d+ exceeds"):
        train(tiny_policy, records, judge, run, tmp_path, mesh)
