"""Rewards: each alone in an environment of its own, and how well the OCR reward reads."""
