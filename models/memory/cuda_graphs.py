"""Run consecutive layers from recorded CUDA graphs.

A small model on a large GPU waits for the host, which needs some microseconds for every launch. A
CUDA graph records the launches of a pass once and repeats them at once, with the same addresses and
the same sizes. Because blocks have backward passes of their own (`models.layers.block`), recording
needs nothing of autograd: the forward and the backward pass of consecutive layers are recorded one
after the other on buffers at fixed addresses, and one autograd node stands for all of these layers.

What changes from batch to batch lies in those buffers: the layers' input, cos and sin, document
boundaries, dropout key. A recording serves one size, so a batch is padded to one of few
(`Sizes`): with a document of zeros at the end, whose gradients are zero, and with empty documents.
Every batch is padded alike, whether its launches are recorded or not, so that a run that is stopped
and resumed computes the same bits.

Layers whose sizes depend on the data (mixtures of experts) or whose document boundaries the host
must know (Gated DeltaNet) run as usual between the recorded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention import AttentionPlan
from kernels.linear.columns import Columns, matrix_of
from kernels.runtime.scratch import buffers
from kernels.runtime.triton_support import cdiv, next_power_of_2
from models.layers.block import BlockSaved, DecoderLayer
from models.layers.context import LayerContext
from models.layers.mlp import MLP
from models.memory.checkpointing import ForwardPass, run_layer
from models.memory.gradient_buffer import GradientBuffer
from models.memory.recorder import Recorder

SIZES = 8
"""How many sizes of batch are recorded; others run launch by launch."""

_WHOLE = 128
_LEAST_TOKENS, _LEAST_DOCUMENTS, _LEAST_LONGEST = 64, 8, 1024


@dataclass(frozen=True)
class Sizes:
    """What recorded launches are made for: tokens, documents, and tokens of the longest one.

    Where the host knows that all documents are equally long (`equal`), nothing is padded.
    """

    tokens: int
    documents: int
    longest: int
    equal: bool

    @classmethod
    def of(cls, plan: AttentionPlan, tokens: int) -> Sizes:
        """The smallest sizes that hold a batch: at most an eighth more tokens."""
        whole = plan.equal_length
        if whole is not None and whole % _WHOLE == 0:
            return cls(tokens, plan.count, whole, True)
        step = max(_LEAST_TOKENS, next_power_of_2(tokens) // 16)
        padded = cdiv(tokens, step) * step
        documents = max(_LEAST_DOCUMENTS, next_power_of_2(plan.count + (padded > tokens)))
        longest = max(_LEAST_LONGEST, next_power_of_2(max(plan.longest, padded - tokens)))
        return cls(padded, documents, min(padded, longest), False)


@dataclass(frozen=True)
class LayerSegment:
    """Consecutive layers that are recorded together."""

    layers: tuple[DecoderLayer, ...]
    gradients: GradientBuffer

    @property
    def first(self) -> int:
        return self.layers[0].index


def recordable(layer: DecoderLayer) -> bool:
    """Whether sizes of tensors within the layer follow from the batch's sizes alone."""
    return layer.self_attn is not None and isinstance(layer.mlp, MLP)


class _RecordedPass:
    """Forward and backward pass of all segments for batches of one size."""

    def __init__(
        self, segments: Sequence[LayerSegment], sizes: Sizes, x: Tensor, run: ForwardPass
    ) -> None:
        rows, width = sizes.tokens, x.shape[1]
        self.segments, self.sizes = segments, sizes
        self.inputs = [x.new_zeros(rows, width) for _ in segments]
        self.outputs = [x.new_zeros(rows, width) for _ in segments]
        self.gradient = x.new_zeros(rows, width)
        self.needs_input = [x.requires_grad or segment.first > 0 for segment in segments]
        self.cu_seqlens = torch.empty(sizes.documents + 1, dtype=torch.int32, device=x.device)
        context, self.policies = run.context, run.policies
        plan, key = context.plan, context.dropout_key
        self.context = replace(
            context,
            cos=context.cos.new_zeros(rows, context.cos.shape[1]),
            sin=context.sin.new_zeros(rows, context.sin.shape[1]),
            plan=plan
            if sizes.equal
            else AttentionPlan.within(self.cu_seqlens, sizes.longest, plan.frugal),
            dropout_key=None if key is None else key.clone(),
        )
        self._saved: dict[int, list[tuple[Tensor, BlockSaved]]] = {}
        self._scratch: list[Tensor] = []
        self._forward: list[Callable[[], None]] = []
        self._backward: list[Callable[[], None]] = []

    def load(self, context: LayerContext) -> None:
        """Write what the layers read of `context` to the fixed addresses."""
        own, rows = self.context, context.cos.shape[0]
        for to, values in ((own.cos, context.cos), (own.sin, context.sin)):
            to[:rows].copy_(values)
        if not self.sizes.equal:
            known = context.plan.count + 1
            self.cu_seqlens[:known].copy_(context.plan.cu_seqlens)
            self.cu_seqlens[known:].fill_(self.sizes.tokens)
        if own.dropout_key is not None and context.dropout_key is not None:
            own.dropout_key.copy_(context.dropout_key)

    def record(self, recorder: Recorder) -> None:
        """Record every segment, in the order in which they are repeated."""
        numbers = range(len(self.segments))
        forward = [partial(self.forward_launches, s) for s in numbers]
        backward = [partial(self.backward_launches, s) for s in numbers]

        def everything() -> None:
            for body in (*forward, *reversed(backward)):
                body()

        with ExitStack() as taken_back:
            for segment in self.segments:
                taken_back.enter_context(segment.gradients.unchanged())
            recorder.warm_up(everything)
        # A larger request elsewhere may replace a buffer, between the passes of a batch even.
        self._scratch = buffers()
        self._forward = [recorder.record(body) for body in forward]
        self._backward = [recorder.record(body) for body in reversed(backward)][::-1]

    @property
    def recorded(self) -> bool:
        return bool(self._forward)

    def forward(self, s: int) -> None:
        """Inputs of segment `s` to its outputs."""
        if self.recorded:
            self._forward[s]()
        else:
            self.forward_launches(s)

    def backward(self, s: int) -> None:
        """`gradient` from that of the segment's outputs to that of its inputs."""
        if self.recorded:
            self._backward[s]()
        else:
            self.backward_launches(s)

    def forward_launches(self, s: int) -> None:
        """The forward pass, launch by launch."""
        x, saved = self.inputs[s], []
        for layer in self.segments[s].layers:
            y, more = layer.forward(x, self.context, self.policies[layer.index])
            saved.append((x, more))
            x = y
        self._saved[s] = saved
        self.outputs[s].copy_(x)

    def backward_launches(self, s: int) -> None:
        """The backward pass, launch by launch, of what the forward pass saved."""
        segment, saved = self.segments[s], self._saved.pop(s)
        dy: Tensor | Columns = self.gradient
        for layer in reversed(segment.layers):
            x, more = saved.pop()
            need_dx = self.needs_input[s] or layer is not segment.layers[0]
            dx, gradients = layer.backward(dy, x, self.context, more, need_dx)
            segment.gradients.add(gradients)
            if dx is not None:
                dy = dx
        if dy is not self.gradient:
            self.gradient.copy_(matrix_of(dy))


