"""What was forgotten and how much penalties had to say, on the page and on the console."""

import io
import re

import example_run as example
import pytest
from rich.console import Console

from jtl.report import console, forgotten, html, penalised, progress


def row(before, after, interval, metric="accuracy"):
    split = lambda value: {"validation": value, "test": value}  # noqa: E731
    return {
        "kind": "probe of the first features",
        "metric": metric,
        "higher_is_better": metric == "accuracy",
        "before": split(before),
        "after": split(after),
        "change": {"value": after - before, "interval": list(interval)},
    }


def result():
    sources = {
        "<news>": row(0.80, 0.75, (-0.07, -0.03)),
        "kept": row(0.60, 0.61, (-0.01, 0.03)),
        "wiki": row(20.0, 25.0, (4.0, 6.0), "perplexity"),
    }
    share = {"median": 0.002, "greatest": 0.004, "last": 0.003}
    said = {"penalties": {"l2_sp": {"value": 0.5, "share": share}}, "warnings": ["too <weak>"]}
    return example.full_result() | {"retain": sources} | said


def rows():
    found = []
    for entry in example.rows():
        if entry["kind"] == "evaluation":
            entry |= {"retain/<news>/accuracy": 0.7, "retain/wiki/perplexity": 24.0}
        found.append(entry)
        if entry["kind"] == "step":
            shares = {"share/classification": 0.9, "share/l2_sp": 0.1}
            found.append(
                {"kind": "shares", "step": entry["step"], "phase": entry["phase"]} | shares
            )
    return found


def test_the_table_names_what_was_lost():
    table = forgotten.table(result())
    assert [cells[0] for cells in table.rows] == ["target", "<news>", "kept", "wiki"]
    assert [cells[-1] for cells in table.rows] == ["gained", "lost", "no clear change", "lost"]
    assert table.rows[0][2:5] == ("74.0 %", "79.0 %", "+5.0 points")
    assert table.rows[3][2:6] == ("20.000", "25.000", "+5.000", "+4.000 to +6.000")


def test_the_page_shows_it_at_its_head_and_in_a_section():
    page = html.page(result(), rows())
    head = page[: page.index("<section>")]
    assert "verdict bad'>Forgotten: &lt;news&gt; went from 80.0 to 75.0 %" in head
    assert "verdict'>Kept: kept" in head
    assert "Warning: too &lt;weak&gt;" in head
    words = re.sub(r"<[^>]*>", " ", page)
    for part in ("What was forgotten", "Target against sources", "Penalties", "0.40&nbsp;%"):
        assert part in words
    assert page.count("<svg") == 7 + 2
    assert "<news>" not in page


def test_a_run_that_watches_nothing_has_no_such_section():
    page = html.page(example.full_result(), example.rows())
    assert "forgotten" not in page and "Penalties" not in page


def test_the_plot_ends_at_the_weights_that_were_kept():
    svg = forgotten.plot(result(), rows())
    assert "perplexity" in svg and "&lt;news&gt; (source)" in svg
    line = forgotten._line("wiki", result()["retain"]["wiki"], rows())
    assert (line.steps, line.values) == ((4, 6, 6), (24.0, 24.0, 25.0))


@pytest.mark.parametrize("width", [100, 200])
def test_the_console_says_it_last(width):
    out = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.finished("runs/a", result(), out=out)
    shown = out.file.getvalue()
    assert "Forgotten: <news> went from 80.0 to 75.0 % accuracy" in shown
    assert ("perplexity, probe of the first features" in shown) == (width == 200)
    assert shown.index("WARNING: too <weak>") > shown.index("Forgotten")
    assert "…" not in shown


def test_an_evaluation_shows_how_far_the_sources_have_moved():
    out = Console(file=io.StringIO(), width=100, force_terminal=False)
    watched = {"<news>": ("accuracy", 0.8), "wiki": ("perplexity", 20.0)}
    with progress.progress(example.PLAN, metric="accuracy", watched=watched, out=out) as show:
        for entry in rows():
            show(entry)
    assert (
        "step 4: validation accuracy 70.0 %; watched: <news> accuracy 70.0 % (-10.0 points), "
        "wiki perplexity 24.000 (+4.000)" in out.file.getvalue()
    )


def _probes(*shares, phase="a"):
    return [
        {"kind": "shares", "step": step, "phase": phase, "share/ewc": share}
        for step, share in enumerate(shares, start=1)
    ]


def test_a_penalty_is_named_that_stays_below_one_percent():
    weak = penalised.found(_probes(0.0, 0.004, 0.009), ["ewc"])
    assert len(weak["warnings"]) == 1 and "'ewc' never had more than 0.90 %" in weak["warnings"][0]
    assert penalised.found(_probes(0.0, 0.004, 0.011), ["ewc"])["warnings"] == []


def test_the_first_probe_of_a_phase_says_nothing():
    """What a phase opens is still where it was: its penalty is zero whatever the weight."""
    two = _probes(0.0) + _probes(0.0, phase="b")
    assert penalised.found(two, ["ewc"])["penalties"]["ewc"]["share"] is None
    assert penalised.found(two, ["ewc"])["warnings"] == []
    some = _probes(0.0, 0.2) + _probes(0.0, 0.4, phase="b")
    share = penalised.found(some, ["ewc"])["penalties"]["ewc"]["share"]
    assert share == {"median": pytest.approx(0.3), "greatest": 0.4, "last": 0.4}


def test_no_penalty_no_words():
    assert penalised.found(_probes(0.5), []) == {}
