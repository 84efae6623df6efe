"""Names of the leaves of a tree, and arithmetic over trees; sums are taken in float32."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jtl.near import listed


def names(tree: PyTree) -> tuple[str, ...]:
    """Return the name of each leaf, spelled `a/b/0/c`, in the order of `jax.tree.leaves`.

    The variables of an `nnx.State` are named without their trailing `.value`.

    >>> names({"layer": [{"kernel": 1.0}, {"kernel": 2.0}], "bias": 3.0})
    ('bias', 'layer/0/kernel', 'layer/1/kernel')
    """
    found = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_nnx_variable):
        if _is_nnx_variable(node):
            inner = jax.tree_util.tree_leaves_with_path(node)
            found.extend((*path, *below[1:]) for below, _ in inner)
        else:
            found.append(path)
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path in found)


def check_structure(tree: PyTree, other: PyTree, what: str) -> None:
    """Raise unless `other`, which the message calls `what`, has the structure of `tree`.

    None counts as a leaf, so that the parts of a `split` have the structure of the whole.

    Raises:
        ValueError: names the leaves that only one of them has.
    """
    if jax.tree.structure(tree, is_leaf=_hole) == jax.tree.structure(other, is_leaf=_hole):
        return
    ours, theirs = _filled_names(tree), _filled_names(other)
    only_ours = [name for name in ours if name not in set(theirs)]
    only_theirs = [name for name in theirs if name not in set(ours)]
    if only_ours or only_theirs:
        detail = f"only the tree has {listed(only_ours)}, only {what} has {listed(only_theirs)}"
    else:
        detail = f"names agree, containers do not: {_containers(tree)} against {_containers(other)}"
    raise ValueError(
        f"{what} has not the structure of the tree: {detail}; make {what} from this very tree, "
        "with `jax.tree.map` or `masks.label`"
    )


def dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Return the sum over all leaves of a times b.

    >>> float(dot({"x": jnp.array([1.0, 2.0]), "y": 3.0}, {"x": jnp.array([4.0, 5.0]), "y": 6.0}))
    32.0

    Raises:
        ValueError: the trees differ in structure.
    """
    check_structure(a, b, "b")
    return _total(jax.tree.map(lambda x, y: jnp.sum(_wide(x) * _wide(y)), a, b))


def norm(tree: PyTree) -> Float[Array, ""]:
    """Return the Euclidean norm of all leaves together.

    >>> float(norm({"x": jnp.array([3.0]), "y": jnp.array([[4.0]])}))
    5.0
    """
    return jnp.sqrt(_total(jax.tree.map(lambda x: jnp.sum(_wide(x) ** 2), tree)))


def lerp(a: PyTree, b: PyTree, t: float | Float[Array, ""]) -> PyTree:
    """Return (1 - t) a + t b, leaf by leaf in the dtypes of a.

    >>> lerp({"x": jnp.array([0.0, 4.0])}, {"x": jnp.array([8.0, 0.0])}, 0.25)
    {'x': Array([2., 3.], dtype=float32)}

    Raises:
        ValueError: the trees differ in structure.
    """
    check_structure(a, b, "b")

    def mixed(x: Any, y: Any) -> Any:
        return ((1 - t) * _wide(x) + t * _wide(y)).astype(jnp.result_type(x))

    return jax.tree.map(mixed, a, b)


def in_float32(
    function: Callable[..., Any], tree: PyTree, *others: PyTree, dtype: Any = None
) -> PyTree:
    """Return `function` of the leaves in the same place: computed in float32 at the least.

    >>> in_float32(lambda x, y: x - y, {"x": jnp.float32(3.0)}, {"x": jnp.float32(1.0)})
    {'x': Array(2., dtype=float32)}

    Args:
        function: of one array of each tree.
        tree: arrays of floating point; a None is a hole, and stays one.
        others: trees like `tree`; what they have in its holes is not read.
        dtype: of the leaves that come out; None keeps those of `tree`.

    Raises:
        ValueError: structures or shapes differ, a leaf is missing, or one is no floating point.
    """
    for number, other in enumerate(others, start=2):
        check_structure(tree, other, f"tree {number}")
    columns = [jax.tree.leaves(part, is_leaf=_hole) for part in (tree, *others)]
    found = []
    for name, *leaves in zip(_filled_names(tree), *columns, strict=True):
        if leaves[0] is None:
            found.append(None)
            continue
        _check_floats(name, leaves)
        kind = jnp.result_type(leaves[0]) if dtype is None else dtype
        found.append(jnp.asarray(function(*(_wide(leaf) for leaf in leaves)), kind))
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_hole), found)


