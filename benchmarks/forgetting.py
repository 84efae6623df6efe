"""What is kept of earlier tasks, by method: MNIST task after task, and reviews before messages.

    python -m benchmarks.assets mnist sms_spam   # once, with a network
    python -m benchmarks.forgetting              # all settings, three seeds
    python -m benchmarks.forgetting --quick      # few examples and ways, one seed
    python -m benchmarks.forgetting --settings permuted --search

Settings:

    permuted      the pixels of MNIST in another order in each of 10 tasks, one head (an MLP with 2
                  hidden layers of 400; 55,000 digits a task); the figure after 5 tasks beside it
    permuted_wide the same with hidden layers of 1,000
    split_task    two digits a task, a head for each task
    split_class   two digits a task, one head over all ten: penalties on weights must fail here
    cost          an EWC step over a plain one; Fisher information over 10,000 examples beside
                  PyTorch's pass over mean gradients (extra `parity`)
    text          MiniLM tuned on film reviews, then on spam, the reviews watched

One JSON line a result: `value` is the mean test figure over all tasks after the last, `values` has
one for each seed, `spread` is their deviation. `joint` learned all tasks at once: the upper bound.
Of strengths: `benchmarks.digit_tasks` and `benchmarks.text_forgetting` say where they come from.
"""

import argparse
import contextlib
import io
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import assets, digit_tasks, measure, penalty_cost, table, text_forgetting
from jtl.train.failure import NonFiniteError

SETTINGS = (*digit_tasks.SETTINGS, "cost", "text")
SEARCH_SEED = 10
AIMS = {
    ("permuted", "ewc"): 0.94,
    ("permuted", "si"): 0.94,
    ("permuted_wide", "ewc"): 0.94,
    ("permuted_wide", "si"): 0.94,
    **{("split_task", way): 0.99 for way in ("ewc", "si", "lwf", "replay")},
}
# Published: the papers' figures, and those of the leading library's own baselines (avalanche).
PUBLISHED = {
    ("permuted", "ewc"): {"paper": 0.94, "library": 0.83},
    ("permuted", "si"): {"paper": 0.95, "library": 0.83},
    ("permuted_wide", "ewc"): {"paper": 0.94},
}
_QUICK = dict(train=400, validation=100, test=200)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--mnist", help="folder of IDX files; left out, the fetched asset")
    parser.add_argument("--ways", nargs="*", help="only these")
    parser.add_argument("--folder", help="keeps the runs of text: given again, they go on")
    parser.add_argument("--json", help="file to which the rows are added")
    parser.add_argument("--search", action="store_true", help="compare strengths on validation")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    rows = []
    for name in options.settings:
        if options.quick and name == "permuted_wide":
            continue  # as narrow as "permuted" there
        measure.say(name)
        for row in _rows(name, options):
            rows.append({"benchmark": "forgetting", "setting": name, **row})
            measure.emit(rows[-1], options.json)
    if not options.search:
        _show([row for row in rows if "way" in row])


def _rows(name: str, options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    seeds = options.seeds[:1] if options.quick else options.seeds
    if name == "cost":
        return penalty_cost.rows(options.quick)
    if name == "text":
        more = dict(search=options.search, ways=options.ways, folder=options.folder)
        return text_forgetting.rows(options.quick, seeds, **more)
    path = options.mnist or str(assets.fetch("mnist"))
    setting = digit_tasks.SETTINGS[name]
    ways = options.ways or (digit_tasks.QUICK[name] if options.quick else tuple(setting.ways))
    setting = setting._replace(ways={way: setting.ways[way] for way in ways})
    sizes: dict[str, Any] = dict(validation=5000 if name.startswith("permuted") else 1000)
    if options.quick:
        number = len(digit_tasks.PAIRS) if name == "split_class" else 2  # one head needs all
        setting = setting._replace(number=number, hidden=(64,), plan={**setting.plan, "epochs": 1})
        setting, sizes = setting._replace(batch_size=64), _QUICK
    if options.search:
        return _searched(name, setting, path, sizes)
    return _each(name, setting, dict(path=path, seeds=seeds, sizes=sizes), not options.quick)


def _each(
    name: str, setting: digit_tasks.Setting, given: dict[str, Any], judge: bool
) -> Iterator[dict[str, Any]]:
    """Yield the row of each way when it has ended; after the first, that of all tasks at once."""
    bound = True
    for way, sections in setting.ways.items():
        try:
            one = setting._replace(ways={way: sections})
            result = digit_tasks.learn(name, one, **given, joint=bound)
        except NonFiniteError as error:
            yield {"way": way, "value": None, "why": str(error)}
            continue
        yield _row(name, way, result["runs"][way], judge)
        if bound:
            bound, joint = False, result["joint"]
            values, spread = joint["values"]["average"], joint["spread"]["average"]
            yield {"way": "joint", "value": joint["average"], "values": values, "spread": spread}


def _row(name: str, way: str, entry: dict[str, Any], judge: bool) -> dict[str, Any]:
    aim = AIMS.get((name, way)) if judge else None
    after_five = {"after_5": entry["averages"][4]} if len(entry["averages"]) > 5 else {}
    return {
        "way": way,
        "value": entry["average"],
        **table.judged(entry["average"], aim, better="higher"),
        **after_five,
        "published": PUBLISHED.get((name, way)),
        **{field: entry[field] for field in ("backward_transfer", "forgetting", "learning")},
        "values": entry["values"]["average"],
        "spread": entry["spread"]["average"],
        "seconds": [seed["seconds"] for seed in entry["seeds"]],
    }


def _searched(
    name: str, setting: digit_tasks.Setting, path: str, sizes: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the validation figure of each strength of each way; test figures are not shown."""
    rows = []
    for way in [way for way in setting.search if way in setting.ways]:
        for weight in setting.search[way]:
            one = digit_tasks.with_strength(setting, way, weight)
            options = dict(path=path, seeds=(SEARCH_SEED,), sizes=sizes, joint=False)
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # it shows test figures
                    entry = digit_tasks.learn(name, one, **options)["runs"][way]["validation"]
            except NonFiniteError as error:
                measure.say(f"{way} {weight}: {str(error)[:60]}")
                rows.append({"search": way, "weight": weight, "seed": SEARCH_SEED, "finite": False})
                continue
            figures = {field: entry[field] for field in ("average", "forgetting", "learning")}
            measure.say(f"{way} {weight}: {figures}")
            rows.append({"search": way, "weight": weight, "seed": SEARCH_SEED, **figures})
    return rows


def _show(rows: list[dict[str, Any]]) -> None:
    body = []
    for row in rows:
        if row["setting"] == "text" or row["value"] is None:
            continue
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        five = f"{100 * row['after_5']:.1f}" if "after_5" in row else ""
        drop = f"{100 * row['forgetting']:.1f}" if "forgetting" in row else ""
        shown = (row["setting"], row["way"], f"{100 * row['value']:.1f}{spread}", five, drop)
        known = row.get("published") or {}
        peers = ", ".join(f"{who} {100 * figure:.0f}" for who, figure in known.items())
        body.append((*shown, table.aimed(row), peers))
    if body:
        headers = ("setting", "way", "all tasks", "after 5", "forgotten", "aim", "published")
        title = "Test accuracy in percent over all tasks, after the last; forgotten in points"
        table.show(title, headers, body, left=2)
    text_forgetting.show([row for row in rows if row["setting"] == "text"])


if __name__ == "__main__":
    main()
