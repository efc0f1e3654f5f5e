"""Which parts of a row leave no trace in what the chat template writes.

A template ignores what it does not know: a field `reasoning_content`, the tools, a role. So for each kind of part (the
tools; the content of a role; a further field of a turn, of the answer apart) one row that has it is rendered twice,
with the part and without it (with more text in the content). Equal texts mean that the template drops it.
"""

from molora_jax.config_resolve import resolve_template_args
from molora_jax.data.example import Example
from molora_jax.data.jsonl import BadRow
from molora_jax.data.options import Options
from molora_jax.data.read import Read
from molora_jax.errors import InputError

MOST_TRIED = 100  # rows that the template refuses, before no other one is tried
ANSWER, CONTEXT, CONTENT, TOOLS = "answer", "context", "content", "tools"


def drop_untraced(read: Read, tokenizer, options: Options):
    """Rows whose answer, tools or turns the template does not write are bad; what it drops of a context is counted.

    Raises:
      InputError: a bad row under `bad_rows="error"`; `data.system` for a template that writes no system turn.
    """
    args = resolve_template_args(options.template_args)

    def render(turns, tools):
        request = dict(args, messages=turns, add_generation_prompt=False, tools=list(tools) if tools else None)
        return tokenizer.render([dict(request, documents=None)])[0].get("text")

    if options.system:
        _check_system(read, options.system, render)
    special = [example for example in read.examples if example.turns or example.tools]
    dropped = untraced(special, render)
    if not dropped:
        return
    refused = []
    for example in read.examples:
        found = dropped.intersection(parts(example)) if example.turns or example.tools else set()
        lost = sorted(part for part in found if part[0] != CONTEXT)
        if lost:
            place, name = lost[0]
            what = {TOOLS: "tools", CONTENT: f"a turn of role {name!r}"}.get(place, f"{name!r} of the answer")
            fix = "Take it out of the row, or take a model whose template writes it."
            error = BadRow(
                f"{what}, of which the chat template writes nothing", "what the model's template writes", fix
            )
            refused.append((example, error))
        else:
            read.unused.update(f"{name!r} of a turn" for _, name in found)
    read.leave_out(refused, bad_rows=options.bad_rows)


def _check_system(read: Read, system: str, render):
    """The first conversation without a system turn that the template takes tells whether it writes one."""
    for example in read.examples:
        turns = example.conversation()
        if turns[0]["role"] in ("system", "developer"):
            continue
        texts = [render([dict(role="system", content=s), *turns], example.tools) for s in (system, system + " trace")]
        if texts[0] is not None:
            if texts[0] == texts[1]:
                raise InputError(
                    "data.system", got=f"{system!r:.60}, of which the chat template writes nothing", expected='""',
                    fix="Leave it out, or take a model whose template writes it.",
                )  # fmt: skip
            return


def parts(example: Example) -> list[tuple[str, str]]:
    """`[(place, name)]`: (content, role), (context | answer, field), (tools, "")."""
    found = [(TOOLS, "")] if example.tools else []
    for i, turn in enumerate(example.turns or ()):
        last = i == len(example.turns) - 1
        if turn["content"]:
            found.append((CONTENT, ANSWER if last else turn["role"]))
        found += [
            (ANSWER if last else CONTEXT, name) for name in turn if name not in ("role", "content") and turn[name]
        ]
    return found


def untraced(examples: list[Example], render) -> set[tuple[str, str]]:
    """The parts of `examples` of which `render(turns, tools)` writes nothing (it is None where it fails)."""
    seen: set = set()
    dropped: set = set()
    failed = 0
    for example in examples:
        new = [part for part in parts(example) if part not in seen]
        if not new:
            continue
        whole = render(example.conversation(), example.tools)
        if whole is None:  # refused: an error of that row, so another one tells
            failed += 1
            if failed == MOST_TRIED:
                break
            continue
        for part in new:
            seen.add(part)
            if whole == render(*_without(example, part)):
                dropped.add(part)
    return dropped


def _without(example: Example, part):
    place, name = part
    turns = example.conversation()
    if place == TOOLS:
        return turns, None
    for i, turn in enumerate(turns):
        last = i == len(turns) - 1
        if place == CONTENT:
            if turn["content"] and name == (ANSWER if last else turn["role"]):
                turn["content"] += " trace"
        elif last == (place == ANSWER):
            turn.pop(name, None)
    return turns, example.tools
