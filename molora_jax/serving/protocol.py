"""Bodies of the OpenAI API, read and written: `/v1/chat/completions`, `/v1/completions`, `/v1/models`.

A body is checked whole before anything of it is computed; what is wrong is an `InputError` whose `where` is the field.
A field that is known and not served is refused unless it asks for nothing; one that nobody knows is refused. Beside
OpenAI's fields there are those of `generate`: `top_k`, `min_p`, `repetition_penalty`.
"""

import dataclasses
import math
import random
import time
import uuid

from molora_jax.decode.sampling import RANGES
from molora_jax.decode.slots import TOP, Draw
from molora_jax.errors import InputError
from molora_jax.serving.answer import Answer

MOST_STOPS = 16
LONGEST_STOPS = 1000  # characters of all of them: each token of an answer is compared with them
COMPLETION_TOKENS = 16  # of /v1/completions where `max_tokens` is left out, as at OpenAI
COMMON = {
    "model", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "max_tokens", "logprobs",
    "top_k", "min_p", "repetition_penalty",
}  # fmt: skip
OWN = {
    "chat": COMMON | {"messages", "max_completion_tokens", "top_logprobs", "tools"},
    "text": COMMON | {"prompt"},
}
IGNORED = {"user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key"}  # change no answer
NEUTRAL = {  # fields of OpenAI's that are not served -> the values that ask for nothing
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "response_format": ({"type": "text"},), "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False), "functions": ([],), "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "prediction": (), "audio": (), "web_search_options": (),
}  # fmt: skip


class NoModel(Exception):
    """`args[0]`: the name."""


@dataclasses.dataclass
class Ask:
    """A checked body. `answers`: one a choice, in the order of their indices; `top`: how many likely tokens each token
    tells beside its own, None: no logprobs."""

    kind: str
    model: str
    answers: list[Answer]
    stream: bool
    usage: bool
    top: int | None
    prompt_tokens: int
    id: str
    created: int
    told: list[int]  # tokens of each choice whose logprobs were told


def read(kind: str, body, runs: dict, slots: dict, *, most: int) -> Ask:
    """Args:
      kind: "chat" or "text". runs, slots: by name. most: choices of one request at most.

    Raises:
      InputError: a field, and what is wrong with it. NoModel: no such model.
    """
    if not isinstance(body, dict):
        raise InputError("body", got=f"{body!r:.60}", expected="a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise InputError(
                    name, got=f"{value!r:.60}", expected="nothing: it is not served here", fix="Leave it out."
                )
        elif name not in OWN[kind] | IGNORED:
            raise InputError(f"{name:.60}", got="an unknown field", expected=f"one of {', '.join(sorted(OWN[kind]))}")
    name = of_type(body, "model", str, "the name of a model", required=True)
    if name not in runs:
        raise NoModel(name)
    run = runs[name]
    stream, options = of_type(body, "stream", bool, "true or false", False), body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise InputError("stream_options", got=f"{options!r:.60}", expected='{"include_usage": true or false}')
    options = {field: value for field, value in options.items() if value is not None}
    for field in options:
        of_type(options, field, bool, "true or false", field="stream_options")
    if options and not stream:
        raise InputError("stream_options", got=f"{options!r:.60}", expected="nothing where stream is not true")
    top, n = _logprobs(kind, body), whole(body, "n", 1, 1, most)
    prompts = _chat_prompts(body, run) if kind == "chat" else _text_prompts(body, run)
    if len(prompts) * n > most:
        raise InputError("n", got=f"{len(prompts)} prompts times {n}", expected=f"at most {most} choices")
    draw, stop = _draw(body), _stop(body)
    answers = []
    for ids in prompts:
        limit = _most_tokens(kind, body, slots[name], ids)
        for i in range(n):  # the first is what `generate` draws
            own = dataclasses.replace(draw, seed=(draw.seed + i) % 2**31)
            answers.append(Answer(run, ids, own, most=limit, stop=stop, logprobs=top is not None))
    kind_id = "chatcmpl-" if kind == "chat" else "cmpl-"
    return Ask(
        kind, name, answers, stream, bool(options.get("include_usage")), top, sum(map(len, prompts)),
        kind_id + uuid.uuid4().hex, int(time.time()), [0] * len(answers),
    )  # fmt: skip


