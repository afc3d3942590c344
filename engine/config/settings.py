"""The base class of all tables of settings."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from engine.config.data_names.passwords import hidden
from engine.config.explain import describe
from engine.errors import ConfigError


def setting(
    default: Any,
    group: str,
    text: str,
    *,
    repeat: bool = False,
    expected: str = "",
    **limits: Any,
) -> Any:
    """A field of a table: its default (`...` if it must be given), heading, help and range.

    `repeat` makes its flag one that may be given several times, and `expected` says in words what a
    `pattern` takes. `limits` are pydantic's.
    """
    shown: JsonDict = {"group": group, "repeat": repeat, "expected": expected}
    return Field(default, description=text, json_schema_extra=shown, **limits)


class Settings(BaseModel):
    """A table of settings. Raises `ConfigError` naming every setting that cannot be used.

    `renamed` maps the earlier name of a field to its present one; both are read. Passwords of URLs
    are put aside before anything is stored, whichever setting they came in.
    """

    # Validators are built when a table is first filled: help only reads the fields.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        defer_build=True,
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    free_texts: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "system", "system_prompt", "train_on", "pattern", "query"}
    )
    """Texts that are what they say, even where they begin with a URL."""

    def __init__(self, /, **values: Any) -> None:
        try:
            shown = self._renamed(values)
            free = self.free_texts
            super().__init__(**{k: v if k in free else hidden(v) for k, v in shown.items()})
        except ValidationError as error:
            raise ConfigError(describe(error, type(self).model_fields, {})) from error

    @model_validator(mode="before")
    @classmethod
    def _no_switch_is_a_number(cls, values: Any) -> Any:
        """Let `true` be refused for a number, where pydantic would read it as 1."""
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        return {
            key: str(value).lower()
            if isinstance(value, bool) and key in fields and _takes_numbers(fields[key].annotation)
            else value
            for key, value in values.items()
        }

    def _renamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` under their fields' present names; those within a value are not keys of ours."""
        for earlier, present in self.renamed.items():
            if earlier in values and present in values:
                raise ConfigError(
                    f"`{earlier}` is the earlier name of `{present}`; both were given: remove one."
                )
        return {self.renamed.get(key, key): value for key, value in values.items()}

    def __hash__(self) -> int:
        """Of the values as JSON: a mapping among them has no hash of its own."""
        return hash(self.model_dump_json())


def _takes_numbers(annotation: Any) -> bool:
    """Whether a field is a number, or none, or one of some words; and neither switch nor text."""
    kinds, waiting = set[Any](), [annotation]
    while waiting:
        kind = waiting.pop()
        union = get_origin(kind) in (Union, UnionType)
        waiting += get_args(kind) if union else ()
        kinds |= set() if union else {kind}
    return not kinds.isdisjoint({int, float}) and kinds.isdisjoint({bool, str, Any})


S = TypeVar("S", bound=Settings)


def given_settings(table: type[S], whole: S | None, options: Mapping[str, Any]) -> S:
    """A table that a caller gave whole, or as `options`. Raises `ConfigError` for both at once."""
    if whole is None:
        return table(**options)
    if options:
        raise ConfigError(
            f"{', '.join(options)} came beside a whole {table.__name__}: put them into it, or give "
            "every setting by itself."
        )
    return whole


def with_present_names(value: Any, renamed: Mapping[str, str]) -> Any:
    """`value` with every earlier name of a key replaced, in mappings within it as well."""
    if isinstance(value, dict):
        return {
            renamed.get(key, key): with_present_names(item, renamed) for key, item in value.items()
        }
    return value


def group_of(field: FieldInfo) -> str:
    """The heading that a setting stands under in the help."""
    return str(_shown(field).get("group", "Options"))


def is_repeated(field: FieldInfo) -> bool:
    """Whether the flag of a setting may be given several times."""
    return bool(_shown(field).get("repeat", False))


def _shown(field: FieldInfo) -> Mapping[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}
