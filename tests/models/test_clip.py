"""CLIP: values by hand, one side alone, open_clip's files; parity with transformers' PyTorch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from family_cases import backbone, batch_of
from flax.traverse_util import flatten_dict

from jtl.data.images import image_inputs
from jtl.data.pairs import PairInputs
from jtl.losses import contrastive as losses
from jtl.models import export, load, zero_shot
from jtl.models.families import open_clip
from jtl.models.families.clip import CLIP, CLIP_VISION
from jtl.models.heads import Contrastive, Linear
from jtl.models.inputs import MissingInputs
from jtl.models.load_head import load_head
from jtl.models.model import attach
from jtl.weights.files import Checkpoint, Tensor
from jtl.weights.rename import torch_name

VISION = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=10,
    patch_size=4,
    projection_dim=8,
)
TEXT = dict(
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    vocab_size=31,
    max_position_embeddings=9,
    eos_token_id=30,
    hidden_act="gelu",
    projection_dim=8,
)
BOTH = dict(vision_config=VISION, text_config=TEXT, projection_dim=8)


def _batch(rows=3, length=7, side=10, seed=0):
    """Texts of unequal lengths: each ends with 30 and is padded with 1 from there."""
    rng = np.random.default_rng(seed)
    ids, mask = np.full((rows, length), 1, np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        end = length - 1 - row
        ids[row, :end] = rng.integers(3, 29, end)
        ids[row, end], mask[row, : end + 1] = 30, 1
    images = rng.normal(size=(rows, side, side, 3)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": images}


@pytest.fixture(scope="module")
def pair():
    return load.new_backbone("clip", BOTH, key=jax.random.key(0))


def test_blocks_are_aligned_from_the_top(pair):
    assert pair.labels == ("stem", "block_0", "block_1", "block_2", "top")
    labels = dict(pair.groups)
    assert labels["vision_model/encoder/layers/2/.*"] == "block_2"
    assert labels["text_model/encoder/layers/1/.*"] == "block_2"
    assert labels["text_model/encoder/layers/0/.*"] == "block_1"


def test_one_side_alone_gives_what_both_give(pair):
    batch = _batch()
    both = pair(batch)
    images = pair({"pixel_values": batch["pixel_values"]})
    texts = pair({name: batch[name] for name in ("input_ids", "attention_mask")})
    np.testing.assert_allclose(images["image_embeds"], both["image_embeds"], atol=1e-6)
    np.testing.assert_allclose(texts["text_embeds"], both["text_embeds"], atol=1e-6)
    assert "text_embeds" not in images and "image_embeds" not in texts
    np.testing.assert_array_equal(images["pooled"], images["image_embeds"])
    np.testing.assert_array_equal(texts["pooled"], texts["text_embeds"])
    assert images["tokens"].shape == (3, 5, 16) and texts["tokens"].shape == (3, 7, 12)


def test_what_stands_behind_the_end_of_a_text_is_not_read(pair):
    batch = _batch()
    texts = {name: jnp.asarray(batch[name]) for name in ("input_ids", "attention_mask")}
    other = {**texts, "input_ids": jnp.where(texts["attention_mask"] == 1, texts["input_ids"], 5)}
    np.testing.assert_array_equal(pair(texts)["text_embeds"], pair(other)["text_embeds"])
    np.testing.assert_allclose(
        pair({"input_ids": texts["input_ids"]})["text_embeds"],
        pair(texts)["text_embeds"],
        atol=1e-6,
    )


def test_bad_pairs_are_named(pair):
    batch = _batch()
    with pytest.raises(ValueError, match=r"'pixel_values': 3, 'input_ids': 2.*as many of one"):
        pair({**batch, "input_ids": batch["input_ids"][:2]})
    with pytest.raises(ValueError, match=r"columns \['labels'\].*\{\}"):
        pair({"labels": np.zeros(3)})
    with pytest.raises(ValueError, match=r"images are \(12, 12\)"):
        pair(_batch(side=12))
    head = Contrastive()
    with pytest.raises(ValueError, match=r"needs \['text_embeds'\].*images and texts"):
        head.apply({}, pair({"pixel_values": batch["pixel_values"]}), {})


def test_scores_by_hand():
    out = {
        "image_embeds": jnp.array([[3.0, 4.0], [0.0, 2.0]]),
        "text_embeds": jnp.array([[1.0, 0.0], [0.0, 5.0], [-1.0, 0.0]]),
        "logit_scale": jnp.log(10.0),
    }
    scores = Contrastive().apply({}, out, {})
    np.testing.assert_allclose(scores, [[6.0, 8.0, -6.0], [0.0, 10.0, 0.0]], atol=1e-5)
    biased = Contrastive().apply({}, {**out, "logit_bias": jnp.array([-2.0])}, {})
    np.testing.assert_allclose(biased, scores - 2.0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vision_config={**VISION, "patch_size": [4, 2]}), r"patch_size .* is \[4, 2\]"),
        (dict(vision_config={**VISION, "patch_size": 16}), r"image_size=\(10, 10\) has no patch"),
        (dict(text_config={**TEXT, "hidden_act": "gleu"}), "activation 'gleu' is not known"),
        (dict(text_config={**TEXT, "num_attention_heads": 5}), "=5 does not divide hidden_size=12"),
        (dict(text_config={"vocab_size": 3}), r"text tower lacks \['hidden_size'"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        CLIP.make({**BOTH, **changes}, "image", jnp.float32)


def test_the_older_text_config_dict_stands_over():
    older = {**BOTH, "text_config_dict": {"eos_token_id": 2}, "vision_config_dict": None}
    assert CLIP.make(older, "image").text.eos_token_id == 2
    assert CLIP.make(BOTH, "image").text.eos_token_id == 30


def _folder(folder, made):
    export.export(folder, attach(made, {"x": Linear(2)}, key=jax.random.key(0)))
    return folder


def test_images_of_another_size_and_other_channels(pair, tmp_path):
    inputs = PairInputs(MissingInputs("text", ""), image_inputs(10, mean=(0.1, 0.2, 0.3)))
    folder = _folder(tmp_path / "x", dataclasses.replace(pair, inputs=inputs))
    wide = load.load_backbone(folder, image_size=(8, 13), channels=1)
    assert wide.config["vision_config"]["image_size"] == [8, 13]
    assert wide.inputs.images.size == (8, 13) and wide.inputs.images.channels == 1
    grey = wide.inputs(images=[np.full((9, 9, 3), 100, np.uint8)])
    assert wide(grey)["tokens"].shape == (1, 1 + 2 * 3, 16)
    again = load.load_backbone(_folder(tmp_path / "y", wide))
    np.testing.assert_array_equal(again(grey)["pooled"], wide(grey)["pooled"])
    # What stands over the config of the tower is brought into it.
    older = {**wide.config, "vision_config_dict": VISION, "vision_config": {}}
    _, stated = CLIP.resize(pair.params, older, (12, 12))
    assert stated["vision_config"]["image_size"] == 12 and CLIP.make(stated, "image")
    tower = load.load_backbone(folder, family="clip_vision_model", channels=4, new_channels="zeros")
    images = _batch()["pixel_values"]
    four = np.concatenate([images, images[..., :1]], axis=-1)
    got, old = tower({"pixel_values": four}), pair({"pixel_values": images})
    np.testing.assert_allclose(got["tokens"], old["tokens"], atol=1e-5)


def test_a_tower_projects_to_as_many_numbers_as_the_pair(tmp_path):
    narrow = {**VISION, "projection_dim": 5}
    config = {**BOTH, "vision_config": narrow, "text_config": {**TEXT, "projection_dim": 6}}
    whole = load.new_backbone("clip", config, key=jax.random.key(0))
    folder, batch = _folder(tmp_path / "x", whole), _batch()
    out = whole(batch)
    for side in ("vision", "text"):
        family = f"clip_{side}_model"
        tower = load.load_backbone(folder, family=family, pooling="projection")
        embeds = out["image_embeds" if side == "vision" else "text_embeds"]
        np.testing.assert_allclose(tower(batch)["pooled"], embeds, atol=1e-6)
        assert tower.dim == 8
        again = load.load_backbone(_folder(tmp_path / side, tower))  # a tower's own file
        np.testing.assert_allclose(again(batch)["pooled"], embeds, atol=1e-6)
    # Of a pair that says nothing the space is as wide as transformers has it; LLaVA's is its own.
    stated = {"model_type": "clip", "vision_config": narrow}
    assert CLIP_VISION.part_config(stated)["projection_dim"] == 512
    assert CLIP_VISION.part_config({**stated, "model_type": "llava"})["projection_dim"] == 5


class _Words:
    """A tokenizer of whole words: "a" is 3, "b" is 4; each text ends with 30."""

    def __call__(self, *, texts):
        length = max(len(text.split()) for text in texts) + 1
        rows = [[*(ord(word) - 94 for word in text.split()), 30] for text in texts]
        return {"input_ids": np.asarray([row + [1] * (length - len(row)) for row in rows])}


def test_text_vectors_are_means_of_units(pair):
    made = dataclasses.replace(pair, inputs=_Words())
    found = zero_shot.text_vectors(made, ["a", "b"], ["{} c", "d {}"])
    assert found.shape == (2, 8)
    expected = []
    for name in ("a", "b"):
        rows = made(_Words()(texts=[f"{name} c", f"d {name}"]))["text_embeds"]
        mean = (rows / jnp.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
        expected.append(mean / jnp.linalg.norm(mean))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"templates are \['photo'\].*\{\}"):
        zero_shot.text_vectors(made, ["a"], ["photo"])


# Of the file of a checkpoint of open_clip, by its names and shapes alone.
def _open_clip_names(config):
    vision, text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
    embed = config["model_cfg"]["embed_dim"]
    wide, narrow = vision["width"], text["width"]
    positions = 1 + (vision["image_size"] // vision["patch_size"]) ** 2
    shapes = {
        "logit_scale": (),
        "positional_embedding": (text["context_length"], narrow),
        "text_projection": (narrow, embed),
        "token_embedding.weight": (text["vocab_size"], narrow),
        "ln_final.weight": (narrow,),
        "ln_final.bias": (narrow,),
        "visual.class_embedding": (wide,),
        "visual.positional_embedding": (positions, wide),
        "visual.proj": (wide, embed),
        "visual.conv1.weight": (wide, 3, vision["patch_size"], vision["patch_size"]),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{name}.weight": (wide,), f"visual.{name}.bias": (wide,)}
    for prefix, tower in (("visual.", vision), ("", text)):
        for i in range(tower["layers"]):
            at, width = f"{prefix}transformer.resblocks.{i}.", tower["width"]
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{at}{name}.weight": (width,), f"{at}{name}.bias": (width,)}
            shapes[f"{at}attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{at}attn.in_proj_bias"] = (3 * width,)
            shapes |= {f"{at}attn.out_proj.weight": (width, width)}
            shapes |= {f"{at}attn.out_proj.bias": (width,)}
            shapes |= {f"{at}mlp.c_fc.weight": (4 * width, width)}
            shapes |= {f"{at}mlp.c_fc.bias": (4 * width,)}
            shapes |= {f"{at}mlp.c_proj.weight": (width, 4 * width)}
            shapes |= {f"{at}mlp.c_proj.bias": (width,)}
    return shapes


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": dict(image_size=8, layers=1, width=16, patch_size=4, head_width=8),
        "text_cfg": dict(context_length=9, vocab_size=31, width=12, heads=2, layers=2),
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    rng = np.random.default_rng(0)
    tensors = {
        name: np.asarray(rng.normal(size=shape), np.float32)
        for name, shape in _open_clip_names(OPEN_CLIP).items()
    }
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    return folder, tensors


def test_open_clips_file_becomes_clip(open_clip_folder):
    folder, stored = open_clip_folder
    made = load.load_backbone(folder)
    assert made.family.model_type == "clip" and made.report.fresh == made.report.unexpected == ()
    layer = made.params["text_model"]["encoder"]["layers"]["1"]
    fused = stored["transformer.resblocks.1.attn.in_proj_weight"]
    for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
        kernel = layer["self_attn"][part]["kernel"]
        np.testing.assert_array_equal(kernel, fused[12 * i : 12 * (i + 1)].T)
    np.testing.assert_array_equal(made.params["visual_projection"]["kernel"], stored["visual.proj"])
    conv = made.params["vision_model"]["embeddings"]["patch_embedding"]["kernel"]
    np.testing.assert_array_equal(conv[1, 2, 0], stored["visual.conv1.weight"][:, 0, 1, 2])
    image = np.full((8, 8, 3), 255, np.uint8)
    pixels = made.inputs(images=[image])["pixel_values"]
    np.testing.assert_allclose(pixels, np.full((1, 8, 8, 3), 2.0), atol=1e-6)  # (1 - 0.5) / 0.25
    tower = load.load_backbone(folder, family="clip_vision_model", pooling="projection")
    np.testing.assert_allclose(
        tower({"pixel_values": pixels})["pooled"], made({"pixel_values": pixels})["image_embeds"]
    )
    assert tower.dim == 8 and tower.inputs.size == (8, 8)


def test_names_of_bioclip_are_all_read():
    """BioCLIP is open_clip's ViT-B/16."""
    vision = dict(image_size=224, layers=12, width=768, patch_size=16)
    text = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12)
    stated = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}}
    shapes = _open_clip_names(stated)
    config = load.full_config(CLIP, open_clip.read_config(stated))
    names = {name: Tensor(shape, np.dtype("float32")) for name, shape in shapes.items()}
    zeros = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
    checkpoint = Checkpoint("torch", names, zeros.__getitem__, stated, None)  # type: ignore
    assert len(shapes) == 302  # as many tensors as the published file has
    module = CLIP.make(config, "image", jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), CLIP.example(config))["params"]
    wanted = {torch_name(path, CLIP.rules)[0] for path in flatten_dict(tree, sep="/")}
    assert wanted == set(open_clip.layout(checkpoint, config).names)
    assert config["vision_config"]["hidden_act"] == "gelu"


