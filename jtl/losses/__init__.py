"""Formulas of tasks as (sum, weight), and metrics as sums; both add up over batches and devices."""

from jtl.losses import bootstrap, classification, metrics, regression

__all__ = ["bootstrap", "classification", "metrics", "regression"]
