"""Wordings of planted facts and of the questions for them, for training only."""
