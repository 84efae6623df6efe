"""How the plots of a page are drawn: one look, phases as bands, SVG that fills its place."""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jtl.report import curves, readable

INK, SOFT, GRID, MAIN, WARM = "#1f2937", "#6b7280", "#e5e7eb", "#2563eb", "#c2410c"
_WIDTH, HEIGHT = 5.6, 3.3
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


@contextlib.contextmanager
def canvas(
    *, width: float | int = _WIDTH, height: float | int = HEIGHT, panels: int = 1
) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes, inches wide and high; several under each other share `x`.

    Args:
        width: in inches.
        height: in inches.
        panels: number of axes; with more than one, a list of them is yielded.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict(_STYLE)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(panels, sharex=True)
        yield figure, axes if panels == 1 else list(axes)


def svg(figure: Any, words: str) -> str:
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


def many(
    rows: Sequence[curves.Row],
    lines: Mapping[str, curves.Series],
    words: str,
    *,
    log: bool = False,
    smooth: bool = False,
    percent: bool = False,
) -> str:
    """Return a plot of many lines by step, from light to dark, with a legend below.

    Args:
        rows: of `metrics.jsonl`.
        lines: {name: series}.
        words: for the axis.
        log: whether the axis is logarithmic.
        smooth: draw moving means.
        percent: draw shares as percent.
    """
    import matplotlib

    shades = matplotlib.colormaps["viridis_r"]
    last = max(len(lines) - 1, 1)
    with canvas(height=HEIGHT + 0.2 * ((len(lines) + 3) // 4)) as (figure, axes):
        borders(axes, curves.stretches(rows))
        for i, (label, line) in enumerate(lines.items()):
            values = curves.smooth(line.values) if smooth else line.values
            line = curves.thin(curves.Series(line.steps, tuple(values)))
            scale = 100 if percent else 1
            heights = [scale * value for value in gaps(line.values)]
            color = shades(0.12 + 0.88 * i / last)
            axes.plot(line.steps, heights, label=safe(label), color=color, linewidth=1.3)
        if log:
            axes.set_yscale("log", nonpositive="mask")
            axes.set_ylim(bottom=_floor(lines.values()))
        axes.set(xlabel="step", ylabel=words)
        figure.legend(loc="outside lower center", ncols=min(len(lines), 4), handlelength=1.2)
        return svg(figure, f"{words} by step")


def borders(axes: Any, stretches: Sequence[curves.Stretch], *, named: bool = True) -> None:
    """Draw where each phase begins, with its name above if it is named."""
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
        if named and i % every == 0:
            axes.annotate(
                safe(stretch.name), ((stretch.first + stretch.last) / 2, 1.0), va="bottom",
                xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                color=SOFT, annotation_clip=False, **look,
            )  # fmt: skip


def level(axes: Any, words: str, height: float | int) -> None:
    """Draw a dashed line across, with words on it."""
    axes.axhline(height, color=SOFT, linestyle="--", linewidth=1)
    axes.annotate(
        words, (1.0, height), xycoords=("axes fraction", "data"), color=SOFT, fontsize=9.5,
        ha="right", va="bottom", xytext=(0, 1), textcoords="offset points",
    )  # fmt: skip


def unit(name: str) -> str:
    """Return what stands on the axis of a figure.

    >>> unit("accuracy"), unit("r2")
    ('accuracy, %', 'R2')
    """
    words = readable.words(name)
    return f"{words}, %" if name in readable.PERCENT else words


def gaps(values: Sequence[float | int | None]) -> list[float | int]:
    """Return values with NaN, which matplotlib leaves out, for None."""
    return [float("nan") if value is None else value for value in values]


def safe(text: str) -> str:
    """Return a text in which matplotlib reads no mathematics and hides no label."""
    text = text.replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def _floor(lines: Iterable[curves.Series]) -> float | int | None:
    """Return where a logarithmic axis begins: schedules that fall to 0 would stretch it."""
    tops = [max((value for value in line.values if value), default=0.0) for line in lines]
    return min((top for top in tops if top), default=0.0) / 30 or None
