"""CellViT: names and shapes of its files, depths at every border, the decoder; parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict

from jtl.models import load
from jtl.models.backbone import column
from jtl.models.families import cellvit, cellvit_files
from jtl.models.families.cellvit import CELLVIT, CELLVIT_SAM, DECODER_RULES
from jtl.models.heads import CellDecoder, Linear, cell_maps
from jtl.models.load_head import load_head, with_heads
from jtl.models.model import attach_weights, outline
from jtl.weights.rename import torch_name

TINY = dict(
    hidden_size=8,
    num_hidden_layers=4,
    num_attention_heads=2,
    mlp_ratio=1.5,
    image_size=32,
    initializer_range=0.3,
    extract_layers=[1, 2, 3, 4],
    num_nuclei_classes=3,
    num_tissue_classes=5,
    decoder_base=4,
    decoder_widths=[6, 5, 7],
)
TINY_SAM = {**TINY, "image_size": 64, "output_channels": 4, "window_size": 2}
TINY_SAM["global_attn_indexes"] = [1, 3]
CONFIGS = {"cellvit": TINY, "cellvit_sam": TINY_SAM}
# {what the file says: (family, parameters of encoder and heads)} of the published models.
FILES = {
    ("CellViT256", ""): ("cellvit", 46_750_349),
    ("CellViTSAM", "SAM-B"): ("cellvit_sam", 146_094_557),
    ("CellViTSAM", "SAM-L"): ("cellvit_sam", 367_847_645),
    ("CellViTSAM", "SAM-H"): ("cellvit_sam", 699_741_149),
}


def _batch(size=(48, 32), n=2):
    images = np.random.default_rng(0).normal(size=(n, *size, 3))
    return {"pixel_values": jnp.asarray(images, jnp.float32)}


@functools.cache
def _model(model_type):
    """A backbone with decoder and tissue head, all of whose leaves are random."""
    made = load.new_backbone(model_type, CONFIGS[model_type], key=jax.random.key(0))
    made = dataclasses.replace(made, params=_random(made.params, 1))
    heads = {"maps": CellDecoder(3, base=4, widths=(6, 5, 7)), "tissue": Linear(5)}
    params, stats = outline(made, heads)
    return attach_weights(made, heads, _random(params, 2), _random(stats, 3))


def _random(shapes, seed):
    """Random leaves near what norms and their statistics are."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        noise = rng.normal(size=shape.shape) * 0.3
        noise = np.abs(noise) + 0.5 if name == "var" else noise + (name == "scale")
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def _forward(model_type):
    model = _model(model_type)
    return jax.jit(lambda params, stats, batch: model.apply(params, stats, batch)[0])


@functools.cache
def _published(arch, size):
    """The names and shapes of a file's tensors, as our trees would be written to it."""
    stated = {"arch": arch, "config": {"model.backbone": size, "data.num_nuclei_classes": 6}}
    config = cellvit_files.read_config(stated)
    row = {"cellvit": CELLVIT, "cellvit_sam": CELLVIT_SAM}[config["model_type"]]
    whole = load.full_config(row, config)
    module = row.make(whole, row.poolings[0], jnp.float32)
    example = row.example(whole)
    body = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    out = jax.eval_shape(
        lambda: module.apply({"params": jax.tree.map(jnp.zeros_like, body)}, example)
    )
    decoder = CellDecoder(whole["num_nuclei_classes"])
    head = jax.eval_shape(decoder.init, jax.random.key(0), out, example)
    shapes = {}
    for tree, rules in ((body, row.rules), (head["params"], DECODER_RULES)):
        for path, leaf in flatten_dict(tree, sep="/").items():
            name, layout = torch_name(path, rules)
            shapes[name] = _theirs(leaf.shape, layout)
    return row, shapes, head["batch_stats"]


def _theirs(shape, layout):
    axes = {"dense": (1, 0), "conv": (3, 2, 0, 1), "transposed_conv": (2, 3, 0, 1), "same": None}
    return shape if axes[layout] is None else tuple(shape[axis] for axis in axes[layout])