def weighted_squared_distance(
    a: PyTree, b: PyTree, *, weight: PyTree | None = None, mask: PyTree | None = None
) -> Float[Array, ""]:
    """Return sum w (a - b)^2 over the leaves that the mask chooses.

    >>> a, b = {"x": jnp.array([1.0, 2.0])}, {"x": jnp.array([3.0, 5.0])}
    >>> float(weighted_squared_distance(a, b, weight={"x": jnp.array([1.0, 10.0])}))
    94.0

    Args:
        a: tree of arrays.
        b: tree like `a`; leaves outside the mask are not read and may be None.
        weight: tree like `a`; None weighs all numbers 1. Outside the mask as `b`.
        mask: tree of bools like `a`, True = included; None includes all.

    Raises:
        ValueError: a tree differs from `a` in structure, or an included leaf in shape.
    """
    mask = jax.tree.map(lambda _: True, a) if mask is None else mask
    others = {"b": b, "mask": mask} | ({} if weight is None else {"weight": weight})
    for what, other in others.items():
        check_structure(a, other, what)
    columns = [
        jax.tree.leaves(tree, is_leaf=_hole) for tree in (a, b, b if weight is None else weight)
    ]
    keeps = jax.tree.leaves(mask, is_leaf=_hole)
    terms = []
    for name, keep, x, y, w in zip(_filled_names(a), keeps, *columns, strict=True):
        if not keep:
            continue
        _check_shapes(name, x, y, w)
        factor = 1.0 if weight is None else _wide(w)
        terms.append(jnp.sum(factor * (_wide(x) - _wide(y)) ** 2))
    return _total(terms)


def size_bytes(tree: PyTree) -> int:
    """Return the bytes that the leaves take; leaves need a shape and a dtype only.

    >>> size_bytes({"x": jnp.zeros((2, 3)), "y": jax.ShapeDtypeStruct((4,), jnp.bfloat16)})
    32
    """
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(np.shape(x)) * jnp.result_type(x).itemsize for x in leaves)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Return whether no leaf holds a NaN or an infinity; keys and integers always pass.

    >>> bool(all_finite({"x": jnp.array([1.0, jnp.nan])})), bool(all_finite({"x": 1}))
    (False, True)
    """
    kinds = [(x, jnp.result_type(x)) for x in jax.tree.leaves(tree)]
    checks = [jnp.all(jnp.isfinite(x)) for x, kind in kinds if jnp.issubdtype(kind, jnp.inexact)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def changes(before: PyTree, after: PyTree) -> dict[str, str]:
    """Return, by name, how each leaf changed that is not the same bit for bit.

    A NaN equals a NaN of the same bits; 0.0 and -0.0 differ.

    >>> changes({"x": np.zeros(3), "y": np.nan}, {"x": np.array([0.0, 1.0, -0.0]), "y": np.nan})
    {'x': '2 of 3 numbers changed'}

    Raises:
        ValueError: the trees differ in structure.
    """
    check_structure(before, after, "after")
    leaves = [jax.tree.leaves(tree, is_leaf=_hole) for tree in (before, after)]
    rows = zip(_filled_names(before), *leaves, strict=True)
    found = {name: _change(old, new) for name, old, new in rows if old is not new}
    return {name: change for name, change in found.items() if change}


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _total(tree: PyTree) -> jax.Array:
    return functools.reduce(jnp.add, jax.tree.leaves(tree), jnp.float32(0.0))


def _check_shapes(name: str, *leaves: Any) -> None:
    shapes = [None if leaf is None else np.shape(leaf) for leaf in leaves]
    if len(set(shapes)) > 1 or None in shapes:
        raise ValueError(
            f"leaf {name!r} has the shapes {shapes} in a, b and weight, where None is a hole; "
            "leave it out with the mask, or give all three the same shape"
        )


def _check_floats(name: str, leaves: list[Any]) -> None:
    shapes = [None if leaf is None else np.shape(leaf) for leaf in leaves]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"leaf {name!r} has the shapes {shapes} in the trees, where None is a hole; "
            "leave it out with a mask, or give all trees the same shape"
        )
    kinds = [jnp.result_type(leaf) for leaf in leaves]
    if not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
        raise ValueError(
            f"leaf {name!r} is of {[str(kind) for kind in kinds]}; arithmetic over weights takes "
            "floating point alone; leave it out with a mask"
        )


def _hole(node: Any) -> bool:
    return node is None


def _is_nnx_variable(node: Any) -> bool:
    # By name, so that flax is not imported.
    return any(
        kind.__name__ in ("Variable", "VariableState") and kind.__module__.startswith("flax.nnx")
        for kind in type(node).__mro__
    )


def _filled_names(tree: PyTree) -> tuple[str, ...]:
    return names(jax.tree.map(lambda _: 0, tree, is_leaf=_hole))


def _containers(tree: PyTree) -> str:
    return str(jax.tree.structure(tree))[:120]


def _change(old: Any, new: Any) -> str:
    """Say how two leaves differ in bits, or return "" where they do not."""
    old_parts, new_parts = _on_host(old), _on_host(new)
    shapes = [[(part.dtype, part.shape) for part in parts] for parts in (old_parts, new_parts)]
    if shapes[0] != shapes[1]:
        return f"was {_typed(old)}, is {_typed(new)}"
    pairs = [(_bits(a), _bits(b)) for a, b in zip(old_parts, new_parts, strict=True)]
    if all(np.array_equal(a, b) for a, b in pairs):
        return ""
    changed = sum(int(np.sum(np.any(a != b, axis=1))) for a, b in pairs)
    return f"{changed} of {sum(part.size for part in old_parts)} numbers changed"


def _on_host(leaf: Any) -> list[np.ndarray]:
    if not isinstance(leaf, jax.Array):
        return [np.asarray(leaf)]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.is_fully_addressable:
        return [np.asarray(leaf)]
    return [np.asarray(shard.data) for shard in leaf.addressable_shards]


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8)


def _typed(leaf: Any) -> str:
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}"
