"""The first b components of every pair: what a run of nested ranks was trained for (DyLoRA, arXiv 2210.07558).

    B A  ->  B_{1:b} A_{1:b},   with the scale alpha / b after `dylora`, and that of the run (s) after any other adapter

The order is that of the components, not of singular values (for the best form of rank b: `task_arithmetic`, form=svd).
What comes out is plain LoRA of rank b; routers and their state, heads and copies of base leaves stay. Of a run of
another adapter it shows what its training did not care for.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from molora_jax import config as config_lib
from molora_jax.adapters.dylora import DyLora
from molora_jax.errors import InputError
from molora_jax.surgery.base import Result, Surgery
from molora_jax.surgery.merge_into_base import formed


@dataclasses.dataclass(frozen=True)
class Truncate(Surgery):
    """`rank` is b."""

    rank: int = 1

    PARENTS: ClassVar[tuple] = (1, 1)
    LIMITS: ClassVar[dict] = {"rank": (1, None)}

    def check(self, parents):
        (parent,) = parents
        if not parent.model.rules:
            raise parent.refuse("without adapters", "a run of adapters that are pairs A, B")
        for key in parent.view():
            if not key.site.startswith("router/") and key.leaf not in ("A", "B"):
                name = f"{key.site}/{key.leaf} of the rule {key.rule}"
                raise parent.refuse(f"which has {name}", "adapters that are pairs A, B (lora, rslora, allora, dylora)")
        for rule in parent.model.rules:
            if formed(parent, rule):
                raise parent.refuse(
                    f"whose rule {rule.name} has experts that are no products (adapter.form)", "pairs A, B"
                )
            if self.rank > rule.adapter.rank:
                raise InputError(
                    "surgery.rank", got=str(self.rank), fix="Lower it.",
                    expected=f"at most {rule.adapter.rank}, the rank of the rule {rule.name}",
                )  # fmt: skip

    def apply(self, parents):
        (parent,) = parents
        b, config = self.rank, parent.config.copy_and_resolve_references()
        with config.unlocked():
            for rule in parent.model.rules:
                nested = isinstance(rule.adapter, DyLora)
                alpha = rule.adapter.alpha if nested else b * rule.adapter.scale()
                config.method.rules[rule.name].adapter = dict(
                    name="lora", rank=b, alpha=float(alpha), dropout=rule.adapter.dropout, init="kaiming"
                )
        shape = parent.model.config
        config_lib.check_model(config, shape.layers, shape.dims, shape.ABSENT)
        leaves = {key: x if key.site.startswith("router/") else np.array(x[:, :b]) for key, x in parent.view().items()}
        modules = parent.opened.items.get("modules", {})
        return Result(config, leaves, state=parent.view("router_state"), modules=modules)
