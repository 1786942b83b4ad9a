"""Evaluation of a backbone without fine-tuning it, on any timm model.

Each protocol is a module with

    VERSION         goes up when the same settings no longer give the same figures
    RULE            whose rule it follows, as `Record.rule`; `own` for one that its page alone states. Where the settings
                    have a `rule`, it is the default one of these
    RULES           where there are several: what each does or presets, by name
    RANDOMNESS      what it draws from the seed, in words; empty if nothing. Where it depends on the settings, they have
                    `randomness`
    PREPROCESSING   what it takes of the model's own preprocessing: names of `Preprocessing`'s fields
    Settings        a frozen dataclass

and

    evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome

`run.run_protocol` calls one and records what came out; nothing here imports torch before that.
"""

PROTOCOLS = {
    "correspond": "how many cells of a crop have their nearest neighbor at the same place in another crop; no labels",
    "knn": "weighted k-nearest-neighbor classification of whole images",
    "linear-svm": "one linear SVM for each class on pooled features, as on VOC07",
    "dense-probe": "a linear layer on frozen feature maps predicts the class of each pixel",
    "linear-seg": "batch norm and a linear layer on frozen features, trained on crops, as in DINOv2 and DINOv3",
    "in-context": "each patch gets the classes of the nearest patches of the training images, as in Hummingbird",
    "cluster": "clusters of the features of all images, each assigned to one class, as in Leopart",
    "retrieve": "regions of the validation images get the class of the nearest region of the training images",
    "propagate": "the mask of a video's first frame, propagated by the features alone, as on DAVIS",
    "depth": "a linear layer on frozen feature maps predicts the depth of each pixel, as on NYUv2",
    "match": "keypoints find the same part of another object by the features alone, as on SPair-71k",
    "discover": "one box around the object that the features separate from the rest: LOST, TokenCut",
}
"""The protocols and what each of them measures; a protocol's module has its name, with underscores."""
