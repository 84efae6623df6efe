"""Penalties on weights as terms: what was learned holds them near where they were."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl.penalties import ewc as ewc_formula
from jtl.penalties import fisher, l2sp
from jtl.recipes.terms.part import Part, Start, dataset_of, examples_of, one_head
from jtl.train.state import Context


def l2_sp(start: Start, *, weight: float = 0.01) -> Part:
    """Return weight times L2-SP towards the start of the backbone; heads stay out.

    Reference: Li, Grandvalet and Davoine 2018, arXiv:1802.01483, equation 3.
    """

    def term(c: Context) -> Any:
        value = l2sp.l2_sp(c.params["backbone"], c.refs["l2_sp"])
        return weight * value, jnp.float32(1.0)

    return Part("l2_sp", term, {"l2_sp": start.model.params["backbone"]})


def ewc(
    start: Start,
    *,
    weight: float = 100.0,
    head: str | None = None,
    data: Mapping[str, Any] | None = None,
    labels: str = "sampled",
    examples: int = 256,
    chunk: int = 8,
) -> Part:
    """Return weight times the EWC penalty of the backbone for the task of a kept head.

    Args:
        start: its model must have kept a trained head.
        weight: lambda of the paper, per unit of the mean Fisher information of one example.
        head: which kept head; None where there is only one.
        data: {"train": source} of that head's task; None where the recipe has it.
        labels: "sampled" from the model, "data", or "exact" over all classes.
        examples: number of training examples of that task that the Fisher is taken over.
        chunk: examples whose gradients are held in memory at once.

    Raises:
        ValueError: no kept head, or several and none named; no data of its task.

    Reference: Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3.
    """
    head = one_head(start, head, "ewc")
    model, params, stats = start.model, start.model.params, start.model.stats
    dataset = dataset_of(start, head, data, "ewc")

    def log_prob(backbone: Any, example: Mapping[str, Any], label: Any) -> Any:
        one = {name: jnp.expand_dims(value, 0) for name, value in example.items()}
        out, _ = model.apply({**params, "backbone": backbone}, stats, one)
        log_probabilities = jax.nn.log_softmax(out[head][0])
        return log_probabilities[label]

    mask = jax.tree.map(lambda label: label in start.live, model.labels["backbone"])
    importance = fisher.fisher_diagonal(
        log_prob,
        params["backbone"],
        examples_of(dataset, examples),
        labels=labels,  # pyright: ignore[reportArgumentType]
        classes=int(np.shape(params["heads"][head]["classifier"]["bias"])[0]),
        key=start.key,
        mask=mask,
        chunk=chunk,
    )

    def term(c: Context) -> Any:
        value = ewc_formula.ewc(
            c.params["backbone"], c.refs[f"anchor/{head}"], c.refs[f"fisher/{head}"], mask=mask
        )
        return weight * value, jnp.float32(1.0)

    refs = {f"anchor/{head}": params["backbone"], f"fisher/{head}": importance}
    return Part(f"ewc_{head}", term, refs)
