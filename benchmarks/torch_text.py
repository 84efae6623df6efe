"""The peer of `benchmarks.text` and `benchmarks.schedule`: the loop that users of PyTorch write.

Same split, same phases, batches of the same size. Texts are tokenised once and padded to the
longest of their batch; what is held runs in evaluation mode, under no_grad where the whole encoder
is; SDPA attention, fused AdamW without decay on biases and norms, linear warm-up and decay, the
clip over what moves. The encoder runs in every epoch, but where `cached` says otherwise.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import threads

CLIP, WARMUP = 1.0, 0.1


class PeerPhase(NamedTuple):
    """A stretch of the loop.

    Attributes:
        rates: {label: peak rate} of what moves: "stem", "block_0", ..., "head".
        epochs: passes over the training data.
        span: epochs that the schedule of the rates spans.
        watch: whether validation data are scored after each epoch and the best weights kept.
    """

    rates: Mapping[str, float]
    epochs: int
    span: int
    watch: bool = False


class PeerResult(NamedTuple):
    """Test accuracy, examples a second, seconds of the loop, and of these the evaluations."""

    accuracy: float
    examples_per_second: float
    seconds: float
    evaluation_seconds: float = 0.0


class _Loop(NamedTuple):
    """What stays as it is: the model and its parts, the tokens of each split."""

    tokenizer: Any
    body: Any
    head: Any
    parts: Mapping[str, Any]
    tokens: Mapping[str, Any]
    labels: Mapping[str, np.ndarray]
    batch_size: int


def available() -> bool:
    """Return whether PyTorch is installed (extra `parity`)."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def run(
    folder: str,
    splits: Mapping[str, tuple[list[str], np.ndarray]],
    *,
    phases: Sequence[PeerPhase],
    batch_size: int,
    seed: int,
    classes: int = 2,
    cached: bool = False,
) -> PeerResult:
    """Train by the loop and score the test split once.

    Args:
        folder: the checkpoint.
        splits: {"train", "validation", "test": (texts, labels)}.
        phases: one after the other; moments of the optimizer are carried on.
        batch_size: texts a step.
        seed: of the head's weights and the order.
        classes: number of classes.
        cached: compute the features once; for phases that move the head alone.
    """
    import torch

    torch.manual_seed(seed)
    tokenizer, body, parts = _load(folder, classes)
    labels = {name: split[1] for name, split in splits.items()}
    began = time.perf_counter()
    watched = ["validation"] if any(phase.watch for phase in phases) else []
    tokens = {name: _tokens(tokenizer, splits[name][0]) for name in ("train", *watched)}
    loop = _Loop(tokenizer, body, parts["head"], parts, tokens, labels, batch_size)
    features = _features(loop, "train") if cached else None
    tx = _optimizer(parts, phases)
    order, evaluating = np.random.default_rng(seed), 0.0
    for phase in phases:
        evaluating += _phase(loop, tx, phase, order, features)
    seconds = time.perf_counter() - began
    tokens["test"] = _tokens(tokenizer, splits["test"][0])
    passes = sum(phase.epochs for phase in phases)
    speed = passes * len(labels["train"]) / seconds
    return PeerResult(_accuracy(loop, "test"), speed, seconds, evaluating)


