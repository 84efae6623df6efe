"""Images and texts together, by the image processor and the tokenizer of one checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jtl.data.text import TextInputs


@dataclasses.dataclass(frozen=True, eq=False)
class PairInputs:
    """A tokenizer and an image processor: each makes its own columns of one batch.

    Attributes:
        text: the tokenizer's `TextInputs`, or what refuses where the checkpoint has none.
        images: the processor's `ImageInputs`, or what refuses where the checkpoint has none.
        length: to which texts are padded; None pads to the longest one. SigLIP reads its text at
            the last place, padded as in training.
        image_token: the word that stands for an image in a text, "" where texts have none.
        image_tokens: how many tokens that word becomes, one for each that the image gives.
    """

    text: Any
    images: Any
    length: int | None = None
    image_token: str = ""
    image_tokens: int = 0

    def __call__(
        self,
        *,
        texts: Sequence[str] | None = None,
        images: Sequence[Any] | np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the columns of both, or of the one that is given.

        Args:
            texts: as for `TextInputs`; with `image_token`, each has it once at most.
            images: as for `ImageInputs`; the image of row i belongs to text i.

        Raises:
            ValueError: neither is given, their numbers differ, the checkpoint has no files for what
                is given, or a text names more than one image or is too long for its image.
        """
        given = {"texts": texts, "images": images}
        counts = {name: len(value) for name, value in given.items() if value is not None}
        if not counts or len(set(counts.values())) > 1:
            raise ValueError(
                f"a batch of pairs is made of {counts or 'nothing'}; give as many texts= as "
                "images=, or one of them alone"
            )
        batch: dict[str, np.ndarray] = {}
        if texts is not None:
            batch.update(self._texts(texts))
        if images is not None:
            batch.update(self.images(images))
        return batch

    def save(self, folder: str | Path) -> None:
        """Write the files of both."""
        for inputs in (self.text, self.images):
            inputs.save(folder)

    def _texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        if not self.image_token:
            return self.text(texts, length=self.length)
        several = [text for text in texts if text.count(self.image_token) > 1]
        if several:
            raise ValueError(
                f"a text names {several[0].count(self.image_token)} images: {several[0][:60]!r}; "
                f"a row has one image; write {self.image_token!r} once"
            )
        word = self.image_token * self.image_tokens
        whole = [text.replace(self.image_token, word) for text in texts]
        batch = self.text(whole, length=self.length)
        own = self.text.tokenizer.convert_tokens_to_ids(self.image_token)
        found = (batch["input_ids"] == own).sum(axis=1)
        wanted = np.asarray([self.image_tokens * (self.image_token in text) for text in texts])
        if (found != wanted).any():
            row = int(np.argmax(found != wanted))
            raise ValueError(
                f"text {row} keeps {found[row]} of the {wanted[row]} tokens of its image: texts "
                f"are cut at {self.text.max_length} tokens, or the tokenizer does not know "
                f"{self.image_token!r} as one token; give shorter texts or a tokenizer that does"
            )
        return batch


def pair_inputs(text: Any, images: Any, config: Mapping[str, Any]) -> PairInputs:
    """Return the inputs of a model of images and texts.

    Args:
        text: the tokenizer's inputs.
        images: the image processor's inputs.
        config: the dict of `config.json`; it says which token stands for an image, and of how many
            patches an image is.
    """
    token = config.get("image_token_index", config.get("image_token_id"))
    if str(config.get("model_type", "")).startswith("siglip"):
        return PairInputs(text, images, length=getattr(text, "max_length", None))
    if token is None or not isinstance(text, TextInputs):
        return PairInputs(text, images)
    word = text.tokenizer.convert_ids_to_tokens(token)
    return PairInputs(text, images, image_token=word, image_tokens=tokens_of_image(config))


def tokens_of_image(config: Mapping[str, Any]) -> int:
    """Return how many tokens an image becomes in the text of LLaVA: one for each patch.

    The token of the whole image counts where `vision_feature_select_strategy` is "full".

    >>> vision = {"image_size": 336, "patch_size": 14}
    >>> tokens_of_image({"vision_config": vision, "vision_feature_select_strategy": "default"})
    576
    """
    vision = config["vision_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return patches + (config.get("vision_feature_select_strategy", "default") == "full")
