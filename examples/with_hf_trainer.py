"""A cached teacher in the Trainer of Hugging Face: compute_loss is overridden, and the model may be any module.

pip install transformers accelerate && kdcache demo && python examples/with_hf_trainer.py kdcache-demo/digits.kdcache
"""

import sys
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import kdcache

EPOCHS = 10


class Distiller(Trainer):
    """A Trainer of a student that learns from a cached teacher."""

    def __init__(self, cache: kdcache.Cache, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = cache.teacher(device=self.args.device)
        self.kd_loss = kdcache.loss("kd", tau=4)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch of a CachedDataset."""
        logits = model(inputs["images"])
        teacher_logits = self.teacher(inputs["ids"], inputs["views"])
        epoch = int(self.state.epoch or 0) + 1
        loss = self.kd_loss(logits, teacher_logits, inputs["labels"], epoch).total
        return (loss, {"logits": logits}) if return_outputs else loss


class SetView(TrainerCallback):
    """A callback that sets the view of each epoch."""

    def __init__(self, train: kdcache.CachedDataset) -> None:
        self.train = train

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the view before any batch of the epoch is loaded."""
        self.train.set_epoch(round(state.epoch or 0))


def collate(items: list[tuple[Any, ...]]) -> dict[str, Tensor]:
    """Return a batch of items of a CachedDataset by name."""
    return dict(zip(("images", "labels", "ids", "views"), torch.utils.data.default_collate(items), strict=True))


torch.manual_seed(0)
cache = kdcache.open_cache(sys.argv[1])
train = kdcache.CachedDataset(kdcache.load_split("digits", "train"), cache)
student = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

with tempfile.TemporaryDirectory() as folder:
    trainer = Distiller(
        cache,
        model=student,
        args=TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=64,
            learning_rate=0.005,
            label_names=["labels"],
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=train,
        callbacks=[SetView(train)],
    )
    trainer.train()

accuracy = kdcache.evaluate(student, kdcache.load_split("digits", "test")).accuracy
sys.stdout.write(f"test accuracy {accuracy:.2%}\n")
