"""From an entry of `data.tasks` to examples: one `Read` a task. A file holds as many tasks as its rows name."""

import collections
import dataclasses
import functools
import hashlib
import itertools

from molora_jax.config.resolve import file_of
from molora_jax.data import cache, jsonl, packages, pairs, parquet
from molora_jax.data.example import Example, distinct, unrepeated
from molora_jax.data.options import Options
from molora_jax.data.rows import to_example
from molora_jax.data.sources import SOURCES, find
from molora_jax.data.spilled import Spilled
from molora_jax.errors import InputError

MOST_TASKS = 1_000  # of a file: more are ids of rows, not tasks
LARGE_ROWS = 200_000  # of a parquet file: from here on its rows are not held in memory
BLOCK = 20_000  # examples of such a file that become ids together
SPLIT_KEY = "jsonl"  # the splits of a file depend on its rows, not on its name


@dataclasses.dataclass
class Read:
    """The examples of one task, sorted and without repeats.

    name: "" for the file's stem. split_key: of `split_of`. path: of the file, "" for a package.
    dropped: why rows were left out -> how many. unused: what of the rows that are kept has no use -> in how many.
    fields: the file's names of `data.fields` that were found.
    """

    name: str
    split_key: str
    examples: list[Example] | Spilled
    path: str = ""
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    fields: set[str] = dataclasses.field(default_factory=set)
    first_error: InputError | None = None

    def blocks(self):
        """The examples as `Read`s with a list each, in order and without repeats, which share what is counted."""
        if not isinstance(self.examples, Spilled):
            yield self
            return
        examples = unrepeated(iter(self.examples), several_answers=True)
        kept = 0
        while block := list(itertools.islice(examples, BLOCK)):
            kept += len(block)
            part = dataclasses.replace(self, examples=block)
            yield part
            self.first_error = self.first_error or part.first_error
        self.dropped["repeats"] += self.examples.count - kept

    @property
    def has_some(self) -> bool:
        return bool(self.examples.count if isinstance(self.examples, Spilled) else self.examples)

    @property
    def labels(self) -> list[str]:
        """The classes of labelled texts."""
        own = self.examples
        return sorted(own.labels if isinstance(own, Spilled) else {example.target for example in own})

    def leave_out(self, refused, *, bad_rows: str, died: int = 0):
        """Takes out examples that no template or tokenizer takes.

        Args:
          refused: (example, why) pairs; `why` has `got`, `expected` and `fix`.
          died: of how many rows the template died, if that was too many: those that were not tried, refused too, are
            no bad rows.

        Raises:
          InputError: the first one, unless `bad_rows="skip"` (rows of a package are never skipped); one that the
            template died of, where those were too many.
        """
        if not refused:
            return
        tried = [pair for pair in refused if not died or getattr(pair[1], "died", False)]
        example, why = min(tried, key=lambda pair: pair[0].row)
        where = f"{self.path}, row {example.row}" if self.path else f"data.tasks, task {self.name!r}"
        skip = 'Correct the row, or set `data.bad_rows="skip"`.'
        if why.fix:
            skip = why.fix if "bad_rows" in why.fix else f'{why.fix} `data.bad_rows="skip"` leaves such rows out.'
        fix = skip if self.path else f"{why.fix} The item: {example.prompt!r:.80}".strip()
        error = InputError(where, got=why.got, expected=why.expected, fix=fix)
        if bad_rows == "error" or not self.path:
            raise error
        if died:
            got = f"one of {died} rows that stop the chat template ({why.got})"
            fix = "Take such rows out: each takes many seconds."
            raise InputError(where, got=got, expected=f"fewer than {died}, to skip them", fix=fix)
        self.first_error = self.first_error or error
        self.dropped["bad rows"] += len(refused)
        out = {id(example) for example, _ in refused}
        self.examples = [example for example in self.examples if id(example) not in out]

    def none_left(self) -> InputError:
        got = f"{self.dropped['bad rows']} bad rows and no good one"
        return InputError(self.path, got=got, expected="at least one good row", fix=f"First: {self.first_error}")


