"""Frozen weights divided among ranks: the bits of whole weights, and the bytes that go around."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.inference.generation import generate_ids
from engine.model_sources.load_model import ON_DEVICE, LayerPlacement, build_model
from engine.model_sources.open import open_model_source
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from kernels.nf4.planar import has_planar_order, to_planar
from kernels.runtime.host_memory import SideCopies
from kernels.runtime.ranks import ONE_RANK
from models.adapters import add_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.block import DecoderLayer
from models.layers.context import StepSettings
from models.layers.experts import ExpertAdapter, Experts
from models.layers.linear import Linear
from models.memory.absent import Absent
from models.memory.lasting import keep_decoded
from models.memory.layer_gather import ALIGNED
from models.memory.offload import tensors_of
from models.memory.sharded_weights import ShardedWeights, frozen_layer_bytes
from models.sharding import idle_pass
from models.tensor_names import skeleton
from tests.support.processes.rank_threads import ThreadRanks, run_ranks
from tests.support.quantised_gguf import write_q8_gguf
from tests.support.scaled_folders import eight_bit, four_bit, write_quantised
from tests.support.tiny_model import GOLDEN, RandomSource

CPU = torch.device("cpu")
LAYERS = 4
FAMILIES = ["llama3", "qwen3_moe", "qwen3_5", "qwen3_5_moe_vl"]
BOUNDS = torch.tensor([0, 9, 30], dtype=torch.int32)


class Weights(RandomSource):
    """Weights that are the same whoever reads them."""

    def tensor(self, name: str) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = self._shapes[name]
        return torch.randn(shape, generator=draw) * 0.1 + float(len(shape) == 1)


def config_of(family: str, layers: int = LAYERS) -> ModelConfig:
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    return ModelConfig.from_dict(raw).with_layers(layers)


def loaded(
    config: ModelConfig, quantization: Any = "nf4", layers: LayerPlacement = ON_DEVICE
) -> Decoder:
    """A float64 model with adapters that do something."""
    source: Any = Weights(config)
    model = build_model(source, quantization=quantization, dtype=torch.float64, layers=layers)
    add_lora(model, rank=2, seed=3)
    draw = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, Linear | ExpertAdapter) and module.lora_A is not None:
            assert module.lora_B is not None
            module.lora_A.data = module.lora_A.data.double()
            shape = module.lora_B.shape
            module.lora_B.data = torch.randn(shape, generator=draw, dtype=torch.float64) * 0.1
    return model


def ids_of(rank: int) -> Tensor:
    return torch.randint(0, 60, (1, 30), generator=torch.Generator().manual_seed(rank))


def step(model: Decoder, ids: Tensor, policy: str = "selective") -> dict[str, Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = model.loss(ids, ids, BOUNDS, settings=StepSettings(checkpointing=policy))
    loss.backward()
    results = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | {"loss": loss.detach()}


def assert_same_bits(mine: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert mine.keys() == plain.keys()
    assert all(torch.equal(mine[name], plain[name]) for name in plain)


def sharded(model: Decoder) -> ShardedWeights:
    assert isinstance(model.weight_stream, ShardedWeights)
    return model.weight_stream


def frozen(layer: torch.nn.Module) -> Iterator[Tensor]:
    """Every tensor of a layer's frozen matrices."""
    for module in layer.modules():
        if isinstance(module, Experts):
            for experts in module.stored.values():
                yield from tensors_of(experts)
            yield from (p for p in (module.gate_up_proj, module.down_proj) if p is not None)
        elif isinstance(module, Linear):
            weight = module.weight
            yield from (weight,) if isinstance(weight, Tensor) else tensors_of(weight)


CASES = [
    *(("nf4", family) for family in FAMILIES),
    *(("int8", family) for family in ("llama3", "qwen3_moe")),
    *((None, family) for family in ("qwen3_moe", "qwen3_5")),
]


@pytest.mark.parametrize(("quantization", "family"), CASES)
def test_divided_weights_give_the_bits_of_whole_ones(quantization: Any, family: str) -> None:
    config = config_of(family)
    whole = loaded(config, quantization)
    expected = [step(whole, ids_of(rank)) for rank in range(2)]
    again = [step(whole, ids_of(rank + 2)) for rank in range(2)]

    def work(ranks: ThreadRanks) -> None:
        model = loaded(config, quantization, LayerPlacement(ranks=ranks))
        assert_same_bits(step(model, ids_of(ranks.rank)), expected[ranks.rank])
        assert_same_bits(step(model, ids_of(ranks.rank + 2)), again[ranks.rank])

    run_ranks(2, work)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_any_number_of_ranks_and_every_policy_give_these_bits(count: int, policy: str) -> None:
    config = config_of("qwen3_moe")
    expected = step(loaded(config), ids_of(0), policy)

    def work(ranks: ThreadRanks) -> None:
        model = loaded(config, layers=LayerPlacement(ranks=ranks))
        assert_same_bits(step(model, ids_of(0), policy), expected)

    run_ranks(count, work)


