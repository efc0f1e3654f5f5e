"""Stop requests, each in a process of its own."""

import os
import signal
import subprocess
import sys

import pytest

from molora_jax.training.signals import StopRequest

PROGRAM = """
import os, sys, threading, time
def print(*words, **_):  # a line in one write: two threads that print at once would mix theirs
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())
sys.path.insert(0, {root!r})
from molora_jax.training.signals import StopRequest
with StopRequest(grace={grace}) as stop:
    threading.Thread(target=lambda: stop.wait(600) and print("asked", flush=True), daemon=True).start()
    print("ready", flush=True)
    {body}
print("left", stop.requested, stop.signal, flush=True)
"""
POLLED = "while not stop.wait(10): pass"
# Native code that gives up the interpreter lock, as a compile does.
BLOCKED = "import ctypes; libc = ctypes.CDLL(None)\n    while True: libc.usleep(10_000_000)"
HANGS = 600  # seconds: for a test that would never end, not for a slow machine
STUBBORN = "while True: time.sleep(0.01)"
FORKED = """worker = os.fork()
    if worker == 0:
        time.sleep(600)
        os._exit(0)
    print("worker", worker, flush=True)
    while not stop.wait(10): pass
    print(os.waitpid(worker, 0)[1], flush=True)
    time.sleep(0.2)"""


def start(body, grace=None):
    code = PROGRAM.format(root=os.getcwd(), grace=grace, body=body)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_is_a_request(number):
    child = start(POLLED)
    child.send_signal(number)
    out, err = child.communicate(timeout=HANGS)
    assert (child.returncode, err) == (0, "") and f"left True {number.value}" in out.splitlines()


def test_an_error_after_a_signal_says_so():
    with pytest.raises(ValueError, match="own") as caught, StopRequest(grace=None) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(HANGS)
        raise ValueError("own")
    assert caught.value.asked_to_stop == signal.SIGTERM
    with pytest.raises(ValueError) as caught, StopRequest(grace=None):
        raise ValueError("no signal came")
    assert not hasattr(caught.value, "asked_to_stop")


@pytest.mark.parametrize("body", [STUBBORN, BLOCKED])
def test_a_second_signal_ends_at_once(body):
    child = start(body)
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "asked\n" and child.poll() is None  # two that wait together arrive in any order
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=HANGS)
    assert child.returncode == 128 + signal.SIGTERM and "ending at once" in err


@pytest.mark.parametrize("body", [BLOCKED])
def test_grace_ends_a_process_that_cannot_answer(body):
    child = start(body, grace=0.3)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=HANGS)
    assert child.returncode == 128 + signal.SIGTERM and "not stopped 0.3 s after signal 15" in err


def test_ctrl_c_that_also_reaches_a_forked_worker_is_one_signal():
    child = start(FORKED)
    assert child.stdout.readline().startswith("worker")
    os.killpg(child.pid, signal.SIGINT)
    out, _ = child.communicate(timeout=HANGS)
    assert child.returncode == 0 and "left True 2" in out.splitlines()


def test_handlers_are_put_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert not stop.requested and signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1
