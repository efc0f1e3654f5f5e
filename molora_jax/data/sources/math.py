"""`math`: arithmetic and one-step word problems, generated. 4.5 k items. Metric: exact match.

No file: drawn from a fixed seed, repeats dropped. The question is the group.
"""

from molora_jax.data.example import Example, mixed, seed_of

DISTRIBUTION = ""
FILTERS = 1
DRAWS = 4980

_NAMES = ("Anna", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam")
_THINGS = ("apples", "books", "coins", "pencils", "stamps", "marbles", "tickets", "cards", "shells", "stickers")


def files():
    return []


def examples(files):
    draws = mixed(seed_of("math", 0), DRAWS * 5).reshape(DRAWS, 5)
    for draw in draws:
        kind, *numbers = (int(number) for number in draw)
        ask, answer = _KINDS[kind % len(_KINDS)](*numbers)
        yield Example("math", ask, str(answer), ask)


def _add(a, b, *_):
    a, b = a % 499 + 2, b % 499 + 2
    return f"What is {a} + {b}?", a + b


def _subtract(a, b, *_):
    a, b = a % 499 + 2, b % 499 + 2
    return f"What is {max(a, b)} - {min(a, b)}?", abs(a - b)


def _multiply(a, b, *_):
    a, b = a % 29 + 2, b % 29 + 2
    return f"What is {a} * {b}?", a * b


def _divide(a, b, *_):
    a, b = a % 29 + 2, b % 29 + 2
    return f"What is {a * b} / {b}?", a


def _gain(a, b, c, d):
    a, b = a % 90 + 3, b % 90 + 3
    name, thing = _NAMES[c % len(_NAMES)], _THINGS[d % len(_THINGS)]
    return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", a + b


def _loss(a, b, c, d):
    a, b = a % 90 + 5, b % 90 + 5
    a, b = max(a, b), min(a, b)
    name, thing = _NAMES[c % len(_NAMES)], _THINGS[d % len(_THINGS)]
    return f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?", a - b


def _boxes(a, b, c, d):
    a, b = a % 18 + 2, b % 18 + 2
    name, thing = _NAMES[c % len(_NAMES)], _THINGS[d % len(_THINGS)]
    return f"{name} has {a} boxes with {b} {thing} each. How many {thing} are there?", a * b


def _share(a, b, c, d):
    a, b = a % 18 + 2, b % 18 + 2
    thing = _THINGS[d % len(_THINGS)]
    return f"{a * b} {thing} are shared equally by {b} children. How many {thing} does each child get?", a


_KINDS = (_add, _subtract, _multiply, _divide, _gain, _loss, _boxes, _share)
