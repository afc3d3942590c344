"""`engine resume`: go on with a run, by what its directory says."""

from cli.from_settings import Call, Verb, make_app
from cli.training.train import run_training
from engine.config.explain import Setting
from engine.config.tasks.workflow import ResumeSettings, TrainOptions
from engine.config.train_config import TrainConfig

# The run directory's own log shows its lines on the console.
OPENS_LOG = True
_TABLES = (ResumeSettings, TrainOptions, TrainConfig)


def resume(call: Call) -> int:
    """Go on with a run that was stopped or killed: RUN is its directory, or its name under runs/.

    All settings come from the run; options that do not change what is learnt may be given anew.
    """
    call.given["resume"] = Setting(call.read(ResumeSettings).run, "RUN")
    return run_training(call)


app = make_app(
    (Verb("resume", _TABLES, words="run", json=False, optional=("model", "data")), resume)
)
