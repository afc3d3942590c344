"""engine eval --tasks: scores in tasks of the LM Evaluation Harness."""

from __future__ import annotations

from engine.config.tasks.inference import EvalSettings
from engine.harness.tasks import TaskResults, run_tasks, task_manager
from engine.inference.generation import stop_ids_of
from engine.inference.perplexity import TOKENS_PER_BATCH
from engine.model_sources.adapter_path import adapter_path
from engine.verbs.models.evaluate import loaded


def evaluate_tasks(settings: EvalSettings) -> TaskResults:
    """Scores of a model in the tasks that `settings` name.

    Inputs hold at most as many tokens as the model was made for, or `max_length` where that is
    given and less. Raises `ConfigError` where the harness is not installed or a task or its data is
    not there, `CheckpointError` as loading does.
    """
    manager = task_manager(settings)
    from engine.harness.language_model import HarnessModel

    with loaded(settings) as model:
        source, tokenizer = model.source, model.tokenizer
        adapters = [adapter_path(path) for path, _ in settings.adapter]
        window = source.config.max_position_embeddings
        if "max_length" in settings.model_fields_set:
            window = min(window, settings.max_length)
        bound = settings.batch_size
        asked = HarnessModel(
            model.decoder,
            tokenizer,
            stop_ids_of(source, tokenizer, *adapters),
            window,
            settings.chat_template_kwargs,
            bound * window if bound else TOKENS_PER_BATCH,
        )
        return run_tasks(asked, settings, manager)
