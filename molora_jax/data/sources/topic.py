"""`topic`: which of 21 subjects is a message about? 750 items. Metric: accuracy (small: report it with its count).

The first message of each conversation of the chatterbot corpus; see `conversations` for the files and the licence. The
message is the group.
"""

from molora_jax.data.example import Example
from molora_jax.data.sources import conversations

DISTRIBUTION = conversations.DISTRIBUTION
FILTERS = 1
LABELS = ()  # the categories of the corpus, known once it is read


def files():
    return conversations.files("topic")


def examples(files):
    talks = list(conversations.read(files))
    labels = tuple(sorted({category for category, _ in talks}))
    for category, turns in talks:
        if len(turns[0]) <= conversations.MOST_CHARACTERS:
            ask = f"Which topic is this message about?\n{turns[0]}"
            yield Example("topic", ask, category, turns[0].lower(), labels)
