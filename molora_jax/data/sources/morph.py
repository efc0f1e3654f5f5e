"""`morph`: inflect an English word. 45 k items in seven forms. Metric: exact match.

File: `lemminflect/resources/infl_lu.csv.gz` (40,450 rows; lemminflect, MIT; made from the NIH SPECIALIST lexicon):
`lemma,pos,forms`, one column a form, variants divided by `/` (the first is taken). Verb columns are past, past
participle (empty: same as the past), -ing, third person. Lower-case lemmas only; the lemma is the group, so the forms
of one word never straddle splits.
"""

import gzip
import re

from molora_jax.data.example import Example
from molora_jax.data.packages import package_files

DISTRIBUTION = "lemminflect"
FILTERS = 1

# Adverbs ask for the same two forms as adjectives in the same words, so that "fast" is one question, not two.
_ASK = dict(
    noun=('Plural of the noun "{}":',),
    verb=(
        'Past tense of the verb "{}":',
        'Past participle of the verb "{}":',
        'Present participle of the verb "{}":',
        'Third person singular of the verb "{}":',
    ),
    adj=('Comparative of "{}":', 'Superlative of "{}":'),
)
_ASK["adv"] = _ASK["adj"]


def files():
    return package_files(
        "morph", distribution=DISTRIBUTION, package="lemminflect", patterns=("resources/infl_lu.csv.gz",)
    )


def examples(files):
    for _, path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                lemma, pos, *forms = line.rstrip("\n").split(",")
                if pos not in _ASK or not re.fullmatch("[a-z]+", lemma):
                    continue
                if pos == "verb" and len(forms) > 1 and not forms[1]:
                    forms[1] = forms[0]
                for ask, form in zip(_ASK[pos], forms, strict=False):
                    form = form.split("/")[0].strip()
                    if form:
                        yield Example("morph", ask.format(lemma), form, lemma)
