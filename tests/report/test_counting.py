import io

from rich.console import Console

from jtl.report.counting import counting


def test_a_line_every_ten_seconds_with_the_time_left():
    out = Console(file=io.StringIO(), width=100)
    seconds = iter([0.0, 5.0, 20.0, 25.0, 31.0])
    show = counting("columns of reviews", out=out, now=lambda: next(seconds))
    for done in (0, 100, 400, 500, 620):
        show(done, 2000)
    assert out.file.getvalue().splitlines() == [
        "  columns of reviews: 400 of 2,000, 1:20 left",
        "  columns of reviews: 620 of 2,000, 1:09 left",
    ]


def test_a_count_that_has_ended_starts_anew():
    out = Console(file=io.StringIO(), width=100)
    seconds = iter([0.0, 3.0, 100.0, 104.0])
    show = counting("rows", out=out, now=lambda: next(seconds))
    for done in (0, 50, 100, 0):
        show(done, 100)
    assert out.file.getvalue() == ""
