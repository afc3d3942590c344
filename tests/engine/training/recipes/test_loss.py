"""Label smoothing, z-loss and NEFTune in a model's step, against torch on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config.train_config import TrainConfig
from engine.model_sources.load_model import load_model
from engine.training.trainable import make_trainable, step_settings
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.noise import with_noise
from models.layers.packed_batch import PackedBatch
from tests.support.tiny_model import GOLDEN

IDS = (torch.arange(60) * 7 % 61 + 1).reshape(2, 30)
LABELS = torch.where(torch.arange(60).reshape(2, 30) % 3 == 0, -100, IDS)


def made(**changes: object) -> tuple[Decoder, StepSettings]:
    config = TrainConfig(
        model="m", data="d", method="lora", gradient_checkpointing="none", **changes
    )
    model = load_model(GOLDEN / "llama")
    make_trainable(model, config, None)
    return model.train(), step_settings(config)


def gradients(model: Decoder, loss: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_smoothing_and_z_loss_of_a_step_are_torchs_on_whole_logits() -> None:
    model, settings = made(label_smoothing_factor=0.1, z_loss=1e-2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    ours = model.batch_loss(PackedBatch.of(IDS, LABELS), settings)
    mine = gradients(model, ours)
    logits, targets = model(IDS)[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()
    wanted = F.cross_entropy(logits, targets, label_smoothing=0.1)
    wanted = wanted + 1e-2 * logits.logsumexp(1)[targets >= 0].square().mean()
    torch.testing.assert_close(ours, wanted)
    for one, other in zip(mine, gradients(model, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_noise_has_the_size_of_the_paper_by_document_and_follows_the_seed() -> None:
    x, bounds, alpha = torch.zeros(110, 64), torch.tensor([0, 10, 110]), 5.0
    noise = with_noise(x, bounds, alpha, 3)
    assert torch.equal(noise, with_noise(x, bounds, alpha, 3))
    assert not torch.equal(noise, with_noise(x, bounds, alpha, 4))
    for part, length in ((noise[:10], 10), (noise[10:], 100)):
        most = alpha / (length * 64) ** 0.5
        assert 0.99 * most < float(part.abs().max()) <= most
        assert float(part.square().mean()) == pytest.approx(most**2 / 3, rel=0.1)
        assert abs(float(part.mean())) < 0.1 * most


def test_noise_is_added_in_training_alone() -> None:
    model, settings = made(neftune_noise_alpha=5.0)
    batch = PackedBatch.of(IDS, LABELS)
    noisy = [
        model.batch_loss(batch, StepSettings(neftune_alpha=5.0, dropout_seed=seed)).item()
        for seed in (1, 2, 1)
    ]
    plain = model.batch_loss(batch, settings).item()
    assert noisy[0] == noisy[2]
    assert len({plain, *noisy}) == 3
    model.eval()
    assert model.batch_loss(batch, StepSettings(neftune_alpha=5.0, dropout_seed=1)).item() == (
        pytest.approx(plain, rel=1e-6)
    )
