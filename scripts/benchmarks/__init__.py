"""Time and memory, of models and of data: `python -m scripts.benchmarks.speed`."""
