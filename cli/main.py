"""The command line: `engine VERB ...`.

A verb is a module with a typer application named `app`, imported only when the verb is used, so
that help and a mistyped verb are answered at once and without torch.

Exit status: 0 done; 1 a fault of the program; 2 something the user can put right, told in one
paragraph; 128 + n stopped by signal n. Tracebacks go to a log file and not to the terminal, unless
ENGINE_TRACEBACK=1 asks for them.
"""

import difflib
import errno
import importlib
import logging
import os
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from cli.interrupts import INTERRUPTS
from cli.streams import open_streams
from engine.errors import is_out_of_memory
from engine.runs.startup import importing, leave_quickly

VERBS: dict[str, tuple[str, str]] = {
    "train": ("cli.training.train", "fine-tune a model: QLoRA, LoRA or every weight"),
    "resume": ("cli.training.resume", "go on with a run that was stopped"),
    "sweep": ("cli.training.sweep", "runs with several values of their settings"),
    "compare": ("cli.training.compare", "runs side by side: settings, curves, figures"),
    "init": ("cli.training.init", "write a configuration for a model, rows and a GPU"),
    "plan": ("cli.training.plan", "what a run will need, before it allocates anything"),
    "eval": ("cli.models.eval", "perplexity of a model, with or without an adapter"),
    "generate": ("cli.models.generate", "answer a prompt"),
    "chat": ("cli.models.chat", "talk with a model, its adapter on, off or compared"),
    "serve": ("cli.models.serve", "an HTTP server that speaks OpenAI's interface"),
    "merge": ("cli.models.merge", "write a model with an adapter merged into its weights"),
    "quantize": ("cli.models.quantize", "write a model in 4, 8 or 16 bits"),
    "export": ("cli.models.export", "write a model or adapter for llama.cpp and Ollama"),
    "prune": ("cli.models.prune", "remove the least important attention heads"),
    "forge": ("cli.models.forge", "prune, fine-tune and judge, cycle after cycle"),
    "pipeline": ("cli.tools.pipeline", "verbs in an order, each done once: data, train, gates"),
    "data": ("cli.tools.data", "check, show and make training data"),
    "bench": ("cli.tools.bench", "time the kernels against this machine's limits"),
    "board": ("cli.training.board", "runs in a browser: curves, samples, rows, pruned heads"),
    "status": ("cli.training.status", "how far a run is, and whether it is alive"),
    "import-config": ("cli.training.import_config", "another trainer's settings as ours"),
    "doctor": ("cli.tools.doctor", "what this machine and installation can do"),
}

# What other programs call the verbs.
_OTHER_NAMES = {
    **dict.fromkeys(("finetune", "fine_tune", "sft", "fit", "learn", "lora", "qlora"), "train"),
    **dict.fromkeys(("evaluate", "evaluation", "perplexity", "test", "score"), "eval"),
    **dict.fromkeys(("infer", "inference", "run", "predict", "ask", "complete"), "generate"),
    **dict.fromkeys(("talk", "repl", "converse", "interactive"), "chat"),
    **dict.fromkeys(("server", "api", "openai", "deploy", "host", "listen"), "serve"),
    **dict.fromkeys(("fuse", "merge_lora", "merge_adapter", "save"), "merge"),
    **dict.fromkeys(("quantise", "bnb", "nf4"), "quantize"),
    **dict.fromkeys(("estimate", "memory", "vram", "dry_run"), "plan"),
    **dict.fromkeys(("preprocess", "dataset", "validate", "inspect", "prepare"), "data"),
    **dict.fromkeys(("benchmark", "profile"), "bench"),
    **dict.fromkeys(("env", "info", "check", "diagnose"), "doctor"),
    **dict.fromkeys(("tensorboard", "dashboard", "ui", "web", "view", "plot"), "board"),
    **dict.fromkeys(("tune", "search", "grid", "hyperparameters", "optuna"), "sweep"),
    **dict.fromkeys(("diff", "versus", "vs"), "compare"),
    **dict.fromkeys(("ps", "runs", "watch", "progress", "logs"), "status"),
    **dict.fromkeys(("convert", "gguf", "to_gguf"), "export gguf"),
    "version": "--version",
}

# What a fault of the program may be behind, so that a traceback helps to find it.
_UNCLEAR = frozenset({errno.EBADF, errno.EFAULT, errno.ECHILD, None})

