"""The trees that a model's rules own: fresh adapters, router state, and which leaves never train.

adapters/<rule>/<segment>/<site>/<leaf> [L_segment, E, ...]      adapters/<rule>/<segment>/router/<scope>/<leaf>
adapters/<rule>/shared/...   leaves without a layer: pools, a head's trunk
adapters/<rule>/shared/router/model/<leaf> [1, ...]   the one router of `share="model"`
router_state                 mirrors the routers
"""

import dataclasses

import jax
import jax.numpy as jnp

from molora_jax import inits
from molora_jax.core import rules as rules_lib
from molora_jax.core.quant import dense


def init_adapters(config, rules, segments, key, params: dict) -> dict:
    """Traceable; a leaf's key folds rule, site and absolute layer. Starts that read the base's gradient are those of a
    gradient of zeros, until `begun_anew` has one."""
    tree: dict = {}
    for rule in rules:
        out: dict = {}
        rule_key = jax.random.fold_in(key, rule.tag)
        routers = []
        for segment in segments:
            if not rule.experts[segment.start]:
                continue
            own = out.setdefault(segment.name, {})
            for name in rule.projections:
                site = rules_lib.site(config, name, segment, rule)
                own[name] = _init_layers(rule.adapter, rule_key, site, config, params)
                own[name] = own[name] if rule.placement is None else rule.placement.kept(name, own[name])
            if rule.base_router == "trained":
                own.setdefault("router", {})["base"] = {"W": _base_router(config, segment, params)}
            for scope in rule.router_scopes:
                site = rules_lib.router_site(config, scope, segment, rule)
                routers.append(site)
                if rule.share != "model":
                    own.setdefault("router", {})[scope] = _init_layers(rule.router, rule_key, site)
        sites = rules_lib.adapter_sites(config, rule, segments)
        shared = dict(rule.adapter.init_shared(jax.random.fold_in(rule_key, 1000), sites))
        if routers:
            shared |= rule.router.init_shared(jax.random.fold_in(rule_key, 1001), tuple(routers))
        if rule.share == "model":  # one router, whatever the layers
            of_model = dataclasses.replace(routers[0], layers=routers[0].layers[:1])
            shared["router"] = {"model": _init_layers(rule.router, rule_key, of_model)}
        if shared:
            out["shared"] = shared
        tree[rule.name] = _without_empty(out)
    return tree


def begun_anew(config, rules, segments, key, params: dict, adapters: dict, layer, base_grad: dict) -> dict:
    """`adapters` of which the leaves at one layer start from the base's gradient there, where their start reads it.

    Traceable, `layer` (absolute) too; `segments` hold the one that it lies in. `key`, `params` as of `init_adapters`;
    `base_grad`: site -> `[D_in, D_out]`.
    """
    (segment,) = segments
    stack = config.stack_of(segment.start)
    for rule in rules:
        rule_key = jax.random.fold_in(key, rule.tag)
        reads = reads_gradient(rule) and rule.experts[segment.start]
        for name in [name for name in rule.projections if name in base_grad] if reads else ():
            site = rules_lib.site(config, name, segment, rule)
            leaf_key = jax.random.fold_in(jax.random.fold_in(rule_key, rules_lib.site_tag(name)), layer)
            base = _at(params[stack.name][name]["kernel"], layer - stack.start)
            new = rule.adapter.init_leaves(leaf_key, site, layer, base=base, base_grad=base_grad[name])
            own = adapters[rule.name][segment.name]
            put = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, layer - segment.start, 0), own[name], new
            )
            adapters = adapters | {rule.name: adapters[rule.name] | {segment.name: own | {name: put}}}
    return adapters


def _at(kernels, place):
    """The dense kernel of one layer of a stack."""
    return dense(jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, place, 0, False), kernels))


def reads_gradient(rule) -> bool:
    """Whether a rule's factors start from the base's gradient."""
    return "base_grad" in inits.needs(rule.adapter.start)


def _base_router(config, segment, params):
    """A copy of the base's own router, `[L_segment, E, D]` float32."""
    stack = config.stack_of(segment.start)
    kernel = params[stack.name]["router"]["kernel"][segment.start - stack.start : segment.stop - stack.start]
    return jnp.swapaxes(jnp.asarray(kernel, jnp.float32), 1, 2)


def _without_empty(tree: dict) -> dict:
    """Members may have no leaves of their own; splitting a tree into its trainable part would lose empty dicts."""
    below = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in below.items() if not isinstance(v, dict) or v}


def _init_layers(member, key, site, config=None, params=None):
    """One layer at a time, with a key of the absolute layer: regrouping layers changes nothing. No params: a router."""
    key = jax.random.fold_in(key, rules_lib.site_tag(site.name) + (100 if params is None else 0))
    # a chain changes a state and no projection: there is no base weight
    stack = None if params is None else config.stack_of(site.layers[0])
    kernel = None if params is None else params[stack.name].get(site.name)

    def of_layer(layer):
        layer_key = jax.random.fold_in(key, layer)
        if params is None:
            return member.init_leaves(layer_key, site, layer)
        base = None if kernel is None else _at(kernel["kernel"], layer - stack.start)
        grad = None if base is None else jnp.zeros(base.shape)
        return member.init_leaves(layer_key, site, layer, base=base, base_grad=grad)

    return jax.lax.map(of_layer, jnp.array(site.layers))


def init_router_state(config, rules, segments) -> dict:
    tree: dict = {}
    for rule in rules:
        whole = rule.share == "model"
        for segment in segments:
            owner, layers = ("shared", 1) if whole else (segment.name, len(segment.layers))
            if not rule.experts[segment.start] or owner in tree.get(rule.name, {}):
                continue
            for scope in rule.router_scopes:
                state = rule.router.init_state(rules_lib.router_site(config, scope, segment, rule))
                if state:
                    state = jax.tree.map(lambda x, n=layers: jnp.broadcast_to(x, (n, *x.shape)) + 0, state)
                    scopes = tree.setdefault(rule.name, {}).setdefault(owner, {}).setdefault("router", {})
                    scopes[scope] = state
    return tree


def keeps_loaded(rule) -> bool:
    """Whether a rule's experts are those of `load` for good."""
    return bool(rule.load) and rule.loaded == "frozen"


def frozen_patterns(rules) -> tuple[str, ...]:
    out = []
    for rule in rules:
        names = rule.adapter.FROZEN + (rule.router.FROZEN if rule.router is not None else ())
        out += [f"{rule.name}/*/{name}" for name in names]
        out += [f"{rule.name}/{rules_lib.ANY_SEGMENT}/{site}/*" for site in rule.projections if keeps_loaded(rule)]
    return tuple(out)
