"""What a backbone is worth where it is used: detection, masks, keypoints and segmentation, fine-tuned and scored.

`clove-hub downstream torchvision` needs no engine but torchvision; `clove-hub results` collects what was found.
"""
