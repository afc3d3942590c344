"""Every matrix that a step multiplies or hands to a kernel has rows on multiples of 16 elements.

A real step on real tensors, on the code for GPUs: Triton launches are observed and left out, and
what no kernel fills is zero. Sizes of the model are multiples of 16, as those of real models are;
ranks are anything.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.benchmark.cases.random_weights import random_decoder
from engine.training.step import TrainingStep
from kernels.attention import attention_forward
from kernels.attention.documents import AttentionSettings
from kernels.linear import projection
from kernels.linear.columns import gradient_columns, input_columns, output_columns
from kernels.linear.projection import Projection, layout_of
from kernels.nf4 import NF4Weight
from kernels.nf4.planar import to_planar
from kernels.runtime.simulation import SimulatedGPU, simulate_with
from models.config.model_config import ModelConfig
from models.layers.context import StepSettings
from models.layers.linear import Linear
from models.layers.packed_batch import PackedBatch
from optim import AdamW8bit

RANKS = (1, 3, 4, 8, 12, 16, 24, 64, 255, 256)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
EXPERTS = {
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DELTA = {
    "full_attention_interval": 2,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "llama"},
    "biases": {"model_type": "qwen2"},
    "normed heads": {"model_type": "qwen3"},
    "mixture": {"model_type": "qwen3_moe"} | EXPERTS,
    "hybrid": {"model_type": "qwen3_5_text"} | DELTA,
    "hybrid mixture": {"model_type": "qwen3_next", "shared_expert_intermediate_size": 64}
    | EXPERTS
    | DELTA,
}


class Pitches(TorchDispatchMode):
    """Notes row pitches of matrices in 16 bits, of products and of launches."""

    gpu: SimulatedGPU | None = None

    def __init__(self) -> None:
        super().__init__()
        self.wrong: set[tuple[str, tuple[int, ...], tuple[int, ...], int]] = set()
        self.seen = 0

    def note(self, where: str, tensors: Sequence[Any]) -> None:
        """Check the rows of every matrix, as it is or transposed."""
        for x in tensors:
            if not isinstance(x, Tensor) or x.dtype != torch.bfloat16 or x.dim() < 2:
                continue
            if 1 in x.shape or 1 not in x.stride():
                continue
            self.seen += 1
            pitches = [step for step in x.stride() if step != 1]
            if any(step % 16 for step in pitches) or x.storage_offset() % 8:
                self.wrong.add((where, tuple(x.shape), x.stride(), int(x.storage_offset())))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::copy_", "aten::add_"):
            self.note(name, (*args, *(kwargs or {}).values(), result))
        return result

    def launch(self, kernel: Any, operations: float) -> Callable[..., None]:
        """Observe a launch, and fill what it would have filled."""

        def observe(*args: Any, **options: Any) -> None:
            self.note(str(kernel.fn.__name__), args)
            for x in args:
                if isinstance(x, Tensor) and x.is_floating_point():
                    x.nan_to_num_(0.0)

        return observe

    def once(self, key: Hashable, run: Callable[[], Any], result: Callable[[], Any]) -> Any:
        return run()

    def some(self, parts: Sequence[Any]) -> Iterator[Any]:
        return iter(parts)

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype, taken: int) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def stays_on_host(self, tensor: Tensor) -> None: ...

    def shapes_only(self) -> AbstractContextManager[Any]:
        return nullcontext()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    monkeypatch.delenv("ENGINE_REFERENCE", raising=False)
    monkeypatch.setenv("ENGINE_INTERPRET", "1")


@pytest.fixture
def flash_inputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """q, k and v of every call of attention."""
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Any:
        seen.extend((q, k, v))
        return attention_forward(q, k, v, settings)

    monkeypatch.setattr("models.layers.attention.attention_forward", attend)
    return seen


def observed_step(family: str, rank: int, policy: str) -> Pitches:
    config = ModelConfig.from_dict(SIZES | FAMILIES[family])
    model = random_decoder(config, torch.device("cpu"), torch.bfloat16, rank=rank)
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(module.weight, NF4Weight):
            module.set_weight(to_planar(module.weight))
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, 96, (1, 48))
    batch = PackedBatch.of(ids, ids)
    pitches = Pitches()
    with simulate_with(pitches), pitches:
        TrainingStep(model, optimizer, StepSettings(checkpointing=policy))([batch])
    return pitches


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", RANKS)
def test_rows_begin_on_multiples_of_sixteen_elements(
    rank: int, family: str, policy: str, flash_inputs: list[Tensor]
) -> None:
    pitches = observed_step(family, rank, policy)
    assert pitches.seen > 50
    assert not pitches.wrong, sorted(pitches.wrong)
    assert len(flash_inputs) >= 3
    for x in flash_inputs:
        assert x.stride(2) == 1
        assert x.data_ptr() % 16 == 0
        assert all(step * x.itemsize % 16 == 0 for step in x.stride()[:2])


SHAPES = (
    (4096, (4096, 1024, 1024), 14336),
    (3584, (3584, 512, 512), 18944),
    (576, (576, 192), 1536),
)
"""Hidden size, outputs of attention's inputs, and the feed-forward part's width."""


@pytest.mark.parametrize(("hidden", "heads", "inner"), SHAPES)
def test_no_rank_moves_the_rows_of_joint_matrices(
    hidden: int, heads: tuple[int, ...], inner: int
) -> None:
    """Every matrix that a group's adapters widen, for all ranks up to 256, by its strides alone."""
    meta = torch.device("meta")
    for rank in range(1, 257):
        a = {n: torch.empty(rank, n, device=meta) for n in (hidden, inner, heads[0])}
        groups = [
            [(out, hidden) for out in heads],
            [(inner, hidden)] * 2,
            [(hidden, inner)],
            [(hidden, heads[0])],
        ]
        for sizes in groups:
            group = [
                Projection(
                    torch.empty(out, width, device=meta),
                    lora_a=a[width],
                    lora_b=torch.empty(out, rank, device=meta),
                )
                for out, width in sizes
            ]
            x = torch.empty(8, sizes[0][1], dtype=torch.bfloat16, device=meta)
            columns = (
                output_columns(8, group, x),
                input_columns(x, group),
                gradient_columns(x, group),
            )
            for made in columns:
                assert made is not None
                assert all(part.stride(0) % 16 == 0 for part in (made.whole, *made.parts))
                assert all(part.storage_offset() % 8 == 0 for part in made.parts)
            layout = layout_of(group)
            assert layout.spare % 16 == 0
            assert all(low % 16 == 0 for low in layout.low)


def test_a_smaller_alignment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "ALIGNED", 4)
    projection._layout.cache_clear()
    wrong = observed_step("dense", 9, "none").wrong
    projection._layout.cache_clear()
    assert "aten::mm" in {where for where, *_ in wrong}
