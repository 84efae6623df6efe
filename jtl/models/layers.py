"""Layers that transformer families share: activations by name, attention, query-key-value blocks.

Attention is a plain einsum with a float32 softmax on TPU, and on CPU the same products with their
operands laid out for it. On GPU it is `jax.nn.dot_product_attention`, by cuDNN where its rules are
met.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Activation = Callable[[jax.Array], jax.Array]
Implementation = Literal["einsum", "matmul", "xla", "cudnn"]


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


# Names as in the `hidden_act` of config.json. The tanh form and the exact one differ by 5e-4.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Activation:
    """Return the function that `hidden_act` of a config names; "gelu" is the exact one (erf).

    Raises:
        ValueError: no activation has this name.

    >>> float(activation("relu")(jnp.array(-2.0)))
    0.0
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not known; there are {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def attention(
    query: Float[Array, "n queries heads size"],
    key: Float[Array, "n keys heads size"],
    value: Float[Array, "n keys heads size"],
    *,
    mask: Bool[Array, "n keys"] | Int[Array, "n keys"] | None = None,
    dropout: Activation | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "n queries heads size"]:
    """Return softmax(query key^T / sqrt(size) + bias) value, the softmax in float32.

    Args:
        query: of each head.
        key: of each head.
        value: of each head.
        mask: 1 or True at keys that are attended to, None for all. A row without any gets the mean
            over all keys, not NaN.
        dropout: applied to the attention probabilities (n, heads, queries, keys); needs "einsum" or
            "matmul".
        implementation: "einsum", "matmul", "xla" or "cudnn"; None takes "matmul" on a CPU, cuDNN on
            a GPU where its rules are met, else "xla" on a GPU, else "einsum".

    Raises:
        ValueError: `dropout` with "xla" or "cudnn".

    >>> x = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> attention(0 * x, x, x).ravel().tolist()
    [2.0, 2.0]
    >>> attention(x, x, x, mask=jnp.array([[1, 0]])).ravel().tolist()
    [1.0, 1.0]
    """
    chosen = implementation or _implementation(query, key, mask, dropout)
    if chosen in ("xla", "cudnn"):
        if dropout is not None:
            raise ValueError(f"attention {chosen!r} has no dropout of probabilities; use 'einsum'")
        full = None if mask is None else _full_mask(mask, query.shape[1])
        return jax.nn.dot_product_attention(query, key, value, mask=full, implementation=chosen)
    query = query / math.sqrt(query.shape[-1])
    if chosen == "einsum":
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key)
    else:
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        scores = _matmul(query, _laid_out(key))
    scores = scores.astype(jnp.float32)
    if mask is not None:
        bias = jnp.where(mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min)
        scores = scores + bias[:, None, None, :]
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if dropout is not None:
        probabilities = dropout(probabilities)
    if chosen == "einsum":
        return jnp.einsum("nhqk,nkhd->nqhd", probabilities, value)
    return _matmul(probabilities, value).swapaxes(1, 2)


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


def _full_mask(mask: jax.Array, queries: int) -> jax.Array:
    n, keys = mask.shape
    return jnp.broadcast_to(mask.astype(bool)[:, None, None, :], (n, 1, queries, keys))


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


def flat_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Return the product of `nn.Dense`, (..., in) by (in, out), over one axis of rows.

    For `nn.Dense(dot_general=flat_dot)`: XLA on a CPU computes the gradient of the kernel faster
    over one axis of rows than over several.

    >>> flat_dot(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), (((2,), (0,)), ((), ()))).shape
    (2, 3, 5)
    """
    del dimension_numbers  # always the last axis by the first
    rows = lhs.reshape(-1, lhs.shape[-1])
    out = jax.lax.dot_general(
        rows,
        rhs,
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])


class Dropout(nn.Module):
    """Dropout as `nn.Dropout`, with two numbers for each 32 bits: on a CPU, drawing is its cost.

    The rate is kept to 1/65536, and what stays is divided by the exact share that stays.

    Attributes:
        rate: share of the numbers that become zero, in [0, 1).
        deterministic: whether the input passes as it is.
    """

    rate: float
    deterministic: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Return numbers of the shape of the input."""
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"dropout is {self.rate}; a rate is in [0, 1); give 0 for none")
        dropped = round(self.rate * 65536)
        if self.deterministic or not dropped:
            return inputs
        key = self.make_rng("dropout")
        *rows, last = inputs.shape
        words = jax.random.bits(key, (*rows, -(-last // 2)), jnp.uint32)
        halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*rows, -1)[..., :last]
        kept = halves >= dropped
        return jnp.where(kept, inputs * (65536 / (65536 - dropped)), 0.0).astype(inputs.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention without its output projection: leaves query, key, value.

    Attributes:
        dim: width of the input and of the output.
        heads: number of heads, a divisor of `dim`.
        dropout: rate of dropout of the attention probabilities, where live.
        bias: whether the three projections have one.
        scale: standard deviation of the initial kernels.
        dtype: of the computation; parameters are float32.
    """

    dim: int
    heads: int
    dropout: float = 0.0
    bias: bool = True
    scale: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, hidden: jax.Array, mask: jax.Array | None = None, live: bool = False
    ) -> jax.Array:
        """Return (n, positions, dim) from hidden (n, positions, dim) and mask (n, positions)."""
        if self.dim % self.heads:
            raise ValueError(
                f"{self.heads} attention heads do not divide the width {self.dim}; "
                "give a number of heads that does"
            )
        shape = (*hidden.shape[:-1], self.heads, self.dim // self.heads)
        query, key, value = (
            nn.Dense(
                self.dim,
                use_bias=self.bias,
                dtype=self.dtype,
                dot_general=flat_dot,
                kernel_init=nn.initializers.normal(self.scale),
                name=name,
            )(hidden).reshape(shape)
            for name in ("query", "key", "value")
        )
        drop = None
        if live and self.dropout > 0:
            drop = Dropout(self.dropout, deterministic=False)
        return attention(query, key, value, mask=mask, dropout=drop).reshape(hidden.shape)
