"""Routed experts in a MiniLM that is not molora_jax's: is a word positive or negative?

    python -m experiments.library.sentiment [--steps=100] [--out=experiments/library]

The words are VADER's lexicon (task `sentiment` of molora_jax); words of one stem are on one side of the split. The
model of `minilm.py` is frozen; four LoRA experts in every projection of its feed-forward blocks, their routers and a
linear head train. Padding is neither routed nor counted.
"""

import argparse
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import molora_jax as mj
from experiments.library import minilm
from molora_jax import pictures
from molora_jax.data.sources import sentiment

RULES = dict(
    ffn=dict(sites="layers/up,layers/down", experts=4, adapter=mj.Lora(rank=4, alpha=8.0), router=mj.SoftmaxTopK(k=2))
)
LENGTH = 8  # tokens of a word; longer ones are cut


def words():
    """`(texts, labels [N], held [N])`: one in eight stems is held out."""
    items = list(sentiment.examples(sentiment.files()))
    texts = [item.prompt.split('"')[1] for item in items]
    labels = np.array([sentiment.LABELS.index(item.target) for item in items], np.int32)
    return texts, labels, np.array([zlib.crc32(item.group.encode()) % 8 == 0 for item in items])


def fit(routed, params, tokens, mask, labels, *, steps, seed=0, size=64, balance=0.01, rate=2e-3):
    """The reader's own loop. Returns the variables, the head and the losses."""
    variables = mj.init_adapters(routed, jax.random.key(seed), params, tokens[:1], mask[:1])
    width = jax.eval_shape(routed.apply, variables, tokens[:1], mask[:1]).shape[-1]
    trained = {"adapters": variables.pop("adapters"), "head": jnp.zeros((width, 2))}
    optimizer = optax.adam(rate)

    @jax.jit
    def step(trained, state, params, tokens, mask, labels, key):
        def loss(trained):
            both = {**variables, "params": params, "adapters": trained["adapters"]}
            h, sown = routed.apply(both, tokens, mask, rngs={"dropout": key}, mutable=["routing"])
            own = optax.softmax_cross_entropy_with_integer_labels(h @ trained["head"], labels).mean()
            return own + balance * mj.balance(sown), own

        grads, own = jax.grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trained, updates), state, own

    state, losses, rng = optimizer.init(trained), [], np.random.default_rng(seed)
    for i in range(steps):
        rows = rng.integers(0, len(tokens), size)
        batch = tokens[rows], mask[rows], labels[rows]
        trained, state, own = step(trained, state, params, *batch, jax.random.key(i))
        losses.append(own)
    return {**variables, "adapters": trained["adapters"]}, trained["head"], np.array(losses)


def measure(routed, variables, head, tokens, mask, labels):
    """Accuracy, and for every layer how often the tokens of a label use each expert `[L, 2, E]`."""
    h, sown = jax.jit(lambda v, t, m: routed.apply(v, t, m, mutable=["routing"]))(variables, tokens, mask)
    selected = np.asarray(sown["routing"]["layers"]["up"]["ffn"]["experts"][0].decision.selected)
    use = [selected[:, labels == label].sum((1, 2)) / mask[labels == label].sum() for label in (0, 1)]
    return float(np.mean(np.argmax(h @ head, -1) == labels)), np.stack(use, axis=1)


def draw(found, path):
    fig, axes = pictures.figure(1, 2, figsize=(9, 3), layout="constrained")
    axes[0].plot(found["losses"], color=pictures.TUNED, lw=1)
    axes[0].set(title="loss of a batch", xlabel="step", ylim=(0, None))
    use = np.array(found["use"])
    gap = (use[:, 1] - use[:, 0]).T
    image = axes[1].imshow(gap, cmap=pictures.signed(), vmin=-1, vmax=1, aspect="auto")
    axes[1].set(title="positive words use the expert more (red) or less", xlabel="layer", ylabel="expert of up")
    axes[1].set_yticks(range(len(gap)))
    fig.colorbar(image, ax=axes[1])
    return pictures.save(fig, path)


def run(steps: int, source: str = "pkg:all-minilm-l6-v2", size: int = 64, most: int = 10**9) -> dict:
    model, params, tokenizer = minilm.weights(source)
    texts, labels, held = words()
    texts, labels, held = texts[:most], labels[:most], held[:most]
    tokens, mask = minilm.tokenize(tokenizer, texts, LENGTH)
    routed = mj.attach(model, RULES, valid=lambda tokens, mask: mask)
    variables, head, losses = fit(routed, params, tokens[~held], mask[~held], labels[~held], steps=steps, size=size)
    accuracy, use = measure(routed, variables, head, tokens[held], mask[held], labels[held])
    majority = float(max(np.mean(labels[held] == 0), np.mean(labels[held] == 1)))
    trained = sum(leaf.size for leaf in jax.tree.leaves(variables["adapters"])) + head.size
    return dict(
        accuracy=accuracy, majority=majority, words=int(held.sum()), trained=trained, use=use.tolist(),
        losses=losses.tolist(),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="experiments/library")
    options = parser.parse_args()
    found = run(options.steps)
    print(f"accuracy {found['accuracy']:.1%} on {found['words']} held-out words (majority {found['majority']:.1%})")
    print(
        f"{found['trained']:,} numbers trained; loss {found['losses'][0]:.3f} -> {np.mean(found['losses'][-10:]):.3f}"
    )
    out = pathlib.Path(options.out)
    draw(found, out / "sentiment.png")
    (out / "sentiment.json").write_text(json.dumps({k: v for k, v in found.items() if k != "losses"}) + "\n")


if __name__ == "__main__":
    main()
