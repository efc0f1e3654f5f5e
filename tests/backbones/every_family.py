"""A `config.json` of every family that is read, small: for tests that walk through all of them."""

from tests.backbones import backbone_cases, family_cases

_KINDS = {name: name for name in ("smollm3", "olmo2", "phi3", "gemma", "gemma2")} | {"gemma3_text": "gemma3"}
DENSE = {name: family_cases.MAIN[f"{name}, untied"] for name in family_cases.FAMILIES} | {
    name: family_cases.KINDS[case] for name, case in _KINDS.items()
}
MOE = {name: backbone_cases.CASES[name] for name in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss")}
MAMBA = {
    "mamba": backbone_cases.CASES["mamba, biases and a head"],
    "falcon_mamba": backbone_cases.CASES["falcon_mamba"],
}
DECODERS = DENSE | MOE | MAMBA
