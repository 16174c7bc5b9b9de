"""The commands of `python -m benchmarks`: one thin function each, which imports what it runs when it is called."""