@pytest.mark.parametrize(
    ("tower", "field", "value"),
    [
        ("vision_cfg", "timm_model_name", "vit_x"),
        ("vision_cfg", "pool_type", "avg"),
        ("text_cfg", "hf_model_name", "bert"),
        ("text_cfg", "pool_type", "last"),
    ],
)
def test_other_towers_of_open_clip_are_refused(tower, field, value):
    stated = {**OPEN_CLIP["model_cfg"]}
    stated[tower] = {**stated[tower], field: value}
    with pytest.raises(ValueError, match=f"{tower} of the open_clip config has .*{field}"):
        open_clip.read_config({"model_cfg": stated})
    assert open_clip.read_config({"architecture": "vit_base"}) is None


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return oracle.peer("CLIPModel", folder, **BOTH), folder, load.load_backbone(folder)


@pytest.mark.parity
def test_every_stage_is_that_of_transformers(theirs):
    peer, folder, made = theirs
    batch = _batch()
    expected = peer(**oracle.to_torch(batch), output_hidden_states=True)
    out = made(batch)
    vision, text = expected.vision_model_output, expected.text_model_output
    oracle.close(out["tokens"], vision.last_hidden_state)
    oracle.close(out["text_tokens"], text.last_hidden_state)
    oracle.close(out["image_embeds"], vision.pooler_output)  # behind the projection, in the pair
    oracle.close(out["text_embeds"], text.pooler_output)
    apply = jax.jit(made.module.apply, static_argnums=(2, 3))
    hidden = [apply({"params": made.params}, batch, frozenset(), stop) for stop in range(1, 5)]
    for stop, got in enumerate(hidden):
        oracle.close(got[:, :5], vision.hidden_states[stop])
        if stop:  # the text's two layers are in the last two blocks
            oracle.close(got[:, 5:, :12], text.hidden_states[stop - 1])


