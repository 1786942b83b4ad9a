"""Training: recipes, the loop of pre-training and what feeds it (`sources`, `run`), and fine-tuning in torchvision (`finetune`).

Methods and views, which also work without a loop, are in `clove_hub`; other frameworks' trainers are in `export`.
"""
