"""Scoring models on held-out prompts with the tasks' rewards, and showing them side by side."""

from opd_ds.evaluation.evaluator import EvaluationResult, Evaluator
from opd_ds.evaluation.report import comparison_grid, print_table, summary

__all__ = ["EvaluationResult", "Evaluator", "comparison_grid", "print_table", "summary"]
