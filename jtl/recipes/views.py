"""Derived columns for a run: what depends on held parameters alone is computed once, then read.

A view of a dataset for a phase starts at the phase's border: its batches hold the activations
there in place of the raw input. All borders that a plan will need come out of one forward pass; a
column is dropped as soon as a label below it moves.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl import data
from jtl.data import fingerprint
from jtl.data.dataset import without_raw
from jtl.models.backbone import beside, column, stage_labels
from jtl.models.model import Model
from jtl.recipes.identity import computed

Shapes = dict[str, Any]  # of jax.ShapeDtypeStruct

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A dataset as the phases of a plan read it; see `make_view`.

    Attributes:
        model: gives the borders and what lies there.
        dataset: raw columns.
        borders: those of the plan, in the order of its phases.
        rows: of a batch while columns are computed.
        store: budgets and folder of the columns.
        progress: called with the rows done so far and all rows.
        derived: the dataset at each border that is ready, the raw one where no budget suffices;
            filled by use.
    """

    model: Model
    dataset: data.Dataset
    borders: tuple[int, ...]
    rows: int
    store: data.Store
    progress: Callable[[int, int], None] | None = None
    derived: dict[int, data.Dataset] = dataclasses.field(default_factory=dict)

    def __call__(self, live: frozenset[str], params: Any, stats: Any) -> data.Dataset:
        """Return the dataset for a phase with these live labels; computes what it lacks."""
        for border in [k for k in self.derived if not self._held(k, live)]:
            del self.derived[border]
        border = self._border(live)
        if border and border not in self.derived:
            others = [k for k in self.borders if k not in self.derived and self._held(k, live)]
            _fill(self, [border, *(k for k in others if k != border)], params, stats)
        return self.derived.get(border, self.dataset)

    def shapes(self, live: frozenset[str], size: int) -> tuple[Shapes, ...]:
        """Return the batches of `size` rows that a phase with these live labels will read.

        One for each bucket, with label, mask and index, so that its step can be compiled before it
        begins. Nothing is computed.
        """
        border = self._border(live)
        ready = self.derived.get(border, None if border else self.dataset)
        if ready is not None:
            return tuple(data.batch_shapes(ready, size))
        batches, name = data.batch_shapes(self.dataset, size), _name(self.model, border)
        free = dataclasses.replace(self.store, arrays=[])  # the columns of the phase before will go
        if not data.fitting(free, _sizes(self, [border])):
            return tuple(batches)
        columns = _columns(self.model, batches, [border])
        pairs = zip(batches, columns, strict=True)
        return tuple(_started(self, batch, found, name) for batch, found in pairs)

    def account(self) -> dict[str, float]:
        """Return what the columns cost so far: "derive_seconds", "reused" and MiB in use."""
        return self.store.account()

    def _border(self, live: frozenset[str]) -> int:
        return self.model.border(live) if self.dataset.steady else 0

    def _held(self, border: int, live: frozenset[str]) -> bool:
        return not live & set(stage_labels(self.model.backbone.module.blocks)[:border])


