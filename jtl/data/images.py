"""Images to pixel arrays by the processor that the weights were trained with, channels last."""

import copy
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ImageInputs:
    """An image processor: resize, crop, rescale and normalise as the weights were trained with.

    Attributes:
        processor: of transformers, on Pillow; its fields say what it does.
        size: (height, width) of its output.
        channels: 3, or 1 for grey images.
    """

    processor: Any
    size: tuple[int, int]
    channels: int = 3

    def __call__(self, images: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
        """Return {"pixel_values": (n, height, width, channels) float32}.

        Args:
            images: uint8 arrays (height, width, channels) or (height, width), encoded bytes,
                paths or PIL images, of any sizes.

        Raises:
            ValueError: there is no image, or one cannot be read.
        """
        if isinstance(images, str | bytes | Path) or not len(images):
            raise ValueError(
                f"images are {type(images).__name__} of length "
                f"{0 if isinstance(images, Path) else len(images)}; give a list of at least one"
            )
        own = (*self.size, self.channels)
        if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == own:
            levels = self.levels
            if levels is not None:
                parts = [np.take(levels[c], images[..., c]) for c in range(self.channels)]
                return {"pixel_values": np.stack(parts, axis=-1)}
        return self._processed(images)

    @functools.cached_property
    def levels(self) -> np.ndarray | None:
        """What a byte becomes in an image of the model's own size: (channels, 256) float32.

        None where the processor does more to such an image than to look at each byte alone: then
        a stack of them takes the long way, one by one. It is tried with a random image.
        """
        own, levels = (*self.size, self.channels), np.arange(256, dtype=np.uint8)
        pixels = self.size[0] * self.size[1]
        count = -(-256 // pixels)
        ramp = np.resize(levels, count * pixels)
        images = np.repeat(ramp.reshape(count, *self.size, 1), self.channels, axis=-1)
        made = self._processed(list(images))["pixel_values"].reshape(-1, self.channels)
        table = np.ascontiguousarray(made[:256].T)
        noise = np.random.default_rng(0).integers(0, 256, own, np.uint8)
        wanted = self._processed([noise])["pixel_values"][0]
        parts = [table[c][noise[..., c]] for c in range(self.channels)]
        return table if np.array_equal(np.stack(parts, axis=-1), wanted) else None

    def _processed(self, images: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
        mode = {1: "L", 3: "RGB"}[self.channels]
        opened = [_opened(image).convert(mode) for image in images]
        if self.channels == 1:  # Pillow's "L" has no axis for its one channel
            opened = [np.asarray(image)[..., None] for image in opened]
        options = {"input_data_format": "channels_last"} if self.channels == 1 else {}
        made = self.processor(opened, return_tensors="np", **options)
        # The processor of IDEFICS gives the pixels alone.
        pixels = made["pixel_values"] if isinstance(made, Mapping) else np.asarray(made)
        return {"pixel_values": np.ascontiguousarray(np.moveaxis(pixels, 1, -1), np.float32)}

    def save(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`."""
        self.processor.save_pretrained(str(folder))


def load_image_inputs(folder: str | Path, config: Mapping[str, Any]) -> ImageInputs:
    """Return the image processor of a checkpoint folder.

    Args:
        folder: a local folder with `preprocessor_config.json`.
        config: the dict of `config.json`; its `num_channels` says grey or colour.

    Raises:
        ValueError: the folder has no such file, it is damaged, or the model is of other channels.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            str(folder), local_files_only=True, backend="pil"
        )
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the image processor of {str(folder)!r} cannot be loaded "
            f"({type(error).__name__}: {reason}); put preprocessor_config.json of the original "
            "checkpoint there, or state the preprocessing by data.image_inputs(size, mean=, std=)"
        ) from error
    return _made(processor, int(config.get("num_channels", 3)), f"the checkpoint {str(folder)!r}")


def image_inputs(
    size: int | tuple[int, int],
    *,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> ImageInputs:
    """Return a stated preprocessing: resize to `size` (bilinear), then (x / 255 - mean) / std.

    For weights without a file that says it, and for training from scratch.

    Args:
        size: (height, width), or one number for a square; the aspect ratio is not kept.
        mean: of each channel, on the scale of 0 to 1; their number is that of the channels.
        std: of each channel.

    Raises:
        ValueError: the channels are neither 1 nor 3, or `std` has another number of them.

    >>> white = np.full((4, 4, 3), 255, np.uint8)
    >>> image_inputs(2)([white])["pixel_values"].shape
    (1, 2, 2, 3)
    """
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    if len(mean) != len(std):
        raise ValueError(
            f"mean has {len(mean)} channels and std has {len(std)}; "
            "give one number of each for every channel"
        )
    height, width = (size, size) if isinstance(size, int) else size
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=list(mean), image_std=list(std)
    )
    return _made(processor, len(mean), "image_inputs")


def timm_inputs(config: Mapping[str, Any]) -> ImageInputs:
    """Return the preprocessing of a checkpoint of timm, as it evaluates: resize, crop, normalise.

    The shorter side is made as long as the crop divided by `crop_pct`.

    Args:
        config: the `pretrained_cfg` of its `config.json`; timm's defaults stand for what it lacks.

    Raises:
        ValueError: it states another way to crop, or an interpolation that is not known.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    channels, height, width = config.get("input_size") or (3, 224, 224)
    filters = {"bilinear": 2, "bicubic": 3, "lanczos": 1}
    filter_name, mode = config.get("interpolation", "bicubic"), config.get("crop_mode", "center")
    if filter_name not in filters or mode != "center" or height != width:
        raise ValueError(
            f"the checkpoint of timm states interpolation {filter_name!r}, crop_mode {mode!r} and "
            f"images of {height} x {width}; read are {sorted(filters)}, 'center' and squares; "
            "state the preprocessing by data.image_inputs(size, mean=, std=)"
        )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": int(height / (config.get("crop_pct") or 0.875))},
        crop_size={"height": height, "width": width},
        resample=filters[filter_name],
        image_mean=list(config.get("mean") or (0.485, 0.456, 0.406)),
        image_std=list(config.get("std") or (0.229, 0.224, 0.225)),
        do_convert_rgb=channels == 3,
    )
    return _made(processor, channels, "the checkpoint of timm")


def resized(inputs: ImageInputs, size: tuple[int, int], channels: int) -> ImageInputs:
    """Return the same preprocessing for images of another size, or for grey ones.

    What is resized before a crop grows with it. One channel has the mean of the means, and of the
    deviations, of three.

    Args:
        inputs: of a checkpoint.
        size: (height, width) of what comes out.
        channels: 1 or 3.

    Raises:
        ValueError: the processor does not come to that size.

    >>> resized(image_inputs(4), (6, 8), 3).size
    (6, 8)
    """
    processor = copy.deepcopy(inputs.processor)
    ratio = min(size) / min(inputs.size)
    height, width = size
    if getattr(processor, "do_center_crop", False):
        processor.crop_size = {"height": height, "width": width}
        old = dict(processor.size)
        processor.size = {name: round(old[name] * ratio) for name in old if old[name]}
    elif "shortest_edge" in dict(processor.size):
        processor.size = {"shortest_edge": round(processor.size["shortest_edge"] * ratio)}
    else:
        processor.size = {"height": height, "width": width}
    for name in ("image_mean", "image_std") if channels != inputs.channels else ():
        values = getattr(processor, name)
        setattr(processor, name, [sum(values) / len(values)] * channels)
    if channels != inputs.channels and getattr(processor, "do_convert_rgb", False):
        processor.do_convert_rgb = channels == 3
    made = _made(processor, channels, f"the resized {type(processor).__name__}")
    if made.size != size:
        raise ValueError(
            f"the image processor {type(processor).__name__} makes images of {made.size} where "
            f"{size} is wanted; state the preprocessing by data.image_inputs(size, mean=, std=)"
        )
    return made


def _made(processor: Any, channels: int, name: str) -> ImageInputs:
    if channels not in (1, 3):
        raise ValueError(
            f"{name} is for images of {channels} channels; files hold 1 (grey) or 3 (colour); "
            "make the batches by hand"
        )
    inputs = ImageInputs(processor, (0, 0), channels)
    try:  # crop_pct, shortest edges and crops make the size; what comes out says it
        shape = inputs([np.zeros((64, 48, 3), np.uint8)])["pixel_values"].shape
    except Exception as error:
        raise ValueError(
            f"the image processor of {name}, {type(processor).__name__}, fails on an image of "
            f"{channels} channels ({error}); correct image_mean and image_std, or num_channels"
        ) from error
    return dataclasses.replace(inputs, size=shape[1:3])


def _opened(image: Any) -> Any:
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path | bytes):
        name = f"{len(image)} bytes" if isinstance(image, bytes) else repr(str(image))
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return ImageOps.exif_transpose(opened)  # transpose loads, the file can be closed
        except Exception as error:
            raise ValueError(
                f"the image of {name} cannot be read ({type(error).__name__}: {error}); "
                "it is missing, damaged or no image; drop it, or fetch it again"
            ) from error
    array = np.asarray(image)
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or array.shape[2:] not in ((), (1,), (3,))
    ):
        raise ValueError(
            f"an image is {array.dtype}{array.shape}; wanted is uint8, 0 to 255, of "
            "(height, width), (height, width, 1) or (height, width, 3); convert it"
        )
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
