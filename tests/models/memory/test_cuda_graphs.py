"""Layers from recorded launches: the same bits as launch by launch, the same numbers as ever."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from engine.benchmark.cases.random_weights import random_decoder
from engine.training.step import TrainingStep
from kernels import attention
from kernels.attention.backends import Backend
from kernels.attention.documents import AttentionPlan, AttentionSettings
from kernels.elementwise.dropout import Seed
from kernels.runtime import scratch
from kernels.runtime.triton_support import HAS_TRITON
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, LayerContext, StepSettings
from models.layers.linear import Linear
from models.layers.packed_batch import PackedBatch
from models.memory import cuda_graphs as layer_graphs
from models.memory.cuda_graphs import LayerGraphs
from models.memory.recorder import CudaRecorder
from optim import AdamW8bit
from tests.support.launches.launch_tape import LaunchTape

CPU = torch.device("cpu")
VOCABULARY = 96
POLICIES = ("none", "selective", "full", "full:1,none")


def visible(plan: AttentionPlan, tokens: int, window: int | None) -> Tensor:
    """(N, N): which keys each query sees, from the boundaries in the device's memory alone."""
    position = torch.arange(tokens)
    document = torch.bucketize(position, plan.cu_seqlens[1:].long(), right=True)
    distance = position.unsqueeze(1) - position
    seen = (document.unsqueeze(1) == document) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def forward(
    q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings
) -> tuple[Tensor, list[Tensor]]:
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, wide_k) * settings.scale
    scores = scores.masked_fill(
        ~visible(settings.plan, q.shape[0], settings.hiding_window), -torch.inf
    )
    shares = scores.softmax(-1)
    return torch.einsum("hij,jhd->ihd", shares, wide_v).contiguous(), [shares]


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, shares = q.shape[1] // k.shape[1], saved[0]
    wide_k, wide_v = (x.repeat_interleave(groups, 1) for x in (k, v))
    d_shares = torch.einsum("ihd,jhd->hij", do, wide_v)
    d_scores = shares * (d_shares - (do * out).sum(-1).T.unsqueeze(2)) * settings.scale
    dq = torch.einsum("hij,jhd->ihd", d_scores, wide_k)
    dk, dv = torch.einsum("hij,ihd->jhd", d_scores, q), torch.einsum("hij,ihd->jhd", shares, do)
    return dq, *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))


