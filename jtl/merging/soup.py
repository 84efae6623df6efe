"""Model soups, the mean of several tuned models: Wortsman et al. 2022, arXiv:2203.05482.

The ingredients start from the same weights and have the same heads. Batch-normalisation statistics
do not average: recompute them for the soup (`train.statistics`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import trees


class Soup(NamedTuple):
    """A greedy soup.

    Attributes:
        params: the mean of the kept ingredients.
        kept: their names, in the order in which they went in.
        score: of the soup.
        scores: {name: score of the ingredient alone}.
        tried: (name, score of the soup with it) in order, kept or not; the best one is the first.
    """

    params: PyTree
    kept: tuple[str, ...]
    score: float
    scores: dict[str, float]
    tried: tuple[tuple[str, float], ...]


def uniform(ingredients: Sequence[PyTree]) -> PyTree:
    """Return the mean of all ingredients, leaf by leaf in the dtypes of the first.

    A number that is the same in all is the same, bit for bit, in the soup.

    >>> uniform([{"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([3.0, 5.0])}])
    {'w': Array([2., 5.], dtype=float32)}

    Args:
        ingredients: trees of weights, read one after the other. A None is a hole (`masks.split`).

    Raises:
        ValueError: no ingredient, trees of different structure or shapes, no floating point.

    Reference: Wortsman et al. 2022, arXiv:2203.05482, section 2, "uniform soup".
    """
    if not len(ingredients):
        raise ValueError("a soup of 0 ingredients is asked for; give one tree of weights or more")
    first = ingredients[0]
    away = None
    for tree in ingredients[1:]:
        away = _farther(away, first, tree)
    return first if away is None else _mean(first, away, len(ingredients))


def greedy(ingredients: Mapping[str, PyTree], score: Callable[[PyTree], float | int]) -> Soup:
    """Return the soup into which each ingredient goes that does not lower its score.

    Best ingredient first; of equal ones, the first given.

    >>> tuned = {"a": {"w": 3.5}, "b": {"w": 1.5}, "c": {"w": 8.5}}
    >>> soup = greedy(tuned, lambda tree: 4.0 - abs(float(tree["w"]) - 2.0))
    >>> soup.kept, float(soup.params["w"]), soup.scores
    (('b', 'a'), 2.5, {'a': 2.5, 'b': 3.5, 'c': -2.5})
    >>> soup.tried
    (('b', 3.5), ('a', 3.5), ('c', 1.5))

    Args:
        ingredients: {name: tree of weights}. One is read at a time, twice in all: a mapping that
            loads on demand keeps three trees in memory, however many there are.
        score: of a tree on validation data, higher is better; never on test data.

    Raises:
        ValueError: no ingredient, a score that is NaN, or trees that do not fit each other.

    Reference: Wortsman et al. 2022, arXiv:2203.05482, recipe 1.
    """
    if not len(ingredients):
        raise ValueError("a soup of 0 ingredients is asked for; give one tree of weights or more")
    scores = {name: _number(score(ingredients[name]), name) for name in ingredients}
    first, *others = sorted(scores, key=lambda name: -scores[name])
    base = best = ingredients[first]
    kept, level, away, tried = [first], scores[first], None, [(first, scores[first])]
    for name in others:
        farther = _farther(away, base, ingredients[name])
        mixed = _mean(base, farther, len(kept) + 1)
        figure = _number(score(mixed), f"the soup with {name}")
        tried.append((name, figure))
        if figure >= level:
            kept, level, away, best = [*kept, name], figure, farther, mixed
    return Soup(best, tuple(kept), level, scores, tuple(tried))


def _farther(away: PyTree, first: PyTree, tree: PyTree) -> PyTree:
    """Add `tree - first` to the sum of differences, in float32: equal leaves add exact zeros."""
    step = trees.in_float32(lambda x, y: y - x, first, tree, dtype=jnp.float32)
    return step if away is None else trees.in_float32(jnp.add, away, step)


def _mean(first: PyTree, away: PyTree, count: int) -> PyTree:
    def mean(x: Any, moved: Any) -> Any:
        return jnp.where(moved == 0, x, x + moved / count)

    return trees.in_float32(mean, first, away)


def _number(figure: Any, what: str) -> float:
    if figure != figure:
        raise ValueError(f"the score of {what} is {figure}; leave it out, or score finite outputs")
    return float(figure)
