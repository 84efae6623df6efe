"""What XLA's optimization level costs on a CPU: seconds to compile a step, and to run it.

    python -m benchmarks.compiling                      # MiniLM, ResNet-50, ViT-B/16
    python -m benchmarks.compiling --models bert llama --repeats 10
    python -m benchmarks.compiling --quick              # a tiny model, a smoke test

The full step of `benchmarks.backbones`, each level in a process of its own, without a cache. One
JSON line a model and level: `compile_cpu_seconds` is of all threads, `seconds` the least of the
repeats, `over_default` both over those of XLA's own level, which is 3.
"""

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from benchmarks import jtl_steps, measure, shapes, table

MODELS = ("minilm", "resnet", "vit")
LEVELS = (3, 1, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(shapes.SHAPES), default=list(MODELS))
    parser.add_argument("--levels", nargs="+", type=int, default=list(LEVELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, help="rows of a batch")
    parser.add_argument("--json", help="file to which the rows are added")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two repeats")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        measure.emit(cell(**json.loads(options.cell)))
        return
    if options.quick:
        options.models, options.repeats = ["tiny"], 2
    rows = []
    for name in options.models:
        found: list[dict[str, Any]] = []
        for level in options.levels:
            measure.say(f"== {name}, level {level}")
            flags = f"--xla_backend_optimization_level={level}"
            given = dict(name=name, level=level, repeats=options.repeats, batch=options.batch)
            found += measure.spawn("benchmarks.compiling", given, XLA_FLAGS=flags)
        for row in (beside(row, found[0]) for row in found):
            measure.emit(row, options.json)
            rows.append(row)
    show(rows)


def cell(name: str, *, level: int, repeats: int, batch: int | None) -> dict[str, Any]:
    """Return the row of one model at the level that the flags of this process set."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    shape = shapes.SHAPES[name]
    rows = batch or shape.rows["cpu"]
    model = shapes.make_model(shape, dropout=None, dtype="float32")
    given = shapes.make_batch(shape, rows)
    began, spent = time.perf_counter(), time.process_time()
    made = jtl_steps.make(model, given, jtl_steps.CASES["full"])
    compiling = {
        "compile_seconds": time.perf_counter() - began,
        "compile_cpu_seconds": time.process_time() - spent,
    }
    seconds = measure.least({"full": made.timed}, repeats)["full"]
    about = dict(benchmark="compiling", model=name, level=level, batch=rows)
    return {**about, **compiling, "seconds": seconds}


def beside(row: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its seconds over those of the first level.

    >>> first = {"compile_cpu_seconds": 4.0, "seconds": 2.0}
    >>> beside({"compile_cpu_seconds": 3.0, "seconds": 2.0}, first)["over_default"]
    {'compile_cpu_seconds': 0.75, 'seconds': 1.0}
    """
    names = ("compile_cpu_seconds", "seconds")
    return {**row, "over_default": {name: row[name] / first[name] for name in names}}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of all rows."""
    headers = ("model", "level", "compiling", "of all threads", "a step")
    body = [
        (
            *(row["model"], str(row["level"])),
            *(
                table.figure(row[name], " s")
                for name in ("compile_seconds", "compile_cpu_seconds", "seconds")
            ),
        )
        for row in rows
    ]
    table.show("Seconds by XLA's optimization level", headers, body, left=1)


if __name__ == "__main__":
    main()
