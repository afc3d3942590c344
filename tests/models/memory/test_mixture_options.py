"""Memory options on mixtures of experts and hybrids: gradients, bytes, what is streamed.

On a CPU nothing moves by itself, so the stream is told to move; the copies are then real ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.benchmark.cases.random_weights import random_decoder
from engine.memory.simulate.meter import MemoryMeter
from engine.memory.simulate.observer import observed
from engine.model_sources.load_model import load_model
from kernels.moe.grouped_matmul import grouped_project
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.block import DecoderLayer
from models.layers.context import StepSettings
from models.layers.experts import ExpertAdapter, Experts
from models.layers.linear import Linear
from models.layers.packed_batch import PackedBatch
from models.memory.offload import WeightStream, on_host

LAYERS = 4
MIXTURES = ["qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_vl"]
BOUNDS = torch.tensor([0, 21, 60], dtype=torch.int32)
IDS = torch.randint(0, 64, (1, 60), generator=torch.Generator().manual_seed(1))

ROUTED = StepSettings(router_loss=0.1)

Build = Callable[..., Decoder]


@pytest.fixture
def build(golden: Callable[[str], Path]) -> Build:
    """``build(family)`` is a model of four layers in float64, NF4 with adapters that do something.

    The router's loss counts; with ``full=True`` the weights are dense and all of them trained.
    """

    def make(family: str, *, full: bool = False, dropout: float = 0.0, **changes: Any) -> Decoder:
        raw = json.loads((golden(family) / "config.json").read_text())
        raw.get("text_config", raw).update(changes)
        config = ModelConfig.from_dict(raw).with_layers(LAYERS)
        torch.manual_seed(0)
        if full:
            model = Decoder(config).double()
            for parameter in model.parameters():
                parameter.data.normal_(std=0.2).add_(float(parameter.dim() == 1))
        else:
            model = random_decoder(config, torch.device("cpu"), torch.float64, rank=4)
        for module in model.modules():
            if isinstance(module, Linear | ExpertAdapter) and module.lora_A is not None:
                assert module.lora_B is not None
                module.lora_A.data = module.lora_A.data.double()
                module.lora_B.data = module.lora_B.data.double() * 10
                module.dropout = dropout
        return model

    return make


def step(model: Decoder, settings: StepSettings = ROUTED) -> dict[str, Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = model.loss(IDS, IDS, BOUNDS, settings=settings)
    loss.backward()
    results = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | {"loss": loss.detach()}


def assert_same_bits(mine: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert mine.keys() == plain.keys()
    assert all(torch.equal(mine[name], plain[name]) for name in plain)


def assert_equal(mine: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert mine.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (mine[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name


def codes(layer: DecoderLayer) -> Iterator[tuple[str, Tensor]]:
    """Path and tensor of every part of every quantised weight of a layer."""
    for path, module in layer.named_modules():
        if isinstance(module, Experts):
            for name, weight in module.stored.items():
                assert not isinstance(weight, tuple)
                yield from ((f"{path}.{name}", x) for x in vars(weight).values())
        elif isinstance(module, Linear) and not isinstance(module.weight, Tensor):
            yield from ((path, x) for x in vars(module.weight).values())


def tensors(layer: DecoderLayer) -> dict[str, list[Tensor]]:
    results: dict[str, list[Tensor]] = {}
    for path, part in codes(layer):
        if isinstance(part, Tensor):
            results.setdefault(path, []).append(part)
    return results


def addresses(layer: DecoderLayer) -> set[int]:
    return {part.data_ptr() for parts in tensors(layer).values() for part in parts}


def size(layer: DecoderLayer) -> int:
    return sum(part.nbytes for parts in tensors(layer).values() for part in parts)


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that move tensors although device and host are one."""
    start = WeightStream.__init__

    def told(self: WeightStream, *args: Any) -> None:
        start(self, *args)
        self._is_gpu = True

    monkeypatch.setattr(WeightStream, "__init__", told)


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("family", [*MIXTURES, "qwen3_5"])
def test_streamed_layers_have_copies_of_all_their_weights_and_give_the_same_bits(
    family: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = step(build(family))
    model = build(family)
    model.stream_weights()
    home = [addresses(layer) for layer in model.layers]
    seen: list[int] = []
    for name in ("forward", "backward"):
        plain = getattr(DecoderLayer, name)

        def checked(layer: DecoderLayer, *args: Any, plain: Any = plain) -> Any:
            here = addresses(layer)
            assert len(here) == len(home[layer.index])
            assert not here & home[layer.index]
            seen.append(layer.index)
            return plain(layer, *args)

        monkeypatch.setattr(DecoderLayer, name, checked)
    for _ in range(2):
        assert_same_bits(step(model), expected)
    up = list(range(LAYERS))
    assert seen == [*up, *up[::-1]] * 2
    assert [addresses(layer) for layer in model.layers] == home


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_vl"])
def test_delta_nets_projections_are_streamed(family: str, build: Build) -> None:
    model = build(family)
    joint = family == "qwen3_next"
    wide = {"in_proj_qkvz"} if joint else {"in_proj_qkv", "in_proj_z"}
    expected = {f"linear_attn.{name}" for name in (*wide, "out_proj")}
    expected |= {f"mlp.experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    expected |= {f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert set(tensors(model.layers[0])) == expected
    stream = WeightStream(model.layers, model.device)
    streamed = sum(len(named) for named in stream._host[0])
    assert streamed == len(expected)


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("family", MIXTURES)
def test_two_layers_weights_are_on_the_device_at_a_time(family: str, build: Build) -> None:
    model = build(family)
    model.stream_weights()
    sizes = [size(layer) for layer in model.layers]
    step(model)
    meter = MemoryMeter()
    with observed(meter), meter:
        step(model)
    streamed = {name: peak.owners["NF4 base"] for name, peak in meter.segments.items()}
    for index in range(LAYERS - 1):
        assert streamed["backward", index + 1] == sizes[index] + sizes[index + 1]
    experts = sum(
        part.nbytes
        for layer in model.layers
        for path, parts in tensors(layer).items()
        if ".experts." in path
        for part in parts
    )
    # Of four layers two are away, with half of the experts at least.
    assert sum(sizes) - max(streamed.values()) >= experts * 0.45


@pytest.mark.usefixtures("moving")
def test_experts_go_back_to_the_host_when_a_layer_fails(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("qwen3_moe")
    model.stream_weights()
    home = [addresses(layer) for layer in model.layers]

    def failing(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("models.layers.block.MoE.forward", failing)
    with pytest.raises(ZeroDivisionError):
        step(model)
    assert [addresses(layer) for layer in model.layers] == home


def test_experts_of_one_weight_each_go_to_the_host_too(golden: Callable[[str], Path]) -> None:
    model = load_model(golden("qwen3_moe"), quantize="int8")
    experts = model.layers[0].mlp.experts  # type: ignore[attr-defined]
    weight = experts.stored["down_proj"]
    moved = on_host(weight)
    assert isinstance(moved, tuple) and len(moved) == len(weight) == 6
    for one, other in zip(weight, moved, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert one.codes.data_ptr() != other.codes.data_ptr()


@pytest.mark.parametrize(("policy", "rows"), [("none", 16), ("selective", 64), ("full", 13)])
@pytest.mark.parametrize("family", MIXTURES)
def test_tiles_change_no_gradient(family: str, policy: str, rows: int, build: Build) -> None:
    plain, model = build(family), build(family)
    settings = replace(ROUTED, checkpointing=policy, mlp_tile_tokens=rows)
    assert_equal(step(model, settings), step(plain))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_5_moe_vl"])
def test_routers_norms_and_experts_get_their_gradients_from_tiles(
    family: str, build: Build
) -> None:
    plain, model = build(family, full=True), build(family, full=True)
    results = step(model, replace(ROUTED, mlp_tile_tokens=16))
    assert len(results) == 1 + len(list(model.parameters()))
    assert_equal(results, step(plain))


@pytest.mark.parametrize("family", MIXTURES)
def test_tiles_are_routed_as_the_whole(family: str, build: Build) -> None:
    """Also where only the last tile has few tokens, and none of some experts."""
    results = []
    for settings in (StepSettings(), StepSettings(16), StepSettings(59)):
        model = build(family)
        routed: list[tuple[Tensor, Tensor]] = []
        model.hidden_states(PackedBatch.of(IDS, cu_seqlens=BOUNDS), settings, routed)
        results.append(routed)
    plain, *tiled = results
    assert len(plain) == sum(model.config.sparse_layers) > 1
    for routed in tiled:
        for (counts, sums), (mine, own) in zip(plain, routed, strict=True):
            assert torch.equal(counts, mine)
            assert torch.allclose(sums, own, rtol=1e-12, atol=0)


def test_a_tile_of_a_mixture_draws_its_dropout_again_in_backward(build: Build) -> None:
    """Against finite differences along the adapters' gradient: other masks would be far off."""
    model = build("qwen2_moe", dropout=0.3).train()
    settings = replace(ROUTED, mlp_tile_tokens=16, dropout_seed=11)
    results = step(model, settings)
    masks = []
    for path in ("experts.down_lora.lora_B", "experts.gate_lora.lora_A"):
        name = f"model.layers.1.mlp.{path}"
        parameter = model.get_parameter(name)
        move = results[name] * (1e-4 / results[name].norm())
        values = []
        for sign in (1.0, -2.0):
            parameter.data += sign * move
            with torch.no_grad():
                values.append(float(model.loss(IDS, IDS, BOUNDS, settings=settings)))
        parameter.data += move
        masks.append((values[0] - values[1]) / 2e-4 / float(results[name].norm()))
    assert masks == pytest.approx([1.0, 1.0], rel=1e-5)
    settings = replace(settings, mlp_tile_tokens=30)
    other = float(model.loss(IDS, IDS, BOUNDS, settings=settings).detach())
    assert other != float(results["loss"])  # its second tile begins elsewhere


def test_a_tile_is_computed_again_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_moe")
    settings = replace(ROUTED, mlp_tile_tokens=16, checkpointing="full")
    sizes: list[int] = []

    def counted(x: Tensor, projections: Any, groups: Any, **options: Any) -> Any:
        sizes.append(groups.rows)
        return grouped_project(x, projections, groups, **options)

    monkeypatch.setattr("kernels.moe.experts.grouped_project", counted)
    loss = model.loss(IDS, IDS, BOUNDS, settings=settings)
    tiles = [32, 32, 32, 24]  # 60 tokens, two experts each
    assert sizes == [rows for rows in tiles for _ in ("inner", "down")] * LAYERS
    sizes.clear()
    loss.backward()
    assert sizes == tiles * LAYERS


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_tiles_hold_the_inner_activations_of_one_tile(policy: str, build: Build) -> None:
    """Real bytes of a step whose experts are wide."""
    inner, rows, chosen = 256, 6, 2
    work, saved = [], []
    for tile in (None, rows):
        model = build("qwen3_moe", moe_intermediate_size=inner)
        settings = replace(ROUTED, mlp_tile_tokens=tile, checkpointing=policy)
        meter = MemoryMeter()
        step(model, settings)
        with observed(meter), meter:
            step(model, settings)
        owners = meter.segments["backward", 2].owners
        work.append(owners["block working set"])
        saved.append(owners["saved activations"])
    one = inner * chosen * 8  # of a token, as wide as its experts
    # gate, up, their product and its gradient; under policy "none" gate and up are saved, of the
    # layers below too.
    wide = 2 if policy == "none" else 4
    assert work[0] - work[1] >= (60 - rows) * wide * one * 0.8
    assert saved[0] - saved[1] == pytest.approx(3 * 60 * 2 * one * (policy == "none"), rel=0.02)
