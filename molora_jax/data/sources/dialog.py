"""`dialog`: answer a message (small talk, trivia, technical support). 1.1 k items. Metric: NLL.

Neighbouring turns of the chatterbot corpus; see `conversations` for the files and the licence. The message is the
group; a message may have several answers, all in one split.
"""

from molora_jax.data.example import Example
from molora_jax.data.sources import conversations

DISTRIBUTION = conversations.DISTRIBUTION
FILTERS = 1
SEVERAL_ANSWERS = True
MOST_CHARACTERS = 140  # of an answer: one long one would raise the loss positions of every row


def files():
    return conversations.files("dialog")


def examples(files):
    for _, turns in conversations.read(files):
        for message, answer in zip(turns, turns[1:], strict=False):
            if len(message) <= conversations.MOST_CHARACTERS and len(answer) <= MOST_CHARACTERS:
                yield Example("dialog", message, answer, message.lower())
