"""`emoji`: the CLDR short names of emoji, from English into five languages. 9 k items. Metrics: exact match, NLL.

Files: `emoji/unicode_codes/emoji.json` (character -> `{"en": ":red_apple:", "status": 2, ...}`; status 2 is fully
qualified) and `emoji_<language>.json` (character -> name) of the package emoji (BSD-3). Skin-tone variants and names
that are the same in both languages are left out. The English name is the group.
"""

import json

from molora_jax.data.example import Example
from molora_jax.data.packages import package_files

DISTRIBUTION = "emoji"
FILTERS = 1
LANGUAGES = dict(fr="French", de="German", es="Spanish", it="Italian", pt="Portuguese")


def files():
    patterns = ("unicode_codes/emoji.json", *(f"unicode_codes/emoji_{language}.json" for language in LANGUAGES))
    return package_files("emoji", distribution=DISTRIBUTION, package="emoji", patterns=patterns)


def examples(files):
    tables = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files}
    characters = tables.pop("unicode_codes/emoji.json")
    for name, table in tables.items():
        language = LANGUAGES[name.removesuffix(".json").rsplit("_", 1)[1]]
        for character, entry in characters.items():
            if entry.get("status") != 2 or "skin_tone" in entry["en"] or character not in table:
                continue
            english, foreign = _words(entry["en"]), _words(table[character])
            if english != foreign:
                yield Example("emoji", f'{language} name of the emoji "{english}":', foreign, english)


def _words(name: str) -> str:
    return name.strip(":").replace("_", " ").strip()
