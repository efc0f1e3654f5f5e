"""Our training step beside that of peft: LoRA of both and our mixture, in turn, on the same weights and batch.

python -m launch.bench_peers [--config.X=V] [--batch=4 --seq=128 --dtype=float32 --threads=1 --steps=5] [--json]

Needs the extra `peers` (torch, transformers, peft): pip install -e ".[peers]". `peft` is peft's LoRA on transformers'
Llama with the weights of `base.source`; rank, alpha and dropout of configs/lora.py on the same projections, AdamW,
the gradient's norm clipped, `sdpa` attention, not compiled. `peft kept` is the same with the allocator settings that
our launchers take for themselves (`runtime.keep_memory`). `lora` and `mixlora` are configs/lora.py and
configs/mixlora.py with train.remat=none, since peft keeps its activations too. Overrides count for both of ours.

Each side is a process of its own, pinned to as many processors. Their steps alternate, so a drift of the machine meets
all. Seconds are CPU seconds of the process; a ratio is formed round by round. `loss` is that of the first step, where
the adapters change nothing: it says that weights and batch are the same.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

from launch import flags
from launch.bench import FLAGS, check, in_turn, machine, spread
from molora_jax.text import columns

OURS = ("lora", "mixlora")
PEERS = {"peft": False, "peft kept": True}  # whether it keeps memory
RATIOS = (("lora", "peft"), ("lora", "peft kept"), ("mixlora", "lora"), ("mixlora", "peft"))
OWN = ("--batch", "--seq", "--dtype", "--threads", "--steps", "--json")
PACKAGES = ("torch", "transformers", "peft")


def run(argv):
    own = [flag for flag in FLAGS if flag[0] in OWN]
    if any(a.partition("=")[0] == "--config" for a in argv):
        raise flags.wrong(
            "--config", "a config", "overrides alone (--config.X=V)", "Sides are fixed; see launch.bench."
        )
    said = ["--config.train.remat=none", *argv] if not any("config.train.remat" in a for a in argv) else argv
    configs = {}
    for name in OURS:
        configs[name], args = flags.parse(__doc__, own, [f"--config={name}", *said])
    check(args)
    _installed()
    result = measure(configs, args)
    print(json.dumps(result) if args.json else table(result))


def _installed():
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise flags.wrong("--config", f"no {', '.join(missing)}", "the extra peers", 'pip install -e ".[peers]"')


def measure(configs, args) -> dict:
    """The result, of children that step in turn. A config is that of one of ours."""
    from molora_jax import config as config_lib

    with tempfile.TemporaryDirectory() as folder:
        adapter = next(iter(configs["lora"].method.rules.values())).adapter
        peer = dict(folder=folder, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.get("dropout", 0.05))
        peer |= dict(learning_rate=configs["lora"].optim.learning_rate, clip=configs["lora"].train.clip)
        write_base(configs["lora"].base.source, pathlib.Path(folder))
        plain = vars(args) | {"generate": False, "no_update": False, "devices": 1, "runs": 1, "together": True}
        made = {name: (peer, plain, None, "bench_peers_side", keep) for name, keep in PEERS.items()}
        made |= {name: (config_lib.to_dict(config), plain) for name, config in configs.items()}
        return summary(*in_turn(made, args.steps), args)


def summary(rows, started, ends, args) -> dict:
    """The result, from the seconds of every round and what each side said at its start and its end."""
    sides, versions = {}, {}
    for name, first in started.items():
        sides[name] = {"cpu_seconds": spread([row[name]["cpu"] for row in rows]), **ends[name]}
        sides[name] |= {"trainable": first["trainable"], "loss": first["loss"]}
        versions |= first.get("versions", {})
    ratios = {f"{a} over {b}": spread([row[a]["cpu"] / row[b]["cpu"] for row in rows]) for a, b in RATIOS}
    return {"sides": sides, "ratios": ratios, "machine": machine(args) | versions}


def write_base(source: str, folder: pathlib.Path) -> None:
    """The base as a Hugging Face folder, in a process of its own: this one keeps no weights."""
    code = (
        "import pathlib, sys; from molora_jax.io import huggingface; from molora_jax.io.base import load_base; "
        "huggingface.write_base(pathlib.Path(sys.argv[2]), load_base(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, source, str(folder)], check=True)


def table(result) -> str:
    rows = [("side", "CPU s a step (median, min, max)", "peak MB", "trainable", "loss")]
    for name, side in result["sides"].items():
        seconds = ", ".join(f"{side['cpu_seconds'][k]:.3f}" for k in ("median", "min", "max"))
        rows.append((name, seconds, f"{side['peak_rss_mb']:.0f}", f"{side['trainable']:,}", f"{side['loss']:.4f}"))
    lines = columns(rows)
    for name, ratio in result["ratios"].items():
        lines.append("{}: {median:.3f} ({min:.3f} to {max:.3f})".format(name, **ratio))
    return "\n".join([*lines, ", ".join(f"{k} {v}" for k, v in result["machine"].items())])


if __name__ == "__main__":
    flags.main(run)