@pytest.mark.parametrize("said", FILES, ids=lambda said: said[1] or said[0])
def test_the_trees_of_the_published_files(said):
    family, parameters = FILES[said]
    row, shapes, stats = _published(*said)
    assert row.model_type == family
    tissue = 19 * (384 if family == "cellvit" else 256) + 19
    assert sum(int(np.prod(shape)) for shape in shapes.values()) + tissue == parameters
    dim, wide = shapes["decoder3.0.block.0.weight"][:2]
    first, second, last = (256, 128, 312) if dim < 512 else (512, 256, 512)
    assert wide == last and len(jax.tree.leaves(stats)) == 2 * 35
    expected = {
        "decoder0.0.block.0.weight": (32, 3, 3, 3),
        "decoder0.1.block.1.weight": (64,),
        "decoder1.0.block.0.weight": (dim, first, 2, 2),
        "decoder1.1.block.1.weight": (second, second, 3, 3),
        "decoder1.2.block.2.bias": (128,),
        "decoder2.1.block.0.weight": (first, 256, 2, 2),
        "nuclei_binary_map_decoder.bottleneck_upsampler.weight": (dim, last, 2, 2),
        "hv_map_decoder.decoder3_upsampler.0.block.0.weight": (last, 2 * last, 3, 3),
        "hv_map_decoder.decoder3_upsampler.3.weight": (last, 256, 2, 2),
        "hv_map_decoder.decoder2_upsampler.2.weight": (256, 128, 2, 2),
        "hv_map_decoder.decoder1_upsampler.2.bias": (64,),
        "nuclei_type_maps_decoder.decoder0_header.0.block.0.weight": (64, 128, 3, 3),
        "nuclei_type_maps_decoder.decoder0_header.2.weight": (6, 64, 1, 1),
        "nuclei_binary_map_decoder.decoder0_header.2.bias": (2,),
    }
    assert {name: shapes.get(name) for name in expected} == expected


def test_what_a_file_says_makes_the_config():
    nested = {"model": {"backbone": "SAM-L", "regression_loss": True}}
    nested["transformations"] = {"normalize": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}}
    made = cellvit_files.read_config({"arch": "CellViTSAM", "config": nested})
    assert made["extract_layers"] == [6, 12, 18, 24] and made["regression_loss"]
    assert made["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert cellvit_files.read_config({"arch": "CellViT256", "config": {}})["extract_layers"] == [
        3,
        6,
        9,
        12,
    ]
    assert cellvit_files.read_config({"arch": "resnet50", "config": {}}) is None
    with pytest.raises(ValueError, match="holds a 'CellViTSAMShared'.*take a checkpoint"):
        cellvit_files.read_config({"arch": "CellViTSAMShared", "config": nested})


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_column_at_every_border_holds_what_the_decoder_reads(model_type):
    model, batch = _model(model_type), _batch()
    forward = _forward(model_type)
    whole = forward(model.params, model.stats, batch)
    assert whole["maps"].shape == (2, 48, 32, 2 + 2 + 3) and whole["tissue"].shape == (2, 5)
    assert whole["skips"].shape == (2, 4, 6, 8)
    border = model.border(frozenset({"maps"}))
    assert border == 5 and model.backbone.module.beside == ("pixel_values",)
    found = model.prefix(model.params, model.stats, batch, 2, 3, border)
    place = column(border, 4)
    out = forward(model.params, model.stats, {place: found[place], **batch})
    oracle.close(out["maps"], np.asarray(whole["maps"]))
    # Each depth is what the layer gave, and none is carried before it is there.
    assert [found[column(k, 4)].shape[1] for k in (2, 3, 5)] == [
        found[column(2, 4)].shape[1] * n for n in (1, 2, 4)
    ]
    first = found[column(2, 4)]
    first = first[:, 1:] if model_type == "cellvit" else first.reshape(2, 6, 8)
    oracle.close(first, np.asarray(whole["skips"][:, 0]))


