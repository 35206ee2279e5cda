"""A student of a cache of sequences in TRL's SFTTrainer; the teacher is not loaded for training.

pip install trl && kdcache demo --tokens -o demo
python examples/with_trl.py demo/topics.kdcache demo/teacher 150

The arguments are the cache, the folder of its teacher (whose tokenizer TRL wants, and which the student is compared
with at the end), and the number of steps. The data set has the number of each sequence in the cache beside its tokens:
the collator compares these with those of the cache, and takes the rows of the sequence.
"""

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import kdcache

HELD_OUT = 40

cache = kdcache.open_cache(sys.argv[1])
teacher_folder, steps = sys.argv[2], int(sys.argv[3])
rows = cache.sequences()


class Distiller(SFTTrainer):
    """An SFTTrainer whose loss compares the student with the rows of a cache, without logits of whole batches."""

    def __init__(self, model: PreTrainedModel, **arguments: Any) -> None:
        self.student = kdcache.split_causal_lm(model)  # before TRL replaces the forward method
        self.kd_loss = kdcache.loss("kd", tau=1)
        super().__init__(model=model, **arguments)
        # num_items_in_batch is given, and the loss is not divided by gradient_accumulation_steps once more.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the sum of the losses of a batch, divided by the number of taught positions of the step."""
        batch = kdcache.TokenBatch(**{name: inputs[name] for name in kdcache.TokenBatch._fields})
        hidden = self.student.hidden_states(batch)
        targets = inputs["targets"].to(hidden.device)
        loss = self.kd_loss.of_tokens(hidden, self.student.head, batch.labels, targets, count=num_items_in_batch).total
        return (loss, {}) if return_outputs else loss


def collate(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return packed sequences, and the teacher's targets of their taught positions in the same order."""
    numbers = [record["sequence"] for record in records]
    sequences = []
    for number, record in zip(numbers, records, strict=True):
        tokens = torch.tensor(record["input_ids"])
        rows.check_tokens(number, tokens)  # names the first token that differs from what the teacher saw
        taught = rows.tokens(number)[1][: len(tokens)].clone()
        taught[-1] = False
        sequences.append(kdcache.TokenSequence(number, tokens, taught))
    batch = kdcache.token_batch(sequences)
    found = rows(numbers, [len(sequence.tokens) for sequence in sequences])
    # transformers counts the labels of a step here; those of a packed batch are shifted already.
    return {**batch._asdict(), "shift_labels": batch.labels, "targets": rows.targets(found.rows)}


def kl_to_teacher(model: nn.Module) -> float:
    """Return the mean KL divergence of a student from the teacher on sequences that are held out, in nats."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    total, count = 0.0, 0
    for number in range(HELD_OUT):
        ids = rows.tokens(number)[0].unsqueeze(0)
        size = rows.encoding.num_classes
        with torch.no_grad():
            q, p = (each.eval()(input_ids=ids).logits[0, :, :size].log_softmax(dim=1) for each in (model, teacher))
        total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        count += len(p)
    return total / count


records = [{"sequence": number, "input_ids": rows.tokens(number)[0].tolist()} for number in range(HELD_OUT, len(rows))]
tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
torch.manual_seed(0)
student = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=rows.encoding.num_classes,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
)
before = kl_to_teacher(student)
with tempfile.TemporaryDirectory() as folder:
    trainer = Distiller(
        student,
        args=SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            dataset_kwargs={"skip_prepare_dataset": True},  # the tokens are those of the cache
            remove_unused_columns=False,  # or the number of the sequence is dropped
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    trainer.train()

sys.stdout.write(f"KL to the teacher: {before:.3f} nats before, {kl_to_teacher(student):.3f} after\n")
