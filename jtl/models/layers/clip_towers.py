"""The towers of CLIP: patches behind a class embedding, and tokens with an end.

LLaVA and Flamingo read images through the same tower, SigLIP texts through one without its causal
mask.

Reference: Radford et al. 2021, arXiv:2103.00020.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch
from jtl.models.layers.norms import layer_norm
from jtl.models.layers.patches import grid, pair
from jtl.models.layers.pixels import pixels
from jtl.models.layers.token_embeddings import token_ids
from jtl.models.layers.tower import TowerEncoder, tower_fields


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """The fields of `vision_config` that the tower reads, under their names there."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int | tuple[int, int]
    patch_size: int
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    projection_dim: int = 512

    @property
    def positions(self) -> int:
        """Number of tokens of an image: one for all of it, and one for each patch."""
        return 1 + math.prod(grid(sides(self.image_size), sides(self.patch_size)))


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """The fields of `text_config` that the tower reads, under their names there."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int = 49407
    hidden_act: str = "quick_gelu"
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    projection_dim: int = 512


def vision_config(config: Mapping[str, Any], made: type = ClipVisionConfig) -> Any:
    """Return the fields that an image tower reads, checked.

    Args:
        config: the dict of `vision_config`; other fields are left alone.
        made: the dataclass to fill.

    Raises:
        ValueError: a size is missing or does not fit, or the patches are not square.

    >>> sizes = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    >>> vision_config(dict(sizes, intermediate_size=8, image_size=8, patch_size=4)).positions
    5
    """
    own = dict(config)
    for name in ("image_size", "patch_size"):
        value = own.get(name)
        if isinstance(value, list | tuple):
            own[name] = value[0] if len(set(value)) == 1 else pair(value, name)
    if isinstance(own.get("patch_size"), tuple):
        raise ValueError(
            f"patch_size of the image tower is {list(own['patch_size'])}; its checkpoints have "
            "square patches; give one whole number"
        )
    made = tower_fields(made, own, "the image tower")
    grid(sides(made.image_size), sides(made.patch_size))
    return made


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size that is one number for both.

    >>> sides(4), sides((4, 6))
    ((4, 4), (4, 6))
    """
    return (size, size) if isinstance(size, int) else size


def text_config(config: Mapping[str, Any]) -> ClipTextConfig:
    """Return the fields that the text tower reads, checked.

    Raises:
        ValueError: a size is missing or does not fit.
    """
    return tower_fields(ClipTextConfig, config, "the text tower")


class _VisionEmbeddings(nn.Module):
    """Patches behind a class embedding, positions added."""

    config: ClipVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config, width = self.config, self.config.hidden_size
        init = nn.initializers.normal(config.initializer_range)
        first = self.param("class_embedding", init, (width,))
        side = (config.patch_size, config.patch_size)
        conv = nn.Conv(
            *(width, side, side, "VALID"),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=init,
            name="patch_embedding",
        )
        patches = conv(images.astype(self.dtype)).reshape(len(images), -1, width)
        first = jnp.broadcast_to(first[None, None, :], (len(images), 1, width))
        places = nn.Embed(config.positions, width, embedding_init=init, name="position_embedding")
        # Added in float32 whatever the dtype: their gradients are sums over all rows.
        hidden = jnp.concatenate([first, patches.astype(jnp.float32)], axis=1)
        return (hidden + places(jnp.arange(config.positions)[None, :])).astype(self.dtype)


class ClipVisionTower(nn.Module):
    """The image tower up to its last layer, which CLIP and LLaVA share."""

    config: ClipVisionConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare embeddings, layers and norms; the misspelling is that of the checkpoints."""
        config = self.config
        self.embeddings = _VisionEmbeddings(config, self.dtype)
        self.pre_layrnorm = layer_norm(config.layer_norm_eps, self.dtype)
        self.encoder = TowerEncoder(config, dtype=self.dtype)
        self.post_layernorm = layer_norm(config.layer_norm_eps, self.dtype)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.config.hidden_size

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, 1 + patches, width)."""
        images = pixels(batch, self.config.num_channels, sides(self.config.image_size))
        return self.pre_layrnorm(self.embeddings(images))

    def layer(self, index: int, hidden: jax.Array, batch: Batch, live: bool) -> jax.Array:
        """Return the output of layer `index`."""
        return self.encoder(index, hidden, None, live)

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """Return the normalised token of the whole image (n, width)."""
        return self.post_layernorm(hidden[:, 0])


class _TextEmbeddings(nn.Module):
    """Token and position embeddings, added."""

    config: Any
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)

        def table(name: str, rows: int) -> nn.Embed:
            # float32 whatever the dtype: the gradient of a row is a sum over all that took it.
            return nn.Embed(
                rows, config.hidden_size, dtype=jnp.float32, embedding_init=init, name=name
            )

        tokens = table("token_embedding", config.vocab_size)(ids)
        places = table("position_embedding", config.max_position_embeddings)
        return (tokens + places(jnp.arange(ids.shape[1])[None, :])).astype(self.dtype)


class TextTower(nn.Module):
    """The text tower up to its final norm, which CLIP and SigLIP share.

    Attributes:
        config: sizes and rates.
        causal: whether a token sees those before it alone.
        projection: width of the layer `head` on a text's one token, None where there is none.
        dtype: of the computation; parameters are float32.
    """

    config: Any
    causal: bool = True
    projection: int | None = None
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare embeddings, layers and the final norm."""
        self.embeddings = _TextEmbeddings(self.config, self.dtype)
        self.encoder = TowerEncoder(self.config, self.causal, self.dtype)
        self.final_layer_norm = layer_norm(self.config.layer_norm_eps, self.dtype)
        if self.projection is not None:
            init = nn.initializers.normal(self.config.initializer_range)
            self.head = nn.Dense(self.projection, dtype=self.dtype, kernel_init=init)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.config.hidden_size

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, length, width)."""
        return self.embeddings(token_ids(batch, self.config.max_position_embeddings))

    def layer(self, index: int, hidden: jax.Array, batch: Batch, live: bool) -> jax.Array:
        """Return the output of layer `index`."""
        mask = batch.get("attention_mask")
        return self.encoder(index, hidden, None if mask is None else jnp.asarray(mask), live)

    def final(self, hidden: jax.Array) -> jax.Array:
        """Return the tokens behind the final norm."""
        return self.final_layer_norm(hidden)

    def projected(self, token: jax.Array) -> jax.Array:
        """Return what the layer `head` makes of one token of each text (n, projection)."""
        return self.head(token)


def end_of_text(ids: jax.Array, eos_token_id: int) -> jax.Array:
    """Return the place (n,) of each text's end token, which the pooled output is read at.

    With `eos_token_id` 2, which the first configs state by mistake, it is the place of the largest
    token; else the first place of that token.

    >>> ids = jnp.array([[9, 3, 30, 30], [9, 30, 1, 1]])
    >>> end_of_text(ids, 30).tolist(), end_of_text(ids, 2).tolist()
    ([2, 1], [2, 1])
    """
    return jnp.argmax(ids if eos_token_id == 2 else ids == eos_token_id, axis=-1)


def at(tokens: jax.Array, places: jax.Array) -> jax.Array:
    """Return the token (n, dim) at one place (n,) of each row of tokens (n, positions, dim).

    >>> at(jnp.array([[[1.0], [2.0]]]), jnp.array([1])).tolist()
    [[2.0]]
    """
    return jnp.take_along_axis(tokens, places[:, None, None], axis=1)[:, 0]
