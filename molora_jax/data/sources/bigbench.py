"""`bb:NAME`: a JSON task of BIG-bench (arXiv 2206.04615): `bb:social_iqa`, `bb:goal_step_wikihow/goal_inference`.

Opt-in: `MOLORA_BIGBENCH` names the sdist (358 MB; `HOW` below) or a folder `benchmark_tasks` of it. The archive
is read as data, none of its code runs; what is asked for is kept in the cache, a file whole. Examples with
`target_scores` are multiple choices, asked as BIG-bench does (a line for each choice); of others the first target is
the answer.

Each file has a canary: BIG-bench asks that its text appears in no training corpus. It stays in every cached copy here
(in the group of each row); a model tuned on a task has no zero-shot score on it. Licences of the data sets inside
differ.
"""

import json
import os
import pathlib
import tarfile

from molora_jax.data import cache
from molora_jax.data.example import Example
from molora_jax.errors import InputError
from molora_jax.io.files import write_atomically

HOW = "pip download --no-deps --no-binary bigbench bigbench==1.0.0, and MOLORA_BIGBENCH=bigbench-1.0.0.tar.gz"
INSIDE = "bigbench-1.0.0/bigbench/benchmark_tasks"


class Task:
    DISTRIBUTION = ""
    FILTERS = 1
    FIX = f"Take the files of BIG-bench: {HOW}."

    def __init__(self, name: str):
        self.name = name

    def files(self):
        """`[(name inside the benchmark, path)]`.

        Raises:
          InputError: no such archive or folder, or no such task in it.
        """
        name, where = f"{self.name}/task.json", f"data.tasks, task 'bb:{self.name}'"
        kept, root = cache.folder().parent / "bigbench" / name, os.environ.get("MOLORA_BIGBENCH", "")
        if not root and kept.is_file():
            return [(name, kept)]
        if not root:
            raise InputError(where, got="no BIG-bench", expected="its files", fix=self.FIX)
        root = pathlib.Path(root).expanduser()
        try:
            path = root / name if root.is_dir() else _unpacked(root, name, kept)
            if not path.is_file():
                raise KeyError(name)
        except (KeyError, OSError, tarfile.TarError) as error:
            got = f"no {name} in {root}" if isinstance(error, KeyError) else f"{root}: {error}"
            fix = "Name a task with a task.json (of one with subtasks: TASK/SUBTASK)."
            raise InputError(
                where, got=got, expected="BIG-bench's sdist, or its folder benchmark_tasks", fix=fix
            ) from None
        return [(name, path)]

    def examples(self, files):
        content = json.loads(pathlib.Path(files[0][1]).read_text(encoding="utf-8"))
        canary, before, name = content["canary"], content.get("task_prefix", ""), f"bb:{self.name}"
        for item in content["examples"]:
            asked, scores = before + item["input"], item.get("target_scores")
            group = f"{item['input']}\n{canary}"
            if scores:
                best = max(scores.values())
                asked += "".join(f"\n  choice: {choice}" for choice in scores)
                target = next(choice for choice, score in scores.items() if score == best)
                many = len({choice.strip() for choice in scores}) > 1 and all(choice.strip() for choice in scores)
                yield Example(name, asked, target, group, offered=tuple(scores) if many else None)
            else:
                target = item["target"] if isinstance(item["target"], str) else item["target"][0]
                if target.strip():
                    yield Example(name, asked, target, group)


def _unpacked(archive: pathlib.Path, name: str, kept: pathlib.Path) -> pathlib.Path:
    """One file of the archive, in the cache."""
    if not kept.is_file():
        with tarfile.open(archive, "r|*") as members:
            inside = next((member for member in members if member.name == f"{INSIDE}/{name}" and member.isfile()), None)
            if inside is None:
                raise KeyError(name)
            content = members.extractfile(inside).read()
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, content.decode())
    return kept
