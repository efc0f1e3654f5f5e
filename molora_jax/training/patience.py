"""`train.patience`: a run ends after so many evaluation rounds in a row without a lower held-out NLL.

    waited <- 0 where valid NLL < lowest, else waited + 1;      over: waited >= train.patience > 0

The count is part of every saved step (`patience` of its manifest), so a run that was killed ends at the same step, and
one that had ended stays so until `train.patience` is raised. A NLL that is not finite is no lower one.
"""

import math


class Patience:
    """`rounds`: `train.patience`; `told`: of the manifest of the step that the run goes on from, None for none.

    >>> patience = Patience(2)
    >>> [patience.seen(nll) for nll in (1.0, 0.9, 0.95, 0.9)]
    [False, False, False, True]
    """

    def __init__(self, rounds: int, told: dict | None = None):
        told = told or {}
        self.rounds, self.waited = rounds, told.get("waited", 0)
        self.lowest = math.inf if told.get("lowest") is None else told["lowest"]

    def seen(self, valid: float) -> bool:
        """Takes the held-out NLL of a round, and says whether the run is over."""
        self.waited = 0 if valid < self.lowest else self.waited + 1
        self.lowest = min(valid, self.lowest) if math.isfinite(valid) else self.lowest
        return self.over

    @property
    def over(self) -> bool:
        return 0 < self.rounds <= self.waited

    def record(self) -> dict:
        """For the manifest: {} where the run has no patience."""
        if not self.rounds:
            return {}
        lowest = self.lowest if math.isfinite(self.lowest) else None
        record = {"rounds": self.rounds, "waited": self.waited, "lowest": lowest, "stopped": self.over}
        return {"patience": record}

    def told(self) -> str:
        return f"{self.waited} evaluations in a row without a lower valid NLL than {self.lowest:.4f}"
