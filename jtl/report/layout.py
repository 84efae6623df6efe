"""A tree of parameters as lines of text, and as tables by group."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jtl.report import readable, tables


class Line(NamedTuple):
    """A branch of a tree.

    Attributes:
        depth: of the branch.
        name: of the branch; branches without siblings are joined, `a/b`.
        leaves: its leaves with their shapes, where it has no more branches.
        label: of all leaves of the branch, "" where the line above says it or they differ.
    """

    depth: int
    name: str
    leaves: str
    label: str


def group_table(params: Any, labels: Any, order: Sequence[str]) -> tables.Table:
    """Return leaves, parameters and their share of each group, and the total.

    Args:
        params: tree of arrays.
        labels: tree of labels.
        order: labels from stem to top; others come after them.

    >>> import numpy as np
    >>> group_table({"a": np.zeros(3), "b": np.zeros(1)}, {"a": "x", "b": "y"}, ["y", "x"]).rows
    (('y', '1', '1', '25.0 %'), ('x', '1', '3', '75.0 %'), ('all', '2', '4', '100.0 %'))
    """
    from jtl import masks

    counts = masks.count(params, labels)
    total = sum(count.parameters for count in counts.values())
    leaves = sum(count.leaves for count in counts.values())
    sizes = [(label, *counts[label]) for label in readable.in_order(counts, order)]
    rows = tuple(
        (label, readable.count(n), readable.count(size), f"{100 * size / max(total, 1):.1f} %")
        for label, n, size in [*sizes, ("all", leaves, total)]
    )
    return tables.Table(("group", "leaves", "parameters", "share"), rows)


def leaf_table(params: Any, labels: Any, group: str) -> tables.Table:
    """Return the leaves of a group: name, shape, type, parameters.

    Raises:
        ValueError: no leaf bears the label.

    >>> import numpy as np
    >>> leaf_table({"a": np.zeros((3, 2))}, {"a": "stem"}, "stem").rows
    (('a', '(3, 2)', 'float64', '6'),)
    """
    import jax

    from jtl import masks

    named = zip(masks.names(params), jax.tree.leaves(params), jax.tree.leaves(labels), strict=True)
    found = [(name, leaf) for name, leaf, label in named if label == group]
    if not found:
        known = readable.in_order(set(jax.tree.leaves(labels)), ())
        raise ValueError(f"no leaf is of the group {group!r}; there are {known}; name one of them")
    rows = tuple(
        (name, str(tuple(leaf.shape)), str(leaf.dtype), readable.count(leaf.size))
        for name, leaf in found
    )
    return tables.Table((f"{group}: leaf", "shape", "type", "parameters"), rows)


def tree_lines(
    params: Mapping[str, Any], labels: Mapping[str, Any], *, full: bool = False
) -> list[Line]:
    """Return a tree of nested dicts line by line; neighbours that are alike stand as one.

    Alike are branches whose names differ in a number only and whose leaves have the same names and
    shapes. Types other than float32 are written behind the shape.

    Args:
        params: tree of arrays.
        labels: tree of labels.
        full: write every branch.

    >>> import numpy as np
    >>> layers = {"0": {"bias": np.zeros(2, "f4")}, "1": {"bias": np.zeros(2, "f4")}}
    >>> labels = {"0": {"bias": "block_0"}, "1": {"bias": "block_1"}}
    >>> tree_lines({"layer": layers}, {"layer": labels})[0]
    Line(depth=0, name='layer/(0, 1)', leaves='bias (2,)', label='block_0, block_1')
    """
    return list(_lines(params, [labels], 0, full, ""))


def _lines(
    tree: Mapping[str, Any], labels: list[Any], depth: int, full: bool, above: str
) -> Iterator[Line]:
    """Yield the branches of a tree; `labels` are those of all trees that it stands for."""
    leaves = {name: leaf for name, leaf in tree.items() if not isinstance(leaf, Mapping)}
    if leaves and len(leaves) < len(tree):
        yield Line(depth, ".", _shapes_line(leaves), "")
    for names in _alike({name: tree[name] for name in tree if name not in leaves}, full):
        first, own = tree[names[0]], [label[name] for label in labels for name in names]
        path = [_run(names)]
        while len(below := _alike(first, full)) == 1 and _branches(first):
            path.append(_run(below[0]))
            first, own = first[below[0][0]], [label[name] for label in own for name in below[0]]
        label = _label(own)
        shapes = "" if _branches(first) else _shapes_line(first)
        yield Line(depth, "/".join(path), shapes, "" if label == above else label)
        if _branches(first):
            yield from _lines(first, own, depth + 1, full, label)


def _alike(tree: Mapping[str, Any], full: bool) -> list[list[str]]:
    """Return the names in a tree, those together that are alike and follow each other."""
    runs: list[list[str]] = []
    for name in sorted(tree, key=_natural):
        if runs and not full and _same(runs[-1][-1], name, tree):
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def _same(one: str, other: str, tree: Mapping[str, Any]) -> bool:
    if not (isinstance(tree[one], Mapping) and isinstance(tree[other], Mapping)):
        return False
    names = (re.sub(r"\d+", "#", name) for name in (one, other))
    return len(set(names)) == 1 and _shapes(tree[one]) == _shapes(tree[other])


def _shapes(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _shapes(branch) for name, branch in tree.items()}
    return tuple(tree.shape), str(tree.dtype)


def _branches(tree: Mapping[str, Any]) -> bool:
    return any(isinstance(branch, Mapping) for branch in tree.values())


def _shapes_line(leaves: Mapping[str, Any]) -> str:
    def one(name: str) -> str:
        kind = str(leaves[name].dtype)
        return f"{name} {tuple(leaves[name].shape)}" + ("" if kind == "float32" else f" {kind}")

    return "  ".join(one(name) for name in sorted(leaves, key=lambda n: (n == "bias", n)))


def _label(trees: list[Any]) -> str:
    """Return the labels of trees of labels if each has but one, else ""."""
    found = [set(_leaves(tree)) for tree in trees]
    if any(len(labels) != 1 for labels in found):
        return ""
    return readable.spans(readable.in_order(set().union(*found), ()))


def _leaves(labels: Any) -> Iterator[str]:
    if isinstance(labels, Mapping):
        for branch in labels.values():
            yield from _leaves(branch)
    else:
        yield labels


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _run(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"({names[0]}, {names[1]})" if len(names) == 2 else f"({names[0]} .. {names[-1]})"
