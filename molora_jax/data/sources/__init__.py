"""Task families: name -> module.

A module has DISTRIBUTION (the pip name, "" for none), FILTERS (raise it when its output changes), `files()` giving
`[(name, path)]` and `examples(files)` giving `Example`s; `identity()` where the output depends on more than the
files, SEVERAL_ANSWERS where one question may occur with more than one answer. `verify(question, answer)` where
answers are judged by more than their text.

A family (`FAMILIES`) is a class of such modules: `rg:NAME` is `FAMILIES["rg"](NAME)`.
"""

from molora_jax.data.sources import (
    bigbench,
    code,
    dialog,
    emoji,
    factbook,
    math,
    morph,
    reasoning,
    sentiment,
    topic,
    translate,
)

SOURCES = dict(
    morph=morph,
    translate=translate,
    emoji=emoji,
    factbook=factbook,
    sentiment=sentiment,
    topic=topic,
    dialog=dialog,
    code=code,
    math=math,
)

FAMILIES = dict(rg=reasoning.Task, bb=bigbench.Task)


def find(entry: str):
    """The source of an entry of `data.tasks` that is no file."""
    family, colon, name = entry.partition(":")
    return FAMILIES[family](name) if colon else SOURCES[entry]
