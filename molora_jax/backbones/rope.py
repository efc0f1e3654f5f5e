"""Rotary frequencies: the kinds of scaling, and how a Hugging Face config says them.

    angle(p, i) = p * theta^(-i / half) * m_i        i = 0 .. half - 1, half = H_d / 2
    cos, sin are multiplied by a (only yarn and longrope have a != 1), so scores by a^2

    linear   m_i = 1 / factor
    llama3   m_i = s + (1 - s) / factor     s: 1 for pairs that turn more than `high` times in the original context,
                                            0 for fewer than `low` times, between linear in the turns
    dynamic  theta (factor n / context - (factor - 1))^(r / (r - 2)) in theta's place, for a text of n > context tokens
    longrope m_i = 1 / short_i, of a text of n > context tokens 1 / long_i;  a = sqrt(1 + ln(factor) / ln(context))
    yarn     m_i = s + (1 - s) / factor     s: the same, between linear in i;  a = 0.1 ln(factor) + 1

`r` is the part of a head that turns. `dynamic` begins beyond `max_position_embeddings` and carries a model to `factor`
times as many. Its frequencies follow the length n of a token's own text: a text's numbers do not depend on what it is
packed or batched with. (transformers takes the longest text of the batch.) A text that grows over the bound changes the
keys of all its tokens, in every layer: no cache serves it (`stays`).
Source: transformers' `modeling_rope_utils.py`; YaRN is Peng et al. 2023, arXiv 2309.00071.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from molora_jax.backbones.hf_fields import shown
from molora_jax.errors import InputError

KINDS = ("default", "linear", "dynamic", "longrope", "llama3", "yarn")
_KEYS = {  # what each kind reads; another key that is set is refused
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
_NOTES = ("rope_type", "type", "rope_theta", "finetuned")  # say nothing about the frequencies beyond kind and theta
_OUTSIDE = {"rope_theta": 10000.0, "partial_rotary_factor": None, "original_max_position_embeddings": None}  # defaults
_OLDER = {"su": "longrope"}
_NEUTRAL = {"partial_rotary_factor": (1,), "attn_factor": (1,), "extrapolation_factor": (1,)}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """`low`, `high`: llama3's frequency factors, or yarn's beta_slow and beta_fast. `context`: the original one."""

    BY_LENGTH: ClassVar[tuple[str, ...]] = ("dynamic", "longrope")

    kind: str
    factor: float
    low: float = 0.0
    high: float = 0.0
    context: float = 0.0
    attention: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on the length of the text."""
        return self.kind in self.BY_LENGTH

    def stays(self, first: int, last: int) -> bool:
        """Whether the frequencies of a text of `first` tokens are those that it has with `last`."""
        return not self.by_length or last <= self.context or (self.kind == "longrope" and first > self.context)

    def frequencies(self, theta: float, r: int, lengths):
        """Of each token by the length of its text: `lengths [...]` -> `[..., r / 2]`, float32."""
        exponents = -jnp.arange(r // 2, dtype=jnp.float32) / (r // 2)
        if self.kind == "longrope":
            short, long = (jnp.array(factors, jnp.float32) for factors in (self.short, self.long))
            return theta**exponents / jnp.where(lengths[..., None] > self.context, long, short)
        grown = jnp.maximum(lengths, self.context).astype(jnp.float32)
        base = theta * (self.factor * grown / self.context - (self.factor - 1)) ** (r / (r - 2))
        return base[..., None] ** exponents

    def multipliers(self, theta: float, head_dim: int):
        """`m [H_d / 2]`, float64."""
        half = head_dim // 2
        if self.kind == "linear":
            return np.full(half, 1 / self.factor)
        if self.kind == "llama3":
            turns = self.context * theta ** (-np.arange(half) / half) / (2 * math.pi)
            keep = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        else:
            first, last = (self._pair(turns, theta, head_dim) for turns in (self.high, self.low))
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            last = last + 0.001 if first == last else last
            keep = 1 - np.clip((np.arange(half) - first) / (last - first), 0.0, 1.0)
        return keep + (1 - keep) / self.factor

    def _pair(self, turns, theta, head_dim):
        """The pair (a real number) that turns so many times in the original context."""
        return head_dim * math.log(self.context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def rotated(config: dict, *, where: str, head_dim: int) -> int:
    """How much of a head turns: `partial_rotary_factor`, inside the rotary parameters before outside.

    Raises:
      InputError: no share of a head, or an odd number of entries.
    """
    inside = _options(config, where)[0].get("partial_rotary_factor")
    share = config.get("partial_rotary_factor") if inside is None else inside
    share = 1.0 if share is None else share
    r = int(head_dim * share) if type(share) in (int, float) and 0 < share <= 1 else 0
    if r < 2 or r % 2:
        raise InputError(
            f"{where}: partial_rotary_factor", got=shown(share), expected=f"a share of {head_dim} that is even"
        )
    return r


def read(config: dict, *, where: str, number, head_dim: int, partial: bool = False) -> tuple[float, RopeScaling | None]:
    """Base and scaling that a Hugging Face config says. `head_dim`: what of it turns (`partial`: maybe less).

    `rope_parameters` (transformers 5) and `rope_scaling` (before) may both be there, if they agree; a `rope_theta`
    inside wins over the one outside. `number(key, default, kind=, source=, where=)` reads a positive number.

    Raises:
      InputError: a kind or a key that is not known, two values for one key, a number out of range.
    """
    options, at = _options(config, where)
    kind = options.get("rope_type") or "default"
    kind = _OLDER.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(
            f"{where}: rope_scaling", got=shown(kind), expected=f"none, {', '.join(KINDS[1:-1])} or {KINDS[-1]}",
            fix="Choose a model with one of these kinds of rotary scaling.",
        )  # fmt: skip
    for key, value in options.items():
        neutral = value is None or (type(value) in (int, float, str) and value in _NEUTRAL.get(key, ()))
        neutral |= partial and key == "partial_rotary_factor"
        if key not in (*_KEYS[kind], *_NOTES) and not neutral:
            raise InputError(
                f"{where}: {at}.{key}", got=shown(value), expected=f"no such field for rope_type {kind}",
                fix="It changes the positions in a way that is not implemented here: choose another model.",
            )  # fmt: skip

    def option(key, default=None):
        return number(key, default, kind=float, source=options, where=f"{where}: {at}.{key}")

    theta = option("rope_theta", number("rope_theta", 10000.0, kind=float))
    if theta <= 1:
        raise InputError(f"{where}: rope_theta", got=str(theta), expected="a number above 1")
    if kind == "default":
        return theta, None
    context = number("max_position_embeddings")
    original = option("original_max_position_embeddings", float(context))
    if kind in ("llama3", "yarn", "longrope"):  # outside wins here, as in transformers
        original = number("original_max_position_embeddings", original, kind=float)
    if kind == "longrope":
        factor = option("factor", context / original)
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        short, long = (_factors(options, name, head_dim // 2, f"{where}: {at}") for name in ("short", "long"))
        attention = option("attention_factor", grown)
        return theta, RopeScaling(kind, factor, context=original, attention=attention, short=short, long=long)
    if kind == "dynamic":
        factor = option("factor")
        if factor < 1 or head_dim <= 2:
            raise InputError(f"{where}: {at}.factor", got=str(factor), expected="at least 1, and heads wider than 2")
        return theta, None if factor == 1 else RopeScaling("dynamic", factor, context=float(context))
    factor = option("factor", context / original if kind == "yarn" and original != context else None)
    if kind == "linear":
        return theta, None if factor == 1 else RopeScaling("linear", factor)
    if kind == "llama3":
        low, high = option("low_freq_factor"), option("high_freq_factor")
        if low >= high:
            raise InputError(f"{where}: {at}.high_freq_factor", got=str(high), expected=f"more than {low}")
        return theta, RopeScaling("llama3", factor, low, high, original)
    low, high = option("beta_slow", 1.0), option("beta_fast", 32.0)
    if low > high:
        raise InputError(f"{where}: {at}.beta_fast", got=str(high), expected=f"at least beta_slow, {low}")
    truncate = options.get("truncate")
    if truncate not in (None, True, False):
        raise InputError(f"{where}: {at}.truncate", got=shown(truncate), expected="true or false")
    attention = option("attention_factor", _attention(factor, option("mscale", 0.0), option("mscale_all_dim", 0.0)))
    return theta, RopeScaling("yarn", factor, low, high, original, attention, truncate is not False)


def _factors(options, name, half, where) -> tuple[float, ...]:
    """longrope's divisor of each frequency."""
    given = options.get(f"{name}_factor")
    numbers = isinstance(given, list) and all(type(x) in (int, float) and 0 < x < math.inf for x in given)
    if not numbers or len(given) != half:
        raise InputError(f"{where}.{name}_factor", got=shown(given), expected=f"a list of {half} positive numbers")
    return tuple(float(x) for x in given)


def _attention(factor, mscale, all_dim):
    grown = lambda by: 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
    return grown(mscale) / grown(all_dim) if mscale and all_dim else grown(1.0)


def _options(config, where):
    """`rope_scaling`, or else `rope_parameters`, and its name. Of both in one file transformers reads the first alone.

    Raises:
      InputError: no object, two values for one key, a second object that says something else.
    """
    found = {}
    for name in ("rope_scaling", "rope_parameters"):
        options = config.get(name)
        if options is None:
            continue
        if not isinstance(options, dict):
            raise InputError(f"{where}: {name}", got=shown(options), expected="an object or null")
        if options:
            found[name] = _one_kind(_flat(options, f"{where}: {name}"), f"{where}: {name}")
    if len(found) == 2:
        _agree(found["rope_scaling"], found["rope_parameters"], config, where)
    name = next(iter(found), "rope_scaling")
    return found.get(name, {}), name


def _agree(scaling: dict, parameters: dict, config, where):
    """Raises InputError where `rope_parameters` sets what `rope_scaling`, with the fields outside, says otherwise."""
    for key, value in parameters.items():
        said = scaling.get(key)
        if said is None and key in _OUTSIDE:
            said = _OUTSIDE[key] if config.get(key) is None else config[key]
        if value is not None and value != said:
            raise InputError(
                f"{where}: rope_parameters.{key}", got=shown(value),
                expected="nothing" if said is None else f"{shown(said)}", fix="rope_scaling is there too, and "
                "transformers reads that one: keep the right one of the two objects.",
            )  # fmt: skip


def _one_kind(options: dict, where) -> dict:
    """With `type`, the older name, as `rope_type`."""
    options = dict(options)
    older, kind = options.pop("type", None), options.get("rope_type")
    if older is None or kind is None:
        return options if older is None else options | {"rope_type": older}
    if older != kind:
        raise InputError(
            f"{where}.type", got=shown(older), expected=f"{shown(kind)}, as rope_type says",
            fix="Keep the right one of the two.",
        )  # fmt: skip
    return options


def _flat(options, where):
    """Parameters by kind of layer (`full_attention`, `sliding_attention`) as one, where they are the same."""
    nested = {key: value for key, value in options.items() if key.endswith("_attention")}
    if not nested:
        return dict(options)
    first, *others = nested.values()
    if len(nested) < len(options) or not isinstance(first, dict) or any(other != first for other in others):
        raise InputError(where, got="several kinds of layers", expected="the same rotary frequencies for every layer")
    return dict(first)
