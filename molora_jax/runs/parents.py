"""The runs that a run was made from, in its steps' manifests:

    "parents": [{"path": "/runs/a", "step": 50, "digest": "<32 hex digits>"}, ...]

The digest is of what was read: base, rules, and the content of adapters, router state and modules; not of optimizer
state, packages or paths. No jax.
"""

import pathlib

from molora_jax.errors import InputError
from molora_jax.runs import identity
from molora_jax.runs.manifest import json_hash, read_manifest

ITEMS = ("adapters", "router_state", "modules")


def digest_of(manifest: dict, base_digest: str | None) -> str:
    """Of a step, from its manifest."""
    config = manifest.get("config") or {}
    tree = {item: leaves for item, leaves in manifest["tree"].items() if item in ITEMS}
    return json_hash({"base": base_digest, "method": config.get("method"), "tree": tree})


def base_digest(folder, manifest: dict) -> str | None:
    """That of the base of a step, as its manifest (or an older run's identity.json) tells it."""
    run = manifest.get("run") or identity.read(pathlib.Path(folder) / "identity.json") or {}
    return run["base"].get("digest") if isinstance(run.get("base"), dict) else None


def entry(folder, step: int, digest: str) -> dict:
    return {"path": str(pathlib.Path(folder).expanduser().resolve()), "step": step, "digest": digest}


def changed(manifest: dict) -> list[str]:
    """A line for each parent that is gone, or is not what it was; the run itself needs none of them."""
    lines = []
    for parent in manifest.get("parents") or ():
        name, folder = f"parent {parent['path']}@{parent['step']}", pathlib.Path(parent["path"])
        try:
            now = read_manifest(folder / "checkpoints" / str(parent["step"]))
            found = digest_of(now, base_digest(folder, now))
        except InputError as error:
            gone = not (folder / "checkpoints" / str(parent["step"])).exists()
            lines.append(f"{name} is {'gone' if gone else f'damaged: {error}'}")
            continue
        if found != parent["digest"]:
            lines.append(f"{name} has changed: digest {found}, was {parent['digest']} when this run was made from it")
    return lines
