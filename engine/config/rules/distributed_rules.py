"""Rules between the settings of several processes and the others."""

from engine.config.rules.rule import Facts, Rule, RunSettings


def _several(settings: RunSettings, facts: Facts) -> bool:
    """Whether processes train together, started by --gpus or by torchrun."""
    return max(settings.gpus, facts.processes or 1) > 1


DISTRIBUTED_RULES = (
    Rule(
        "optimizer_in_backward",
        lambda c, f: c.optimizer_in_backward and _several(c, f),
        "optimizer_in_backward moves a layer before the gradients of several processes could be "
        "added up.",
        "Leave it out, or train with one process",
    ),
    Rule(
        "cuda_graphs",
        lambda c, f: c.cuda_graphs and _several(c, f),
        "cuda_graphs repeats launches with gradients at fixed addresses, and several processes "
        "have theirs in buckets.",
        "Leave it out, or train with one process",
    ),
    Rule(
        "gpus",
        lambda c, f: _several(c, f) and "-" in c.data,
        "data - is standard input, which one process alone can read.",
        "Write the rows to a file first",
    ),
    Rule(
        "max_restarts",
        lambda c, _: c.max_restarts > 0 and c.gpus == 1,
        "max_restarts {c.max_restarts} starts processes again that --gpus started, and gpus is 1.",
        "Give --gpus N, or torchrun's own --max-restarts",
    ),
)
