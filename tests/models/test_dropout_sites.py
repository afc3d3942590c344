"""Every site, expert and micro-batch of a model draws a mask of its own, and draws it again."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.benchmark.cases.random_weights import random_decoder
from engine.training.step import TrainingStep
from kernels.elementwise.dropout import Seed, dropout, keep_mask
from kernels.linear import lora_backward
from kernels.moe import grouped_matmul
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.experts import ExpertAdapter
from models.layers.linear import Linear
from models.layers.packed_batch import PackedBatch
from optim import AdamW8bit

Draw = tuple[int, int, int, int, int]
"""Key, site, first row, rows and width of a mask."""


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Draw]:
    """Every mask that is drawn from now on."""
    drawn: list[Draw] = []

    def recording(x: Tensor, p: float, seed: Seed) -> Tensor:
        drawn.append((int(seed.key), seed.site, seed.first_row, x.shape[0], x.shape[1]))
        return dropout(x, p, seed)

    for module in (lora_backward, grouped_matmul):
        monkeypatch.setattr(module, "dropout", recording)
    return drawn


def step_of(
    directory: Path, settings: StepSettings, layers: int = 4, micro_batches: int = 3
) -> tuple[Decoder, Callable[[], object]]:
    """A model with dropout 0.3 in every adapter, and a step over micro-batches of 60 tokens."""
    raw = json.loads((directory / "config.json").read_text())
    config = ModelConfig.from_dict(raw).with_layers(layers)
    model = random_decoder(config, torch.device("cpu"), torch.float32, rank=4)
    for module in model.modules():
        if isinstance(module, Linear | ExpertAdapter) and module.lora_A is not None:
            module.dropout = 0.3
    ids = torch.randint(0, 64, (micro_batches, 60), generator=torch.Generator().manual_seed(1))
    batches = [PackedBatch.of(row[None], labels=row[None]) for row in ids]
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step = TrainingStep(model, optimizer, settings, seed=7)
    return model, lambda: step(batches, number=5)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "qwen3_next"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_masks_of_all_sites_and_micro_batches_are_independent(
    family: str, policy: str, golden: Callable[[str], Path], draws: list[Draw]
) -> None:
    model, step = step_of(golden(family), StepSettings(checkpointing=policy))
    step()
    keys = {draw[0] for draw in draws}
    assert len(keys) == 3
    sites = defaultdict(set)
    for key, site, *shape in draws:
        sites[key, site].add(tuple(shape))
    # One shape for a site: forward, recompute and backward drop the same elements.
    assert all(len(shapes) == 1 for shapes in sites.values())
    # Two of the mixer and two of the feed-forward part; two more of a shared expert.
    assert len(sites) == 3 * (4 * len(model.layers) + 2 * sum(model.config.sparse_layers))
    masks = torch.stack(
        [
            keep_mask(60, 64, 0.3, Seed(key, site), torch.device("cpu")).flatten().double()
            for key, site in sites
        ]
    )
    masks -= masks.mean(1, keepdim=True)
    masks /= masks.norm(dim=1, keepdim=True)
    largest = float((masks @ masks.T).fill_diagonal_(0.0).abs().max())
    assert largest * math.sqrt(60 * 64) < 6


def test_each_expert_drops_rows_of_its_own(
    golden: Callable[[str], Path], draws: list[Draw]
) -> None:
    """Rows of all experts are rows of one mask, and tiles begin where the rows before them end."""
    model, step = step_of(golden("qwen2_moe"), StepSettings(mlp_tile_tokens=16), layers=2)
    step()
    assert list(model.config.sparse_layers) == [False, True]
    top_k = model.config.num_experts_per_tok
    rows = {(first, count) for _, site, first, count, _ in draws if site in (8, 9)}
    assert rows == {(first * top_k, min(16, 60 - first) * top_k) for first in range(0, 60, 16)}
    rows = {(first, count) for _, site, first, count, _ in draws if site in (10, 11)}
    assert rows == {(first, min(16, 60 - first)) for first in range(0, 60, 16)}


def test_tiles_of_a_dense_model_draw_the_masks_of_the_whole(golden: Callable[[str], Path]) -> None:
    losses = []
    for settings in (StepSettings(), StepSettings(mlp_tile_tokens=16)):
        torch.manual_seed(0)
        model, _ = step_of(golden("llama"), settings)
        model.double().train()
        ids = torch.arange(60)[None]
        settings = StepSettings(settings.mlp_tile_tokens, dropout_seed=3)
        loss = model.loss(ids, ids, settings=settings)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        losses.append([loss.detach(), *grads])
    for whole, tiled in zip(*losses, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-9, atol=1e-12)
