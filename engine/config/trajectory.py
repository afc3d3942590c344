"""Which settings decide what a run learns, and which do not."""

from engine.config.publishing import Publishing
from engine.config.training.distributed import DistributedSettings
from engine.config.training.evaluation import EvaluationSettings

# Settings that change where a run writes or what it shows, and never what it learns.
NOT_TRAJECTORY = frozenset(
    {
        "output_dir",
        "run_id",
        "resume",
        "overwrite",
        "keep_checkpoints",
        "checkpoint_every",
        "reference_cache",
        "report_to",
        "log_level",
        "log_every",
        "memory_budget",
        "fit_memory",
        "keep_decoded",
        "embedding_on",
        "offload",
        "optimizer_in_backward",
        "plot",
        "token_cache",
        *EvaluationSettings.model_fields,
        *DistributedSettings.model_fields,
        *Publishing.model_fields,
    }
)
# What the digests of a run's manifest say more of than a name can, and how long a run is.
KNOWN_OTHERWISE = frozenset(
    {
        "add_tokens",  # the tokenizer's digest says which they are
        "bad_lines",  # rows that it leaves out would have ended the run
        "max_row_bytes",
        "data",
        "epochs",
        "eval_data",
        "eval_query",
        "init_adapter",
        "max_steps",
        "model",
        "query",
        "reference",
        "revision",
        "teacher",
        "tokenizer",
        "template_date",
        "threads",
    }
)
