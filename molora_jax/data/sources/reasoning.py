"""`rg:NAME`: a task of reasoning-gym (arXiv 2505.24760), made and judged by its own code: `rg:chain_sum`.

Opt-in (`pip install "molora_jax[reasoning]"`), for its code runs; that of other packages never does. Drawn with one
seed; repeats are dropped and splits go by the question, so that no question is in two of them. Metric: the verifier's,
an answer is right where its score is 1.
"""

import functools

from molora_jax.config.fields import did_you_mean
from molora_jax.data.example import Example
from molora_jax.errors import InputError

ITEMS, SEED = 2000, 0  # a slow generator makes a dozen items a second; what is made is cached


class Task:
    DISTRIBUTION = "reasoning-gym"
    FILTERS = 1
    FIX = 'Install the pinned version: pip install "molora_jax[reasoning]".'

    def __init__(self, name: str):
        self.name = name

    def files(self):
        return []

    def identity(self) -> str:
        return f"{ITEMS} {SEED}"

    def examples(self, files):
        for item in _dataset(self.name):
            question, answer = item["question"], item["answer"]
            if isinstance(answer, str) and answer.strip() and question.strip():  # some tasks have no single answer
                yield Example(f"rg:{self.name}", question, answer, question)

    def verify(self, question: str, answer: str) -> bool:
        """Whether the task's own verifier gives the whole score."""
        return float(_dataset(self.name).score_answer(answer=answer, entry=_entries(self.name)[question])) >= 1.0


@functools.lru_cache(maxsize=8)
def _entries(name: str) -> dict:
    return {item["question"]: item for item in _dataset(name)}


@functools.lru_cache(maxsize=8)
def _dataset(name: str):
    where = f"data.tasks, task 'rg:{name}'"
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        got, expected = f"no package {error.name}", "the package 'reasoning-gym' and all that it imports"
        raise InputError(where, got=got, expected=expected, fix=Task.FIX) from None
    if name not in DATASETS:
        fix = did_you_mean(name, DATASETS)
        raise InputError(where, got=repr(name), expected="a task of reasoning_gym.factory.DATASETS", fix=fix)
    return reasoning_gym.create_dataset(name, size=ITEMS, seed=SEED)
