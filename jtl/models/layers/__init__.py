"""Layers that families share: one idea a file."""

from jtl.models.layers.activations import ACTIVATIONS, activation
from jtl.models.layers.attention import attention
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.log_buckets import log_buckets
from jtl.models.layers.norms import BatchNorm, RMSNorm, batch_moments, layer_norm
from jtl.models.layers.pack import pack, unpack
from jtl.models.layers.pixels import pixels
from jtl.models.layers.relative_buckets import relative_buckets
from jtl.models.layers.rotary import rotary, rotate
from jtl.models.layers.self_attention import SelfAttention
from jtl.models.layers.skew import offsets, skew

__all__ = [
    "ACTIVATIONS",
    "BatchNorm",
    "Dropout",
    "RMSNorm",
    "SelfAttention",
    "activation",
    "attention",
    "batch_moments",
    "flat_dot",
    "layer_norm",
    "log_buckets",
    "offsets",
    "pack",
    "pixels",
    "relative_buckets",
    "rotary",
    "rotate",
    "skew",
    "unpack",
]
