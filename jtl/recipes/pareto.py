"""One penalty at several strengths: what each gains on the target and leaves of a source.

The runs are those of `fine_tune`, each in a folder of its own. Which one is taken is said by the
validation splits and a stated rule; the test figures of all are read after that.
"""

import functools
import inspect
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jtl.models.backbone import Backbone
from jtl.models.model import Model
from jtl.recipes import tasks
from jtl.recipes.finetune import DEFAULT_PLAN, fine_tune
from jtl.recipes.job import Settings
from jtl.recipes.predict import Predictor
from jtl.recipes.retain import Watched
from jtl.recipes.start import described, opened
from jtl.report import jsonfile, record
from jtl.report import pareto as report
from jtl.train.plan import Phase

Point = tuple[float | int, float | int]
Runs = dict[float, tuple[str, dict[str, Any]]]  # {strength: (folder, result)}


def pareto(
    backbone: Backbone | Model | Predictor,
    data: Mapping[str, Any],
    *,
    folder: str | pathlib.Path,
    penalties: Sequence[Callable[..., Any]],
    retain: Sequence[Callable[..., Watched]],
    strengths: Sequence[float | int] = (0, 1, 10, 100),
    tolerance: float | int = 0.01,
    source: str | None = None,
    task: Callable[..., tasks.Task] = tasks.classification,
    plan: Callable[..., Sequence[Phase]] = DEFAULT_PLAN,
    optimizer: Any = None,
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
    """Fine-tune once for each strength, and return the front, also in `folder/result.json`.

    Taken is, of the runs whose target figure on validation is within `tolerance` of the best, the
    one that keeps most of the source there; its model is copied to `folder/model`.

    Args:
        backbone: as for `fine_tune`, like the arguments that are not named here.
        data: of the target.
        folder: of all runs; one that was interrupted goes on.
        penalties: the first takes the strengths as its `weight`; the others stay as they are.
        retain: watched sources, at least one.
        strengths: weights of the first penalty; 0 leaves it out.
        tolerance: of the target's figure, in its own unit (0.01 is one point of accuracy).
        source: name of the watched source that is traded against; None where there is only one.
        task: `training data -> Task`.
        plan: `(groups, heads) -> phases`.
        optimizer: transform at unit rate; None is `recipes.optimizers.adamw()`.
        head: name of the task's head.
        batch_size: examples a step.
        buckets: number of padded lengths of texts.
        max_length: longest text in tokens.
        clip: largest global norm of the live gradient.
        accumulate: microbatches a step.
        parallel: how the runs lie on the devices.
        save_every: steps between checkpoints.
        columns_mib: memory for derived columns, MiB.
        columns_disk_mib: of the folder of columns.
        columns_folder: of these columns.
        ema: decay of a moving average.
        shares_every: steps between probes of each term's share of the gradient.
        dtype: of the computation; None is the backbone's own.
        remat: compute the inside of each block again in the backward pass.
        hold_statistics: BatchNorm keeps its stored statistics in live blocks too.
        seed: of order, dropout and fresh weights, the same in all runs.
        overwrite: train anew where finished runs lie.
        config: what `config.json` shows; None shows the options given here.

    Returns:
        {"metric", "source", "source_metric", "source_higher_is_better", "start": the source's
        {validation, test} before training, "points": [{"strength", "folder", "target": {validation,
        test, test_interval}, "retained": {validation, test}, "change", "front", "warnings"}],
        "taken": strength, "rule": in words, and "seed", "versions", "config", "seconds"}.

    Raises:
        ValueError: no penalty, a first one without `weight`, no source, strengths that are not two
            or more different ones, and as `fine_tune`.
    """
    began = time.perf_counter()
    strengths = tuple(float(strength) for strength in strengths)
    _check(penalties, retain, strengths, tolerance)
    start, _ = opened(backbone)
    settings = Settings(
        *(optimizer, batch_size, clip, accumulate, parallel, save_every),
        *(columns_mib, columns_disk_mib, columns_folder, ema, shares_every),
    )
    options = {"head": head, "buckets": buckets, "max_length": max_length, "seed": seed}
    options |= {"dtype": dtype, "remat": remat, "hold_statistics": hold_statistics}
    calls = {"task": task, "plan": plan, "penalties": penalties, "retain": retain}
    more = {"strengths": strengths, "tolerance": tolerance, "source": source}
    more["optimizer"] = "given" if optimizer else "adamw"
    shown = described("pareto", start, data, settings, {**options, **more}, calls=calls)
    place = record.open_run(folder, config=config or shown, overwrite=overwrite)
    if place.result is not None:
        report.show(place.folder, place.result)
        return place.result
    runs: Runs = {}
    for strength in strengths:
        name = f"strength_{strength:g}"
        run = {
            **calls,
            **options,
            **settings._asdict(),
            "penalties": _at(penalties, strength),
            "folder": place.folder / name,
            "config": {**place.config, "strength": strength},
        }
        runs[strength] = name, fine_tune(backbone, data, **run, overwrite=overwrite)
        _source(source, runs)  # refused after the first run, not after the last
    found = {
        **_compared(runs, _source(source, runs), tolerance),
        "seed": seed,
        "versions": record.versions(),
        "config": place.config,
        "seconds": time.perf_counter() - began,
    }
    result = jsonfile.plain(found)
    best = place.folder / runs[result["taken"]][0] / record.MODEL
    shutil.copytree(best, place.folder / record.MODEL, dirs_exist_ok=True)
    report.write(place.folder, result)
    jsonfile.write(place.folder / record.RESULT, result)
    report.show(place.folder, result)
    return result


def front(points: Sequence[Point]) -> list[bool]:
    """Return which points no other beats: one at least as good in both, and better in one.

    >>> front([(0.9, 0.1), (0.8, 0.5), (0.7, 0.4)])  # higher is better; the last loses on both
    [True, True, False]
    """

    def beaten(point: Point) -> bool:
        return any(
            other != point and other[0] >= point[0] and other[1] >= point[1] for other in points
        )

    return [not beaten(point) for point in points]


def take(points: Sequence[Point], tolerance: float | int) -> int:
    """Return the point with the best second figure within a tolerance of the best first.

    Of equals the one with the better first figure is taken, then the earlier one.

    >>> take([(0.90, 0.1), (0.895, 0.5), (0.7, 0.9)], tolerance=0.01)
    1
    """
    best = max(first for first, _ in points)
    near = [i for i, (first, _) in enumerate(points) if first >= best - tolerance - 1e-12]
    return max(near, key=lambda i: (points[i][1], points[i][0], -i))


def _at(penalties: Sequence[Callable[..., Any]], strength: float) -> tuple[Callable[..., Any], ...]:
    """Return the penalties with the strength as the weight of the first; 0 leaves it out."""
    first, *rest = penalties
    return (functools.partial(first, weight=strength), *rest) if strength else tuple(rest)


def _compared(runs: Runs, source: str, tolerance: float | int) -> dict[str, Any]:
    """Return what the runs say together; the choice reads the validation figures alone."""
    rows = {strength: result["retain"][source] for strength, (_, result) in runs.items()}
    some = next(iter(rows.values()))
    sign = 1 if some["higher_is_better"] else -1
    figures = [
        (result["target"]["validation"], sign * result["retain"][source]["after"]["validation"])
        for _, result in runs.values()
    ]
    on_front, taken = front(figures), list(runs)[take(figures, tolerance)]
    points = [
        {
            "strength": strength,
            "folder": name,
            "target": {
                key: result["target"][key] for key in ("validation", "test", "test_interval")
            },
            "retained": rows[strength]["after"],
            "change": rows[strength]["change"],
            "front": best,
            "warnings": result.get("warnings", []),
        }
        for (strength, (name, result)), best in zip(runs.items(), on_front, strict=True)
    ]
    first = next(iter(runs.values()))[1]
    return {
        "metric": first["metric"],
        "source": source,
        "source_metric": some["metric"],
        "source_higher_is_better": some["higher_is_better"],
        "start": some["before"],
        "points": points,
        "taken": taken,
        "rule": f"of the runs within {tolerance:g} of the best target figure on validation, the "
        f"one that keeps most of {source} there",
    }


def _source(source: str | None, runs: Runs) -> str:
    names = list(next(iter(runs.values()))[1]["retain"])
    if source is None and len(names) == 1:
        return names[0]
    if source in names:
        return str(source)
    raise ValueError(
        f"source={source!r} is to be traded against the target; retain watches {names}; name one"
    )


def _check(
    penalties: Sequence[Any],
    retain: Sequence[Any],
    strengths: Sequence[float],
    tolerance: float | int,
) -> None:
    if not penalties or not retain:
        raise ValueError(
            f"pareto has {len(penalties)} penalties and {len(retain)} watched sources; give at "
            "least one of each: the strength of the first penalty is what differs"
        )
    known = inspect.signature(penalties[0]).parameters
    if "weight" not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise ValueError(
            f"the first penalty has no weight to be varied; it takes {sorted(known)}; give one "
            "that has, and the others after it"
        )
    if len(set(strengths)) < max(len(strengths), 2) or min(strengths) < 0 or tolerance < 0:
        raise ValueError(
            f"strengths are {list(strengths)} and tolerance is {tolerance}; give two or more "
            "different strengths, none below 0, and a tolerance of 0 or more"
        )
