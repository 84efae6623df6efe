"""DeiT's two classifiers, on the CLS token and on the distillation token.

Reference: Touvron et al. 2020, arXiv:2012.12877, section 3.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.heads.start import kernel_init


class Distilled(nn.Module):
    """Two linear layers, on the first and the second token; the logits are their mean.

    Attributes:
        outputs: number of classes.
        start: of the kernels, "normal" (standard deviation 0.02) or "zeros".
    """

    outputs: int
    start: str = "normal"

    tied = False
    needs = "tokens"

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, outputs)."""
        tokens = out["tokens"].astype(jnp.float32)
        logits = [
            nn.Dense(self.outputs, kernel_init=kernel_init(self.start), name=name)(tokens[:, i])
            for i, name in enumerate(("cls_classifier", "distillation_classifier"))
        ]
        return (logits[0] + logits[1]) / 2