def probe(
    folder: str, splits: Mapping[str, tuple[list[str], np.ndarray]], *, batch_size: int
) -> PeerResult:
    """Fit scikit-learn's logistic regression on features computed once; score the test split."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tokenizer, body, parts = _load(folder, 2)
    labels = {name: split[1] for name, split in splits.items()}
    began = time.perf_counter()
    tokens = {"train": _tokens(tokenizer, splits["train"][0])}
    loop = _Loop(tokenizer, body, parts["head"], parts, tokens, labels, batch_size)
    fitted = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=6, max_iter=1000))
    fitted.fit(_features(loop, "train").numpy(), labels["train"])
    seconds = time.perf_counter() - began
    tokens["test"] = _tokens(tokenizer, splits["test"][0])
    guess = fitted.predict(_features(loop, "test").numpy())
    accuracy = float((guess == labels["test"]).mean())
    return PeerResult(accuracy, len(labels["train"]) / seconds, seconds)


def _load(folder: str, classes: int) -> tuple[Any, Any, dict[str, Any]]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(threads())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    body = AutoModel.from_pretrained(folder)
    head = torch.nn.Sequential(
        torch.nn.Dropout(0.1), torch.nn.Linear(body.config.hidden_size, classes)
    )
    blocks = {f"block_{i}": layer for i, layer in enumerate(body.encoder.layer)}
    return tokenizer, body, {"stem": body.embeddings, **blocks, "head": head}


def _optimizer(parts: Mapping[str, Any], phases: Sequence[PeerPhase]) -> Any:
    import torch

    groups = []
    for label in dict.fromkeys(label for phase in phases for label in phase.rates):
        own = list(parts[label].parameters())
        matrices, others = [p for p in own if p.ndim > 1], [p for p in own if p.ndim <= 1]
        groups.append({"params": matrices, "label": label, "weight_decay": 0.01})
        groups.append({"params": others, "label": label, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def _phase(
    loop: _Loop, tx: Any, phase: PeerPhase, order: np.random.Generator, features: Any
) -> float:
    """Train one phase; return the seconds of its evaluations."""
    import torch

    rows = len(loop.labels["train"])
    total = phase.span * -(-rows // loop.batch_size)
    live = _open(loop, phase)
    forward = _forward(loop, phase, features)
    best, kept, evaluating, step = -1.0, [], 0.0, 0
    for _ in range(phase.epochs):
        _modes(loop, phase)
        permuted = order.permutation(rows)
        for i in range(0, rows, loop.batch_size):
            chosen = permuted[i : i + loop.batch_size]
            target = torch.as_tensor(loop.labels["train"][chosen]).long()
            loss = torch.nn.functional.cross_entropy(loop.head(forward(chosen)), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(live, CLIP, foreach=True)
            for group in tx.param_groups:
                group["lr"] = phase.rates.get(group["label"], 0.0) * curve(step, total)
            tx.step()
            tx.zero_grad(set_to_none=True)
            step += 1
        if phase.watch:
            began = time.perf_counter()
            score = _accuracy(loop, "validation")
            if score > best:
                best, kept = score, [p.detach().clone() for p in live]
            evaluating += time.perf_counter() - began
    with torch.no_grad():
        for p, value in zip(live, kept, strict=False):
            p.copy_(value)
    return evaluating


def curve(step: int, total: int) -> float:
    """Return the share of the peak rate: a linear rise, then a linear fall.

    >>> [round(curve(step, 20), 2) for step in (0, 2, 11, 19)]
    [0.0, 1.0, 0.5, 0.06]
    """
    rise = round(total * WARMUP)
    return step / rise if step < rise else (total - step) / max(1, total - rise)


def _open(loop: _Loop, phase: PeerPhase) -> list[Any]:
    """Let what moves move; return its parameters."""
    for label, part in loop.parts.items():
        part.requires_grad_(label in phase.rates)
    return [p for label in phase.rates for p in loop.parts[label].parameters()]


def _modes(loop: _Loop, phase: PeerPhase) -> None:
    loop.body.eval()
    for label in phase.rates:
        loop.parts[label].train()


def _forward(loop: _Loop, phase: PeerPhase, features: Any) -> Callable[[np.ndarray], Any]:
    """Return `rows -> features`, of the encoder or as they were cached."""
    import torch

    if features is not None:
        return lambda rows: features[torch.as_tensor(rows)]
    moves = set(phase.rates) != {"head"}

    def forward(rows: np.ndarray) -> Any:
        with torch.set_grad_enabled(moves):
            return _pooled(loop, "train", rows)

    return forward


def _tokens(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, truncation=True, max_length=256)


def _pooled(loop: _Loop, part: str, rows: np.ndarray) -> Any:
    tokens = loop.tokens[part]
    ragged = {name: [tokens[name][row] for row in rows] for name in ("input_ids", "attention_mask")}
    batch = loop.tokenizer.pad(ragged, return_tensors="pt")
    hidden = loop.body(**batch).last_hidden_state
    weight = batch["attention_mask"][:, :, None].float()
    return (hidden * weight).sum(1) / weight.sum(1)


def _features(loop: _Loop, part: str) -> Any:
    """Return the features of a split, computed in batches of texts of like length."""
    import torch

    lengths = [len(ids) for ids in loop.tokens[part]["input_ids"]]
    order = np.argsort(lengths)
    features = torch.empty(len(lengths), loop.body.config.hidden_size)
    loop.body.eval()
    with torch.no_grad():
        for i in range(0, len(lengths), loop.batch_size):
            rows = order[i : i + loop.batch_size]
            features[torch.as_tensor(rows)] = _pooled(loop, part, rows)
    return features


def _accuracy(loop: _Loop, part: str) -> float:
    import torch

    loop.head.eval()
    features = _features(loop, part)
    with torch.no_grad():
        guess = loop.head(features).argmax(-1).numpy()
    return float((guess == loop.labels[part]).mean())
