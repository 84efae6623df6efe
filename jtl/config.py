"""From a config to calls: a section is `dict(kind="name", **fields)`, one table for each section.

Defaults stand in one place, the signature of the function that a kind names. An unknown section,
kind or field is an error that lists the known ones.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

TABLES: dict[str, dict[str, str]] = {
    "recipe": {
        "fine_tune": "jtl.recipes.finetune:fine_tune",
        "continual": "jtl.recipes.continual:continual",
        "find_rate": "jtl.recipes.find_rate:find_rate",
        "interpolate": "jtl.recipes.interpolate:interpolate",
        "pareto": "jtl.recipes.pareto:pareto",
    },
    "backbone": {
        "pretrained": "jtl.models.load:load_backbone",
        "scratch": "jtl.recipes.scratch:scratch",
        "run": "jtl.recipes.predict:load",
    },
    "tuned": {
        "fine_tune": "jtl.recipes.finetune:fine_tune",
        "run": "jtl.recipes.predict:load",
    },
    "data": {
        "table": "jtl.recipes.sources:table",
        "folder": "jtl.recipes.sources:folder",
        "tfds": "jtl.recipes.sources:tfds",
        "digits": "jtl.recipes.sources:digits",
        "mnist": "jtl.recipes.sources:mnist",
    },
    "plan": {
        "feature_extraction": "jtl.train.phases:feature_extraction",
        "last_groups": "jtl.train.phases:last_groups",
        "full": "jtl.train.phases:full",
        "gradual_unfreeze": "jtl.train.phases:gradual_unfreeze",
        "linear_probe_then_finetune": "jtl.train.phases:linear_probe_then_finetune",
        "phases": "jtl.train.phases:by_hand",
        "progressive": "jtl.train.phases:progressive",
    },
    "optimizer": {
        "adabelief": "jtl.recipes.optimizers:adabelief",
        "adafactor": "jtl.recipes.optimizers:adafactor",
        "adagrad": "jtl.recipes.optimizers:adagrad",
        "adam": "jtl.recipes.optimizers:adam",
        "adamw": "jtl.recipes.optimizers:adamw",
        "lamb": "jtl.recipes.optimizers:lamb",
        "lars": "jtl.recipes.optimizers:lars",
        "lion": "jtl.recipes.optimizers:lion",
        "muon": "jtl.recipes.optimizers:muon",
        "nadamw": "jtl.recipes.optimizers:nadamw",
        "radam": "jtl.recipes.optimizers:radam",
        "rmsprop": "jtl.recipes.optimizers:rmsprop",
        "sgd": "jtl.recipes.optimizers:sgd",
    },
    "task": {
        "classification": "jtl.recipes.tasks:classification",
        "regression": "jtl.recipes.tasks:regression",
    },
    "penalties": {
        "agem": "jtl.recipes.terms:agem",
        "delta": "jtl.recipes.terms:delta",
        "ewc": "jtl.recipes.terms:ewc",
        "features": "jtl.recipes.terms:features",
        "kl": "jtl.recipes.terms:kl",
        "l2_sp": "jtl.recipes.terms:l2_sp",
        "lwf": "jtl.recipes.terms:lwf",
        "mas": "jtl.recipes.terms:mas",
        "replay": "jtl.recipes.terms:replay",
        "si": "jtl.recipes.terms:si",
    },
    "retain": {
        "masked_lm": "jtl.recipes.language:masked_lm",
        "probe": "jtl.recipes.retain:probe",
        "task": "jtl.recipes.retain:task",
    },
}

MANY = ("penalties", "retain")  # sections that are tuples of sections


def resolve(section: str, kind: str) -> Callable[..., Any]:
    """Return the function that `kind` names in the table of `section`.

    Raises:
        ValueError: the section has no such kind.
    """
    table = TABLES[section]
    if kind not in table:
        raise ValueError(
            f"{section} has no kind {kind!r}; it has {sorted(table)}{_nearest(kind, table)}"
        )
    module, name = table[kind].split(":")
    return getattr(importlib.import_module(module), name)


def build(section: str, fields: Mapping[str, Any], /, *args: Any, **given: Any) -> Any:
    """Call what a section names: the fields as keywords, `args` and `given` from the caller.

    Raises:
        ValueError: no `kind`, an unknown kind, or a field that the function does not take or lacks.
    """
    call = bind(section, fields, *args, **given)
    function = resolve(section, fields["kind"])
    _check_complete(f"{section} of kind {fields['kind']!r}", function, len(args), fields, given)
    return call()


def bind(section: str, fields: Any, /, *args: Any, **given: Any) -> Callable[..., Any]:
    """Return the call of `build` with its fields checked, still to be made, perhaps with more args.

    Raises:
        ValueError: as `build`.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"section {section} is {fields!r}; write {{'kind': 'NAME', ...}}, with a kind of "
            f"{sorted(TABLES[section])}"
        )
    fields = dict(fields)
    if "kind" not in fields:
        raise ValueError(
            f"section {section} has the fields {sorted(fields)} and no kind; "
            f"add kind= one of {sorted(TABLES[section])}"
        )
    kind = fields.pop("kind")
    function = resolve(section, kind)
    _check_fields(f"{section} of kind {kind!r}", function, fields, set(given))

    def call(*more: Any, **options: Any) -> Any:
        return function(*args, *more, **{**fields, **given, **options})

    call.__name__ = kind
    return call


