"""RetroLM: questions over texts far longer than the model's window, on a fixed budget of keys and values."""

__version__ = "0.1.0"
