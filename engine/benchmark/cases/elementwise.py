"""Cases of memory-bound ops: norms, RoPE, SwiGLU, cross-entropy, the optimizer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.benchmark.cases import plain
from engine.benchmark.cases.case import Case, CaseSizes, Tensors, Work, gradients, leaf
from kernels.elementwise.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from kernels.elementwise.rope import rope_qk_
from kernels.elementwise.swiglu import swiglu_backward_, swiglu_forward
from kernels.loss.cross_entropy import cross_entropy_
from models.config.model_config import ModelConfig
from models.layers.rotary import Rotary
from models.tensor_names import PROJECTIONS, layer_tensors
from optim import AdamW8bit


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Random values of unit variance."""
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def cases(model: str, config: ModelConfig, settings: CaseSizes) -> Iterator[Case]:
    """All cases of this module at the shapes of `config`."""
    yield from _norms(model, config, settings)
    yield _rope(model, config, settings)
    yield from _swiglu(model, config, settings)
    yield _cross_entropy(model, config, settings)
    yield _adamw(model, config, settings)


def _norms(model: str, config: ModelConfig, settings: CaseSizes) -> Iterator[Case]:
    n, h, dtype, eps = (
        settings.streamed_tokens,
        config.hidden_size,
        settings.dtype,
        config.rms_norm_eps,
    )
    size = n * h * dtype.itemsize

    def forward(t: Tensors) -> Tensors:
        return {"y": rms_norm_forward(t["x"], t["weight"], eps)[0]}

    def plain_forward(t: Tensors) -> Tensors:
        return {"y": plain.rms_norm(t["x"], t["weight"], eps)}

    def added(t: Tensors) -> Tensors:
        y, total, _ = add_rms_norm_forward(t["x"], t["residual"], t["weight"], eps)
        return {"y": y, "total": total}

    def plain_added(t: Tensors) -> Tensors:
        total = t["x"] + t["residual"]
        return {"y": plain.rms_norm(total, t["weight"], eps), "total": total}

    def both(t: Tensors) -> Tensors:
        y, rstd = rms_norm_forward(t["x"], t["weight"], eps)
        return {"y": y, "dx": rms_norm_backward(t["dy"], t["x"], t["weight"], rstd)[0]}

    def plain_both(t: Tensors) -> Tensors:
        x = leaf(t["x"])
        y = plain.rms_norm(x, t["weight"], eps)
        return {"y": y.detach(), **gradients(y, {"x": x}, t["dy"])}

    def make(device: torch.device, ours: str) -> Work:
        tensors = {name: normal(device, dtype, n, h) for name in ("x", "residual", "dy")}
        tensors["weight"] = 1.0 + 0.1 * normal(device, dtype, h)
        variants = {"y": (forward, plain_forward), "add": (added, plain_added)}
        return Work(tensors, *variants.get(ours, (both, plain_both)))

    shape = f"{n}x{h}"
    yield Case("rms_norm", model, shape, dtype, 4.0 * n * h, 2.0 * size, lambda d: make(d, "y"))
    yield Case(
        "add_rms_norm", model, shape, dtype, 5.0 * n * h, 4.0 * size, lambda d: make(d, "add")
    )
    yield Case(
        "rms_norm_grad", model, shape, dtype, 12.0 * n * h, 5.0 * size, lambda d: make(d, "grad")
    )


