import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import pytest

from jtl import masks
from jtl.models.layers.norms import BatchNorm
from jtl.train.compile import compile_step
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

START = jnp.int32(0)


def ready(live=network.LIVE, *, tx=None, apply=None, terms=None, rate=1e-2, refs=None, **options):
    """Return state and step on the toy network."""
    params = network.parameters()
    labels = network.labelled(params)
    if tx is None:
        tx = phase_optimizer(dict.fromkeys(live, optax.adamw(1.0)), labels, live, live)
    step = make_step(
        apply or network.make_apply(),
        terms or {"task": network.cross_entropy},
        tx,
        labels,
        dict.fromkeys(live, rate),
        **options,
    )
    return create(params, {}, tx, refs=refs, key=jax.random.key(0)), step


# By hand


def line(params, stats, batch, *, key, live):
    return {"y": params["w"] * batch["x"]}, stats


def squares(c):
    rows = c.batch["mask"]
    return jnp.sum(jnp.where(rows, 0.5 * (c.out["y"] - c.batch["label"]) ** 2, 0.0)), jnp.sum(rows)


def pull(c):
    return 0.5 * (c.params["w"] - c.refs["anchor"]) ** 2, 1.0


LINE = {
    "x": np.array([1.0, 2.0, 9.0, 3.0], np.float32),
    "label": np.array([0.0, 1.0, 7.0, 0.0], np.float32),
    "mask": np.array([True, True, False, True]),
}


def line_step(rates, terms=None, **options):
    labels = {"w": "w", "b": "b"}
    tx = phase_optimizer({"w": optax.sgd(1.0)}, labels, {"w"}, {"w"})
    params = {"w": jnp.float32(2.0), "b": jnp.float32(5.0)}
    state = create(params, {}, tx, refs={"anchor": jnp.float32(1.0)}, key=jax.random.key(0))
    return state, make_step(line, terms or {"fit": squares}, tx, labels, rates, **options)


def test_values_by_hand():
    # w = 2: errors 2, 3, 6 at the real rows. Loss (4 + 9 + 36) / 2 / 3, slope (2 + 6 + 18) / 3.
    # The pull to 1: value 1/2, slope 1.
    state, step = line_step({"w": 0.1}, {"fit": squares, "pull": pull})
    new, metrics = step(state, LINE, START)
    slope = 26 / 3 + 1
    assert float(metrics["loss/fit"]) == pytest.approx(49 / 6)
    assert float(metrics["loss/pull"]) == pytest.approx(0.5)
    assert float(metrics["loss"]) == pytest.approx(49 / 6 + 0.5)
    assert float(metrics["grad_norm"]) == pytest.approx(slope)
    assert float(new.params["w"]) == pytest.approx(2 - 0.1 * slope)
    assert float(new.params["b"]) == 5.0
    assert float(metrics["examples"]) == 3
    assert bool(metrics["finite"])
    assert int(new.step) == 1


def test_clip_by_hand():
    state, step = line_step({"w": 0.1}, clip=2.0)
    new, metrics = step(state, LINE, START)
    assert float(metrics["grad_norm"]) == pytest.approx(26 / 3)
    assert float(new.params["w"]) == pytest.approx(2 - 0.1 * 2.0)
    state, step = line_step({"w": 0.1}, clip=100.0)
    assert float(step(state, LINE, START)[0].params["w"]) == pytest.approx(2 - 0.1 * 26 / 3)


def test_a_schedule_counts_from_the_start_of_its_phase():
    state, step = line_step({"w": lambda count: 0.1 * (count + 1)})
    state = state._replace(step=jnp.int32(7))
    new, metrics = step(state, LINE, jnp.int32(5))
    assert float(metrics["rate/w"]) == pytest.approx(0.3)
    assert float(new.params["w"]) == pytest.approx(2 - 0.3 * 26 / 3)


