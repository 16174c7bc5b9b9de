"""GenEval: does the image show what the prompt asks for? See `reward.py`; the rules alone are in `rules.py`."""

from opd_ds.rewards.geneval.reward import GenEval
from opd_ds.rewards.geneval.rules import tag_means

__all__ = ["GenEval", "tag_means"]