@pytest.fixture
def open_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that learns of documents as the back ends of a GPU do."""
    backend = Backend("open", forward, backward, lambda *problem: True)
    monkeypatch.setattr(attention, "_backend", lambda *problem: backend)


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "qwen3",
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512,
            **changes,
        }
    )


HYBRID = {
    "model_type": "qwen3_5_text",
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}


def model_of(
    dtype: torch.dtype, dropout: float = 0.0, device: torch.device = CPU, **changes: Any
) -> Decoder:
    """The same model at every call."""
    torch.manual_seed(7)
    model = random_decoder(config(**changes), device, dtype, rank=4)
    for module in model.modules():
        if isinstance(module, Linear):
            module.dropout = dropout
    return model.train()


def batch_of(lengths: tuple[int, ...]) -> PackedBatch:
    tokens = sum(lengths)
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(tokens))
    return PackedBatch.of(ids, ids, torch.tensor([0, *lengths]).cumsum(0))


BATCHES = ((40, 20), (9, 30, 18), (64,), (5, 5, 5, 5, 33), (60, 1), (31, 31))
"""All of them are padded to 64 tokens in eight documents."""


def gradients(
    model: Decoder, lengths: tuple[int, ...], settings: StepSettings = DEFAULT_SETTINGS
) -> dict[str, Tensor]:
    loss = model.batch_loss(batch_of(lengths), settings)
    loss.backward()
    results = {"loss": loss.detach().clone()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[name] = parameter.grad.clone()
            parameter.grad = None
    return results


def losses(model: Decoder, recorder: LaunchTape | None) -> tuple[list[float], Sequence[Tensor]]:
    """Of training steps of two micro-batches each, and the adapters after them."""
    model.set_graphs(LayerGraphs(model.layers, recorder))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit(trained, lr=1e-2)
    micro = [[batch_of(one), batch_of(two)] for one, two in pairwise(BATCHES)]
    step = TrainingStep(model, optimizer, max_grad_norm=1.0, seed=3)
    return [step(pair, number).loss for number, pair in enumerate(micro)], trained


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("changes", [{}, HYBRID], ids=["dense", "hybrid"])
def test_every_batch_has_the_gradients_it_has_without_recording(
    policy: str, changes: dict[str, Any], open_attention: None
) -> None:
    plain, recorded = (model_of(torch.float64, **changes) for _ in range(2))
    settings = StepSettings(checkpointing=policy)
    recorded.record_layers(LaunchTape())
    for lengths in BATCHES:
        want, got = (gradients(model, lengths, settings) for model in (plain, recorded))
        assert want.keys() == got.keys()
        assert len(want) > 1
        for name, value in want.items():
            assert float((got[name] - value).norm()) <= 1e-10 * float(value.norm()), name
    assert recorded.graphs is not None
    assert recorded.graphs.repeated == len(BATCHES)
    assert recorded.graphs.launched == 0


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("changes", [{}, HYBRID], ids=["dense", "hybrid"])
def test_training_computes_the_bits_of_launch_by_launch(
    dropout: float, changes: dict[str, Any], open_attention: None
) -> None:
    launched, recorded = (model_of(torch.float32, dropout, **changes) for _ in range(2))
    (want, want_adapters), (got, got_adapters) = (
        losses(launched, None),
        losses(recorded, LaunchTape()),
    )
    assert got == want
    assert len(set(want)) == len(want)
    assert recorded.graphs is not None
    assert recorded.graphs.launched == 0  # another dropout seed needs no other recording
    for one, other in zip(got_adapters, want_adapters, strict=True):
        assert torch.equal(one, other)


def test_kernels_are_repeated_too(open_attention: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_TRITON:
        pytest.skip("Triton is not installed on this platform")
    monkeypatch.setenv("ENGINE_INTERPRET", "1")
    monkeypatch.setattr(layer_graphs, "_LEAST_TOKENS", 16)
    tape, results = LaunchTape(), []
    for recorder in (None, tape):
        model = model_of(torch.float32, 0.2, num_hidden_layers=1, hidden_size=32)
        model.set_graphs(LayerGraphs(model.layers, recorder))
        settings = StepSettings(dropout_seed=5)
        with tape.kernels():
            results.append([gradients(model, lengths, settings) for lengths in ((9, 5), (3, 8, 2))])
    assert len(tape.recordings) == 2
    for want, got in zip(*results, strict=True):
        for name, value in want.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("forgotten", ["cos", "boundaries", "key"])
def test_what_is_not_written_anew_is_seen(
    forgotten: str, open_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layer_graphs._RecordedPass.load

    def load(self: Any, context: LayerContext) -> None:
        saved = {
            "cos": self.context.cos,
            "boundaries": self.cu_seqlens,
            "key": self.context.dropout_key,
        }[forgotten]
        before = saved.clone()
        right(self, context)
        if self.recorded:
            saved.copy_(before)

    want, _ = losses(model_of(torch.float32, 0.2), None)
    monkeypatch.setattr(layer_graphs._RecordedPass, "load", load)
    got, _ = losses(model_of(torch.float32, 0.2), LaunchTape())
    assert got != want


def test_a_layer_that_makes_the_host_wait_is_not_recorded(
    open_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LayerContext.seed

    def reading(*site: Any) -> Seed:
        seed = right(*site)
        assert seed is not None
        return replace(seed, key=int(seed.key))

    monkeypatch.setattr(LayerContext, "seed", reading)
    with pytest.raises(RuntimeError, match="host wait"):
        losses(model_of(torch.float32, 0.2), LaunchTape())


def test_the_host_cannot_read_the_documents_of_recorded_launches() -> None:
    model = model_of(torch.float32)
    model.record_layers(LaunchTape())
    with pytest.raises(RuntimeError, match="flash or efficient"):
        gradients(model, (40, 20))


def test_a_forward_pass_without_a_backward_pass_loses_its_activations(
    open_attention: None,
) -> None:
    model = model_of(torch.float32)
    model.record_layers(LaunchTape())
    first, second = (batch_of(lengths) for lengths in BATCHES[:2])
    lost = model.batch_loss(first)
    model.batch_loss(second).backward()
    with pytest.raises(RuntimeError, match="another forward pass"):
        lost.backward()


def test_hooks_of_parameters_see_their_gradients(open_attention: None) -> None:
    results = []
    for recorder in (None, LaunchTape()):
        model = model_of(torch.float64)
        for layer in model.layers:
            assert layer.self_attn is not None
            lora_a = layer.self_attn.o_proj.lora_A
            assert lora_a is not None
            lora_a.register_hook(lambda gradient: gradient.index_fill(1, torch.arange(3), 0))
        if recorder is not None:
            model.record_layers(recorder)
        results.append(gradients(model, (40, 20)))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-10, atol=1e-14)
    hooked = results[1]["model.layers.0.self_attn.o_proj.lora_A"]
    assert hooked[:, :3].abs().sum() == 0
    assert hooked[:, 3:].abs().sum() > 0


def test_evaluation_between_the_passes_does_no_harm(open_attention: None) -> None:
    plain, recorded = (model_of(torch.float64) for _ in range(2))
    recorded.record_layers(LaunchTape())
    batch, other = batch_of((40, 20)), batch_of((64,))
    loss = recorded.batch_loss(batch)
    with torch.no_grad():
        recorded.batch_loss(other)
    loss.backward()
    for name, value in gradients(plain, (40, 20)).items():
        if name != "loss":
            gradient = recorded.get_parameter(name).grad
            assert gradient is not None
            torch.testing.assert_close(gradient, value, rtol=1e-10, atol=1e-14)


class Forgetful:
    """Records nothing, and keeps nothing alive."""

    def warm_up(self, body: Callable[[], None]) -> None:
        body()

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        body()
        return lambda: None


def test_scratch_stays_as_long_as_what_was_recorded_with_it(open_attention: None) -> None:
    model = model_of(torch.float32)
    model.record_layers(Forgetful())
    scratch.release()
    model.batch_loss(batch_of((40, 20)))
    used = [ref(buffer) for buffer in scratch.buffers() if buffer.numel() > 64]
    assert used
    scratch.release()
    decoded = [buffer() for buffer in used if buffer() is not None]
    assert decoded
    model.set_graphs(None)
    del decoded
    gc.collect()
    assert all(buffer() is None for buffer in used)


def test_sizes_beyond_the_limit_run_launch_by_launch(
    open_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_graphs, "SIZES", 1)
    model = model_of(torch.float32)
    model.record_layers(LaunchTape())
    for lengths in ((40, 20), (100,), (30, 30), (90,)):
        gradients(model, lengths)
    assert model.graphs is not None
    assert (model.graphs.repeated, model.graphs.launched) == (2, 2)


def test_models_without_a_layer_to_record_are_refused() -> None:
    mixture = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
               "moe_intermediate_size": 32, "decoder_sparse_step": 1}  # fmt: skip
    with torch.device("meta"):
        model = Decoder(config(**mixture))
    with pytest.raises(ValueError, match="mixtures of experts"):
        model.record_layers(LaunchTape())


def test_layers_offloaded_to_the_host_are_refused() -> None:
    streamed, recorded = model_of(torch.float32), model_of(torch.float32)
    streamed.stream_weights()
    with pytest.raises(ValueError, match="on the host"):
        streamed.record_layers(LaunchTape())
    recorded.record_layers(LaunchTape())
    with pytest.raises(ValueError, match="on the host"):
        recorded.batch_loss(batch_of((40, 20)), StepSettings(offload_inputs=True))


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda")


def test_cuda_graphs_compute_the_bits_of_launch_by_launch(cuda: torch.device) -> None:
    results = []
    for recorder in (None, CudaRecorder(cuda)):
        model = model_of(torch.bfloat16, 0.1, cuda)
        model.set_graphs(LayerGraphs(model.layers, recorder))
        settings = StepSettings(dropout_seed=5)
        results.append([gradients(model, lengths, settings)["loss"] for lengths in BATCHES])
    assert torch.equal(torch.stack(results[0]), torch.stack(results[1]))
