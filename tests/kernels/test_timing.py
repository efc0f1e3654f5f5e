"""How the benches measure: what they leave out, which clock and which processors they take."""

import os
from types import SimpleNamespace

import jax.numpy as jnp

from kernels_pallas import platform, timing


def test_a_form_that_does_not_fit_is_left_out_and_named(monkeypatch, capsys):
    forms = {"small": lambda x: x + 1, "wide": lambda x: jnp.cumsum(jnp.outer(x, x) + 1, axis=0)}
    monkeypatch.setattr(timing, "memory_bytes", lambda: 1 << 20)
    times = timing.measure(forms, (jnp.ones(1024),), 2)
    assert list(times) == ["small"] and len(times["small"]) == 2
    assert "wide is left out" in capsys.readouterr().err


def test_memory_is_that_of_the_machine_on_a_cpu():
    assert timing.memory_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_processors_are_given_up_on_a_cpu_only(monkeypatch):
    pinned = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, processors: pinned.append(processors))
    monkeypatch.setattr(platform.importlib.metadata, "entry_points", lambda group: ["cuda"])
    for asked in ("cpu", None):  # of JAX_PLATFORMS
        monkeypatch.setattr(platform, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=asked)))
        timing.pin(2)
    assert pinned == [[3, 5]] and platform.may_accelerate()
