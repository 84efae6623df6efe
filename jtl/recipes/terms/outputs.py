"""Penalties on outputs as terms: what the start model answers is kept to."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jtl.penalties import kl as kl_formula
from jtl.recipes.terms.part import Part, Start, one_head
from jtl.train.state import Context


def kl(
    start: Start, *, weight: float = 1.0, head: str | None = None, temperature: float = 2.0
) -> Part:
    """Return weight times KL(start model ‖ model) of a kept head's outputs on the training batches.

    With the head of an earlier task this is learning without forgetting.

    Raises:
        ValueError: no kept head, or several and none named.

    Reference: Hinton, Vinyals and Dean 2015, arXiv:1503.02531; Li and Hoiem 2016, arXiv:1606.09282.
    """
    head = one_head(start, head, "kl")
    name, model = f"reference/{head}", start.model

    def columns(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        out, _ = model.apply(model.params, model.stats, batch)
        return {name: out[head]}

    def term(c: Context) -> Any:
        mask = c.batch["mask"]
        rows = jnp.sum(mask.astype(jnp.float32))
        value = kl_formula.kl(c.out[head], c.batch[name], temperature=temperature, mask=mask)
        return weight * value * rows, rows

    return Part(f"kl_{head}", term, {}, columns, (name,))
