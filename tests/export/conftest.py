import pytest

from molora_jax.export.perform import perform
from tests.export import runs


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """`exported(name, case, format) -> (the run's folder, the exported folder, notes)`, each made once."""
    root, seen, notes = tmp_path_factory.mktemp("export"), {}, {}

    def export(name, case, format):
        if name not in seen:
            seen[name] = runs.made(root / name / "run", case)
        if (name, format) not in notes:
            said: list[str] = []
            perform(seen[name], format, root / name / format, note=said.append)
            notes[name, format] = said
        return seen[name], root / name / format, notes[name, format]

    return export
