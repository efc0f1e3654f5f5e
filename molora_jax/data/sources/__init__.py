"""Task families: name -> module.

A module has DISTRIBUTION (the pip name, "" for none), FILTERS (raise it when its output changes), `files()` giving
`[(name, path)]` and `examples(files)` giving `Example`s; `identity()` where the output depends on more than the
files, SEVERAL_ANSWERS where one question may occur with more than one answer.
"""

from molora_jax.data.sources import code, dialog, emoji, factbook, math, morph, sentiment, topic, translate

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
