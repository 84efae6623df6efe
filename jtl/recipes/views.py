"""Derived columns for a run: what depends on held parameters alone is computed once, then read.

A view of a dataset for a phase starts at the phase's border: its batches hold the activations there
in place of the raw input. All borders that a plan will need come out of one forward pass; a border is
computed anew only where a label below it has moved since.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jtl import data
from jtl.models.backbone import column, stage_labels
from jtl.models.model import Model

View = Callable[[frozenset[str], Any, Any], data.Dataset]


def make_view(
    model: Model,
    dataset: data.Dataset,
    plan_lives: Iterable[frozenset[str]],
    *,
    batch_size: int,
    budget: int,
    log: Callable[[str], None] = lambda _: None,
) -> View:
    """Return `view(live, params, stats) -> Dataset` for one dataset and one plan.

    Args:
        model: gives the borders and the prefix.
        dataset: raw batches.
        plan_lives: the live labels of every phase.
        batch_size: rows at a time while columns are computed.
        budget: bytes of columns that may be held in memory at once; beyond it a phase reads raw
            batches and `log` says so.
        log: takes a line for the user.
    """
    borders = sorted({model.border(live) for live in plan_lives} - {0})
    derived: dict[int, data.Dataset] = {}
    moved: set[str] = set()

    def fill(wanted: tuple[int, ...], params: Any, stats: Any) -> None:
        compute = jax.jit(lambda p, s, batch: model.prefix(p, s, batch, *wanted))

        def columns(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
            return compute(params, stats, batch)

        names = [column(border, model.backbone.module.blocks) for border in wanted]
        whole = data.derive(
            dataset, batch_size, columns, names=names, replace=True, budget_bytes=budget
        )
        if whole is None:
            log(f"columns at borders {list(wanted)} exceed {budget / 2**20:.0f} MiB: read raw")
            return
        derived.update(
            {border: whole.only(name) for border, name in zip(wanted, names, strict=True)}
        )

    def view(live: frozenset[str], params: Any, stats: Any) -> data.Dataset:
        border = model.border(live)
        prefix = set(stage_labels(model.backbone.module.blocks)[:border])
        stale = bool(prefix & moved)
        moved.update(live)
        if border == 0:
            return dataset
        if stale:
            derived.pop(border, None)
            fill((border,), params, stats)
        elif border not in derived:
            fill(tuple(k for k in borders if k >= border or k not in derived), params, stats)
        return derived.get(border, dataset)

    return view
