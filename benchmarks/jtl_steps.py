"""Our side of `benchmarks.freezing`: the forward pass and one step for each set of live groups."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.measure import Timed
from jtl import masks, trees
from jtl.losses.classification import cross_entropy
from jtl.models.model import Model
from jtl.recipes.optimizers import adamw
from jtl.train.compile import make_compiled
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

CLIP = 1.0


class Case(NamedTuple):
    """What moves in a step, and what else the step does.

    Attributes:
        blocks: open from the top, None for the whole backbone; the head always moves.
        accumulate: microbatches.
        ema: decay of the average of the live weights, None for none.
    """

    blocks: int | None
    accumulate: int = 1
    ema: float | None = None


CASES = {
    "head": Case(0),
    "head_all_on": Case(0, accumulate=2, ema=0.999),
    "last_block": Case(1),
    "last_two_blocks": Case(2),
    "full": Case(None),
}


class Made(NamedTuple):
    """A step to time, and the optimizer's memory.

    Attributes:
        timed: the step.
        optimizer_bytes: its slots in all.
        never_live_bytes: those of labels that no step moves.
    """

    timed: Timed
    optimizer_bytes: int
    never_live_bytes: int


def live_labels(model: Model, case: Case) -> frozenset[str]:
    """Return the labels that move."""
    blocks = model.backbone.module.blocks
    if case.blocks is None:
        return frozenset((*model.groups, "head"))
    opened = (f"block_{i}" for i in range(blocks - case.blocks, blocks))
    # The last norm of a pre-norm encoder lies above its last block and opens with it.
    top = {"top"} & set(model.groups) if case.blocks else set()
    return frozenset((*opened, *top, "head"))


def forward(model: Model, batch: dict[str, Any]) -> Timed:
    """Return the forward pass in evaluation mode, compiled."""
    arrays = jax.tree.map(jnp.asarray, batch)

    def logits(params: Any, inputs: Any) -> jax.Array:
        return model.apply(params, model.stats, inputs)[0]["head"]

    compiled = jax.jit(logits).lower(model.params, arrays).compile()
    flops = float(compiled.cost_analysis()["flops"])
    return Timed(lambda: jax.block_until_ready(compiled(model.params, arrays)), flops)


def make(model: Model, batch: dict[str, Any], case: Case) -> Made:
    """Return a step: AdamW, clip and norm metric over what moves, gate on what is not finite."""

    def loss(c: Any) -> Any:
        return cross_entropy(c.out["head"], c.batch["label"], mask=c.batch["mask"])

    live, labels = live_labels(model, case), model.labels
    tx = phase_optimizer(dict.fromkeys(live, adamw()), labels, live, live)
    options = dict(clip=CLIP, accumulate=case.accumulate, ema=case.ema)
    step = make_compiled(
        make_step(model.apply, {"task": loss}, tx, labels, dict.fromkeys(live, 1e-5), **options)
    )
    averaged = None if case.ema is None else masks.mask(labels, live)
    key = jax.random.key(0)
    held = [create(model.params, model.stats, tx, averaged=averaged, key=key)]
    slots = optimizer_bytes(held[0].opt_state, live)
    arrays, start = jax.tree.map(jnp.asarray, batch), jnp.int32(0)
    compiled = step.compile(held[0], arrays, start)

    def call() -> Any:
        held[0], metrics = compiled.call(held[0], arrays, start)
        return jax.block_until_ready((held[0], metrics))

    return Made(Timed(call, compiled.flops), *slots)


def optimizer_bytes(opt_state: Any, live: frozenset[str]) -> tuple[int, int]:
    """Return the bytes of all slots, and of those of labels outside `live`."""
    slots = {name: trees.size_bytes(slot) for name, slot in opt_state.inner_states.items()}
    return sum(slots.values()), sum(size for name, size in slots.items() if name not in live)
