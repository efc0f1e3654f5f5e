"""Runs out of this package: a checkpoint as files that other programs read. A format a file; `perform.py` opens, asks
and writes."""

from molora_jax.export import gguf, merged, mixlora, molora, peft, sglang, vllm

FORMATS = {
    "peft": peft, "vllm": vllm, "sglang": sglang, "mixlora": mixlora, "molora": molora, "merged": merged, "gguf": gguf,
}  # fmt: skip
