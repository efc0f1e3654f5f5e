"""A trained run, opened: `molora_jax.load_run(DIR)` in a notebook, a script or a launcher.

    >>> run = molora_jax.load_run("runs/quickstart")
    >>> run.generate("What is the capital of France?")
    >>> run.routing("A sad film.")["ffn"]["ffn"].shape      # [layers, tokens, experts]

Only the run's folder and its base model are needed; the task data are read when `run.data` is first asked for. The
model sits on one device, the first, or on a mesh that splits its base: `load_run(DIR, mesh=dict(fsdp=8))`.
"""

import dataclasses
import functools
import logging
import os
import pathlib
from typing import Any

import jax
import numpy as np

from molora_jax import data as data_lib
from molora_jax import sharding
from molora_jax.backbones.compile import compile_base
from molora_jax.backbones.gates import by_layer
from molora_jax.config import objectives as objectives_config
from molora_jax.config.resolve import resolve_template_args
from molora_jax.data import render, traces
from molora_jax.data.jsonl import BadRow
from molora_jax.data.turns import read_messages, read_tools
from molora_jax.decode import generate as decoding
from molora_jax.errors import InputError
from molora_jax.evaluation import consistency, measure
from molora_jax.io.base import configured_base
from molora_jax.io.templates import characters
from molora_jax.objectives import Objective, compile_objective
from molora_jax.runs import parents, written
from molora_jax.runs.metrics_file import read_rows
from molora_jax.runs.modules import Modules, in_place
from molora_jax.runs.opened import open_run
from molora_jax.runs.view import View
from molora_jax.runs.without import leave_out

LOG = logging.getLogger("molora_jax.run")


