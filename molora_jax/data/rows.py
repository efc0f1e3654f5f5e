"""What a row of a user's file means: its form, its fields, and the `Example` that it becomes.

    format              fields of a row
    messages            messages: the last assistant turn is the answer, the rest the context
    prompt_completion   prompt and completion (or target): texts, or lists of turns
    choice              prompt, choices (texts) and answer (one of them, or its place from 0), which is what is learnt
    alpaca              instruction, input (may be empty), output
    sharegpt            conversations: from and value
    (data.raw)          text; or prompt and completion (or target), as they stand
    labelled            text and label, for the objective `classify`
    preference          prompt, chosen and rejected: texts, or lists of turns, for the objective `preference`

Beside them: task, system, history, input, tools, weight. `data.format="auto"` tells the form by the fields, row by row.
A field that could change what is asked or answered (`MEANINGFUL`) is used or the row refused; others are counted.
"""

import dataclasses
import functools
import re

from molora_jax.data.example import Example
from molora_jax.data.jsonl import BadRow, Unreadable, kind
from molora_jax.data.options import Options
from molora_jax.data.turns import as_text, read_history, read_messages, read_tools, words

# format -> the sets of fields that a row of it has, and those that it may have
FORMS = {
    "messages": ([("messages",)], ("system", "tools", "weight")),
    "sharegpt": ([("conversations",)], ("system", "tools", "weight")),
    "alpaca": ([("instruction", "output")], ("input", "system", "history", "tools", "weight")),
    "prompt_completion": (
        [("prompt", "target"), ("prompt", "completion")],
        ("input", "system", "history", "tools", "weight"),
    ),
    "choice": ([("prompt", "choices", "answer")], ("input", "system", "history", "tools", "weight")),
}
RAW = {
    "text": ([("text",)], ("weight",)),
    "prompt_completion": ([("prompt", "target"), ("prompt", "completion")], ("weight",)),
    "alpaca": ([("instruction", "output")], ("input", "weight")),
    "choice": ([("prompt", "choices", "answer")], ("input", "weight")),
}
LABELLED = {"labelled": ([("text", "label")], ("weight",))}
PAIRS = {"preference": ([("prompt", "chosen", "rejected")], ("input", "system", "history", "tools", "weight"))}
BY_READS = {"text": FORMS, "label": LABELLED, "pair": PAIRS}
OBJECTIVES = {"text": "lm", "label": "classify", "pair": "preference"}  # one that reads such rows, to name it
MOST_LABEL = 200  # characters of a class's name
MOST_NAME = 100  # characters of a task's name
TASK = re.compile(r"\w([\w .+@#&()='-]*[\w.+@#&()='-])?")  # what `schedule.*.tasks` can name: no comma, no path
MEANINGFUL = frozenset(
    "answer answers argument arguments assistant audio audios background bot chat_template_kwargs choices chosen "
    "completion context conversation conversations developer dialog dialogue document documents examples few_shot "
    "function_call functions history image images input instruction instructions kto_tag label labels loss loss_mask "
    "mask messages options output paragraph passage premise hypothesis prompt query question rationale reasoning "
    "reasoning_content rejected response responses suffix system system_message system_prompt target targets text "
    "thinking tool_calls tool_choice tools train user video videos weight weights".split()
)


def to_example(row: dict, number: int, options: Options) -> tuple[Example | None, list[str]]:
    """(the example, the names of fields that are not used). None: a row whose weights leave nothing to train on.

    Raises:
      BadRow: the row is of no form, or has a meaningful field that its form does not use.
    """
    row, unused = _renamed(row, options)
    form, keys = _form(row, options)
    may = _forms(options)[form][1]
    for name in (*keys, *may, "task"):
        if isinstance(row.get(name), Unreadable):
            fix = f"Write the column as text, or leave it out in data.fields (drop={name})."
            raise BadRow(row[name].got, "text, numbers, lists and structs", fix)
    task = row.get("task")
    if not isinstance(task, (str, type(None))):
        raise BadRow(f"task of type {kind(task)}", "a string")
    if task and not (len(task) <= MOST_NAME and TASK.fullmatch(task)):
        raise BadRow(
            f"task {task!r:.60} of {len(task):,} characters",
            f"a name of at most {MOST_NAME}: letters, digits, and spaces or any of _ - . + @ # & ( ) = ' inside it",
        )
    for name, value in row.items():
        turns = name in ("messages", "conversations") and value == []  # a form's own field, if without a turn
        if name in (*keys, *may, "task") or (value in (None, "", [], {}) and not turns):
            continue
        if name in MEANINGFUL and not (options.format != "auto" and _is_key(name)):
            raise BadRow(
                f"a field {name!r}, which a row with {' and '.join(keys)} does not use",
                f"{', '.join((*keys, *may))} and fields that change neither question nor answer",
                f"Say what it is in data.fields (as in prompt={name}), leave it out there (drop={name}), or name the "
                "row's form in data.format.",
            )
        unused.append(name)
    given = {name: row[name] for name in may if row.get(name) not in (None, "", [], {})}
    weight = given.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(f"weight {weight!r:.60}", "0 or 1")
    read = {"label": _read_labelled, "pair": _read_pair}.get(options.reads, _read_raw if options.raw else _read_turns)
    read = functools.partial(_read_choice, read) if form == "choice" else read
    example = read(row, form, keys, given, task or "", number, options)
    return (example if weight else None), unused


