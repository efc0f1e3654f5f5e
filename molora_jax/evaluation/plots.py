"""The pictures of a report: tasks, routing. Matplotlib without a display."""

import pathlib

import numpy as np

from molora_jax.pictures import BASE, TUNED, figure, plain, save, say, signed


def stack(pictures, path) -> pathlib.Path:
    """Pictures one above the other, as wide as the widest; a narrower one is in the middle."""
    from matplotlib.image import imread, imsave

    images = [imread(picture)[..., :3] for picture in pictures]
    width = max(image.shape[1] for image in images)
    rows = [
        np.pad(image, ((0, 0), ((width - w) // 2, (width - w + 1) // 2), (0, 0)), constant_values=1.0)
        for image, w in ((image, image.shape[1]) for image in images)
    ]
    path, image = pathlib.Path(path), np.concatenate(rows)
    imsave(path, image)
    imsave(path.with_suffix(".pdf"), image, metadata={"CreationDate": None})
    return path


def plot_tasks(report: dict, path) -> pathlib.Path:
    """Base against tuned, task by task, with 95 % intervals: NLL per answer token, exact match where generated."""
    tasks = report["tasks"]
    if any("accuracy" in t for t in tasks.values()):
        return _plot_choices(tasks, path)
    shown = any(t["exact"] is not None for t in tasks.values())
    height = 1.3 + 0.48 * len(tasks)
    fig, axes = figure(1, 1 + shown, figsize=(6 + 4 * shown, height), layout="constrained", sharey=True, squeeze=False)
    _bars(axes[0, 0], tasks, "nll", 1.0)
    axes[0, 0].set(xlabel="NLL per answer token (nats)\nlower is better")
    if shown:
        _bars(axes[0, 1], tasks, "exact", 100.0)
        n = max(t["generated"] for t in tasks.values())
        axes[0, 1].set(xlabel=f"exact match (%) of at most {n} answers\nhigher is better", xlim=(0, 100))
    return _named(fig, axes, tasks, path)


def _plot_choices(tasks: dict, path) -> pathlib.Path:
    """The untrained start against tuned: NLL an item, accuracy with what the most frequent class gets."""
    fig, axes = figure(1, 2, figsize=(10, 1.3 + 0.48 * len(tasks)), layout="constrained", sharey=True, squeeze=False)
    _bars(axes[0, 0], tasks, "nll", 1.0, before="start")
    axes[0, 0].set(xlabel="NLL an item (nats)\nlower is better")
    _bars(axes[0, 1], tasks, "accuracy", 100.0, before="start")
    for i, t in enumerate(tasks.values()):
        axes[0, 1].plot([100 * t["majority"][0]] * 2, [i - 0.4, i + 0.4], color="#333333", ls=":", lw=1.2)
    axes[0, 1].set(xlabel="accuracy (%), dotted: most frequent class or chance\nhigher is better", xlim=(0, 100))
    return _named(fig, axes, tasks, path)


def _named(fig, axes, tasks, path) -> pathlib.Path:
    names = [f"{plain(name)} ({t['items']})" for name, t in tasks.items()]
    axes[0, 0].set_yticks(range(len(tasks)), names)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return save(fig, path)


def _bars(ax, tasks, key, factor, before="base"):
    told = "base model" if before == "base" else "untrained start"
    for offset, name, color, label in ((-0.2, f"{key}_{before}", BASE, told), (0.2, key, TUNED, "tuned")):
        found = [(i, t[name]) for i, t in enumerate(tasks.values()) if t[name] is not None]
        at, values = np.array([i for i, _ in found]), factor * np.array([v for _, v in found])
        error = np.abs(values[:, 1:] - values[:, :1]).T
        ax.barh(at + offset, values[:, 0], 0.38, xerr=error, color=color, label=label,
                error_kw=dict(lw=1, capsize=2, ecolor="#333333"))  # fmt: skip
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def plot_routing(routing: dict, experts: dict, path) -> pathlib.Path:
    """`draw_routing` as files."""
    return save(draw_routing(routing, experts), path)


def draw_routing(routing: dict, experts: dict):
    """Where the tokens of each task go: a column of panels a task, a row a router scope; layers down, experts across.

    With few scopes a second row shows how each task differs from the mean of the tasks.

    Args:
      routing: `{rule: {scope: {task: [L][E]}}}`, fractions that sum to 1 over a layer's experts.
      experts: `{rule: experts of each layer}`; what is beyond is left grey.
    """
    scopes = [(rule, scope, by_task) for rule, scopes in routing.items() for scope, by_task in scopes.items()]
    if not scopes:
        fig, ax = figure(figsize=(6, 2), layout="constrained")
        say(ax, "This run has no router: every token uses the same adapter.")
        return fig
    tasks = list(scopes[0][2])
    fractions = [_masked(by_task, experts[rule], scope) for rule, scope, by_task in scopes]
    names = [rule if scope in (rule, "site") else f"{rule}: {scope}" for rule, scope, _ in scopes]
    top = max(float(np.nanpercentile(x, 99.5)) for x in fractions)
    rows = [(f"{n}\nlayer", x, dict(cmap="magma_r", vmin=0, vmax=top)) for n, x in zip(names, fractions, strict=True)]
    if len(scopes) <= 2 and len(tasks) > 1:
        for name, x in zip(names, fractions, strict=True):
            change = x - np.mean(x, axis=0)
            most = max(1e-3, float(np.nanpercentile(np.abs(change), 99.5)))
            rows.append((f"{name}, minus mean\nlayer", change, dict(cmap=signed(), vmin=-most, vmax=most)))
    wide = 1.05 if len(tasks) > 2 else 2.1  # the bar and its space are parts of the width
    size = (1.8 + wide * len(tasks), 0.9 + sum(max(1.2, 0.08 * x.shape[1]) + 0.2 for _, x, _ in rows))
    fig, axes = figure(
        len(rows), len(tasks), figsize=size, layout="constrained", squeeze=False, sharey="row", sharex="row"
    )
    for row, (label, x, colours) in enumerate(rows):
        for column, ax in enumerate(axes[row]):
            ax.set_facecolor("#e4e4e4")
            image = ax.imshow(x[column], aspect="auto", **colours)
        _dress(axes[row], label, x)
        if row == 0 or "minus" in label:  # rows of one scale share a bar
            label = "difference in share" if "minus" in label else "mean share of the gates"
            group = axes[: len(scopes)] if row == 0 else axes[row]
            share = 0.12 / (wide * len(tasks))
            bar = fig.colorbar(image, ax=group, fraction=2 * share, pad=share, extend="max" if row == 0 else "both")
            bar.set_label(label, fontsize=8)
            bar.ax.tick_params(labelsize=7)
    for ax, task in zip(axes[0], tasks, strict=True):
        ax.set_title(plain(task), fontsize=9)
    fig.supxlabel("expert", fontsize=9)
    return fig


def _dress(axes, label, x):
    """Ticks at whole layers and at the first and last expert."""
    L, E = x.shape[1:]
    axes[0].set_ylabel(label if L > 1 else label.replace("layer", "all layers"), fontsize=8)
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    for ax in axes:
        ax.set_xticks([0, E - 1] if E > 1 else [0])
        ax.tick_params(labelsize=7, length=2)


def _masked(by_task, counts, scope):
    """`[tasks, L, E]`, NaN where there is no expert."""
    fractions = np.array(list(by_task.values()), float)
    counts = [max(counts)] if scope == "model" else counts
    for layer, count in enumerate(counts):
        fractions[:, layer, count:] = np.nan
    return fractions
