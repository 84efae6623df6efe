"""BioViL's image side: a ResNet whose places are projected to where CXR-BERT's texts are.

The file is `biovil_image_resnet50_proj_size_128.pt` of microsoft/BiomedVLP-CXR-BERT-specialized; it
has no config of its own: `load_backbone(file, family="biovil_image")`. Its texts come from a
backbone of model_type "cxr-bert" with the head "projection". Images are grey, from 0 to 1, the same
in all three channels: the shorter side is made 512 pixels long, and the middle 448 x 448 are cut
out. The authors stretch an image before, so that its darkest pixel is 0 and its lightest 255; that
is left to who reads the files. Stages: those of `families/resnet.py`; "top" is the projector.
BioViL-T, which reads two images, is not this network.

Reference: Boecking et al. 2022, arXiv:2204.09817.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import UNUSED, Batch, Family, Out, Rules, run_stages
from jtl.models.families.resnet import RESNET, ResNet, ResNetConfig, resnet_config
from jtl.models.families.torchvision_names import resnet_rules
from jtl.models.layers import BatchNorm
from jtl.models.layers.maps import flat, real_rows
from jtl.models.layers.pointwise import pointwise

POOLINGS = ("projection", "mean")
# ResNet-50, and the projection of the published file.
_DEFAULTS = {
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "num_channels": 3,
    "projection_size": 128,
}


class _Projector(nn.Module):
    """Two dense layers on each place of a map, with BatchNorm and ReLU between."""

    width: int
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, maps: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        init = nn.initializers.normal(0.02)
        options: Any = dict(kernel_size=(1, 1), dtype=self.dtype, kernel_init=init)
        options |= dict(conv_general_dilated=pointwise)
        hidden = nn.Conv(self.width, use_bias=False, **options, name="hidden")(maps)
        norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="norm")
        return nn.Conv(self.width, **options, name="output")(nn.relu(norm(hidden, mask, live)))


class BioVilImage(nn.Module):
    """BioViL's image side in stages; see `models/backbone.py` for the contract.

    `out` has "patch_embeds" (n, height * width, projection_size) beside "tokens".

    Attributes:
        config: sizes of the ResNet.
        projection_size: width of the space that images and texts share.
        pooling: what `out["pooled"]` is: "projection", the mean over the projected places, or
            "mean", over the places before.
        dtype: of the computation; parameters and statistics are float32.
        axis_name: axis of devices over which BatchNorm takes its moments; None for one program.
    """

    config: ResNetConfig
    projection_size: int = 128
    pooling: str = "projection"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        """Declare the network and its projector."""
        self.encoder = ResNet(self.config, "mean", self.dtype, self.axis_name)
        self.projector = _Projector(self.projection_size, self.dtype, self.axis_name)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(self.config.depths)

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map after the first convolution and max pooling."""
        return self.encoder.stem(batch, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map after residual layer `index`."""
        return self.encoder.block(index, hidden, batch, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens", "pooled" and, where they are computed, "patch_embeds"."""
        out = self.encoder.top(hidden, batch, live)
        if self.pooling == "mean" and not self.is_initializing():
            return out
        embeds = flat(self.projector(hidden, real_rows(batch), live))
        mean = jnp.mean(embeds.astype(jnp.float32), axis=1).astype(embeds.dtype)
        pooled = out["pooled"] if self.pooling == "mean" else mean
        return {**out, "patch_embeds": embeds, "pooled": pooled}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> BioVilImage:
    return BioVilImage(resnet_config(_network(config)), config["projection_size"], pooling, dtype)


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in _DEFAULTS if name != "projection_size"}


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of this network; beside the file lies a config, which is CXR-BERT's."""
    return {name: config.get(name, value) for name, value in _DEFAULTS.items()}


def _inputs(config: Mapping[str, Any]) -> Any:
    """Return the authors' transform for evaluation: resize to 512, cut out 448, divide by 255."""
    from jtl.data.images import timm_inputs

    if config["num_channels"] != 3:
        return None
    sizes = {"input_size": [3, 448, 448], "crop_pct": 448 / 512, "interpolation": "bilinear"}
    return timm_inputs({**sizes, "mean": [0.0] * 3, "std": [1.0] * 3})


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    inner = tuple((f"encoder/(?:{rule})", label) for rule, label in RESNET.groups(config, "mean"))
    return (*inner, ("projector/.*", UNUSED if pooling == "mean" else "top"))


BIOVIL_IMAGE = Family(
    model_type="biovil_image",
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["projection_size"],
    dims=lambda config, pooling: (
        config["projection_size"] if pooling == "projection" else config["hidden_sizes"][-1]
    ),
    example=lambda config: {"pixel_values": jnp.zeros((1, 32, 32, config["num_channels"]))},
    rules=(
        *resnet_rules("encoder", "encoder.encoder"),
        ("projector/hidden/kernel", "projector.model.0.weight", "conv"),
        ("projector/norm/scale", "projector.model.1.weight", "same"),
        ("projector/norm/bias", "projector.model.1.bias", "same"),
        ("projector/norm/mean", "projector.model.1.running_mean", "same"),
        ("projector/norm/var", "projector.model.1.running_var", "same"),
        ("projector/output/kernel", "projector.model.3.weight", "conv"),
        ("projector/output/bias", "projector.model.3.bias", "same"),
    ),
    # Of torchvision's ResNet: a classifier of ImageNet that nothing reads.
    ignored=(r"encoder[.]encoder[.]fc[.].*", r"(.*[.])?num_batches_tracked", r"classifier[.].*"),
    complete=_complete,
    inputs=_inputs,
)
