"""The front and the choice by hand; and the choice of whole runs, whose training is left out."""

import functools
import inspect
import json

import pytest
import tiny

from jtl.recipes import finetune
from jtl.recipes import pareto as recipe
from jtl.report import pareto as report
from jtl.report import record


def _result(target, source, higher=True):
    """A result of `fine_tune`; the figures are (validation, test)."""
    split = lambda pair: dict(zip(("validation", "test"), pair, strict=True))  # noqa: E731
    kept = {
        "metric": "accuracy" if higher else "perplexity",
        "higher_is_better": higher,
        "before": split((0.9, 0.91)),
        "after": split(source),
        "change": {"value": -0.1, "interval": [-0.2, 0.0]},
    }
    score = {**split(target), "test_interval": [0.0, 1.0], "seconds": 1.0}
    return {"metric": "accuracy", "target": score, "retain": {"news": kept}}


@pytest.fixture
def trained(monkeypatch):
    """Put given results in the place of training; yields what each run was asked for."""
    asked = []

    def use(results):
        def fine_tune(backbone, data, *, folder, penalties, config, **options):
            inspect.signature(finetune.fine_tune).bind(backbone, data, folder=folder, **options)
            run = record.open_run(folder, config=config)
            model = run.folder / record.MODEL
            model.mkdir(exist_ok=True)
            (model / "name").write_text(run.folder.name)
            asked.append((run.folder.name, [made(None) for made in penalties], options))
            return results[run.folder.name]

        monkeypatch.setattr(recipe, "fine_tune", fine_tune)
        monkeypatch.setattr(recipe, "opened", lambda backbone: (backbone, {}))
        monkeypatch.setattr(recipe, "described", lambda *_, **__: {"recipe": "pareto"})
        return asked

    return use


def _pull(start, *, weight=0.5):
    return "pull", weight


def _other(start):
    return "other"


def _pareto(folder, **options):
    given = {"penalties": (_pull, _other), "retain": (_other,), "strengths": (0, 1, 10), **options}
    return recipe.pareto(tiny.resnet(), {}, folder=folder, **given)


RUNS = {
    "strength_0": _result((0.90, 0.80), (0.50, 0.51)),
    "strength_1": _result((0.895, 0.70), (0.80, 0.10)),
    "strength_10": _result((0.70, 0.95), (0.85, 0.99)),
}


def test_a_front_by_hand():
    points = [(3, 1), (2, 2), (1, 3), (1, 2), (2, 2)]
    assert recipe.front(points) == [True, True, True, False, True]


def test_the_choice_by_hand():
    points = [(0.90, 0.1), (0.89, 0.5), (0.889, 0.9)]
    assert recipe.take(points, 0.0) == 0
    assert recipe.take(points, 0.01) == 1
    assert recipe.take(points, 0.02) == 2
    assert recipe.take([(0.9, 0.5), (0.8, 0.5)], 0.2) == 0


def test_the_first_penalty_takes_the_strengths_and_zero_leaves_it_out(trained, tmp_path):
    asked = trained(RUNS)
    _pareto(tmp_path / "run", seed=3)
    assert [(name, made) for name, made, _ in asked] == [
        ("strength_0", ["other"]),
        ("strength_1", [("pull", 1.0), "other"]),
        ("strength_10", [("pull", 10.0), "other"]),
    ]
    assert all(options["seed"] == 3 for _, _, options in asked)


def test_validation_chooses_whatever_the_test_figures_say(trained, tmp_path):
    trained(RUNS)
    result = _pareto(tmp_path / "run")
    assert result["taken"] == 1.0
    assert [point["front"] for point in result["points"]] == [True, True, True]
    assert result["points"][1]["target"]["test"] == 0.70
    assert (tmp_path / "run" / "model" / "name").read_text() == "strength_1"
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    strict = _pareto(tmp_path / "strict", tolerance=0.0)
    assert strict["taken"] == 0.0


def test_of_a_perplexity_less_is_more(trained, tmp_path):
    runs = {
        "strength_0": _result((0.90, 0.9), (30.0, 30.0), higher=False),
        "strength_1": _result((0.90, 0.9), (20.0, 20.0), higher=False),
    }
    trained(runs)
    result = _pareto(tmp_path / "run", strengths=(0, 1))
    assert result["taken"] == 1.0
    assert [point["front"] for point in result["points"]] == [False, True]
    assert not result["source_higher_is_better"]


def test_what_ended_is_returned_and_its_page_says_it(trained, tmp_path, capsys):
    asked = trained(RUNS)
    first = _pareto(tmp_path / "run")
    again = _pareto(tmp_path / "run")
    assert again == first and len(asked) == 3
    page = (tmp_path / "run" / "report.html").read_text()
    assert page == report.page(first)
    assert "Strength 1 is taken" in page and "Strength 1 is taken" in capsys.readouterr().out
    assert page.count("<svg") == 2 and "strength_10/report.html" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalties": ()}, "0 penalties and 1 watched sources; give at least one of each"),
        ({"retain": ()}, "2 penalties and 0 watched"),
        ({"penalties": (_other, _pull)}, r"no weight to be varied; it takes \['start'\]"),
        ({"strengths": (1, 1.0)}, r"strengths are \[1.0, 1.0\].*two or more different"),
        ({"strengths": (-1, 1)}, "none below 0"),
        ({"source": "sports"}, r"source='sports'.*retain watches \['news'\]; name one"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message, trained, tmp_path):
    asked = trained(RUNS)
    with pytest.raises(ValueError, match=message):
        _pareto(tmp_path / "run", **options)
    assert len(asked) == ("source" in options)  # before the first run, or after it


def test_a_config_gives_the_strength_to_the_first_penalty(monkeypatch):
    from jtl import config

    section = {"kind": "l2_sp", "weight": 3.0}
    monkeypatch.setattr(config, "resolve", lambda *_: _pull)
    assert functools.partial(config._one_of("penalties", section), weight=7.0)(None) == ("pull", 7)