class LayerGraphs:
    """Runs the layers of a model, those that can be recorded from recordings.

    Gradients of recorded layers are accumulated in buffers that become the parameters' `grad`. A
    forward pass must have had its backward pass before the next one.
    """

    def __init__(self, layers: Sequence[DecoderLayer], recorder: Recorder | None) -> None:
        self.recorder = recorder
        self.parts = _parts(layers)
        self.segments = [part for part in self.parts if isinstance(part, LayerSegment)]
        # What makes autograd ask for the gradients of layers whose input wants none.
        self.anchor = torch.zeros((), requires_grad=True)
        self.repeated = self.launched = 0
        self._passes: dict[tuple[Any, ...], _RecordedPass] = {}

    @property
    def turn(self) -> int:
        """The number of the newest forward pass."""
        return self.repeated + self.launched

    def forward(self, x: Tensor, run: ForwardPass) -> Tensor:
        """x (N, H) -> the last layer's output (N, H), with gradients as `run_layer` gives them."""
        current = self._pass(x, run)
        current.load(run.context)
        if current.recorded:
            self.repeated += 1
        else:
            self.launched += 1
        numbers = iter(range(len(self.segments)))
        for part in self.parts:
            if isinstance(part, LayerSegment):
                x = _RecordedSegment.apply(x, self.anchor, self, current, next(numbers))
            else:
                x = run_layer(x, part, run)
        return x

    def _pass(self, x: Tensor, run: ForwardPass) -> _RecordedPass:
        """The pass for this batch, recorded while fewer than `SIZES` are."""
        context = run.context
        sizes, silent = Sizes.of(context.plan, x.shape[0]), context.dropout_key is None
        settings = replace(context.settings, dropout_seed=None)  # the key lies in a buffer
        key = (sizes, run.policies, settings, x.requires_grad, silent)
        known = self._passes.get(key)
        if known is not None:
            return known
        fresh = _RecordedPass(self.segments, sizes, x, run)
        if self.recorder is not None and len(self._passes) < SIZES:
            fresh.load(context)
            with torch.no_grad():
                fresh.record(self.recorder)
            self._passes[key] = fresh
        return fresh


def _parts(layers: Sequence[DecoderLayer]) -> list[LayerSegment | DecoderLayer]:
    parts: list[LayerSegment | DecoderLayer] = []
    run: list[DecoderLayer] = []
    for layer in (*layers, None):
        if layer is not None and recordable(layer):
            run.append(layer)
            continue
        if run:
            params = [p for member in run for p in member.trainable()]
            parts.append(LayerSegment(tuple(run), GradientBuffer(params)))
            run = []
        if layer is not None:
            parts.append(layer)
    return parts


class _RecordedSegment(torch.autograd.Function):
    """One segment. Its parameters' gradients do not pass through autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        graphs: LayerGraphs,
        current: _RecordedPass,
        s: int,
    ) -> Tensor:
        rows, target = x.shape[0], current.inputs[s]
        target[:rows].copy_(x)
        target[rows:].zero_()
        current.forward(s)
        ctx.graphs, ctx.current, ctx.s, ctx.turn = graphs, current, s, graphs.turn
        return current.outputs[s][:rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        graphs, current, s = ctx.graphs, ctx.current, ctx.s
        if ctx.turn != graphs.turn:
            raise RuntimeError(
                "another forward pass has written over the activations of this one: recorded "
                "layers want each backward pass before the next forward pass"
            )
        rows = dy.shape[0]
        current.gradient[:rows].copy_(dy)
        current.gradient[rows:].zero_()
        current.segments[s].gradients.attach()
        current.backward(s)
        dx = current.gradient[:rows] if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None
