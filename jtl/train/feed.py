"""What a run asks of the data: the batches of a phase, and their shapes before it begins."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jtl.train.state import Batch


class Feed(NamedTuple):
    """The training data of a phase.

    Attributes:
        batches: `step -> iterator of batches` from that step of the whole run on, without end. The
            batch at a step depends on nothing but the step.
        steps_per_epoch: length of an epoch.
        examples_per_epoch: where a length or a warm-up is told in examples; None if unknown.
        account: plain data for the row of the phase; `derive_seconds` is what computing columns
            took while the phase began.
    """

    batches: Callable[[int], Iterator[Batch]]
    steps_per_epoch: int
    examples_per_epoch: int | None = None
    account: Mapping[str, Any] = {}


class Ahead(NamedTuple):
    """What is known of phases before they begin, so that they can be compiled while another runs.

    Attributes:
        shapes: `live -> shapes of the batches` of a phase, one for each length bucket, placed as
            the batches will be.
        steps_per_epoch: as its feed will say.
        examples_per_epoch: the same.
        warm: `live -> None`, called in the background: compiles what evaluation will need.
    """

    shapes: Callable[[frozenset[str]], Sequence[Batch]]
    steps_per_epoch: int
    examples_per_epoch: int | None = None
    warm: Callable[[frozenset[str]], None] | None = None
