"""`engine train`: fine-tune a model by the settings of `TrainConfig`."""

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.sources import build
from engine.config.tasks.workflow import TrainOptions
from engine.config.train_config import TrainConfig
from engine.runs.startup import importing

# The run directory's own log shows its lines on the console.
OPENS_LOG = True


def train(call: Call) -> int:
    """Fine-tune a model: NF4 base with LoRA (qlora), 16-bit base with LoRA (lora), or every weight.

    Settings come from --preset, then the file, then flags, then KEY=VALUE words; the last wins.
    With --resume RUN they come from that run first.
    """
    return run_training(call)


def run_training(call: Call) -> int:
    """Train, or show what would be trained, as `call` asks; returns the exit status."""
    from engine.runs.stored import resumed

    settings = build(TrainConfig, resumed(call.given))
    with importing():
        from engine.distributed.group import leads
        from engine.verbs.training import train as run

    options = call.read(TrainOptions)
    if options.lr_find:
        return _find_rate(settings, options)
    if options.dry_run:
        from engine.runs.logs import RunLog

        log = RunLog("WARNING")
        try:
            say(run.dry_run(settings))
        finally:
            log.close()
        return 0
    result = run.train(settings)
    if not leads():
        return 0
    if result.adapter_path is not None:
        say(f"Trained adapter saved to: {result.adapter_path}")
    if result.pushed:
        say(f"Sent to: {result.pushed}")
    say("Next:", *result.next, sep="\n  ")
    return 0 if result.status == "Success" else 1


def _find_rate(settings: TrainConfig, options: TrainOptions) -> int:
    """Suggest a learning rate, and the command that trains with it."""
    from engine.config.tasks.commands import train_command
    from engine.verbs.training.lr_find import lr_find

    rates = options.lr_find_min, options.lr_find_max
    curve = lr_find(settings, steps=options.lr_find_steps, rates=rates)
    say(curve.text())
    say(f"Written: {', '.join(str(path) for path in (curve.path, curve.figure) if path)}")
    if curve.suggestion is None:
        return 1
    say("Next:", train_command(settings, learning_rate=curve.suggestion), sep="\n  ")
    return 0


app = make_app((Verb("train", (TrainOptions, TrainConfig), presets=True, json=False), train))
