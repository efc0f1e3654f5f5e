"""A field that a `config.json` lacks means what transformers means by that (`tests/fixtures/make_absent_fields.py`)."""

import json
import pathlib

import pytest

from molora_jax.backbones import hf_fields
from molora_jax.backbones.families import FAMILIES
from molora_jax.backbones.hf_config import from_hf
from molora_jax.errors import InputError
from tests.backbones import family_cases

FOUND = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "absent_fields.json").read_text())
SIZES = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"}  # asked for


def read(config: dict):
    """The backbone, or the error; of the fields that are read."""
    family = config["model_type"]
    names = {"model_type", *hf_fields.READ, *FAMILIES[family].reads}
    try:
        return from_hf({name: value for name, value in config.items() if name in names}, where="config.json")
    except InputError as error:
        return str(error)


def test_the_fixture_has_every_family():
    assert FAMILIES.keys() == FOUND.keys() | {"gemma3"}  # whose text_config is gemma3_text's


@pytest.mark.parametrize("family", FOUND)
def test_an_absent_field_means_what_transformers_means(family):
    means = FOUND[family]["means"]
    plain = read(means)
    assert not isinstance(plain, str) and read(FOUND[family]["least"]) == plain
    for field, changes in FOUND[family]["without"].items():
        found = read({name: value for name, value in means.items() if name != field})
        if isinstance(found, str) and field in SIZES - FAMILIES[family].defaults.keys():
            assert f"{field}: got None" in found
            continue
        assert found == read({**means, **changes}), field
        contradicts = field in ("use_sliding_window", "sliding_window") and "layer_types" in means
        assert not isinstance(found, str) or contradicts, field


def test_a_window_of_null_is_refused_where_layers_slide():
    with pytest.raises(InputError, match="sliding_window: got None; expected a positive int"):
        from_hf(family_cases.config("gemma3_text", sliding_window=None), where="c")
