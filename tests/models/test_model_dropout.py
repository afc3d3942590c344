"""Dropout of the model itself: embedding, what blocks add, and attention's weights."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, silu

from kernels.elementwise.dropout import Seed, keep_mask
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings

P, ATTENTION_P, KEY = 0.25, 0.375, 77
"""Multiples of 2^-16, as masks have them."""
SETTINGS = StepSettings(hidden_dropout=P, attention_dropout=ATTENTION_P, dropout_seed=KEY)
BOUNDS = (0, 7, 8, 21)


def fresh(directory: Path, layers: int = 2) -> Decoder:
    """A float64 model of random weights that trains every one of them."""
    raw = json.loads((directory / "config.json").read_text())
    model = Decoder(ModelConfig.from_dict(raw).with_layers(layers)).double()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values * 0.1 + (1.0 if "norm" in name else 0.0)
    return model.train()


def example(model: Decoder) -> tuple[Tensor, Tensor]:
    ids = torch.randint(
        0, model.config.vocab_size, (1, BOUNDS[-1]), generator=torch.Generator().manual_seed(1)
    )
    return ids, torch.tensor(BOUNDS, dtype=torch.int32)


def loss_of(model: Decoder, settings: StepSettings) -> Tensor:
    ids, bounds = example(model)
    return model.loss(ids, ids, cu_seqlens=bounds, settings=settings)


def masked(x: Tensor, p: float, site: int, first_row: int = 0) -> Tensor:
    mask = keep_mask(x.shape[0], x.shape[1], p, Seed(KEY, site, first_row), torch.device("cpu"))
    return x * mask / (1 - p)


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = (positions.float()[:, None, None] * frequencies).to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def plain_llama(config: ModelConfig, w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The mean loss of a Llama in plain torch, one document at a time."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * w[name]

    heads, dim = config.num_attention_heads, config.head_dim
    groups = heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    x = masked(embedding(ids, w["model.embed_tokens.weight"]), P, (1 << 20) - 1)
    for layer in range(config.num_hidden_layers):
        name, site = f"model.layers.{layer}.", (1 << 20) + 3 * layer
        h = norm(x, f"{name}input_layernorm.weight")
        q, k, v = (
            (h @ w[f"{name}self_attn.{part}_proj.weight"].T).unflatten(1, (-1, dim))
            for part in "qkv"
        )
        parts = []
        for start, end in itertools.pairwise(BOUNDS):
            positions = torch.arange(end - start)
            qd = rotated(q[start:end], positions, theta).transpose(0, 1)
            kd = rotated(k[start:end], positions, theta).transpose(0, 1)
            vd = v[start:end].transpose(0, 1)
            kd, vd = kd.repeat_interleave(groups, 0), vd.repeat_interleave(groups, 0)
            scores = qd @ kd.mT * dim**-0.5
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
            weights = scores.softmax(-1)
            dropped = masked(weights.flatten(0, 1), ATTENTION_P, site + 2, start * heads)
            parts.append((dropped.view_as(weights) @ vd).transpose(0, 1))
        mixed = torch.cat(parts).flatten(1) @ w[f"{name}self_attn.o_proj.weight"].T
        x = x + masked(mixed, P, site)
        h = norm(x, f"{name}post_attention_layernorm.weight")
        gate, up, down = (w[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        x = x + masked((silu(h @ gate.T) * (h @ up.T)) @ down.T, P, site + 1)
    logits = norm(x, "model.norm.weight") @ w["lm_head.weight"].T
    targets = torch.cat([ids[1:], ids[:1]])
    targets[[end - 1 for end in BOUNDS[1:]]] = -100
    return cross_entropy(logits, targets)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("tile", [None, 16])
def test_loss_and_every_gradient_equal_a_plain_model_with_the_same_masks(
    policy: str, tile: int | None, golden: Callable[[str], Path]
) -> None:
    model = fresh(golden("llama"))
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    want = plain_llama(model.config, leaves, example(model)[0][0])
    want.backward()
    got = loss_of(model, replace(SETTINGS, checkpointing=policy, mlp_tile_tokens=tile))
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next", "mistral"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_gradients_of_every_family_are_those_of_its_loss(
    family: str, policy: str, golden: Callable[[str], Path]
) -> None:
    """Along a random direction the loss rises as its gradient says."""
    model, settings = fresh(golden(family), 4), replace(SETTINGS, checkpointing=policy)
    loss_of(model, settings).backward()
    generator = torch.Generator().manual_seed(5)
    steps = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for n, p in model.named_parameters()
    }
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == steps.keys()
    slope = sum(float((grads[n] * step).sum()) for n, step in steps.items())
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in model.named_parameters():
                parameter.add_(steps[name], alpha=sign * 1e-6)
            losses.append(float(loss_of(model, settings)))
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=2e-4)


def test_dropout_follows_from_its_seed_and_is_off_outside_training(
    golden: Callable[[str], Path],
) -> None:
    model = fresh(golden("llama"))
    with torch.no_grad():
        plain = float(loss_of(model, StepSettings()))
        first, again = float(loss_of(model, SETTINGS)), float(loss_of(model, SETTINGS))
        other = float(loss_of(model, replace(SETTINGS, dropout_seed=KEY + 1)))
        assert first == again != other
        assert plain not in (first, other)
        assert float(loss_of(model.eval(), SETTINGS)) == plain