def make_view(
    model: Model,
    dataset: data.Dataset,
    lives: Iterable[frozenset[str]],
    *,
    batch_size: int,
    store: data.Store | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> View:
    """Return `view(live, params, stats) -> Dataset` of one dataset for the phases of a plan.

    The numbers are those of the plain path, to rounding, in the same batches, wherever the columns
    lie. An augmented dataset is read raw in every phase.

    Args:
        model: gives the borders and what lies there.
        dataset: raw columns.
        lives: the live labels of every phase.
        batch_size: rows at a time while columns are computed.
        store: of this view alone: its memory and, beyond it, its folder, where later runs find what
            was computed. Where a phase's column fits in neither, the phase reads raw columns and
            the log says so. None is memory alone, and so are several processes.
        progress: called with the rows done so far and all rows, while columns are computed.
    """
    store = store or data.Store()
    if jax.process_count() > 1:  # all must take the same path, and their folders may differ
        store = dataclasses.replace(store, disk_bytes=0)
    borders = tuple(dict.fromkeys(border for live in lives if (border := model.border(live))))
    return View(model, dataset, borders, batch_size, store, progress)


def together(
    views: Sequence[View], live: frozenset[str], params: Any, stats: Any
) -> list[data.Dataset]:
    """Return the datasets of a phase whose rows share batches: all start at one border.

    Where one of them has no room for the column there, all are read raw.
    """
    found: dict[int, data.Dataset] = {}
    for i in sorted(
        range(len(views)), key=lambda i: (views[i].dataset.steady, views[i].dataset.size)
    ):
        found[i] = views[i](live, params, stats)
        if views[i].model.border(live) and found[i] is views[i].dataset:
            return [view.dataset for view in views]
    return [found[i] for i in range(len(views))]


def shapes_together(views: Sequence[View], live: frozenset[str], size: int) -> tuple[Shapes, ...]:
    """Return the batches of `size` rows that come from these views, as `View.shapes` does."""
    found = [view.shapes(live, size) for view in views]
    if len(views) == 1:
        return found[0]
    border = views[0].model.border(live)
    name = _name(views[0].model, border) if border else None
    if name is not None and not all(name in batches[0] for batches in found):
        found = [tuple(data.batch_shapes(view.dataset, size)) for view in views]
    return tuple(data.mixed_shapes([view.dataset for view in views], found, size))


def _started(view: View, batch: Shapes, columns: Shapes, name: str) -> Shapes:
    """Return the shapes of a batch that starts at a column, as `Dataset.only` leaves it."""
    names, kept = (name, *view.dataset.derived), beside(view.model.backbone.module)
    start = without_raw({**batch, **columns}, names, kept)
    return {**start, **{kept: batch[kept] for kept in ("label", "mask", "index")}}


def _fill(view: View, wanted: list[int], params: Any, stats: Any) -> None:
    """Find or compute the column at the first border, and those at the others that fit too."""
    dataset, store, border = view.dataset, view.store, wanted[0]
    names = {k: _name(view.model, k) for k in wanted}
    keys = _keys(view, wanted, params, stats) if store.disk_bytes > 0 else {}
    found = data.stored(dataset, keys, store)
    sizes = _sizes(view, [k for k in wanted if names[k] not in found.derived])
    if border in sizes and not data.fitting(store, {border: sizes[border]}):
        view.derived.clear()  # columns for later phases make room
    chosen = list(data.fitting(store, sizes))
    if border in sizes and border not in chosen:
        _refuse(view, border, sizes[border])
        chosen = []
    ready = {k: found for k in wanted if names[k] in found.derived}
    while chosen:
        whole = _derived(view, chosen, keys, params, stats)
        if whole is not None:
            ready |= dict.fromkeys(chosen, whole)
        chosen = chosen[:1] if whole is None and len(chosen) > 1 else []
    for k, whole in ready.items():
        kept = beside(view.model.backbone.module)
        view.derived[k] = whole.only(names[k], *dataset.derived, beside=kept)
    view.derived.setdefault(border, dataset)


def _derived(
    view: View, borders: list[int], keys: Mapping[str, str], params: Any, stats: Any
) -> data.Dataset | None:
    """Compute the columns at these borders in one forward pass over the raw dataset."""
    compute = jax.jit(lambda p, s, batch: view.model.prefix(p, s, batch, *borders))
    return data.derive(
        view.dataset,
        view.rows,
        lambda batch: compute(params, stats, batch),
        names=[_name(view.model, border) for border in borders],
        store=view.store,
        keys=keys,
        progress=view.progress,
    )


def _keys(view: View, borders: list[int], params: Any, stats: Any) -> dict[str, str]:
    """Return the fingerprint of each column: of the data and of all stages below, one by one."""
    model, dataset = view.model, view.dataset
    if dataset.contents is None:
        return {}
    params, stats = jax.tree.map(jnp.asarray, (params, stats))
    raw = data.row_shapes(dataset, view.rows)[0]  # the lengths of the others are in the contents
    here, key, found = raw, fingerprint(dataset.contents, view.rows), {}
    for border in range(1, max(borders) + 1):
        made, shapes = computed(lambda b, k=border: model.prefix(params, stats, b, k), here)
        key, here = fingerprint(key, made), {**raw, **shapes}
        found[border] = key
    return {_name(model, border): found[border] for border in borders}


def _sizes(view: View, borders: list[int]) -> dict[int, int]:
    """Return the bytes of the column at each border."""
    rows = [count for count in np.bincount(view.dataset.bucket).tolist() if count]
    found = _columns(view.model, data.row_shapes(view.dataset, view.rows), borders)
    return {
        border: data.column_bytes(
            ((count, *shapes[name].shape[1:]), shapes[name].dtype)
            for count, shapes in zip(rows, found, strict=True)
        )
        for border in borders
        for name in [_name(view.model, border)]
    }


def _columns(model: Model, raw: Iterable[Shapes], borders: list[int]) -> list[Shapes]:
    """Return the shapes of the columns at these borders, for the raw batches of each bucket."""
    params, stats = model.params, model.stats
    return [jax.eval_shape(lambda b: model.prefix(params, stats, b, *borders), b) for b in raw]


def _name(model: Model, border: int) -> str:
    return column(border, model.backbone.module.blocks)


def _refuse(view: View, border: int, needed: int) -> None:
    store = view.store
    _LOG.warning(
        "%s: the column at border %d needs %.1f MiB; columns may take %.1f MiB of memory and %.1f "
        "MiB of disk (%.1f MiB of it can be had); raw batches are read; raise one of the budgets "
        "(columns_mib, columns_disk_mib), or free the disk",
        *(view.dataset.name, border, needed / 2**20, store.memory_bytes / 2**20),
        *(store.disk_bytes / 2**20, data.room(store) / 2**20),
    )
