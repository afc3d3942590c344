"""Write a LoRA adapter that all programs compute alike.

vLLM reads one rank and one alpha and no patterns; llama.cpp's converter reads alpha alone and
divides it by the rank of each pair. So every pair gets the largest rank, filled up with zeros, its
real scale goes into B, and alpha is that rank: the factor is 1 wherever it is computed.

An adapter that is written as it is comes with a report of who refuses or misreads it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.errors import ConfigError, listing
from engine.model_sources.adapter.peft import Adapter, save_adapter, uniform
from engine.model_sources.adapter.provenance import BASE_FILE
from engine.model_sources.export import write_tokenizer
from engine.model_sources.interface.stops import GENERATION_CONFIG
from engine.model_sources.vocabulary.folder import TokenizerFolder
from engine.storage import durable
from engine.storage.safe_files import MIB, read_regular

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
        _carry(adapter.path, folder)
    return _report(adapter, rank)


def write_as_it_is(adapter: Adapter, output: Path) -> list[str]:
    """Write `adapter` with its own ranks and scales to the new folder `output`, as PEFT has it.

    Returns what consumers would refuse or compute otherwise, a line each. Raises `ConfigError` for
    an occupied output.
    """
    with durable.publish_directory(output) as folder:
        save_adapter(folder, adapter.config, adapter.pairs, adapter)
        _carry(adapter.path, folder)
    ranks = [int(a.shape[0]) for a, *_ in adapter.pairs.values()]
    return _report(adapter, max(ranks, default=0), as_it_is=True)


def _carry(source: Path, folder: Path) -> None:
    """Copy what a run left beside its adapter: its base, the ends of answers, the tokenizer."""
    if not source.is_dir():
        return
    write_tokenizer(TokenizerFolder(source), folder)
    for name in (BASE_FILE, GENERATION_CONFIG):
        if (source / name).is_file():
            durable.write_bytes(folder / name, read_regular(source / name, MIB))


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


def _report(adapter: Adapter, rank: int, as_it_is: bool = False) -> list[str]:
    lines = ["PEFT and transformers: load it as it is."]
    fault = _fault(adapter) if as_it_is else ""
    if fault:
        lines.append(f"vLLM: {fault}")
    elif rank > _VLLM_RANK:
        lines.append(f"vLLM: start it with --max-lora-rank {_next_rank(rank)}.")
    else:
        lines.append("vLLM: loads it as it is.")
    experts = any(".experts." in module for module in adapter.pairs)
    if experts:
        lines.append("llama.cpp: refuses pairs for experts; merge, then engine export gguf.")
    elif fault:
        lines.append(f"llama.cpp: {fault}")
    else:
        lines.append("llama.cpp: convert_lora_to_gguf.py, or engine export gguf --adapter.")
    return lines


def _fault(adapter: Adapter) -> str:
    """Why vLLM and llama.cpp do not compute this adapter as PEFT does; empty where they do."""
    config = adapter.config
    if config.use_dora:
        return "refuses DoRA; merge it with engine merge."
    if adapter.others:
        what = listing(adapter.others.modules())
        return f"refuses what is more than pairs ({what}); merge it with engine merge."
    if config.rank_pattern or config.alpha_pattern:
        return "reads no patterns, so its scale is wrong; write it with --portable."
    return ""


def _next_rank(rank: int) -> int:
    """The smallest limit that vLLM knows and that holds `rank`."""
    return next((size for size in (16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
