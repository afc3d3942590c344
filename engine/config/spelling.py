"""Validators that accept settings in the spellings people use."""

import math
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator

from engine.config.choices import POLICIES, PRUNABLES, Auto
from engine.config.numbers import is_count
from engine.storage import strict_json
from engine.storage.home import can_be_named, expanded

Name = TypeVar("Name", str, Path)

DTYPES = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}
OPTIMIZERS = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw8"), "adamw8bit"),
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), "adamw"),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), "lion8bit"),
}
CHECKPOINTING = dict.fromkeys(("true", "yes", "on", "unsloth"), "selective") | dict.fromkeys(
    ("false", "no", "off"), "none"
)

METRIC_NAMES = {
    "l2": "l2-weights",
    "activation": "l2-output",
    "reconstruction": "l2-reconstruction",
}
"""Earlier and shorter names of metrics."""

PRECISIONS = dict.fromkeys(("16", "16-bit", "bf16", "bfloat16", "dense"), "16bit") | dict.fromkeys(
    ("8", "8-bit", "int8"), "8bit"
)


def spelled(table: Mapping[str, str]) -> BeforeValidator:
    """A validator that replaces the other spellings in `table`, whatever their case."""

    def replace(value: Any) -> Any:
        if type(value).__name__ == "dtype":  # torch.float32, without importing torch
            value = str(value).removeprefix("torch.")
        if isinstance(value, str | bool):
            text = str(value).strip().lower()
            return table.get(text, text)
        return value

    return BeforeValidator(replace)


def auto_or_number(least: int, most: int) -> BeforeValidator:
    """A validator of `auto`, or of a whole number inside bounds."""

    def read(value: Any) -> int | str:
        text = str(value).strip().lower()
        if text == "auto":
            return text
        if is_count(text) and least <= int(text) <= most:
            return int(text)
        raise ValueError(f"expected auto or a whole number from {least} to {most}")

    return BeforeValidator(read)


ChunkTokens = Annotated[Auto | int, auto_or_number(1, 1 << 20)]
"""Tokens of a chunk of the loss; auto is `kernels.loss.linear_cross_entropy.chunk_tokens`."""


def given_chunk(value: Auto | int) -> int | None:
    """The number that was asked for; None where the loss chooses."""
    return None if value == "auto" else int(value)


DEVICE = r"^(auto|cpu|cuda(:[0-9]{1,4})?)$"
DEVICES = "auto, cpu, cuda or cuda:1 (the second GPU)"
BAD_LINES = r"^(fail|skip|skip:[0-9]{1,3}(\.[0-9]+)?%)$"
BAD_LINES_WORDS = "fail, skip or skip:5% (stop when more than 5 % are bad)"
POLICY = f"({'|'.join(POLICIES)})"


def checkpointing_policies(value: Any) -> Any:
    """Other spellings of a checkpointing policy; a list of policies as one text."""
    if isinstance(value, list | tuple):
        value = ",".join(str(item) for item in value)
    text = str(value).strip().lower().replace(" ", "")
    return CHECKPOINTING.get(text, text)


def comma_list(value: Any) -> Any:
    """`"a, b"` as `["a", "b"]`; "none" and "" as the empty list; anything else as it is."""
    if value is None:
        return ()
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        return [part for part in parts if part and part.lower() != "none"]
    return value


def numbers(value: Any) -> Any:
    """One number or several with commas between them; 0 alone as none, which lets others choose."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    listed = comma_list(value)
    if listed in (["0"], [0]):
        return ()
    if isinstance(listed, list | tuple) and any(
        not is_count(str(item)) or int(item) < 1 for item in listed
    ):
        raise ValueError("should be numbers from 1 on with commas between them")
    return listed


def one_or_many(value: Any) -> Any:
    """One path or a list of paths, as a tuple of strings."""
    if value is None:
        return ()
    if isinstance(value, str | Path):
        return (str(value),)
    if isinstance(value, list | tuple):
        return tuple(str(item) if isinstance(item, Path) else item for item in value)
    return value


def minus_one_is_none(value: Any) -> Any:
    """-1 as other trainers write it: no limit."""
    return None if value in (-1, "-1") else value


def json_object(value: Any) -> Any:
    """`'{"enable_thinking": false}'` as a mapping."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return strict_json.loads(value)
    except ValueError as error:
        raise ValueError(
            f'should be a JSON object such as {{"enable_thinking": false}}: {error}'
        ) from error


def iso_date(value: Any) -> Any:
    """A date, or a date and time, as text in ISO form."""
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).isoformat()
        except ValueError as error:
            raise ValueError("should be a date such as 2026-01-31 or 2026-01-31T12:00") from error
    return value


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)
_GIGABYTE = 10**9


