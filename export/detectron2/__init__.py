"""Detectron2: backbones for it, the papers' fine-tuning tasks in it, and detectors on your own photos.

Nothing here imports Detectron2 before it is known to be installed.
"""
