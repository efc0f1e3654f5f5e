"""One side of `launch.bench`: reads a config, then answers `start`, `step`, `end` lines with JSON."""

import dataclasses
import functools
import json
import resource
import sys
import time


def main():
    from molora_jax import runtime

    runtime.keep_memory()
    message = json.loads(sys.stdin.readline())
    config, args = message["config"], message["args"]
    answers, sys.stdout = sys.stdout, sys.stderr
    from molora_jax.errors import InputError

    runtime.configure()
    from kernels_pallas import timing

    timing.pin(args["threads"])
    work, booted = None, time.time() - message["born"]
    for line in sys.stdin:
        what = json.loads(line)
        try:
            if what == "start":
                began = time.monotonic()
                work, answer = start(config, args)
                answer["first"] = booted + answer.pop("done") - began
                work()  # a second warm-up, unmeasured
            elif what == "step":
                answer = timed(work)
            else:
                answer = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                          "peak_device_mb": peak_device_mb()}  # fmt: skip
        except InputError as error:
            answer = {"error": dict(where=error.where, got=error.got, expected=error.expected, fix=error.fix)}
        print(json.dumps(answer), file=answers, flush=True)


def timed(work) -> dict:
    wall, cpu = time.monotonic(), time.process_time()
    parts = work()
    return {"cpu": (time.process_time() - cpu) / parts, "wall": (time.monotonic() - wall) / parts}


def peak_device_mb() -> float | None:
    """Of the accelerator's memory, None on a CPU."""
    import jax

    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**20


def start(tree, args):
    """`(work, answer)`: work() does one step and returns by how much to divide its time."""
    import jax
    import numpy as np

    from kernels_pallas.platform import may_accelerate
    from molora_jax import config as config_lib
    from molora_jax import sharding
    from molora_jax.backbones.compile import compile_model
    from molora_jax.core import trees
    from molora_jax.engines import Engine
    from molora_jax.errors import InputError
    from molora_jax.io.base import load_base
    from molora_jax.runs.modules import compile_modules

    if jax.default_backend() == "cpu" and may_accelerate():
        raise InputError(
            "--threads", got="a plugin for an accelerator, but none that jax can use", expected="one of the two",
            fix="Set JAX_PLATFORMS=cpu: the process is pinned only where nothing but a CPU can be meant.",
        )  # fmt: skip
    config = config_lib.from_dict(tree)
    base = load_base(config.base.source, dtype=args["dtype"], quant=config.base.get("quant", "none"))
    config_lib.check_model(config, base.config.layers, base.config.dims, base.config.ABSENT)
    model = compile_model(config, base.config, max_segments=1)
    devices = args.get("devices", 1)
    if len(jax.devices()) < devices:
        raise InputError("--devices", got=str(devices), expected=f"at most {len(jax.devices())} on this machine")
    mesh = sharding.make_mesh(dict(data=devices, fsdp=1, expert=1, tensor=1), jax.devices()[:devices])
    model = dataclasses.replace(model, engine=Engine("replicate", mesh))
    params = sharding.put(base.params, sharding.param_shardings(base.config, base.params, mesh))
    base = dataclasses.replace(base, params=None)  # the host's copy is not part of a step's memory
    modules = compile_modules(config, params, width=base.config.width, classes=0)
    frozen = model.frozen_patterns()
    init = lambda p: trees.joined(model.init_adapters(jax.random.key(0), p), modules.init(jax.random.key(0), p))  # noqa: E731
    shapes = jax.eval_shape(init, params)
    answer = {
        "trainable": trees.count(trees.split(shapes, frozen)[0]),
        "device": jax.local_devices()[0].device_kind,
        "clock": "cpu" if jax.default_backend() == "cpu" else "wall",
    }
    rng = np.random.default_rng(0)
    make = decoding if args["generate"] else functools.partial(training, modules=modules, shapes=shapes)
    work = make(config, args, model, base, params, mesh, frozen, rng)
    began = time.monotonic()
    work()
    answer["done"] = time.monotonic()
    if hasattr(work, "loss"):
        answer["loss"] = float(np.mean(work.loss))  # of the first step
    answer["compile"] = answer["done"] - began  # compile (or the cache's answer) and the warm-up step
    return work, answer


