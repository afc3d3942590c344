"""The choice of an attention back end without a device to try it on."""

import dataclasses

import torch

from kernels.attention import AttentionPlan, AttentionSettings, attention_forward
from kernels.attention.choice import select


def test_meta_tensors_pass_without_a_trial() -> None:
    q = torch.empty(196, 4, 64, dtype=torch.bfloat16, device="meta")
    boundaries = torch.tensor([0, 5, 135, 196], dtype=torch.int32)
    plan = AttentionPlan.from_cu_seqlens(boundaries, 196)
    settings = AttentionSettings(plan, None, 0.1)
    assert select(q, q, settings).name == "flash"
    assert select(q.float(), q, settings).name == "documents"
    out, saved = attention_forward(q, q, q, dataclasses.replace(settings, backend="flash"))
    assert out.shape == q.shape
    assert len(saved) == 3
