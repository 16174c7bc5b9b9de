"""Scoring models on held-out prompts with rewards, and showing them side by side.

Nothing is imported here: the command line imports `cli` before anything heavy.
"""
