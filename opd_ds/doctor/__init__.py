"""`opd-ds doctor`: what a node or a whole allocation offers a run, and what would stop one. Loads no model."""
