"""`retrolm kb`: knowledge bases. Each command stands in the module of its kind and imports when it is called."""

from __future__ import annotations

import typer

from . import kb_content, kb_files, kb_plan, kb_questions, kb_report

command = typer.Typer(help="Knowledge bases: texts read once, kept on disk, asked in any later process.")


@command.callback()
def _group() -> None:
    """Knowledge bases: texts read once, kept on disk, asked in any later process."""


command.command("create")(kb_content.create)
command.command("add")(kb_content.add)
command.command("ask")(kb_questions.ask)
command.command("query")(kb_questions.query)
command.command("list")(kb_report.list_documents)
command.command("info")(kb_report.info)
command.command("plan")(kb_plan.plan)
command.command("remove")(kb_content.remove)
command.command("merge")(kb_content.merge)
command.command("gc")(kb_content.gc)
command.command("verify")(kb_report.verify)
command.command("export")(kb_files.export)
command.command("import")(kb_files.import_)
