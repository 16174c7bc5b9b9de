"""Making teachers: reinforcement learning of a diffusion model from rewards (DiffusionNFT, GRPO-Guard)."""
