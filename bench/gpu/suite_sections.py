"""The sections of `bench.gpu.suite`: what each measures, item by item.

A section lists its items for given options and runs one of them. Options are plain JSON, because
items run in processes of their own: `smoke` (tiny sizes), `device`, `seconds` per timing, and
`roofline`, which the first section measured, and `peers`, whether to time other libraries' ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch

from bench import peers
from bench.gpu import (
    peer_step,
    profile_step,
    step,
    step_peers,
    step_torchtune,
    step_unsloth,
    train_steps,
)
from bench.gpu.step import StepSpec
from engine.benchmark.cases.case import Case, CaseSizes
from engine.benchmark.cases.shapes import configuration
from engine.benchmark.roofline import Roofline, measure_roofline
from engine.benchmark.runner import all_cases, default_models, default_settings, run_case
from engine.selfcheck.accuracy import check_case, check_layouts

Options = Mapping[str, Any]
LLAMA, QWEN = "llama-3.1-8b", "qwen3-8b"
ACCURACY_MODELS = (LLAMA, QWEN, "qwen3-30b-a3b", "qwen3-next-80b-a3b")
OP_MODELS = default_models(torch.device("cuda"))


@dataclass(frozen=True)
class Section:
    """`weight` is its share of the time; `run` measures one of `items`, in `seconds` at most."""

    weight: float
    seconds: float
    items: Callable[[Options], list[str]]
    run: Callable[[str, Options], dict[str, Any]]


def device_of(options: Options) -> torch.device:
    return torch.device(options["device"])


def dtype_of(options: Options) -> torch.dtype:
    return default_settings(device_of(options)).dtype


def _peak(options: Options) -> float | None:
    roofline = options.get("roofline")
    name = str(dtype_of(options)).removeprefix("torch.")
    return None if roofline is None else roofline["flops"].get(name)


def _settings(options: Options, tokens: int, document: int, dtype: torch.dtype) -> CaseSizes:
    whole = CaseSizes(tokens, dtype, document=document, head_rows=min(tokens, 2048))
    return replace(whole, optimizer_layers=1) if options["smoke"] else whole


def _cases(model: str, options: Options, settings: CaseSizes) -> list[Case]:
    return list(all_cases(model, settings, configuration(model, options["smoke"])))


def _run_roofline(_: str, options: Options) -> dict[str, Any]:
    seconds = options["seconds"]
    measured = measure_roofline(device_of(options), budget=seconds, small=options["smoke"])
    return {"bandwidth": measured.bandwidth, "flops": dict(measured.flops)}


def _accuracy_dtypes(options: Options) -> tuple[torch.dtype, ...]:
    if device_of(options).type == "cuda":
        return torch.bfloat16, torch.float16, torch.float32
    return (torch.float32,)


def _accuracy_items(options: Options) -> list[str]:
    names = [str(dtype).removeprefix("torch.") for dtype in _accuracy_dtypes(options)]
    return [*_accuracy_cases(options), *(f"layouts {name}" for name in names)]


def _accuracy_cases(options: Options) -> dict[str, Case]:
    tokens = 24 if options["smoke"] else 4000
    return {
        case.name: case
        for dtype in _accuracy_dtypes(options)
        for model in ACCURACY_MODELS
        for case in _cases(model, options, _settings(options, tokens, tokens // 2 + 1, dtype))
        if model != QWEN or case.op == "decoder_layer"
    }


def _run_accuracy(item: str, options: Options) -> dict[str, Any]:
    torch.manual_seed(0)
    if item.startswith("layouts "):
        rows, columns = (33, 128) if options["smoke"] else (4097, 4096)
        dtype = getattr(torch, item.split()[1])
        return {"op": "layouts", **check_layouts(rows, columns, device_of(options), dtype)}
    case = _accuracy_cases(options)[item]
    return {"op": case.op, **check_case(case, device_of(options))}


def _op_cases(options: Options) -> dict[str, Case]:
    tokens = 16 if options["smoke"] else 8192
    models = (LLAMA,) if options["smoke"] else OP_MODELS
    settings = _settings(options, tokens, tokens // 2, dtype_of(options))
    return {case.name: case for model in models for case in _cases(model, options, settings)}


def _run_op(item: str, options: Options) -> dict[str, Any]:
    roofline = options.get("roofline") or _run_roofline("", options)
    row = run_case(
        _op_cases(options)[item],
        device_of(options),
        Roofline(roofline["bandwidth"], roofline["flops"]),
        budget=options["seconds"],
        baselines=[peers.baselines] if options["peers"] else [],
    )
    return row.plain()


def _step_items(options: Options) -> list[str]:
    if options["smoke"]:
        return [f"{LLAMA} 2x8 {level}" for level in ("none", "full")]
    sizes = ((LLAMA, "4x4096"), (QWEN, "4x4096"))
    large = [f"{m} {size} {level}" for m, size in sizes for level in ("none", "selective", "full")]
    return [*large, *(f"{model} 1x2048 none" for model in (LLAMA, QWEN))]


def _run_step(item: str, options: Options) -> dict[str, Any]:
    return step.measure_step(
        StepSpec.parse(item),
        device_of(options),
        dtype_of(options),
        small=options["smoke"],
        steps=2 if options["smoke"] else 5,
        peak_flops=_peak(options),
    )


def _train_items(_: Options) -> list[str]:
    return list(train_steps.RUNS)


def _run_train(item: str, options: Options) -> dict[str, Any]:
    small = options["smoke"]
    return train_steps.measure_run(
        item, device_of(options), dtype_of(options), small=small, steps=1 if small else 4
    )


def _peer_items(options: Options) -> list[str]:
    if options["smoke"]:
        return [f"{LLAMA} 2x8 full"]
    shapes = [f"{LLAMA} 4x4096 full", f"{LLAMA} 4x4096 none", f"{LLAMA} 1x2048 none"]
    return [*shapes, f"{QWEN} 4x4096 full", f"{QWEN} 4x4096 none", f"{QWEN} 1x2048 none"]


def _llama_items(options: Options) -> list[str]:
    return [item for item in _peer_items(options) if item.startswith(LLAMA)]


def run_peer(side: ModuleType, item: str, options: Options) -> dict[str, Any]:
    """A step through the packages of `side`; where they do not serve, the reason is the result."""
    absent = peer_step.missing(side.PACKAGES)
    if absent:
        return {"skipped": f"{item}: not installed: {', '.join(absent)}"}
    try:
        measured: dict[str, Any] = side.measure_step(
            StepSpec.parse(item),
            device_of(options),
            dtype_of(options),
            small=options["smoke"],
            steps=1 if options["smoke"] else 3,
            peak_flops=_peak(options),
        )
    except Exception as error:
        # Whatever another program raises is no fault of what is measured here.
        text = " ".join(str(error).split())[:300]
        return {"skipped": f"{item}: {side.PACKAGES[0]} failed: {type(error).__name__}: {text}"}
    return measured


def _run_profile(item: str, options: Options) -> dict[str, Any]:
    what, _, spec = item.partition(": ")
    measure = profile_step.host_waits if what == "host waits" else profile_step.profile_step
    return measure(
        StepSpec.parse(spec), device_of(options), dtype_of(options), small=options["smoke"]
    )


def _profile_items(options: Options) -> list[str]:
    sizes = ("2x8",) if options["smoke"] else ("4x4096", "1x2048")
    profiles = [f"profile: {LLAMA} {size} none" for size in sizes]
    if not options["smoke"]:
        profiles.append(f"profile: {LLAMA} {sizes[-1]} none graphs")
    return [*profiles, f"host waits: {LLAMA} {sizes[-1]} none"]


def _graph_items(options: Options) -> list[str]:
    if options["smoke"]:
        return [f"{LLAMA} 1x128 none"]
    return [f"{model} 1x2048 none" for model in ("qwen3-0.6b", "qwen3-4b", LLAMA)]


def _run_graphs(item: str, options: Options) -> dict[str, Any]:
    small = options["smoke"]
    return step.compare_graphs(
        StepSpec.parse(item),
        device_of(options),
        dtype_of(options),
        small=small,
        steps=1 if small else 5,
    )


SECTIONS: dict[str, Section] = {
    "accuracy": Section(2.0, 30.0, _accuracy_items, _run_accuracy),
    "roofline": Section(0.5, 30.0, lambda _: ["limits"], _run_roofline),
    "steps": Section(1.5, 45.0, _step_items, _run_step),
    "train": Section(2.5, 45.0, _train_items, _run_train),
    "graphs": Section(0.5, 45.0, _graph_items, _run_graphs),
    "profile": Section(0.8, 45.0, _profile_items, _run_profile),
    "peers": Section(1.5, 90.0, _peer_items, partial(run_peer, step_peers)),
    "unsloth": Section(0.8, 90.0, _llama_items, partial(run_peer, step_unsloth)),
    "torchtune": Section(0.8, 90.0, _llama_items, partial(run_peer, step_torchtune)),
    "ops": Section(2.0, 20.0, lambda options: list(_op_cases(options)), _run_op),
}
"""In the order in which they run: what is right, then by what matters if time runs out."""
