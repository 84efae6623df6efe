"""The plots of a run, each a text of SVG that stands inside a page."""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jtl.report import curves, readable, tables

INK, SOFT, GRID, MAIN, WARM = "#1f2937", "#6b7280", "#e5e7eb", "#2563eb", "#c2410c"
Numbers = Sequence[float | int]
_WIDTH, _HEIGHT = 5.6, 3.3
_CELLS_WITH_NUMBERS, _NAMED_CLASSES = 12, 30
_FLAT_NAMES, _NAMED_PHASES = 7, 24
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "grid.color": GRID,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "jtl",
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


def metric(rows: Sequence[curves.Row], name: str, levels: Mapping[str, float | int]) -> str:
    """Return the validation metric by step.

    Args:
        rows: of `metrics.jsonl`.
        name: of the metric.
        levels: validation figures of the baselines, drawn as level lines.
    """
    line = curves.evaluations(rows, name)
    scale = 100 if name in readable.PERCENT else 1
    with _figure() as (figure, axes):
        _borders(axes, curves.stretches(rows))
        values = [None if value is None else scale * value for value in line.values]
        axes.plot(line.steps, _gaps(values), color=MAIN, marker="o", markersize=4)
        limits = _view(values, levels, scale)
        for baseline, level in levels.items():
            if limits is None or limits[0] < scale * level < limits[1]:
                _level(axes, tables.baseline_name(baseline), scale * level)
        axes.set(xlabel="step", ylabel=_unit(name), ylim=limits)
        return _svg(figure, f"validation {name} by step")


def loss(rows: Sequence[curves.Row]) -> str:
    """Return the training loss by step, as it came and smoothed."""
    line = curves.series(rows, "step", "loss")
    means = curves.Series(line.steps, tuple(curves.smooth(line.values)))
    with _figure() as (figure, axes):
        _borders(axes, curves.stretches(rows))
        raw, means = curves.thin(line), curves.thin(means)
        axes.plot(raw.steps, _gaps(raw.values), color=MAIN, alpha=0.3, linewidth=0.8)
        axes.plot(means.steps, _gaps(means.values), color=MAIN, linewidth=1.8)
        axes.set(xlabel="step", ylabel="training loss")
        return _svg(figure, "training loss by step")


def terms(rows: Sequence[curves.Row]) -> str | None:
    """Return the smoothed loss of each term by step, None where there is but one."""
    lines = curves.named(rows, "loss")
    if len(lines) < 2:
        return None
    return _many(rows, lines, "loss of each term", smooth=True)


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
    return _many(rows, positive, "learning rate", log=True) if some else None


