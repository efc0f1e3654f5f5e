"""`launch.profile` on a trace made by hand."""

from types import SimpleNamespace as Thing

import pytest

from launch import flags, profile
from molora_jax.errors import InputError


def event(start, duration, op):
    return Thing(start_ns=start, duration_ns=duration, stats=[("hlo_op", op)] if op else [])


def test_an_operation_counts_without_those_inside_it_for_its_innermost_stage():
    names = {
        "while.1": "jit(step)/jvp()/while",
        "dot.1": "jit(step)/jvp()/while/body/attention/q/base/dot_general",
        "gather.1": "jit(step)/jvp()/while/body/ffn/gather",  # the primitive of that name, not the stage
        "dot.2": "jit(step)/transpose(jvp())/while/body/experts/dot_general",
    }
    events = [event(0, 100, "while.1"), event(10, 30, "dot.1"), event(50, 20, "gather.1"), event(0, 500, None),
              event(200, 7, "dot.2"), event(210, 5, "copy.3")]  # fmt: skip
    host = Thing(name="/host:CPU", lines=[Thing(events=events)])
    spent = profile.by_stage(Thing(planes=[Thing(name="/host:metadata", lines=[]), host]), names)
    assert spent == {
        ("other", False): 50 + 5, ("base", False): 30, ("ffn", False): 20, ("experts", True): 7,
    }  # fmt: skip
    table = profile.table(spent, steps=1)
    assert table.splitlines()[1].startswith("other") and table.splitlines()[-1].split() == ["a", "step", "0.0", "0.0"]


def test_of_operations_that_overlap_only_the_common_time_is_taken_off():
    assert dict(profile.own_times([(0, 10, "a"), (8, 6, "b"), (20, 5, "c")])) == {"a": 8, "b": 6, "c": 5}


@pytest.mark.parametrize("flag", ["--steps=0", "--batch=0", "--threads=0"])
def test_a_number_that_is_too_small_is_refused(flag):
    with pytest.raises(InputError, match=flag.split("=")[0]):
        profile.run([f"--config={flags.ROOT / 'configs/mixlora.py'}", flag])
