"""peft: `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained` reads them (0.21).

    plain products          LORA; one that starts away from zero (PiSSA) has rank 2R: [A; A0], [B, -B0]
    rslora, dora            LORA with use_rslora, with use_dora and the magnitude m as `lora_magnitude_vector`
    adalora, ia3, vera      ADALORA, IA3, VERA; LoRA-FA is LORA
    the router x_lora       XLORA, its experts in folders 0, 1, ... (`peft_xlora.py`)
    base_experts            LORA with target_parameters: gate and up are one tensor there, so one pair of rank 2R

`lora_A [R, D_in]`, `lora_B [D_out, R]`. Of an expert stack both are flat: `lora_A [E R, D_in]`, the R rows of an expert
together; `lora_B [D_out, R E]`, column r E + e. They mean the same whether the stack is `[E, D_out, D_in]` or, where
the module says `is_transposed`, `[E, D_in, D_out]`: A is always at the input. The wrapper of gate_up_proj is the inner
one (`experts.base_layer`), that of down_proj the outer (`experts`).

A module that is several of our sites (Phi-3's qkv_proj, gate_up_proj) has their A one below another, B block-diagonal;
the rows of a site without an adapter keep their magnitude and the factor 1. VeRA and X-LoRA there are refused.
"""

import numpy as np

from molora_jax.adapters.adalora import AdaLora
from molora_jax.adapters.dora import Dora
from molora_jax.adapters.ia3 import Ia3
from molora_jax.adapters.rslora import RsLora
from molora_jax.adapters.vera import Vera
from molora_jax.config.fields import FFN
from molora_jax.export import peft_files, peft_xlora
from molora_jax.export.base import Source, in_rows, stacked
from molora_jax.export.peft_files import PREFIX, own_leaves, targets

# Families whose experts are stacks in transformers: `[E, D_out, D_in]`, gate_up_proj gate's rows, then up's; or
# `[E, D_in, D_out]`, gate's and up's columns in turns.
CONCATENATED, IN_TURNS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), ("gpt_oss",)


def write(source: Source, folder) -> list[str]:
    """Raises InputError for a run that no adapter of peft's is equal to."""
    if peft_xlora.is_one(source):
        return peft_xlora.write(source, folder)
    source.check_static(experts=True)
    config, arrays = adapter(source)
    _check_called(source, config["peft_type"])
    peft_files.write_adapter(folder, source, config, arrays)
    return []


def _check_called(source, kind: str) -> None:
    """Raises InputError for a projection of a state-space block that peft does not adapt, or would for nothing."""
    for rule in source.rules:
        for site in rule.projections:
            got = f"whose rule {rule.name} is on {site}"
            if site == "dt_proj":  # an adapter of it would be read without a word, and do nothing
                fix = "--format=merged has it in the kernel."
                raise source.refuse(got, "sites whose modules transformers calls: of dt_proj it takes the weight", fix)
            if site == "out_proj" and kind in ("LORA", "ADALORA"):
                raise source.refuse(got, f"no out_proj: peft refuses {kind} on it in state-space blocks")


def adapter(source: Source) -> tuple[dict, dict]:
    """`(config, {name: array})` of static rules."""
    kinds = {type(rule.adapter) for rule in source.rules}
    for special, make in ((Dora, _dora), (Ia3, _ia3), (Vera, _vera)):
        if special in kinds:
            if len(kinds) > 1:
                names = ", ".join(sorted(kind.__name__ for kind in kinds))
                raise source.refuse(f"with the adapters {names}", f"one kind of adapter beside {special.__name__}")
            return make(source)
    if kinds == {AdaLora} and len({(r.adapter.rank, r.adapter.alpha) for r in source.rules}) == 1:
        return _adalora(source)
    return _lora(source)


def _lora(source):
    """B is written without the scale where all rules have one, so that training can go on from the files."""
    scales = {rule.adapter.scale() for rule in source.rules}
    scale = scales.pop() if len(scales) == 1 and not source.expert_factors else 1.0
    pairs = {name: (A, B / np.float32(scale)) for name, (A, B) in source.products.items()}
    config, arrays = peft_files.lora(source, pairs, dict.fromkeys(pairs, scale))
    plain = {(type(rule.adapter), rule.adapter.rank, rule.adapter.alpha) for rule in source.rules}
    if len(plain) == 1 and (RsLora, config["r"]) == next(iter(plain))[:2] and not config["rank_pattern"]:
        config |= {"use_rslora": True, "lora_alpha": source.rules[0].adapter.alpha}
    if source.expert_factors:
        if source.backbone.family not in (*CONCATENATED, *IN_TURNS):
            known = ", ".join((*CONCATENATED, *IN_TURNS))
            raise source.refuse(f"with experts of the family {source.backbone.family}", f"one of {known}")
        stacks = {}
        for layer, sites in source.expert_factors.items():
            found, stacks[layer] = expert_stack(source, sites)
            arrays |= {f"{PREFIX}{experts_of(layer)}.{name}": x for name, x in found.items()}
        if len(stacks) != source.backbone.layers or len(set(stacks.values())) != 1:
            raise source.refuse("with adapted experts in some layers, or of several ranks", "all layers and one rank")
        of = {name: (len(A), float(len(A))) for name, (A, _) in pairs.items()}
        rank = stacks[0]
        config |= {
            "r": rank, "lora_alpha": rank, "lora_dropout": 0.0,  # peft knows no dropout at parameters
            "rank_pattern": {name: own[0] for name, own in of.items() if own[0] != rank},
            "alpha_pattern": {name: own[1] for name, own in of.items() if own[0] != rank},
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        }  # fmt: skip
    return config, arrays


