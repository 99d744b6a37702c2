"""Entry point: the table of commands. Each is imported only when it is called, so that `--help` stays fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from .boundary import CONTEXT, DEBUG_FLAG, guard, run_guarded

# name: (module under retrolm.cli, one line for `retrolm --help`). A module offers `command`: a function or a Typer.
COMMANDS = {
    "ask": ("ask", "Ask questions about a text file"),
    "chat": ("chat", "Talk about a text file in the terminal"),
    "kb": ("kb", "Knowledge bases: read texts once, keep them on disk, ask any time"),
    "plan": ("plan", "Say what reading a file will take: tokens, pages, time, memory"),
    "demo": ("demo", "Read the example book and ask it questions whose answers are known"),
    "pull": ("pull", "Fetch a demo model"),
    "models": ("models", "List the demo models and which of them are here"),
    "methods": ("methods", "List what --method takes: how the budget can be spent"),
    "retriever": ("retriever", "Look at trained page retrievers, pack them smaller, share them"),
    "adapter": ("adapter", "Look at LoRA adapters of stage 2, pack them smaller, share them"),
    "data": ("data", "Prepare training data"),
    "train": ("train", "Train a page retriever, or the backbone on sparse KV"),
    "verify": ("verify", "Show that RetroLM equals the stock model where it should"),
    "bench": ("bench", "Time RetroLM against dense attention by the stock model"),
    "eval": ("eval", "Run benchmark tasks over methods, budgets and lengths"),
    "report": ("report", "Turn rows of `retrolm eval` into tables and plots"),
    "reproduce": ("reproduce", "Run the small-model version of the paper's tables"),
    "doctor": ("doctor", "Check this installation"),
}


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    sys.exit(main(sys.argv[1:] if arguments is None else arguments))


def main(arguments: Sequence[str]) -> int:
    """Run the command line on `arguments` and return the exit code."""
    words = [word for word in arguments if word != DEBUG_FLAG] or ["--help"]
    wanted = next((word for word in words if not word.startswith("-")), "")
    return run_guarded(build_app(wanted), words, debug=DEBUG_FLAG in arguments)


def build_app(wanted: str) -> typer.Typer:
    """Build the application with the command `wanted` imported; the others stand as names with a line of help."""
    app = typer.Typer(
        help=_HELP,
        callback=_root,
        context_settings=CONTEXT,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name, (module, summary) in COMMANDS.items():
        command = importlib.import_module(f".{module}", __package__).command if name == wanted else _not_loaded
        _add(app, name, command, summary)
    return app


_HELP = (
    "Ask questions about texts far longer than a model's window, on a fixed budget of keys and values (KV).\n\n"
    "First steps: retrolm pull smollm2-135m-instruct, then retrolm ask FILE 'QUESTION'."
)


def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=lambda value: _show_version(value),
                                          help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option(DEBUG_FLAG, help="Show tracebacks; may stand anywhere in the line.")] = False,
) -> None:  # fmt: skip
    """Options that belong to no command."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"retrolm {__version__}")
        raise typer.Exit


def _add(app: typer.Typer, name: str, command: Any, summary: str) -> None:
    if not isinstance(command, typer.Typer):
        app.command(name, short_help=summary, context_settings=CONTEXT)(guard(command))
        return
    for inner in command.registered_commands:
        inner.callback = guard(_callback(inner.callback))
    app.add_typer(command, name=name, short_help=summary, context_settings=CONTEXT)


def _callback(function: Callable[..., Any] | None) -> Callable[..., Any]:
    assert function is not None
    return function


def _not_loaded() -> None:
    """Stand-in for a command that this run doesn't call."""


if __name__ == "__main__":
    run()
