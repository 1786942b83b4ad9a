"""SlotCon's segmentation tasks in MMSegmentation, with the converted backbone."""
