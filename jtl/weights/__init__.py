"""Checkpoint files and trees: where they lie, how they are read, renamed, reported and written."""

from jtl.weights.checkpoint import Checkpoint, Tensor
from jtl.weights.files import read
from jtl.weights.hub import locate
from jtl.weights.layouts import joined, mapped, nested, renamed, split, united
from jtl.weights.load import fill
from jtl.weights.rename import DEFAULT_RULES, to_ours, to_torch, torch_name
from jtl.weights.report import LoadReport, check, counts, text
from jtl.weights.save import write
from jtl.weights.tree import from_tree

__all__ = [
    "DEFAULT_RULES",
    "Checkpoint",
    "LoadReport",
    "Tensor",
    "check",
    "counts",
    "fill",
    "from_tree",
    "joined",
    "locate",
    "mapped",
    "nested",
    "read",
    "renamed",
    "split",
    "text",
    "to_ours",
    "to_torch",
    "torch_name",
    "united",
    "write",
]
