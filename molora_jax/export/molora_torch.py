"""Runs an adapter of molora_jax inside a transformers model: one file, which needs torch and safetensors alone.

    model = AutoModelForCausalLM.from_pretrained(BASE)
    model = molora_torch.load(model, DIR)         # changes the model in place; DIR has torch.safetensors
    model.generate(...)                           # a router that reads the base's hidden state: use_cache=False

It covers decoders whose layers are `self_attn` and `mlp` (Llama, Mistral, Qwen2, Qwen3, SmolLM3, Phi-3, OLMo2,
Gemma, Mixtral, OLMoE, Qwen-MoE, gpt-oss) or a `mixer` (Mamba, Falcon-Mamba); adapters that are products B A, with row
factors or without; the placements and routers of the two tables below. `load` refuses anything else by name. Every
expert that a token of the batch chose is computed for all its tokens: right before fast. What is added to the base's
own experts is added to their weights. Routers compute in float32. For inference: no dropout, no noise, no balance
losses.

x [..., D_in]; of a site A [1|E, R, D_in], B [1|E, R, D_out] (scales inside), out [E, D_out], inp [E, D_in];
gates [..., E].
"""

import json
import math
import os
import struct

PLACEMENTS = ("projection", "ffn", "chain", "base_experts")
ROUTERS = (
    "softmax_topk", "top_p", "top1", "biased_topk", "sigmoid_topk", "learned_threshold", "entropy_hybrid", "sparsegen",
    "recurrent", "sparse_projection", "core_space", "x_lora",
)  # fmt: skip
FILE, ATTENTION = "torch.safetensors", ("q", "k", "v", "o")


class Decision:
    """`gates [..., E]`, 0 where an expert is not chosen; `base [...]` the coefficient of the frozen block, or None."""

    def __init__(self, gates, selected, base=None):
        import torch

        self.selected = selected
        self.gates = torch.where(selected, gates, torch.zeros_like(gates))
        self.base = base


# ---- routers: (leaves, shared, state, x, options, carry) -> (Decision, carry), all float32 ---------------------------


def top_k(score, k):
    import torch

    E = score.shape[-1]
    if k >= E:
        return torch.ones_like(score, dtype=torch.bool)
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :k]  # the lower index wins a tie
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)


def _logits(W, x, b=None):
    z = x.float() @ W.T
    return z if b is None else z + b


def _over_sum(h):
    total = h.sum(-1, keepdim=True)
    return h / total.masked_fill(total == 0, 1.0)


def softmax_topk(p, shared, state, x, o, carry):
    probs = _logits(p["W"], x).softmax(-1)
    E = probs.shape[-1]
    k = min(o["k"] or E, E)
    selected = top_k(probs, k)
    gates = probs * selected
    gates = gates / gates.sum(-1, keepdim=True) if o["renormalise"] else gates
    whole = o["renormalise"] or k == E
    return Decision(gates, selected, (~selected.any(-1)).float() if whole else None), carry


def _prefix(probs, limit, crossing):
    import torch

    if limit >= 1:
        return torch.ones_like(probs, dtype=torch.bool)
    ranked, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    mass = ranked.cumsum(-1)
    kept = (mass - ranked if crossing else mass) <= limit
    return torch.zeros_like(kept).scatter(-1, order, kept)


def top_p(p, shared, state, x, o, carry):
    probs = _logits(p["W"], x).softmax(-1)
    E = probs.shape[-1]
    selected = _prefix(probs, o["p"], True) & top_k(probs, min(o["max_experts"] or E, E))
    gates = probs * selected
    gates = gates / gates.sum(-1, keepdim=True) if o["renormalise"] else gates
    return Decision(gates, selected, (~selected.any(-1)).float() if o["renormalise"] else None), carry


def top1(p, shared, state, x, o, carry):
    probs = _logits(p["W"], x, p.get("b")).softmax(-1)
    selected = top_k(probs, probs.shape[-1] if o["dense"] else 1)
    whole = o["dense"] or not o["gated"]
    gates = probs if o["dense"] or o["gated"] else selected.float()
    return Decision(gates, selected, (~selected.any(-1)).float() if whole else None), carry


def biased_topk(p, shared, state, x, o, carry):
    z = _logits(p["W"], x)
    score = z.softmax(-1) if o["score"] == "softmax" else z.sigmoid()
    selected = top_k(score + state["b"], o["k"])
    gates = _over_sum(score * selected) if o["renormalise"] else score
    return Decision(gates, selected, (~selected.any(-1)).float() if o["renormalise"] else None), carry


