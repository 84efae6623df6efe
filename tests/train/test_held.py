import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_toy as toy
from jax.sharding import NamedSharding, PartitionSpec

from jtl.train.held import check_held, digest, digests, held_stats
from jtl.train.mesh import make_mesh
from jtl.train.plan import Phase

PLAN = [Phase("a", {"head": 0.1}, steps=1), Phase("b", {"body": 0.1}, steps=1)]


def test_what_is_held_has_digests_by_name():
    found = digests(toy.begin(PLAN), toy.labels(), frozenset({"head"}))
    assert set(found) == {
        "params/body/kernel",
        "params/norm/scale",
        "stats/norm/mean",
        *(f"opt_state/body/{name}" for name in slots("body")),
    }


def slots(label):
    from jtl import trees

    return trees.names(toy.begin(PLAN).opt_state.inner_states[label])


def test_optimizer_slots_of_held_labels_are_watched():
    state = toy.begin(PLAN)
    live = frozenset({"head"})
    counted = optax.tree.set(state.opt_state.inner_states["body"], count=jnp.int32(1))
    inner = {**state.opt_state.inner_states, "body": counted}
    moved = state._replace(opt_state=state.opt_state._replace(inner_states=inner))
    before, after = (digests(s, toy.labels(), live) for s in (state, moved))
    with pytest.raises(ValueError, match="1 of .* held arrays changed in phase 'a'.*body.*count"):
        check_held(before, after, "a")


@pytest.mark.parametrize(
    ("old", "new", "equal"),
    [
        (np.float32([0.0]), np.float32([-0.0]), False),
        (np.float32([np.nan]), np.float32([np.nan]), True),
        (np.float32([1.0]), np.float32([np.nextafter(np.float32(1), np.float32(2))]), False),
        (np.zeros(2, np.float32), np.zeros((1, 2), np.float32), False),
        (np.zeros(2, np.float32), np.zeros(2, np.int32), False),
        (jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16), True),
        (np.float32(2.0), jnp.float32(2.0), True),
    ],
)
def test_digests_are_equal_for_equal_bits_only(old, new, equal):
    def digest(x):
        state = toy.begin(PLAN)._replace(params={"x": x}, stats={}, opt_state=())
        return digests(state, {"x": "held"}, frozenset())

    assert (digest(old) == digest(new)) == equal
    assert list(digest(old)) == ["params/x"]


@pytest.mark.parametrize("axes", [("data",), (None, "data"), ()])
def test_a_digest_does_not_depend_on_where_the_array_lies(axes):
    mesh = make_mesh()
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    assert digest(spread) == digest(x) == digest(np.asfortranarray(x))
    assert digest(spread.at[9, 3].add(1.0)) != digest(x) != digest(spread.T)


def test_a_key_among_the_optimizer_slots_has_a_digest():
    keys = [jax.random.key(0), jax.random.key(0), jax.random.key(1)]
    found = [digest(key) for key in keys]
    assert found[0] == found[1] != found[2]


def test_a_statistic_belongs_to_the_nearest_module_with_parameters():
    labels = {
        "a": {"norm": {"scale": "one", "bias": "two"}, "dense": {"kernel": "three"}},
        "b": {"dense": {"kernel": "four"}},
    }
    stats = {"a": {"norm": {"mean": 0.0}, "bare": {"mean": 0.0}}, "b": {"bare": {"mean": 0.0}}}

    def held(*live):
        return held_stats(stats, labels, frozenset(live))

    assert held("four") == {
        "a": {"norm": {"mean": True}, "bare": {"mean": True}},
        "b": {"bare": {"mean": False}},
    }
    assert held("two")["a"] == {"norm": {"mean": False}, "bare": {"mean": False}}
    assert held("three")["a"] == {"norm": {"mean": True}, "bare": {"mean": False}}


def test_equal_digests_pass():
    check_held({"x": "1"}, {"x": "1"}, "a")
    with pytest.raises(ValueError, match="'x', 'y'"):
        check_held({"x": "1"}, {"y": "1"}, "a")
