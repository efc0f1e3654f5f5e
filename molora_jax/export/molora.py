"""Our own folder: any run as safetensors, and one file of torch that runs it inside transformers.

    molora.safetensors     every leaf of the run under its path; the config and the base's digest as metadata.
                           `rules.X.load=("molora:DIR",)` reads it
    torch.safetensors      what `molora_torch.py` reads: RULE/LAYER/SITE/{A [1|E, R, D_in], B [1|E, R, D_out], out, inp}
                           with every scale and every matrix between A and B multiplied out, and the routers' leaves
    molora_torch.py        `molora_torch.load(model, DIR)`; needs torch and safetensors alone

Adapters come as their factors, so any adapter that is a product, with or without row factors, runs. What the torch file
has no mathematics for is named in its metadata, and `load` refuses it with that text.
"""

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from molora_jax import config as config_lib
from molora_jax import placements
from molora_jax.adapters import ADAPTERS
from molora_jax.adapters.base import Adapter
from molora_jax.core.quant import dense
from molora_jax.core.rules import adapter_sites, layers_named
from molora_jax.core.types import Context
from molora_jax.export import molora_torch
from molora_jax.export.base import Source
from molora_jax.export.peft import IN_TURNS
from molora_jax.io import tensors
from molora_jax.io.base_facts import base_facts
from molora_jax.routers import ROUTERS
from molora_jax.routers.x_lora import XLora
from molora_jax.runs import saved

FAMILIES = (  # decoders of `self_attn` and `mlp`, or of a `mixer`
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "olmo2", "gemma", "gemma2", "gemma3_text", "mixtral",
    "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "mamba", "falcon_mamba",
)  # fmt: skip
LEAVES, TORCH = "molora.safetensors", "torch.safetensors"


def write(source: Source, folder) -> list[str]:
    opened = source.opened
    items = {name: tree for name, tree in opened.items.items() if name != "start"}
    leaves = {path: np.asarray(x) for path, x in flatten_dict(items, sep="/").items()}
    config = config_lib.to_dict(saved.without_inputs(source.config))
    config["base"]["source"] = str(source.config.base.source)
    told = {
        "version": 1, "config": config, "step": opened.step,
        "base": {
            "digest": opened.base.digest, "family": source.backbone.family, "source": config["base"]["source"],
            **base_facts(opened.base),
        },
    }  # fmt: skip
    tensors.write_named(folder / LEAVES, leaves, {"molora": json.dumps(told, sort_keys=True)})
    reason = lacks(source)
    spec = {"lacks": reason} if reason else _spec(source)
    arrays = {} if reason else _arrays(source)
    tensors.write_named(folder / TORCH, arrays, {"molora_torch": json.dumps(spec, sort_keys=True)})
    shutil.copyfile(pathlib.Path(molora_torch.__file__), folder / "molora_torch.py")
    heads = [name for name in opened.items.get("modules") or {} if name != "base"]
    notes = [f"the trained head {name} is in {LEAVES}; molora_torch.py does not run it" for name in heads]
    return [*notes, f"molora_torch.py does not run it: {reason}"] if reason else notes


def lacks(source: Source) -> str:
    """What of a run `molora_torch.py` has no mathematics for ("": nothing)."""
    backbone = source.backbone
    if backbone.family not in FAMILIES:
        return f"a base of the family {backbone.family} (it knows {', '.join(FAMILIES)})"
    for rule in source.rules:
        where, router = placements.of(rule), rule.router
        if where.NAME not in molora_torch.PLACEMENTS:
            return f"rule {rule.name}: the placement {where.NAME or type(where).__name__}"
        if source.on_experts(rule) and any(isinstance(other.router, XLora) for other in source.rules):
            return f"rule {rule.name}: base_experts beside x_lora, which reads the base without them"
        if "dt_proj" in rule.projections:
            return f"rule {rule.name}: dt_proj, whose weight transformers takes without its module"
        if router is not None and _name(ROUTERS, router) not in molora_torch.ROUTERS:
            return f"rule {rule.name}: the router {_name(ROUTERS, router) or type(router).__name__}"
        if _bends(source, rule):
            return f"rule {rule.name}: the adapter {_name(ADAPTERS, rule.adapter) or type(rule.adapter).__name__}"
        if any(f.form is not None for *_, f in _factors(source, rule)):
            return f"rule {rule.name}: adapter.form={getattr(rule.adapter, 'form', '')!r}, which is no product B A"
    return ""


def _bends(source, rule) -> bool:
    """Whether an adapter changes A x before B (one that only stops a gradient there does not)."""
    if type(rule.adapter).latent is Adapter.latent:
        return False
    site = adapter_sites(source.backbone, rule, source.opened.model.segments)[0]
    own = source.by_site.get((rule.name, site.layers[0], site.name), {})
    z = jnp.linspace(-2.0, 2.0, rule.adapter.rank)[None, None]
    return not np.array_equal(rule.adapter.latent(z, own, Context(None, None, None, None, None, site=site)), z)


def _name(table: dict, member) -> str:
    return next((name for name, kind in table.items() if kind is type(member)), "")


