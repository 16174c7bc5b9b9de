"""A tiny random pipeline of each model family, and diffusers' own way to draw with it."""
