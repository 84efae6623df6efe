"""What comes near a name that nobody bears: the middle part of an error message."""

import difflib
import re
from collections.abc import Iterable, Sequence

SHOWN = 6


def listed(items: Sequence[str]) -> str:
    """Return the first items, quoted, and how many more there are.

    >>> listed(["a", "b"]), listed([str(i) for i in range(8)])
    ("'a', 'b'", "'0', '1', '2', '3', '4', '5' and 2 more")
    """
    shown = ", ".join(repr(item) for item in items[:SHOWN]) or "nothing"
    return shown + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" with the known name that comes nearest, "" where none is near.

    >>> nearest("haed", {"head", "stem"}), nearest("q", {"head"})
    ("; did you mean 'head'?", '')
    """
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def nearest_leaves(pattern: str, leaves: Sequence[str]) -> str:
    """Return the leaves that a mistyped regex most likely meant: compare it with all prefixes.

    >>> nearest_leaves("layers/.*", ["layer/0/bias", "head/bias"])
    "the nearest is 'layer/0/bias'"
    """
    words = re.sub(r"\\.|\(\?:|[.*+?^$()\[\]{}|]", "", pattern).strip("/")
    stems: dict[str, str] = {}
    for leaf in leaves:
        parts = leaf.split("/")
        for size in range(1, len(parts) + 1):
            stems.setdefault("/".join(parts[:size]), leaf)
    near = difflib.get_close_matches(words, list(stems), n=3, cutoff=0.5)
    found = list(dict.fromkeys(stems[stem] for stem in near))
    if not found:
        return f"the tree has {listed(leaves)}"
    return f"the nearest {'is' if len(found) == 1 else 'are'} {listed(found)}"
