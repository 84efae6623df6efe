"""What a training step costs when parts are held, as a multiple of the forward pass.

    python -m benchmarks.freezing                             # BERT-base, ViT-B/16, MiniLM
    python -m benchmarks.freezing --models bert --repeats 10 --json freezing.jsonl
    python -m benchmarks.freezing --peers eager               # without torch.compile
    python -m benchmarks.freezing --quick                     # a tiny model, a smoke test

BERT-base and MiniLM at 128 tokens, ViT-B/16 at 224 pixels: batches of 8 in float32 on a CPU, larger
ones in bfloat16 on a GPU (`--dtype`, `--batch`). Each model has a process of its own. One JSON line
for each figure, then a table:

    forward                 share of the ceiling (a product of large matrices in the same process)
    head                    step that moves the head, over the forward pass
    head_all_on             the same with accumulation in 2 parts and a moving average of weights
    last_block, last_two_blocks, full
    never_live_bytes        optimizer memory of what no phase moves
    epoch_2_head            a later epoch of a phase, over the forward pass over its data
    epoch_2_last_block      the same with the last block open
    border_stall            the longest wait at a border of phases (columns that are computed there
                            apart), over a step of the phase that begins

Every step clips and gives the gradient norm, and keeps the old weights where it is not finite.
Dropout is what the checkpoints are published with (BERT 0.1, ViT none) and off in what is held, the
same on both sides; `--dropout` changes it. The process keeps freed memory, for both sides, as the
command `python -m jtl` does; `--no-keep-memory` shows the steps without that. The peer is PyTorch
with transformers, eager and under `torch.compile` (extra `parity`), on as many threads. Times are
the least of repeats in which all calls of both sides are taken in turn. `value` is ours,
`peer_value` the faster peer's over its own forward pass, `ratio` the second over the first,
`faster` the quotient of seconds.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import held_prefix, jtl_steps, measure, shapes, table, torch_steps
from jtl.train.memory import keep_freed_memory

MODELS = ("bert", "vit", "minilm")
AIMS = {"head": 1.05, "head_all_on": 1.05, "last_block": 1.25, "full": 3.4}
OVER_FLOOR = ("minilm", "tiny")  # too small for the aims: their measure is the share of FLOPs
EXAMPLES = {"bert": 64, "vit": 64, "minilm": 256, "tiny": 32}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(shapes.SHAPES), default=list(MODELS))
    parser.add_argument("--steps", nargs="+", choices=list(jtl_steps.CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, help="rows of a batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument("--dropout", type=float, help="in what moves, in place of the published")
    parser.add_argument("--peers", nargs="*", choices=("eager", "compile"))
    parser.add_argument(
        "--examples", type=int, help="rows of the data for whole epochs; 0 for none"
    )
    parser.add_argument("--json", help="file to which the rows are added")
    keep = argparse.BooleanOptionalAction
    parser.add_argument("--keep-memory", action=keep, default=True, help="freed is taken again")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, two repeats, no compiler"
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        for row in cell(**json.loads(options.cell)):
            measure.emit(row)
        return
    os.environ["JTL_KEEP_MEMORY"] = str(int(options.keep_memory))
    if options.quick:
        options.models, options.repeats = ["tiny"], 2
        options.steps = ["head", "last_block", "full"]
    peers = options.peers
    if peers is None:
        peers = ["eager"] if options.quick else ["eager", "compile"]
    rows = []
    for name in options.models:
        given = dict(name=name, repeats=options.repeats, batch=options.batch, dtype=options.dtype)
        given |= dict(dropout=options.dropout, peers=peers, examples=options.examples)
        given |= dict(steps=options.steps or list(jtl_steps.CASES))
        for row in _of_model(given, apart=not options.quick):
            measure.emit(row, options.json)
            rows.append(row)
    show(rows)


def _of_model(given: dict[str, Any], *, apart: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of a model from a process of its own; once more without peers if that dies."""
    measure.say(f"== {given['name']}")
    if not apart:
        yield from map(measure.clean, cell(**given))
        return
    try:
        yield from measure.spawn("benchmarks.freezing", given)
    except RuntimeError as error:
        if not given["peers"]:
            raise
        measure.say(f"{error}; once more without the peers")
        reason = {"process": "the process with the peers died"}
        for row in measure.spawn("benchmarks.freezing", {**given, "peers": []}):
            yield {**row, "peers_failed": reason}


