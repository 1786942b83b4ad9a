"""Training: recipes, the loop of pre-training and what feeds it (`sources`, `run`), and fine-tuning in torchvision (`finetune`).

Methods and views are not here, as they serve without a loop too; nor are other frameworks' trainers, which are `export`'s.
"""
