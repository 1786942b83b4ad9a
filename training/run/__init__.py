"""The folder of a run: one writer, complete checkpoints, resuming, stopping, and agreement between ranks.

The computation of a step is in `..step`, logging in `..reporting`.
"""