def _rope(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, dim, dtype = settings.streamed_tokens, config.head_dim, settings.dtype
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    elements = n * (heads + kv_heads) * dim

    def ours(t: Tensors) -> Tensors:
        q, k = rope_qk_(t["q"], t["k"], t["cos"], t["sin"])
        return {"q": q, "k": k}

    def other(t: Tensors) -> Tensors:
        return {name: plain.rope(t[name], t["cos"], t["sin"]) for name in ("q", "k")}

    def make(device: torch.device) -> Work:
        cos, sin = Rotary(config)(torch.arange(n, device=device), dtype)
        q, k = normal(device, dtype, n, heads, dim), normal(device, dtype, n, kv_heads, dim)
        return Work({"q": q, "k": k, "cos": cos, "sin": sin}, ours, other, ("q", "k"))

    nbytes = 2.0 * elements * dtype.itemsize + n * dim * 4.0
    shape = f"{n}x({heads}+{kv_heads})x{dim}"
    return Case("rope", model, shape, dtype, 3.0 * elements, nbytes, make)


def _swiglu(model: str, config: ModelConfig, settings: CaseSizes) -> Iterator[Case]:
    n, inner, dtype = settings.streamed_tokens, config.intermediate_size, settings.dtype
    size = n * inner * dtype.itemsize

    def forward(t: Tensors) -> Tensors:
        return {"h": swiglu_forward(t["gate"], t["up"])}

    def plain_forward(t: Tensors) -> Tensors:
        return {"h": plain.swiglu(t["gate"], t["up"])}

    def both(t: Tensors) -> Tensors:
        h = swiglu_forward(t["gate"], t["up"])
        dgate, dup = swiglu_backward_(t["dh"], t["gate"], t["up"])
        return {"h": h, "dgate": dgate, "dup": dup}

    def plain_both(t: Tensors) -> Tensors:
        inputs = {name: leaf(t[name]) for name in ("gate", "up")}
        h = plain.swiglu(inputs["gate"], inputs["up"])
        return {"h": h.detach(), **gradients(h, inputs, t["dh"])}

    def make(device: torch.device, backward: bool) -> Work:
        tensors = {name: normal(device, dtype, n, inner) for name in ("gate", "up", "dh")}
        if backward:
            return Work(tensors, both, plain_both, ("gate", "up", "dh"))
        return Work(tensors, forward, plain_forward)

    shape, flops = f"{n}x{inner}", 5.0 * n * inner
    yield Case("swiglu", model, shape, dtype, flops, 3.0 * size, lambda d: make(d, False))
    yield Case("swiglu_grad", model, shape, dtype, 3 * flops, 8.0 * size, lambda d: make(d, True))


def _cross_entropy(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    vocabulary, dtype = config.vocab_size, settings.dtype
    n = min(settings.tokens, settings.head_rows)
    if settings.streamed is not None:
        n = max(n, settings.streamed * config.hidden_size // vocabulary)

    def ours(t: Tensors) -> Tensors:
        return {"loss": cross_entropy_(t["logits"], t["targets"]), "dlogits": t["logits"]}

    def other(t: Tensors) -> Tensors:
        logits = leaf(t["logits"])
        loss = plain.cross_entropy(logits, t["targets"])
        return {"loss": loss.detach(), **gradients(loss.sum(), {"logits": logits})}

    def make(device: torch.device) -> Work:
        logits = normal(device, dtype, n, vocabulary)
        targets = torch.randint(0, vocabulary, (n,), device=device)
        return Work({"logits": logits, "targets": targets}, ours, other, ("logits",))

    elements = n * vocabulary
    nbytes = 2.0 * elements * dtype.itemsize
    return Case("cross_entropy", model, f"{n}x{vocabulary}", dtype, 6.0 * elements, nbytes, make)


def adapter_shapes(config: ModelConfig, rank: int, layers: int) -> list[tuple[int, int]]:
    """Shapes of the LoRA halves of `layers` layers, all projections."""
    shapes = [
        shape
        for name, shape in layer_tensors(config).items()
        if name.split(".")[-2] in PROJECTIONS and name.endswith(".weight")
    ]
    pairs = [half for out, into in shapes for half in ((rank, into), (out, rank))]
    return pairs * layers


def _adamw(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    layers = settings.optimizer_layers or config.num_hidden_layers
    shapes = adapter_shapes(config, settings.rank, layers)
    count = sum(rows * columns for rows, columns in shapes)

    def parameters(device: torch.device) -> list[Tensor]:
        made = [leaf(0.02 * normal(device, torch.float32, *shape)) for shape in shapes]
        for parameter in made:
            parameter.grad = 0.01 * torch.randn_like(parameter)
        return made

    def make(device: torch.device) -> Work:
        params = parameters(device)
        mine = AdamW8bit(params, lr=1e-5)
        theirs = torch.optim.AdamW(parameters(device), lr=1e-5, fused=device.type == "cuda")

        def step(optimizer: torch.optim.Optimizer) -> Tensors:
            optimizer.step()
            return {}

        return Work({}, lambda _: step(mine), lambda _: step(theirs), parameters=params)

    # Gradient read; parameter, two codes and, per block of 256, two scales read and written.
    nbytes = count * (4.0 + 8.0 + 4.0 + 16.0 / 256)
    shape = f"{len(shapes)} tensors, {count / 1e6:.2f} M"
    return Case("adamw8bit", model, shape, torch.float32, 15.0 * count, nbytes, make)
