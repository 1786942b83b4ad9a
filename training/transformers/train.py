"""Training by transformers' Trainer, with the image order, the stop requests and the rows of clove-hub's fine-tuning.

Images, augmentations and random numbers in a step are functions of the seed and the step, so that an interrupted run
continues as if it had not been. Weights and optimizer state are in the Trainer's own checkpoints.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from clove_hub.runs import METRICS
from clove_hub.weights.transformers import quiet

from ..finetune.dataset import OrderByKind
from ..run.device import synchronized
from ..run.folder import RunFolder
from ..run.loader import open_loader
from ..run.progress import Progress
from ..run.sampler import StepSampler, step_seed
from ..run.stopping import FINISHED, Stop
from .examples import batches_of
from .settings import ModelSettings

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
WHOLE = "whole"
"""The file that marks a complete checkpoint."""


def train(
    settings: ModelSettings,
    network: Any,
    prefix: str,
    photos: Any,
    processor: Any,
    folder: RunFolder,
    accelerator: Accelerator,
    steps: int,
    micro: int,
    asked_to_stop: Stop,
) -> int:
    """Train until the last step or a stop request, resuming from the run's folder; return the exit code.

    Args:
        network: the model; it is modified.
        prefix: the path of the backbone inside.
        photos: the training images, as `load_data` reads them.
        steps: optimizer steps.
        micro: images per forward pass of this process.
        asked_to_stop: the requested exit code, or 0.

    Raises:
        FloatingPointError: a non-finite loss or gradient; the newest checkpoint is from before.
        OSError: a file of the run cannot be written, a data-loading worker or another process of the run has ended.
    """
    peers = folder.peers
    place = folder.path / CHECKPOINTS
    last = peers.from_main(newest(place) if peers.main else None)
    start = _step(last) if last else 0
    folder.truncate(METRICS, start)
    network = synchronized(network, accelerator)
    batch, seed = settings.batch.total, settings.run.seed
    order = OrderByKind([0] * len(photos) if settings.squares else photos.kinds, batch, seed)
    sampler = StepSampler(order, batch, micro, peers.rank, peers.world, start, steps)
    workers = min(settings.data.workers, max(steps - start, 1))
    batches = open_loader(
        batches_of(photos, settings, processor),
        sampler,
        workers,
        accelerator.device.type == "cuda",
        None,
        settings.run.timeout,
    )
    arguments = TrainingArguments(
        output_dir=str(place),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // (micro * peers.world),
        learning_rate=settings.optimizer.learning_rate,
        max_grad_norm=settings.optimizer.clip_norm,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup(steps),
        bf16=settings.run.precision == "bf16",
        use_cpu=accelerator.device.type == "cpu",
        seed=seed,
        logging_steps=settings.run.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a non-finite loss ends the run
        save_steps=settings.run.save_every,
        save_total_limit=settings.run.keep,
        ignore_data_skip=True,  # the sampler starts where the run resumes
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    with Progress(peers.main, start, steps) as progress:
        follower = Follower(settings, folder, progress, asked_to_stop)
        trainer = StepTrainer(batches, network, arguments, make_optimizer(network, prefix, settings), follower)
        if start < steps:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        elif last:
            restore(network, last)
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # from here on the network computes in float32
    if follower.code:
        log.info("asked to stop: saved after step %d; start the run again to resume", trainer.state.global_step)
        return follower.code
    return FINISHED


class StepTrainer(Trainer):
    """A Trainer with external batches; transformers has no other way to pass them."""

    def __init__(
        self,
        batches: Iterator[Mapping[str, Any]],
        network: nn.Module,
        arguments: TrainingArguments,
        optimizer: torch.optim.Optimizer,
        follower: Follower,
    ) -> None:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # more GPUs only by `accelerate launch`
        super().__init__(network, arguments, optimizers=(optimizer, None), callbacks=[follower])
        self.remove_callback(PrinterCallback)
        self.batches = batches
        # As for a language model, whose loss is a sum over tokens, gradients would be summed instead of averaged.
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> Any:
        return self.batches

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Replace transformers' own, which up to 5.24 skips the tensors that a model names differently in files.

        Those are DETR's backbone: it would silently restart from the run's initial weights.
        """
        restore(self.model, Path(resume_from_checkpoint))


class Follower(TrainerCallback):
    """Seed each step, write rows, check for stop requests and mark complete checkpoints."""

    def __init__(self, settings: ModelSettings, folder: RunFolder, progress: Progress, asked_to_stop: Stop) -> None:
        self.settings, self.folder, self.progress, self.asked_to_stop = settings, folder, progress, asked_to_stop
        self.code = FINISHED

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        torch.manual_seed(step_seed(self.settings.run.seed, state.global_step, self.folder.peers.rank))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.bar.update()
        self.code = self.folder.peers.highest(self.asked_to_stop())
        if self.code or state.global_step == state.max_steps:
            control.should_save = control.should_training_stop = True
        if control.should_save:  # after the loss was checked
            control.should_log = True
            self.folder.require_own()

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        row = {name: value for name, value in (logs or {}).items() if name in ("loss", "grad_norm", "learning_rate")}
        if "loss" not in row:  # the summary at the end
            return
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"{bad[0]} is not finite after step {state.global_step}; the newest checkpoint is from before. Train again with a "
                f"lower optimizer.learning_rate (now {self.settings.optimizer.learning_rate:g}) or run.precision=fp32, and with "
                "another --out"
            )
        steps, seconds = self.progress.lap(state.global_step)
        speed = steps * self.settings.batch.total / seconds
        self.folder.append(METRICS, {"step": state.global_step, **row, "images_per_second": speed})
        self.progress.show({"loss": f"{row['loss']:.3f}", "images/s": f"{speed:.1f}"})

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.folder.peers.main:
            (self.folder.path / CHECKPOINTS / f"checkpoint-{state.global_step}" / WHOLE).touch()


def restore(network: Any, folder: Path) -> None:
    """Load the weights that `save_pretrained` wrote into the network, as `from_pretrained` does."""
    with quiet():
        opened, report = type(network).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), f"{folder}: {report}"
    network.load_state_dict(opened.state_dict())


def make_optimizer(network: nn.Module, prefix: str, settings: ModelSettings) -> torch.optim.Optimizer:
    """AdamW, with a separate rate for the backbone, and no decay of one-dimensional parameters and embeddings."""
    chosen = settings.optimizer
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or id(parameter) in tables
            groups.setdefault((name.startswith(f"{prefix}."), free), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": chosen.learning_rate * (chosen.backbone_rate if inside else 1),
                "weight_decay": 0.0 if free else chosen.weight_decay,
            }
            for (inside, free), parameters in groups.items()
        ]
    )


def newest(place: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are removed, because the Trainer would count them."""
    whole = []
    for path in place.glob("checkpoint-*"):
        if (path / WHOLE).is_file():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    assert found is not None
    return int(found[1])
