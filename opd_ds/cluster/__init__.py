"""Processes among others: rank and rendezvous, signals, heartbeats, failures, SLURM scripts."""
