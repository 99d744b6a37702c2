"""Landmark Attention's training: plain language modelling on short texts with landmarks among their tokens."""
