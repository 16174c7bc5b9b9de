"""Prompt sets and encoded prompts, and drawing from them in a way that does not depend on the number of ranks."""

from opd_ds.data.prompt_set import PromptSet, negative_prompt
from opd_ds.data.sampling import Shard, draw_prompts, rows_on_a_rank, shard, shards_by
from opd_ds.data.sizes import Kind, Size, Sizes, check_sizes, own_size

__all__ = [
    "Kind",
    "PromptSet",
    "Shard",
    "Size",
    "Sizes",
    "check_sizes",
    "draw_prompts",
    "negative_prompt",
    "own_size",
    "rows_on_a_rank",
    "shard",
    "shards_by",
]
