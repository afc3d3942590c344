"""The checks of `engine doctor --gpu`, in the order of their worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.selfcheck import attention, experts, kernels, machine, steps
from engine.selfcheck.options import CheckOptions, Finding, not_run
from kernels.attention.table import BACKENDS

RANKS = (4, 8, 16, 64)
_REFERENCE = "ENGINE_REFERENCE={} runs plain torch in its stead, more slowly"
_ATTENTION = "ENGINE_ATTENTION={} takes another back end"


@dataclass(frozen=True)
class SelfCheck:
    """`check` runs it; `remedy` is the way around a failure.

    `needs` says why it cannot be run in the interpreter, if so. With `alone` no other process may
    use the device meanwhile.
    """

    check: Callable[[CheckOptions], Finding]
    remedy: str
    needs: str = ""
    alone: bool = False

    def run(self, options: CheckOptions) -> Finding:
        """What it finds; a GPU with too little memory is a reason not to run."""
        try:
            return self.check(options)
        except torch.OutOfMemoryError as error:
            return not_run(f"needs more memory than is free: {str(error).splitlines()[0][:120]}")


def _kernel(modules: str, *ops: str, **options: Any) -> SelfCheck:
    return SelfCheck(kernels.kernel_check(*ops, **options), _REFERENCE.format(modules))


def _rank(rank: int) -> SelfCheck:
    products = kernels.kernel_check("lora_qkv", "lora_mlp", rank=rank)
    step = steps.model_check(steps.DENSE, lora_rank=rank)

    def run(options: CheckOptions) -> Finding:
        finding = products(options)
        if not finding["passed"]:
            return finding
        whole = step(options)
        return whole | {"detail": f"{finding['detail']}; a step: {whole['detail']}"}

    others = ", ".join(str(other) for other in RANKS if other != rank)
    return SelfCheck(run, f"another --lora-rank: {others} are checked here too")


def _attention(name: str) -> SelfCheck:
    others = {"cpu": "documents", "documents": "efficient"}
    return SelfCheck(
        attention.backend_check(name),
        _ATTENTION.format(others.get(name, "documents")),
        needs="" if name == "documents" else "needs a CUDA GPU",
    )


def _step(model: str, remedy: str, *, half: bool = True, **changes: object) -> SelfCheck:
    return SelfCheck(steps.model_check(model, half=half, **changes), remedy)


def _same(
    label: str, remedy: str, lengths: tuple[int, ...] = (70, 33, 25), **changes: object
) -> SelfCheck:
    check = steps.same_losses(label, lengths, **changes)
    return SelfCheck(check, remedy, needs="needs a CUDA GPU: a CPU has nothing to move or record")


_ALL = _REFERENCE.format(1)
_HYBRID = {"model": kernels.HYBRID}

CHECKS: dict[str, SelfCheck] = {
    "nf4 quantise": _kernel("nf4", "nf4_quantize"),
    "nf4 decode": _kernel("nf4", "nf4_dequantize", "nf4_dequantize_transposed"),
    "nf4 layouts": SelfCheck(kernels.check_layout_kernels, _REFERENCE.format("nf4")),
    "nf4 product": _kernel("nf4", "nf4_linear", "nf4_linear_dx"),
    "rms norm": _kernel("rms_norm", "rms_norm", "add_rms_norm", "rms_norm_grad"),
    "rms norm, zero-centred": _kernel("rms_norm", "rms_norm_zero_centred", **_HYBRID),
    "rope": _kernel("rope", "rope"),
    "swiglu": _kernel("swiglu", "swiglu", "swiglu_grad"),
    "cross-entropy": _kernel("cross_entropy", "cross_entropy", "linear_cross_entropy"),
    "8-bit head": _kernel("int8,cross_entropy", "int8_head"),
    "distillation": _kernel("cross_entropy", "linear_distillation"),
    "8-bit optimizer": SelfCheck(
        kernels.kernel_check("adamw8bit"), "--optimizer adamw keeps moments in 32 bits"
    ),
    "dropout": _kernel("dropout", "dropout", "lora_dropout"),
    "bias": SelfCheck(kernels.kernel_check("lora_bias"), _ALL),
    "DoRA": SelfCheck(kernels.kernel_check("dora"), "leave out --use-dora"),
    **{f"rank {rank}": _rank(rank) for rank in RANKS},
    "mixture": _kernel("moe", "mixture", model=kernels.MIXTURE),
    "grouped product": SelfCheck(
        experts.check_grouped_library, "ENGINE_REFERENCE=grouped_library decodes experts on the way"
    ),
    "gated delta rule": _kernel("delta_net", "gated_delta", **_HYBRID),
    "causal convolution": _kernel("delta_net", "causal_conv1d", **_HYBRID),
    "gated norm": _kernel("delta_net", "gated_rms_norm", **_HYBRID),
    **{f"attention {name}": _attention(name) for name in BACKENDS},
    "step, dense": _step(steps.DENSE, _ALL),
    "step, Qwen2.5": _step(steps.BIASED, _ALL, lora_dropout=0.1),
    "step, DoRA": _step(steps.DENSE, "leave out --use-dora", use_dora=True),
    "step, full recompute": _step(
        steps.DENSE, "--gradient-checkpointing none", gradient_checkpointing="full"
    ),
    "step, full fine-tuning": _step(steps.DENSE, "--method lora", method="full"),
    "step, mixture": _step(steps.MIXTURE, _REFERENCE.format("moe"), half=False),
    "step, Qwen3-Next": _step(steps.HYBRID, _REFERENCE.format("delta_net,moe"), half=False),
    "streams": SelfCheck(
        machine.check_side_copies, "leave out --offload", needs="needs a CUDA GPU with streams"
    ),
    "batches ahead": SelfCheck(
        machine.check_uploads,
        "none: every batch of `engine train` is sent so; try another driver or GPU",
        needs="needs a CUDA GPU with streams",
    ),
    "pinned memory": SelfCheck(machine.check_pinned, "leave out --offload and --embedding-on host"),
    "offload": _same("offload", "leave out --offload", offload=("checkpoints", "weights")),
    "graphs, packed": _same("CUDA graphs", "leave out --cuda-graphs", cuda_graphs=True),
    "graphs, equal lengths": _same(
        "CUDA graphs", "leave out --cuda-graphs", (128, 128), cuda_graphs=True
    ),
    "allocator limit": SelfCheck(
        machine.check_allocator_limit,
        "leave out --memory-budget",
        needs="needs a CUDA GPU's allocator",
        alone=True,
    ),
    "memory plan": SelfCheck(
        steps.check_memory_plan,
        "a --memory-budget smaller by the error",
        needs="needs a CUDA GPU's allocator",
    ),
    "same bits": SelfCheck(
        steps.check_same_bits, "ENGINE_ATTENTION=documents, or leave out --deterministic"
    ),
    "rates": SelfCheck(
        machine.measure_rates, "none: another program may use the device", alone=True
    ),
}


class _Section:
    """The checks as `engine.selfcheck.isolation` runs them."""

    def run(self, item: str, options: Mapping[str, Any]) -> Finding:
        chosen = CheckOptions.of(options)
        torch.manual_seed(0)
        finding = CHECKS[item].run(chosen)
        return finding if options["figures"] else finding | {"figures": None}


SECTIONS = {"checks": _Section()}