@pytest.mark.parity
@pytest.mark.parametrize("size", [(24, 24), (8, 22)])
def test_another_size_is_that_of_transformers(theirs, size):
    peer, folder, _ = theirs
    images = np.random.default_rng(2).normal(size=(2, *size, 3)).astype(np.float32)
    batch = {"pixel_values": images}
    given = oracle.to_torch(batch)
    made = load.load_backbone(folder, image_size=size)
    expected = peer.vision_model(**given, interpolate_pos_encoding=True)
    oracle.close(made(batch)["tokens"], expected.last_hidden_state)
    tower = load.load_backbone(folder, family="clip_vision_model", image_size=size)
    oracle.close(tower(batch)["pooled"], expected.pooler_output)


@pytest.mark.parity
def test_scores_and_loss_are_those_of_transformers(theirs):
    peer, folder, made = theirs
    batch = _batch()
    head, own = load_head(folder, made, "contrastive")
    scores = head.apply({"params": own}, made(batch), batch)
    expected = peer(**oracle.to_torch(batch), return_loss=True)
    oracle.close(scores, expected.logits_per_image)
    total, weight = losses.contrastive(scores)
    oracle.close(total / weight, expected.loss)


@pytest.mark.parity
def test_gradients_of_every_parameter_are_those_of_transformers(theirs):
    import torch

    peer, _, made = theirs
    batch = _batch()
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=(3, 8)).astype(np.float32) / 10 for _ in range(2)]
    head = Contrastive()

    def loss(params):
        out = made.module.apply({"params": params}, batch)
        total, weight = losses.contrastive(head.apply({}, out, batch))
        sides = zip((out["image_embeds"], out["text_embeds"]), weights, strict=True)
        return total / weight + sum(jnp.sum(x * w) for x, w in sides)

    expected = peer(**oracle.to_torch(batch), return_loss=True)
    image, text = (
        expected.vision_model_output.pooler_output,
        expected.text_model_output.pooler_output,
    )
    total = expected.loss + (image * torch.tensor(weights[0])).sum()
    oracle.same_gradients(made, loss, peer, total + (text * torch.tensor(weights[1])).sum())


