"""`molora --help | head`: whoever reads goes away, and the command ends without a word."""

import os
import pathlib
import subprocess
import sys

import pytest

from launch import flags
from molora_jax import pipes, runtime
from molora_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def unread():
    """The end of a pipe that is written to; the other one is closed."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def test_help_that_nobody_reads(unread):
    command = [sys.executable, "-m", "molora_jax", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=unread, stderr=subprocess.PIPE)
    assert done.returncode == pipes.GONE == 141 and not done.stderr


def prints(_):
    print("x" * 100_000)


def prints_and_exits(_):
    print("x")
    sys.exit(0)


def mistaken(_):
    raise InputError("field", got="x", expected="y")


@pytest.mark.parametrize("function, stream", [(prints, "stdout"), (prints_and_exits, "stdout"), (mistaken, "stderr")])
def test_a_launcher_that_nobody_reads(unread, monkeypatch, function, stream):
    monkeypatch.setattr(flags.signal, "signal", lambda *_: None)
    monkeypatch.setattr(runtime, "keep_memory", lambda: None)
    with open(unread, "w", buffering=1 if stream == "stderr" else -1, closefd=False) as file:
        monkeypatch.setattr(sys, stream, file)
        with pytest.raises(SystemExit) as ended:
            flags.main(function)
    assert ended.value.code == pipes.GONE


def test_a_broken_pipe_of_the_commands_own_is_an_error():
    def function():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        pipes.quietly(function)
    assert pipes.quietly(lambda: 2) == 2
