"""A language model's teacher that runs once, in the Trainer of Hugging Face: nothing is downloaded.

pip install transformers accelerate && python examples/with_hf_trainer_lm.py 150

The argument is the number of steps of the teacher, which learns the bytes of a text that Python brings along; of the
student there are as many. The student sees the teacher's 16 most probable bytes and the mass of all others, and never
the teacher.
"""

import sys
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import kdcache

LENGTH, COUNT, VOCABULARY_SIZE = 64, 600, 256
STEPS = int(sys.argv[1])

Item = tuple[kdcache.TokenSequence, kdcache.TokenTargets]


def language_model(hidden_size: int) -> LlamaForCausalLM:
    """Return a small language model of bytes."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


class Distiller(Trainer):
    """A Trainer of a student that learns from stored targets, without logits of whole batches."""

    def __init__(self, student: kdcache.CausalLM, **arguments: Any) -> None:
        super().__init__(model=student.network, **arguments)
        self.student = student
        self.kd_loss = kdcache.loss("kd", tau=1)
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


def collate(items: list[Item]) -> dict[str, Any]:
    """Return packed sequences, and the targets of their taught positions in the same order."""
    sequences, targets = zip(*items, strict=True)
    batch = kdcache.token_batch(sequences)
    taken = [each[:count] for each, (_, count) in zip(targets, batch.rows, strict=True)]
    # transformers counts the labels of a step here; those of a packed batch are shifted already.
    counted = {"shift_labels": batch.labels}
    return {**batch._asdict(), **counted, "targets": kdcache.TokenTargets.concatenate(taken)}


def kl_to_teacher(student: nn.Module, teacher: nn.Module, tokens: Tensor) -> float:
    """Return the mean KL divergence of the next bytes, in nats."""
    with torch.no_grad():
        q, p = (model(input_ids=tokens).logits.log_softmax(dim=2) for model in (student.eval(), teacher))
    return float(F.kl_div(q, p, log_target=True, reduction="none").sum(dim=2).mean())


torch.manual_seed(0)
text = "".join(topics[name] for name in sorted(topics)).encode()[: LENGTH * (COUNT + 50)]
tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().reshape(-1, LENGTH)
train, test = tokens[:COUNT], tokens[COUNT:]

teacher = language_model(64)
optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.005)
for _ in range(STEPS):
    batch = train[torch.randint(COUNT, (16,))]
    optimizer.zero_grad()
    loss = F.cross_entropy(teacher(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    torch.autograd.backward(loss)
    optimizer.step()

# The teacher runs once: 16 log-probabilities and the mass of the other bytes, for each position but the last.
teacher.train(False)
taught = torch.arange(LENGTH) < LENGTH - 1
items: list[Item] = []
for number, sequence in enumerate(train):
    with torch.no_grad():
        logits = teacher(input_ids=sequence.unsqueeze(0)).logits[0, :-1]
    items.append((kdcache.TokenSequence(number, sequence, taught), kdcache.TokenTargets.of_logits(logits, top_k=16)))

student = language_model(32)
before = kl_to_teacher(student, teacher, test)
with tempfile.TemporaryDirectory() as folder:
    trainer = Distiller(
        kdcache.split_causal_lm(student),
        args=TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            remove_unused_columns=False,  # or the Trainer drops what the forward method does not name
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=items,
    )
    trainer.train()

sys.stdout.write(f"KL to the teacher: {before:.3f} nats before, {kl_to_teacher(student, teacher, test):.3f} after\n")