def sigmoid_topk(p, shared, state, x, o, carry):
    score = _logits(p["W"], x).sigmoid()
    q = score + state["b"]
    selected = top_k(q, o["k"])
    h = (q if o["bias_in_gate"] else score) * selected
    return Decision(selected.sum(-1, keepdim=True) * _over_sum(h), selected), carry


def learned_threshold(p, shared, state, x, o, carry):
    probs = _logits(p["W"], x).softmax(-1)
    tau = o["ceiling"] / probs.shape[-1] * _logits(p["w_tau"], x, p["b_tau"]).sigmoid()
    excess = probs - tau
    selected = excess >= 0
    kept = excess * selected
    nobody = kept.sum(-1) == 0
    return Decision(_over_sum(kept), selected, nobody.float()), carry


def _entropy(p, kind, q, eps):
    p = p + eps
    N = p.shape[-1]
    if N == 1:
        return p[..., 0] * 0
    if abs(q - 1) < 1e-3:
        return -(p * p.log()).sum(-1) / math.log(N)
    if kind == "tsallis":
        return (1 - (p**q).sum(-1)) / (q - 1) / ((1 - N ** (1.0 - q)) / (q - 1))
    return ((p**q).sum(-1) + 1e-10).log() / (1 - q) / math.log(N)


def entropy_hybrid(p, shared, state, x, o, carry):
    probs = _logits(p["W"], x).softmax(-1)
    selected = _prefix(probs, o["p"], False) | top_k(probs, o["k"])
    if o["threshold"] < 1:
        selected = selected | (_entropy(probs, o["kind"], o["q"], o["eps"]) > o["threshold"])[..., None]
    return Decision(probs, selected), carry


def sparsegen(p, shared, state, x, o, carry):
    import torch

    u = _logits(p["W"], x)
    if o["learned"]:
        mlp = shared["lambda"][str(x.shape[-1])]
        hidden = torch.relu(_logits(mlp["W1"], x, mlp["b1"]))
        lam = torch.nn.functional.logsigmoid(_logits(mlp["W2"], hidden, mlp["b2"])[..., 0]) + 1 - o["eps"]
    else:
        lam = torch.full(u.shape[:-1], o["fixed"], device=u.device)
    left = 1 - lam[..., None]
    u = u - u.max(-1, keepdim=True).values
    ranked = torch.sort(u, dim=-1, descending=True).values
    k = torch.arange(1, u.shape[-1] + 1, device=u.device)
    most = (left + k * ranked > ranked.cumsum(-1)).sum(-1, keepdim=True).clamp(min=1)
    active = u >= ranked.gather(-1, most - 1)
    count = active.sum(-1, keepdim=True)
    mean = (u * active).sum(-1, keepdim=True) / count
    gates = ((u - mean) / left + 1 / count).clamp(min=0) * active
    return Decision(gates, gates > 0, torch.zeros_like(lam)), carry


def recurrent(p, shared, state, x, o, carry):
    import torch

    x = _logits(p["proj"], x)
    h = torch.zeros_like(x) if carry is None or o["mode"] == "np" else carry
    a = [_logits(shared["gru_W"][i], x, shared["gru_b"][i]) for i in range(3)]
    r = [_logits(shared["gru_U"][i], h, shared["gru_c"][i]) for i in range(3)]
    s, z = (a[0] + r[0]).sigmoid(), (a[1] + r[1]).sigmoid()
    h = (1 - z) * (a[2] + s * r[2]).tanh() + z * h
    return softmax_topk(p, shared, state, h, o, None)[0], h


def sparse_projection(p, shared, state, x, o, carry):
    score = _logits(p["W"], x) + state["d"]
    selected = top_k(score.abs() if o["select"] == "abs" else score, o["k"])
    return Decision(selected.float(), selected), carry


def x_lora(p, shared, state, h, o, carry):
    import torch

    for i in range(o["depth"] - 1):
        layer = shared["trunk"][str(i)]
        h = torch.relu(_logits(layer["W"], h, layer["b"]))
    z = _logits(p["W"], h, p.get("b"))
    E, cool = z.shape[-1], z / o["temperature"]
    k = min(o["top_k"] or E, E)
    selected = top_k(z, k)
    if o["mix"] == "softmax_topk":
        gates = cool.masked_fill(~selected, -1e30).softmax(-1)
    else:
        gates = cool.softmax(-1) if o["mix"] == "softmax" else z
    whole = o["gain"] == 1 and (o["mix"] == "softmax_topk" or (o["mix"] == "softmax" and k == E))
    return Decision(o["gain"] * gates, selected, (~selected.any(-1)).float() if whole else None), carry


