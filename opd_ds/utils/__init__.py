"""Small helpers that know nothing of the rest: atomic files, hashes, log levels."""
