"""`engine pipeline`: verbs in an order, each done once."""

from cli.from_settings import Call, Verb, make_app
from engine.config.tasks.workflow import PipelineSettings

OPENS_LOG = True


def run_pipeline(call: Call) -> int:
    """Run the stages of a file that have not been done, until one fails.

    FILE lists verbs with their settings. A pipeline that was stopped goes on where it was; a stage
    whose settings changed is done anew, with those after it. Ends with the status of the stage
    that failed: 3 for a gate.
    """
    settings = call.read(PipelineSettings)
    from engine.verbs.training.pipeline import pipeline, print_event, told

    result = pipeline(settings, print_event if settings.events == "jsonl" else told)
    return result.status


app = make_app((Verb("pipeline", (PipelineSettings,), words="file", json=False), run_pipeline))
