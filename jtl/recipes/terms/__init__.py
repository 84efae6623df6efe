"""Formulas as terms: what a penalty needs from the start model, and how it enters the loss.

A penalty is made once, when the start model is known: `penalty(start) -> Part`. A part is a term
`Context -> (sum, weight)`, the arrays that it reads (`refs`, never trained) and, for penalties on
outputs, what the start model gives on the training data (`columns`, computed once).
"""

from jtl.recipes.terms.engine import si
from jtl.recipes.terms.outputs import kl, lwf
from jtl.recipes.terms.part import Part, Start, Stream
from jtl.recipes.terms.replay import agem, replay
from jtl.recipes.terms.representations import delta, features
from jtl.recipes.terms.weights import ewc, l2_sp, mas

__all__ = [
    "Part",
    "Start",
    "Stream",
    "agem",
    "delta",
    "ewc",
    "features",
    "kl",
    "l2_sp",
    "lwf",
    "mas",
    "replay",
    "si",
]
