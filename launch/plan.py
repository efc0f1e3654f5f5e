"""Says before a launch whether a run fits, and what bounds it: compiles the real step for chips that are not there.

python -m launch.plan --config=mixlora --base=llama3-8b --topology=v5p:4x4x4 [--json] [--config.data.seq_len=2048 ...]

Bases: llama3-8b, qwen3-30b-a3b, smollm2, or the folder of a model (its config.json is read, no weights). Topologies:
v5e:4x4, v6e:16x16, v5p:4x4x4, tpu7x:2x2x1 (needs libtpu: pip install -e '.[tpu]', no TPU); h100:8 or h100:4x8, four
hosts of eight, and a100, h200, b200 (needs pip install -e '.[plan]', no GPU); cpu:8. Mesh, batch and dtype that are not
given are chosen and printed. Ends with status 1 where the run does not fit.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import sys

from launch import flags
from molora_jax.errors import InputError

FLAGS = [
    ("--base", dict(required=True, metavar="NAME|DIR", help="llama3-8b, qwen3-30b-a3b, smollm2, or a model's folder")),
    ("--topology", dict(required=True, metavar="CHIP:AxBxC", help="v5p:4x4x4, v6e:16x16, v5e:4x4, h100:8x8, cpu:8")),
    ("--json", dict(action="store_true", help="one JSON on stdout instead of text")),
]
NO_TPU = dict(  # what libtpu looks for on a TPU host; without them it says at length that this is none
    TPU_ACCELERATOR_TYPE="v5litepod-1", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0"
)  # fmt: skip
TPUS, GPUS = ("v5e", "v6e", "v5p", "tpu7x"), ("a100", "h100", "h200", "b200")
EXPECTED = (
    "CHIP:SIZES such as v5p:4x4x4, v6e:16x16, v5e:4x4, tpu7x:2x2x1, h100:8, h200:4x8 (four hosts of eight), cpu:8"
)


def topology(text: str):
    """`(chip, devices)`. Before jax is used.

    Raises:
      InputError: a topology that does not exist, or no compiler for it.
    """
    found = re.fullmatch(rf"({'|'.join((*TPUS, *GPUS, 'cpu'))}):(\d+(?:x\d+)*)", text)
    if not found:
        raise InputError("--topology", got=repr(text), expected=EXPECTED)
    chip, sizes = found[1], [int(size) for size in found[2].split("x")]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # a compiler that takes minutes is no error
    if chip == "cpu":
        if len(sizes) != 1 or not 1 <= sizes[0] <= 512:
            raise InputError("--topology", got=repr(text), expected="cpu:N with N from 1 to 512")
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={sizes[0]}"
        )
        import jax

        return chip, jax.devices()[: sizes[0]]
    if chip in GPUS:
        *hosts, each = sizes
        if len(hosts) > 1 or not all(1 <= size <= 1024 for size in sizes):
            raise InputError(
                "--topology", got=repr(text), expected=f"{chip}:N, or {chip}:HxN for H hosts of N GPUs (1 to 1024)"
            )
        from molora_jax.training import gpus

        return chip, gpus.devices(chip, *(hosts or [1]), each)
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "--topology", got=f"{text}, without the TPU's compiler", expected="libtpu on this machine (no TPU)",
            fix="pip install -e '.[tpu]', or set TPU_LIBRARY_PATH to a libtpu.so.",
        )  # fmt: skip
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    for name, value in NO_TPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return chip, topologies.get_topology_desc(text, platform="tpu").devices
    except Exception as error:  # of several kinds, by the plugin
        raise InputError(
            "--topology", got=f"{text!r} ({str(error).splitlines()[0][:160]})", expected=EXPECTED,
            fix="Sizes are those of slices that exist, such as v5e:4x4 or v5p:2x2x2.",
        ) from error  # fmt: skip


def backbone(base: str):
    """The shape of a base by name, or of a folder.

    Raises:
      InputError: neither, or a config that is not read.
    """
    from molora_jax.backbones.hf_config import from_hf
    from molora_jax.backbones.presets import PRESETS

    if base in PRESETS:
        return from_hf(PRESETS[base], where=f"--base={base}")
    file = pathlib.Path(base).expanduser() / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            "--base", got=f"{base!r} ({error})"[:200], expected=", ".join(PRESETS) + ", or a folder with a config.json"
        ) from None
    return from_hf(found, where=str(file))


def run(argv):
    given = [argument for argument in (sys.argv[1:] if argv is None else argv)]
    config, args = flags.parse(__doc__, FLAGS, argv)
    own = lambda name: any(argument.startswith(f"--config.{name}") for argument in given)  # noqa: E731
    chip, devices = topology(args.topology)
    if chip != "cpu" and not own("base.dtype"):
        with config.unlocked():
            config.base.dtype = "bfloat16"
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.training.plan import plan

    told = lambda text: print(text, file=sys.stderr)  # noqa: E731
    made = plan(
        config, backbone(args.base), devices, chip, own_mesh=own("mesh."), own_batch=own("train.batch_size"), note=told
    )
    print(json.dumps(dataclasses.asdict(made), indent=1) if args.json else words(made))
    return 0 if made.fits else 1


def words(made) -> str:
    from molora_jax.sharding import axes_text
    from molora_jax.text import table

    gb = lambda size: f"{size / 2**30:.2f} GiB"  # noqa: E731
    mesh = axes_text(made.mesh) or "one device"
    limit = "" if made.limit is None else f": a run gets {gb(made.usable)} of the {gb(made.limit)} of a chip"
    lines = [
        f"{made.devices} x {made.kind}, mesh {mesh}, {made.batch} rows of {made.seq_len} tokens, base in {made.dtype}",
        table([("memory of a device", ""), *((name, gb(size)) for name, size in made.memory.items())], right=(1,)),
        f"{'fits' if made.fits else 'does not fit'}{limit}",
        f"engine {made.engine}: {made.why}",
    ]
    if made.collectives:
        rows = [("collective", "axis", "times", "MB sent")]
        rows += [(c["kind"], c["axis"], str(c["count"]), f"{c['bytes'] / 1e6:,.1f}") for c in made.collectives]
        lines.append(table(rows, right=(2, 3)))
    if made.roofline_s is not None:
        lines.append(f"a step takes at least {1e3 * made.roofline_s:.3g} ms, bound by {made.bound}")
    if made.advice:
        lines.append(f"what would fit: {made.advice}")
    lines.append(f"compiled in {made.compile_s:.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    flags.main(run)
