"""Fine-tune a backbone on one task: baselines, phases, verdict, and a folder with the proof.

`fine_tune` is the whole job. In order: attach a head, fit the linear probe on what the frozen
backbone gives, run the plan, score both on the untouched test split, write the run folder.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jtl.models.backbone import Backbone
from jtl.models.export import export
from jtl.models.model import Model
from jtl.recipes import tasks, verdict
from jtl.recipes.datasets import check_sources, make_datasets, once
from jtl.recipes.follow import Ended, follow, group_rows
from jtl.recipes.optimizers import adamw
from jtl.recipes.predict import Predictor
from jtl.recipes.retain import Before, Watched
from jtl.recipes.start import attached, described, opened
from jtl.recipes.training import Engine, Job, Settings, make_engine, make_parts
from jtl.recipes.watching import changed, scored_before, starts, watch
from jtl.report import console, html, penalised, record
from jtl.train import checkpoint, phases
from jtl.train.compile import enable_cache
from jtl.train.evaluate import make_predict
from jtl.train.memory import keep_freed_memory
from jtl.weights.report import LoadReport, counts

DEFAULT_PLAN = functools.partial(
    phases.progressive, head_rate=2e-3, rate=1e-4, final_rate=2e-5, decay=0.9, per_phase=2
)


def fine_tune(
    backbone: Backbone | Model | Predictor,
    data: Mapping[str, Any],
    *,
    folder: str | pathlib.Path,
    task: Callable[..., tasks.Task] = tasks.classification,
    plan: Callable[..., Sequence[phases.Phase]] = DEFAULT_PLAN,
    optimizer: Any = None,
    penalties: Sequence[Callable[..., Any]] = (),
    retain: Sequence[Callable[..., Watched]] = (),
    head: str = "head",
    batch_size: int = 32,
    buckets: int = 2,
    max_length: int | None = None,
    clip: float | None = 1.0,
    accumulate: int = 1,
    parallel: str = "jit",
    save_every: int | None = None,
    columns_mib: int = 2048,
    columns_disk_mib: int = 8192,
    columns_folder: str | None = None,
    ema: float | None = None,
    shares_every: int | None = 50,
    dtype: str | None = None,
    remat: bool = False,
    hold_statistics: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune and return the result, which is also in `folder/result.json`.

    Args:
        backbone: pretrained features; or a trained model (`jtl.load(run)`), whose heads are kept.
        data: {"train", "validation", "test"} of sources; phases and probe are chosen on validation,
            test is scored once, at the end.
        folder: of the run. A run that was interrupted there goes on; one that ended is returned as
            it is; one of another config is refused.
        task: `training data -> Task`; `recipes.tasks.classification` or `regression`.
        plan: `(groups, heads) -> phases`; the builders of `train.phases` with their options bound.
        optimizer: transform at unit rate for every label; None is `recipes.optimizers.adamw()`.
        penalties: `Start -> Part`; those of `recipes.terms` with their options bound.
        retain: `Before -> Watched`, sources whose figures are watched; those of `recipes.retain`
            and `recipes.language` with their options bound.
        head: name of the task's head.
        batch_size: examples a step.
        buckets: number of padded lengths that texts are sorted into.
        max_length: longest text in tokens; None is the checkpoint's own limit.
        clip: largest global norm of the live gradient; None for no clipping.
        accumulate: microbatches a step.
        parallel: how the run lies on the devices it finds, `batch_size` rows over all of them:
            "jit" or "data" (each has the whole state), "fsdp" (large arrays are split too), "pmap".
        save_every: steps between checkpoints; None saves at evaluations only.
        columns_mib: memory for derived columns, MiB.
        columns_disk_mib: of the folder of columns that do not fit in memory or took long to
            compute, where later runs find them; 0 keeps none. Where a phase's column fits in
            neither, it reads raw batches, and the log says so.
        columns_folder: of these columns; None is `jtl/columns` in the user's cache folder.
        ema: decay of a moving average of the live weights, which is then evaluated and kept.
        shares_every: steps between probes of each term's share of the gradient; None for none.
        dtype: of the computation, "float32" or "bfloat16"; parameters, optimizer and losses stay
            float32. None is the backbone's own.
        remat: compute the inside of each block again in the backward pass, to save memory.
        hold_statistics: BatchNorm keeps its stored statistics in live blocks too, for small batches
            or data unlike those of the checkpoint.
        seed: of order, dropout and fresh weights.
        overwrite: train anew where a finished run lies.
        config: what `config.json` and `result.json` show; None shows the options given here.

    Raises:
        ValueError: a bad input; the message says what is wrong, what is there and what to do.
    """
    began = time.perf_counter()
    settings = Settings(
        optimizer or adamw(),
        *(batch_size, clip, accumulate, parallel, save_every),
        *(columns_mib, columns_disk_mib, columns_folder, ema, shares_every),
    )
    start, classes = opened(backbone)
    check_sources(data)
    options = {"head": head, "buckets": buckets, "max_length": max_length, "seed": seed}
    options |= {"dtype": dtype, "remat": remat, "hold_statistics": hold_statistics}
    options |= {"optimizer": "given" if optimizer else "adamw"}
    calls = {"task": task, "plan": plan, "penalties": penalties, "retain": retain}
    shown = described("fine_tune", start, data, settings, options, calls=calls)
    run = record.open_run(folder, config=config or shown, overwrite=overwrite)
    if run.result is not None:
        console.finished(run.folder, run.result)
        return run.result
    enable_cache()
    keep_freed_memory()
    job_task = task(data["train"])
    model = attached(start, head, job_task, seed, classes=classes)
    how: Any = dict(remat=remat or None, hold_statistics=hold_statistics or None)
    model = model.computing(dtype, **how)
    console.loaded(model.backbone.source, model.backbone.report)
    datasets = make_datasets(model, data, buckets=buckets, max_length=max_length)
    job = Job(model, head, job_task, datasets, list(plan(model.groups, (head,))), seed)
    kept = tuple(start.heads) if isinstance(start, Model) else ()
    watching, settings = watch(job, settings, retain, Before(model, kept, classes))
    parts = make_parts(job, penalties, kept, classes)
    place = run.folder / record.CHECKPOINTS
    engine = make_engine(job, settings, parts=parts, folder=place, retained=watching)
    rows = group_rows(job)
    console.groups(rows, [phase.name for phase in job.plan])
    with contextlib.closing(engine.events):
        baselines, probed = _baselines(job, engine)
        resumed = checkpoint.latest(engine.checkpoints) is not None
        first = scored_before(watching, job, resumed=resumed)
        ended = follow(run, job, engine, watched=starts(watching, first))
    tuned = dataclasses.replace(model, params=ended.params, stats=ended.stats)
    result = _result(run, job, baselines, probed, tuned, ended, began) | {"groups": rows}
    result |= changed(watching, job, tuned, first)
    names = [part.name for part in parts if part.term is not None and not part.project]
    result |= penalised.found(record.read_rows(run.folder), names)
    export(run.folder / record.MODEL, tuned, labels={**classes, head: job_task.classes})
    run = record.write_result(run, result)
    html.write_report(run.folder)
    console.finished(run.folder, result)
    return result


