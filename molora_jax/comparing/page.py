"""One page about several runs, whole in one file: text, tables and pictures, no script, nothing from outside.

Every text of a run (names of folders and tasks, values of a config, prompts, answers) is escaped; a policy in the
page's head forbids scripts and any request.
"""

import base64
import contextlib
import datetime
import html
import io
import json
import pathlib

import numpy as np

from molora_jax.comparing import pairs
from molora_jax.comparing.facts import Facts
from molora_jax.evaluation import plots
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, plain, say, shades, smoothed
from molora_jax.runs.identity import flat

COLOURS = ("#1f6fb2", "#d1495b", "#2a9d5c", "#e09f3e", "#7b4fa3", "#5c6670")
MOST_POINTS = 1500  # of a line
STYLE = """
:root { color-scheme: light; --line: #d9dee3; --soft: #f5f7f9; --ink: #1c2329; --quiet: #5c6670 }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink);
  background: #fff; max-width: 1100px; margin: 0 auto; padding: 1.2rem 1rem 4rem }
h1 { font-size: 1.6rem; margin: .2rem 0 }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem } p { margin: .4rem 0 } .quiet { color: var(--quiet); font-size: .9rem }
.wide { overflow-x: auto; margin: .5rem 0 } table { border-collapse: collapse; font-size: .88rem }
th, td { padding: .3rem .65rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { background: var(--soft); font-weight: 600 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.v, td.name, th.name { overflow-wrap: anywhere; min-width: 7.5rem; max-width: 22rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .85rem }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em }
img { max-width: 100%; height: auto; display: block } .name { overflow-wrap: anywhere }
.better { color: #17693a; font-weight: 600 } .worse { color: #a3293c; font-weight: 600 }
.note { border-left: 3px solid #e09f3e; background: #fff8ec; padding: .35rem .7rem; margin: .4rem 0;
  overflow-wrap: anywhere }
code { font-size: .9em; background: var(--soft); padding: .05em .3em; overflow-wrap: anywhere }
""".strip()


def write(runs: list[Facts], out) -> pathlib.Path:
    """The page at `out`."""
    out = pathlib.Path(out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page(runs))
    return out


