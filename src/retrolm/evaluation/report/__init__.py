"""Tables and plots from any set of rows: Markdown, CSV and one self-contained HTML page."""
