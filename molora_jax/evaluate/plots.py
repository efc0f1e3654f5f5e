"""The pictures of a report: loss, tasks, routing. Matplotlib without a display."""

import json
import pathlib


def figure(*args, **kwargs):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*args, **kwargs)


def plot_loss(workdir) -> pathlib.Path:
    """`report/loss.png` from `metrics.jsonl`: loss, the language-model part, held-out NLL where it was measured."""
    workdir = pathlib.Path(workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    fig, ax = figure(figsize=(7, 4), layout="constrained")
    for name, label in (("loss", "training loss"), ("lm_loss", "answer tokens only")):
        ax.plot([r["step"] for r in rows], [float(r[name]) for r in rows], label=label)
    seen = [(r["step"], r["valid_nll"]) for r in rows if "valid_nll" in r]
    if seen:
        ax.plot(*zip(*seen, strict=True), "o-", label="held-out (valid)")
    ax.set(xlabel="step", ylabel="nats a token", title=workdir.resolve().name)
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    path = workdir / "report" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, dpi=120)
    import matplotlib.pyplot as plt

    plt.close(fig)
    return path