def page(runs: list[Facts]) -> str:
    colours = colours_of(len(runs))
    title = f"{runs[0].name}: a run of molora_jax" if len(runs) == 1 else f"{len(runs)} runs of molora_jax compared"
    parts = [
        ("", _overview(runs, colours)),
        ("Losses", _losses(runs, colours)),
        ("Held-out tasks", _tasks(runs, colours)),
        ("Routing", _routing(runs, colours)),
        ("What differs between the configs", _differences(runs)),
        ("Size, speed, versions", _costs(runs)),
        ("Answers side by side", _answers(runs)),
    ]
    body = "\n".join((f"<h2>{e(name)}</h2>\n" if name else "") + text for name, text in parts if text)
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{e(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<h1 class="name">{e(title)}</h1>
<p class="quiet">Written {e(made)} by launch.report. NLL: nats a token of the answer, lower is better.
Intervals: 95 %.</p>
{body}
</body>
</html>
"""


def e(text) -> str:
    return html.escape(str(text), quote=True)


def colours_of(count: int) -> list[str]:
    from matplotlib.colors import to_hex

    return list(COLOURS[:count]) if count <= len(COLOURS) else [to_hex(c) for c in shades(count)]


# ---- parts of the page ---------------------------------------------------------------------------------------------


def _overview(runs, colours) -> str:
    rows = []
    for run, colour in zip(runs, colours, strict=True):
        last = smoothed([v for _, v in run.column("lm_loss", "loss")])
        best = run.best
        rows.append([
            _named(run.name, colour), e(run.state), _n(f"{last[-1]:.3f}" if len(last) else "-"),
            _n("-" if best is None else f"{best[0]:.4f} (step {best[1]})"),
            e(f"step {run.report['step']}, {sum(t['items'] for t in run.report['tasks'].values()):,} items"
              if run.report else "no"),
        ])  # fmt: skip
    head = ["run", "trained", _n("last loss (smoothed)"), _n("lowest held-out NLL"), "evaluated"]
    notes = [f'<p class="note">{e(run.name)}: {e(note)}</p>' for run in runs for note in run.notes]
    return _table(head, rows) + "".join(notes)


def _losses(runs, colours) -> str:
    if not any(run.rows for run in runs):
        return _say("No run has trained a step yet: metrics.jsonl has no row.")
    fig, ax = figure(figsize=(9, 4.6), layout="constrained")
    for run, colour in zip(runs, colours, strict=True):
        points = _thinned(run.column("lm_loss", "loss"))
        if points:
            steps, values, course = points
            if len(steps) >= 10:
                ax.plot(steps, values, color=colour, lw=0.8, alpha=0.28)
            ax.plot(steps, course, color=colour, lw=1.7, label=plain(run.name), marker="." if len(steps) < 10 else None)
        seen = run.column("valid_nll")
        if seen:
            ax.plot(*zip(*seen, strict=True), "o--", color=colour, ms=5, lw=1, mfc="white")
    ax.set(xlabel="optimizer step", ylabel="nats a token")
    if ax.get_lines():
        ax.xaxis.get_major_locator().set_params(integer=True)
        if len(runs) <= 12:
            ax.legend(frameon=False, fontsize="small")
    else:
        say(ax, "no finite loss")
    ax.grid(alpha=0.3)
    told = "Pale: every step. Full: the mean around each step. Rings: held-out NLL (split valid) during the training."
    sizes = {run.config.get("train", {}).get("batch_size") for run in runs}
    if len(sizes) > 1:
        told += " The runs differ in train.batch_size: a step is not the same work in each."
    return _picture(fig, "losses of the runs by step") + f'<p class="quiet">{e(told)}</p>'


def _tasks(runs, colours) -> str:
    done = [(run, colour) for run, colour in zip(runs, colours, strict=True) if run.report]
    out = [f'<p class="note">{e(run.name)}: {e(run.missing)}</p>' for run in runs if not run.report]
    if not done:
        return "".join(out)
    names = list(dict.fromkeys(task for run, _ in done for task in run.report["tasks"]))
    out.append(_task_picture(done, names))
    for key, title, form in (("nll", "NLL", "{:.3f}"), ("hits", "Right answers", "{:.1%}")):
        rows = []
        for task in names:
            cells, any_ = [e(task)], False
            before = next((b for run, _ in done if (b := _value(run, task, key, before=True))), None)
            cells.append(_n("-" if before is None else form.format(before[0])))
            for run, _ in done:
                value = _value(run, task, key)
                any_ |= value is not None
                cells.append(_n(_interval(value, form)))
            if any_:
                rows.append(cells)
        if rows:
            means = [e("mean of the tasks"), _n("")]
            for run, _ in done:
                values = [v[0] for task in names if (v := _value(run, task, key))]
                means.append(_n(form.format(np.mean(values)) if values else "-"))
            head = ["task", _n("before training"), *[_n(_named(run.name, colour), raw=True) for run, colour in done]]
            out.append(f"<h3>{title}</h3>" + _table(head, [*rows, means]))
    held = dict.fromkeys(str(run.report.get("held_out", "")) for run, _ in done)
    out.append(f'<p class="quiet">Split test: {e("; ".join(held))}.</p>')
    return "".join(out) + _paired(done, names)


def _paired(done, names) -> str:
    """Differences to the first run on the items that both have seen."""
    if len(done) < 2:
        return ""
    (first, _), *others = done
    out = [f"<h3>Difference to {e(first.name)}, item by item</h3>"]
    for run, colour in others:
        a, b = _rows(first), _rows(run)
        rows = []
        for task in names:
            i, _ = pairs.common(a[task], b[task]) if task in a and task in b else ([], [])
            if i:
                change, right = pairs.nll_change(a[task], b[task]), pairs.right_change(a[task], b[task])
                rows.append([
                    e(task), _n(len(i)), _changed(change, "{:+.3f}", -1) if change else _n("other tokens"),
                    _changed(right, "{:+.1%}", 1) if right else _n("-"),
                ])  # fmt: skip
        out.append(f"<p>{_named(run.name, colour)}</p>")
        if not rows:
            why = "an evaluation of an older version" if not (a and b) else "no item in common"
            out.append(_say(f"{why}: nothing can be paired. Evaluate both anew with the same data and eval.num_items."))
            continue
        mean = pairs.mean_change(a, b)
        rows.append([e("mean of the tasks"), _n(""), _changed(mean, "{:+.3f}", -1) if mean else _n("-"), _n("")])
        out.append(_table(["task", _n("common items"), _n("NLL"), _n("right answers")], rows))
    out.append(
        '<p class="quiet">In colour: the interval leaves 0 out. Of many tasks one in twenty does so by chance.</p>'
    )
    return "".join(out)


def _routing(runs, colours) -> str:
    routed = [run for run in runs if run.report and run.report["routing"]]
    out = []
    lines = [(run, colour, _balance(run)) for run, colour in zip(runs, colours, strict=True)]
    if any(points for *_, points in lines):
        fig, ax = figure(figsize=(9, 3.2), layout="constrained")
        for run, colour, points in lines:
            if points:
                steps, values = zip(*points, strict=True)
                ax.plot(steps, smoothed(values), color=colour, lw=1.7, label=plain(run.name))
        ax.set(xlabel="optimizer step", ylabel="load of the busiest expert\nover the mean")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        if len(runs) <= 12:
            ax.legend(frameon=False, fontsize="small")
        out.append(_picture(fig, "balance of the experts by step"))
        out.append('<p class="quiet">Mean over layers and routers; 1: all experts have as many tokens.</p>')
    for run in routed:
        fig = plots.draw_routing(run.report["routing"], _counts(run))
        picture = _picture(fig, f"experts by layer and task of {run.name}", kind="png")
        out.append(f"<h3>{e(run.name)}</h3>{picture}")
    others = [run for run in runs if run not in routed]
    without = [run.name for run in others if not _has_router(run)]
    unknown = [run.name for run in others if _has_router(run)]
    if without:
        out.append(_say(f"{', '.join(without)}: no router, every token uses the same adapter."))
    if unknown:
        out.append(_say(f"{', '.join(unknown)}: where tokens go by layer and task is known after an evaluation."))
    return "".join(out)


def _has_router(run) -> bool:
    return any(rule.get("router") for rule in run.config.get("method", {}).get("rules", {}).values())


def _differences(runs) -> str:
    if len(runs) < 2:
        return _say("One run: there is nothing to compare its config with.")
    flats = [flat(run.config) for run in runs]
    rows = []
    for path in sorted({path for one in flats for path in one}):
        values = [json.dumps(one[path]) if path in one else None for one in flats]
        if len(set(values)) > 1:
            shown = ["-" if v is None else json.loads(v) for v in values]
            rows.append([f"<code>{e(path)}</code>", *[_value_cell(v) for v in shown]])
    if not rows:
        return _say("Nothing: the configs are equal in every field.")
    return _table(["field", *[e(run.name) for run in runs]], rows)


def _costs(runs) -> str:
    def row(name, cells):
        return [e(name), *[_n(cell) for cell in cells]]

    sizes = [run.manifest.get("parameters") or {} for run in runs]
    speeds = [run.speed() for run in runs]
    rows = [
        row("base", [run.config.get("base", {}).get("source", "-") for run in runs]),
        row("parameters of the base", [_count(one.get("base")) for one in sizes]),
        row("parameters that train", [_trained(one) for one in sizes]),
        row("parameters beside them that do not", [_count(one.get("frozen")) for one in sizes]),
        row("seconds a step (median)", ["-" if s is None else f"{s[0]:.3f}" for s in speeds]),
        row("tokens/s (median)", ["-" if s is None else f"{s[1]:,.0f}" for s in speeds]),
    ]
    packages = [run.manifest.get("packages") or {} for run in runs]
    rows += [
        row(name, [one.get(name, "-") for one in packages]) for name in sorted({n for one in packages for n in one})
    ]
    out = _table(["", *[_n(e(run.name), raw=True) for run in runs]], rows)
    beside = [f"{run.name} shared its steps with up to {run.beside} other runs" for run in runs if run.beside]
    if beside:
        out += f'<p class="quiet">{e("; ".join(beside))}: seconds are of all of them, tokens/s of the run alone.</p>'
    if not all(sizes):
        out += '<p class="quiet">-: a step of an older version, which did not write its parameters down.</p>'
    return out


def _answers(runs) -> str:
    done = [run for run in runs if run.report and isinstance(run.report.get("answers"), dict)]
    asked: dict = {}
    for run in done:
        for task, answers in run.report["answers"].items():
            for one in answers if isinstance(answers, list) else ():
                if isinstance(one, dict):
                    key = task, str(one.get("prompt")), str(one.get("target"))
                    asked.setdefault(key, {"base": one.get("base")})[run.name] = one.get("tuned")
    if not asked:
        return ""
    rows = []
    for (task, prompt, target), own in asked.items():
        rows.append(
            [e(task), _text(prompt), _text(target), _text(own["base"]), *[_text(own.get(r.name)) for r in done]]
        )
    return _table(["task", "prompt", "target", "base", *[e(run.name) for run in done]], rows)


# ---- values --------------------------------------------------------------------------------------------------------


def _value(run, task, key, *, before=False):
    own = run.report["tasks"].get(task)
    if own is None:
        return None
    if key == "nll":
        return (own.get("nll_base") or own.get("nll_start")) if before else own["nll"]
    names = ("exact_base", "accuracy_start") if before else ("exact", "accuracy")
    return next((own[name] for name in names if own.get(name) is not None), None)


def _rows(run) -> dict:
    """The items of an evaluation by task; {} of an older one, or where they are not what they should be."""
    rows = run.report.get("rows")
    with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError):
        for own in rows.values():
            size = {len(own[name]) for name in ("row", "nll", "tokens", "right")}
            np.array(own["nll"], float), np.array(own["tokens"], float)
            assert len(size) == 1, "columns of one length"
        return rows
    return {}


def _balance(run) -> list[tuple[int, float]]:
    out = []
    for row in run.rows:
        values = [v for name, v in row.items() if name.startswith("site/") and name.endswith("/load_max_over_mean")]
        numbers = [x for v in values for x in (v if isinstance(v, list) else [v]) if isinstance(x, (int, float))]
        if numbers and np.all(np.isfinite(numbers)):
            out.append((row["step"], float(np.mean(numbers))))
    return out


def _counts(run) -> dict:
    out = {}
    for rule, scopes in run.report["routing"].items():
        shapes = [np.shape(next(iter(by_task.values()))) for by_task in scopes.values()]
        out[rule] = run.experts(rule, max(shape[0] for shape in shapes), max(shape[1] for shape in shapes))
    return out


def _thinned(points):
    """`(steps, values, their smoothed course)` of at most `MOST_POINTS`."""
    if not points:
        return None
    steps, values = (np.array(column) for column in zip(*points, strict=True))
    every = -(-len(steps) // MOST_POINTS)
    return steps[::every], values[::every], smoothed(values)[::every]


def _task_picture(done, names) -> str:
    fig, ax = figure(figsize=(9, 1.4 + 0.24 * len(names) * (len(done) + 0.8)), layout="constrained")
    spread = 0.7 / len(done)
    for number, (run, colour) in enumerate(done):
        found = [(at, run.report["tasks"][task]["nll"]) for at, task in enumerate(names) if task in run.report["tasks"]]
        at = np.array([at for at, _ in found]) + (number - (len(done) - 1) / 2) * spread
        values = np.array([value for _, value in found])
        error = np.abs(values[:, 1:] - values[:, :1]).T
        ax.errorbar(values[:, 0], at, xerr=error, fmt="o", color=colour, ms=5, capsize=2, lw=1.4, label=plain(run.name))
    start = [next((b for run, _ in done if (b := _value(run, task, "nll", before=True))), None) for task in names]
    before = [(at, value[0]) for at, value in enumerate(start) if value]
    if before:
        ax.plot(
            [x for _, x in before],
            [at for at, _ in before],
            "|",
            color="#9aa5b1",
            ms=14,
            mew=2,
            label="before training",
        )
    ax.set_yticks(range(len(names)), [plain(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set(xlabel="NLL (nats a token; lower is better), 95 % intervals over items")
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=min(3, len(done) + 1), frameon=False,
               fontsize="small")  # fmt: skip
    return _picture(fig, "held-out NLL of the runs by task")


# ---- HTML ----------------------------------------------------------------------------------------------------------


class _Cell(str):
    """HTML of a whole cell."""


def _n(text, *, raw=False) -> _Cell:
    """A cell of a number."""
    return _Cell(f'<td class="n">{text if raw else e(text)}</td>')


def _value_cell(value) -> _Cell:
    return _Cell(f'<td class="v">{e(value)}</td>')


def _text(value) -> _Cell:
    return _Cell(f'<td class="v"><pre>{e("-" if value is None else value)}</pre></td>')


def _table(head, rows) -> str:
    """`head` and cells are HTML already: `_Cell`s, or the inside of one."""
    cell = lambda c: c if isinstance(c, _Cell) else f'<td class="name">{c}</td>'  # noqa: E731
    top = "".join(cell(c).replace("<td", "<th").replace("</td>", "</th>") for c in head)
    body = "\n".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'


def _named(name, colour) -> str:
    return f'<span class="dot" style="background:{colour}"></span>{e(name)}'


def _say(text) -> str:
    return f'<p class="quiet">{e(text)}</p>\n'


def _interval(value, form) -> str:
    return "-" if value is None else f"{form.format(value[0])} ({form.format(value[1])} to {form.format(value[2])})"


def _changed(value, form, sign) -> _Cell:
    """A difference; `sign` is that of an improvement."""
    sure = value[1] > 0 or value[2] < 0
    kind = ("better" if value[0] * sign > 0 else "worse") if sure else ""
    return _n(f'<span class="{kind}">{e(_interval(value, form))}</span>', raw=True)


def _count(value) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _trained(one: dict) -> str:
    trained, base = one.get("trained"), one.get("base")
    if not isinstance(trained, int):
        return "-"
    return (
        f"{trained:,} ({trained / (base + trained):.2%})"
        if isinstance(base, int) and base + trained
        else f"{trained:,}"
    )


def _picture(fig, what, *, kind="svg") -> str:
    """Lines as SVG; PNG for what has many cells."""
    buffer, more = io.BytesIO(), dict(metadata={"Date": None}) if kind == "svg" else dict(dpi=130)
    fig.savefig(buffer, format=kind, bbox_inches="tight", **more)
    kind, data = "svg+xml" if kind == "svg" else kind, base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{e(what)}" src="data:image/{kind};base64,{data}">\n'
