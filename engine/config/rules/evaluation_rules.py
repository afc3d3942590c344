"""Rules between the settings of evaluations while training."""

from engine.config.rules.rule import Rule

EVALUATION_RULES = (
    Rule(
        "eval_ema",
        lambda c, _: c.eval_ema and c.ema_decay is None,
        "eval_ema evaluates averaged weights, and ema_decay, which averages them, is not set.",
        "Give --ema-decay 0.999, or leave out --eval-ema",
    ),
    Rule(
        "save_best",
        lambda c, _: c.best_metric is not None and not c.eval_every,
        "The best checkpoint and early stopping go by {c.best_metric} of evaluations while the run "
        "trains, and eval_every is 0.",
        "Give --eval-every N with --eval-data FILE or --heldout 0.1, or leave out --save-best, "
        "--early-stopping and --load-best-at-end",
    ),
    Rule(
        "sample_every",
        lambda c, _: c.sample_every > 0 and c.sample_prompts is None,
        "sample_every {c.sample_every} answers prompts, and there are none.",
        "Give --sample-prompts FILE, or leave out --sample-every",
    ),
    Rule(
        "sample_prompts",
        lambda c, _: c.sample_prompts is not None and not c.sample_every,
        "sample_prompts {c.sample_prompts} would never be answered: sample_every is 0.",
        "Give --sample-every N, or leave out --sample-prompts",
    ),
)
