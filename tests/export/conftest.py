import zlib

import pytest

from molora_jax.export.perform import perform
from tests.export import runs


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """`exported(name, case, format) -> (the run's folder, the exported folder, notes)`, each made once."""
    root, made, notes = tmp_path_factory.mktemp("export"), {}, {}

    def export(name, case, format):
        key = f"{name}-{zlib.crc32(repr(case).encode()):x}"  # tables of cases have names in common
        if key not in made:
            made[key] = runs.made(root / key / "run", case)
        if (key, format) not in notes:
            said: list[str] = []
            perform(made[key], format, root / key / format, note=said.append)
            notes[key, format] = said
        return made[key], root / key / format, notes[key, format]

    return export
