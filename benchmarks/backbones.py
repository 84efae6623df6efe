"""Backbones beside their peers: the forward pass and the full training step, in one run.

    python -m benchmarks.backbones                           # BERT-base, ViT-B/16, ResNet-50, LLaMA
    python -m benchmarks.backbones --models bert --repeats 10
    python -m benchmarks.backbones --flax PYTHON             # and transformers 4's Flax classes
    python -m benchmarks.backbones --quick                   # a tiny model, a smoke test

Published shapes with random weights: BERT-base at 128 tokens and ViT-B/16 and ResNet-50 at 224
pixels in batches of 8, a LLaMA of 135 million weights (SmolLM2's shape) at 128 tokens in batches of
4; float32 on a CPU, larger ones in bfloat16 on a GPU. Each model has a process of its own. The
peers are transformers on PyTorch, eager and under `torch.compile` (extra `parity`), in the same
process, all calls in turn; and the Flax classes of transformers 4 in the process of another
interpreter (PYTHON: an environment with jtl and `transformers==4.57.6`), right after. The step is
AdamW with clipping on everything, dropout as published.

One JSON line a figure: `value` is the seconds of the fastest peer over ours (above 1 we are
faster), `matmul_share` what ours is of a product of large matrices in the same process.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import jtl_steps, measure, shapes, table, torch_steps
from jtl.train.memory import keep_freed_memory

MODELS = ("bert", "vit", "resnet", "llama")
FIGURES = ("forward", "full")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(shapes.SHAPES), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, help="rows of a batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument("--peers", nargs="*", choices=("eager", "compile"))
    parser.add_argument("--flax", help="interpreter of an environment with transformers 4")
    parser.add_argument("--json", help="file to which the rows are added")
    keep = argparse.BooleanOptionalAction
    parser.add_argument("--keep-memory", action=keep, default=True, help="freed is taken again")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two repeats")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        for row in cell(**json.loads(options.cell)):
            measure.emit(row)
        return
    os.environ["JTL_KEEP_MEMORY"] = str(int(options.keep_memory))
    if options.quick:
        options.models, options.repeats = ["tiny"], 2
    peers = options.peers
    if peers is None:
        peers = ["eager"] if options.quick else ["eager", "compile"]
    rows = []
    for name in options.models:
        measure.say(f"== {name}")
        given = dict(name=name, repeats=options.repeats, batch=options.batch, dtype=options.dtype)
        found = list(measure.spawn("benchmarks.backbones", {**given, "peers": peers}))
        flax = _flax_seconds(options.flax, given) if options.flax else {}
        for row in (beside(row, flax) for row in found):
            measure.emit(row, options.json)
            rows.append(row)
    show(rows)


def cell(
    name: str, *, repeats: int, batch: int | None, dtype: str | None, peers: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model, in this process."""
    import jax

    keep_freed_memory()
    shape, backend = shapes.SHAPES[name], jax.default_backend()
    dtype = dtype or ("bfloat16" if backend == "gpu" else "float32")
    rows = batch or shape.rows["gpu" if backend == "gpu" else "cpu"]
    model = shapes.make_model(shape, dropout=None, dtype=dtype)
    given = shapes.make_batch(shape, rows)
    cases = {"full": jtl_steps.CASES["full"]}
    measure.say("compiling")
    calls = {"forward": jtl_steps.forward(model, given)}
    calls["full"] = jtl_steps.make(model, given, cases["full"]).timed
    options = dict(dropout=None, dtype=dtype, compiled="compile" in peers, cases=cases)
    theirs = torch_steps.make_peers(shape, given, **options) if peers else {}
    for peer, made in theirs.items():
        calls |= {f"{peer}/{case}": timed for case, timed in made.calls.items()}
    size = 256 if name == "tiny" else 2048 if backend == "cpu" else 8192
    calls["matmul"] = measure.jax_matmul(size, dtype)
    seconds = measure.least(calls, repeats)
    ceiling = calls["matmul"].flops / seconds["matmul"]
    about = dict(benchmark="backbones", model=name, dtype=dtype, batch=rows, backend=backend)
    failed = {peer: made.failed for peer, made in theirs.items() if made.failed}
    for figure in FIGURES:
        speed = calls[figure].flops / seconds[figure]
        own = {"seconds": seconds[figure], "gflops": speed / 1e9, "matmul_share": speed / ceiling}
        found = {peer: seconds.get(f"{peer}/{figure}") for peer in theirs}
        own["peers"] = {peer: value for peer, value in found.items() if value is not None}
        yield {**about, "figure": figure, **own, "peers_failed": failed}


def beside(row: Mapping[str, Any], flax: Mapping[str, float]) -> dict[str, Any]:
    """Return a row with the Flax class's seconds among its peers, and who is faster.

    >>> row = {"figure": "full", "seconds": 2.0, "peers": {"torch_eager": 3.0}}
    >>> beside(row, {"full": 5.0})["value"], beside(row, {})["faster_than"]
    (1.5, {'torch_eager': 1.5})
    """
    peers = dict(row["peers"])
    if row["figure"] in flax:
        peers["flax"] = flax[row["figure"]]
    faster = {peer: seconds / row["seconds"] for peer, seconds in peers.items()}
    value = min(faster.values(), default=None)
    aim = table.judged(value, 1.0, better="higher")
    return {**row, "peers": peers, "value": value, "faster_than": faster, **aim}


def _flax_seconds(python: str, given: Mapping[str, Any]) -> dict[str, float]:
    command = [python, "-m", "benchmarks.flax_steps", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        measure.say(f"the Flax class did not run: {done.stderr.strip().splitlines()[-1:]}")
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of all rows."""
    peers = ("torch_eager", "torch_compile", "flax")
    headers = ("model", "figure", "seconds", *peers, "faster than the fastest", "of matmul")
    body = [
        (
            *(row["model"], row["figure"], table.figure(row["seconds"])),
            *(table.figure(row["peers"].get(peer)) for peer in peers),
            table.figure(row["value"], "x"),
            f"{row['matmul_share']:.0%}",
        )
        for row in rows
    ]
    table.show("Seconds of a forward pass and of a full step", headers, body, left=2)
    for row in rows:
        if row["figure"] == "forward" and row.get("peers_failed"):
            measure.say(f"{row['model']}: peers that did not run: {row['peers_failed']}")


if __name__ == "__main__":
    main()
