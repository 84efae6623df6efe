"""Frequencies of the rotary position embedding, by the kinds of scaling that checkpoints state.

With `s` numbers of a head that are turned, the plain ones are `theta^(-2i / s)`, i = 0 .. s/2 - 1.
A model that shall read longer texts than it was trained on has them scaled:

| kind | frequencies |
|---|---|
| "default" | plain |
| "linear" | plain / factor |
| "dynamic" | of `theta (factor length / longest - factor + 1)^(s / (s - 2))` past `longest` |
| "yarn" | high ones plain, low ones plain / factor, a ramp between; cosine and sine are scaled |
| "llama3" | wavelengths under original / high plain, over original / low divided, a mean between |
| "longrope" | plain / a stated factor of each, one list for short texts and one for long ones |

Reference: Su et al. 2021, arXiv:2104.09864; Chen et al. 2023, arXiv:2306.15595 (linear); Peng et
al. 2023, arXiv:2309.00071 (dynamic in appendix A.1, YaRN); Dubey et al. 2024, arXiv:2407.21783
(llama3); Ding et al. 2024, arXiv:2402.13753 (LongRoPE).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
_STRETCHED = ("llama3", "longrope", "yarn")
_NEEDED = {
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """How the positions of a model turn its queries and keys.

    Attributes:
        size: of a head, all of which is turned.
        theta: base of the wavelengths.
        kind: one of `KINDS`.
        longest: positions that the model is made for, `max_position_embeddings`.
        original: positions that it was trained on before it was stretched.
        factor: how far it was stretched.
        scale: of cosine and sine.
        low_freq_factor: of "llama3".
        high_freq_factor: of "llama3".
        beta_fast: of "yarn": turns within `original` from which on a pair stays as it is.
        beta_slow: of "yarn": turns below which a pair is divided by the factor.
        truncate: of "yarn": whether the ends of the ramp are whole numbers.
        short_factor: of "longrope", one number for each pair.
        long_factor: of "longrope", for texts longer than `original`.
    """

    size: int
    theta: float = 10000.0
    kind: str = "default"
    longest: int = 2048
    original: int = 2048
    factor: float = 1.0
    scale: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def rope_of(config: Mapping[str, Any], size: int) -> Rope:
    """Return what a config states, in the spelling of today (rope_parameters) or of before.

    Args:
        config: the dict of `config.json`, with `rope_parameters`, or `rope_scaling` and
            `rope_theta`; and with `max_position_embeddings`.
        size: of a head.

    Raises:
        ValueError: the size is odd, the kind is not known, a part of a head only is turned, or a
            number is missing.

    >>> config = dict(max_position_embeddings=64, rope_theta=100.0)
    >>> rope_of({**config, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8).factor
    2.0
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = stated.get("rope_type") or stated.get("type") or "default"
    _check(stated, kind, size, stated.get("partial_rotary_factor"))
    longest = int(config.get("max_position_embeddings") or 2048)
    original = stated.get("original_max_position_embeddings")
    if kind in _STRETCHED:
        original = config.get("original_max_position_embeddings") or original
    original = int(original or longest)
    factor = stated.get("factor")
    if factor is None:
        factor = longest / original
    floats = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    own: dict[str, Any] = {name: float(stated[name]) for name in floats if stated.get(name)}
    if kind == "longrope":
        own |= {name: tuple(map(float, stated[name])) for name in _NEEDED[kind]}
        wrong = {name: len(own[name]) for name in _NEEDED[kind] if len(own[name]) != size // 2}
        if wrong:
            raise ValueError(
                f"the lists of rope 'longrope' have {wrong} numbers; heads of {size} have "
                f"{size // 2} pairs; correct the lists in config.json"
            )
    return Rope(
        size=size,
        theta=_theta(config, stated),
        kind=kind,
        longest=longest,
        original=original,
        factor=float(factor),
        scale=_scale(kind, float(factor), original, stated),
        truncate=bool(stated.get("truncate", True)),
        **own,
    )


def _theta(config: Mapping[str, Any], stated: Mapping[str, Any]) -> float:
    """Return the base: beside the scaling, in the config, or as transformers filled it in."""
    filled = (config.get("rope_parameters") or {}).get("rope_theta")
    return float(stated.get("rope_theta") or config.get("rope_theta") or filled or 10000.0)


def _check(stated: Mapping[str, Any], kind: str, size: int, part: float | None) -> None:
    if kind not in KINDS:
        raise ValueError(
            f"the config has rope_type={kind!r}; jtl has {KINDS}; use a checkpoint of one of these"
        )
    if size % 2 or part not in (None, 1, 1.0):
        raise ValueError(
            f"the config has heads of {size} numbers and partial_rotary_factor={part}; rotary "
            "positions here turn pairs over the whole of a head; use a checkpoint of that kind"
        )
    missing = [name for name in _NEEDED.get(kind, ()) if stated.get(name) is None]
    if missing:
        raise ValueError(
            f"the rope {kind!r} of the config lacks {missing}; it has {sorted(stated)}; "
            "add them to config.json"
        )


def _scale(kind: str, factor: float, original: int, stated: Mapping[str, Any]) -> float:
    """Return by what cosine and sine are multiplied."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if stated.get("attention_factor") is not None:
        return float(stated["attention_factor"])
    if factor <= 1.0:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    over, under = stated.get("mscale"), stated.get("mscale_all_dim")
    if over and under:
        return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1.0


def frequencies(rope: Rope, length: int | jax.Array) -> Float[Array, " half"]:
    """Return the radians that each pair of a head turns by for one position, in float32.

    Args:
        rope: of the model.
        length: one more than the largest position; "dynamic" and "longrope" depend on it. They
            depend on this text's length alone, where transformers' "dynamic" keeps the
            frequencies of the longest text that the process has seen.

    >>> frequencies(Rope(size=4, theta=16.0), 8).tolist()
    [1.0, 0.25]
    >>> frequencies(Rope(size=4, theta=16.0, kind="linear", factor=2.0), 8).tolist()
    [0.5, 0.125]
    """
    power = np.arange(0, rope.size, 2) / rope.size
    plain = rope.theta**-power
    if rope.kind == "dynamic":
        longer = jnp.maximum(length, rope.longest) / rope.longest
        growth = (rope.factor * longer - (rope.factor - 1)) ** (rope.size / (rope.size - 2))
        return jnp.asarray(plain, jnp.float32) * growth ** jnp.asarray(-power, jnp.float32)
    if rope.kind == "longrope":
        short, long = (plain / np.asarray(f) for f in (rope.short_factor, rope.long_factor))
        chosen = jnp.where(length > rope.original, jnp.asarray(long), jnp.asarray(short))
        return chosen.astype(jnp.float32)
    if rope.kind == "linear":
        plain = plain / rope.factor
    if rope.kind == "yarn":
        plain = _yarn(rope, plain)
    if rope.kind == "llama3":
        plain = _llama3(rope, plain)
    return jnp.asarray(plain, jnp.float32)


def _yarn(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Divide the slow pairs by the factor, with a ramp over the places between."""

    def place(turns: float) -> float:
        """Return the place (in numbers of a head) that makes so many turns within `original`."""
        ratio = rope.original / (turns * 2 * math.pi)
        return rope.size * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    high = high + 0.001 if low == high else high  # no division by zero; the published constant
    ramp = np.clip((np.arange(rope.size // 2) - low) / (high - low), 0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Divide long wavelengths by the factor, with a ramp over the turns within `original`."""
    turns = rope.original * plain / (2 * math.pi)
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = np.clip(share, 0, 1)
    return (1 - share) * plain / rope.factor + share * plain
