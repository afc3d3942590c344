"""torch's CUDA attention functions, emulated on a CPU from their documented meaning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Emulation:
    """torch's CUDA functions by a dense masked softmax; `skew` shifts every window by so much."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.skew = 0
        self.leak = False

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """P (H, N, N) in float64, out (N, H, D), log-sum-exp (H, N); q, k, v (N, H or Hkv, D)."""
        position = torch.arange(q.shape[0])
        document = torch.bucketize(position, cu.long(), right=True)
        distance = position.unsqueeze(1) - position.unsqueeze(0)
        sees = distance >= 0
        if not self.leak:
            sees = sees & (document.unsqueeze(1) == document.unsqueeze(0))
        if window is not None:
            sees = sees & (distance < window + self.skew)
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1).double() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
        scores = scores.masked_fill(~sees, float("-inf"))
        p = scores.softmax(-1)
        out = torch.einsum("hqk,khd->qhd", p, v)
        return p, out.to(q.dtype), scores.logsumexp(-1).float()

    def forward(self, *given: Any) -> tuple[Tensor, Tensor]:
        return self.dense(*given)[1:]

    def gradients(
        self, do: Tensor, out: Tensor, lse: Tensor, given: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv by the formulas of `kernels.attention`: autograd is off down here."""
        q, k, v, scale = *given[:3], given[5]
        p, again, again_lse = self.dense(*given)
        assert torch.equal(out, again), "backward got another output than forward gave"
        assert torch.equal(lse, again_lse), "backward got another log-sum-exp than forward gave"
        groups = q.shape[1] // k.shape[1]
        wide_k, wide_v = (x.repeat_interleave(groups, 1).double() for x in (k, v))
        wide_do = do.double()
        dp = torch.einsum("qhd,khd->hqk", wide_do, wide_v)
        rows = torch.einsum("qhd,hqk,khd->hq", wide_do, p, wide_v)
        ds = p * (dp - rows.unsqueeze(-1)) * scale
        dq = torch.einsum("hqk,khd->qhd", ds, wide_k)
        dk = torch.einsum("hqk,qhd->khd", ds, q.double()).unflatten(1, (-1, groups)).sum(2)
        dv = torch.einsum("hqk,qhd->khd", p, wide_do).unflatten(1, (-1, groups)).sum(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    @staticmethod
    def window(is_causal: bool, left: int, right: int) -> int | None:
        assert right == 0
        assert is_causal == (left < 0)
        return None if left < 0 else left + 1

    @staticmethod
    def check_boundaries(cu: Tensor, longest: int) -> None:
        assert cu.dtype == torch.int32
        lengths = cu.diff()
        known = bool((lengths > 0).all())
        assert longest == int(lengths.max()) if known else longest > int(lengths.max())

    def flash_forward(self, q, k, v, cu_q, cu_k, max_q, max_k, p, causal, debug, **options):  # type: ignore[no-untyped-def]
        self.calls.append("flash_forward")
        self.check_boundaries(cu_q, max_q)
        assert p == 0.0
        window = self.window(causal, options["window_size_left"], options["window_size_right"])
        out, lse = self.forward(q, k, v, cu_q, window, options["scale"])
        return out, lse, torch.tensor([7, 8]), torch.tensor(9), torch.ones(0)

    def flash_backward(  # type: ignore[no-untyped-def]
        self, do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, p, causal, state, unused, **options
    ):
        self.calls.append("flash_backward")
        assert state.tolist() == [7, 8]
        assert int(unused) == 9
        window = self.window(causal, options["window_size_left"], options["window_size_right"])
        return self.gradients(do, out, lse, (q, k, v, cu_q, window, options["scale"]))

    def efficient_forward(  # type: ignore[no-untyped-def]
        self, q, k, v, bias, cu_q, cu_k, max_q, max_k, p, mask, with_lse, **options
    ):
        self.calls.append("efficient_forward")
        self.check_boundaries(cu_q, max_q)
        assert q.shape[0] == k.shape[0] == 1
        assert q.shape[2] == k.shape[2]
        assert (bias, p, mask, with_lse) == (None, 0.0, 1, True)
        window, scale = options.get("window_size"), options["scale"]
        out, lse = self.forward(q[0], k[0], v[0], cu_q, window, scale)
        return out.unsqueeze(0), lse, torch.tensor(7), torch.tensor(8), max_q, max_k

    def efficient_backward(  # type: ignore[no-untyped-def]
        self, do, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, p, seed, offset, mask,
        bias_grad, **options,
    ):  # fmt: skip
        self.calls.append("efficient_backward")
        assert (int(seed), int(offset), mask, bias_grad) == (7, 8, 1, False)
        given = (q[0], k[0], v[0], cu_q, options.get("window_size"), options["scale"])
        grads = self.gradients(do[0], out[0], lse, given)
        return *(g.unsqueeze(0) for g in grads), torch.ones(0)

    def cudnn_forward(self, q, k, v, bias, with_lse, p=0.0, causal=False, debug=False, *, scale):  # type: ignore[no-untyped-def]
        self.calls.append("cudnn_forward")
        assert (bias, with_lse, p, causal) == (None, True, 0.0, True)
        documents, _, tokens, _ = q.shape
        cu = torch.arange(documents + 1) * tokens
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        out, lse = self.forward(*flat, cu, None, scale)
        out = out.unflatten(0, (documents, tokens)).transpose(1, 2).contiguous()
        return out, lse, None, None, tokens, tokens, torch.tensor(7), torch.tensor(8), None

    def cudnn_backward(  # type: ignore[no-untyped-def]
        self, do, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, p, causal, *,
        scale,
    ):  # fmt: skip
        self.calls.append("cudnn_backward")
        assert (int(seed), int(offset), p, causal) == (7, 8, 0.0, True)
        assert max_q == max_k == q.shape[2]
        documents, _, tokens, _ = q.shape
        cu = torch.arange(documents + 1) * tokens
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (do, q, k, v, out)]
        grads = self.gradients(flat[0], flat[4], lse, (*flat[1:4], cu, None, scale))
        return tuple(g.unflatten(0, (documents, tokens)).transpose(1, 2) for g in grads)

    def cudnn_varlen_forward(  # type: ignore[no-untyped-def]
        self, q, k, v, bias, cu_q, cu_k, max_q, max_k, with_lse, p=0.0, causal=False, debug=False,
        *, scale,
    ):  # fmt: skip
        self.calls.append("cudnn_varlen_forward")
        assert (bias, with_lse, p, causal, debug) == (None, True, 0.0, True, False)
        self.check_padding(cu_q, max_q)
        out, lse = self.forward(q, k, v, cu_q, None, scale)
        return out, lse, cu_q, cu_k, max_q, max_k, torch.tensor(7), torch.tensor(8), torch.ones(0)

    def cudnn_varlen_backward(  # type: ignore[no-untyped-def]
        self, do, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, p, causal, *,
        scale,
    ):  # fmt: skip
        self.calls.append("cudnn_varlen_backward")
        assert (int(seed), int(offset), p, causal) == (7, 8, 0.0, True)
        self.check_padding(cu_q, max_q)
        return self.gradients(do, out, lse, (q, k, v, cu_q, None, scale))

    @staticmethod
    def check_padding(cu: Tensor, longest: int) -> None:
        """Few different numbers of documents and longest lengths: cuDNN plans for each."""
        documents = cu.numel() - 1
        assert documents & (documents - 1) == 0
        assert longest & (longest - 1) == 0
        assert longest >= int(cu.diff().max())
        assert int(cu.diff().min()) >= 0
