"""Four ways to answer the same strings, and what the base learns before: to copy what an instruction asks for.

Upper: dcba -> DCBA     Back: dcba -> abcd     Next: dcba -> edcb     Twice: dcba -> ddccbbaa
"""

import string

import numpy as np

LETTERS = string.ascii_lowercase
NEXT = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[:1])
TASKS = {
    "upper": ("Upper: {}", str.upper),
    "back": ("Back: {}", lambda text: text[::-1]),
    "next": ("Next: {}", lambda text: text.translate(NEXT)),
    "twice": ("Twice: {}", lambda text: "".join(2 * letter for letter in text)),
}
BEFORE = {
    "copy": ("Copy: {}", lambda text: text),
    "first": ("First: {}", lambda text: text[0]),
    "last": ("Last: {}", lambda text: text[-1]),
    "skip": ("Skip: {}", lambda text: text[::2]),
    "rest": ("Rest: {}", lambda text: text[1:]),
    "dash": ("Dash: {}", "-".join),
    "ends": ("Ends: {}", lambda text: text[0] + text[-1]),
    "capitals": ("Copy: {}", lambda text: text),  # of capital letters
}


def rows(name: str, count: int, seed: int) -> list[dict]:
    """Rows of a task, `prompt` and `target`: strings of three to six letters, each once."""
    ask, answer = (TASKS | BEFORE)[name]
    rng, found = np.random.default_rng([seed, *name.encode()]), {}
    while len(found) < count:
        text = "".join(rng.choice(list(LETTERS), rng.integers(3, 7)))
        text = text.upper() if name == "capitals" else text
        found[text] = dict(prompt=ask.format(text), target=answer(text))
    return list(found.values())
