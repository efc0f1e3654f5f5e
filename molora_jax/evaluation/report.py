"""The report of a run: `report/report.json`, pictures beside it, and a table.

    {"step": N, "tasks": {NAME: {"items", "answer_tokens", "nll", "nll_base", "exact", "exact_base", ...}}, ...}

`nll` is per answer token (nats, end token included), `exact` the fraction of generated answers that equal the target,
or that the verifier of a task takes; each is `[value, low, high]` with a 95 % interval (`intervals.py`). More keys:
`nll_change` (tuned minus base, paired), `generated` (items with a generated answer), `too_long` (of these, targets that
do not fit into `eval.max_new_tokens`, which count as wrong); `routing`: `{rule: {scope: {task: [L][E]}}}`, the mean
fraction of the gates.
Tasks whose rows offer choices have more keys (`multiple_choice.py`); a run that learns classes or pairs has others
(`choices.py`).
`rows`: `{task: {row, nll, tokens, right}}`, an entry an item; `row` is a hash of its prompt and target, so that two
runs can be compared on the items that both have seen. `answers`: `{task: [{prompt, target, base, tuned}]}`, a few.
"""

import contextlib
import hashlib
import json
import pathlib

import numpy as np

from molora_jax.errors import InputError
from molora_jax.evaluation import choices, intervals, multiple_choice, plots
from molora_jax.evaluation.progress import Phases
from molora_jax.evaluation.run import Run, load_run
from molora_jax.evaluation.score import chosen, score
from molora_jax.io.files import write_atomically
from molora_jax.runs import saved
from molora_jax.text import table
from molora_jax.training.loss_picture import plot_loss

SHOWN, LONGEST = 3, 600  # answers of a task, characters of a text


def evaluate(run, *, phases=None) -> dict:
    """Scores a run on its test split.

    Args:
      run: of `load_run`, or its folder. phases: told how far it is; lines on standard error by default.

    Returns:
      The content of `report.json`.

    Raises:
      InputError: no data, or no test item in any task.

    >>> import molora_jax as mj
    >>> report = mj.evaluate("runs/a")
    >>> sorted(report["tasks"])
    ['double']
    """
    phases = Phases() if phases is None else phases
    run = run if isinstance(run, Run) else load_run(run, warn=phases.note)
    options = run.config.eval
    phases.start("test items", 1)
    examples = run.data.heldout("test", options.num_items)
    phases.end()
    trained_on = saved.fingerprint(run.workdir, run.step)
    if trained_on not in (None, run.data.fingerprint, run.data.trained_fingerprint):
        phases.note("note: the data are not those that the run was trained on (other tasks, files or package versions)")
    if not examples:
        raise no_items(run.config.data)
    if run.objective.READS == "text":
        base, tuned = (score(run, examples, base=base, phases=phases) for base in (True, False))
        likely = [multiple_choice.score(run, examples, base=base, phases=phases) for base in (True, False)]
        right = [judged(run, examples, scores.answers) for scores in (base, tuned)]
        gates, rows = tuned.gates, tasks(run, examples, base, tuned, likely, right)
        seen, answers = items(run, examples, tuned.nll, tuned.tokens, right[1]), shown(run, examples, base, tuned)
    else:
        start, tuned = (choices.score(run, examples, start=start, phases=phases) for start in (True, False))
        gates, rows = tuned["gates"], choices.tasks(run, examples, start, tuned)
        seen, answers = items(run, examples, tuned["nll"], np.ones(len(examples), int), tuned["right"]), {}
    report = {
        "step": run.step,
        "objective": run.config.get("objective", {}).get("name", "lm"),
        "labels": list(run.labels),
        "base": run.config.base.source,
        "held_out": run.data.report()["held_out"],
        "max_new_tokens": options.max_new_tokens,
        "tasks": rows,
        "without_items": [n for i, n in enumerate(run.data.task_names) if all(e.task_id != i for e in examples)],
        "routing": routing(run, gates, {e.task_id for e in examples}),
        "rows": seen,
        "answers": answers,
    }
    return report


def no_items(data) -> InputError:
    """The error of a run without a held-out item."""
    valid, held_out = data.get("valid", ""), data.get("test_share", 0.05)
    if valid or held_out:
        got = f"no row of {valid}" if valid else f"no test item ({held_out:.1%} of the rows, by a hash of their text,"
        return InputError(
            "data.valid" if valid else "data.tasks", got=f"{got} that fits into data.seq_len{'' if valid else ')'}",
            expected="at least one", fix="Add rows, or raise data.seq_len if the report counts too long ones.",
        )  # fmt: skip
    return InputError(
        "data.test_share", got="0.0: every row was trained on, and none is left to report on",
        expected="held-out items", fix="Name rows that were not trained on: --config.data.valid=jsonl:PATH.",
    )  # fmt: skip


def write(run, report: dict) -> pathlib.Path:
    """`report/report.json` of the run.

    Raises:
      InputError: the disk refuses it; what was there stays.
    """
    path = pathlib.Path(run.workdir) / "report" / "report.json"
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(str(path.parent), got="a file", expected="a folder for the report", fix="Move it away.")
    with _written(path):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(report, indent=1) + "\n")
    return path


@contextlib.contextmanager
def _written(path):
    try:
        yield
    except OSError as error:
        raise InputError(
            str(error.filename or path), got=error.strerror or str(error), expected="a file that can be written",
            fix="Make room; the table above is whole.",
        ) from None  # fmt: skip