def test_each_label_has_its_rate():
    live = frozenset({"head", "block_5"})
    params, labels = network.parameters(), network.labelled(network.parameters())
    tx = phase_optimizer(dict.fromkeys(live, optax.sgd(1.0)), labels, live, live)
    moved = {}
    for rates in ({"head": 1.0, "block_5": 1.0}, {"head": 0.5, "block_5": 0.125}):
        step = make_step(network.make_apply(), {"task": network.cross_entropy}, tx, labels, rates)
        new, _ = step(create(params, {}, tx, key=jax.random.key(0)), network.batch(), START)
        moved[rates["head"]] = jax.tree.map(lambda a, b: a - b, new.params, params)
    network.close(moved[0.5]["head"], jax.tree.map(lambda x: 0.5 * x, moved[1.0]["head"]))
    a, b = (moved[rate]["body"]["block_5"] for rate in (0.5, 1.0))
    network.close(a, jax.tree.map(lambda x: 0.125 * x, b))


def test_a_batch_of_padding_alone_moves_nothing():
    state, step = line_step({"w": 0.1})
    new, metrics = step(state, {**LINE, "mask": np.zeros(4, bool)}, START)
    assert bool(metrics["finite"])
    assert float(metrics["loss"]) == 0.0
    assert float(new.params["w"]) == 2.0


def test_no_gradient_flows_through_a_weight():
    def weighed(c):
        return squares(c)[0], 3.0 * c.params["w"] / 2.0

    state, step = line_step({"w": 0.1}, {"fit": weighed})
    assert float(step(state, LINE, START)[0].params["w"]) == pytest.approx(2 - 0.1 * 26 / 3)


# Frozen is free, whatever optimizer comes


def labels_of():
    return network.labelled(network.parameters())


def head_mask():
    return masks.mask(labels_of(), {"head"})


def head_only():
    return phase_optimizer({"head": optax.adamw(1.0)}, labels_of(), {"head"}, {"head"})


OPTIMIZERS = {
    "phase": head_only,
    "clip before": lambda: optax.chain(optax.clip_by_global_norm(1.0), head_only()),
    "adamw of all": lambda: optax.adamw(1.0, weight_decay=0.1),
    "masked alone": lambda: optax.masked(optax.adamw(1.0), head_mask()),
    "decay after": lambda: optax.chain(head_only(), optax.add_decayed_weights(0.1)),
    "if finite": lambda: optax.apply_if_finite(head_only(), 3),
    "every second": lambda: optax.MultiSteps(head_only(), 2).gradient_transformation(),
}


def forward_flops(rows):
    apply, params = network.make_apply(), network.parameters()
    forward = jax.jit(lambda p, b: apply(p, {}, b, key=None, live=frozenset())[0])
    return forward.lower(params, network.batch(rows)).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_head_only_step_costs_a_forward_pass(name):
    # A norm, a clip or a finite check over all leaves costs the whole backward pass: 3 forwards.
    state, step = ready(tx=OPTIMIZERS[name](), clip=1.0)
    compiled = compile_step(step, state, network.batch(512), START)
    assert compiled.flops < 1.05 * forward_flops(512)


def test_all_live_costs_three_forward_passes():
    state, step = ready(network.ALL, clip=1.0)
    compiled = compile_step(step, state, network.batch(512), START)
    assert 2.5 < compiled.flops / forward_flops(512) < 3.2


@pytest.mark.parametrize("live", [network.LIVE, frozenset({"head", "block_3"})])
def test_the_weights_of_microbatches_cost_no_forward_pass(live):
    # XLA counts the body of a loop once, so half the batch is all that must be there.
    apply = network.make_apply(dropout=0.1)
    counts = {}
    for accumulate in (1, 2):
        state, step = ready(live, apply=apply, clip=1.0, accumulate=accumulate)
        counts[accumulate] = compile_step(step, state, network.batch(512), START).flops
    assert counts[2] < 0.56 * counts[1]


