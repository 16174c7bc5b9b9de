"""Prompt sets and encoded prompts, and drawing from them in a way that does not depend on the number of ranks."""

from opd_ds.data.prompt_set import PromptSet
from opd_ds.data.sampling import Shard, draw_prompts, rows_on_a_rank, shard

__all__ = ["PromptSet", "Shard", "draw_prompts", "rows_on_a_rank", "shard"]
