"""`python -m jtl.show NAME`: what a checkpoint holds. Source, inputs, groups in depth order, tree.

python -m jtl.show google-bert/bert-base-uncased
python -m jtl.show google-bert/bert-base-uncased --full
python -m jtl.show google-bert/bert-base-uncased --group block_3
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jtl.report import layout, readable, screen, tables

_WORD = 10
_NORMALISATION = ("image_mean", "image_std")


def overview(backbone: Any) -> list[tuple[str, str]]:
    """Return what a `Backbone` is, as (word, text) pairs."""
    report = backbone.report
    lists = {} if report is None else report._asdict()
    counts = {name: len(names) for name, names in lists.items()}
    others = [name for name in backbone.family.poolings if name != backbone.pooling]
    also = f"; also {', '.join(others)}" if others else ""
    return [
        ("source", backbone.source),
        ("family", f"{backbone.family.model_type}, {backbone.module.blocks} blocks"),
        ("weights", tables.loaded(counts) if counts else "random"),
        ("inputs", describe(backbone.inputs)),
        ("features", f"{backbone.pooling}, width {backbone.dim}{also}"),
    ]


def describe(inputs: Any) -> str:
    """Return the fields of an input spec in one line.

    Of an object in it the name of its type is written, and the mean and deviation of images.

    >>> describe(None)
    'none: batches are made by hand'
    """
    if inputs is None:
        return "none: batches are made by hand"
    name = type(inputs).__name__
    if not dataclasses.is_dataclass(inputs):
        return name
    values = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    simple = str | bool | int | float | tuple | list | None
    shown = [
        f"{key} {value if isinstance(value, simple) else type(value).__name__}"
        for key, value in values.items()
    ]
    for value in values.values():
        shown += [f"{key} {getattr(value, key)}" for key in _NORMALISATION if hasattr(value, key)]
    return f"{name}: {', '.join(shown)}"


def show(backbone: Any, *, full: bool = False, group: str | None = None, out: Any = None) -> None:
    """Print a backbone, or the leaves of one of its groups.

    Args:
        backbone: of `jtl.load_backbone`.
        full: write every branch of the tree, also those that are alike.
        group: print the leaves of this group alone.
        out: a `rich` console; None writes to standard output.

    Raises:
        ValueError: there is no such group.
    """
    from jtl import masks
    from jtl.models.backbone import UNUSED

    out = screen.make_console() if out is None else out
    optional = [regex for regex, label in backbone.groups if label == UNUSED]
    labels = masks.label(backbone.params, backbone.groups, optional=optional)
    if group is not None:
        screen.draw(out, layout.leaf_table(backbone.params, labels, group))
        return
    for word, text in overview(backbone):
        screen.say(out, f"{word:{_WORD}}{text}")
    order = backbone.labels
    screen.draw(out, layout.group_table(backbone.params, labels, order), strong=("all",))
    _draw_tree(layout.tree_lines(backbone.params, labels, full=full), out)
    if backbone.stats:
        number = len(masks.names(backbone.stats))
        screen.say(out, f"beside them {readable.plural(number, 'running statistic')}")


def _draw_tree(lines: Sequence[layout.Line], out: Any) -> None:
    names = ["  " * line.depth + line.name for line in lines]
    left, right = (max(map(len, words)) + 2 for words in (names, [line.label for line in lines]))
    for name, line in zip(names, lines, strict=True):
        screen.say(out, f"{name:{left}}{line.label:{right}}{line.leaves}".rstrip())


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, load, print; a bad name ends with its error in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m jtl.show", description="Show what a pretrained checkpoint holds."
    )
    parser.add_argument("name", help="a folder, package:IMPORTNAME/path, or a hub id")
    parser.add_argument("--full", action="store_true", help="write every branch of the tree")
    parser.add_argument("--group", help="the leaves of one group only, such as block_3")
    parser.add_argument("--pooling", help="how the features are pooled")
    given = parser.parse_args(arguments)
    from jtl.models.load import load_backbone

    try:
        backbone = load_backbone(given.name, pooling=given.pooling)
        show(backbone, full=given.full, group=given.group)
    except ValueError as error:
        sys.exit(f"jtl: {error}")


if __name__ == "__main__":
    main()