def test_temporary_memory_is_that_of_the_forward_pass():
    # All activations of 6 blocks would be 6 * 4096 * 64 * 4 bytes = 6.3 MB; the forward keeps two.
    state, step = ready(clip=1.0)
    assert compile_step(step, state, network.batch(4096), START).temp_bytes < 3.5e6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_held_leaves_keep_their_bits_under_any_optimizer(name):
    state, step = ready(tx=OPTIMIZERS[name](), clip=1.0)
    step = jax.jit(step)
    new = state
    for seed in range(4):
        new, metrics = step(new, network.batch(seed=seed), START)
        assert bool(metrics["finite"])
    masks.assert_held(state.params, new.params, masks.mask(labels_of(), network.ALL ^ {"head"}))
    masks.assert_held(state.params, new.params, masks.mask(labels_of(), "unused"))
    assert np.any(np.asarray(state.params["head"]["kernel"] != new.params["head"]["kernel"]))


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_held_leaves_keep_their_bits(dtype, accumulate):
    live = frozenset({"head", "block_2"})
    apply = network.make_apply(dropout=0.1, dtype=dtype)
    labels = labels_of()
    tx = phase_optimizer(
        dict.fromkeys(network.ALL, optax.adamw(1.0, weight_decay=0.1)), labels, live, network.ALL
    )
    state, step = ready(live, tx=tx, apply=apply, clip=0.5, accumulate=accumulate)
    new, step = state, jax.jit(step)
    for seed in range(3):
        new, _ = step(new, network.batch(seed=seed), START)
    held = jax.tree.map(lambda keep: not keep, masks.mask(labels, live))
    masks.assert_held(state.params, new.params, held)
    for name in ("head", "block_2"):
        old, now = (toys_leaf(s.params, name) for s in (state, new))
        assert np.any(np.asarray(old != now)), name


def toys_leaf(params, label):
    return (params["head"] if label == "head" else params["body"][label])["kernel"]


def test_parameters_keep_their_dtype():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network.parameters())
    labels = network.labelled(params)
    tx = phase_optimizer({"head": optax.adamw(1.0)}, labels, {"head"}, {"head"})
    for accumulate in (1, 2):
        step = make_step(
            network.make_apply(),
            {"task": network.cross_entropy},
            tx,
            labels,
            {"head": 1e-1},
            accumulate=accumulate,
            clip=1.0,
        )
        state = create(params, {}, tx, key=jax.random.key(0))
        new, _ = step(state, network.batch(), START)
        kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, new)]
        assert kinds[0] == kinds[1]


# Accumulation


def class_weighted(c):
    weights = jnp.where(c.batch["mask"], jnp.array([1.0, 2.0, 5.0])[c.batch["label"]], 0.0)
    logs = jax.nn.log_softmax(c.out["head"])
    picked = jnp.take_along_axis(logs, c.batch["label"][:, None], 1)[:, 0]
    return -jnp.sum(weights * picked), jnp.sum(weights)


def towards_zero(c):
    return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(c.params["head"])), jnp.float32(1.0)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_microbatches_with_unequal_masks_are_one_batch(accumulate):
    # Rows m, m + 8, ... form microbatch m: they have 4, 3, 1, 0, ... real rows.
    real = np.zeros((4, 8), bool)
    for m, count in enumerate((4, 3, 1, 0, 2, 2, 4, 1)):
        real[:count, m] = True
    batch = network.batch(32, real=real.reshape(-1))
    terms = {"task": class_weighted, "pull": towards_zero}
    live = frozenset({"head", "block_5"})
    tx = phase_optimizer(dict.fromkeys(live, optax.sgd(1.0)), labels_of(), live, live)
    results = []
    for parts in (1, accumulate):
        state, step = ready(live, tx=tx, terms=terms, clip=1.0, accumulate=parts)
        results.append(step(state, batch, START))
    network.close(results[0][1], results[1][1])
    network.close(results[0][0].params["head"], results[1][0].params["head"])
    network.close(results[0][0].params["body"], results[1][0].params["body"])