def test_a_process_alone_needs_no_group() -> None:
    config = config_of("llama3")
    model = loaded(config)
    expected = step(model, ids_of(0))
    model.shard_weights(ONE_RANK)
    assert_same_bits(step(model, ids_of(0)), expected)


def test_loading_keeps_the_share_of_a_layer_before_the_next_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[int] = []
    take = ShardedWeights.take

    class Watched(Weights):
        def tensor(self, name: str) -> Tensor:
            _, kind, number, *_ = [*name.split("."), "", ""]
            order.extend([int(number)] if kind == "layers" else [])
            return super().tensor(name)

    def noted(weights: ShardedWeights, layer: DecoderLayer) -> None:
        order.append(-1)
        take(weights, layer)
        assert all(isinstance(x, Absent) for x in frozen(layer))

    monkeypatch.setattr(ShardedWeights, "take", noted)
    source: Any = Watched(config_of("qwen3_moe"))
    build_model(source, quantization="nf4", layers=LayerPlacement(ranks=ONE_RANK))
    assert [number for number, _ in groupby(order)] == [0, -1, 1, -1, 2, -1, 3, -1]


@pytest.mark.parametrize("family", ["llama3", "qwen3_5_moe_vl"])
def test_bytes_sent_and_memory_follow_their_formulas(family: str) -> None:
    config = config_of(family)
    layers = skeleton(config).layers
    whole = loaded(config)
    codes = [sum(x.nbytes for x in frozen(layer)) for layer in whole.layers]

    def work(ranks: ThreadRanks) -> ShardedWeights:
        model = loaded(config, layers=LayerPlacement(ranks=ranks))
        weights = sharded(model)
        for first in (True, False):
            ranks.sent.clear()
            step(model, ids_of(ranks.rank))
            expected = weights.bytes_per_pass(first=first)
            assert ranks.sent == {"all_gather": expected}
        ranks.sent.clear()
        with torch.no_grad():
            for _ in range(2):
                ranks.sent.clear()
                model.loss(ids_of(0), ids_of(0))
        assert ranks.sent == {"all_gather": weights.bytes_per_pass(backward=False)}
        return weights

    weights = run_ranks(2, work)[0]
    assert weights.bytes_per_pass() == sum(weights.shares[2:]) + sum(weights.shares[:-2])
    for nbytes, share, tensors in zip(weights.layer_bytes, weights.shares, codes, strict=True):
        assert tensors <= nbytes <= tensors + ALIGNED * 200
        assert nbytes / 2 <= share < nbytes / 2 + ALIGNED
    dense = [frozen_layer_bytes(layer) for layer in layers]  # fp32, and nothing is quantised
    assert all(more > less for more, less in zip(dense, weights.layer_bytes, strict=True))
    buffers = [b for b in weights._gather._buffers if b is not None]
    resident = sum(b.nbytes for b in [*weights._gather.shares, *buffers])
    assert weights.resident_bytes == resident


@pytest.mark.parametrize("trained", [0, 2, LAYERS])
def test_an_idle_rank_makes_the_gathers_of_a_pass(trained: int) -> None:
    config = config_of("qwen3_5")
    expected = step(_frozen_below(loaded(config), trained), ids_of(0)) if trained < LAYERS else {}

    def work(ranks: ThreadRanks) -> None:
        model = _frozen_below(loaded(config, layers=LayerPlacement(ranks=ranks)), trained)
        for turn in range(3):
            if turn % 2 != ranks.rank:
                idle_pass(model, num_items=7)
            elif trained < LAYERS:
                assert_same_bits(step(model, ids_of(0)), expected)
            else:
                model.loss(ids_of(0), ids_of(0), BOUNDS)
            if turn % 2 != ranks.rank:
                idle_pass(model)
            else:
                with torch.no_grad():
                    model(ids_of(1))

    run_ranks(2, work)


def _frozen_below(model: Decoder, layer: int) -> Decoder:
    for below in model.layers[:layer]:
        below.requires_grad_(False)
    return model


def test_evaluation_and_generation_run_on_all_ranks() -> None:
    config = config_of("qwen3_5")
    plain = loaded(config)
    prompt = list(range(5))
    expected = list(generate_ids(plain, prompt, max_new_tokens=6))
    with torch.no_grad():
        logits = plain(ids_of(0))

    def work(ranks: ThreadRanks) -> None:
        model = loaded(config, layers=LayerPlacement(ranks=ranks))
        with torch.no_grad():
            assert torch.equal(model(ids_of(0)), logits)
        assert list(generate_ids(model, prompt, max_new_tokens=6)) == expected

    run_ranks(2, work)