def cell(
    name: str,
    *,
    steps: list[str],
    repeats: int,
    batch: int | None,
    dtype: str | None,
    dropout: float | None,
    peers: list[str],
    examples: int | None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model, in this process."""
    import jax

    keep_freed_memory()
    shape, backend = shapes.SHAPES[name], jax.default_backend()
    dtype = dtype or ("bfloat16" if backend == "gpu" else "float32")
    rows = batch or shape.rows["gpu" if backend == "gpu" else "cpu"]
    about = dict(benchmark="freezing", model=name, dtype=dtype, batch=rows, backend=backend)
    about |= dict(dropout=shape.dropout if dropout is None else dropout)
    model = shapes.make_model(shape, dropout=dropout, dtype=dtype)
    given = shapes.make_batch(shape, rows)
    cases = {case: jtl_steps.CASES[case] for case in steps}
    measure.say("compiling the steps")
    ours = {case: jtl_steps.make(model, given, how) for case, how in cases.items()}
    calls = {"forward": jtl_steps.forward(model, given)}
    calls |= {case: made.timed for case, made in ours.items()}
    options = dict(dropout=dropout, dtype=dtype, compiled="compile" in peers, cases=cases)
    theirs = torch_steps.make_peers(shape, given, **options) if peers else {}
    calls |= {
        f"{p}/{case}": timed for p, peer in theirs.items() for case, timed in peer.calls.items()
    }
    calls |= _ceilings(256 if name == "tiny" else 2048 if backend == "cpu" else 8192, dtype, peers)
    seconds = measure.least(calls, repeats)
    flops = {case: timed.flops for case, timed in calls.items()}
    failed = {p: peer.failed for p, peer in theirs.items() if peer.failed}
    for row in step_rows(name, seconds, flops):
        yield about | row | {"peers_failed": failed}
    yield about | memory_row(ours[steps[0]])
    del ours, theirs, calls
    count = EXAMPLES[name] if examples is None else examples
    if count:
        phases = [case for case in held_prefix.PHASES if case in steps]
        phases = phases[:2] if name == "tiny" else phases
        for row in _run_rows(model, shape, count, rows, phases, seconds):
            yield about | (row | {"aim": None, "met": None} if name == "tiny" else row)


def _ceilings(size: int, dtype: str, peers: list[str]) -> dict[str, measure.Timed]:
    theirs = torch_steps.matmul(size, dtype) if peers else None
    ceilings = {"matmul": measure.jax_matmul(size, dtype)}
    return ceilings | ({} if theirs is None else {"torch/matmul": theirs})


def step_rows(
    name: str, seconds: Mapping[str, float], flops: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """Yield the row of the forward pass and of each step.

    Args:
        name: of the model.
        seconds: {"forward", "matmul", case, "PEER/forward", "PEER/case"}.
        flops: of the same, NaN where nobody counts them.
    """
    ceiling = flops["matmul"] / seconds["matmul"]
    forward = seconds["forward"]

    def rate(case: str) -> dict[str, float]:
        speed = flops[case] / seconds[case]
        return {"gflops": speed / 1e9, "matmul_share": speed / ceiling}

    torch = seconds.get("torch/matmul")
    torch_ceiling = None if torch is None else flops["torch/matmul"] / torch / 1e9
    top = {"matmul_gflops": ceiling / 1e9, "torch_matmul_gflops": torch_ceiling}
    found = _peers("forward", seconds, forward)
    yield {"figure": "forward", "value": 1.0, "seconds": forward, **rate("forward"), **top, **found}
    for case in (case for case in jtl_steps.CASES if case in seconds):
        value, counted = seconds[case] / forward, flops[case] / flops["forward"]
        aim = None if name in OVER_FLOOR else AIMS.get(case)
        row = {"figure": case, "value": value, **table.judged(value, aim), "seconds": seconds[case]}
        if jtl_steps.CASES[case].accumulate == 1:  # XLA counts the body of a loop once
            row |= {"flops_over_forward": counted, "over_floor": value / counted, **rate(case)}
        if case == "full":
            spent = seconds[case] - forward
            row["backward_share"] = (flops[case] - flops["forward"]) / spent / ceiling
        yield row | _peers(case, seconds, seconds[case])


def _peers(case: str, seconds: Mapping[str, float], own: float) -> dict[str, Any]:
    """Return what the peers take for a case, and the faster one beside our figure."""
    names = [key.removesuffix(f"/{case}") for key in seconds if key.endswith(f"/{case}")]
    peers = {
        peer: {
            "seconds": seconds[f"{peer}/{case}"],
            "value": seconds[f"{peer}/{case}"] / seconds.get(f"{peer}/forward", float("nan")),
        }
        for peer in names
    }
    if not peers:
        return {"peer": None, "peers": {}}
    best = min(peers, key=lambda peer: peers[peer]["seconds"])
    value = peers[best]["value"]
    ratio = value / (own / seconds["forward"])
    faster = peers[best]["seconds"] / own
    return {"peer": best, "peer_value": value, "ratio": ratio, "faster": faster, "peers": peers}


def memory_row(head: jtl_steps.Made) -> dict[str, Any]:
    """Return the row of optimizer memory for what never moves; PyTorch's AdamW has none either."""
    value = head.never_live_bytes
    row = {"figure": "never_live_bytes", "value": value, **table.judged(value, 0)}
    return row | {"optimizer_bytes_head": head.optimizer_bytes, "peer": None, "peers": {}}


def _run_rows(
    model: Any,
    shape: shapes.Shape,
    examples: int,
    batch: int,
    phases: list[str],
    seconds: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    measure.say(f"a run over {examples} rows")
    times = held_prefix.phase_times(model, shape, examples, batch, phases)
    forward = held_prefix.forward_seconds(model, shape, examples, batch)
    blocks = model.backbone.module.blocks
    yield from run_rows(times, forward, blocks, seconds)


def run_rows(
    times: Mapping[str, held_prefix.PhaseTime],
    forward: float,
    blocks: int,
    seconds: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of later epochs and of the borders.

    Args:
        times: of each phase of a run.
        forward: seconds of a forward pass over the same data.
        blocks: of the model.
        seconds: of single steps; a peer runs its prefix in every epoch, so its later epochs take
            its step over its forward pass.
    """
    # Forward and backward of one block are three times its share of the forward pass.
    aims = {"head": 0.05, "last_block": 3 / blocks}
    for case, aim in ((case, aim) for case, aim in aims.items() if case in times):
        later = times[case].epochs[1:]
        value = min(later) / forward
        row = {"figure": f"epoch_2_{case}", "value": value, **table.judged(value, aim)}
        row |= {"seconds": min(later), "first_epoch_seconds": times[case].epochs[0]}
        row |= {"forward_over_data_seconds": forward}
        peers = _peers(case, seconds, seconds[case])
        if peers["peer"]:
            peers |= {"ratio": peers["peer_value"] / value, "faster": None}
        yield row | peers
    stalls = {name: t.stall / t.step for name, t in times.items() if t.stall is not None}
    if not stalls:
        return
    value = max(stalls.values())
    row = {"figure": "border_stall", "value": value, **table.judged(value, 1.0), "stalls": stalls}
    row["border_seconds"] = {name: time.border for name, time in times.items()}
    row["compile_wait_seconds"] = {name: time.waited for name, time in times.items()}
    row["step_seconds"] = {name: time.step for name, time in times.items()}
    yield row | {"peer": None, "peers": {}}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of all rows."""
    headers = ("model", "figure", "jtl", "eager", "compiled", "aim", "FLOPs", "of matmul", "faster")
    body = []
    for row in rows:
        peers = [row["peers"].get(p, {}).get("value") for p in ("torch_eager", "torch_compile")]
        share = row.get("matmul_share")
        body.append(
            (
                *(row["model"], row["figure"], table.figure(row["value"])),
                *(table.figure(value) for value in peers),
                *(table.aimed(row), table.figure(row.get("flops_over_forward"))),
                "" if share is None else f"{share:.0%}",
                table.figure(row.get("faster"), "x"),
            )
        )
    title = "Step over forward pass; `faster` is the seconds of the faster peer over ours"
    table.show(title, headers, body, left=2)
    for row in rows:
        if row["figure"] == "forward" and row.get("peers_failed"):
            measure.say(f"{row['model']}: peers that did not run: {row['peers_failed']}")


if __name__ == "__main__":
    main()
