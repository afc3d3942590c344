"""Memory options change no gradient: each against the plain path, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model_sources.load_model import build_model
from kernels.linear.int8 import Int8Weight, dequantize_int8
from models.adapters import add_lora
from models.cache.one_sequence import KVCache
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings, layer_policies
from models.tensor_names import expected_tensors

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
TIED = SHAPE | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}
BOUNDS = torch.tensor([0, 21, 60], dtype=torch.int32)


class Random:
    """A checkpoint of random weights."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(0)
        self._tensors = {
            name: torch.randn(shape, generator=generator) * 0.1 + (1.0 if len(shape) == 1 else 0.0)
            for name, shape in expected_tensors(config).items()
        }

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def codes(self, name: str) -> None:
        """Nothing is quantised."""

    def release(self, name: str) -> None:
        """Nothing is mapped."""


def build(shape: dict[str, Any], dropout: float = 0.0, **options: Any) -> Decoder:
    checkpoint: Any = Random(ModelConfig.from_dict(shape))
    model = build_model(checkpoint, quantization="nf4", dtype=torch.float64, **options)
    add_lora(model, rank=4, seed=3, dropout=dropout)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora" in name:  # in float64, and B not zero, so that every path carries a gradient
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = values * 0.1
    return model


def batch(shape: dict[str, Any]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape["vocab_size"], (1, 60), generator=generator)
    labels = ids.clone()
    labels[0, :30] = -100
    return ids, labels


def gradients(
    model: Decoder, shape: dict[str, Any], settings: StepSettings = DEFAULT_SETTINGS
) -> dict[str, Tensor]:
    ids, labels = batch(shape)
    model.zero_grad()
    loss = model.loss(ids, labels, BOUNDS, settings=replace(settings, loss_chunk_tokens=16))
    loss.backward()
    results = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(results) == 3 * 7 * 2
    return results | {"loss": loss.detach()}


def assert_equal(mine: dict[str, Tensor], plain: dict[str, Tensor], limit: float = 1e-10) -> None:
    assert mine.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (mine[name] - gradient).abs().max() <= limit * gradient.abs().max(), name


def densify(model: Decoder) -> None:
    """Put the dense matrix that 8-bit rows stand for in their place."""
    for holder in (model.model.embed_tokens, model.lm_head):
        weight = None if holder is None else holder.weight
        if isinstance(weight, Int8Weight):
            holder.set_weight(dequantize_int8(weight, torch.float64))  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["head", "tied"])
def test_a_head_in_8_bit_rows_is_the_dense_matrix_it_stands_for(
    shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.loss.linear_cross_entropy._SLAB_BYTES", 64 * 64 * 8)  # 64 rows
    model, dense = build(shape, head_8bit=True), build(shape, head_8bit=True)
    densify(dense)
    assert isinstance(model.head_weight(), Int8Weight)
    assert not isinstance(dense.head_weight(), Int8Weight)
    assert_equal(gradients(model, shape), gradients(dense, shape))
    ids, _ = batch(shape)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), dense(ids), rtol=1e-10, atol=1e-12)
    caches = [KVCache(model.config, 32, torch.float64, torch.device("cpu")) for _ in range(2)]
    mine, plain = (m.decode(ids[0, :7], c) for m, c in zip((model, dense), caches, strict=True))
    torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


def test_8_bit_rows_are_near_the_weights_they_were_made_of() -> None:
    model, plain = build(SHAPE, head_8bit=True), build(SHAPE)
    head, weight = model.head_weight(), plain.head_weight()
    assert isinstance(head, Int8Weight) and isinstance(weight, Tensor)
    apart = (dequantize_int8(head, torch.float64) - weight).abs().amax(1)
    # Half a step of 1/127 of the row's largest, and what fp32 scales lose.
    assert bool((apart <= weight.abs().amax(1) / 254 * (1 + 1e-5)).all())
    assert float(apart.max()) > 0


def test_an_embedding_on_the_host_gives_the_same_bits() -> None:
    model, plain = build(SHAPE, embedding_on_host=True), build(SHAPE)
    assert "model.embed_tokens.weight" not in dict(model.named_parameters())
    mine, theirs = gradients(model, SHAPE), gradients(plain, SHAPE)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_tied_embedding_cannot_stay_on_the_host() -> None:
    with pytest.raises(ConfigError, match="output head too"):
        build(TIED, embedding_on_host=True)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_damaged_head_or_embedding_is_refused(name: str) -> None:
    checkpoint: Any = Random(ModelConfig.from_dict(SHAPE))
    checkpoint.tensor(name)[3, 4] = float("nan")
    with pytest.raises(Exception, match=f"tensor {name} holds values that are not finite"):
        build_model(checkpoint, head_8bit=True, embedding_on_host=True)


@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["llama", "qwen3"])
@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(
    "settings",
    [StepSettings(16), StepSettings(64), StepSettings(None, True), StepSettings(7, True)],
    ids=str,
)
def test_tiles_and_single_weights_change_no_gradient(
    shape: dict[str, Any], policy: str, settings: StepSettings
) -> None:
    model, plain = build(shape), build(shape)
    settings = replace(settings, checkpointing=policy)
    assert_equal(gradients(model, shape, settings), gradients(plain, shape))


def test_norms_and_weights_get_their_gradients_from_tiles() -> None:
    results = []
    for settings in (StepSettings(16), StepSettings()):
        checkpoint: Any = Random(ModelConfig.from_dict(SHAPE))
        model = build_model(checkpoint, dtype=torch.float64)
        model.requires_grad_(True)
        ids, labels = batch(SHAPE)
        model.loss(ids, labels, BOUNDS, settings=settings).backward()
        assert all(p.grad is not None for p in model.parameters())
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal(results[0], results[1])


def test_a_tile_draws_its_dropout_again_in_backward() -> None:
    """Against finite differences along the adapters' gradient: other masks would be far off."""
    model = build(SHAPE, dropout=0.3)
    model.train()
    settings = StepSettings(16, dropout_seed=11, loss_chunk_tokens=16)
    results = gradients(model, SHAPE, settings)
    down = model.model.get_parameter("layers.0.mlp.down_proj.lora_B")
    gate = model.model.get_parameter("layers.1.mlp.gate_proj.lora_A")
    ids, labels = batch(SHAPE)
    for parameter in (down, gate):
        name = next(n for n, p in model.named_parameters() if p is parameter)
        step = results[name] * (1e-4 / results[name].norm())
        values = []
        for sign in (1.0, -2.0):
            parameter.data += sign * step
            with torch.no_grad():
                values.append(float(model.loss(ids, labels, BOUNDS, settings=settings)))
        parameter.data += step
        slope = (values[0] - values[1]) / 2e-4
        assert slope == pytest.approx(float(results[name].norm()), rel=1e-5)


@pytest.mark.parametrize("policy", ["full:1,none", "none:2,full", "full:1,selective:1,none:1"])
def test_policies_by_layer_change_no_bit(policy: str) -> None:
    model, plain = build(TIED), build(TIED)
    mine = gradients(model, TIED, StepSettings(checkpointing=policy))
    theirs = gradients(plain, TIED, StepSettings(checkpointing="none"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_policies_are_counted_from_the_first_layer() -> None:
    assert layer_policies("full:2,none", 5) == ("full", "full", "none", "none", "none")
    assert layer_policies("selective", 2) == ("selective", "selective")


@pytest.mark.parametrize("text", ["ful", "full,none", "full:4,none", "full:1,none:1", "full:x"])
def test_policies_that_do_not_fit_the_layers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="checkpointing policy"):
        layer_policies(text, 3)
