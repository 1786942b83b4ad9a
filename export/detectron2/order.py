"""The images and random numbers of a process in each iteration, as functions of the seed and the iteration.

Detectron2's loader starts with the seed's first image whenever it is built, also when a training resumes. With these
parts, a resumed training has the images, augmentations and proposals that it would have had without the stop, and on
the CPU the same weights, bit for bit. Remaining differences:

- GPUs add in any order, so weights differ by rounding, as they do between any two runs.
- Another number of processes divides the images differently.
- Batch norm that is not synchronized has separate statistics in each process; a checkpoint holds the first's.
- Precise batch norm starts again with the seed's first images, which matters if it also runs before the end
  (TEST.EVAL_PERIOD).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import GroupedBatchSampler
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, Dataset

from clove_hub.processes import deaf_workers


def in_order(loader: Any, seed: int, start: int) -> DataLoader[Any]:
    """The batches of a Detectron2 training loader starting at an iteration. Earlier images are not read.

    They are the batches of Detectron2 without workers; its workers would each group their own images.

    Args:
        loader: as `build_detection_train_loader` builds it, for any data set, sampler and mapper.
        start: the iteration, counted from 0.
    """
    grouped = isinstance(loader, AspectRatioGroupedDataset)
    single = loader.dataset if grouped else loader
    images, sampler = single.dataset.dataset, single.dataset.sampler
    if grouped:
        records = images._dataset  # the annotations only; `images` itself would read the files
        wide = [record["width"] > record["height"] for record in (records[i] for i in range(len(records)))]
        batches = GroupedBatchSampler(sampler, wide, loader.batch_size)
    else:
        batches = BatchSampler(sampler, loader.batch_size, drop_last=True)
    places = (
        [(iteration, place, image) for place, image in enumerate(batch, start=1)]
        for iteration, batch in islice(enumerate(batches), start, None)
    )
    return DataLoader(
        Augmented(images, seed, comm.get_rank()),
        batch_sampler=places,
        num_workers=single.num_workers,
        collate_fn=trivial_batch_collator,
        worker_init_fn=deaf_workers()[1],
        generator=Generator(),  # otherwise it draws from the global one during the first iteration
    )


@dataclass(frozen=True)
class Augmented(Dataset[Any]):
    """Images by their position in a training, (iteration, place in the batch from 1, image)."""

    images: Any
    seed: int
    rank: int

    def __getitem__(self, at: tuple[int, int, int]) -> Any:
        iteration, place, image = at
        # Detectron2's and DensePose's augmentations draw only from NumPy's global generator.
        np.random.seed(mixed(self.seed, self.rank, iteration, place))  # noqa: NPY002
        return self.images[image]


class StepSeed(HookBase):  # type: ignore[misc]
    """Seeds the model's random numbers in an iteration, such as the choice of proposals."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        seed_all_rng(mixed(self.seed, comm.get_rank(), self.trainer.iter))


def mixed(*numbers: int) -> int:
    """A 32-bit seed from several numbers; trailing zeros have no effect."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
