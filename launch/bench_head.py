"""The loss over a large vocabulary, whole against in chunks: memory of the compiled program, and time in pairs.

python -m launch.bench_head [--vocab=152000 --width=896 --rows=4 --positions=512 --rounds=5] [--dtype=float32]

One thread. Value and slope of the hidden states, the head frozen (`objectives.vocabulary`). `temp MB` is what XLA
reserves beside arguments and results; times are CPU seconds, one form after another in every round, ratios pair by
pair. With `--rounds=0` nothing runs.
"""

import argparse
import statistics
import time

MEGABYTES = (64, 128, 256)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(vocab=152_000, width=896, rows=4, positions=512, rounds=5).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    from kernels_pallas import timing

    timing.pin(1)
    import dataclasses

    import jax
    import jax.numpy as jnp

    from molora_jax.backbones.families import TINY
    from molora_jax.backbones.model import Model
    from molora_jax.objectives import lm, vocabulary

    model = Model(dataclasses.replace(TINY, vocab=args.vocab, width=args.width))
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (args.rows, args.positions)
    params = {"embed": (0.02 * jax.random.normal(keys[0], (args.vocab, args.width))).astype(args.dtype)}
    hidden = jax.random.normal(keys[1], (*shape, args.width)).astype(args.dtype)
    targets = jax.random.randint(keys[2], shape, 0, args.vocab)

    def loss(hidden, params):
        return jnp.mean(vocabulary.by_token(lm.nll_of, model, params, hidden, targets)[0])

    whole, forms, temp = 4 * args.rows * args.positions * args.vocab, {}, {}
    for name, size in [("whole", whole), *((f"{mb} MB", mb * 2**20) for mb in MEGABYTES)]:
        vocabulary.CHUNK_BYTES = size
        compiled = jax.jit(jax.value_and_grad(lambda *given: loss(*given))).lower(hidden, params).compile()
        forms[name] = compiled
        temp[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    seconds = {name: [] for name in forms}
    for i in range(args.rounds and args.rounds + 1):
        for name, compiled in forms.items():
            began = time.process_time()
            jax.block_until_ready(compiled(hidden, params))
            if i:  # the first is a warm-up
                seconds[name].append(time.process_time() - began)
    print(f"{args}, jax {jax.__version__}")
    print("| logits at a time | temp MB | CPU s, median | over whole: median (least to greatest) |\n|---|---|---|---|")
    for name, values in seconds.items():
        if not values:
            print(f"| {name} | {temp[name]:,.0f} | | |")
            continue
        ratios = [a / b for a, b in zip(values, seconds["whole"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {temp[name]:,.0f} | {statistics.median(values):.2f} | {spread} |")


if __name__ == "__main__":
    main()
