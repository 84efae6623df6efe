"""Averaged gradient episodic memory: Chaudhry, Ranzato, Rohrbach, Elhoseiny, arXiv:1812.00420."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jtl import trees


def project(grads: PyTree, reference: PyTree) -> PyTree:
    """Return g - (g . r / r . r) r where g . r < 0, and g where it is not.

    A step against it does not raise the reference's loss, to first order. Give it the leaves that
    move and no others, all of them at once: the products run over the whole tree.

    >>> g, r = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([-2.0, 0.0])}
    >>> project(g, r)["w"].tolist()  # g . r = -2, r . r = 4
    [0.0, 2.0]
    >>> project(g, {"w": jnp.array([2.0, 0.0])})["w"].tolist()
    [1.0, 2.0]

    Args:
        grads: gradient of what is trained on.
        reference: gradient of the loss on examples of earlier tasks, a tree like `grads`; zero
            everywhere projects nothing.

    Raises:
        ValueError: the trees differ in structure.

    Reference: Chaudhry et al. 2019, arXiv:1812.00420, equation 11.
    """
    product, square = trees.dot(grads, reference), trees.dot(reference, reference)
    against = (product < 0) & (square > 0)
    factor = jnp.where(against, product / jnp.where(square > 0, square, 1.0), 0.0)

    def one(g: Any, r: Any) -> Any:
        wide = jnp.asarray(g, jnp.float32) - factor * jnp.asarray(r, jnp.float32)
        return jnp.where(against, wide.astype(jnp.result_type(g)), g)

    return jax.tree.map(one, grads, reference)


def projection() -> optax.GradientTransformationExtraArgs:
    """Return `project` as a transform; it goes first in a chain, before any clip.

    >>> tx = optax.chain(projection(), optax.sgd(0.5))
    >>> w, r = {"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([-1.0, -1.0])}
    >>> tx.update(w, tx.init(w), w, reference_grads=r)[0]["w"].tolist()  # [3, 1] + 2 r is [1, -1]
    [-0.5, 0.5]

    Reference: Chaudhry et al. 2019, arXiv:1812.00420, equation 11.
    """

    def update(
        updates: PyTree, state: Any, params: Any = None, *, reference_grads: Any, **_: Any
    ) -> tuple[PyTree, Any]:
        del params
        return project(updates, reference_grads), state

    init = lambda params: optax.EmptyState()  # noqa: E731
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
