import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import example_run as example
import pytest

from jtl.report import curves, html, plots, record

NASTY = "<script>alert('$x$ & more')</script>"
VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Collects text and checks that each tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_a_page_is_one_closed_file_with_all_parts():
    page = html.page(example.full_result(), example.rows())
    found = parsed(page)
    words = " ".join(" ".join(found.text).split())
    for part in ("Verdict", "Learning rate by group", "Terms of the loss", "Confusion matrix"):
        assert part in words
    for part in ("Reliability", "Phases", "Groups", "Weights from the checkpoint", "Config"):
        assert part in words
    assert "Better than the linear probe by 5.0 points" in words
    assert found.tags.count("svg") == 7
    assert "script" not in found.tags


def test_a_page_fetches_nothing():
    page = html.page(example.full_result(), example.rows())
    links = re.findall(r"""(?:href|src|url)\s*[=(]\s*["']?([^"')\s>]*)""", page)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_every_text_is_escaped():
    result = example.full_result()
    result["source"] = result["data"]["name"] = NASTY
    result["config"] = {"note": NASTY}
    result["versions"] = {NASTY: NASTY}
    result["confusion"]["classes"] = [NASTY, "_good$"]
    result["load_report"]["fresh"] = [NASTY]
    result["groups"][0]["label"] = NASTY
    result["baselines"][NASTY] = example.score(0.1, 0.2)
    result["phases"][0]["name"] = NASTY
    rows = [
        {**row, "phase": NASTY, f"rate/{NASTY}": 0.1, f"loss/{NASTY}": 0.2}
        if row["phase"] == "head"
        else row
        for row in example.rows()
    ]
    found = parsed(html.page(result, rows))
    assert "script" not in found.tags
    assert "".join(found.text).count("<script>") >= 8


def test_a_page_needs_only_the_keys_that_must_be_there():
    result = example.result()
    assert parsed(html.page(result, [])).tags.count("svg") == 1
    assert "Held leaves changed" in html.page(result | {"held_bit_equal": False}, [])


def test_a_result_that_lacks_a_key_gives_no_page():
    result = example.result()
    del result["target"]
    with pytest.raises(ValueError, match="lacks .'target'."):
        html.page(result, [])


def test_the_report_of_a_folder(tmp_path):
    run = record.open_run(tmp_path / "run", config={"seed": 0})
    with pytest.raises(ValueError, match=r"has no result\.json"):
        html.write_report(run.folder)
    for row in example.rows():
        record.append(run, row)
    record.write_result(run, example.full_result())
    assert html.write_report(run.folder).read_text() == html.page(
        example.full_result(), example.rows()
    )


def test_plots_name_the_phases_and_are_sound_xml():
    svg = plots.loss(example.rows())
    ET.fromstring(svg)
    assert 'role="img" aria-label="training loss by step"' in svg
    assert "system-ui" in svg
    assert "DejaVu" not in svg
    for name in ("head", "open_block_1"):
        assert f">{name}<" in svg.replace("\n", "")
    assert "open_stem" not in svg


def test_a_plot_is_the_same_each_time():
    assert plots.loss(example.rows()) == plots.loss(example.rows())


def test_a_single_term_needs_no_plot_and_no_rates_none():
    rows = [{"kind": "step", "step": 1, "phase": "a", "loss": 1.0, "loss/task": 1.0}]
    assert plots.terms(rows) is None
    assert plots.rates(rows, []) is None
    assert plots.rates([{**rows[0], "rate/head": 0.0}], []) is None


def test_many_classes_stand_without_numbers():
    size = 40
    counts = [[int(i == j) for j in range(size)] for i in range(size)]
    svg = plots.confusion([f"class {i}" for i in range(size)], counts)
    assert "class 3" not in svg


def test_stretches_span_the_steps_of_their_phases():
    assert curves.stretches(example.rows()) == [("head", 0, 4), ("open_block_1", 4, 6)]


def test_restored_weights_show_as_a_jump():
    rows = [
        {"kind": "evaluation", "step": 4, "phase": "a", "accuracy": 0.6},
        {"kind": "phase_end", "step": 4, "phase": "a", "metric_after": 0.7},
    ]
    assert curves.evaluations(rows, "accuracy") == ((4, 4), (0.6, 0.7))


def test_smoothing_keeps_constants_and_gaps():
    assert curves.smooth([2.0, None, 2.0]) == pytest.approx([2.0, None, 2.0])
