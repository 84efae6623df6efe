"""Names and layouts: from a leaf of our trees to the tensor of a PyTorch checkpoint, and back.

Rules go in one direction, from our path to the torch name. Loading asks where each of our leaves
lies, export asks the same, so one table serves both. Layouts of kernels:

| layout | here | in PyTorch |
|---|---|---|
| "dense" | (in, out) | (out, in) |
| "conv", of 1 to 3 dimensions | (height, width, in, out) | (out, in, height, width) |
| "transposed_conv", also flipped | (height, width, in, out) | (in, out, height, width) |
| "same" | | as it is |
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

Rule = tuple[str, str, str]

LAYOUTS = ("same", "dense", "conv", "transposed_conv")

DEFAULT_RULES: tuple[Rule, ...] = (
    (r"(.*)/kernel", r"\1.weight", "dense"),
    (r"(.*)/(?:scale|embedding)", r"\1.weight", "same"),
    (r"(.*)/mean", r"\1.running_mean", "same"),
    (r"(.*)/var", r"\1.running_var", "same"),
    (r"(.*)", r"\1", "same"),
)


def torch_name(path: str, rules: Iterable[Rule] = ()) -> tuple[str, str]:
    r"""Return the torch name of the leaf at `path` and its layout; the first rule that fits wins.

    Args:
        path: our leaf, spelled `a/b/0/c`.
        rules: (regex for the whole path, template of the name, layout), tried before
            `DEFAULT_RULES`. What is left of `/` in the expanded template becomes `.`.

    Raises:
        ValueError: a rule has a layout that does not exist.

    >>> torch_name("encoder/layer/0/query/kernel")
    ('encoder.layer.0.query.weight', 'dense')
    >>> torch_name("stem/kernel", [("(.*)/kernel", r"\1.weight", "conv")])
    ('stem.weight', 'conv')
    """
    for pattern, template, layout in (*rules, *DEFAULT_RULES):
        match = re.fullmatch(pattern, path)
        if match:
            _fits(layout, 0)  # refuses a layout that does not exist
            return match.expand(template).replace("/", "."), layout
    raise AssertionError("the last default rule fits every path")


def normalise(name: str, aliases: Iterable[tuple[str, str]]) -> str:
    """Return a checkpoint name in one spelling: each (regex, replacement) is applied in turn.

    >>> normalise("bert.encoder.LayerNorm.gamma", [("^bert[.]", ""), ("[.]gamma$", ".weight")])
    'encoder.LayerNorm.weight'
    """
    for pattern, replacement in aliases:
        name = re.sub(pattern, replacement, name)
    return name


def to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    """Return a torch tensor in our layout.

    PyTorch's transposed convolution is the gradient of a convolution, `nn.ConvTranspose` (with
    `transpose_kernel=False`) a convolution of the spread-out input: the kernel is flipped. Where
    PyTorch has padding p, output padding q and kernel size k, the padding of Flax is
    `(k - 1 - p, k - 1 - p + q)`.

    >>> to_ours(np.zeros((8, 3, 5, 7)), "conv").shape
    (5, 7, 3, 8)
    >>> to_ours(np.arange(3.0).reshape(1, 1, 3), "transposed_conv").ravel().tolist()
    [2.0, 1.0, 0.0]
    """
    axes = _axes(layout, array.ndim)
    if axes is None:
        return array
    ours = array.transpose(axes)
    return np.ascontiguousarray(_flipped(ours) if layout == "transposed_conv" else ours)


def to_torch(array: np.ndarray, layout: str) -> np.ndarray:
    """Return an array of ours in torch's layout: the inverse of `to_ours`.

    >>> to_torch(np.zeros((5, 7, 3, 8)), "conv").shape
    (8, 3, 5, 7)
    """
    axes = _axes(layout, array.ndim)
    if axes is None:
        return array
    array = _flipped(array) if layout == "transposed_conv" else array
    return np.ascontiguousarray(array.transpose(np.argsort(axes)))


def shape_to_ours(shape: Sequence[int], layout: str) -> tuple[int, ...] | None:
    """Return the shape that `to_ours` would give, None where the rank does not fit the layout.

    >>> shape_to_ours((8, 3), "dense"), shape_to_ours((8,), "dense")
    ((3, 8), None)
    """
    if not _fits(layout, len(shape)):
        return None
    axes = _axes(layout, len(shape))
    return tuple(shape) if axes is None else tuple(shape[axis] for axis in axes)


def _fits(layout: str, rank: int) -> bool:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; there are {LAYOUTS}; correct the rule")
    return {"same": True, "dense": rank == 2}.get(layout, rank > 2)


def _flipped(kernel: np.ndarray) -> np.ndarray:
    return np.flip(kernel, tuple(range(kernel.ndim - 2)))


def _axes(layout: str, rank: int) -> tuple[int, ...] | None:
    if not _fits(layout, rank):
        raise ValueError(
            f"layout {layout!r} is for kernels of rank {'2' if layout == 'dense' else '3 and more'}"
            f", this array has rank {rank}; give the leaf a rule with another layout"
        )
    orders = {"same": None, "conv": (*range(2, rank), 1, 0), "dense": (1, 0)}
    return orders.get(layout, (*range(2, rank), 0, 1))
