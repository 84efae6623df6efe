"""The peer of `benchmarks.penalty_cost`: PyTorch as the users of the leading library have it.

The penalty is a loop over named parameters, and the importance the square of a batch's mean
gradient.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import measure, shapes
from benchmarks.measure import Timed

BATCH = 128


def available() -> bool:
    """Return whether PyTorch is here, and give it as many threads as we have."""
    try:
        import torch
    except ImportError:
        return False
    torch.set_num_threads(measure.threads())
    return True


def _mlp(layers: Any) -> Any:
    import torch

    parts: list[Any] = []
    for layer in layers:
        rows, columns = layer["w"].shape
        parts += [torch.nn.Linear(rows, columns), torch.nn.ReLU()]
        parts[-2].weight.data = torch.tensor(np.asarray(layer["w"]).T.copy())
        parts[-2].bias.data = torch.tensor(np.asarray(layer["b"]).copy())
    return torch.nn.Sequential(*parts[:-1])


def mlp_loss(layers: Any, batch: Any) -> tuple[Any, Callable[[], Any]]:
    """Return the same network, and its loss on a batch."""
    import torch

    model = _mlp(layers)
    x, y = torch.as_tensor(batch["x"]), torch.as_tensor(batch["label"])
    return model, lambda: torch.nn.functional.cross_entropy(model(x), y)


def text_loss(shape: shapes.Shape, batch: Any) -> tuple[Any, Callable[[], Any]]:
    """Return a BERT of the shape with a head, and its loss on a batch."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(**shapes.config_of(shape, 0.0))
    body = BertModel(config, add_pooling_layer=False)
    head = torch.nn.Linear(config.hidden_size, 2)
    ids, mask, y = (
        torch.as_tensor(np.asarray(batch[column])).long()
        for column in ("input_ids", "attention_mask", "label")
    )

    def loss() -> Any:
        hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.nn.functional.cross_entropy(head(hidden.mean(1)), y)

    return torch.nn.ModuleList([body, head]), loss


def step(model: Any, loss: Callable[[], Any], *, penalised: bool) -> Timed:
    """Return the peer's step: the penalty as a loop over named parameters."""
    import torch

    tx = torch.optim.AdamW(model.parameters(), lr=1e-5)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    fisher = {name: torch.ones_like(p) for name, p in anchor.items()}

    def call() -> None:
        total = loss()
        if penalised:
            penalty = torch.tensor(0.0)
            for name, p in model.named_parameters():
                penalty = penalty + (fisher[name] * (p - anchor[name]).pow(2)).sum()
            total = total + 0.1 * penalty
        tx.zero_grad()
        total.backward()
        tx.step()

    return Timed(call)


def batch_means(layers: Any, x: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    """Return the pass of the leading library: squares of the mean gradients of batches."""
    import torch

    model = _mlp(layers)
    inputs, labels = torch.as_tensor(x), torch.as_tensor(y)
    starts = range(0, len(x), BATCH)

    def call() -> Any:
        found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for i in starts:
            model.zero_grad()
            out = model(inputs[i : i + BATCH])
            torch.nn.functional.cross_entropy(out, labels[i : i + BATCH]).backward()
            for name, p in model.named_parameters():
                found[name] += p.grad.detach().clone().pow(2)
        means = [(value / len(starts)).numpy() for value in found.values()]
        return [{"b": b, "w": w.T} for w, b in zip(means[::2], means[1::2], strict=True)]

    return call
