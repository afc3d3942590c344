"""Weight decay applies to matrices and to nothing else, and only to what trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optim import AdamW8bit, param_groups
from optim.param_groups import plus_ratio


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.input_layernorm = nn.LayerNorm(4)
        self.lora_A = nn.Parameter(torch.zeros(2, 4))
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


def test_norms_biases_and_vectors_do_not_decay() -> None:
    block = Block()
    decayed, exempt = param_groups(block, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert exempt["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(block.lora_A), id(block.q_proj.weight)]
    rest = (block.q_proj.bias, block.input_layernorm.weight, block.input_layernorm.bias)
    assert [id(p) for p in exempt["params"]] == [id(p) for p in rest]


def test_matrices_b_and_vectors_learn_faster_under_lora_plus() -> None:
    block = Block()
    block.lora_B = nn.Parameter(torch.zeros(4, 2))
    named = {id(p): name for name, p in block.named_parameters()}
    groups = param_groups(block, 0.1, lambda name, p: plus_ratio(name, p, 16.0))
    shown = [
        (sorted(named[id(p)] for p in g["params"]), g["weight_decay"], g.get("lr_ratio"))
        for g in groups
    ]
    assert shown == [
        (["lora_A", "q_proj.weight"], 0.1, None),
        (["lora_B"], 0.1, 16.0),
        (["input_layernorm.bias", "input_layernorm.weight", "q_proj.bias"], 0.0, 16.0),
    ]


def test_a_norm_stored_as_a_matrix_does_not_decay() -> None:
    named = [
        ("model.norm.weight", nn.Parameter(torch.zeros(1, 4))),
        ("mixer.bias", nn.Parameter(torch.zeros(2, 2))),
        ("up_proj.weight", nn.Parameter(torch.zeros(2, 2))),
    ]
    decayed, exempt = param_groups(named)
    assert [id(p) for p in decayed["params"]] == [id(named[2][1])]
    assert len(exempt["params"]) == 2


def test_a_shared_parameter_counts_once_and_empty_groups_are_left_out() -> None:
    shared = nn.Parameter(torch.zeros(2, 2))
    groups = param_groups([("embed.weight", shared), ("lm_head.weight", shared)])
    assert len(groups) == 1
    assert len(groups[0]["params"]) == 1
    AdamW8bit(groups)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to optimise"):
        param_groups([("a", nn.Parameter(torch.zeros(2), requires_grad=False))])
