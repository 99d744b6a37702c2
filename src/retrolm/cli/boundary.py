"""One place where errors become one line on stderr and an exit code.

0 success · 1 the work failed, or a check said no · 2 the request can't be carried out · 130 stopped by Ctrl-C
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import typer

from ..errors import RetroLMError
from .screen import error_line

CONTEXT = {"help_option_names": ["-h", "--help"]}
DEBUG_FLAG = "--debug"
INTERRUPTED = 130
NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
# typer brings its own copy of click or uses the package, by version; this class is the usage error of either.
USAGE_ERROR: type[Any] = typer.BadParameter.__bases__[0]

_debug = False


def run_guarded(app: typer.Typer, words: Sequence[str], debug: bool) -> int:
    """Run `app` on `words`; returns the exit code, whatever happens inside."""
    global _debug
    _debug = debug
    with nullcontext() if debug else _hushed():
        return _run(app, words)


def _run(app: typer.Typer, words: Sequence[str]) -> int:
    try:
        code = int(app(list(words), standalone_mode=False, prog_name="retrolm") or 0)
        sys.stdout.flush()
        return code
    except USAGE_ERROR as error:
        return _usage_error(error)
    except (Exception, KeyboardInterrupt) as error:
        return _explain(error)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep libraries' warnings, which no user of the command can act on, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def guard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that it ends in an exit code and at most one line of error. A returned int is the code."""

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            code = function(*arguments, **options) or 0
            sys.stdout.flush()
        except (typer.Exit, USAGE_ERROR):
            raise
        except (Exception, KeyboardInterrupt) as error:
            code = _explain(error)
        raise typer.Exit(code)

    return guarded


def _explain(error: BaseException) -> int:
    """Say in one line what went wrong; returns the exit code."""
    if _debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        error_line(str(error) or "Interrupted.")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # the reader of our output has gone; keep the interpreter from complaining about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if f"(os error {errno.ENOSPC})" in str(error) or (isinstance(error, OSError) and error.errno in NO_SPACE):
        error_line(f"No space left on the disk{_about(error)}. Make room, then try again.")
        return 2
    if isinstance(error, RetroLMError):
        error_line(str(error))
        return error.exit_code
    hint = "" if _debug else f" (run again with {DEBUG_FLAG} for the traceback)"
    if isinstance(error, OSError) and error.filename and error.strerror:
        error_line(f"{error.filename}: {error.strerror}{hint}.")
        return 2
    error_line(f"{type(error).__name__}: {error}{hint}")
    return 1


def _about(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return f" while writing {name}" if name else ""


def _usage_error(error: Any) -> int:
    context = getattr(error, "ctx", None)
    error_line(f"{error.format_message()} See: {context.command_path if context else 'retrolm'} --help")
    return int(error.exit_code)