@dataclasses.dataclass
class Run:
    """`config` (ConfigDict), `model`, `params` (the base, trained copies of its leaves in their places), `adapters`,
    `router_state` (nested dicts of arrays), `tokenizer`, `step` (None: the base alone), `workdir` (None likewise).

    `base_params`: the base as it was; `modules`: trained heads and copies, as `module_spec` makes them; `labels`: names
    of the classes; `start`: the run as it began, where its objective looks back; `facts`, `digest`: of `opened.Opened`;
    `mesh`: where the arrays lie.
    """

    config: Any
    model: Any
    params: dict
    adapters: dict
    router_state: dict
    tokenizer: Any
    step: int | None = None
    workdir: pathlib.Path | None = None
    base_params: dict | None = None
    modules: dict = dataclasses.field(default_factory=dict)
    module_spec: Modules = Modules()
    labels: tuple[str, ...] = ()
    start: dict | None = None
    facts: dict = dataclasses.field(default_factory=dict)
    digest: str = ""
    mesh: Any = dataclasses.field(default_factory=lambda: sharding.local_mesh(None))

    def __repr__(self):
        rules = ", ".join(rule.name for rule in self.model.rules) or "no rules"
        return f"Run({str(self.workdir)!r}, step={self.step}, base={self.config.base.source!r}, rules: {rules})"

    @functools.cached_property
    def data(self):
        """The run's `DataSet`, read now. Raises InputError where its files or packages are gone."""
        config = self.config
        return data_lib.build(
            config.data, tokenizer=self.tokenizer, batch_size=config.train.batch_size, seed=config.seed,
            reads=objectives_config.reads(config), unit=objectives_config.unit(config),
        )  # fmt: skip

    @functools.cached_property
    def objective(self) -> Objective:
        """Of the stage that the step belongs to."""
        return compile_objective(self.config.get("objective") or objectives_config.PLAIN)

    def tokens(self, text: str) -> list[str]:
        """The pieces that `routing` reports on, as text."""
        return [self.tokenizer.decode([i]) for i in self.tokenizer.encode(text)]

    def prompt_ids(self, prompt, *, tools=None) -> list[int]:
        """A prompt in the model's chat template, up to where the answer starts (under `data.raw`, as it stands).

        Args:
          prompt: a user's text, or a conversation: a list of turns `{"role", "content"}`, the one to answer last.
          tools: descriptions of tools, for the template.

        Raises:
          InputError: an empty prompt, turns that are none, or a template that refuses them or drops tools or a turn.
        """
        data = self.config.data
        _bounded(characters([prompt, tools]))
        tools = _tools(tools)
        if tools and data.get("raw", False):
            raise InputError("tools", got="descriptions of tools", expected="none: this run has data.raw=True")
        if data.get("raw", False):  # trained on plain text
            if not isinstance(prompt, str) or not prompt.strip():
                raise InputError("prompt", got=repr(prompt)[:80], expected="text: this run has data.raw=True")
            return self.plain_ids(prompt)
        given = _turns(prompt)
        turns = render.with_system(given, data.system)
        args = resolve_template_args(data.get("template_args", ""))
        text = self.tokenizer.chat(turns, add_generation_prompt=True, tools=tools, **args)
        added = data.system if len(turns) > len(given) else ""
        for name in traces.check_prompt(turns, tools, text, system=added):
            LOG.warning("the chat template writes nothing of %r of the turns: the answer does not depend on it", name)
        return self.tokenizer.encode_rendered(text)

    def plain_ids(self, text: str) -> list[int]:
        """A text as it stands, without the chat template; the tokenizer's own BOS in front where it has one."""
        _bounded(len(text))
        return self.tokenizer.encode_plain(text)

    def generate(
        self, prompt, *, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
        min_p: float = 0.0, repetition_penalty: float = 1.0, stop=(), seed: int = 0, cache: bool = True, tools=None,
    ):  # fmt: skip
        """Answers one prompt (-> str) or a list of them (-> list of str).

        Args:
          prompt: a text; a conversation, `[{"role": "user", "content": ...}, ...]`; or a list of texts and
            conversations.
          temperature: 0 takes the likeliest token; else tokens are drawn, by `seed` and the prompt alone.
          top_p, top_k, min_p: draw among the likeliest tokens only (`decode/sampling.py`).
          repetition_penalty: above 1, tokens that stand in prompt or answer become less likely.
          stop: a text or several; an answer ends before the first of them.
          cache: False recomputes everything for each token: the same answer, slowly.
          tools: descriptions of tools, for the template.

        Raises:
          InputError: an empty or too long prompt, a bad number.
        """
        single = isinstance(prompt, str) or _is_conversation(prompt)
        prompts = [prompt] if single else prompt
        if not isinstance(prompts, (list, tuple)):
            raise InputError("prompt", got=repr(prompt)[:80], expected="text, turns, or a list of them")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise InputError("stop", got=repr(stop)[:80], expected="texts that are not empty")
        ids = [self.prompt_ids(text, tools=tools) for text in prompts]
        self._say_where_answers_end(ids, max_new_tokens, stop)
        answers = decoding.generate(
            self.model, self.params, self.adapters, self.router_state,
            ids, max_new_tokens=max_new_tokens,
            eos_id=self.tokenizer.end_ids, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
            repetition_penalty=repetition_penalty, stop=functools.partial(self.stop_at, stop) if stop else None,
            seed=seed, cache=cache,
        )  # fmt: skip
        texts = [before(self.text(ids), stop) for ids in answers]
        return texts[0] if single else texts

    def _say_where_answers_end(self, prompts, max_new_tokens, stop) -> None:
        """A line to the log where an answer may end otherwise than its caller would expect."""
        longest, context = max(map(len, prompts), default=0), self.model.config.context
        if isinstance(max_new_tokens, int) and longest < context < longest + max_new_tokens:
            LOG.warning(
                "the model's context of %d tokens has room for %d new ones after the longest prompt, not for %d",
                context, context - longest, max_new_tokens,
            )  # fmt: skip
        if not self.tokenizer.end_ids and not stop:
            LOG.warning("the tokenizer names no end token: every answer has all of its %s tokens", max_new_tokens)

    def stop_at(self, stop, ids) -> int | None:
        """How many of `ids` it takes to write one of the texts `stop`; special tokens count as text."""
        written = lambda n: any(text in self.tokenizer.decode(ids[:n]) for text in stop)  # noqa: E731
        return next(n for n in range(1, len(ids) + 1) if written(n)) if written(len(ids)) else None

    def text(self, ids) -> str:
        """An answer's ids as text, without the end token and other special ones."""
        ids = list(ids)
        ended = ids[-1:] and ids[-1] in self.tokenizer.end_ids  # it need not be marked as special
        return self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)

    def routing(self, text) -> dict[str, dict[str, np.ndarray]]:
        """The gates of every routed rule for a text, read as it stands (no chat template).

        Args:
          text: or a list of token ids.

        Returns:
          `{rule: {site | attn | ffn | model: [layers, tokens, E_max]}}` float32: a row for each layer of the model, 0
          where the rule does not act or beyond a layer's experts; `model` (one decision for all layers) is
          `[1, tokens, E]`.
        """
        ids = self._given(text)
        batch = measure.text_batch(self, ids)
        gates = _gates(self.params, self.adapters, self.router_state, batch, model=self.model)
        return {
            rule: {scope: np.asarray(g)[:, 0, : len(ids)] for scope, g in scopes.items()}
            for rule, scopes in gates.items()
        }

    def consistency(self, texts, segment: int = 16) -> dict[str, dict[str, list]]:
        """How far consecutive tokens use the same experts: SRP of every routed rule and layer (`consistency.py`).

        Args:
          texts: each read as it stands, or a list of token ids; those shorter than `segment` count for nothing.

        Returns:
          `{rule: {site | attn | ffn | model: [SRP, ...]}}`, one a layer, None where the rule does not act.

        Raises:
          InputError: no text as long as a segment, or longer than the model's context.
        """
        return consistency.of_run(self, texts, segment)

    def _given(self, text):
        """The ids of a text, or ids as they were given."""
        if isinstance(text, (list, np.ndarray)):
            return measure.token_ids(text, self.model.config.vocab)
        return self._ids_of(text)

    def _ids_of(self, text) -> list[int]:
        """A text, read as it stands."""
        if not isinstance(text, str):
            raise InputError("text", got=repr(text)[:80], expected="text")
        if len(text) > render.LONGEST:
            raise InputError("text", got=f"{len(text):,} characters", expected=f"at most {render.LONGEST:,}")
        return self.tokenizer.encode(text)

    def logits(self, text) -> np.ndarray:
        """`[tokens, V]` float32: of the token after each token of a text, read as it stands (`tokens(text)`).

        Args:
          text: or a list of token ids.

        Raises:
          InputError: no text, or one that does not fit the model's context; a base without a head.
        """
        return measure.logits(self, self._given(text))

    def nll(self, prompt, answer):
        """Nats a token of an answer to a prompt in the run's own template, end token included.

        Args:
          prompt, answer: a text each (-> float), or lists of N texts (-> `[N]` float64).

        Raises:
          InputError: an empty or too long text, lists of different lengths, a base without a head.
        """
        single = isinstance(prompt, str)
        for where, value in (("prompt", prompt), ("answer", answer)):
            if isinstance(value, str) != single or not isinstance(value, (str, list, tuple, np.ndarray)):
                expected = "a text, or a list of texts"
                expected = (
                    expected if where == "prompt" else "a text, as prompt is" if single else "a list, as prompt is"
                )
                raise InputError(where, got=f"{value!r:.60} (a {type(value).__name__})", expected=expected)
        found = measure.nll(self, [prompt] if single else list(prompt), [answer] if single else list(answer))
        return float(found[0]) if single else found

    def metrics(self) -> list[dict]:
        """The rows of `metrics.jsonl`, one an optimizer step; [] without any. NaN and infinities are floats."""
        return [] if self.workdir is None else read_rows(pathlib.Path(self.workdir) / "metrics.jsonl")

    def view(self, item: str = "adapters") -> View:
        """The leaves by (rule, absolute layer, site, leaf), whatever the segments; `write_run` takes it back.

        Args:
          item: "adapters" or "router_state".
        """
        if item not in ("adapters", "router_state"):
            raise InputError("item", got=repr(item), expected="adapters or router_state")
        return View(getattr(self, item), where=item)


