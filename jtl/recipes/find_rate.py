"""Find the learning rates of a phase: one sweep under its own freeze, before anything is trained.

The fields are those of `fine_tune`, so its configs will do (without `ema`, `save_every`, `retain`
and `shares_every`):

    python -m jtl --config=configs/quickstart.py --config.recipe=find_rate \
        --config.folder=runs/quickstart_rate
"""

import itertools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jtl import data as jdata
from jtl import near
from jtl.models.backbone import Backbone
from jtl.models.model import Model
from jtl.recipes import identity, tasks
from jtl.recipes.datasets import check_sources, make_datasets
from jtl.recipes.finetune import DEFAULT_PLAN
from jtl.recipes.optimizers import adamw
from jtl.recipes.predict import Predictor
from jtl.recipes.start import attached, opened, origin
from jtl.recipes.supply import Supply, make_supply
from jtl.recipes.training import Job, Settings, make_parts
from jtl.report import console, jsonfile, rates, record
from jtl.train import parallel as parallels
from jtl.train import schedules, sweep
from jtl.train.compile import enable_cache
from jtl.train.memory import keep_freed_memory
from jtl.train.optimizer import phase_optimizer
from jtl.train.plan import Phase, check_plan
from jtl.train.state import create
from jtl.train.step import make_step