def test_microbatches_have_noise_of_their_own():
    def noise(c):
        return jax.random.normal(c.key), jnp.float32(1.0)

    def value(accumulate, step_number=0):
        terms = {"task": network.cross_entropy, "a": noise, "b": noise}
        state, step = ready(terms=terms, accumulate=accumulate)
        _, metrics = step(state._replace(step=jnp.int32(step_number)), network.batch(), START)
        return float(metrics["loss/a"]), float(metrics["loss/b"])

    assert value(1) == value(1)
    assert value(1)[0] != value(1)[1]
    assert value(1) != value(1, 1)
    key = jax.random.fold_in(jax.random.key(0), 0)
    ours = [float(noise_of(jax.random.fold_in(key, m))) for m in (0, 1)]
    assert value(2)[0] == pytest.approx(np.mean(ours))


def noise_of(key):
    return jax.random.normal(jax.random.split(key, 4)[2])


# Running statistics


def normalised(params, stats, batch, *, key, live):
    own = {"params": params["norm"], "batch_stats": stats["norm"]}
    hidden, moved = BatchNorm().apply(
        own, batch["x"], batch["mask"], "norm" in live, mutable=["batch_stats"]
    )
    return {"head": hidden @ params["head"]["kernel"]}, {"norm": moved["batch_stats"]}


def norm_step(live, accumulate=1):
    params = {
        "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "head": {"kernel": jnp.ones((4, network.CLASSES))},
    }
    labels = {"norm": {"scale": "norm", "bias": "norm"}, "head": {"kernel": "head"}}
    stats = {"norm": {"mean": jnp.full(4, 0.1), "var": jnp.full(4, 0.3)}}
    tx = phase_optimizer(dict.fromkeys(live, optax.sgd(1.0)), labels, live, live)
    rates = dict.fromkeys(live, 0.1)
    step = make_step(
        normalised, {"task": network.cross_entropy}, tx, labels, rates, accumulate=accumulate
    )
    return create(params, stats, tx, key=jax.random.key(0)), step


def test_held_statistics_keep_their_bits():
    state, step = norm_step({"head"})
    new, _ = jax.jit(step)(state, network.batch(8, dim=4), START)
    masks.assert_held(state.stats, new.stats)
    state, step = norm_step({"head", "norm"})
    new, _ = jax.jit(step)(state, network.batch(8, dim=4), START)
    assert np.all(np.asarray(state.stats["norm"]["mean"] != new.stats["norm"]["mean"]))


def test_statistics_take_the_microbatches_one_after_the_other():
    batch = network.batch(8, dim=4)
    state, step = norm_step({"norm"}, accumulate=2)
    new, _ = step(state, batch, START)
    stats = state.stats
    for part in range(2):
        rows = {name: jnp.asarray(value[part::2]) for name, value in batch.items()}
        _, stats = normalised(state.params, stats, rows, key=None, live={"norm"})
    network.close(new.stats, stats)


def test_statistics_of_another_structure_are_an_error():
    def apply(params, stats, batch, *, key, live):
        return {"y": params["w"] * batch["x"]}, {"mean": jnp.zeros(1)}

    state, _ = line_step({"w": 0.1})
    labels = {"w": "w", "b": "b"}
    step = make_step(apply, {"fit": squares}, optax.sgd(1.0), labels, {"w": 0.1})
    with pytest.raises(ValueError, match="statistics that apply returned"):
        step(state, LINE, START)


# Not finite


