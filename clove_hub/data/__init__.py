"""Reading what lies on a disk: pictures as pixels, folders of them, and labels, one file for each format.

What is made of the pixels is not here: crops are `clove_hub.views`, sources of pre-training `clove_hub.training.sources`.
"""