# ---- a rule, and what a forward pass remembers -----------------------------------------------------------------------


class Rule:
    def __init__(self, spec, leaves):
        self.spec, self.leaves = spec, leaves  # leaves: {layer: nested}, "shared": nested
        self.name, self.share, self.router = spec["name"], spec["share"], spec.get("router")

    def at(self, layer, site):
        return self.leaves.get(str(layer), {}).get(site)

    def acts(self, layer):
        return bool(self.spec["experts"][layer])


class Pass:
    """Decisions and carries of one forward pass, and the base's hidden state where a router reads it."""

    def __init__(self):
        self.off, self.hidden = False, None
        self.clear()

    def clear(self):
        self.decisions, self.carry = {}, {}

    def decide(self, rule, layer, scope, x):
        """A Decision; of `share=model` one for all layers, made before the first."""
        where = (rule.name, "model") if rule.share == "model" else (rule.name, layer, scope)
        if where not in self.decisions:
            name = rule.router["name"]
            owner = rule.leaves["shared"] if rule.share == "model" else rule.leaves[str(layer)]
            own = rule.spec["leaves_of"].get(scope, scope)
            part = lambda tag: owner.get(tag, {}).get("model" if rule.share == "model" else own, {})  # noqa: E731
            shared = rule.leaves.get("shared", {}).get("router", {})
            if name == "x_lora":
                x = self.hidden
            if name == "core_space":
                x = _logits(rule.at(layer, scope)["read"], x)
            function = softmax_topk if name == "core_space" else globals()[name]
            found, self.carry[rule.name] = function(
                part("router"), shared, part("state"), x, rule.router, self.carry.get(rule.name)
            )
            self.decisions[where] = found
        return self.decisions[where]


def change(x, f, gates):
    """`sum_e g_e B_e A_e x`, experts that nobody chose left out."""
    if f["A"].shape[1] == 0:
        return 0.0
    out = 0.0
    for e in range(max(len(f["A"]), len(f["B"]))):
        g = None if gates is None else gates[..., e : e + 1]
        if g is not None and not bool((g != 0).any()):
            continue
        A, B = (m[e if len(m) > 1 else 0].to(x.dtype) for m in (f["A"], f["B"]))
        y = (x @ A.T) @ B
        out = out + (y if g is None else g.to(x.dtype) * y)
    return out


def factor(f, gates):
    """`sum_e g_e (f_e - 1)` of a row factor `f [E, D]`."""
    return f[0] - 1 if gates is None else gates @ (f - 1)


def low(f, seen, base):
    """One expert's change of a projection whose frozen output is `base`."""
    y = change(seen, f, None)
    return y + base * (f["out"][0] - 1).to(seen.dtype) if "out" in f else y


def wrap_linear(linear, sites, layer, now):
    """The rules that act on one projection, in place of its forward.

    `sites`: `[(site, its rows of the module or None for all, rules), ...]`.
    """
    import torch

    frozen = linear.forward
    sites = sorted(sites, key=lambda one: one[1] or [0])
    whole = len(sites) == 1 and sites[0][1] is None

    def forward(x):
        if now.off:
            return frozen(x)
        if whole:
            return projected(x, linear.weight, linear.bias, sites[0][0], layer, sites[0][2], now)
        parts = []
        for site, rows, rules in sites:
            cut = slice(*rows)
            bias = None if linear.bias is None else linear.bias[cut]
            parts.append(projected(x, linear.weight[cut], bias, site, layer, rules, now))
        return torch.cat(parts, dim=-1)

    linear.forward = forward


def projected(x, weight, bias, site, layer, rules, now):
    """One site with its rules."""
    import torch.nn.functional as F

    found = []
    for rule in rules:
        scope = rule.share if rule.share in ("attn", "ffn", "model") else site
        decision = None if rule.router is None else now.decide(rule, layer, scope, x)
        found.append((rule, rule.at(layer, site), None if decision is None else decision.gates))
    scaled = x
    for _, f, gates in found:
        if "inp" in f:
            scaled = scaled + x * factor(f["inp"], gates).to(x.dtype)
    base = F.linear(scaled, weight)
    y = base
    for rule, f, gates in found:
        if "out" in f:
            own = base if bias is None or not rule.spec["with_bias"] else base + bias
            y = y + own * factor(f["out"], gates).to(x.dtype)
        y = y + change(x, f, gates)
    return y if bias is None else y + bias


