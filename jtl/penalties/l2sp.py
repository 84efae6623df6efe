"""L2-SP, decay towards the start: Li, Grandvalet and Davoine 2018, arXiv:1802.01483."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jtl import trees


def l2_sp(params: PyTree, anchor: PyTree, *, mask: PyTree | None = None) -> Float[Array, ""]:
    """Return 1/2 sum (params - anchor)^2.

    >>> float(l2_sp({"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([1.0, 2.0])}))
    4.5

    Args:
        params: tree of arrays.
        anchor: the start, a tree like `params`; None in a leaf outside the mask.
        mask: True = included; a fresh head stays out. None includes all.

    Raises:
        ValueError: the trees differ in structure or an included leaf in shape.

    Reference: Li, Grandvalet and Davoine 2018, arXiv:1802.01483, equation 3, first term.
    """
    return 0.5 * trees.weighted_squared_distance(params, anchor, mask=mask)


class Start(NamedTuple):
    """The parameters when the optimizer began."""

    start: Any


def decay_to_start(
    rate: float, mask: PyTree | Callable[[PyTree], PyTree] | None = None
) -> optax.GradientTransformation:
    """Return a transform that adds -rate (params - start) to updates that point downhill.

    It is to L2-SP what AdamW's decay is to L2: the pull does not pass through Adam's moments. It
    goes after what sets the sign, and, in a transform at unit rate, the step's rate scales it too:

        body = optax.chain(optax.adam(1.0), decay_to_start(0.01))
        tx = masks.optimizer({"body": body, "head": optax.adamw(1.0)}, labels)

    where the head, which is fresh, decays towards 0. A new state begins at the parameters of that
    moment, so a state made anew for each task decays towards the end of the task before.

    >>> tx = decay_to_start(0.25)
    >>> state = tx.init({"w": jnp.array([1.0, 2.0])})
    >>> updates, _ = tx.update({"w": jnp.array([0.0, 10.0])}, state, {"w": jnp.array([3.0, 2.0])})
    >>> updates["w"].tolist()
    [-0.5, 10.0]

    Args:
        rate: share of the distance that one step takes back.
        mask: as in optax, a tree of bools or a function of the parameters; the updates of other
            leaves pass as they are, and no start is kept for them. None includes all.

    Raises:
        ValueError: an update without parameters.

    Reference: Li, Grandvalet and Davoine 2018, arXiv:1802.01483; decoupled as in Loshchilov and
        Hutter 2019, arXiv:1711.05101.
    """

    def init(params: Any) -> Start:
        return Start(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "decay_to_start pulls parameters to their start, and params=None is given; "
                "call tx.update(grads, state, params)"
            )

        def pulled(update: Any, leaf: Any, start: Any) -> Any:
            wide = (jnp.asarray(x, jnp.float32) for x in (update, leaf, start))
            update32, leaf32, start32 = wide
            return (update32 - rate * (leaf32 - start32)).astype(update.dtype)

        return jax.tree.map(pulled, updates, params, state.start), state

    tx = optax.GradientTransformation(init, update)
    return tx if mask is None else optax.masked(tx, mask)
