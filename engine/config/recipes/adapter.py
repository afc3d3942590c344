"""Settings of the adapter: what is trained, and from which start."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import field_validator

from engine.config.choices import TARGET_PRESETS, Method
from engine.config.settings import Settings, setting
from engine.config.spelling import comma_list, spelled


class AdapterSettings(Settings):
    """What of a model is trained: an adapter of some rank on some projections, or every weight."""

    method: Annotated[Method, spelled({})] = setting(
        "qlora",
        "Adapter",
        "NF4 base with LoRA, 16-bit base with LoRA, every weight, or every weight from random ones",
    )
    lora_rank: int = setting(16, "Adapter", "rank of the adapter", ge=1, le=4096)
    lora_alpha: float = setting(32.0, "Adapter", "adapter scale is alpha / rank", gt=0)
    lora_dropout: float = setting(0.0, "Adapter", "dropout before the adapter", ge=0, lt=1)
    use_rslora: bool = setting(False, "Adapter", "scale by alpha / sqrt(rank) instead")
    use_dora: bool = setting(
        False, "Adapter", "learn the length of each weight row apart from its direction (DoRA)"
    )
    target_modules: str | tuple[str, ...] = setting(
        "all", "Adapter", "all, attn, qv, or projections with commas between them"
    )
    init_adapter: Path | None = setting(None, "Adapter", "an earlier adapter to train on from")
    double_quant: bool = setting(True, "Adapter", "quantise the NF4 scales again")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _targets(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value in TARGET_PRESETS:
                return value
            value = "all" if value in ("all-linear", "all_linear") else comma_list(value)
        if value == "all":
            return value
        names = tuple(value) if isinstance(value, list | tuple) else value
        if not isinstance(names, tuple) or not names:
            raise ValueError("should be all, attn, qv, or at least one projection's name")
        wrong = [name for name in names if not re.fullmatch(r"[A-Za-z_][\w.]*", str(name))]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no projection's name")
        return tuple(dict.fromkeys(str(name) for name in names))
