"""Frozen base models: one function from a source string to config, weights and tokenizer.

    pkg:smollm2-135m-instruct    a pinned package that carries a GGUF file (`fetch.py`)
    pkg:all-minilm-l6-v2         one that carries a Hugging Face folder, an encoder
    gguf:PATH                    a GGUF file
    dir:PATH                     a Hugging Face folder with safetensors; also the path of such a folder alone
    hf:ORG/NAME[@revision]       the Hugging Face hub (extra `hub`)
    sandbox:6m                   a decoder of 5.6 million parameters that this repository pretrains and ships
    random:tiny                  four random layers and a byte tokenizer; also tiny-untied (a head of its own),
                                 tiny-qwen3 (query and key norms, heads wider than the model), tiny-bert (an encoder),
                                 tiny-moe (experts of its own), tiny-mamba (state-space blocks); random:tiny@7 is
                                 another draw (seed 7, not 0)

A GGUF file (or a model in parts, by any of them) is dequantised once, into a Hugging Face folder
`CACHE/converted/<digest>-<dtype>-v3`; later starts only map that. The folder is written under another name and renamed
when it is complete, so a kill leaves no half model and two processes at once do no harm. `molora.json` in it holds the
sha256 of every file and of itself, and all are hashed at every start (0.4 s for 540 MB, while they are copied): a
flipped bit on the disk would otherwise pass as a slightly different model. A base that is read quantised (`quant`) lies
beside it in the same way, as `<digest>-<dtype>-<quant>-v1`, made of one tensor of its folder at a time.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from molora_jax import stores
from molora_jax.backbones import families, hf_config
from molora_jax.backbones.base import Backbone
from molora_jax.backbones.hf_fields import shown
from molora_jax.backbones.sizes import base_shapes
from molora_jax.core import trees
from molora_jax.core.quant import FORMS, is_quantised, quantised_tree
from molora_jax.errors import InputError
from molora_jax.io import (
    fetch,
    gguf,
    gguf_model,
    gguf_tokenizer,
    huggingface,
    model_files,
    parts,
    random_init,
    sandbox,
    tensors,
    tokenizer,
)  # fmt: skip
from molora_jax.io.files import read_json, there, write_text

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_FORMAT = "v3"  # raise it when a conversion changes: old folders are then not used
_QUANT_FORMAT = "v1"
_NOTE = "molora.json"
_WEIGHTS = model_files.WEIGHTS


@dataclasses.dataclass(frozen=True)
class Base:
    """A loaded base.

    `params`: nested dict of numpy arrays, as the backbone's `shapes()` says, kernels maybe quantised. `digest`: hex
    sha256 of the weights' own content (the GGUF file, the safetensors files, the random values), the same on every
    machine and for every dtype and `quant`.
    `folder`: the Hugging Face folder that it was read from (of a GGUF file the converted one), None of random values.
    """

    config: Backbone
    params: dict
    tokenizer: tokenizer.Tokenizer
    digest: str
    source: str
    folder: pathlib.Path | None = None


def configured_base(config, known=(), *, stored: bool = False) -> Base:
    """The base that a config asks for; `known` and `stored` as in `load_base`."""
    base, seed = config.base, config.get("seed", 0)
    quant = base.get("quant", "none")
    return load_base(base.source, dtype=base.dtype, quant=quant, seed=seed, known=known, stored=stored)


def load_base(
    source: str, *, dtype: str = "float32", quant: str = "none", seed: int = 0, known=(), stored: bool = False,
    where: str = "base.source",
) -> Base:  # fmt: skip
    """Loads a frozen base model.

    Args:
      source: one of the forms at the top of this file.
      dtype: float32, bfloat16 or float16; of every parameter.
      quant: "int8" or "nf4" of the kernels of projections and experts (`core/quant.py`), or "none".
      seed, known: of a run that is there, its seed and the digests that it recorded. In older versions a random base
        without `@` followed the run's seed: where that is the base that was recorded, it is the one.
      stored: leaves of `params` that lie in files are read when they are indexed, so that each process reads its part
        (`huggingface.Stored`); not those of a quantised base. Of several processes each digests some of the files: all
        have to call this together.
      where: the field that named it, for errors.

    Raises:
      InputError: whatever is wrong with the source, in terms of what to change.

    >>> import molora_jax as mj
    >>> base = mj.load_base("random:tiny")
    >>> base.config.layers, base.params["blocks"]["q"]["kernel"].shape
    (4, (4, 64, 64))
    """
    if dtype not in _DTYPES:
        raise InputError("base.dtype", got=repr(dtype), expected=f"one of {', '.join(_DTYPES)}")
    if quant not in ("none", *FORMS):
        raise InputError("base.quant", got=repr(quant), expected=f"one of none, {', '.join(FORMS)}")
    scheme, _, rest = source.partition(":")
    schemes = ("random", "pkg", "gguf", "dir", "hf", "sandbox")
    if scheme not in schemes and there(pathlib.Path(source).expanduser() / "config.json"):
        scheme, rest = "dir", source
    name, at, draw = rest.partition("@")
    if scheme == "random" and name in families.RANDOM and (draw.isdecimal() if at else True):
        config = families.RANDOM[name]
        params, digest = random_init.random_params(config, seed=int(draw or 0), dtype=_DTYPES[dtype])
        if known and digest not in known and not at:
            older = random_init.random_params(config, seed=seed, dtype=_DTYPES[dtype])
            params, digest = older if older[1] in known else (params, digest)
        params = params if quant == "none" else quantised_tree(config, params, quant)
        return Base(config, params, tokenizer.byte_tokenizer(), digest, source)
    if scheme not in schemes or not rest or scheme == "random":
        raise InputError(
            where, got=repr(source),
            expected="pkg:NAME, gguf:PATH, dir:PATH, hf:ORG/NAME[@revision], sandbox:6m, or one of "
            f"{', '.join(f'random:{name}' for name in families.RANDOM)} [@draw]",
        )  # fmt: skip
    try:
        if scheme == "pkg":
            return _load_package(rest, dtype, quant, source, stored)
        if scheme == "gguf":
            path = pathlib.Path(stores.at_hand(rest, where="base.source")).expanduser()
            digests = [fetch.remembered_sha256(part) for part in gguf.files(path)]
            digest = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
            return _load_converted(_converted(digest, dtype, lambda: path), dtype, quant, digest, source, stored)
        if scheme == "sandbox":
            folder = sandbox.folder(rest)
        else:
            folder = fetch.hub_folder(rest) if scheme == "hf" else _folder(rest)
        return _load_folder(folder, dtype, quant, source, stored=stored)
    except OSError as error:  # a full disk, a folder without permission
        raise _of_the_disk(source, error) from error


def _of_the_disk(source: str, error: OSError) -> InputError:
    """Names the file, and whether it is the model's own or what the cache keeps of it."""
    name = str(error.filename or "a file")
    ours = not error.filename or fetch.cache_dir() in pathlib.Path(name).parents
    what = "to write what the cache keeps of it: a copy, converted or quantised" if ours else "to read it"
    return InputError(
        f"{source}: {name}", got=error.strerror or str(error), expected=what,
        fix="Check the path, its permissions and the free space (MOLORA_CACHE moves the cache).",
    )  # fmt: skip


