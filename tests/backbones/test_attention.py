"""Which form of attention a layer takes, by what it is for and where it runs."""

from types import SimpleNamespace as Thing

import jax
import jax.numpy as jnp
import pytest

from molora_jax.backbones.attention import attention_form

H100, T4, AMD = (Thing(compute_capability=version) for version in ("9.0", "7.5", "gfx942"))
Q = jax.ShapeDtypeStruct((2, 64, 9, 64), jnp.bfloat16)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_the_fused_form_is_taken_where_asked_for_and_measured(one_device):
    assert attention_form(Q, "fused", train=True, platform="gpu", device=H100) == "cudnn"


@pytest.mark.parametrize(
    "changes",
    [
        dict(asked="xla"),
        dict(train=False),
        dict(platform="cpu"),
        dict(platform="tpu"),
        dict(device=T4),
        dict(device=AMD),
        dict(q=jax.ShapeDtypeStruct(Q.shape, jnp.float32)),
        dict(q=jax.ShapeDtypeStruct((2, 63, 9, 64), Q.dtype)),
        dict(q=jax.ShapeDtypeStruct((2, 64, 9, 60), Q.dtype)),
    ],
)
def test_elsewhere_jax_chooses(one_device, changes):
    options = dict(q=Q, asked="fused", train=True, platform="gpu", device=H100) | changes
    assert attention_form(**options) is None


def test_several_devices_were_not_measured():
    assert attention_form(Q, "fused", train=True, platform="gpu", device=H100) is None
