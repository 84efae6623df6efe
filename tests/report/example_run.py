"""A small run as plain data, as the records hold it."""

from typing import Any

PLAN = [
    {"name": "head", "live": ["head"], "steps": 4},
    {"name": "open_block_1", "live": ["block_1", "head"], "steps": 2},
    {"name": "open_stem", "live": ["block_0", "block_1", "head", "stem"], "steps": 2},
]
ORDER = ["stem", "block_0", "block_1"]


def score(validation: float, test: float) -> dict[str, Any]:
    interval = [test - 0.02, test + 0.02]
    return {"validation": validation, "test": test, "test_interval": interval, "seconds": 1.5}


def phase(name: str, live: list[str], before: float, after: float, steps: int) -> dict[str, Any]:
    return {
        "name": name,
        "live": live,
        "epochs": steps / 2,
        "steps": steps,
        "metric_before": before,
        "metric_after": after,
        "seconds": 2.0,
        "compile_seconds": 1.0,
        "flops_per_step": 2e9,
        "optimizer_bytes": 3000,
        "held_bit_equal": True,
    }


def result() -> dict[str, Any]:
    skipped = phase("open_stem", PLAN[2]["live"], 0.8, 0.8, 0) | {"skipped": True}
    return {
        "metric": "accuracy",
        "baselines": {"majority": score(0.5, 0.52), "linear_probe": score(0.75, 0.74)},
        "target": score(0.8, 0.79),
        "phases": [
            phase("head", ["head"], 0.5, 0.7, 4),
            phase("open_block_1", ["block_1", "head"], 0.7, 0.8, 2),
            skipped,
        ],
        "held_bit_equal": True,
        "loaded": {"loaded": 3, "fresh": 1, "unexpected": 0, "wrong_shape": 0},
        "seed": 0,
        "versions": {"jax": "0"},
        "config": {"recipe": "fine_tune", "seed": 0},
    }


def full_result() -> dict[str, Any]:
    """Return a result with every key that may be absent."""
    rates = {"head": 1e-3, "open_block_1": 1e-3, "open_stem": 1e-3}
    return result() | {
        "gain": {"over": "linear_probe", "value": 0.05, "interval": [0.01, 0.09]},
        "figures": {"validation": {"accuracy": 0.8}, "test": {"accuracy": 0.79, "loss": 0.4}},
        "groups": [
            {"label": "stem", "leaves": 5, "parameters": 1200, "rates": {"open_stem": 1e-5}},
            {"label": "block_0", "leaves": 5, "parameters": 90, "rates": {"open_stem": 2e-5}},
            {"label": "block_1", "leaves": 5, "parameters": 90, "rates": {"open_block_1": 4e-5}},
            {"label": "head", "leaves": 2, "parameters": 10, "rates": rates},
        ],
        "confusion": {"classes": ["bad", "good"], "counts": [[8, 2], [1, 9]]},
        "calibration": {"confidence": [0.0, 15.0], "correct": [0, 17], "count": [0, 20]},
        "load_report": {"loaded": ["a", "b", "c"], "fresh": ["head/kernel"]},
        "source": "a checkpoint",
        "data": {"name": "reviews", "train": 2000},
        "seconds": 61.0,
    }


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    step, figure = 0, 0.5
    for planned in PLAN[:2]:
        name, live = planned["name"], planned["live"]
        start = {"kind": "phase_start", "step": step, "phase": name, "live": live}
        found.append(start | {"steps": planned["steps"]})
        for _ in range(planned["steps"]):
            step += 1
            row = {"kind": "step", "step": step, "phase": name, "loss": 1 / step, "examples": 8}
            row |= {"loss/classification": 1 / step, "loss/l2_sp": 0.01 * step}
            found.append(row | {f"rate/{label}": 1e-3 for label in live})
        before, figure = figure, figure + 0.2
        found.append({"kind": "evaluation", "step": step, "phase": name, "accuracy": figure})
        end = phase(name, live, before, figure, planned["steps"])
        found.append({**end, "kind": "phase_end", "step": step, "phase": name})
    return [*found, {"kind": "skipped", "step": step, "phase": "open_stem"}]
