"""OpenFlamingo on LLaMA: its file, what a word reads; parity with a small PyTorch model of it."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict

from jtl.models import load
from jtl.models.families.open_flamingo import OPENFLAMINGO, load_openflamingo
from jtl.models.families.open_flamingo import openflamingo_checkpoint as unite
from jtl.models.families.open_flamingo_names import open_flamingo_names, open_flamingo_sizes
from jtl.models.layers.gated_cross_attention import image_before
from jtl.models.load_head import load_head
from jtl.weights import from_tree

VISION = dict(
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=20,
    image_size=8,
    patch_size=4,
    projection_dim=6,
)
TEXT = dict(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    max_position_embeddings=32,
)
IMAGE, EVERY, HEADS, SIZE = 32, 2, 8, 64  # the heads are those of all published files


def _batch(seed=0):
    """Two images a row, at other places; the first words stand before any image."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 31, (3, 9)).astype(np.int32)
    for row, places in enumerate(((1, 4), (2, 3), (3, 7))):
        ids[row, list(places)] = IMAGE
    mask = np.ones_like(ids)
    mask[0, -2:] = 0
    pixels = rng.normal(size=(3, 2, 8, 8, 3)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def _named(*names):
    return from_tree({name: np.zeros((4, 2), np.float32) for name in names})


def test_names_of_the_file_are_counted_and_halved():
    cross = "lang_encoder.gated_cross_attn_layers"
    file = _named(
        *(
            "perceiver.latents",
            "perceiver.layers.0.0.to_kv.weight",
            "perceiver.layers.1.1.3.weight",
        ),
        *(f"{cross}.3.attn_gate", f"{cross}.7.attn.to_kv.weight", f"{cross}.7.ff.0.bias"),
        "lang_encoder.model.layers.3.gated_cross_attn_layer.attn_gate",
        "lang_encoder.model.embed_tokens.weight",
        "lang_encoder.old_decoder_blocks.0.mlp.up_proj.weight",
    )
    made = open_flamingo_names(file)
    ours, cross = "perceiver_resampler.blocks", "gated_cross_attn_layers"
    assert sorted(made.names) == sorted(
        [
            *("perceiver_resampler.latents", f"{ours}.1.1.c_proj.weight", "embed_tokens.weight"),
            *(f"{ours}.0.0.{part}_proj.weight" for part in "kv"),
            *(f"{cross}.1.cross_attn.{part}_proj.weight" for part in "kv"),
            *(f"{cross}.0.alpha_cross_attn", f"{cross}.1.post_attention_layernorm.bias"),
        ]
    )
    assert len(made.ignored) == 2
    sizes = open_flamingo_sizes(file)
    assert sizes == dict(cross_attn_every_n_layers=4, resampler_n_latents=4, resampler_depth=2)
    assert open_flamingo_names(made).names == made.names


def test_cross_attentions_named_below_their_layers_alone():
    below = _named("module.lang_encoder.model.layers.1.gated_cross_attn_layer.ff_gate")
    assert list(open_flamingo_names(below).names) == ["gated_cross_attn_layers.0.alpha_dense"]
    with pytest.raises(ValueError, match=r"before the layers \[1, 2\], which are not each n-th"):
        open_flamingo_names(
            _named(*(f"lang_encoder.gated_cross_attn_layers.{i}.ff_gate" for i in (1, 2)))
        )
    with pytest.raises(ValueError, match=r"has no 'perceiver'.*begin with \['lang_encoder'\]"):
        open_flamingo_sizes(_named("lang_encoder.gated_cross_attn_layers.1.ff_gate"))


def test_a_language_model_of_another_kind_is_refused():
    config = dict(text_config=dict(TEXT, model_type="mpt"), vision_config=VISION)
    with pytest.raises(ValueError, match="language model of OpenFlamingo is 'mpt'.*MPT is not"):
        load.new_backbone("openflamingo", config, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"lacks \['text_config'\].*load_openflamingo"):
        load.new_backbone("openflamingo", dict(vision_config=VISION), key=jax.random.key(0))
    config = dict(text_config=TEXT, vision_config=VISION, cross_attn_every_n_layers=5)
    with pytest.raises(ValueError, match="is 5 and the decoder has 4 layers"):
        OPENFLAMINGO.make(load.full_config(OPENFLAMINGO, config), "last", jnp.float32)


def test_a_word_reads_the_last_image_before_it():
    sizes = dict(n_heads=2, head_dim=4, resampler_n_latents=2, resampler_depth=1)
    text = dict(TEXT, num_hidden_layers=1)
    config = dict(text_config=text, vision_config=VISION, cross_attn_every_n_layers=1, **sizes)
    config["alpha_initializer"] = "ones"
    made = load.new_backbone("openflamingo", config, key=jax.random.key(0))
    batch = _batch()
    seen = image_before(jnp.asarray(batch["input_ids"]), IMAGE, 2)
    plain, stated = made(batch), made({**batch, "image_attention_mask": seen})
    np.testing.assert_array_equal(plain["tokens"], stated["tokens"])
    changed = {**batch, "pixel_values": batch["pixel_values"].copy()}
    changed["pixel_values"][:, 1] += 1.0
    moved = np.abs(made(changed)["tokens"] - plain["tokens"]).max(axis=-1) > 1e-6
    assert moved.argmax(axis=1).tolist() == [4, 3, 7], "the first word that the second image moves"


def _peer(torch, folder):
    """Save a language model, CLIP and the trained file; return a PyTorch model of the three."""
    import transformers

    nn = torch.nn
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    generator = torch.Generator().manual_seed(0)
    for model, name in ((language, "language"), (clip, "vision")):
        oracle.randomise(model, generator, 0.3)
        model.eval().save_pretrained(folder / name)
    language.resize_token_embeddings(TEXT["vocab_size"] + 3)

    def ff(dim):
        inner = nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
        return nn.Sequential(nn.LayerNorm(dim), *inner)

    def projections(module, dim, width):
        module.to_q = nn.Linear(dim, HEADS * SIZE, bias=False)
        module.to_kv = nn.Linear(width, 2 * HEADS * SIZE, bias=False)
        module.to_out = nn.Linear(HEADS * SIZE, dim, bias=False)
        return module

    def attend(module, words, tokens, allowed=None, gate=1.0):
        key, value = module.to_kv(tokens).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for x in (module.to_q(words), key, value)
        )
        scores = query @ key.transpose(2, 3) * SIZE**-0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], -torch.finfo(scores.dtype).max)
        mixed = (scores.softmax(-1) * gate) @ value
        return module.to_out(mixed.transpose(1, 2).flatten(2))

    def resampler(dim):
        made = nn.Module()
        made.latents, made.norm = nn.Parameter(torch.zeros(3, dim)), nn.LayerNorm(dim)
        layers = []
        for _ in range(2):
            read = projections(nn.Module(), dim, dim)
            read.norm_media, read.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
            layers.append(nn.ModuleList([read, ff(dim)]))
        made.layers = nn.ModuleList(layers)
        return made

    def block(dim, width):
        made = nn.Module()
        made.attn = projections(nn.Module(), dim, width)
        made.attn.norm, made.ff = nn.LayerNorm(dim), ff(dim)
        made.attn_gate, made.ff_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))
        return made

    peer = nn.Module()
    peer.perceiver, peer.lang_encoder = resampler(12), language
    peer.vision_model = getattr(clip, "vision_model", clip)
    crossed = [block(16, 12) if (i + 1) % EVERY == 0 else None for i in range(4)]
    language.gated_cross_attn_layers = nn.ModuleList(crossed)
    oracle.randomise(peer.perceiver, generator, 0.3)
    oracle.randomise(language.gated_cross_attn_layers, generator, 0.3)
    state, kept = types.SimpleNamespace(), ("perceiver", "embed_tokens", "gated_cross")
    trained = {n: x for n, x in peer.state_dict().items() if any(part in n for part in kept)}
    torch.save(trained, folder / "checkpoint.pt")

    def crossing(module):
        def hook(_, args):
            words, attn = args[0], module.attn
            read = attend(attn, attn.norm(words), state.media, state.allowed, state.gate)
            words = words + module.attn_gate.tanh() * read
            return (words + module.ff_gate.tanh() * module.ff(words), *args[1:])

        return hook

    for layer, module in zip(language.model.layers, crossed, strict=True):
        if module is not None:
            layer.register_forward_pre_hook(crossing(module))

    def forward(batch):
        pixels, ids = batch["pixel_values"], batch["input_ids"]
        rows, count = pixels.shape[:2]
        patches = peer.vision_model(pixels.flatten(0, 1)).last_hidden_state[:, 1:]
        latents = peer.perceiver.latents.expand(len(patches), -1, -1)
        for read, mlp in peer.perceiver.layers:
            media, own = read.norm_media(patches), read.norm_latents(latents)
            latents = latents + attend(read, own, torch.cat([media, own], dim=1))
            latents = latents + mlp(latents)
        state.media = peer.perceiver.norm(latents).reshape(rows, -1, latents.shape[-1])
        time = (ids == IMAGE).cumsum(-1)
        owners = 1 + torch.arange(count).repeat_interleave(latents.shape[1])
        state.allowed = time[:, :, None] == owners
        state.gate = (time > 0)[:, None, :, None].float()
        return language(
            input_ids=ids, attention_mask=batch["attention_mask"], output_hidden_states=True
        )

    return peer.eval(), forward


