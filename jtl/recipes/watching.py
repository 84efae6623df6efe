"""Sources watched through a run: scored before, at each evaluation and after, and what changed.

A figure is computed again only where something that it reads may have moved since; and where the
lower blocks are held, from the derived column at the border.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jtl import data as jdata
from jtl.models.model import Model
from jtl.recipes.datasets import EVALUATION_ROWS, once
from jtl.recipes.job import Job, Settings
from jtl.recipes.retain import PARTS, Before, Watched
from jtl.recipes.views import View, make_view
from jtl.report.counting import counting
from jtl.train import parallel
from jtl.train.evaluate import Predict, make_predict
from jtl.train.plan import ever_live

Outputs = dict[str, dict[str, dict[str, np.ndarray]]]  # of each source on each split
Lives = Sequence[frozenset[str]]


class Last(NamedTuple):
    """The last figures of a source, and the labels that were live when they were taken."""

    figures: dict[str, float]
    live: frozenset[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Watching:
    """Sources ready to be scored; `watch` makes it.

    Attributes:
        watched: the sources.
        predict: {source: what its figures are made from}.
        views: {source: "validation" as the phases read it}.
        last: {source: last figures}; filled by use.
    """

    watched: tuple[Watched, ...]
    predict: Mapping[str, Predict]
    views: Mapping[str, View]
    last: dict[str, Last] = dataclasses.field(default_factory=dict)

    def __call__(self, params: Any, stats: Any, live: frozenset[str]) -> dict[str, float]:
        """Return {"retain/NAME/FIGURE": value} on the validation splits, for `make_engine`.

        Args:
            params: all parameters.
            stats: running statistics.
            live: labels that move in this phase.
        """
        found: dict[str, float] = {}
        for source in self.watched:
            last = self.last.get(source.name)
            # The best weights of a phase are put back at its end: the phase before counts too.
            if last is None or source.reads & (live | last.live):
                dataset = source.datasets["validation"]
                if source.reads & live:
                    dataset = self.views[source.name](live, params, stats)
                values = self.predict[source.name](params, stats, once(dataset))
                labels = source.datasets["validation"].labels
                last = Last(source.score(values, labels), live)
            self.last[source.name] = last._replace(live=live)
            found |= {f"retain/{source.name}/{k}": v for k, v in last.figures.items()}
        return found


def watch(
    job: Job, settings: Settings, kinds: Sequence[Callable[[Before], Watched]], before: Before
) -> tuple[Watching, Settings]:
    """Return the sources made for a start model, and the settings that are left for the target.

    Derived columns of the sources take their part, by rows, of the memory that `columns_mib` names.

    Raises:
        ValueError: two sources of one name, or a name that no metric can bear.
    """
    made = tuple(kind(before) for kind in kinds)
    _check_names([source.name for source in made])
    lives = [phase.live for phase in job.plan]
    rows = {
        source.name: source.datasets["validation"].size for source in made if _moves(source, lives)
    }
    own = sum(job.datasets[part].size for part in ("train", "validation"))
    whole = own + sum(rows.values())
    left = settings._replace(columns_mib=int(settings.columns_mib * own / whole))
    jit = functools.partial(parallel.split_forward, parallel.make_spread(settings.parallel))
    predict = {
        source.name: make_predict(source.apply, heads=source.outputs, jit=jit) for source in made
    }
    views = {
        source.name: _view(job.model, source, lives, settings, rows.get(source.name, 0) / whole)
        for source in made
    }
    return Watching(made, predict, views), left


def scored_before(watching: Watching, job: Job, *, resumed: bool) -> Outputs:
    """Return what the start model gives on both splits; a run that begins with it goes on there."""
    first = _outputs(watching, watching.watched, job.model)
    for source in () if resumed else watching.watched:
        watching.last[source.name] = Last(_validation(source, first[source.name]), frozenset())
    return first


def starts(watching: Watching, first: Outputs) -> dict[str, tuple[str, float]]:
    """Return {source: (its figure, the value on validation before training)}."""
    return {
        source.name: (source.metric, _validation(source, first[source.name])[source.metric])
        for source in watching.watched
    }


def changed(watching: Watching, job: Job, tuned: Model, first: Outputs) -> dict[str, Any]:
    """Return `retain` of result.json: each source before and after, and the change on its test.

    Args:
        watching: the sources.
        job: says what could move.
        tuned: the model after training.
        first: of `scored_before`.

    Returns:
        {"retain": {name: row}}, or {} where nothing is watched; `report.record` says what a row is.
    """
    ever = ever_live(job.plan)
    moved = [source for source in watching.watched if source.reads & ever]
    last = {**first, **_outputs(watching, moved, tuned)}
    rows = {s.name: _change(s, first[s.name], last[s.name]) for s in watching.watched}
    return {"retain": rows} if rows else {}


def _outputs(watching: Watching, sources: Sequence[Watched], model: Model) -> Outputs:
    return {
        source.name: {
            part: watching.predict[source.name](model.params, model.stats, once(dataset))
            for part, dataset in source.datasets.items()
        }
        for source in sources
    }


def _validation(source: Watched, values: Mapping[str, Any]) -> dict[str, float]:
    return source.score(values["validation"], source.datasets["validation"].labels)


def _change(source: Watched, first: Any, last: Any) -> dict[str, Any]:
    labels = {part: dataset.labels for part, dataset in source.datasets.items()}
    figures = {
        when: {part: source.score(values[part], labels[part]) for part in PARTS}
        for when, values in (("before", first), ("after", last))
    }
    short = {
        when: {part: found[source.metric] for part, found in parts.items()}
        for when, parts in figures.items()
    }
    low, high = source.interval(first["test"], last["test"], labels["test"])
    value = short["after"]["test"] - short["before"]["test"]
    return {
        "kind": source.kind,
        "metric": source.metric,
        "higher_is_better": source.higher_is_better,
        **short,
        "change": {"value": value, "interval": [low, high]},
        "figures": figures,
        "data": {part: dataset.size for part, dataset in source.datasets.items()},
    }


def _view(model: Model, source: Watched, lives: Lives, settings: Settings, share: float) -> View:
    dataset = source.datasets["validation"]
    folder = None if settings.columns_folder is None else pathlib.Path(settings.columns_folder)
    store = jdata.Store(
        memory_bytes=int(settings.columns_mib * 2**20 * share),
        disk_bytes=settings.columns_disk_mib * 2**20,
        folder=folder,
    )
    return make_view(
        *(model, dataset, [live for live in lives if live & source.reads]),
        batch_size=min(EVALUATION_ROWS, dataset.size),
        store=store,
        progress=counting(f"columns of {source.name}"),
    )


def _moves(source: Watched, lives: Lives) -> bool:
    return any(source.reads & live for live in lives)


def _check_names(names: Sequence[str]) -> None:
    if len({*names, "target"}) <= len(names) or any(not name or "/" in name for name in names):
        raise ValueError(
            f"retain names its sources {list(names)}; give each a name of its own, without '/', "
            "and not 'target'"
        )
