"""Texts to token arrays by the tokenizer that the weights were trained with."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jtl.data.sources import checked_texts

Ragged = dict[str, list[list[int]]]


@dataclasses.dataclass(frozen=True, eq=False)
class TextInputs:
    """A tokenizer and the longest text that its model takes.

    Attributes:
        tokenizer: of transformers; its own columns (input_ids, attention_mask, perhaps
            token_type_ids) become those of the batch.
        max_length: tokens, the special ones included; longer texts are cut.
    """

    tokenizer: Any
    max_length: int

    def __call__(self, texts: Sequence[str], *, length: int | None = None) -> dict[str, np.ndarray]:
        """Return int32 columns (n, length), padded.

        Args:
            texts: at least one.
            length: to pad and cut to; None pads to the longest text.

        Raises:
            ValueError: there is no text, one is no string, or `length` exceeds `max_length`.
        """
        ragged = self.tokens(texts, max_length=length)
        longest = max(len(ids) for ids in ragged["input_ids"])
        return self.padded(ragged, range(len(texts)), length or longest)

    def tokens(self, texts: Sequence[str], *, max_length: int | None = None) -> Ragged:
        """Return the columns of the texts as lists of tokens, cut and not padded.

        Raises:
            ValueError: as the call.
        """
        if isinstance(texts, str):
            raise ValueError(f"one string is given, {texts[:40]!r}; give a list of texts")
        texts = checked_texts(texts, "the inputs")
        if not texts:
            raise ValueError("there are no texts: the list is empty; give at least one")
        limit = self.max_length if max_length is None else max_length
        if not 1 <= limit <= self.max_length:
            raise ValueError(
                f"{limit} tokens are asked for; the checkpoint takes 1 to {self.max_length}; "
                "give less, or None for all that it takes"
            )
        return dict(self.tokenizer(texts, truncation=True, max_length=limit, padding=False))

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Return the number of tokens (n,) of each text after cutting."""
        return np.asarray([len(ids) for ids in self.tokens(texts)["input_ids"]], np.int32)

    def padded(
        self, ragged: Ragged, rows: Sequence[int] | np.ndarray, length: int
    ) -> dict[str, np.ndarray]:
        """Return int32 columns (rows, length) of some rows of `tokens`."""
        fill = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        left = self.tokenizer.padding_side == "left"
        return {
            name: _padded([column[row] for row in rows], length, fill.get(name, 0), left)
            for name, column in ragged.items()
        }

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, `max_length` among them."""
        self.tokenizer.save_pretrained(str(folder))


def load_text_inputs(folder: str | Path, config: Mapping[str, Any]) -> TextInputs:
    """Return the tokenizer of a checkpoint folder.

    The longest text is the least of what the tokenizer states, of sentence-transformers' file
    `sentence_bert_config.json`, and of the positions of the model.

    Decoders such as GPT-2 and LLaMA were trained without padding. Batches of theirs are padded with
    the token that ends a text; `attention_mask` says which places are real, and `save` writes it as
    the padding token.

    Args:
        folder: a local folder with the tokenizer's files.
        config: the dict of `config.json`.

    Raises:
        ValueError: the folder has no tokenizer, it has no token to pad with, or nothing says how
            long a text may be.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the tokenizer of {str(folder)!r} cannot be loaded "
            f"({type(error).__name__}: {reason}); "
            "put tokenizer.json or vocab.txt of the original checkpoint there"
        ) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {str(folder)!r} has no padding token, and none that ends a text; "
            f"its special tokens are {tokenizer.special_tokens_map}; "
            "add pad_token to its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    limits = [tokenizer.model_max_length, _stated(folder), config.get("max_position_embeddings")]
    known = [int(limit) for limit in limits if limit and limit < 10**6]
    if not known:
        raise ValueError(
            f"nothing says how long a text {str(folder)!r} takes; tokenizer_config.json and "
            "config.json state no length; add model_max_length to tokenizer_config.json"
        )
    tokenizer.model_max_length = min(known)  # so that `save` keeps it
    return TextInputs(tokenizer, min(known))


def _stated(folder: Path) -> int | None:
    file = folder / "sentence_bert_config.json"
    return json.loads(file.read_text()).get("max_seq_length") if file.is_file() else None


def _padded(rows: list[list[int]], length: int, fill: int, left: bool) -> np.ndarray:
    lengths = np.asarray([len(row) for row in rows])
    places = np.arange(length)[None, :]
    real = places >= length - lengths[:, None] if left else places < lengths[:, None]
    array = np.full((len(rows), length), fill, np.int32)
    if rows:
        array[real] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return array
