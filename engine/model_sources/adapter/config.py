"""adapter_config.json: what an adapter is, read and written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.model_sources.adapter.experts import PARAMETERS
from engine.model_sources.adapter.keys import initialisation, judge_adapter_keys
from engine.patterns import Pattern, PatternError, pattern_of

# Written as they are, next to the keys of `AdapterConfig`.
_CONSTANT: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "revision": None,
    "task_type": "CAUSAL_LM",
}
_MOST = 65_536
_PLAIN = re.compile(r"[\w.]{1,200}")
"""A pattern that matches names which end as it does after its last dot."""
_MOST_PATTERNS = 1000
_OF_ENDINGS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class AdapterConfig:
    """The part of adapter_config.json that says what the adapter is.

    `target_modules` are suffixes of module names, such as "q_proj". A module's rank and alpha are
    those of the first pattern that matches its name, else `r` and `lora_alpha`. `layers` are those
    that `target_modules` are meant in, none for all; `loftq_iter`, if not 0, the rounds of LoftQ
    that the base was quantised with. With
    `fused_experts` the pairs of experts are written as `engine.model_sources.adapter.experts` says.
    `raw` is the parsed file; empty for an adapter that was made here.
    """

    r: int
    lora_alpha: float
    target_modules: list[str]
    base_model_name_or_path: str = ""
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    fused_experts: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    loftq_iter: int = 0
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def scale(self) -> float:
        """The factor of B @ A of a module that no pattern names."""
        return scale_of(self.lora_alpha, self.r, self.use_rslora)

    @property
    def plain_alpha(self) -> float:
        """The alpha whose quotient by `r` is the scale; whole where it is."""
        alpha = self.scale * self.r
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

    @property
    def initial(self) -> str:
        """The initialisation that changes the base weights; empty where none does."""
        return initialisation(self.raw)

    def rank(self, module: str) -> int:
        """The rank that `module` should have."""
        return int(by_pattern(self.rank_pattern, module, self.r))

    def module_scale(self, module: str) -> float:
        """The factor of B @ A of `module`."""
        return scale_of(self.alpha(module), self.rank(module), self.use_rslora)

    def alpha(self, module: str) -> float:
        """The alpha of `module`."""
        return float(by_pattern(self.alpha_pattern, module, self.lora_alpha))


def scale_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """The factor of B @ A."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name or an ending of it."""
    for pattern, value in patterns.items():
        if _PLAIN.fullmatch(pattern) and not module.endswith(pattern.rpartition(".")[2]):
            continue  # most adapters name every module whole: that is told in no time
        if pattern_of(_of_an_ending(pattern)).match(module) is not None:
            return value
    return default


def _of_an_ending(pattern: str) -> str:
    """The pattern of a whole name, of which `pattern` matches all or an ending."""
    return rf"(.*\.)?({pattern})$"


