"""What not forgetting costs: a step with the EWC penalty, and the Fisher information before it.

    python -m benchmarks.penalty_cost            # both shapes, 10,000 examples
    python -m benchmarks.penalty_cost --quick    # small shapes, 1,000 examples, a smoke test

    step/mlp, step/minilm   seconds of a step with the penalty over those of one without, each of
                            the same library; a step of Adam on random rows
    fisher/data, /sampled   seconds of the per-example diagonal over those of the pass that squares
                            the mean gradient of batches of 128 in PyTorch. `first` counts the
                            compilation. `ratio` is the mean of the diagonal over the mean of what
                            that pass gives, `spearman` their rank correlation, for labels of data

One JSON line a figure, then a table. PyTorch comes with the extra `parity`.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, shapes, table, torch_penalty
from benchmarks.measure import Timed
from jtl.losses.classification import cross_entropy
from jtl.penalties.ewc import ewc
from jtl.penalties.fisher import fisher_diagonal
from jtl.recipes.optimizers import adamw
from jtl.train.compile import make_compiled
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

AIMS = {"step": 1.1, "fisher": 1.0}
WIDTHS = (784, 400, 400, 10)
NO_TORCH = "PyTorch is not installed; pip install -e '.[parity]' for the peer's figures"


class Network(NamedTuple):
    """A network of ours to step, and what it reads."""

    apply: Callable[..., Any]
    params: Any
    batch: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, 1,000 examples")
    parser.add_argument("--json", help="file to which the rows are added")
    options = parser.parse_args()
    found = rows(options.quick)
    for row in found:
        measure.emit(row, options.json)
    show(found)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return the row of each figure; without PyTorch the peer's fields are None."""
    torch = torch_penalty.available()
    if not torch:
        measure.say(NO_TORCH)
    text = "tiny" if quick else "minilm"
    repeats = 3 if quick else 15
    made = {"mlp": _mlp(256), text: _text(shapes.SHAPES[text])}
    found = [step_row(name, network, torch, repeats) for name, network in made.items()]
    return found + fisher_rows(1000 if quick else 10_000, torch, 2 if quick else 7)


def step_row(name: str, network: Network, torch: bool, repeats: int) -> dict[str, Any]:
    """Return what the penalty adds to a step, ours and the peer's."""
    calls = {f"jtl/{what}": _step(network, what == "ewc") for what in ("naive", "ewc")}
    if torch:
        for what in ("naive", "ewc"):
            made = (
                torch_penalty.mlp_loss(network.params, network.batch)
                if name == "mlp"
                else torch_penalty.text_loss(shapes.SHAPES[name], network.batch)
            )
            calls[f"torch/{what}"] = torch_penalty.step(*made, penalised=what == "ewc")
    best = measure.least(calls, repeats)
    value = best["jtl/ewc"] / best["jtl/naive"]
    peer = None if not torch else best["torch/ewc"] / best["torch/naive"]
    return {
        "benchmark": "penalty_cost",
        "figure": f"step/{name}",
        "value": value,
        **table.judged(value, AIMS["step"]),
        "peer_value": peer,
        "seconds": best["jtl/ewc"],
        "peer_seconds": best.get("torch/ewc"),
    }


def fisher_rows(examples: int, torch: bool, repeats: int) -> list[dict[str, Any]]:
    """Return what the per-example diagonal costs, and how wrong the pass over batches is."""
    x, y = _prototypes(examples)
    params = _trained(x, y)
    cut = [(x[i : i + 1000], y[i : i + 1000]) for i in range(0, examples, 1000)]
    last: dict[str, Any] = {}

    def ours(labels: Any) -> Callable[[], Any]:
        def call() -> None:
            key = jax.random.key(0)
            found = fisher_diagonal(_log_prob, params, cut, labels=labels, classes=10, key=key)
            last[labels] = jax.block_until_ready(found)

        return call

    calls = {labels: Timed(ours(labels)) for labels in ("data", "sampled")}
    first = {labels: _seconds(timed.call) for labels, timed in calls.items()}
    if torch:
        peer = torch_penalty.batch_means(params, x, y)
        calls["torch"] = Timed(lambda: last.update(torch=peer()))
    best = measure.least(calls, repeats)
    error = {} if not torch else compared(_flat(last["data"]), _flat(last["torch"]))
    found = []
    for labels in first:
        value = None if not torch else best[labels] / best["torch"]
        row = {"benchmark": "penalty_cost", "figure": f"fisher/{labels}", "examples": examples}
        row |= {"value": value, **table.judged(value, AIMS["fisher"]), "peer_value": None}
        row |= {"seconds": best[labels], "first": first[labels], "peer_seconds": best.get("torch")}
        found.append(row | (error if labels == "data" else {}))
    return found