def of_type(body, name, kind, words, default=None, *, required=False, field=None):
    """`field`: what an error names in place of `name`."""
    if name not in body and not required:
        return default
    value = body.get(name)
    if not isinstance(value, kind):
        raise InputError(field or name, got="nothing" if name not in body else f"{value!r:.60}", expected=words)
    return value


def whole(body, name, default, low, high):
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(name, got=f"{value!r:.60}", expected=f"an integer from {low} to {high}")
    return value


def _draw(body) -> Draw:
    temperature = body.get("temperature", 1.0)
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not (temperature == 0 or 1e-3 <= temperature <= 2):
        raise InputError("temperature", got=f"{temperature!r:.60}", expected="0 (the likeliest token), or 0.001 to 2")
    given = {name: body[name] for name in RANGES if name in body}
    seed = whole(body, "seed", random.getrandbits(31), 0, 2**31 - 1)
    return Draw(temperature=float(temperature), seed=seed, **given)  # checks them


def _stop(body) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    fine = isinstance(stop, list) and len(stop) <= MOST_STOPS and all(isinstance(t, str) and t for t in stop)
    if not fine:
        raise InputError("stop", got=f"{stop!r:.60}", expected=f"a text or up to {MOST_STOPS} texts, none empty")
    if sum(map(len, stop)) > LONGEST_STOPS:
        got = f"{sum(map(len, stop)):,} characters"
        raise InputError("stop", got=got, expected=f"at most {LONGEST_STOPS:,}, of all texts together")
    return tuple(stop)


def _logprobs(kind, body) -> int | None:
    if kind == "text":
        return whole(body, "logprobs", 0, 0, TOP) if "logprobs" in body else None
    asked = of_type(body, "logprobs", bool, "true or false", False)
    if "top_logprobs" in body and not asked:
        raise InputError("top_logprobs", got=f"{body['top_logprobs']!r:.60}", expected="logprobs: true beside it")
    top = whole(body, "top_logprobs", 0, 0, TOP)
    return top if asked else None


def _most_tokens(kind, body, slots, ids) -> int:
    """Tokens of an answer at most. One that the model's own context cuts ends there, as in `generate`; one that the
    server's smaller `--context` would cut is refused."""
    field = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    where = "messages" if kind == "chat" else "prompt"
    if not 0 < len(ids) < slots.context:
        raise InputError(
            where, got=f"{len(ids)} tokens", expected=f"1 to {slots.context - 1}, to fit the context with an answer",
            fix="Shorten it." if ids else "Write something.",
        )  # fmt: skip
    room = slots.room(ids)
    asked = whole(body, field, room if kind == "chat" else min(room, COMPLETION_TOKENS), 1, 2**31 - 1)
    if asked > room and slots.context < slots.model.config.context:
        raise InputError(
            field, got=f"{asked} after a prompt of {len(ids)} tokens", expected=f"at most {room}",
            fix=f"This server was started with a context of {slots.context} tokens.",
        )  # fmt: skip
    asked = min(asked, room)
    slots.check(ids, asked)
    return asked


def _chat_prompts(body, run) -> list[list[int]]:
    messages = of_type(body, "messages", list, "a list of turns", required=True)
    if not messages:
        raise InputError("messages", got="an empty list", expected='turns {"role": ..., "content": ...}')
    if run.config.data.get("raw", False):
        raise InputError(
            "messages", got="a conversation", expected="/v1/completions: this run was trained on plain text"
        )
    tools = of_type(body, "tools", list, "a list of descriptions of tools")
    return [_named("messages", run.prompt_ids, messages, tools=tools or None)]


