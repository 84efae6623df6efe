"""Tokens masked once and for all, so that the figures of a masked language model compare."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl.data import Dataset

POSITIONS, LABELS = "masked_positions", "masked_labels"


def masked(dataset: Dataset, tokenizer: Any, *, share: float, seed: int) -> Dataset:
    """Return texts in which a share of the tokens is hidden behind the mask token.

    Two int32 columns (n, most masked in a text) are added: where the tokens stood, and which they
    were, -1 where a text has fewer. Special tokens and padding are never masked; at least one other
    token of each text is.

    Args:
        dataset: encoded texts.
        tokenizer: says which tokens are special, and has the mask token.
        share: of the tokens.
        seed: of the choice; the same for the same rows.

    Raises:
        ValueError: the tokenizer has no mask token, a share outside (0, 1], or no token to mask.
    """
    if getattr(tokenizer, "mask_token_id", None) is None or not 0 < share <= 1:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has the special tokens "
            f"{getattr(tokenizer, 'all_special_tokens', [])} and share is {share}; masked-LM needs "
            "a mask token and a share above 0, at most 1"
        )
    rng = np.random.default_rng(seed)
    parts = tuple(_part(dict(part), tokenizer, share, rng) for part in dataset.parts)
    if not any((part[LABELS] >= 0).any() for part in parts):
        raise ValueError(f"{dataset.name} has no token to mask; give texts with words")
    return dataclasses.replace(dataset, parts=parts, derived=(POSITIONS, LABELS))


def at_masked(tokens: jax.Array, batch: Any) -> jax.Array:
    """Return the tokens (n, masked, dim) at the masked positions of (n, positions, dim).

    >>> tokens = jnp.array([[[1.0], [2.0], [3.0]]])
    >>> at_masked(tokens, {"masked_positions": jnp.array([[2, 0]])})[0, :, 0].tolist()
    [3.0, 1.0]
    """
    return jnp.take_along_axis(tokens, batch[POSITIONS][:, :, None], axis=1)


def _part(
    part: dict[str, np.ndarray], tokenizer: Any, share: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    ids = np.array(part["input_ids"])
    ordinary = ~np.isin(ids, tokenizer.all_special_ids) & (part["attention_mask"] > 0)
    wanted = np.ceil(share * ordinary.sum(1)).astype(int)
    most = max(int(wanted.max(initial=0)), 1)
    # The lowest of random numbers, real tokens before all others: a choice without replacement.
    order = np.argsort(np.where(ordinary, rng.random(ids.shape), 2.0), axis=1)[:, :most]
    chosen = np.arange(order.shape[1])[None] < wanted[:, None]
    labels = np.where(chosen, np.take_along_axis(ids, order, 1), -1)
    rows = np.nonzero(chosen)[0]
    ids[rows, order[chosen]] = tokenizer.mask_token_id
    return {
        **part,
        "input_ids": ids,
        POSITIONS: order.astype(np.int32),
        LABELS: labels.astype(np.int32),
    }
