"""The table of models; identifying files of weights, reading them safely, renaming tensors between frameworks.

Nothing is imported here: the table (`clove_hub.zoo.models`) can be read quickly, without torch.
"""
