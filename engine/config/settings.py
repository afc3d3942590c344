"""The base class of all tables of settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from engine.config.data_names.passwords import hidden
from engine.config.explain import describe
from engine.config.numbers import in_range, plain_number
from engine.config.spelling import nameable, written_path
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
        except UnicodeEncodeError as error:
            # pydantic takes no half characters in the words of a validator, which quote a name.
            raise ConfigError(f"The configuration cannot be used: {error.object}") from error

    @model_validator(mode="wrap")
    @classmethod
    def _keys_are_text(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Let a table within another be refused by name for a key that is no text."""
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            value = {str(key): item for key, item in value.items()}
        return handler(value)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Let `true` be refused for a number, where pydantic would read it as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if _is_path(annotation):
            value = _read_paths(value)
        return plain_number(value, annotation)

    @field_validator("*", mode="after")
    @classmethod
    def _usable(cls, value: Any, info: ValidationInfo) -> Any:
        """Numbers in range, and names that files can have."""
        paths = value if isinstance(value, tuple) else (value,)
        for path in paths:
            if isinstance(path, Path):
                nameable(path)
        return in_range(value, cls.model_fields[str(info.field_name)].metadata)

    def _renamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` under their fields' present names; those within a value are not keys of ours."""
        for earlier, present in self.renamed.items():
            if earlier in values and present in values:
                raise ConfigError(
                    f"`{earlier}` is the earlier name of `{present}`; both were given: remove one."
                )
        return {self.renamed.get(key, key): value for key, value in values.items()}

    def __hash__(self) -> int:
        """Of the values as text: a mapping among them has no hash, a path may be no UTF-8."""
        return hash(repr(self))


def _is_path(annotation: Any) -> bool:
    """Whether a field takes a path, and no other text."""
    kinds = (annotation, *get_args(annotation))
    return Path in kinds and str not in kinds


def _read_paths(value: Any) -> Any:
    """A text, or each of several, as the path that it is; anything else as it is."""
    if isinstance(value, list | tuple):
        return [_read_paths(item) for item in value]
    return written_path(value) if isinstance(value, str) else value


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
