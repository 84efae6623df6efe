"""Attention: the softmax of scaled products, with masks, biases and grouped heads.

It is a plain einsum with a float32 softmax on TPU, and on CPU the same products with their operands
laid out for it. On GPU it is `jax.nn.dot_product_attention`, by cuDNN where its rules are met.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jtl.models.layers.activations import Activation

Implementation = Literal["einsum", "matmul", "xla", "cudnn"]


def attention(
    query: Float[Array, "n queries heads size"],
    key: Float[Array, "n keys groups size"],
    value: Float[Array, "n keys groups width"],
    *,
    mask: Bool[Array, "n keys"] | Int[Array, "n keys"] | None = None,
    bias: Float[Array, "#n #heads #queries #keys"] | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout: Activation | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "n queries heads width"]:
    """Return softmax(scale query key^T + bias) value, the softmax in float32.

    Args:
        query: of each head.
        key: of each head, or of each group of heads that share one (grouped queries): head `h`
            reads group `h * groups // heads`.
        value: as `key`.
        mask: 1 or True at keys that are attended to, None for all. A row without any gets the mean
            over all keys, not NaN.
        bias: added to the scaled scores.
        causal: query `i` attends to keys up to its own place; the last query has the last key's.
        window: with `causal`, to so many keys at most, its own among them.
        scale: None is 1 / sqrt(size).
        dropout: applied to the attention probabilities (n, heads, queries, keys); needs "einsum" or
            "matmul".
        implementation: "einsum", "matmul", "xla" or "cudnn"; None takes "matmul" on a CPU, cuDNN on
            a GPU where its rules are met, else "xla" on a GPU, else "einsum".

    Raises:
        ValueError: `dropout` with "xla" or "cudnn", `window` without `causal`, or groups that do
            not divide the heads.

    >>> x = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> attention(0 * x, x, x).ravel().tolist()
    [2.0, 2.0]
    >>> attention(x, x, x, mask=jnp.array([[1, 0]])).ravel().tolist()
    [1.0, 1.0]
    >>> attention(0 * x, x, x, causal=True).ravel().tolist()
    [1.0, 2.0]
    """
    chosen = implementation or _implementation(query, key, mask, dropout)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    allowed = _allowed(query.shape[1], key.shape[1], mask, causal, window)
    if chosen in ("xla", "cudnn"):
        if dropout is not None:
            raise ValueError(f"attention {chosen!r} has no dropout of probabilities; use 'einsum'")
        full = None if mask is None and window is None else allowed
        if full is not None:
            full = jnp.broadcast_to(full, (query.shape[0], 1, query.shape[1], key.shape[1]))
        return jax.nn.dot_product_attention(
            *(query, key, value, bias),
            mask=full,
            is_causal=causal and full is None,
            scale=scale,
            implementation=chosen,
        )
    query, key, value = query * scale, *_ungrouped(query.shape[2], key, value)
    if chosen == "einsum":
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key)
    else:
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        scores = _matmul(query, _laid_out(key))
    scores = scores.astype(jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if allowed is not None:
        # Added, not put in its place: a row without any key then has the mean over all of them.
        scores = scores + jnp.where(allowed, 0.0, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if dropout is not None:
        probabilities = dropout(probabilities)
    if chosen == "einsum":
        return jnp.einsum("nhqk,nkhd->nqhd", probabilities, value)
    return _matmul(probabilities, value).swapaxes(1, 2)


def _allowed(
    queries: int, keys: int, mask: jax.Array | None, causal: bool, window: int | None
) -> jax.Array | None:
    """Return where queries may look, (n or 1, 1, queries or 1, keys), None for everywhere."""
    if window is not None and not causal:
        raise ValueError(f"window={window} looks back from each query; give causal=True with it")
    allowed = None if mask is None else mask.astype(bool)[:, None, None, :]
    if causal:
        back = jnp.arange(queries)[:, None] + (keys - queries) - jnp.arange(keys)[None, :]
        seen = (back >= 0) if window is None else (back >= 0) & (back < window)
        seen = seen[None, None]
        allowed = seen if allowed is None else jnp.logical_and(allowed, seen)
    return allowed


def _ungrouped(heads: int, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Give each head its own copy of the key and value of its group."""
    groups = key.shape[2]
    if groups == heads:
        return key, value
    if heads % groups:
        raise ValueError(
            f"{groups} groups of keys do not divide {heads} heads; give a number that does"
        )
    return jnp.repeat(key, heads // groups, axis=2), jnp.repeat(value, heads // groups, axis=2)


@jax.custom_vjp
def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply stacks of matrices; the gradient's operands are transposed in memory beforehand.

    XLA's product on a CPU is slow on operands that it has to read across the rows.
    """
    return jnp.matmul(a, b)


def _matmul_forward(a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.matmul(a, b), (a, b)


def _matmul_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, ...]:
    a, b = kept
    return jnp.matmul(g, _laid_out(b)), jnp.matmul(_laid_out(a), g)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _laid_out(x: jax.Array) -> jax.Array:
    """Return the transpose of the last two axes, written out."""
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


def _implementation(query: Any, key: Any, mask: Any, dropout: Any) -> Implementation:
    """Choose by backend; cuDNN wants Ampere, 16 bits, small heads, even lengths with a mask."""
    if jax.default_backend() == "cpu":
        return "matmul"
    if dropout is not None or jax.default_backend() != "gpu":
        return "einsum"
    ampere = float(getattr(jax.devices()[0], "compute_capability", "0")) >= 8.0
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    small = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    even = mask is None or (query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0)
    return "cudnn" if ampere and half and small and even else "xla"
