"""Adapters on a decoder: they train, all of them, and under every checkpointing policy alike."""

from collections.abc import Callable

import pytest
import torch

from kernels.nf4 import quantize
from models.adapters import (
    adapter_tensors,
    add_lora,
    attach_lora,
    linears,
    scale_of,
    target_modules,
)
from models.cache.one_sequence import KVCache
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings
from models.layers.linear import Linear
from models.tensor_names import DELTA_PROJECTIONS, PROJECTIONS

IDS = torch.tensor([3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28])
BOUNDS = torch.tensor([0, 7, 18], dtype=torch.int32)


def config(**changes: object) -> ModelConfig:
    raw = {
        "model_type": "qwen3",
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
    }
    return ModelConfig.from_dict(raw | changes)


def build(dtype: torch.dtype = torch.float32, **changes: object) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config(**changes)).to(dtype)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if "norm" in name:
            parameter.data.add_(1.0)
    return model


def randomize_adapters(model: Decoder) -> None:
    generator = torch.Generator().manual_seed(1)
    for a, b in adapter_tensors(model).values():
        a.normal_(0, 0.3, generator=generator)
        b.normal_(0, 0.3, generator=generator)


def gradients(model: Decoder, settings: StepSettings = DEFAULT_SETTINGS) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(IDS, IDS, BOUNDS, settings=settings).backward()
    results = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in results.values())
    return {name: gradient for name, gradient in results.items() if gradient is not None}


def test_a_new_adapter_changes_nothing_and_leaves_only_itself_trainable() -> None:
    model = build()
    with torch.no_grad():
        before = model(IDS[None])
        paths = add_lora(model, rank=4)
        after = model(IDS[None])
    assert torch.equal(before, after)
    assert len(paths) == 2 * 7
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2
    assert all(name.endswith(("lora_A", "lora_B")) for name in trainable)


@pytest.mark.parametrize("targets", ["all", "attn", "qv", "gate_proj", ["k_proj", "down_proj"]])
def test_adapters_on_any_set_of_projections_get_gradients(targets: str | list[str]) -> None:
    model = build()
    paths = add_lora(model, rank=3, targets=targets)
    randomize_adapters(model)
    wanted = [name for name in target_modules(targets) if name not in DELTA_PROJECTIONS]
    assert len(paths) == 2 * len(wanted)
    for name, gradient in gradients(model).items():
        assert name.split(".")[-2] in wanted
        assert float(gradient.abs().max()) > 0, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("quantized", [False, True])
def test_checkpointing_policies_give_the_same_gradients_to_rounding(
    dropout: float, quantized: bool
) -> None:
    model = build(torch.float64)
    if quantized:
        for linear in linears(model, PROJECTIONS).values():
            assert isinstance(linear.weight, torch.Tensor)
            linear.set_weight(quantize(linear.weight.detach().float()))
    add_lora(model, rank=4, dropout=dropout)
    model.double().train()
    randomize_adapters(model)
    results = {}
    for policy in ("none", "selective", "full"):
        settings = StepSettings(checkpointing=policy, dropout_seed=5)
        results[policy] = gradients(model, settings)
    for policy in ("selective", "full"):
        for name, want in results["none"].items():
            error = (results[policy][name] - want).norm() / want.norm()
            assert float(error) <= 1e-10, (policy, name)


def test_dropout_masks_differ_by_seed_and_vanish_in_evaluation() -> None:
    model = build()
    add_lora(model, rank=4, dropout=0.5)
    randomize_adapters(model)
    model.train()
    losses = []
    for seed in (1, 2, 1):
        settings = StepSettings(dropout_seed=seed)
        losses.append(float(model.loss(IDS, IDS, BOUNDS, settings=settings).detach()))
    assert losses[0] == losses[2] != losses[1]
    model.eval()
    evaluated = float(model.loss(IDS, IDS, BOUNDS).detach())
    settings = StepSettings(dropout_seed=9)
    assert evaluated == float(model.loss(IDS, IDS, BOUNDS, settings=settings).detach())


