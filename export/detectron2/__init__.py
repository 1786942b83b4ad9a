"""Detectron2: backbones for it, the papers' fine-tuning tasks, and detectors on your own photos.

Nothing here imports Detectron2 before its installation is checked.
"""
