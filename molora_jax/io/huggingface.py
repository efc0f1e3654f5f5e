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
import math
import os
import pathlib
import sys

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.backbones import gemma, hf_config
from molora_jax.backbones.base import Backbone
from molora_jax.backbones.hf_fields import shown
from molora_jax.core.quant import dense, empty, quantise
from molora_jax.core.trees import set_path
from molora_jax.errors import InputError
from molora_jax.io import mxfp4, tensors
from molora_jax.io.files import read_json, there, write_text
from molora_jax.io.model_files import INDEX, WEIGHTS, copy_texts
from molora_jax.io.tokenizer import Tokenizer

_HEAD = "lm_head.weight"


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder's safetensors files, as its index names them."""
    single, index = folder / WEIGHTS, folder / INDEX
    if there(single):
        return [single]
    if not there(index):
        raise InputError(
            str(folder), got=f"no model.safetensors and no {INDEX}",
            expected="a Hugging Face folder with safetensors weights",
            fix="Save the model with safe_serialization=True (pickled .bin files are not read).",
        )  # fmt: skip
    return [folder / name for name in sorted(set(tensors.read_index(index).values()))]


class Stored:
    """A leaf of a base in its files, of some `shape` and `dtype`. Indexing it (by slices) reads that part and no more,
    as numpy."""

    def __init__(self, leaf, views: dict, origin: dict, dtype):
        self.shape, self.dtype = leaf.shape, np.dtype(dtype)
        self._leaf, self._views, self._origin = leaf, views, origin
        self.lets_go = True  # of the files' pages, once a part is read

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    def __array__(self, dtype=None, copy=None):
        return self[...].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index) -> np.ndarray:
        index = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (self.ndim - len(index))
        ranges = [range(*one.indices(size)) for one, size in zip(index, self.shape, strict=True)]
        lead, rest = ranges[: self._leaf.stacked], index[self._leaf.stacked :]
        shape = [len(one) for one in ranges]
        out = _aligned(shape, self.dtype) if self.lets_go else np.empty(shape, self.dtype)
        for name, at in self._leaf.files():
            if all(i in own for i, own in zip(at, lead, strict=True)):
                place = tuple(own.index(i) for i, own in zip(at, lead, strict=True))
                self._copy(name, rest, out[place] if place else out)
        return out

    def of_tensor(self, place, dtype) -> np.ndarray:
        """What one tensor of the files holds, at a place of the stacked axes."""
        alone = Stored(self._leaf, self._views, self._origin, dtype)
        alone.lets_go = False
        return alone[tuple(slice(i, i + 1) for i in place)].reshape(self.shape[len(place) :])

    def _copy(self, name, index, out):
        view = self._views[name]
        tensor = np.asarray(self._leaf.taken(view))
        with np.errstate(over="ignore"):  # a value too large for `dtype` shows as infinite below
            np.copyto(out, (tensor.T if self._leaf.turned else tensor)[index], casting="unsafe")
        if self.lets_go:
            tensors.let_go(view)
        if not np.isfinite(out).all():
            raise InputError(
                f"{self._origin[name]}: tensor {name}", got=f"NaN or values that are infinite in {self.dtype.name}",
                expected="finite weights", fix="Fetch the file again, or load it as float32.",
            )  # fmt: skip


def _aligned(shape, dtype) -> np.ndarray:
    """An empty array that a CPU device of jax takes as it is, without a copy: it begins at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)


def opened(folder: pathlib.Path, dtype) -> tuple[Backbone, dict]:
    """Config and parameters, each `Stored`. Fields of the config that nobody knows are told on stderr.

    Raises:
      InputError: a file, tensor name, shape or dtype that does not fit the config; values only when they are read.
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
    if not there(folder / WEIGHTS):
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
    """Checks every name and shape against the template; nothing of the weights is read."""
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

    tree: dict = {}
    for path, leaf in shapes.items():
        set_path(tree, path, Stored(leaf, views, origin, dtype))
    return tree


def read(tree: dict) -> dict:
    """Every leaf whole."""
    flat = flatten_dict(tree, sep="/")
    for leaf in flat.values():
        leaf.lets_go = False  # others are read at the same time
    return unflatten_dict(dict(zip(flat, _side_by_side(lambda leaf: leaf[...], flat.values()), strict=True)), sep="/")


