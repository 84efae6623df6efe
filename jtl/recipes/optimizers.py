"""Optimizers at unit rate, for phases: the step multiplies each label's update by its rate.

    p <- p + rate * update(gradient, state, p)

So the decay is decoupled and scaled by the rate, as in optax and PyTorch, unless a docstring says
otherwise; momentum holds gradients, not steps, so that a change of rate takes hold at once. Decay
applies to matrices only (`decayed`). Gradients, moments and parameters are float32 inside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from optax import contrib

from jtl import trees
from jtl.penalties.l2sp import decay_to_start

_MATRICES = ("kernel", "embedding", "embeddings", "weight", "w")
_TABLES = ("embedding", "embeddings")
_Tx = optax.GradientTransformation


def decayed(params: PyTree) -> PyTree[bool]:
    """Return the mask of what weight decay applies to: matrices, not biases, norms, tokens.

    By the name of the leaf and its rank, 2 or more: `kernel`, `embedding` (Flax), `weight`
    (Equinox), `w`, `embeddings` (Haiku).

    >>> shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    >>> decayed({"dense": {"kernel": shape(3, 2), "bias": shape(2)}, "norm": {"weight": shape(3)}})
    {'dense': {'bias': False, 'kernel': True}, 'norm': {'weight': False}}
    """
    return _by_name(params, lambda name, leaf: name in _MATRICES and np.ndim(leaf) >= 2)


def in_float32(tx: _Tx) -> optax.GradientTransformationExtraArgs:
    """Return `tx` with gradients and parameters given to it, and so its moments, in float32.

    An optax transform has moments of the dtype of the parameters. In bfloat16 a second moment with
    b2 = 0.999 never moves again once it is near the mean square: a change of 0.1 % is rounded off.

    >>> in_float32(optax.adam(1.0)).init({"w": jnp.ones(2, jnp.bfloat16)})[0].nu["w"].dtype
    dtype('float32')
    """
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return inner.update(_wide(updates), state, _wide(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(_wide(params)), update)


def adamw(
    *,
    weight_decay: float = 0.01,
    start_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> _Tx:
    """Return AdamW at rate 1 with decoupled decay on matrices only.

    Args:
        weight_decay: of matrices, towards 0.
        start_decay: of every leaf, towards where it was when the optimizer began: L2-SP without
            Adam's moments (`penalties.l2sp.decay_to_start`); with `weight_decay=0` there is no
            other pull.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.

    Reference: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    tx = optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
    return in_float32(optax.chain(tx, decay_to_start(start_decay)) if start_decay else tx)