def scores(result: Mapping[str, Any]) -> str:
    """Return the test figures of baselines and target with their intervals."""
    name = result["metric"]
    scale = 100 if name in readable.PERCENT else 1
    found = {tables.baseline_name(key): row for key, row in result["baselines"].items()}
    found["fine-tuned"] = result["target"]
    with _figure(height=0.9 + 0.42 * len(found)) as (figure, axes):
        for i, (words, row) in enumerate(found.items()):
            color = MAIN if words == "fine-tuned" else SOFT
            low, high = row["test_interval"] or (row["test"], row["test"])
            axes.plot([scale * low, scale * high], [i, i], color=color, linewidth=3, alpha=0.45)
            axes.plot([scale * row["test"]], [i], color=color, marker="o", markersize=8)
        axes.set_yticks(range(len(found)), list(found), color=INK)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.set(xlabel=f"test {_unit(name)}, 95 % interval")
        return _svg(figure, "test figures with intervals")


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Return the confusion matrix: colour is the share of the row, numbers are examples."""
    size = len(classes)
    shares = [[cell / max(sum(row), 1) for cell in row] for row in counts]
    with _figure(height=min(2.2 + 0.45 * size, 5.6)) as (figure, axes):
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
        return _svg(figure, "confusion matrix of the test split")


def reliability(confidence: Numbers, correct: Numbers, count: Numbers) -> str:
    """Return accuracy by confidence; arguments are the sums of `calibration_sums`."""
    bins, total = len(count), max(sum(count), 1)
    kept = [b for b in range(bins) if count[b]]
    middles = [(b + 0.5) / bins for b in kept]
    with _figure() as (figure, axes):
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
        return _svg(figure, "reliability on the test split")


def _many(
    rows: Sequence[curves.Row],
    lines: Mapping[str, curves.Series],
    words: str,
    *,
    log: bool = False,
    smooth: bool = False,
) -> str:
    import matplotlib

    shades = matplotlib.colormaps["viridis_r"]
    last = max(len(lines) - 1, 1)
    with _figure(height=_HEIGHT + 0.2 * ((len(lines) + 3) // 4)) as (figure, axes):
        _borders(axes, curves.stretches(rows))
        for i, (label, line) in enumerate(lines.items()):
            values = curves.smooth(line.values) if smooth else line.values
            line = curves.thin(curves.Series(line.steps, tuple(values)))
            color = shades(0.12 + 0.88 * i / last)
            axes.plot(
                line.steps, _gaps(line.values), label=_safe(label), color=color, linewidth=1.3
            )
        if log:
            axes.set_yscale("log", nonpositive="mask")
            axes.set_ylim(bottom=_floor(lines.values()))
        axes.set(xlabel="step", ylabel=words)
        figure.legend(loc="outside lower center", ncols=min(len(lines), 4), handlelength=1.2)
        return _svg(figure, f"{words} by step")


def _level(axes: Any, words: str, height: float | int) -> None:
    axes.axhline(height, color=SOFT, linestyle="--", linewidth=1)
    axes.annotate(
        words, (1.0, height), xycoords=("axes fraction", "data"), color=SOFT, fontsize=9.5,
        ha="right", va="bottom", xytext=(0, 1), textcoords="offset points",
    )  # fmt: skip


def _borders(axes: Any, stretches: Sequence[curves.Stretch]) -> None:
    """Draw where each phase begins, with its name above."""
    if not stretches:
        return
    first, last = stretches[0].first, stretches[-1].last
    every = 1 + (len(stretches) - 1) // _NAMED_PHASES
    look: dict[str, Any] = {"fontsize": 9.5, "ha": "center"}
    if len(stretches) > _FLAT_NAMES:
        look |= {"fontsize": 8, "rotation": 90}
    elif len(stretches) > 1:
        look |= {"ha": "left", "rotation": 35}
    axes.set_xlim(first, last + 0.015 * (last - first))
    for i, stretch in enumerate(stretches):
        if i % 2:
            axes.axvspan(stretch.first, stretch.last, color="#f3f4f6", linewidth=0, zorder=0)
        if i:
            axes.axvline(stretch.first, color=SOFT, linewidth=0.8, linestyle=":")
        if i % every == 0:
            axes.annotate(
                _safe(stretch.name), ((stretch.first + stretch.last) / 2, 1.0), va="bottom",
                xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                color=SOFT, annotation_clip=False, **look,
            )  # fmt: skip


def _floor(lines: Iterable[curves.Series]) -> float | int | None:
    """Return where a logarithmic axis begins: schedules that fall to 0 would stretch it."""
    tops = [max((value for value in line.values if value), default=0.0) for line in lines]
    return min((top for top in tops if top), default=0.0) / 30 or None


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


def _unit(name: str) -> str:
    words = readable.words(name)
    return f"{words}, %" if name in readable.PERCENT else words


def _gaps(values: Sequence[float | int | None]) -> list[float | int]:
    return [float("nan") if value is None else value for value in values]


def _safe(text: str) -> str:
    """Return a text in which matplotlib reads no mathematics and hides no label."""
    text = text.replace("$", r"\$")
    return " " + text if text.startswith("_") else text


@contextlib.contextmanager
def _figure(
    *, width: float | int = _WIDTH, height: float | int = _HEIGHT
) -> Iterator[tuple[Any, Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict(_STYLE)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        yield figure, figure.subplots()


def _svg(figure: Any, words: str) -> str:
    """Return the figure as SVG that fills the width it is given; `words` is for screen readers."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    text = re.sub(r"(font: (?:[\w.]+ )*[\d.]+px )[^;\"]*", r"\1system-ui, sans-serif", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)
