"""A result as it stands in a card."""

MEASURED = {
    "protocol": "voc07-svm, version 1",
    "task": "image-classification",
    "dataset": "PASCAL VOC 2007",
    "dataset_type": "pascal_voc",
    "split": "test2007",
    "settings": "seed 0",
    "metrics": {"mAP": 12.34},
}
