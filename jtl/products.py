"""A function as operations, and the leaves of it that are used once, in a product with a vector.

The gradient with respect to such a leaf is the outer product of the vector and the gradient at the
product's output. So both are asked for, and the gradient itself is never formed.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_LAYOUT = ("convert_element_type", "copy", "reshape", "squeeze", "transpose")


class _Op(NamedTuple):
    """An equation; what it reads and writes are numbers of values, or constants."""

    eqn: Any
    reads: tuple[Any, ...]
    writes: tuple[int, ...]


class _Constant(NamedTuple):
    value: Any


class Product(NamedTuple):
    """The one use of a leaf: operation `at` takes it, laid out anew, as its operand `side`."""

    at: int
    side: int
    layout: tuple[_Op, ...]


class Plan(NamedTuple):
    """A function of arrays as operations.

    Attributes:
        ops: in order.
        outs: where the results are.
        products: {number of a live leaf: the product that its gradient is an outer product for}.
    """

    ops: tuple[_Op, ...]
    outs: tuple[Any, ...]
    products: dict[int, Product]


def make_plan(function: Callable[..., Any], live: Any, *others: Any) -> Plan:
    """Return `function(live, *others)` as operations, and which leaves of `live` are products.

    Args:
        function: gives a tuple of arrays.
        live: tree of arrays that are differentiated.
        others: what else it reads.
    """
    closed = jax.make_jaxpr(function)(live, *others)
    fresh = itertools.count()
    ops, outs = _flatten(closed, [next(fresh) for _ in closed.in_avals], fresh)
    users: dict[Any, list[int]] = {}
    for number, op in enumerate([*ops, _Op(None, outs, ())]):
        for read in op.reads:
            if not isinstance(read, _Constant):
                users.setdefault(read, []).append(number)
    found = {i: _product(ops, users, i) for i in range(len(jax.tree.leaves(live)))}
    return Plan(ops, outs, {i: product for i, product in found.items() if product is not None})


def _flatten(closed: Any, reads: Any, fresh: Iterator[int]) -> tuple[Any, Any]:
    """Return all operations, those of called functions among them, and where the results are."""
    jaxpr, ops = closed.jaxpr, []
    where = dict(zip(jaxpr.invars, reads, strict=True))
    where |= {v: _Constant(c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)}

    def find(atom: Any) -> Any:
        return _Constant(atom.val) if isinstance(atom, Literal) else where[atom]

    for eqn in jaxpr.eqns:
        inputs = tuple(find(atom) for atom in eqn.invars)
        if eqn.primitive.name in _CALLS and hasattr(eqn.params.get("jaxpr"), "consts"):
            inner, outs = _flatten(eqn.params["jaxpr"], inputs, fresh)
            ops.extend(inner)
        else:
            outs = tuple(next(fresh) for _ in eqn.outvars)
            ops.append(_Op(eqn, inputs, outs))
        where |= dict(zip(eqn.outvars, outs, strict=True))
    return tuple(ops), tuple(find(atom) for atom in jaxpr.outvars)


def _product(ops: Any, users: Any, value: int) -> Product | None:
    """Return the product with a vector that is the only use of a value, None if it is not."""
    layout = []
    while len(users.get(value, ())) == 1 and users[value][0] < len(ops):
        at = users[value][0]
        op = ops[at]
        if op.eqn.primitive.name == "dot_general":
            side = op.reads.index(value)
            other = op.eqn.invars[1 - side].aval.shape
            contracted, batched = op.eqn.params["dimension_numbers"]
            bound = {*contracted[1 - side], *batched[1 - side]}
            free = math.prod(size for axis, size in enumerate(other) if axis not in bound)
            return Product(at, side, tuple(layout)) if free == 1 else None
        if op.eqn.primitive.name not in _LAYOUT or len(op.reads) != 1:
            return None
        layout.append(op)
        value = op.writes[0]
    return None


def run(plan: Plan, inputs: list[Any], added: dict[int, Any]) -> tuple[list[Any], dict[int, Any]]:
    """Return the results, with `added` to the products, and the other operand of each.

    Args:
        plan: of the function.
        inputs: the leaves of what it was planned with.
        added: {number of a leaf: what is added to its product}: zeros, to differentiate by.
    """
    values: dict[Any, Any] = dict(enumerate(inputs))
    leaf_of = {product.at: leaf for leaf, product in plan.products.items()}
    operands = {}

    def read(atom: Any) -> Any:
        return atom.value if isinstance(atom, _Constant) else values[atom]

    for at, op in enumerate(plan.ops):
        given = [read(atom) for atom in op.reads]
        outs = _bind(op.eqn, given)
        if at in leaf_of:
            leaf = leaf_of[at]
            operands[leaf] = given[1 - plan.products[leaf].side]
            outs = [outs[0] + added[leaf]]
        values |= dict(zip(op.writes, outs, strict=True))
    return [read(atom) for atom in plan.outs], operands


def _bind(eqn: Any, given: list[Any]) -> list[Any]:
    outs = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]


def outer(plan: Plan, number: int, leaf: Any, operand: Any, slope: Any) -> jax.Array:
    """Return the sum over rows of the outer products, laid out as the leaf, in float32.

    It is what the product's own transpose gives for these operands.

    Args:
        plan: of the function.
        number: of the leaf.
        leaf: the leaf.
        operand: the vectors of all rows, along a first axis.
        slope: what stands for the gradients at the product's output, likewise.
    """
    product = plan.products[number]
    params = plan.ops[product.at].eqn.params

    def dots(weight: Any) -> Any:
        for op in product.layout:
            if op.eqn.primitive.name != "convert_element_type":
                weight = _bind(op.eqn, [weight])[0]

        def dot(row: Any) -> Any:
            pair = (weight, row) if product.side == 0 else (row, weight)
            # Squares of gradients span many decades: no products of fewer bits on an accelerator.
            return jax.lax.dot_general(
                *pair, params["dimension_numbers"], precision=jax.lax.Precision.HIGHEST
            )

        return jax.vmap(dot)(operand)

    shape = jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.float32)
    return jax.linear_transpose(dots, shape)(slope)[0]
