"""What a run will need, before it starts: memory by part, passes, seconds a round. No weights, no devices."""