def test_statistics_of_the_decoder_move_where_it_is_live_alone():
    model, batch = _model("cellvit"), _batch()

    @functools.partial(jax.jit, static_argnames="live")
    def moved(live):
        return model.apply(model.params, model.stats, batch, live=live)[1]

    held = moved(live=frozenset({"tissue"}))
    jax.tree.map(np.testing.assert_array_equal, held, model.stats)
    live = moved(live=frozenset({"maps"}))
    pairs = zip(jax.tree.leaves(live), jax.tree.leaves(model.stats), strict=True)
    assert all(not np.array_equal(a, b) for a, b in pairs)


def test_channels_are_taken_apart():
    values = jnp.arange(9.0).reshape(1, 1, 1, 9)
    maps = cell_maps(values, regression=True)
    assert maps.regression.ravel().tolist() == [2, 3] and maps.hv.ravel().tolist() == [4, 5]
    assert maps.types.ravel().tolist() == [6, 7, 8] and cell_maps(values).regression is None


def test_errors():
    with pytest.raises(ValueError, match=r"extract_layers=\(2, 2, 3, 4\) of 4 layers"):
        cellvit.depths({**TINY, "extract_layers": [2, 2, 3, 4]})
    decoder, skips = CellDecoder(3), jnp.zeros((1, 4, 4, 8))
    with pytest.raises(ValueError, match=r"images are \(32, 40\).*multiples of 16"):
        decoder.apply({}, {"skips": skips}, _batch((32, 40), 1))
    with pytest.raises(ValueError, match="reads out.*'skips'.*attach it to a cellvit"):
        decoder.apply({}, {"tokens": skips}, _batch((32, 32), 1))
    sam = _model("cellvit_sam").backbone
    with pytest.raises(ValueError, match=r"images are \(80, 32\).*up to \(64, 64\)"):
        sam(_batch((80, 32)))
    with pytest.raises(ValueError, match="pooling is 'cls'.*take pooling='mean'"):
        CELLVIT_SAM.make(sam.config, "cls", jnp.float32)


def _peer(model_type):
    """The network in PyTorch under CellViT's names, small, with random weights."""
    import cellvit_peer
    import torch

    peer = cellvit_peer.Net(sam=model_type == "cellvit_sam").eval()
    oracle.randomise(peer, torch.Generator().manual_seed(0), 0.3)
    return peer


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory):
    """The peer, and ours from a file in the form that CellViT publishes."""
    import torch

    peer = _peer(request.param)
    folder = tmp_path_factory.mktemp("cellvit")
    config = load.full_config(
        {"cellvit": CELLVIT, "cellvit_sam": CELLVIT_SAM}[request.param], CONFIGS[request.param]
    )
    state = {"arch": "Net", "epoch": 3, "model_state_dict": peer.state_dict()}
    torch.save({**state, "config": {"data.x": 1}, "run_name": "x"}, folder / "net.pth")
    backbone = load.load_backbone(folder / "net.pth", family=request.param, config=config)
    model = with_heads(folder / "net.pth", backbone, {"maps": "cell_maps", "tissue": "tissue"})
    return peer, model, folder / "net.pth"


@pytest.mark.parity
def test_maps_and_tissues_agree(pair):
    import torch

    peer, model, file = pair
    assert model.backbone.report.fresh == () and model.backbone.family.model_type in CONFIGS
    batch = _batch()
    with torch.no_grad():
        found = peer(oracle.to_torch(batch)["pixel_values"])
    out = jax.jit(lambda: model.apply(model.params, model.stats, batch)[0])()
    oracle.close(out["tissue"], found["tissue"])
    oracle.close(out["maps"], found["maps"].permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="running statistics.*with_heads"):
        load_head(file, model.backbone, "cell_maps")


