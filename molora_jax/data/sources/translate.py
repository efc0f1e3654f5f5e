"""`translate`: user-interface sentences from English into six languages. 3 k items. Metrics: chrF, target NLL.

Files: `django/**/locale/<language>/LC_MESSAGES/django*.po` (13 catalogues a language; Django, BSD-3). A catalogue is a
list of blank-line separated entries: comments (`#, fuzzy`), `msgctxt`, `msgid`, `msgstr`, each a quoted string that may
go on over the next lines. Skipped: fuzzy and plural entries, text with markup or placeholders, text of more than one
line. The English sentence is the group: all its translations are in one split.
"""

import re

from molora_jax.data.example import Example
from molora_jax.data.packages import package_files

DISTRIBUTION = "django"
FILTERS = 1
LANGUAGES = dict(fr="French", de="German", es="Spanish", it="Italian", pt="Portuguese", nl="Dutch")
MOST_CHARACTERS = 115

_ESCAPES = {r"\"": '"', r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def files():
    patterns = tuple(f"**/locale/{language}/LC_MESSAGES/django*.po" for language in LANGUAGES)
    return package_files("translate", distribution=DISTRIBUTION, package="django", patterns=patterns)


def examples(files):
    for name, path in files:
        language = LANGUAGES[name.split("/locale/")[1].split("/")[0]]
        for english, foreign in entries(path.read_text(encoding="utf-8")):
            if _plain(english) and _plain(foreign) and english != foreign:
                yield Example("translate", f"Translate into {language}: {english}", foreign, english)


def entries(text: str):
    """(msgid, msgstr) of every entry that is neither fuzzy nor plural nor the header."""
    for block in re.split(r"\n\s*\n", text):
        fields, field = {}, None
        for line in block.splitlines():
            line = line.strip()
            if line.startswith("#"):
                if line.startswith("#~") or (line.startswith("#,") and "fuzzy" in line):
                    fields = {"msgid_plural": ""}
                    break
                continue
            key, quote, rest = line.partition('"')
            if not quote or not rest.endswith('"'):
                continue
            field = key.strip() or field
            fields[field] = fields.get(field, "") + re.sub(
                r"\\.", lambda m: _ESCAPES.get(m.group(), m.group()), rest[:-1]
            )
        if fields.get("msgid") and fields.get("msgstr") and "msgid_plural" not in fields:
            yield fields["msgid"], fields["msgstr"]


def _plain(text: str) -> bool:
    words = any(c.isalpha() for c in text)
    return words and text == text.strip() and len(text) <= MOST_CHARACTERS and not re.search(r"[%{<>\n\\|]", text)
