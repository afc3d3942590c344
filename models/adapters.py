"""Add LoRA pairs to a decoder, and read or load their tensors.

A (r, in) starts uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5), as in PEFT), B (out, r) at
zero, so a new adapter changes nothing until it has been trained. The scale is alpha / r, or
alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732). DoRA adds a magnitude (out,) to
each pair, which starts at the lengths of the weight's rows (`kernels.linear.dora`). Adapters are
fp32 whatever the base is. Every expert of a mixture has pairs of its own, named by the expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.linear.decode import decode_weight
from kernels.linear.dora import adapted_row_norms
from models.decoder import Decoder
from models.families.json_values import listed
from models.layers.experts import ExpertAdapter, Experts
from models.layers.linear import Linear
from models.tensor_layout import Layout, path_in_file
from models.tensor_names import ATTENTION_PROJECTIONS, DELTA_PROJECTIONS, PROJECTIONS

PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
"""The tensors of one adapter, in the order of its tuple; the last one only under DoRA."""
TARGETS: dict[str, tuple[str, ...]] = {
    "all": PROJECTIONS,
    "attn": (*ATTENTION_PROJECTIONS, *DELTA_PROJECTIONS),
    "qv": ("q_proj", "v_proj"),
}


def target_modules(targets: str | Sequence[str]) -> tuple[str, ...]:
    """Projection names for a preset ("all", "attn", "qv"), a comma list, or a list.

    Raises `ValueError` naming what is not a projection.
    """
    if isinstance(targets, str):
        named = TARGETS.get(targets) or tuple(t.strip() for t in targets.split(",") if t.strip())
    else:
        named = tuple(targets)
    unknown = [name for name in named if name not in PROJECTIONS]
    if unknown or not named:
        raise ValueError(
            f"target modules {listed(unknown) or '(none)'} are unknown; expected one of the "
            f"presets {', '.join(TARGETS)} or names out of {', '.join(PROJECTIONS)}"
        )
    return tuple(name for name in PROJECTIONS if name in named)


def linears(model: nn.Module, names: Sequence[str]) -> dict[str, Linear]:
    """Module path -> `Linear`, for every projection whose last name is in `names`."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Linear) and path.rsplit(".", 1)[-1] in names
    }


def expert_adapters(model: nn.Module, names: Sequence[str]) -> dict[str, ExpertAdapter]:
    """Path of a mixture's experts and a projection of `names` -> the module for their pairs."""
    return {
        f"{path}.{name}": adapter
        for path, module in model.named_modules()
        if isinstance(module, Experts)
        for name, adapter in module.adapters().items()
        if name in names
    }


@dataclass(frozen=True)
class PairSize:
    """Rank of a pair, and the alpha that its factor follows from (`scale_of`)."""

    rank: int
    alpha: float


def scale_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """The factor of B A x."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def freeze(model: nn.Module) -> None:
    """Turn every gradient off."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def add_lora(
    model: Decoder,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all",
    use_rslora: bool = False,
    seed: int = 0,
    use_dora: bool = False,
) -> list[str]:
    """Freeze the base, give every target projection a trainable pair; returns their paths.

    With `use_dora` each pair gets a magnitude too. The initial values are a function of
    (seed, order of the modules). Raises `ValueError` on a rank below 1, a dropout outside [0, 1),
    an unknown target, targets that the model does not have, or DoRA on experts.
    """
    names = target_modules(targets)
    paths = [*linears(model, names), *expert_adapters(model, names)]
    if not paths:
        raise ValueError(f"the model has none of the target modules {listed(names)}")
    sizes = dict.fromkeys(paths, PairSize(rank, alpha))
    return add_pairs(model, sizes, dropout, use_rslora, seed, use_dora)


