"""`engine train`: fine-tune a model by the settings of `TrainConfig`."""

from cli.from_settings import Call, Verb, make_app
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
        from engine.verbs.training import train as run

    if call.read(TrainOptions).dry_run:
        from engine.runs.logs import RunLog

        log = RunLog("WARNING")
        try:
            print(run.dry_run(settings))
        finally:
            log.close()
        return 0
    result = run.train(settings)
    if result.adapter_path is not None:
        print(f"Trained adapter saved to: {result.adapter_path}")
    if result.pushed:
        print(f"Sent to: {result.pushed}")
    print("Next:", *result.next, sep="\n  ")
    return 0 if result.status == "Success" else 1


app = make_app((Verb("train", (TrainOptions, TrainConfig), presets=True, json=False), train))
