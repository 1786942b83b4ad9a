"""The papers' segmentation tasks as config files for MMSegmentation, with the converted backbone."""
