"""Find out which program a configuration is of, and translate it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.config.programs import axolotl, llama_factory, others
from engine.config.programs.translation import Translation
from engine.errors import ConfigError

PROGRAMS: dict[str, Callable[[dict[str, Any], Path], Translation]] = {
    "axolotl": axolotl.translate,
    "llama-factory": llama_factory.translate,
    "trl": others.translate_trl,
    "mlx-lm": others.translate_mlx,
}

_MARKS = {
    "axolotl": {"base_model", "datasets", "sequence_len", "micro_batch_size", "lora_target_linear"},
    "llama-factory": {"stage", "finetuning_type", "template", "cutoff_len", "lora_target"},
    "trl": {"dataset_name", "use_peft", "lora_target_modules", "max_seq_length", "lora_r"},
    "mlx-lm": {"iters", "lora_parameters", "fine_tune_type", "steps_per_eval", "adapter_path"},
}
"""Keys that few programs but this one have."""


def program_of(given: Mapping[str, Any]) -> str:
    """The program whose marks are there most. Raises `ConfigError` where there are none."""
    scores = {name: len(marks & given.keys()) for name, marks in _MARKS.items()}
    best = max(scores, key=lambda name: scores[name])
    if not scores[best]:
        raise ConfigError(
            f"This is no configuration of {', '.join(PROGRAMS)}: none of the keys that tell them "
            f"apart is there (such as {', '.join(sorted(min(m) for m in _MARKS.values()))}). Name "
            "the program with --program, or see docs/coming_from.md for the settings side by side."
        )
    return best


def translate(given: dict[str, Any], folder: Path, program: str | None = None) -> Translation:
    """One program's configuration as settings of `TrainConfig`. Raises `ConfigError`."""
    return PROGRAMS[program or program_of(given)](given, folder)
