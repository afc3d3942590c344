"""Run cases: choose them, time them, compare them with the limits."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from engine.benchmark.cases import adapters, elementwise, layer, matmul, mixture
from engine.benchmark.cases.case import Case, CaseSizes, Work
from engine.benchmark.roofline import Roofline, last_level_cache
from engine.benchmark.timing import Call, Timing, clear, measure, peak_bytes
from engine.device import resolve_dtype
from engine.errors import ConfigError
from engine.memory.find_model import find_model
from models.config.model_config import ModelConfig

Baselines = Callable[[str, Work], Mapping[str, Call]]
"""Op and its inputs -> other implementations of it by name."""

OPS = (
    "nf4_quantize",
    "nf4_dequantize",
    "nf4_dequantize_transposed",
    "nf4_linear",
    "nf4_linear_dx",
    "lora_qkv",
    "lora_mlp",
    "linear_cross_entropy",
    "attention",
    "attention_grad",
    "rms_norm",
    "add_rms_norm",
    "rms_norm_grad",
    "rope",
    "swiglu",
    "swiglu_grad",
    "cross_entropy",
    "adamw8bit",
    "decoder_layer",
    "dropout",
    *adapters.VARIANTS,
    "int8_head",
    "linear_distillation",
    "mixture",
    "gated_delta",
    "causal_conv1d",
    "gated_rms_norm",
    "rms_norm_zero_centred",
)
_DENSE_MLP = ("lora_mlp", "swiglu", "swiglu_grad", "decoder_layer")
_PLAIN_ATTENTION = ("lora_qkv", "rope", "adamw8bit", "decoder_layer", *adapters.VARIANTS)


@dataclass
class Measurement:
    """One measured case. Times in seconds; `others` has the times of other implementations.

    `memory_bytes` is the most that ours holds at once beyond its inputs.

    `ratios` are their times over ours; `failed` says why one could not be measured.
    """

    op: str
    model: str
    shape: str
    dtype: str
    seconds: float
    p20: float
    p80: float
    host_seconds: float
    repeats: int
    flops: float
    nbytes: float
    tflops: float
    gigabytes_per_second: float
    bound: str
    roofline_share: float
    memory_bytes: int = 0
    others: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """What JSON holds."""
        return asdict(self)


def default_models(device: torch.device) -> tuple[str, ...]:
    """Whose shapes are measured where nothing is said: large ones, or one for a processor."""
    if device.type == "cuda":
        return "llama-3.1-8b", "qwen3-8b", "qwen3-4b", "llama-3.3-70b"
    return ("smollm2-135m",)


def default_settings(
    device: torch.device, tokens: int | None = None, config: ModelConfig | None = None
) -> CaseSizes:
    """Sizes that fill a GPU, or that one processor core finishes soon.

    On a CPU ops that memory bounds get tensors of the width of `config` that do not fit its caches,
    unless `tokens` says how many.
    """
    if device.type == "cuda":
        whole = tokens or 8192
        return CaseSizes(whole, resolve_dtype("auto", device), document=min(whole, 4096))
    if tokens is not None:
        return CaseSizes(
            tokens, torch.float32, document=max(1, tokens // 2), head_rows=32, optimizer_layers=2
        )
    streamed = None
    if config is not None:  # tensors of a quarter more than the caches hold
        streamed = 5 * last_level_cache() // (4 * 4 * config.hidden_size)
    return CaseSizes(64, torch.float32, document=32, head_rows=32, streamed=streamed)


def all_cases(model: str, settings: CaseSizes, config: ModelConfig | None = None) -> Iterator[Case]:
    """Every case at the shapes of `config`, or of the model that `model` names.

    A mixture has cases of its experts in place of those of a dense feed-forward part, and a model
    with Gated DeltaNet those of its mixer. Raises `ConfigError` for a name that is none.
    """
    config = config or find_model(model)[0]
    absent: set[str] = set()
    if config.num_experts:
        absent |= {*_DENSE_MLP, "adamw8bit"}
    if "linear_attention" in config.layer_types:
        absent |= set(_PLAIN_ATTENTION)
    for module in (matmul, elementwise, layer, adapters, mixture):
        for case in module.cases(model, config, settings):
            if case.op not in absent:
                yield case


def chosen_ops(names: Sequence[str]) -> tuple[str, ...]:
    """`names`, or all ops. Raises `ConfigError` for one that does not exist."""
    for name in names:
        if name not in OPS:
            near = difflib.get_close_matches(name, OPS, n=1, cutoff=0.5)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"There is no op {name!r}.{meant} Ops: {', '.join(OPS)}.")
    return tuple(names) or OPS


def run_case(
    case: Case,
    device: torch.device,
    roofline: Roofline,
    *,
    budget: float,
    compiled: bool = False,
    baselines: Sequence[Baselines] = (),
) -> Measurement:
    """Measure one case, plain torch and the other implementations."""
    clear(device)
    work = case.make(device)
    mine = work.copies()
    restore = _restore(work, mine)
    taken = measure(lambda: work.ours(mine), device, budget=budget, before=restore)
    row = _row(case, taken, roofline)
    if restore is not None:
        restore()
    row.memory_bytes = peak_bytes(lambda: work.ours(mine), device, mine.values())
    for name, call in _others(case, work, compiled, baselines, row):
        try:
            row.others[name] = measure(call, device, budget=budget).median
        except Exception as error:
            # Another implementation that cannot do this is a fact to report, not a failed run.
            row.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row.ratios = {name: seconds / taken.median for name, seconds in row.others.items()}
    return row


def _restore(work: Work, mine: Mapping[str, torch.Tensor]) -> Call | None:
    """Puts back what the op overwrites, untimed."""
    if not work.overwritten:
        return None

    def before() -> None:
        for name in work.overwritten:
            mine[name].copy_(work.tensors[name])

    return before


def _others(
    case: Case, work: Work, compiled: bool, baselines: Sequence[Baselines], row: Measurement
) -> Iterator[tuple[str, Call]]:
    yield "torch", partial(work.plain, work.tensors)
    if compiled and work.tensors:
        yield "torch.compile", partial(torch.compile(work.plain), work.tensors)
    for offer in baselines:
        try:
            yield from offer(case.op, work).items()
        except Exception as error:
            name = getattr(offer, "__module__", "baseline")
            row.failed[name] = f"{type(error).__name__}: {error}"


def _row(case: Case, taken: Timing, roofline: Roofline) -> Measurement:
    least = roofline.least_seconds(case.flops, case.nbytes, case.dtype_name)
    return Measurement(
        op=case.op,
        model=case.model,
        shape=case.shape,
        dtype=case.dtype_name,
        seconds=taken.median,
        p20=taken.p20,
        p80=taken.p80,
        host_seconds=taken.host,
        repeats=taken.repeats,
        flops=case.flops,
        nbytes=case.nbytes,
        tflops=case.flops / taken.median / 1e12,
        gigabytes_per_second=case.nbytes / taken.median / 1e9,
        bound=roofline.bound(case.flops, case.nbytes, case.dtype_name),
        roofline_share=least / taken.median,
    )