def _folder(path) -> pathlib.Path:
    return pathlib.Path(stores.at_hand(path, where="base.source", skip=model_files.of_no_use)).expanduser()


def _load_package(alias, dtype, quant, source, stored):
    if alias not in fetch.PACKAGES:
        fetch.package_file(alias)  # raises, with the names that exist
    digest = fetch.PACKAGES[alias].member_sha256
    if fetch.PACKAGES[alias].beside:  # a Hugging Face folder, whose files are checked at every start
        return _load_folder(fetch.package_file(alias).parent, dtype, quant, source, digest=digest, stored=stored)
    folder = _converted(digest, dtype, lambda: fetch.package_file(alias))
    return _load_converted(folder, dtype, quant, digest, source, stored)


def _load_converted(folder, dtype, quant, digest, source, stored):
    load = lambda: _load_folder(folder, dtype, quant, source, digest=digest, stored=stored)  # noqa: E731
    return _checked(folder, digest, dtype, load)


def _checked(folder, digest, dtype, load):
    """`load()`, while the files of a folder of the cache are held against its note."""
    expected = _read_note(folder, digest, dtype)
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {_NOTE}
    wrong = found ^ expected.keys()
    for name in sorted(expected.keys() - {_WEIGHTS} - wrong):
        _same_digest(folder / name, fetch.file_sha256(folder / name), expected[name])
    if wrong:
        _damaged(folder / min(wrong), "a file too many or too few", "the files that were written")
    weights = folder / _WEIGHTS
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(fetch.file_sha256, weights)  # hashlib releases the GIL
        made = load()
        _same_digest(weights, hashing.result(), expected[_WEIGHTS])
    return made


