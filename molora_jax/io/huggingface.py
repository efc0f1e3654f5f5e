"""A Hugging Face folder as our parameters, and back.

A folder holds `config.json`, `model.safetensors` (or `model.safetensors.index.json` and its shards), `tokenizer.json`,
`tokenizer_config.json`. Their linear weights are `[D_out, D_in]`, one tensor a layer; ours are `[L, D_in, D_out]`. So
is the head: `[V, D]` there and `[D, V]` here.
The tree and the names are those of the backbone's `shapes()`.
"""

import concurrent.futures
import dataclasses
import fnmatch
import json
import os
import pathlib
import shutil
import sys

import numpy as np
from flax.traverse_util import flatten_dict

from molora_jax.backbones import gemma, hf_config
from molora_jax.backbones.base import Backbone
from molora_jax.backbones.hf_fields import shown
from molora_jax.core.trees import set_path
from molora_jax.errors import InputError
from molora_jax.io import mxfp4, tensors
from molora_jax.io.tokenizer import Tokenizer, read_json

INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder's safetensors files, as its index names them."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        raise InputError(
            str(folder), got=f"no model.safetensors and no {INDEX}",
            expected="a Hugging Face folder with safetensors weights",
            fix="Save the model with safe_serialization=True (pickled .bin files are not read).",
        )  # fmt: skip
    return [folder / name for name in sorted(set(tensors.read_index(index).values()))]


def read_folder(folder: pathlib.Path, dtype) -> tuple[Backbone, dict]:
    """Config and parameters (numpy, `dtype`). Fields of the config that nobody knows are told on stderr.

    Raises:
      InputError: a file, tensor name, shape, dtype or value that does not fit the config.
    """
    note = lambda text: print(f"note: {text}", file=sys.stderr, flush=True)  # noqa: E731
    path = folder / "config.json"
    said = read_json(path)
    config = hf_config.from_hf(said, where=str(path), note=note)
    views, origin = {}, {}
    for path in weight_files(folder):
        for name, view in tensors.read(path).items():
            if name in views:
                raise InputError(
                    f"{path}: tensor {shown(name)}", got="a second copy", expected="one file for each tensor"
                )
            views[name], origin[name] = view, path
    if not (folder / "model.safetensors").exists():
        _check_index(folder / INDEX, origin)
    if said.get("quantization_config"):
        origin |= {name.removesuffix(mxfp4.BLOCKS): file for name, file in origin.items()}
        views = mxfp4.joined(views, str(folder))
    if said.get("text_config"):  # a vision tower stands beside
        views, origin = ({ours: x for n, x in d.items() if (ours := gemma.in_text_tower(n))} for d in (views, origin))
    if config.PREFIX and config.shapes()["embed"].name not in views:  # saved with a head on top of it
        views, origin = ({n.removeprefix(config.PREFIX): x for n, x in d.items()} for d in (views, origin))
    if getattr(config, "tied", False) and not _is_tied(views, config):
        note(f"{folder}: lm_head.weight differs from the embedding, so it is used, though config.json says tied")
        config = dataclasses.replace(config, tied=False)
    return config, _assemble(views, origin, config, dtype, where=str(folder))


def _check_index(index, origin):
    for name, file in tensors.read_index(index).items():
        if name not in origin or origin[name].name != file:
            got = "no such tensor there" if name not in origin else f"it lies in {origin[name].name}"
            raise InputError(
                f"{index}: {shown(name)}", got=got, expected=f"a tensor of {file}", fix="Fetch the files again."
            )


def _is_tied(views, config) -> bool:
    """Whether a file's head, where it has one, is a copy of its embedding."""
    head, embed = views.get(_HEAD), views.get(config.shapes()["embed"].name)
    return head is None or embed is None or (head.shape == embed.shape and np.array_equal(head, embed))


