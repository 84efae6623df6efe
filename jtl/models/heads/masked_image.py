"""MAE's decoder: from the patches that were seen to the pixels of all of them, and its loss.

Reference: He et al. 2021, arXiv:2111.06377.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.models.layers.masking import masking
from jtl.models.layers.norms import layer_norm
from jtl.models.layers.patches import cut
from jtl.models.layers.sincos import sincos_2d
from jtl.models.layers.vit_encoder import EncoderConfig, Layers, dense


class MaskedImage(nn.Module):
    """Hidden patches become a learned token; a small ViT then tells the pixels of each patch.

    It reads the tokens of a masked encoder and `batch["noise"]` (n, patches), which says which
    patches they are. Its positions are fixed sines and cosines; they are a leaf since checkpoints
    have it, and get no gradient.

    Attributes:
        rows: of patches.
        columns: of patches.
        pixels: numbers of a patch, height * width * channels.
        width: of the decoder.
        layers: number of its layers.
        heads: of attention.
        inner: width of its MLPs.
        mask_ratio: share of the patches that is hidden.
        activation: of its MLPs.
        epsilon: of its LayerNorms.
        bias: whether query, key and value have one.
        scale: standard deviation of the initial kernels.
    """

    rows: int
    columns: int
    pixels: int
    width: int = 512
    layers: int = 8
    heads: int = 16
    inner: int = 2048
    mask_ratio: float = 0.75
    activation: str = "gelu"
    epsilon: float = 1e-12
    bias: bool = True
    scale: float = 0.02

    tied = False
    needs = "tokens"

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 pixels of each patch, (n, patches, pixels), channels last in a patch.

        Raises:
            ValueError: the batch has no noise, or the backbone has not masked.
        """
        seen, patches = out["tokens"].astype(jnp.float32), self.rows * self.columns
        if self.is_initializing():  # the example of a family hides nothing
            made = masking(jnp.zeros((len(seen), patches)), self.mask_ratio)
            seen = seen[:, : 1 + made.keep.shape[1]]
        else:
            made = masking(_noise(batch, patches), self.mask_ratio)
        if seen.shape[1] != 1 + made.keep.shape[1]:
            raise ValueError(
                f"the backbone gives {seen.shape[1]} tokens and the noise keeps "
                f"{made.keep.shape[1]} of {patches} patches, with a CLS token before them; "
                "give the backbone the same batch, and the head its mask_ratio"
            )
        config = EncoderConfig(
            self.width, self.layers, self.heads, self.inner, self.bias, self.activation,
            layer_norm_eps=self.epsilon, initializer_range=self.scale,
        )  # fmt: skip
        hidden = dense(self.width, self.scale, jnp.float32, "decoder_embed")(seen)
        token = self.param("mask_token", nn.initializers.normal(self.scale), (1, 1, self.width))
        places = self.param("decoder_pos_embed", self._positions)
        hidden_ones = jnp.broadcast_to(
            token, (len(hidden), patches - made.keep.shape[1], self.width)
        )
        shuffled = jnp.concatenate([hidden[:, 1:], hidden_ones], axis=1)
        whole = jnp.take_along_axis(shuffled, made.restore[:, :, None], axis=1)
        hidden = jnp.concatenate([hidden[:, :1], whole], axis=1) + jax.lax.stop_gradient(places)
        decoder = Layers(config, jnp.float32, name="decoder_layers")
        for index in range(self.layers):
            hidden = decoder(index, hidden, live)
        hidden = layer_norm(self.epsilon, name="decoder_norm")(hidden)
        return dense(self.pixels, self.scale, jnp.float32, "decoder_pred")(hidden)[:, 1:]

    def _positions(self, key: jax.Array) -> jax.Array:
        return jnp.asarray(sincos_2d(self.rows, self.columns, self.width))[None]


def reconstruction_loss(
    predicted: Float[Array, "n patches pixels"],
    images: Float[Array, "n height width channels"],
    noise: Float[Array, "n patches"],
    *,
    patch: tuple[int, int],
    mask_ratio: float = 0.75,
    normalised: bool = False,
) -> Float[Array, ""]:
    """Return the mean squared error over the pixels of the hidden patches.

    Args:
        predicted: of `MaskedImage`.
        images: `batch["pixel_values"]`.
        noise: `batch["noise"]`, that the encoder was given.
        patch: (height, width) of one.
        mask_ratio: of the model.
        normalised: whether each patch is taken from its own mean and in units of its own deviation
            (`norm_pix_loss`).

    >>> images, noise = jnp.arange(4.0).reshape(1, 2, 2, 1), jnp.array([[0.1, 0.2, 0.3, 0.4]])
    >>> predicted = jnp.zeros((1, 4, 1))
    >>> float(reconstruction_loss(predicted, images, noise, patch=(1, 1), mask_ratio=0.5))
    6.5

    Reference: He et al. 2021, arXiv:2111.06377, section 3 and table 1 (d).
    """
    target = cut(images.astype(jnp.float32), patch)
    if normalised:
        mean = jnp.mean(target, axis=-1, keepdims=True)
        variance = jnp.var(target, axis=-1, keepdims=True, ddof=1)
        target = (target - mean) / jnp.sqrt(variance + 1e-6)
    error = jnp.mean(jnp.square(predicted.astype(jnp.float32) - target), axis=-1)
    mask = masking(noise, mask_ratio).mask
    return jnp.sum(error * mask) / jnp.sum(mask)


def _noise(batch: Mapping[str, Any], patches: int) -> jax.Array:
    if "noise" not in batch or batch["noise"].shape[1:] != (patches,):
        there = batch["noise"].shape if "noise" in batch else sorted(batch)
        raise ValueError(
            f"the decoder needs the column 'noise' of (n, {patches}), which hides patches; the "
            f"batch has {there}; draw it by jax.random.uniform(key, (n, {patches}))"
        )
    return jnp.asarray(batch["noise"])
