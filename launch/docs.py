"""Writes what the documents say from the code: docs/methods.md, docs/combinations.md, docs/surveys.md,
docs/absent.md, tables and quoted files.

python -m launch.docs
"""

import re

from configs import common
from launch.flags import ROOT
from molora_jax.catalogue import combinations, methods, surveys

QUOTED = re.compile(r"(<!-- file: (\S+) -->\n```python\n)(.*?)(?=```\n)", re.S)


def _quoted(match) -> str:
    """A fence under `<!-- file: PATH -->` holds that file, whole."""
    return match[1] + (ROOT / match[2]).read_text(encoding="utf-8")


def documents() -> dict[str, str]:
    """`{path below the root: text}` as they should be."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.compile(r"(?<=## Methods\n\n)\|.*?\n(?=\n)", re.S)
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {
        "README.md": table.sub(lambda _: methods.readme_table(), readme),
        "CONTRIBUTING.md": QUOTED.sub(_quoted, guide),
        "docs/methods.md": methods.document(),
        "docs/surveys.md": surveys.document(),
        "docs/absent.md": surveys.absent_document(),
        "docs/combinations.md": combinations.document(combinations.walk(common.get_config())),
    }


if __name__ == "__main__":
    for path, text in documents().items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(path)
