"""Keeping other libraries from talking over our own progress."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Leave the terminal to our own progress: no loading bars, no notes about optional image backends."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