def wrap_mlp(mlp, layer, whole, chains, now):
    """Rules whose experts are the whole block, and chains beside it."""
    import torch
    import torch.nn.functional as F

    frozen = mlp.forward

    def block(x):
        if not whole:
            return frozen(x)
        if hasattr(mlp, "gate_up_proj"):  # Phi-3
            act, (g, u) = mlp.activation_fn, mlp.gate_up_proj(x).chunk(2, dim=-1)
        else:
            act, g, u = mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x)
        h0 = act(g) * u
        mix, rest = 0.0, 0.0
        for rule in whole:
            scope = "ffn"
            decision = None if rule.router is None else now.decide(rule, layer, scope, x)
            f = {site: rule.at(layer, site) for site in ("gate", "up", "down")}
            E = max(len(f["gate"]["A"]), len(f["gate"]["B"]), len(f["gate"].get("out", ())))
            gates = torch.ones(*x.shape[:-1], 1, device=x.device) if decision is None else decision.gates
            if decision is None:
                c = torch.zeros(x.shape[:-1], device=x.device)
            elif decision.base is not None:
                c = decision.base
            elif rule.spec["scales_base"]:
                c = (~decision.selected.any(-1)).float()
            else:
                c = 1 - gates.sum(-1)
            mix = mix + c[..., None].to(x.dtype) * h0
            per_expert = rule.spec["per_expert"] or (decision is None and "out" in f["down"])
            for e in range(E):
                w = gates[..., e : e + 1].to(x.dtype)
                if not bool((w != 0).any()):
                    continue
                one = {site: {n: m[e : e + 1] if len(m) > 1 else m for n, m in f[site].items() if n != "read"}
                       for site in f}  # fmt: skip
                h = act(g + low(one["gate"], x, g)) * (u + low(one["up"], x, u))
                h = h * one["down"]["inp"][0].to(x.dtype) if "inp" in one["down"] else h
                if per_expert:
                    base = F.linear(h, mlp.down_proj.weight)
                    rest = rest + w * (base + low(one["down"], h, base))
                else:
                    mix, rest = mix + w * h, rest + w * low(one["down"], h, 0.0)
        mix = mix - (len(whole) - 1) * h0
        return mlp.down_proj(mix) + rest

    def passes(rule, x):
        o, f = rule.spec["options"], rule.at(layer, "ffn")
        phi = {"silu": F.silu, "gelu": lambda a: F.gelu(a, approximate="tanh"), "relu": F.relu}.get(o["nonlinearity"])
        d, z = torch.zeros_like(x), x
        for t in range(o["iterations"]):
            gates = None
            if rule.router is not None:
                gates = now.decide(rule, layer, rule.spec["decided_by"][f"pass{t}"], z).gates
            if phi is None:
                out = change(z, f, gates)
            else:
                out = torch.zeros_like(x)
                for e in range(max(len(f["A"]), len(f["B"]))):
                    A, B = (m[e if len(m) > 1 else 0].to(x.dtype) for m in (f["A"], f["B"]))
                    y = phi(z @ A.T) @ B
                    out = out + (y if gates is None else gates[..., e : e + 1].to(x.dtype) * y)
            d = out if o["residual"] == "outer" else d + out
            z = d if o["residual"] == "outer" else x + d
        return d

    def forward(x):
        if now.off:
            return frozen(x)
        out = block(x)
        for rule in chains:
            out = out + passes(rule, x)
        return out

    mlp.forward = forward


def add_to_experts(mlp, leaves, layout):
    """Static products of a base's own experts, added to their stacked weights in place; their router's trained copy.

    `layout`: whether a stack is `[E, D_in, D_out]`, and whether gate and up are in turns there or one after the other.
    """
    experts = mlp.experts
    if not hasattr(experts, "gate_up_proj"):
        raise NotImplementedError(f"{type(experts).__name__}: its experts are no stack, as transformers 5 has them")
    for i, site in enumerate(("gate", "up", "down")):
        A, B = leaves[site]["A"], leaves[site]["B"]
        weight = (experts.down_proj if site == "down" else experts.gate_up_proj).data
        weight = weight.transpose(1, 2) if layout["transposed"] else weight
        if site != "down":
            F = weight.shape[1] // 2
            weight = weight[:, i::2] if layout["in_turns"] else weight[:, i * F : (i + 1) * F]
        for e in range(len(weight)):
            a, b = (m[e if len(m) > 1 else 0] for m in (A, B))
            weight[e] += (b.T @ a).to(weight.dtype)
    if "router" in leaves:
        gate = mlp.gate if hasattr(mlp, "gate") else mlp.router
        gate.weight.data.copy_(leaves["router"]["base"]["W"])


# ---- loading ---------------------------------------------------------------------------------------------------------