def add_pairs(
    model: Decoder,
    sizes: Mapping[str, PairSize],
    dropout: float = 0.0,
    use_rslora: bool = False,
    seed: int = 0,
    use_dora: bool = False,
) -> list[str]:
    """As `add_lora`, with the size of every pair: `sizes` maps the graph's paths of projections.

    `model.layers.0.mlp.experts.up_proj` means that projection of all experts of a mixture.
    """
    for path, size in sizes.items():
        if size.rank < 1 or not 0.0 <= dropout < 1.0:
            raise ValueError(
                f"rank {size.rank} of {path} must be at least 1 and dropout {dropout} in [0, 1)"
            )
    projections = {p: m for p, m in linears(model, PROJECTIONS).items() if p in sizes}
    experts = {p: m for p, m in expert_adapters(model, PROJECTIONS).items() if p in sizes}
    if not sizes or len(projections) + len(experts) < len(sizes):
        strays = sizes.keys() - projections.keys() - experts.keys()
        raise ValueError(f"the model has no projections {listed(sorted(strays)) or '(none)'}")
    if use_dora and experts:
        raise ValueError(
            "DoRA is not defined for experts, whose adapters PEFT keeps as parameters without a "
            "magnitude; leave it out or target attn"
        )
    freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for path, linear in projections.items():
        rank, alpha = sizes[path].rank, sizes[path].alpha
        bound = 1.0 / math.sqrt(linear.in_features)
        a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(linear.out_features, rank)
        device = model.device  # the weight may lie on the host
        linear.lora_A = nn.Parameter(a.to(device))
        linear.lora_B = nn.Parameter(b.to(device))
        linear.scale, linear.dropout = scale_of(rank, alpha, use_rslora), dropout
        if use_dora:
            with _its_weights(model, path):
                linear.lora_magnitude_vector = nn.Parameter(_magnitude(linear, model.dtype))
    for path, adapter in experts.items():
        rank, scale = sizes[path].rank, scale_of(sizes[path].rank, sizes[path].alpha, use_rslora)
        adapter.attach(rank, scale, dropout, model.device, generator)
    return [path for path, _, _ in _adapters(model)]


def _its_weights(model: Decoder, path: str) -> AbstractContextManager[None]:
    """Inside the block a projection has its weight, wherever that is between passes."""
    stream, layer = model.weight_stream, re.search(r"\.layers\.(\d+)\.", path)
    return nullcontext() if stream is None or layer is None else stream.weights_of(int(layer[1]), 1)


@torch.no_grad()
def _magnitude(linear: Linear, dtype: torch.dtype) -> Tensor:
    """|| W_i + s B_i A || (out,) in fp32, of W as a step in `dtype` sees it.

    Computed as every step computes it, so that a new adapter scales each row by exactly 1.
    """
    weight, a, b = linear.weight, linear.lora_A, linear.lora_B
    assert a is not None and b is not None
    dense = weight if isinstance(weight, Tensor) else decode_weight(weight, dtype)
    return adapted_row_norms(dense, a, b, linear.scale).float()