@pytest.mark.parity
def test_the_first_configs_end_a_text_at_its_largest_token(tmp_path):
    old = {**BOTH, "text_config": {**TEXT, "eos_token_id": 2}}
    peer = oracle.peer("CLIPModel", tmp_path, **old)
    batch = _batch(4, 6)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = peer.text_projection(peer.text_model(**oracle.to_torch(texts)).pooler_output)
    oracle.close(load.load_backbone(tmp_path)(texts)["text_embeds"], expected)


@pytest.mark.parity
@pytest.mark.parametrize("projected", [True, False])
def test_towers_alone_are_those_of_transformers(theirs, tmp_path, projected):
    import transformers

    peer, folder, _ = theirs
    kind = "WithProjection" if projected else ""
    pooling = "projection" if projected else "pooler"
    batch = _batch()
    for side, columns in (("Vision", ("pixel_values",)), ("Text", ("input_ids", "attention_mask"))):
        own = {name: batch[name] for name in columns}
        model_type = f"clip_{side.lower()}_model"
        tower = getattr(transformers, f"CLIP{side}Model{kind}").from_pretrained(folder).eval()
        expected = tower(**oracle.to_torch(own))
        embeds = "image_embeds" if side == "Vision" else "text_embeds"
        expected = expected[embeds] if projected else expected.pooler_output
        part = load.load_backbone(folder, family=model_type, pooling=pooling)
        oracle.close(part(own)["pooled"], expected)
        assert part.dim == expected.shape[1]
        tower.save_pretrained(tmp_path / side)  # a tower's own file has other names
        oracle.close(load.load_backbone(tmp_path / side, pooling=pooling)(own)["pooled"], expected)