def test_a_magnitude_is_that_of_the_whole_weight() -> None:
    config = config_of("llama3")
    plain = loaded(config)
    add_lora(plain, rank=2, seed=3, use_dora=True)
    ids = ids_of(0)

    def work(ranks: ThreadRanks) -> None:
        model = loaded(config, layers=LayerPlacement(ranks=ranks))
        add_lora(model, rank=2, seed=3, use_dora=True)
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert isinstance(mine.data, Absent) or torch.equal(mine, theirs)
        assert torch.equal(model(ids), plain(ids))

    run_ranks(2, work)


def write_gguf(folder: Path) -> Path:
    write_q8_gguf(folder / "m.gguf", GOLDEN / "qwen2")
    return folder / "m.gguf"


def write_codes(folder: Path, encode: Any, **noted: Any) -> Path:
    return write_quantised(folder / "m", encode, {"quant_method": "bitsandbytes", **noted})


SOURCES: dict[str, tuple[Callable[[Path], Path], Any]] = {
    "GGUF": (write_gguf, "nf4"),
    "GGUF, dense": (write_gguf, None),
    "4-bit codes": (lambda folder: write_codes(folder, four_bit(), load_in_4bit=True), None),
    "8-bit codes": (lambda folder: write_codes(folder, eight_bit, load_in_8bit=True), None),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_files_of_every_kind_are_divided(tmp_path: Path, kind: str) -> None:
    write, quantization = SOURCES[kind]
    source, ids = open_model_source(str(write(tmp_path))), ids_of(0)
    plain = build_model(source, quantization=quantization)
    kinds = {type(m.weight) for m in plain.layers[0].modules() if isinstance(m, Linear)}
    assert kinds <= {NF4Weight, Int8Weight} or (quantization is None and kind.startswith("GGUF"))

    def work(ranks: ThreadRanks) -> None:
        model = build_model(source, quantization=quantization, layers=LayerPlacement(True, ranks))
        assert all(isinstance(x, Absent) for layer in model.layers for x in frozen(layer))
        assert torch.equal(model(ids), plain(ids))

    run_ranks(2, work)


def test_codes_in_planar_order_come_back_as_they_were() -> None:
    plain = loaded(config_of("llama3"))
    planar = 0
    for module in plain.modules():
        weight = module.weight if isinstance(module, Linear) else None
        if isinstance(weight, NF4Weight) and has_planar_order(weight):
            assert isinstance(module, Linear)
            module.set_weight(to_planar(weight))
            planar += 1
    assert planar
    before = [[x.clone() for x in frozen(layer)] for layer in plain.layers]
    weights = plain.shard_weights(ONE_RANK)
    for layer, tensors in zip(plain.layers, before, strict=True):
        with weights.weights_of(layer.index, 1):
            assert all(map(torch.equal, frozen(layer), tensors))


def test_weights_outside_their_turn_are_an_error_and_never_other_numbers() -> None:
    model = loaded(config_of("llama3"))
    weights = model.shard_weights(ONE_RANK)
    with weights.weights_of(0, 1):
        assert all(not isinstance(x, Absent) for x in frozen(model.layers[0]))
    assert all(isinstance(x, Absent) for layer in model.layers for x in frozen(layer))
    model.weight_stream = None
    for reading in (lambda: model(ids_of(0)), lambda: next(frozen(model.layers[1])) + 1):
        with pytest.raises(RuntimeError, match="of which this rank has a share alone"):
            reading()


def test_what_is_trained_or_decoded_is_not_divided() -> None:
    model = loaded(config_of("llama3"), None)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="is trained; only frozen ones"):
        model.shard_weights(ONE_RANK)
    model = loaded(config_of("llama3"))
    keep_decoded(model.layers[-1:], model.dtype)
    with pytest.raises(ValueError, match="decoded to stay"):
        model.shard_weights(ONE_RANK)
    weights = ShardedWeights(ONE_RANK, CPU)
    with pytest.raises(ValueError, match="layer 1 is given where 0 is expected"):
        weights.take(loaded(config_of("llama3")).layers[1])


def test_shares_on_the_host_are_uploaded_before_they_are_gathered() -> None:
    """On a CPU host and device are one; the uploads are made to happen."""
    config = config_of("qwen3_moe")
    expected = step(loaded(config), ids_of(0))

    def work(ranks: ThreadRanks) -> None:
        model = loaded(config, layers=LayerPlacement(True, ranks))
        gather = sharded(model)._gather
        gather._copies = SideCopies(CPU)
        assert_same_bits(step(model, ids_of(0)), expected)
        assert all(buffer is not None for buffer in gather._uploaded)

    run_ranks(2, work)