def adapter_tensors(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Module path -> (A, B), under DoRA (A, B, magnitude), sharing memory with the model.

    Paths are those of the model's file: below `model.language_model.` where the decoder is a part
    of a larger model, and with the expert's number for a mixture's.
    """
    tensors: dict[str, tuple[Tensor, ...]] = {}
    for path, parts, expert in _adapters(model):
        data = (part.data for part in parts)
        tensors[path] = tuple(t if expert is None else t[expert] for t in data)
    return tensors


def _adapters(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter], int | None]]:
    """(path, parameters, expert) of every adapter; an expert's are one row of the parameters."""
    layout = Layout(nested=isinstance(model, Decoder) and model.config.nested)
    for path, module in model.named_modules():
        path = layout.path(path)
        if isinstance(module, Experts):
            for name, adapter in module.adapters().items():
                pair = [part for part in (adapter.lora_A, adapter.lora_B) if part is not None]
                for expert in range(module.count if pair else 0):
                    number = module.share.first + expert
                    yield f"{path}.{number}.{name}", pair, expert
        if isinstance(module, Linear) and module.lora_A is not None:
            parts = (module.lora_A, module.lora_B, module.lora_magnitude_vector)
            yield path, [part for part in parts if part is not None], None


@dataclass(frozen=True)
class MatchedPairs:
    """The pairs of an adapter by the modules that they belong to, each with its factor."""

    linears: list[tuple[Linear, tuple[Tensor, ...], float]]
    experts: list[tuple[ExpertAdapter, dict[int, tuple[Tensor, ...]], dict[int, float]]]


def match_pairs(
    model: Decoder, tensors: Mapping[str, tuple[Tensor, ...]], scales: Mapping[str, float]
) -> MatchedPairs:
    """The modules of `tensors`; arguments and errors as in `attach_lora`."""
    layout = Layout(nested=model.config.nested)
    projections = {layout.path(p): linear for p, linear in linears(model, PROJECTIONS).items()}
    experts = {
        layout.path(p): adapter for p, adapter in expert_adapters(model, PROJECTIONS).items()
    }
    given = {path_in_file(model.config, path): parts for path, parts in tensors.items()}
    factors = {path_in_file(model.config, path): scale for path, scale in scales.items()}
    pairs: dict[str, dict[int, tuple[Tensor, ...]]] = {}
    pair_scales: dict[str, dict[int, float]] = {}
    wrong = []
    for path, parts in given.items():
        owner, expert = _owner_of_expert(path)
        if path not in projections and owner not in experts:
            wrong.append(f"{path} is not in the model")
            continue
        target = projections[path] if path in projections else experts[owner]
        wrong += _misfits(path, parts, target.in_features, target.out_features)
        if path not in projections:
            pairs.setdefault(owner, {})[expert] = parts
            pair_scales.setdefault(owner, {})[expert] = factors[path]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"adapter does not match: {'; '.join(sorted(wrong)[:5])}{more}")
    return MatchedPairs(
        [(projections[p], given[p], factors[p]) for p in given.keys() & projections.keys()],
        [(experts[owner], each, pair_scales[owner]) for owner, each in pairs.items()],
    )


@torch.no_grad()
def attach_lora(
    model: Decoder,
    tensors: Mapping[str, tuple[Tensor, ...]],
    scales: Mapping[str, float],
    dropout: float = 0.0,
) -> None:
    """Freeze the base and give exactly the modules of `tensors` trainable copies of them.

    `tensors` maps the file's path of a projection to (A, B), under DoRA (A, B, magnitude), and
    `scales` to the factor of B A. Ranks may differ. Raises `ValueError` listing modules that the
    model does not have, and shapes that do not fit.
    """
    matched = match_pairs(model, tensors, scales)
    freeze(model)
    for linear, parts, scale in matched.linears:
        linear.scale, linear.dropout = scale, dropout
        a, b, *magnitude = (
            nn.Parameter(part.to(model.device, torch.float32, copy=True)) for part in parts
        )
        linear.lora_A, linear.lora_B = a, b
        linear.lora_magnitude_vector = magnitude[0] if magnitude else None
    for adapter, each, factors in matched.experts:
        adapter.set_pairs(each, factors, dropout, model.device)


def _owner_of_expert(path: str) -> tuple[str, int]:
    """`mlp.experts.3.up_proj` -> (`mlp.experts.up_proj`, 3); (path, 0) of anything else."""
    before, separator, rest = path.partition(".mlp.experts.")
    number, _, leaf = rest.partition(".")
    if not separator or not (number.isascii() and number.isdecimal() and len(number) < 10):
        return path, 0
    return f"{before}.mlp.experts.{leaf}", int(number)


def _misfits(path: str, parts: tuple[Tensor, ...], columns: int, rows: int) -> list[str]:
    """What does not fit of the tensors for a matrix (rows, columns)."""
    rank = parts[0].shape[0] if parts[0].dim() else 0
    expected = ((rank, columns), (rows, rank), (rows,))
    return [
        f"{name} of {path} is {tuple(part.shape)}, expected {shape}"
        for name, part, shape in zip(PARTS, parts, expected, strict=False)
        if tuple(part.shape) != shape
    ]
