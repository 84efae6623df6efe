"""A class or a value for each place of an image, from the tokens of a grid of patches.

Reference: Oquab et al. 2023, arXiv:2304.07193, section 7.4 (a linear layer with batch
normalisation on patch tokens); Zheng et al. 2021, arXiv:2012.15840 (progressive upsampling).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.heads.start import kernel_init
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.maps import real_rows
from jtl.models.layers.norms import BatchNorm, layer_norm


class DenseMap(nn.Module):
    """Logits of each place: one linear layer on each token, made larger by bilinear interpolation.

    With `widths` a light decoder comes first: for each width a transposed convolution that doubles
    the sides, LayerNorm and GELU. The grid is that of `out["map"]` (n, rows, columns, dim) where
    the backbone has one, else that of the tokens.

    Attributes:
        outputs: number of classes or of values at each place.
        scale: how often larger the result is than the grid, such as the side of a patch.
        prefix: number of tokens before those of the patches (CLS, registers).
        rows: of the grid of tokens; None takes it to be square.
        widths: of the decoder.
        batch_norm: whether the features are normalised over the batch before the linear layer.
        dropout: rate before the linear layer, in phases in which the head is live.
        start: of the linear layer's kernel, see `start.kernel_init`.
        axis_name: axis of devices over which BatchNorm takes its moments; None for one program.
    """

    outputs: int
    scale: int = 16
    prefix: int = 0
    rows: int | None = None
    widths: tuple[int, ...] = ()
    batch_norm: bool = False
    dropout: float = 0.0
    start: str = "normal"
    axis_name: str | None = None

    needs = "tokens"
    tied = False

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, rows * scale, columns * scale, outputs).

        Raises:
            ValueError: the tokens are no such grid, or the decoder makes it larger than `scale`.
        """
        maps = self._grid(out).astype(jnp.float32)
        height, width = (side * self.scale for side in maps.shape[1:3])
        for i, wide in enumerate(self.widths):
            up = nn.ConvTranspose(wide, (2, 2), strides=(2, 2), padding="VALID", name=f"up_{i}")
            maps = nn.gelu(layer_norm(1e-6, name=f"norm_{i}")(up(maps)), approximate=False)
        if self.batch_norm:
            norm = BatchNorm(axis_name=self.axis_name, name="batch_norm")
            maps = norm(maps, real_rows(batch), live)
        maps = Dropout(self.dropout, deterministic=not live)(maps)
        init = kernel_init(self.start)
        logits = nn.Dense(self.outputs, kernel_init=init, name="classifier")(maps)
        # Linear, so the same as on features that were made larger first, at a share of the work.
        shape = (logits.shape[0], height, width, self.outputs)
        return jax.image.resize(logits, shape, "bilinear", antialias=False)

    def _grid(self, out: Mapping[str, jax.Array]) -> jax.Array:
        if 2 ** len(self.widths) > self.scale:
            raise ValueError(
                f"the decoder of widths {self.widths} makes the grid {2 ** len(self.widths)} times "
                f"larger and scale is {self.scale}; give fewer widths or a larger scale"
            )
        if "map" in out:
            return out["map"]
        tokens = out["tokens"][:, self.prefix :]
        places = tokens.shape[1]
        rows = self.rows or round(places**0.5)
        if places % rows or (self.rows is None and rows * rows != places):
            raise ValueError(
                f"{out['tokens'].shape[1]} tokens, {self.prefix} of them before the patches, are "
                f"no grid of {self.rows or 'as many rows as columns'}; give rows= of the grid, and "
                "prefix= for CLS and register tokens"
            )
        return tokens.reshape(tokens.shape[0], rows, places // rows, -1)
