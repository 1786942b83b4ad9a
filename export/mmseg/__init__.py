"""SlotCon's segmentation tasks in MMSegmentation, with the converted backbone.

Nothing here imports MMSegmentation before its installation is checked.
"""
