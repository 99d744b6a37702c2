"""`retrolm kb plan`: what asking a base will take."""

from __future__ import annotations

from .kb_content import open_with_engine
from .kb_options import BaseArgument, ModelOption
from .options import JsonFlag
from .plan import QUESTION, plan_json, show_plan
from .screen import print_json, waiting


def plan(base: BaseArgument, model: ModelOption = None, as_json: JsonFlag = False) -> int:
    """Say what asking all documents of a base takes: memory, and time to the first token.

    What adding a text takes is said by `retrolm plan`. Exits with 1 if the memory isn't there.
    """
    from ..engine.plan import look_around
    from ..knowledge_base.plan import plan_asking

    before = look_around()
    opened = open_with_engine(base, model)
    with waiting("Measuring one answer …"):
        expected = plan_asking(opened, QUESTION, before)
    name = str(opened.manifest.setup["model"])
    if as_json:
        print_json({"base": base, **plan_json(name, opened.lm, expected)})
    else:
        show_plan(base, name, opened.lm, expected, "reading anew")
    return 0 if expected.fits else 1