@pytest.mark.parity
def test_gradients_and_statistics_of_a_step_agree(pair):
    import torch

    peer, model, _ = pair
    batch, live = _batch(), frozenset({"maps"})
    weights = np.random.default_rng(1).normal(size=(2, 48, 32, 7)).astype(np.float32) / 100

    @jax.jit
    def value(params):
        def loss(params):
            out, stats = model.apply(params, model.stats, batch, live=live)
            return jnp.sum(out["maps"] * weights) + jnp.sum(out["tissue"] ** 2), stats

        return jax.grad(loss, has_aux=True)(params)

    gradients, stats = value(model.params)
    before = {name: leaf.clone() for name, leaf in peer.state_dict().items()}
    peer.train()
    found = peer(oracle.to_torch(batch)["pixel_values"])
    maps = found["maps"].permute(0, 2, 3, 1)
    ((maps * torch.tensor(weights)).sum() + (found["tissue"] ** 2).sum()).backward()
    theirs = {name: leaf.grad.numpy() for name, leaf in peer.named_parameters()}
    row, heads = model.backbone.family, gradients["heads"]
    assert _same(gradients["backbone"], row, row.rules, theirs, model) + _same(
        heads["maps"], row, DECODER_RULES, theirs, model
    ) + _same(heads["tissue"], row, (), theirs, model) == len(theirs)
    running = {name: leaf.numpy() for name, leaf in peer.state_dict().items()}
    assert _same(stats["heads"]["maps"], row, DECODER_RULES, running, model, 1e-5) == 70
    peer.eval()
    peer.load_state_dict(before)


def _same(tree, row, rules, found, model, tolerance=1e-4):
    """Compare a tree with PyTorch's arrays, brought to our names; return how many there were."""
    from jtl.weights.checkpoint import Checkpoint, Tensor
    from jtl.weights.load import fill

    names = {name: Tensor(value.shape, value.dtype) for name, value in found.items()}
    checkpoint = Checkpoint("torch", names, found.__getitem__, {}, None)
    checkpoint = row.layout(checkpoint, model.backbone.config)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)
    trees, report = fill({"params": shapes}, checkpoint, rules=rules)
    assert report.fresh == report.wrong_shape == ()
    jax.tree.map(lambda a, b: oracle.close(a, np.asarray(b), tolerance), tree, trees["params"])
    fused = 2 * 4 * 2 if row is CELLVIT and "encoder" in tree else 0  # qkv are one tensor there
    return len(report.loaded) - fused


@pytest.mark.parity
def test_a_file_tells_its_variant(tmp_path):
    import torch

    peer = _peer("cellvit")
    names = {"model.embed_dim": 8, "model.depth": 4, "model.num_heads": 2}
    config = {**names, "model.extract_layers": [1, 2, 3, 4], "data.num_tissue_classes": 5}
    state = {"arch": "CellViT", "config": config, "model_state_dict": peer.state_dict()}
    state["model_state_dict"]["encoder.pos_embed"] = torch.zeros(1, 197, 8)
    torch.save(state, tmp_path / "x.pth")
    for i in range(4):  # this arch has four times the width between
        own = state["model_state_dict"]
        for name in (f"encoder.blocks.{i}.mlp.fc1", f"encoder.blocks.{i}.mlp.fc2"):
            wide = torch.zeros(32, 8) if name.endswith("1") else torch.zeros(8, 32)
            own[f"{name}.weight"] = wide
        own[f"encoder.blocks.{i}.mlp.fc1.bias"] = torch.zeros(32)
    torch.save(state, tmp_path / "x.pth")
    made = load.load_backbone(tmp_path / "x.pth")
    assert made.family is CELLVIT and made.report.fresh == ()
    assert made.module.config.extract_layers == (1, 2, 3, 4)
    assert made.inputs([np.zeros((256, 256, 3), np.uint8)])["pixel_values"].min() == -1.0
    with pytest.raises(ValueError, match="have another shape"):
        with_heads(tmp_path / "x.pth", made, {"maps": "cell_maps"})
