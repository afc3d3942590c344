"""Lending to the host: the order of copies, the gradients, and what is on the device when.

On a CPU nothing moves by itself, so the stores are told to move; the copies are then real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.model_sources.load_model import build_model
from kernels.nf4 import NF4Weight
from kernels.nf4.planar import has_planar_order, to_planar
from kernels.runtime.host_memory import SideCopies, gather_rows, host_copy
from models.adapters import add_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings
from models.layers.linear import Linear
from models.layers.mlp import MLP
from models.memory.offload import OffloadedInputs, WeightStream, on_host
from models.tensor_names import expected_tensors

CPU = torch.device("cpu")
LAYERS = 4
SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


class Random:
    """A checkpoint of random weights."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._generator = torch.Generator().manual_seed(0)
        self._shapes = expected_tensors(config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return torch.randn(shape, generator=self._generator) * 0.1 + float(len(shape) == 1)

    def codes(self, name: str) -> None:
        """Nothing is quantised."""

    def release(self, name: str) -> None:
        """Nothing is mapped."""


def build() -> Decoder:
    checkpoint: Any = Random(ModelConfig.from_dict(SHAPE))
    model = build_model(checkpoint, quantization="nf4", dtype=torch.float64)
    add_lora(model, rank=4, seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.1
    return model


def step(model: Decoder, settings: StepSettings = DEFAULT_SETTINGS) -> dict[str, Tensor]:
    ids = torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model.loss(ids, ids, settings=settings).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(mine: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert mine.keys() == plain.keys()
    assert all(torch.equal(mine[name], plain[name]) for name in plain)


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores that move tensors although device and host are one."""

    def told(kind: Any) -> None:
        build_it = kind.__init__

        def start(self: Any, *args: Any) -> None:
            build_it(self, *args)
            self._is_gpu = True

        monkeypatch.setattr(kind, "__init__", start)

    told(OffloadedInputs)
    told(WeightStream)


def test_offloading_on_a_cpu_moves_nothing_and_changes_nothing() -> None:
    plain = step(build())
    model = build()
    model.stream_weights()
    assert_same_bits(step(model, StepSettings(offload_inputs=True)), plain)


@pytest.mark.parametrize("policy", ["none", "full", "full:2,selective"])
@pytest.mark.usefixtures("moving")
def test_inputs_that_went_away_come_back_the_same(policy: str) -> None:
    plain, model = build(), build()
    settings = StepSettings(checkpointing=policy, offload_inputs=True)
    expected = step(plain, StepSettings(checkpointing=policy))
    assert_same_bits(step(model, settings), expected)
    assert_same_bits(step(model, settings), expected)  # and again, with a new store


@pytest.mark.usefixtures("moving")
def test_inputs_come_back_one_layer_ahead_of_their_use(monkeypatch: pytest.MonkeyPatch) -> None:
    store = OffloadedInputs(CPU, SideCopies(CPU))
    given = [torch.full((3,), float(index)) for index in range(3)]
    for index, x in enumerate(given):
        store.save(index, x)
    sent: list[float] = []
    send_for = OffloadedInputs._start_fetch

    def noted(self: OffloadedInputs, host: Tensor) -> Any:
        sent.append(float(host[0]))
        return send_for(self, host)

    monkeypatch.setattr(OffloadedInputs, "_start_fetch", noted)
    assert store.fetch(2) is given[2]  # it never left
    assert sent == [1.0]
    second = store.fetch(1)
    assert torch.equal(second, given[1]) and second.data_ptr() != given[1].data_ptr()
    assert sent == [1.0, 0.0]
    assert torch.equal(store.fetch(0), given[0])
    assert sent == [1.0, 0.0]
    with pytest.raises(KeyError):
        store.fetch(0)


@pytest.mark.usefixtures("moving")
def test_streamed_weights_give_the_same_gradients_and_leave_the_device() -> None:
    expected = step(build())
    model = build()
    model.stream_weights()
    stream = model.weight_stream
    assert isinstance(stream, WeightStream)
    brought: list[int] = []
    bring = stream._start_upload
    most = 0

    def noted(index: int) -> Any:
        nonlocal most
        brought.append(index)
        most = max(most, len(stream._on_device) + 1)
        return bring(index)

    stream._start_upload = noted  # type: ignore[method-assign]
    assert_same_bits(step(model), expected)
    up, down = list(range(LAYERS)), list(range(LAYERS - 2, -1, -1))
    assert brought == up + down  # the last layer stays for its backward pass
    assert most == 2
    before = {id(linear): linear.weight for linear in _linears(model)}
    brought.clear()
    assert_same_bits(step(model), expected)
    assert brought == up[1:] + down  # and the first for the next forward pass
    for linear in _linears(model):
        assert linear.weight is before[id(linear)]


@pytest.mark.usefixtures("moving")
def test_both_kinds_of_offloading_go_together_and_serve_evaluation() -> None:
    plain, model = build(), build()
    settings = StepSettings(offload_inputs=True)
    model.stream_weights()
    assert_same_bits(step(model, settings), step(plain))
    ids = torch.arange(30).view(1, -1)
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))
    assert_same_bits(step(model, settings), step(plain))


@pytest.mark.usefixtures("moving")
def test_weights_go_back_to_the_host_when_a_layer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    model.stream_weights()
    before = {id(linear): linear.weight for linear in _linears(model)}
    monkeypatch.setattr("models.layers.block.MLP.forward", _fail)
    with pytest.raises(ZeroDivisionError):
        step(model)
    assert all(linear.weight is before[id(linear)] for linear in _linears(model))


def _fail(*args: Any) -> None:
    raise ZeroDivisionError


def _linears(model: Decoder) -> list[Linear]:
    return [m for m in model.modules() if isinstance(m, Linear) and not _dense(m)]


def _dense(linear: Linear) -> bool:
    return isinstance(linear.weight, Tensor)


def test_a_weight_goes_to_the_host_in_either_order_of_its_codes() -> None:
    mlp = build().layers[0].mlp
    assert isinstance(mlp, MLP)
    weight = mlp.up_proj.weight
    assert isinstance(weight, NF4Weight) and has_planar_order(weight)
    for given in (weight, to_planar(weight)):
        moved = on_host(given)
        assert type(moved) is type(given) and moved.shape == given.shape
        for name, part in vars(given).items():
            if isinstance(part, Tensor):
                other = getattr(moved, name)
                assert torch.equal(other, part) and other.data_ptr() != part.data_ptr()


def test_rows_of_a_table_on_the_host() -> None:
    table = host_copy(torch.randn(10, 4), torch.float16)
    index = torch.tensor([3, 3, 9])
    assert torch.equal(gather_rows(table, index, CPU), table[index])


class _Recorder:
    """Stands for torch's streams and events, and writes down what is asked of them."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        recorder = self

        class Stream:
            def __init__(self, name: Any) -> None:
                self.name = name if isinstance(name, str) else "side"

            def wait_stream(self, other: Stream) -> None:
                recorder.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event: Event) -> None:
                recorder.log.append(f"{self.name} waits for {event.name}")

        class Event:
            count = 0

            def record(self, stream: Stream) -> None:
                Event.count += 1
                self.name = f"event {Event.count}"
                recorder.log.append(f"{self.name} on {stream.name}")

        @contextmanager
        def entered(stream: Stream) -> Iterator[None]:
            recorder.log.append(f"on {stream.name}")
            yield
            recorder.log.append(f"off {stream.name}")

        compute = Stream("compute")
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", entered)
        patch.setattr(torch.cuda, "current_stream", lambda device: compute)
        patch.setattr("kernels.runtime.host_memory.copy_stream", lambda device: Stream(device))


def test_a_copy_starts_behind_the_computation_and_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = _Recorder()
    recorder.install(monkeypatch)
    copies = SideCopies(CPU)
    target, source = torch.zeros(3), torch.ones(3)
    event = copies.start([(target, source)])
    assert torch.equal(target, source)
    copies.wait(event)
    assert recorder.log == [
        "side waits for compute",
        "on side",
        "off side",
        "event 1 on side",
        "compute waits for event 1",
    ]


@pytest.mark.usefixtures("moving")
def test_an_input_is_let_go_only_when_its_copy_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = _Recorder()
    recorder.install(monkeypatch)
    store = OffloadedInputs(CPU, SideCopies(CPU))
    first = torch.ones(2)
    store.save(0, first)
    assert store._outgoing is not None and store._outgoing[1] is first
    store.save(1, torch.zeros(2))
    assert "compute waits for event 1" in recorder.log
    assert recorder.log.index("compute waits for event 1") < recorder.log.index("event 2 on side")


@pytest.mark.usefixtures("moving")
def test_weights_sent_for_in_vain_are_waited_for_before_they_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = _Recorder()
    recorder.install(monkeypatch)
    stream = WeightStream(build().layers, CPU)
    with stream.weights_of(0, 1):
        pass
    recorder.log.clear()
    with stream.weights_of(3, -1):
        assert set(stream._on_device) == {3, 2}
    assert "compute waits for event 2" in recorder.log  # layer 1, which was never used
