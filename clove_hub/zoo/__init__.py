"""The table of models; finding out what a file of weights is, reading it safely, naming its tensors as others do.

Nothing is imported here: the table (`clove_hub.zoo.models`) can be read without torch, and therefore fast.
"""
