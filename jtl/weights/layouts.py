r"""Published layouts of other projects, made into one: transforms of a `Checkpoint`, all lazy.

Each function takes a checkpoint and returns one under other names; no tensor is read before it is
asked for. They chain, so that one table of names serves every project that published the same
architecture. Patterns are regexes for the whole name, templates may use their groups. A pattern
that fits no name changes nothing: what is missing then is seen in the report of `fill`. timm's ViT:

    parts = (r"\1.query.\2", r"\1.key.\2", r"\1.value.\2")
    checkpoint = split(checkpoint, r"(.*)\.qkv\.(.*)", parts)
    checkpoint = renamed(checkpoint, [(r"blocks\.(\d+)\.norm1\.(.*)", r"layer.\1.before.\2")])
"""

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jtl.weights.checkpoint import Checkpoint, Tensor

Template = str | Callable[[re.Match[str]], str]
_Entry = tuple[Tensor, Callable[[], np.ndarray]]


def renamed(checkpoint: Checkpoint, rules: Iterable[tuple[str, Template | None]]) -> Checkpoint:
    r"""Return the checkpoint under other names.

    Args:
        checkpoint: of `weights.read`.
        rules: (regex for the whole name, template, or a function of the match, or None). The first
            rule that fits wins; None leaves the name out and lists it in `ignored`; a name that no
            rule fits stays as it is.

    Raises:
        ValueError: two tensors would have one name.

    >>> from jtl.weights.tree import from_tree
    >>> both = from_tree({"blocks.0.w": np.ones(2), "mask": np.zeros(1)})
    >>> new = renamed(both, [(r"blocks\.(\d+)\.w", r"layer.\1.weight"), ("mask", None)])
    >>> list(new.names), new.ignored, new.get("layer.0.weight").tolist()
    (['layer.0.weight'], ('mask',), [1.0, 1.0])
    """
    table = [(re.compile(pattern), template) for pattern, template in rules]
    pairs, ignored = [], []
    for name in checkpoint.names:
        new = _new_name(name, table)
        if new is None:
            ignored.append(name)
        else:
            pairs.append((new, name, _entry(checkpoint, name)))
    return _made(checkpoint, pairs, ignored)


