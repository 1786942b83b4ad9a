# ruff: noqa: C408 (a config of MMEngine)
# PASCAL VOC 2012: trained on train and aug (10 582 images), scored on val. 513 pixels, 30k iterations.
_base_ = [
    "./fcn.py",
    "mmseg::_base_/datasets/pascal_voc12_aug.py",
    "mmseg::_base_/default_runtime.py",
]
crop_size = (513, 513)
model = dict(data_preprocessor=dict(size=crop_size), decode_head=dict(num_classes=21))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(2048, 513), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=4,  # of each of 4 GPUs
    dataset=dict(
        datasets=[
            dict(
                type="PascalVOCDataset",
                data_root="data/VOCdevkit/VOC2012",
                data_prefix=dict(img_path="JPEGImages", seg_map_path=folder),
                ann_file=f"ImageSets/Segmentation/{split}.txt",
                pipeline=train_pipeline,
            )
            for folder, split in (("SegmentationClass", "train"), ("SegmentationClassAug", "aug"))
        ]
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.003, momentum=0.9, weight_decay=0.0001),
)
param_scheduler = [dict(type="MultiStepLR", by_epoch=False, milestones=[21000, 27000], gamma=0.1)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=30000, val_interval=30000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
