"""The folder of a run: one writer, checkpoints that are whole, resuming, stopping, and what ranks have to agree on.

What is computed in a step is not here (`..step`), nor what is logged (`..reporting`).
"""
