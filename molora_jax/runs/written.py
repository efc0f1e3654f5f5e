"""A run's folder, written as a whole: what `opened.py` opens, for a run that no training made.

    DIR/config.json, identity.json, checkpoints/0/      as a run of launch.train has them before its first step
    DIR/base/                                           its own base, where that is not its parents'

Everything is written beside DIR and renamed when it is complete, so a kill leaves no half run.
"""

import contextlib
import io
import os
import pathlib

import jax
import numpy as np

from molora_jax import config as config_lib
from molora_jax.backbones.compile import compile_model
from molora_jax.core.trees import set_path
from molora_jax.errors import InputError, local
from molora_jax.io import huggingface
from molora_jax.io.base import Base, load_base
from molora_jax.io.base_facts import base_facts, pinned
from molora_jax.io.parts import whole_folder
from molora_jax.io.plain import names, same_names
from molora_jax.runs import saved
from molora_jax.runs.checkpoints import Checkpoints
from molora_jax.runs.manifest import describe_files
from molora_jax.runs.opened import item_shapes
from molora_jax.runs.warm_start import check_finite
from molora_jax.runs.workdir import Workdir


def free(workdir, *, where: str = "workdir") -> pathlib.Path:
    """The absolute path of a folder that a new run may be written to: not there yet, or empty.

    Raises:
      InputError: it holds something, or is a file.
    """
    if not isinstance(workdir, (str, os.PathLike)) or not str(workdir).strip():
        raise InputError(where, got=repr(workdir), expected="a folder for the run", fix="Name one.")
    path = pathlib.Path(local(where, workdir)).expanduser().absolute()
    try:
        if path.is_dir():
            held = sorted(entry.name for entry in path.iterdir())
            if held:
                raise InputError(
                    where, got=f"{path}, which holds {', '.join(held[:4])}", expected="an empty or a new folder",
                    fix="Choose another folder.",
                )  # fmt: skip
        elif path.exists() or path.is_symlink():
            raise InputError(where, got=f"{path}, a file", expected="an empty or a new folder")
    except OSError as error:
        raise InputError(
            where, got=f"{path}: {error.strerror}", expected="a folder that can be written",
            fix="Choose another folder.",
        ) from None  # fmt: skip
    return path


@contextlib.contextmanager
def whole(target: pathlib.Path, *, at: str, expected: str, fix: str, where: str = "workdir"):
    """A path beside `target` for a new folder, which takes its place when all is written; an error leaves nothing.

    Args:
      target: of `free`. at, expected, fix: of the error where the disk does not take it; where: that of `free`.

    Raises:
      InputError: an error of the disk, or somebody was faster.
    """
    try:
        with whole_folder(target) as part:
            yield part
            free(target, where=where)  # nobody was faster
    except OSError as error:
        raise InputError(at, got=error.strerror or str(error), expected=expected, fix=fix) from error


def write(workdir, *, config, items: dict, facts: dict, backbone=None, base: Base | None = None, parents=()):
    """Writes a run at step 0.

    Args:
      config: what its leaves fit; paths of starts in it are dropped.
      items: `adapters`, `router_state` and, where the run has them, `modules` and `start`: nested dicts of arrays.
      facts: as `Opened.facts`; with a `base` those of it are made anew.
      backbone: of the base that the run stands on. base: a changed one, which is written to DIR/base.
      parents: entries of `parents.py`.

    Returns:
      The folder.

    Raises:
      InputError: the folder is not free, leaves that the config does not fit, NaN or Inf, a disk that refuses.
    """
    target = free(workdir)
    config = saved.without_inputs(config, keep_data=True)
    backbone = backbone if base is None else base.config
    items = {name: jax.tree.map(np.asarray, tree) for name, tree in items.items()}
    _check(config, backbone, items, classes=len(facts.get("labels") or ()))
    full = dict(
        at=f"workdir {target}", expected="a disk that takes the run",
        fix="Make room, or choose another workdir; nothing was left there.",
    )  # fmt: skip
    with whole(target, **full) as part:
        with Workdir(part) as workdir:
            files = {}
            if base is not None:
                written = _write_base(part / saved.BASE, base)
                with config.unlocked():
                    config.base.source = f"dir:{target / saved.BASE}"
                    config.base.quant = "none"  # a surgery that writes a base has made its kernels dense
                own, day = pinned(written, (facts.get("base") or {}).get("day"))
                facts = facts | {"base_digest": own.digest, "base": base_facts(own, day=day)}
                files = {"base_files": describe_files(part / saved.BASE)}
            plain = config_lib.to_dict(config)
            workdir.write_config(plain)
            digest = workdir.check_identity(plain, facts)
            meta = {"samples": 0, "config": plain, "identity": digest, "run": workdir.identity, **files}
            _save(part, items, meta | ({"parents": list(parents)} if parents else {}))
    return target


def _save(part, items, meta):
    with Checkpoints(part / "checkpoints", keep=1, warn=lambda text: None) as checkpoints:
        checkpoints.save(0, items, meta=meta, wait=True)
        if checkpoints.last_save_failed:
            raise OSError(checkpoints.failures[-1].error)


def _write_base(folder, base: Base) -> Base:
    """The base as a folder in Hugging Face form, read again."""
    folder.mkdir()
    huggingface.write_base(folder, base)
    with contextlib.redirect_stderr(io.StringIO()):  # notes on its config, told when the parent was opened
        return load_base(f"dir:{folder}")


def _check(config, backbone, items, *, classes):
    """Raises InputError where the config is wrong, or the leaves are not what it asks for, or not finite."""
    config_lib.validate(_anywhere(config), need_rules=False)
    config_lib.check_model(config, backbone.layers, backbone.dims, backbone.ABSENT)
    shapes = shapes_of(config, backbone, classes=classes)
    shapes |= {"start": dict(shapes)} if "start" in items else {}
    for item, tree in (dict.fromkeys(items, {}) | shapes).items():
        have, want = names(items.get(item, {})), names(tree)
        same_names(have, want, where=item)
        for name, leaf in want.items():
            if (have[name].shape, have[name].dtype) != (leaf.shape, leaf.dtype):
                got = f"{have[name].dtype}{list(have[name].shape)}"
                raise InputError(f"{item}/{name}", got=got, expected=f"{leaf.dtype}{list(leaf.shape)}")
    check_finite(items, where="leaves", of="the run to be written")


def shapes_of(config, backbone, *, classes: int) -> dict:
    """`{item: nested dict of shapes}` that a config asks for on a backbone."""
    params: dict = {}
    for path, leaf in backbone.shapes().items():
        set_path(params, path, jax.ShapeDtypeStruct(leaf.shape, np.float32))
    return item_shapes(config, compile_model(config, backbone), params, classes=classes)[1]


def _anywhere(config):
    """A copy whose base and data need not be there."""
    config = saved.without_inputs(config)
    with config.unlocked():
        config.base.source = "random:tiny"
    return config