def _same_digest(path, got, expected):
    if got != expected:
        _damaged(path, f"sha256 {got}", f"{expected}, as it was written")


def _damaged(path, got, expected):
    fix = f"The cache is damaged: delete {path.parent} and start again."
    raise InputError(str(path), got=got, expected=expected, fix=fix)


def _write_note(folder, digest, name, dtype):
    """`molora.json`: where a folder comes from, and the sha256 of every file in it and of this note."""
    files = {path.name: fetch.file_sha256(path) for path in sorted(folder.iterdir())}
    note = {"source_sha256": digest, "source_name": name, "dtype": dtype, "files": files}
    write_text(folder / _NOTE, json.dumps(note | {"sha256": _own_digest(note)}))


def _own_digest(note) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _read_note(folder, digest, dtype) -> dict[str, str]:
    """File name -> sha256. Raises InputError where the note is damaged or of another source."""
    try:
        note = read_json(folder / _NOTE)
    except InputError as error:
        _damaged(folder / _NOTE, error.got, error.expected)
    sound = note.pop("sha256", None) == _own_digest(note)
    if not sound or (note.get("source_sha256"), note.get("dtype")) != (digest, dtype) or _WEIGHTS not in note["files"]:
        _damaged(folder / _NOTE, "another content", "what was written")
    return note["files"]


def _load_folder(folder, dtype, quant, source, *, digest=None, stored=False):
    config, params = huggingface.opened(folder, _DTYPES[dtype])
    text = tokenizer.from_folder(folder, end="eos" if config.CAUSAL else "sep")
    check_ids(text, config.vocab, where=str(folder))
    if digest is None:
        files = huggingface.weight_files(folder)
        digests = _shared_out(files) if stored else map(fetch.remembered_sha256, files)
        joined = "\n".join(f"{path.name} {digest}" for path, digest in zip(files, digests, strict=True))
        digest = hashlib.sha256(joined.encode()).hexdigest()
    if quant != "none":
        params = _quantised(config, digest, dtype, quant, lambda: huggingface.quantised(config, params, quant))
    elif not stored:
        params = huggingface.read(params)
    return Base(config, params, text, digest, source, pathlib.Path(folder))


def _shared_out(files: list[pathlib.Path]) -> list[str]:
    """The sha256 of every file; of several processes each reads some of them."""
    count, own = jax.process_count(), jax.process_index()
    mine = {i: fetch.remembered_sha256(path) for i, path in enumerate(files) if i % count == own}
    if count == 1:
        return list(mine.values())
    table = np.zeros((len(files), 32), np.uint8)
    for i, digest in mine.items():
        table[i] = list(bytes.fromhex(digest))
    return [bytes(row).hex() for row in multihost_utils.process_allgather(table).max(0)]


def _quantised(config, digest, dtype, quant, make) -> dict:
    """The parameters of a quantised base, from the cache; `make()` gives them where they are not there yet. How the
    weights are read depends on the config: it belongs to the key."""
    kind, read_as = f"{dtype}-{quant}", hashlib.sha256(repr(config).encode()).hexdigest()[:8]
    folder = fetch.cache_dir() / "converted" / f"{digest[:32]}-{kind}-{_QUANT_FORMAT}-{read_as}"
    if not folder.exists():
        with _cached(folder) as part:
            flat = flatten_dict(make(), sep="/")
            packed = {path: flat.pop(path) for path, W in list(flat.items()) if is_quantised(W)}
            own = {f"{path}/{name}": a for path, W in packed.items() for name, a in W.arrays.items()}
            tensors.write_named(part / _WEIGHTS, flat | own)
            _write_note(part, digest, quant, kind)
    return _checked(folder, digest, kind, lambda: _read_quantised(config, folder / _WEIGHTS, dtype, quant))


