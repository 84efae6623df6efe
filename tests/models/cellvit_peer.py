"""CellViT in PyTorch under the names of its files: small encoders, the decoder, its branches.

Written from the paper and the names; the layers of SAM are transformers'.
"""

import math

import torch
from torch import nn

DIM, BASE, WIDTHS, OUTPUTS = 8, 4, (6, 5, 7), (2, 2, 3)


def _norm(dim):
    return nn.LayerNorm(dim, eps=1e-6)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        n, many, _ = x.shape
        query, key, value = self.qkv(x).reshape(n, many, 3, 2, DIM // 2).permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2) / math.sqrt(DIM // 2)).softmax(-1)
        return self.proj((scores @ value).transpose(1, 2).reshape(n, many, DIM))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, 12), nn.Linear(12, DIM)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = _norm(DIM), Attention(), _norm(DIM), MLP()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patch(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, DIM, 16, 16)

    def forward(self, x):
        return self.proj(x)


class Dino(nn.Module):
    """A ViT whose 2 x 2 positions are stretched as DINO's code does, and its classifier."""

    def __init__(self):
        super().__init__()
        self.patch_embed = Patch()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, DIM))
        self.blocks = nn.ModuleList([Layer() for _ in range(4)])
        self.norm, self.head = _norm(DIM), nn.Linear(DIM, 5)

    def forward(self, images):
        x = self.patch_embed(images)
        rows, columns = x.shape[2:]
        table = self.pos_embed[:, 1:].reshape(1, 2, 2, DIM).permute(0, 3, 1, 2)
        factors = ((rows + 0.1) / 2, (columns + 0.1) / 2)
        table = nn.functional.interpolate(table, scale_factor=factors, mode="bicubic")
        x = (x + table).flatten(2).transpose(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1)
        depths = []
        for block in self.blocks:
            x = block(x)
            depths.append(x[:, 1:].transpose(1, 2).reshape(len(x), DIM, rows, columns))
        return self.head(self.norm(x)[:, 0]), depths


class Sam(nn.Module):
    """SAM's encoder with 4 x 4 positions, of which images read the first ones."""

    def __init__(self):
        super().__init__()
        from transformers import SamVisionConfig
        from transformers.models.sam.modeling_sam import SamVisionLayer

        config = SamVisionConfig(
            hidden_size=DIM, num_attention_heads=2, mlp_dim=12, image_size=64, patch_size=16
        )
        config._attn_implementation = "eager"
        self.patch_embed = Patch()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 4, DIM))
        self.blocks = nn.ModuleList([SamVisionLayer(config, w) for w in (2, 0, 2, 0)])
        first, second = nn.Conv2d(DIM, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.neck = nn.ModuleList([first, _norm(4), second, _norm(4)])
        for block in self.blocks:
            block.norm1, block.norm2 = block.layer_norm1, block.layer_norm2
            del block.layer_norm1, block.layer_norm2
            block.forward = _sam_layer(block)

    def forward(self, images):
        x = self.patch_embed(images).permute(0, 2, 3, 1)
        x = x + self.pos_embed[:, : x.shape[1], : x.shape[2]]
        depths = []
        for block in self.blocks:
            x = block(x)
            depths.append(x.permute(0, 3, 1, 2))
        for conv, norm in (self.neck[:2], self.neck[2:]):
            x = norm(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x.mean((1, 2)), depths


def _sam_layer(block):
    def forward(x):
        inner, size = block.norm1(x), block.window_size
        height, width = x.shape[1:3]
        if size:
            inner, padded = block.window_partition(inner, size)
        inner = block.attn(hidden_states=inner)[0]
        if size:
            inner = block.window_unpartition(inner, size, padded, (height, width))
        x = x + inner
        return x + block.mlp(block.norm2(x))

    return forward


class Block(nn.Module):
    def __init__(self, before, after, up=False):
        super().__init__()
        parts = [nn.ConvTranspose2d(before, after, 2, 2)] if up else []
        conv = nn.Conv2d(after if up else before, after, 3, padding=1)
        self.block = nn.Sequential(*parts, conv, nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x):
        return self.block(x)


def _chain(widths, up=False):
    pairs = zip(widths, widths[1:], strict=False)
    return [Block(before, after, up) for before, after in pairs]


def _branch(outputs):
    b, last = BASE, WIDTHS[2]
    branch = nn.Module()
    branch.bottleneck_upsampler = nn.ConvTranspose2d(DIM, last, 2, 2)
    branch.decoder3_upsampler = nn.Sequential(
        *_chain([2 * last, last, last, last]), nn.ConvTranspose2d(last, 4 * b, 2, 2)
    )
    branch.decoder2_upsampler = nn.Sequential(
        *_chain([8 * b, 4 * b, 4 * b]), nn.ConvTranspose2d(4 * b, 2 * b, 2, 2)
    )
    branch.decoder1_upsampler = nn.Sequential(
        *_chain([4 * b, 2 * b, 2 * b]), nn.ConvTranspose2d(2 * b, b, 2, 2)
    )
    branch.decoder0_header = nn.Sequential(*_chain([2 * b, b, b]), nn.Conv2d(b, outputs, 1))
    return branch


class Net(nn.Module):
    def __init__(self, sam):
        super().__init__()
        self.encoder = Sam() if sam else Dino()
        first, second, last = WIDTHS
        self.decoder0 = nn.Sequential(*_chain([3, BASE // 2, BASE]))
        self.decoder1 = nn.Sequential(*_chain([DIM, first, second, 2 * BASE], up=True))
        self.decoder2 = nn.Sequential(*_chain([DIM, first, 4 * BASE], up=True))
        self.decoder3 = nn.Sequential(*_chain([DIM, last], up=True))
        self.nuclei_binary_map_decoder, self.hv_map_decoder, self.nuclei_type_maps_decoder = (
            _branch(outputs) for outputs in OUTPUTS
        )
        if sam:
            self.classifier_head = nn.Linear(4, 5)

    def forward(self, images):
        tissue, (z1, z2, z3, z4) = self.encoder(images)
        if hasattr(self, "classifier_head"):
            tissue = self.classifier_head(tissue)
        maps = []
        branches = (
            self.nuclei_binary_map_decoder,
            self.hv_map_decoder,
            self.nuclei_type_maps_decoder,
        )
        for branch in branches:  # what they share runs for each of them, as in CellViT
            x = branch.bottleneck_upsampler(z4)
            x = branch.decoder3_upsampler(torch.cat([self.decoder3(z3), x], 1))
            x = branch.decoder2_upsampler(torch.cat([self.decoder2(z2), x], 1))
            x = branch.decoder1_upsampler(torch.cat([self.decoder1(z1), x], 1))
            maps.append(branch.decoder0_header(torch.cat([self.decoder0(images), x], 1)))
        return {"tissue": tissue, "maps": torch.cat(maps, 1)}