def nested(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """Return the part below a prefix, which its names lose; the others are listed in `ignored`.

    Raises:
        ValueError: no name begins with the prefix.

    >>> from jtl.weights.tree import from_tree
    >>> both = from_tree({"visual.proj": np.ones(2), "logit_scale": np.zeros(1)})
    >>> list(nested(both, "visual.").names), nested(both, "visual.").ignored
    (['proj'], ('logit_scale',))
    """
    below = [name for name in checkpoint.names if name.startswith(prefix)]
    if not below:
        tops = sorted({re.split("[./]", name)[0] for name in checkpoint.names})
        raise ValueError(
            f"no name of {str(checkpoint.folder)!r} begins with {prefix!r}; the names begin with "
            f"{tops[:12]}; correct the prefix"
        )
    pairs = [(name.removeprefix(prefix), name, _entry(checkpoint, name)) for name in below]
    others = [name for name in checkpoint.names if not name.startswith(prefix)]
    return _made(checkpoint, pairs, others)


def united(*checkpoints: Checkpoint) -> Checkpoint:
    """Return checkpoints as one, with the config and the folder of the first.

    It is for a model whose parts were published apart, such as a trained head and what it stands
    on; `renamed` and `nested` give each part the names of the whole beforehand.

    Raises:
        ValueError: there is none, they are of different layouts, or two of them have one name.

    >>> from jtl.weights.tree import from_tree
    >>> body, head = from_tree({"body": np.ones(2)}), from_tree({"head": np.zeros(1)})
    >>> whole = united(body, head)
    >>> list(whole.names), whole.get("head").tolist()
    (['body', 'head'], [0.0])
    """
    layouts = sorted({checkpoint.layout for checkpoint in checkpoints})
    if len(layouts) != 1:
        raise ValueError(
            f"{len(checkpoints)} checkpoints of the layouts {layouts} are to be one; the names and "
            "kernels of a checkpoint are of one layout; give one or more files of the same"
        )
    owners: dict[str, Checkpoint] = {}
    for checkpoint in checkpoints:
        twice = sorted(set(checkpoint.names) & set(owners))
        if twice:
            folders = [str(owner.folder) for owner in (owners[twice[0]], checkpoint)]
            raise ValueError(
                f"{len(twice)} names stand in both {folders}: {twice[:6]}; say by renamed which "
                "of them is left out"
            )
        owners.update(dict.fromkeys(checkpoint.names, checkpoint))
    return checkpoints[0]._replace(
        names={name: owner.names[name] for name, owner in owners.items()},
        get=lambda name: owners[name].get(name),
        ignored=tuple(name for checkpoint in checkpoints for name in checkpoint.ignored),
    )


def split(
    checkpoint: Checkpoint,
    pattern: str,
    names: Sequence[str],
    axis: int = 0,
    *,
    sizes: Sequence[int] | None = None,
) -> Checkpoint:
    r"""Return the checkpoint with each fused tensor cut into parts.

    Args:
        checkpoint: of `weights.read`.
        pattern: of the fused tensors' names.
        names: one template for each part, in the order in which they lie along the axis.
        axis: along which they lie; -1 serves a kernel `(in, out)` and its bias at once.
        sizes: of the parts along the axis; None cuts equal ones.

    Raises:
        ValueError: the axis does not have that size, or two tensors would have one name.

    >>> from jtl.weights.tree import from_tree
    >>> fused = from_tree({"attn.qkv.bias": np.arange(6)})
    >>> parts = split(fused, r"(.*)\.qkv\.(.*)", (r"\1.q.\2", r"\1.k.\2", r"\1.v.\2"))
    >>> {name: parts.get(name).tolist() for name in parts.names}
    {'attn.q.bias': [0, 1], 'attn.k.bias': [2, 3], 'attn.v.bias': [4, 5]}
    """
    pairs = []
    for name, tensor in checkpoint.names.items():
        match = re.fullmatch(pattern, name)
        if not match:
            pairs.append((name, name, _entry(checkpoint, name)))
            continue
        start = 0
        for template, size in zip(names, _sizes(name, tensor, axis, names, sizes), strict=True):
            part = _part(checkpoint, name, axis, start, size)
            pairs.append((match.expand(template), name, part))
            start += size
    return _made(checkpoint, pairs)


def joined(checkpoint: Checkpoint, patterns: Sequence[str], name: str, axis: int = 0) -> Checkpoint:
    r"""Return the checkpoint with parts put together: the inverse of `split`.

    Args:
        checkpoint: of `weights.read`.
        patterns: one for each part, in the order in which they shall lie along the axis.
        name: the template of the whole; the parts for which it gives one name belong together.
        axis: along which they shall lie.

    Raises:
        ValueError: a part is missing, parts do not fit together, or a name would stand twice.

    >>> from jtl.weights.tree import from_tree
    >>> parts = from_tree({"a.up": np.ones((1, 2)), "a.gate": np.zeros((2, 2))})
    >>> whole = joined(parts, (r"(.*)\.gate", r"(.*)\.up"), r"\1.both")
    >>> whole.names["a.both"].shape, whole.get("a.both").tolist()
    ((3, 2), [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    """
    groups: dict[str, dict[int, str]] = {}
    pairs = []
    for part in checkpoint.names:
        fits = ((i, re.fullmatch(pattern, part)) for i, pattern in enumerate(patterns))
        place, match = next(((i, match) for i, match in fits if match), (0, None))
        if match is None:
            pairs.append((part, part, _entry(checkpoint, part)))
        else:
            groups.setdefault(match.expand(name), {})[place] = part
    for whole, places in groups.items():
        lacking = [patterns[i] for i in range(len(patterns)) if i not in places]
        if lacking:
            raise ValueError(
                f"{whole!r} is to be joined from {len(patterns)} parts; the checkpoint has "
                f"{sorted(places.values())} and nothing that fits {lacking}; correct the patterns"
            )
        parts = [places[i] for i in range(len(patterns))]
        pairs.append((whole, " + ".join(parts), _whole(checkpoint, whole, parts, axis)))
    return _made(checkpoint, pairs)


def mapped(
    checkpoint: Checkpoint,
    pattern: str,
    function: Callable[[np.ndarray], np.ndarray],
    *,
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None,
) -> Checkpoint:
    """Return the checkpoint with a function applied to each tensor whose name fits.

    Args:
        checkpoint: of `weights.read`.
        pattern: of the names.
        function: from the stored array to the one wanted, of the same dtype: a flip, a reshape, a
            sum over an axis. It runs when the tensor is read.
        shape: from the stored shape to that of the result; None says that it stays.

    Raises:
        ValueError: on reading, where the result has another shape than was said.

    >>> from jtl.weights.tree import from_tree
    >>> stored = from_tree({"conv": np.arange(4).reshape(2, 2)})
    >>> summed = mapped(stored, "conv", lambda x: x.sum(0), shape=lambda s: s[1:])
    >>> summed.names["conv"].shape, summed.get("conv").tolist()
    ((2,), [2, 4])
    """
    pairs = []
    for name, tensor in checkpoint.names.items():
        entry = _entry(checkpoint, name)
        if re.fullmatch(pattern, name):
            wanted = tuple(shape(tensor.shape)) if shape else tensor.shape
            entry = _applied(checkpoint, name, function, wanted)
        pairs.append((name, name, entry))
    return _made(checkpoint, pairs)


def _made(
    checkpoint: Checkpoint,
    pairs: Iterable[tuple[str, str, _Entry]],
    ignored: Iterable[str] = (),
) -> Checkpoint:
    """Return the checkpoint of (new name, where it comes from, entry), no new name twice."""
    entries: dict[str, _Entry] = {}
    origins: dict[str, str] = {}
    for new, origin, entry in pairs:
        if new in entries:
            raise ValueError(
                f"{origins[new]!r} and {origin!r} of {str(checkpoint.folder)!r} would both be "
                f"named {new!r}; correct the rules so that each tensor has a name of its own"
            )
        entries[new], origins[new] = entry, origin
    return checkpoint._replace(
        names={name: tensor for name, (tensor, _) in entries.items()},
        get=lambda name: entries[name][1](),
        ignored=(*checkpoint.ignored, *ignored),
    )


def _entry(checkpoint: Checkpoint, name: str) -> _Entry:
    return checkpoint.names[name], lambda: checkpoint.get(name)


def _new_name(name: str, table: Iterable[tuple[re.Pattern[str], Template | None]]) -> str | None:
    for pattern, template in table:
        match = pattern.fullmatch(name)
        if match:
            if template is None:
                return None
            return match.expand(template) if isinstance(template, str) else template(match)
    return name


def _sizes(
    name: str, tensor: Tensor, axis: int, names: Sequence[str], sizes: Sequence[int] | None
) -> Sequence[int]:
    shape, parts = tensor.shape, len(names)
    there = shape[axis] if -len(shape) <= axis < len(shape) else 0
    sizes = [there // parts] * parts if sizes is None else sizes
    if len(sizes) != parts or sum(sizes) != there or there == 0:
        raise ValueError(
            f"{name!r} cannot be split into {parts} parts of sizes {list(sizes)} along axis "
            f"{axis}: its shape is {shape}; correct the pattern, the names or the sizes"
        )
    return sizes


def _part(checkpoint: Checkpoint, name: str, axis: int, start: int, size: int) -> _Entry:
    shape, dtype = checkpoint.names[name]
    axis %= len(shape)
    cut = (*(slice(None),) * axis, slice(start, start + size))
    new = (*shape[:axis], size, *shape[axis + 1 :])
    # A copy, since a view would keep the whole fused tensor in memory.
    return Tensor(new, dtype), lambda: checkpoint.get(name)[cut].copy()


def _whole(checkpoint: Checkpoint, whole: str, parts: Sequence[str], axis: int) -> _Entry:
    tensors = [checkpoint.names[part] for part in parts]
    shapes, dtypes = [t.shape for t in tensors], {t.dtype for t in tensors}
    rank = len(shapes[0])
    fits = -rank <= axis < rank and len(dtypes) == 1
    others = {(*s[: axis % rank], *s[axis % rank + 1 :]) for s in shapes} if fits else set()
    if len(others) != 1 or {len(s) for s in shapes} != {rank}:
        raise ValueError(
            f"{whole!r} cannot be joined along axis {axis}: its parts are "
            f"{dict(zip(parts, tensors, strict=True))}; correct the patterns or the axis"
        )
    axis %= rank
    total = sum(s[axis] for s in shapes)
    new = Tensor((*shapes[0][:axis], total, *shapes[0][axis + 1 :]), tensors[0].dtype)
    return new, lambda: np.concatenate([checkpoint.get(part) for part in parts], axis)


def _applied(
    checkpoint: Checkpoint,
    name: str,
    function: Callable[[np.ndarray], np.ndarray],
    wanted: tuple[int, ...],
) -> _Entry:
    tensor = Tensor(wanted, checkpoint.names[name].dtype)

    def get() -> np.ndarray:
        result = np.asarray(function(checkpoint.get(name)), tensor.dtype)
        if result.shape != wanted:
            raise ValueError(
                f"the function for {name!r} gives shape {result.shape} and was said to give "
                f"{wanted}; correct the shape= that stands beside it"
            )
        return result

    return tensor, get