def _metadata(path):
    with open(path, "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]


def load(model, folder):
    """Puts the adapter of a folder into a transformers model, in place, and returns the model.

    Raises:
      NotImplementedError: the run has something that this file does not compute; the message names it.
      ValueError: the model is another one than the run's base, or has an adapter already.
    """
    from safetensors.torch import load_file

    path = os.path.join(folder, FILE)
    spec = json.loads(_metadata(path)["molora_torch"])
    if spec.get("lacks"):
        raise NotImplementedError(f"{folder}: {spec['lacks']}")
    _check_model(model, spec["model"], folder)
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    leaves, copies = {}, {}
    for name, tensor in load_file(path).items():
        head, *rest = name.split("/")
        if head == "base":
            copies[name.removeprefix("base/")] = tensor
            continue
        group = leaves.setdefault(head, {})
        for part in rest[:-1]:
            group = group.setdefault(part, {})
        group[rest[-1]] = tensor.to(device)
    for name, tensor in copies.items():
        parameters[name].data.copy_(tensor)
    rules, now = [Rule(one, leaves.get(one["name"], {})) for one in spec["rules"]], Pass()
    for layer, at in ((int(layer), at) for layer, at in spec["layers"].items()):
        acting = [rule for rule in rules if rule.acts(layer)]
        kind = lambda name: [rule for rule in acting if rule.spec["kind"] == name]  # noqa: E731,B023
        modules = {}
        for site, module in at["modules"].items():
            own = [rule for rule in kind("projection") if site in rule.spec["sites"]]
            modules.setdefault(module, []).append((site, at["rows"].get(site), own))
        for module, sites in modules.items():
            if any(own for *_, own in sites):
                wrap_linear(model.get_submodule(module), sites, layer, now)
        for rule in kind("base_experts"):
            add_to_experts(model.get_submodule(at["blocks"]["ffn"]), rule.leaves[str(layer)], spec["experts"])
        if kind("ffn") or kind("chain"):
            wrap_mlp(model.get_submodule(at["blocks"]["ffn"]), layer, kind("ffn"), kind("chain"), now)
        for scope in ("attn", "ffn"):
            sharing = [rule for rule in kind("projection") if rule.router is not None and rule.share == scope]
            if sharing:
                part = model.get_submodule(at["blocks"][scope])
                part.register_forward_pre_hook(_entering(sharing, layer, scope, now), with_kwargs=True)
    model.register_forward_pre_hook(_beginning(model, rules, now), with_kwargs=True)
    whole = [rule for rule in rules if rule.share == "model" and rule.router["name"] != "x_lora"]
    if whole:
        model.get_input_embeddings().register_forward_hook(_embedded(whole, spec["embed_scale"], now))
    return model


def _check_model(model, fields, folder):
    """`fields`: those of its config by which the run's base is told from another model."""
    if hasattr(model, "molora_folder"):
        raise ValueError(f"{folder}: the model has the adapter of {model.molora_folder}; load a fresh model")
    config = model.config.get_text_config()
    got = {name: getattr(config, name, None) for name in fields}
    if got != fields:
        raise ValueError(f"{folder}: got a model with {got}; expected the run's base, {fields}")
    model.molora_folder = str(folder)


def _entering(rules, layer, scope, now):
    """The decision of a sub-block, from its normed input."""

    def hook(module, args, kwargs):
        if not now.off:
            for rule in rules:
                now.decide(rule, layer, scope, args[0] if args else kwargs["hidden_states"])

    return hook


def _embedded(rules, scale, now):
    """The decision for all layers, from what enters the first. `scale`: of Gemma's embedding."""

    def hook(module, args, out):
        if not now.off:
            if not hasattr(module, "embed_scale"):  # transformers 4 scales after the module
                out = out * out.new_tensor(scale)
            for rule in rules:
                now.decide(rule, 0, "model", out)

    return hook


def _beginning(model, rules, now):
    """Forgets the last pass, and runs the base alone where a router reads its hidden state."""
    reading = any(rule.router is not None and rule.router["name"] == "x_lora" for rule in rules)

    def hook(module, args, kwargs):
        import torch

        if now.off:
            return
        now.clear()
        if reading:
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            if cache is not None and cache.get_seq_length() > 0:
                raise NotImplementedError("x_lora reads the base's hidden state: give use_cache=False")
            now.off = True
            try:
                with torch.no_grad():
                    more = dict(output_hidden_states=True, use_cache=False)
                    more |= {name: None for name in ("cache", "past_key_values") if name in kwargs}
                    now.hidden = model(*args, **{**kwargs, "labels": None, **more}).hidden_states[-1]
            finally:
                now.off = False

    return hook
