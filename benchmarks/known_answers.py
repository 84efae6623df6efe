"""Whether real pretrained weights give the answers that everybody knows.

    python -m benchmarks.assets smollm2 && python -m benchmarks.known_answers smollm2

One JSON line an answer: `value` is what the model says, `right` whether it is what it should be.
The process ends with 1 where an answer is wrong. A model whose weights, names, positions or norms
are off by anything that matters knows no capitals.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import assets

Answer = dict[str, Any]

NEXT_WORDS = {
    "The capital of France is": "Paris",
    "The capital of Italy is": "Rome",
    "The capital of Japan is": "Tokyo",
}
PARAGRAPH = (
    "The sun is a star at the centre of the solar system. The Earth and the other planets move "
    "around it. Light from the sun takes about eight minutes to reach the Earth."
)
HIGHEST_PERPLEXITY = 15.0  # of the paragraph; its words in reverse order have a multiple of it


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    """Return exp of the mean negative log-probability of each token after the first.

    Args:
        logits: (length, vocabulary) of the token after each place.
        ids: (length,) of the text.

    >>> perplexity(np.zeros((3, 4)), np.array([0, 1, 2]))
    4.0
    """
    wide = logits[:-1].astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    chosen = wide[np.arange(len(ids) - 1), ids[1:]]
    return float(np.exp(np.mean(np.log(np.exp(wide).sum(-1)) - chosen)))


def smollm2() -> Iterator[Answer]:
    """Yield next words, and the perplexity of a paragraph forwards and backwards."""
    import jax

    from jtl.models.load import load_backbone
    from jtl.models.load_head import load_head
    from jtl.models.model import attach

    folder = assets.fetch("smollm2")
    backbone = load_backbone(folder)
    module, params = load_head(folder, backbone, "causal_lm")
    model = attach(backbone, {"next": module}, key=jax.random.key(0))
    weights = {"backbone": backbone.params, "heads": {"next": params}}
    apply = jax.jit(lambda batch: model.apply(weights, {}, batch)[0]["next"])

    batch = backbone.inputs(list(NEXT_WORDS))
    logits = np.asarray(apply(batch))
    ends = batch["attention_mask"].sum(1) - 1
    for row, (text, word) in enumerate(NEXT_WORDS.items()):
        said = backbone.inputs.tokenizer.decode([int(logits[row, ends[row]].argmax())]).strip()
        yield {"what": text, "value": said, "right": said == word}
    backwards = " ".join(reversed(PARAGRAPH.split()))
    found = []
    for text in (PARAGRAPH, backwards):
        batch = backbone.inputs([text])
        found.append(perplexity(np.asarray(apply(batch))[0], batch["input_ids"][0]))
    yield {"what": "perplexity", "value": found[0], "right": found[0] < HIGHEST_PERPLEXITY}
    more = found[1] / found[0]
    yield {"what": "perplexity backwards over it", "value": more, "right": more > math.e}


CHECKS: dict[str, Callable[[], Iterator[Answer]]] = {"smollm2": smollm2}


def main(argv: list[str] | None = None) -> None:
    """Ask the named models and print one line an answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=sorted(CHECKS))
    right = True
    for name in parser.parse_args(argv).names:
        for answer in CHECKS[name]():
            print(json.dumps({"model": name, **answer}), flush=True)
            right = right and answer["right"]
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
