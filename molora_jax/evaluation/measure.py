"""What a loaded run says of texts: logits, and the NLL of answers. S positions, V vocabulary, N answers."""

import functools

import jax
import numpy as np

from molora_jax.backbones.base import needs_head
from molora_jax.config.resolve import resolve_template_args
from molora_jax.data import render
from molora_jax.data.example import Example
from molora_jax.data.packing import empty_batch, write_segment
from molora_jax.decode.generate import round_up
from molora_jax.errors import InputError
from molora_jax.objectives.held_out import example_nll


def text_batch(run, ids) -> dict:
    """A batch of one row `[1, S]` for a text's ids, padded to a size that many texts share."""
    if not 0 < len(ids) <= run.model.config.context:
        raise InputError("text", got=f"{len(ids)} tokens", expected=f"1 to {run.model.config.context}")
    size = round_up(len(ids))
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(ids)] = ids
    return {
        "tokens": tokens,
        "positions": np.arange(size, dtype=np.int32)[None],
        "segment_ids": (np.arange(size)[None] < len(ids)).astype(np.int32),
    }


def logits(run, ids) -> np.ndarray:
    needs_head(run.model.config, "logits", "base.source")
    found = _logits(run.params, run.adapters, run.router_state, text_batch(run, ids), model=run.model)
    return np.asarray(found)[0, : len(ids)]


def token_ids(ids, vocab: int) -> np.ndarray:
    """`[tokens]` int; raises InputError for what is no token of the model."""
    found = np.asarray(ids)
    wrong = found.ndim != 1 or found.size and not np.issubdtype(found.dtype, np.integer)
    if wrong or found.size and (found.min() < 0 or found.max() >= vocab):
        raise InputError("text", got=f"{ids!r:.80}", expected=f"a text, or a list of token ids from 0 to {vocab - 1}")
    return found


@functools.partial(jax.jit, static_argnames="model")
def _logits(params, adapters, router_state, batch, *, model):
    return model.logits(params, model.hidden(params, adapters, router_state, batch)[0])


def nll(run, prompts: list[str], answers: list[str]) -> np.ndarray:
    """`[N]` float64: mean over an answer's tokens, end token included, of -log p in nats, as the training counts it."""
    needs_head(run.model.config, "the NLL of an answer", "base.source")
    for where, texts in (("prompt", prompts), ("answer", answers)):
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(where, got=repr(text)[:80], expected="some text")
    if len(prompts) != len(answers):
        raise InputError("answer", got=f"{len(answers)} texts", expected=f"one for each of {len(prompts)} prompts")
    found = [encoded(run, *pair) for pair in zip(prompts, answers, strict=True)]
    sums = sums_over(run, [(pair.ids, pair.loss_mask) for pair in found], where="prompt")
    return sums["nll"] / sums["tokens"]


def sums_over(run, texts, *, where: str, base: bool = False, rows: int | None = None, done=lambda rows: None) -> dict:
    """Over the marked tokens of each of N texts: `nll` (nats, summed), `tokens`, `right` (the likeliest token is the
    text's), each `[N]` float64.

    Args:
      texts: `(ids, mask)`, one 0 or 1 an id; the first id is never predicted.
      base: of the frozen base alone. rows: of a batch at most; None: `eval.batch_size`. done: called with the number
        of rows after each batch.

    Raises:
      InputError: in the name of `where`, a text that does not fit the model's context.
    """
    longest = max((len(ids) - 1 for ids, _ in texts), default=0)
    if longest > run.model.config.context:
        raise InputError(where, got=f"{longest} tokens", expected=f"at most {run.model.config.context}")
    tuned = (run.model, run.adapters, run.router_state)
    model, adapters, state = (run.model.without_rules(), {}, {}) if base else tuned
    params = run.base_params if base and run.base_params is not None else run.params
    rows = max(1, min(len(texts), rows or run.config.eval.batch_size))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))  # little padding, few shapes
    sums = {name: np.zeros(len(texts)) for name in ("nll", "tokens", "right")}
    sizes = [round_up(max(len(texts[i][0]) - 1, 1)) for i in order]
    for size in sorted(set(sizes)):
        batches, here = [], [i for i, own in zip(order, sizes, strict=True) if own == size]
        for first in range(0, len(here), rows):
            batch = empty_batch(rows, size, pad_id=run.tokenizer.pad_id)
            batch["example_index"] = np.full((rows, size), -1, np.int32)
            for row, i in enumerate(here[first : first + rows]):
                ids, mask = texts[i]
                ids = np.asarray(ids, np.int32)
                write_segment(batch, row, 0, 1, ids=ids, mask=mask, task_id=0, example_id=first + row)
                batch["example_index"][row] = i
            batches.append(batch)
        found = example_nll(
            model, params, adapters, state, batches, len(texts), mesh=run.mesh, targets_per_row=size,
            constrain=_as_it_is, done=lambda: done(rows),
        )  # fmt: skip
        for name in sums:
            sums[name] += found[name]
    return sums


def _as_it_is(x):
    """One device: nothing to constrain."""
    return x


def encoded(run, prompt: str, answer: str):
    """Ids of an answer to a prompt in the run's own template; raises InputError where it refuses them."""
    text = prompt + answer if run.config.data.get("raw", False) else None
    return encoded_example(run, Example(task="", prompt="" if text else prompt, target=answer, group="", text=text))


def encoded_example(run, example: Example):
    """Ids of a row in the run's own template, its last answer marked; raises InputError where it refuses it."""
    data = run.config.data
    (found,) = render.encode_examples(
        run.tokenizer, [example], system=data.system, train_on="last",
        template_args=resolve_template_args(data.get("template_args", "")),
    )  # fmt: skip
    if isinstance(found, render.Refused):
        raise InputError("prompt", got=found.got, expected=found.expected, fix=found.fix)
    return found
