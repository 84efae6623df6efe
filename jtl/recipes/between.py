"""The line from the start of a run to its end: models on it, and their figures."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jtl import data as jdata
from jtl import masks, trees
from jtl.merging.wise_ft import wise_ft
from jtl.models.backbone import Backbone
from jtl.models.model import Model
from jtl.recipes import verdict
from jtl.recipes.datasets import Datasets, once
from jtl.recipes.retain import PARTS, Watched
from jtl.recipes.tasks import Task
from jtl.train.evaluate import Predict, make_predict
from jtl.train.held import held_stats
from jtl.train.statistics import make_recompute

TARGET = "target"
ENDS = ("before", "after", "tuned")


class Ends(NamedTuple):
    """The two ends of a line, and which leaves lie between them.

    Attributes:
        start: the tuned model with the start's weights; a head that is new is the tuned one.
        tuned: the tuned model.
        mask: of the leaves that both have.
        heads: {head: "interpolated", or "tuned" where it is new}.
    """

    start: Model
    tuned: Model
    mask: Any
    heads: dict[str, str]


class Line(NamedTuple):
    """A line, and what is scored on it.

    Attributes:
        ends: start and tuned model.
        head: of the target.
        task: its figures.
        datasets: of the target.
        watched: the sources.
        predict: forward passes by name, "target" and the sources.
        statistics: `params -> stats` on the target's training data; None where there are none.
    """

    ends: Ends
    head: str
    task: Task
    datasets: Datasets
    watched: Sequence[Watched]
    predict: Mapping[str, Predict]
    statistics: Callable[[Any], Any] | None


def make_ends(start: Backbone | Model, tuned: Model) -> Ends:
    """Return both ends with equal structure.

    Raises:
        ValueError: the start is of another shape, or nothing differs but new heads.
    """
    kept = start.params["heads"] if isinstance(start, Model) else {}
    body = start.params["backbone"] if isinstance(start, Model) else start.params
    heads = {name: "interpolated" if name in kept else "tuned" for name in tuned.heads}
    shared = {name: kept[name] for name, said in heads.items() if said == "interpolated"}
    both = {name: said == "interpolated" for name, said in heads.items()}
    mask = {
        "backbone": _all(tuned.params["backbone"], True),
        "heads": {name: _all(tuned.params["heads"][name], both[name]) for name in heads},
    }
    own = {"backbone": body, "heads": shared}
    ((_, params),) = wise_ft(own, tuned.params, (0,), mask=mask)
    if not trees.changes(params, tuned.params):
        raise ValueError(
            "start and tuned weights are the same, but for new heads: there is nothing between "
            "them; give the backbone that the run began from, and a run that moved it"
        )
    stats = _start_stats(start, tuned, heads)
    return Ends(dataclasses.replace(tuned, params=params, stats=stats), tuned, mask, heads)


def _start_stats(start: Backbone | Model, tuned: Model, heads: dict[str, str]) -> dict[str, Any]:
    """Return the statistics of the start; of heads that it does not have, the tuned ones."""
    theirs = start.stats if isinstance(start, Model) else {"backbone": start.stats}
    stats = dict(tuned.stats)
    if "backbone" in stats and jax.tree.leaves(theirs.get("backbone", {})):
        stats["backbone"] = theirs["backbone"]
    if "heads" in stats:
        kept = theirs.get("heads", {})
        stats["heads"] = {
            name: kept[name] if heads[name] == "interpolated" and name in kept else own
            for name, own in stats["heads"].items()
        }
    return stats


def make_line(
    ends: Ends,
    head: str,
    task: Task,
    datasets: Datasets,
    watched: Sequence[Watched],
    *,
    batch_size: int,
    seed: int,
) -> Line:
    """Return the line with its forward passes, each of which is compiled once.

    Raises:
        ValueError: two sources of one name, or a name with '/'.
    """
    names = [TARGET, *(source.name for source in watched)]
    if len(set(names)) < len(names) or any("/" in name for name in names):
        raise ValueError(
            f"retain names its sources {names[1:]}; give each a name of its own, without '/' and "
            f"not {TARGET!r}"
        )
    predict = {source.name: make_predict(source.apply, heads=source.outputs) for source in watched}
    predict[TARGET] = make_predict(ends.tuned.apply, heads=(head,))
    statistics, moved = None, _moved(ends)
    if moved and jax.tree.leaves(ends.tuned.stats):
        statistics = _statistics(ends, moved, datasets["train"], batch_size, seed)
    return Line(ends, head, task, datasets, watched, predict, statistics)


def at(line: Line, alpha: float) -> Model:
    """Return the model at an alpha, with the statistics that belong to its weights."""
    start, tuned, mask, _ = line.ends
    if alpha in (0.0, 1.0):
        return tuned if alpha else start
    ((_, params),) = wise_ft(start.params, tuned.params, (alpha,), mask=mask)
    stats = tuned.stats if line.statistics is None else line.statistics(params)
    return dataclasses.replace(tuned, params=params, stats=stats)


def validated(line: Line, alpha: float) -> dict[str, Any]:
    """Return all figures of target and sources on validation data: a row of the curve."""
    found = _outputs(line, at(line, alpha), "validation")
    return {
        "alpha": alpha,
        "target": line.task.score(found[TARGET][line.head], line.datasets["validation"].labels),
        "retain": {
            source.name: source.score(found[source.name], source.datasets["validation"].labels)
            for source in line.watched
        },
        "recomputed": line.statistics is not None and alpha not in (0.0, 1.0),
    }


def scored_once(line: Line, chosen: float) -> dict[str, Any]:
    """Return "target" and "retain" of alpha 0, the chosen and 1, on validation and test data."""
    alphas = dict(zip(ENDS, (0.0, chosen, 1.0), strict=True))
    made = {}
    for alpha in set(alphas.values()):
        model = at(line, alpha)
        made[alpha] = {part: _outputs(line, model, part) for part in PARTS}
    found = {end: made[alpha] for end, alpha in alphas.items()}
    labels = {part: dataset.labels for part, dataset in line.datasets.items()}
    target = {}
    for end, parts in found.items():
        validation, test = (parts[part][TARGET][line.head] for part in PARTS)
        scored = verdict.score(line.task, verdict.Scored(validation, test, 0.0), labels)
        target[end] = {name: value for name, value in scored.items() if name != "seconds"}
    return {TARGET: target, "retain": {s.name: _change(s, found) for s in line.watched}}


def _all(tree: Any, value: bool) -> Any:
    return jax.tree.map(lambda _: value, tree)


def _statistics(
    ends: Ends, moved: tuple[str, ...], train: Any, batch_size: int, seed: int
) -> Callable[[Any], Any]:
    size = min(batch_size, train.size)
    again = make_recompute(ends.tuned.apply, live=moved)
    steps = jdata.steps_per_epoch(train, size)

    def statistics(params: Any) -> Any:
        return again(params, ends.tuned.stats, jdata.batches(train, size, seed=seed, stop=steps))

    return statistics


def _moved(ends: Ends) -> tuple[str, ...]:
    """Return what has statistics among the stages from the lowest that differs up, and the heads.

    Below it all inputs are the same. Where only heads differ, those that do.
    """
    tuned = ends.tuned
    names = set(trees.changes(ends.start.params, tuned.params))
    pairs = zip(masks.names(tuned.params), jax.tree.leaves(tuned.labels), strict=True)
    labels = {label for name, label in pairs if name in names}
    places = [i for i, label in enumerate(tuned.groups) if label in labels]
    stages = tuned.groups[min(places, default=len(tuned.groups)) :]
    heads = tuple(name for name in tuned.heads if stages or name in labels)
    return tuple(label for label in (*stages, *heads) if _has_stats(tuned, label))


def _has_stats(model: Model, label: str) -> bool:
    """Return whether a label has running statistics; what has none need not be live for them."""
    held = held_stats(model.stats, model.labels, frozenset({label}))
    return not all(jax.tree.leaves(held))


def _outputs(line: Line, model: Model, part: str) -> dict[str, dict[str, Any]]:
    datasets = {TARGET: line.datasets, **{s.name: s.datasets for s in line.watched}}
    return {
        name: line.predict[name](model.params, model.stats, once(parts[part]))
        for name, parts in datasets.items()
    }


def _change(source: Watched, found: Mapping[str, Any]) -> dict[str, Any]:
    labels = {part: dataset.labels for part, dataset in source.datasets.items()}
    row: dict[str, Any] = {
        end: {
            part: source.score(values[source.name], labels[part])[source.metric]
            for part, values in parts.items()
        }
        for end, parts in found.items()
    }
    first = found["before"]["test"][source.name]
    for end, name in (("after", "change"), ("tuned", "tuned_change")):
        bounds = source.interval(first, found[end]["test"][source.name], labels["test"])
        value = row[end]["test"] - row["before"]["test"]
        row[name] = {"value": value, "interval": list(bounds)}
    about = {"kind": source.kind, "metric": source.metric}
    return {**about, "higher_is_better": source.higher_is_better, **row}
