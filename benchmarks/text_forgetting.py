"""The text setting of `benchmarks.forgetting`: MiniLM tuned on film reviews, then on spam.

The head of the reviews stays on the model; its accuracy is watched while a task of another kind is
learned in several ways. Strengths of L2-SP, EWC, KL and LwF are the best that `--search` found by
the validation figures, from a seed that the table does not use: what keeps most of the reviews
while spam stays within a point. The share of replay was not searched.
"""

import contextlib
import io
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import assets, measure, table
from benchmarks.reviews import REVIEWS, WEIGHTS
from jtl import config

SOURCE, TARGET = "reviews", "spam"
SEARCH_SEED = 10
WITHIN = 0.01  # of plain tuning's accuracy: equal on the target
KEPT_AIM = 0.8  # of what plain tuning loses
RATE = 3e-4
SIZES = dict(train=1000, validation=500, test=1000)
_FULL = dict(kind="full", rate=RATE, head_rate=2e-3, epochs=2, warmup=0.1)
_PROGRESSIVE = dict(
    kind="progressive",
    head_rate=2e-3,
    rate=RATE / 3,
    final_rate=RATE / 10,
    decay=0.9,
    per_phase=2,
    head_epochs=2,
)
PLANS: dict[str, Mapping[str, Any]] = {
    "low_rate": {**_FULL, "rate": RATE / 10},
    "progressive": _PROGRESSIVE,
}
PENALTIES: dict[str, dict[str, Any]] = {
    "l2_sp": dict(kind="l2_sp", weight=1.0),
    "ewc": dict(kind="ewc", weight=10000.0, examples=256, chunk=32),
    "kl": dict(kind="kl", weight=3.0, temperature=1.0),
    "lwf": dict(kind="lwf", weight=3.0),
    "replay": dict(kind="replay", rows=0.05),
}
WAYS = ("plain", *PLANS, *PENALTIES, "wise_ft")
QUICK = ("plain", "ewc")
SEARCH = {
    "l2_sp": (0.1, 1.0, 10.0),
    "ewc": (100.0, 1000.0, 10000.0),
    "kl": (1.0, 3.0, 10.0),
    "lwf": (1.0, 3.0, 10.0),
}