def to_json(config: AdapterConfig, carried: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the file: conservative keys, and `carried` as it was read elsewhere.

    alpha / r is the scale whatever the configuration calls it, since llama.cpp's converter reads no
    `use_rslora`. With patterns, which it does not read either, all is as it was trained.
    """
    patterned = bool(config.rank_pattern or config.alpha_pattern)
    alpha = config.lora_alpha if patterned else config.plain_alpha
    return {
        **_CONSTANT,
        "base_model_name_or_path": config.base_model_name_or_path,
        "alpha_pattern": dict(config.alpha_pattern),
        **(_loftq_keys(config.loftq_iter) if config.loftq_iter else {}),
        "layers_to_transform": list(config.layers) or None,
        "lora_alpha": round(alpha) if alpha == round(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "target_modules": sorted(config.target_modules),
        "use_dora": config.use_dora,
        "use_rslora": patterned and config.use_rslora,
        **carried,
    }


def _loftq_keys(rounds: int) -> dict[str, Any]:
    """By these PEFT quantises the base as it loads the adapter."""
    settings = {"loftq_bits": 4, "loftq_iter": rounds}
    return {"init_lora_weights": "loftq", "loftq_config": settings}


def from_json(raw: dict[str, Any], source: str) -> AdapterConfig:
    """Read a parsed adapter_config.json. Raises `CheckpointError` naming `source` and the key."""
    judge_adapter_keys(raw, source)
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha", 8), raw.get("lora_dropout", 0.0)
    rank = _require_rank("r", rank, source)
    _require_number("lora_alpha", alpha, -math.inf, math.inf, source)
    _require_number("lora_dropout", dropout, 0.0, 1.0, source)
    ranks = _patterns(raw, "rank_pattern", source)
    alphas = _patterns(raw, "alpha_pattern", source)
    for pattern, value in ranks.items():
        _require_rank(f"rank_pattern of {pattern!r}", value, source)
    for pattern, value in alphas.items():
        _require_number(f"alpha_pattern of {pattern!r}", value, -math.inf, math.inf, source)
    targets = raw.get("target_modules")
    # A text is a pattern over module names; the tensors say just as well which modules it means.
    listed = list(map(str, targets)) if isinstance(targets, list) else []
    parameters = list(map(str, raw.get("target_parameters") or []))
    return AdapterConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=listed,
        base_model_name_or_path=str(raw.get("base_model_name_or_path") or ""),
        lora_dropout=float(dropout),
        use_rslora=_flag(raw, "use_rslora", source),
        use_dora=_flag(raw, "use_dora", source),
        fused_experts=any(_ends(PARAMETERS, name) for name in parameters),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        raw=raw,
    )


def _ends(names: tuple[str, ...], name: str) -> bool:
    return any(f".{full}".endswith(f".{name}") or f".{name}".endswith(full) for full in names)


def _patterns(raw: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: {key} is {value!r}; expected an object of patterns.")
    special = [pattern for pattern in value if not _PLAIN.fullmatch(pattern)]
    if len(special) > _MOST_PATTERNS:
        raise CheckpointError(
            f"{source}: {key} has {len(special)} patterns that are no plain names; at most "
            f"{_MOST_PATTERNS} are compared with every module. No adapter needs as many."
        )
    for pattern in special:
        compile_pattern(pattern, key, source)
    return value


def compile_pattern(pattern: str, key: str, source: str) -> Pattern:
    """A regular expression over module names. Raises `CheckpointError` for what is none."""
    try:
        return pattern_of(_of_an_ending(pattern) if key in _OF_ENDINGS else pattern)
    except PatternError as error:
        raise CheckpointError(
            f"{source}: {key} holds {pattern[:80]!r}, which is no pattern of module names: {error}."
        ) from error


def _flag(raw: Mapping[str, Any], key: str, source: str) -> bool:
    """A switch; the text "false" would count as true in a program that does not look."""
    value = raw.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise CheckpointError(f"{source}: {key} is {str(value)[:40]!r}; expected true or false.")


def _require_rank(key: str, rank: Any, source: str) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _MOST:
        raise CheckpointError(f"{source}: {key} is {rank!r}; expected a rank of at least 1.")
    return rank


def _require_number(key: str, value: Any, low: float, high: float, source: str) -> None:
    """A number from `low` to below `high`. An alpha below 0 takes away what was learnt (PEFT)."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not low <= value < high or value == -math.inf:
        raise CheckpointError(
            f"{source}: {key} is {value!r}; expected a number"
            f"{' from 0 to below 1' if low == 0 else ''}."
        )


def model_card(config: AdapterConfig, whole: Sequence[str] = ()) -> str:
    """The model card that PEFT writes: front matter by which the hub knows what this is.

    `whole` are the modules that the adapter holds whole.
    """
    name = public_name(config.base_model_name_or_path)
    base, tag = json.dumps(name), json.dumps(f"base_model:adapter:{name}")
    targets = ", ".join(sorted(config.target_modules))
    copies, resize = "", ""
    if whole:
        copies = f"\nIt holds {' and '.join(whole)} whole, for the tokenizer in this folder.\n"
        resize = (
            "    tokenizer = AutoTokenizer.from_pretrained(this_folder)\n"
            "    if len(tokenizer) > base_model.get_input_embeddings().weight.shape[0]:\n"
            "        base_model.resize_token_embeddings(len(tokenizer))\n"
        )
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\npipeline_tag: text-generation\n"
        f"tags:\n- {tag}\n- lora\n- transformers\n---\n\n# LoRA adapter\n\n"
        f"Rank {config.r}, scale {config.scale:g}, on {targets} of "
        f"`{name}`. Load it with PEFT:\n{copies}\n"
        f"    from peft import PeftModel\n{resize}"
        "    model = PeftModel.from_pretrained(base_model, this_folder)\n"
    )


def public_name(model: str) -> str:
    """A model's name for others to read: its hub id if there is one, else its last part."""
    cached = re.search(r"models--([\w.\-]+?)--([\w.\-]+)/snapshots/", model)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    path = Path(model)
    return path.name if path.is_absolute() or path.exists() else model