def compared(right: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Return the ratio of the means, and the rank correlation; equal numbers share a rank.

    >>> compared(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 0.0]))
    {'ratio': 4.0, 'spearman': -0.5}
    """
    return {
        "ratio": float(right.mean() / wrong.mean()),
        "spearman": round(float(np.corrcoef(_ranks(right), _ranks(wrong))[0, 1]), 6),
    }


def _ranks(x: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where.reshape(-1)]


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _prototypes(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy copies of ten images, one label in ten wrong."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 10, examples)
    x = 0.5 * rng.random((10, 784))[classes] + 0.5 * rng.random((examples, 784))
    wrong = rng.random(examples) < 0.1
    return x.astype(np.float32), np.where(wrong, rng.integers(0, 10, examples), classes)


def _layers() -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    pairs = list(zip(WIDTHS, WIDTHS[1:], strict=False))
    scaled = [rng.standard_normal(pair).astype(np.float32) / np.sqrt(pair[0]) for pair in pairs]
    return [{"b": jnp.zeros(k.shape[1]), "w": jnp.asarray(k)} for k in scaled]


def _logits(layers: Any, x: Any) -> jax.Array:
    for number, layer in enumerate(layers):
        x = x @ layer["w"] + jnp.broadcast_to(layer["b"], (*x.shape[:-1], len(layer["b"])))
        x = jax.nn.relu(x) if number < len(layers) - 1 else x
    return x


def _log_prob(layers: Any, x: Any, label: Any) -> jax.Array:
    return jax.nn.log_softmax(_logits(layers, x))[label]


def _trained(x: np.ndarray, y: np.ndarray) -> Any:
    """Return layers after two epochs of SGD: at the start of training gradients are all alike."""

    def loss(layers: Any, x: Any, y: Any) -> Any:
        return -jnp.mean(jax.nn.log_softmax(_logits(layers, x))[jnp.arange(len(y)), y])

    @jax.jit
    def step(layers: Any, x: Any, y: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 0.1 * g, layers, jax.grad(loss)(layers, x, y))

    layers = _layers()
    for i in range(0, 2 * len(x), 100):
        layers = step(layers, x[i % len(x) :][:100], y[i % len(x) :][:100])
    return layers


def _mlp(rows: int) -> Network:
    def apply(params: Any, stats: Any, batch: Any, *, key: Any, live: Any) -> Any:
        del key, live
        return {"head": _logits(params, batch["x"])}, stats

    x, y = _prototypes(rows)
    return Network(apply, _layers(), {"x": x, "label": y, "mask": np.ones(rows, bool)})


def _text(shape: shapes.Shape) -> Network:
    model = shapes.make_model(shape, dropout=0.0, dtype="float32")
    return Network(model.apply, model.params, shapes.make_batch(shape, shape.rows["cpu"]))


def _step(network: Network, penalised: bool) -> Timed:
    """Return our step of AdamW on everything, with the penalty or without."""

    def task(c: Any) -> Any:
        return cross_entropy(c.out["head"], c.batch["label"], mask=c.batch["mask"])

    def penalty(c: Any) -> Any:
        return 0.1 * ewc(c.params, c.refs["anchor"], c.refs["fisher"]), jnp.float32(1.0)

    labels = jax.tree.map(lambda _: "all", network.params)
    tx = phase_optimizer({"all": adamw()}, labels, {"all"}, {"all"})
    terms = {"task": task} | ({"ewc": penalty} if penalised else {})
    step = make_compiled(make_step(network.apply, terms, tx, labels, {"all": 1e-5}))
    ones = jax.tree.map(jnp.ones_like, network.params)
    refs = {"anchor": network.params, "fisher": ones} if penalised else {}
    held = [create(network.params, {}, tx, refs=refs, key=jax.random.key(0))]
    arrays, start = jax.tree.map(jnp.asarray, network.batch), jnp.int32(0)
    compiled = step.compile(held[0], arrays, start)

    def call() -> Any:
        held[0], metrics = compiled.call(held[0], arrays, start)
        return jax.block_until_ready((held[0], metrics))

    return Timed(call, compiled.flops)


def show(found: list[dict[str, Any]]) -> None:
    """Print the table."""
    headers = ("figure", "value", "PyTorch's", "aim", "ms", "PyTorch's", "ratio", "spearman")
    body = []
    for row in found:
        ms = [None if s is None else 1e3 * s for s in (row["seconds"], row["peer_seconds"])]
        figures = (row["value"], row["peer_value"])
        wrong = (row.get("ratio"), row.get("spearman"))
        cells = [table.figure(value) for value in (*figures, *ms, *wrong)]
        body.append((row["figure"], *cells[:2], table.aimed(row), *cells[2:]))
    title = "Cost of a penalty: a step over one without; the Fisher diagonal over PyTorch's pass"
    table.show(title, headers, body, left=1)


if __name__ == "__main__":
    main()