def plain(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """The textbook formula, for autograd to differentiate."""
    assert isinstance(linear.weight, torch.Tensor)
    y = x @ linear.weight.T
    if linear.bias is not None:
        y = y + linear.bias
    if linear.lora_A is not None and linear.lora_B is not None:
        y = y + linear.scale * (x @ linear.lora_A.T) @ linear.lora_B.T
    return y


def test_adapter_gradients_equal_autograd_through_merged_weights() -> None:
    """d loss / d A and d loss / d B follow from d loss / d W of the merged model."""
    model = build(torch.float64)
    add_lora(model, rank=4, alpha=6.0)
    model.double()
    randomize_adapters(model)
    got = gradients(model)
    merged = build(torch.float64)
    for path, linear in linears(model, PROJECTIONS).items():
        target = merged.get_submodule(path)
        assert isinstance(target, Linear) and isinstance(target.weight, torch.Tensor)
        assert isinstance(linear.weight, torch.Tensor)
        assert linear.lora_A is not None and linear.lora_B is not None
        with torch.no_grad():
            delta = linear.scale * linear.lora_B @ linear.lora_A
            target.weight.copy_(linear.weight + delta)
    want = gradients(merged)
    for path, linear in linears(model, PROJECTIONS).items():
        dw = want[f"{path}.weight"]
        assert linear.lora_A is not None and linear.lora_B is not None
        da = linear.scale * linear.lora_B.detach().T @ dw
        db = linear.scale * dw @ linear.lora_A.detach().T
        assert torch.allclose(got[f"{path}.lora_A"], da, rtol=1e-9, atol=1e-12), path
        assert torch.allclose(got[f"{path}.lora_B"], db, rtol=1e-9, atol=1e-12), path


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert scale_of(16, 32, False) == 2.0
    assert scale_of(16, 32, True) == 8.0


def test_unknown_targets_and_ranks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="w_proj"):
        target_modules("q_proj,w_proj")
    with pytest.raises(ValueError, match="rank 0"):
        add_lora(build(), rank=0)


def test_attaching_tensors_names_every_mismatch() -> None:
    model = build()
    a, b = torch.ones(4, 64), torch.ones(64, 4)
    tensors = {
        "model.layers.9.self_attn.q_proj": (a, b),
        "model.layers.0.self_attn.k_proj": (a, b),
        "model.layers.1.self_attn.o_proj": (a, b, torch.ones(3)),
    }
    with pytest.raises(ValueError) as caught:
        attach_lora(model, tensors, dict.fromkeys(tensors, 1.0))
    for words in (
        r"model.layers.9.self_attn.q_proj is not in the model",
        r"lora_B of model.layers.0.self_attn.k_proj is (64, 4), expected (32, 4)",
        r"lora_magnitude_vector of model.layers.1.self_attn.o_proj is (3,), expected (64,)",
    ):
        assert words in str(caught.value)
    assert not adapter_tensors(model)


def test_ranks_and_scales_may_differ_from_module_to_module() -> None:
    model, plain = build(torch.float64), build(torch.float64)
    sizes = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.up_proj": 5}
    generator = torch.Generator().manual_seed(3)
    shapes = {path: linear.weight.shape for path, linear in linears(model, PROJECTIONS).items()}
    tensors = {
        path: (
            torch.randn(rank, shapes[path][1], generator=generator),
            torch.randn(shapes[path][0], rank, generator=generator),
        )
        for path, rank in sizes.items()
    }
    scales = {path: 0.5 * rank for path, rank in sizes.items()}
    attach_lora(model, tensors, scales)
    for path, (a, b) in tensors.items():
        weight = plain.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        weight.data += scales[path] * b.double() @ a.double()
    assert torch.allclose(model(IDS[None]), plain(IDS[None]), atol=1e-9)
    assert {p for p, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"{path}.lora_{letter}" for path in sizes for letter in "AB"
    }


@pytest.mark.parametrize("window", [None, 4])
def test_generation_with_cache_equals_generation_without(window: int | None) -> None:
    changes: dict[str, object] = (
        {"model_type": "mistral", "sliding_window": window, "head_dim": 16} if window else {}
    )
    model = build(torch.float64, **changes).eval()
    cache = KVCache(model.config, 64, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        whole = model(IDS[None])[0]
        pieces = [IDS[:5], IDS[5:6], IDS[6:9], *IDS[9:].split(1)]
        end = 0
        for piece in pieces:
            end += len(piece)
            last = model.decode(piece, cache)
            assert torch.allclose(last, whole[end - 1], rtol=0, atol=1e-12), end


def test_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="101"):
        build()(torch.tensor([[1, 101]]))


@pytest.mark.parametrize("bounds", [[0, 7], [0, 9, 7, 18], [1, 18], [0, 0, 18]])
def test_boundaries_that_do_not_fit_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        build()(IDS[None], torch.tensor(bounds, dtype=torch.int32))


Factory = Callable[[], Decoder]


@pytest.mark.parametrize("frozen", [True, False])
def test_full_training_reaches_every_parameter(frozen: bool) -> None:
    model = build(tie_word_embeddings=frozen)
    for name, gradient in gradients(model).items():
        assert float(gradient.abs().max()) > 0, name
