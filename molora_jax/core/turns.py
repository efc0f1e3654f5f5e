"""Experts that learn in turn: a router's `learning(state, E)` says which of its rule's experts learn now.

The others act; their factors send no gradient (so no clipping or penalty sees one) and are moved by nothing, neither by
momentum nor by weight decay. L layers, E experts.
"""

import jax
import jax.numpy as jnp


def held(rule, experts: int, leaves: dict, state: dict) -> dict:
    """A rule's leaves `{site: {leaf: [E, ...]}}` at one layer, without a slope of experts that do not learn.

    `state`: the rule's state there, `{"router": {scope: ...}}`.
    """
    own = dict(leaves)
    for scope, of_scope in state.get("router", {}).items():
        learning = rule.router.learning(of_scope, experts)
        for site in () if learning is None else rule.decided_at(scope):
            own[site] = {name: _where(learning, x, jax.lax.stop_gradient(x), 0) for name, x in leaves[site].items()}
    return own


def moved(model, updates: dict, router_state: dict) -> dict:
    """An optimizer's updates `{rule: {segment: {site: {leaf: [L, E, ...]}}}}`, 0 for experts that do not learn."""
    out = dict(updates)
    for r, rule in enumerate(model.rules):
        for segment in model.segments if rule.name in updates and rule.router is not None else ():
            scopes = router_state.get(rule.name, {}).get(segment.name, {}).get("router", {})
            for scope, state in scopes.items():
                experts = segment.counts[r]
                if rule.router.learning(jax.tree.map(lambda x: x[0], state), experts) is None:
                    continue
                learning = jax.vmap(lambda one, rule=rule, E=experts: rule.router.learning(one, E))(state)  # [L, E]
                sites = dict(out[rule.name].get(segment.name, {}))
                for site in rule.decided_at(scope):
                    sites[site] = {name: _where(learning, x, 0.0, 1) for name, x in sites.get(site, {}).items()}
                out[rule.name] = out[rule.name] | {segment.name: {site: own for site, own in sites.items() if own}}
    return out


def _where(learning, leaf, other, axis: int):
    """By expert along `axis`; a leaf that all experts share (one there) stays as it is."""
    if leaf.ndim <= axis or leaf.shape[axis] != learning.shape[-1]:
        return leaf
    return jnp.where(learning.reshape(*learning.shape, *[1] * (leaf.ndim - learning.ndim)), leaf, other)
