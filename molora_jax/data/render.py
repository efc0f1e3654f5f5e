"""Examples as ids, with the tokens to train on marked.

The whole conversation is rendered once with the model's template, answer included, and encoded once: context and answer
are pieces of the same ids, so that no space, no merge and no end token differs from what the template writes. Nothing
but the user's own conversations is ever rendered:

    full   = template(turns)                                    context | answer
    prompt = template(turns before the answer, and the generation prompt), where `full` starts with it: context

The answer is what stands behind the prompt (a think block that the template puts there too), up to and with the first
end token behind its text; what the template writes after that is not kept. Where it writes no end token there, the
answer ends with its text, and `eos_id` is put behind. A token that straddles a border belongs to the answer.

A template that renders the turns before an answer in another way once the answer is there has no such prompt; then the
answer begins where its text does. A template that marks what the model writes with `{% generation %}` has the last
word on what is trained on, as in transformers; only the end token of each answer is trained on in any case.
"""

import bisect
import dataclasses
import operator
import os
import re

from molora_jax.data.example import Example
from molora_jax.data.traces import untraced
from molora_jax.io.templates import Deaths, characters

LONGEST = 1_000_000  # characters of a row: encoding more takes seconds and memory, and no run's `seq_len` holds it
MOST_RENDERED = 100_000_000  # characters for a row with many answers to train on: each renders all before it
TURN = 100  # characters that a turn costs beside its own
CHUNK = 512  # examples rendered and encoded together
_REFUSED = "a conversation that the chat template renders"


@dataclasses.dataclass(frozen=True)
class Ids:
    """One example, n ids. loss_mask: n times 0 or 1. context: how many ids stand before the last answer; 0 in plain
    text, which is all answer. lead: how many of the answer's ids the template puts before its text. untraced: parts of
    the row that the template does not write (`traces.py`). asked: what the template writes to ask for an answer and
    leaves out once the answer is there; "" where the ids go on from the prompt."""

    ids: list[int]
    loss_mask: list[int]
    context: int
    lead: int = 0
    untraced: tuple[tuple[str, str], ...] = ()
    asked: str = ""


@dataclasses.dataclass(frozen=True)
class Refused:
    """An example that cannot become ids, and why: the parts of an `InputError`. died: the template hangs on it, or
    fills the memory."""

    got: str
    expected: str
    fix: str = ""
    died: bool = False


