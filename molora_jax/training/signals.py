"""SIGTERM and SIGINT ask a run to stop; the loop answers between two steps.

    first signal    `requested` becomes true; the loop saves and leaves
    second signal   the process ends at once with status 128 + signal
    after `grace`   if the loop has not left (it is inside a long compile, say), the process ends with that status too:
                    the last checkpoint, at the least that of step 0, is what remains

Python runs a signal handler only between two bytecodes of the main thread, so not during a compile or a collective
that hangs. The C part of a handler does run and writes to `signal.set_wakeup_fd`; a thread reads there and decides. It
needs the interpreter lock, which XLA gives up while it compiles and runs; native code that keeps the lock delays it.
On several processes one of them may see the signal a step earlier: the loop has to agree on the flag, and leaves
SIGTERM to jax, whose handler tells the coordinator.
"""

import os
import select
import signal
import socket
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager for the main thread; handlers and wakeup descriptor are put back at its end.

    An error that leaves it after a signal has the signal's number as `error.asked_to_stop`.

    Args:
      grace: seconds between the first signal and the end of the process, counted until the context is left; None
        waits for ever. 25 lies below the 30 after which Kubernetes and SLURM kill.
      signals: those that are heard here.

    Example:
      >>> with StopRequest() as stop:
      ...     while not stop.requested:
      ...         step()
    """

    def __init__(self, grace: float | None = 25.0, signals: tuple[int, ...] = SIGNALS):
        self.grace, self.signals = grace, signals
        self.signal = None  # the first signal's number
        self._event = threading.Event()
        self._old_handlers = {}  # empty outside the context; the hooks of fork cannot be taken back

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleeps, but not past a request; whether there is one."""
        return self._event.wait(seconds)

    def __enter__(self):
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="stop-request", daemon=True)
        self._thread.start()
        self._old_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in self.signals}
        # A forked worker shares the socket: Ctrl-C reaches both and would look like two signals here. Signals wait
        # while the fork is under way, so that there is no moment at which the worker answers them in our name.
        os.register_at_fork(before=self._hold, after_in_parent=self._let_go, after_in_child=self._forget)
        return self

    def __exit__(self, kind, error, trace):
        if error is not None and self.signal is not None:
            error.asked_to_stop = self.signal  # who goes on after an error should not go on after this one
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        self._old_handlers = {}
        self._writer.close()  # the thread reads the end of the stream
        self._thread.join()
        self._reader.close()

    def _watch(self):
        deadline = None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], left)[0]:
                self._end(f"not stopped {self.grace:g} s after signal {self.signal}: ending")
            received = self._reader.recv(64)
            if not received:
                return
            for number in (n for n in received if n in self.signals):
                if self.signal is not None:
                    self._end(f"signal {number} again: ending at once")
                self.signal = number
                self._event.set()
                deadline = None if self.grace is None else time.monotonic() + self.grace

    def _end(self, message):
        os.write(2, f"{message}\n".encode())
        os._exit(128 + self.signal)  # no clean-up: the main thread may never return to Python

    def _hold(self):
        if self._old_handlers:
            signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)

    def _let_go(self):
        if self._old_handlers:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)

    def _forget(self):
        if self._old_handlers:
            signal.set_wakeup_fd(-1)
            for number in self.signals:  # not Python's handler of SIGINT: what it raises inside this hook would be lost
                signal.signal(number, signal.SIG_DFL)
            self._let_go()
