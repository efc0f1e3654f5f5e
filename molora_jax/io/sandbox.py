"""The sandbox base: a decoder of a few million parameters that this repository pretrains (`experiments/sandbox`).

`sandbox_bases/digests.json` pins every file of it by sha256. It is looked for beside this file, then in the cache,
where `python -m experiments.sandbox` puts what it made.
"""

import json
import pathlib

from molora_jax.errors import InputError
from molora_jax.io import fetch

HERE = pathlib.Path(__file__).parent / "sandbox_bases"
PINNED = HERE / "digests.json"
WEIGHTS = "model.safetensors"


def folder(name: str) -> pathlib.Path:
    """The Hugging Face folder of `sandbox:NAME`, every file of it as it was pinned.

    Raises:
      InputError: an unknown name; a base that was never made here; a file of another content.
    """
    pinned = json.loads(PINNED.read_text(encoding="utf-8"))
    if name not in pinned:
        raise InputError(f"sandbox:{name}", got="an unknown name", expected=f"one of {', '.join(sorted(pinned))}")
    files = pinned[name]
    for place in (HERE / name, cached(name, files[WEIGHTS])):
        if not all((place / file).is_file() for file in files):
            continue
        for file, digest in files.items():
            got = fetch.remembered_sha256(place / file)
            if got != digest:
                raise InputError(
                    str(place / file), got=f"sha256 {got}", expected=f"{digest}, as it was pinned",
                    fix="Take the file from the repository again, or name your own base as dir:PATH.",
                )  # fmt: skip
        return place
    raise InputError(
        f"sandbox:{name}", got=f"no such base in {HERE / name}, and none in the cache",
        expected="the folder that ships with the repository", fix="Make it: python -m experiments.sandbox",
    )  # fmt: skip


def cached(name: str, digest: str) -> pathlib.Path:
    """Where a base of that digest lies in the cache."""
    return fetch.cache_dir() / "sandbox" / f"{name}-{digest[:32]}"