def _renamed(row: dict, options: Options) -> tuple[dict, list[str]]:
    """The row with our names for its fields, and the fields that the user leaves out or that another one displaces."""
    names = options.names
    if not names.keys() & row.keys():
        return row, []
    taken = {names[own] for own in row if names.get(own)}
    unused = [name for name in row if names.get(name) == "" or (name in taken and name not in names)]
    kept = {names.get(name, name): value for name, value in row.items() if name not in unused}
    return kept, unused


def _forms(options: Options) -> dict:
    return RAW if options.raw else BY_READS[options.reads]


def _is_key(name: str) -> bool:
    return name == "text" or any(name in keys for sets, _ in FORMS.values() for keys in sets)


def _form(row: dict, options: Options) -> tuple[str, tuple[str, ...]]:
    """The row's form and its fields."""
    forms = _forms(options)
    if options.format != "auto":
        forms = {options.format: forms[options.format]}
    every = [(form, keys) for form, (sets, _) in forms.items() for keys in sets]
    found = [(form, keys) for form, keys in every if all(row.get(key) is not None for key in keys)]
    if len(found) == 1:
        return found[0]
    if found:
        sets = " and ".join("+".join(keys) for _, keys in found)
        raise BadRow(f"fields of several forms ({sets})", "one form", "Say which in data.format, or data.fields.")
    for reads, others in BY_READS.items() if not options.raw else ():
        keys = next((keys for sets, _ in others.values() for keys in sets if all(k in row for k in keys)), None)
        if keys and reads != options.reads:
            raise BadRow(
                f"{', '.join(keys)}: a row of the form that the objective {OBJECTIVES[reads]!r} reads",
                "; or ".join(" and ".join(keys) for _, keys in every),
                f"Set objective.name={OBJECTIVES[reads]}, or name the file's own fields in data.fields.",
            )
    near = [(form, keys) for form, keys in every if any(key in row for key in keys)]
    keys = max(near or every, key=lambda item: sum(key in row for key in item[1]))[1]
    if not near and not options.raw and options.format == "auto" and options.reads == "text":
        keys = ("prompt", "target")
    missing = next((key for key in keys if key not in row), None)
    if missing is None:  # one of them is null
        missing = next(key for key in keys if row[key] is None)
        raise BadRow(
            f"{missing} of type null", "a string" if missing not in ("messages", "conversations") else "a list"
        )
    sets = "; or ".join(" and ".join(keys) for _, keys in every)
    fix = "Name the file's own fields in data.fields (as in prompt=question), or correct the row."
    if "text" in row and not options.raw and options.reads == "text":
        fix = "Plain text is trained on with data.raw=True."
    fix += ' `data.bad_rows="skip"` leaves such rows out.'
    raise BadRow(f"no field {missing!r} (fields: {', '.join(map(repr, list(row)[:20])) or 'none'})", sets, fix)


