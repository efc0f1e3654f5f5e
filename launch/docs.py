"""Writes what the documents say from the code: docs/methods.md, docs/combinations.md and the README's table.

python -m launch.docs
"""

import re

from configs import common
from launch.flags import ROOT
from molora_jax import combinations, methods


def documents() -> dict[str, str]:
    """`{path below the root: text}` as they should be."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.compile(r"(?<=## Methods\n\n)\|.*?\n(?=\n)", re.S)
    return {
        "README.md": table.sub(lambda _: methods.readme_table(), readme),
        "docs/methods.md": methods.document(),
        "docs/combinations.md": combinations.document(combinations.walk(common.get_config())),
    }


if __name__ == "__main__":
    for path, text in documents().items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(path)
