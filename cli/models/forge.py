"""`engine forge`: prune, fine-tune, judge what was saved, cycle after cycle."""

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.explain import Setting
from engine.config.sources import build
from engine.config.tasks.pruning import ForgeJob
from engine.config.train_config import TrainConfig

_SHARED = ("model", "data", "eval_data")


def forge_model(call: Call) -> None:
    """Prune heads, fine-tune what is left, merge, and judge the saved model; cycle after cycle.

    KEY=VALUE words also say how to fine-tune, as for `engine train`: max_steps=100 lora_rank=16.

    Held-out perplexity is that of models read back from the disk. A cycle that makes the model
    worse by more than 10 % and 1.0 is the last. A job that was stopped goes on with --resume.
    """
    call.given.update(_as_forge_has_it(call.given))
    job = call.read(ForgeJob)
    own = ForgeJob.model_fields.keys() - set(_SHARED)
    given = {"data": Setting(["-"], "--domain")}
    given |= {key: value for key, value in call.given.items() if key not in own}
    training = build(TrainConfig, given)
    from engine.forging.report import PLOT, draw, samples, table
    from engine.verbs.models.forge import forge

    results = forge(job.settings(training), resume=job.resume)
    draw(results, job.output_dir / PLOT)
    if call.print_json(results):
        return
    if job.samples:
        say(samples(results), end="\n\n")
    say(table(results))
    if results["stopped"]:
        say(results["stopped"])
    if results["verdict"] is not None:
        say(results["verdict"]["text"])
    say(f"Model: {results['model']}")


def _as_forge_has_it(given: dict[str, Setting]) -> dict[str, Setting]:
    """Values that a training's file has and a job of forge says otherwise.

    A run that holds nothing out says `heldout: 0`, and one that goes on where it can says
    `resume: auto`, or null.
    """
    changed = {}
    share, resume = given.get("heldout"), given.get("resume")
    if share is not None and not share.source.startswith("--") and share.value in (0, None):
        changed["heldout"] = Setting(ForgeJob.model_fields["heldout"].default, share.source)
    if resume is not None and resume.value in (None, "auto"):
        changed["resume"] = Setting(resume.value == "auto", resume.source)
    return changed


app = make_app((Verb("forge", (ForgeJob,), also=(TrainConfig,), presets=True), forge_model))
