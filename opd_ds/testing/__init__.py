"""What tests and benchmarks share: tiny pipelines of every family, several runs in one launch."""
