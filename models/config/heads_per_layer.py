"""Numbers of heads where layers differ in them.

`config.json` then has, beside `num_attention_heads` and `num_key_value_heads`, which are the
largest of the layers, two lists with a number for each layer. Within a layer every key/value head
is read by the same number of query heads. Layers without attention have an entry that nothing
reads. No other program knows these keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PER_LAYER = ("num_attention_heads_per_layer", "num_key_value_heads_per_layer")


def heads_per_layer(
    raw: Mapping[str, Any], layers: int, largest: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query heads and key/value heads of each layer; both empty where the file has neither list.

    `largest` are the numbers that the file gives for the whole model. Raises `ValueError` with one
    sentence that names the key.
    """
    given = [key for key in PER_LAYER if raw.get(key) is not None]
    if not given:
        return (), ()
    if len(given) == 1:
        missing = next(key for key in PER_LAYER if key not in given)
        raise ValueError(f"{given[0]} is given without {missing}; each needs the other")
    if raw.get("head_dim") is None:
        raise ValueError(
            f"{PER_LAYER[0]} is given without head_dim, which does not follow from the number of "
            "heads where layers differ in it"
        )
    heads, kv_heads = (
        _counts(raw, key, layers, most) for key, most in zip(PER_LAYER, largest, strict=True)
    )
    for layer, (count, kv_count) in enumerate(zip(heads, kv_heads, strict=True)):
        if count % kv_count:
            raise ValueError(
                f"{PER_LAYER[0]} is {count} for layer {layer}, which {PER_LAYER[1]}, {kv_count}, "
                "does not divide"
            )
    return heads, kv_heads


def _counts(raw: Mapping[str, Any], key: str, layers: int, most: int) -> tuple[int, ...]:
    """The list `key`: for each layer a number from 1 to `most`, which one of them must be."""
    values = raw[key]
    if not isinstance(values, list | tuple) or len(values) != layers:
        raise ValueError(f"{key} is {values!r}; expected {layers} numbers, one a layer")
    whole = key.removesuffix("_per_layer")
    for layer, value in enumerate(values):
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(
                f"{key} is {value!r} for layer {layer}; expected an integer from 1 to {whole}, "
                f"{most}"
            )
    if max(values) != most:
        raise ValueError(
            f"{whole} is {most}, and the largest of {key} is {max(values)}; they should be equal"
        )
    return tuple(values)
