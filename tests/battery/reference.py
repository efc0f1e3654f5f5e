"""The whole decoder with its mixtures, written naively: every expert has a weight of its own, every weight is applied.

    W_e = W + s B_e A_e     (DoRA: m_e (W + s B_e A_e) / ||.||_row)
    projection:  y = sum_e g_e W_e x + (1 - sum g) W x
    ffn:         y = sum_e g_e FFN_e(x) + (1 - sum g) FFN_0(x),   FFN_e with its own W_gate, W_up and W_down

Shares no code with the product: no rank-space gating, no shared base products, no slots, no scan. `xp` is numpy
(float64 values) or jax.numpy (gradients). B batch, S sequence, D width, E experts.

The members of the first methods are written out again here. A later router, adapter or loss is asked for its decision,
factors or sums (`members.py`); what is done with them stays naive, and its equation is its acceptance test's.
"""

import collections

import jax
import numpy as np

from tests.battery import members

# [B, S, E] but valid, rows, base_gate [B, S]
Decision = collections.namedtuple(
    "Decision", "probs selected gates valid rows logits base_gate sparsity averaged base_logit", defaults=(None,) * 5
)


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64 if np.asarray(x).dtype.kind == "f" else None), tree)


def softmax(xp, z):
    e = xp.exp(z - xp.max(z, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def rms(xp, x, weight, eps):
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(xp, x, positions, base):
    """`x [B, S, H, H_d]`, by complex numbers' real form, pairs `(i, i + H_d / 2)`."""
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = xp.cos(angle), xp.sin(angle)
    return xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def covers(segment, layer):
    return int(segment[:3]) <= layer <= int(segment[4:])


def attend(xp, q, k, v, segment_ids):
    """Causal within an example; key-value heads repeated for their group of query heads."""
    group = q.shape[2] // k.shape[2]
    k, v = xp.repeat(k, group, axis=2), xp.repeat(v, group, axis=2)
    scores = xp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    S = q.shape[1]
    may = (segment_ids[:, None, :] == segment_ids[:, :, None]) & np.tril(np.ones((S, S), bool))
    return xp.einsum("bhqk,bkhd->bqhd", softmax(xp, xp.where(may[:, None], scores, -1e30)), v)


def route(xp, router, leaves, x, batch):
    """Softmax, then either the K largest or the shortest prefix whose sum passes p."""
    logits = xp.einsum("bsd,ed->bse", x, leaves["W"])
    probs = softmax(xp, logits)
    order = xp.argsort(-probs, axis=-1)
    rank = xp.argsort(order, axis=-1)
    if type(router).__name__ == "SoftmaxTopK":
        keep = rank < (router.k or probs.shape[-1])
    else:
        mass = xp.cumsum(xp.take_along_axis(probs, order, axis=-1), axis=-1)
        t = xp.sum(mass <= router.p, axis=-1, keepdims=True) + 1
        keep = rank < t
    valid = batch["segment_ids"] > 0
    selected = keep & valid[..., None]
    gates = xp.where(selected, probs, 0.0)
    if router.renormalise:
        kept = xp.sum(gates, axis=-1, keepdims=True)
        gates = gates / xp.where(kept > 0, kept, 1.0)
    return Decision(probs, selected, gates, valid, rows_of(batch), logits)


def place_of(rule, place):
    """The weight of one place of a rule of the placement `block`, among all that it has, in the paper's order."""
    there = {*rule.sites, *(name for name, _ in rule.adapter.kinds)}
    order = [p for p in ("q", "k", "v", "prompt", "o", "up", "gate", "down", "parallel") if p in there]
    return slice(order.index(place), order.index(place) + 1)


def prompted(xp, q, leaves, block):
    """Attention over a prompt's own slots: `q [B, S, H, H_d]` -> alike. Its softmax is not the text's."""
    heads = lambda y: y.reshape(len(y), -1, q.shape[-1])  # noqa: E731
    K, V = (heads(leaves["P"][0] @ block[site]["kernel"]) for site in ("k", "v"))
    K, V = (xp.repeat(y, q.shape[2] // y.shape[1], axis=1) for y in (K, V))
    a = softmax(xp, xp.einsum("bshd,lhd->bshl", q, K) / q.shape[-1] ** 0.5)
    return xp.einsum("bshl,lhd->bshd", a, V) * leaves["gate"][0][:, None]


def rows_of(batch):
    """A number for every packed example."""
    ids = batch["segment_ids"]
    return np.arange(len(ids))[:, None] * 1000 + ids


def expert_weights(xp, adapter, leaves, W, shared, ctx):
    """`[E, D_in, D_out]`."""
    kind = type(adapter).__name__
    if kind not in ("Lora", "RsLora", "Dora"):
        return members.expert_weights(xp, adapter, leaves, W, shared, ctx)
    s = adapter.alpha / (adapter.rank**0.5 if kind == "RsLora" else adapter.rank)
    change = xp.einsum("erd,ero->edo", leaves["A"], leaves["B"])
    if "A0" in leaves:
        change = change - xp.einsum("erd,ero->edo", leaves["A0"], leaves["B0"])
    W_e = W[None] + s * change
    if kind == "Dora":
        norm = xp.sqrt(xp.sum(W_e * W_e, axis=1, keepdims=True))
        W_e = leaves["m"][:, None] * W_e / (norm if xp is np else jax.lax.stop_gradient(norm))
    return W_e


def forward(xp, model, params, adapters, batch):
    """`(hidden [B, S, D] after the last norm, {(layer, rule, scope): Decision})`."""
    c, decisions = model.config, {}
    batch = {name: np.asarray(value) for name, value in batch.items()}
    x = params["embed"][batch["tokens"]]
    routers = members.Routers(model, adapters, batch)
    reads = any(rule.router is not None and rule.router.INPUT for rule in model.rules)
    features = forward(xp, model.without_rules(), params, {}, batch)[0] if reads else None
    for layer in range(c.layers):
        block = jax.tree.map(lambda w, layer=layer: w[layer], params["blocks"])
        acting = []
        for rule in model.rules:
            if rule.experts[layer]:
                own = [(n, t) for n, t in adapters[rule.name].items() if n != "shared" and covers(n, layer)]
                name, segment = own[0] if own else ("000-000", {})
                acting.append((rule, jax.tree.map(lambda w, i=layer - int(name[:3]): w[i], segment)))

        def decide(rule, leaves, scope, x, layer=layer):
            if rule.router is None:
                return xp.ones((*x.shape[:2], 1))
            key = (layer, rule.name, scope) if scope != "model" else (0, rule.name, scope)
            if key not in decisions:
                x = params["embed"][batch["tokens"]] if scope == "model" else x
                x = features if rule.router.INPUT else x
                if type(rule.router).__name__ in ("SoftmaxTopK", "TopP"):
                    own = routers.leaves(rule, leaves, scope)
                    decisions[key] = route(xp, rule.router, own, x, batch)
                else:
                    made = routers.route(xp, rule, leaves, scope, x, layer)
                    valid = batch["segment_ids"] > 0  # numpy: known while jax traces
                    decisions[key] = Decision(*made[:3], valid, rows_of(batch), *made[4:])
            return decisions[key].gates

        def weights(rule, leaves, site, W, layer=layer):
            ctx = routers.context(rule, site, layer, base=W)
            adapter = rule.adapter.kinds[0][1] if hasattr(rule.adapter, "kinds") else rule.adapter
            return expert_weights(xp, adapter, leaves.get(site, {}), W, adapters[rule.name].get("shared", {}), ctx)

        def project(site, x, normed, acting=acting, block=block, decide=decide, weights=weights, entered=x):
            """A site whose own router (if it has one) reads `x`, a shared one the sub-block's `normed` input."""
            W = block[site]["kernel"]
            y = x @ W
            for rule, leaves in acting:
                if site in rule.sites:
                    W_e = weights(rule, leaves, site, W)
                    if rule.placement is not None:  # one decision for the block, on what enters it
                        g = decide(rule, leaves, "block", entered)[..., place_of(rule, site)]
                        y = y + g * (x @ (W_e[0] - W))
                        continue
                    own = rule.router is None or rule.router.share == "site"
                    g = decide(rule, leaves, site if own else rule.router.share, x if own else normed)
                    y = y + xp.einsum("bse,bseo->bso", g, xp.einsum("bsd,edo->bseo", x, W_e) - (x @ W)[:, :, None])
            return y

        def ffn(h, block=block):
            g, u, down = (block[s]["kernel"] for s in ("gate", "up", "down"))
            act = h @ g
            return (act / (1 + xp.exp(-act)) * (h @ u)) @ down

        heads = lambda y: y.reshape(*y.shape[:2], -1, c.head_dim)  # noqa: E731
        h = rms(xp, x, block["attn_norm"], c.norm_eps)
        q, k, v = (heads(project(site, h, h)) for site in ("q", "k", "v"))
        if c.qk_norm:
            q, k = (rms(xp, y, block[f"{n}_norm"], c.norm_eps) for n, y in (("q", q), ("k", k)))
        q, k = (rotate(xp, y, batch["positions"], c.rope_base) for y in (q, k))
        a = attend(xp, q, k, v, batch["segment_ids"])
        entered = x
        for rule, leaves in acting:
            if "prompt" in leaves:
                w = decide(rule, leaves, "block", entered)[..., place_of(rule, "prompt"), None]
                a = a + w * prompted(xp, q, leaves["prompt"], block)
        x = x + project("o", a.reshape(*h.shape[:2], -1), h)

        h = rms(xp, x, block["ffn_norm"], c.norm_eps)
        whole = [(rule, leaves) for rule, leaves in acting if rule.placement is None and rule.sites == ("ffn",)]
        if whole:
            base = ffn(h)
            y = base
            for rule, leaves in whole:
                g = decide(rule, leaves, rule.share if rule.router is not None else "ffn", h)
                W = {s: weights(rule, leaves, s, block[s]["kernel"]) for s in ("gate", "up", "down")}
                for e in range(g.shape[-1]):
                    expert = ffn(h, {s: {"kernel": W[s][e]} for s in W})
                    y = y + g[..., e : e + 1] * (expert - base)
                d = (
                    decisions.get((layer if rule.share != "model" else 0, rule.name, rule.share))
                    if rule.router
                    else None
                )
                # bool: must equal 1 - sum g
                own = d is not None and d.base_gate is not None and d.base_gate.dtype != bool
                if d is not None and (rule.gates_scale_base or own):  # the base's coefficient is not 1 - sum g
                    c_0 = d.base_gate if own else xp.where(xp.any(d.selected, axis=-1), 0.0, 1.0)
                    y = y + (c_0 - (1 - xp.sum(g, axis=-1)))[..., None] * base
        else:
            g, u = project("gate", h, h), project("up", h, h)
            y = project("down", g / (1 + xp.exp(-g)) * u, h)
        for rule, leaves in acting:
            if "parallel" in leaves:
                p, w = leaves["parallel"], decide(rule, leaves, "block", entered)[..., place_of(rule, "parallel")]
                inner = h @ p["inward"][0].T + p["b"][0]
                y = y + w * (inner / (1 + xp.exp(-inner)) @ p["outward"][0] + p["c"][0])
            if rule.placement is not None and rule.placement.NAME == "chain":
                z = h
                for t in range(rule.placement.iterations):
                    g = decide(rule, leaves, f"pass{t}", z)
                    pair = leaves["ffn"]["A"], leaves["ffn"]["B"]
                    z = z + rule.adapter.alpha / rule.adapter.rank * xp.einsum("bse,bsd,erd,ero->bso", g, z, *pair)
                y = y + z - h
        x = x + y
    return rms(xp, x, params["final_norm"], c.norm_eps), decisions


def nll(xp, params, hidden, batch):
    """Mean over answer tokens."""
    logits = hidden @ (params["head"] if "head" in params else params["embed"].T)
    logp = xp.log(softmax(xp, logits))
    at = xp.take_along_axis(logp, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    return -xp.sum(at * batch["loss_weight"]) / np.sum(batch["loss_weight"])


def balance(xp, decisions, option):
    """The balance loss by joining tokens, as the papers write it: the arrays are concatenated, then the means taken."""
    groups = collections.defaultdict(list)
    for (layer, rule, scope), d in decisions.items():
        E = d.probs.shape[-1]
        key = dict(all=E, layer=(layer, E), site=(layer, rule, scope))[option.over]
        keep = np.asarray(d.valid)
        averaged = d.probs if d.averaged is None else d.averaged
        groups[key].append((averaged[keep], (d.gates if option.counts == "soft" else d.selected)[keep],
                            d.selected[keep], d.rows[keep]))  # fmt: skip
    values = []
    for parts in groups.values():
        *arrays, rows = zip(*parts, strict=True)
        probs, chosen, selected = map(xp.concatenate, arrays)
        rows, each = np.concatenate(rows), []  # numpy: known while jax traces
        for example in np.unique(rows) if option.per_example else [None]:
            mine = np.ones(len(rows), bool) if example is None else rows == example
            whole = xp.sum(selected[mine]) if option.normalise == "slots" else mine.sum()
            f, P = xp.sum(chosen[mine], axis=0) / whole, xp.mean(probs[mine], axis=0)
            each.append((probs.shape[-1] if option.times_experts else 1) * xp.sum(f * P))
        values.append(sum(each) / len(each))
    return sum(values) / (len(values) if option.reduce == "mean" else 1)


def entropy(xp, decisions, option):
    each = [-xp.mean(xp.sum(d.probs * xp.log(d.probs), axis=-1)[np.asarray(d.valid)]) for d in decisions.values()]
    return sum(each) / len(each)


def loss(xp, model, params, adapters, batch):
    """The training loss of the whole batch."""
    hidden, decisions = forward(xp, model, params, adapters, batch)
    known = {"balance": balance, "entropy": entropy}
    total = nll(xp, params, hidden, batch)
    for name, member in model.losses:
        written = name in known and getattr(member, "kind", "shannon") == "shannon"
        found = known[name](xp, decisions, member) if written else members.loss(model, member, decisions, batch)
        total = total + member.weight * found
    return total
