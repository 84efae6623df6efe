"""DeBERTa's attention: words and relative places, each asked about the other.

Reference: He et al. 2020, arXiv:2006.03654, equation 4.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jtl.models.layers.attention import attention
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.log_buckets import log_buckets
from jtl.models.layers.skew import offsets, skew


class RelativePlaces(NamedTuple):
    """A table of relative places.

    Attributes:
        span: places on each side; the table has twice as many rows.
        farthest: number of distances that the buckets were made for.
        bucketed: whether far distances share places; else those beyond the span have the last one.
    """

    span: int
    farthest: int
    bucketed: bool


def place_rows(length: int, places: RelativePlaces) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the table that a text needs, and two lists of places among them.

    The first list has the place of each column of `skew` for the products of queries with places,
    the second that for the products of keys.

    >>> rows, among = place_rows(2, RelativePlaces(span=2, farthest=2, bucketed=False))
    >>> rows.tolist(), rows[among].tolist()
    ([0, 1, 2, 3], [[3, 2, 1, 0], [1, 2, 3, 3]])
    """
    ahead = offsets(length)
    distances = np.stack([-ahead, ahead])  # query - key
    if places.bucketed:
        distances = log_buckets(distances, buckets=places.span, farthest=places.farthest)
    rows = np.clip(distances + places.span, 0, 2 * places.span - 1)
    needed, among = np.unique(rows, return_inverse=True)
    return needed, among.reshape(rows.shape)


class DisentangledAttention(nn.Module):
    """Self-attention over words and relative places, without its output projection.

    Leaves query_proj, key_proj, value_proj, and pos_key_proj, pos_query_proj where not `shared`.

    Attributes:
        dim: width of the input and of the output.
        heads: number of heads, a divisor of `dim`.
        terms: of "c2p" (the query's word with the key's place) and "p2c" (the key's word with the
            query's place).
        places: of the table; None without relative attention.
        shared: whether the layers of query and key serve the places too.
        dropout: rate of dropout of the attention probabilities, where live.
        place_dropout: rate of dropout of the table, where live.
        scale: standard deviation of the initial kernels.
        dtype: of the computation; parameters are float32.
    """

    dim: int
    heads: int
    terms: tuple[str, ...]
    places: RelativePlaces | None
    shared: bool = False
    dropout: float = 0.0
    place_dropout: float = 0.0
    scale: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, hidden: jax.Array, table: jax.Array | None, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        """Return (n, positions, dim).

        Args:
            hidden: (n, positions, dim).
            table: of relative places, (2 span, dim).
            mask: (n, positions), 1 or True at real positions. A query that is padding sees all
                keys alike, whatever it is, as in transformers.
            live: whether there is dropout.
        """
        layers = {name: self._dense(f"{name}_proj") for name in ("query", "key", "value")}
        query, key, value = (self._heads(layer(hidden)) for layer in layers.values())
        if mask is not None:
            query = jnp.where(mask.astype(bool)[:, :, None, None], query, 0)
        scale = (query.shape[-1] * (1 + len(self.terms))) ** -0.5
        bias = jnp.zeros((1, 1, 1, 1))
        if self.places is not None and table is not None:
            drop = Dropout(self.place_dropout, deterministic=not live)
            for_query, for_key = self._by_term(drop(table), layers, hidden.shape[1])
            if for_query is not None:
                bias = bias + _by_place(query * scale, for_query)
            if for_key is not None:
                bias = bias + _by_place(key * scale, for_key).swapaxes(2, 3)
        # Not cuDNN: the bias at padding overflows 16 bits.
        return attention(
            *(query, key, value),
            bias=_masked(bias, mask),
            scale=scale,
            dropout=Dropout(self.dropout) if live and self.dropout > 0 else None,
            implementation=None if jax.default_backend() == "cpu" else "einsum",
        ).reshape(hidden.shape)

    def _by_term(
        self, table: jax.Array, layers: dict[str, nn.Dense], length: int
    ) -> list[jax.Array | None]:
        """Return the places (offsets, heads, size) that queries meet, and those that keys meet."""
        assert self.places is not None
        rows, among = place_rows(length, self.places)
        found: list[jax.Array | None] = []
        for term, name, own in (("c2p", "key", among[0]), ("p2c", "query", among[1])):
            if term not in self.terms:
                found.append(None)
                continue
            layer = layers[name] if self.shared else self._dense(f"pos_{name}_proj")
            found.append(self._heads(layer(table[rows]))[own])
        return found

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, self.dim // self.heads)

    def _dense(self, name: str) -> nn.Dense:
        init = nn.initializers.normal(self.scale)
        return nn.Dense(
            self.dim, dtype=self.dtype, kernel_init=init, dot_general=flat_dot, name=name
        )


def _by_place(words: jax.Array, places: jax.Array) -> jax.Array:
    """Return the products (n, heads, word, other word) of words with the others' places.

    Args:
        words: (n, positions, heads, size).
        places: (offsets, heads, size).
    """
    return skew(jnp.einsum("nqhd,ohd->nhqo", words, places))


def _masked(bias: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the bias of scores with all pairs out of sight that are not both real."""
    if mask is None:
        return bias
    real = mask.astype(bool)
    seen = real[:, None, :, None] & real[:, None, None, :]
    return jnp.where(seen, bias.astype(jnp.float32), jnp.finfo(jnp.float32).min)