def training(config, args, model, base, params, mesh, frozen, rng, *, modules, shapes):
    import jax
    import numpy as np
    import optax

    from molora_jax import sharding
    from molora_jax.core import trees
    from molora_jax.errors import InputError
    from molora_jax.training import many
    from molora_jax.training.exact import ExactStep
    from molora_jax.training.programs import compile_optimizer
    from molora_jax.training.step import Knobs, fresh, make_gradient, make_step

    B, S, runs = args["batch"], args["seq"], args.get("runs", 1)
    side_by_side = runs > 1 and args["together"]
    member = compile_optimizer(config)
    steps, pairs = config.train.steps, trees.pairs(model, trees.split(shapes, frozen)[0])
    optimizer, whole = member.make(steps, pairs), sharding.replicated(mesh)
    start = lambda p, seed: fresh(model, optimizer, p, frozen, jax.random.key(seed), modules.init)  # noqa: E731
    make = jax.jit(start, out_shardings=whole)
    knobs = sharding.put(Knobs.of(0, member, model.losses), whole)
    if side_by_side:
        state = many.stack([make(params, seed) for seed in range(runs)])
        knobs = many.stack([knobs.replace(seed=knobs.seed + seed) for seed in range(runs)])
    else:
        state = make(params, 0)
    options = dict(frozen=frozen, accumulate=config.train.accumulate, targets_per_row=S)
    exact = config.train.get("exact", False)
    options |= {} if exact else {"constrain": sharding.constrain(mesh)}
    if exact and args["no_update"]:
        raise InputError("--no_update", got="with train.exact", expected="a whole step", fix="Drop one of them.")
    if args["no_update"]:
        gradient = make_gradient(model, **options)
        norm = jax.jit(lambda *x: optax.tree.norm(gradient(*x, {}, knobs)[0]))  # needs every gradient, keeps none
    else:
        made = model, optimizer, None
        options["rated"] = lambda rates: (member.at(rates).make(steps, pairs), member.at(rates).schedule(steps))
        if exact and side_by_side:
            raise InputError("--runs", got="with train.exact", expected="one run", fix="Drop one of them.")
        if exact:
            step = ExactStep(*made, clip=config.train.clip, mesh=mesh, **options)
        else:
            step = make_step(*made, clip=config.train.clip, **options)
            step = many.over_runs(step) if side_by_side else step
            step = jax.jit(step, donate_argnums=0, out_shardings=(whole, whole))
    ids = rng.integers(0, base.config.vocab, (B, S + 1)).astype(np.int32)
    ones = np.ones((B, S), np.int32)
    batch = dict(tokens=ids[:, :-1], targets=ids[:, 1:], loss_weight=ones.astype(np.float32), segment_ids=ones,
                 positions=ones * np.arange(S, dtype=np.int32), task_ids=0 * ones, example_ids=ones)  # fmt: skip
    if side_by_side:
        batch = many.put_batches([{**batch, "tokens": np.roll(batch["tokens"], i, axis=1)} for i in range(runs)], mesh)
    else:
        batch = sharding.put_batch(batch, mesh, B)

    def work():
        nonlocal state
        if args["no_update"]:
            jax.block_until_ready(norm(state, params, batch))
            return 1
        for _ in range(1 if side_by_side else runs):  # of runs one after the other the memory is that of one
            state, values = step(state, params, batch, {}, knobs)
            jax.block_until_ready((state, values))
        work.loss = values["loss"]
        return 1

    # for `launch.profile`: the compiled program, whose instructions carry the names of the stages
    lowered = lambda: norm.lower(state, params, batch) if args["no_update"] else step.lower(  # noqa: E731
        state, params, batch, {}, knobs
    )  # fmt: skip
    work.text = lambda: lowered().compile().as_text()
    return work


def decoding(config, args, model, base, params, mesh, frozen, rng):
    import jax
    import numpy as np

    from launch.bench import NEW_TOKENS
    from molora_jax import sharding
    from molora_jax.decode.generate import generate

    make = jax.jit(lambda p: model.init_adapters(jax.random.key(0), p), out_shardings=sharding.replicated(mesh))
    adapters, state = make(params), model.init_router_state()
    prompt = rng.integers(0, base.config.vocab, 32).astype(np.int32).tolist()

    def work():
        generate(model, params, adapters, state, [prompt], eos_id=None, max_new_tokens=NEW_TOKENS)
        return NEW_TOKENS

    return work


if __name__ == "__main__":
    main()
