"""The feed-forward layers of decoders: plain, and with a gate.

Reference: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (plain);
Shazeer 2020, arXiv:2002.05202 (gated: SwiGLU, where the activation is "silu").
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.layers.activations import activation
from jtl.models.layers.dense import flat_dot


class MLP(nn.Module):
    """c_proj(activation(c_fc(x))): leaves c_fc, c_proj, as in GPT-2.

    Attributes:
        inner: width between.
        activation: by its name in a config.
        bias: whether both layers have one.
        scale: standard deviation of the initial kernel of c_fc.
        last_scale: of c_proj; None is `scale`.
        dtype: of the computation; parameters are float32.
    """

    inner: int
    activation: str = "gelu_new"
    bias: bool = True
    scale: float = 0.02
    last_scale: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array of the shape of x (..., dim)."""
        last_scale = self.scale if self.last_scale is None else self.last_scale
        inner = _dense(self, self.inner, self.scale, "c_fc")(x)
        inner = activation(self.activation)(inner)
        return _dense(self, x.shape[-1], last_scale, "c_proj")(inner)


class GatedMLP(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)): leaves gate_proj, up_proj, down_proj.

    Attributes:
        inner: width between.
        activation: of the gate, by its name in a config.
        bias: whether the three layers have one.
        scale: standard deviation of the initial kernels.
        dtype: of the computation; parameters are float32.
    """

    inner: int
    activation: str = "silu"
    bias: bool = False
    scale: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array of the shape of x (..., dim)."""
        gate = activation(self.activation)(_dense(self, self.inner, self.scale, "gate_proj")(x))
        inner = gate * _dense(self, self.inner, self.scale, "up_proj")(x)
        return _dense(self, x.shape[-1], self.scale, "down_proj")(inner)


def _dense(layer: MLP | GatedMLP, width: int, scale: float, name: str) -> nn.Dense:
    return nn.Dense(
        width,
        use_bias=layer.bias,
        dtype=layer.dtype,
        kernel_init=nn.initializers.normal(scale),
        dot_general=flat_dot,
        name=name,
    )
