"""How a head begins: by hand, as classifiers they are known to be, and put into a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import backbone, batch_of

from jtl.models.export import export, import_model
from jtl.models.heads import Linear, pool, start
from jtl.models.heads.pooling import AttentionPool
from jtl.models.model import attach


def _model(**options):
    return attach(backbone("vit"), {"head": Linear(3, **options)}, key=jax.random.key(1))


def test_a_prior_makes_the_first_loss_the_entropy_of_the_labels():
    counts = np.array([6, 3, 1])
    model = start.with_start(_model(start="zeros"), "head", {"bias": start.class_prior(counts)})
    out, _ = model.apply(model.params, {}, batch_of(model.backbone))
    shares = counts / counts.sum()
    np.testing.assert_allclose(jax.nn.softmax(out["head"]), np.tile(shares, (3, 1)), atol=1e-6)
    with pytest.raises(ValueError, match=r"the classes \[1\] have no example"):
        start.class_prior([2, 0])


def test_class_means_answer_with_the_nearest_mean():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 4)).astype(np.float32)
    labels = np.arange(30) % 3
    made = start.class_means(jnp.asarray(features), jnp.asarray(labels), 3, scale=2.0)
    means = np.stack([features[labels == c].mean(0) for c in range(3)])
    x = rng.normal(size=(20, 4)).astype(np.float32)
    distances = ((x[:, None] - means) ** 2).sum(-1)
    logits = x @ np.asarray(made["kernel"]) + np.asarray(made["bias"])
    np.testing.assert_array_equal(logits.argmax(1), distances.argmin(1))
    gap = logits + distances  # scale 2: -2 |x - m|^2 / 2, up to a number for each row
    np.testing.assert_allclose(gap, np.tile(gap[:, :1], (1, 3)), atol=1e-4)
    with pytest.raises(ValueError, match=r"the classes \[2\] have no example among 2"):
        start.class_means(jnp.zeros((2, 4)), jnp.array([0, 1]), 3)


def test_text_vectors_are_scaled_cosines():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3, 16)).astype(np.float32)
    model = start.with_start(_model(), "head", start.text_vectors(jnp.asarray(vectors), scale=7.0))
    batch = batch_of(model.backbone)
    out, _ = model.apply(model.params, {}, batch)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(out["head"], 7.0 * np.asarray(out["pooled"]) @ unit.T, atol=1e-4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\{'kernel': \(\(2, 3\), \(16, 3\)\)\}"):
        start.with_start(_model(), "head", {"kernel": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="has no linear head 'task'; it has"):
        start.with_start(_model(), "task", {})
    with pytest.raises(ValueError, match="start 'ones' is not known; there are"):
        _model(start="ones")


def test_scaled_kernels_give_logits_of_unit_variance():
    head = Linear(400, start="scaled")
    features = {"pooled": jax.random.normal(jax.random.key(0), (50, 64))}
    params = head.init(jax.random.key(1), features, {})
    assert float(jnp.std(head.apply(params, features, {}))) == pytest.approx(1.0, abs=0.05)


def test_attention_pooling_begins_as_the_mean_and_can_look_at_one_position():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    pooling = AttentionPool()
    params = pooling.init(jax.random.key(0), tokens, mask)
    mean = pool({"tokens": tokens}, {"attention_mask": mask}, "mean")
    np.testing.assert_allclose(pooling.apply(params, tokens, mask), mean, atol=1e-6)
    sharp = {"params": {"query": 1e4 * tokens[1, 3]}}
    chosen = int(jnp.argmax(tokens[1] @ tokens[1, 3]))
    np.testing.assert_allclose(pooling.apply(sharp, tokens, mask)[1], tokens[1, chosen], atol=1e-5)


def test_a_head_with_attention_pooling_comes_back_from_its_folder(tmp_path):
    model = _model(pooling="attention")
    assert model.params["heads"]["head"]["attention"]["query"].shape == (16,)
    export(tmp_path / "x", model)
    again = import_model(tmp_path / "x")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
