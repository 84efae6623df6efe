"""Weights between the start of a run and its end: how much of the training to keep, on two figures.

`interpolate` is the whole job. In order: score every alpha on the validation data of the target and
of each watched source, choose one by a stated rule, score start, chosen and tuned weights on the
test data, export the chosen model. Wortsman et al. 2022, arXiv:2109.01903.
"""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jtl.models.backbone import Backbone
from jtl.models.export import export
from jtl.models.model import Model
from jtl.recipes import identity, tasks
from jtl.recipes.between import TARGET, Line, at, make_ends, make_line, scored_once, validated
from jtl.recipes.datasets import check_sources, make_datasets
from jtl.recipes.predict import Predictor, load
from jtl.recipes.retain import Before, Watched
from jtl.recipes.start import opened, origin
from jtl.report import interpolation, jsonfile, record
from jtl.train.compile import enable_cache
from jtl.train.memory import keep_freed_memory

ALPHAS = tuple(i / 10 for i in range(11))
RULES = ("smallest", "best")
TUNED = "tuned"


def interpolate(
    backbone: Backbone | Model | Predictor,
    tuned: Model | Predictor | Callable[..., Any],
    data: Mapping[str, Any],
    *,
    folder: str | pathlib.Path,
    task: Callable[..., tasks.Task] = tasks.classification,
    retain: Sequence[Callable[..., Watched]] = (),
    alphas: Sequence[float | int] = ALPHAS,
    rule: str = "smallest",
    tolerance: float | int = 0.01,
    head: str = "head",
    batch_size: int = 32,
    buckets: int = 2,
    max_length: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the line from start to tuned weights, choose a point on it, and export that model.

    Heads that both models have are interpolated with the backbone. A head that is new has no start:
    it is the tuned one at every alpha, at alpha 0 on the start's features. BatchNorm statistics
    belong to their weights: strictly between the ends those from the lowest stage that training
    moved on are made anew from the target's training data; the ends keep their own.

    Args:
        backbone: what the tuned run began from: pretrained features, or a trained model.
        tuned: the trained model (`jtl.load(run)`); or a call that trains one, made as `tuned(
            backbone, data, folder=folder / "tuned", ...)`, such as `fine_tune` with its plan bound.
        data: {"train", "validation", "test"} of the target, those of the tuned run.
        folder: of this run. One that was interrupted goes on, one that ended is returned.
        task: `training data -> Task`, for the target's figures.
        retain: `Before -> Watched`, the sources; those of `recipes.retain` with options bound.
        alphas: shares of the tuned weights; 0 and 1 are scored in any case.
        rule: "smallest", the smallest alpha whose target figure is within `tolerance` of that of
            the tuned weights, so that most of the start is kept; or "best", the highest target
            figure, of equal ones the smallest alpha. Both on validation data alone.
        tolerance: in the units of the task's metric: 0.01 is one point of accuracy.
        head: of the target, in the tuned model.
        batch_size: rows of the batches that statistics are made of; that of training is best.
        buckets: number of padded lengths of texts.
        max_length: longest text in tokens; None is the checkpoint's own limit.
        seed: of the order of these batches, and of training where `tuned` is a call.
        overwrite: begin anew where a finished run lies.
        config: what `config.json` shows; None shows the options given here.

    Returns:
        {"metric", "rule", "tolerance", "chosen": alpha, "curve": [{"alpha", "target": {figure:
        validation}, "retain": {source: {figure: validation}}, "recomputed": whether statistics
        were}], "target": {"before", "after", "tuned": {"validation", "test", "test_interval"}} of
        alpha 0, the chosen and 1, "retain": {source: the same with "metric", "kind",
        "higher_is_better", "change" and "tuned_change" from alpha 0 with their intervals}, "heads":
        {head: "interpolated" or "tuned"}, "source", "data", "seed", "versions", "config",
        "seconds"}; also in `folder/result.json`.

    Raises:
        ValueError: a bad input; the message says what is wrong, what is there and what to do.
    """
    began = time.perf_counter()
    _check(rule, tolerance, alphas)
    start, classes = opened(backbone)
    check_sources(data)
    options = {"head": head, "buckets": buckets, "max_length": max_length, "seed": seed}
    shown = {
        "recipe": "interpolate",
        "backbone": origin(start),
        "tuned": _shown(tuned),
        "data": identity.sources(data),
        "task": identity.called(task),
        "retain": [identity.called(source) for source in retain],
        "alphas": alphas,
        "rule": rule,
        "tolerance": tolerance,
        "batch_size": batch_size,
        **options,
    }
    run = record.open_run(folder, config=config or shown, overwrite=overwrite)
    if run.result is not None:
        interpolation.show(run.folder, run.result)
        return run.result
    enable_cache()
    keep_freed_memory()
    if not isinstance(tuned, Model | Predictor):
        place = run.folder / TUNED
        tuned(backbone, data, folder=place, task=task, overwrite=overwrite, **options)
        tuned = load(place)
    ended, names = opened(tuned)
    made = task(data["train"])
    ends = make_ends(start, _checked(ended, names, head, made))
    datasets = make_datasets(ends.tuned, data, buckets=buckets, max_length=max_length)
    kept = tuple(name for name, said in ends.heads.items() if said == "interpolated")
    watched = [source(Before(ends.start, kept, classes)) for source in retain]
    line = make_line(ends, head, made, datasets, watched, batch_size=batch_size, seed=seed)
    curve = _curve(run, line, sorted({0.0, *map(float, alphas), 1.0}))
    chosen = choose(curve, made.metric, rule=rule, tolerance=tolerance)
    result = {
        "metric": made.metric,
        "rule": rule,
        "tolerance": tolerance,
        "chosen": chosen,
        "curve": curve,
        **scored_once(line, chosen),
        "heads": ends.heads,
        "source": ends.tuned.backbone.source,
        "data": {"name": datasets["train"].name, **{p: d.size for p, d in datasets.items()}},
        "seed": seed,
        "versions": record.versions(),
        "config": run.config,
        "seconds": time.perf_counter() - began,
    }
    labels = {**classes, **names, head: made.classes}
    labels = {name: words for name, words in labels.items() if name in ends.heads}
    export(run.folder / record.MODEL, at(line, chosen), labels=labels)
    result = jsonfile.plain(result)
    interpolation.write(run.folder, result)
    jsonfile.write(run.folder / record.RESULT, result)
    interpolation.show(run.folder, result)
    return result


def choose(
    curve: Sequence[Mapping[str, Any]], metric: str, *, rule: str, tolerance: float | int
) -> float:
    """Return the alpha that the rule takes from the validation figures of the target.

    >>> figures = {0.0: 0.5, 0.4: 0.79, 0.7: 0.82, 1.0: 0.8}
    >>> curve = [{"alpha": alpha, "target": {"accuracy": x}} for alpha, x in figures.items()]
    >>> choose(curve, "accuracy", rule="smallest", tolerance=0.01)
    0.4
    >>> choose(curve, "accuracy", rule="best", tolerance=0.01)
    0.7

    Args:
        curve: rows with "alpha", ascending to 1, and "target".
        metric: higher is better.
        rule: one of `RULES`; see `interpolate`.
        tolerance: of "smallest", in units of the metric.
    """
    figures = {row["alpha"]: row["target"][metric] for row in curve}
    if rule == "best":
        return max(figures, key=lambda alpha: (figures[alpha], -alpha))
    enough = figures[1.0] - tolerance - 1e-9  # 0.80 - 0.01 is a little more than 0.79
    return min(alpha for alpha, figure in figures.items() if figure >= enough)


def _check(rule: str, tolerance: float | int, alphas: Sequence[float | int]) -> None:
    if rule not in RULES or not tolerance >= 0:
        raise ValueError(
            f"rule is {rule!r} and tolerance {tolerance}; give one of {RULES} and 0 or more"
        )
    if not all(0 <= alpha <= 1 for alpha in alphas):
        raise ValueError(f"alphas are {list(alphas)}; give numbers from 0 to 1")


def _shown(tuned: Any) -> Any:
    ready = isinstance(tuned, Backbone | Model | Predictor)
    return origin(opened(tuned)[0]) if ready else identity.called(tuned)


def _checked(
    model: Any, names: Mapping[str, tuple[str, ...]], head: str, task: tasks.Task
) -> Model:
    heads = sorted(model.heads) if isinstance(model, Model) else []
    if head not in heads:
        raise ValueError(
            f"the tuned model has the heads {heads} and none named {head!r}; give the folder of a "
            "run that ended, or name its head by head="
        )
    if tuple(names.get(head, task.classes)) != tuple(task.classes):
        raise ValueError(
            f"the tuned head {head!r} answers {list(names[head])} and the data have "
            f"{list(task.classes)}; give the data of the tuned run (classes= in the same order)"
        )
    return model


def _curve(run: record.Run, line: Line, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Return the validation figures at every alpha; what an interrupted run has, is read."""
    metrics = {TARGET: line.task.metric, **{s.name: s.metric for s in line.watched}}
    there = {row["alpha"]: row for row in record.read_rows(run.folder)}
    curve = []
    for number, alpha in enumerate(alphas):
        if alpha in there:
            row = _folded(there[alpha], [source.name for source in line.watched])
        else:
            row = validated(line, alpha)
            record.append(run, _flat(row, number))
        interpolation.step(row, metrics)
        curve.append(row)
    return curve


def _flat(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a row of the curve as an event of `metrics.jsonl`."""
    alpha, again = row["alpha"], row["recomputed"]
    event = {"kind": "evaluation", "step": number, "phase": f"alpha {alpha:g}"}
    retain = {
        f"retain/{name}/{figure}": value
        for name, figures in row["retain"].items()
        for figure, value in figures.items()
    }
    return {**event, "alpha": alpha, "recomputed": again, **row[TARGET], **retain}


def _folded(event: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the row of the curve that an event was made from."""
    about = ("kind", "step", "phase", "alpha", "recomputed")
    own = {k: v for k, v in event.items() if k not in about and not k.startswith("retain/")}
    retain = {
        name: {
            key.removeprefix(f"retain/{name}/"): value
            for key, value in event.items()
            if key.startswith(f"retain/{name}/")
        }
        for name in names
    }
    found = {"alpha": event["alpha"], "recomputed": event["recomputed"]}
    return {**found, TARGET: own, "retain": retain}
