"""Several streams of positions in one array, so that they can be one column of a batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def pack(*streams: jax.Array) -> jax.Array:
    """Join streams (n, positions, width) along their positions; narrow ones get zeros at the end.

    >>> pack(jnp.ones((1, 2, 3)), jnp.ones((1, 1, 2)))[0].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    """
    widest = max(stream.shape[-1] for stream in streams)
    padded = [
        jnp.pad(stream, ((0, 0), (0, 0), (0, widest - stream.shape[-1]))) for stream in streams
    ]
    return jnp.concatenate(padded, axis=1)


def unpack(
    packed: jax.Array, lengths: Sequence[int], widths: Sequence[int]
) -> tuple[jax.Array, ...]:
    """Take apart what `pack` joined.

    Args:
        packed: (n, positions, width).
        lengths: positions of each stream; one of them may be -1, which is what is left.
        widths: of each stream.

    >>> packed = pack(jnp.ones((1, 2, 3)), jnp.ones((1, 1, 2)))
    >>> [stream.shape for stream in unpack(packed, (2, -1), (3, 2))]
    [(1, 2, 3), (1, 1, 2)]
    """
    rest = packed.shape[1] - sum(length for length in lengths if length >= 0)
    places = [0]
    for length in lengths:
        places.append(places[-1] + (rest if length < 0 else length))
    return tuple(
        packed[:, start:stop, :width]
        for start, stop, width in zip(places, places[1:], widths, strict=False)
    )
