"""The Flax classes of transformers 4, timed: run by `benchmarks.backbones --flax PYTHON`.

    PYTHON -m benchmarks.flax_steps '{"name": "bert", "repeats": 5, "batch": null, "dtype": null}'

Written as well as its users write it: the module under `jit`, AdamW with clipping of optax on all
weights, buffers donated. Prints {"forward": seconds, "full": seconds}, the least of the repeats.
"""

import json
import sys
from typing import Any

from benchmarks import measure, shapes
from benchmarks.jtl_steps import CLIP

CLASSES = {
    "bert": "FlaxBertModel",
    "vit": "FlaxViTModel",
    "resnet": "FlaxResNetModel",
    "llama": "FlaxLlamaModel",
}


def main() -> None:
    given = json.loads(sys.argv[1])
    print(json.dumps(measure.clean(seconds(**given), digits=6)))


def seconds(name: str, *, repeats: int, batch: int | None, dtype: str | None) -> dict[str, float]:
    """Return the least seconds of the forward pass and of the full step."""
    import jax

    shape, backend = shapes.SHAPES[name], jax.default_backend()
    dtype = dtype or ("bfloat16" if backend == "gpu" else "float32")
    rows = batch or shape.rows["gpu" if backend == "gpu" else "cpu"]
    forward, step = _calls(shape, shapes.make_batch(shape, rows), dtype)
    return measure.least({"forward": forward, "full": step}, repeats)


def _calls(shape: shapes.Shape, batch: dict[str, Any], dtype: str) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp
    import optax
    import transformers

    made = getattr(transformers, CLASSES[shape.family])
    options = {"input_shape": (1, 224, 224, 3)} if shape.family == "resnet" else {}
    config = made.config_class(**shapes.config_of(shape, None))
    model = made(config, seed=0, dtype=jnp.dtype(dtype), **options)
    inputs = {name: jnp.asarray(batch[name]) for name in batch if name not in ("label", "mask")}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = jnp.moveaxis(inputs["pixel_values"], -1, 1)
    labels = jnp.asarray(batch["label"])
    width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
    stats = model.params.get("batch_stats")
    body = model.params["params"] if stats else model.params
    params = {"body": body, "head": jnp.zeros((width, 2))}

    def logits(params: Any, key: Any, train: bool) -> Any:
        own = {"params": params["body"], "batch_stats": stats} if stats else params["body"]
        extra = {} if shape.family == "llama" else {"dropout_rng": key}
        out = model(**inputs, params=own, train=train, **({} if stats else extra))
        out = out[0] if stats and train else out
        if shape.family == "resnet":
            pooled = out.pooler_output.reshape(len(labels), -1)
        else:
            pooled = {"bert": lambda x: x.mean(1), "vit": lambda x: x[:, 0]}.get(
                shape.family, lambda x: x[:, -1]
            )(out.last_hidden_state)
        return pooled.astype(jnp.float32) @ params["head"]

    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(1e-5, weight_decay=0.01))

    def step(params: Any, state: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            found = logits(params, key, True)
            return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    key = jax.random.key(0)
    ahead = jax.jit(lambda params: logits(params, key, False))
    held = [jax.tree.map(jnp.array, params), tx.init(params)]
    stepped = jax.jit(step, donate_argnums=(0, 1))

    def call() -> Any:
        held[0], held[1], value = stepped(held[0], held[1], key)
        return jax.block_until_ready((held[0], value))

    forward = measure.Timed(lambda: jax.block_until_ready(ahead(params)))
    return forward, measure.Timed(call)


if __name__ == "__main__":
    main()
