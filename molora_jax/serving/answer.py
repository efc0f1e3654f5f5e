"""An answer as it grows, token by token: what of its text is certain, and where it ends.

The whole text is, byte for byte, what `Run.generate` returns for the same ids: a piece is only given away once no later
token can change it. So a character whose bytes are not all there waits, and so does what may be the start of a text of
`stop`.
"""

import dataclasses

from molora_jax.decode.slots import Draw, Token
from molora_jax.evaluation.run import Run, before

TORN = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


@dataclasses.dataclass(frozen=True)
class Piece:
    """`text` that was not given before; `tokens` likewise, those behind the text included that is held back; `finish`:
    None, "stop" (an end token, a text of `stop`) or "length"."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None


class Answer:
    """One answer to a prompt.

    Args:
      prompt: ids. most: tokens of the answer at most, the end token included.
      logprobs: whether each token tells its own, and the likeliest ones.
    """

    def __init__(self, run: Run, prompt, draw: Draw, *, most: int, stop: tuple[str, ...] = (), logprobs: bool = False):
        self.run, self.prompt, self.draw, self.most = run, prompt, draw, most
        self.stop, self.logprobs = stop, logprobs
        self.ids: list[int] = []
        self.given = ""
        self.finish: str | None = None

    def add(self, token: Token) -> Piece:
        """The next token's piece."""
        self.ids.append(token.id)
        ended = token.id in self.run.tokenizer.end_ids
        if ended or self._stopped():
            self.finish = "stop"
        elif len(self.ids) >= self.most:
            self.finish = "length"
        text = before(self.run.text(self.ids), self.stop)
        certain = text if self.finish else text[: len(text) - self._held(text)]
        new = certain[len(self.given) :] if certain.startswith(self.given) else ""
        self.given += new
        return Piece(new, () if ended else (token,), self.finish)

    def _stopped(self) -> bool:
        if not self.stop:
            return False
        written = self.run.tokenizer.decode(self.ids)
        return any(text in written for text in self.stop)

    def _held(self, text: str) -> int:
        """How many characters at the end wait."""
        torn = len(text) - len(text.rstrip(TORN))
        sound = text[: len(text) - torn]
        starts = (n for stop in self.stop for n in range(len(stop) - 1, 0, -1) if sound.endswith(stop[:n]))
        return torn + max(starts, default=0)
