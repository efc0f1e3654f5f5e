"""An answer as it grows, token by token: what of its text is certain, and where it ends.

The whole text is, byte for byte, what `Run.generate` returns for the same ids: a piece is only given away once no later
token can change it. So a character whose bytes are not all there waits, and so does what may be the start of a text of
`stop`. A token's work does not grow with the answer: only its last tokens are decoded again (`Grown`).
"""

import dataclasses
import functools

from molora_jax.decode.slots import Draw, Token
from molora_jax.evaluation.run import Run, before
from molora_jax.io.tokenizer import TORN

WINDOW = 32  # tokens that are decoded anew, before a border is looked for among them
BACK = 12  # tokens from the border to the last token, and tokens before the border that are decoded with those after it
SETTLED = 4  # characters on both sides of a border; no character has more bytes, so none is open across it


@dataclasses.dataclass(frozen=True)
class Piece:
    """`text` that was not given before; `tokens` likewise, those behind the text included that is held back; `finish`:
    None, "stop" (an end token, a text of `stop`) or "length"."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None


class Grown:
    """The text of ids that come one by one: `sure + tail`, which is what `decode` makes of all ids.

    `sure` is the text up to a border. The tokens after it are decoded together with some before it, because decoders
    drop or add a space at the start of a text.
    """

    def __init__(self, tokenizer, **options):
        """`options`: of the tokenizer's `decode`."""
        self.decode, self.byte_ids = functools.partial(tokenizer.decode, **options), tokenizer.byte_ids
        self.ids = []  # from some before the border on
        self.lead = 0  # characters of the ids before the border
        self.sure, self.tail, self.look = "", "", WINDOW

    def __len__(self):
        return len(self.sure) + len(self.tail)

    def after(self, start: int) -> str:
        """The text from a character on."""
        return self.sure[start:] + self.tail[max(0, start - len(self.sure)) :]

    def add(self, token_id: int) -> None:
        self.ids.append(token_id)
        text = self.decode(self.ids)
        self.tail = text[self.lead :]
        open_bytes = token_id in self.byte_ids and text.endswith(TORN)  # one open character tears all bytes beside it
        if len(self.ids) >= self.look and not open_bytes:
            self._move(text)

    def _move(self, text: str) -> None:
        """Moves the border, if both sides of the new one give the same text as the whole."""
        border = len(self.ids) - BACK
        head = self.decode(self.ids[:border])
        kept = self.ids[border - BACK :]
        lead = self.decode(kept[:BACK])
        rest = self.decode(kept)
        same = rest.startswith(lead) and head + rest[len(lead) :] == text
        if same and len(head) >= self.lead and len(lead) >= SETTLED and len(rest) - len(lead) >= SETTLED:
            self.sure, self.tail = self.sure + head[self.lead :], rest[len(lead) :]
            self.ids, self.lead, self.look = kept, len(lead), WINDOW
        else:
            self.look = (
                len(self.ids) + 7
            )  # not at every token; 7, so that characters of 2, 3 and 4 bytes fall into step


class Answer:
    """One answer to a prompt.

    Args:
      prompt: ids. most: tokens of the answer at most, the end token included.
      logprobs: whether each token tells its own, and the likeliest ones.

    `offsets`: for each of `ids`, the character of the text at which it begins.
    """

    def __init__(self, run: Run, prompt, draw: Draw, *, most: int, stop: tuple[str, ...] = (), logprobs: bool = False):
        self.run, self.prompt, self.draw, self.most = run, prompt, draw, most
        self.stop, self.logprobs = stop, logprobs
        self.ids: list[int] = []
        self.offsets: list[int] = []
        self.given = ""
        self.finish: str | None = None
        self.text = Grown(run.tokenizer, skip_special_tokens=True)
        self.written = Grown(run.tokenizer)  # special tokens count as text where a text of `stop` is looked for
        self.longest = max(map(len, stop), default=0)

    def add(self, token: Token) -> Piece:
        """The next token's piece."""
        self.ids.append(token.id)
        self.offsets.append(len(self.text) - _torn(self.text.tail))
        ended = token.id in self.run.tokenizer.end_ids
        if ended or self._stopped(token.id):
            self.finish = "stop"
        elif len(self.ids) >= self.most:
            self.finish = "length"
        if self.finish:
            text = before(self.run.text(self.ids), self.stop)
            new = text[len(self.given) :] if text.startswith(self.given) else ""
        else:
            if token.id not in self.run.tokenizer.special_ids:  # they write nothing
                self.text.add(token.id)
            # no text of `stop` begins before: its start would have been held back
            new = before(self.text.after(len(self.given)), self.stop)
            new = new[: len(new) - self._held(new)]
        self.given += new
        return Piece(new, () if ended else (token,), self.finish)

    def _stopped(self, token_id: int) -> bool:
        if not self.stop:
            return False
        start = max(0, len(self.written.sure) - self.longest)  # what is before was searched
        self.written.add(token_id)
        recent = self.written.after(start)
        return any(text in recent for text in self.stop)

    def _held(self, text: str) -> int:
        """How many characters at the end wait."""
        torn = _torn(text)
        sound = text[: len(text) - torn]
        lengths = ((stop, min(len(stop) - 1, len(sound))) for stop in self.stop)
        starts = (n for stop, most in lengths for n in range(most, 0, -1) if sound.endswith(stop[:n]))
        return torn + max(starts, default=0)


def _torn(text: str) -> int:
    return len(text) - len(text.rstrip(TORN))
