"""Settings of the adapter: what is trained, and from which start."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, field_validator

from engine.config.choices import EVERY_WEIGHT, SAVED_MODULES, Method, SavedModule
from engine.config.recipes.module_names import (
    excluded_names,
    layer_ranges,
    number_by_pattern,
    start_name,
    target_names,
)
from engine.config.settings import Settings, setting
from engine.config.spelling import comma_list, spelled

MOST_RANK = 4096


class AdapterSettings(Settings):
    """What of a model is trained: an adapter of some rank on some projections, or every weight."""

    method: Annotated[Method, spelled({})] = setting(
        "qlora",
        "Adapter",
        "NF4 base with LoRA, 16-bit base with LoRA, every weight, or every weight from random ones",
    )
    lora_rank: int = setting(16, "Adapter", "rank of the adapter", ge=1, le=MOST_RANK)
    lora_alpha: float = setting(32.0, "Adapter", "adapter scale is alpha / rank", gt=0, le=1e9)
    lora_dropout: float = setting(0.0, "Adapter", "dropout before the adapter", ge=0, lt=1)
    use_rslora: bool = setting(False, "Adapter", "scale by alpha / sqrt(rank) instead")
    use_dora: bool = setting(
        False, "Adapter", "learn the length of each weight row apart from its direction (DoRA)"
    )
    target_modules: Annotated[str | tuple[str, ...], BeforeValidator(target_names)] = setting(
        "all",
        "Adapter",
        "all, attn, qv, names of projections with commas between them, or a pattern (a regular "
        "expression) of whole names",
    )
    exclude_modules: Annotated[str | tuple[str, ...], BeforeValidator(excluded_names)] = setting(
        (), "Adapter", "names, or a pattern, of modules that are left out of these"
    )
    layers: Annotated[str | None, BeforeValidator(layer_ranges)] = setting(
        None,
        "Adapter",
        "only these layers, from 0: 8-31, or 0,3,16- (from 16 to the last)",
        pattern=r"^[0-9]{1,4}(-[0-9]{0,4})?(,[0-9]{1,4}(-[0-9]{0,4})?)*$",
        expected="numbers of layers and ranges of them, such as 8-31 or 0,3,16-",
    )
    rank_pattern: Annotated[dict[str, int], BeforeValidator(number_by_pattern)] = setting(
        {}, "Adapter", "other ranks by a pattern of module names: q_proj=32,layers.3.mlp.*=8"
    )
    alpha_pattern: Annotated[dict[str, float], BeforeValidator(number_by_pattern)] = setting(
        {}, "Adapter", "other alphas, as --rank-pattern"
    )
    init_lora_weights: Annotated[str, BeforeValidator(start_name)] = setting(
        "default",
        "Adapter",
        "how an adapter starts: default or gaussian, which change nothing yet; pissa, "
        "pissa_niter_16 (faster) or olora, as the largest part of the weights; loftq, as what NF4 "
        "leaves out",
        pattern=r"^(default|gaussian|pissa|pissa_niter_[1-9][0-9]{0,2}|olora|loftq)$",
        expected="default, gaussian, pissa, pissa_niter_16, olora or loftq",
    )
    loftq_iter: int = setting(1, "Adapter", "rounds of LoftQ", ge=1, le=20)
    modules_to_save: Annotated[tuple[SavedModule, ...], BeforeValidator(comma_list)] = setting(
        (),
        "Adapter",
        "train these whole too and save them in the adapter: embed_tokens, lm_head; where the two "
        "are tied they are one",
    )
    add_tokens: Path | None = setting(
        None,
        "Adapter",
        "file of new tokens, one a line, or .json with lists under normal and special; embedding "
        "and head get rows for them, the mean of the others', and are trained",
    )
    init_adapter: Path | None = setting(None, "Adapter", "an earlier adapter to train on from")
    double_quant: bool = setting(True, "Adapter", "quantise the NF4 scales again")

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """What is trained whole beside an adapter: with new tokens, embedding and head."""
        if self.method in EVERY_WEIGHT:
            return ()
        return SAVED_MODULES if self.add_tokens is not None else self.modules_to_save

    @field_validator("rank_pattern")
    @classmethod
    def _ranks_in_range(cls, value: dict[str, int]) -> dict[str, int]:
        if not all(1 <= rank <= MOST_RANK for rank in value.values()):
            raise ValueError(f"every rank should be at least 1 and at most {MOST_RANK}")
        return value

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas_in_range(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(alpha > 0 for alpha in value.values()):
            raise ValueError("every alpha should be greater than 0")
        return value
