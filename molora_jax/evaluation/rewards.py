"""What a run trained on preferences says of answers: rewards, and the best of N by them.

    r = rewards(run, prompts, answers, tasks)            [N] float32
    best = best_of(r [prompts, N], n)                    the answer of the largest reward among the first n
    tasks = categories(outer, texts)                     a run of `classify` as the outer router: one class a text

N answers, C classes.
"""

import dataclasses
import functools

import jax
import numpy as np

from molora_jax.data.packing import empty_batch, write_segment
from molora_jax.decode.generate import round_up
from molora_jax.errors import InputError
from molora_jax.evaluation.measure import encoded
from molora_jax.objectives import Forward

MARKER = "<|user|>"  # before each of a user's turns, where the outer router reads several


def rewards(run, prompts, answers, tasks=None) -> np.ndarray:
    """`[N]` float32: of each answer to its prompt, in the run's own template.

    Args:
      run: of `load_run`, trained with `preference` (form "reward") or `reward_experts`.
      prompts, answers: lists of N texts; tasks: the name of each one's task (category), where the run tells them apart.

    Raises:
      InputError: a run without a reward, lists of different lengths, an unknown task, a text too long.
    """
    objective, names = run.objective, run.model.tasks
    if run.config.objective.name not in run.modules or not hasattr(objective, "rewards"):
        raise InputError(
            "run", got=f"a run of {run.config.objective.name}", expected="one that trained a reward",
            fix="Train with configs/dmoerm.py, or configs/preference.py and objective.form=reward.",
        )  # fmt: skip
    tasks = [names[0]] * len(prompts) if tasks is None else list(tasks)
    if not len(prompts) == len(answers) == len(tasks):
        got = f"{len(prompts)} prompts, {len(answers)} answers, {len(tasks)} tasks"
        raise InputError("answers", got=got, expected="as many of each")
    strange = next((task for task in tasks if task not in names), None)
    if strange is not None:
        raise InputError("tasks", got=repr(strange), expected=f"some of {', '.join(names)}")
    found = [encoded(run, *pair) for pair in zip(prompts, answers, strict=True)]
    batches = _batches(run, [item.ids for item in found], [names.index(task) for task in tasks])
    model, head = dataclasses.replace(run.model, max_segments=1), run.modules[run.config.objective.name]
    given = run.params, run.adapters, run.router_state, head
    out = [_rewards(*given, batch, model=model, objective=objective) for batch in batches]
    return np.concatenate([np.asarray(r) for r in out])[: len(found)]


def best_of(found: np.ndarray, n: int) -> np.ndarray:
    """`[prompts]`: which of the first n candidates has the largest of `found [prompts, N]`; the first of equal ones.

    >>> import numpy as np
    >>> best_of(np.array([[0.1, 0.5, 0.9]]), 2).tolist()
    [1]
    """
    return np.argmax(found[:, :n], axis=1)


def categories(run, texts) -> list[str]:
    """The class of each text, one each: the argmax of a run of `classify` on a decoder or an encoder.

    Raises:
      InputError: a run of another objective, a text too long.
    """
    if not run.labels or not hasattr(run.objective, "pooled"):
        raise InputError("run", got=f"a run of {run.config.objective.name}", expected="one of classify")
    ids = [[*run.tokenizer.with_prefix(run.tokenizer.encode(text)), *run.tokenizer.suffix_ids] for text in texts]
    given = run.params, run.adapters, run.router_state, run.modules[run.config.objective.name]
    model = dataclasses.replace(run.model, max_segments=1)
    batches = _batches(run, [[*own, 0] for own in ids], [0] * len(ids))  # a class stands behind its text
    out = [_classes(*given, batch, model=model, objective=run.objective) for batch in batches]
    return [run.labels[i] for i in np.concatenate([np.asarray(c) for c in out])[: len(texts)]]


def user_turns(messages) -> str:
    """What an outer router reads of a conversation: all of the user's turns, each behind a marker.

    >>> user_turns([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    '<|user|>Hi'
    """
    return "".join(MARKER + turn["content"] for turn in messages if turn["role"] == "user")


def _batches(run, ids: list, task_ids: list):
    longest = max((len(own) - 1 for own in ids), default=1)
    if longest > run.model.config.context:
        raise InputError("answers", got=f"{longest} tokens", expected=f"at most {run.model.config.context}")
    rows, size = max(1, min(len(ids), run.config.eval.batch_size)), round_up(longest)
    for first in range(0, len(ids), rows):
        batch = empty_batch(rows, size, pad_id=run.tokenizer.pad_id)
        for row, own in enumerate(ids[first : first + rows]):
            own = np.asarray(own, np.int32)
            mask = np.ones(len(own), np.int32)
            write_segment(batch, row, 0, 1, ids=own, mask=mask, task_id=task_ids[first + row], example_id=first + row)
        yield batch


def _forward(params, adapters, state, batch, model):
    hidden = lambda batch: model.hidden(params, adapters, state, batch)[0]  # noqa: E731
    return Forward(model, params, hidden, batch["tokens"].shape[1])


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def _rewards(params, adapters, state, heads, batch, *, model, objective):
    return objective.rewards(_forward(params, adapters, state, batch, model), heads, {}, batch)[0][:, 0]


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def _classes(params, adapters, state, heads, batch, *, model, objective):
    last = (batch["segment_ids"] > 0).sum(axis=1, keepdims=True) - 1
    h = objective.pooled(_forward(params, adapters, state, batch, model).hidden(batch), batch, last)
    return (h @ heads["kernel"] + heads["bias"])[:, 0].argmax(axis=-1)
