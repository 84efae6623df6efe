"""MAE: ViT that was trained to fill in hidden patches; its decoder is a head.

A batch with a column `noise` (n, patches) has patches hidden: those with the smallest noise are
kept, `mask_ratio` of the config says how many. Without it the encoder sees the whole image, as
fine-tuning wants. `heads.MaskedImage` is the decoder, `heads.reconstruction_loss` its loss.

Reference: He et al. 2021, arXiv:2111.06377.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Backbone, Batch, Family, Out, PretrainedHead, Rules, run_stages
from jtl.models.families.vit import ALIASES, KERNEL, VIT, Embeddings, ViTConfig, vit_config
from jtl.models.families.vit_layouts import published
from jtl.models.heads import MaskedImage, pool
from jtl.models.layers import layer_norm, pixels
from jtl.models.layers.masking import masking
from jtl.models.layers.patches import grid
from jtl.models.layers.vit_encoder import Encoder
from jtl.models.resize import channels_of, positions_of

POOLINGS = ("cls", "mean", "mean_norm")


class MAE(nn.Module):
    """MAE's encoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        mask_ratio: share of the patches that is hidden where the batch has noise.
        pooling: what `out["pooled"]` is: "cls" (the first token), "mean" (of the patches that were
            seen) or "mean_norm" (the final LayerNorm on the mean of the patches before it, as MAE
            fine-tunes; "tokens" then are without it).
        dtype: of the computation; parameters are float32.
    """

    config: ViTConfig
    mask_ratio: float = 0.75
    pooling: str = "cls"
    dtype: Any = jnp.float32
    beside = ("noise",)

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        self.embeddings = Embeddings(self.config, self.dtype)
        self.encoder = Encoder(self.config.encoder, self.dtype)
        self.layernorm = layer_norm(self.config.encoder.layer_norm_eps, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.encoder.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, 1 + patches that are seen, dim)."""
        images = pixels(batch, self.config.num_channels, self.config.image_size)
        keep = masking(batch["noise"], self.mask_ratio).keep if "noise" in batch else None
        return self.embeddings(images.astype(self.dtype), live, keep)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index`, of the shape of `hidden`."""
        return self.encoder(index, hidden, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"."""
        if self.pooling == "mean_norm":
            pooled = self.layernorm(pool({"tokens": hidden[:, 1:]}, {}, "mean"))
            return {"tokens": hidden, "pooled": pooled}
        tokens = self.layernorm(hidden)
        read = tokens[:, 1:] if self.pooling == "mean" else tokens
        return {"tokens": tokens, "pooled": pool({"tokens": read}, {}, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> MAE:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to MAE; give one of {POOLINGS}")
    return MAE(vit_config(config), config["mask_ratio"], pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    layers = range(config["num_hidden_layers"])
    blocks = ((rf"encoder/layer/{i}/.*", f"block_{i}") for i in layers)
    return (("embeddings/.*", "stem"), *blocks, ("layernorm/.*", "top"))


def _decoder(config: Mapping[str, Any], backbone: Backbone) -> MaskedImage:
    made = vit_config(config)
    rows, columns = grid(made.image_size, made.patch_size)
    return MaskedImage(
        rows=rows,
        columns=columns,
        pixels=made.patch_size[0] * made.patch_size[1] * made.num_channels,
        width=config["decoder_hidden_size"],
        layers=config["decoder_num_hidden_layers"],
        heads=config["decoder_num_attention_heads"],
        inner=config["decoder_intermediate_size"],
        mask_ratio=config["mask_ratio"],
        activation=made.encoder.hidden_act,
        epsilon=made.encoder.layer_norm_eps,
        bias=made.encoder.qkv_bias,
        scale=made.encoder.initializer_range,
    )


_DECODER_RULES = (
    (r"(.*)/kernel", r"decoder.\1.weight", "dense"),
    (r"(.*)/scale", r"decoder.\1.weight", "same"),
    (r"(.*)", r"decoder.\1", "same"),
)

VIT_MAE = Family(
    model_type="vit_mae",
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=VIT.example,
    rules=VIT.rules,
    # What transformers 5 saves, and what it has in memory, to the names of the hub's files.
    aliases=((r"^decoder[.]decoder_encoder[.]layer[.]", "decoder.decoder_layers."), *ALIASES),
    ignored=(r"(classifier|decoder)[.].*",),
    class_name="ViTMAEModel",
    prefix="vit",
    heads={
        "masked_image": PretrainedHead(
            "ViTMAEForPreTraining", MaskedImage, _decoder, _DECODER_RULES
        )
    },
    layout=published,
    resize=positions_of("embeddings/position_embeddings"),
    channels=channels_of(KERNEL),
)
