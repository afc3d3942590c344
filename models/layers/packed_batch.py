"""`PackedBatch`: documents laid end to end, and which tokens are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.attention.documents import checked_bounds
from kernels.attention.shared import SharedTokens, prompts_shared
from kernels.runtime.device import has_streams, upload
from models.parallel.token_slices import TokenSlices

_ALIGNMENT = 16
"""Elements of eight bytes at which the parts of a joined batch start: kernels read them widely."""


@dataclass(frozen=True)
class Sequences:
    """Which sequence each trained token belongs to, where a loss is one of whole sequences.

    Token i stands at slots[i] of a padded matrix of `shape` (S, T): row slots[i] // T is its
    sequence. slots (n,) int64; `counts` has the trained tokens of every sequence, and `examples`
    the index of the example that it is made of.
    """

    slots: Tensor
    shape: tuple[int, int]
    counts: tuple[int, ...]
    examples: tuple[int, ...]

    @classmethod
    def of(cls, counts: Sequence[int], examples: Sequence[int]) -> Sequences:
        """Sequences whose trained tokens follow each other in this order."""
        longest = max(counts, default=0)
        starts = torch.arange(len(counts)) * longest
        repeats = torch.tensor(counts, dtype=torch.int64)
        first = torch.repeat_interleave(repeats.cumsum(0) - repeats, repeats)
        within = torch.arange(first.shape[0]) - first
        slots = torch.repeat_interleave(starts, repeats) + within
        return cls(slots, (len(counts), longest), tuple(counts), tuple(examples))


@dataclass(frozen=True)
class PackedBatch:
    """Documents laid end to end; built once, by the loader, and read from there to the loss.

    Document d is input_ids[bounds[d] : bounds[d + 1]]. The hidden state at trained[i] predicts
    targets[i], which is the next token of the same document: no document's first token is a target.

    input_ids (N,) int64; trained, targets (n,) int64; cu_seqlens (D + 1,) int32 on the device and
    the same numbers in `bounds` on the host. `sequences` divide the trained tokens, where a loss
    asks for that. With `shared` the batch holds tokens once that two documents begin with:
    boundaries then count all tokens of the documents, `trained` and input_ids those of the batch.
    `weights` (n,) fp32 say how much each trained token counts, `total_weight` their sum; None where
    all count once. With `slices` the ids and the trained tokens are those of one rank's slice, by
    their index in it; documents and `total_weight` are those of the whole. A part of a step's
    micro-batch `micro` begins at its token `first_token`, by which random masks are drawn; None is
    a whole one.
    """

    input_ids: Tensor
    trained: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    bounds: tuple[int, ...]
    sequences: Sequences | None = None
    shared: SharedTokens | None = None
    weights: Tensor | None = None
    total_weight: float | None = None
    micro: int | None = None
    first_token: int = 0
    slices: TokenSlices | None = None

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> PackedBatch:
        """The rows of input_ids (B, T) or (N,) laid end to end.

        labels have the shape of input_ids and are not shifted; negative where not trained. Without
        labels nothing is trained. `weights`, of their shape, say how much each counts as a target.
        Without `cu_seqlens` (D + 1,) every row is a document. Labels or
        boundaries on a GPU are waited for, once each. Raises `ValueError` where shapes or
        boundaries do not fit.
        """
        ids = input_ids.reshape(-1)
        tokens, length = ids.shape[0], input_ids.shape[-1]
        if cu_seqlens is None:
            bounds = checked_bounds(range(0, tokens + 1, max(1, length)), tokens)
            cu_seqlens = torch.arange(0, tokens + 1, length, device=ids.device)
        else:
            bounds = checked_bounds(cu_seqlens.tolist(), tokens)
        cu_seqlens = cu_seqlens.to(torch.int32)
        if labels is None:
            none = ids.new_empty(0)
            return cls(ids, none, none, cu_seqlens, bounds)
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} must have the shape of input_ids "
                f"{tuple(input_ids.shape)}"
            )
        shifted = _shifted(labels.reshape(-1), cu_seqlens)
        trained = torch.nonzero(shifted >= 0).squeeze(1)
        targets = shifted.index_select(0, trained)
        if weights is None:
            return cls(ids, trained, targets, cu_seqlens, bounds)
        own = weights.reshape(-1).to(torch.float32).index_select(0, trained + 1)
        total = float(own.double().sum())
        return cls(ids, trained, targets, cu_seqlens, bounds, weights=own, total_weight=total)

    def part_of(self, micro: int, first_token: int) -> PackedBatch:
        """This batch as the part of a step's micro-batch that begins at one of its tokens."""
        return replace(self, micro=micro, first_token=first_token)

    def sliced(self, rank: int, size: int) -> PackedBatch:
        """The slice of one of `size` ranks, which is as long as the others' or a token longer.

        A batch in a GPU's memory is waited for.
        """
        slices = TokenSlices.of(self.tokens, rank, size)
        own = (self.trained >= slices.first) & (self.trained < slices.edges[rank + 1])
        index = torch.nonzero(own).squeeze(1)
        sequences, weights = self.sequences, self.weights
        if sequences is not None:
            sequences = replace(sequences, slots=sequences.slots.index_select(0, index))
        return replace(
            self,
            input_ids=slices.own(self.input_ids),
            trained=self.trained.index_select(0, index) - slices.first,
            targets=self.targets.index_select(0, index),
            sequences=sequences,
            weights=None if weights is None else weights.index_select(0, index),
            total_weight=self.items,
            slices=slices,
        )

    @classmethod
    def idle(cls) -> PackedBatch:
        """A batch without trained tokens, for a rank that has no row while others compute.

        Its loss, of tokens or of its no sequences, and its gradients are zero.
        """
        batch = cls.of(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), -100))
        return replace(batch, sequences=Sequences.of((), ()))

    @property
    def items(self) -> float:
        """What the loss of this batch counts: its trained tokens, or the sum of their weights."""
        return self.trained_tokens if self.total_weight is None else self.total_weight

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def trained_tokens(self) -> int:
        return self.trained.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that takes memory."""
        tensors = [self.input_ids, self.trained, self.targets, self.cu_seqlens]
        if self.sequences is not None:
            tensors.append(self.sequences.slots)
        if self.weights is not None:
            tensors.append(self.weights)
        return tuple(tensors if self.shared is None else [*tensors, *self.shared.tensors()])

    def _of(self, tensors: Sequence[Tensor]) -> PackedBatch:
        """This batch with other `tensors`, in the order of that method."""
        ids, trained, targets, cu_seqlens, *more = tensors
        sequences = self.sequences
        if sequences is not None:
            sequences = replace(sequences, slots=more.pop(0))
        weights = None if self.weights is None else more.pop(0)
        return replace(
            self,
            input_ids=ids,
            trained=trained,
            targets=targets,
            cu_seqlens=cu_seqlens,
            sequences=sequences,
            weights=weights,
            shared=None if self.shared is None else SharedTokens(*more),
        )

    def with_shared(self, prompts: Sequence[int]) -> PackedBatch:
        """This batch, whose documents come in pairs, with the tokens held once that pairs share.

        prompts[n] is how many tokens the documents 2 n and 2 n + 1 begin with in common; none of
        them may be trained.
        """
        shared = SharedTokens(*prompts_shared(self.bounds, tuple(prompts)))
        return replace(
            self,
            input_ids=shared.taken(self.input_ids),
            trained=shared.source.index_select(0, self.trained),
            shared=shared,
        )

    def to(self, device: torch.device, ids_device: torch.device | None = None) -> PackedBatch:
        """The batch on `device`, its ids on `ids_device` if that is given.

        A batch in host memory goes to a GPU in one copy from pinned memory: the host does not wait.
        """
        ids_device = ids_device or device
        if has_streams(device) and all(part.is_cpu for part in self.tensors()):
            with_ids = ids_device.type == device.type
            return self.divided(upload(self.joined(with_ids), device), with_ids)
        ids, *rest = self.tensors()
        return self._of([_moved(ids, ids_device), *(_moved(part, device) for part in rest)])

    def joined(self, with_ids: bool = True) -> Tensor:
        """Everything in one tensor of int64, for one copy; the inverse is `divided`.

        Without ids they stay where they are.
        """
        parts = self._parts(with_ids)
        buffer = torch.zeros(_joined_length(parts), dtype=torch.int64)
        for part, view in zip(parts, _views(buffer, parts), strict=True):
            view.copy_(part)
        return buffer

    def joined_bytes(self) -> int:
        """What `joined` takes."""
        return 8 * _joined_length(self._parts(with_ids=True))

    def divided(self, buffer: Tensor, with_ids: bool = True) -> PackedBatch:
        """This batch as views of `buffer`, which is a copy of `joined`, on any device."""
        views = _views(buffer, self._parts(with_ids))
        return self._of(views if with_ids else [self.input_ids, *views])

    def _parts(self, with_ids: bool) -> tuple[Tensor, ...]:
        return self.tensors() if with_ids else self.tensors()[1:]


def _moved(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device) if x.is_cuda or x.device == device else upload(x, device)


def _words(part: Tensor) -> int:
    """Elements of eight bytes of a joined batch that a part takes."""
    words = -(-part.numel() * part.element_size() // 8)
    return -(-words // _ALIGNMENT) * _ALIGNMENT


def _joined_length(parts: Sequence[Tensor]) -> int:
    return sum(map(_words, parts))


def _views(buffer: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts' slices of a joined batch, each of its part's type and length."""
    views, start = [], 0
    for part in parts:
        end = start + _words(part)
        views.append(buffer[start:end].view(part.dtype)[: part.numel()])
        start = end
    return views


def _shifted(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The label of the next token of the same document (N,), -100 at the document's end."""
    targets = torch.full_like(labels, -100)
    targets[:-1] = labels[1:]
    targets[cu_seqlens[1:].long() - 1] = -100
    return targets


def batch_positions(batch: PackedBatch) -> Tensor:
    """The position (N,) of every token of the whole batch in its document."""
    bounds = batch.cu_seqlens
    starts = torch.repeat_interleave(
        bounds[:-1].long(), bounds.diff().long(), output_size=batch.bounds[-1]
    )
    positions = torch.arange(batch.bounds[-1], device=bounds.device) - starts
    return positions if batch.shared is None else batch.shared.taken(positions)
