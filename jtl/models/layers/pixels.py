"""The image column of a batch, checked: what every image family reads in its stem."""

import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch


def pixels(batch: Batch, channels: int, size: tuple[int, int] | None = None) -> jax.Array:
    """Return `batch["pixel_values"]` (n, height, width, channels), checked for what is static.

    Args:
        batch: with the images channels last.
        channels: that the model has been made for.
        size: (height, width) that the model has been made for, None where any size will do.

    Raises:
        ValueError: the column is missing, is no float array of rank 4, or its channels or its size
            are others than the model's.

    >>> pixels({"pixel_values": jnp.zeros((2, 8, 6, 3))}, 3, (8, 6)).shape
    (2, 8, 6, 3)
    """
    if "pixel_values" not in batch:
        raise ValueError(
            f"the batch has no column 'pixel_values'; it has {sorted(batch)}; "
            "make batches with backbone.inputs(images)"
        )
    values = jnp.asarray(batch["pixel_values"])
    if values.ndim != 4 or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"'pixel_values' is {values.dtype}{values.shape}; it must hold normalised floats in "
            "(n, height, width, channels); make batches with backbone.inputs(images)"
        )
    if values.shape[-1] != channels:
        hint = "; the channels seem to come first" if values.shape[1] == channels else ""
        raise ValueError(
            f"'pixel_values' has shape {values.shape}{hint}; the model reads {channels} channels, "
            "and they come last; make batches with backbone.inputs(images)"
        )
    if size is not None and values.shape[1:3] != size:
        raise ValueError(
            f"the images are {values.shape[1:3]} (height, width); the model has positions for "
            f"{size}; resize the images, or take a checkpoint of their size"
        )
    return values
