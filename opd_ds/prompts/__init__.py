"""Prompt sets, and drawing from them in a way that does not depend on the number of ranks."""

from opd_ds.prompts.prompt_set import PromptSet
from opd_ds.prompts.sampling import SampleNoise, Shard, draw_prompts, sample_seed, shard

__all__ = ["PromptSet", "SampleNoise", "Shard", "draw_prompts", "sample_seed", "shard"]
