"""Continuous batching: one thread that owns the device, a bounded queue before it, a set of slots for each run.

    submit -> waiting (bounded) -> a free slot of its run: prefill -> a token a step, beside all others -> free

Every turn of the thread drops what was cancelled, fills free slots in order of arrival, and makes one step of each run
that has answers in the making.
"""

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable

from molora_jax.decode.slots import Draw, Slots
from molora_jax.serving.answer import Answer, Piece

LOG = logging.getLogger("molora_jax.serving")


class Full(Exception):
    """No place in the queue; `retry_after` in seconds."""

    def __init__(self, retry_after: int):
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Closing(Exception):
    """The server ends: nothing new is taken, and what still waits is not begun."""

    def __init__(self):
        super().__init__("the server is shutting down")


@dataclasses.dataclass(eq=False)
class Request:
    """Answers that came together, from one prompt or several, to one run.

    `send(number, Piece | Exception)` is called from the engine's thread, with the number of the answer; after an
    exception nothing more comes.
    """

    model: str
    answers: list[Answer]
    send: Callable[[int, Piece | Exception], None]
    left: int = 0
    gone: bool = False
    prompts: dict = dataclasses.field(default_factory=dict)  # ids -> [their prefill, how many answers still need it]


class Engine:
    """Args:
    runs: by the name under which they are served. slots: answers in the making, of each run at most. queue: answers
      that may wait, of all runs together. context: most tokens of a prompt with its answer; 0 is each run's own bound.
    """

    def __init__(self, runs: dict, *, slots: int = 16, queue: int = 256, context: int = 0):
        self.runs, self.queue, self.count = runs, queue, slots
        self.slots = {
            name: Slots(
                run.model, run.params, run.adapters, run.router_state, count=slots,
                context=context or run.model.config.context,
            )
            for name, run in runs.items()
        }  # fmt: skip
        self.waiting: collections.deque[tuple[Request, int]] = collections.deque()
        self.running = {name: {} for name in runs}  # slot -> (request, number)
        self.changed = threading.Condition()
        self.deadline: float | None = None  # set when closing
        self.seconds = 1.0  # of an answer, a moving mean
        self.begun: dict[tuple[str, int], float] = {}
        self.steps = self.tokens = 0
        self.thread = threading.Thread(target=self._run, name="molora-serving", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def warm_up(self) -> None:
        """Compiles the steps of each run before anyone waits for them; before `start`."""
        for slots in self.slots.values():
            prompt, taken = slots.read([0]), []
            for width in slots.widths:
                while len(taken) < width:
                    taken.append(slots.put(prompt, Draw())[0])
                slots.step()
            for slot in taken:
                slots.take(slot)

    def submit(self, request: Request) -> None:
        """Raises Full, Closing."""
        with self.changed:
            if self.deadline is not None or not self.thread.is_alive():
                raise Closing
            if self._without_slot(request) > self.queue:
                raise Full(max(1, math.ceil(self.seconds * (len(self.waiting) + 1) / self.count)))
            request.left = len(request.answers)
            for answer in request.answers:
                key = tuple(answer.prompt)
                request.prompts.setdefault(key, [None, 0])[1] += 1
            self.waiting.extend((request, number) for number in range(len(request.answers)))
            self.changed.notify()

    def _without_slot(self, request: Request) -> int:
        """How many answers would wait for others to end, with these."""
        asked = collections.Counter(waiting.model for waiting, _ in self.waiting)
        asked[request.model] += len(request.answers)
        return sum(max(0, asked[name] + len(running) - self.count) for name, running in self.running.items())

    def cancel(self, request: Request) -> None:
        """Nobody waits for it any more: its slots are free after the step that is under way."""
        with self.changed:
            request.gone = True
            self.changed.notify()

    def close(self, grace: float) -> None:
        """Ends the engine: waiting requests end with `Closing`, running ones too unless they end within `grace`
        seconds."""
        with self.changed:
            self.deadline = min(self.deadline or math.inf, time.monotonic() + grace)
            self.changed.notify()

    @property
    def closing(self) -> bool:
        return self.deadline is not None

    @property
    def late(self) -> bool:
        """Past the deadline. The thread looks at it between two steps only, and a step may compile for minutes."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def ended(self) -> bool:
        return self.closing and not self.thread.is_alive()

    def state(self) -> dict:
        """For `/health`."""
        with self.changed:
            alive = self.thread.is_alive() and not self.closing
            return {
                "status": "ok" if alive else "closing" if self.closing else "stopped",
                "models": list(self.runs), "slots": self.count, "queue": self.queue,
                "running": sum(map(len, self.running.values())), "waiting": len(self.waiting),
                "tokens": self.tokens, "steps": self.steps,
            }  # fmt: skip

    def _run(self):
        try:
            self._loop()
        finally:  # whatever ended it: nobody waits for ever
            with self.changed:
                self.deadline = self.deadline or time.monotonic()
                for items in (self.waiting, *(list(running.values()) for running in self.running.values())):
                    self._refuse(items)

    def _loop(self):
        while True:
            with self.changed:
                while not (self.waiting or any(self.running.values()) or self.closing):
                    self.changed.wait()
                if self.closing and not any(self.running.values()):
                    return
                admitted = self._turn()
            for name, request, number in admitted:
                self._guarded(name, self._begin, request, number)
            for name, running in self.running.items():
                if running:
                    self._guarded(name, self._step)

    def _turn(self) -> list:
        """What is given a slot now; frees the slots of requests that are gone."""
        for name, running in self.running.items():
            for slot, (request, _) in list(running.items()):
                if request.gone:
                    self._free(name, slot)
        self.waiting = collections.deque(item for item in self.waiting if not item[0].gone)
        if self.closing:
            self._refuse(self.waiting)
            if self.late:
                for name, running in self.running.items():
                    self._refuse(list(running.values()))
                    for slot in list(running):
                        self._free(name, slot)
        free = {name: len(slots.free) for name, slots in self.slots.items()}
        admitted, rest = [], collections.deque()
        for request, number in self.waiting:
            if free[request.model]:
                free[request.model] -= 1
                admitted.append((request.model, request, number))
            else:
                rest.append((request, number))
        self.waiting = rest
        return admitted

    def _refuse(self, items) -> None:
        for request, number in items:
            self._send(request, number, Closing())
        if items is self.waiting:
            self.waiting = collections.deque()

    def _guarded(self, name, work, *begun) -> None:
        """A fault on the device ends the run's answers (and the one that is `begun`), not the server."""
        try:
            work(name, *begun)
        except Exception as error:  # noqa: BLE001  whatever it is: those who wait are told
            LOG.exception("a step of %s failed", name)
            with self.changed:
                ended, self.running[name] = self.running[name], {}
            self.slots[name].clear()
            for request, number in [*ended.values(), *([begun] if begun else [])]:
                self._send(request, number, error)

    def _begin(self, name, request, number) -> None:
        answer, slots = request.answers[number], self.slots[name]
        shared = request.prompts[tuple(answer.prompt)]
        if shared[0] is None:
            shared[0] = slots.read(answer.prompt)
        slot, token = slots.put(shared[0], answer.draw, logprobs=answer.logprobs)
        shared[1] -= 1
        if not shared[1]:
            shared[0] = None
        with self.changed:
            self.running[name][slot] = (request, number)
        self.begun[name, slot] = time.monotonic()
        self._add(name, slot, token)

    def _step(self, name) -> None:
        tokens = self.slots[name].step()
        self.steps += 1
        for slot, token in tokens.items():
            self._add(name, slot, token)

    def _add(self, name, slot, token) -> None:
        request, number = self.running[name][slot]
        piece = request.answers[number].add(token)
        self.tokens += 1
        if piece.finish:
            self.seconds += 0.1 * (time.monotonic() - self.begun[name, slot] - self.seconds)
            with self.changed:
                self._free(name, slot)
        self._send(request, number, piece)

    def _free(self, name, slot) -> None:
        del self.running[name][slot]
        self.begun.pop((name, slot), None)
        self.slots[name].take(slot)

    def _send(self, request, number, piece) -> None:
        if not request.gone:
            request.send(number, piece)
