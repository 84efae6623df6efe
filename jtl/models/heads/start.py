"""How a fresh head begins: by its name, or from what is known of the classes.

`kernel_init` gives the initializers by name. The others give the weights of a linear head from
class counts, from features, or from the vectors of a text encoder; `with_start` puts them in.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

STARTS = {
    "normal": nn.initializers.normal(0.02),
    "scaled": nn.initializers.lecun_normal(),
    "zeros": nn.initializers.zeros,
}


def kernel_init(start: str) -> Any:
    """Return the initializer of a head's kernel by its name.

    "normal" has standard deviation 0.02, "scaled" 1 / sqrt(dim) (LeCun's, so that logits of
    features of unit variance begin with unit variance).

    Raises:
        ValueError: no start has this name.
    """
    if start not in STARTS:
        raise ValueError(f"head start {start!r} is not known; there are {sorted(STARTS)}")
    return STARTS[start]


def class_prior(counts: Any) -> Float[Array, " classes"]:
    """Return the bias under which a head without features answers by the classes' shares.

    The first loss is then the entropy of the labels, not log of the number of classes.

    Args:
        counts: examples of each class (classes,), all above 0.

    Raises:
        ValueError: a class has no example.

    >>> jnp.exp(class_prior([3, 1])).tolist()
    [0.75, 0.25]

    Reference: Lin et al. 2017, arXiv:1708.02002, section 3.3 (the prior of a rare class).
    """
    counts = np.asarray(counts, np.float64)
    if counts.min() <= 0:
        absent = np.flatnonzero(counts <= 0).tolist()
        raise ValueError(
            f"the classes {absent} have no example, so their prior is log 0; counts are "
            f"{counts.tolist()}; leave these classes out, or start without a prior"
        )
    return jnp.asarray(np.log(counts / counts.sum()), jnp.float32)


def class_means(
    features: Float[Array, "n dim"], labels: Int[Array, " n"], classes: int, *, scale: float = 1.0
) -> dict[str, Array]:
    """Return kernel and bias of the nearest class mean as a linear layer.

        logit_c = scale (x . m_c - |m_c|^2 / 2) = -scale |x - m_c|^2 / 2 + what all classes share

    Args:
        features: of the training data.
        labels: 0 to classes - 1, each there at least once.
        classes: number of classes.
        scale: larger is surer.

    Raises:
        ValueError: a class has no example.

    >>> made = class_means(jnp.array([[0.0], [2.0], [4.0]]), jnp.array([0, 1, 1]), 2)
    >>> made["kernel"].tolist(), made["bias"].tolist()
    ([[0.0, 3.0]], [-0.0, -4.5])

    Reference: Snell et al. 2017, arXiv:1703.05175, section 2.4.
    """
    counts = jnp.zeros(classes).at[labels].add(1.0)
    if int(jnp.sum(counts == 0)):
        raise ValueError(
            f"the classes {jnp.flatnonzero(counts == 0).tolist()} have no example among "
            f"{len(labels)}; give examples of every class"
        )
    sums = jnp.zeros((classes, features.shape[1])).at[labels].add(features.astype(jnp.float32))
    means = sums / counts[:, None]
    return {"kernel": scale * means.T, "bias": -scale * jnp.sum(means**2, axis=1) / 2}


def text_vectors(vectors: Float[Array, "classes dim"], *, scale: float = 100.0) -> dict[str, Array]:
    """Return kernel and bias of a head that begins as the zero-shot classifier.

    Args:
        vectors: of the class names, by the text encoder that goes with the image encoder.
        scale: of the cosines, CLIP's `exp(logit_scale)`.

    >>> text_vectors(jnp.array([[3.0, 4.0]]), scale=10.0)["kernel"].ravel().tolist()
    [6.0, 8.0]

    Reference: Wortsman et al. 2021, arXiv:2109.01903, section 2.
    """
    wide = vectors.astype(jnp.float32)
    unit = wide / jnp.linalg.norm(wide, axis=1, keepdims=True)
    return {"kernel": scale * unit.T, "bias": jnp.zeros(len(vectors))}


def with_start(model: Any, head: str, start: Mapping[str, Any]) -> Any:
    """Return the model with weights of its linear head replaced.

    Args:
        model: a `Model`.
        head: name of a `Linear` head in it.
        start: "kernel", "bias" or both, such as `class_means` gives.

    Raises:
        ValueError: there is no such linear head, or a shape differs.
    """
    own = model.params["heads"].get(head, {}).get("classifier")
    if own is None:
        raise ValueError(
            f"the model has no linear head {head!r}; it has {sorted(model.heads)}; name a Linear"
        )
    wrong = {
        name: (np.shape(value), None if name not in own else own[name].shape)
        for name, value in start.items()
        if name not in own or np.shape(value) != own[name].shape
    }
    if wrong:
        raise ValueError(
            f"the head {head!r} cannot begin so: {{name: (given, has)}} is {wrong}; "
            "give arrays of the head's shapes"
        )
    made = {name: jnp.asarray(value, own[name].dtype) for name, value in start.items()}
    heads = dict(model.params["heads"])
    heads[head] = {**heads[head], "classifier": {**own, **made}}
    return dataclasses.replace(model, params={**model.params, "heads": heads})
