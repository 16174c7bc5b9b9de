"""Tiny random pipelines, one module a model family, for tests and benchmarks; made without network.

Each module has two functions:

    write(folder, seed=0) -> Path
        a complete diffusers folder; another seed gives other weights in the same architecture
    draw(pipeline, family, prompts, noise, guidance, steps) -> Tensor
        what diffusers' own pipeline makes of `noise`: final latents, both in the layout of the family's latents
"""