def tasks(run, examples, base, tuned, likely, right) -> dict:
    """A row a task; `likely`: of `multiple_choice.score`, `right`: of `judged`, of the base and of the run."""
    task_ids = np.array([e.task_id for e in examples])
    picked = set(chosen(examples, run.config.eval.num_generated))
    out = {}
    for task, name in enumerate(run.data.task_names):
        items = np.flatnonzero(task_ids == task)
        if not len(items):
            continue
        generated = [i for i in items.tolist() if i in picked]
        count = tuned.tokens[items]

        def exact(right, generated=generated):
            return intervals.wilson(sum(right[i] for i in generated), len(generated)) if generated else None

        out[name] = {
            "items": len(items),
            "answer_tokens": int(count.sum()),
            "nll": intervals.ratio(tuned.nll[items], count),
            "nll_base": intervals.ratio(base.nll[items], count),
            "nll_change": intervals.ratio_change(base.nll[items], tuned.nll[items], count),
            "exact": exact(right[1]),
            "exact_base": exact(right[0]),
            "generated": len(generated),
            "too_long": sum(len(examples[i].target_ids) > run.config.eval.max_new_tokens for i in generated),
            **multiple_choice.rows(examples, items.tolist(), *likely),
        }
    return out


def items(run, examples, nll, tokens, right) -> dict:
    """`{task: {row, nll, tokens, right}}`: what is known of every item, in the order of the evaluation."""
    out: dict = {}
    for example, own_nll, count, hit in zip(examples, nll, tokens, right, strict=True):
        text = json.dumps([example.prompt, example.target]).encode()
        columns = out.setdefault(run.data.task_names[example.task_id], dict(row=[], nll=[], tokens=[], right=[]))
        columns["row"].append(hashlib.blake2b(text, digest_size=8).hexdigest())
        columns["nll"].append(round(float(own_nll), 5))
        columns["tokens"].append(int(count))
        columns["right"].append(None if hit is None else float(hit))
    return out


def shown(run, examples, base, tuned) -> dict:
    """The first generated answers of every task, as text."""
    out: dict = {}
    for i, example in enumerate(examples):
        mine = out.setdefault(run.data.task_names[example.task_id], [])
        if tuned.answers[i] is not None and len(mine) < SHOWN:
            texts = example.prompt, example.target, base.answers[i], tuned.answers[i]
            cut = [text if len(text) <= LONGEST else text[:LONGEST] + " ..." for text in texts]
            mine.append(dict(zip(("prompt", "target", "base", "tuned"), cut, strict=True)))
    return out


def judged(run, examples, answers) -> list[float | None]:
    """`_is_right` of each answer; None where none was generated."""
    pairs = zip(examples, answers, strict=True)
    return [None if answer is None else _is_right(run, example, answer) for example, answer in pairs]


def _is_right(run, example, answer: str) -> float:
    """1 or 0 for the target, as given or as the template writes it (a think block in front, white space taken off);
    what the verifier says, where the task has one."""
    verify = run.data.verifier(example.task_id)
    if verify:
        return float(verify(example.prompt, answer.strip()))
    return float(answer.strip() in {example.target.strip(), run.text(example.target_ids).strip()})


def routing(run, gates: dict, present: set) -> dict:
    """Fractions that sum to 1 over a layer's experts; all zeros in a layer where the rule does not act."""
    out: dict = {}
    for rule, scopes in gates.items():
        for scope, total in scopes.items():
            fractions = total / np.maximum(total.sum(-1, keepdims=True), 1e-9)
            named = {n: fractions[t].round(5).tolist() for t, n in enumerate(run.data.task_names) if t in present}
            out.setdefault(rule, {})[scope] = named
    return out


def chooses(report: dict) -> bool:
    """Whether a report is of classes or pairs (`choices.py`)."""
    return any("accuracy" in task for task in report["tasks"].values())


def pictures(run, report: dict) -> list[pathlib.Path]:
    """`tasks.png`, `loss.png` and `routing.png` in the run's `report` folder, `overview.png` of the first and last."""
    folder = pathlib.Path(run.workdir) / "report"
    counts = {rule.name: rule.experts for rule in run.model.rules}
    with _written(folder):
        tasks = plots.plot_tasks(report, folder / "tasks.png")
        routing = plots.plot_routing(report["routing"], counts, folder / "routing.png")
        return [tasks, plot_loss(run.workdir), routing, plots.stack([tasks, routing], folder / "overview.png")]


def text_table(report: dict) -> str:
    """One row a task and the mean over tasks; intervals are of the tuned model."""
    if chooses(report):
        return choices.text_table(report)
    rows = [("task", "items", "NLL base", "NLL tuned", "95 %", "generated", "exact base", "exact tuned", "95 %")]
    for name, t in report["tasks"].items():
        exact = ("-", "-", "-") if t["exact"] is None else (
            f"{t['exact_base'][0]:.0%}", f"{t['exact'][0]:.0%}", f"{t['exact'][1]:.0%} - {t['exact'][2]:.0%}"
        )  # fmt: skip
        nll = t["nll"]
        rows.append((name, str(t["items"]), f"{t['nll_base'][0]:.3f}", f"{nll[0]:.3f}", f"{nll[1]:.3f} - {nll[2]:.3f}",
                     str(t["generated"]), *exact))  # fmt: skip
    every = report["tasks"].values()

    def mean(key, form):
        values = [t[key][0] for t in every if t[key] is not None]
        return form.format(np.mean(values)) if values else "-"

    rows.append(
        ("mean", str(sum(t["items"] for t in every)), mean("nll_base", "{:.3f}"), mean("nll", "{:.3f}"), "",
         str(sum(t["generated"] for t in every)), mean("exact_base", "{:.0%}"), mean("exact", "{:.0%}"), "")
    )  # fmt: skip
    choice = multiple_choice.text_table(report)
    return table(rows, right=(1, 2, 3, 4, 5, 6, 7, 8)) + ("\n" + choice if choice else "")
