"""Random pipelines of a few ten thousand parameters, one module per model family, and diffusers' own way to draw."""
