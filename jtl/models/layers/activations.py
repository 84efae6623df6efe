"""Activations by the names that `hidden_act` of a config has."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


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
