"""How much each attention head matters, from the weights alone.

With q, k, v the rows and o the columns of head h (k and v those of the key/value head it reads),
and g the gain of the norm that q, k and v read through, which belongs to their columns:

    l2-weights  sqrt((|q g|^2 + |k g|^2) / sqrt(D) + |v g|^2 + |o|^2), Frobenius norms of the head's
                slices; attention divides q.k by sqrt(D), which is shared between q and k. Where q
                and k are normalised head by head (qwen3) their lengths carry no information: there
                it is sqrt(|v g|^2 + |o|^2). Rows of an output gate count as rows of q_proj; biases
                do not. The norm of weight slices is the customary measure of structured pruning (Li
                et al. 2017, arXiv 1608.08710); see `WEIGHTS_WARNING`.
    l2-weights-largest
                the same turned round within each layer: the largest norms go first. An experiment.
    ov          |o v g|, the norm of the map from the input of the layer to its output that the head
                makes where it attends. It does not depend on how the map is split between o and v.
                A DeltaNet head's output is normalised, so its v carries no information: both norms
                are |o w| there, with w the norm's weight on the columns of o.
    random      a seeded control: what the other metrics must beat.

Metrics that need data are in `engine.pruning.calibration` and `engine.pruning.reconstruction`.
Scores are float64. Tensors are read one at a time. |o v|^2 = sum(o^T o * v v^T), of (D, D)
matrices.
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
from models.tensor_names import is_quantised

Read = Callable[[str], Tensor]
WEIGHTS_WARNING = (
    "--metric %s looks at weights alone and can be worse than chance: see the measured table in "
    "docs/pruning.md. With --data, l2-reconstruction is what to use."
)


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
    """Scores of every head of `layers` by `metric` (one that needs no rows).

    `through` scores the values that a model quantised so computes with. Raises `CheckpointError`
    for a score that is not finite.
    """
    generator = torch.Generator().manual_seed(seed)

    def read(name: str) -> Tensor:
        dense = through is None or not is_quantised(name)
        name = path_in_file(source.config, name)
        tensor = source.tensor(name)
        if dense:
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
            values = _ov(o, heads, read, _gain(source, heads, read))
        else:
            values = _l2(lengths, heads, read, _gain(source, heads, read))
        if metric == "l2-weights-largest":
            values = values.max() + values.min() - values
        scored.append(LayerScores(heads, checked(values, heads.layer), pruned))
    return scored


def _gain(source: ModelSource, heads: HeadSlices, read: Read) -> Tensor:
    """What the norm before the layer's mixer multiplies by (H,)."""
    weight = read(f"model.layers.{heads.layer}.input_layernorm.weight")
    return weight + 1 if source.config.zero_centered_norm else weight


def _l2(squares: Tensor, heads: AttentionHeads, read: Read, gain: Tensor) -> Tensor:
    """sqrt of the sum of squares of the head's slices; `squares` are those of o."""

    def rows(projection: str, parts: int) -> Tensor:
        return _rows(read(heads.weight(projection)) * gain, parts)

    groups = rows("v_proj", heads.kv_heads)
    if not heads.head_norm:
        scale = heads.head_dim**-0.5
        groups = groups + scale * rows("k_proj", heads.kv_heads)
        squares = squares + scale * rows("q_proj", heads.heads)
    return (squares + groups.repeat_interleave(heads.group_size)).sqrt()


def _rows(weight: Tensor, parts: int) -> Tensor:
    """Sum of squares (parts,) of consecutive equal blocks of rows."""
    return weight.double().square().sum(1).view(parts, -1).sum(1)


def _ov(o: Tensor, heads: AttentionHeads, read: Read, gain: Tensor) -> Tensor:
    v = read(heads.weight("v_proj")) * gain
    v = v.unflatten(0, (heads.kv_heads, heads.head_dim)).double()
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
