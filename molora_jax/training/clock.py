"""Where the time of a run goes, and how fast it is: columns `time/*` of `metrics.jsonl`, and a line at the end.

    time/tokens_per_second_device   tokens of the step (padding is none) / seconds / devices
    time/mfu                        model FLOP utilisation: `flops.per_token` times that rate / a chip's peak
    time/data_seconds               of the step, waiting for rows
    time/device_gb                  the most memory that a device of this process has held

What jax or the table of chips does not say is left out. Goodput is the part of the time in which steps were computed;
the rest was starting, compiling, waiting for data, saving, evaluating.
"""

import collections
import contextlib
import math
import time

import jax
import numpy as np

from kernels_pallas.select import DEVICES

REST = ("start", "compile", "data", "checkpoint", "evaluation")


def peak_flops(kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a chip by its device kind, None where the table does not have it."""
    return next((chip.flops_per_second for key, chip in DEVICES.items() if key in kind.lower()), None)


class Clock:
    """Of one start of a run.

    Args:
      devices: of the mesh. flops: a token's, None where nobody counts them. began: when it started, by
        `time.monotonic`; what has passed since is the start.
    """

    def __init__(self, devices, flops: float | None = None, *, began: float | None = None):
        self.devices, self.flops = list(devices), flops
        self.peak = peak_flops(self.devices[0].device_kind)
        now = time.monotonic()
        self.began = now if began is None else began
        self.spent: dict[str, float] = collections.defaultdict(float, start=now - self.began)
        self.steps: list[float] = []  # seconds of those that only computed
        self._data, self._else = 0.0, 0.0  # since the last step was written

    @contextlib.contextmanager
    def of(self, what: str):
        """Counts what is done in here as `what`, one of `REST`."""
        before = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - before
            self.spent[what] += seconds
            if what == "data":
                self._data += seconds
            else:
                self._else += seconds

    def row(self, tokens: int, seconds: float) -> dict[str, float]:
        """The columns of a step of so many tokens; `seconds` since the step before was done."""
        data, other, self._data, self._else = self._data, self._else, 0.0, 0.0
        alone = max(seconds - other, 1e-9)  # a save or an evaluation between two steps is none of the step's
        if not other:
            self.steps.append(seconds)
        rate = tokens / alone / len(self.devices)
        out = {"time/tokens_per_second_device": round(rate, 2), "time/data_seconds": round(data, 4)}
        if self.flops and self.peak:
            out["time/mfu"] = round(self.flops * rate / self.peak, 4)
        held = self.device_bytes()
        if held is not None:
            out["time/device_gb"] = round(held / 1e9, 3)
        return out

    def rows(self, tokens: list[int], seconds: float) -> list[dict[str, float]]:
        """The columns of runs that took a step together: each has the rate of its own tokens."""
        whole, total = self.row(sum(tokens), seconds), max(sum(tokens), 1)
        rates = [name for name in ("time/tokens_per_second_device", "time/mfu") if name in whole]
        return [whole | {name: round(whole[name] * own / total, 4) for name in rates} for own in tokens]

    def device_bytes(self) -> int | None:
        """The most that a device of this process has held, where jax says it."""
        own = [device for device in self.devices if device.process_index == jax.process_index()]
        held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in own]
        return max((number for number in held if number is not None), default=None)

    def told(self) -> str:
        """`goodput 81 %: steps 0.52 s (sd 0.02); compile 12 %, data 3 %, checkpoint 4 %`."""
        total = max(time.monotonic() - self.began, 1e-9)
        rest = {what: self.spent[what] / total for what in REST if self.spent[what] / total >= 0.005}
        text = f"goodput {1 - sum(self.spent.values()) / total:.0%}"
        if self.steps:
            deviation = float(np.std(self.steps, ddof=1)) if len(self.steps) > 1 else math.nan
            known = "" if math.isnan(deviation) else f" (sd {deviation:.3g})"
            text += f": a step {float(np.median(self.steps)):.3g} s{known}"
        return text + "".join(f"; {what} {part:.0%}" for what, part in rest.items())
