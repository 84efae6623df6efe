import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from optax import contrib

from jtl import config, masks
from jtl.recipes import optimizers
from jtl.recipes.optimizers import OPTIMIZERS, decayed, in_float32

RATE, DECAY = 0.02, 0.3
every = pytest.mark.parametrize("name", OPTIMIZERS)


def parameters(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "dense": {"kernel": normal(4, 3), "bias": normal(3)},
        "embedding": normal(5, 4),
        "norm": {"scale": normal(4)},
    }


def gradients(step, params):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


AT_RATE = {
    "adabelief": (
        {"weight_decay": 0.0, "eps": 1e-8},
        lambda: optax.adabelief(RATE, eps=1e-8),
    ),
    "adafactor": (
        {"weight_decay": DECAY, "min_size_to_factor": 3},
        lambda: optax.adafactor(  # its decay is not scaled by its rate
            RATE,
            min_dim_size_to_factor=3,
            multiply_by_parameter_scale=False,
            weight_decay_rate=RATE * DECAY,
            weight_decay_mask=decayed,
        ),
    ),
    "adagrad": ({}, lambda: optax.adagrad(RATE)),
    "adam": ({}, lambda: optax.adam(RATE)),
    "adamw": (
        {"weight_decay": DECAY},
        lambda: optax.adamw(RATE, weight_decay=DECAY, mask=decayed),
    ),
    "lamb": (
        {"weight_decay": DECAY},
        lambda: optax.lamb(RATE, weight_decay=DECAY, mask=decayed),
    ),
    "lars": (
        {"weight_decay": DECAY},
        lambda: optax.lars(
            RATE, weight_decay=DECAY, weight_decay_mask=decayed, trust_ratio_mask=decayed
        ),
    ),
    "lion": (
        {"weight_decay": DECAY},
        lambda: optax.lion(RATE, weight_decay=DECAY, mask=decayed),
    ),
    "muon": (
        {"weight_decay": 0.0},
        lambda: contrib.muon(
            RATE,
            consistent_rms=0.2,
            muon_weight_dimension_numbers={
                "dense": {"kernel": contrib.MuonDimensionNumbers(), "bias": None},
                "embedding": None,
                "norm": None,
            },
        ),
    ),
    "nadamw": (
        {"weight_decay": DECAY},
        lambda: optax.nadamw(RATE, weight_decay=DECAY, mask=decayed),
    ),
    "radam": ({"weight_decay": 0.0}, lambda: optax.radam(RATE)),
    "rmsprop": (
        {"momentum": 0.9},
        lambda: optax.rmsprop(RATE, momentum=0.9, bias_correction=True),
    ),
    "sgd": (
        {"weight_decay": DECAY, "nesterov": True},
        lambda: optax.chain(
            optax.add_decayed_weights(DECAY, mask=decayed),
            optax.sgd(RATE, momentum=0.9, nesterov=True),
        ),
    ),
}


def trained(tx, rate, steps, params):
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state

    for number in range(steps):
        params, state = step(params, state, gradients(number, params))
    return params


@every
def test_unit_rate_times_the_rate_is_optax_at_that_rate(name):
    options, reference = AT_RATE[name]
    params = parameters()
    ours = trained(OPTIMIZERS[name](**options), RATE, 8, params)
    theirs = trained(reference(), 1.0, 8, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, theirs)


@pytest.mark.parametrize(
    "name", ["adabelief", "adafactor", "adamw", "lion", "muon", "nadamw", "radam", "sgd"]
)
def test_decay_alone_is_by_hand_and_spares_biases_and_norms(name):
    # Without a gradient an update is -decay * p on matrices, and nothing elsewhere.
    params = parameters()
    tx = OPTIMIZERS[name](weight_decay=DECAY)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    for part in ("kernel", "bias"):
        factor = -DECAY if part == "kernel" else 0.0
        np.testing.assert_allclose(
            updates["dense"][part], factor * params["dense"][part], rtol=1e-6
        )
    np.testing.assert_allclose(updates["embedding"], -DECAY * params["embedding"], rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0.0)


# The first update of a leaf whose gradient is 3 everywhere, in rates. AdaBelief divides g by the
# deviation of g from its mean, 0.9 g; Adagrad by sqrt(0.1 + g^2); SGD and RAdam by nothing; LAMB
# scales to the norm of the parameters, 2, LARS to 0.001 of it; Muon to a mean square of 0.2^2.
FIRST = {
    **dict.fromkeys(("adam", "adamw", "adafactor", "lion", "rmsprop"), 1.0),
    "adabelief": 1 / 0.9,
    "adagrad": 3 / np.sqrt(9.1),
    "lamb": 2.0,
    "lars": 0.002,
    "nadamw": 0.9 * 0.1 / (1 - 0.9**2) + 1.0,
    "radam": 3.0,
    "sgd": 3.0,
    "muon": 0.2,
}


@every
def test_the_first_update_by_hand(name):
    params = {"kernel": jnp.full((3, 3), 2.0)}
    options = {"weight_decay": 0.0} if "weight_decay" in AT_RATE[name][0] else {}
    tx = OPTIMIZERS[name](**options)
    updates, _ = tx.update({"kernel": jnp.full((3, 3), 3.0)}, tx.init(params), params)
    # A matrix of rank 1 keeps one direction: Muon makes its one singular value about 1 (0.7-1.2).
    expected = -FIRST[name] * (np.sqrt(3) / 3 if name == "muon" else 1.0)
    tolerance = 0.4 if name == "muon" else 1e-5
    np.testing.assert_allclose(updates["kernel"], expected, rtol=tolerance)