def size_in_bytes(value: Any) -> Any:
    """`"8GiB"` and `"8GB"` as numbers of bytes; 1 GiB is 2^30 and 1 GB 10^9."""
    size = _bytes(value) if isinstance(value, str) else value
    if isinstance(size, int | float) and not isinstance(size, bool) and size < 1 << 20:
        raise ValueError("is less than 1 MiB; write a unit, such as 8GiB")
    return size


def number_of_bytes(value: Any) -> Any:
    """`"64KiB"` and `"16MiB"` as numbers of bytes; a number as it is."""
    return _bytes(value) if isinstance(value, str) else value


def number_and_size(text: str) -> tuple[int, str | None]:
    """The number of GPUs, and the memory of each as text where it is given: 8x80GiB, or 8."""
    number, times, _ = text.lower().partition("x")
    return int(number), text[len(number) + 1 :].strip() if times else None


def auto_or_size(value: Any) -> Any:
    """`"auto"` as it is, none as None, and sizes as `size_in_bytes` reads them."""
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() == "auto"):
        return "auto" if value else None
    return None if value == "none" else size_in_bytes(value)


SizeToFit = Annotated[Auto | int | None, BeforeValidator(auto_or_size)]
"""Bytes that a run is to fit; auto is what this machine has."""


def shard_size(value: Any) -> Any:
    """`"5"`, 5 and 5.0 as 5 GB, `"900MB"` as that, and an integer from 1,000 on as bytes."""
    if isinstance(value, str):
        plain = re.fullmatch(r"\s*\d*\.?\d+(e[+-]?\d+)?\s*", value, re.ASCII)
        return _whole(float(value) * _GIGABYTE) if plain else _bytes(value)
    gigabytes = isinstance(value, float) or (type(value) is int and 0 < value < 1000)
    return _whole(value * _GIGABYTE) if gigabytes else value


def _whole(size: float) -> int:
    """A size in bytes, the part of a byte left out."""
    if not math.isfinite(size):
        raise ValueError("is more than any disk or memory holds")
    return int(size)


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("should be a size such as 8GiB, 7.5GB or 900MiB")
    number, unit, binary = match.groups()
    power = " kmgt".index(unit.lower() or " ")
    return _whole(float(number) * (1024 if binary else 1000) ** power)


def nameable(name: Name) -> Name:
    """`name`, which must be one that a file can have."""
    if not can_be_named(name):
        raise ValueError("holds a character that no file's name can have")
    return name


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def written_path(text: str) -> Path:
    """A path as it is written in a file or a flag, with ~ for a home.

    Raises `ValueError` for a text that `Path` would make a path of, and nobody meant as one.
    """
    if not text:
        raise ValueError("is empty; name a file or a folder, or leave it out")
    if _URL.match(text):
        raise ValueError(
            "is a URL; a path on this machine is expected, so mount or copy what it is"
        )
    return expanded(nameable(text))


FolderOrWord = Annotated[str, AfterValidator(nameable)]
"""A folder, or a word in its stead."""


def as_text(value: Any) -> Any:
    """A path as text."""
    return str(value) if isinstance(value, Path) else value


def none_is_unset(value: Any) -> Any:
    """`"none"` and `""` as None."""
    return None if isinstance(value, str) and value.lower() in ("none", "") else value


def layer_numbers(value: Any) -> Any:
    """`"0,1,-1"`, or one number, as the numbers of layers."""
    if type(value) is int:
        return (value,)
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    try:
        if not value.isascii():  # int() reads the digits of every script
            raise ValueError
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{value!r} is no list of layer numbers, such as 0,1,-1") from error


def optional(check: Callable[[float], float]) -> Callable[[float | None], float | None]:
    """A validator that leaves None alone."""
    return lambda value: None if value is None else check(value)


def budget(value: Any) -> Any:
    """`params=0.8` or `latency=0.8`: a share of a whole model's parameters or time."""
    if value is None:
        return None
    kind, sign, share = str(value).replace(" ", "").partition("=")
    kind = {"parameters": "params", "ms": "latency"}.get(kind, kind)
    try:
        number = float(share)
    except ValueError:
        number = 0.0
    if kind not in ("params", "latency") or not sign or not 0 < number < 1:
        raise ValueError("expected params=SHARE or latency=SHARE, with a share between 0 and 1")
    return f"{kind}={number:g}"


def parts_of_a_model(value: Any) -> Any:
    """Parts to prune, with commas between them, in the order in which they are known."""
    listed = comma_list(value)
    named = [str(part).strip() for part in listed] if isinstance(listed, list | tuple) else [value]
    known = [part for part in PRUNABLES if part in named]
    if len(known) != len(named) or not known:
        raise ValueError(f"should be one or several of {', '.join(PRUNABLES)}")
    return ",".join(known)


def inner_share(value: float) -> float:
    """A share between 0 and 1, both left out."""
    if not 0 < value < 1:
        raise ValueError("should be a number between 0 and 1, such as 0.2")
    return value
