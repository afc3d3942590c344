"""Cases of mixtures of experts and of Gated DeltaNet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from engine.benchmark.cases import plain
from engine.benchmark.cases.case import Case, CaseSizes, Tensors, Work, gradients, leaf
from engine.benchmark.cases.elementwise import normal
from engine.benchmark.cases.matmul import flat
from engine.benchmark.cases.random_weights import random_nf4
from kernels.attention import AttentionPlan
from kernels.delta_net import gated_delta, reference
from kernels.delta_net.causal_conv1d import causal_conv1d
from kernels.delta_net.gated_rms_norm import gated_rms_norm
from kernels.delta_net.operands import GatedDeltaInputs
from kernels.elementwise.rms_norm import rms_norm
from kernels.linear.projection import Projection
from kernels.moe.experts import MixtureOfExperts, mixture_of_experts
from kernels.moe.grouped_matmul import ExpertProjection
from kernels.nf4 import NF4Weight
from kernels.nf4.planar import PlanarNF4Weight
from models.config.model_config import ModelConfig

_EPS = 1e-6


def cases(model: str, config: ModelConfig, settings: CaseSizes) -> Iterator[Case]:
    """The cases of this module that a model of this shape has."""
    if config.num_experts:
        yield _mixture(model, config, settings)
    if "linear_attention" in config.layer_types:
        yield _gated_delta(model, config, settings)
        yield _convolution(model, config, settings)
        yield _gated_norm(model, config, settings)
    if config.zero_centered_norm:
        yield _zero_centred_norm(model, config, settings)


def _mixture(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, hidden, dtype = settings.tokens, config.hidden_size, settings.dtype
    count, inner, top_k = (
        config.num_experts, config.moe_intermediate_size, config.num_experts_per_tok,
    )  # fmt: skip

    def make(device: torch.device) -> Work:
        parts = {
            name: _experts(count, *shape, settings.rank, device, dtype)
            for name, shape in (
                ("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner)),
            )
        }  # fmt: skip
        # Router logits are the first columns of x, values far enough apart to be chosen alike in
        # every precision: which experts a token goes to is then no matter of rounding.
        router = torch.zeros(count, hidden, dtype=dtype, device=device)
        router[:, :count] = torch.eye(count, dtype=dtype, device=device)
        x = normal(device, dtype, n, hidden)
        x[:, :count] = torch.rand(n, count, device=device).argsort(1).to(dtype) * (8.0 / count)
        tensors = {"x": x, "dy": normal(device, dtype, n, hidden)}
        for name, part in parts.items():
            assert part.lora_a is not None and part.lora_b is not None
            tensors |= {f"{name}_a": part.lora_a, f"{name}_b": part.lora_b}
        scale = parts["down"].scale
        weights = {name: _dense_experts(part, dtype) for name, part in parts.items()}

        def ours(t: Tensors) -> Tensors:
            trained = {k: v for k, v in t.items() if k not in ("x", "dy")}
            inputs = {"x": leaf(t["x"]), **trained}
            moe = MixtureOfExperts(
                Projection(router), (parts["gate"], parts["up"]), parts["down"], top_k, True
            )
            y, _, _ = mixture_of_experts(inputs["x"], moe)
            return {"y": y.detach(), **gradients(y, inputs, t["dy"])}

        def other(t: Tensors) -> Tensors:
            inputs = {name: leaf(value) for name, value in t.items() if name != "dy"}
            y = _plain_mixture(inputs, router, weights, top_k, scale)
            return {"y": y.detach(), **gradients(y, inputs, t["dy"])}

        return Work(tensors, ours, other)

    rows, matrix = n * top_k, 3 * inner * hidden
    adapter = settings.rank * 3 * (inner + hidden)
    used = min(count, rows)
    nbytes = 4.0 * n * hidden * dtype.itemsize + used * (2 * 0.5159 * matrix + 8.0 * adapter)
    shape = f"{n}x{top_k}/{count}x{inner}x{hidden}"
    flops = rows * (4.0 * matrix + 6.0 * adapter)
    return Case("mixture", model, shape, dtype, flops, nbytes, make)


def _experts(
    count: int, out: int, columns: int, rank: int, device: torch.device, dtype: torch.dtype
) -> ExpertProjection:
    """Random NF4 weights of all experts, with pairs in the compute type."""
    weight = replace(random_nf4(count * out, columns, device, dtype), shape=(count, out, columns))
    a = normal(device, dtype, count, rank, columns) * columns**-0.5
    b = normal(device, dtype, count, out, rank) * rank**-0.5
    return ExpertProjection(weight, a.requires_grad_(), b.requires_grad_(), 0.5)


def _dense_experts(projection: ExpertProjection, dtype: torch.dtype) -> Tensor:
    """The decoded weights (E, out, in)."""
    assert isinstance(projection.weight, NF4Weight | PlanarNF4Weight)
    count, out, columns = projection.weight.shape
    whole = flat(replace(projection.weight, shape=(count * out, columns)))
    return plain.nf4_weight(whole, dtype).view(count, out, columns)


def _plain_mixture(
    t: dict[str, Tensor],
    router: Tensor,
    weights: dict[str, Tensor],
    top_k: int,
    scale: float,
) -> Tensor:
    x = t["x"]
    wide = torch.promote_types(x.dtype, torch.float32)
    probabilities = torch.softmax(functional.linear(x, router.to(x.dtype)), -1, dtype=wide)
    chosen, experts = probabilities.topk(top_k, -1)
    chosen = chosen / chosen.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in range(router.shape[0]):
        token, slot = torch.where(experts == expert)
        if not token.numel():
            continue

        def linear(name: str, given: Tensor, expert: int = expert) -> Tensor:
            a, b = t[f"{name}_a"][expert], t[f"{name}_b"][expert]
            return plain.lora(given, weights[name][expert].to(x.dtype), a, b, scale)

        rows = x[token]
        h = plain.swiglu(linear("gate", rows), linear("up", rows))
        h = h * chosen[token, slot].unsqueeze(1).to(x.dtype)
        y = y.index_add(0, token, linear("down", h))
    return y


def _gated_delta(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, dtype, bounds = settings.tokens, settings.dtype, settings.bounds
    heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    names = ("q", "k", "v", "g", "beta")

    def make(device: torch.device) -> Work:
        plan = AttentionPlan.from_cu_seqlens(torch.tensor(bounds, dtype=torch.int32), n)
        tensors = {
            "q": normal(device, dtype, n, heads, key),
            "k": normal(device, dtype, n, heads, key),
            "v": normal(device, dtype, n, value_heads, value),
            "g": -torch.rand(n, value_heads, device=device),
            "beta": torch.rand(n, value_heads, device=device),
            "do": normal(device, dtype, n, value_heads, value),
        }

        def ours(t: Tensors) -> Tensors:
            inputs = {name: leaf(t[name]) for name in names}
            q, k, v, g, beta = inputs.values()
            o, _ = gated_delta(q, k, v, g, beta, plan)
            return {"o": o.detach(), **gradients(o, inputs, t["do"])}

        def other(t: Tensors) -> Tensors:
            inputs = GatedDeltaInputs(t["q"], t["k"], t["v"], t["g"], t["beta"], bounds)
            o, _, saved = reference.forward(inputs)
            grads = reference.backward(t["do"], inputs, saved, None)
            return {"o": o, **{f"d{name}": grad for name, grad in zip(names, grads, strict=False)}}

        return Work(tensors, ours, other)

    # Per token and value head, forward: the state is read, corrected and written; thrice that back.
    flops = 4 * 6.0 * n * value_heads * key * value
    nbytes = 4.0 * n * (2 * heads * key + 2 * value_heads * value) * dtype.itemsize
    shape = f"{len(bounds) - 1}x{bounds[1]}x({heads}+{value_heads})x{key}x{value}"
    return Case("gated_delta", model, shape, dtype, flops, nbytes, make)


def _convolution(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, dtype, bounds = settings.tokens, settings.dtype, settings.bounds
    channels = (
        2 * config.linear_num_key_heads * config.linear_key_head_dim
        + config.linear_num_value_heads * config.linear_value_head_dim
    )
    taps = config.linear_conv_kernel_dim

    def make(device: torch.device) -> Work:
        plan = AttentionPlan.from_cu_seqlens(torch.tensor(bounds, dtype=torch.int32), n)
        tensors = {name: normal(device, dtype, n, channels) for name in ("x", "dy")}
        tensors["weight"] = normal(device, dtype, channels, taps)

        def ours(t: Tensors) -> Tensors:
            inputs = {name: leaf(t[name]) for name in ("x", "weight")}
            y = causal_conv1d(inputs["x"], inputs["weight"], plan)
            return {"y": y.detach(), **gradients(y, inputs, t["dy"])}

        def other(t: Tensors) -> Tensors:
            inputs = {name: leaf(t[name]) for name in ("x", "weight")}
            y = plain.causal_conv1d(inputs["x"], inputs["weight"], bounds)
            return {"y": y.detach(), **gradients(y, inputs, t["dy"])}

        return Work(tensors, ours, other)

    size = n * channels
    flops, nbytes = 6.0 * taps * size + 10.0 * size, 5.0 * size * dtype.itemsize
    return Case("causal_conv1d", model, f"{n}x{channels}x{taps}", dtype, flops, nbytes, make)


def _gated_norm(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, dtype = settings.streamed_tokens, settings.dtype
    heads, width = config.linear_num_value_heads, config.linear_value_head_dim
    names = ("o", "z", "weight")

    def make(device: torch.device) -> Work:
        tensors = {name: normal(device, dtype, n, heads, width) for name in ("o", "z", "dy")}
        tensors["weight"] = 1.0 + 0.1 * normal(device, dtype, width)

        def ours(t: Tensors) -> Tensors:
            inputs = {name: leaf(t[name]) for name in names}
            y = gated_rms_norm(inputs["o"], inputs["z"], inputs["weight"], _EPS)
            return {"y": y.detach(), **gradients(y, inputs, t["dy"])}

        def other(t: Tensors) -> Tensors:
            inputs = {name: leaf(t[name]) for name in names}
            y = plain.gated_rms_norm(inputs["o"], inputs["z"], inputs["weight"], _EPS)
            return {"y": y.detach(), **gradients(y, inputs, t["dy"])}

        return Work(tensors, ours, other)

    size = n * heads * width
    nbytes = 8.0 * size * dtype.itemsize
    return Case("gated_rms_norm", model, f"{n}x{heads}x{width}", dtype, 30.0 * size, nbytes, make)


def _zero_centred_norm(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, width, dtype = settings.streamed_tokens, config.hidden_size, settings.dtype
    names = ("x", "weight")

    def make(device: torch.device) -> Work:
        tensors = {name: normal(device, dtype, n, width) for name in ("x", "dy")}
        tensors["weight"] = 0.1 * normal(device, dtype, width)

        def ours(t: Tensors) -> Tensors:
            inputs = {name: leaf(t[name]) for name in names}
            y = rms_norm(inputs["x"], inputs["weight"], _EPS, zero_centered=True)
            return {"y": y.detach(), **gradients(y, inputs, t["dy"])}

        def other(t: Tensors) -> Tensors:
            inputs = {name: leaf(t[name]) for name in names}
            y = plain.rms_norm(inputs["x"], inputs["weight"], _EPS, zero_centered=True)
            return {"y": y.detach(), **gradients(y, inputs, t["dy"])}

        return Work(tensors, ours, other)

    size = n * width
    nbytes = 5.0 * size * dtype.itemsize
    return Case("rms_norm_zero_centred", model, f"{n}x{width}", dtype, 14.0 * size, nbytes, make)
