"""One tiny trained run for all tests of this folder."""

import pytest

from tests.tiny import train_tiny


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("tiny"))
