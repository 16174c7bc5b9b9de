"""Several models' weights into one, without training."""
