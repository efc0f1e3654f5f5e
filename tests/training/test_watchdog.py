"""A run that hangs writes its stacks and ends; one that goes on is left alone."""

import threading
import time

from molora_jax.training.watchdog import Watchdog


def test_without_a_beat_it_writes_the_stacks_and_ends(tmp_path, capfd):
    ended = threading.Event()
    with Watchdog(0.2, tmp_path, process=3, end=ended.set) as watchdog:
        watchdog.beat("step 7")
        assert ended.wait(60)
    said = capfd.readouterr().err
    assert "step 7 in process 3" in said and "train.hang_seconds" in said
    for text in (said, (tmp_path / "hang-3.txt").read_text()):
        assert "test_without_a_beat_it_writes_the_stacks_and_ends" in text, "the stack of the thread that hangs"


def test_beats_and_the_end_keep_it_quiet(tmp_path):
    ended = threading.Event()
    with Watchdog(30.0, tmp_path, end=ended.set) as watchdog:
        for step in range(5):
            watchdog.beat(f"step {step}")
    with Watchdog(0.0, tmp_path, end=ended.set):
        time.sleep(0.1)
    assert not ended.is_set() and not list(tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog" and not thread.daemon]