def encode_examples(
    tokenizer, examples: list[Example], *, system: str = "", train_on: str = "last", template_args: dict | None = None,
    longest: int = LONGEST, deaths: Deaths | None = None,
) -> list[Ids | Refused]:  # fmt: skip
    """An entry for each example, in order.

    Args:
      system: a system turn for conversations without one; "" adds none.
      train_on: the "last" assistant turn or "all" of them; an example's `weights` go before.
      template_args: the template's own arguments. longest: characters that a row may have.
      deaths: of the file whose rows these are.
    """
    out, deaths = [], deaths or Deaths()
    settings = dict(system=system, train_on=train_on, template_args=template_args or {}, deaths=deaths)
    for first in range(0, len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        results = [_too_long(example, longest) or _too_many(tokenizer, example, train_on) for example in chunk]
        for kind, work in ((True, _plain), (False, _chats)):
            indices = [i for i, e in enumerate(chunk) if results[i] is None and (e.text is not None) == kind]
            if indices:
                options = {} if kind else dict(settings, longest=longest)
                for i, result in zip(indices, work(tokenizer, [chunk[i] for i in indices], **options), strict=True):
                    results[i] = result
        out += results
    return out


def with_system(turns, system: str) -> list[dict]:
    """`turns` with a system turn in front, where there is none yet."""
    turns = list(turns)
    if system and not (turns and turns[0].get("role") in ("system", "developer")):
        turns = [{"role": "system", "content": system}, *turns]
    return turns


def _too_long(example, longest) -> Refused | None:
    if example.turns is None and example.text is None:
        size = len(example.prompt) + len(example.target) + (characters(example.tools) if example.tools else 0)
    else:
        size = characters([example.turns, example.tools, example.text])
    return None if size <= longest else Refused(f"{size:,} characters", f"at most {longest:,}", "Cut the row.")


def _too_many(tokenizer, example, train_on) -> Refused | None:
    """Every answer that is trained on renders the turns before it: a long conversation with many of them is refused."""
    weights = example.weights or [train_on == "all" and turn["role"] == "assistant" for turn in example.turns or ()]
    answers = sum(map(bool, weights))
    if answers < 100 or _tags(tokenizer):
        return None
    cost = answers * (characters(example.turns) + TURN * len(example.turns)) // 2
    if cost <= MOST_RENDERED:
        return None
    got = f"{len(example.turns):,} turns with {answers:,} answers to train on"
    return Refused(got, "fewer, for each of them is rendered with all before it", "Cut the conversation into rows.")


def _plain(tokenizer, examples):
    """Plain text: BOS where the tokenizer has one, the end token behind, a loss on all of it (behind the prompt, where
    the text has one)."""
    out = []
    for example, encoded in zip(examples, _encode(tokenizer, [e.text for e in examples]), strict=True):
        if not isinstance(encoded, Refused):
            ids, offsets = encoded
            asked = next((i for i, (_, stop) in enumerate(offsets) if stop > len(example.prompt)), len(ids))
            whole = tokenizer.with_prefix(ids)
            context = len(whole) - len(ids) + asked if asked else 0
            whole = whole if whole[-1:] == [tokenizer.eos_id] else [*whole, tokenizer.eos_id]
            encoded = Ids(whole, [0] * context + [1] * (len(whole) - context), context)
            if len(whole) < 2:
                encoded = Refused("an empty text", "some text")
        out.append(encoded)
    return out


def _chats(tokenizer, examples, *, system, train_on, template_args, longest, deaths):
    marks = _Marks(tokenizer)
    chats = [_Chat(example, system, train_on, tagged=marks.generation) for example in examples]
    requests = [request for chat in chats for request in chat.requests(template_args)]
    rows = [row for row, chat in enumerate(chats) for _ in range(chat.num_requests)]
    rendered = iter(tokenizer.render(requests, rows=rows, deaths=deaths))
    cuts = []
    for chat in chats:
        results = [next(rendered) for _ in range(chat.num_requests)]
        cuts.append(_failed(results) or _cut(marks, chat, results, longest))
    good = [cut for cut in cuts if not isinstance(cut, Refused)]
    encoded = iter(_encode(tokenizer, [cut.text for cut in good]))
    return [cut if isinstance(cut, Refused) else _ids(tokenizer, cut, next(encoded)) for cut in cuts]


def _failed(results) -> Refused | None:
    """Why a conversation has no text: what its template died of, else the first error."""
    errors = sorted((result for result in results if "error" in result), key=lambda result: "died" not in result)
    return Refused(errors[0]["error"], _REFUSED, died="died" in errors[0]) if errors else None


class _Chat:
    """A conversation with the assistant turns that need a border of their own: the last one always."""

    def __init__(self, example, system, train_on, *, tagged):
        turns = example.turns or ({"role": "user", "content": example.prompt},
                                  {"role": "assistant", "content": example.target})  # fmt: skip
        self.turns, self.tools = with_system(turns, system), example.tools
        added = len(self.turns) - len(turns)
        last = len(self.turns) - 1
        answers = [i for i, turn in enumerate(self.turns) if turn.get("role") == "assistant" or i == last]
        if example.weights is not None:
            self.trained = {i for i in answers if example.weights[i - added] > 0}
        else:
            self.trained = set(answers) if train_on == "all" else {last}
        self.answers = answers
        self.special = len(self.turns) > 2 or example.turns is not None or example.tools is not None
        self.tagged = tagged
        self.needed = [last] if tagged else sorted(self.trained | {last})
        self.num_requests = 1 + len(self.needed)

    def requests(self, template_args):
        common = dict(template_args, tools=list(self.tools) if self.tools else None, documents=None)
        yield dict(common, messages=self.turns, add_generation_prompt=False)
        for i in self.needed:
            yield dict(common, messages=self.turns[:i], add_generation_prompt=True)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A rendered conversation up to the end of its answer: `text`, the characters where the last answer and its own
    text begin, spans of characters that are trained on, whether `eos_id` is to follow (and be trained on), the parts of
    the row that are not written, and `Ids.asked`."""

    text: str
    begin: int
    text_begin: int
    spans: list[tuple[int, int]]
    add_end: bool
    train_end: bool
    untraced: tuple[tuple[str, str], ...]
    asked: str


def _cut(marks, chat, results, longest) -> _Cut | Refused:
    full, *prompts = (result["text"] for result in results)
    tagged = [tuple(span) for span in results[0]["spans"]]
    found, low = {}, 0
    for number, (i, prompt) in enumerate(zip(chat.needed, prompts, strict=True)):
        is_last = number == len(chat.needed) - 1
        high = len(full) if is_last else _next_turn(marks, chat, i, full, prompts[number + 1], low)
        place = _place(marks, chat, i, full, prompt, low, high)
        if place is None and is_last and tagged:  # the tags say where it is
            shown = len(os.path.commonprefix([full, prompt]))
            place = _Place(shown, tagged[-1][0], *tagged[-1], marks.end(full, tagged[-1][1], len(full)))
        if place is None:
            ways = ["set the template's arguments (data.template_args)", "leave the reasoning out of the row"]
            ways += [] if is_last else ["train on the last turn only"]
            return Refused(
                f"a template that renders turn {i + 1} in another way than what it is given",
                "the assistant's text as it was given, behind its prompt",
                f"Use a template that keeps the turns as they are, {', or '.join(ways)}.",
            )
        found[i], low = place, place.stop
    last = found[chat.needed[-1]]
    stop = last.stop
    if last.end is None and tagged and tagged[-1][1] > last.begin:
        stop = max(stop, tagged[-1][1])  # all that the template calls the model's
    if stop > 2 * longest:
        return Refused(f"a template that writes {stop:,} characters", f"at most {2 * longest:,}", "Cut the row.")
    if chat.tagged:
        spans = _tagged_spans(chat, tagged, last)
        if isinstance(spans, Refused):
            return spans
        trained = any(begin < stop and end > last.begin for begin, end in spans)
    else:
        spans = [(found[i].begin, found[i].stop) for i in chat.needed if i in chat.trained]
        trained = chat.needed[-1] in chat.trained
    written = {i: (place.shown, place.stop) for i, place in found.items() if i in chat.trained}
    if chat.tagged:  # without its end no answer of the model would ever end
        spans = [*spans, *_ends(marks, chat, full, tagged, spans)]
        spans += [last.end] if trained and last.end is not None else []
        written |= _tagged_turns(marks, chat, full, tagged)
    written[chat.needed[-1]] = last.shown, stop
    lost = untraced(chat.turns, chat.tools, full, written) if chat.special else ()
    asked = prompts[-1][last.shown :]
    return _Cut(full[:stop], last.begin, last.text_begin, spans, last.end is None, trained, lost, asked)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Of an answer in the rendered text: where the template begins to write of it, where it and its text begin, where
    its text ends, its end token `[start, stop)`."""

    shown: int
    begin: int
    text_begin: int
    text_end: int
    end: tuple[int, int] | None

    @property
    def stop(self) -> int:
        return self.end[1] if self.end else self.text_end


def _place(marks, chat, i, full, prompt, low, high) -> _Place | None:
    """Where turn i is in `full`, between the characters `low` and `high`."""
    is_last = i == len(chat.turns) - 1
    exact = full.startswith(prompt)
    begin = len(prompt) if exact else max(low, len(os.path.commonprefix([full, prompt])))
    high = max(high, begin)
    turn = chat.turns[i]
    text = _text(turn)
    # a header or thoughts between prompt and text may hold the same letters: "a" stands in "assistant"
    later = is_last and bool(text.strip()) and not full[begin:high].lstrip().startswith(text.strip())
    at = marks.find(full[begin:high], text, from_end=is_last and (later or not exact))
    end = None if at is None and not exact else marks.end(full, begin + (at[1] if at else 0), high)
    if at is None and not (exact and (is_last or end) and full[begin:high].strip()):
        return None
    # an answer that the template changes (a think block taken out of it): what is behind the prompt is the answer
    shown, (start, text_end) = begin, (begin, begin) if at is None else (begin + at[0], begin + at[1])
    if not exact:
        begin = start
    if end is None and (at is None or turn.get("tool_calls")):  # calls stand behind the text
        text_end = max(text_end, len(full[:high].rstrip()))
    return _Place(shown, begin, start, text_end, end)


def _next_turn(marks, chat, i, full, prompt, low) -> int:
    """Where the text of the turns after turn i begins in `full`, if they are found; at most the end of `prompt`, the
    next one that needs a border."""
    high = max(low, len(os.path.commonprefix([full, prompt])))
    for turn in reversed(chat.turns[i + 1 : chat.needed[chat.needed.index(i) + 1]]):
        at = marks.find(full[low:high], _text(turn), from_end=True)
        high = low + at[0] if at else high
    return high


def _text(turn) -> str:
    """The text of a turn; of parts, all of them in a row."""
    content = turn.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


class _Marks:
    """The special tokens of a tokenizer as text, and whether its template marks what the model writes."""

    def __init__(self, tokenizer):
        texts = [text for text in tokenizer.added_tokens if not text.isspace()]
        ends = {tokenizer.token_text(i) for i in tokenizer.end_ids}
        self.special, self.ends = _pattern(texts), _pattern(ends & set(texts))
        self.generation = _tags(tokenizer)

    def find(self, tail: str, text: str, *, from_end: bool) -> tuple[int, int] | None:
        """Where `text` stands in `tail`: as it is, else without the white space around it.

        Not inside a special token: "s" is not found in "</s>".
        """
        if not text.strip():
            return None if from_end else (0, 0)
        special = [match.span() for match in self.special.finditer(tail)]
        for wanted in dict.fromkeys((text, text.strip())):
            at = tail.rfind(wanted) if from_end else tail.find(wanted)
            while at >= 0:
                stop = at + len(wanted)
                if not any(a < stop and at < b and not (at <= a and b <= stop) for a, b in special):
                    return at, stop
                at = tail.rfind(wanted, 0, stop - 1) if from_end else tail.find(wanted, at + 1)
        return None

    def end(self, full: str, start: int, stop: int) -> tuple[int, int] | None:
        """The first end token of `full[start:stop]`."""
        match = self.ends.search(full, start, stop)
        return match.span() if match else None

    def ends_with(self, text: str) -> bool:
        """Whether an end token is the last of `text`, white space aside."""
        text = text.rstrip()
        return any(match.end() == len(text) for match in self.ends.finditer(text))


def _tags(tokenizer) -> bool:
    return bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", tokenizer.template or ""))


def _pattern(texts) -> re.Pattern:
    """Any of `texts`, the longest that fits."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")


def _tagged_spans(chat, tagged, last):
    """Those of the template's own spans that are to be trained on."""
    if len(chat.trained) == len(chat.answers):
        return tagged
    if chat.trained == {chat.needed[-1]}:
        return [span for span in tagged if span[1] > last.begin]
    if len(tagged) != len(chat.answers):
        got = f"{len(tagged)} generation blocks for {len(chat.answers)} assistant turns"
        return Refused(got, "one a turn, so that weights can choose", "Leave the weights out.")
    return [span for span, i in zip(tagged, chat.answers, strict=True) if i in chat.trained]


def _ends(marks, chat, full, tagged, spans) -> list[tuple[int, int]]:
    """The end tokens that the tags of `spans` leave out: each behind its tag, with no text of the next turn between."""
    ends, one_each = [], len(tagged) == len(chat.answers)
    for k, (begin, stop) in enumerate(tagged[:-1]):
        end = marks.end(full, stop, tagged[k + 1][0])
        if (begin, stop) not in spans or end is None or marks.ends_with(full[begin:stop]):
            continue
        between, after = full[stop : end[0]], _text(chat.turns[chat.answers[k] + 1]) if one_each else ""
        if not between.strip() or (after.strip() and marks.find(between, after, from_end=True) is None):
            ends.append(end)
    return ends


def _tagged_turns(marks, chat, full, tagged) -> dict[int, tuple[int, int]]:
    """What the template writes of the trained turns before the last one, tag and all: what stands between the texts of
    their neighbours. {} where there is not one tag a turn."""
    out = {}
    for k, i in enumerate(chat.answers[:-1] if len(tagged) == len(chat.answers) else ()):
        low, high = tagged[k - 1][1] if k else 0, tagged[k + 1][0]
        before = marks.find(full[low : tagged[k][0]], _text(chat.turns[i - 1]), from_end=True) if i else None
        text, stop = _text(chat.turns[i + 1]), tagged[k][1]
        after = marks.find(full[stop:high], text, from_end=False) if text.strip() else None
        if i in chat.trained:
            out[i] = low + before[1] if before else low, stop + after[0] if after else high
    return out


_stop = operator.itemgetter(1)


def _overlaps(offsets, spans) -> list[int]:
    """As transformers: 1 for every token that overlaps a span; both are in order."""
    mask, at = [0] * len(offsets), 0
    for i, (start, stop) in enumerate(offsets):
        while at < len(spans) and start >= spans[at][1]:
            at += 1
        if at == len(spans):
            break
        mask[i] = int(stop > spans[at][0])
    return mask


def _ids(tokenizer, cut: _Cut, encoded) -> Ids | Refused:
    if isinstance(encoded, Refused):
        return encoded
    ids, offsets = encoded
    context, text_at = (bisect.bisect_right(offsets, at, key=_stop) for at in (cut.begin, cut.text_begin))
    if cut.spans == [(cut.begin, len(cut.text))]:
        mask = [0] * context + [1] * (len(ids) - context)
    else:
        mask = _overlaps(offsets, sorted(cut.spans))
    if cut.add_end or ids[-1] not in tokenizer.end_ids:
        ids, mask = [*ids, tokenizer.eos_id], [*mask, int(cut.train_end)]
    if tokenizer.template is None:
        whole = tokenizer.with_prefix(ids)
        added = len(whole) - len(ids)
        ids, mask, context, text_at = whole, [0] * added + mask, context + added, text_at + added
    if not context:
        return Refused("a conversation whose template writes nothing before the answer", "some context")
    if not any(mask[1:]):
        return Refused("no turn to train on", "an assistant turn with weight 1")
    return Ids(ids, mask, context, max(0, text_at - context), cut.untraced, cut.asked)


def _encode(tokenizer, texts) -> list:
    """`(ids, offsets)` of each text, or why it has none."""
    if not texts:
        return []
    try:
        return tokenizer.encode_spans(texts)
    except ValueError:  # one of them: which?
        out = []
        for text in texts:
            try:
                out += tokenizer.encode_spans([text])
            except ValueError as error:
                out.append(Refused(getattr(error, "got", str(error)), getattr(error, "expected", "text to encode")))
        return out
