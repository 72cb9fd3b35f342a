"""TRL's preference trainer on the pairs of a tree, in torch: what `benchmarks/update.py` measures beside our own arms.

The loss is `DPOTrainer._compute_loss` with the trainer's defaults (gradient checkpointing on), called on batches as its
collator makes them: chosen sequences, then rejected ones, padded to the longest. Its constructor is left out, because it
refuses reference log-probs that are known already for pictures; the loss reads them where they are given.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from trl.trainer.dpo_trainer import DPOTrainer, add_fused_lm_head

from srpo_jax.models.config import ModelConfig
from srpo_jax.models.saving import save_params
from srpo_jax.trees import ReasoningTree

BETA = 0.1
ARMS = {"": True, "_reference": False}  # are reference log-probs given?
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


class PairTrainer:
    """A model and a reference model in torch, and TRL's loss of pairs of sequences."""

    def __init__(self, config: ModelConfig, params: Any, reference: Any, pairs: int):
        """`pairs` are taken at a time; their gradients add up."""
        self.pairs, self.image_token = pairs, config.image_token_id
        self.model, ref_model = (_in_torch(config, weights) for weights in (params, reference))
        self.model.gradient_checkpointing_enable()
        add_fused_lm_head(self.model, outputs=OUTPUTS)
        add_fused_lm_head(ref_model)
        same = {name: lambda x, **_: x for name in ("reduce", "gather", "gather_for_metrics")}
        self.trainer = SimpleNamespace(
            model=self.model.train(),
            ref_model=ref_model.eval().requires_grad_(False),
            accelerator=SimpleNamespace(**same, device=torch.device("cpu"), num_processes=1),
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            aux_loss_enabled=False,
            ld_alpha=None,
            f_divergence_type="reverse_kl",
            loss_types=["sigmoid"],
            loss_weights=[1.0],
            beta=BETA,
            label_smoothing=0.0,
            use_weighting=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )

    def batches(self, tree: ReasoningTree, pairs: np.ndarray, reference: np.ndarray, pictures, grids) -> list[dict]:
        """Inputs of the loss, some pairs each.

        Args:
          tree: trunk and branches.
          pairs: int[n, 2], favourable and unfavourable branch.
          reference: float[M], log-probs of the branches under the reference model.
          pictures: patches of the tree's images, and
          grids: their rows and columns of merge units.
        """
        made = []
        for first in range(0, len(pairs), self.pairs):
            chosen, rejected = pairs[first : first + self.pairs].T
            batch = self._batch(tree, [*chosen, *rejected], pictures, grids)
            for name, side in (("chosen", chosen), ("rejected", rejected)):
                batch[f"ref_{name}_logps"] = torch.tensor(reference[side], dtype=torch.float32)
            made.append(batch)
        return made

    def _batch(self, tree: ReasoningTree, branches, pictures, grids) -> dict[str, torch.Tensor]:
        trunk = tree.trunk
        chosen = [tree.branches[m] for m in branches]
        whole = [trunk.encoded.prefix(trunk.ends[b.prefix]).append(b.tokens) for b in chosen]
        longest = max(len(e.tokens) for e in whole)
        names = ("input_ids", "attention_mask", "completion_mask", "mm_token_type_ids")
        batch = {name: torch.zeros((len(whole), longest), dtype=torch.long) for name in names}
        positions = torch.zeros((3, len(whole), longest), dtype=torch.long)
        for row, (one, branch) in enumerate(zip(whole, chosen, strict=True)):
            count = len(one.tokens)
            batch["input_ids"][row, :count] = torch.tensor(one.tokens)
            batch["attention_mask"][row, :count] = 1
            batch["completion_mask"][row, count - len(branch.tokens) : count] = 1
            positions[:, row, :count] = torch.tensor(one.positions)
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.image_token).long()
        batch["position_ids"] = positions
        if pictures:
            batch["pixel_values"] = torch.tensor(np.concatenate(pictures * len(whole)))
            one_grid = [[1, 2 * rows, 2 * columns] for rows, columns in grids]
            batch["image_grid_thw"] = torch.tensor(one_grid * len(whole))
        return batch

    def step(self, batches: list[dict], given: bool) -> float:
        """Loss of all pairs; its gradients are computed as well. `given` takes reference log-probs from the batches."""
        self.model.zero_grad()
        self.trainer.precompute_ref_logps = given
        total, count = 0.0, sum(len(batch["ref_chosen_logps"]) for batch in batches)
        for batch in batches:
            share = len(batch["ref_chosen_logps"]) / count
            loss = share * DPOTrainer._compute_loss(cast(DPOTrainer, self.trainer), self.model, dict(batch), False)
            loss.backward()
            total += float(loss.detach())
        return total


def _in_torch(config: ModelConfig, params: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        save_params(folder, config, params)
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
