"""Figures of runs and of backbones' features.

Each kind is a module of its name (dashes become underscores): `add_arguments` defines its arguments, `draw` loads the
data and draws them. The drawing itself is a function of arrays that returns a matplotlib figure: it shows and saves
nothing, and does not change matplotlib's global state. From Python: `draw_backbones` of pca, compare, retrieve and
propagate, `bars.draw_results`, and `output.save`.
"""

FIGURES: dict[str, str] = {
    "curves": "loss, cosines and signs of collapse over the steps, of one or several runs",
    "matches": "two views of a photo as a method sees them, and which cells show the same place",
    "attention": "what each head of a CLoVE run's predictor, or of a ViT's last block, attends to from chosen points",
    "pca": "the principal components of backbones' features as colors, of all or of the foreground, below the photos",
    "compare": "several backbones on the same photos: what their features separate and find similar",
    "prototypes": "the photos nearest to the prototypes of a SlotCon run, and where they are",
    "retrieve": "regions of photos and the classes that `evaluate retrieve` finds by each backbone, beside the truth",
    "propagate": "frames of clips with the masks that `evaluate propagate` predicts by each backbone, below the truth",
}
"""The kinds of figures, and what each shows."""
