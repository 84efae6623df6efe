"""Label the leaves of any tree by rules on their names, and work on the leaves of chosen labels.

Needs jax and optax alone, and takes any pytree: Linen and Haiku dicts, `nnx.State`, Equinox
modules, lists, namedtuples, optimizer states. A mask is a tree of bools, True = chosen.

    labels = masks.label(params, [("encoder/.*", "encoder"), (".*", "head")])
    live, held = masks.split(params, masks.mask(labels, {"head"}))
    grads = jax.grad(lambda live: loss(masks.merge(live, held)))(live)
    tx = masks.optimizer({"head": optax.adam(1e-3)}, labels)
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from jtl.near import listed, nearest, nearest_leaves
from jtl.trees import changes, check_structure
from jtl.trees import names as names


class Count(NamedTuple):
    """How many leaves bear a label, and how many numbers they hold."""

    leaves: int
    parameters: int


def label(
    tree: PyTree, rules: Iterable[tuple[str, str]], *, optional: Iterable[str] = ()
) -> PyTree:
    """Return a tree like `tree` with a label on each leaf: that of the first rule that matches.

    >>> label({"encoder": {"kernel": 0}, "head": {"bias": 0}}, [("head/.*", "top"), (".*", "body")])
    {'encoder': {'kernel': 'body'}, 'head': {'bias': 'top'}}

    Args:
        tree: any pytree; its leaves are not read.
        rules: (regex, label) pairs; a regex must match the whole name of a leaf (see `names`).
        optional: regexes of those rules that may match nothing.

    Raises:
        ValueError: a leaf that no rule matches; a rule that gives no leaf its label, be it that it
            matches none or that earlier rules took them all; a rule that is no regex.
    """
    compiled = _compiled(rules)
    leaves = names(tree)
    first = [next((i for i, (rx, _) in enumerate(compiled) if rx.fullmatch(n)), -1) for n in leaves]
    bare = [name for name, i in zip(leaves, first, strict=True) if i < 0]
    if bare:
        raise ValueError(_no_rule(bare, compiled))
    excused = _excused(compiled, optional)
    idle = [i for i in range(len(compiled)) if i not in {*first, *excused}]
    if idle:
        raise ValueError(_no_leaf([compiled[i] for i in idle], compiled, leaves, first))
    return jax.tree.unflatten(jax.tree.structure(tree), [compiled[i][1] for i in first])


def mask(labels: PyTree[str], keep: str | Iterable[str]) -> PyTree[bool]:
    """Return the mask of the leaves whose label is in `keep`.

    >>> mask({"encoder": "body", "head": "top"}, {"top"})
    {'encoder': False, 'head': True}

    Raises:
        ValueError: `keep` names a label that no leaf bears.
    """
    kept = _known_labels({keep} if isinstance(keep, str) else set(keep), labels, "keep")
    return jax.tree.map(lambda name: name in kept, labels)


def split(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """Return the chosen leaves and the rest: two trees like `tree` with None in the holes.

    >>> split({"a": 1, "b": 2}, {"a": True, "b": False})
    ({'a': 1, 'b': None}, {'a': None, 'b': 2})

    Raises:
        ValueError: the mask has another structure, or a leaf that is no bool.
    """
    _check_mask(tree, mask)
    chosen = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return chosen, rest


def merge(chosen: PyTree, rest: PyTree) -> PyTree:
    """Return the tree that `split` took apart.

    >>> merge({"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': 1, 'b': 2}

    Raises:
        ValueError: the trees differ in structure, or both have a leaf in the same place.
    """
    check_structure(chosen, rest, "rest")
    pairs = jax.tree.map(lambda a, b: a is not None and b is not None, chosen, rest, is_leaf=_hole)
    twice = [name for name, both in zip(names(pairs), jax.tree.leaves(pairs), strict=True) if both]
    if twice:
        raise ValueError(
            f"chosen and rest both have a leaf at {listed(twice)}; a place must be None in one of "
            "them; merge the two parts that one `split` gave"
        )
    return jax.tree.map(lambda a, b: b if a is None else a, chosen, rest, is_leaf=_hole)


def count(tree: PyTree, labels: PyTree[str]) -> dict[str, Count]:
    """Return leaves and parameters of each label, in the order in which labels first occur.

    >>> count({"a": np.zeros((2, 3)), "b": np.zeros(4)}, {"a": "body", "b": "head"})
    {'body': Count(leaves=1, parameters=6), 'head': Count(leaves=1, parameters=4)}

    Args:
        tree: arrays, or anything with a shape (`jax.ShapeDtypeStruct`).
        labels: the tree that `label` made.

    Raises:
        ValueError: the labels have another structure.
    """
    check_structure(tree, labels, "labels")
    counts: dict[str, Count] = {}
    for name, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(tree), strict=True):
        leaves, parameters = counts.get(name, Count(0, 0))
        counts[name] = Count(leaves + 1, parameters + math.prod(np.shape(leaf)))
    return counts


def optimizer(
    txs: Mapping[str, optax.GradientTransformation], labels: PyTree[str]
) -> optax.GradientTransformationExtraArgs:
    """Return one transform that gives each label its own and holds every label that has none.

    Held leaves get a zero update and no state, whatever their gradient and whatever decay the
    other labels have. A clip or a norm belongs inside the transforms, or over the gradients of the
    live leaves only (`split`): over all leaves it brings back the whole backward pass. Adding the
    zero update turns a held -0.0 into 0.0: to keep every bit, apply updates to the live leaves.

    >>> tx = optimizer({"head": optax.sgd(1.0)}, {"body": "body", "head": "head"})
    >>> grads = {"body": np.ones(1), "head": np.ones(1)}
    >>> jax.tree.map(float, tx.update(jax.tree.map(lambda g: g[0], grads), tx.init(grads))[0])
    {'body': 0.0, 'head': -1.0}

    Raises:
        ValueError: a transform for a label that no leaf bears.
    """
    _known_labels(set(txs), labels, "txs")
    held = {name: optax.set_to_zero() for name in jax.tree.leaves(labels) if name not in txs}
    # As a function: optax calls labels that are callable, which an Equinox module of labels is.
    return optax.multi_transform({**txs, **held}, lambda _: labels)


def hold(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return a transform with the state of `tx` that leaves it untouched and gives zero updates.

    It stands in for `tx` while a label is held, so that its moments are there when it moves again.

    >>> tx = hold(optax.sgd(1.0, momentum=0.9))
    >>> updates, state = tx.update(np.float32(3.0), tx.init(np.float32(1.0)))
    >>> float(updates), float(state[0].trace)
    (0.0, 0.0)
    """

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        del params
        return optax.tree.zeros_like(updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def assert_held(before: PyTree, after: PyTree, mask: PyTree | None = None) -> None:
    """Raise unless the leaves of the mask are the same bit for bit.

    A NaN equals a NaN of the same bits; 0.0 and -0.0 differ.

    Args:
        before: tree of arrays.
        after: tree like `before`.
        mask: the held leaves; None takes all.

    Raises:
        ValueError: a held leaf changed in value, shape or dtype; or the structures differ.
    """
    check_structure(before, after, "after")
    held = jax.tree.map(lambda _: True, before) if mask is None else mask
    moved = changes(split(before, held)[0], split(after, held)[0])
    if moved:
        shown = listed([f"{name}: {change}" for name, change in moved.items()])
        raise ValueError(
            f"{len(moved)} of {sum(jax.tree.leaves(held))} held leaves changed: {shown}; "
            "hold them with `masks.optimizer`, and put no decay and no update after it"
        )


def _hole(node: Any) -> bool:
    return node is None


def _check_mask(tree: PyTree, mask: PyTree) -> None:
    check_structure(tree, mask, "mask")

    def fits(leaf: Any, keep: Any) -> bool:
        return leaf is None or isinstance(keep, bool | np.bool_)

    good = jax.tree.map(fits, tree, mask, is_leaf=_hole)
    wrong = [name for name, fit in zip(names(good), jax.tree.leaves(good), strict=True) if not fit]
    if wrong:
        raise ValueError(
            f"a mask holds True and False, and this one holds something else at {listed(wrong)}; "
            "make it with `masks.mask(labels, keep)`"
        )


def _known_labels(asked: set[str], labels: PyTree[str], what: str) -> set[str]:
    known = set(jax.tree.leaves(labels))
    unknown = sorted(asked - known)
    if unknown:
        raise ValueError(
            f"{what} names {unknown}, which no leaf bears; take some of the labels {sorted(known)}"
            f"{nearest(unknown[0], known)}"
        )
    return asked


_Rules = list[tuple[re.Pattern[str], str]]


def _compiled(rules: Iterable[Any]) -> _Rules:
    compiled = []
    for rule in rules:
        pair = isinstance(rule, tuple | list) and len(rule) == 2
        if not pair or not all(isinstance(part, str) for part in rule):
            raise ValueError(
                f"a rule is a pair (regex, label) of strings, and {rule!r} is given; "
                'write [("encoder/.*", "encoder"), ...]'
            )
        try:
            compiled.append((re.compile(rule[0]), rule[1]))
        except re.error as error:
            raise ValueError(
                f"rule {rule!r} is no regex: {error}; escape it with re.escape"
            ) from None
    return compiled


def _excused(rules: _Rules, optional: Iterable[str]) -> set[int]:
    patterns = [regex.pattern for regex, _ in rules]
    excused = {optional} if isinstance(optional, str) else set(optional)
    unknown = sorted(excused - set(patterns))
    if unknown:
        raise ValueError(
            f"optional names {unknown}, which is the regex of no rule; the rules are {patterns}; "
            "spell it as in the rule"
        )
    return {i for i, pattern in enumerate(patterns) if pattern in excused}


def _no_rule(bare: list[str], rules: _Rules) -> str:
    name = bare[0]
    inside = next((rx.pattern for rx, _ in rules if rx.pattern and rx.search(name)), None)
    if inside is not None:
        hint = f"{inside!r} matches only a part of {name!r}, and a rule must match all of it"
    else:
        near = difflib.get_close_matches(name, [rx.pattern for rx, _ in rules], n=1, cutoff=0.4)
        hint = f"the nearest rule is {near[0]!r}" if near else "no rule comes near"
    return (
        f"{len(bare)} leaves match no rule: {listed(bare)}; {hint}; "
        "add a rule for them, or end the rules with ('.*', LABEL)"
    )


def _no_leaf(idle: _Rules, rules: _Rules, leaves: Sequence[str], first: Sequence[int]) -> str:
    lines = []
    for regex, name in idle:
        taken = [i for leaf, i in zip(leaves, first, strict=True) if regex.fullmatch(leaf)]
        if taken:
            earlier = sorted({rules[i][0].pattern for i in taken})
            why = (
                f"its {len(taken)} leaves are taken by earlier rules {earlier}; move it before them"
            )
        else:
            why = f"matches no leaf; {nearest_leaves(regex.pattern, leaves)}"
        lines.append(f"\n  ({regex.pattern!r}, {name!r}) {why}")
    return (
        f"{len(idle)} of {len(rules)} rules label nothing:{''.join(lines)}\n"
        "correct or drop them; `optional=` names rules whose leaves may be absent"
    )