def _bounded(size: int) -> None:
    if size > render.LONGEST:
        raise InputError("prompt", got=f"{size:,} characters", expected=f"at most {render.LONGEST:,}")


def _is_conversation(prompt) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(turn, dict) for turn in prompt)


def _turns(prompt) -> list[dict]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError("prompt", got=repr(prompt), expected="some text", fix="Write a question.")
        return [{"role": "user", "content": prompt}]
    if not _is_conversation(prompt):
        raise InputError("prompt", got=repr(prompt)[:80], expected='text, or a list of {"role": ..., "content": ...}')
    try:
        # as rows are read, but an answer that ended with its first token may be sent back
        turns, _ = read_messages(list(prompt), "prompt", empty_answers=True)
    except BadRow as error:
        raise InputError("prompt", got=error.got, expected=error.expected) from None
    if turns[-1]["role"] == "assistant":
        got = f"{len(turns)} turns, the assistant's last"
        raise InputError("prompt", got=got, expected="a turn to answer last", fix="Leave the last turn out.")
    return turns


def _tools(tools) -> list[dict] | None:
    try:
        found = read_tools(list(tools) if isinstance(tools, tuple) else tools)  # as rows are read
    except BadRow as error:
        raise InputError("tools", got=error.got, expected=error.expected) from None
    return found and list(found)


