"""The frame of every command: a user's mistake is one line on stderr, not a traceback."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

# What the library raises for bad input, bad files and a system that says no.
_MISTAKES = (ValueError, KeyError, AttributeError, TypeError, OSError, FloatingPointError)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs ``main(positional arguments)`` as a program; a mistake ends it with status 1 or 2."""

    def guarded(argv: Sequence[str]) -> int:
        if not _DEBUG.value:
            logging.set_verbosity(logging.ERROR)  # Orbax tells of every file it writes
        try:
            main(list(argv[1:]))
        except FloatingPointError as error:
            return _fail(error, 1)
        except (ValueError, OSError) as error:
            return _fail(error, 2)
        return 0

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; a wrong config field gets the same treatment as any other mistake."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, *_MISTAKES) as error:
        sys.exit(_fail(error, 2))


def _fail(error: Exception, status: int) -> int:
    if flags.FLAGS.is_parsed() and _DEBUG.value:
        raise error
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {text}", file=sys.stderr, flush=True)
    return status
