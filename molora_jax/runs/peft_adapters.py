"""An adapter that peft saved, as products: `rules.X.load=("peft:DIR",)`.

    DIR/adapter_config.json     r, lora_alpha, their patterns, use_rslora
    DIR/adapter_model.safetensors     base_model.model.MODULE.lora_A.weight [R, D_in], .lora_B.weight [D_out, R]
    s B A,   s = alpha / R, or alpha / sqrt(R) with use_rslora; ADALORA: alpha / (R + 1e-5) B diag(E) A

The tensors say which modules are adapted, of what rank; the config says only their scales. A pattern is matched as peft
does, as a regular expression at the end of a module's name; one with groups, or with many quantifiers, is refused, for
strangers' files may hold one that never ends. A module that AdaLoRA has pruned to rank 0 is as one that is not there. A
module that is several of our sites (Phi-3's qkv_proj) is split into them. A pickled
`adapter_model.bin` is never read.
"""

import json
import pathlib
import re

import numpy as np

from molora_jax import stores
from molora_jax.backbones.gemma import in_text_tower
from molora_jax.config.fields import shown
from molora_jax.io import tensors
from molora_jax.io.files import plain

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
NAME = re.compile(r"(.+)\.(lora_A|lora_B|lora_E)(?:\.(?!bias$)[A-Za-z_]\w*)??(?:\.weight)?")
QUANTIFIERS = 3  # of a pattern: its time grows with a power of their number (under a millisecond with 3)
NEUTRAL = {  # fields that make an adapter more than a product -> what a plain one has
    "use_dora": (False, None), "modules_to_save": (None, []), "trainable_token_indices": (None,),
    "bias": ("none", None), "lora_bias": (False, None), "target_parameters": (None, []), "layer_replication": (None,),
    "alora_invocation_tokens": (None,), "arrow_config": (None,), "monteclora_config": (None,), "velora_config": (None,),
    "kasa_config": (None,),
}  # fmt: skip
ALTERED = ("pissa", "corda", "olora", "loftq", "lora_ga")  # starts that change the base beside it


def read(path: str, backbone, *, refuse) -> dict:
    """`{(layer, site): [(A [R, D_in], s B [R, D_out])]}` of an adapter's folder.

    Args:
      backbone: of the base that the run is on. refuse: `(got, expected, fix="...") -> InputError`.

    Raises:
      InputError: another kind of adapter, a module that the base has not as a site, shapes that do not fit, NaN.
    """
    folder = pathlib.Path(stores.at_hand(path)).expanduser()
    if (folder / PICKLED).exists() and not (folder / WEIGHTS).exists():
        raise refuse(
            f"with a pickled {PICKLED}, which could run any code", WEIGHTS,
            "Load it with peft where you trust it, and save_pretrained(DIR, safe_serialization=True).",
        )  # fmt: skip
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise refuse(f"without {name}", f"a folder that peft saved, with {CONFIG} and {WEIGHTS}")
    config = _config(folder, refuse)
    places, found = _places(backbone), {}
    for module, parts in _modules(folder, refuse).items():
        here = places.get(module) or places.get(in_text_tower(module) or "")
        if here is None:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in places}))
            raise refuse(f"which adapts {shown(module)}", f"modules that are sites of this base: {known}")
        (_, first, part), *_ = here
        d_in, d_out = backbone.dims(first)
        A, B = _product(config, module, parts, (d_in, d_out if part is None else part.size), refuse)
        if not len(A):
            continue
        for layer, site, part in here:
            own = B if part is None else part.of(B.T).T
            used = np.ones(len(A), bool) if part is None or not B.any() else own.any(axis=1)
            if used.any():  # else a site of a fused module that the adapter leaves alone
                found[layer, site] = [(A[used], own[used])]
    if not found:
        raise refuse("which changes no module", "lora_A and lora_B of at least one")
    return found


