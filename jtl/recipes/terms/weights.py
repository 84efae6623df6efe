"""Penalties on weights as terms: what was learned holds them near where they were.

They cover the leaves that move and were trained before: those of the backbone and of kept heads. A
head that is kept and goes on moving, shared by several tasks, is held back like the backbone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import masks
from jtl.penalties import ewc as ewc_formula
from jtl.penalties import fisher, l2sp
from jtl.penalties import mas as mas_formula
from jtl.recipes.terms.part import Part, Start, check_weight, dataset_of, examples_of, one_head
from jtl.train.state import Context

FORMS = ("separate", "online")
_ROWS = 128  # of a batch whose gradients are taken; `chunk` bounds what is in memory


def l2_sp(start: Start, *, weight: float = 0.01) -> Part | None:
    """Return weight times L2-SP towards where the weights are now; fresh heads stay out.

    Args:
        start: the model that is kept to.
        weight: of 1/2 sum (params - start)^2, per unit of squared distance.

    Returns:
        The part; None before the first of several tasks.

    Reference: Li, Grandvalet and Davoine 2018, arXiv:1802.01483, equation 3.
    """
    check_weight(weight, "l2_sp")
    if start.first:
        return None
    mask = _covered(start)

    def term(c: Context) -> Any:
        value = l2sp.l2_sp(c.params, c.refs["l2_sp"], mask=mask)
        return weight * value, jnp.float32(1.0)

    return Part("l2_sp", term, {"l2_sp": _anchor(start, mask)})


def ewc(
    start: Start,
    *,
    weight: float = 100.0,
    head: str | None = None,
    data: Mapping[str, Any] | None = None,
    labels: str = "sampled",
    examples: int = 256,
    chunk: int | None = None,
    form: str = "separate",
    decay: float = 1.0,
) -> Part | None:
    """Return weight times the EWC penalty of all earlier tasks, at the cost of one.

    Args:
        start: its model must have kept a trained head.
        weight: lambda of the paper, per unit of the mean Fisher information of one example. With a
            loss that is a mean over examples, 1 is what Bayes' rule gives two tasks of the same
            number of examples.
        head: which kept head; None takes each that the recipe has data of, which of several tasks
            is the last.
        data: {"train": source} of that head's task; None where the recipe has it.
        labels: "sampled" from the model, "data", or "exact" over all classes.
        examples: number of training examples of each head that the Fisher is taken over.
        chunk: examples whose gradients are held in memory at once; None chooses.
        form: "separate" is the sum of the penalties of all tasks, each with its own anchor;
            "online" has the newest anchor, and information decays.
        decay: gamma of the online form, above 0 and at most 1: what is left of the earlier tasks'
            information at each new one.

    Returns:
        The part; None before the first of several tasks.

    Raises:
        ValueError: no kept head, or several and none named; no data of its task; a head that tells
            no classes apart; an unknown form, or a decay outside (0, 1] or in the separate form.

    Reference: Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3; Schwarz et al. 2018,
        arXiv:1805.06370, equation 9 (online).
    """
    check_weight(weight, "ewc")
    _check_form(form, decay)
    if start.first:
        return None
    covered = _covered(start)

    def of_head(output: _Output, classes: int, rows: Any) -> PyTree:
        def log_prob(variables: Any, example: Any, label: Any) -> jax.Array:
            return jax.nn.log_softmax(output(variables, example))[label]

        return fisher.fisher_diagonal(
            log_prob,
            _variables(start),
            rows,
            labels=labels,  # pyright: ignore[reportArgumentType]
            classes=classes,
            key=start.key,
            mask=_variables_mask(start, covered),
            chunk=chunk,
        )["params"]

    heads = _heads(start, head, data, "ewc")
    name = _name("ewc", head, data, heads)
    found = _summed(start, heads, data, examples, "ewc", of_head)
    both = ewc_formula.Quadratic(_anchor(start, covered), found, jnp.float32(0.0))
    fields = tuple(f"{name}/{field}" for field in both._fields)
    if start.previous is not None:
        earlier = ewc_formula.Quadratic(*(start.previous.refs[field] for field in fields))
        both = _with_earlier(earlier, both, form, decay)
    mask = _known(covered, both.fisher)

    def term(c: Context) -> Any:
        anchor, information, constant = (c.refs[field] for field in fields)
        value = ewc_formula.ewc(c.params, anchor, information, mask=mask)
        return weight * (value + constant), jnp.float32(1.0)

    return Part(name, term, dict(zip(fields, both, strict=True)))


def mas(
    start: Start,
    *,
    weight: float = 1.0,
    head: str | None = None,
    data: Mapping[str, Any] | None = None,
    examples: int = 256,
    chunk: int | None = None,
    decay: float = 1.0,
) -> Part | None:
    """Return weight times the MAS penalty of all earlier tasks; the newest anchor holds.

    Args:
        start: its model must have kept a trained head.
        weight: lambda of the paper, per unit of the mean over examples of the absolute gradient of
            the squared length of the logits.
        head: as in `ewc`.
        data: as in `ewc`; labels are not read.
        examples: number of training examples of each head that the importance is taken over.
        chunk: as in `ewc`.
        decay: above 0 and at most 1: what is left of the earlier tasks' importance at each new one.

    Returns:
        The part; None before the first of several tasks.

    Raises:
        ValueError: no kept head, or several and none named; no data of its task; a decay outside
            (0, 1].

    Reference: Aljundi et al. 2018, arXiv:1711.09601, equation 4.
    """
    check_weight(weight, "mas")
    _check_decay(decay)
    if start.first:
        return None
    covered = _covered(start)

    def of_head(output: _Output, classes: int, rows: Any) -> PyTree:
        del classes
        return mas_formula.output_importance(
            output,
            _variables(start),
            (columns for columns, _ in rows),
            mask=_variables_mask(start, covered),
            chunk=chunk,
        )["params"]

    heads = _heads(start, head, data, "mas")
    name = _name("mas", head, data, heads)
    found = _summed(start, heads, data, examples, "mas", of_head)
    if start.previous is not None:
        found = ewc_formula.decayed(start.previous.refs[f"{name}/importance"], found, decay)
    mask = _known(covered, found)

    def term(c: Context) -> Any:
        anchor, importance = c.refs[f"{name}/anchor"], c.refs[f"{name}/importance"]
        return weight * mas_formula.mas(c.params, anchor, importance, mask=mask), jnp.float32(1.0)

    return Part(
        name, term, {f"{name}/anchor": _anchor(start, covered), f"{name}/importance": found}
    )


_Output = Callable[[Any, Mapping[str, Any]], jax.Array]


def _with_earlier(
    earlier: ewc_formula.Quadratic, new: ewc_formula.Quadratic, form: str, decay: float
) -> ewc_formula.Quadratic:
    """Return one quadratic for all tasks so far."""
    if form == "separate":
        return ewc_formula.merged(earlier, new.anchor, new.fisher)
    return new._replace(fisher=ewc_formula.decayed(earlier.fisher, new.fisher, decay))


def _covered(start: Start) -> PyTree[bool]:
    """Return the mask of the leaves that move and were trained before."""
    fresh = frozenset(start.model.heads) - frozenset(start.kept)
    return jax.tree.map(lambda label: label in start.live - fresh, start.model.labels)


def _known(covered: PyTree[bool], importance: PyTree) -> PyTree[bool]:
    return jax.tree.map(lambda keep, found: keep and found is not None, covered, importance)


def _anchor(start: Start, mask: PyTree[bool]) -> PyTree:
    chosen, _ = masks.split(start.model.params, mask)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), chosen)


def _variables(start: Start) -> dict[str, Any]:
    """Return all that the model reads: as arguments, so that tasks share what is compiled."""
    return {"params": start.model.params, "stats": start.model.stats}


def _variables_mask(start: Start, covered: PyTree[bool]) -> dict[str, Any]:
    return {"params": covered, "stats": jax.tree.map(lambda _: False, start.model.stats)}


def _heads(
    start: Start, head: str | None, data: Mapping[str, Any] | None, what: str
) -> tuple[str, ...]:
    there = tuple(name for name in start.kept if name in start.datasets)
    return there if head is None and data is None and there else (one_head(start, head, what),)


def _name(what: str, head: str | None, data: Mapping[str, Any] | None, heads: Any) -> str:
    return what if head is None and data is None else f"{what}_{heads[0]}"


def _summed(
    start: Start,
    heads: tuple[str, ...],
    data: Mapping[str, Any] | None,
    examples: int,
    what: str,
    of_head: Callable[[_Output, int, Any], PyTree],
) -> PyTree:
    """Return the sum over heads of the importance of each, in evaluation mode."""
    total = None
    for head in heads:
        dataset = dataset_of(start, head, data, what)
        output, classes = _output(start, head), _classes(start, head, dataset, what)
        found = of_head(output, classes, examples_of(dataset, examples, _ROWS))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return total


def _output(start: Start, head: str) -> _Output:
    """Return `(variables, example) -> logits` of one example."""
    apply = start.model.apply

    def output(variables: Any, example: Mapping[str, Any]) -> jax.Array:
        one = {name: jnp.expand_dims(value, 0) for name, value in example.items()}
        out, _ = apply(variables["params"], variables["stats"], one)
        return out[head][0].astype(jnp.float32)

    return output


def _classes(start: Start, head: str, dataset: Any, what: str) -> int:
    columns, _ = next(examples_of(dataset, 1, 1))
    example = {name: column[0] for name, column in columns.items()}
    shape = jax.eval_shape(_output(start, head), _variables(start), example).shape
    if len(shape) != 1 or (what == "ewc" and shape[0] < 2):
        raise ValueError(
            f"{what} needs one vector of logits for each example, and head {head!r} gives {shape}; "
            "name a head of classes, or take l2_sp, which needs no outputs"
        )
    return shape[0]


def _check_form(form: str, decay: float) -> None:
    if form not in FORMS:
        raise ValueError(f"form {form!r} is not known; take one of {FORMS}")
    _check_decay(decay)
    if form == "separate" and decay != 1.0:
        raise ValueError(
            f"decay={decay} is of the online form, and form='separate' lets nothing go; give "
            "form='online', or decay=1.0"
        )


def _check_decay(decay: float) -> None:
    if not 0 < decay <= 1:
        raise ValueError(
            f"decay={decay} is the share of earlier importance that is left; take a number above 0 "
            "and at most 1"
        )
