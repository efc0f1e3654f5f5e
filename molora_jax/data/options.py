"""`config.data` as the data code reads it: every field, checked, with defaults for those that older configs lack."""

import dataclasses
import functools

from molora_jax.config.data_checks import raw_problems
from molora_jax.config.fields import FIELDS
from molora_jax.config.resolve import resolve_fields, resolve_template_args
from molora_jax.config.values import check_value, raise_all


@dataclasses.dataclass(frozen=True)
class Options:
    """The fields of `config.data` (see `configs/common.py`)."""

    tasks: str
    valid: str
    test_share: float
    format: str
    file_tasks: bool
    fields: str
    raw: bool
    template_args: str
    train_on: str
    seq_len: int
    temperature: float
    system: str
    overlong: str
    bad_rows: str
    reads: str = "text"  # of the objective: "text" (answers), "label" (a text and its class), "pair" (two answers)

    @classmethod
    def of(cls, config_data, reads: str = "text") -> "Options":
        """Raises InputError for a wrong value."""
        fields = FIELDS["data"]
        values = {name: getattr(config_data, name, field.default) for name, field in fields.items()}
        raise_all(
            [problem for name, field in fields.items() for problem in check_value(f"data.{name}", values[name], field)]
            or list(raw_problems(values))
        )
        resolve_template_args(values["template_args"])
        resolve_fields(values["fields"])
        return cls(**values, reads=reads)

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """A file's names of fields -> ours, "" for one that is left out."""
        return resolve_fields(self.fields)

    @property
    def reading(self) -> tuple:
        """What the examples of a file depend on beside its bytes."""
        return self.format, self.file_tasks, self.fields, self.raw, self.train_on, self.bad_rows, self.reads
