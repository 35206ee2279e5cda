"""A cached teacher in Lightning: the student is a LightningModule, and any Trainer will do.

pip install lightning && kdcache demo && python examples/with_lightning.py kdcache-demo/digits.kdcache
"""

import sys

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import kdcache

EPOCHS = 10


class Student(lightning.LightningModule):
    """A small network that learns from a cached teacher."""

    def __init__(self, train: kdcache.CachedDataset, cache: kdcache.Cache) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.data, self.cache = train, cache
        self.loss = kdcache.loss("kd", tau=4)

    def on_fit_start(self) -> None:
        """Open the teacher on the device that Lightning chose."""
        self.teacher = self.cache.teacher(device=self.device)

    def on_train_epoch_start(self) -> None:
        """Set the view of the epoch."""
        self.data.set_epoch(self.current_epoch)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch of a CachedDataset."""
        images, labels, ids, views = batch
        parts: kdcache.LossParts = self.loss(
            self.network(images), self.teacher(ids, views), labels, self.current_epoch + 1
        )
        return parts.total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; a cached teacher has no parameters."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


lightning.seed_everything(0, verbose=False)
cache = kdcache.open_cache(sys.argv[1])
train = kdcache.CachedDataset(kdcache.load_split("digits", "train"), cache)

trainer = lightning.Trainer(
    max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)
student = Student(train, cache)
trainer.fit(student, DataLoader(train, batch_size=64, shuffle=True))
accuracy = kdcache.evaluate(student.network, kdcache.load_split("digits", "test")).accuracy
sys.stdout.write(f"test accuracy {accuracy:.2%}\n")
