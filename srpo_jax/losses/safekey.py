"""SafeKey's two auxiliary losses (arXiv 2505.16186), to be added to a language-model loss with weights of 0.2.

A path opens with the model's understanding of the request; the key sentence follows it and shows whether the model will
go on safely. One loss has the key sentence follow from the understanding alone, with the query hidden; the other asks hidden
states whether the request is safe. Both are functions of what a model gives: log-probs of a forward pass in which the query
is masked, and logits of two heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from srpo_jax.losses.branches import masked_mean


def key_sentence_loss(masked_logprobs: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Query-mask modelling: L = −mean over the key sentence's tokens of log π(t | earlier tokens; query masked).

    Args:
      masked_logprobs: float[B, A], log π of path tokens from a forward pass whose attention does not see the query.
      key: bool[B, A], the tokens of the key sentence.

    Returns:
      float[B] losses, 0 for a path without a key sentence, and the statistics `key_sentence_loss` and `has_key_sentence`.

    Example:
      >>> import jax.numpy as jnp
      >>> float(key_sentence_loss(jnp.array([[-9.0, -1.0, -2.0]]), jnp.array([[False, True, True]]))[0][0])
      1.5
    """
    loss = -masked_mean(masked_logprobs, key)
    has_key = jnp.any(key, axis=-1).astype(loss.dtype)
    return loss, {"key_sentence_loss": jax.lax.stop_gradient(loss), "has_key_sentence": has_key}


def safety_head_loss(
    full: jax.Array, understanding: jax.Array, safe: jax.Array, *, theta: float = 0.5
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Dual-path safety heads: L = θ BCE(σ(understanding), safe) + (1 − θ) BCE(σ(full), safe).

    Args:
      full: float[B], logit of the head on the mean hidden state of query and understanding, all before the key
        sentence.
      understanding: float[B], logit of the head on the mean hidden state of the understanding alone.
      safe: bool or number[B], whether the request is safe; negative where nobody says.
      theta: share of the second head, from 0 to 1 (0.5 in the released code).

    Returns:
      float[B] losses, 0 where nobody says, and statistics: the two losses, the accuracy of both heads, and
      `has_safety_label`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss, told = safety_head_loss(jnp.zeros(1), jnp.zeros(1), jnp.array([True]))
      >>> round(float(loss[0]), 4)  # ln 2
      0.6931
    """
    if isinstance(theta, int | float) and not 0 <= theta <= 1:
        raise ValueError(f"theta={theta}: a share between 0 and 1")
    label = jnp.asarray(safe, full.dtype)
    known, target = label >= 0, jnp.maximum(label, 0)
    parts = {"full": full, "understanding": understanding}
    losses = {k: known * (jax.nn.softplus(x) - target * x) for k, x in parts.items()}
    aux = {f"head_loss_{k}": x for k, x in losses.items()} | {"has_safety_label": known.astype(full.dtype)}
    aux |= {f"head_accuracy_{k}": (known & ((x > 0) == (target > 0.5))).astype(full.dtype) for k, x in parts.items()}
    return theta * losses["understanding"] + (1 - theta) * losses["full"], jax.lax.stop_gradient(aux)
