"""What every section of a pipeline file is: everything that is wrong with one is found at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from kdcache.config.yaml_lines import Place


class Section(BaseModel):
    """A section of a pipeline file: unknown keys, wrong types and impossible combinations are refused, all at once."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Keys whose values cannot stand together, and what to say of the first of them."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, given: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
        problems: list[tuple[Any, Any, Place]] = []
        bad: set[str | int] = set()
        try:
            section = validate(given)
        except ValidationError as error:
            if not isinstance(given, dict):
                raise
            problems = [(one["type"], one["msg"], one["loc"]) for one in error.errors()]
            bad = {loc[0] for _, _, loc in problems}
            # Combinations of the keys that are well are judged all the same.
            well = {key: given[key] for key in cls.model_fields if key in given and key not in bad}
            lacking = {key: "" for key, field in cls.model_fields.items() if field.is_required()}
            section = cls.model_construct(**{**lacking, **well})
        for keys, message in section._combinations():
            if bad.isdisjoint(keys):
                problems.append(("combination", message, keys[:1]))
        if problems:
            details = [InitErrorDetails(type=PydanticCustomError(a, b), loc=c, input=None) for a, b, c in problems]
            raise ValidationError.from_exception_data(cls.__name__, details)
        return section
