"""`jsonl:PATH`: a user's own examples, one JSON object a line.

Either `{"prompt": "...", "target": "...", "task": "..."}` (task optional) or the chat form `{"messages": [{"role":
"user", "content": "..."}, ..., {"role": "assistant", "content": "..."}]}`: the last turn is the answer, the rest the
context; a first turn of role `system` is allowed. Empty lines are no rows. Everything else that is not such an object
is a bad row: an error that names file and row (counted from 1), or skipped and counted, as `data.bad_rows` says.
"""

import dataclasses
import json
import pathlib

from molora_jax.data.example import Example
from molora_jax.errors import InputError

SPLIT_KEY = "jsonl"  # the splits depend on the rows, not on the file's name
ROLES = ("system", "user", "assistant")


def content(path: str) -> bytes:
    """The file's bytes.

    Raises:
      InputError: there is no such file, or it is empty.
    """
    where = f"data.tasks, jsonl:{path}"
    try:
        raw = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(where, got=reason, expected="a readable file", fix="Correct the path.") from error
    if not raw.strip():
        raise InputError(where, got="an empty file", expected="one JSON object a line", fix="Add rows, or drop it.")
    return raw


def parse(raw: bytes, *, path: str, bad_rows: str) -> tuple[str, list[Example], int]:
    """(task name, examples in file order, number of bad rows).

    The name is the `task` value if every row carries the same one, else the file's stem.

    Raises:
      InputError: a bad row under `bad_rows="error"`, or no good row at all.
    """
    examples, bad, first_error = [], 0, None
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(dataclasses.replace(_row(line, last=number == len(lines)), row=number))
        except _BadRow as error:
            first_error = first_error or InputError(
                f"{path}, row {number}", got=error.got, expected=error.expected, fix=error.fix
            )
            bad += 1
            if bad_rows == "error":
                raise first_error from None
    if not examples:
        raise InputError(
            path, got=f"{bad} bad rows and no good one", expected="at least one good row", fix=f"First: {first_error}"
        )
    names = {example.task for example in examples}
    name = names.pop() if len(names) == 1 else ""
    return name or pathlib.Path(path).stem, examples, bad


class _BadRow(Exception):
    def __init__(self, got: str, expected: str, fix: str = 'Correct the row, or set `data.bad_rows="skip"`.'):
        self.got, self.expected, self.fix = got, expected, fix


def _row(line: bytes, *, last: bool) -> Example:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"a byte 0x{line[error.start]:02x} at position {error.start} that is not UTF-8"
        raise _BadRow(got, "UTF-8 text") from None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        got = f"invalid JSON ({getattr(error, 'msg', None) or error}) in {_shown(text.strip())}"
        if last and not str(error).startswith("Extra data"):  # no newline after it
            raise _BadRow(got, "a whole JSON object", "The last line looks cut off: write the file again.") from None
        raise _BadRow(got, "one JSON object") from None
    if not isinstance(row, dict):
        raise _BadRow(f"a JSON {_kind(row)}", "a JSON object")
    task = row.get("task", "")
    if not isinstance(task, str):
        raise _BadRow(f"task of type {_kind(task)}", "a string")
    if "messages" in row:
        messages = _messages(row["messages"])
        *context, (_, target) = messages
        simple = len(context) == 1
        prompt = context[0][1] if simple else "\n".join(f"{role}: {words}" for role, words in context)
        turns = tuple({"role": role, "content": words} for role, words in messages)
        return Example(task, prompt, target, prompt, turns=None if simple else turns)
    prompt, target = (_text(row, field) for field in ("prompt", "target"))
    return Example(task, prompt, target, prompt)


def _messages(turns) -> list[tuple[str, str]]:
    if not isinstance(turns, list):
        raise _BadRow(f"messages of type {_kind(turns)}", 'a list of {"role": ..., "content": ...}')
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise _BadRow(f"messages[{i}] of type {_kind(turn)}", '{"role": ..., "content": ...}')
        role = turn.get("role")
        if role not in ROLES or (role == "system" and i > 0):
            raise _BadRow(f"messages[{i}].role {_shown(role)}", "user or assistant, or system in the first turn")
        messages.append((role, _text(turn, "content", f"messages[{i}].")))
    roles = [role for role, _ in messages]
    if not roles or roles[-1] != "assistant" or "user" not in roles:
        raise _BadRow(f"messages with roles {roles}", "at least one user turn, and the answer (assistant) last")
    return messages


def _text(row: dict, field: str, prefix: str = "") -> str:
    if field not in row:
        raise _BadRow(
            f"no field {prefix + field!r} (fields: {', '.join(map(repr, row)) or 'none'})",
            "fields prompt and target, or messages" if not prefix else "role and content",
        )
    text = row[field]
    if not isinstance(text, str):
        raise _BadRow(f"{prefix}{field} of type {_kind(text)}", "a string")
    if not text.strip():
        raise _BadRow(f"an empty {prefix}{field}", "some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow(f"{prefix}{field} with half of a surrogate pair", "valid Unicode text") from None
    return text


def _kind(value) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _shown(value) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 60 else text[:57] + "...")