_OUT_OF_MEMORY = (
    "The memory is full: that of the GPU, of this machine, or what a limit (ulimit -v, a "
    "container) leaves of it. Outputs get their names when they are whole, so what stood before "
    "stands as it was. End other programs, raise the limit, or ask for less: shorter or fewer rows "
    "at once, a smaller model. ENGINE_TRACEBACK=1 shows where it was."
)

_PRINTING = frozenset({"typer", "click", "rich"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    if arguments is None:
        INTERRUPTS.install()
        with open_streams():
            return _main(sys.argv[1:])
    return _main(list(arguments))


def _main(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does: nothing is left to tell.
        _print_nowhere()
        return 0
    except OSError as error:
        _complain(_refused(error))
        return 2
    return status


def _print_nowhere() -> None:
    """Let the null device take what is printed from now on, and what Python flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if words[0] in ("-V", "--version"):
        from engine.provenance import version

        print(f"engine {version()}")
        return 0
    verb = words[0]
    if verb not in VERBS:
        what = "option" if verb.startswith("-") else "verb"
        _complain(f"There is no {what} {verb!r}.{_meant(verb)} Verbs: {', '.join(VERBS)}.")
        return 2
    return _run(verb, words[1:])


def _meant(word: str) -> str:
    """What somebody who typed `word` for a verb may have meant, as a sentence."""
    other = _OTHER_NAMES.get(word.lstrip("-").replace("-", "_").lower())
    if other is not None:
        return f" That is `engine {other}` here."
    near = difflib.get_close_matches(word, VERBS, n=1, cutoff=0.7)
    near = near or difflib.get_close_matches(word, ("--help", "--version"), n=1, cutoff=0.7)
    return f" Did you mean `engine {near[0]}`?" if near else ""


def _run(verb: str, arguments: list[str]) -> int:
    leave_quickly()
    try:
        os.getcwd()  # noqa: PTH109 - of a folder that is gone, torch's libraries end the process
    except OSError as error:
        _complain(
            f"The folder that this command was started in cannot be used ({error.strerror}): it "
            "was deleted, or may not be entered. Go to another one (cd) and run it there."
        )
        return 2
    try:
        with importing():
            module = importlib.import_module(VERBS[verb][0])
            _hide_secrets_typed()
        with nullcontext() if getattr(module, "OPENS_LOG", False) else _console_log():
            return _invoke(module, verb, arguments)
    except BrokenPipeError:
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer makes it an exit with status 1
            raise stop.__context__ from None
        return _stopped(stop)
    except BaseException as error:
        if type(error).__name__ == "Abort":  # what a typer that uses click makes of Ctrl-C
            return _stopped(KeyboardInterrupt())
        if _is_usage_error(error):
            _complain(f"{_usage_message(error)} `engine {verb} --help` lists the options.")
            return 2
        return _failed(error)


def _hide_secrets_typed() -> None:
    """Take secrets out of this process's own words, which trackers store beside a run."""
    from engine.config.data_names.passwords import hide_in_words

    sys.argv[1:] = hide_in_words(sys.argv[1:])


def _invoke(module: ModuleType, verb: str, arguments: list[str]) -> int:
    """Run a verb's typer application, which returns its exit status or None."""
    from typer.main import get_command

    command = get_command(module.app)
    with INTERRUPTS.at_work():
        status = command.main(args=arguments, prog_name=f"engine {verb}", standalone_mode=False)
    # What a typer with a parser of its own makes of Ctrl-C; or the exception got lost on its way.
    if status == 130 or INTERRUPTS.seen:
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0


def _stopped(stop: KeyboardInterrupt | SystemExit) -> int:
    if isinstance(stop, KeyboardInterrupt):
        _complain("Stopped.")
        return 130
    if type(stop) is not SystemExit:
        _complain(str(stop))
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _is_usage_error(error: BaseException) -> bool:
    """Whether the option parser raised this; typer 0.27 and later carry a click of their own."""
    return hasattr(error, "format_message") and getattr(error, "exit_code", None) == 2


def _usage_message(error: Any) -> str:
    option = getattr(error, "option_name", None)
    if option is not None and "requires an argument" in str(error.message):
        return f"{option} needs a value{_told(error, option)}."
    if option is None or "No such option" not in str(error.message):
        message = str(error.format_message()).rstrip(".") or "Name one of its commands"
        message = message if message.endswith("?") else f"{message}."
        return f"{message}{_commands(error)}"
    near = difflib.get_close_matches(option, error.possibilities or [], n=1, cutoff=0.75)
    from engine.config.aliases import HINTS
    from engine.config.explain import nearest

    settings = {parameter.name: parameter for parameter in error.ctx.command.params}
    name = option.lstrip("-").replace("-", "_")
    hint = HINTS.get(name) if "method" in settings else None
    if hint is not None:
        return f"There is no option {option}: {hint}."
    field = nearest(name, settings)
    near = [f"--{field.replace('_', '-')}"] if field else near
    if near:
        return f"There is no option {option}. Did you mean {near[0]}?"
    if commands := _commands(error):
        return f"There is no option {option} before a command.{commands}"
    return f"There is no option {option}."


def _commands(error: Any) -> str:
    """The commands of a verb that has some, as a sentence; empty for any other."""
    names = getattr(getattr(error.ctx, "command", None), "commands", {})
    return f" Its commands: {', '.join(names)}." if names else ""


def _told(error: Any, option: str) -> str:
    """The help of an option, to stand in a sentence."""
    for parameter in getattr(getattr(error.ctx, "command", None), "params", ()):
        if option in parameter.opts:
            return f": {parameter.help}"
    return ""


def _failed(error: BaseException) -> int:
    from engine.errors import EngineError

    if os.environ.get("ENGINE_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, EngineError):
        _complain(str(error))
        return 2
    if isinstance(error, OSError):
        _complain(_refused(error))
        return 2
    if is_out_of_memory(error):
        _complain(_OUT_OF_MEMORY)
        return 2
    notes = " ".join(getattr(error, "__notes__", ())) or _keep_traceback(error)
    text = " ".join(str(error).split())
    _complain(f"The program failed with {type(error).__name__}: {text[:500]}. {notes}")
    return 1


def _refused(error: OSError) -> str:
    """What the system refused, where, what is safe, and what to do."""
    from engine.storage.durable import describe

    where = f" {error.filename}" if error.filename else ""
    if not where and _is_of_printing(error):
        where = " standard output"
        _print_nowhere()
    notes = ""
    if error.errno in _UNCLEAR:
        notes = " " + (" ".join(getattr(error, "__notes__", ())) or _keep_traceback(error))
    return (
        f"The system refused to open, read or write{where}: {describe(error)}. Outputs get their "
        "names when they are whole, so what stood before stands as it was. Look at that file and "
        f"its disk, and run the command again.{notes}"
    )


def _is_of_printing(error: OSError) -> bool:
    """Whether what prints raised this: the command line, or what shows its help."""
    frames = traceback.extract_tb(error.__traceback__)
    last = Path(frames[-1].filename) if frames else Path()
    return last.is_relative_to(Path(__file__).parent) or not _PRINTING.isdisjoint(last.parts)


def _keep_traceback(error: BaseException) -> str:
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix="engine-",
            suffix=".log",
            delete=False,
            encoding="utf-8",
            errors="backslashreplace",
        ) as file:
            from engine.config.data_names.passwords import scrub

            file.write(scrub("".join(traceback.format_exception(error))))
    except OSError:
        return "ENGINE_TRACEBACK=1 shows the traceback."
    return f"The traceback is in {file.name}."


def _complain(message: str) -> None:
    """Print one paragraph to the error stream, if anyone is there."""
    from engine.config.data_names.passwords import scrub
    from engine.errors import printable

    try:
        print(f"engine: {printable(scrub(' '.join(message.split())))}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


@contextmanager
def _console_log() -> Iterator[None]:
    """Show INFO lines of this program; a run that keeps a log of its own does so itself."""
    from engine.runs.logs import OWN_LOGGERS, ConsoleHandler

    handler = ConsoleHandler()
    logging.getLogger().addHandler(handler)
    levels = {name: logging.getLogger(name).level for name in OWN_LOGGERS}
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def help_text() -> str:
    """What `engine --help` prints."""
    verbs = "\n".join(f"  {verb:<14} {text}" for verb, (_, text) in VERBS.items())
    return textwrap.dedent(
        """\
        Usage: engine VERB [OPTIONS]

        Fine-tune language models with QLoRA on a CPU or a CUDA GPU.

        Verbs:
        {verbs}

        engine VERB --help lists a verb's options and their defaults.
        engine --version prints the version.

        An example:
          engine train --model Qwen/Qwen3-0.6B --data chats.jsonl --output-dir runs/first
        """
    ).format(verbs=verbs)[:-1]


if __name__ == "__main__":
    sys.exit(main())