def source(entry: str, options: Options, *, field: str = "data.tasks"):
    """(what the examples depend on, as text; a function that reads them)."""
    path = file_of(entry)
    if path:
        where = f"{field}, {entry}"
        file = jsonl.found(path, where=where, field=field)
        kind = "parquet" if entry.startswith("parquet:") else path.lower().endswith(".json")
        if kind == "parquet":
            opened = parquet.opened(file, where=where)
            rows, large = functools.partial(parquet.rows, opened, path=path), opened.metadata.num_rows > LARGE_ROWS
        else:
            rows, large = functools.partial(jsonl.stream, file, where=where), jsonl.is_large(file)
        if large or kind == "parquet":
            with open(file, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        else:
            raw = jsonl.content(file, where=where)
            digest, rows = hashlib.sha256(raw).hexdigest(), functools.partial(jsonl.rows, raw, path=path)
        depends = f"{digest} {options.reading!r} {kind}"
        return depends, lambda: _read_file(rows(), path=path, options=options, large=large)
    files = find(entry).files()
    depends = f"{packages.digest_files(files)} {identity(entry)} {options.reads}"
    return depends, functools.partial(_read_package, entry, files, options.reads)


def identity(entry: str) -> str:
    """What the examples of a task depend on beside files: code and package versions."""
    module = find(entry)
    more = getattr(module, "identity", str)()
    return f"{entry} {module.FILTERS} {module.DISTRIBUTION} {packages.version(module.DISTRIBUTION)} {more}".strip()


def several_answers(entry: str) -> bool:
    return getattr(find(entry), "SEVERAL_ANSWERS", False)


def verifier(entry: str):
    """See `DataSet.verifier`."""
    return None if file_of(entry) else getattr(find(entry), "verify", None)


def stem(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _read_package(entry: str, files, reads: str) -> list[Read]:
    module = find(entry)
    try:
        examples, problem = distinct(module.examples(files), several_answers=several_answers(entry)), "no example"
    except InputError:  # the source says itself what is missing
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:  # files of another format
        examples, problem = [], f"{type(error).__name__}: {error}"
    if not examples:
        raise InputError(
            f"data.tasks, task {entry!r}",
            got=f"{problem} in the files of {module.DISTRIBUTION} {packages.version(module.DISTRIBUTION)}",
            expected="the file format of the pinned version",
            fix=getattr(module, "FIX", "Install the pinned versions: `pip install 'molora_jax[data]'`."),
        )
    if reads == "label" and any(example.choices is None for example in examples):
        names = ", ".join(name for name, module in SOURCES.items() if hasattr(module, "LABELS"))
        raise InputError(
            f"data.tasks, task {entry!r}", got="answers that are no classes",
            expected=f"{names}, or a file of text, label", fix="Choose another task, or another objective.",
        )  # fmt: skip
    if reads == "pair":
        examples = pairs.of_task(entry, examples)
    return [Read(entry, entry, examples)]


def _read_file(rows, *, path: str, options: Options, large: bool = False) -> list[Read]:
    """One `Read` for each name in the rows' `task`; rows without one have the file's stem ("" here).

    Args:
      rows: of `jsonl.rows`. large: their examples are sorted on disk.

    Raises:
      InputError: a bad row under `bad_rows="error"`, or no row to train on at all.
    """
    found, bad, first_error, names, told = {}, collections.Counter(), None, set(), set()
    together = large and not options.file_tasks  # one sequence on disk, whatever the names
    for number, row in rows:
        try:
            if isinstance(row, jsonl.BadRow):
                raise row
            names.update(options.names.keys() & row.keys())
            example, unused = to_example(row, number, options)
        except jsonl.BadRow as error:
            first_error = first_error or error.at(path, number)
            if options.bad_rows == "error":
                raise first_error from None
            task = row.get("task") if isinstance(row, dict) else ""
            bad[task if isinstance(task, str) else ""] += 1
            continue
        name = row.get("task") or "" if example is None else example.task
        told.add(name)
        name = "" if together else name
        if name not in found:
            if len(found) > MOST_TASKS and large:
                raise _too_many_tasks(len(found), path, "more than ")
            found[name] = Read(name, SPLIT_KEY, Spilled(cache.place()) if large else [], path)
        read = found[name]
        read.unused.update(f"field {field!r}" for field in unused)
        if example is None:
            read.dropped["weight 0"] += 1
        elif example.tie:
            read.dropped["ties"] += 1
        elif large:
            read.examples.add(example, label=options.reads == "label")
        else:
            read.examples.append(example)
    if together and len(told) == 1 and found:
        found = {name: dataclasses.replace(found[""], name=name) for name in told}
    kept = {name: read for name, read in found.items() if read.has_some}
    if not kept:
        weightless, ties = (sum(read.dropped[why] for read in found.values()) for why in ("weight 0", "ties"))
        reasons = [f"{bad.total()} bad rows"] * bool(bad or not found)
        reasons += [f"{weightless} rows of weight 0"] * bool(found and (weightless or not ties))
        reasons += [f"{ties} rows whose answers are the same"] * bool(ties)
        reasons = ", ".join(reasons)
        fix = f"First: {first_error}" if first_error else "Give a weight of 1 to an answer, or leave the file out."
        raise InputError(path, got=f"{reasons} and no good one", expected="at least one good row", fix=fix)
    if not large and not options.file_tasks and len(kept) > 1:
        kept = {"": _together(kept.values(), path)}
    if len(kept) > MOST_TASKS:
        raise _too_many_tasks(len(kept), path)
    main = next(iter(kept.values()))
    for read in found.values():  # a task without a row to train on: its counts go to the file's first
        if not read.has_some:
            main.dropped.update(read.dropped)
            main.unused.update(read.unused)
    for name, count in bad.items():
        kept.get(name, main).dropped["bad rows"] += count
    for read in kept.values():
        if large:
            read.fields = names
            continue
        examples = distinct(read.examples, several_answers=True)
        read.dropped["repeats"] += len(read.examples) - len(examples)
        read.examples, read.fields = examples, names
    return list(kept.values())


def _too_many_tasks(count: int, path: str, more: str = "") -> InputError:
    return InputError(
        path, got=f"rows that name {more}{count:,} tasks", expected=f"at most {MOST_TASKS:,} tasks in a file",
        fix="Leave the names out with data.fields=drop=task, or take all rows as one with data.file_tasks=False.",
    )  # fmt: skip


def _together(reads, path: str) -> Read:
    whole = Read("", SPLIT_KEY, [], path)
    for read in reads:
        whole.examples += read.examples
        whole.dropped.update(read.dropped)
        whole.unused.update(read.unused)
    whole.examples.sort(key=lambda example: example.row)
    return whole
