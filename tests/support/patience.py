"""How long a test waits for what should happen: long enough for any machine, however busy."""

PATIENCE = 1800
"""Seconds; at least ten times what anything here takes on a quiet machine with two cores."""
