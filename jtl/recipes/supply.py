"""What a run reads: batches by process, derived columns, and the figures of an evaluation."""

import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jtl import data as jdata
from jtl.recipes.datasets import EVALUATION_ROWS, once
from jtl.recipes.identity import column_keys
from jtl.recipes.job import Job, Settings
from jtl.recipes.terms import Part
from jtl.recipes.views import View, make_view, shapes_together, together
from jtl.report.counting import counting
from jtl.train import evaluate, parallel, run
from jtl.train.coming import Epoch
from jtl.train.compile import lifted, shapes_of
from jtl.train.parallel import Spread


class Supply(NamedTuple):
    """The data of a job, ready for its run; `make_supply` makes it.

    Attributes:
        job: the job.
        settings: how it is trained.
        spread: how the run lies on its devices.
        train: training data, with the columns that penalties read.
        views: "train", "validation" and each stream's name, as the phases read them.
        predict: the logits of the task's head.
        streams: {"stream 1": (dataset with its columns, rows of a batch)}, in the order of parts.
    """

    job: Job
    settings: Settings
    spread: Spread
    train: jdata.Dataset
    views: Mapping[str, View]
    predict: evaluate.Predict
    streams: Mapping[str, tuple[jdata.Dataset, int]] = {}


def make_supply(job: Job, settings: Settings, spread: Spread, parts: Sequence[Part]) -> Supply:
    """Return the data of a job; the columns of penalties are computed here.

    Raises:
        ValueError: a batch larger than the data, streams that leave the task no row, or reference
            outputs that fit nowhere.
    """
    sources = [part.stream for part in parts if part.stream is not None]
    own, *rows = jdata.split_rows(settings.batch_size, [stream.rows for stream in sources])
    jdata.plan(job.datasets["train"], own)  # refuses a batch larger than the data
    store = _store(settings, 1.0)
    train = _with_columns(job.datasets["train"], [p for p in parts if p.stream is None], store)
    streams = [
        _with_columns(part.stream.dataset, [part], store)
        for part in parts
        if part.stream is not None
    ]
    named = {f"stream {k}": pair for k, pair in enumerate(zip(streams, rows, strict=True), 1)}
    jit = functools.partial(parallel.split_forward, spread)
    predict = evaluate.make_predict(job.model.apply, heads=(job.head,), jit=jit)
    views = make_views(
        job, settings, train, {name: dataset for name, (dataset, _) in named.items()}
    )
    return Supply(job, settings, spread, train, views, predict, named)


def make_views(
    job: Job,
    settings: Settings,
    train: jdata.Dataset,
    streams: Mapping[str, jdata.Dataset] | None = None,
) -> dict[str, View]:
    """Return the views of training data, validation data and streams: they share the budgets."""
    phases = [phase.live for phase in job.plan]
    probed = [frozenset({job.head}), *phases]  # the linear probe reads these two as well
    datasets = {"train": train, "validation": job.datasets["validation"], **(streams or {})}
    rows = sum(dataset.size for dataset in datasets.values())
    return {
        part: make_view(
            *(job.model, dataset, probed if part in ("train", "validation") else phases),
            batch_size=min(EVALUATION_ROWS, dataset.size),
            store=_store(settings, dataset.size / rows),
            progress=counting(f"columns of the {part} data"),
        )
        for part, dataset in datasets.items()
    }


def _store(settings: Settings, share: float) -> jdata.Store:
    folder = None if settings.columns_folder is None else pathlib.Path(settings.columns_folder)
    memory, disk = (mib * 2**20 for mib in (settings.columns_mib, settings.columns_disk_mib))
    # The disk is one for all: what it holds is counted there.
    return jdata.Store(memory_bytes=int(memory * share), disk_bytes=disk, folder=folder)


def epoch(supply: Supply) -> Epoch:
    """Return steps and examples of one pass over the training data."""
    own = supply.settings.batch_size - sum(rows for _, rows in supply.streams.values())
    return Epoch(jdata.steps_per_epoch(supply.train, own), supply.train.size)


