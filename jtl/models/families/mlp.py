"""MLP on the pixels of an image: the network of the benchmarks on MNIST, trained from scratch.

Stages: "stem" is the flattened image and the first hidden layer, "block_i" is hidden layer i + 1,
"top" has no weights. transformers has no such family.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.layers import Dropout, activation, pixels


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """The fields of `config.json`; `image_size` is (height, width)."""

    image_size: tuple[int, int]
    hidden_sizes: tuple[int, ...]
    num_channels: int = 1
    hidden_act: str = "relu"
    hidden_dropout_prob: float = 0.0


def mlp_config(config: Mapping[str, Any]) -> MLPConfig:
    """Return the fields that the network reads, checked.

    Args:
        config: `image_size`, one number or (height, width), and `hidden_sizes`, the width of each
            hidden layer; `num_channels`, `hidden_act` and `hidden_dropout_prob` have defaults.
            Other fields are left alone.

    Raises:
        ValueError: a field is missing, a size is no positive whole number, or the activation is not
            known.

    >>> mlp_config({"image_size": 28, "hidden_sizes": [400, 400]}).image_size
    (28, 28)
    """
    missing = [name for name in ("image_size", "hidden_sizes") if config.get(name) is None]
    if missing:
        raise ValueError(f"the MLP config lacks {missing}; it has {sorted(config)}; add them")
    known = {field.name for field in dataclasses.fields(MLPConfig)}
    own = {name: value for name, value in config.items() if name in known and value is not None}
    size, hidden = own["image_size"], tuple(own["hidden_sizes"])
    size = (size, size) if isinstance(size, int) else tuple(size)
    whole = all(isinstance(number, int) and number > 0 for number in (*size, *hidden))
    if not whole or len(size) != 2 or not hidden:
        raise ValueError(
            f"the MLP config has image_size={size} and hidden_sizes={hidden}; give (height, width) "
            "and the width of at least one hidden layer, all whole numbers above 0"
        )
    made = MLPConfig(**{**own, "image_size": size, "hidden_sizes": hidden})
    activation(made.hidden_act)
    return made


class MLP(nn.Module):
    """The hidden layers in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        dtype: of the computation; parameters are float32.
    """

    config: MLPConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the hidden layers."""
        init = nn.initializers.he_normal()
        sizes = self.config.hidden_sizes
        self.dense = [nn.Dense(size, dtype=self.dtype, kernel_init=init) for size in sizes]
        self.dropout = Dropout(self.config.hidden_dropout_prob)

    @property
    def blocks(self) -> int:
        """Number of hidden layers after the first."""
        return len(self.config.hidden_sizes) - 1

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the first hidden layer (n, width) of the flattened images."""
        images = pixels(batch, self.config.num_channels, self.config.image_size)
        return self._layer(0, images.reshape(len(images), -1), live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return hidden layer `index + 1` (n, width)."""
        return self._layer(index + 1, hidden, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "pooled", the last hidden layer, and "tokens", the same with one position."""
        return {"tokens": hidden[:, None], "pooled": hidden}

    def _layer(self, index: int, hidden: jax.Array, live: bool) -> jax.Array:
        hidden = activation(self.config.hidden_act)(self.dense[index](hidden.astype(self.dtype)))
        return self.dropout(hidden) if live else hidden

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> MLP:
    del pooling  # there is one way
    return MLP(mlp_config(config), dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    del pooling
    blocks = range(len(config["hidden_sizes"]) - 1)
    return (("dense_0/.*", "stem"), *((f"dense_{i + 1}/.*", f"block_{i}") for i in blocks))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    made = mlp_config(config)
    return {"pixel_values": jnp.zeros((1, *made.image_size, made.num_channels))}


FAMILY = Family(
    model_type="mlp",
    complete=dict,
    modality="image",
    make=_make,
    groups=_groups,
    poolings=("pooled",),
    dim=lambda config: config["hidden_sizes"][-1],
    example=_example,
)
