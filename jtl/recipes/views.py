"""Derived columns for a run: what depends on held parameters alone is computed once, then read.

A view of a dataset for a phase starts at the phase's border: its batches hold the activations
there in place of the raw input. All borders that a plan will need come out of one forward pass; a
column is dropped as soon as a label below it moves.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jtl import data
from jtl.models.backbone import column, stage_labels
from jtl.models.model import Model

View = Callable[[frozenset[str], Any, Any], data.Dataset]

_LOG = logging.getLogger(__name__)


def make_view(
    model: Model,
    dataset: data.Dataset,
    lives: Iterable[frozenset[str]],
    *,
    batch_size: int,
    budget_bytes: int,
) -> View:
    """Return `view(live, params, stats) -> Dataset` of one dataset for the phases of a plan.

    The numbers are those of the plain path, to rounding, in the same batches.

    Args:
        model: gives the borders and what lies there.
        dataset: raw columns.
        lives: the live labels of every phase.
        batch_size: rows at a time while columns are computed.
        budget_bytes: of columns in memory at once; where they need more, a phase reads raw columns
            and the log says so.
    """
    blocks = model.backbone.module.blocks
    labels = stage_labels(blocks)
    borders = sorted({model.border(live) for live in lives} - {0})
    derived: dict[int, data.Dataset] = {}
    refused: set[int] = set()

    def fill(wanted: tuple[int, ...], params: Any, stats: Any) -> bool:
        compute = jax.jit(lambda p, s, batch: model.prefix(p, s, batch, *wanted))

        def columns(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
            return compute(params, stats, batch)

        names = [column(border, blocks) for border in wanted]
        whole = data.derive(dataset, batch_size, columns, names=names, budget_bytes=budget_bytes)
        if whole is None:
            return False
        for border, name in zip(wanted, names, strict=True):
            derived[border] = whole.only(name, *dataset.derived)
        return True

    def view(live: frozenset[str], params: Any, stats: Any) -> data.Dataset:
        for border in [k for k in derived if live & set(labels[:k])]:
            del derived[border]
        border = model.border(live)
        if border and border not in derived and border not in refused:
            steady = (k for k in borders if k not in derived and not live & set(labels[:k]))
            wanted = tuple(sorted({border, *steady}))
            if not fill(wanted, params, stats) and not fill((border,), params, stats):
                refused.add(border)
                _LOG.warning(
                    "%s: the column at border %d needs more than %.0f MiB; raw batches are read",
                    *(dataset.name, border, budget_bytes / 2**20),
                )
        return derived.get(border, dataset)

    return view