def _config(folder, refuse) -> dict:
    try:
        config = json.loads(plain(folder / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise refuse(
            f"whose {CONFIG} is no JSON object ({type(error).__name__})", "the file as peft wrote it"
        ) from None
    if kind not in ("LORA", "ADALORA"):
        raise refuse(f"of the kind {shown(kind)}", "LORA or ADALORA: only products become experts")
    for field, plain_ones in NEUTRAL.items():
        if field in config and config[field] not in plain_ones:
            raise refuse(
                f"with {field}={shown(config[field])}", f"{field}={plain_ones[0]}: products alone become experts"
            )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(ALTERED):
        raise refuse(
            f"with init_lora_weights={shown(start)}: an adapter of an altered base", "one of the base as it is",
            "Save it with path_initial_model_for_weight_conversion, which makes it one of rank 2R.",
        )  # fmt: skip
    return config


def _modules(folder, refuse) -> dict:
    """`{module: {"lora_A": array, ...}}`."""
    out: dict = {}
    for name, value in tensors.read(folder / WEIGHTS).items():
        match = NAME.fullmatch(name)
        if match is None:
            raise refuse(f"with a tensor {shown(name)}", "lora_A and lora_B of linear modules")
        if value.dtype not in tensors.FLOATS or not np.isfinite(value.astype(np.float32)).all():
            raise refuse(f"with {value.dtype} or NaN or Inf in {shown(name)}", "finite float tensors")
        parts = out.setdefault(match[1].removeprefix(PREFIX), {})
        if match[2] in parts:
            raise refuse(f"with two {match[2]} of one module, {shown(name)} the second", "one adapter a folder")
        parts[match[2]] = value.astype(np.float32)
    return out


def _places(backbone) -> dict:
    """Module of the base's checkpoint -> `[(layer, site, its part of the module or None), ...]`."""
    out, shapes = {}, backbone.shapes()
    for stack in backbone.stacks:
        for site in stack.sites:
            leaf = shapes[f"{stack.name}/{site}/kernel"]
            for layer, (name, _) in enumerate(leaf.files(), stack.start):
                for module in {prefix + name.removesuffix(".weight") for prefix in ("", backbone.PREFIX)}:
                    out.setdefault(module, []).append((layer, site, leaf.part))
    return out


def _product(config, module, parts, dims, refuse):
    ada = config["peft_type"] == "ADALORA"
    missing = {"lora_A", "lora_B", *(["lora_E"] if ada else [])} - parts.keys()
    if missing:
        raise refuse(f"without {', '.join(sorted(missing))} of {module}", "both factors of every module")
    A, B = parts["lora_A"], parts["lora_B"]
    R = len(A)
    scaled = parts["lora_E"].shape == (R, 1) if ada else R > 0
    if A.shape != (R, dims[0]) or B.shape != (dims[1], R) or not scaled:
        raise refuse(f"with A {list(A.shape)}, B {list(B.shape)} at {module}", f"[R, {dims[0]}] and [{dims[1]}, R]")
    rank = _number(config, "init_r" if ada else "r", {} if ada else config.get("rank_pattern"), module, refuse)
    alpha = _number(config, "lora_alpha", {} if ada else config.get("alpha_pattern"), module, refuse)
    if rank != R and not ada:
        raise refuse(f"of rank {R} at {module}, where its config says {rank:g}", "the rank that the config says")
    if ada:
        return A * parts["lora_E"], np.float32((alpha if alpha > 0 else rank) / (rank + 1e-5)) * B.T
    return A, np.float32(alpha / (R**0.5 if config.get("use_rslora") else R)) * B.T


def _number(config, field, patterns, module, refuse) -> float:
    """The value of a field at a module: that of the first pattern that fits, else the field's own."""
    value = config.get(field)
    if not isinstance(patterns or {}, dict):
        raise refuse(f"with the patterns {shown(patterns)} for {field}", "an object of patterns and numbers")
    for pattern, other in (patterns or {}).items():
        if len(pattern) > 200 or "(" in pattern or sum(map(pattern.count, "*+?{")) > QUANTIFIERS:
            expected = f"patterns of at most 200 characters, without groups, with at most {QUANTIFIERS} of * + ? {{"
            raise refuse(f"with the pattern {shown(pattern)}", expected)
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise refuse(f"with the pattern {shown(pattern)}", f"a regular expression ({error})") from None
        if fits:
            value = other
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise refuse(f"with {field} {shown(value)}", "a positive number")
    return float(value)
