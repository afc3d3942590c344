"""Read the rotary parameters of a `config.json`, in either spelling.

transformers 5 has them in `rope_parameters`, transformers 4 in `rope_theta`, `rope_scaling` and
`partial_rotary_factor`. What they mean is in `models.layers.rotary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.family import Family
from models.families.json_values import boolean, listed, positive

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
# Rows of a picture's positions: for text they are equal, and the rotation the plain one. The
# other two are notes of those who made the file.
_WITHOUT_EFFECT = ("mrope_section", "mrope_interleaved", "finetuned", "rope_interleaved")
_KNOWN = frozenset(
    {
        *_WITHOUT_EFFECT,
        "type",
        "rope_type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    }
)
_YARN_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_LONGEST = 2**31
_RANGE = (1e-12, 1e12)
"""Within it angles and their scale are finite, whatever the numbers are together."""


def read_rope_parameters(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The rotary parameters in transformers 5 spelling, whichever spelling the file uses.

    Precedence: `rope_parameters` or `rope_scaling`, then top-level keys, then defaults. A
    top-level `original_max_position_embeddings` wins over a nested one, as in transformers.
    Raises `ValueError` with one sentence that names the key.
    """
    nested = _nested(raw)
    dropped = (*_WITHOUT_EFFECT, "type", "partial_rotary_factor")
    rope = {k: v for k, v in nested.items() if v is not None and k not in dropped}
    rope["rope_type"] = _kind(nested)
    theta = raw.get("rope_theta")
    rope.setdefault("rope_theta", family.rope_theta if theta is None else theta)
    rope["rope_theta"] = _number(rope, "rope_theta")
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"rope_type is {rope['rope_type']!r}; supported are {', '.join(ROPE_TYPES)}"
        )
    _partial_rotation(rope, nested, raw, family)
    if rope["rope_type"] != "default":
        _scaling(rope, raw)
    return rope


def _nested(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object of the file that holds the parameters; empty where it has none.

    A file that has both spellings must mean the same by them: which of two scalings its weights
    were trained with cannot be known.
    """
    objects: dict[str, Mapping[str, Any]] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} is {value!r}; expected an object")
        if any(isinstance(part, Mapping) for part in value.values()):
            raise ValueError(
                f"{key} per layer type are not used by the supported families: {value!r}"
            )
        unknown = sorted(str(part) for part in value if part not in _KNOWN)
        if unknown and _kind(value) in ROPE_TYPES:
            raise ValueError(
                f"{key} has the unknown keys {listed(unknown)}; known are "
                f"{', '.join(sorted(_KNOWN))}"
            )
        if value:
            objects[key] = value
    if len(objects) == 2:
        new, old = (
            {k: v for k, v in value.items() if k not in ("type", "rope_type") and v is not None}
            | {"rope_type": _kind(value)}
            for value in objects.values()
        )
        if any(new[key] != value for key, value in old.items() if key in new):
            raise ValueError(
                f"rope_parameters is {objects['rope_parameters']!r} and rope_scaling is "
                f"{objects['rope_scaling']!r}, which contradict each other; keep the one that the "
                "model was trained with"
            )
        return {**objects["rope_scaling"], **objects["rope_parameters"]}
    return next(iter(objects.values()), {})


def _kind(nested: Mapping[str, Any]) -> Any:
    return nested.get("rope_type", nested.get("type", "default"))


def _scaling(rope: dict[str, Any], raw: Mapping[str, Any]) -> None:
    """Check and complete the parameters of a scaled rotation, in place."""
    rope["factor"] = _number(rope, "factor")
    original = raw.get("original_max_position_embeddings")
    if original is None:
        original = rope.get("original_max_position_embeddings")
    if original is None or rope["rope_type"] == "dynamic":
        original = raw.get("max_position_embeddings", 2048)
    rope["original_max_position_embeddings"] = original
    if positive(rope, "original_max_position_embeddings") > _LONGEST:
        raise ValueError(
            f"original_max_position_embeddings is {original!r}; expected at most {_LONGEST}"
        )
    _number(rope, "original_max_position_embeddings")
    if rope["rope_type"] == "llama3":
        low = rope["low_freq_factor"] = _number(rope, "low_freq_factor", 1.0)
        high = rope["high_freq_factor"] = _number(rope, "high_freq_factor", 4.0)
        if high <= low:
            raise ValueError(f"high_freq_factor {high} must be greater than low_freq_factor {low}")
    if rope["rope_type"] == "yarn":
        for key in _YARN_NUMBERS:
            # A scale of 0 is how some files say that there is none.
            if key in rope and not (key.startswith("mscale") and rope[key] == 0):
                _number(rope, key)
        if rope.get("beta_fast", 32.0) < rope.get("beta_slow", 1.0):
            raise ValueError(
                f"beta_fast is {rope.get('beta_fast', 32.0)}, less than beta_slow, "
                f"{rope.get('beta_slow', 1.0)}"
            )
        if rope["rope_theta"] <= 1.0:
            raise ValueError(f"rope_theta is {rope['rope_theta']}; yarn needs more than 1")
        boolean(rope, "truncate", True)


def _partial_rotation(
    rope: dict[str, Any], nested: Mapping[str, Any], raw: Mapping[str, Any], family: Family
) -> None:
    """Put `partial_rotary_factor` into `rope` where the family rotates a part of each head."""
    default = 1.0 if family.partial_rotary is None else family.partial_rotary
    part = nested.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    part = default if part is None else part
    if family.partial_rotary is None:
        if part != 1.0:
            raise ValueError(f"partial_rotary_factor is {part!r}; this family rotates whole heads")
        return
    part = positive({"partial_rotary_factor": part}, "partial_rotary_factor")
    dim = raw.get("head_dim") or family.head_dim or 0
    if part > 1.0 or int(dim * part) % 2 or int(dim * part) < 2:
        raise ValueError(
            f"partial_rotary_factor is {part}; expected an even share of a head's {dim} elements"
        )
    if rope["rope_type"] == "dynamic" and int(dim * part) == 2:
        raise ValueError(
            f"partial_rotary_factor is {part}, of a head's {dim} elements; the rope_type dynamic "
            "needs 4 that are rotated"
        )
    rope["partial_rotary_factor"] = part


def _number(rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number of a size that rotations can be computed with."""
    value, (least, most) = positive(rope, key, default), _RANGE
    if not least <= value <= most:
        raise ValueError(f"{key} is {value!r}; expected a number from {least:g} to {most:g}")
    return value
