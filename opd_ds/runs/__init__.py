"""Whole runs from start to end: training, evaluation, export, encoding."""
