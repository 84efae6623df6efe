"""MiniLM on film reviews by five strategies, beside the plain PyTorch loop on the same split.

    python -m benchmarks.text                      # 200 and 2,000 labels, three seeds
    python -m benchmarks.text --quick              # 64 labels, one seed, one epoch
    python -m benchmarks.text --table sst.tsv --text sentence --label label

One JSON line for each strategy, number of labels and seed; at the end a table of means and spreads.
Every cell runs in a process of its own (`benchmarks.reviews`): `seconds` is the training with
everything that it needs (derived columns and compilation in jtl, tokenising in both),
`compile_seconds` is what XLA's compilations took of it, `peak_mib` is the largest resident memory.
PyTorch's side needs the extra `parity`. The test split is scored once; nothing is chosen on it.
"""

import argparse
import dataclasses
from typing import Any

import numpy as np

from benchmarks import measure, reviews, table, torch_text
from benchmarks.reviews import Cell

STRATEGIES = ("probe", "head", "last_two", "full", "progressive")
PEERS = ("probe", "head", "last_two", "full")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", default=reviews.REVIEWS, help="file of sentences and labels")
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="label")
    parser.add_argument("--sizes", type=int, nargs="*", default=[200, 2000])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--json", help="file to which the rows are added")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.seeds, options.epochs, options.test = [64], [0], 1, 100
    columns = dict(table=options.table, text=options.text, label=options.label)
    rows = []
    for size in options.sizes:
        for strategy in options.strategies:
            for seed in options.seeds:
                sizes = dict(size=size, seed=seed, epochs=options.epochs, test=options.test)
                rows.append(_pair(Cell("jtl", strategy, **sizes, **columns)))
                measure.emit(rows[-1], options.json)
    _show(rows)


def _pair(cell: Cell) -> dict[str, Any]:
    """Return the row of a cell: jtl, and PyTorch where it has the strategy."""
    row: dict[str, Any] = {"benchmark": "text", "strategy": cell.strategy}
    row |= {"size": cell.size, "seed": cell.seed}
    measure.say(f"{cell.strategy} on {cell.size} labels, seed {cell.seed}")
    row["jtl"] = reviews.apart(cell)
    if cell.strategy in PEERS and torch_text.available():
        try:
            row["torch"] = reviews.apart(dataclasses.replace(cell, side="torch", columns=False))
        except RuntimeError as error:
            return row | {"torch_failed": measure.why(error)}
        row["accuracy_over_torch"] = round(row["jtl"]["accuracy"] - row["torch"]["accuracy"], 4)
        row["speed_over_torch"] = round(row["torch"]["seconds"] / row["jtl"]["seconds"], 2)
    return row


def _show(rows: list[dict[str, Any]]) -> None:
    body = []
    for size, strategy in dict.fromkeys((row["size"], row["strategy"]) for row in rows):
        cells = [r for r in rows if (r["size"], r["strategy"]) == (size, strategy)]
        speeds = [r["speed_over_torch"] for r in cells if "torch" in r]
        body.append(
            (
                *(str(size), strategy, _spread(cells, "jtl"), _spread(cells, "torch")),
                f"{np.median(speeds):.1f}x" if speeds else "",
                str(max(r["jtl"]["peak_mib"] for r in cells)),
            )
        )
    headers = ("labels", "strategy", "jtl", "PyTorch", "faster", "MiB")
    table.show("Test accuracy in percent, mean and deviation over seeds", headers, body, left=2)


def _spread(cells: list[dict[str, Any]], side: str) -> str:
    values = [100 * r[side]["accuracy"] for r in cells if side in r]
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else ""


if __name__ == "__main__":
    main()
