"""The chatterbot corpus, read for `topic` and `dialog`.

Files: `chatterbot_corpus/data/english/*.yml` (21; chatterbot-corpus, BSD-3): `categories: [name, ...]` and
`conversations`, a list of lists of turns. A few conversations are a bare string by mistake; they are left out.
"""

import functools
import importlib.util

from molora_jax.data.packages import package_files
from molora_jax.errors import InputError

DISTRIBUTION = "chatterbot-corpus"
MOST_CHARACTERS = 200


def files(task: str):
    found = package_files(
        task, distribution=DISTRIBUTION, package="chatterbot_corpus", patterns=("data/english/*.yml",)
    )
    if importlib.util.find_spec("yaml") is None:
        raise InputError(
            f"data.tasks, task {task!r}",
            got="no package 'pyyaml'",
            expected="it to be installed",
            fix="Install it with `pip install 'molora_jax[data]'`, or take the task out of `data.tasks`.",
        )
    return found


def read(files):
    """(category, turns) of every conversation of at least one turn."""
    for _, path in files:
        yield from _read(path)


@functools.lru_cache(maxsize=64)  # two tasks read the same files
def _read(path):
    import yaml

    # The C loader is the same safe loader, 20 times faster.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    category = str(content["categories"][0])
    talks = []
    for conversation in content["conversations"]:
        turns = [" ".join(str(turn).split()) for turn in conversation] if isinstance(conversation, list) else []
        if turns and all(turns):
            talks.append((category, turns))
    return talks
