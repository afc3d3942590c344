"""Rules between the settings of every run, and with its model."""

from engine.config.rules.rule import Rule

TIED_EMBEDDING = Rule(
    "embedding_on",
    lambda c, f: c.embedding_on == "host" and f.tied is True,
    "This model's embedding is its output head too, which every token reads, so it cannot stay on "
    "the host.",
    "Leave out --embedding-on host; --head-precision 8bit halves it",
)

RUN_RULES = (
    Rule(
        "warmup_steps",
        lambda c, _: c.warmup_ratio is not None and c.warmup_steps is not None,
        "warmup_ratio and warmup_steps give the same length twice.",
        "Set one of them, not both",
    ),
    Rule(
        "heldout",
        lambda c, _: bool(c.eval_data) and c.heldout > 0,
        "eval_data and heldout both say which rows are held out.",
        "Set one of them, not both",
    ),
    Rule(
        "eval_every",
        lambda c, _: c.eval_every > 0 and not c.eval_data and not c.heldout,
        "eval_every {c.eval_every} evaluates held-out rows, and there are none.",
        "Give --eval-data FILE or --heldout 0.1, or leave out --eval-every",
    ),
    Rule(
        "teacher",
        lambda c, _: c.teacher is not None and c.every_weight,
        "teacher needs a frozen head, and method {c.method} trains it.",
        "Give method lora or qlora",
    ),
    Rule(
        "teacher",
        lambda c, _: c.teacher is not None and c.memory_budget is not None,
        "memory_budget does not count what a teacher takes.",
        "Set one of them",
    ),
    Rule(
        "init_adapter",
        lambda c, _: c.every_weight and c.init_adapter is not None,
        "init_adapter needs method lora or qlora, and method is {c.method}.",
        "Leave it out, or change the method",
    ),
    Rule(
        "use_dora",
        lambda c, _: c.every_weight and c.use_dora,
        "use_dora needs method lora or qlora, and method is {c.method}.",
        "Leave it out, or change the method",
    ),
    Rule(
        "head_precision",
        lambda c, _: c.every_weight and c.head_precision == "8bit",
        "head_precision 8bit is for a frozen head, and method {c.method} trains it.",
        "Leave it out, or give method lora or qlora",
    ),
    Rule(
        "embedding_on",
        lambda c, _: c.every_weight and c.embedding_on == "host",
        "embedding_on host is for a frozen head and embedding, and method {c.method} trains them.",
        "Leave it out, or give method lora or qlora",
    ),
    TIED_EMBEDDING,
    Rule(
        "optimizer_in_backward",
        lambda c, _: c.optimizer_in_backward and not c.every_weight,
        "optimizer_in_backward is for method full, and it is {c.method}: an adapter's gradients "
        "are too small to be worth it.",
        "Leave it out, or train with --method full",
    ),
    Rule(
        "optimizer_in_backward",
        lambda c, _: c.optimizer_in_backward and (c.max_grad_norm > 0 or c.accumulate > 1),
        "optimizer_in_backward was given with max_grad_norm {c.max_grad_norm:g} and accumulate "
        "{c.accumulate}. It moves a layer before the gradients of the others are there, so it can "
        "neither clip by the norm of all of them nor add them up over micro-batches.",
        "Give --max-grad-norm 0 --accumulate 1, or leave it out",
    ),
    Rule(
        "optimizer_in_backward",
        lambda c, f: c.optimizer_in_backward and "float16" in (c.dtype, f.dtype),
        "optimizer_in_backward was given for a run that computes in float16, whose gradients need "
        "a loss scale: a step that overflows is done again at a lower one, and part of the weights "
        "would have moved by then.",
        "Give --dtype bfloat16 or float32, or leave it out",
    ),
    Rule(
        "offload",
        lambda c, _: "weights" in c.offload and (c.method != "qlora" or c.use_dora),
        "offload weights streams NF4 weights.",
        "Give method qlora without use_dora, or leave it out",
    ),
    Rule(
        "keep_decoded",
        lambda c, _: c.keep_decoded not in ("auto", "none", "0") and c.method != "qlora",
        "keep_decoded {c.keep_decoded} is for weights in NF4, and method is {c.method}.",
        "Leave it out, or give method qlora",
    ),
    Rule(
        "keep_decoded",
        lambda c, _: (
            c.keep_decoded not in ("auto", "none", "0")
            and (c.low_memory_decode or "weights" in c.offload)
        ),
        "keep_decoded {c.keep_decoded} was given with low_memory_decode or offload weights, which "
        "save the very memory that it spends.",
        "Leave out one or the other",
    ),
    Rule(
        "cuda_graphs",
        lambda c, _: c.cuda_graphs and c.every_weight,
        "cuda_graphs keeps the gradients of the layers at fixed addresses all the time, which only "
        "an adapter's are small enough for.",
        "Give method lora or qlora, not full",
    ),
    Rule(
        "cuda_graphs",
        lambda c, _: c.cuda_graphs and bool(c.offload),
        "cuda_graphs was given with {offload}. Recorded launches need memory at addresses that "
        "stay.",
        "Leave out one or the other",
    ),
    Rule(
        "cuda_graphs",
        lambda c, _: c.cuda_graphs and c.memory_budget is not None,
        "cuda_graphs was given with memory_budget. Recorded launches hold memory of their own.",
        "Leave out one or the other",
    ),
    Rule(
        "cuda_graphs",
        lambda c, f: c.cuda_graphs and f.device not in (None, "cuda"),
        "--cuda-graphs was given for a run on the {f.device}, which has none.",
        "Leave it out, or train on a GPU with --device cuda",
    ),
    Rule(
        "cuda_graphs",
        lambda c, f: c.cuda_graphs and f.recordable is False,
        "--cuda-graphs was given for a {f.model_type} model, none of whose layers has sizes that "
        "stay: those within mixtures of experts, and the documents of Gated DeltaNet, change with "
        "every batch.",
        "Leave it out",
    ),
    Rule(
        "resume",
        lambda c, _: c.resume == "auto" and c.output_dir is None and c.run_id is None,
        "resume auto needs output_dir or run_id, to know which run goes on.",
        "Give one of them",
    ),
    Rule(
        "resume",
        lambda c, _: c.resume is not None and c.overwrite,
        "resume goes on with a run and overwrite replaces it.",
        "Set one of them",
    ),
)
