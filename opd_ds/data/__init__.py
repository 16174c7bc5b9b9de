"""`opd-ds data`: prompt sets made and checked, prompts encoded ahead of a run."""