def test_shapes_at_the_published_size():
    """Of OpenFlamingo-9B: LLaMA-7B and CLIP ViT-L/14; the shapes are those of its file."""
    vision = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    vision |= dict(num_hidden_layers=24, patch_size=14, image_size=224)
    config = load.full_config(OPENFLAMINGO, dict(text_config={}, vision_config=vision))
    module = OPENFLAMINGO.make(config, "last", jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), OPENFLAMINGO.example(config))
    flat = {path: leaf.shape for path, leaf in flatten_dict(shapes["params"], sep="/").items()}
    crossed = {path.split("/")[1] for path in flat if path.startswith("gated_cross")}
    assert crossed == {str(i) for i in range(8)}
    cross, resampler = "gated_cross_attn_layers/7", "perceiver_resampler"
    assert flat[f"{cross}/cross_attn/q_proj/kernel"] == (4096, 512)
    assert flat[f"{cross}/cross_attn/k_proj/kernel"] == (1024, 512)
    assert flat[f"{cross}/cross_attn/o_proj/kernel"] == (512, 4096)
    assert flat[f"{cross}/mlp/c_fc/kernel"] == (4096, 16384)
    assert flat[f"{cross}/post_attention_layernorm/bias"] == (4096,)
    assert flat[f"{resampler}/latents"] == (64, 1024)
    assert flat[f"{resampler}/blocks/5/0/q_proj/kernel"] == (1024, 512)
    assert flat["embed_tokens/embedding"] == (32003, 4096)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("openflamingo")
    peer, forward = _peer(torch, folder)
    whole = unite(folder / "checkpoint.pt", language=folder / "language", vision=folder / "vision")
    return peer, forward, folder, whole, load.load_backbone(whole)


