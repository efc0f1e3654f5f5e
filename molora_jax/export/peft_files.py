"""What every adapter of peft is on disk: a config, tensors under `base_model.model.`, and which modules are meant."""

import collections
import json

import numpy as np

from molora_jax.core.rules import adapter_sites
from molora_jax.export.base import source_name
from molora_jax.io import tensors
from molora_jax.io.files import write_text

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WHOLE = ("r", "lora_alpha", "init_r", "target_r", "rank_pattern", "alpha_pattern")
BIASED = ("LORA", "ADALORA", "VERA")  # whose config has a field `bias`


def write_adapter(folder, source, config: dict, arrays: dict) -> None:
    """Args: config, as the class of its `peft_type` has it; arrays, name -> array, written as float32."""
    common = {"inference_mode": True, "base_model_name_or_path": source_name(source.opened)}
    common |= {"task_type": "CAUSAL_LM" if source.backbone.CAUSAL else "FEATURE_EXTRACTION"}
    common |= {"bias": "none"} if config["peft_type"] in BIASED else {}
    write_config(folder, common | config)
    tensors.write_named(folder / WEIGHTS, {name: np.float32(x) for name, x in arrays.items()})


def write_config(folder, config: dict) -> None:
    config = {name: _plain(value) if name in WHOLE else value for name, value in config.items()}
    text = json.dumps(config, indent=1, sort_keys=True)
    write_text(folder / CONFIG, text)


def _plain(value):
    """A whole number as such: readers want an int for an alpha of 32."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    return int(value) if isinstance(value, float) and value == int(value) else value


def own_leaves(source):
    """`(rule, layer, site, leaves)` of every adapted site."""
    for rule in source.rules:
        for site in adapter_sites(source.backbone, rule, source.opened.model.segments):
            for layer in site.layers:
                yield rule, layer, site, source.by_site[rule.name, layer, site.name]


def pair(own: dict, expert: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`A [R, D_in]`, `B [R, D_out]` of one expert; with its start (PiSSA) `[A; A0]`, `[B; -B0]` of rank 2R."""
    A, B = (own[part][expert if len(own[part]) > 1 else 0] for part in "AB")
    if "A0" in own:
        A, B = np.concatenate([A, own["A0"][0]]), np.concatenate([B, -own["B0"][0]])
    return A, B


def lora(source, modules: dict, scales: dict, **more) -> tuple[dict, dict]:
    """`(config, arrays)` of LORA; `modules`: name -> `(A [R, D_in], B [R, D_out])`, `scales`: name -> s."""
    arrays = {}
    for name, (A, B) in modules.items():
        arrays[f"{PREFIX}{name}.lora_A.weight"], arrays[f"{PREFIX}{name}.lora_B.weight"] = A, B.T
    of = {name: (len(A), scales[name] * len(A)) for name, (A, _) in modules.items()}
    rank, alpha = collections.Counter(of.values()).most_common(1)[0][0] if of else (1, 1)
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": False, "use_dora": False,
        "rank_pattern": {name: own[0] for name, own in of.items() if own != (rank, alpha)},
        "alpha_pattern": {name: own[1] for name, own in of.items() if own != (rank, alpha)},
        "lora_dropout": dropout(source), "init_lora_weights": True, "target_modules": targets(source, modules), **more,
    }, arrays  # fmt: skip


def targets(source, names) -> list[str]:
    """`target_modules`: the last part of a name where it means these modules and no other, else whole names."""
    if source.tower != "model.":
        return sorted(names)  # the vision tower has a q_proj too
    last = lambda name: name.rpartition(".")[2]  # noqa: E731
    files = {name for leaf in source.shapes.values() for name, _ in leaf.files() if name.endswith(".weight")}
    every, short = (collections.Counter(map(last, some)) for some in ([n[: -len(".weight")] for n in files], names))
    return sorted({last(name) if short[last(name)] == every[last(name)] else name for name in names})


def dropout(source) -> float:
    return max(float(rule.adapter.dropout) for rule in source.rules)
