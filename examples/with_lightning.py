"""A cached teacher in Lightning: the student is a LightningModule, and the Trainer knows nothing of teachers.

pip install lightning && kdcache demo && python examples/with_lightning.py kdcache-demo/digits.kdcache
"""

import sys

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdcache
from kdcache.config.schema import DatasetSpec
from kdcache.data.loader import batches
from kdcache.data.views import View

EPOCHS = 10


class Student(lightning.LightningModule):
    """A small network that learns from the teacher that a cache is."""

    def __init__(self, train: kdcache.CachedDataset, cache: kdcache.Cache) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.data, self.cache = train, cache
        self.loss = kdcache.Loss.model_validate({"name": "kd"})

    def on_fit_start(self) -> None:
        """The teacher answers on the device that Lightning chose."""
        self.teacher = self.cache.teacher(self.device)

    def on_train_epoch_start(self) -> None:
        """Each epoch has its view."""
        self.data.set_epoch(self.current_epoch)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of a batch of a CachedDataset."""
        images, labels, ids, views = batch
        logits = self.network(images)
        epoch = self.current_epoch + 1
        return kdcache.distillation_loss(logits, self.teacher(ids, views), labels, self.loss, epoch).total

    def test_step(self, batch: list[Tensor], _: int) -> None:
        """The accuracy on a batch of images and labels."""
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(dim=1) == labels).float().mean(), batch_size=len(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the student alone: a cached teacher has no parameters."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


lightning.seed_everything(0, verbose=False)
digits = DatasetSpec(name="digits")
cache = kdcache.open_cache(sys.argv[1])
train = kdcache.CachedDataset(kdcache.load_split(digits, "train"), cache)
test = kdcache.load_split(digits, "test")
images, labels, *_ = next(batches(View(test, test.transform), [range(len(test))]))

trainer = lightning.Trainer(
    max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)
student = Student(train, cache)
trainer.fit(student, DataLoader(train, batch_size=64, shuffle=True))
(measured,) = trainer.test(student, DataLoader(TensorDataset(images, labels), batch_size=100), verbose=False)
sys.stdout.write(f"test accuracy {measured['accuracy']:.2%}\n")
