"""Reading images, folders of images, and labels, one file for each format.

Crops are in `clove_hub.views`, sources for pre-training in `clove_hub.training.sources`.
"""
