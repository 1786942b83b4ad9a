# ruff: noqa: C408 (a config of MMEngine)
# Fully convolutional networks as MoCo (He et al. 2020) fine-tunes them, and SlotCon (Wen et al. 2022) after it: the last
# stage has stride 1 and its 3x3 convolutions dilation 2, and two 3x3 convolutions of 256 channels and dilation 6 follow.
# 16 images in an iteration, weight decay 1e-4.
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor"),
    backbone=dict(
        type="ResNet",
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        contract_dilation=True,  # the first block saw the finer map before, and keeps dilation 1
        norm_cfg=norm_cfg,
        norm_eval=False,
    ),
    decode_head=dict(
        type="FCNHead",
        in_channels=2048,
        in_index=3,
        channels=256,
        num_convs=2,
        kernel_size=3,
        dilation=6,
        concat_input=False,
        dropout_ratio=0.0,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
