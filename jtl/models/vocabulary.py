"""Another vocabulary for a pretrained model: new words begin as the mean of what they were before.

A token that both vocabularies have keeps its row. Any other begins as the mean of the rows of the
pieces into which the old tokenizer cuts it, or as the mean of all rows.

Reference: Hewitt 2021, "Initializing new word embeddings for pretrained language models" (the mean
of all rows); Dobler and de Melo 2023, arXiv:2305.14481, section 2 (tokens that overlap).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jtl.models.backbone import Backbone
from jtl.models.model import Model
from jtl.models.stated import full_config

Pieces = tuple[tuple[int, ...], ...]


def adapt_vocab(
    model: Backbone | Model,
    tokenizer: Any,
    *,
    start: str = "subword_mean",
) -> Any:
    """Return the model for the vocabulary of another tokenizer, or of its own with more tokens.

    The word embedding gets one row for each token; so do the kernel and bias of heads over the
    vocabulary (masked LM, causal LM). The inputs get the tokenizer.

    Args:
        model: a text backbone with its inputs, or a model on one.
        tokenizer: of transformers.
        start: of tokens that the old vocabulary lacks: the mean of the rows of their pieces, where
            the old tokenizer knows any, or the mean of all rows.

    Raises:
        ValueError: the backbone has no word embedding, its tokenizer is not known, or `start` is
            neither of the two.
    """
    backbone = model.backbone if isinstance(model, Model) else model
    old = getattr(backbone.inputs, "tokenizer", None)
    if not backbone.family.table or old is None:
        raise ValueError(
            f"{backbone.source!r} of family {backbone.family.model_type} has "
            f"{'no tokenizer' if backbone.family.table else 'no word embedding'}; adapt_vocab is "
            "for a text model that was loaded with its tokenizer"
        )
    if start not in ("subword_mean", "mean"):
        raise ValueError(f"start is {start!r}; give 'subword_mean' or 'mean'")
    pieces = old_pieces(old, tokenizer)
    if start == "mean":
        kept = _kept(old, tokenizer)
        pieces = tuple(ids if kind else () for ids, kind in zip(pieces, kept, strict=True))
    known = min(len(old), backbone.config["vocab_size"])
    adapted = _backbone(backbone, tokenizer, pieces, known)
    if not isinstance(model, Model):
        return adapted
    heads, own = {}, {}
    for name, head in model.heads.items():
        vocabulary = hasattr(head, "vocabulary")
        heads[name] = head.clone(vocabulary=len(pieces)) if vocabulary else head
        leaves = model.params["heads"].get(name)
        if leaves is not None:
            own[name] = _of_head(leaves, pieces, known, head.vocabulary) if vocabulary else leaves
    params = {"backbone": adapted.params, "heads": own}
    return dataclasses.replace(model, backbone=adapted, heads=heads, params=params)


def old_pieces(old: Any, new: Any) -> Pieces:
    """Return for each id of the new tokenizer the old ids that it begins from, () for none.

    Args:
        old: tokenizer of the pretrained model.
        new: tokenizer to come.
    """
    there, unknown = old.get_vocab(), old.unk_token_id
    found: list[tuple[int, ...]] = [()] * len(new)
    for token, place in new.get_vocab().items():
        if token in there:
            found[place] = (there[token],)
            continue
        text = new.convert_tokens_to_string([token]).removeprefix("##").strip()
        ids = old(text, add_special_tokens=False)["input_ids"] if text else ()
        found[place] = tuple(i for i in ids if i != unknown)
    return tuple(found)


def new_rows(table: jax.Array, pieces: Sequence[Sequence[int]], known: int) -> jax.Array:
    """Return (tokens, dim): the mean of the old rows of each token, of all known rows for ().

    Args:
        table: (old tokens, dim) or, for a bias, (old tokens,).
        pieces: of `old_pieces`.
        known: rows of the table that belong to tokens; those after it only pad.

    >>> table = jnp.array([[1.0], [3.0], [8.0]])
    >>> new_rows(table, [(2,), (0, 1), ()], known=3).ravel().tolist()
    [8.0, 2.0, 4.0]
    """
    old = np.asarray(table, np.float32)
    made = np.empty((len(pieces), *old.shape[1:]), np.float32)
    mean = old[:known].mean(axis=0)
    for place, ids in enumerate(pieces):
        made[place] = old[list(ids)].mean(axis=0) if ids else mean
    return jnp.asarray(made, table.dtype)


def _kept(old: Any, new: Any) -> list[bool]:
    there = old.get_vocab()
    found = [False] * len(new)
    for token, place in new.get_vocab().items():
        found[place] = token in there
    return found


def _backbone(backbone: Backbone, tokenizer: Any, pieces: Pieces, known: int) -> Backbone:
    family = backbone.family
    flat: Any = flatten_dict(backbone.params, sep="/")
    flat[family.table] = new_rows(flat[family.table], pieces, known)
    special = {
        name: getattr(tokenizer, name)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        if backbone.config.get(name) is not None and getattr(tokenizer, name) is not None
    }
    config = full_config(family, {**backbone.config, **special, "vocab_size": len(pieces)})
    inputs = dataclasses.replace(backbone.inputs, tokenizer=tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, inputs.max_length)
    return dataclasses.replace(
        backbone,
        module=family.make(config, backbone.pooling, backbone.module.dtype),
        params=unflatten_dict(flat, sep="/"),
        config=config,
        inputs=inputs,
    )


def _of_head(leaves: Any, pieces: Pieces, known: int, size: int) -> Any:
    """Adapt the leaves of a head that have one number, or one column, for each token."""

    def adapted(leaf: jax.Array) -> jax.Array:
        if leaf.shape[-1:] != (size,):
            return leaf
        if leaf.ndim == 1:
            return new_rows(leaf, pieces, known)
        return new_rows(leaf.T, pieces, known).T

    return jax.tree.map(adapted, leaves)