def _baselines(job: Job, engine: Engine) -> tuple[dict[str, Any], Any]:
    """Return the scores of the answer without features and of the linear probe, and its logits."""
    began = time.perf_counter()
    labels = {part: dataset.labels for part, dataset in job.datasets.items()}
    features = {part: engine.features(part) for part in ("train", "validation", "test")}
    fitted = verdict.probe(job.task, features, labels)
    seconds = time.perf_counter() - began
    scored = verdict.Scored(fitted(features["validation"]), fitted(features["test"]), seconds)
    probe = verdict.score(job.task, scored, labels) | {"strength": fitted.strength}
    return {job.task.baseline: verdict.guess(job.task, labels), "linear_probe": probe}, scored.test


def _result(
    run: record.Run,
    job: Job,
    baselines: dict[str, Any],
    probed: Any,
    tuned: Model,
    ended: Ended,
    began: float,
) -> dict[str, Any]:
    """Return what `result.json` holds; see `report.record`."""
    labels = {part: dataset.labels for part, dataset in job.datasets.items()}
    predict = make_predict(tuned.apply, heads=(job.head,))
    logits = {
        part: predict(tuned.params, tuned.stats, once(job.datasets[part]))[job.head]
        for part in ("validation", "test")
    }
    scored = verdict.Scored(logits["validation"], logits["test"], ended.seconds)
    report = tuned.backbone.report or LoadReport()
    sizes = {part: dataset.size for part, dataset in job.datasets.items()}
    result = {
        "metric": job.task.metric,
        "baselines": baselines,
        "target": verdict.score(job.task, scored, labels),
        "phases": ended.phases,
        "held_bit_equal": all(row["held_bit_equal"] for row in ended.phases if not row["skipped"]),
        "loaded": counts(report),
        "seed": job.seed,
        "versions": record.versions(),
        "config": run.config,
        "figures": {part: job.task.score(logits[part], labels[part]) for part in logits},
        "load_report": report._asdict(),
        "source": tuned.backbone.source,
        "data": {"name": job.datasets["train"].name, **sizes},
        **verdict.pictures(job.task, logits["test"], labels["test"]),
        "seconds": time.perf_counter() - began,
    }
    gain = verdict.gain(job.task, logits["test"], probed, labels["test"])
    return result | ({"gain": gain} if gain else {})
