"""Use a finished run: `jtl.load(folder).predict(raw)`."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtl.models.export import import_model, read_labels
from jtl.models.model import Model


class Prediction(NamedTuple):
    """One answer: the name of the class, its probability, and those of all classes by name.

    For a regression `label` is the number, and there are no probabilities.
    """

    label: Any
    probability: float | None
    probabilities: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained model with its inputs and label names.

    Attributes:
        model: backbone, heads and weights.
        classes: {head: names of its classes}, () for a regression.
    """

    model: Model
    classes: dict[str, tuple[str, ...]]

    def logits(self, raw: Sequence[Any], *, head: str | None = None, batch: int = 32) -> np.ndarray:
        """Return logits (n, outputs) of raw texts or images, in batches of at most `batch`."""
        head = self._head(head)
        rows = [
            np.asarray(_apply(self, raw[i : i + batch], head)) for i in range(0, len(raw), batch)
        ]
        if not rows:
            raise ValueError("there is nothing to predict: raw is empty; give a list of inputs")
        return np.concatenate(rows)

    def predict(self, raw: Any, *, head: str | None = None, batch: int = 32) -> list[Prediction]:
        """Return a prediction for each raw input: texts, or images as arrays, paths or PIL.

        Args:
            raw: a list of inputs; one string counts as a list of one.
            head: which head; None where there is only one.
            batch: inputs at a time.

        Raises:
            ValueError: nothing to predict, or a head that the model has not.
        """
        if batch < 1:
            raise ValueError(f"batch is {batch}; give the number of inputs at a time, 1 or more")
        raw = [raw] if isinstance(raw, str) else list(raw)
        names = self.classes[self._head(head)]
        logits = self.logits(raw, head=head, batch=batch)
        if not names:
            return [Prediction(float(row[0]), None, {}) for row in logits]
        probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1))
        return [_prediction(row, names) for row in probabilities]

    def _head(self, head: str | None) -> str:
        heads = list(self.model.heads)
        if head is None and len(heads) == 1:
            return heads[0]
        if head not in self.model.heads:
            raise ValueError(f"head {head!r} is asked for; the model has {heads}; name one of them")
        return str(head)


def _apply(predictor: Predictor, raw: Sequence[Any], head: str) -> jax.Array:
    model = predictor.model
    batch = {name: jnp.asarray(value) for name, value in model.backbone.inputs(raw).items()}
    out, _ = model.apply(model.params, model.stats, batch)
    return out[head]


def _prediction(row: np.ndarray, names: tuple[str, ...]) -> Prediction:
    best = int(row.argmax())
    return Prediction(
        names[best], float(row[best]), {name: float(p) for name, p in zip(names, row, strict=True)}
    )


def load(folder: str | pathlib.Path) -> Predictor:
    """Return the model of a run folder (or of its `model/`), ready to predict.

    Raises:
        ValueError: the folder has no finished model.
    """
    place = _model_folder(folder)
    return Predictor(import_model(place), read_labels(place))


def _model_folder(folder: str | pathlib.Path) -> pathlib.Path:
    root = pathlib.Path(folder)
    place = root / "model" if (root / "model").is_dir() else root
    if not (place / "config.json").is_file() or not (place / "model.safetensors").is_file():
        there = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else "nothing"
        raise ValueError(
            f"{root} holds no finished model; it has {there}; give the folder of a run that ended, "
            "or finish it by the command that started it"
        )
    return place
