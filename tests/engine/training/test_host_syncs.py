"""A training step waits for the device once, however many layers and micro-batches it has.

On a GPU, reading a value or a size from the device waits until the device is done. The operations
that read are counted in a real step of the trainer, once on the torch references and once with
every op taking its Triton path; there the launches are left out, and outputs that no kernel fills
are zero. The step that is counted has other documents than the one that warms up, so that what is
worked out for each batch counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.benchmark.cases.random_weights import random_decoder
from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.training.step import TrainingStep
from kernels.delta_net.reference import chunk_layout
from kernels.delta_net.tiles import chunk_table
from kernels.elementwise.swiglu import swiglu_forward
from kernels.moe.grouped_matmul import planar_experts
from kernels.nf4 import NF4Weight
from kernels.runtime.triton_support import HAS_TRITON
from models.config.model_config import ModelConfig
from models.layers.context import StepSettings
from models.layers.experts import Experts
from models.layers.packed_batch import PackedBatch
from optim import AdamW8bit

WARMING, DOCUMENTS = (9, 3, 12), (7, 12, 5)

EXPERTS = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "output_router_logits": True,
}
DELTA = {
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3"},
    "mixture": {"model_type": "qwen3_moe"} | EXPERTS,
    "hybrid": {"model_type": "qwen3_5_text"} | DELTA,
    "hybrid mixture": {"model_type": "qwen3_next", "shared_expert_intermediate_size": 64}
    | EXPERTS
    | DELTA,
}

# Each of these needs a value or a size that only the device knows.
READING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::bincount",
}


class HostReads(TorchDispatchMode):
    """Counts what a GPU would make the host wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        sized = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        masked = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READING or sized or masked:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def config(layers: int, name: str) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            **MODELS[name],
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64,
        }
    )


def step_of(
    layers: int, recompute: str, name: str, tile: int | None
) -> Callable[[list[PackedBatch]], object]:
    model = random_decoder(config(layers, name), torch.device("cpu"), torch.float32, rank=4)
    for module in model.modules():
        if isinstance(module, Experts):  # in the order that the kernels read
            module.stored = {
                leaf: planar_experts(weight) if isinstance(weight, NF4Weight) else weight
                for leaf, weight in module.stored.items()
            }
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    settings = StepSettings(tile, checkpointing=recompute)
    return TrainingStep(model, optimizer, settings, max_grad_norm=1.0)


def batches_of(documents: tuple[int, ...], micro_batches: int) -> list[PackedBatch]:
    """So many equal micro-batches of documents of these lengths, as the loader makes them."""
    ids = [torch.randint(0, 96, (length,)).tolist() for length in documents]
    examples = [Example(tokens, [True] * len(tokens), "row") for tokens in ids]
    return [collate(examples) for _ in range(micro_batches)]


def reads(
    layers: int,
    recompute: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str = "dense",
    tile: int | None = None,
    micro_batches: int = 2,
) -> Counter[str]:
    """What one warmed-up step reads. `tolist` goes past the dispatcher, so it is counted apart."""
    step = step_of(layers, recompute, name, tile)
    step(batches_of(WARMING, micro_batches))
    batches = batches_of(DOCUMENTS, micro_batches)
    chunk_layout.cache_clear()
    chunk_table.cache_clear()
    counter = HostReads()
    plain = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        counter.counts["tolist"] += 1
        return plain(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", counted)
        with counter:
            step(batches)
    return counter.counts


@pytest.fixture(params=["reference", "kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On the references, or on the Triton paths without their launches."""
    if request.param == "kernels":
        if not HAS_TRITON:
            pytest.skip("Triton is not installed on this platform")
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import KernelInterface

        monkeypatch.setenv("ENGINE_INTERPRET", "1")
        for owner in (KernelInterface, InterpretedFunction):
            if "__getitem__" in vars(owner):
                monkeypatch.setattr(owner, "__getitem__", lambda kernel, grid: no_launch)
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            monkeypatch.setattr(owner, name, zeroed(getattr(owner, name)))
    return str(request.param)


def zeroed(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An allocation that returns zeros."""

    def allocate_zeroed(*args: object, **options: object) -> torch.Tensor:
        tensor = allocate(*args, **options)
        return tensor if tensor.is_meta else tensor.detach().zero_()

    return allocate_zeroed


def no_launch(*args: object, **options: object) -> None:
    """A kernel that does nothing."""


WAITS = {
    "kernels": {"tolist": 1},
    "reference": {"tolist": 2, "aten::_local_scalar_dense": 1},
}
"""One on the kernels: the loss and the gradients' norm, read together after the update.

The optimizer's reference asks two things more: whether all is finite, and how many steps were done.
"""


@pytest.mark.parametrize(("layers", "micro_batches"), [(1, 1), (4, 1), (1, 3), (4, 3)])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_waits_for_the_device_once(
    path: str, recompute: str, layers: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = reads(layers, recompute, monkeypatch, micro_batches=micro_batches)
    assert counts == WAITS[path]


@pytest.mark.parametrize(
    ("name", "tile"), [("mixture", None), ("mixture", 16), ("hybrid", None), ("hybrid mixture", 16)]
)
def test_a_step_of_mixtures_and_hybrids_waits_for_the_device_once(
    name: str, tile: int | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layers in (2, 4):
        counts = reads(layers, "selective", monkeypatch, name, tile)
        if path == "reference" and name != "hybrid":
            # Expert by expert, a mixture asks once for the tokens of each and saves them for
            # backward; of two tiles once in either direction.
            asked, micro_batches = 1 if tile is None else 2 * 2, 2
            counts["tolist"] -= layers * micro_batches * asked
        assert counts == WAITS[path]


def test_a_read_in_a_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = swiglu_forward

    def reading(gate: torch.Tensor, up: torch.Tensor, **options: Any) -> torch.Tensor:
        assert float(gate.sum()) < float("inf")
        return right(gate, up, **options)

    monkeypatch.setattr("kernels.linear.swiglu_mlp.swiglu_forward", reading)
    few, many = (reads(layers, "none", monkeypatch) for layers in (1, 4))
    assert many["aten::_local_scalar_dense"] > few["aten::_local_scalar_dense"] > 0
