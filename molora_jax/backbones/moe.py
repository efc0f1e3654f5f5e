"""Decoders whose feed-forward blocks are experts that the base routes to: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE.

    p = softmax(W_r x),  S = the K largest of p,  w = p on S (divided by its sum where `normalised`)
    y = sum_{e in S} w_e W_d[e] (act(W_g[e] x) * W_u[e] x)   (+ sigmoid(w_s x) FFN_s(x), Qwen2-MoE's shared expert)

    blocks/router/kernel [L, D, E]   blocks/experts/{gate, up [L, E, D, F], down [L, E, F, D]}
    blocks/shared/{gate, up, down}/kernel   blocks/shared_gate/kernel [L, D, 1]   where the family has them

The rest is Llama's. The experts' kernels never leave their stack as a layer's slice. Sites are those of attention; the
base's own experts are changed by the placement `base_experts`. Padding is not routed.
B batch, S sequence, T tokens, D width, F an expert's width, E experts, K active experts, L layers, H heads.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from molora_jax.backbones.base import NO_SSM, WHOLE, Leaf, Stack, projection
from molora_jax.backbones.llama import AT, Llama
from molora_jax.config.fields import ATTENTION, FFN
from molora_jax.core import routing as routing_math
from molora_jax.core.lowrank import frozen_linear
from molora_jax.core.types import Routing
from molora_jax.errors import InputError
from molora_jax.placements.ffn import ACTIVATIONS

NO_FFN = "There is no one dense FFN: the base routes to its experts; placement=dict(name='base_experts') adapts them."


@dataclasses.dataclass(frozen=True)
class Moe(Llama):
    """`F = expert_width`; `active` is K; `shared_width` 0: there is no shared expert."""

    experts: int = 0
    active: int = 0
    expert_width: int = 0
    normalised: bool = True
    shared_width: int = 0

    ABSENT: ClassVar[dict[str, str]] = NO_SSM | dict.fromkeys(("gate", "up", "down", "ffn"), NO_FFN)
    TITLE: ClassVar[str] = ""
    DESCRIBED_LAST: ClassVar[tuple[str, ...]] = ("qk_norm_all",)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        (stack,) = super().stacks
        return (dataclasses.replace(stack, sites=ATTENTION, by_expert=("experts",)),)

    def dims(self, site: str) -> tuple[int, int]:
        """Of a projection; gate, up and down of one expert."""
        wide = {"gate": (self.width, self.expert_width), "down": (self.expert_width, self.width)}
        return wide.get({"up": "gate"}.get(site, site)) or super().dims(site)

    def shapes(self) -> dict[str, Leaf]:
        L, D, E, F = self.layers, self.width, self.experts, self.expert_width
        mixtral = self.family == "mixtral"
        at, theirs = AT + ("block_sparse_moe" if mixtral else "mlp"), [f"{site}_proj" for site in FFN]
        out = super().shapes()
        out["blocks/router/kernel"] = Leaf((L, D, E), WHOLE, f"{at}.gate.weight", 1, True, D**-0.5)
        scale = {"gate": D**-0.5, "up": D**-0.5, "down": F**-0.5 / math.sqrt(2 * L)}
        for site, name in zip(FFN, ("w1", "w3", "w2") if mixtral else theirs, strict=True):
            d_in, d_out = self.dims(site)
            wide = ("tensor", "fsdp") if site == "down" else ("fsdp", "tensor")
            specs = (P(None, "expert", *wide), P(None, None, *wide))
            out[f"blocks/experts/{site}"] = Leaf(
                (L, E, d_in, d_out), specs, f"{at}.experts.{{}}.{name}.weight", 2, True, scale[site], product=True
            )
        if self.shared_width:
            for site, name in zip(FFN, theirs, strict=True):
                inward = site == "down"
                d_in, d_out = (self.shared_width, D) if inward else (D, self.shared_width)
                out[f"blocks/shared/{site}/kernel"] = projection(
                    L, d_in, d_out, f"{at}.shared_expert.{name}", inward=inward
                )
            out["blocks/shared_gate/kernel"] = Leaf(
                (L, D, 1), WHOLE, f"{at}.shared_expert_gate.weight", 1, True, D**-0.5
            )
        return out

    def _feed_forward(self, p, h, at, adapt):
        with jax.named_scope("route"):
            routing = self.route(self._scores(adapt, p, h), at.valid)
        out = adapt.experts(h, routing, p["experts"], self.activation)
        if self.shared_width:
            with jax.named_scope("shared_expert"):
                g, u = (frozen_linear(p["shared"][site]["kernel"], h) for site in ("gate", "up"))
                shared = frozen_linear(p["shared"]["down"]["kernel"], ACTIVATIONS[self.activation](g) * u)
                open_ = jax.nn.sigmoid(frozen_linear(p["shared_gate"]["kernel"], h).astype(jnp.float32))
                out = out + (open_ * shared.astype(jnp.float32)).astype(out.dtype)
        return out

    def _scores(self, adapt, p, h):
        """The router's logits `[B, S, E]`."""
        return routing_math.logits(adapt.base_router(p["router"]["kernel"]).T, h)

    def route(self, z, valid) -> Routing:
        """The base's decision by its router's logits `z [B, S, E]`; `valid [B, S]`."""
        probs = jax.nn.softmax(z, axis=-1)
        best = routing_math.top_k(probs, self.active)
        gates = jnp.where(best, probs, 0.0)
        if self.normalised:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        selected = best & valid[..., None]
        return Routing(jnp.where(selected, gates, 0.0), selected, z, probs, valid, k_max=self.active)


def fields(config: dict, number, where: str) -> dict:
    """The fields of `Moe` that a Hugging Face `config.json` says beyond Llama's.

    Raises:
      InputError: dense layers between the routed ones, more active experts than there are.
    """
    experts = number("num_experts" if config.get("num_experts") is not None else "num_local_experts")
    active, family = number("num_experts_per_tok"), config["model_type"]
    if active > experts:
        raise InputError(f"{where}: num_experts_per_tok", got=str(active), expected=f"at most the {experts} experts")
    for name, off in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        value = config.get(name)
        if value is not None and value != off:
            raise InputError(
                f"{where}: {name}", got=str(value)[:80], expected=f"{off}: every layer has experts",
                fix="Dense layers between those with experts are not supported: choose another model.",
            )  # fmt: skip
    found = dict(
        experts=experts, active=active, normalised=family == "mixtral" or flag(config, "norm_topk_prob", where)
    )
    found["expert_width"] = number("moe_intermediate_size" if family.startswith("qwen") else "intermediate_size")
    if family == "qwen2_moe":
        found["shared_width"] = number("shared_expert_intermediate_size")
        found["qkv_bias"] = flag(config, "qkv_bias", where)
    return found


def flag(config: dict, name: str, where: str) -> bool:
    value = config.get(name)
    if value not in (None, True, False) or type(value) is int:
        raise InputError(f"{where}: {name}", got=str(value)[:80], expected="true or false")
    return bool(value)