def quantised(config: Backbone, tree: dict, form: str) -> dict:
    """Every leaf, kernels in a `form` of `core/quant.py`.

    One tensor of a file at a time is read and quantised: beside what comes out there are as many dense ones as threads.
    """
    flat, shapes = flatten_dict(tree, sep="/"), config.shapes()
    packed = {path: empty(x.shape, form, x.dtype, where=path) for path, x in flat.items() if shapes[path].product}
    rest = read(unflatten_dict({path: x for path, x in flat.items() if path not in packed}, sep="/"))

    def one(job):
        path, place = job
        quantise(flat[path].of_tensor(place, np.float32), packed[path][place])

    _side_by_side(one, [(p, at) for p in packed for at in np.ndindex(*flat[p].shape[: shapes[p].stacked])])
    return unflatten_dict(flatten_dict(rest, sep="/") | packed, sep="/")


def _side_by_side(do, jobs) -> list:
    """`do` of each job, on threads: numpy releases the GIL in its copies."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(do, jobs))


def write_folder(folder: pathlib.Path, config: dict, sources: dict, tokenizer: Tokenizer, dtype) -> None:
    """Writes a folder that this module and `transformers` read.

    Args:
      config: the content of `config.json`.
      sources: Hugging Face name -> (shape, function that gives the array); read one at a time.
    """
    config = {**config, "dtype": np.dtype(dtype).name, "torch_dtype": np.dtype(dtype).name}
    write_text(folder / "config.json", json.dumps(config, indent=1))
    write_text(folder / "tokenizer.json", tokenizer.inner.to_str(pretty=True))
    special = {f"{role}_token": getattr(tokenizer, role) for role in ("bos", "eos", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    settings["add_bos_token"] = bool(tokenizer.prefix_ids)
    settings["chat_template"] = tokenizer.template
    if tokenizer.tool_template is not None:
        named = {"default": tokenizer.template, "tool_use": tokenizer.tool_template}
        settings["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    settings = {key: value for key, value in settings.items() if value is not None}
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1))
    ends = {"eos_token_id": list(tokenizer.end_ids)} if tokenizer.end_ids else {}
    write_text(folder / "generation_config.json", json.dumps(ends))
    shapes = {name: shape for name, (shape, _) in sources.items()}
    tensors.write(folder / WEIGHTS, shapes, dtype, (read() for _, read in sources.values()))


def sources_of(config: Backbone, params: dict) -> dict:
    """`{name: (shape, read)}` of a base's tensors in a Hugging Face folder, as `write_folder` takes them; of kernels
    that are quantised the values that their codes say."""
    values, held = flatten_dict(params, sep="/"), {}  # held: name -> its leaves and their values
    for path, leaf in config.shapes().items():
        for name, index in leaf.files():
            held.setdefault(name, []).append((leaf, values[path], index))

    def whole(leaves):
        def of(leaf, values, index):
            one = np.asarray(dense(values[index]))
            return one.T if leaf.turned else one

        if leaves[0][0].part is None:
            (own,) = leaves
            return of(*own)
        out = np.empty(leaves[0][0].file_shape, leaves[0][1].dtype)
        for own in leaves:
            own[0].taken(out)[...] = of(*own)
        return out

    return {n: (leaves[0][0].file_shape, lambda leaves=leaves: whole(leaves)) for n, leaves in held.items()}


def write_base(folder: pathlib.Path, base, dtype=np.float32) -> None:
    """A loaded base (`io.base.Base`, perhaps with other params) as a folder that this module and `transformers` read.

    Weights are of `dtype`, of a quantised base those that its codes say; config and tokenizer are the files that the
    base was read with, else written from it.
    """
    sources = sources_of(base.config, base.params)
    if base.folder is None:
        write_folder(folder, hf_config.to_hf(base.config), sources, base.tokenizer, dtype)
        return
    copy_texts(base.folder, folder)
    config = read_json(folder / "config.json")
    config = gemma.text_tower(config, "config.json") if config.get("text_config") else config  # no vision tower here
    config.pop("quantization_config", None)  # what was packed is not any more
    config |= {"dtype": np.dtype(dtype).name, "torch_dtype": np.dtype(dtype).name}
    if "tie_word_embeddings" in config or getattr(base.config, "tied", False):
        config["tie_word_embeddings"] = bool(getattr(base.config, "tied", False))  # the file's own head may overrule it
    write_text(folder / "config.json", json.dumps(config, indent=1))
    tensors.write(
        folder / WEIGHTS, {name: shape for name, (shape, _) in sources.items()}, dtype,
        (read() for _, read in sources.values()),
    )  # fmt: skip
