"""The frame of every command: a user's mistake is one line on stderr, not a traceback."""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from experiments import environment, help_text, lazy, processes
from experiments.base_configs import MakeConfig

with lazy.imports():
    import jax

    from lora_jax.training import preemption, workdirs

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

# Errors that the library raises for bad input, bad files and what the system refuses.
_MISTAKES = (ValueError, KeyError, AttributeError, TypeError, OSError, FloatingPointError)
_NO_VALUE = re.compile(r"Flag --(\w+) must have a value other than None")  # absl's words
_ADAPTER_FILES = ("adapter.json", "adapter_config.json")  # of this library, and of PEFT


def run(
    main: Callable[[list[str]], None], find_config: Callable[[], MakeConfig] | None = None
) -> None:
    """Runs ``main(positional arguments)`` as a program.

    The program exits with 0, also if it was asked to stop and can go on; 1 if the training
    diverged; 2 after a mistake; 3 if another process of the run has ended early; 130 if it was
    interrupted.

    Args:
      main: the program.
      find_config: returns the function that makes the program's base config, whose fields
        ``--help`` shows; None for a program without a config.
    """

    def run_main(argv: Sequence[str]) -> int:
        if not _DEBUG.value:
            logging.set_verbosity(logging.FATAL)  # Orbax logs every file it reads or writes
        try:
            check_adapter(flags.FLAGS["adapter"].value if "adapter" in flags.FLAGS else None)
            processes.start()
            environment.start_cache()
            main(list(argv[1:]))
        except preemption.Stopped as stopped:
            print(stopped, flush=True)
        except FloatingPointError as error:
            return _fail(error, 1)
        except (ValueError, OSError) as error:
            return _fail(error, 2)
        except KeyboardInterrupt as error:
            return _fail(error, 130)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            return _fail(ValueError(f"another process has ended, or can't be reached ({error})"), 3)
        return 0

    environment.collect_seldom()
    app.run(run_main, flags_parser=functools.partial(_parse, find_config=find_config))


def say(text: str) -> None:
    """Prints a line of a report at once, also into a file or a pipe."""
    print(text, flush=True)


def say_all(*texts: str) -> None:
    """Prints the texts that are not empty, each as a line of a report."""
    for text in filter(None, texts):
        say(text)


def check_adapter(directory: str | None) -> None:
    """Checks that the directory of an adapter is not that of its run, of several, or of a model.

    Raises:
      ValueError: it is; the message says where in it the adapter is.
    """
    if not directory or any((Path(directory) / name).exists() for name in _ADAPTER_FILES):
        return
    inside = Path(directory) / workdirs.ADAPTER
    if any((inside / name).exists() for name in _ADAPTER_FILES):
        raise ValueError(
            f"{directory} is the directory of a run, and its adapter is in {inside}: give "
            f"--adapter={inside}."
        )
    if (Path(directory) / workdirs.SWEEP).exists():
        raise ValueError(
            f"{directory} is the directory of a sweep, and its adapters are in "
            f"{Path(directory) / 'runs'}/*/{workdirs.ADAPTER}: choose one of them."
        )
    if found := sorted(
        str(x.parent) for n in _ADAPTER_FILES for x in Path(directory).glob(f"*/{n}")
    ):
        raise ValueError(
            f"{directory} holds adapters and is none itself: give --adapter={found[-1]}, or "
            f"another of {', '.join(found)}."
        )
    if (Path(directory) / workdirs.CONFIG).is_file() and any(Path(directory).glob("*.safetensors")):
        raise ValueError(
            f"{directory} is a whole model, and no adapter (merged weights are one, too): give the "
            "directory of an adapter."
        )


def _parse(argv: Sequence[str], find_config: Callable[[], MakeConfig] | None) -> list[str]:
    """Parses flags; a program with a config reads what is left, the fields of the config."""
    if help_text.is_full_asked(argv):
        app.usage(writeto_stdout=True)
        sys.exit(0)
    if help_text.is_asked(argv):
        sys.exit(_help(argv, find_config))
    has_config = "config" in flags.FLAGS
    if has_config:
        flags.FLAGS.set_gnu_getopt()  # flags behind a value without "=" are flags, too
    try:
        return flags.FLAGS(argv, known_only=has_config)
    except (flags.Error, *_MISTAKES) as error:
        sys.exit(_tell(error, 2))


def _help(argv: Sequence[str], find_config: Callable[[], MakeConfig] | None) -> int:
    try:
        help_text.show(argv, find_config)
    except (flags.Error, *_MISTAKES) as error:
        return _tell(error, 2)
    return 0


def _fail(error: BaseException, status: int) -> int:
    return processes.fail(_tell(error, status))


def _tell(error: BaseException, status: int) -> int:
    """Prints an error as a line, with which the program ends with this status."""
    if flags.FLAGS.is_parsed() and _DEBUG.value:
        raise error
    print(f"error: {_text(error)}", file=sys.stderr, flush=True)
    return status


def _text(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; a training run goes on from its last checkpoint if started again"
    if isinstance(error, OSError) and error.strerror:
        # The library's errors have a sentence here; the system's have a word or two, and a file.
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if match := _NO_VALUE.search(str(error)):
        flag = match[1]
        return f"There is no --{flag}: give --{flag}=VALUE ({flags.FLAGS[flag].help})"
    return str(error)
