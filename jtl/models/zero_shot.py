"""Text vectors of classes: what a classifier of images knows before it has seen any.

Reference: Radford et al. 2021, arXiv:2103.00020, section 3.1.4 (prompt ensembles).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.models.backbone import Backbone


def text_vectors(
    backbone: Backbone, class_names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
) -> Float[Array, "classes dim"]:
    """Return the direction of each class: the mean of its prompts' unit embeddings, made a unit.

    Times the temperature, `exp(logit_scale)`, and transposed, they are the kernel of a linear head
    on unit image embeddings.

    Args:
        backbone: of a text and an image tower, such as CLIP, with its inputs.
        class_names: of the classes, in their order.
        templates: texts in which `{}` stands for the name.

    Raises:
        ValueError: there is no class, or a template has no place for the name.
    """
    if not class_names or not templates or not all("{}" in text for text in templates):
        raise ValueError(
            f"templates are {list(templates)[:5]} for {len(class_names)} classes; give at least "
            "one class, and templates that have {} where the name stands"
        )
    vectors = []
    for name in class_names:  # class by class, so that many classes need no more memory
        batch = backbone.inputs(texts=[text.replace("{}", name) for text in templates])
        units = _unit(backbone(batch)["text_embeds"])
        vectors.append(jnp.mean(units, axis=0))
    return _unit(jnp.stack(vectors))


def _unit(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)
