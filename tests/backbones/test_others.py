"""The backbones beside llama, as Hugging Face folders: outputs, loss and gradients against transformers."""

import pytest

from molora_jax.io.base import load_base
from tests.backbones import backbone_cases, others

QUICK = (
    "bert",
    "mixtral, sliding window",
    "qwen2_moe",
    "gpt_oss",
)  # all that differs between the families, but for small switches


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in backbone_cases.CASES]
)
def test_outputs_and_gradients(tmp_path, monkeypatch, case):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    for what, error in others.errors(case, load_base(others.written(tmp_path / "m", case))).items():
        assert error < 1e-4, (what, error)
