"""Gates of all segments side by side."""

import jax.numpy as jnp


def by_layer(model, gates: dict) -> dict:
    """`{rule: {segment: {scope: [L_seg, ..., E]}}}` -> `{rule: {scope: [L, ..., E_max]}}`, zeros where no expert is.

    A decision of the whole model keeps its one row.
    """
    out: dict = {}
    for rule in model.rules:
        for scope in rule.scopes:
            parts = {name: scopes[scope] for name, scopes in gates.get(rule.name, {}).items() if scope in scopes}
            E = max(g.shape[-1] for g in parts.values())
            if scope == "model":
                out.setdefault(rule.name, {})[scope] = parts["model"]
                continue
            like, rows = next(iter(parts.values())), []
            for segment in model.segments:
                g = parts.get(segment.name)
                if g is None:
                    g = jnp.zeros((len(segment.layers), *like.shape[1:-1], E), like.dtype)
                rows.append(jnp.pad(g, [(0, 0)] * (g.ndim - 1) + [(0, E - g.shape[-1])]))
            out.setdefault(rule.name, {})[scope] = jnp.concatenate(rows)
    return out
