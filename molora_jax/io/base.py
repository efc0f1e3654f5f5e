"""Frozen base models: one function from a source string to config, weights and tokenizer.

    pkg:smollm2-135m-instruct    a pinned package that carries a GGUF file (`fetch.py`)
    gguf:PATH                    a GGUF file
    dir:PATH                     a Hugging Face folder with safetensors
    hf:ORG/NAME[@revision]       the Hugging Face hub (extra `hub`)
    random:tiny                  four random layers and a byte tokenizer

A GGUF file is dequantised once, into a Hugging Face folder `CACHE/converted/<digest>-<dtype>-v2`; later starts only
map that. The folder is written under another name and renamed when it is complete, so a kill leaves no half model and
two processes at once do no harm. Its weights are hashed at every start (0.4 s for 540 MB, while they are copied): a
flipped bit on the disk would otherwise pass as a slightly different model.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time

import ml_dtypes
import numpy as np

from molora_jax.errors import InputError
from molora_jax.io import fetch, gguf, gguf_model, huggingface, random_init, tokenizer
from molora_jax.models import families

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_FORMAT = "v2"  # raise it when a conversion changes: old folders are then not used
_NOTE = "molora.json"
_STALE_SECONDS = 86_400


@dataclasses.dataclass(frozen=True)
class Base:
    """A loaded base.

    `params`: nested dict of numpy arrays as in `families.py`. `digest`: hex sha256 of the weights' source content (the
    GGUF file, the safetensors files, the random values), the same on every machine and for every dtype.
    """

    config: families.DecoderConfig
    params: dict
    tokenizer: tokenizer.Tokenizer
    digest: str
    source: str


def load_base(source: str, *, dtype: str = "float32", seed: int = 0) -> Base:
    """Loads a frozen base model.

    Args:
      source: one of the forms at the top of this file.
      dtype: float32, bfloat16 or float16; of every parameter.
      seed: of `random:` only.

    Raises:
      InputError: whatever is wrong with the source, in terms of what to change.
    """
    if dtype not in _DTYPES:
        raise InputError("base.dtype", got=repr(dtype), expected=f"one of {', '.join(_DTYPES)}")
    scheme, _, rest = source.partition(":")
    if scheme == "random" and rest == "tiny":
        params, digest = random_init.random_params(families.TINY, seed=seed, dtype=_DTYPES[dtype])
        return Base(families.TINY, params, tokenizer.byte_tokenizer(), digest, source)
    if scheme not in ("pkg", "gguf", "dir", "hf") or not rest:
        raise InputError(
            "base.source", got=repr(source),
            expected="pkg:NAME, gguf:PATH, dir:PATH, hf:ORG/NAME[@revision] or random:tiny",
        )  # fmt: skip
    try:
        if scheme == "pkg":
            return _load_package(rest, dtype, source)
        if scheme == "gguf":
            path = pathlib.Path(rest).expanduser()
            gguf.check_magic(path)
            digest = fetch.remembered_sha256(path)
            return _load_converted(_converted(digest, dtype, lambda: path), dtype, digest, source)
        folder = fetch.hub_folder(rest) if scheme == "hf" else pathlib.Path(rest).expanduser()
        return _load_folder(folder, dtype, source)
    except OSError as error:  # a full disk, a folder without permission
        raise InputError(
            f"{source}: {error.filename or 'a file'}", got=error.strerror or str(error), expected="to read or write it",
            fix="Check the path, its permissions and the free space (MOLORA_CACHE moves the cache).",
        ) from error  # fmt: skip


def _load_package(alias, dtype, source):
    if alias not in fetch.PACKAGES:
        fetch.package_file(alias)  # raises, with the names that exist
    digest = fetch.PACKAGES[alias].member_sha256
    return _load_converted(_converted(digest, dtype, lambda: fetch.package_file(alias)), dtype, digest, source)


def _load_converted(folder, dtype, digest, source):
    weights = folder / "model.safetensors"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(fetch.file_sha256, weights)  # hashlib releases the GIL
        base = _load_folder(folder, dtype, source, digest=digest)
        expected = tokenizer.read_json(folder / _NOTE).get("weights_sha256")
        if hashing.result() != expected:
            raise InputError(
                str(weights), got=f"sha256 {hashing.result()}", expected=f"{expected}, as it was written",
                fix=f"The cache is damaged: delete {folder} and start again.",
            )  # fmt: skip
    return base


def _load_folder(folder, dtype, source, *, digest=None):
    config, params = huggingface.read_folder(folder, _DTYPES[dtype])
    text = tokenizer.from_folder(folder)
    if text.vocab_size > config.vocab:
        raise InputError(
            f"{folder}: tokenizer", got=f"{text.vocab_size} tokens", expected=f"at most the model's {config.vocab}",
            fix="Use the tokenizer that belongs to these weights.",
        )  # fmt: skip
    if digest is None:
        files = huggingface.weight_files(folder)
        joined = "\n".join(f"{path.name} {fetch.remembered_sha256(path)}" for path in files)
        digest = hashlib.sha256(joined.encode()).hexdigest()
    return Base(config, params, text, digest, source)


def _converted(digest, dtype, gguf_path) -> pathlib.Path:
    """The converted folder, made if it is not there. `gguf_path()` gives the file only when it is needed."""
    root = fetch.cache_dir() / "converted"
    folder = root / f"{digest[:32]}-{dtype}-{_FORMAT}"
    if folder.exists():
        return folder
    path = gguf_path()
    root.mkdir(exist_ok=True)
    _sweep(root)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=".part-", dir=root))
    try:
        file = gguf.read(path)
        config = gguf_model.hf_config(file)
        sources = gguf_model.tensor_sources(file, families.from_hf(config, where=str(path)))
        huggingface.write_folder(temporary, config, sources, gguf_model.tokenizer(file), _DTYPES[dtype])
        note = {
            "source_sha256": digest, "source_name": path.name, "dtype": dtype,
            "weights_sha256": fetch.file_sha256(temporary / "model.safetensors"),
        }  # fmt: skip
        (temporary / _NOTE).write_text(json.dumps(note), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp's 0700 would lock out others who share the cache
        with contextlib.suppress(OSError):  # another process was first: its folder holds the same
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not folder.exists():
        raise InputError(str(folder), got="a folder that could not be renamed", expected="the converted model")
    return folder


def _sweep(root):
    """Removes what killed conversions left, once it is surely nobody's."""
    for left in root.glob(".part-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
