"""One tiny trained run for all tests of this folder."""

import pytest

from tests.tiny import copy_of_tiny_run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    return copy_of_tiny_run(tmp_path_factory, tmp_path_factory.mktemp("tiny"))
