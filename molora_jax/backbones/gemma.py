"""What a config of Gemma 1, 2 and 3 says beyond Llama's fields: the text tower alone.

    x = sqrt(D) embed[tokens];   norms multiply with 1 + weight;   GeGLU with the tanh form of gelu
    Gemma 2, 3: a norm before and after each sub-block; layers that slide, by a pattern; scores over sqrt(query scalar)
    Gemma 2: scores and logits capped, c tanh(z / c)
    Gemma 3: norms of queries and keys; layers that slide have a rotation of their own, without scaling

`model_type` gemma3 has a vision tower beside: its `text_config` is read, its images are not.
Gemma Team 2024 (arXiv 2403.08295, 2408.00118) and 2025 (arXiv 2503.19786).
"""

from molora_jax.backbones.hf_fields import quoted, shown
from molora_jax.errors import InputError

SWITCHES = dict(plus_one=True, scaled_embedding=True)
BOTH = SWITCHES | dict(norms="both")


def first(config: dict, number, where: str) -> dict:
    """Gemma 1. Its older files say `gelu` and mean the tanh form."""
    return {"activation": "gelu_tanh"} if config.get("hidden_act") == "gelu" else {}


def second(config: dict, number, where: str) -> dict:
    return {
        "query_scalar": number("query_pre_attn_scalar", kind=float),
        "score_cap": _cap(config, "attn_logit_softcapping", number),
        "logit_cap": _cap(config, "final_logit_softcapping", number),
    }


def third(config: dict, number, where: str) -> dict:
    """Gemma 3; `rope_local_base_freq` has been put there by `flat` where the file has parameters by kind of layer."""
    local = number("rope_local_base_freq", kind=float)
    if local <= 1:
        raise InputError(f"{where}: rope_local_base_freq", got=str(local), expected="a number above 1")
    return {
        "query_scalar": number("query_pre_attn_scalar", kind=float), "local_base": local,
        "logit_cap": _cap(config, "final_logit_softcapping", number),
    }  # fmt: skip


VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
TEXT = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}


def in_text_tower(name: str) -> str | None:
    """The name that a tensor of a model with a vision tower has in the text tower alone; None outside of it."""
    if name.startswith(VISION):
        return None
    prefix = next((prefix for prefix in TEXT if name.startswith(prefix)), "")
    return TEXT.get(prefix, "") + name.removeprefix(prefix)


def _cap(config, name, number):
    return None if config.get(name) is None else number(name, kind=float)


def flat(config: dict, where: str) -> dict:
    """A config of Gemma 3 with the rotary parameters of the full layers alone, and the local base beside them.

    Raises:
      InputError: a scaled rotation of the layers that slide; a window of null.
    """
    config, parameters = dict(config), config.get("rope_parameters")
    if isinstance(parameters, dict) and any(key.endswith("_attention") for key in parameters):
        kinds = {name: parameters.get(f"{name}_attention") or {} for name in ("full", "sliding")}
        named = {"full_attention", "sliding_attention"}
        if not all(isinstance(options, dict) for options in kinds.values()) or not parameters.keys() <= named:
            raise InputError(
                f"{where}: rope_parameters", got=shown(parameters), expected="objects full_attention, sliding_attention"
            )
        local = dict(kinds["sliding"])
        theta, kind = local.pop("rope_theta", None), local.pop("rope_type", local.pop("type", "default"))
        if kind != "default" or any(value is not None for value in local.values()):
            raise InputError(
                f"{where}: rope_parameters.sliding_attention", got=shown(kinds["sliding"]),
                expected="rope_type default: layers that slide have no scaling here",
            )  # fmt: skip
        config["rope_parameters"] = kinds["full"]
        if isinstance(scaling := config.get("rope_scaling"), dict) and scaling:  # both are read here, this one first
            config["rope_scaling"] = kinds["full"] | scaling
        if theta is not None:
            config["rope_local_base_freq"] = theta
    if "sliding_window" in config and config["sliding_window"] is None:  # absent: 4096
        raise InputError(f"{where}: sliding_window", got="None", expected="a positive int")
    return config


def text_tower(config: dict, where: str) -> dict:
    """The `text_config` of a model with a vision tower, as a config of its own.

    Raises:
      InputError: there is none.
    """
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        raise InputError(f"{where}: text_config", got=quoted(inner), expected="an object")
    tied = config.get("tie_word_embeddings")
    return inner | {"model_type": "gemma3_text", "tie_word_embeddings": True if tied is None else tied}
