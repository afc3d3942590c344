"""Rules between the settings of several processes and the others."""

from engine.config.data_names.given_rows import PREFIX
from engine.config.rules.rule import Facts, Rule, RunSettings


def _several(settings: RunSettings, facts: Facts) -> bool:
    """Whether processes train together, started by --gpus or by torchrun."""
    return max(settings.gpus, facts.processes or 1) > 1


def _divides_trained(settings: RunSettings) -> bool:
    """Whether processes divide the parameters that they train."""
    return settings.shard == "weights" and settings.every_weight


def _divides_processes(setting: str) -> Rule:
    """The rule that a number of processes that share something divides that of all."""

    def uneven(settings: RunSettings, facts: Facts) -> bool:
        count: int = getattr(settings, setting)
        size = max(settings.gpus, facts.processes or 1)
        return size > 1 and size % count != 0  # of one process another rule says more

    return Rule(
        setting,
        uneven,
        f"{setting} {{c.{setting}}} does not divide the number of processes.",
        "Start a multiple of it with --gpus, or torchrun's --nproc-per-node",
    )


_EXPERTS = (
    _divides_processes("expert_parallel"),
    Rule(
        "expert_parallel",
        lambda c, f: c.expert_parallel > 1 and c.gpus == 1 and f.processes == 1,
        "expert_parallel {c.expert_parallel} divides experts among processes, and there is one.",
        "Give --gpus N, or start torchrun",
    ),
    Rule(
        "expert_parallel",
        lambda c, f: c.expert_parallel > 1 and f.experts == 0,
        "expert_parallel {c.expert_parallel} divides the experts of a mixture, and {c.model} has "
        "none.",
        "Leave it out",
    ),
    Rule(
        "expert_parallel",
        lambda c, f: bool(f.experts and f.experts % c.expert_parallel),
        "expert_parallel {c.expert_parallel} does not divide the {f.experts} experts of {c.model}.",
        "Give a number that divides them",
    ),
    Rule(
        "expert_parallel",
        lambda c, _: c.expert_parallel > 1 and c.every_weight,
        "expert_parallel divides experts whose weights are frozen, and method {c.method} trains "
        "every weight.",
        "Leave it out, or give method lora or qlora",
    ),
    Rule(
        "expert_parallel",
        lambda c, _: c.expert_parallel > 1 and c.mlp_tile_tokens is not None,
        "expert_parallel sends a batch's tokens to their experts at once, and mlp_tile_tokens "
        "{c.mlp_tile_tokens} would compute them in tiles.",
        "Leave one of them out",
    ),
    Rule(
        "expert_parallel",
        lambda c, _: c.expert_parallel > 1 and c.optimizer == "adafactor",
        "optimizer adafactor limits the update of all experts of a projection together, and "
        "expert_parallel divides them among processes.",
        "Give optimizer adamw8bit, adamw or lion8bit",
    ),
)

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
        lambda c, f: (
            _several(c, f) and any(name == "-" or name.startswith(PREFIX) for name in c.data)
        ),
        "data {c.data} is standard input, or rows of a Python program, which one process alone can "
        "read.",
        "Write the rows to a file first",
    ),
    Rule(
        "max_restarts",
        lambda c, _: c.max_restarts > 0 and c.gpus == 1,
        "max_restarts {c.max_restarts} starts processes again that --gpus started, and gpus is 1.",
        "Give --gpus N, or torchrun's own --max-restarts",
    ),
    _divides_processes("context_parallel"),
    Rule(
        "context_parallel",
        lambda c, f: c.context_parallel > 1 and c.gpus == 1 and f.processes == 1,
        "context_parallel {c.context_parallel} shares a batch's tokens among processes, and there "
        "is one.",
        "Give --gpus N, or start torchrun",
    ),
    *_EXPERTS,
    Rule(
        "shard",
        lambda c, f: c.shard != "none" and c.gpus == 1 and f.processes == 1,
        "shard {c.shard} divides weights among processes, and there is one.",
        "Give --gpus N, start torchrun, or use --offload weights",
    ),
    Rule(
        "shard",
        lambda c, _: _divides_trained(c) and c.optimizer in ("muon", "adafactor"),
        "shard weights with method {c.method} divides the parameters that are trained, and "
        "optimizer {c.optimizer} needs whole matrices.",
        "Give optimizer adamw8bit, adamw or lion8bit",
    ),
    Rule(
        "shard",
        lambda c, _: c.shard != "none" and c.keep_decoded.isdecimal() and int(c.keep_decoded) > 0,
        "shard {c.shard} gathers the stored weights of each layer, and keep_decoded "
        "{c.keep_decoded} would keep decoded ones.",
        "Leave one of them out",
    ),
    Rule(
        "shard",
        lambda c, _: c.shard != "none" and bool(c.saved_modules),
        "shard {c.shard} divides frozen weights, embedding and head among them, and "
        "modules_to_save or add_tokens train these.",
        "Leave out one or the other",
    ),
)
