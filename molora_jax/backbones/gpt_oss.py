"""gpt-oss: a base that routes, with biases everywhere, sinks in attention and a clamped activation.

    attention      softmax over the keys and one sink a head, whose value is 0; every second layer slides
    p = softmax of the K largest of W_r x + b_r
    y = sum_e p_e (W_d[e] (a(g) b(u)) + b_d[e]),   g = W_g[e] x + b_g[e],  u = W_u[e] x + b_u[e]
    a(g) = m sigmoid(1.702 m), m = min(g, 7);   b(u) = clip(u, -7, 7) + 1

    blocks/sinks [L, H]   blocks/router/bias [L, E]   blocks/experts/{gate_bias, up_bias [L, E, F], down_bias [L, E, D]}

A checkpoint has gate and up interleaved in one tensor `[E, D, 2 F]`, in bfloat16 or as MXFP4 blocks (`io/mxfp4.py`),
which are read into the dtype of the base. OpenAI 2025, arXiv 2508.10925; the activation as transformers has it.
"""

import dataclasses
import math

from jax.sharding import PartitionSpec as P

from molora_jax.backbones import moe
from molora_jax.backbones.base import WHOLE, Leaf, Part
from molora_jax.backbones.hf_fields import shown
from molora_jax.backbones.llama import AT
from molora_jax.backbones.moe import Moe
from molora_jax.core import routing as routing_math
from molora_jax.errors import InputError

SCALING = dict(  # where a config says none
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096
)


@dataclasses.dataclass(frozen=True)
class GptOss(Moe):
    def shapes(self) -> dict[str, Leaf]:
        L, D, E, F = self.layers, self.width, self.experts, self.expert_width
        at, out = f"{AT}mlp.", super().shapes()
        out["blocks/sinks"] = Leaf((L, self.heads), WHOLE, f"{AT}self_attn.sinks", 1, fill=0.0)
        out["blocks/router/kernel"] = Leaf((L, D, E), WHOLE, f"{at}router.weight", 1, True, D**-0.5)
        out["blocks/router/bias"] = Leaf((L, E), WHOLE, f"{at}router.bias", 1, fill=0.0)
        wide = (P(None, "expert", "fsdp", "tensor"), P(None, None, "fsdp", "tensor"))
        thin = (P(None, "expert", "tensor"), P(None, None, "tensor"))
        for i, site in enumerate(("gate", "up")):
            half = lambda axis, i=i: Part(axis, i, 2 * F, 2 * F, step=2)  # noqa: E731
            name = f"{at}experts.gate_up_proj"
            out[f"blocks/experts/{site}"] = Leaf((L, E, D, F), wide, name, 1, scale=D**-0.5, part=half(2), product=True)
            out[f"blocks/experts/{site}_bias"] = Leaf((L, E, F), thin, f"{name}_bias", 1, fill=0.0, part=half(1))
        inward = (P(None, "expert", "tensor", "fsdp"), P(None, None, "tensor", "fsdp"))
        name, scale = f"{at}experts.down_proj", F**-0.5 / math.sqrt(2 * L)
        out["blocks/experts/down"] = Leaf((L, E, F, D), inward, name, 1, scale=scale, product=True)
        out["blocks/experts/down_bias"] = Leaf((L, E, D), (P(None, "expert"), *WHOLE), f"{name}_bias", 1, fill=0.0)
        return out

    def _scores(self, adapt, p, h):
        return routing_math.logits(adapt.base_router(p["router"]["kernel"]).T, h, p["router"]["bias"])


def before(config: dict, where: str) -> dict:
    """A config with the rotary scaling that is meant where none is said.

    Raises:
      InputError: weights in another form than MXFP4.
    """
    form = config.get("quantization_config")
    method = form.get("quant_method") if isinstance(form, dict) else form
    if method not in (None, "mxfp4"):
        raise InputError(
            f"{where}: quantization_config", got=shown(method), expected="mxfp4, or none",
            fix="Choose the model as bfloat16 or in its own form, MXFP4.",
        )  # fmt: skip
    said = config.get("rope_scaling") or config.get("rope_parameters")
    return config if said else config | {"rope_scaling": SCALING}


def fields(config: dict, number, where: str) -> dict:
    """The fields of `GptOss` beyond Llama's.

    Raises:
      InputError: another clamp than the models of this family have.
    """
    for name, usual in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        value = config.get(name)
        if value is not None and value != usual:
            raise InputError(f"{where}: {name}", got=shown(value), expected=f"{usual}, as in the models of OpenAI")
    return moe.fields(config, number, where) | {"activation": "clamped", "normalised": True}
