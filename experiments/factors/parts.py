"""The small experiments of the low-rank methods' specifications, a function each.

Every function takes `ask`, which trains a row on the small base and returns its finished run, and yields
`(row, numbers)`.
"""

import pathlib

import numpy as np

from configs import common
from experiments.routed import small

EVERY_SITE = f"{common.ATTENTION},{common.FFN}"
RATE = 4e-3


def lora(rank, **more):
    """Scale 1, so that a rate means the same at every rank."""
    return dict(name="lora", rank=rank, alpha=float(rank)) | more


def weights(folder) -> dict:
    """`{name: kernel}`, float64, of the projections of a model's folder."""
    from safetensors.numpy import load_file

    found = load_file(pathlib.Path(folder) / "model.safetensors")
    return {k: v.astype(np.float64) for k, v in found.items() if "_proj" in k}


def surgery(name, run, out, **options):
    """The folder of what a surgery makes of a run; made once."""
    from molora_jax.surgery.perform import perform

    if not (out / "config.json").is_file():
        made = common.surgery(name)
        made.surgery.inputs = (str(run.workdir),)
        made.surgery.update(options)
        perform(made, str(out))
    return out


def change(run, ask) -> dict:
    """`{name: what training changed of the kernel}`: the run merged into its base, less the base."""
    out = pathlib.Path(run.workdir)
    merged = weights(surgery("merge_into_base", run, out.with_name(f"{out.name}-merged")) / "base")
    return {name: merged[name] - kernel for name, kernel in weights(ask.source.removeprefix("dir:")).items()}


def held_out(run) -> dict:
    return {"NLL": small.scored(run)[0]}


def nola(ask):
    """NOLA with fewer numbers than LoRA of rank 1, and more of them at one rank."""
    yield "LoRA, R = 1", held_out(ask(lora(1), sites="q,v"))
    for k in (16, 32, 64, 256):
        adapter = dict(name="nola", rank=8, alpha=8.0, bases_A=k, bases_B=k)
        yield f"NOLA, R = 8, {k} + {k} coefficients", held_out(ask(adapter, sites="q,v", rate=1e-2))


def randlora(ask):
    """How many directions the change of q has."""
    rows = {
        "LoRA, R = 4": (lora(4), RATE),
        "RandLoRA, R = 8": (dict(name="randlora", rank=8, alpha=160.0, normalise=True), 1e-3),
    }
    for row, (adapter, rate) in rows.items():
        run = ask(adapter, sites="q,down", rate=rate)
        values = [np.linalg.svd(W, compute_uv=False) for name, W in change(run, ask).items() if "q_proj" in name]
        energy = np.mean([np.exp(_entropy(s**2)) for s in values])
        rank = np.mean([(s > 1e-4 * s[0]).sum() for s in values])
        yield row, held_out(run) | {"rank": float(rank), "directions by energy": float(energy)}


def _entropy(x):
    p = x / x.sum()
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum())


def lora_pro(ask):
    """How far from full fine-tuning a short run ends, every row at its rate."""
    steps, rate, pro = max(1, ask.steps // 6), 1e-3, dict(name="lora_pro", form="full", ridge=1e-6)
    full = ask(None, steps=steps, rate=rate, clip=0.0)
    aim = change(full, ask)
    norm = np.sqrt(sum((W**2).sum() for W in aim.values()))
    yield "full fine-tuning", _last(full) | {"distance": 0.0}
    for name, optim, ranks in (("LoRA", {}, (4, 16)), ("LoRA-Pro", pro, (4, 16, 64))):
        for rank in ranks:
            run = ask(lora(rank), steps=steps, rate=rate, optim=optim, clip=0.0)
            away = np.sqrt(sum(((W - aim[k]) ** 2).sum() for k, W in change(run, ask).items()))
            yield f"{name}, R = {rank}", _last(run) | {"distance": float(away / norm)}


def _last(run, steps=10):
    return {"training loss": float(np.mean(small.losses(run.workdir)[-steps:]))}


def allora(ask):
    """The growth of B A's rows under SGD, and what dropout does to B."""
    from molora_jax.evaluation.run import load_run

    steps = max(1, ask.steps // 3)
    each = max(1, steps // 10)
    rows = {
        "LoRA, SGD, rate 1": (lora(8), 1.0),
        "ALLoRA, SGD, eta 2, rate 0.5": (dict(name="allora", rank=8, eta_squared=4.0, form="rows"), 0.5),
    }
    for row, (adapter, rate) in rows.items():
        run = ask(
            adapter, steps=steps, rate=rate, optim=dict(name="sgd"), save_every=each, keep=steps // each, clip=0.0
        )
        grown = {}
        for step in range(each, steps + 1, each):
            pairs = zip(*_factors(load_run(run.workdir, step, config=run.config)), strict=True)
            grown[str(step)] = float(np.mean([np.linalg.norm(B @ A, axis=-1).mean() for A, B in pairs]))
        yield row, {"mean norm of a row of B A": grown} | _last(run)
    for dropout in (0.0, 0.3):
        A, B = _factors(ask(lora(8, dropout=dropout), steps=steps))
        norms = {name: float(np.sqrt(sum((x**2).sum() for x in xs))) for name, xs in (("|A|", A), ("|B|", B))}
        yield f"LoRA, Adam, dropout {dropout}", norms


def _factors(run):
    """All A `[L, 1, R, D_in]` and all B `[L, 1, D_out, R]` of a run."""
    A, B = small.leaves(run, "A"), small.leaves(run, "B")
    return A, [b if b.shape[-1] == a.shape[-2] else np.swapaxes(b, -1, -2) for a, b in zip(A, B, strict=True)]


def dylora(ask):
    """Cut off after b components: a run of one rank, and a run of all ranks."""
    from molora_jax.evaluation.run import load_run

    yield "LoRA trained at R = 1", held_out(ask(lora(1)))
    for row, adapter in (("LoRA, R = 8", lora(8)), ("DyLoRA, R = 8", lora(8, name="dylora", lowest=1, ratio=1.0))):
        run = ask(adapter)
        for b in (1, 2, 4, 6, 8):
            out = pathlib.Path(run.workdir)
            cut = surgery("truncate", run, out.with_name(f"{out.name}-{b}"), rank=b)
            yield f"{row}, cut to {b}", held_out(load_run(str(cut)))


def baselines(ask):
    """What users of peft expect to find, one budget."""
    yield "the base", held_out(ask.base())
    rows = {
        "LoRA, R = 8": (lora(8), RATE, {}),
        "DoRA, R = 8": (lora(8, name="dora"), RATE, {}),
        "LoRA-FA, R = 8": (lora(8, name="lora_fa", precondition=False), RATE, {}),
        "AdaLoRA, R = 12 to 8": (
            lora(12, name="adalora"), RATE,
            dict(name="adalora", target=8, initial_fraction=0.1, final_fraction=0.3, every=1, beta1=0.85, beta2=0.85),
        ),
        "VeRA, R = 64": (dict(name="vera", rank=64, d_initial=0.1, seed=0), 1e-2, {}),
        "(IA)3": (dict(name="ia3"), 1e-2, {}),
    }  # fmt: skip
    for row, (adapter, rate, optim) in rows.items():
        losses = dict(orthogonal=dict(weight=0.5)) if adapter["name"] == "adalora" else {}
        sites = "k,v,down" if adapter["name"] == "ia3" else EVERY_SITE
        yield row, held_out(ask(adapter, rate=rate, optim=optim, losses=losses, sites=sites))


PARTS = {f.__name__: f for f in (nola, randlora, lora_pro, allora, dylora, baselines)}
