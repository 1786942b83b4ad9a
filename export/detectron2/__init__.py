"""The papers' fine-tuning tasks in Detectron2, each on top of a file of its own model zoo.

Nothing here imports Detectron2 before it is known to be installed.
"""
