"""An image tower and a text tower side by side in one hidden array, aligned from the top.

Block i of the pair runs one layer of each tower, and the last block the last layer of both; the
deeper tower has the first blocks for itself. The batch may lack images or texts: then that tower
does not run, and the hidden array holds the other stream alone. Which it holds is seen from the
number of positions: those beyond the length of `input_ids` are the images'.

A tower has `depth`, `width`, `stem(batch, live)` and `layer(index, hidden, batch, live)`.
"""

from collections.abc import Sequence
from typing import Any

import jax

from jtl.models.backbone import Batch, Out, Rules
from jtl.models.layers.pack import pack, unpack


def layer_of(block: int, blocks: int, depth: int) -> int:
    """Return the layer that a tower of `depth` layers runs in a block, negative for none.

    >>> [layer_of(block, blocks=3, depth=2) for block in range(3)]
    [-1, 0, 1]
    """
    return block - (blocks - depth)


def block_rules(prefixes: Sequence[tuple[str, int]]) -> Rules:
    """Return the rules of the blocks of towers that are aligned from the top.

    Args:
        prefixes: (path before the number of a layer, depth) of each tower.

    >>> block_rules([("v/", 1), ("t/", 2)])
    (('t/0/.*', 'block_0'), ('v/0/.*', 'block_1'), ('t/1/.*', 'block_1'))
    """
    blocks = max(depth for _, depth in prefixes)
    return tuple(
        (rf"{prefix}{layer_of(block, blocks, depth)}/.*", f"block_{block}")
        for block in range(blocks)
        for prefix, depth in prefixes
        if layer_of(block, blocks, depth) >= 0
    )


def streams(
    hidden: jax.Array, batch: Batch, widths: tuple[int, int]
) -> tuple[jax.Array | None, jax.Array | None]:
    """Return the stream of the images and that of the texts, None for one that is not there.

    Args:
        hidden: (n, positions, width) of `pack`.
        batch: its `input_ids` (n, length), if any, say how many positions are the texts'.
        widths: of the image stream and of the text stream.

    >>> import jax.numpy as jnp
    >>> hidden = pack(jnp.ones((1, 2, 3)), jnp.ones((1, 4, 2)))
    >>> images, texts = streams(hidden, {"input_ids": jnp.zeros((1, 4), int)}, (3, 2))
    >>> images.shape, texts.shape
    ((1, 2, 3), (1, 4, 2))
    """
    length = batch["input_ids"].shape[1] if "input_ids" in batch else 0
    images, texts = unpack(hidden, (-1, length), widths)
    return images if images.shape[1] else None, texts if length else None


def joint(images: jax.Array | None, texts: jax.Array | None) -> jax.Array:
    """Return one array of the streams that are there."""
    return pack(*(stream for stream in (images, texts) if stream is not None))


def joint_stem(vision: Any, text: Any, batch: Batch, live: bool) -> jax.Array:
    """Return the embeddings of both towers in one array, or of the one that the batch has.

    Raises:
        ValueError: the batch has neither images nor texts, or unequal numbers of them.
    """
    found = {name: len(batch[name]) for name in ("pixel_values", "input_ids") if name in batch}
    if not found or len(set(found.values())) > 1:
        raise ValueError(
            f"the batch has the columns {sorted(batch)} with these numbers of rows: {found}; a "
            "pair needs 'pixel_values', 'input_ids', or as many of one as of the other; make "
            "batches with backbone.inputs(images=..., texts=...)"
        )
    images = vision.stem(batch, live) if "pixel_values" in found else None
    return joint(images, text.stem(batch, live) if "input_ids" in found else None)


def joint_block(
    vision: Any, text: Any, index: int, hidden: jax.Array, batch: Batch, live: bool
) -> jax.Array:
    """Return the hidden array after block `index` of the pair."""
    blocks = max(vision.depth, text.depth)
    made = []
    for tower, stream in zip(
        (vision, text), streams(hidden, batch, (vision.width, text.width)), strict=True
    ):
        layer = layer_of(index, blocks, tower.depth)
        if stream is not None and layer >= 0:
            stream = tower.layer(layer, stream, batch, live)
        made.append(stream)
    return joint(*made)


def pooled_side(out: Out, pooling: str) -> jax.Array:
    """Return the embedding of the side that is asked for, of the other where it was not run.

    >>> import jax.numpy as jnp
    >>> out = {"text_embeds": jnp.ones((1, 2))}
    >>> pooled_side(out, "image").tolist()
    [[1.0, 1.0]]
    """
    other = {"image": "text", "text": "image"}[pooling]
    own, instead = f"{pooling}_embeds", f"{other}_embeds"
    return out[own] if own in out else out[instead]
