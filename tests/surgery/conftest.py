"""Three runs of plain LoRA on one base, of other numbers each, and one of another rank."""

import pytest

from tests.surgery.make import lora_rules, new_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = {name: new_run(folder / name, lora_rules(), seed=i) for i, name in enumerate("abc")}
    return made | {"wide": new_run(folder / "wide", lora_rules(rank=8, alpha=8.0), seed=9)}
