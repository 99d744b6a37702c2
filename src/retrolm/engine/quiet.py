"""Keeps other libraries' loading bars and advice off the terminal of a command-line run."""

from __future__ import annotations

import os
import warnings

import transformers


def silence_libraries() -> None:
    """Show only errors of transformers and the Hugging Face hub, and no Python warnings."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