@pytest.mark.parity
def test_tokens_and_logits_are_those_of_the_pytorch_model(theirs):
    _, forward, folder, whole, made = theirs
    batch = _batch()
    real = batch["attention_mask"] == 1
    expected = forward(oracle.to_torch(batch))
    out = made(batch)
    oracle.close(out["tokens"][real], expected.hidden_states[-1][torch_mask(real)])
    head, own = load_head(whole, made, "causal_lm")
    assert own["kernel"].shape == (16, 31), "the head is the language model's own"
    logits = np.asarray(head.apply({"params": own}, out, batch))
    oracle.close(logits[real], expected.logits[torch_mask(real)][:, :31])
    again = load_openflamingo(
        folder / "checkpoint.pt", language=folder / "language", vision=folder / "vision"
    )
    np.testing.assert_array_equal(again(batch)["tokens"], out["tokens"])


def torch_mask(mask):
    import torch

    return torch.tensor(mask)


@pytest.mark.parity
def test_gradients_of_every_parameter_are_those_of_the_pytorch_model(theirs):
    import torch

    peer, forward, _, _, made = theirs
    batch = _batch()
    weight = np.random.default_rng(1).normal(size=(3, 9, 16)).astype(np.float32) / 10
    weight *= batch["attention_mask"][:, :, None]

    def loss(params):
        return jnp.sum(made.module.apply({"params": params}, batch)["tokens"] * weight)

    tokens = forward(oracle.to_torch(batch)).hidden_states[-1]
    unread = ("post_layernorm", "lm_head")
    without = {n for n, _ in peer.named_parameters() if any(part in n for part in unread)}
    oracle.same_gradients(made, loss, peer, (tokens * torch.tensor(weight)).sum(), without=without)


def _write_inputs(folder):
    """Write a tokenizer of the language model's 31 words and an image processor of CLIP's."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {**{f"w{i}": i for i in range(30)}, "<unk>": 30}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="w2", model_max_length=16
    )
    made.save_pretrained(folder / "language")
    stated = dict(image_processor_type="CLIPImageProcessor", size=dict(shortest_edge=8))
    stated["crop_size"] = dict(height=8, width=8)
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(stated))


@pytest.mark.parity
def test_inputs_of_both_folders_make_a_batch(theirs):
    _, _, folder, _, _ = theirs
    _write_inputs(folder)
    made = load_openflamingo(
        folder / "checkpoint.pt", language=folder / "language", vision=folder / "vision"
    )
    texts = ["<image> w5 w6 <|endofchunk|>", "w7 <image>"]
    batch = made.inputs(texts=texts, images=[np.zeros((20, 30, 3), np.uint8)] * 2)
    assert batch["input_ids"].tolist() == [[32, 5, 6, 31], [7, 32, 2, 2]]
    assert made(batch)["pooled"].shape == (2, 16)


@pytest.mark.parity
def test_what_a_folder_lacks_is_said(theirs, tmp_path):
    _, _, folder, _, _ = theirs
    with pytest.raises(ValueError, match="language model of OpenFlamingo is 'clip_vision_model'"):
        unite(folder / "checkpoint.pt", language=folder / "vision", vision=folder / "vision")
    with pytest.raises(ValueError, match="give the checkpoint.pt of OpenFlamingo"):
        unite(
            folder / "language" / "model.safetensors",
            language=folder / "language",
            vision=folder / "vision",
        )
