"""Synaptic intelligence: Zenke, Poole and Ganguli 2017, arXiv:1703.04200.

How much each weight did for the fall of the loss, added up along the path of training, is how hard
it is held to where it ended. The path is that of the steps that were taken, whatever made them:

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3), path_integral())
    updates, state = tx.update(grads, state, params, task_grads=grads)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jtl import trees


class PathIntegral(NamedTuple):
    """State of `path_integral`.

    Attributes:
        omega: for each weight the fall of the loss that its way has brought so far, float32.
    """

    omega: Any


def path_integral() -> optax.GradientTransformationExtraArgs:
    """Return a transform that adds -gradient times update to omega, and passes updates through.

    It goes last in a chain: what reaches it must be the update that is added to the weights, rate
    and all. `task_grads` is the gradient of the task's loss alone, before any clip.

    >>> tx = optax.chain(optax.sgd(0.5), path_integral())
    >>> w, g = {"w": jnp.array([2.0])}, {"w": jnp.array([3.0])}
    >>> updates, state = tx.update(g, tx.init(w), w, task_grads=g)
    >>> float(updates["w"][0]), float(state[1].omega["w"][0])  # -0.5 * 3, and 3 * 1.5
    (-1.5, 4.5)

    Reference: Zenke, Poole and Ganguli 2017, arXiv:1703.04200, equations 2 and 3.
    """

    def init(params: PyTree) -> PathIntegral:
        return PathIntegral(jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params))

    def update(
        updates: PyTree, state: PathIntegral, params: Any = None, *, task_grads: Any, **_: Any
    ) -> tuple[PyTree, PathIntegral]:
        del params
        omega = jax.tree.map(
            lambda o, g, u: o - jnp.asarray(g, jnp.float32) * jnp.asarray(u, jnp.float32),
            *(state.omega, task_grads, updates),
        )
        return updates, PathIntegral(omega)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def importance(omega: PyTree, began: PyTree, ended: PyTree, *, damping: float = 0.1) -> PyTree:
    """Return max(omega, 0) / ((ended - began)^2 + damping), leaf by leaf in float32.

    A weight whose way made the loss rise has no importance.

    >>> omega, began = {"w": jnp.array([3.0, -1.0])}, {"w": jnp.array([1.0, 1.0])}
    >>> importance(omega, began, {"w": jnp.array([2.0, 5.0])}, damping=0.5)["w"].tolist()
    [2.0, 0.0]

    Args:
        omega: of `path_integral` over the task; a leaf that is None stays None.
        began: weights before the task; leaves where omega is None are not read.
        ended: weights after the task; the same.
        damping: xi of the paper; holds the quotient small where a weight hardly moved.

    Raises:
        ValueError: a damping that is not positive, or trees of another structure.

    Reference: Zenke, Poole and Ganguli 2017, arXiv:1703.04200, equation 5, one task.
    """
    if not damping > 0:
        raise ValueError(
            f"damping is {damping}, and a weight that did not move is divided by it; give one "
            "above 0"
        )
    for what, tree in {"began": began, "ended": ended}.items():
        trees.check_structure(omega, tree, what)

    def one(fall: Any, before: Any, after: Any) -> Any:
        if fall is None:
            return None
        way = jnp.asarray(after, jnp.float32) - jnp.asarray(before, jnp.float32)
        return jnp.maximum(fall, 0.0) / (way**2 + damping)

    return jax.tree.map(one, omega, began, ended, is_leaf=lambda node: node is None)


def si(
    params: PyTree, anchor: PyTree, importance: PyTree, *, mask: PyTree | None = None
) -> Float[Array, ""]:
    """Return sum importance (params - anchor)^2, the surrogate loss of strength c = 1.

    >>> params, anchor = {"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([0.0, 2.0])}
    >>> float(si(params, anchor, {"w": jnp.array([4.0, 2.0])}))
    22.0

    Args:
        params: tree of arrays.
        anchor: parameters after the task before, a tree like `params`; None in a leaf outside the
            mask.
        importance: the sum over the tasks before of what `importance` gives; None likewise.
        mask: True = included; a fresh head and held leaves stay out. None includes all.

    Raises:
        ValueError: the trees differ in structure or an included leaf in shape.

    Reference: Zenke, Poole and Ganguli 2017, arXiv:1703.04200, equation 4.
    """
    return trees.weighted_squared_distance(params, anchor, weight=importance, mask=mask)