def before(text: str, stop) -> str:
    """A text up to where the first of the texts `stop` begins."""
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]


@functools.partial(jax.jit, static_argnames="model")
def _gates(params, adapters, router_state, batch, *, model):
    gates = model.hidden(params, adapters, router_state, batch, collect=True)[3]
    return by_layer(model, gates)


def _put(tree, mesh):
    return sharding.put(tree, sharding.replicated(mesh))


def _put_base(base, mesh) -> dict:
    """The base's arrays, split over the mesh as in training."""
    shardings = sharding.param_shardings(base.config, base.params, mesh)
    sharding.fits(base.params, shardings, mesh)
    return sharding.put(base.params, shardings)


def _arrays_of(run) -> tuple:
    """What the base's arrays of a run, or of an opened one, follow from."""
    base = run.config.base
    return run.facts.get("base_digest"), run.model.config, str(base.dtype), base.get("quant", "none")


def load_run(
    workdir, step="best", *, config=None, mesh=None, without: str = "", beside: Run | None = None, warn=LOG.warning
) -> Run:
    """Opens the run in `workdir`, a folder or `DIR@step`.

    What the run is comes from the manifest of the step, which is under a checksum: a `config.json` that says otherwise
    is overruled, with a line to `warn`; an `identity.json` that does, and another base, tokenizer or chat template than
    the run was trained with, are refused.

    Args:
      step: `"best"` (the newest valid one where none was marked), `"latest"` (the newest valid one), or its number.
      config: in place of the run's own `config.json`, say with other fields of `eval`.
      mesh: sizes of axes over this process's devices, such as `dict(fsdp=8)`, which split the base; None: one device.
      without: experts to leave out, in place of `eval.without` (see `runs/without.py`): `"legal,code"`.
      beside: an open run whose base's arrays this one shares, where it has the same base in the same dtype and quant.
      warn: called with a line of text; a log record by default.

    Raises:
      InputError: no run there, no such step, damage, another base model, a config that the checkpoint does not fit, no
        expert of that name, a mesh that does not divide the base, or a base that has no room.

    >>> import molora_jax as mj
    >>> run = mj.load_run("runs/a")
    >>> run.nll("Double 4", "8") > 0, isinstance(run.generate("Double 4", max_new_tokens=2), str)
    (True, True)
    """
    mesh = sharding.local_mesh(mesh)
    found = open_run(workdir, step, config=config, warn=warn)
    config = found.config
    if without:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.eval.without = without
    config, model, items = leave_out(config, found.model, found.base.params, found.items, own=found.own)
    shared = beside is not None and beside.mesh == mesh and _arrays_of(beside) == _arrays_of(found)
    base = beside.base_params if shared else _put_base(found.base, mesh)
    items = {name: _put(item, mesh) for name, item in items.items()}
    modules = items.get("modules", {})
    return Run(
        config, model, in_place(base, modules), items["adapters"], items["router_state"],
        found.base.tokenizer, found.step, found.folder, base, modules, found.modules, found.labels, items.get("start"),
        found.facts, found.digest, mesh,
    )  # fmt: skip