def experts_of(layer: int) -> str:
    """The module of a layer's experts in transformers 5, whatever the checkpoint's names are."""
    return f"model.layers.{layer}.mlp.experts"


def expert_stack(source, sites: dict) -> tuple[dict, int]:
    """`({name: flat array}, rank)` of a layer's experts; `sites`: `A [1|E, R, D_in]`, `s B [1|E, R, D_out]`."""
    E = source.backbone.experts
    (Ag, Bg), (Au, Bu), (Ad, Bd) = ([np.broadcast_to(x, (E, *x.shape[1:])) for x in sites[s]] for s in FFN)
    R, F = Ag.shape[1], Bg.shape[2]
    both = np.concatenate([Ag, Au], axis=1)
    wide = np.zeros((E, 2 * R, 2 * F), np.float32)
    turns = source.backbone.family in IN_TURNS
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if turns else (slice(0, F), slice(F, None))
    wide[:, :R, gate], wide[:, R:, up] = Bg, Bu
    pad = lambda x: np.concatenate([x, np.zeros((E, 2 * R - x.shape[1], x.shape[2]), np.float32)], axis=1)  # noqa: E731
    out = {}
    for name, A, B in (("base_layer.", both, wide), ("", pad(Ad), pad(Bd))):
        out[f"{name}lora_A.weight"] = A.reshape(-1, A.shape[2])
        out[f"{name}lora_B.weight"] = B.transpose(2, 1, 0).reshape(B.shape[2], -1)
    return out, 2 * R


def _dora(source):
    found, scales, magnitudes, sites = {}, {}, {}, set()
    for rule, layer, site, own in own_leaves(source):
        (name, part), scale = source.place(layer, site.name), rule.adapter.scale()
        if (name, site.name) in sites or scales.setdefault(name, scale) != scale:
            raise source.refuse(f"with two adapters on {name}", "one: magnitudes do not add")
        sites.add((name, site.name))
        A, B = peft_files.pair(own)
        found.setdefault(name, []).append((A, in_rows(B, part)))
        norms = lambda layer=layer, name=name: source.row_norms(layer, name)  # noqa: E731
        _put(magnitudes, f"{PREFIX}{name}.lora_magnitude_vector", own["m"][0], part, norms)
    pairs = {name: stacked(some) for name, some in found.items()}
    config, arrays = peft_files.lora(source, pairs, scales, use_dora=True)
    return config, arrays | magnitudes


def _put(arrays: dict, key: str, rows, part, rest) -> None:
    """A site's rows of a vector; those of the module's other sites are what `rest()` has, asked for once."""
    if part is None:
        arrays[key] = rows
        return
    if key not in arrays:
        arrays[key] = np.array(rest(), np.float32)
    part.of(arrays[key])[...] = rows


def _ia3(source):
    arrays, fed, sites = {}, {}, set()
    for _, layer, site, own in own_leaves(source):
        (name, part), down = source.place(layer, site.name), site.name == "down"
        if (name, site.name) in sites:
            raise source.refuse(f"with two adapters on {name}", "one: their factors would multiply there")
        sites.add((name, site.name))
        fed[name] = down
        key = f"{PREFIX}{name}.ia3_l"
        if down:
            arrays[key] = own["l"][0][None, :]
        else:
            _put(arrays, key, own["l"][0][:, None], part, lambda part=part: np.ones((part.size, 1)))
    return {
        "peft_type": "IA3", "target_modules": targets(source, fed),
        "feedforward_modules": targets(source, [name for name, down in fed.items() if down]),
    }, arrays  # fmt: skip


def _vera(source):
    if len(source.rules) > 1:
        raise source.refuse("with two rules of vera", "one: peft has one pair of random matrices for all modules")
    (rule,) = source.rules
    bases, names, arrays = source.shared(rule), [], {}
    for _, layer, site, own in own_leaves(source):
        names.append(source.module(layer, site.name))
        key = f"{PREFIX}{names[-1]}."
        arrays |= {f"{key}vera_lambda_d": own["d"][0], f"{key}vera_lambda_b": own["b"][0]}
    arrays |= {"base_model.vera_A": bases["basis_A"], "base_model.vera_B": bases["basis_B"].T}
    return {
        "peft_type": "VERA", "r": rule.adapter.rank, "save_projection": True, "d_initial": rule.adapter.d_initial,
        "projection_prng_key": rule.adapter.seed, "vera_dropout": peft_files.dropout(source),
        "target_modules": targets(source, names),
    }, arrays  # fmt: skip


def _adalora(source):
    arrays, names, adapter = {}, [], source.rules[0].adapter
    for _, layer, site, own in own_leaves(source):
        name, part = source.place(layer, site.name)
        if name in names or part is not None:
            return _lora(source)
        names.append(name)
        key = f"{PREFIX}{name}."
        arrays |= {f"{key}lora_A": own["A"][0], f"{key}lora_B": own["B"][0].T, f"{key}lora_E": own["lam"][0][:, None]}
    return {
        "peft_type": "ADALORA", "init_r": adapter.rank, "target_r": adapter.rank, "lora_alpha": adapter.alpha,
        "lora_dropout": peft_files.dropout(source), "total_step": max(int(source.config.train.steps), 1), "tinit": 0,
        "tfinal": 0, "rank_pattern": None, "target_modules": targets(source, names),
    }, arrays  # fmt: skip
