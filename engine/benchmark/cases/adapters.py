"""Cases of dropout, biases, DoRA, the 8-bit head and distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from engine.benchmark.cases import plain
from engine.benchmark.cases.case import Case, CaseSizes, Tensors, Work, gradients, leaf
from engine.benchmark.cases.elementwise import normal
from engine.benchmark.cases.matmul import flat
from engine.benchmark.cases.random_weights import random_projection
from kernels.elementwise.dropout import Seed, dropout, keep_mask
from kernels.linear.int8 import Int8Weight, quantize_int8
from kernels.linear.lora import lora_qkv
from kernels.linear.projection import Projection
from kernels.loss.linear_cross_entropy import linear_cross_entropy
from kernels.loss.linear_distillation import linear_distillation
from kernels.nf4 import NF4Weight
from models.config.model_config import ModelConfig

_SEED = Seed(0x1234_5678_9ABC)
_DROPPED = 0.1
VARIANTS = ("lora_bias", "lora_dropout", "dora")
"""Forms of the three attention inputs that a plain LoRA layer does not have."""


def cases(model: str, config: ModelConfig, settings: CaseSizes) -> Iterator[Case]:
    """All cases of this module at the shapes of `config`."""
    yield _dropout(model, config, settings)
    for variant in VARIANTS:
        yield _variant(model, config, settings, variant)
    yield _int8_head(model, config, settings)
    yield _distillation(model, config, settings)


def _dropout(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, h, dtype = settings.streamed_tokens, config.hidden_size, settings.dtype

    def make(device: torch.device) -> Work:
        keep = keep_mask(n, h, _DROPPED, _SEED, device)

        def other(t: Tensors) -> Tensors:
            return {"y": torch.where(keep, t["x"] * (1.0 / (1.0 - _DROPPED)), 0.0)}

        x = normal(device, dtype, n, h)
        return Work({"x": x}, lambda t: {"y": dropout(t["x"], _DROPPED, _SEED)}, other)

    nbytes = 2.0 * n * h * dtype.itemsize
    return Case("dropout", model, f"{n}x{h}", dtype, 20.0 * n * h, nbytes, make)


def _variant(model: str, config: ModelConfig, settings: CaseSizes, op: str) -> Case:
    n, hidden, dtype, dim = settings.tokens, config.hidden_size, settings.dtype, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes = {"q": q, "k": kv, "v": kv}
    width = q + 2 * kv

    def make(device: torch.device) -> Work:
        group = {
            name: _varied(random_projection(out, hidden, settings.rank, device, dtype), op)
            for name, out in shapes.items()
        }
        stored = {name: flat(p.weight) for name, p in group.items()}
        keep = keep_mask(n, hidden, _DROPPED, _SEED, device)
        tensors = {"x": normal(device, dtype, n, hidden), "dy": normal(device, dtype, n, width)}
        return Work(
            tensors | _trained(group),
            lambda t: _ours(t, group, op),
            lambda t: _plain(t, group, stored, keep if op == "lora_dropout" else None),
            quantized=stored,
        )

    weights, adapter = width * hidden, settings.rank * (width + 3 * hidden)
    flops = n * (4.0 * weights + 6.0 * adapter)
    nbytes = 2 * (hidden + width) * n * dtype.itemsize + 2 * 0.5159 * weights + 8.0 * adapter
    return Case(op, model, f"{n}x{width}x{hidden}", dtype, flops, nbytes, make)


def _varied(projection: Projection, op: str) -> Projection:
    device, out = projection.weight.device, projection.out_features
    if op == "lora_bias":
        return replace(projection, bias=torch.randn(out, device=device))
    if op == "lora_dropout":
        return replace(projection, dropout=_DROPPED)
    magnitude = 0.5 + torch.rand(out, device=device)
    return replace(projection, magnitude=magnitude.requires_grad_())


def _trained(group: Mapping[str, Projection]) -> dict[str, Tensor]:
    """What a group trains, by name."""
    return {
        f"{name}_{part}": tensor
        for name, projection in group.items()
        for part in ("lora_a", "lora_b", "magnitude")
        if (tensor := getattr(projection, part)) is not None
    }


def _ours(t: Tensors, group: Mapping[str, Projection], op: str) -> Tensors:
    inputs: dict[str, Tensor] = {"x": leaf(t["x"])} | _trained(group)
    seed = _SEED if op == "lora_dropout" else None
    y = torch.cat(lora_qkv(inputs["x"], group["q"], group["k"], group["v"], seed), 1)
    return {"y": y.detach(), **gradients(y, inputs, t["dy"])}


def _plain(
    t: Tensors,
    group: Mapping[str, Projection],
    stored: Mapping[str, NF4Weight],
    keep: Tensor | None,
) -> Tensors:
    inputs = {name: leaf(tensor) for name, tensor in t.items() if name != "dy"}
    x = inputs["x"]
    dropped = x if keep is None else torch.where(keep, x / (1.0 - _DROPPED), 0.0)
    parts = []
    for name, projection in group.items():
        weight = plain.nf4_weight(stored[name], projection.weight.dtype).to(x.dtype)
        a, b = (inputs[f"{name}_lora_{half}"].to(x.dtype) for half in "ab")
        y = functional.linear(x, weight)
        y = y + functional.linear(functional.linear(dropped, a), b) * projection.scale
        magnitude = inputs.get(f"{name}_magnitude")
        if magnitude is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            adapted = weight.to(wide) + projection.scale * (b.to(wide) @ a.to(wide))
            norms = torch.linalg.vector_norm(adapted, dim=1).detach()
            y = y * (magnitude / norms).to(x.dtype)
        parts.append(y if projection.bias is None else y + projection.bias.to(x.dtype))
    y = torch.cat(parts, 1)
    return {"y": y.detach(), **gradients(y, inputs, t["dy"])}


def _int8_head(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, vocabulary = min(settings.tokens, settings.head_rows), config.vocab_size
    hidden, dtype = config.hidden_size, settings.dtype

    def ours(t: Tensors) -> Tensors:
        h = leaf(t["hidden"])
        loss = linear_cross_entropy(h, Int8Weight(t["codes"], t["absmax"], dtype), t["labels"])
        return {"loss": loss.detach(), **gradients(loss, {"hidden": h})}

    def other(t: Tensors) -> Tensors:
        h = leaf(t["hidden"])
        scale = (t["absmax"] / 127.0).unsqueeze(1)
        weight = (t["codes"].to(scale.dtype) * scale).to(h.dtype)
        loss = plain.cross_entropy(h @ weight.T, t["labels"]).mean()
        return {"loss": loss.detach(), **gradients(loss, {"hidden": h})}

    def make(device: torch.device) -> Work:
        weight = quantize_int8(normal(device, dtype, vocabulary, hidden) * hidden**-0.5)
        tensors = {
            "hidden": normal(device, dtype, n, hidden),
            "codes": weight.codes,
            "absmax": weight.absmax,
            "labels": torch.randint(0, vocabulary, (n,), device=device),
        }
        return Work(tensors, ours, other)

    flops, nbytes = 4.0 * n * vocabulary * hidden, (vocabulary + 2.0 * n * dtype.itemsize) * hidden
    return Case("int8_head", model, f"{n}x{vocabulary}x{hidden}", dtype, flops, nbytes, make)


def _distillation(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, vocabulary = min(settings.tokens, settings.head_rows), config.vocab_size
    hidden, dtype = config.hidden_size, settings.dtype
    names = ("hidden", "teacher_hidden")

    def ours(t: Tensors) -> Tensors:
        h = leaf(t["hidden"])
        loss = linear_distillation(h, t["weight"], t["teacher_hidden"], t["weight"])
        return {"loss": loss.detach(), **gradients(loss, {"hidden": h})}

    def other(t: Tensors) -> Tensors:
        h = leaf(t["hidden"])
        wide = torch.promote_types(h.dtype, torch.float32)
        log_p, log_q = (
            (x @ t["weight"].T).to(wide).log_softmax(1) for x in (h, t["teacher_hidden"])
        )
        loss = functional.kl_div(log_p, log_q, log_target=True, reduction="sum") / n
        return {"loss": loss.detach(), **gradients(loss, {"hidden": h})}

    def make(device: torch.device) -> Work:
        tensors = {name: normal(device, dtype, n, hidden) for name in names}
        tensors["weight"] = normal(device, dtype, vocabulary, hidden) * hidden**-0.5
        return Work(tensors, ours, other)

    flops = 6.0 * n * vocabulary * hidden
    nbytes = (vocabulary + 3.0 * n) * hidden * dtype.itemsize
    shape = f"{n}x{vocabulary}x{hidden}"
    return Case("linear_distillation", model, shape, dtype, flops, nbytes, make)
