"""What becomes of another program's configuration, key by key."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.data_names.passwords import shown_value


@dataclass(frozen=True)
class Translated:
    """A setting of ours, and the key (or the default) of the other program that it comes from."""

    value: Any
    origin: str


@dataclass
class Translation:
    """Our settings; keys that need none, with the reason; keys without a counterpart."""

    program: str
    settings: dict[str, Translated] = field(default_factory=dict)
    needless: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """The settings as `TrainConfig` takes them."""
        return {name: entry.value for name, entry in self.settings.items()}


class GivenKeys:
    """A configuration that is read key by key; what nobody took is reported as unknown.

    A key with no value (null) is one that its program does not see either.
    """

    def __init__(self, program: str, given: Mapping[str, Any]) -> None:
        self.result = Translation(program)
        self.left = {key: value for key, value in given.items() if value is not None}

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as read from now on."""
        return self.left.pop(key, default)

    def put(self, setting: str, value: Any, origin: str) -> None:
        """Set one of ours; what came first stays."""
        self.result.settings.setdefault(setting, Translated(value, origin))

    def default(self, setting: str, value: Any) -> None:
        """Set one of ours to what the other program does where nothing is said."""
        self.put(setting, value, f"{self.result.program}'s default")

    def number(self, key: str, default: float | None = None) -> float | None:
        """Take a number; a value that is none is missing."""
        return self.as_number(key, self.take(key, default))

    def as_number(self, key: str, value: Any) -> float | None:
        """A value of `key` as a finite number; one that is none is missing, unless it is empty."""
        if value is None or value is False or value == "":  # not in: 0 equals False
            return None
        try:
            number = math.nan if value is True else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        self.miss(key, f"{shown_value(key, value)[:60]} is no number")
        return None

    def table(self, key: str) -> dict[str, Any]:
        """Take a mapping; another value is missing, unless it is empty."""
        value = self.take(key)
        if isinstance(value, Mapping):
            return {str(name): item for name, item in value.items()}
        if value not in (None, False, "", []):
            self.miss(key, f"{shown_value(key, value)[:60]} is no mapping of names to values")
        return {}

    def several(self, key: str) -> list[Any]:
        """Take a list, or the one value that there is."""
        value = self.take(key)
        if isinstance(value, list | tuple):
            return list(value)
        return [] if value in (None, False, "") else [value]

    def copy(self, table: Mapping[str, str]) -> None:
        """Take keys whose values mean the same under our name."""
        for key, setting in table.items():
            if key in self.left:
                self.put(setting, self.take(key), key)

    def copy_or_default(self, table: Mapping[str, tuple[str, Any]]) -> None:
        """Take such keys; of one that is not there, what the other program does without it."""
        for key, (setting, default) in table.items():
            self.copy({key: setting})
            self.default(setting, default)

    def choose(self, key: str, setting: str, table: Mapping[str, Any], default: str) -> None:
        """Take a key whose values have other names here; one without any is missing."""
        asked = key in self.left
        value = str(self.take(key, default)).lower()
        if value in table:
            origin = key if asked else f"{self.result.program}'s default"
            self.put(setting, table[value], origin)
        else:
            self.miss(key, f"there is no {value!r} for `{setting}`; its default stays")

    def miss(self, key: str, why: str) -> None:
        """Report a key whose wish is not met."""
        self.result.missing[key] = why

    def miss_if_asked(self, table: Mapping[str, str]) -> None:
        """Report keys without a counterpart where they ask for something: not false, 0 or empty."""
        for key, why in table.items():
            if key in self.left:
                if self.take(key) in (False, 0, "", "no", "none", [], {}):
                    self.result.needless[key] = "it asks for nothing"
                else:
                    self.miss(key, why)

    def drop(self, keys: Iterable[str], why: str) -> None:
        """Take keys that need no counterpart."""
        for key in keys:
            if key in self.left:
                self.take(key)
                self.result.needless[key] = why

    def drop_by_reason(self, table: Mapping[str, Iterable[str]]) -> None:
        """Take keys that need no counterpart, by the reason why."""
        for why, keys in table.items():
            self.drop(keys, why)

    def whole(self, key: str, setting: str, default: float) -> None:
        """A number of epochs, which here is whole: a part of one is rounded up."""
        asked = key in self.left
        value = self.number(key, default)
        if value is None:
            return
        whole = max(1, int(-(-value // 1)))
        self.put(setting, whole, key if asked else f"{self.result.program}'s default")
        if whole != value:
            self.miss(key, f"`{setting}` is a whole number: {value:g} became {whole}")

    def finish(self) -> Translation:
        """The translation; keys that nobody took are unknown."""
        made = self.result.settings
        if "eval_every" in made and not {"heldout", "eval_data"} & made.keys():
            self.miss(made.pop("eval_every").origin, "no rows are held out to evaluate on")
        for name in ("early_stopping", "load_best_at_end", "save_best"):
            if name in made and "eval_every" not in made:
                self.miss(made.pop(name).origin, "nothing is evaluated while the run trains")
        for key, value in self.left.items():
            self.miss(key, f"this key ({shown_value(key, value)[:60]}) is not known here")
        return self.result


def stands(path: str | Path) -> bool:
    """Whether there is such a file or folder; a name that none can have names none."""
    return os.path.exists(path)  # noqa: PTH110 - that of Path raises for such names


def compute_type(source: GivenKeys) -> None:
    """`bf16` and `fp16`, which most programs have."""
    bf16, fp16 = source.take("bf16"), source.take("fp16")
    if bf16 in (True, "true", "full"):
        source.put("dtype", "bfloat16", "bf16")
    elif fp16 in (True, "true"):
        source.put("dtype", "float16", "fp16")
    elif bf16 == "auto" or fp16 == "auto":
        source.put("dtype", "auto", "bf16")
    elif bf16 is False and fp16 in (False, None):
        source.put("dtype", "float32", "bf16")


def checkpointing(source: GivenKeys, key: str = "gradient_checkpointing") -> None:
    """Recomputation: how much of it does not change a result, only memory and time."""
    asked = source.take(key)
    if asked in (False, "false"):
        source.put("gradient_checkpointing", "none", key)
    elif asked is not None:
        source.put("gradient_checkpointing", "auto", key)


def heldout(source: GivenKeys, key: str) -> None:
    """A share of the rows held out; a number of rows has no counterpart."""
    value = source.number(key)
    if value is None or value == 0:
        return
    if value < 1:
        source.put("heldout", value, key)
    else:
        source.miss(key, f"{value:g} rows: `heldout` is a share of the rows, such as 0.05")


ADAMW = {
    **dict.fromkeys(
        ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw8bit", "adamw_torch_8bit"),
        "adamw8bit",
    ),
    **dict.fromkeys(
        ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit"), "adamw"
    ),
}
OPTIMIZERS = ADAMW | {
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), "lion8bit"),
    "adafactor": "adafactor",
    "muon": "muon",
}
PROCESSES = "`gpus` or torchrun starts processes; for less memory, `memory_budget` or `offload`"
KERNELS = "the kernels are fused already"
NEVER_PADDED = "rows are never padded"
NOT_EIGHT_BITS = "8-bit bases are not trained on: the base has 16 bits, or 4"
NO_HEAD = "embeddings and head are not trained beside an adapter"
SAME_VOCABULARY = "the vocabulary stays"
NO_PREFERENCES = "learnt are rows, a teacher and preferences, offline"
NOTHING_UPLOADED = "nothing is uploaded"

OBJECTIVES = {
    "dpo": "dpo", "sigmoid": "dpo", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo",
    "cpo": "cpo",
}  # fmt: skip


def preferences(source: GivenKeys, key: str, asked: Any, table: Mapping[str, str]) -> None:
    """The objective that `key` asks for, with the settings of it that `table` renames."""
    objective = OBJECTIVES.get(str(asked).lower())
    if objective is None:
        source.miss(key, f"{asked!r}: {NO_PREFERENCES}")
        return
    source.put("objective", objective, key)
    source.copy(table)
