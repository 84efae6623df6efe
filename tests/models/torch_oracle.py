"""transformers' PyTorch models as the oracle of a family: forward, gradients, names, folders.

A parity test makes a tiny random model with `peer`, which also saves it as a folder, loads the
folder by `jtl.load_backbone`, and compares. Nothing here runs without PyTorch.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl.models import load
from jtl.models.backbone import Backbone
from jtl.weights.files import Checkpoint, Tensor
from jtl.weights.load import fill


def peer(
    class_name: str, folder: Path, *, seed: int = 0, spread: float = 0.3, **config: Any
) -> Any:
    """Make a random model of a transformers class, in evaluation mode, and save it to a folder."""
    import torch
    import transformers

    made = getattr(transformers, class_name)
    model = made(made.config_class(**config)).eval()
    randomise(model, torch.Generator().manual_seed(seed), spread)
    model.save_pretrained(folder)
    return model


def randomise(model: Any, generator: Any, spread: float) -> None:
    """Give every weight and running statistic of a PyTorch model a random value, norms near 1."""
    import torch

    with torch.no_grad():
        for name, leaf in [*model.named_parameters(), *model.named_buffers()]:
            if not leaf.is_floating_point() or "inv_freq" in name:
                continue
            norm = leaf.ndim == 1 and name.endswith("weight")
            noise = torch.randn(leaf.shape, generator=generator) * spread
            if name.endswith("running_var"):
                leaf.copy_(noise.abs() + 0.5)
            elif leaf.ndim or name in dict(model.named_parameters()):
                leaf.copy_(noise + (1.0 if norm else 0.0))


def to_torch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a batch of ours into PyTorch's: integers long, images channels first."""
    import torch

    made = {}
    for name, value in batch.items():
        array = np.array(value)
        if name.startswith("pixel_values"):
            array = np.ascontiguousarray(np.moveaxis(array, -1, -3))
        integers = np.issubdtype(array.dtype, np.integer)
        made[name] = torch.tensor(array).long() if integers else torch.tensor(array)
    return made


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Compare to an absolute tolerance, times the largest expected value where that is over 1."""
    expected = expected.detach().float().numpy() if hasattr(expected, "detach") else expected
    scale = max(1.0, float(np.abs(expected).max()))
    got = np.asarray(got, np.float32)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


def same_gradients(
    backbone: Backbone,
    loss: Callable[[Any], jax.Array],
    peer: Any,
    their_loss: Any,
    *,
    without: Iterable[str] = (),
    tolerance: float = 1e-4,
) -> None:
    """Compare the gradient of a loss with respect to every parameter of the backbone.

    Args:
        backbone: of the peer's folder.
        loss: of `backbone.params`.
        peer: the PyTorch model; its gradients are computed here.
        their_loss: the same loss there.
        without: names of the peer that the loss does not reach.
        tolerance: absolute, times the largest gradient of the leaf where that is over 1.
    """
    peer.zero_grad()
    their_loss.backward()
    found = {n: p.grad.float().numpy() for n, p in peer.named_parameters() if p.grad is not None}
    missing = {n for n, p in peer.named_parameters() if p.grad is None} - set(without)
    assert not missing, f"the loss does not reach {sorted(missing)}"
    names = {name: Tensor(value.shape, value.dtype) for name, value in found.items()}
    checkpoint = Checkpoint("torch", names, found.__getitem__, backbone.config, Path("gradients"))
    row = backbone.family
    if row.layout is not None:
        checkpoint = row.layout(checkpoint, backbone.config)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), backbone.params)
    trees, report = fill({"params": shapes}, checkpoint, rules=row.rules, aliases=row.aliases)
    assert not report.wrong_shape
    gradients = jax.jit(jax.grad(loss))(backbone.params)
    excused = set(report.fresh)
    assert len(report.loaded) and len(excused) <= len(tuple(without)), sorted(excused)

    def compare(path: Any, got: Any, expected: Any) -> None:
        if not isinstance(expected, jax.ShapeDtypeStruct):
            close(got, np.asarray(expected), tolerance)

    jax.tree_util.tree_map_with_path(compare, gradients, trees["params"])


def names_agree(class_name: str, model_type: str, pooling: str | None = None, **config: Any) -> int:
    """Compare names and shapes with those of a transformers class at a real configuration.

    The PyTorch model is made on the meta device, so nothing is allocated.

    Returns:
        The number of leaves that were compared.
    """
    import torch
    import transformers

    from jtl.models import families

    made = getattr(transformers, class_name)
    with torch.device("meta"):
        model = made(made.config_class(**config))
    names = {n: Tensor(tuple(t.shape), np.dtype("float32")) for n, t in model.state_dict().items()}
    stated = model.config.to_dict()
    row = families.family(model_type)
    if row.part and row.part in stated and stated.get("model_type") != row.model_type:
        stated = row.part_config(stated) if row.part_config else stated[row.part]
    whole = load.full_config(row, stated)
    module = row.make(whole, pooling or row.poolings[0], jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), row.example(whole))
    template = {"params": shapes["params"], "stats": shapes.get("batch_stats", {})}
    # Nothing is read: the values are zeros that share one number.
    zeros = {n: np.broadcast_to(np.float32(0), t.shape) for n, t in names.items()}
    checkpoint = Checkpoint("torch", names, zeros.__getitem__, stated, Path("meta"))
    if row.layout is not None:
        checkpoint = row.layout(checkpoint, whole)
    return _counted(template, checkpoint, row)


def _counted(template: Any, checkpoint: Checkpoint, row: Any) -> int:
    from jtl.weights.report import check

    _, report = fill(
        template,
        checkpoint,
        rules=row.rules,
        aliases=row.aliases,
        place=lambda path, value: jnp.zeros((), value.dtype),
    )
    check(report, allow_fresh=row.optional, allow_unexpected=row.ignored)
    return len(report.loaded)
