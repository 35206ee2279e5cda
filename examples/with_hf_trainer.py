"""A cached teacher in the Trainer of Hugging Face: compute_loss is overridden, the model is any module.

pip install transformers accelerate && kdcache demo && python examples/with_hf_trainer.py kdcache-demo/digits.kdcache
"""

import sys
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import kdcache
from kdcache.config.schema import DatasetSpec
from kdcache.data.loader import batches
from kdcache.data.views import View

EPOCHS = 10


class Distiller(Trainer):
    """A Trainer of a student of the teacher that a cache is."""

    def __init__(self, cache: kdcache.Cache, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = cache.teacher(self.args.device)
        self.kd_loss = kdcache.Loss.model_validate({"name": "kd"})

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """With the teacher's logits in training; in evaluation, where there are no ids, the cross-entropy."""
        logits = model(inputs["images"])
        if "ids" in inputs:
            teacher_logits = self.teacher(inputs["ids"], inputs["views"])
            epoch = int(self.state.epoch or 0) + 1
            loss = kdcache.distillation_loss(logits, teacher_logits, inputs["labels"], self.kd_loss, epoch).total
        else:
            loss = nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


class EachEpochItsView(TrainerCallback):
    """Each epoch has its view."""

    def __init__(self, train: kdcache.CachedDataset) -> None:
        self.train = train

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before any batch of the epoch is loaded."""
        self.train.set_epoch(round(state.epoch or 0))


def collate(items: list[tuple[Any, ...]]) -> dict[str, Tensor]:
    """Items of a CachedDataset, or pairs of an image and a label, by name."""
    return dict(zip(("images", "labels", "ids", "views"), torch.utils.data.default_collate(items), strict=False))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Of the logits of the test split."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


torch.manual_seed(0)
digits = DatasetSpec(name="digits")
cache = kdcache.open_cache(sys.argv[1])
train = kdcache.CachedDataset(kdcache.load_split(digits, "train"), cache)
test = kdcache.load_split(digits, "test")
images, labels, *_ = next(batches(View(test, test.transform), [range(len(test))]))

with tempfile.TemporaryDirectory() as folder:
    trainer = Distiller(
        cache,
        model=nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        args=TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=100,
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
        eval_dataset=TensorDataset(images, labels),
        compute_metrics=accuracy,
        callbacks=[EachEpochItsView(train)],
    )
    trainer.train()
    sys.stdout.write(f"test accuracy {trainer.evaluate()['eval_accuracy']:.2%}\n")
