"""What `python -m benchmarks gpu` runs, in the order of importance. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A process of its own.

    Attributes:
        function: `module:function` of `benchmarks.gpu`, called with a `Session`.
        expected: seconds without which it is not started.
        limit: seconds after which it is ended.
        on_cpu: whether it says anything there; compiling takes a processor minutes.
    """

    name: str
    what: str
    function: str
    expected: float
    limit: float
    on_cpu: bool = True


PARTS = (
    Part("versions", "software, device, and what the device can do", "device:versions", 10, 60),
    Part("invariants", "rounds that must be equal, with a tiny model", "invariants:invariants", 30, 120),
    Part("lora", "LoRA student with three LoRA teachers", "rounds:lora", 40, 140),
    Part("full-offload", "full student, three full teachers on the host", "rounds:full_offload", 30, 80),
    Part("full-stream", "the same, block by block", "rounds:full_stream", 30, 80, on_cpu=False),
    Part("full-zero-inference", "the same, sharded", "rounds:full_zero_inference", 40, 170),
    Part("miniature", "the recipe `miniature`, 30 rounds", "small:miniature", 20, 70),
    Part("rewards", "rounds that learn from rewards", "small:rewards", 15, 60),
    Part("oom", "scoring.micro_batch = auto, out of memory once", "small:out_of_memory", 15, 45, on_cpu=False),
    Part("evaluation", "images of the student", "small:evaluation", 10, 45),
    Part("attention", "kernels of attention at FLUX.1's width", "attention:attention", 15, 120),
    Part("compiled", "LoRA student, blocks eager and compiled", "rounds:compiled", 120, 400, on_cpu=False),
)