def _factors(source, rule):
    """`(layer, site, leaves, factors)` of every place that a rule adapts."""
    for site in adapter_sites(source.backbone, rule, source.opened.model.segments):
        stack = source.backbone.stack_of(site.layers[0])
        kernel = source.opened.base.params[stack.name].get(site.name, {}).get("kernel")
        for layer in site.layers:
            own = source.by_site.get((rule.name, layer, site.name), {})
            W = None if kernel is None else jnp.asarray(dense(kernel[layer - stack.start]))
            ctx = Context(None, None, None, None, None, base=W, site=site, layer=layer)
            yield layer, site, own, rule.adapter.factors(own, source.shared(rule), ctx)


def _spec(source) -> dict:
    rules = []
    for rule in source.rules:
        placement = placements.of(rule)
        one = {
            "name": rule.name, "kind": placement.NAME, "sites": list(rule.projections), "share": rule.share,
            "experts": list(rule.experts), "per_expert": rule.down == "per_expert",
            "scales_base": rule.gates_scale_base, "scopes": list(rule.scopes),
            "leaves_of": {scope: rule.leaves_of(scope) for scope in rule.scopes},
            "decided_by": {scope: placement.decided_by(scope) for scope in rule.scopes},
            "options": dataclasses.asdict(placement), "with_bias": False,
        }  # fmt: skip
        if rule.router is not None:
            options = {n: v for n, v in dataclasses.asdict(rule.router).items() if isinstance(v, (int, float, str))}
            one["router"] = options | {"name": _name(ROUTERS, rule.router)}
        one["with_bias"] = any(f.with_bias for *_, f in _factors(source, rule))
        rules.append(one)
    backbone = source.backbone
    model = {
        "model_type": backbone.family, "num_hidden_layers": backbone.layers, "hidden_size": backbone.width,
        "vocab_size": backbone.vocab,
    }  # fmt: skip
    layers = {str(layer): _layer(source, layer) for layer in range(backbone.layers)}
    scaled, turns = getattr(source.backbone, "scaled_embedding", False), source.backbone.family in IN_TURNS
    return {
        "version": 2, "rules": rules, "layers": layers, "model": model, "base": sorted(_copies(source)),
        "embed_scale": source.backbone.width**0.5 if scaled else 1.0,
        "experts": dict(transposed=turns, in_turns=turns),
    }  # fmt: skip


def _layer(source, layer: int) -> dict:
    """Names in transformers of a layer's projections, the rows of those that are a part of a module, its sub-blocks."""
    places = {site: source.place(layer, site) for site in source.backbone.stack_of(layer).sites}
    attn = next(iter(places.values()))[0].rpartition(".")[0]
    return {
        "modules": {site: name for site, (name, _) in places.items()},
        "rows": {site: [part.start, part.stop] for site, (_, part) in places.items() if part is not None},
        "blocks": {"attn": attn, "ffn": f"{attn.rpartition('.')[0]}.mlp"},
    }  # fmt: skip


def _copies(source) -> dict:
    """Trained copies of the base's leaves, by their names in its checkpoint."""
    copies, out = flatten_dict((source.opened.items.get("modules") or {}).get("base", {}), sep="/"), {}
    for path, value in copies.items():
        leaf = source.shapes[path]
        for name, index in leaf.files():
            own = value[index].T if leaf.turned else value[index]
            if leaf.part is not None:  # its neighbours are trained too
                whole = out.get(source.named(name), np.empty(leaf.file_shape, np.float32))
                leaf.taken(whole)[...] = own
                own = whole
            out[source.named(name)] = own
    return out


def _arrays(source) -> dict:
    out = {f"base/{name}": x for name, x in _copies(source).items()}
    for rule in source.rules:
        scale = np.float32(rule.adapter.scale())
        for layer, site, own, f in _factors(source, rule):
            A = np.asarray(f.A) if f.mid is None else np.asarray(jnp.matmul(f.mid, f.A))
            key = f"{rule.name}/{layer}/{site.name}"
            out |= {f"{key}/A": A, f"{key}/B": scale * np.asarray(f.B)}
            out |= {f"{key}/{n}": np.asarray(getattr(f, n)) for n in ("out", "inp") if getattr(f, n) is not None}
            if rule.router is not None and rule.router.IN_RANK:
                out[f"{key}/read"] = np.asarray(own["A"][0])
        for item, tag in (("adapters", "router"), ("router_state", "state")):
            for path, x in flatten_dict(source.opened.items[item].get(rule.name, {}), sep="/").items():
                out |= _router_leaf(rule.name, path, np.asarray(x), tag)
    return {name: np.float32(x) for name, x in out.items()}


def _router_leaf(rule: str, path: str, x, tag: str) -> dict:
    """`SEGMENT/router/SCOPE/LEAF [L, ...]` by layer, `shared/...` as it is."""
    segment, *rest = path.split("/")
    if segment == "shared":
        whole = rest[:2] == ["router", "model"]
        return {f"{rule}/shared/{tag}/{'/'.join(rest[1:] if whole else rest)}": x[0] if whole else x}
    if rest[0] != "router":
        return {}
    layers = zip(layers_named(segment), x, strict=True)
    return {f"{rule}/{layer}/{tag}/{'/'.join(rest[1:])}": row for layer, row in layers}