@pytest.mark.parametrize("bad", ["loss", "gradient", "update", "stats"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_keeps_everything(bad, accumulate):
    def apply(params, stats, batch, *, key, live):
        y = params["w"] * batch["x"]
        if bad == "gradient":  # sqrt at 0: value 0, slope infinite
            y = y + jnp.sqrt(jnp.abs(batch["flag"] * (params["w"] - 2.0)))
        if bad == "loss":
            y = y + jnp.where(batch["flag"] > 0, jnp.nan, 0.0)
        mean = jnp.where(jnp.any(batch["flag"] > 0) & (bad == "stats"), jnp.inf, stats["mean"])
        return {"y": y}, {"mean": mean}

    labels = {"w": "w", "b": "b"}
    params = {"w": jnp.float32(2.0), "b": jnp.float32(5.0)}
    tx = phase_optimizer({"w": optax.adam(1.0)}, labels, {"w"}, {"w"})
    rate = (lambda count: jnp.where(count == 0, jnp.inf, 0.1)) if bad == "update" else 0.1
    step = make_step(apply, {"fit": squares}, tx, labels, {"w": rate}, accumulate=accumulate)
    state = create(params, {"mean": jnp.float32(0.0)}, tx, key=jax.random.key(0))
    flagged = {**LINE, "flag": np.array([1, 0, 0, 0], np.float32)}
    new, metrics = jax.jit(step)(state, flagged, START)
    assert not bool(metrics["finite"])
    assert int(new.step) == 0 and not bool(new.finite)
    masks.assert_held(state[1:4], new[1:4])
    clean = {**LINE, "flag": np.zeros(4, np.float32)}
    late, metrics = jax.jit(step)(new, clean, START)  # a loop that has not read it yet
    assert not bool(metrics["finite"]) and int(late.step) == 0
    masks.assert_held(state[1:4], late[1:4])
    if bad in ("loss", "stats"):
        new, metrics = jax.jit(step)(late._replace(finite=jnp.bool_(True)), clean, START)
        assert bool(metrics["finite"]) and int(new.step) == 1
        assert float(new.params["w"]) == pytest.approx(1.9, abs=1e-4)


def test_a_norm_that_overflows_is_not_finite():
    # The clip would make it an update of nothing, and Adam would count it as a step.
    state, step = line_step({"w": 0.1}, {"steep": lambda c: (c.params["w"] * 1e25, 1.0)}, clip=1.0)
    new, metrics = step(state, LINE, START)
    assert not bool(metrics["finite"])
    assert float(new.params["w"]) == 2.0


def test_statistics_may_start_at_infinity_and_hold_keys():
    def apply(params, stats, batch, *, key, live):
        moved = {**stats, "max": jnp.maximum(stats["max"], jnp.max(batch["x"]))}
        return {"y": params["w"] * batch["x"]}, moved

    labels = {"w": "w", "b": "b"}
    step = make_step(apply, {"fit": squares}, optax.sgd(1.0), labels, {"w": 0.1}, accumulate=2)
    stats = {"max": jnp.float32(-jnp.inf), "never": jnp.float32(-jnp.inf), "key": jax.random.key(3)}
    params = {"w": jnp.float32(2.0), "b": jnp.float32(5.0)}
    state = create(params, stats, optax.sgd(1.0), key=jax.random.key(0))
    new, metrics = jax.jit(step)(state, LINE, START)
    assert bool(metrics["finite"])
    assert float(new.stats["max"]) == 9.0


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rates={}), "at least one of each"),
        (dict(terms={}), "at least one of each"),
        (dict(rates={"haed": 0.1}), r"rates name \['haed'\].*the tree has \['b', 'w'\]"),
        (dict(accumulate=0), "counts microbatches from 1"),
        (dict(clip=0.0), "norm above 0"),
    ],
)
def test_errors_when_made(options, message):
    asked = {"rates": {"w": 0.1}, "terms": {"fit": squares}, **options}
    rates, terms = asked.pop("rates"), asked.pop("terms")
    with pytest.raises(ValueError, match=message):
        make_step(line, terms, optax.sgd(1.0), {"w": "w", "b": "b"}, rates, **asked)


def test_errors_when_traced():
    state, step = line_step({"w": 0.1}, accumulate=3)
    with pytest.raises(ValueError, match="a multiple of 3"):
        step(state, LINE, START)
    state, step = line_step({"w": 0.1}, {"fit": lambda c: c.out["y"]})
    with pytest.raises(ValueError, match=r"term 'fit' .* returns \(sum, weight\)"):
        step(state, LINE, START)


def test_a_state_shares_no_buffer_with_the_caller():
    params = network.parameters()
    tx = head_only()
    state = create(params, {}, tx, refs={"anchor": params}, key=jax.random.key(0))
    step = make_step(
        network.make_apply(), {"task": network.cross_entropy}, tx, labels_of(), {"head": 0.1}
    )
    compiled = compile_step(step, state, network.batch(), START)
    state, _ = compiled.call(state, network.batch(), START)
    compiled.call(state, network.batch(), START)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
