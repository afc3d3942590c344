"""Quantisations that are read, and what to use for the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, listing

_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "mxfp4": "MXFP4",
    "torchao": "torchao",
    "bitnet": "BitNet",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "higgs": "HIGGS",
    "fp_quant": "FP-Quant",
    "quark": "Quark",
    "modelopt": "NVIDIA ModelOpt",
    "mlx": "MLX",
}
_READ = "bitsandbytes' 4 and 8 bits, fp8 and compressed-tensors with 8 bits"
_SUFFIX = re.compile(
    r"[-_.](gptq|awq|hqq|aqlm|eetq|quanto|mxfp4|nvfp4|w4a16|w4a4|int4|int8|[2345]bit|fp4|exl[23]|mlx)"
    r"([-_.].*)?$",
    re.IGNORECASE,
)
_TENSORS = re.compile(
    r".*\.(qweight|qzeros|g_idx|scales|biases|SCB|absmax|quant_map|weight_scale\w*|weight_packed"
    r"|quant_state\.\w+|weight_zero_point|codebooks|codes|weight_shape|W_q|_data|_scale|_shift"
    r"|bitmask|compressed|row_offsets|\w+_blocks|\w+_scales|\w+_scale_inv)"
)


def method_of(raw_config: Mapping[str, Any]) -> str | None:
    """The name of the quantisation that config.json notes, in lower case; None where it does not.

    Some models of several parts note it beside the decoder's own keys.
    """
    inner = raw_config.get("text_config")
    noted = raw_config.get("quantization_config")
    if not noted and isinstance(inner, Mapping):
        noted = inner.get("quantization_config")
    if not noted:
        return None
    if not isinstance(noted, Mapping):
        return str(noted).lower()
    if "quant_method" in noted:
        return str(noted["quant_method"]).lower()
    bits = noted.get("load_in_4bit") or noted.get("load_in_8bit")
    return "bitsandbytes" if bits else "?"


def quantised_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that only quantised weights have beside them."""
    return [name for name in names if _TENSORS.fullmatch(name)]


def refuse(path: Path, method: str | None, names: list[str]) -> CheckpointError:
    """The error for weights that are stored in a way that is not read."""
    known = _NAMES.get(method or "")
    how = known or (f"by {method}" if method not in (None, "?") else "by no named method")
    seen = f" (tensors such as {listing(names[:3])})" if names else ""
    original = _SUFFIX.sub("", path.name)
    example = f", {original} in place of {path.name}" if original != path.name else ""
    return CheckpointError(
        f"{path}: the weights are stored quantised ({how}){seen}, which is not read; read are "
        f"{_READ}. Take the model's original 16-bit files{example}, which become NF4 as they load "
        "with --method qlora or --quantize nf4, or a copy that bitsandbytes quantised."
    )
