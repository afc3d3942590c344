"""Rules between the settings of several processes and the others."""

from engine.config.rules.rule import Rule

DISTRIBUTED_RULES = (
    Rule(
        "gpus",
        lambda c, _: c.gpus > 1 and c.optimizer_in_backward,
        "optimizer_in_backward moves a layer before the gradients of the {c.gpus} processes could "
        "be added up.",
        "Leave one of them out",
    ),
    Rule(
        "gpus",
        lambda c, _: c.gpus > 1 and c.cuda_graphs,
        "cuda_graphs repeats launches with gradients at fixed addresses, and {c.gpus} processes "
        "keep gradients in buckets.",
        "Leave one of them out",
    ),
    Rule(
        "gpus",
        lambda c, _: c.gpus > 1 and "-" in c.data,
        "data - is standard input, which one process alone can read, and gpus is {c.gpus}.",
        "Write the rows to a file first",
    ),
    Rule(
        "max_restarts",
        lambda c, _: c.max_restarts > 0 and c.gpus == 1,
        "max_restarts {c.max_restarts} starts processes again that --gpus started, and gpus is 1.",
        "Give --gpus N, or torchrun's own --max-restarts",
    ),
)