@every
def test_moments_and_updates_are_float32_whatever_the_parameters_are(name):
    params = parameters(jnp.bfloat16)
    tx = OPTIMIZERS[name]()
    state = tx.init(params)
    updates, new = tx.update(gradients(0, params), state, params)
    kinds = {
        x.dtype for x in jax.tree.leaves((state, new)) if jnp.issubdtype(x.dtype, jnp.floating)
    }
    assert kinds <= {np.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(updates)} == {np.dtype("float32")}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    same, _ = tx.update(gradients(0, params), tx.init(wide), wide)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), same, updates)


def test_a_second_moment_in_bfloat16_sticks_and_ours_does_not():
    # From 1 towards 2.25 by 0.1 % of the gap a step. In bfloat16, 1 + 0.00125 rounds to 1, so
    # optax's own Adam stays where it is.
    params = {"w": jnp.ones(1, jnp.bfloat16)}
    found = {}
    for name, tx in {"optax": optax.adam(1.0), "ours": optimizers.adam()}.items():
        state = tx.init(params)
        state = optax.tree.set(state, nu={"w": jnp.ones_like(state[0].nu["w"])})
        for _ in range(100):
            _, state = tx.update({"w": jnp.full(1, 1.5, jnp.bfloat16)}, state, params)
        found[name] = float(state[0].nu["w"][0])
    assert found["optax"] == 1.0
    assert found["ours"] == pytest.approx(2.25 - 1.25 * 0.999**100, rel=1e-5)


def test_in_float32_passes_extra_arguments_and_works_without_parameters():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda u: u * value, updates), state

    tx = in_float32(optax.GradientTransformationExtraArgs(lambda params: (), update))
    updates, _ = tx.update({"w": jnp.ones(1, jnp.bfloat16)}, (), value=3.0)
    assert updates["w"] == jnp.float32(3.0)


def test_adafactor_keeps_a_row_and_a_column_of_a_large_matrix():
    params = {"kernel": jnp.ones((128, 256))}
    state = OPTIMIZERS["adafactor"]().init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 128 + 256 + 8
    scaled = OPTIMIZERS["adafactor"](parameter_scale=True)
    half = {"kernel": jnp.full((2, 2), 0.5)}
    updates, _ = scaled.update(half, scaled.init(half), half)
    np.testing.assert_allclose(updates["kernel"], -0.5, rtol=1e-6)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


def haiku_net(x):
    return hk.Linear(2)(hk.LayerNorm(-1, True, True)(hk.Embed(5, 4)(x)))


TREES = {
    "frozen": lambda: FrozenDict(parameters()),
    "nnx": lambda: nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param),
    "equinox": lambda: eqx.filter(
        eqx.nn.Sequential([eqx.nn.LayerNorm(4), eqx.nn.Linear(4, 2, key=jax.random.key(0))]),
        eqx.is_array,
    ),
    "haiku": lambda: hk.transform(haiku_net).init(jax.random.key(0), jnp.zeros(1, jnp.int32)),
}
MATRICES = {
    "frozen": {"dense/kernel", "embedding"},
    "nnx": {"embed/embedding", "head/kernel"},
    "equinox": {"layers/1/weight"},
    "haiku": {"embed/embeddings", "linear/w"},
}


@pytest.mark.parametrize("kind", TREES)
def test_matrices_are_found_in_every_kind_of_tree(kind):
    tree = TREES[kind]()
    mask = decayed(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    names = masks.names(tree)
    assert {n for n, d in zip(names, jax.tree.leaves(mask), strict=True) if d} == MATRICES[kind]


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("kind", TREES)
def test_a_label_of_any_tree_takes_them(kind, name):
    tree = TREES[kind]()
    chosen = sorted(MATRICES[kind])[-1]
    labels = masks.label(tree, [(chosen, "one"), (".*", "rest")])
    tx = masks.optimizer({"one": OPTIMIZERS[name]()}, labels)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
    moved = {
        name
        for name, update in zip(masks.names(tree), jax.tree.leaves(updates), strict=True)
        if np.any(update != 0)
    }
    assert moved == {chosen}


def test_the_config_names_them_all():
    assert {kind: f"jtl.recipes.optimizers:{kind}" for kind in OPTIMIZERS} == config.TABLES[
        "optimizer"
    ]


def test_start_decay_takes_back_a_share_of_the_way_and_passes_no_moment():
    params = parameters()
    txs = (optimizers.adamw(weight_decay=0.0, start_decay=share) for share in (0.0, 0.25))
    plain, pulled = ((tx, tx.init(params)) for tx in txs)
    moved = jax.tree.map(lambda p: p + 1.0, params)
    (tx, state), (tx_pulled, state_pulled) = plain, pulled
    for step in range(2):  # the moments are the same, though the pull was there at the first step
        grads = gradients(step, params)
        want, state = tx.update(grads, state, moved)
        got, state_pulled = tx_pulled.update(grads, state_pulled, moved)
        back = jax.tree.map(lambda a, b: a - b, got, want)
        for leaf in jax.tree.leaves(back):  # biases and norms too
            np.testing.assert_allclose(leaf, -0.25, rtol=1e-5)


def test_start_decay_is_an_option_of_a_config():
    tx = config.build("optimizer", {"kind": "adamw", "start_decay": 0.5, "weight_decay": 0.0})
    params = parameters()
    zero = jax.tree.map(jnp.zeros_like, params)
    far = jax.tree.map(lambda p: p + 2.0, params)
    updates, _ = tx.update(zero, tx.init(params), far)
    np.testing.assert_allclose(updates["norm"]["scale"], -1.0, rtol=1e-5)
