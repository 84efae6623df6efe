"""What every decoder is held to beside transformers' PyTorch model of the same weights."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from torch_oracle import close, same_gradients, to_torch

from jtl.models import families, load
from jtl.models.backbone import column
from jtl.models.export import export
from jtl.models.load_head import load_head
from jtl.models.model import attach
from jtl.weights.rename import normalise, torch_name

PAD = 0  # no other token is 0: PyTorch lets no gradient reach the padding token's row


def batch_of(n=3, length=7, *, right=0, left=0, vocabulary=31, seed=0, **columns):
    """Rows of tokens; the first has `right` and the second `left` places of padding."""
    rng = np.random.default_rng(seed)
    mask = np.ones((n, length), np.int32)
    mask[0, length - right :] = 0
    mask[1 % n, :left] = 0
    ids = rng.integers(1, vocabulary, (n, length)) * mask + PAD * (1 - mask)
    batch = {"input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.asarray(mask)}
    return {**batch, **columns}


BATCHES = {
    "padded on both sides": batch_of(right=2, left=3),
    "one token, no mask": {"input_ids": jnp.array([[7]])},
    "positions from the first real token": batch_of(
        *(2, 13),
        left=3,
        position_ids=jnp.maximum(
            jnp.cumsum(batch_of(2, 13, left=3)["attention_mask"], axis=1) - 1, 0
        ),
    ),
}


def real(batch, values):
    """Return values (n, positions, ...) with zeros at padding."""
    mask = np.asarray(batch.get("attention_mask", np.ones(values.shape[:2])))
    return np.asarray(values, np.float32) * mask[:, :, None]


def same_hidden_states(made, peer, batch, tolerance=1e-5):
    """Compare the output of every stage at the real positions, and the last real token."""
    import torch

    with torch.no_grad():
        theirs = peer(**to_torch(batch), output_hidden_states=True, use_cache=False)
    module, params = made.module, {"params": made.params}

    @jax.jit
    def run(batch):
        found = {}
        for border in range(1, module.blocks + 1):
            hidden = module.apply(params, {**batch, **found}, frozenset(), border)
            found = {**found, column(border, module.blocks): hidden}
        return found, module.apply(params, {**batch, **found})

    found, out = run(batch)
    for ours, hidden in zip(found.values(), theirs.hidden_states[:-1], strict=True):
        close(real(batch, ours), real(batch, hidden), tolerance)
    last = theirs.last_hidden_state.float().numpy()
    close(real(batch, out["tokens"]), real(batch, last), tolerance)
    mask = np.asarray(batch.get("attention_mask", np.ones(last.shape[:2])))
    ends = [int(np.flatnonzero(row)[-1]) for row in mask]
    close(out["pooled"], last[np.arange(len(ends)), ends], tolerance)


def same_gradients_everywhere(made, peer, batch):
    """Compare the gradient with respect to every parameter of a loss on the real positions."""
    import torch

    mask = np.asarray(batch["attention_mask"])[:, :, None]
    shape = (*mask.shape[:2], made.dim)
    weight = np.random.default_rng(1).normal(size=shape).astype(np.float32) * mask / 10

    def loss(params):
        return jnp.sum(made.module.apply({"params": params}, batch)["tokens"] * weight)

    theirs = peer(**to_torch(batch), use_cache=False).last_hidden_state
    same_gradients(made, loss, peer, (theirs * torch.tensor(weight)).sum())


def same_head(folder, peer, kind, batch):
    """Compare the logits of a head that a class of transformers saved; return the model."""
    made = load.load_backbone(folder)
    module, params = load_head(folder, made, kind)
    model = attach(made, {"head": module}, key=jax.random.key(0))
    model = dataclasses.replace(model, params={**model.params, "heads": {"head": params}})
    _same_logits(model, peer, batch)
    return model


def opened_again(folder, auto, model, batch):
    """Export a model, open the folder by a class of transformers, and compare the logits."""
    import transformers

    export(folder, model)
    peer, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    _same_logits(model, peer.eval(), batch)


def _same_logits(model, peer, batch):
    import torch

    out, _ = model.apply(model.params, model.stats, batch)
    with torch.no_grad():
        theirs = peer(**to_torch(batch))
    spans = "start_logits" in theirs
    theirs = torch.stack([theirs.start_logits, theirs.end_logits], -1) if spans else theirs.logits
    if theirs.ndim == 3:
        close(real(batch, out["head"]), real(batch, theirs))
    else:
        close(out["head"], theirs)


def names_and_shapes_agree(class_name, model_type, **config):
    """Compare all names and shapes at a published size; no weight is made. Return their number."""
    import torch
    import transformers

    made = getattr(transformers, class_name)
    with torch.device("meta"):
        peer = made(made.config_class(**config))
    row = families.family(model_type)
    theirs = {normalise(n, row.aliases): tuple(x.shape) for n, x in peer.state_dict().items()}
    rest = "|".join(f"(?:{pattern})" for pattern in row.ignored)
    theirs = {name: shape for name, shape in theirs.items() if not re.fullmatch(rest, name)}
    module = row.make(load.full_config(row, peer.config.to_dict()), row.poolings[0], jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), row.example(peer.config.to_dict()))
    ours = {}
    for path, leaf in flatten_dict(shapes["params"], sep="/").items():
        name, layout = torch_name(path, row.rules)
        ours[name] = leaf.shape[::-1] if layout == "dense" else leaf.shape
    assert ours == theirs
    return len(ours)
