"""The base class of the sections of a pipeline file, which reports all problems at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from kdcache.config.yaml_lines import Place, refusal
from kdcache.errors import UsageError

Count = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
S = TypeVar("S", bound=BaseModel)


class Section(BaseModel):
    """A section of a pipeline file. Unknown keys, wrong types and invalid combinations are all reported at once."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield the keys of an invalid combination, and the message about the first of them."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, given: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
        """Validate the section, and check combinations of the valid keys even if others are invalid."""
        problems: list[tuple[Any, Any, Place]] = []
        bad: set[str | int] = set()
        try:
            section = validate(given)
        except ValidationError as error:
            if not isinstance(given, dict):
                raise
            problems = [(one["type"], one["msg"], one["loc"]) for one in error.errors()]
            bad = {loc[0] for _, _, loc in problems}
            valid = {key: given[key] for key in cls.model_fields if key in given and key not in bad}
            missing = {key: "" for key, field in cls.model_fields.items() if field.is_required()}
            section = cls.model_construct(**{**missing, **valid})
        for keys, message in section._combinations():
            if bad.isdisjoint(keys):
                problems.append(("combination", message, keys[:1]))
        if problems:
            details = [InitErrorDetails(type=PydanticCustomError(a, b), loc=c, input=None) for a, b, c in problems]
            raise ValidationError.from_exception_data(cls.__name__, details)
        return section


def validated(section: type[S], given: Any, what: str) -> S:
    """Return a section made of plain values, such as the keyword arguments of a call.

    Args:
        section: its type.
        given: a mapping, as a pipeline file would have it.
        what: the thing that it describes, for error messages.

    Raises:
        UsageError: with everything that is wrong.
    """
    try:
        return section.model_validate(given)
    except ValidationError as error:
        raise _refused(error, section, given, what) from None


def section_with(section: type[S], given: S | Mapping[str, Any] | None, options: Mapping[str, Any], what: str) -> S:
    """Return a section from a section, a mapping or keyword arguments, of which the latter replace the others.

    Args:
        section: its type.
        given: the section, or a mapping as a pipeline file would have it; None for the defaults.
        options: keyword arguments.
        what: the thing that it describes, for error messages.

    Raises:
        UsageError: with everything that is wrong.
    """
    if isinstance(given, section) and not options:
        return given
    before = given.model_dump() if isinstance(given, section) else dict(given or {})
    return validated(section, {**before, **options}, what)


def places_of_keys(section: type[BaseModel], place: str = "") -> dict[str, list[str]]:
    """Return the places of every key of a section and of the sections inside it, such as `student.train.lr` of `lr`.

    `*` stands for a kind or for a name that the user gives, as in `loss.controller.*.low`.
    """
    places: dict[str, list[str]] = {}
    for name, field in section.model_fields.items():
        at = f"{place}.{name}".lstrip(".")
        places.setdefault(name, []).append(at)
        for kind, inside in _sections_in(field.annotation):
            for key, of_key in places_of_keys(kind, f"{at}.*" if inside else at).items():
                places[key] = list(dict.fromkeys([*places.get(key, []), *of_key]))
    return places


def _sections_in(annotation: Any, depth: int = 0) -> Iterator[tuple[type[BaseModel], bool]]:
    """Yield the sections that a field may have, and whether they are inside another type, such as an optional one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, depth > 1
    for part in get_args(annotation):
        yield from _sections_in(part, depth + 1)


def _refused(error: ValidationError, section: type[BaseModel], given: Any, what: str) -> UsageError:
    places = dict.fromkeys(_places(given), "")
    return refusal(
        error, places, "", places_of_keys(section), what, "correct each of them; docs/PIPELINES.md lists them"
    )


def _places(given: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the path of every value in a mapping."""
    for key, value in given.items() if isinstance(given, dict) else ():
        yield (*place, key)
        yield from _places(value, (*place, key))