def write_run(workdir, run: Run, *, view: View | None = None, config=None) -> pathlib.Path:
    """Writes a loaded run, perhaps with other leaves, as a run of its own: load_run, evaluate, generate, a warm start
    (`train.init_from`) and surgery open it. Its manifest names `run` as its parent, by digest.

    Args:
      workdir: a folder that is not there yet, or empty.
      view: of `run.view()`, changed; None: the leaves as they are.
      config: that the leaves fit, in place of the run's own.

    Returns:
      The folder; it is at step 0, without an optimizer's state.

    Raises:
      InputError: a folder that holds something, leaves that the config does not fit, NaN or Inf, a full disk.

    >>> import molora_jax as mj
    >>> run = mj.load_run("runs/a")
    >>> view = run.view()
    >>> view["all", 0, "q", "B"] = 2 * view["all", 0, "q", "B"]
    >>> folder = mj.write_run("runs/b", run, view=view)
    >>> mj.load_run("runs/b").step
    0
    """
    if not isinstance(run, Run):
        fix = f"Open it first: write_run(DIR, load_run({str(run)!r}))." if isinstance(run, (str, os.PathLike)) else ""
        fix = "Write the new folder first: write_run(DIR, run)." if isinstance(workdir, Run) else fix
        raise InputError("run", got=f"{run!r:.80} (a {type(run).__name__})", expected="a run of load_run", fix=fix)
    if view is not None and (not isinstance(view, View) or view.where == "router_state"):
        got = f"a view of {view.where}" if isinstance(view, View) else f"a {type(view).__name__}"
        raise InputError("view", got=got, expected="what run.view() gave, changed", fix="Take view = run.view().")
    if run.workdir is None:
        raise InputError("run", got="a base alone", expected="a run of load_run")
    adapters = run.adapters if view is None else view.tree()
    items = {"adapters": adapters, "router_state": run.router_state}
    items |= {name: own for name, own in (("modules", run.modules), ("start", run.start)) if own}
    return written.write(
        workdir, config=run.config if config is None else config, items=items, facts=run.facts,
        backbone=run.model.config, parents=[parents.entry(run.workdir, run.step, run.digest)],
    )  # fmt: skip


def load_base_run(config, *, mesh=None) -> Run:
    """The frozen base of a config alone, in the same form: no rules, no adapters. `mesh`: as in `load_run`.

    >>> import molora_jax as mj
    >>> base = mj.load_base_run(mj.load_config("lora", {"base.source": "random:tiny"}))
    >>> base.nll("Double 4", "8") > 0
    True
    """
    mesh = sharding.local_mesh(mesh)
    base = configured_base(config)
    model = compile_base(config, base.config)
    params = _put_base(base, mesh)
    return Run(config, model, params, {}, {}, base.tokenizer, base_params=params, mesh=mesh)
