"""`python -m benchmarks gpu`: does it run on this GPU, is it right there, how fast is it, and is the plan right?"""