def adam(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> _Tx:
    """Return Adam at rate 1, without decay.

    Reference: Kingma and Ba 2015, arXiv:1412.6980.
    """
    return in_float32(optax.adam(1.0, b1=b1, b2=b2, eps=eps))


def nadamw(
    *, weight_decay: float = 0.01, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> _Tx:
    """Return AdamW with Nesterov momentum at rate 1; the first update is 1.47 times the rate.

    Reference: Dozat 2016, openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.
    """
    return in_float32(
        optax.nadamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
    )


def radam(
    *, weight_decay: float = 0.01, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> _Tx:
    """Return rectified Adam at rate 1 with decoupled decay; it needs no warmup.

    The first five updates are the momentum alone, as large as the gradients.

    Reference: Liu et al. 2020, arXiv:1908.03265.
    """
    return _decoupled(optax.scale_by_radam(b1=b1, b2=b2, eps=eps), weight_decay)


def adabelief(
    *, weight_decay: float = 0.01, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-16
) -> _Tx:
    """Return AdaBelief at rate 1 with decoupled decay.

    Reference: Zhuang et al. 2020, arXiv:2010.07468.
    """
    return _decoupled(optax.scale_by_belief(b1=b1, b2=b2, eps=eps), weight_decay)


def lion(*, weight_decay: float = 0.1, b1: float = 0.9, b2: float = 0.99) -> _Tx:
    """Return Lion at rate 1: the sign of the momentum. It takes a rate 3 to 10 times below AdamW's.

    Rate times decay stays the same, so the decay is as many times above AdamW's.

    Reference: Chen et al. 2023, arXiv:2302.06675.
    """
    return in_float32(optax.lion(1.0, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed))


def sgd(*, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0) -> _Tx:
    """Return SGD with momentum at rate 1, and L2 decay on matrices only, before the momentum."""
    decay = optax.add_decayed_weights(weight_decay, mask=decayed)
    return in_float32(
        optax.chain(decay, optax.sgd(1.0, momentum=momentum or None, nesterov=nesterov))
    )


def rmsprop(*, decay: float = 0.9, eps: float = 1e-8, momentum: float = 0.0) -> _Tx:
    """Return RMSprop at rate 1, with the bias of its second moment corrected.

    Without the correction the first update of a group would be 3.2 times the rate.

    Reference: Hinton, Srivastava and Swersky 2012, neural networks for machine learning, lecture 6.
    """
    return in_float32(
        optax.rmsprop(1.0, decay=decay, eps=eps, momentum=momentum or None, bias_correction=True)
    )


def adagrad(*, initial: float = 0.1, eps: float = 1e-7) -> _Tx:
    """Return Adagrad at rate 1; `initial` is what the sums of squares start from.

    Reference: Duchi, Hazan and Singer 2011, jmlr.org/papers/v12/duchi11a.html.
    """
    return in_float32(optax.adagrad(1.0, initial_accumulator_value=initial, eps=eps))


def adafactor(
    *,
    parameter_scale: bool = False,
    clipping: float | None = 1.0,
    decay_rate: float = 0.8,
    min_size_to_factor: int = 128,
    weight_decay: float = 0.0,
) -> _Tx:
    """Return Adafactor at rate 1: second moments as a row and a column for each large matrix.

    Args:
        parameter_scale: multiply each update by the root mean square of its parameter, at least
            0.001, as in pre-training. A head that starts at zero hardly moves then.
        clipping: greatest root mean square of the update of a leaf, before the rate.
        decay_rate: exponent of the schedule of the second moment.
        min_size_to_factor: matrices with both sides as large as this are factored.
        weight_decay: decoupled, scaled by the rate; optax's own `weight_decay_rate` is not.

    Reference: Shazeer and Stern 2018, arXiv:1804.04235.
    """
    tx = optax.adafactor(
        1.0,
        min_dim_size_to_factor=min_size_to_factor,
        decay_rate=decay_rate,
        multiply_by_parameter_scale=parameter_scale,
        clipping_threshold=clipping,
        weight_decay_rate=weight_decay,
        weight_decay_mask=decayed,
    )
    return in_float32(tx)


def lamb(
    *, weight_decay: float = 0.01, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> _Tx:
    """Return LAMB at rate 1: AdamW's update scaled to the norm of each leaf, for large batches.

    Reference: You et al. 2020, arXiv:1904.00962.
    """
    return in_float32(
        optax.lamb(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
    )


def lars(
    *, momentum: float = 0.9, trust_coefficient: float = 0.001, weight_decay: float = 0.0
) -> _Tx:
    """Return LARS at rate 1: SGD scaled to the norm of each matrix, for probes with large batches.

    Decay is added to the gradient of matrices; biases and norms take plain SGD with momentum.

    Reference: You, Gitman and Ginsburg 2017, arXiv:1708.03888.
    """
    tx = optax.lars(
        1.0,
        weight_decay=weight_decay,
        weight_decay_mask=decayed,
        trust_coefficient=trust_coefficient,
        trust_ratio_mask=decayed,
        momentum=momentum,
    )
    return in_float32(tx)


def muon(
    *,
    weight_decay: float = 0.01,
    beta: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    rms: float = 0.2,
) -> _Tx:
    """Return Muon at rate 1 for rank-2 kernels, and Nesterov AdamW for all else.

    A new head is better off with AdamW of its own: give `txs={"head": adamw(), ...}`.

    Args:
        weight_decay: decoupled, of both.
        beta: of the momentum that is made orthogonal.
        b1: of AdamW.
        b2: of AdamW.
        rms: root mean square of a kernel's update; at 0.2 it takes the rates of AdamW.

    Reference: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025,
    arXiv:2502.16982.
    """
    tx = contrib.muon(
        1.0,
        beta=beta,
        adam_b1=b1,
        adam_b2=b2,
        consistent_rms=rms,
        muon_weight_dimension_numbers=_orthogonal,
    )
    # optax's muon decays the biases of its Adam part. These updates point downhill already.
    return in_float32(optax.chain(tx, optax.add_decayed_weights(-weight_decay, mask=decayed)))


OPTIMIZERS: dict[str, Callable[..., _Tx]] = {
    "adabelief": adabelief,
    "adafactor": adafactor,
    "adagrad": adagrad,
    "adam": adam,
    "adamw": adamw,
    "lamb": lamb,
    "lars": lars,
    "lion": lion,
    "muon": muon,
    "nadamw": nadamw,
    "radam": radam,
    "rmsprop": rmsprop,
    "sgd": sgd,
}


def _decoupled(tx: _Tx, weight_decay: float) -> _Tx:
    decay = optax.add_decayed_weights(weight_decay, mask=decayed)
    return in_float32(optax.chain(tx, decay, optax.scale(-1.0)))


def _orthogonal(params: Any) -> Any:
    """Return what optax's muon takes: the axes of the kernels of rank 2, None for other leaves."""

    def axes(name: str, leaf: Any) -> Any:
        chosen = np.ndim(leaf) == 2 and name in _MATRICES and name not in _TABLES
        return contrib.MuonDimensionNumbers() if chosen else None

    return _by_name(params, axes)


def _by_name(params: Any, value: Callable[[str, Any], Any]) -> Any:
    last = [name.rpartition("/")[2] for name in trees.names(params)]
    values = [value(n, leaf) for n, leaf in zip(last, jax.tree.leaves(params), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), values)


def _wide(tree: Any) -> Any:
    def wide(x: Any) -> jax.Array:
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))

    return jax.tree.map(wide, tree)
