"""The MNIST settings of `benchmarks.forgetting`: tasks, ways, and the strengths of penalties.

`python -m benchmarks.forgetting --search` compares strengths by the validation figure from a seed
that the tables do not use. Those of EWC and SI on permuted MNIST, and of EWC, SI and LwF on split
MNIST with a head for each task, are the best found so; the others are round numbers that nothing
was searched for.
"""

import tempfile
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jtl import config

NAMES = tuple(str(digit) for digit in range(10))
PAIRS = tuple((digit, digit + 1) for digit in range(0, 10, 2))
BUFFER = 2000  # examples that replay keeps in all
QUICK = {
    "permuted": ("ewc", "si"),
    "split_task": ("lwf",),
    "split_class": ("replay",),
}


class Setting(NamedTuple):
    """A sequence of tasks, and the ways to learn it.

    Attributes:
        scenario: of `recipes.continual`.
        ways: {way: penalty sections}.
        plan: of each task.
        search: {way: strengths that the search compares}.
        hidden: widths of the MLP.
        number: of tasks.
        optimizer: section of the config.
        batch_size: examples a step.
        clip: largest norm of the gradient, None for none.
    """

    scenario: str
    ways: Mapping[str, tuple[dict[str, Any], ...]]
    plan: Mapping[str, Any]
    search: Mapping[str, Sequence[float]]
    hidden: tuple[int, ...] = (400, 400)
    number: int = 5
    optimizer: Mapping[str, Any] = MappingProxyType(dict(kind="adam"))
    batch_size: int = 256
    clip: float | None = None


def _fisher(kind: str, weight: float, **fields: Any) -> tuple[dict[str, Any], ...]:
    return (dict(kind=kind, weight=weight, examples=1000, **fields),)


_PERMUTED = Setting(
    "domain",
    {
        "ewc": _fisher("ewc", 15.0),
        "si": (dict(kind="si", weight=3.0),),
        "plain": (),
        "online_ewc": _fisher("ewc", 15.0, form="online"),
        "replay": (dict(kind="replay", rows=0.5, size=BUFFER),),
        "mas": _fisher("mas", 0.03),
    },
    dict(kind="full", rate=0.1, head_rate=0.1, epochs=3),
    {"ewc": (15.0, 40.0), "si": (1.0, 3.0, 6.0), "mas": (0.01, 0.03, 0.1)},
    number=10,
    optimizer=dict(kind="sgd", momentum=0.9),
)

SETTINGS = {
    "permuted": _PERMUTED,
    # As wide as the network that the paper of EWC takes for ten tasks may be (400 to 2000).
    "permuted_wide": _PERMUTED._replace(
        ways={way: _PERMUTED.ways[way] for way in ("ewc", "si", "plain")}, hidden=(1000, 1000)
    ),
    "split_task": Setting(
        "task",
        {
            "plain": (),
            "ewc": _fisher("ewc", 3000.0),
            "si": (dict(kind="si", weight=1000.0),),
            "lwf": (dict(kind="lwf", weight=1.0),),
            "replay": (dict(kind="replay", rows=0.5, size=BUFFER),),
        },
        dict(kind="full", rate=3e-4, head_rate=3e-4, epochs=10),
        {
            "ewc": (3000.0, 30000.0),
            "si": (30.0, 300.0, 1000.0, 3000.0, 10000.0),
            "lwf": (0.3, 1.0, 3.0),
        },
    ),
    "split_class": Setting(
        "class",
        {
            "plain": (),
            "ewc": _fisher("ewc", 1000.0),
            "si": (dict(kind="si", weight=1.0),),
            "lwf": (dict(kind="lwf", weight=1.0),),
            "replay": (dict(kind="replay", rows=0.5, size=BUFFER),),
        },
        dict(kind="full", rate=3e-4, head_rate=3e-4, epochs=4),
        {},
    ),
}


def tasks(name: str, path: str, number: int, sizes: Mapping[str, Any]) -> tuple[dict, ...]:
    """Return the tasks of a setting on MNIST in a folder."""
    data = dict(kind="mnist", path=path, **sizes)
    if name.startswith("permuted"):
        orders = (None, *range(1, number))
        return tuple(dict(name=f"order_{i}", data=dict(data, permutation=order))
                     for i, order in enumerate(orders))  # fmt: skip
    shared = dict(names=NAMES) if name == "split_class" else {}
    return tuple(
        dict(name=f"digits_{'_'.join(map(str, pair))}", data=dict(data, classes=pair, **shared))
        for pair in PAIRS[:number]
    )


def learn(
    name: str,
    setting: Setting,
    *,
    path: str,
    seeds: Sequence[int],
    sizes: Mapping[str, Any],
    joint: bool = True,
) -> dict[str, Any]:
    """Return the result of a continual run of a setting; nothing of it stays on disk."""
    shape = dict(image_size=28, num_channels=1, hidden_sizes=setting.hidden)
    with tempfile.TemporaryDirectory() as folder:
        return config.run(
            dict(
                recipe="continual",
                folder=f"{folder}/run",
                scenario=setting.scenario,
                backbone=dict(kind="scratch", family="mlp", config=shape, mean=(0.0,), std=(1.0,)),
                tasks=tasks(name, path, setting.number, sizes),
                task=dict(kind="classification", dropout=0.0),
                plan=dict(setting.plan),
                optimizer=dict(setting.optimizer),
                ways=dict(setting.ways),
                joint=joint,
                batch_size=setting.batch_size,
                clip=setting.clip,
                checkpoints=False,
                seeds=tuple(seeds),
            )
        )


def with_strength(setting: Setting, way: str, weight: float) -> Setting:
    """Return the setting with one way alone, at another strength."""
    sections = tuple(dict(section, weight=weight) for section in setting.ways[way])
    return setting._replace(ways={way: sections})
