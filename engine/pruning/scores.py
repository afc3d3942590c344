"""How much each attention head matters, from the weights alone.

With q, k, v the rows and o the columns of head h (k and v those of the key/value head it reads):

    l2      sqrt(|q|^2 + |k|^2 + |v|^2 + |o|^2), Frobenius norms of the head's slices. Where q and
            k are normalised head by head (qwen3) their lengths carry no information: there it is
            sqrt(|v|^2 + |o|^2). Rows of an output gate count as rows of q_proj; biases do not.
    ov      |o v|, the norm of the map from the input of the layer to its output that the head
            makes where it attends. It does not depend on how the map is split between o and v.
            A DeltaNet head's output is normalised, so its v carries no information: l2 and ov are
            both |o w| there, with w the norm's weight on the columns of o.
    random  a seeded control: what the other metrics must beat.

Weights are of different size in different layers, so that a ranking of all heads together by l2 or
ov empties some of them: of SmolLM2's 270 heads a tenth by ov are 20 of the 27 in the first three
layers, and perplexity goes from 21 to 1880; a tenth of every layer, to 31. Rank these two by layer.

`activation` and `gradient` need data; they are in `engine.pruning.calibration`. Scores are float64.
Tensors are read one at a time. |o v|^2 = sum(o^T o * v v^T), of (D, D) matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.choices import HeadKind, Metric, Quantization
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.interface.model_source import ModelSource
from kernels.linear.decode import decode_weight
from kernels.linear.int8 import quantize_int8
from kernels.nf4 import quantize
from models.head_slices import AttentionHeads, DeltaHeads, HeadSlices, layer_heads
from models.tensor_layout import path_in_file

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class LayerScores:
    """`values` (heads,) in float64, and the heads that are pruned already: their o is zero."""

    heads: HeadSlices
    values: Tensor
    pruned: frozenset[int]

    @property
    def active(self) -> set[int]:
        """The heads that could be pruned."""
        return set(range(self.heads.heads)) - self.pruned


def prunable_heads(source: ModelSource, kind: HeadKind) -> list[HeadSlices]:
    """The heads of every layer that has heads of `kind`.

    One run prunes one kind, so that layers of the other are neither counted nor scored and a
    fraction is one of real heads. Raises `ConfigError` where no layer has such heads.
    """
    layers = [layer_heads(source.config, n) for n in range(source.config.num_hidden_layers)]
    wanted = DeltaHeads if kind == "delta" else AttentionHeads
    matches: list[HeadSlices] = [heads for heads in layers if isinstance(heads, wanted)]
    if not matches and kind == "delta":
        raise ConfigError(f"{source.path} has no linear attention; leave out --heads delta.")
    if not matches:
        raise ConfigError(f"{source.path} has no layer with attention heads to prune.")
    return matches


def weight_scores(
    source: ModelSource,
    layers: Sequence[HeadSlices],
    metric: Metric,
    *,
    seed: int = 0,
    through: Quantization | None = None,
) -> list[LayerScores]:
    """Scores of every head of `layers` by `metric` (l2, ov or random).

    `through` scores the values that a model quantised so computes with. Raises `CheckpointError`
    for a score that is not finite.
    """
    generator = torch.Generator().manual_seed(seed)

    def read(name: str) -> Tensor:
        name = path_in_file(source.config, name)
        tensor = source.tensor(name)
        if through is None:
            wide = tensor.to(torch.float32, copy=True)
        else:
            packed = quantize(tensor) if through == "nf4" else quantize_int8(tensor)
            wide = decode_weight(packed, torch.float32)
        source.release(name)
        return wide

    scored = []
    for heads in layers:
        o = heads.by_head(read(heads.weight(heads.output)))
        lengths = o.double().square().sum((0, 2))
        pruned = frozenset(torch.nonzero(lengths == 0).flatten().tolist())
        if metric == "random":
            values = torch.rand(heads.heads, generator=generator, dtype=torch.float64)
        elif not isinstance(heads, AttentionHeads):
            values = (o * read(heads.weight("norm"))).double().square().sum((0, 2)).sqrt()
        elif metric == "ov":
            values = _ov(o, heads, read)
        else:
            values = _l2(lengths, heads, read)
        scored.append(LayerScores(heads, checked(values, heads.layer), pruned))
    return scored


def _l2(squares: Tensor, heads: AttentionHeads, read: Read) -> Tensor:
    """sqrt of the sum of squares of the head's slices; `squares` are those of o."""
    groups = _rows(read(heads.weight("v_proj")), heads.kv_heads)
    if not heads.head_norm:
        groups = groups + _rows(read(heads.weight("k_proj")), heads.kv_heads)
        squares = squares + _rows(read(heads.weight("q_proj")), heads.heads)
    return (squares + groups.repeat_interleave(heads.group_size)).sqrt()


def _rows(weight: Tensor, parts: int) -> Tensor:
    """Sum of squares (parts,) of consecutive equal blocks of rows."""
    return weight.double().square().sum(1).view(parts, -1).sum(1)


def _ov(o: Tensor, heads: AttentionHeads, read: Read) -> Tensor:
    v = read(heads.weight("v_proj")).unflatten(0, (heads.kv_heads, heads.head_dim)).double()
    inner = (v @ v.mT).repeat_interleave(heads.group_size, 0)
    outer = output_grams(o)
    squares: Tensor = (outer * inner).sum((1, 2))
    return squares.clamp_(min=0).sqrt_()


def output_grams(o: Tensor) -> Tensor:
    """o_h^T o_h (heads, D, D) in float64 of o (H, heads, D), one head at a time."""
    return torch.stack([part.mT @ part for part in (o[:, h].double() for h in range(o.shape[1]))])


def checked(values: Tensor, layer: int) -> Tensor:
    """`values`, unless one is not finite: then a `CheckpointError` that names the layer."""
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"A score of layer {layer}'s attention heads is not finite; the model is damaged "
            "or was saved from a diverged run. Download it again or use an earlier one."
        )
    return values
