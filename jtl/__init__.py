"""Transfer learning in JAX: a pretrained backbone, a head, and the proof of what happened to both.

`import jtl` loads nothing; each name below loads its own module on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "jtl.models.backbone",
    "Model": "jtl.models.model",
    "adapt_vocab": "jtl.models.vocabulary",
    "attach": "jtl.models.model",
    "export": "jtl.models.export",
    "fine_tune": "jtl.recipes.finetune",
    "from_flax": "jtl.models.load",
    "load": "jtl.recipes.predict",
    "load_backbone": "jtl.models.load",
    "new_backbone": "jtl.models.load",
}
_PACKAGES = (
    *("data", "losses", "masks", "merging", "models", "penalties"),
    *("recipes", "report", "train", "trees", "weights"),
)

__all__ = ["__version__", *_HOMES, *_PACKAGES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"jtl.{name}")
    raise AttributeError(f"jtl has no name {name!r}; it has {sorted(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
