"""What parity tests of all text encoders do: hidden states, gradients, bfloat16, heads, folders."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from torch_oracle import close, peer, same_gradients, to_torch

from jtl.models import export, families, load, load_head
from jtl.models.backbone import Backbone
from jtl.models.model import attach

SIZES = dict(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
    initializer_range=0.3,
)


def text_batch(length: int = 7, *, pad: int = 0, types: int = 0) -> dict[str, jax.Array]:
    """Three rows of tokens; the first ends in two of padding, the second begins with one.

    No real token is the padding token: PyTorch lets no gradient reach its rows.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 31, (3, length))
    mask = np.ones_like(ids)
    mask[0, -2:] = mask[1, 0] = 0
    batch = {"input_ids": np.where(mask, ids, pad), "attention_mask": mask}
    if types:
        batch["token_type_ids"] = rng.integers(0, types, ids.shape)
    return {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}


def stages(backbone: Backbone, batch: dict[str, jax.Array]) -> tuple[list[jax.Array], Any]:
    """Return every hidden state, and what the top gives."""

    @jax.jit
    def run(params: Any) -> Any:
        def one(stop: int | None) -> Any:
            return backbone.module.apply({"params": params}, batch, frozenset(), stop)

        return [one(stop) for stop in range(1, backbone.module.blocks + 2)], one(None)

    return run(backbone.params)


def same_forward(model: Any, backbone: Backbone, batch: dict[str, jax.Array]) -> Any:
    """Compare every hidden state and the outputs at real tokens; return theirs."""
    hidden, out = stages(backbone, batch)
    theirs = model(**to_torch(batch), output_hidden_states=True)
    assert len(theirs.hidden_states) == len(hidden)
    for ours, other in zip(hidden, theirs.hidden_states, strict=True):
        close(ours, other)
    close(out["tokens"], theirs.last_hidden_state)
    if getattr(theirs, "pooler_output", None) is not None and backbone.pooling == "pooler":
        close(out["pooled"], theirs.pooler_output)
    return theirs


def same_backbone(model: Any, backbone: Backbone, batch: dict[str, jax.Array]) -> None:
    """Compare forward, gradients with respect to every parameter, and the run in bfloat16."""
    import torch

    theirs = same_forward(model, backbone, batch)
    rng = np.random.default_rng(1)
    shape = theirs.last_hidden_state.shape
    # What padding gives is read by nobody, and PyTorch lets no gradient reach its rows.
    weight = rng.normal(size=shape) * np.asarray(batch["attention_mask"])[..., None] / 10
    tokens = weight.astype(np.float32)
    first = np.asarray(batch["attention_mask"])[:, :1]
    pooled = (rng.normal(size=(shape[0], shape[-1])) * first / 10).astype(np.float32)
    has_pooler = backbone.pooling == "pooler"

    def loss(params: Any) -> jax.Array:
        out = backbone.module.apply({"params": params}, batch)
        total = jnp.sum(out["tokens"] * tokens)
        return total + (jnp.sum(out["pooled"] * pooled) if has_pooler else 0.0)

    their_loss = (theirs.last_hidden_state * torch.tensor(tokens)).sum()
    if has_pooler:
        their_loss = their_loss + (theirs.pooler_output * torch.tensor(pooled)).sum()
    same_gradients(backbone, loss, model, their_loss)
    half = backbone.module.clone(dtype=jnp.bfloat16)
    out = jax.jit(half.apply)({"params": backbone.params}, batch)
    assert out["tokens"].dtype == jnp.bfloat16
    real = np.asarray(batch["attention_mask"])[..., None]
    expected = theirs.last_hidden_state.detach().numpy() * real
    close(out["tokens"].astype(jnp.float32) * real, expected, 0.06)


def same_head(
    folder: Path, kind: str, batch: dict[str, jax.Array], model_type: str, **config: Any
) -> None:
    """Compare a pretrained head's logits, and those of the folder that is written back."""
    import torch
    import transformers

    row = families.family(model_type).heads[kind]
    theirs = peer(row.class_name, folder / "theirs", **config)
    pooling = row.pooling or "cls"
    backbone = load.load_backbone(folder / "theirs", pooling=pooling)
    module, params = load_head.load_head(folder / "theirs", backbone, kind)
    model = attach(backbone, {"head": module}, key=jax.random.key(0))
    given = jax.tree.map(jnp.shape, model.params["heads"]["head"])
    assert given == jax.tree.map(jnp.shape, params)
    params = {"backbone": backbone.params, "heads": {"head": params}}
    table = model._table(params)
    out = {**backbone(batch), "table": table}
    logits = module.apply({"params": params["heads"]["head"]}, out, batch)
    with torch.no_grad():
        expected = logits_of(theirs(**to_torch(batch)))
    close(logits, expected)
    assert float(np.abs(np.asarray(logits)).max()) > 0.1
    model = type(model)(backbone, model.heads, params, model.stats)
    names = {"head": "abcde"[: module.outputs]} if getattr(module, "outputs", 0) > 2 else {}
    export.export(folder / "ours", model, labels=names)
    opener = getattr(transformers, row.class_name)
    again, loading = opener.from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        close(logits, logits_of(again.eval()(**to_torch(batch))))


def logits_of(out: Any) -> Any:
    """Return the logits of an output of transformers, the two of a span in one array."""
    import torch

    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.logits
