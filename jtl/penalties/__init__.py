"""Formulas against forgetting, one method a file; each takes a mask of the leaves it covers."""

from jtl.penalties import agem, delta, ewc, features, fisher, kl, l2sp, mas, si

__all__ = ["agem", "delta", "ewc", "features", "fisher", "kl", "l2sp", "mas", "si"]
