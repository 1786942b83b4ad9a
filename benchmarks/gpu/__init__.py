"""All that has to be asked of a GPU, in one call of ten minutes: `python -m benchmarks.gpu` (see `__main__`)."""
