"""Benchmarks: tasks and their scores, the runner, and the report."""
