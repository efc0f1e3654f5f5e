"""Where the files of an installed data package lie, without importing the package.

Packages are read as data: their Python code never runs (a top-level `find_spec` does not execute it).
"""

import hashlib
import importlib.metadata
import importlib.util
import pathlib

from molora_jax.errors import InputError


def package_files(task: str, *, distribution: str, package: str, patterns: tuple[str, ...]):
    """`[(name inside the package, path)]`, sorted by name, of every file that matches one of `patterns`.

    Raises:
      InputError: the package is not installed, or holds no such file.
    """
    fix = "Install it with `pip install 'molora_jax[data]'`, or take the task out of `data.tasks`."
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"data.tasks, task {task!r}", got=f"no package {distribution!r}", expected="it to be installed", fix=fix
        )
    root = pathlib.Path(list(spec.submodule_search_locations)[0])
    found = {path.relative_to(root).as_posix(): path for p in patterns for path in root.glob(p) if path.is_file()}
    if not found:
        raise InputError(
            f"data.tasks, task {task!r}",
            got=f"package {distribution!r} {version(distribution)} without {patterns[0]}",
            expected="a version that ships that file",
            fix=fix,
        )
    return sorted(found.items())


def version(distribution: str) -> str:
    """The installed version; "" for no distribution (a source without a package)."""
    if not distribution:
        return ""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def digest_files(files) -> str:
    """Hex digest of the names inside the package and the contents; where the package lies does not matter."""
    total = hashlib.sha256()
    for name, path in files:
        content = path.read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()
