"""Diagnoses: what a run says about itself, from its figures."""

from jtl.diagnose.forgetting import Forgetting, figures

__all__ = ["Forgetting", "figures"]
