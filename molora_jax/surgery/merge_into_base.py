"""The base with a run's static adapters in its kernels: a plain model, in Hugging Face form in OUT/base.

    W'_ = (1 + sum (i - 1)) W (1 + sum (o - 1)) + sum A^T M^T s B        W [D_in, D_out], sums over rules on the site

i `[D_in]` and o `[D_out]` are an adapter's factors of the frozen product (DoRA's; (IA)3's o scales the bias too), M
`[R, R]` what stands between A and B. Trained copies of base leaves (`method.train_base`) take their leaves' places; a
trained head stays a module of the run. LoRA on a base's own experts (`base_experts`) goes into each expert's kernel, a
trained copy of its router into its place. A routed rule cannot be merged: what it adds depends on the token. Weights
are written as float32; those of a quantised base (`base.quant`) as the values that its codes stand for, on which the
run was trained, and the new run's base is not quantised.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax import placements
from molora_jax.adapters.base import Adapter
from molora_jax.core.quant import dense, is_quantised
from molora_jax.core.rules import adapter_sites
from molora_jax.core.types import Context
from molora_jax.placements.base_experts import BaseExperts
from molora_jax.runs.modules import in_place
from molora_jax.surgery.base import Result, Surgery


@dataclasses.dataclass(frozen=True)
class MergeIntoBase(Surgery):
    PARENTS: ClassVar[tuple] = (1, 1)

    def check(self, parents):
        (parent,) = parents
        for rule in parent.model.rules:
            if rule.router is not None:
                raise parent.refuse(
                    f"whose rule {rule.name} routes: what it adds depends on the token, and no one kernel holds it",
                    "static adapters: rules without a router", "Decode with the run itself.",
                )  # fmt: skip
            if not placements.of(rule).LOADS and not on_experts(rule):
                raise parent.refuse(
                    f"whose rule {rule.name} changes no kernel of the base ({placements.of(rule).NAME})",
                    "rules on projections",
                )  # fmt: skip
            if type(rule.adapter).latent is not Adapter.latent or formed(parent, rule):
                name = type(rule.adapter).__name__
                raise parent.refuse(f"whose adapter {name} is not linear in its input", "a linear adapter")
        if not parent.model.rules and not parent.opened.items.get("modules", {}).get("base"):
            raise parent.refuse("which changes nothing of its base", "a run with adapters or trained base leaves")

    def apply(self, parents):
        (parent,) = parents
        opened, modules = parent.opened, parent.opened.items.get("modules", {})
        params = _copied(in_place(opened.base.params, modules))
        for (stack, name, i), rules in _meetings(parent).items():  # one kernel at a time is held in float64
            kernel, bias = (params[stack][name].get(leaf) for leaf in ("kernel", "bias"))
            adapters = [(r, site, *parent.leaves_at(r.name, layer, site.name)) for r, layer, site in rules]
            kernel[i], gain = merged_kernel(kernel[i], adapters)
            if bias is not None:
                bias[i] *= gain
        for rule in filter(on_experts, parent.model.rules):
            _merge_experts(params, parent, rule)
        config = parent.config.copy_and_resolve_references()
        with config.unlocked():
            config.method.rules, config.losses, config.method.train_base = {}, {}, ""
        heads = {name: leaves for name, leaves in modules.items() if name != "base"}
        base = dataclasses.replace(opened.base, params=params)
        return Result(config, {}, base=base, modules=heads)


def formed(parent, rule) -> bool:
    """Whether a rule's experts are no product B A (`Factors.form`)."""
    site = adapter_sites(parent.model.config, rule, parent.model.segments)[0]
    own, shared = parent.leaves_at(rule.name, site.layers[0], site.name)
    base = jax.ShapeDtypeStruct((site.d_in, site.d_out), np.float32)
    ctx = Context(None, None, None, None, None, site=site, base=base)
    return jax.eval_shape(rule.adapter.factors, own, shared, ctx).form is not None


def _meetings(parent) -> dict:
    """`{(stack, site, place in the stack): [(rule, layer, site), ...]}`: who changes which kernel."""
    model, found = parent.model, {}
    for rule in model.rules:
        if on_experts(rule):
            continue
        for site in adapter_sites(model.config, rule, model.segments):
            stack = model.config.stack_of(site.layers[0])
            for layer in site.layers:
                found.setdefault((stack.name, site.name, layer - stack.start), []).append((rule, layer, site))
    return found


def on_experts(rule) -> bool:
    return isinstance(placements.of(rule), BaseExperts)


def _merge_experts(params: dict, parent, rule) -> None:
    """Adds `A_e^T s B_e` to the kernels `[L, E, D_in, D_out]` of the base's experts, in place."""
    for (name, layer, site), own in parent.view().by_site().items():
        if name != rule.name or layer is None:
            continue
        stack = parent.model.config.stack_of(layer)
        if site == "router/base":
            params[stack.name]["router"]["kernel"][layer - stack.start] = own["W"].T
            continue
        kernel = params[stack.name]["experts"][site][layer - stack.start]
        A, B = (np.asarray(own[part], np.float64) for part in "AB")
        for e in range(len(kernel)):  # one expert at a time is held in float64
            kernel[e] += rule.adapter.scale() * A[e if len(A) > 1 else 0].T @ B[e if len(B) > 1 else 0]


def merged_kernel(W: np.ndarray, adapters: list) -> tuple[np.ndarray, np.ndarray]:
    """A kernel `[D_in, D_out]` with `(rule, site, own leaves, shared leaves)` of each adapter in it, float64, and the
    factor `[D_out]` of its bias."""
    change, inp, out, gain = np.zeros(W.shape), *(np.ones(n) for n in (*W.shape, W.shape[1]))
    for rule, site, own, shared in adapters:
        ctx = Context(None, None, None, None, None, base=jnp.asarray(W), site=site)
        f = rule.adapter.factors(own, shared, ctx)
        A, B = (np.asarray(x[0], np.float64) for x in (f.A, f.B))
        A = A if f.mid is None else np.asarray(f.mid[0], np.float64) @ A
        change += rule.adapter.scale() * A.T @ B
        inp += 0 if f.inp is None else np.asarray(f.inp[0], np.float64) - 1
        out += 0 if f.out is None else np.asarray(f.out[0], np.float64) - 1
        gain += np.asarray(f.out[0], np.float64) - 1 if f.with_bias else 0
    return inp[:, None] * W.astype(np.float64) * out[None, :] + change, gain


def _copied(tree):
    """The same leaves as float32 arrays of their own, dense: of a quantised kernel a layer at a time."""
    return {k: _copied(v) if isinstance(v, dict) else _dense(v) for k, v in tree.items()}


def _dense(leaf):
    if not is_quantised(leaf):
        return np.array(leaf, np.float32)
    out = np.empty(leaf.shape, np.float32)
    for layer in range(len(out)):
        out[layer] = dense(leaf[layer])
    return out
