"""The scores of images against texts, from the embeddings of a pair's two towers."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Contrastive(nn.Module):
    """Cosines of all images with all texts, times the inverse temperature of the backbone.

    It has no weights: embeddings, temperature and, for SigLIP, the bias are the backbone's. The
    loss over the scores is `losses.contrastive`'s.
    """

    needs = "tokens"
    tied = False

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, m), a row for each image and a column for each text.

        Raises:
            ValueError: the backbone has no pair of embeddings, or the batch lacked one side.
        """
        lacking = [name for name in ("image_embeds", "text_embeds") if name not in out]
        if lacking:
            raise ValueError(
                f"the contrastive head needs {lacking}; the backbone gives {sorted(out)}; give "
                "batches with images and texts to a backbone of two towers"
            )
        images, texts = (_unit(out[name]) for name in ("image_embeds", "text_embeds"))
        scale = jnp.exp(out["logit_scale"].astype(jnp.float32)).reshape(())  # SigLIP's is (1,)
        logits = scale * (images @ texts.T)
        bias = out.get("logit_bias")
        return logits if bias is None else logits + bias.astype(jnp.float32).reshape(())


def _unit(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)
