"""The records of a run: `config.json`, `metrics.jsonl` and `result.json` in its folder.

A run folder holds

    config.json     what was asked for
    metrics.jsonl   one JSON object a line, a row for each event
    result.json     what came out; it is there when the run has ended
    report.html     the same to look at (`jtl.report.html`)
    checkpoints/    the state to go on from
    model/          the trained model, a folder that transformers opens

Rows of `metrics.jsonl`. Each has `kind`, `step` (finished steps of the whole run) and `phase`. A
number that is not finite is written null.

    step         loss, loss/TERM for each term, rate/LABEL for each live label, grad_norm,
                 examples (real rows of the batch), finite (false: the step changed nothing)
    shares       grad_norm/TERM and share/TERM (its part of the sum of the norms) of each term, of
                 the state and batch of the step of the same number
    evaluation   the figures on the validation split, the metric of the run among them, and
                 retain/NAME/FIGURE of each source that is watched
    phase_start  live (labels), steps (longest length); its step is that at which the phase began
    phase_end    what `phases` of result.json says of the phase, the times of its border too
    skipped      reason (optional): the phase did not run

A run that goes on from a save cuts off the rows after it (`cut`). Events at the very step of the
save may come twice; `read_rows` takes the last of each (kind, step, phase).

`result.json`. Keys in brackets may be absent; shares are between 0 and 1; seconds are wall time.

    metric         name of the figure that the plan went by; higher is better
    baselines      {name: score}; "majority" (a regression: "mean") and "linear_probe"
    target         score of the fine-tuned model
                   A score is {validation, test, test_interval: [low, high], [seconds]}: the metric
                   on both splits, the 95 % bootstrap interval of the test figure
    phases         list in order, also of those skipped: {name, live: [label], epochs, steps,
                   metric_before, metric_after, seconds, compile_seconds, flops_per_step,
                   optimizer_bytes, [held_bit_equal], [skipped: true], [stopped], [best_step],
                   [compilations], [compile_wait_seconds], [border_seconds], [derive_seconds],
                   [stall_seconds], [column_mib], [disk_mib], [reused]};
                   flops_per_step is null where XLA gave no count; before and after are on the
                   validation split, after the best weights of the phase were restored.
                   compilations and compile_seconds count programs of the step, also those compiled
                   while another phase ran; compile_wait_seconds is what the phase waited for them.
                   border_seconds go from the end of the phase before to the first step, without
                   evaluations; of these derive_seconds computed columns, stall_seconds is the
                   rest. column_mib and disk_mib are what columns take; reused counts those that
                   were found in files
    held_bit_equal true: in every phase every held leaf and statistic kept its bits
    loaded         counts: {loaded, fresh, unexpected, wrong_shape}
    seed           of the run
    versions       {package: version}, see `versions`
    config         equal to config.json
    [gain]         {over: name of a baseline, value, interval: [low, high]}: paired difference on
                   the test split, fine-tuned minus baseline, with its 95 % bootstrap interval
    [figures]      {validation: {name: value}, test: {name: value}}: all figures of the target
    [retain]       {name of a watched source: row}; a row is {kind (in words), metric,
                   higher_is_better, before: {validation, test}, after: {validation, test},
                   change: {value, interval: [low, high]}, figures: {before, after: {validation,
                   test: {name: value}}}, data: {validation, test: examples}}. before is the start
                   model, after the trained one; change is after minus before on the test split,
                   with its paired 95 % bootstrap interval
    [penalties]    {term: {value, share: {median, greatest, last}}}: the loss of the last step, and
                   the share of the gradient norm over the probes, the first of each phase left out;
                   null where there is no other
    [warnings]     list of texts, shown on the console and at the head of the page
    [groups]       list from stem to heads: {label, leaves, parameters, rates: {phase: rate}}; a
                   phase that is absent holds the label; the rate is the peak, null if unknown
    [confusion]    {classes: [name], counts: [[int]]}: test split, row = true class, column = given
    [calibration]  {confidence: [float], correct: [float], count: [float]}: sums for each bin of
                   confidence on the test split (`jtl.losses.metrics.calibration_sums`)
    [load_report]  {loaded, fresh, unexpected, wrong_shape}: the names themselves
    [source]       name of the backbone's checkpoint
    [data]         {name: text or number}: what was trained on
    [seconds]      of the whole run
"""

import json
import pathlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jtl
from jtl.report.jsonfile import plain, read, replace, write

CONFIG, METRICS, RESULT, REPORT = "config.json", "metrics.jsonl", "result.json", "report.html"
CHECKPOINTS, MODEL = "checkpoints", "model"
KINDS = ("step", "shares", "evaluation", "phase_start", "phase_end", "skipped")
_RESULT_KEYS = {
    "": (
        *("metric", "baselines", "target", "phases", "held_bit_equal", "loaded"),
        *("seed", "versions", "config"),
    ),
    "target": ("validation", "test", "test_interval"),
    "loaded": ("loaded", "fresh", "unexpected", "wrong_shape"),
    "phases": (
        *("name", "live", "epochs", "steps", "metric_before", "metric_after", "seconds"),
        *("compile_seconds", "flops_per_step", "optimizer_bytes"),
    ),
}
_UNCOMPARED = ("folder", "overwrite")
_PACKAGES = ("jtl", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "transformers")


