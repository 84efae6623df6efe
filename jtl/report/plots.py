"""The plots of a run, each a text of SVG that stands inside a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from jtl.report import curves, drawing, readable, tables
from jtl.report.drawing import GRID, INK, MAIN, SOFT

Numbers = Sequence[float | int]
_CELLS_WITH_NUMBERS, _NAMED_CLASSES = 12, 30


def metric(rows: Sequence[curves.Row], name: str, levels: Mapping[str, float | int]) -> str:
    """Return the validation metric by step.

    Args:
        rows: of `metrics.jsonl`.
        name: of the metric.
        levels: validation figures of the baselines, drawn as level lines.
    """
    line = curves.evaluations(rows, name)
    scale = 100 if name in readable.PERCENT else 1
    with drawing.canvas() as (figure, axes):
        drawing.borders(axes, curves.stretches(rows))
        values = [None if value is None else scale * value for value in line.values]
        axes.plot(line.steps, drawing.gaps(values), color=MAIN, marker="o", markersize=4)
        limits = _view(values, levels, scale)
        for baseline, level in levels.items():
            if limits is None or limits[0] < scale * level < limits[1]:
                drawing.level(axes, tables.baseline_name(baseline), scale * level)
        axes.set(xlabel="step", ylabel=drawing.unit(name), ylim=limits)
        return drawing.svg(figure, f"validation {name} by step")


def loss(rows: Sequence[curves.Row]) -> str:
    """Return the training loss by step, as it came and smoothed."""
    line = curves.series(rows, "step", "loss")
    means = curves.Series(line.steps, tuple(curves.smooth(line.values)))
    with drawing.canvas() as (figure, axes):
        drawing.borders(axes, curves.stretches(rows))
        raw, means = curves.thin(line), curves.thin(means)
        axes.plot(raw.steps, drawing.gaps(raw.values), color=MAIN, alpha=0.3, linewidth=0.8)
        axes.plot(means.steps, drawing.gaps(means.values), color=MAIN, linewidth=1.8)
        axes.set(xlabel="step", ylabel="training loss")
        return drawing.svg(figure, "training loss by step")


def terms(rows: Sequence[curves.Row]) -> str | None:
    """Return the smoothed loss of each term by step, None where there is but one."""
    lines = curves.named(rows, "loss")
    if len(lines) < 2:
        return None
    return drawing.many(rows, lines, "loss of each term", smooth=True)


def rates(rows: Sequence[curves.Row], order: Sequence[str]) -> str | None:
    """Return the learning rate of each group by step, on a logarithmic axis; held is no line.

    Args:
        rows: of `metrics.jsonl`.
        order: labels from stem to heads; others come after them.
    """
    lines = curves.named(rows, "rate")
    known = [label for label in order if label in lines]
    lines = {label: lines[label] for label in (*known, *(set(lines) - set(known)))}
    positive = {
        label: line._replace(values=tuple(value or None for value in line.values))
        for label, line in lines.items()
    }
    some = any(value for line in lines.values() for value in line.values)
    return drawing.many(rows, positive, "learning rate", log=True) if some else None


def scores(result: Mapping[str, Any]) -> str:
    """Return the test figures of baselines and target with their intervals."""
    name = result["metric"]
    scale = 100 if name in readable.PERCENT else 1
    found = {tables.baseline_name(key): row for key, row in result["baselines"].items()}
    found["fine-tuned"] = result["target"]
    with drawing.canvas(height=0.9 + 0.42 * len(found)) as (figure, axes):
        for i, (words, row) in enumerate(found.items()):
            color = MAIN if words == "fine-tuned" else SOFT
            low, high = row["test_interval"] or (row["test"], row["test"])
            axes.plot([scale * low, scale * high], [i, i], color=color, linewidth=3, alpha=0.45)
            axes.plot([scale * row["test"]], [i], color=color, marker="o", markersize=8)
        axes.set_yticks(range(len(found)), list(found), color=INK)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.set(xlabel=f"test {drawing.unit(name)}, 95 % interval")
        return drawing.svg(figure, "test figures with intervals")


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Return the confusion matrix: colour is the share of the row, numbers are examples."""
    size = len(classes)
    shares = [[cell / max(sum(row), 1) for cell in row] for row in counts]
    with drawing.canvas(height=min(2.2 + 0.45 * size, 5.6)) as (figure, axes):
        axes.grid(False)
        picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        if size <= _CELLS_WITH_NUMBERS:
            for i, row in enumerate(counts):
                for j, cell in enumerate(row):
                    color = "white" if shares[i][j] > 0.55 else INK
                    axes.text(j, i, f"{cell:,}", ha="center", va="center", color=color)
        if size <= _NAMED_CLASSES:
            short = [name if len(name) <= 18 else name[:17] + "…" for name in classes]
            small = {"fontsize": 11 if size <= _CELLS_WITH_NUMBERS else 8}
            turned = {"rotation": 90} if size > 4 or max(map(len, short)) > 12 else {}
            axes.set_xticks(range(size), short, **small, **turned)
            axes.set_yticks(range(size), short, **small)
        axes.set(xlabel="given class", ylabel="true class")
        figure.colorbar(picture, ax=axes, label="share of the true class", fraction=0.05)
        return drawing.svg(figure, "confusion matrix of the test split")


def reliability(confidence: Numbers, correct: Numbers, count: Numbers) -> str:
    """Return accuracy by confidence; arguments are the sums of `calibration_sums`."""
    bins, total = len(count), max(sum(count), 1)
    kept = [b for b in range(bins) if count[b]]
    middles = [(b + 0.5) / bins for b in kept]
    with drawing.canvas() as (figure, axes):
        share = [count[b] / total for b in kept]
        bar = {"width": 0.92 / bins}
        axes.bar(middles, share, color=GRID, label="share of examples", **bar)
        axes.plot([0, 1], [0, 1], color=SOFT, linestyle="--", linewidth=1, label="calibrated")
        axes.plot(
            [confidence[b] / count[b] for b in kept],
            [correct[b] / count[b] for b in kept],
            *("o-",), color=MAIN, markersize=4, label="accuracy",
        )  # fmt: skip
        low = kept[0] / bins if kept else 0.0
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(low, 1.01), ylim=(0, 1.03))
        figure.legend(loc="outside lower center", ncols=3, handlelength=1.2)
        return drawing.svg(figure, "reliability on the test split")


def _view(
    values: Sequence[float | int | None], levels: Mapping[str, float | int], scale: float | int
) -> tuple[float | int, float | int] | None:
    """Return limits that leave out the untrained start and the baselines that read no input."""
    trained = [value for value in values[1:] if value is not None]
    shown = [scale * level for name, level in levels.items() if name not in tables.BLIND]
    if not trained:
        return None
    low, high = min(trained + shown), max(trained + shown)
    margin = 0.15 * max(high - low, 0.02 * scale)
    return low - margin, high + margin
