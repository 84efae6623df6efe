"""Heads: what turns the features of a backbone into the outputs of a task.

A head is a Linen module called as `head(out, batch, live)`, with two fields that say what it reads:
`needs` is "pooled" or "tokens" (all that the top gives), `tied` is True where it also reads
`out["table"]`, the word embedding of the backbone (vocabulary, dim).
"""

from jtl.models.heads.cell_decoder import CellDecoder, CellMaps, cell_maps
from jtl.models.heads.contrastive import Contrastive
from jtl.models.heads.ctc import CTC
from jtl.models.heads.decoupled import Decoupled
from jtl.models.heads.dense_map import DenseMap
from jtl.models.heads.distilled import Distilled
from jtl.models.heads.language import CausalLM, MaskedLM
from jtl.models.heads.linear import Linear
from jtl.models.heads.masked_image import MaskedImage, reconstruction_loss
from jtl.models.heads.pooling import POOLINGS, pool
from jtl.models.heads.projected import Projected
from jtl.models.heads.tokens import ReplacedToken, Span, TokenLinear, TokenProjection
from jtl.models.heads.two_layer import TwoLayer

__all__ = [
    "CTC",
    "POOLINGS",
    "CausalLM",
    "CellDecoder",
    "CellMaps",
    "Contrastive",
    "Decoupled",
    "DenseMap",
    "Distilled",
    "Linear",
    "MaskedImage",
    "MaskedLM",
    "Projected",
    "ReplacedToken",
    "Span",
    "TokenLinear",
    "TokenProjection",
    "TwoLayer",
    "cell_maps",
    "pool",
    "reconstruction_loss",
]
