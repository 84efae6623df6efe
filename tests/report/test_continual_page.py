"""The page of a continual run, from a result written by hand."""

import re

import pytest

from jtl.report import continual


def _entry(matrix, averages, spread=None):
    figures = dict(
        average=0.5, learning=0.75, backward_transfer=-0.5, forward_transfer=None, forgetting=0.5
    )
    spreads = dict.fromkeys(figures, spread) | {"averages": spread and [spread, spread]}
    whole = {"matrix": matrix, **figures, "averages": averages, "spread": spreads}
    return {**whole, "validation": whole}


@pytest.fixture
def result():
    plain = _entry([[1.0, 0.9], [0.5, 0.75]], [1.0, 0.625], spread=0.02)
    held = _entry([[0.5, None], [0.5, 0.5]], [0.5, 0.5], spread=0.02)
    best = {"average": 0.9, "spread": {"average": 0.01}}
    return {
        "tasks": ["a<b", "c"], "metric": "accuracy", "scenario": "domain", "seeds": [0, 1],
        "runs": {"plain": plain, "held": held}, "joint": {**best, "validation": best},
        "config": {"recipe": "continual"},
    }  # fmt: skip


def test_a_cell_is_the_darker_the_higher_and_what_was_not_learned_has_none(result):
    page = continual.page(result)
    cells = re.findall(r"<td style='background: rgba\(37, 99, 235, ([\d.]+)\)'>([\d.]+)", page)
    plain, held = cells[:3], cells[3:]
    assert plain == [("0.50", "100.0"), ("0.00", "50.0"), ("0.25", "75.0")]
    assert held == [("0.00", "50.0")] * 3  # all the same: nothing stands out
    assert "90.0" not in re.sub(r"<svg.*?</svg>|all at once.*?</tr>", "", page, flags=re.DOTALL)


def test_the_page_shows_every_way_and_opens_without_network(result):
    page = continual.page(result)
    assert page.count("<svg") == 1 and "standard deviation over 2 seeds" in page
    assert "a&lt;b" in page and "a<b" not in page
    assert "50.0 ± 2.0&nbsp;%" in page and "-50.0 ± 2.0" in page and "90.0 ± 1.0&nbsp;%" in page
    assert not re.search(r"src=|href=\"(?!#)|https?://(?!www\.w3\.org)", page)


def test_the_console_leaves_out_a_matrix_without_room(result, capsys):
    continual.matrices(result)
    shown = capsys.readouterr().out
    assert "after a<b" in shown and "test accuracy of 2 tasks, mean and standard" in shown
    wide = {**result, "tasks": ["a" * 60, "b" * 60]}
    continual.matrices(wide)
    shown = capsys.readouterr().out
    assert "after" not in shown and "held" in shown


def test_warnings_head_the_page_and_end_what_the_console_shows(result, capsys):
    result = {**result, "warnings": ["way 'held', task 'a<b': penalty 'ewc' holds nothing"]}
    page = continual.page(result)
    assert "Warning: way &#x27;held&#x27;, task &#x27;a&lt;b&#x27;: penalty" in page
    assert page.index("Warning:") < page.index("Test splits")
    continual.matrices(result)
    assert "WARNING: way 'held', task 'a<b'" in " ".join(capsys.readouterr().out.split())