def _read_quantised(config, path, dtype, quant) -> dict:
    """The tree of `base_shapes`, filled from a file; what it holds is checked against its digest meanwhile."""
    views = tensors.read(path)

    def of_leaf(path, _):
        return np.array(views[trees.name_of(path)])

    return jax.tree_util.tree_map_with_path(of_leaf, base_shapes(config, _DTYPES[dtype], quant))


def check_ids(text: tokenizer.Tokenizer, rows: int, *, where: str) -> None:
    """Every id that text can become has a row in the embedding; a look-up beyond it would give another token's row.

    Raises:
      InputError: a token or special token whose id is too large, by name.
    """
    vocabulary = text.inner.get_vocab(with_added_tokens=True)
    token = max(vocabulary, key=vocabulary.__getitem__, default=None)
    named = {repr(token): vocabulary.get(token, 0)}
    named |= {f"the {role} token": getattr(text, f"{role}_id") or 0 for role in ("bos", "eos", "pad")}
    named |= {f"an end token, {i}": i for i in getattr(text, "end_ids", ())}
    named |= {f"a token that is put around texts, {i}": i for i in (*text.prefix_ids, *text.suffix_ids)}
    for name, largest in named.items():
        if not 0 <= largest < rows:
            raise InputError(
                f"{where}: tokenizer", got=f"{shown(name)} with id {largest} (it has {text.vocab_size} tokens)",
                expected=f"ids below {rows}, the rows of the model's embedding",
                fix="Use the tokenizer that belongs to these weights, or remove tokens that were added to it alone.",
            )  # fmt: skip


def _converted(digest, dtype, gguf_path) -> pathlib.Path:
    """The converted folder, made if it is not there. `gguf_path()` gives the file only when it is needed."""
    root = fetch.cache_dir() / "converted"
    folder = root / f"{digest[:32]}-{dtype}-{_FORMAT}"
    if folder.exists():
        return folder
    path = gguf_path()

    with _cached(folder) as part:
        file = gguf.read(path)
        config = gguf_model.hf_config(file)
        backbone, text = hf_config.from_hf(config, where=str(path)), gguf_tokenizer.tokenizer(file)
        check_ids(text, backbone.vocab, where=str(path))
        sources = {
            name: (shape, functools.partial(_finite, f"{path}: tensor {name}", read, _DTYPES[dtype]))
            for name, (shape, read) in gguf_model.tensor_sources(file, backbone).items()
        }
        huggingface.write_folder(part, config, sources, text, _DTYPES[dtype])
        try:  # what cannot be read back is an error of the file, and never takes its place in the cache
            huggingface.opened(part, _DTYPES[dtype])
            check_ids(tokenizer.from_folder(part), backbone.vocab, where=str(path))
        except InputError as error:
            where = error.where.replace(str(part), str(path))
            raise InputError(where, got=error.got, expected=error.expected, fix=error.fix) from None
        _write_note(part, digest, path.name, dtype)
    return folder


def _finite(where, read, dtype) -> np.ndarray:
    """A tensor of a GGUF file in the dtype that it is kept in."""
    with np.errstate(over="ignore"):
        value = read().astype(dtype)
    if not np.isfinite(value).all():
        raise InputError(
            where, got=f"NaN or values that are infinite in {np.dtype(dtype).name}", expected="finite weights",
            fix="Fetch the file again, or load it as float32.",
        )  # fmt: skip
    return value


@contextlib.contextmanager
def _cached(folder):
    """A new folder that becomes `folder` of the cache as a whole, or not at all."""
    with parts.scratch(folder.parent) as part:
        yield part
        with contextlib.suppress(OSError):  # another process was first: its folder holds the same
            os.rename(part, folder)
    if not folder.exists():
        raise InputError(str(folder), got="a folder that could not be renamed", expected="the converted model")
