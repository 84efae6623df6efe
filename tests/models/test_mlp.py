"""The MLP: values by hand, names and stages, grey images, and a way back from disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jtl.data.images import image_inputs
from jtl.models import load
from jtl.models.export import export, import_model
from jtl.models.families.mlp import FAMILY, mlp_config
from jtl.models.heads import Linear
from jtl.models.model import attach

CONFIG = {"image_size": [2, 3], "num_channels": 1, "hidden_sizes": [4, 5]}


def _backbone(**changes):
    inputs = image_inputs((2, 3), mean=(0.5,), std=(0.5,))
    return load.new_backbone("mlp", {**CONFIG, **changes}, key=jax.random.key(0), inputs=inputs)


def test_golden_tree_and_stages():
    backbone = _backbone()
    shapes = {n: x.shape for n, x in flatten_dict(backbone.params, sep="/").items()}
    assert shapes == {
        "dense_0/kernel": (6, 4), "dense_0/bias": (4,),
        "dense_1/kernel": (4, 5), "dense_1/bias": (5,),
    }  # fmt: skip
    assert backbone.labels == ("stem", "block_0") and backbone.dim == 5
    assert _backbone(hidden_sizes=[7]).labels == ("stem",)
    assert (
        attach(backbone, {"head": Linear(2)}, key=jax.random.key(0)).border(
            frozenset({"stem", "block_0", "head"})
        )
        == 0
    )  # all raw: nothing is held below the first layer that would be stored


def test_values_by_hand():
    backbone = _backbone(hidden_sizes=[2, 1])
    module = backbone.module
    params = {
        "dense_0": {
            "kernel": jnp.array([[1.0, 0], [0, 1], [0, 0], [0, 0], [0, 0], [0, -1]]),
            "bias": jnp.array([0.5, 0.0]),
        },
        "dense_1": {"kernel": jnp.array([[2.0], [3.0]]), "bias": jnp.array([-1.0])},
    }
    # Row by row: the second pixel is to the right of the first, the last at the lower right.
    image = jnp.array([[1.0, 2.0, 0.0], [0.0, 0.0, 5.0]]).reshape(1, 2, 3, 1)
    out = module.apply({"params": params}, {"pixel_values": image})
    # max(1 + 0.5, 0) = 1.5 and max(2 - 5, 0) = 0; then 2 * 1.5 + 3 * 0 - 1 = 2.
    assert out["pooled"].tolist() == [[2.0]]
    assert out["tokens"].tolist() == [[[2.0]]]


def test_stages_add_up_to_the_whole():
    backbone = _backbone()
    variables = {"params": backbone.params}
    batch = backbone.inputs(np.arange(12, dtype=np.uint8).reshape(2, 2, 3, 1))
    whole = backbone.module.apply(variables, batch)["pooled"]
    for border, name in ((1, "hidden_1"), (2, "hidden_2"), (3, "hidden_3")):
        stop = backbone.module.apply(variables, batch, frozenset(), border) if border < 3 else None
        if stop is not None:
            again = backbone.module.apply(variables, {name: stop})["pooled"]
            np.testing.assert_array_equal(again, whole)


def test_dropout_is_on_in_live_stages_alone():
    backbone = _backbone(hidden_sizes=[64, 64], hidden_dropout_prob=0.5)
    batch = {"pixel_values": jnp.ones((1, 2, 3, 1))}
    run = lambda live: backbone.module.apply(  # noqa: E731
        {"params": backbone.params}, batch, live, rngs={"dropout": jax.random.key(1)}
    )["pooled"]
    held = run(frozenset({"head"}))
    np.testing.assert_array_equal(held, run(frozenset()))
    dropped = run(frozenset({"block_0"}))
    assert float(jnp.mean(dropped == 0)) > float(jnp.mean(held == 0)) + 0.1


def test_a_model_comes_back_from_its_folder(tmp_path):
    model = attach(_backbone(), {"a": Linear(3), "b": Linear(2)}, key=jax.random.key(1))
    export(tmp_path / "model", model, labels={"b": ("no", "yes")})
    again = import_model(tmp_path / "model")
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    batch = model.backbone.inputs([image])
    assert batch["pixel_values"].shape == (1, 2, 3, 1)
    np.testing.assert_array_equal(
        again.backbone.inputs([image])["pixel_values"], batch["pixel_values"]
    )
    one, _ = model.apply(model.params, {}, batch)
    other, _ = again.apply(again.params, {}, batch)
    for name in ("a", "b"):
        np.testing.assert_array_equal(one[name], other[name])


def test_sizes_are_checked():
    with pytest.raises(ValueError, match=r"lacks \['hidden_sizes'\]; it has \['image_size'\]; add"):
        mlp_config({"image_size": 28})
    for wrong in ({"hidden_sizes": []}, {"hidden_sizes": [0]}, {"image_size": [28, 28, 1]}):
        with pytest.raises(ValueError, match="give .height, width. and the width of at least one"):
            mlp_config({**CONFIG, **wrong})
    with pytest.raises(ValueError, match="the model reads 1 channels"):
        FAMILY.make(CONFIG, "pooled").init(
            jax.random.key(0), {"pixel_values": jnp.zeros((1, 2, 3, 3))}
        )
