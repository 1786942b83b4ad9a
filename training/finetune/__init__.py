"""Fine-tuning of detectors, keypoints and segmentation in torchvision, with checkpoints and scores; one loop for all tasks.

The papers' own protocols in Detectron2 and MMSegmentation are not here: `clove_hub.export` runs those frameworks themselves.
"""
