"""A pretrained backbone in stages: stem, blocks in order of depth, top.

Every family module keeps one contract, so that a forward pass can stop and start at the border of
any block and each stage can run in training or evaluation mode by itself:

    module.blocks                            number of blocks
    module.stem(batch, live)                 -> hidden
    module.block(index, hidden, batch, live) -> hidden
    module.top(hidden, batch, live)          -> {"tokens": (n, positions, dim), "pooled": (n, dim)}
    module(batch, live, stop)                = run_stages(module, batch, live, stop)

`hidden` is one array, (n, positions, dim) or a map or a vector, so that it can be a column; a
family with two streams (an encoder's output beside a decoder's) puts them into one by
`layers.pack`. What blocks and top read beside it is named by `module.beside`, columns of the raw
batch; where a module says nothing, that is the attention mask. Leaves of the stem that blocks read
too (a table of relative places) are named by `module.common`, regexes of their paths.

`live` is a bool for one stage (dropout on, BatchNorm on batch statistics) and a frozenset of labels
for the module. A border is a number of finished stages; the activations there are a column of the
batch (`column`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Batch = Mapping[str, Any]
Out = dict[str, jax.Array]
Rules = tuple[tuple[str, str], ...]

UNUSED = "unused"


class PretrainedHead(NamedTuple):
    """A head that checkpoints of a family carry, and the class of transformers that has it.

    Attributes:
        class_name: of transformers.
        module: our class of head.
        make: `(config, backbone) -> head`, an instance of `module`.
        rules: from the head's leaf paths to names in the checkpoint, before
            `weights.rename.DEFAULT_RULES`.
        pooling: of the backbone, that the class reads; None where the head reads tokens.
        optional: leaf paths (regex) that a checkpoint may lack; they come fresh.
        fields: values that the head's fields have in the class; with others it is not that head.
        prefix: of the backbone's names in this class; None is the family's.
        stated: `head -> fields of config.json` by which the class is told about this head.
    """

    class_name: str
    module: type
    make: Callable[[Mapping[str, Any], "Backbone"], Any]
    rules: tuple[tuple[str, str, str], ...]
    pooling: str | None = None
    optional: tuple[str, ...] = ()
    fields: Mapping[str, Any] = {}
    prefix: str | None = None
    stated: Callable[[Any], Mapping[str, Any]] = lambda head: {}


class Family(NamedTuple):
    """What a file in `models/families/` declares about a model family.

    Attributes:
        model_type: the `model_type` of `config.json`.
        modality: "text", "image", "audio" or "image_text", which decides the input spec.
        make: `(config, pooling, dtype) -> module`; `config` is the dict of `config.json`.
        groups: `(config, pooling) -> rules`, (regex, label) in order of depth over the backbone's
            own leaf paths.
        poolings: what `out["pooled"]` may be; the first one is the family's default.
        dim: `config -> width of out["pooled"]`.
        example: `config -> batch` of one row, small, for shapes only.
        class_name: of the bare backbone in transformers, "" where it has none.
        prefix: of the backbone's names inside transformers' classes with heads; None is
            `model_type`, "" none.
        heads: {kind: `PretrainedHead`}, kinds such as "masked_lm" and "classification".
        table: path of the word embedding, which tied heads read, "" where there is none.
        rules: (our path regex, checkpoint name template, layout), tried before
            `weights.rename.DEFAULT_RULES`.
        aliases: (regex, replacement) that bring checkpoint names to one spelling.
        optional: leaf paths (regex) that a checkpoint may lack; they come fresh and are reported.
        ignored: checkpoint names (regex, after aliases) of no backbone leaf: buffers and heads.
        layout: `(checkpoint, config) -> checkpoint` that brings other published layouts (timm's,
            the authors' own) to transformers' names, lazily; None where there is one layout only.
        part: the field of a larger model's config that holds this family's ("vision_config"), ""
            where it is the whole.
        part_config: `config -> config` of this part from that of the larger model, where it is not
            the field `part` alone; None has it so.
        dims: `(config, pooling) -> width of out["pooled"]` where it hangs on the pooling; None has
            `dim` say it.
        longest: `config -> tokens` of the longest text; None has `max_position_embeddings` say it.
        complete: `config -> config` with defaults, for a family that transformers does not have;
            None has transformers' own config class fill them in.
        resize: `(params, config, size) -> (params, config)` for images of another (height, width);
            None where any size will do, or none can. See `models/resize.py`.
        channels: `(params, config, channels, new) -> (params, config)` for another number of them.
        inputs: `config -> input spec` of the published weights, whose files state none; None, or
            None from it, where nothing is known.
    """

    model_type: str
    modality: str
    make: Callable[[Mapping[str, Any], str, Any], nn.Module]
    groups: Callable[[Mapping[str, Any], str], Rules]
    poolings: tuple[str, ...]
    dim: Callable[[Mapping[str, Any]], int]
    example: Callable[[Mapping[str, Any]], dict[str, jax.Array]]
    class_name: str = ""
    prefix: str | None = None
    heads: Mapping[str, PretrainedHead] = {}
    table: str = ""
    rules: tuple[tuple[str, str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    layout: Callable[[Any, Mapping[str, Any]], Any] | None = None
    part: str = ""
    longest: Callable[[Mapping[str, Any]], int] | None = None
    dims: Callable[[Mapping[str, Any], str], int] | None = None
    complete: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    resize: Callable[..., tuple[dict[str, Any], dict[str, Any]]] | None = None
    channels: Callable[..., tuple[dict[str, Any], dict[str, Any]]] | None = None
    part_config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    inputs: Callable[[Mapping[str, Any]], Any] | None = None


def stage_labels(blocks: int) -> tuple[str, ...]:
    """Return the labels of all stages in order of depth.

    >>> stage_labels(2)
    ('stem', 'block_0', 'block_1', 'top')
    """
    return ("stem", *(f"block_{i}" for i in range(blocks)), "top")


def column(border: int, blocks: int) -> str:
    """Return the name of the batch column that holds the activations at `border`.

    >>> column(3, blocks=6), column(8, blocks=6)
    ('hidden_3', 'pooled')
    """
    if not 1 <= border <= blocks + 2:
        raise ValueError(f"border {border} is outside 1..{blocks + 2}, which {blocks} blocks have")
    return "pooled" if border == blocks + 2 else f"hidden_{border}"


def beside(module: Any) -> tuple[str, ...]:
    """Return the raw columns that blocks and top of a module read beside the hidden array."""
    return getattr(module, "beside", ("attention_mask",))


def common(module: Any) -> tuple[str, ...]:
    """Return regexes of the leaves of the stem that blocks of a module read too."""
    return getattr(module, "common", ())


def given(batch: Batch, blocks: int) -> int:
    """Return the border at which the batch lets the forward pass start, 0 for raw input."""
    borders = [k for k in range(1, blocks + 3) if column(k, blocks) in batch]
    return max(borders, default=0)


def run_stages(
    module: Any, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
) -> Any:
    """Run the stages from the batch's border up to `stop`: every family module's `__call__`.

    Args:
        module: a bound family module.
        batch: raw columns, or the column of a border.
        live: labels of the stages that run in training mode.
        stop: number of stages to have finished; None runs all.

    Returns:
        `out` where all stages ran, else the hidden activations at `stop`.

    Raises:
        ValueError: the batch starts above `stop`, or above a live stage.
    """
    labels = stage_labels(module.blocks)
    stop = len(labels) if stop is None else stop
    start = given(batch, module.blocks)
    if start > stop:
        raise ValueError(f"the batch starts at border {start}; ask for that or more, not {stop}")
    skipped = [label for label in labels[:start] if label in live]
    if skipped:
        raise ValueError(
            f"the batch starts at border {start}, above the live stages {skipped}, which would not "
            "run; give the raw columns or a lower border"
        )
    hidden = batch[column(start, module.blocks)] if start else None
    if start == len(labels):
        return {"pooled": hidden}
    for stage in range(start, stop):
        on = labels[stage] in live
        if stage == 0:
            hidden = module.stem(batch, on)
        elif stage <= module.blocks:
            hidden = module.block(stage - 1, hidden, batch, on)
        else:
            hidden = module.top(hidden, batch, on)
    return hidden


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A family module with its pretrained weights and the inputs that they were trained on.

    Attributes:
        module: the Linen module; see the contract at the head of this file.
        params: nested dict with the names of the Hugging Face Flax checkpoints.
        stats: running statistics of BatchNorm, `{}` where there are none.
        groups: (regex, label) rules over `params` in order of depth; "unused" marks weights that no
            output reads.
        inputs: the preprocessing of the weights; `inputs(raw)` makes a batch.
        dim: width of `out["pooled"]`.
        config: the dict of `config.json`.
        family: the `Family` row it was made by.
        pooling: how `out["pooled"]` is made.
        source: the name that it was loaded from.
        report: the `LoadReport` of its weights, None for a backbone with random weights.
    """

    module: Any
    params: dict[str, Any]
    stats: dict[str, Any]
    groups: Rules
    inputs: Any
    dim: int
    config: dict[str, Any]
    family: Family
    pooling: str
    source: str = "scratch"
    report: Any = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that own at least one leaf, from stem to top, without "unused"."""
        owned = {label for _, label in self.groups}
        return tuple(label for label in stage_labels(self.module.blocks) if label in owned)

    def __call__(self, batch: Batch) -> Out:
        """Return `out` in evaluation mode: "tokens" (n, positions, dim) and "pooled" (n, dim)."""
        arrays = {name: jnp.asarray(value) for name, value in batch.items()}
        return _forward(self.module, self.params, self.stats, arrays)


@functools.partial(jax.jit, static_argnums=0)
def _forward(module: Any, params: Any, stats: Any, batch: Batch) -> Out:
    return module.apply(variables(params, stats), batch)


def variables(params: Any, stats: Any) -> dict[str, Any]:
    """Return Linen variables, with `batch_stats` only where there are statistics."""
    return {"params": params, "batch_stats": stats} if stats else {"params": params}
