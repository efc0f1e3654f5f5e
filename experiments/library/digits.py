"""Routed experts in a vision transformer: it learned upright digits, and is to read turned, mirrored and inverted ones.

    python -m experiments.library.digits [--steps=800] [--out=experiments/library]

The images are scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a quarter of them is held out. Every digit is
shown in four views. The transformer of `vit.py` learns the first view alone and is frozen; then four LoRA experts a
Dense layer of its blocks (and their routers) learn all views.
"""

import argparse
import gzip
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import molora_jax as mj
from experiments.library.vit import ViT
from molora_jax import pictures
from molora_jax.errors import InputError

VIEWS = {
    "upright": lambda x: x,
    "mirrored": lambda x: x[:, :, ::-1],
    "turned left": lambda x: np.rot90(x, axes=(1, 2)),
    "inverted": lambda x: 1.0 - x,
}
RULES = [
    dict(
        sites="layers_*", experts=4, adapter=mj.Lora(rank=4, alpha=8.0),
        router=mj.SoftmaxTopK(k=1, renormalise=False),
    )
]  # fmt: skip


def load():
    """`(images [N, 8, 8] in 0 .. 1, labels [N])`, read from the package's file; its code does not run."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None:
        fix = "Install it with `pip install 'molora_jax[data]'`."
        raise InputError("scikit-learn", got="no such package", expected="it to be installed", fix=fix)
    path = pathlib.Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :64].reshape(-1, 8, 8) / 16, table[:, 64].astype(np.int32)


def views(images, names=tuple(VIEWS)):
    """The images in each view, one view after the other; and the number of the view of each."""
    seen = np.concatenate([VIEWS[name](images) for name in names])
    return np.ascontiguousarray(seen), np.repeat(np.arange(len(names)), len(images))


def batches(images, labels, size, steps, seed):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(images), size)
        yield images[rows], labels[rows]


def pretrain(model, images, labels, *, steps, seed=0):
    """The base: all of the model's parameters, on the data as they are."""
    params = jax.jit(model.init)(jax.random.key(seed), images[:1])["params"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, x, y):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": p}, x), y).mean()  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for x, y in batches(images, labels, 128, steps, seed):
        params, state = step(params, state, x, y)
    return params


def adapt(routed, params, images, labels, *, steps, seed=1, balance=0.01):
    """The reader's own loop: only the adapters move. Returns the variables and the losses."""
    variables = mj.init_adapters(routed, jax.random.key(seed), params, images[:1])
    adapters = variables.pop("adapters")
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(adapters, state, x, y, key):
        def loss(adapters):
            logits, sown = routed.apply(
                {**variables, "adapters": adapters}, x, rngs={"dropout": key}, mutable=["routing"]
            )
            own = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return own + balance * mj.balance(sown), own

        grads, own = jax.grad(loss, has_aux=True)(adapters)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, own

    state, losses = optimizer.init(adapters), []
    for i, (x, y) in enumerate(batches(images, labels, 128, steps, seed)):
        adapters, state, own = step(adapters, state, x, y, jax.random.key(i))
        losses.append(own)
    return {**variables, "adapters": adapters}, np.array(losses)


def measure(model, variables, images, labels, view):
    """Accuracy by view; and of a routed model the share of patches of each view that an expert serves, by layer."""
    logits, sown = jax.jit(lambda v, x: model.apply(v, x, mutable=["routing"]))(variables, images)
    right = np.asarray(jnp.argmax(logits, -1)) == labels
    accuracy = [float(right[view == i].mean()) for i in range(len(VIEWS))]
    shares = {}
    for layer, one in sown.get("routing", {}).items():
        selected = np.asarray(one["up"]["rule0"]["experts"][0].decision.selected)
        shares[layer] = [selected[view == i].mean((0, 1)).tolist() for i in range(len(VIEWS))]
    return accuracy, shares


def draw(found, path):
    fig, axes = pictures.figure(1, 1 + len(found["shares"]), figsize=(11, 3), layout="constrained")
    place = np.arange(len(VIEWS))
    axes[0].bar(place - 0.2, found["before"], 0.4, color=pictures.BASE, label="frozen")
    axes[0].bar(place + 0.2, found["after"], 0.4, color=pictures.TUNED, label="with experts")
    axes[0].set(title="accuracy on held-out digits", ylim=(0, 1))
    axes[0].set_xticks(place, VIEWS, rotation=20)
    axes[0].legend(loc="lower left", fontsize=8)
    for ax, (layer, shares) in zip(axes[1:], found["shares"].items(), strict=True):
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        ax.set(title=f"{layer}/up: share of patches", xlabel="expert")
        ax.set_yticks(place, VIEWS)
        for i, row in enumerate(shares):
            for e, share in enumerate(row):
                ax.text(e, i, f"{share:.2f}", ha="center", va="center", fontsize=8, color="w" if share > 0.5 else "k")
    return pictures.save(fig, path)


def run(steps: int, base_steps: int) -> dict:
    images, labels = load()
    held = np.arange(len(images)) % 4 == 3
    model = ViT()
    params = pretrain(model, images[~held], labels[~held], steps=base_steps)
    routed = mj.attach(model, RULES)
    seen, _ = views(images[~held])
    variables, losses = adapt(routed, params, seen, np.tile(labels[~held], len(VIEWS)), steps=steps)
    test, view = views(images[held])
    truth = np.tile(labels[held], len(VIEWS))
    before, _ = measure(model, {"params": params}, test, truth, view)
    after, shares = measure(routed, variables, test, truth, view)
    trained = sum(leaf.size for leaf in jax.tree.leaves(variables["adapters"]))
    return dict(before=before, after=after, shares=shares, losses=losses.tolist(), trained=trained, held_out=len(truth))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--base_steps", type=int, default=300)
    parser.add_argument("--out", default="experiments/library")
    options = parser.parse_args()
    found = run(options.steps, options.base_steps)
    for name, before, after in zip(VIEWS, found["before"], found["after"], strict=True):
        print(f"{name:12}  frozen {before:6.1%}   with experts {after:6.1%}")
    print(f"{found['trained']:,} numbers trained; {found['held_out']} held-out images")
    out = pathlib.Path(options.out)
    draw(found, out / "digits.png")
    (out / "digits.json").write_text(json.dumps({k: v for k, v in found.items() if k != "losses"}) + "\n")


if __name__ == "__main__":
    main()
