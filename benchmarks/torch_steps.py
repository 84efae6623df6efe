"""The peer of the step benchmarks: transformers on PyTorch, eager and under `torch.compile`.

Written as well as its users write it: the held encoder in evaluation mode, under `no_grad` where
nothing in it moves, SDPA attention, fused AdamW over what moves and without decay on biases and
norms, the clip over what moves, batches already on the device, bfloat16 by autocast.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.jtl_steps import CASES, CLIP, Case
from benchmarks.measure import Timed, say, threads, why
from benchmarks.shapes import Shape, config_of

COMPILED = ("head", "last_block", "full")
MODELS = {"bert": "BertModel", "vit": "ViTModel", "resnet": "ResNetModel", "llama": "LlamaModel"}


class Peer(NamedTuple):
    """What can be timed, and why the rest cannot.

    Attributes:
        calls: {name of the case, or "forward"}.
        failed: {name: reason}.
    """

    calls: dict[str, Timed]
    failed: dict[str, str]


class _Torch(NamedTuple):
    """The model on its device, with one batch."""

    body: Any
    head: Any
    run: Callable[..., Any]
    family: str
    inputs: Mapping[str, Any]
    labels: Any
    autocast: Callable[[], Any]


def make_peers(
    shape: Shape,
    batch: Mapping[str, Any],
    *,
    cases: Mapping[str, Case],
    dropout: float | None,
    dtype: str,
    compiled: bool,
) -> dict[str, Peer]:
    """Return {"torch_eager", "torch_compile"} on one model, as far as they run here."""
    try:
        made = _build(shape, batch, dropout, dtype)
    except Exception as error:
        failed = {"forward": why(error)}
        return {name: Peer({}, failed) for name in ("torch_eager", "torch_compile")}
    peers = {"torch_eager": _peer(made, cases)}
    if not compiled:
        return {**peers, "torch_compile": Peer({}, {"forward": "not asked for"})}
    import torch

    body = torch.compile(made.body, dynamic=False)
    some = {name: case for name, case in cases.items() if name in COMPILED}
    return {**peers, "torch_compile": _peer(made._replace(run=body), some)}


def matmul(size: int, dtype: str) -> Timed | None:
    """Return the product of two square matrices; None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    device = _device()
    kind = getattr(torch, dtype)
    left = torch.randn(size, size, device=device).to(kind)

    def call() -> None:
        torch.matmul(left, left)
        _wait()

    return Timed(call, 2.0 * size**3)


def _peer(made: _Torch, cases: Mapping[str, Case]) -> Peer:
    """Return the cases that run, each called once: a compiler that fails, fails here."""
    found: dict[str, Timed] = {}
    failed: dict[str, str] = {}
    makers = {"forward": lambda: _forward(made)}
    makers |= {name: lambda case=case: _step(made, case) for name, case in cases.items()}
    for name, make in makers.items():
        say(f"PyTorch: {'compiling' if made.run is not made.body else 'calling'} {name}")
        try:
            timed = make()
            timed.prepare()
            timed.call()
        except Exception as error:
            failed[name] = why(error)
        else:
            found[name] = timed
    return Peer(found, failed)


def _build(shape: Shape, batch: Mapping[str, Any], dropout: float | None, dtype: str) -> _Torch:
    import torch
    import transformers

    torch.set_num_threads(threads())
    model = getattr(transformers, MODELS[shape.family])
    torch.manual_seed(0)
    device = _device()
    options = {"add_pooling_layer": False} if shape.family in ("bert", "vit") else {}
    body = model(model.config_class(**config_of(shape, dropout)), **options).to(device)
    width = getattr(body.config, "hidden_size", None) or body.config.hidden_sizes[-1]
    head = torch.nn.Linear(width, 2).to(device)
    if "pixel_values" in batch:
        pixels = torch.as_tensor(batch["pixel_values"]).permute(0, 3, 1, 2).contiguous()
        inputs = {"pixel_values": pixels.to(device)}
    else:
        names = ("input_ids", "attention_mask")
        inputs = {name: torch.as_tensor(batch[name]).long().to(device) for name in names}
    labels = torch.as_tensor(batch["label"]).long().to(device)

    def autocast() -> Any:
        if dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device, getattr(torch, dtype))

    return _Torch(body, head, body, shape.family, inputs, labels, autocast)


def _device() -> str:
    import jax
    import torch

    return "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"


def _wait() -> None:
    import torch

    if _device() == "cuda":
        torch.cuda.synchronize()


def _pooled(made: _Torch, inputs: Mapping[str, Any]) -> Any:
    out = made.run(**inputs)
    if made.family == "resnet":
        return out.pooler_output.flatten(1).float()
    hidden = out.last_hidden_state
    if made.family == "vit":
        return hidden[:, 0].float()
    if made.family == "llama":  # every text is full
        return hidden[:, -1].float()
    weight = inputs["attention_mask"][:, :, None].float()
    return (hidden.float() * weight).sum(1) / weight.sum(1)


def _forward(made: _Torch) -> Timed:
    import torch

    def call() -> None:
        with torch.no_grad(), made.autocast():
            made.head(_pooled(made, made.inputs))
        _wait()

    return Timed(call, prepare=lambda: _open(made, CASES["head"]))


def _open(made: _Torch, case: Case) -> None:
    """Let what moves move and train; hold the rest in evaluation mode."""
    body, everything = made.body, case.blocks is None
    body.train(everything)
    body.requires_grad_(everything)
    for part in _opened(body, case.blocks or 0):
        part.train()
        part.requires_grad_(True)


def _opened(body: Any, blocks: int) -> list[Any]:
    if not blocks:
        return []
    import torch

    depth = body.config.num_hidden_layers
    lists = (m for m in body.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
    last = [body.layernorm] if hasattr(body, "layernorm") else []
    return [*list(next(lists))[-blocks:], *last]


def _step(made: _Torch, case: Case) -> Timed:
    import torch

    _open(made, case)
    live = [p for p in (*made.body.parameters(), *made.head.parameters()) if p.requires_grad]
    decayed, others = [p for p in live if p.ndim > 1], [p for p in live if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    tx = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    average = None if case.ema is None else [p.detach().clone() for p in live]
    parts = _parts(made, case.accumulate)

    def call() -> None:
        for inputs, labels in parts:
            with made.autocast():
                with torch.set_grad_enabled(case.blocks != 0):
                    features = _pooled(made, inputs)
                logits = made.head(features).float()
            loss = torch.nn.functional.cross_entropy(logits, labels) / len(parts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(live, CLIP, foreach=True)
        tx.step()
        tx.zero_grad(set_to_none=True)
        if average is not None and case.ema is not None:
            torch._foreach_lerp_(average, [p.detach() for p in live], 1 - case.ema)
        _wait()

    return Timed(call, prepare=lambda: _open(made, case))


def _parts(made: _Torch, count: int) -> list[tuple[dict[str, Any], Any]]:
    rows = {name: value.chunk(count) for name, value in made.inputs.items()}
    labels = made.labels.chunk(count)
    return [({name: value[i] for name, value in rows.items()}, labels[i]) for i in range(count)]