def find_rate(
    backbone: Backbone | Model | Predictor,
    data: Mapping[str, Any],
    *,
    folder: str | pathlib.Path,
    task: Callable[..., tasks.Task] = tasks.classification,
    plan: Callable[..., Sequence[Phase]] = DEFAULT_PLAN,
    phase: str | None = None,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.98,
    optimizer: Any = None,
    penalties: Sequence[Callable[..., Any]] = (),
    head: str = "head",
    batch_size: int = 32,
    buckets: int = 2,
    max_length: int | None = None,
    clip: float | None = 1.0,
    accumulate: int = 1,
    parallel: str = "jit",
    columns_mib: int = 2048,
    columns_disk_mib: int = 8192,
    columns_folder: str | None = None,
    dtype: str | None = None,
    remat: bool = False,
    hold_statistics: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Sweep the rates of a phase and return what the rules suggest, also in `folder/result.json`.

    All labels keep the proportions of the phase: the sweep goes over the rate of the fastest. It
    trains a copy of the start model; a later phase too is swept from there, so for one give a
    trained model, or read its curve with that in mind.

    Args:
        backbone: as for `fine_tune`, like the arguments that are not named here.
        data: "train" is swept over.
        folder: of the sweep; one that ended there is returned as it is.
        task: `training data -> Task`.
        plan: `(groups, heads) -> phases`.
        phase: name of a phase of the plan; None is the first.
        lowest: rate of the fastest label at the first step.
        highest: its rate at the last; the sweep ends where the loss runs away.
        steps: number of them.
        smoothing: share of the past in the running mean of the loss.
        optimizer: transform at unit rate; None is `recipes.optimizers.adamw()`.
        penalties: `Start -> Part`; they are part of the loss.
        head: name of the task's head.
        batch_size: examples a step.
        buckets: number of padded lengths of texts.
        max_length: longest text in tokens.
        clip: largest global norm of the live gradient.
        accumulate: microbatches a step.
        parallel: how the sweep lies on the devices.
        columns_mib: memory for derived columns, MiB.
        columns_disk_mib: of the folder of columns.
        columns_folder: of these columns.
        dtype: of the computation; None is the backbone's own.
        remat: compute the inside of each block again in the backward pass.
        hold_statistics: BatchNorm keeps its stored statistics in live blocks too.
        seed: of order, dropout and fresh weights.
        overwrite: sweep anew where a sweep lies.
        config: what `config.json` shows; None shows the options given here.

    Returns:
        {"phase", "live", "fastest": labels of the highest rate, "peaks": {label: rate in the plan},
        "suggestions": {rule: rate of the fastest}, "scales": {rule: factor on the plan's rates},
        "rates" and "losses": what the rules read, "readings": [{"rate", "loss", "smoothed"}], and
        "source", "seed", "versions", "config", "seconds"}; see `train.sweep`.

    Raises:
        ValueError: a bad input, or a sweep too short to read.
    """
    began = time.perf_counter()
    settings = Settings(
        *(optimizer or adamw(), batch_size, clip, accumulate, parallel, None),
        *(columns_mib, columns_disk_mib, columns_folder),
    )
    start, classes = opened(backbone)
    check_sources(data)
    sweeping = {"lowest": lowest, "highest": highest, "steps": steps, "smoothing": smoothing}
    shown = {
        "recipe": "find_rate",
        "backbone": origin(start),
        "data": identity.sources(data),
        "head": head,
        "task": identity.called(task),
        "plan": identity.called(plan),
        "penalties": [identity.called(penalty) for penalty in penalties],
        "buckets": buckets,
        "max_length": max_length,
        "seed": seed,
        "dtype": dtype,
        "remat": remat,
        "hold_statistics": hold_statistics,
        "phase": phase,
        **sweeping,
        **settings._replace(optimizer="given" if optimizer else "adamw")._asdict(),
    }
    place = record.open_run(folder, config=config or shown, overwrite=overwrite)
    if place.result is not None:
        rates.show(place.folder, place.result)
        return place.result
    enable_cache()
    keep_freed_memory()
    job_task = task(data["train"])
    model = attached(start, head, job_task, seed, classes=classes)
    how: Any = dict(remat=remat or None, hold_statistics=hold_statistics or None)
    model = model.computing(dtype, **how)
    console.loaded(model.backbone.source, model.backbone.report)
    datasets = make_datasets(model, data, buckets=buckets, max_length=max_length)
    phases = list(plan(model.groups, (head,)))
    check_plan(phases, (*model.groups, *model.heads))
    chosen = _phase(phases, phase)
    job = Job(model, head, job_task, datasets, [chosen], seed)
    kept = tuple(start.heads) if isinstance(start, Model) else ()
    readings = _swept(job, settings, make_parts(job, penalties, kept, classes), sweeping)
    result = _result(chosen, readings, steps) | {
        "source": model.backbone.source,
        "seed": seed,
        "versions": record.versions(),
        "config": place.config,
        "seconds": time.perf_counter() - began,
    }
    result = jsonfile.plain(result)
    rates.write(place.folder, result)
    jsonfile.write(place.folder / record.RESULT, result)
    rates.show(place.folder, result)
    return result


def _phase(phases: Sequence[Phase], name: str | None) -> Phase:
    named = {phase.name: phase for phase in phases}
    if name is None:
        return phases[0]
    if name not in named:
        raise ValueError(
            f"the plan has no phase {name!r}; it has {list(named)}{near.nearest(name, named)}"
        )
    return named[name]


def _swept(
    job: Job, settings: Settings, parts: Sequence[Any], sweeping: Mapping[str, Any]
) -> list[sweep.Reading]:
    """Return the readings of a sweep over the job's one phase, shown as they come."""
    model, (phase,) = job.model, job.plan
    options = dict(sweeping)
    smoothing = options.pop("smoothing")
    spread = parallels.make_spread(settings.parallel)
    parallels.check_batch_size(spread, settings.batch_size, accumulate=settings.accumulate)
    ready = make_supply(job, settings, spread, parts)
    batches = _batches(ready, options["steps"])
    txs: dict[str, Any] = dict.fromkeys(phase.live, settings.optimizer)
    tx = phase_optimizer(txs, model.labels, phase.live, phase.live)
    refs = {name: value for part in parts for name, value in part.refs.items()}
    key = jax.random.fold_in(jax.random.key(job.seed), 1)
    state = parallels.place(spread, create(model.params, model.stats, tx, refs=refs, key=key))
    made = make_step(
        (model if spread.axis_name is None else model.on_axis(spread.axis_name)).apply,
        {job.task.kind: job.task.term(job.head), **{part.name: part.term for part in parts}},
        *(tx, model.labels, sweep.sweep_rates(phase.rates, **options)),
        clip=settings.clip,
        accumulate=settings.accumulate,
        axis_name=spread.axis_name,
    )
    step = parallels.compiled(spread, made)
    readings = sweep.sweep(state, batches, step, smoothing=smoothing, **options)
    return list(_shown(readings, phase, model.groups, settings.batch_size, options["steps"]))


def _batches(ready: Supply, steps: int) -> Iterator[dict[str, Any]]:
    """Yield the batches of this process, from the phase's border on where that saves work."""
    model, (phase,), size = ready.job.model, ready.job.plan, ready.settings.batch_size
    dataset = ready.train
    if dataset.size <= steps * size:  # else the columns would be of more than the sweep sees
        dataset = ready.views["train"](phase.live, model.params, model.stats)
    mine = parallels.rows(ready.spread, size)
    for batch in jdata.batches(dataset, size, seed=ready.job.seed):
        own = {name: column[mine] for name, column in batch.items()}
        yield parallels.put(ready.spread, own)


def _shown(
    readings: Iterator[sweep.Reading],
    phase: Phase,
    order: Sequence[str],
    examples: int,
    steps: int,
) -> Iterator[sweep.Reading]:
    """Yield the readings, and show each on the console."""
    planned = [{"name": phase.name, "live": sorted(phase.live), "steps": steps}]
    with console.progress(planned, metric="loss", order=order) as show:
        show({"kind": "phase_start", "step": 0, "phase": phase.name, **planned[0]})
        for number, reading in zip(itertools.count(1), readings):
            row = {"kind": "step", "step": number, "phase": phase.name, "examples": examples}
            show({**row, "loss": reading.loss, "rate/fastest": reading.rate})
            yield reading


def _result(phase: Phase, readings: Sequence[sweep.Reading], steps: int) -> dict[str, Any]:
    found = sweep.conclude(readings, steps)
    peaks = {label: schedules.peak(rate) for label, rate in phase.rates.items()}
    top = sweep.fastest(phase.rates)
    return {
        "phase": phase.name,
        "live": sorted(phase.live),
        "fastest": [label for label, peak in peaks.items() if peak == top],
        "peaks": peaks,
        **found._asdict(),
        "scales": {rule: rate / top for rule, rate in found.suggestions.items()},
        "readings": [reading._asdict() for reading in readings],
    }
