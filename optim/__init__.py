"""Optimizers, parameter groups, clipping and the learning-rate schedule."""

from optim.adafactor import Adafactor
from optim.adamw8bit import AdamW8bit
from optim.clip import clip_grad_norm
from optim.in_backward import StepInBackward
from optim.interface import StepOptimizer
from optim.lion8bit import Lion8bit
from optim.lr_schedule import ScheduleShape, lr_at
from optim.muon import Muon
from optim.param_groups import param_groups

__all__ = [
    "Adafactor",
    "AdamW8bit",
    "Lion8bit",
    "Muon",
    "ScheduleShape",
    "StepInBackward",
    "StepOptimizer",
    "clip_grad_norm",
    "lr_at",
    "param_groups",
]
