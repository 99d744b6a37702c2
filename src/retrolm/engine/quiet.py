"""Keeps transformers' loading bars and advice off the terminal, where a command shows its own."""

from __future__ import annotations

import transformers


def silence_libraries() -> None:
    """Show only errors of transformers, and no progress bars of it and the Hugging Face hub, in this process."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
