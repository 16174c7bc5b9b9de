"""Checkpoints: what is written, how it is found and checked, and how a student leaves as a model."""
