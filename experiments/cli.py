"""The frame of every command: a user's mistake is one line on stderr, not a traceback."""

import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from experiments import processes
from lora_jax.training import preemption

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

# Errors that the library raises for bad input, bad files and what the system refuses.
_MISTAKES = (ValueError, KeyError, AttributeError, TypeError, OSError, FloatingPointError)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs ``main(positional arguments)`` as a program.

    The program exits with 0, also if it was asked to stop and can go on; 1 if the training
    diverged; 2 after a mistake; 3 if another process of the run has ended early; 130 if it was
    interrupted.
    """

    def run_main(argv: Sequence[str]) -> int:
        if not _DEBUG.value:
            logging.set_verbosity(logging.FATAL)  # Orbax logs every file it reads or writes
        try:
            processes.start()
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

    app.run(run_main, flags_parser=_parse)


def say(text: str) -> None:
    """Prints a line of a report at once, also into a file or a pipe."""
    print(text, flush=True)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; a wrong config field gets the same treatment as any other mistake."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, *_MISTAKES) as error:
        sys.exit(_fail(error, 2))


def _fail(error: BaseException, status: int) -> int:
    if flags.FLAGS.is_parsed() and _DEBUG.value:
        raise error
    print(f"error: {_text(error)}", file=sys.stderr, flush=True)
    return processes.fail(status)


def _text(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; a training run goes on from its last checkpoint if started again"
    if isinstance(error, OSError) and error.strerror:
        # The library's errors have a sentence here; the system's have a word or two, and a file.
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    inner = error.args[0] if error.args else error
    if isinstance(error, KeyError) or isinstance(inner, KeyError):
        # ml_collections wraps its message on a config field in a KeyError, sometimes in two.
        message = inner.args[0] if isinstance(inner, KeyError) else inner
        return f"unknown config field {message} (configs/common.py lists all)".replace("\n", ": ")
    return str(error)
