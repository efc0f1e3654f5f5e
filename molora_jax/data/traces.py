"""Which parts of a row leave no trace in what the chat template writes.

A template ignores what it does not know: a field `reasoning_content`, the tools, a role. So the one text that it
renders of a row is searched for pieces of each kind of part (the tools; the content of a role; a further field of a
turn). A piece is a run of words and spaces of its texts: JSON, HTML and white space leave it as it is. Nothing is
rendered for this. A part is taken as written where any piece is found: a text of a letter or two may be so by chance.
"""

import json
import re

from molora_jax.data.jsonl import BadRow
from molora_jax.errors import InputError

ANSWER, CONTEXT, CONTENT, TOOLS = "answer", "context", "content", "tools"
PIECES = 16  # of a part: so many first, last and longest ones
KINDS = 64  # of parts of a row that are looked for
_ROLES = frozenset("system developer user assistant tool function model".split())  # headers write these too


def untraced(turns: list[dict], tools, text: str, answers: dict[int, tuple[int, int]]) -> tuple[tuple[str, str], ...]:
    """The parts `(place, name)` of a conversation of which `text` has nothing: (content, role | answer), (context |
    answer, field), (tools, "").

    Args:
      text: what the template renders of the turns and the tools.
      answers: of each turn that is trained on, the characters `[begin, stop)` that are rendered of it. Its parts have
        to stand there; those of the other turns, the context, anywhere.
    """
    context: dict = {(TOOLS, ""): [tools]} if tools else {}
    owned = {i: {} for i in answers}
    for i, turn in enumerate(turns):
        for name, value in turn.items():
            if value and name != "role":
                if i in answers:
                    owned[i][(CONTENT, ANSWER) if name == "content" else (ANSWER, name)] = _joined([value])
                else:
                    context.setdefault((CONTENT, turn["role"]) if name == "content" else (CONTEXT, name), []).append(
                        value
                    )
    whole = text.casefold()
    context = {part: _joined(values) for part, values in context.items()}
    answered = [string for own in owned.values() for string in own.values()]
    missing = {}
    for part, own in list(context.items())[:KINDS]:
        pieces = _pieces(own)
        if part[0] == CONTEXT:  # a call's name, say, stands in the tools as well: it must be there once more
            others = [*answered, *(string for other, string in context.items() if other != part)]
            times = lambda piece: sum(string.count(piece) for string in others)  # noqa: B023, E731
            pieces = [piece for piece in pieces if whole.count(piece) > times(piece) or piece not in whole]
        if not _written(pieces, whole):
            missing[part] = True
    for i, (begin, stop) in answers.items():
        place = text[begin:stop].casefold()
        missing |= {part: True for part, own in list(owned[i].items())[:KINDS] if not _written(_pieces(own), place)}
    return tuple(missing)


def _joined(values) -> str:
    return "\n".join(_leaves(values)).casefold()


def _written(pieces: list[str], place: str) -> bool:
    """Whether any piece stands there, as it is or as JSON escapes it."""
    escaped = [json.dumps(piece)[1:-1] for piece in pieces if not piece.isascii()]
    return any(piece in place for piece in (*pieces, *escaped))


def _leaves(values) -> list[str]:
    """The texts inside a JSON value, in order, without the names of an object; numbers as JSON."""
    out, left = [], [values]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += reversed(value.values() or value.keys())
        elif isinstance(value, (list, tuple)):
            left += reversed(value)
        elif value is not None:
            out.append(value if isinstance(value, str) else json.dumps(value))
    return out


def _pieces(text: str) -> list[str]:
    runs = [run.strip() for run in re.findall(r"\w[\w ]*", text)] or [text.strip()]
    runs = [run for run in runs if run not in _ROLES] or runs
    return list(dict.fromkeys([*runs[:PIECES], *runs[-PIECES:], *sorted(runs, key=len)[-PIECES:]]))


def drop_untraced(read, encoded: list, *, system: str, bad_rows: str) -> list:
    """Rows whose answers, tools or turns the template does not write are bad; what it drops of a context is counted.

    Args:
      read: a `Read`. encoded: `Ids` or refusals of its examples, in order.

    Returns:
      Those of `encoded` that are kept, as the examples of `read` are.

    Raises:
      InputError: a bad row under `bad_rows="error"`; `data.system` for a template that writes no system turn.
    """
    refused, kept = [], []
    for example, result in zip(read.examples, encoded, strict=True):
        missing = getattr(result, "untraced", ())
        if system and (CONTENT, "system") in missing and example.conversation()[0]["role"] != "system":
            raise _no_system(system)
        lost = sorted(part for part in missing if part[0] != CONTEXT)
        if lost:
            refused.append((example, _bad(*lost[0])))
            continue
        kept.append(result)
        read.unused.update(f"{name!r} of a turn" for _, name in missing)
    read.leave_out(refused, bad_rows=bad_rows)
    return kept


def check_prompt(turns: list[dict], tools, text: str, *, system: str) -> list[str]:
    """The fields of turns that are gone from `text`, what the template renders to ask for an answer to them.

    Args:
      turns: `data.system` in front, if they have no system turn of their own. system: `data.system`, if it is.

    Raises:
      InputError: the tools or a turn's content are gone; a row of data is refused for it too.
    """
    plain = len(turns) == 1 and turns[0].keys() == {"role", "content"} and not tools
    missing = () if plain else untraced(turns, tools, text, {})  # as of rows: the one text is not looked for
    if system and (CONTENT, "system") in missing:
        raise _no_system(system)
    for place, name in missing:
        if place != CONTEXT:
            bad = _bad(place, name)
            fix = "Leave it out, or take a model whose template writes it."
            raise InputError("tools" if place == TOOLS else "prompt", got=bad.got, expected=bad.expected, fix=fix)
    return [name for _, name in missing]


def _no_system(system: str) -> InputError:
    return InputError(
        "data.system", got=f"{system!r:.60}, of which the chat template writes nothing", expected='""',
        fix="Leave it out, or take a model whose template writes it.",
    )  # fmt: skip


def _bad(place, name) -> BadRow:
    what = {TOOLS: "tools", CONTENT: f"a turn of role {name!r}"}.get(place, f"{name!r} of the answer")
    what = "an answer" if (place, name) == (CONTENT, ANSWER) else what
    fix = "Take it out of the row, or take a model whose template writes it."
    if place == ANSWER or name == ANSWER:
        fix += " An answer that is not trained on (data.train_on, weight) may have it."
    return BadRow(f"{what}, of which the chat template writes nothing", "what the model's template writes", fix)
