"""How much each attention head matters, measured on calibration rows.

With out_t,h what head h gives o_proj at token t, and o_h its columns:

    l2-output   mean over tokens of |o_h out_t,h|, the length of what the head adds to the residual
                stream, divided by the layer's mean: lengths grow with depth, and without that the
                first layers would lose most of their heads.
    gradient    sum over rows of |sum over the row's tokens of <out_t,h, dL/d out_t,h>| / tokens,
                the first-order change of the loss if the head were taken out (Michel et al. 2019,
                arXiv 1905.10650). It equals |<o_h, dL/d o_h>|, so only o_proj needs a gradient.

|o_h out|^2 = out^T (o_h^T o_h) out, which needs the (D, D) matrices o_h^T o_h alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.config.choices import Metric
from engine.data.batches.loader import collate
from engine.data.dataset import load_rows
from engine.data.examples import Example, build_examples, check_ids
from engine.device import resolve_device, resolve_dtype
from engine.inference.perplexity import by_tokens
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import build_model
from engine.pruning.scores import LayerScores, checked, output_grams, weight_scores
from engine.tokenization.tokenizer import load_tokenizer
from kernels.delta_net.gated_rms_norm import gated_rms_norm_forward
from kernels.linear.decode import decode_weight
from models.decoder import Decoder
from models.head_slices import HeadSlices, layer_heads
from models.layers.block import Mixer
from models.layers.delta_net import DeltaNet
from models.layers.linear import Linear
from models.layers.observer import LayerObserver, observe_layers

if TYPE_CHECKING:
    from engine.config.choices import Quantization

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Calibration:
    """The rows to run, and how the model is loaded: the first `rows` of `data`.

    `query` says which rows of a database are read.
    """

    data: tuple[str, ...]
    query: str | None = None
    rows: int = 64
    max_length: int = 512
    quantize: Quantization | None = None
    device: str = "auto"
    dtype: str = "auto"


def calibration_examples(source: ModelSource, how: Calibration) -> list[Example]:
    """The tokenised rows. Raises `DataError` for rows that cannot be used."""
    rows = load_rows(list(how.data), query=how.query)[: how.rows]
    examples, _ = build_examples(rows, load_tokenizer(source), how.max_length)
    check_ids(examples, source.config.vocab_size)
    return examples


def measured_scores(
    source: ModelSource,
    layers: Sequence[HeadSlices],
    metric: Metric,
    examples: list[Example],
    how: Calibration,
) -> list[LayerScores]:
    """Scores of every head of `layers` by `metric` (l2-output or gradient)."""
    blank = weight_scores(source, layers, "random")
    device = resolve_device(how.device)
    model = build_model(
        source,
        quantization=how.quantize,
        device=device,
        dtype=resolve_dtype(how.dtype, device),
    )
    numbers = [heads.layer for heads in layers]
    if metric == "l2-output":
        measured = [_relative(values) for values in activations(model, numbers, examples)]
    else:
        measured = gradients(model, numbers, examples)
    return [
        replace(scores, values=checked(values, scores.heads.layer))
        for scores, values in zip(blank, measured, strict=True)
    ]


def _relative(values: Tensor) -> Tensor:
    """`values` (heads,) over the mean of those that are not 0."""
    mean = values.sum() / (values > 0).sum().clamp(min=1)
    return values / mean.clamp(min=torch.finfo(torch.float64).tiny)


@torch.no_grad()
def activations(model: Decoder, layers: Sequence[int], examples: list[Example]) -> list[Tensor]:
    """Mean length (heads,) in float64 of what each head of `layers` adds, over all tokens."""
    watch = _HeadLengths(model, layers)
    tokens = 0
    with observe_layers(watch):
        for group in by_tokens(examples, TOKENS_PER_BATCH):
            batch = collate(group)
            model.hidden_states(batch.to(model.device, model.ids_device))
            tokens += int(batch.input_ids.numel())
    return [watch.sums[layer].cpu() / max(tokens, 1) for layer in layers]


class _HeadLengths(LayerObserver):
    """Adds up the lengths of every token's contributions as mixers run."""

    def __init__(self, model: Decoder, layers: Sequence[int]) -> None:
        self.sums: dict[int, Tensor] = {}
        self._mixers: dict[int, tuple[Mixer, Tensor]] = {}
        for layer in layers:
            heads, linear = _output(model, layer)
            grams = output_grams(heads.by_head(dense_weight(linear, torch.float32))).float()
            self._mixers[layer] = model.layers[layer].mixer, grams
            self.sums[layer] = torch.zeros(heads.heads, dtype=torch.float64, device=grams.device)

    def mixer_ran(self, layer: int, saved: Any) -> None:
        """Add the lengths of what each head of a layer adds."""
        if layer not in self._mixers:
            return
        mixer, grams = self._mixers[layer]
        out = heads_output(mixer, saved).float()
        squares = (torch.einsum("nhd,hde->nhe", out, grams) * out).sum(2)
        self.sums[layer].add_(squares.clamp_(min=0).sqrt_().double().sum(0))


def heads_output(mixer: Mixer, saved: Any) -> Tensor:
    """What the output projection reads (N, heads, D)."""
    out: Tensor = saved.out
    if isinstance(mixer, DeltaNet):
        return gated_rms_norm_forward(out, saved.z, mixer.norm.weight, mixer.norm.eps)[0]
    return out if saved.gate is None else out * torch.sigmoid(saved.gate)


def gradients(model: Decoder, layers: Sequence[int], examples: list[Example]) -> list[Tensor]:
    """|<o_h, dL/d o_h>| (heads,) in float64, summed over rows, per trained token.

    o_proj is made dense; a quantised one with the values it stands for.
    """
    outputs = {layer: _output(model, layer) for layer in layers}
    sums = {layer: torch.zeros((), dtype=torch.float64) for layer in layers}
    for _, linear in outputs.values():
        if not isinstance(linear.weight, Tensor):
            linear.set_weight(dense_weight(linear, model.dtype))
        assert isinstance(linear.weight, Tensor)
        linear.weight.requires_grad_(True)
    tokens = 0
    for example in examples:
        batch = collate([example])
        model.batch_loss(batch, num_items=1).backward()
        tokens += batch.trained_tokens
        for layer, (heads, linear) in outputs.items():
            sums[layer] = sums[layer] + _inner(heads, linear).abs().cpu()
    return [sums[layer] / max(tokens, 1) for layer in layers]


def _output(model: Decoder, layer: int) -> tuple[HeadSlices, Linear]:
    """The heads of a layer and the projection that reads them."""
    heads = layer_heads(model.config, layer)
    linear = model.get_submodule(heads.module(heads.output))
    assert isinstance(linear, Linear)
    return heads, linear


def _inner(heads: HeadSlices, linear: Linear) -> Tensor:
    """<o_h, dL/d o_h> (heads,) of the gradient that is there, which is taken away."""
    weight = linear.weight
    assert isinstance(weight, Tensor) and weight.grad is not None
    product = weight.detach().double() * weight.grad.double()
    weight.grad = None
    inner: Tensor = heads.by_head(product).sum((0, 2))
    return inner


def dense_weight(linear: Linear, dtype: torch.dtype) -> Tensor:
    """The weight as a dense matrix of its own."""
    weight = linear.weight
    if isinstance(weight, Tensor):
        return weight.detach().to(dtype)
    return decode_weight(weight, dtype).clone()
