"""Formulas as terms: what a penalty needs from the start model, and how it enters the loss.

A penalty is made once, when the start model is known: `penalty(start) -> Part`. A part is a term
`Context -> (sum, weight)`, the arrays that it reads (`refs`, never trained) and, for penalties on
outputs, what the start model gives on the training data (`columns`, computed once).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtl import data as jdata
from jtl.data import Dataset
from jtl.models.model import Model
from jtl.penalties import ewc as ewc_formula
from jtl.penalties import fisher, l2sp
from jtl.penalties import kl as kl_formula
from jtl.train.state import Context, Term

Columns = Callable[[Mapping[str, Any]], dict[str, jax.Array]]


class Start(NamedTuple):
    """What a penalty may keep to: the model before training, and what it is trained on.

    Attributes:
        model: the start model.
        kept: names of heads that came with it, trained; a fresh head has nothing to keep.
        live: labels that move in some phase of the plan.
        datasets: {kept head: encoded training data of its task}, where the recipe has them.
        key: for sampling.
    """

    model: Model
    kept: tuple[str, ...]
    live: frozenset[str]
    datasets: Mapping[str, Dataset]
    key: jax.Array


class Part(NamedTuple):
    """A penalty ready for the step.

    Attributes:
        name: of the term in the metrics.
        term: see `train.state.Term`.
        refs: arrays that the term reads from `Context.refs`.
        columns: `batch -> columns` of the training data, computed once with the start model.
        column_names: the names that `columns` gives.
    """

    name: str
    term: Term
    refs: dict[str, Any]
    columns: Columns | None = None
    column_names: tuple[str, ...] = ()


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
    head = _one_head(start, head, "ewc")
    model, params, stats = start.model, start.model.params, start.model.stats
    dataset = _dataset(start, head, data)

    def log_prob(backbone: Any, example: Mapping[str, Any], label: Any) -> Any:
        one = {name: jnp.expand_dims(value, 0) for name, value in example.items()}
        out, _ = model.apply({**params, "backbone": backbone}, stats, one)
        log_probabilities = jax.nn.log_softmax(out[head][0])
        return log_probabilities[label]

    mask = jax.tree.map(lambda label: label in start.live, model.labels["backbone"])
    importance = fisher.fisher_diagonal(
        log_prob,
        params["backbone"],
        _examples(dataset, examples),
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


def kl(
    start: Start, *, weight: float = 1.0, head: str | None = None, temperature: float = 2.0
) -> Part:
    """Return weight times KL(start model ‖ model) of a kept head's outputs on the training batches.

    With the head of an earlier task this is learning without forgetting.

    Raises:
        ValueError: no kept head, or several and none named.

    Reference: Hinton, Vinyals and Dean 2015, arXiv:1503.02531; Li and Hoiem 2016, arXiv:1606.09282.
    """
    head = _one_head(start, head, "kl")
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


def _one_head(start: Start, head: str | None, what: str) -> str:
    if head is None and len(start.kept) == 1:
        return start.kept[0]
    if head in start.kept:
        return str(head)
    raise ValueError(
        f"{what} keeps to a trained head, and head={head!r} is given; the start model brought "
        f"{list(start.kept)}; start from a run (backbone of kind 'run'), name one of its heads, or "
        "take l2_sp, which needs none"
    )


def _dataset(start: Start, head: str, data: Mapping[str, Any] | None) -> Dataset:
    if data is not None:
        return jdata.encode(data["train"], start.model.backbone.inputs)
    if head not in start.datasets:
        raise ValueError(
            f"ewc needs examples of the task of head {head!r}; there are data of "
            f"{sorted(start.datasets)}; give data={{'train': source}} (in a config, a data section)"
        )
    return start.datasets[head]


def _examples(dataset: Dataset, rows: int) -> Iterator[tuple[Any, Any]]:
    """Return batches of raw columns and labels, real rows only, `rows` in all at the most."""
    left = rows
    for chosen in jdata.plan(dataset, min(32, dataset.size)):
        chosen = chosen[:left]
        left -= len(chosen)
        if len(chosen):
            yield dataset.columns(chosen), dataset.labels[chosen]
