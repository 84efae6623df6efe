"""Optimizers at unit rate, for phases: the step multiplies each label's update by its rate."""

from typing import Any

import jax
import optax

_DECAYED = ("kernel", "embedding")


def decayed(params: Any) -> Any:
    """Return the mask of what weight decay applies to: matrices, not biases, norms, tokens.

    >>> decayed({"dense": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0}})
    {'dense': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) in _DECAYED if path else False, params
    )


def adamw(
    *, weight_decay: float = 0.01, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Return AdamW at rate 1 with decoupled decay on matrices only.

    Reference: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    return optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)


def sgd(*, momentum: float = 0.9, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Return SGD with momentum at rate 1, and L2 decay on matrices only."""
    decay = optax.add_decayed_weights(weight_decay, mask=decayed)
    return optax.chain(decay, optax.sgd(1.0, momentum=momentum or None))
