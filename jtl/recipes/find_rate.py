"""Find the learning rates of a phase: one sweep under its own freeze, before anything is trained.

The fields are those of `fine_tune`, so any of its configs will do:

    python -m jtl --config=configs/quickstart.py --config.recipe=find_rate \
        --config.folder=runs/quickstart_rate
"""

import difflib
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jtl import data as jdata
from jtl.models.backbone import Backbone
from jtl.models.model import Model
from jtl.recipes import identity, tasks
from jtl.recipes.datasets import EVALUATION_ROWS, check_sources
from jtl.recipes.finetune import DEFAULT_PLAN, _attached, _opened, _origin
from jtl.recipes.optimizers import adamw
from jtl.recipes.predict import Predictor
from jtl.recipes.training import Job, Settings, _with_columns, make_parts
from jtl.recipes.views import make_view
from jtl.report import console, jsonfile, rates, record
from jtl.train import schedules, sweep
from jtl.train.compile import enable_cache, make_compiled
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
    columns_mib: int = 2048,
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
        columns_mib: memory for derived columns, MiB.
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
    settings = Settings(optimizer or adamw(), batch_size, clip, accumulate, columns_mib=columns_mib)
    start, _ = _opened(backbone)
    check_sources(data)
    sweeping = {"lowest": lowest, "highest": highest, "steps": steps, "smoothing": smoothing}
    shown = {
        "recipe": "find_rate",
        "backbone": _origin(start),
        "data": identity.sources(data),
        "head": head,
        "task": identity.called(task),
        "plan": identity.called(plan),
        "penalties": [identity.called(penalty) for penalty in penalties],
        "buckets": buckets,
        "max_length": max_length,
        "seed": seed,
        "phase": phase,
        **sweeping,
        **settings._replace(optimizer="given" if optimizer else "adamw")._asdict(),
    }
    place = record.open_run(folder, config=config or shown, overwrite=overwrite)
    if place.result is not None:
        rates.show(place.folder, place.result)
        return place.result
    enable_cache()
    job_task = task(data["train"])
    model = _attached(start, head, job_task, seed)
    console.loaded(model.backbone.source, model.backbone.report)
    inputs = model.backbone.inputs
    train = jdata.encode(data["train"], inputs, buckets=buckets, max_length=max_length)
    phases = list(plan(model.groups, (head,)))
    check_plan(phases, (*model.groups, *model.heads))
    chosen = _phase(phases, phase)
    job = Job(model, head, job_task, {"train": train}, [chosen], seed)
    kept = tuple(start.heads) if isinstance(start, Model) else ()
    readings = _swept(job, settings, make_parts(job, penalties, kept), sweeping)
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
        near = difflib.get_close_matches(name, named, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the plan has no phase {name!r}; it has {list(named)}{hint}")
    return named[name]


def _swept(
    job: Job, settings: Settings, parts: Sequence[Any], sweeping: Mapping[str, Any]
) -> list[sweep.Reading]:
    """Return the readings of a sweep over the job's one phase, shown as they come."""
    model, (phase,) = job.model, job.plan
    options = dict(sweeping)
    smoothing = options.pop("smoothing")
    txs: dict[str, Any] = dict.fromkeys(phase.live, settings.optimizer)
    tx = phase_optimizer(txs, model.labels, phase.live, phase.live)
    terms = {job.task.kind: job.task.term(job.head), **{part.name: part.term for part in parts}}
    made = sweep.sweep_rates(phase.rates, **options)
    how = {"clip": settings.clip, "accumulate": settings.accumulate}
    step = make_compiled(make_step(model.apply, terms, tx, model.labels, made, **how))
    refs = {name: value for part in parts for name, value in part.refs.items()}
    key = jax.random.fold_in(jax.random.key(job.seed), 1)
    state = create(model.params, model.stats, tx, refs=refs, key=key)
    dataset = _seen(job, settings, parts, options["steps"])
    batches = jdata.batches(dataset, settings.batch_size, seed=job.seed)
    readings = sweep.sweep(state, batches, step, smoothing=smoothing, **options)
    return list(_shown(readings, phase, model.groups, settings.batch_size, options["steps"]))


def _seen(job: Job, settings: Settings, parts: Sequence[Any], steps: int) -> jdata.Dataset:
    """Return the training data, from the phase's border on where that saves work."""
    dataset = _with_columns(job.datasets["train"], parts)
    if dataset.size > steps * settings.batch_size:
        return dataset  # the sweep sees a part of it, and the columns would be those of all
    model, (phase,) = job.model, job.plan
    view = make_view(
        model,
        dataset,
        [phase.live],
        batch_size=min(EVALUATION_ROWS, dataset.size),
        budget_bytes=settings.columns_mib * 2**20,
    )
    return view(phase.live, model.params, model.stats)


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
