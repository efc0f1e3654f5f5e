"""The turns of a conversation, as chat templates take them, out of what files hold.

`messages`: `{"role", "content", ...}`; further fields (`tool_calls`, `reasoning_content`, `name`, ...) stay as they
are, without those that are null. `conversations` (ShareGPT): `{"from", "value"}`. Content is text, or a list of text
parts (joined); null beside `tool_calls`. `weight` (0 or 1) of an assistant's turn says whether it is trained on.
"""

import json

from molora_jax.data.jsonl import BadRow, kind, shown

LOSS_FIELDS = ("train", "training", "trainable", "loss", "loss_mask", "mask", "weights")  # how others say `weight`
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip


def read_messages(value, where: str, *, sharegpt: bool = False, empty_answers: bool = False) -> tuple[list[dict], list]:
    """(turns, weights): a weight is None where the row does not say.

    Args:
      empty_answers: allows an assistant's turn without text: in a prompt, where it was said and is not trained on.

    Raises:
      BadRow: not such a list.
    """
    if not isinstance(value, list):
        form = '{"from": ..., "value": ...}' if sharegpt else '{"role": ..., "content": ...}'
        raise BadRow(f"{where} of type {kind(value)}", f"a list of {form}")
    turns, weights = [], []
    for i, item in enumerate(value):
        at = f"{where}[{i}]"
        if not isinstance(item, dict):
            raise BadRow(f"{at} of type {kind(item)}", '{"role": ..., "content": ...}')
        turn = {name: field for name, field in item.items() if field is not None or name in ("content", "value")}
        if sharegpt and "from" in turn:
            turn = _from_sharegpt(turn, at)
        other = next((name for name in LOSS_FIELDS if name in turn), None)
        if other:
            raise BadRow(f"a field '{at}.{other}'", "weight, 0 or 1, to say what is trained on", "Rename it to weight.")
        weights.append(_weight(turn.pop("weight", None), at))
        turns.append(_turn(turn, at, first=i == 0 or all(t["role"] == "system" for t in turns), empty=empty_answers))
        if weights[-1] and turns[-1]["role"] != "assistant":
            raise BadRow(f"{at}.weight 1 on a turn of role {turns[-1]['role']!r}", "a weight on assistant turns alone")
    return turns, weights


def _turn(turn: dict, at: str, *, first: bool, empty: bool) -> dict:
    role = turn.get("role")
    early = role == "system" and (at.endswith("[0]")) or role == "developer" and first
    if not isinstance(role, str) or role not in ROLES or (role in ("system", "developer") and not early):
        expected = "user, assistant or tool, or system or developer before all others"
        raise BadRow(f"{at}.role {shown(role)}", expected)
    calls = turn.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)):
        raise BadRow(f"{at}.tool_calls of type {kind(calls)}", "a list of objects")
    if calls == []:
        del turn["tool_calls"]
    if role == "assistant" and calls and turn.get("content") is None:
        return {**turn, "content": None}
    if "content" not in turn:
        names = ", ".join(map(repr, turn)) or "none"
        raise BadRow(f"no field '{at}.content' (fields: {names})", "role and content")
    content = _content(turn["content"], f"{at}.content")
    may_be_empty = role in ("system", "developer", "tool") or calls or (role == "assistant" and empty)
    if not content.strip() and not may_be_empty:
        raise BadRow(f"an empty {at}.content", "some text")
    return {**turn, "content": content}


def _content(value, at: str) -> str:
    if isinstance(value, list):
        for i, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text":
                got = part.get("type") if isinstance(part, dict) else part
                fix = "Only text can be trained on: leave such rows out."
                raise BadRow(f"{at}[{i}] of type {shown(got)}", '{"type": "text", "text": ...}', fix)
            if not isinstance(part.get("text"), str):
                raise BadRow(f"{at}[{i}].text of type {kind(part.get('text'))}", "a string")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow(f"{at} of type {kind(value)}", "a string, or a list of text parts")
    return value


def _weight(value, at: str):
    if value is not None and (isinstance(value, bool) or value not in (0, 1)):
        raise BadRow(f"{at}.weight {shown(value)}", "0 or 1")
    return value


def _from_sharegpt(turn: dict, at: str) -> dict:
    name, value = turn.pop("from"), turn.pop("value", None)
    role = SHAREGPT.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"{at}.from {shown(name)}", f"one of {', '.join(SHAREGPT)}")
    if role != "function_call":
        return {"role": role, "content": value, **turn}
    calls = from_json(value, f"{at}.value")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow(f"{at}.value {shown(value)}", 'a call as JSON: {"name": ..., "arguments": {...}}')
    calls = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": None, "tool_calls": calls, **turn}


def from_json(value, at: str):
    """The value, read from JSON where it is text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{at} {shown(value)}", "JSON") from None


def read_history(value, where: str = "history") -> list[dict]:
    """`[[question, answer], ...]`, or turns."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return read_messages(value, where)[0]
    turns = []
    for i, pair in enumerate(value) if isinstance(value, list) else ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) and t.strip() for t in pair):
            raise BadRow(f"{where}[{i}] {shown(pair)}", "[question, answer], two texts")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if not isinstance(value, list):
        raise BadRow(f"{where} of type {kind(value)}", "a list of [question, answer]")
    return turns


def read_tools(value) -> tuple[dict, ...] | None:
    """A list of objects, also as JSON text; None where there is none."""
    tools = from_json(value, "tools") if value else None
    if not tools:
        return None
    odd = [tool for tool in tools if not isinstance(tool, dict)] if isinstance(tools, list) else [tools]
    if odd:
        inside = " with" if isinstance(tools, list) else ","
        raise BadRow(f"tools of type {kind(tools)}{inside} {shown(odd[0])}", "a list of objects")
    return tuple(tools)


def words(turn: dict) -> str:
    """A turn's content as text; of calls, their JSON."""
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return "\n".join(filter(None, [turn["content"], calls]))


def as_text(turns: list[dict]) -> str:
    """The one turn's text, or lines of `role: text`."""
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {words(turn)}" for turn in turns)
