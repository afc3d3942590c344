"""Hand-written backward passes refuse to be differentiated again."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.attention import AttentionPlan, attention
from kernels.delta_net import gated_delta
from kernels.delta_net.causal_conv1d import causal_conv1d
from kernels.delta_net.gated_rms_norm import gated_rms_norm
from kernels.elementwise.rms_norm import rms_norm
from kernels.elementwise.rope import rope
from kernels.elementwise.swiglu import swiglu
from kernels.linear.lora import lora_linear
from kernels.linear.projection import Projection
from kernels.linear.swiglu_mlp import lora_mlp
from kernels.loss.linear_cross_entropy import linear_cross_entropy
from kernels.loss.linear_preference import sequence_log_probs
from kernels.moe.experts import MixtureOfExperts, mixture_of_experts
from kernels.moe.grouped_matmul import ExpertProjection
from kernels.nf4 import quantize
from kernels.nf4.matmul import nf4_linear

ROOT = Path(__file__).parents[2]
PLAN = AttentionPlan.from_cu_seqlens(torch.tensor([0, 3, 8], dtype=torch.int32), 8)
FLAT, HEADS, GATES = torch.ones(8, 64), torch.ones(8, 2, 16), torch.ones(8, 2)
MATRIX = Projection(torch.ones(64, 64))
MIXTURE = MixtureOfExperts(
    Projection(torch.eye(4, 64)),
    (ExpertProjection(torch.ones(4, 32, 64)),),
    ExpertProjection(torch.ones(4, 64, 16)),
    2,
    True,
)

OPS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "attention": (lambda x: attention(x, x, x, PLAN), HEADS),
    "gated_delta": (lambda x: gated_delta(x, x, x, GATES, GATES, PLAN)[0], HEADS),
    "causal_conv1d": (lambda x: causal_conv1d(x, torch.ones(64, 4), PLAN), FLAT),
    "gated_rms_norm": (lambda x: gated_rms_norm(x, x, torch.ones(64)), FLAT),
    "rms_norm": (lambda x: rms_norm(x, torch.ones(64)), FLAT),
    "rope": (lambda x: rope(x, torch.ones(8, 8), torch.ones(8, 8)), HEADS),
    "swiglu": (lambda x: swiglu(x, x), FLAT),
    "lora_linear": (lambda x: lora_linear(x, MATRIX), FLAT),
    "lora_mlp": (lambda x: lora_mlp(x, MATRIX, MATRIX, MATRIX), FLAT),
    "mixture_of_experts": (lambda x: mixture_of_experts(x, MIXTURE)[0], FLAT),
    "nf4_linear": (lambda x: nf4_linear(x, quantize(torch.ones(64, 64))), FLAT),
    "linear_cross_entropy": (
        lambda x: linear_cross_entropy(x, torch.ones(9, 64), torch.arange(8)),
        FLAT,
    ),
    "sequence_log_probs": (
        lambda x: sequence_log_probs(
            x, torch.ones(9, 64), torch.arange(8), torch.arange(8), (2, 4)
        ),
        FLAT,
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_a_second_backward_pass_raises(name: str) -> None:
    op, values = OPS[name]
    x = values.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _backward_passes(path: Path) -> Iterator[ast.FunctionDef]:
    """The backward methods of the autograd functions in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and "Function" in map(_last_name, node.bases):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "backward":
                    yield method


def test_every_function_of_the_product_is_once_differentiable() -> None:
    methods = [
        (path, method)
        for folder in ("kernels", "models", "optim", "engine")
        for path in sorted(ROOT.joinpath(folder).rglob("*.py"))
        for method in _backward_passes(path)
    ]
    assert len(methods) >= len(OPS)
    for path, method in methods:
        marks = [_last_name(decorator) for decorator in method.decorator_list]
        assert "once_differentiable" in marks, f"{path}, line {method.lineno}"
