"""One model of several by arithmetic over their weights, one method a file; nothing is trained."""

from jtl.merging import dare, soup, task_vectors, ties, wise_ft

__all__ = ["dare", "soup", "task_vectors", "ties", "wise_ft"]