class Run(NamedTuple):
    """A run folder that is open for writing.

    Attributes:
        folder: where it is.
        config: what was asked for, as plain data.
        result: what the run came to, None where it has not ended.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    result: dict[str, Any] | None


def open_run(
    folder: str | pathlib.Path, *, config: Mapping[str, Any], overwrite: bool = False
) -> Run:
    """Make a run folder, or open the one that is there and was made for the same config.

    Args:
        folder: of the run; parents are made too.
        config: what was asked for. Its fields `folder` and `overwrite` are not compared.
        overwrite: remove the records, checkpoints and model of the run that is there.

    Raises:
        ValueError: the folder holds a run of another config, or files but no run; `config` holds
            something that is no JSON.
    """
    folder = pathlib.Path(folder)
    asked = plain(config)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the run folder {str(folder)!r} is a file; give another folder")
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
    elif not (folder / CONFIG).is_file():
        raise ValueError(
            f"{str(folder)!r} is no run folder: it has {_names(folder)} and no {CONFIG}; "
            "give an empty or a new folder"
        )
    elif overwrite or not any((folder / name).is_file() for name in (METRICS, RESULT)):
        _clear(folder)  # one that was refused before its first step leaves its config alone
    else:
        _check_config(folder, asked)
        _mend(folder / METRICS)
        return Run(folder, asked, read(folder / RESULT) if (folder / RESULT).is_file() else None)
    write(folder / CONFIG, asked)
    return Run(folder, asked, None)


def append(run: Run, row: Mapping[str, Any]) -> None:
    """Add a row to `metrics.jsonl`.

    Raises:
        ValueError: the row has no known `kind`, no `step` or no `phase`, or holds what is no JSON.
    """
    lacking = [name for name in ("kind", "step", "phase") if name not in row]
    if lacking or row["kind"] not in KINDS:
        raise ValueError(
            f"a row of {METRICS} needs kind, step and phase, the kind one of {KINDS}; "
            f"this one has {dict(row)}; add {lacking or 'a known kind'}"
        )
    with (run.folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(row), allow_nan=False) + "\n")


def read_rows(folder: str | pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of a run in order: of rows with equal kind, step and phase the last one.

    A last line that was cut short, as when a run was killed, is left out.

    Raises:
        ValueError: another line is no JSON.
    """
    path = pathlib.Path(folder) / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(
                f"line {number} of {str(path)!r} is no JSON: {line[:60]!r}; remove the line"
            ) from None
        rows[row["kind"], row["step"], row["phase"]] = row
    return list(rows.values())


def cut(run: Run, step: int) -> None:
    """Remove the rows after `step`, from which the run goes on."""
    if (run.folder / METRICS).is_file():
        kept = [row for row in read_rows(run.folder) if row["step"] <= step]
        replace(run.folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))


def write_result(run: Run, result: Mapping[str, Any]) -> Run:
    """Write `result.json` in one move and return the run with its result.

    Raises:
        ValueError: a key is absent that the schema above demands; something is no JSON.
    """
    check_result(result)
    write(run.folder / RESULT, plain(result))
    return run._replace(result=read(run.folder / RESULT))


def check_result(result: Mapping[str, Any]) -> None:
    """Raise unless a result has the keys of the schema above.

    Raises:
        ValueError: which keys are absent, and where.
    """
    parts: list[tuple[str, str, Mapping[str, Any]]] = [("", "the result", result)]
    parts += [(key, key, result[key]) for key in ("target", "loaded") if key in result]
    parts += [("target", f"baseline {n!r}", row) for n, row in result.get("baselines", {}).items()]
    parts += [("phases", f"phase {i}", row) for i, row in enumerate(result.get("phases", ()))]
    for schema, where, found in parts:
        absent = [key for key in _RESULT_KEYS[schema] if key not in found]
        if absent:
            raise ValueError(f"{where} lacks {absent}; it has {sorted(found)}; add what is absent")


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that a run rests on."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = jtl.__version__ if package == "jtl" else "not installed"
    return found


def _check_config(folder: pathlib.Path, asked: Mapping[str, Any]) -> None:
    there = _flat(read(folder / CONFIG))
    wanted = _flat(asked)
    changed = [
        f"{name}: {there.get(name, 'absent')!r} there, {wanted.get(name, 'absent')!r} asked for"
        for name in dict.fromkeys((*there, *wanted))
        if there.get(name, "absent") != wanted.get(name, "absent")
    ]
    if changed:
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise ValueError(
            f"{str(folder)!r} holds a run of another config; {'; '.join(changed[:6])}{more}; "
            "give another folder, or overwrite=True to remove that run"
        )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    found: dict[str, Any] = {}
    for name, entry in config.items():
        if prefix or name not in _UNCOMPARED:
            found.update(_flat(entry, f"{prefix}.{name}" if prefix else str(name)))
    return found


def _mend(path: pathlib.Path) -> None:
    """Cut off a last line that a killed run left unfinished, so that rows can be added."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text and not text.endswith("\n"):
        replace(path, text[: text.rfind("\n") + 1])


def _clear(folder: pathlib.Path) -> None:
    for name in (CHECKPOINTS, MODEL):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (RESULT, METRICS, REPORT, CONFIG):
        (folder / name).unlink(missing_ok=True)


def _names(folder: pathlib.Path, limit: int = 4) -> str:
    names: Sequence[str] = sorted(path.name for path in folder.iterdir())
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
