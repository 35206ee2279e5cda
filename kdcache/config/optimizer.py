"""How any network is trained: the keys that students of images and of tokens have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from kdcache.config.section import Count, Section, Seed
from kdcache.losses.options import NotNegative, Positive

Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(Section):
    """Epochs, optimizer, schedule, precision and seeds (`train/optim.py`)."""

    epochs: Count = 30
    """Passes over the training samples."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    lr: Positive = 0.05
    """Highest learning rate."""
    momentum: Fraction = 0.9
    """Momentum of sgd."""
    nesterov: bool = True
    """Nesterov momentum, for sgd."""
    weight_decay: NotNegative = 5e-4
    """Weight decay of every parameter."""
    schedule: Literal["constant", "cosine", "multistep", "onecycle"] = "cosine"
    """Learning rate schedule after the warm-up (`train/optim.py`)."""
    warmup_epochs: NotNegative = 0.0
    """Epochs over which the learning rate grows from 0; for onecycle, to its highest (0: three tenths of all)."""
    milestones: list[Count] = Field(default=[])
    """Epochs after which a multistep schedule multiplies the learning rate by `gamma`."""
    gamma: Positive = 0.1
    """Factor of a multistep schedule."""
    label_smoothing: Fraction = 0.0
    """Label smoothing of the cross-entropy."""
    max_grad_norm: Positive | None = None
    """Gradient clipping: largest norm of the gradient of all parameters."""
    ema_decay: Fraction | None = None
    """Validate and keep an exponential moving average of the weights with this decay per step."""
    early_stopping_patience: Count | None = None
    """Stop after this many epochs without a lower loss of the samples that are held out."""
    held_out_fraction: Fraction = 0.0
    """Fraction of the training samples that are held out: the epoch with the lowest loss on them is selected. Without
    it, the last epoch is."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of training: float32 or mixed precision. Evaluation is in float32."""
    compile: bool = False
    """Compile the network and the loss with torch.compile."""
    seed: Seed = 0
    """Seed of the initial weights and the order of the samples."""
    data_seed: Seed | None = None
    """Seed of the order of the samples; None: `seed`."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]] = (
        Field(default=[])
    )
    """Trackers that get the metrics of each epoch, through accelerate; metrics.csv has them in any case."""

    @property
    def seed_of_data(self) -> int:
        """`data_seed`, or else `seed`."""
        return self.seed if self.data_seed is None else self.data_seed

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if (self.schedule == "multistep") != bool(self.milestones):
            yield ("milestones", "schedule"), "belong to schedule: multistep, which needs at least one"
        if self.warmup_epochs >= self.epochs:
            yield ("warmup_epochs", "epochs"), f"{self.warmup_epochs} leave nothing of {self.epochs} epochs"
