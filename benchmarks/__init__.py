"""What is measured by a command, from a checkout: `python -m benchmarks --help`.

`commands/` has one thin function a command, `plots.py` what all plots are drawn with. `paper/` trains the paper's
comparison in the miniature, `speed/` times our rounds against the public loop's, `gpu/` looks at one GPU, `rewards/` at
scorers. `families.py` takes every model family through all stages (`family_checks.py`), `plan_memory.py` holds plans
against processes (`plan_worker.py`, at true width `full_size.py`), `checkpoint_cost.py` times checkpoints.
"""
