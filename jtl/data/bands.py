"""Images of many bands, and series of them, as weights of satellites read them: normalised."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILE = "band_inputs.json"


@dataclasses.dataclass(frozen=True)
class BandInputs:
    """A normalisation of each band; what is resized or cut is resized or cut before.

    Attributes:
        mean: of each band, in the units of the images.
        std: of each band.
        size: (height, width) of the images, None where any size will do.
        steps: where weights were trained on coarse numbers, how many steps from 0 to 1 there are:
            what is normalised is cut to that range and rounded down to a step; None leaves it.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    steps: int | None = None

    def __call__(self, images: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
        """Return {"pixel_values": float32 of the shape of the images}.

        Args:
            images: numbers (n, height, width, bands) or (n, frames, height, width, bands), or a
                list of n arrays of one shape.

        Raises:
            ValueError: there is no image, they differ in shape, or their bands or their size are
                others than the weights'.

        >>> inputs = BandInputs((1.0, 0.0), (2.0, 4.0), (1, 1))
        >>> inputs(np.array([[[[5.0, 2.0]]]]))["pixel_values"].tolist()
        [[[[2.0, 0.5]]]]
        """
        values = self._checked(images)
        values = (values - np.asarray(self.mean)) / np.asarray(self.std)
        if self.steps is not None:
            values = np.floor(np.clip(values, 0.0, 1.0) * self.steps) / self.steps
        return {"pixel_values": values.astype(np.float32)}

    def save(self, folder: str | Path) -> None:
        """Write `band_inputs.json`."""
        stated = json.dumps(dataclasses.asdict(self), indent=2)
        (Path(folder) / FILE).write_text(stated + "\n", encoding="utf-8")

    def _checked(self, images: Sequence[Any] | np.ndarray) -> np.ndarray:
        shapes = {np.shape(image) for image in images}
        if len(shapes) != 1:
            raise ValueError(
                f"the images have the shapes {sorted(shapes, key=str)}; give at least one, and all "
                f"of one shape: {self.size or 'any'} (height, width) and {len(self.mean)} bands"
            )
        values = np.asarray(images)
        numbers = np.issubdtype(values.dtype, np.integer) or np.issubdtype(
            values.dtype, np.floating
        )
        fits = values.shape[-1:] == (len(self.mean),)
        fits = fits and self.size in (None, values.shape[-3:-1])
        if not numbers or values.ndim not in (4, 5) or not fits:
            raise ValueError(
                f"the images are {values.dtype}{values.shape}; the weights read {len(self.mean)} "
                f"bands of {self.size or 'any'} (height, width): numbers (n, height, width, bands) "
                "or (n, frames, height, width, bands); choose the bands, and resize before"
            )
        return values.astype(np.float64)


def band_inputs(
    size: int | tuple[int, int] | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    steps: int | None = None,
) -> BandInputs:
    """Return a stated preprocessing of images of many bands: (x - mean) / std.

    Args:
        size: (height, width), or one number for a square; None takes any.
        mean: of each band, in the units of the images.
        std: of each band.
        steps: see `BandInputs`.

    Raises:
        ValueError: `std` has another number of bands than `mean`, or one that is not positive.

    >>> band_inputs(8, mean=(0.5, 0.5), std=(1.0, 2.0)).size
    (8, 8)
    """
    if len(mean) != len(std) or not len(mean) or min(std) <= 0:
        raise ValueError(
            f"mean is of {len(mean)} bands and std is {list(std)}; "
            "give one mean and one positive deviation for every band"
        )
    means, deviations = (tuple(float(value) for value in values) for values in (mean, std))
    return BandInputs(means, deviations, (size, size) if isinstance(size, int) else size, steps)


def load_band_inputs(folder: str | Path) -> BandInputs:
    """Return what `BandInputs.save` has written to a folder.

    Raises:
        ValueError: the file is damaged.
    """
    place = Path(folder) / FILE
    try:
        stated = json.loads(place.read_text(encoding="utf-8"))
        size, own = stated["size"], {name: stated[name] for name in ("mean", "std", "steps")}
        return band_inputs(None if size is None else (size[0], size[1]), **own)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(place)!r} is no preprocessing of bands ({type(error).__name__}: {error}); "
            "export the model again, or state it by data.band_inputs(size, mean=, std=)"
        ) from error
