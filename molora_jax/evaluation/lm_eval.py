"""A run as a model of EleutherAI's lm-eval: its tasks, its prompts and metrics, our likelihoods and answers.

    >>> from lm_eval import simple_evaluate                 # pip install "molora_jax[eval]"
    >>> from lm_eval.tasks import TaskManager
    >>> from molora_jax.evaluation.lm_eval import RunLM
    >>> tasks = TaskManager(include_path="my_tasks")        # a folder with a YAML task
    >>> simple_evaluate(RunLM("runs/mix"), tasks=["quiz"], task_manager=tasks)["results"]

Texts are encoded as lm-eval's own `hf` model does: nothing is added to them, a text without a context starts with BOS
(or the end token), what does not fit the context is cut from the left. The chat template is used where it is asked
for (`apply_chat_template=True`).

    loglikelihood           sum of log p(token) over the continuation, and whether each token is the likeliest
    loglikelihood_rolling   of a whole text, in windows of the context; each token counts once
    generate_until          text up to the first of `until`
"""

import functools
import os

from molora_jax.backbones.base import needs_head
from molora_jax.config.resolve import resolve_template_args
from molora_jax.decode import generate as decoding
from molora_jax.errors import InputError
from molora_jax.evaluation.measure import sums_over
from molora_jax.evaluation.run import Run, before, load_run

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError('lm-eval is not installed: pip install "molora_jax[eval]"') from error

MOST_NEW = 256  # tokens of an answer where a task does not say
DRAWS = ("top_p", "top_k", "min_p")


@register_model("molora")
class RunLM(LM):
    """Args:
    run: of `load_run`, or its folder. base: measure the frozen base alone. batch_size: rows of a batch; None:
      `eval.batch_size` of the run.

    Raises:
      InputError: no run there, a base that predicts no next token.
    """

    def __init__(self, run: Run | str | os.PathLike, *, base: bool = False, batch_size: int | None = None, **_):
        super().__init__()
        self.run, self.base = run if isinstance(run, Run) else load_run(run), base
        needs_head(self.run.model.config, "lm-eval", "base.source")
        self.batch_size = batch_size or self.run.config.eval.batch_size
        self.context = self.run.model.config.context

    @property
    def prefix(self) -> int:
        """What stands before a text without a context."""
        tokenizer = self.run.tokenizer
        first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if first is None:
            raise InputError("base.source", got="a tokenizer without BOS and end token", expected="one of them")
        return first

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request.args) for request in requests]
        sums = self._sums([(context + rest, len(rest)) for context, rest in pairs])
        return [(-nll, bool(right == count)) for nll, right, count in sums]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, of = [], []
        for i, request in enumerate(requests):
            ids = self.run.tokenizer.encode(request.args[0])
            for start in range(0, len(ids), self.context):
                stop = min(start + self.context, len(ids))
                window = [self.prefix, *ids[:stop]] if start == 0 else ids[max(0, stop - self.context - 1) : stop]
                windows.append((window, stop - start))
                of.append(i)
        totals = [0.0] * len(requests)
        for i, (nll, _, _) in zip(of, self._sums(windows), strict=True):
            totals[i] -= nll
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        out, groups = [""] * len(requests), {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        for members in groups.values():
            contexts = [requests[i].args[0] for i in members]
            for i, text in zip(members, self._answers(contexts, requests[members[0]].args[1]), strict=True):
                out[i] = text
        return out

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        args = resolve_template_args(self.run.config.data.get("template_args", ""))
        return self.run.tokenizer.chat(list(chat_history), add_generation_prompt=add_generation_prompt, **args)

    @property
    def tokenizer_name(self) -> str:
        return self.run.tokenizer.digest()

    def chat_template(self, chat_template=False) -> str:
        return self.run.tokenizer.template or ""

    def _pair(self, context: str, rest: str):
        """Ids of both; a space between them belongs to what follows, and the whole is encoded at once."""
        if not context:
            return [self.prefix], self.run.tokenizer.encode(rest)
        bare = context.rstrip()
        whole, before_it = (self.run.tokenizer.encode(text) for text in (context + rest, bare))
        return before_it, whole[len(before_it) :]

    def _sums(self, texts):
        """`(nll, right, count)` of the last `n` ids of each `(ids, n)`."""
        cut = [(ids[-self.context - 1 :], n) for ids, n in texts]
        masked = [(ids, [0] * (len(ids) - n) + [1] * n if n < len(ids) else [0] + [1] * (n - 1)) for ids, n in cut]
        sums = sums_over(self.run, masked, where="lm-eval, a text", base=self.base, rows=self.batch_size)
        return list(zip(sums["nll"].tolist(), sums["right"].tolist(), sums["tokens"].tolist(), strict=True))

    def _answers(self, contexts, options) -> list[str]:
        run, options = self.run, dict(options)
        until = options.pop("until", None) or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        most = next((options.pop(name) for name in ("max_gen_toks", "max_new_tokens") if name in options), MOST_NEW)
        samples, temperature = options.pop("do_sample", None), float(options.pop("temperature", 0.0) or 0.0)
        temperature = 0.0 if samples is False else temperature or float(bool(samples))
        known = {name: options.pop(name) for name in (*DRAWS, "repetition_penalty", "seed") if name in options}
        if options:
            raise InputError(
                "generation_kwargs", got=f"{next(iter(options))!r}", fix="Leave it out of the task.",
                expected=f"until, max_gen_toks, do_sample, temperature, {', '.join(DRAWS)}, repetition_penalty, seed",
            )  # fmt: skip
        known = {name: value for name, value in known.items() if temperature or name not in DRAWS}
        room = max(1, self.context - most)
        ids = [run.tokenizer.encode(text)[-room:] or [self.prefix] for text in contexts]
        model, adapters, state = run.model, run.adapters, run.router_state
        if self.base:
            model, adapters, state = model.without_rules(), {}, {}
        answers = decoding.generate(
            model, run.base_params if self.base else run.params, adapters, state, ids, max_new_tokens=most,
            eos_id=run.tokenizer.end_ids, temperature=temperature, batch_size=self.batch_size,
            stop=functools.partial(run.stop_at, stop) if stop else None, **known,
        )  # fmt: skip
        return [before(run.text(answer), stop) for answer in answers]