def rows(
    quick: bool,
    seeds: Sequence[int],
    *,
    search: bool = False,
    ways: Sequence[str] | None = None,
    folder: str | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each way, with its figures from every seed.

    Args:
        quick: few examples, one epoch, `QUICK` ways.
        seeds: of splits, heads and order.
        search: compare strengths on validation data instead, from a seed of its own.
        ways: only these and plain tuning; None is all.
        folder: where the runs are kept; started again, it goes on where it was. None: nowhere.
    """
    known = tuple(SEARCH) if search else WAYS
    if unknown := sorted(set(ways or ()) - set(known)):
        raise ValueError(f"no such ways of text: {unknown}; there are {known}")
    with tempfile.TemporaryDirectory() as passing:
        place = pathlib.Path(folder or passing)
        if search:
            return _searched(place, quick, ways or tuple(SEARCH))
        wanted = ways or (QUICK if quick else WAYS)
        chosen = [way for way in WAYS if way == "plain" or way in wanted]
        found = {seed: _seed(place / str(seed), seed, chosen, quick) for seed in seeds}
    return [_row(way, [found[seed] for seed in seeds]) for way in chosen]


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of the rows."""
    body = []
    for row in found:
        deviations = [row["spread"][name] for name in ("target", "source", "kept")]
        values = [row[name] for name in ("target", "source", "kept")]
        cells = [_percent(v, d) for v, d in zip(values, deviations, strict=True)]
        body.append((row["way"], *cells, "yes" if row["equal_target"] else "no", table.aimed(row)))
    if body:
        headers = ("way", "spam", "reviews", "kept", "spam within 1 point", "aim")
        title = "Test accuracy in percent; kept: of what plain tuning loses on the reviews"
        table.show(title, headers, body, left=1)


def _percent(value: float | None, deviation: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _seed(place: pathlib.Path, seed: int, ways: Sequence[str], quick: bool) -> dict[str, Any]:
    """Return {way: {"target", "source", "before"}} on the test splits, from one seed."""
    source = _source(place / "source", seed, quick)
    found = {}
    for way in ways:
        measure.say(f"text: {way}, seed {seed}")
        if way == "wise_ft":
            result = _interpolated(place, source, seed, quick)
            figure = result["target"]["after"]["test"]
        else:
            penalties = (PENALTIES[way],) if way in PENALTIES else ()
            result = _tuned(place / way, source, seed, quick, PLANS.get(way, _FULL), penalties)
            figure = result["target"]["test"]
        kept = result["retain"][SOURCE]
        found[way] = {
            "target": figure,
            "source": kept["after"]["test"],
            "before": kept["before"]["test"],
        }
    return found


def _row(way: str, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = {name: [seed[way][name] for seed in seeds] for name in ("target", "source", "before")}
    plain = {name: np.mean([seed["plain"][name] for seed in seeds]) for name in values}
    lost = [seed["plain"]["before"] - seed["plain"]["source"] for seed in seeds]
    values["kept"] = [
        (seed[way]["source"] - seed["plain"]["source"]) / loss
        for seed, loss in zip(seeds, lost, strict=True)
        if loss > WITHIN
    ]
    means = {name: float(np.mean(row)) if row else None for name, row in values.items()}
    equal = bool(means["target"] is not None and means["target"] >= plain["target"] - WITHIN)
    aim = KEPT_AIM if equal and way != "plain" else None
    return {
        "way": way,
        **means,
        "equal_target": equal,
        **table.judged(means["kept"], aim, better="higher"),
        "values": values,
        "spread": {
            name: float(np.std(row, ddof=1)) if len(row) > 1 else None
            for name, row in values.items()
        },
    }


def _searched(place: pathlib.Path, quick: bool, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Return the validation figures of each strength."""
    place = place / f"search_{SEARCH_SEED}"
    source = _source(place / "source", SEARCH_SEED, quick)
    found = []
    searched = {way: SEARCH[way] for way in ways}
    for way, weights in {"plain": (0.0,), **searched}.items():
        for weight in weights:
            penalties = (dict(PENALTIES[way], weight=weight),) if way in PENALTIES else ()
            folder = place / f"{way}_{weight}"
            with contextlib.redirect_stdout(io.StringIO()):  # it shows figures of the test splits
                result = _tuned(folder, source, SEARCH_SEED, quick, _FULL, penalties)
            figures = {
                "target": result["target"]["validation"],
                "source": result["retain"][SOURCE]["after"]["validation"],
            }
            measure.say(f"{way} {weight}: {figures}")
            found.append({"search": way, "weight": weight, "seed": SEARCH_SEED, **figures})
    return found


def _source(folder: pathlib.Path, seed: int, quick: bool) -> str:
    """Tune MiniLM on the reviews, and return the folder of that run."""
    backbone = dict(kind="pretrained", name=WEIGHTS)
    plan = dict(kind="full", rate=1e-4, head_rate=2e-3, epochs=1 if quick else 2, warmup=0.1)
    _run(folder, backbone, _reviews(seed, quick), SOURCE, plan, seed)
    return str(folder)


def _tuned(
    folder: pathlib.Path,
    source: str,
    seed: int,
    quick: bool,
    plan: Mapping[str, Any],
    penalties: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Tune the source run on spam, and return the result."""
    data = _reviews(seed, quick)
    given = [
        dict(penalty, data=data) if penalty["kind"] in ("ewc", "replay") else dict(penalty)
        for penalty in penalties
    ]
    plan = {**plan, "per_phase": 6, "head_epochs": 1} if quick and "per_phase" in plan else plan
    plan = {**plan, "epochs": 1} if quick and "epochs" in plan else plan
    backbone = dict(kind="run", folder=source)
    more = dict(penalties=given, retain=(_retained(seed, quick),))
    return _run(folder, backbone, _spam(seed, quick), TARGET, plan, seed, **more)


def _interpolated(place: pathlib.Path, source: str, seed: int, quick: bool) -> dict[str, Any]:
    """Interpolate between the source and plain tuning's result; alpha by validation on spam."""
    return config.run(
        dict(
            recipe="interpolate",
            folder=str(place / "wise_ft"),
            backbone=dict(kind="run", folder=source),
            tuned=dict(kind="run", folder=str(place / "plain")),
            data=_spam(seed, quick),
            head=TARGET,
            retain=(_retained(seed, quick),),
            tolerance=WITHIN / 2,
            max_length=48,
        )
    )


def _run(
    folder: pathlib.Path,
    backbone: Mapping[str, Any],
    data: Mapping[str, Any],
    head: str,
    plan: Mapping[str, Any],
    seed: int,
    **more: Any,
) -> dict[str, Any]:
    return config.run(
        dict(
            recipe="fine_tune",
            folder=str(folder),
            backbone=backbone,
            data=data,
            task=dict(kind="classification", dropout=0.1),
            head=head,
            plan=plan,
            optimizer=dict(kind="adamw", weight_decay=0.01),
            batch_size=32,
            max_length=48,
            seed=seed,
            **more,
        )
    )


def _reviews(seed: int, quick: bool) -> dict[str, Any]:
    where, classes = dict(source="rotten_tomatoes"), ("negative", "positive")
    return dict(
        kind="table", path=REVIEWS, where=where, classes=classes, seed=seed, **_sizes(quick)
    )


def _spam(seed: int, quick: bool) -> dict[str, Any]:
    path = assets.fetch("sms_spam") / "sms-spam.csv"
    names = dict(label="spam", classes=("ham", "spam"))
    return dict(kind="table", path=str(path), seed=seed, **names, **_sizes(quick))


def _retained(seed: int, quick: bool) -> dict[str, Any]:
    data = _reviews(seed, quick)
    return dict(kind="task", name=SOURCE, head=SOURCE, data=data, max_length=48)


def _sizes(quick: bool) -> dict[str, int]:
    return dict(train=32, validation=32, test=32) if quick else SIZES
