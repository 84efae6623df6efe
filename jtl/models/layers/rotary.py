"""Rotary position embedding: pairs of numbers turned by an angle that grows with the position.

Reference: Su et al. 2021, arXiv:2104.09864, equation 34; pairs are (i, i + size / 2), as in LLaMA's
checkpoints.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(
    positions: Int[Array, "n length"], frequencies: Float[Array, " half"], *, factor: float = 1.0
) -> tuple[Float[Array, "n length 1 size"], Float[Array, "n length 1 size"]]:
    """Return cosine and sine of each position's angles, for `rotate`.

    Args:
        positions: of the tokens.
        frequencies: radians that each pair turns by for one position.
        factor: both results are multiplied by it (YaRN and LongRoPE scale attention so).

    >>> cosine, sine = rotary(jnp.array([[0, 1]]), jnp.array([jnp.pi]))
    >>> cosine[0, :, 0].round(3).tolist()
    [[1.0, 1.0], [-1.0, -1.0]]
    """
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "n length heads size"],
    cosine: Float[Array, "#n length 1 size"],
    sine: Float[Array, "#n length 1 size"],
) -> Float[Array, "n length heads size"]:
    """Turn the pairs (i, i + size / 2) of each head; computed in float32, given back in x's dtype.

    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> quarter = rotary(jnp.array([[1]]), jnp.array([jnp.pi / 2]))
    >>> abs(rotate(x, *quarter)).ravel().round(3).tolist()
    [0.0, 1.0]
    """
    half = x.shape[-1] // 2
    wide = x.astype(jnp.float32)
    turned = jnp.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    return (wide * cosine + turned * sine).astype(x.dtype)
