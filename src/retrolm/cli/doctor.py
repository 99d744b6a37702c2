"""`retrolm doctor`: check this installation."""

from __future__ import annotations

from dataclasses import asdict

from .options import JsonFlag
from .screen import OUT, print_json, show_table

MARKS = {"ok": "ok", "note": "-", "bad": "BAD"}


def command(as_json: JsonFlag = False) -> int:
    """Check Python, libraries, devices, memory, disk, models and optional parts. Exits with 1 if RetroLM can't work."""
    from ..engine.doctor import diagnose

    findings = diagnose()
    healthy = all(finding.state != "bad" for finding in findings)
    if as_json:
        print_json({"healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        rows = [(f.name, MARKS[f.state], f"{f.detail} → {f.fix}" if f.fix else f.detail) for f in findings]
        show_table(("what", "", "found"), rows)
        OUT.print("\nRetroLM can work here." if healthy else "\nRetroLM can't work here: mend what is marked BAD.")
    return 0 if healthy else 1