def _read_turns(row, form, keys, given, task, number, options) -> Example | None:
    if form in ("messages", "sharegpt"):
        turns, weights = read_messages(row[keys[0]], keys[0], sharegpt=form == "sharegpt")
    else:
        asked, answer = row[keys[0]], row[keys[1]]
        turns = read_history(given["history"]) if "history" in given else []
        weights = [None] * len(turns)
        for name, value, role in ((keys[0], asked, "user"), (keys[1], answer, "assistant")):
            if isinstance(value, list) and form == "prompt_completion":
                added, theirs = read_messages(value, name)
            else:
                added, theirs = [{"role": role, "content": _text(value, name)}], [None]
            if name == keys[0] and "input" in given:
                if isinstance(value, list):
                    raise BadRow("a field 'input' beside a list of turns", "the turns alone")
                added[-1]["content"] += "\n" + _text(given["input"], "input")
            turns, weights = turns + added, weights + theirs
    if "system" in given:
        if turns and turns[0]["role"] == "system" and turns[0]["content"]:
            raise BadRow("a system turn and a field 'system'", "one of them")
        rest = turns[1:] if turns and turns[0]["role"] == "system" else turns
        weights = [None] * (1 + len(rest) - len(turns)) + weights
        turns = [{"role": "system", "content": _text(given["system"], "system")}, *rest]
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise BadRow(f"a system turn in place {roles.index('system', 1)}", "the system turn first")
    if not roles or roles[-1] != "assistant" or "user" not in roles:
        raise BadRow(f"{keys[0]} with roles {roles}", "at least one user turn, and the answer (assistant) last")
    turns, weights = _weighed(turns, weights, options.train_on)
    if turns is None:
        return None
    prompt, target, tools = as_text(turns[:-1]), words(turns[-1]), read_tools(given.get("tools"))
    plain = len(turns) == 2 and all(turn.keys() == {"role", "content"} for turn in turns)
    turns = None if plain and turns[0]["role"] == "user" else tuple(turns)
    return Example(task, prompt, target, prompt, turns=turns, tools=tools, weights=weights, row=number)


def _weighed(turns, weights, train_on):
    """The turns up to the last one that is trained on (what comes later has no part in a loss), and their weights."""
    if all(weight is None for weight in weights):
        return turns, None
    last = len(turns) - 1
    usual = [float(turn["role"] == "assistant" and (train_on == "all" or i == last)) for i, turn in enumerate(turns)]
    weights = [own if given is None else float(given) for own, given in zip(usual, weights, strict=True)]
    if not any(weights):
        return None, None
    end = max(i for i, weight in enumerate(weights) if weight) + 1
    same = end == len(turns) and weights == usual
    return turns[:end], None if same else tuple(weights[:end])


def _read_choice(read, row, form, keys, given, task, number, options) -> Example | None:
    """The example of the right answer, which carries all that were offered."""
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        got = f"choices of type {kind(choices)}" if not isinstance(choices, list) else f"{len(choices)} choices"
        raise BadRow(got, "a list of at least two texts")
    choices = [_text(choice, f"choices[{i}]") for i, choice in enumerate(choices)]
    if len(set(choices)) < len(choices):
        raise BadRow("a choice twice", "choices that differ")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    if not isinstance(answer, str) or answer not in choices:
        raise BadRow(f"answer {answer!r:.60}", f"one of the choices, or its place from 0 to {len(choices) - 1}")
    example = read({**row, "target": answer}, "prompt_completion", ("prompt", "target"), given, task, number, options)
    return None if example is None else dataclasses.replace(example, offered=tuple(choices))


def _read_labelled(row, form, keys, given, task, number, options) -> Example:
    text, label = _text(row["text"], "text"), row["label"]
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    label = _text(label, "label").strip()
    if len(label) > MOST_LABEL:
        raise BadRow(f"a label of {len(label):,} characters", f"a name of at most {MOST_LABEL}")
    return Example(task, text, label, text, row=number)


def _read_pair(row, form, keys, given, task, number, options) -> Example | None:
    """The chosen answer's example, which carries the rejected one's."""
    chosen, rejected = (
        _read_turns(row, "prompt_completion", ("prompt", side), given, task, number, options)
        for side in ("chosen", "rejected")
    )
    if chosen is None or rejected is None:
        raise BadRow("turns without one to train on", "an answer with weight 1 on both sides")
    return dataclasses.replace(chosen, rejected=rejected)


def _read_raw(row, form, keys, given, task, number, options) -> Example:
    texts = [_text(row[key], key) for key in keys]
    if "input" in given:
        texts[0] += "\n" + _text(given["input"], "input")
    prompt, target = texts if len(texts) == 2 else ("", texts[0])
    return Example(task, prompt, target, prompt or target, text=prompt + target, row=number)


def _text(value, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{field} of type {kind(value)}", "a string")
    if not value.strip():
        raise BadRow(f"an empty {field}", "some text")
    return value
