"""`sentiment`: is a word positive or negative? 6.5 k items. Metric: accuracy.

File: `vaderSentiment/vader_lexicon.txt` (7,519 lines; vaderSentiment, MIT): `token<TAB>mean<TAB>deviation<TAB>ten
human ratings` from -4 to 4. Kept: lower-case words of three letters or more with a mean of at least 0.5 on either side.
The first five letters are the group ("foolish", "foolishly", "foolishness" stay together).
"""

import re

from molora_jax.data.example import Example
from molora_jax.data.packages import package_files

DISTRIBUTION = "vaderSentiment"
FILTERS = 1
LABELS = ("negative", "positive")


def files():
    return package_files(
        "sentiment", distribution=DISTRIBUTION, package="vaderSentiment", patterns=("vader_lexicon.txt",)
    )


def examples(files):
    for _, path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            word, mean, *_ = line.split("\t")
            if re.fullmatch("[a-z]{3,}", word) and abs(float(mean)) >= 0.5:
                ask = f'Is the word "{word}" positive or negative?'
                yield Example("sentiment", ask, LABELS[float(mean) > 0], word[:5], LABELS)