@pytest.mark.parity
def test_transformers_opens_what_is_exported(theirs, tmp_path):
    import transformers

    peer, _, made = theirs
    batch = _batch()
    model = attach(made, {"pairs": Contrastive()}, key=jax.random.key(0))
    export.export(tmp_path / "pair", model)
    opened = transformers.CLIPModel.from_pretrained(tmp_path / "pair")
    expected = peer(**oracle.to_torch(batch)).logits_per_image
    oracle.close(opened(**oracle.to_torch(batch)).logits_per_image.detach().numpy(), expected, 1e-6)
    again = export.import_model(tmp_path / "pair")
    out, _ = again.apply(again.params, again.stats, batch)
    oracle.close(out["pairs"], expected)
    tower = load.load_backbone(theirs[1], family="clip_vision_model")
    export.export(tmp_path / "tower", attach(tower, {"x": Linear(2)}, key=jax.random.key(0)))
    alone = transformers.CLIPVisionModel.from_pretrained(tmp_path / "tower").eval()
    own = {"pixel_values": batch["pixel_values"]}
    oracle.close(tower(own)["pooled"], alone(**oracle.to_torch(own)).pooler_output)


@pytest.mark.parity
def test_bfloat16_is_near(theirs):
    _, folder, made = theirs
    half = load.load_backbone(folder, dtype=jnp.bfloat16)(_batch())
    for name in ("image_embeds", "text_embeds"):
        exact = np.asarray(made(_batch())[name])
        near = np.asarray(half[name], np.float32)
        assert half[name].dtype == jnp.bfloat16
        assert np.abs(near - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parity
def test_names_and_shapes_are_those_of_the_published_models():
    base = dict(projection_dim=512)
    assert oracle.names_agree("CLIPModel", "clip", **base) == 398
    large = dict(
        projection_dim=768,
        text_config=dict(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
        ),
        vision_config=dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_attention_heads=16,
            num_hidden_layers=24,
            patch_size=14,
            projection_dim=768,
        ),
    )
    assert oracle.names_agree("CLIPModel", "clip", **large) == 590
    vision = large["vision_config"]
    assert oracle.names_agree("CLIPVisionModel", "clip_vision_model", **vision) == 391
    kind = "CLIPVisionModelWithProjection"
    assert oracle.names_agree(kind, "clip_vision_model", "projection", **vision) == 392
    assert CLIP_VISION.part == "vision_config"
    assert backbone("clip").family is CLIP and batch_of(backbone("clip"))
