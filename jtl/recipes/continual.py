"""Several tasks one after the other on one backbone, and what each costs those before it.

Every task has its own head. Penalties keep to the tasks that came before; the same tasks are also
run plainly, so that the table shows what a penalty is worth.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jtl.models.backbone import Backbone
from jtl.models.export import export
from jtl.models.model import Model, attach
from jtl.recipes import identity
from jtl.recipes import tasks as kinds
from jtl.recipes.datasets import check_sources, make_datasets, once
from jtl.recipes.follow import follow
from jtl.recipes.optimizers import adamw
from jtl.recipes.terms import Part, Start
from jtl.recipes.training import Job, Settings, make_engine
from jtl.report import console, jsonfile, record
from jtl.train import phases
from jtl.train.compile import enable_cache
from jtl.train.evaluate import make_predict
from jtl.train.plan import ever_live


def continual(
    backbone: Backbone,
    tasks: Sequence[Mapping[str, Any]],
    *,
    folder: str | pathlib.Path,
    task: Callable[..., kinds.Task] = kinds.classification,
    plan: Callable[..., Sequence[Any]] = phases.full,
    optimizer: Any = None,
    penalties: Sequence[Callable[..., Part]] = (),
    batch_size: int = 32,
    clip: float | None = 1.0,
    seed: int = 0,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the tasks in order, plainly and with the penalties, and return both tables.

    Args:
        backbone: shared by all tasks.
        tasks: {"name", "data": {"train", "validation", "test"}} in order; a name is a head's.
        folder: of the run; each task has a folder of its own in it, from which it goes on.
        task: `training data -> Task`, for every task.
        plan: `(groups, heads) -> phases`, for every task; the other tasks' heads are held.
        optimizer: transform at unit rate; None is `recipes.optimizers.adamw()`. Each task starts
            with a fresh state.
        penalties: `Start -> Part`, made at the end of each task for its head.
        batch_size: examples a step.
        clip: largest global norm of the live gradient; None for no clipping.
        seed: of order, dropout and fresh weights.
        overwrite: train anew where a finished run lies.
        config: what `config.json` shows; None shows the options given here.

    Returns:
        {"tasks", "metric", "runs": {"plain", "penalised": {"matrix", "average",
        "backward_transfer"}}}: matrix[i][j] is the test figure on task j after task i; backward
        transfer is the mean over earlier tasks of last minus own figure (Lopez-Paz and Ranzato
        2017, arXiv:1706.08840).

    Raises:
        ValueError: a bad input; the message says what is wrong, what is there and what to do.
    """
    began = time.perf_counter()
    names = [str(entry["name"]) for entry in tasks]
    if len(set(names)) < max(len(names), 2):
        raise ValueError(f"tasks are named {names}; give at least two, each a name of its own")
    settings = Settings(optimizer or adamw(), batch_size, clip)
    shown = {
        "recipe": "continual",
        "backbone": {"source": backbone.source, "weights": identity.weights(backbone.params)},
        "tasks": {str(entry["name"]): identity.sources(entry["data"]) for entry in tasks},
        "task": identity.called(task),
        "plan": identity.called(plan),
        "penalties": [identity.called(penalty) for penalty in penalties],
        "optimizer": "given" if optimizer else "adamw",
        "clip": clip,
        "batch_size": batch_size,
        "seed": seed,
    }
    place = record.open_run(folder, config=config or shown, overwrite=overwrite)
    if place.result is not None:
        console.matrices(place.result)
        return place.result
    enable_cache()
    for entry in tasks:
        check_sources(entry["data"])
    made = {name: task(entry["data"]["train"]) for name, entry in zip(names, tasks, strict=True)}
    heads = {name: made[name].head for name in names}
    model = attach(backbone, heads, key=jax.random.key(seed))
    sources = {name: entry["data"] for name, entry in zip(names, tasks, strict=True)}
    jobs = [
        Job(model, name, made[name], make_datasets(model, data), plan(model.groups, (name,)), seed)
        for name, data in sources.items()
    ]
    runs = {}
    for way, chosen in {"plain": (), "penalised": tuple(penalties)}.items():
        if way == "plain" or chosen:
            inner = (place.folder / way, place.config, overwrite)
            runs[way], model = _sequence(inner, jobs, settings, chosen)
    result = {"tasks": names, "metric": jobs[0].task.metric, "runs": runs, "seed": seed}
    result |= {"versions": record.versions(), "seconds": time.perf_counter() - began}
    export(place.folder / record.MODEL, model, labels={n: made[n].classes for n in names})
    result = jsonfile.plain({**result, "config": place.config})
    jsonfile.write(place.folder / record.RESULT, result)
    console.matrices(result)
    return result


def _sequence(
    place: tuple[pathlib.Path, Mapping[str, Any], bool],
    jobs: Sequence[Job],
    settings: Settings,
    penalties: Sequence[Callable[..., Part]],
) -> tuple[dict[str, Any], Model]:
    """Train all tasks one way; return its figures and the model after the last.

    `place` is (folder, config, overwrite).
    """
    folder, config, overwrite = place
    model, parts, matrix = jobs[0].model, [], []
    predict = make_predict(model.apply, heads=tuple(job.head for job in jobs))
    for number, start in enumerate(jobs):
        job = start._replace(model=model)
        inner = record.open_run(folder / job.head, config=config, overwrite=overwrite)
        checkpoints = inner.folder / record.CHECKPOINTS
        which = {"task": number, "way": folder.name}
        engine = make_engine(job, settings, parts=parts, folder=checkpoints, config=which)
        ended = follow(inner, job, engine)
        model = dataclasses.replace(model, params=ended.params, stats=ended.stats)
        key = jax.random.fold_in(jax.random.key(job.seed), 100 + number)
        kept = {job.head: job.datasets["train"]}
        ready = Start(model, (job.head,), ever_live(job.plan), kept, key)
        parts += [penalty(ready) for penalty in penalties]
        matrix.append([_figure(predict, model, other) for other in jobs])
    last = np.asarray(matrix[-1])
    own = np.diagonal(np.asarray(matrix))
    figures = {
        "matrix": matrix,
        "average": float(last.mean()),
        "backward_transfer": float((last - own)[:-1].mean()),
    }
    return figures, model


def _figure(predict: Any, model: Model, job: Job) -> float:
    dataset = job.datasets["test"]
    logits = predict(model.params, model.stats, once(dataset))[job.head]
    return job.task.score(logits, dataset.labels)[job.task.metric]
