"""Several tasks one after the other on one backbone, and what each costs those before it.

The same tasks are learned in several ways, plainly among them, and from several seeds, so that the
tables show what a penalty is worth and how far chance goes.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jtl.models.backbone import Backbone
from jtl.models.export import export
from jtl.models.load import new_backbone
from jtl.models.model import Model, attach
from jtl.recipes import identity, sequence
from jtl.recipes import tasks as kinds
from jtl.recipes.comparison import joint_entry, way_entry
from jtl.recipes.datasets import make_datasets
from jtl.recipes.optimizers import adamw
from jtl.recipes.scenario import Lesson, all_at_once, lessons
from jtl.recipes.terms import Part
from jtl.recipes.training import Job, Settings
from jtl.report import continual as page
from jtl.report import jsonfile, record
from jtl.train import phases
from jtl.train.compile import enable_cache
from jtl.train.evaluate import make_predict
from jtl.train.memory import keep_freed_memory
from jtl.train.parallel import make_spread, split_forward

Penalties = Sequence[Callable[..., Part | None]]


def continual(
    backbone: Backbone,
    tasks: Sequence[Mapping[str, Any]],
    *,
    folder: str | pathlib.Path,
    scenario: str = "task",
    task: Callable[..., kinds.Task] = kinds.classification,
    plan: Callable[..., Sequence[Any]] = phases.full,
    optimizer: Any = None,
    penalties: Penalties = (),
    ways: Mapping[str, Penalties] | None = None,
    joint: bool = False,
    batch_size: int = 32,
    buckets: int = 2,
    max_length: int | None = None,
    clip: float | None = 1.0,
    accumulate: int = 1,
    parallel: str = "jit",
    carry_optimizer: bool = False,
    checkpoints: bool = True,
    save_every: int | None = None,
    columns_mib: int = 2048,
    columns_disk_mib: int = 8192,
    columns_folder: str | None = None,
    ema: float | None = None,
    shares_every: int | None = None,
    dtype: str | None = None,
    remat: bool = False,
    hold_statistics: bool = False,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the tasks in order, each way and from each seed, and return what that comes to.

    Choose strengths by the validation figures; the test figures are for the end.

    Args:
        backbone: shared by all tasks. The first seed starts from its weights; where they are random
            (kind 'scratch'), each other seed draws its own.
        tasks: {"name", "data": {"train", "validation", "test"}} in order.
        folder: of the run; each task has a folder of its own in it, from which it goes on.
        scenario: "task" (a head for each, named after it), "domain" (one head, the same classes in
            every task) or "class" (one head over the classes of all tasks, which every source
            names, some of them in each task).
        task: `training data -> Task`, for every task.
        plan: `(groups, heads) -> phases`, for every task; the other tasks' heads are held.
        optimizer: transform at unit rate; None is `recipes.optimizers.adamw()`.
        penalties: short for `ways={"plain": (), "penalised": penalties}`.
        ways: {name: penalties}, each `Start -> Part`, made anew before every task.
        joint: whether all tasks are also learned at once, the upper bound.
        batch_size: examples a step.
        buckets: number of padded lengths of texts.
        max_length: longest text in tokens; None is the checkpoint's own limit.
        clip: largest global norm of the live gradient; None for no clipping.
        accumulate: microbatches a step.
        parallel: how a task lies on the devices: "jit", "data", "fsdp" or "pmap".
        carry_optimizer: whether a task goes on with the optimizer state of the one before, leaf
            groups of the same label; else each starts with a fresh state.
        checkpoints: whether states are saved, so that an interrupted run goes on.
        save_every: steps between saves, beside those after each evaluation.
        columns_mib: memory for derived columns of a task, MiB.
        columns_disk_mib: of the folder of columns that later runs find; 0 keeps none.
        columns_folder: of these columns; None is `jtl/columns` in the user's cache folder.
        ema: decay of a moving average of the live weights, which each task then ends with.
        shares_every: steps between probes of each term's share of the gradient; a penalty that
            never has much of it is a warning. None for none: each task compiles a program for it.
        dtype: of the computation, "float32" or "bfloat16"; None is the backbone's own.
        remat: compute the inside of each block again in the backward pass, to save memory.
        hold_statistics: BatchNorm keeps its stored statistics in live blocks too.
        seed: of order, dropout and fresh weights.
        seeds: several of them; None is the one of `seed`.
        overwrite: train anew where a finished run lies.
        config: what `config.json` shows; None shows the options given here.

    Returns:
        {"tasks", "metric", "scenario", "seeds", "runs": {way: entry}, "joint"}: see
        `recipes.comparison` for an entry.

    Raises:
        ValueError: a bad input; the message says what is wrong, what is there and what to do.

    Reference: van de Ven and Tolias 2019, arXiv:1904.07734: the three scenarios.
    """
    began = time.perf_counter()
    chosen = _ways(penalties, ways)
    seeds = (seed,) if seeds is None else tuple(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; give at least one, each once")
    settings = Settings(
        optimizer or adamw(),
        *(batch_size, clip, accumulate, parallel, save_every),
        *(columns_mib, columns_disk_mib, columns_folder, ema, shares_every),
    )
    how = {"dtype": dtype, "remat": remat, "hold_statistics": hold_statistics}
    options = {"buckets": buckets, "max_length": max_length, "carry_optimizer": carry_optimizer}
    shown = {
        "recipe": "continual",
        "backbone": {"source": backbone.source, "weights": identity.weights(backbone.params)},
        "tasks": {str(entry["name"]): identity.sources(entry["data"]) for entry in tasks},
        "scenario": scenario,
        "task": identity.called(task),
        "plan": identity.called(plan),
        "ways": {way: [identity.called(made) for made in given] for way, given in chosen.items()},
        "joint": joint,
        "optimizer": "given" if optimizer else "adamw",
        "seeds": seeds,
        **{name: value for name, value in settings._asdict().items() if name != "optimizer"},
        **options,
        **how,
    }
    learned = lessons(tasks, scenario, task)
    place = record.open_run(folder, config=config or shown, overwrite=overwrite)
    if place.result is not None:
        page.matrices(place.result)
        return place.result
    enable_cache()
    keep_freed_memory()
    models = [_start(backbone, learned, number, one, how) for number, one in enumerate(seeds)]
    texts = {"buckets": buckets, "max_length": max_length}
    jit = functools.partial(split_forward, make_spread(parallel))
    course = sequence.Course(
        learned,
        [make_datasets(models[0], lesson.sources, **texts) for lesson in learned],
        *(plan, settings, make_predict(models[0].apply, heads=tuple(models[0].heads), jit=jit)),
        *(place.config, overwrite, checkpoints, carry_optimizer),
    )
    runs, last = _all_ways(course, models, seeds, chosen, place.folder)
    result = {
        "tasks": [lesson.name for lesson in learned],
        "metric": learned[0].task.metric,
        "scenario": scenario,
        "seeds": seeds,
        "seed": seeds[0],
        "runs": runs,
        "warnings": _warnings(runs),
    }
    if joint:
        result["joint"] = _joint(course, models, seeds, place.folder)
    result |= {"versions": record.versions(), "seconds": time.perf_counter() - began}
    labels = {lesson.head: lesson.task.classes for lesson in learned}
    export(place.folder / record.MODEL, last, labels=labels)
    result = jsonfile.plain({**result, "config": place.config})
    page.write_report(place.folder, result)
    jsonfile.write(place.folder / record.RESULT, result)
    page.matrices(result)
    return result


def _ways(penalties: Penalties, ways: Mapping[str, Penalties] | None) -> dict[str, Penalties]:
    if ways is not None and penalties:
        raise ValueError(
            f"penalties are given and ways too, {sorted(ways)}; put the penalties among the ways"
        )
    if ways is None:
        return {"plain": (), **({"penalised": tuple(penalties)} if penalties else {})}
    taken = ("joint", record.MODEL, record.CHECKPOINTS)  # folders beside those of the ways
    if not ways or any("/" in way or way in taken for way in ways):
        raise ValueError(
            f"ways are {sorted(ways)}; give at least one, named without '/' and not "
            f"{', '.join(map(repr, taken))}"
        )
    plain_first = sorted(ways.items(), key=lambda way: bool(way[1]))  # a config sorts names
    return {way: tuple(given) for way, given in plain_first}


def _warnings(runs: Mapping[str, Any]) -> list[str]:
    """Return what is to be said of penalties with hardly a share in the gradient, once a task."""
    found = {}
    for way, entry in runs.items():
        for row in entry["seeds"]:
            for task, said in row["penalties"].items():
                for words in said["warnings"]:
                    found.setdefault(f"way {way!r}, task {task!r}: {words}", None)
    return list(found)


def _start(
    backbone: Backbone,
    learned: Sequence[Lesson],
    number: int,
    seed: int,
    how: Mapping[str, Any],
) -> Model:
    """Return the model of a seed before the first task."""
    key = jax.random.key(seed)
    if number and backbone.source == "scratch":
        family, pooling = backbone.family.model_type, backbone.pooling
        drawn = new_backbone(
            family, backbone.config, key=jax.random.fold_in(key, 1), pooling=pooling
        )
        backbone = dataclasses.replace(backbone, params=drawn.params, stats=drawn.stats)
    model = attach(backbone, {lesson.head: lesson.task.head for lesson in learned}, key=key)
    remat, held = how["remat"] or None, how["hold_statistics"] or None
    return model.computing(how["dtype"], remat=remat, hold_statistics=held)


def _all_ways(
    course: sequence.Course,
    models: Sequence[Model],
    seeds: Sequence[int],
    ways: Mapping[str, Penalties],
    folder: pathlib.Path,
) -> tuple[dict[str, Any], Model]:
    """Return the entry of each way, and the model of the last way from the first seed."""
    everything = range(len(course.lessons))
    fresh = [
        {part: sequence.scored(course, model, part, everything) for part in sequence.PARTS}
        for model in models
    ]
    entries, last = {}, models[0]
    for way, penalties in ways.items():
        found = []
        for seed, model in zip(seeds, models, strict=True):
            show = page.shower(way, seed, [lesson.name for lesson in course.lessons])
            place = folder / way / f"seed_{seed}"
            found.append(sequence.learn(course, model, place, penalties, seed=seed, show=show))
        entries[way] = way_entry(found, fresh, seeds)
        last = found[0].model
    return entries, last


def _joint(
    course: sequence.Course,
    models: Sequence[Model],
    seeds: Sequence[int],
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Return the entry of learning all tasks at once."""
    task, head, datasets = all_at_once(course.lessons, course.datasets)
    scores = []
    for seed, model in zip(seeds, models, strict=True):
        phases = course.plan(model.groups, tuple(model.heads))
        job = Job(model, head, task, datasets, phases, seed)
        state = sequence.run_job(course, job, (), folder / "joint" / f"seed_{seed}" / "all")
        ended = dataclasses.replace(model, params=state.params, stats=state.stats)
        everything = range(len(course.lessons))
        scores.append(
            {part: sequence.scored(course, ended, part, everything) for part in sequence.PARTS}
        )
        page.say_joint(seed, float(np.mean(scores[-1]["test"])))
    return joint_entry(scores, seeds)