def feed(supply: Supply, live: frozenset[str], params: Any, stats: Any) -> run.Feed:
    """Return the training data of a phase: derived columns where its prefix is held."""
    job, size = supply.job, supply.settings.batch_size
    views, mine = supply.views, parallel.rows(supply.spread, size)
    read = ("train", *supply.streams)
    before = sum(views[part].account()["derive_seconds"] for part in read)
    dataset, *others = together([views[part] for part in read], live, params, stats)
    rows = [count for _, count in supply.streams.values()]

    def batches(start: int) -> Iterator[dict[str, Any]]:
        if others:
            mixed = list(zip(others, rows, strict=True))
            made = jdata.mixed_batches(dataset, mixed, size, seed=job.seed, start=start)
        else:
            made = jdata.batches(dataset, size, seed=job.seed, start=start)
        for batch in made:
            yield {name: column[mine] for name, column in batch.items()}

    accounts = [views[part].account() for part in read]
    account = {name: sum(each[name] for each in accounts) for name in accounts[0]}
    account["derive_seconds"] -= before
    return run.Feed(batches, *epoch(supply), account)


def ahead(supply: Supply, begin: Any) -> run.Ahead | None:
    """Return what phases will read, known before they begin; a step of `pmap` compiles in turn."""
    spread, views = supply.spread, supply.views
    if spread.kind == "pmap":
        return None
    own = parallel.rows(spread, supply.settings.batch_size)
    params, stats = shapes_of((begin.params, begin.stats))
    read = [views[part] for part in ("train", *supply.streams)]

    def shapes(live: frozenset[str]) -> list[dict[str, Any]]:
        found = shapes_together(read, live, own.stop - own.start)
        return [parallel.shapes(spread, batch) for batch in found]

    def warm(live: frozenset[str]) -> None:
        rows = min(EVALUATION_ROWS, views["validation"].dataset.size)
        supply.predict.warm(params, stats, views["validation"].shapes(live, rows))

    return run.Ahead(shapes, *epoch(supply), warm)


def score(supply: Supply, params: Any, stats: Any, live: frozenset[str]) -> dict[str, float]:
    """Return the figures on the validation data."""
    job = supply.job
    dataset = supply.views["validation"](live, params, stats)
    logits = supply.predict(params, stats, once(dataset))[job.head]
    return job.task.score(logits, job.datasets["validation"].labels)


def features(supply: Supply, views: Mapping[str, View], part: str) -> np.ndarray:
    """Return the pooled features (n, dim) of the start model on a part of the data."""
    job, model = supply.job, supply.job.model
    dataset = job.datasets[part]
    if part in views:
        dataset = views[part](frozenset({job.head}), model.params, model.stats)
    pooled = evaluate.make_predict(model.apply, heads=("pooled",))
    values = pooled(model.params, model.stats, once(dataset))["pooled"]
    if part != "train":  # in training the step that meets them says more
        _check_finite(part, values)
    return values


def _check_finite(part: str, features: np.ndarray) -> None:
    rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(rows):
        raise ValueError(
            f"the features of {part} are not finite in {len(rows)} of {len(features)} examples, "
            f"first {rows[:6].tolist()}; clean these examples, or check the backbone's weights"
        )


def _with_columns(
    dataset: jdata.Dataset, parts: Sequence[Part], store: jdata.Store
) -> jdata.Dataset:
    """Return the training data with what the start model gives on it, for penalties on outputs."""
    for part in parts:
        if part.columns is None:
            continue
        size = min(EVALUATION_ROWS, dataset.size)
        keys = {}
        if store.disk_bytes:  # they are read with care: every weight counts
            keys = column_keys(part.columns, dataset, size, part.column_names)
        compute = lifted(part.columns)  # it holds the start model
        show = counting(f"outputs for {part.name}")
        whole = jdata.derive(
            *(dataset, size, compute),
            names=part.column_names,
            store=store,
            keys=keys,
            progress=show,
        )
        if whole is None:
            raise ValueError(
                f"the reference outputs {list(part.column_names)} of {dataset.name} fit neither in "
                "memory nor on disk; raise columns_mib or columns_disk_mib, take fewer examples, "
                "or a penalty on weights such as l2_sp"
            )
        dataset = whole
    return dataset
