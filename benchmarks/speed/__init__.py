"""`python -m benchmarks speed`: our rounds against the public loop's, on the same work, in turns."""
