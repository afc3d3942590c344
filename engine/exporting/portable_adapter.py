"""Write a LoRA adapter that all programs compute alike.

vLLM reads one rank and one alpha and no patterns; llama.cpp's converter reads alpha alone and
divides it by the rank of each pair. So every pair gets the largest rank, filled up with zeros, its
real scale goes into B, and alpha is that rank: the factor is 1 wherever it is computed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.errors import ConfigError, listing
from engine.model_sources.adapter.peft import Adapter, save_adapter, uniform
from engine.storage import durable

_VLLM_RANK = 16
"""The largest rank that vLLM takes unless it is told otherwise."""


def write_portable(adapter: Adapter, output: Path) -> list[str]:
    """Write `adapter` to the new folder `output`; returns what consumers should know, a line each.

    Raises `ConfigError` for DoRA, trained biases or modules, which some of them refuse, and for an
    occupied output.
    """
    refuse_more_than_pairs(adapter, "PEFT computes it, vLLM and llama.cpp refuse it")
    rank, pairs = uniform(adapter.pairs, adapter.scales, 1.0)
    config = replace(
        adapter.config, r=rank, lora_alpha=float(rank), use_rslora=False, fused_experts=False,
        rank_pattern={}, alpha_pattern={}, raw={},
        target_modules=sorted({module.rpartition(".")[2] for module in adapter.pairs}),
    )  # fmt: skip
    with durable.publish_directory(output) as folder:
        save_adapter(folder, config, pairs)
    return _report(adapter, rank)


def refuse_more_than_pairs(adapter: Adapter, why: str) -> None:
    """Raise `ConfigError` for DoRA and for what is no pair; `why` says who does not compute it."""
    if adapter.config.use_dora:
        what = "is a DoRA adapter"
    elif adapter.others or not adapter.pairs:
        others = listing(adapter.others.modules()) or "no pairs"
        what = f"holds more than pairs of matrices ({others})"
    else:
        return
    raise ConfigError(
        f"{adapter.path} {what}: {why}. Merge it first: engine merge --model MODEL --adapter "
        f"{adapter.path} --output merged"
    )


def _report(adapter: Adapter, rank: int) -> list[str]:
    lines = ["PEFT and transformers: load it as it is."]
    if rank > _VLLM_RANK:
        lines.append(f"vLLM: start it with --max-lora-rank {_next_rank(rank)}.")
    else:
        lines.append("vLLM: loads it as it is.")
    experts = any(".experts." in module for module in adapter.pairs)
    if experts:
        lines.append("llama.cpp: refuses pairs for experts; merge, then engine export gguf.")
    else:
        lines.append("llama.cpp: convert_lora_to_gguf.py, or engine export gguf --adapter.")
    return lines


def _next_rank(rank: int) -> int:
    """The smallest limit that vLLM knows and that holds `rank`."""
    return next((size for size in (16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
