"""Chat templates under a limit: those of strangers render in one child process, without jax and without our memory.

A template can hang or fill the memory (`range` in `range`, `'x' * 10**9`), so it has 10 seconds, 512 MB and ten million
characters of text a rendering (`template_worker.py`). The child starts with the first rendering, takes a batch of
conversations a message, and ends with this process: its standard input closes. One that was killed is replaced, and the
rendering that it died of is an error of its own; the others go on, until too many of them have killed one (`Deaths`).

Our own two templates, below, render in this process.
"""

import atexit
import dataclasses
import itertools
import json
import os
import pathlib
import select
import subprocess
import sys
import threading
import time

from molora_jax.errors import InputError
from molora_jax.io import template_worker

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
BATCH = 256  # conversations a message
BATCH_BYTES = 4_000_000  # of a message, so that it fits the child's memory
START = 60  # seconds that the child may take to start: imports from a slow disk
MOST_DEATHS = 5  # rows that may kill the child: each costs ten seconds, or twice as much


@dataclasses.dataclass
class Deaths:
    """How many rows killed the child, `most` at most. Calls that belong together, such as a file's, share one count."""

    most: int = MOST_DEATHS
    count: int = 0

    @property
    def too_many(self) -> bool:
        return self.count >= self.most


def render(
    template: str | None, conversations: list[dict], *, day: str | None = None, rows=None, deaths: Deaths | None = None
) -> list[dict]:  # fmt: skip
    """Renders each of `conversations` (the template's variables; `messages` among them).

    Args:
      template: None is PLAIN. day: an ISO date that `strftime_now` tells, None is now.
      rows: the number of the row that each conversation belongs to, those of one row in sequence; None: each is one.
      deaths: counts the rows that killed the child, here and in other calls.

    Returns:
      A dict each: `text` and `spans` (of `{% generation %}`, in characters), or `error`, a text that says why not, with
      `died` beside it where the child died of this row. None is tried once too many have done so.
    """
    template = PLAIN if template is None else template
    if template in (CHATML, PLAIN):
        return [template_worker.attempt(template, day, variables) for variables in conversations]
    return _worker.render(template, day, conversations, rows, deaths)


class Worker:
    """The child process. Threads take turns."""

    def __init__(self, seconds: float = template_worker.SECONDS):
        self.seconds = seconds
        self._process, self._lock = None, threading.Lock()

    def render(self, template, day, conversations, rows=None, deaths=None) -> list[dict]:
        rows, deaths = range(len(conversations)) if rows is None else rows, deaths or Deaths()
        packed = [_packed(conversation) for conversation in conversations]
        row_of = [row for row, text in zip(rows, packed, strict=True) if isinstance(text, bytes)]
        good = [text for text in packed if isinstance(text, bytes)]
        answers, careful = [], deaths.count > 0  # careful: each answer is sent at once
        with self._lock:
            while len(answers) < len(good) and not deaths.too_many:
                batch = _batch(good, len(answers))
                head = {"template": template, "day": day, "count": len(batch), "careful": careful}
                request = b"".join(map(template_worker.frame, [template_worker.dumps(head), *batch]))
                try:
                    got, why = self._exchange(request, len(batch))
                except BaseException:  # Ctrl-C, say: what the child still answers would be taken for the next's
                    self.close()
                    raise
                answers += got
                if why:
                    self.close()
                    if got and not careful:  # some were rendered, but not sent: once more, each sent at once
                        careful = True
                        continue
                    careful = True
                    deaths.count += 1
                    row = row_of[len(answers)]
                    while len(answers) < len(good) and row_of[len(answers)] == row:  # what is left of it would too
                        answers.append({"error": why, "died": True})
        untried = {"error": f"not tried: {deaths.count} rows before it killed the template's process"}
        rendered = itertools.chain(answers, itertools.repeat(untried))
        return [next(rendered) if isinstance(text, bytes) else text for text in packed]

    def close(self):
        """Ends the child, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.stdin.close()
            process.stdout.close()
            process.wait()

    def forget(self):
        """After a fork: the child belongs to the parent, and so may the lock."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                pipe.close()
            self._process.returncode = 0  # not ours to wait for
        self._process, self._lock = None, threading.Lock()

    def _start(self):
        paths = os.pathsep.join(path for path in sys.path if path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-P", str(pathlib.Path(template_worker.__file__))], bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
        except OSError as error:
            raise _no_process(error.strerror or str(error)) from None
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)

    def _exchange(self, request: bytes, count) -> tuple[list[dict], str]:
        """Answers to the first conversations, and why the next one has none ("" if all have)."""
        if self._process is None:
            self._start()
            ready, why = self._talk(b"", 1, seconds=START)
            if not ready:
                self.close()
                raise _no_process(why)
        return self._talk(request, count, seconds=self.seconds)

    def _talk(self, request: bytes, count, *, seconds) -> tuple[list, str]:
        out, source = self._process.stdin.fileno(), self._process.stdout.fileno()
        send, received, answers = memoryview(request), bytearray(), []
        poll = select.poll()  # not select(), which takes no file number above 1023
        poll.register(source, select.POLLIN)
        if send:
            poll.register(out, select.POLLOUT)
        deadline = time.monotonic() + seconds
        while len(answers) < count:
            left = max(0.0, deadline - time.monotonic())
            events = dict(poll.poll(1000 * left))
            readable, writable = source in events, out in events
            if writable:
                try:
                    send = send[os.write(out, send[: 1 << 16]) :]
                except BlockingIOError:
                    pass
                except BrokenPipeError:
                    send = send[:0]  # it is gone: what it said before is read below
                if not send:
                    poll.unregister(out)
            if readable:
                chunk = os.read(source, 1 << 20)
                if not chunk:
                    return answers, self._died()
                received += chunk
                answers += _frames(received)
                deadline = time.monotonic() + seconds
            elif writable:
                deadline = time.monotonic() + seconds
            elif left <= 0:
                return answers, f"it ran for more than {seconds:g} seconds"
        return answers, ""

    def _died(self) -> str:
        status = self._process.wait()
        if status in (-9, -14):
            return f"its process was killed (signal {-status}): too much time or memory"
        return f"its process ended with status {status}"


def _no_process(why) -> InputError:
    return InputError(
        "chat template", got=f"no process to render it in ({why})", expected=f"{sys.executable} to start",
        fix="Free processes or memory.",
    )  # fmt: skip


def _packed(conversation: dict) -> bytes | dict:
    """As JSON, or the error that it cannot be: objects of Python, lists in lists without an end."""
    try:
        return template_worker.dumps(conversation)
    except (TypeError, ValueError, RecursionError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _batch(packed: list[bytes], first: int) -> list[bytes]:
    """Those from `first` on: at least one, no more than a message holds."""
    size = 0
    for last in range(first, min(len(packed), first + BATCH)):
        size += len(packed[last])
        if last > first and size > BATCH_BYTES:
            return packed[first:last]
    return packed[first : first + BATCH]


def characters(value) -> int:
    """Of all text inside a JSON value: what a row weighs."""
    total, queue = 0, [value]
    while queue:
        value = queue.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            queue += value.keys()
            queue += value.values()
        elif isinstance(value, (list, tuple)):
            queue += value
    return total


def _frames(received: bytearray):
    """Takes the whole frames off the front."""
    while len(received) >= 8:
        end = 8 + int.from_bytes(received[:8], "little")
        if len(received) < end:
            return
        yield json.loads(bytes(received[8:end]))
        del received[:end]


_worker = Worker()
atexit.register(_worker.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)
