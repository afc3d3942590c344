"""Plans whose documents the host does not know."""

import pytest
import torch

from kernels.attention.documents import AttentionPlan, AttentionSettings
from kernels.attention.table import BACKENDS


def test_only_the_device_knows_the_documents_of_an_open_plan() -> None:
    plan = AttentionPlan.within(torch.tensor([0, 5, 9, 9], dtype=torch.int32), longest=8)
    assert (plan.count, plan.longest, plan.equal_length) == (3, 8, None)
    with pytest.raises(RuntimeError, match="flash or efficient"):
        plan.documents()
    settings = AttentionSettings(plan, None, 0.2)
    q = torch.empty(9, 4, 32, dtype=torch.bfloat16)
    assert not BACKENDS["documents"].suits(q, q[:, :2], settings)
    assert not BACKENDS["cudnn"].suits(q, q[:, :2], settings)
    assert BACKENDS["flash"].suits(q, q[:, :2], settings)
