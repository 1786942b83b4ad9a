# ruff: noqa: C408 (a config of MMEngine)
# Cityscapes: trained on train (2975 finely annotated images), scored on val. 769 pixels, 90k iterations.
_base_ = [
    "./fcn.py",
    "mmseg::_base_/datasets/cityscapes_769x769.py",
    "mmseg::_base_/default_runtime.py",
]
crop_size = (769, 769)
model = dict(data_preprocessor=dict(size=crop_size), decode_head=dict(num_classes=19))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(2048, 1024), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))  # of each of 4 GPUs
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0001),
)
param_scheduler = [dict(type="MultiStepLR", by_epoch=False, milestones=[63000, 81000], gamma=0.1)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=90000, val_interval=90000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
