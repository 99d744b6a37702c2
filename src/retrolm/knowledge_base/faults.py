"""Errors of knowledge bases: damage, and a base that is busy or of another kind."""

from __future__ import annotations

from ..errors import UserError


class DamagedBaseError(UserError):
    """A file of a knowledge base is missing, cut short or changed."""


class BusyBaseError(UserError):
    """Another process is writing to the knowledge base."""


class MismatchError(UserError):
    """Model, tokenizer, retriever or options differ from those a base was read with, or its format is another."""