def _check_fields(
    what: str, function: Callable[..., Any], fields: Mapping[str, Any], given: set[str]
) -> None:
    parameters = inspect.signature(function).parameters
    known = {
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"{what} has no field {unknown[0]!r}; it has {sorted(known - given)}"
            f"{_nearest(unknown[0], known)}"
        )


def _check_complete(
    what: str,
    function: Callable[..., Any],
    skip: int,
    fields: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    needed = [p.name for p in parameters if p.default is p.empty]
    missing = [name for name in needed if name not in {*fields, *given}]
    if missing:
        raise ValueError(f"{what} lacks {missing}; it has {sorted(fields)}; give {missing} too")


def plain(value: Any) -> Any:
    """Return a config as plain dicts, tuples and scalars, ready for JSON.

    >>> plain({"b": (1, {"c": None})})
    {'b': (1, {'c': None})}
    """
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(plain(entry) for entry in value)
    return value


def run(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Run the recipe of a config and return its result.

    Args:
        config: `recipe` (a name), the sections of `TABLES`, and the recipe's own options at the top
            level. With `smoke=True` the entries of `smoke_with` replace their namesakes: the same
            command in a minute, on small data.

    Raises:
        ValueError: an unknown section, kind or field, or what the recipe itself refuses.
    """
    whole = plain(config)
    for section in TABLES.keys() & whole.keys() - {"recipe", *MANY}:
        bind(section, whole[section])  # what smoke replaces is checked too
    config = _smoked(whole)
    name = config.get("recipe", "fine_tune")
    recipe = resolve("recipe", name)
    fields = {field: value for field, value in config.items() if field != "recipe"}
    _check_fields(f"the config of recipe {name!r}", recipe, fields, {"config"})
    _check_complete(f"the config of recipe {name!r}", recipe, 0, fields, {})
    return recipe(**{field: _built(field, value) for field, value in fields.items()}, config=config)


def _built(field: str, value: Any) -> Any:
    """Return the object of a section; plans, tasks and penalties stay calls for the recipe."""
    if field == "tasks":
        return tuple({**task, "data": build("data", task["data"])} for task in value)
    if field in MANY:
        return tuple(_one_of(field, section) for section in value)
    if field == "ways" and isinstance(value, Mapping):
        return {way: _built("penalties", sections) for way, sections in value.items()}
    if field not in TABLES:
        return value
    if field == "tuned" and isinstance(value, Mapping) and value.get("kind") == "fine_tune":
        return bind(field, {name: _built(name, inner) for name, inner in value.items()})
    return bind(field, value) if field in ("plan", "task") else build(field, value)


def _one_of(field: str, section: Any) -> Callable[..., Any]:
    """Return the call of one of several sections, which may have sections of its own."""
    fields = dict(section) if isinstance(section, Mapping) else section
    if isinstance(fields, dict):
        inner = {name: fields[name] for name in ("data", "task") if name in fields}
        fields |= {name: _built(name, value) for name, value in inner.items()}
    call = bind(field, fields)
    what = f"{field} of kind {fields['kind']!r}"
    _check_complete(what, resolve(field, fields["kind"]), 1, fields, {})
    return call


def _smoked(config: dict[str, Any]) -> dict[str, Any]:
    overrides, smoke = config.pop("smoke_with", {}), config.pop("smoke", False)
    return {**config, **overrides} if smoke else config


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
