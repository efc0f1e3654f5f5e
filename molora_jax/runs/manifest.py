"""`manifest.json` of a checkpoint step: written last, so that its presence says that everything before it is there.

    {"format": 1, "step": 50, "samples": 400, "config": {...}, "packages": {"jax": "0.10.2", ...}, "best": false,
     "run": {...}, "identity": "<hash of run>",      (`molora_jax/runs/identity.py`; older steps have no run)
     "tree": {"adapters": {"ffn/000-003/gate/A": {"shape": [4, 8, 16, 576], "dtype": "float32", "digest": "<hex>"}}},
     "files": {"adapters/ffn.000-003.gate.A/c/0/0/0/0": [1179776, "<blake2b>"]},
     "checksum": "<blake2b of everything above>"}

`tree` describes the logical arrays (`molora_jax/io/digest.py`), whatever the mesh; `files` the bytes on disk, so that
damage is found and named without letting a parser loose on damaged files.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import stat

from molora_jax.errors import InputError
from molora_jax.io.files import write_atomically
from molora_jax.runs.manifest_form import malformed

FORMAT = 1
NAME = "manifest.json"
PACKAGES = ("molora_jax", "jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint")
DAMAGED = "Delete the step's folder: an older step will be used."


def build(step: int, *, meta: dict, tree: dict, files: dict) -> dict:
    """The manifest as a dict. `meta` holds samples, config, identity and whatever else the caller wants to keep."""
    clash = sorted({"format", "step", "packages", "tree", "files", "checksum"} & set(meta))
    if clash:
        raise ValueError(f"meta may not hold the manifest's own fields {clash}")
    meta = {"samples": None, "config": None, "identity": None, **meta}
    body = dict(format=FORMAT, step=step, **meta, packages=package_versions(), tree=tree, files=files)
    body = json.loads(json.dumps(body))  # what will be read back: tuples are lists, keys are strings
    return body | {"checksum": json_hash(body)}


def write(folder, manifest: dict):
    write_atomically(pathlib.Path(folder) / NAME, json.dumps(manifest, indent=1))


def read_manifest(path) -> dict:
    """The manifest of a step's folder (or of the file itself).

    Raises InputError where it is absent, unreadable, of another format, or not what was written.
    """
    path = pathlib.Path(path)
    path = path / NAME if path.is_dir() else path
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(path), got="no such file", expected="the manifest of a whole step", fix=DAMAGED) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(path), got=f"{error}", expected="JSON", fix=DAMAGED) from None
    if not isinstance(manifest, dict):
        raise InputError(str(path), got=type(manifest).__name__, expected="a JSON object", fix=DAMAGED)
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    if manifest.get("checksum") != json_hash(body):
        raise InputError(str(path), got="a checksum that does not hold", expected="the text as written", fix=DAMAGED)
    if manifest.get("format") != FORMAT:
        raise InputError(
            str(path), got=f"format {manifest.get('format')!r:.80}", expected=f"format {FORMAT}",
            fix="Update molora_jax.",
        )  # fmt: skip
    wrong = malformed(manifest)
    if wrong:
        raise InputError(str(path), got=wrong, expected="a manifest as launch.train writes it", fix=DAMAGED)
    return manifest


def describe_files(folder) -> dict[str, list]:
    """`{relative path: [bytes, blake2b]}` of every file below `folder`, the manifest aside."""
    folder = pathlib.Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != NAME)
    return {p.relative_to(folder).as_posix(): [p.stat().st_size, _hash_file(p)] for p in paths}


def damaged_file(folder, files: dict[str, list]) -> str:
    """What is wrong with the first file that is not as described; "" where all are. Other files are ignored."""
    root = pathlib.Path(folder).resolve()
    for relative, (size, digest) in files.items():
        path = pathlib.Path(folder) / relative
        try:
            if not path.resolve().is_relative_to(root):
                return f"{relative} leads out of the step's folder"
            if not stat.S_ISREG(path.stat().st_mode):
                return f"{relative} is no regular file"
            found = path.stat().st_size
            if found != size:
                return f"{relative} has {found} bytes, not {size}"
            if _hash_file(path) != digest:
                return f"the content of {relative} has changed"
        except FileNotFoundError:
            return f"{relative} is missing"
        except (OSError, RuntimeError) as error:  # RuntimeError: a ring of links
            return f"{relative} cannot be read: {error}"
    return ""


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "source"
    return versions


def json_hash(value) -> str:
    """blake2b (32 hex digits) of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _hash_file(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
