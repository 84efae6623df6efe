"""The peer of `benchmarks.text`: the plain PyTorch loop that a user of transformers writes.

Same split, same epochs, batches of the same size padded to their longest text; the held encoder
runs in evaluation mode under no_grad, AdamW has no decay on biases and norms, linear warm-up and
decay.
"""

import time
from typing import Any, NamedTuple

import numpy as np


class PeerResult(NamedTuple):
    """Test accuracy, training examples a second, seconds of the training loop."""

    accuracy: float
    examples_per_second: float
    seconds: float


def available() -> bool:
    """Return whether PyTorch is installed (extra `parity`)."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def run(
    folder: str,
    splits: dict[str, tuple[list[str], np.ndarray]],
    *,
    strategy: str,
    epochs: int,
    rate: float,
    head_rate: float,
    batch_size: int,
    seed: int,
    classes: int = 2,
) -> PeerResult:
    """Train by the loop and score the test split once.

    Args:
        folder: the checkpoint.
        splits: {"train", "test": (texts, labels)}.
        strategy: "probe" (cached features, scikit-learn), "head", "last_two" or "full".
        epochs: passes over the training data.
        rate: AdamW's rate of the encoder.
        head_rate: AdamW's rate of the head.
        batch_size: texts a step.
        seed: of the head's weights and the order.
        classes: number of classes.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    body = AutoModel.from_pretrained(folder)
    head = torch.nn.Sequential(
        torch.nn.Dropout(0.1), torch.nn.Linear(body.config.hidden_size, classes)
    )
    if strategy == "probe":
        return _probe(tokenizer, body, splits, batch_size)
    layers = list(body.encoder.layer)
    opened = {"head": [], "last_two": layers[-2:], "full": [body]}[strategy]
    for p in body.parameters():
        p.requires_grad_(False)
    for part in opened:
        for p in part.parameters():
            p.requires_grad_(True)
    texts, labels = splits["train"]
    steps = epochs * -(-len(texts) // batch_size)
    tx = torch.optim.AdamW(_parameter_groups(opened, head, rate, head_rate))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        tx, lambda s: min((s + 1) / max(1, steps // 10), (steps - s) / max(1, steps - steps // 10))
    )
    order = np.random.default_rng(seed)
    began = time.perf_counter()
    for _ in range(epochs):
        rows = order.permutation(len(texts))
        body.eval()
        for part in opened:
            part.train()
        head.train()
        for i in range(0, len(rows), batch_size):
            chosen = rows[i : i + batch_size]
            batch = _tokens(tokenizer, [texts[r] for r in chosen])
            tx.zero_grad()
            with torch.set_grad_enabled(bool(opened)):
                features = _pooled(body, batch)
            loss = torch.nn.functional.cross_entropy(
                head(features), torch.as_tensor(labels[chosen]).long()
            )
            loss.backward()
            live = [p for group in tx.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(live, 1.0)
            tx.step()
            schedule.step()
    seconds = time.perf_counter() - began
    body.eval()
    head.eval()
    features = _features(tokenizer, body, splits["test"][0], batch_size)
    with torch.no_grad():
        guess = head(torch.as_tensor(features)).argmax(-1).numpy()
    accuracy = float((guess == splits["test"][1]).mean())
    return PeerResult(accuracy, epochs * len(texts) / seconds, seconds)


def _parameter_groups(opened: list[Any], head: Any, rate: float, head_rate: float) -> list[Any]:
    groups = []
    for part, part_rate in [*((p, rate) for p in opened), (head, head_rate)]:
        matrices = [p for p in part.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in part.parameters() if p.requires_grad and p.ndim <= 1]
        groups.append({"params": matrices, "lr": part_rate, "weight_decay": 0.01})
        groups.append({"params": others, "lr": part_rate, "weight_decay": 0.0})
    return groups


def _probe(tokenizer: Any, body: Any, splits: Any, batch_size: int) -> PeerResult:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    began = time.perf_counter()
    train = _features(tokenizer, body, splits["train"][0], batch_size)
    probe = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=6, max_iter=1000))
    probe.fit(train, splits["train"][1])
    seconds = time.perf_counter() - began
    test = _features(tokenizer, body, splits["test"][0], batch_size)
    accuracy = float((probe.predict(test) == splits["test"][1]).mean())
    return PeerResult(accuracy, len(train) / seconds, seconds)


def _tokens(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")


def _pooled(body: Any, batch: Any) -> Any:
    hidden = body(**batch).last_hidden_state
    weight = batch["attention_mask"][:, :, None].float()
    return (hidden * weight).sum(1) / weight.sum(1)


def _features(tokenizer: Any, body: Any, texts: list[str], batch_size: int) -> np.ndarray:
    import torch

    body.eval()
    order = np.argsort([len(text) for text in texts])
    features = np.empty((len(texts), body.config.hidden_size), np.float32)
    with torch.no_grad():
        for i in range(0, len(texts), batch_size):
            rows = order[i : i + batch_size]
            features[rows] = _pooled(body, _tokens(tokenizer, [texts[r] for r in rows])).numpy()
    return features
