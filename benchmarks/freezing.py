"""What a training step costs when parts are held, as a multiple of the forward pass.

    python -m benchmarks.freezing            # BERT-base shapes, 8 x 128 tokens, float32
    python -m benchmarks.freezing --quick    # MiniLM shapes, for a smoke test

Prints one JSON line for each set of live groups: seconds and FLOPs of the step, both divided by
those of the forward pass, and beside them PyTorch (transformers, eager, the frozen part in
evaluation mode under no_grad) where the extra `parity` is installed. Times are the least of
interleaved repeats.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl.losses.classification import cross_entropy
from jtl.models.heads import Linear
from jtl.models.load import new_backbone
from jtl.models.model import Model, attach
from jtl.recipes.optimizers import adamw
from jtl.train.compile import make_compiled
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
MINILM = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="MiniLM shapes, two repeats")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    shape, repeats = (MINILM, 2) if options.quick else (BASE, options.repeats)
    batch = _batch(8, 128)
    model = _model(shape)
    blocks = model.backbone.module.blocks
    top = f"block_{blocks - 1}"
    sets = {
        "head": ("head",),
        "last_block": (top, "head"),
        "last_two_blocks": (f"block_{blocks - 2}", top, "head"),
        "full": (*model.groups, "head"),
    }
    calls: dict[str, Callable[[], Any]] = {"forward": _forward(model, batch)}
    flops = {"forward": calls["forward"].flops}  # type: ignore[attr-defined]
    for name, live in sets.items():
        calls[name] = _step(model, batch, frozenset(live))
        flops[name] = calls[name].flops  # type: ignore[attr-defined]
    seconds = _least(calls, repeats)
    peer = _torch(shape, batch, {"head": 0, "last_block": 1, "last_two_blocks": 2}, repeats)
    for name in sets:
        row = {
            "benchmark": "freezing",
            "live": name,
            "seconds": round(seconds[name], 4),
            "time_over_forward": round(seconds[name] / seconds["forward"], 3),
            "flops_over_forward": round(flops[name] / flops["forward"], 3),
        }
        if peer:
            row["torch_seconds"] = round(peer[name], 4)
            row["torch_time_over_forward"] = round(peer[name] / peer["forward"], 3)
            row["torch_over_jtl"] = round(peer[name] / seconds[name], 2)
        print(json.dumps(row), flush=True)


def _batch(rows: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(1000, 30000, (rows, length)).astype(np.int32),
        "attention_mask": np.ones((rows, length), np.int32),
        "label": rng.integers(0, 2, rows).astype(np.int32),
        "mask": np.ones(rows, bool),
    }


def _model(shape: dict[str, int]) -> Model:
    backbone = new_backbone("bert", dict(shape), key=jax.random.key(0), pooling="mean")
    return attach(backbone, {"head": Linear(2, dropout=0.1)}, key=jax.random.key(1))


def _forward(model: Model, batch: dict[str, Any]) -> Callable[[], Any]:
    arrays = jax.tree.map(jnp.asarray, batch)

    def forward(params: Any, inputs: Any) -> jax.Array:
        return model.apply(params, model.stats, inputs)[0]["head"]

    compiled = jax.jit(forward).lower(model.params, arrays).compile()

    def call() -> Any:
        return jax.block_until_ready(compiled(model.params, arrays))

    call.flops = compiled.cost_analysis()["flops"]  # type: ignore[attr-defined]
    return call


def _step(model: Model, batch: dict[str, Any], live: frozenset[str]) -> Callable[[], Any]:
    def loss(c: Any) -> Any:
        return cross_entropy(c.out["head"], c.batch["label"], mask=c.batch["mask"])

    labels = model.labels
    txs = {label: adamw() for label in live}
    tx = phase_optimizer(txs, labels, live, live)
    rates = dict.fromkeys(live, 1e-5)
    step = make_compiled(make_step(model.apply, {"task": loss}, tx, labels, rates, clip=1.0))
    arrays = jax.tree.map(jnp.asarray, batch)
    start = jnp.int32(0)
    held = [create(model.params, model.stats, tx, key=jax.random.key(0))]
    compiled = step.compile(held[0], arrays, start)

    def call() -> Any:
        held[0], metrics = compiled.call(held[0], arrays, start)
        return jax.block_until_ready(metrics)

    call.flops = compiled.flops  # type: ignore[attr-defined]
    return call


def _least(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def _torch(
    shape: dict[str, int], batch: dict[str, Any], open_blocks: dict[str, int], repeats: int
) -> dict[str, float]:
    try:
        import torch
        from transformers import BertConfig, BertModel
    except ImportError:
        return {}
    ids, mask = torch.tensor(batch["input_ids"]).long(), torch.tensor(batch["attention_mask"])
    labels = torch.tensor(batch["label"]).long()
    body = BertModel(BertConfig(**shape), add_pooling_layer=False)
    head = torch.nn.Linear(shape["hidden_size"], 2)

    def pooled() -> Any:
        hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden.mean(1)

    def forward() -> None:
        body.eval()
        with torch.no_grad():
            head(pooled())

    def step(blocks: int | None) -> Callable[[], None]:
        def call() -> None:
            body.train(blocks is None)
            for p in body.parameters():
                p.requires_grad_(blocks is None)
            for layer in list(body.encoder.layer)[len(body.encoder.layer) - (blocks or 0) :]:
                layer.train()
                for p in layer.parameters():
                    p.requires_grad_(True)
            live = [p for p in (*body.parameters(), *head.parameters()) if p.requires_grad]
            tx = optimizers.setdefault(blocks, torch.optim.AdamW(live, lr=1e-5))
            tx.zero_grad()
            if blocks == 0:
                with torch.no_grad():
                    features = pooled()
            else:
                features = pooled()
            torch.nn.functional.cross_entropy(head(features), labels).backward()
            torch.nn.utils.clip_grad_norm_(live, 1.0)
            tx.step()

        return call

    optimizers: dict[int | None, Any] = {}
    calls = {name: step(blocks) for name, blocks in open_blocks.items()}
    return _least({"forward": forward, **calls, "full": step(None)}, repeats)


if __name__ == "__main__":
    main()
