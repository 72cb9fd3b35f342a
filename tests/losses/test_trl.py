"""Values beside those of TRL on the same log-probs: its loss methods are called with tensors, no model and no trainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax import losses
from tests.losses.questions import One, as_arrays

pytestmark = pytest.mark.slow
pytest.importorskip("trl", reason="the extra test-all installs trl")
torch = pytest.importorskip("torch")

L = 5


def pairs(seed: int, n: int = 4):
    """Pairs (favourable, unfavourable) of one prefix each, so that every pair is a question's only one."""
    rng = np.random.default_rng(seed)

    def one(verdict):
        length = rng.integers(1, L + 1)
        logprobs = -rng.exponential(size=length)
        near = [logprobs + rng.normal(scale=0.3, size=length) for _ in range(2)]
        return One(0, verdict, 1, 1, logprobs, *near)

    return [(one(1), one(0)) for _ in range(n)]


def ours(loss, made, **options):
    """Mean over questions."""
    with jax.enable_x64(True):
        return float(np.mean([loss(as_arrays(list(pair)), **options)[0][0] for pair in made]))


def padded(values):
    """float32[n, L + 1] with a first column for the prompt, and the completion mask."""
    x, mask = np.zeros((len(values), L + 1)), np.zeros((len(values), L + 1), int)
    for row, value in enumerate(values):
        x[row, 1 : len(value) + 1], mask[row, 1 : len(value) + 1] = value, 1
    return torch.tensor(x, dtype=torch.float32), torch.tensor(mask)


def gather():
    """An accelerator of one process."""
    same = {name: lambda x, **kw: x for name in ("reduce", "gather", "gather_for_metrics")}
    return SimpleNamespace(**same, device=torch.device("cpu"), num_processes=1)


def forward(logps):
    """What TRL's models return: log-probs, and statistics that only its logs read."""
    zero = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=zero, mean_logits=zero, is_top1=zero.bool())


def sides(made, name):
    return [getattr(p, name) for p, _ in made] + [getattr(m, name) for _, m in made]


@pytest.mark.parametrize(
    ("kind", "beta", "loss", "options"),
    [
        ("sigmoid", 0.3, losses.dpo, {"beta": 0.3}),
        ("sigmoid_norm", 0.3, losses.dpo, {"beta": 0.3, "normalise": True}),
        ("ipo", 0.2, losses.ipo, {"tau": 0.2}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_dpo_and_ipo_are_those_of_trl(kind, beta, loss, options, seed):
    from trl.trainer.dpo_trainer import DPOTrainer

    made = pairs(seed)
    logps, mask = padded(sides(made, "logprobs"))
    reference, _ = padded(sides(made, "reference"))
    n = len(made)
    # `_compute_loss` reads log-probs of the tokens after the first, 0 where nothing is scored.
    outputs = forward(logps[:, 1:])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=gather(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    ref = reference.sum(1)
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": ref[:n],
        "ref_rejected_logps": ref[n:],
    }
    found = DPOTrainer._compute_loss(trainer, lambda **kw: outputs, inputs, False)
    assert ours(loss, made, **options) == pytest.approx(float(found), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_odds_ratio_of_orpo_and_the_loss_of_simpo_are_those_of_trl(seed):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    made = pairs(seed)
    chosen, rejected = (
        torch.tensor([float(np.mean(side.logprobs)) for side in column]) for column in zip(*made, strict=True)
    )
    orpo = SimpleNamespace(beta=0.3, accelerator=gather())
    ratio = ORPOTrainer.odds_ratio_loss(orpo, chosen, rejected)[0]  # β log σ: TRL subtracts it from the likelihood
    anchor = -float(chosen.mean())
    assert ours(losses.orpo, made, lambda_=0.3) == pytest.approx(anchor - float(ratio.mean()), rel=1e-5)
    cpo = SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=0.0, loss_type="simpo", accelerator=gather()
    )
    simpo = CPOTrainer.cpo_loss(cpo, chosen, rejected)[0]
    assert ours(losses.simpo, made, beta=2.0, gamma=0.7) == pytest.approx(float(simpo.mean()), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_kto_is_that_of_trl_given_its_kl(seed):
    from trl.trainer.kto_trainer import KTOTrainer

    made = [b for pair in pairs(seed) for b in pair]
    logps, mask = padded([b.logprobs for b in made])
    reference, _ = padded([b.reference for b in made])
    kl = torch.tensor([0.4, 0.8])
    outputs = forward(logps[:, 1:])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=gather(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda model, batch: kl,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "label": torch.tensor([bool(b.verdict) for b in made]),
        "ref_logps": reference.sum(1),
        "ref_KL_logps": torch.zeros(2),
    }
    found = KTOTrainer._compute_loss(trainer, lambda **kw: outputs, inputs, False)
    with jax.enable_x64(True):
        options = {"beta": 0.3, "desirable": 1.5, "undesirable": 0.5}
        parts = [losses.kto(as_arrays([b]), jnp.asarray([0.6]), **options)[0][0] for b in made]
    assert float(np.mean(parts)) == pytest.approx(float(found), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "level", "low", "high", "options"),
    [
        ("grpo", "token", 0.2, 0.2, {"beta": 0.1}),
        ("dr_grpo", "token", 0.2, 0.2, {"aggregate": "constant", "max_tokens": 7, "scale": "none"}),
        ("bnpo", "token", 0.2, 0.28, {"aggregate": "token"}),
        ("grpo", "sequence", 3e-4, 4e-4, {"ratio": "sequence"}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_grpo_and_its_variants_are_those_of_trl(kind, level, low, high, options, seed):
    """One group; TRL takes advantages as given, so ours come from the group of the same rewards."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    made = [b for pair in pairs(seed) for b in pair][: 7 - seed]
    logps, mask = (x[:, 1:] for x in padded([b.logprobs for b in made]))
    rewards = torch.tensor([float(b.verdict) for b in made])
    advantages = rewards - rewards.mean()
    if options.get("scale") != "none":
        advantages = advantages / (rewards.std() + 1e-4)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=gather(),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=options.get("beta", 0.0),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        loss_type=kind,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        max_completion_length=7,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *args, **kw: (logps, torch.zeros_like(logps), None),
    )
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": padded([b.sampled for b in made])[0][:, 1:],
        "ref_per_token_logps": padded([b.reference for b in made])[0][:, 1:],
    }
    found = GRPOTrainer._compute_loss(trainer, None, inputs)
    with jax.enable_x64(True):
        mine, _ = losses.grpo(as_arrays(made), clip_low=low, clip_high=high, **options)
    assert float(mine[0]) == pytest.approx(float(found), rel=1e-4, abs=1e-6)
