"""Formulas of tasks as (sum, weight), and metrics as sums; both add up over batches and devices."""

from jtl.losses import bootstrap, classification, contrastive, ctc, dense, metrics, regression

__all__ = ["bootstrap", "classification", "contrastive", "ctc", "dense", "metrics", "regression"]
