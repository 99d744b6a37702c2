"""The engine: a stock model, read page by page."""