def _assemble(views, origin, config, dtype, *, where):
    """Checks every name and shape against the template before the first allocation, then stacks and transposes."""
    shapes, left = config.shapes(), set(views)
    for leaf in shapes.values():
        for name, _ in leaf.files():
            got = f"{views[name].dtype.name} of shape {views[name].shape}" if name in views else "no such tensor"
            if name not in views or views[name].shape != leaf.file_shape or views[name].dtype not in tensors.FLOATS:
                raise InputError(
                    f"{origin.get(name, where)}: tensor {name}", got=got,
                    expected=f"a float tensor of shape {leaf.file_shape}",
                    fix="Check that config.json belongs to these weights.",
                )  # fmt: skip
            left.discard(name)
    left -= {_HEAD} if getattr(config, "tied", False) else set()
    extra = sorted(n for n in left if not any(fnmatch.fnmatchcase(n, pattern) for pattern in config.IGNORED))
    if extra:
        raise InputError(
            f"{where}: tensors", got=f"{len(extra)} more than the {config.family} family has, first {shown(extra[0])}",
            expected="only those of its family", fix="Choose a plain model of a supported family.",
        )  # fmt: skip

    tree, jobs = {}, []
    for path, leaf in shapes.items():
        values = np.empty(leaf.shape, dtype)
        set_path(tree, path, values)
        jobs += [(name, leaf, values[index].T if leaf.turned else values[index]) for name, index in leaf.files()]

    def copy(job):
        name, leaf, out = job
        with np.errstate(over="ignore"):  # a value too large for `dtype` shows as infinite below
            np.copyto(out, leaf.taken(views[name]), casting="unsafe")
        if not np.isfinite(out).all():
            raise InputError(
                f"{origin[name]}: tensor {name}", got=f"NaN or values that are infinite in {np.dtype(dtype).name}",
                expected="finite weights", fix="Fetch the file again, or load it as float32.",
            )  # fmt: skip

    # numpy releases the GIL in these copies
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(copy, jobs))
    return tree


def write_folder(folder: pathlib.Path, config: dict, sources: dict, tokenizer: Tokenizer, dtype) -> None:
    """Writes a folder that this module and `transformers` read.

    Args:
      config: the content of `config.json`.
      sources: Hugging Face name -> (shape, function that gives the array); read one at a time.
    """
    config = {**config, "dtype": np.dtype(dtype).name, "torch_dtype": np.dtype(dtype).name}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tokenizer.inner.save(str(folder / "tokenizer.json"))
    special = {f"{role}_token": getattr(tokenizer, role) for role in ("bos", "eos", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    settings["add_bos_token"] = bool(tokenizer.prefix_ids)
    if tokenizer.template is not None:
        settings["chat_template"] = tokenizer.template
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    ends = {"eos_token_id": list(tokenizer.end_ids)} if tokenizer.end_ids else {}
    (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    shapes = {name: shape for name, (shape, _) in sources.items()}
    tensors.write(folder / "model.safetensors", shapes, dtype, (read() for _, read in sources.values()))


_BESIDE = (  # files of a model's folder that say what its tokenizer and its answers are
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def write_base(folder: pathlib.Path, base, dtype=np.float32) -> None:
    """A loaded base (`io.base.Base`, perhaps with other params) as a folder that this module and `transformers` read.

    Weights are of `dtype`; config and tokenizer are the files that the base was read with, else written from it.
    """
    shapes, params = base.config.shapes(), flatten_dict(base.params, sep="/")
    held: dict = {}  # name -> its leaves and their values
    for path, leaf in shapes.items():
        for name, index in leaf.files():
            held.setdefault(name, []).append((leaf, params[path][index]))

    def whole(leaves):
        if leaves[0][0].part is None:
            ((leaf, value),) = leaves
            return value.T if leaf.turned else value
        out = np.empty(leaves[0][0].file_shape, leaves[0][1].dtype)
        for leaf, value in leaves:
            leaf.taken(out)[...] = value.T if leaf.turned else value
        return out

    sources = {n: (leaves[0][0].file_shape, lambda leaves=leaves: whole(leaves)) for n, leaves in held.items()}
    if base.folder is None:
        write_folder(folder, hf_config.to_hf(base.config), sources, base.tokenizer, dtype)
        return
    for name in _BESIDE:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    config = read_json(folder / "config.json")
    config = gemma.text_tower(config, "config.json") if config.get("text_config") else config  # no vision tower here
    config.pop("quantization_config", None)  # what was packed is not any more
    config |= {"dtype": np.dtype(dtype).name, "torch_dtype": np.dtype(dtype).name}
    if "tie_word_embeddings" in config or getattr(base.config, "tied", False):
        config["tie_word_embeddings"] = bool(getattr(base.config, "tied", False))  # the file's own head may overrule it
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors.write(
        folder / "model.safetensors", {name: shape for name, (shape, _) in sources.items()}, dtype,
        (read() for _, read in sources.values()),
    )  # fmt: skip
