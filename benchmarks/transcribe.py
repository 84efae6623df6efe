"""Greedy decoding by Whisper: the likeliest next token until the end, the encoder run once."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl.models.layers import pack


def greedy(
    backbone: Any,
    features: np.ndarray,
    prefix: Sequence[int],
    most: int,
    rules: Mapping[str, Any],
) -> list[int]:
    """Return the tokens that follow a prefix, without the one that ends the text.

    Args:
        backbone: of the family "whisper".
        features: (1, mels, frames) of one recording.
        prefix: what the decoder is told first: start, language, task, no times.
        most: tokens at most.
        rules: the dict of `generation_config.json`: `eos_token_id`, `suppress_tokens` and
            `begin_suppress_tokens`, which are never chosen, or never first.
    """
    variables = {"params": backbone.params}
    encode = jax.jit(functools.partial(backbone.module.apply, method=_encoded))
    step = jax.jit(functools.partial(backbone.module.apply, method=_next))
    encoded = encode(variables, jnp.asarray(features))
    tokens = np.zeros((1, len(prefix) + most), np.int32)
    tokens[0, : len(prefix)] = prefix
    never = list(rules.get("suppress_tokens") or [])
    for place in range(len(prefix), tokens.shape[1]):
        logits = np.array(step(variables, tokens, encoded, place - 1))
        first = place == len(prefix)
        logits[[*never, *(rules.get("begin_suppress_tokens") or [] if first else [])]] = -np.inf
        tokens[0, place] = logits.argmax()
        if tokens[0, place] == rules["eos_token_id"]:
            return tokens[0, len(prefix) : place].tolist()
    return tokens[0, len(prefix) :].tolist()


def _encoded(module: Any, features: jax.Array) -> jax.Array:
    return module.encoder({"input_features": features})["tokens"]


def _next(module: Any, tokens: jax.Array, encoded: jax.Array, place: Any) -> jax.Array:
    """Return the logits (vocabulary,) of the token after `place`; later ones are not seen."""
    hidden = pack(encoded, module.decoder.start(tokens, False))
    for index in range(module.config.encoder.layers, module.blocks):
        hidden = module.block(index, hidden, {})
    found = module.top(hidden, {})["tokens"][0, place]
    return module.decoder.embed_tokens.embedding @ found