def _text_prompts(body, run) -> list[list[int]]:
    """A text, a list of texts, token ids, or a list of lists of them."""
    prompt, vocab = body.get("prompt"), run.model.config.vocab
    number = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < vocab  # noqa: E731
    is_ids = lambda x: isinstance(x, list) and x and all(map(number, x))  # noqa: E731
    prompt = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    wrong = not isinstance(prompt, list) or not prompt
    if wrong or not (all(isinstance(p, str) and p for p in prompt) or all(map(is_ids, prompt))):
        expected = f"a text, token ids from 0 to {vocab - 1}, or a list of one of them; none empty"
        raise InputError("prompt", got="nothing" if prompt is None else f"{prompt!r:.60}", expected=expected)
    return [_named("prompt", run.plain_ids, p) if isinstance(p, str) else p for p in prompt]


def _named(field, function, *args, **options):
    """A problem of the prompt under the name that the field has here."""
    try:
        return function(*args, **options)
    except InputError as error:
        got = error.got.replace("prompt[", f"{field}[")[:200]
        where = "tools" if error.where == "tools" else field
        raise InputError(where, got=got, expected=error.expected, fix=error.fix) from None


def choice(ask: Ask, number: int, piece, *, done: bool) -> dict:
    """One choice of a response (`done`: all of it), or of a chunk of a stream; `piece` as of `Answer`."""
    out = {"index": number, "finish_reason": piece.finish, "logprobs": _told(ask, number, piece.tokens, piece.finish)}
    if ask.kind == "text":
        return {"text": piece.text, **out}
    if done:
        return {"message": {"role": "assistant", "content": piece.text, "refusal": None}, **out}
    return {"delta": {"content": piece.text} if piece.text or not piece.finish else {}, **out}


def _told(ask: Ask, number: int, tokens, finish) -> dict | None:
    if ask.top is None:
        return None
    answer = ask.answers[number]
    tokenizer = answer.run.tokenizer

    def entry(i, logprob):
        raw = tokenizer.token_bytes(i)
        return {"token": _written(i, raw), "logprob": _finite(logprob), "bytes": None if raw is None else list(raw)}

    def text(i):
        return _written(i, tokenizer.token_bytes(i))

    if ask.kind == "chat":
        content = [
            entry(t.id, t.logprob) | {"top_logprobs": [entry(*pair) for pair in t.top[: ask.top]]} for t in tokens
        ]
        return {"content": content, "refusal": None}
    first = ask.told[number]
    ask.told[number] += len(tokens)
    # tokens of a text of `stop` begin at the end of the text
    end = len(answer.given) if finish else math.inf
    offsets = [min(offset, end) for offset in answer.offsets[first : first + len(tokens)]]
    tops = [{text(i): _finite(p) for i, p in t.top[: ask.top]} | {text(t.id): _finite(t.logprob)} for t in tokens]
    return {
        "tokens": [text(t.id) for t in tokens], "token_logprobs": [_finite(t.logprob) for t in tokens],
        "top_logprobs": tops if ask.top else None, "text_offset": offsets,
    }  # fmt: skip


def _written(token_id: int, raw: bytes | None) -> str:
    """A token's text; of a piece of a character its bytes, as OpenAI writes them: `bytes:\\xf0\\x9f`."""
    if raw is None:  # no text, and bytes that nobody knows: told apart by its id
        return f"token:{token_id}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999."""
    return logprob if math.isfinite(logprob) else -9999.0


def response(ask: Ask, choices: list, *, chunk: bool = False, usage: dict | None = None) -> dict:
    name = ("chat.completion" + ".chunk" * chunk) if ask.kind == "chat" else "text_completion"
    head = {"id": ask.id, "object": name, "created": ask.created, "model": ask.model, "choices": choices}
    return head | ({"usage": usage} if usage or ask.usage else {})


def usage(ask: Ask) -> dict:
    made = sum(len(answer.ids) for answer in ask.answers)
    return {"prompt_tokens": ask.prompt_tokens, "completion_tokens": made, "total_tokens": ask.prompt_tokens + made}


def problem(message: str, *, kind="invalid_request_error", param=None, code=None) -> dict:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
