# ruff: noqa: C408 (a config of MMEngine)
# ADE20K: 512 pixels, 80k iterations with MMSegmentation's own schedule for that many (SGD 0.01, polynomial decay).
_base_ = [
    "./fcn.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_80k.py",
]
crop_size = (512, 512)
model = dict(data_preprocessor=dict(size=crop_size), decode_head=dict(num_classes=150))
train_dataloader = dict(batch_size=4)  # of each of 4 GPUs
