"""The training loop of language models: epochs of sequences, selected by the loss on sequences that are held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from kdcache.config.text import TokenTrainSpec
from kdcache.losses import Loss
from kdcache.models.causal_lm import CausalLM
from kdcache.runtime.progress import Progress, Silent, Task
from kdcache.train.epochs import Checkpointer, Selected, TrainingResult, epochs_work, mean_losses
from kdcache.train.passes import Clock, run_alone
from kdcache.train.tokens.batches import EpochPlan, Micro, in_micro_batches, with_packing
from kdcache.train.tokens.inputs import TokenInputs
from kdcache.train.tokens.scoring import TokenScore, TokenSums, positions_of
from kdcache.train.tokens.step import TokenTrainer


class TokenEpoch(NamedTuple):
    """A line of metrics.csv: losses are means over the steps of the epoch, as `LossParts` defines them.

    `lr` is that of the first step; temperatures are means over the taught positions, None without a teacher. The last
    four are of the sequences that are held out, None without any: the loss, `TokenScore.perplexity`, `kl` and
    `agreement`.
    """

    epoch: int
    lr: float
    loss: float
    cross_entropy: float
    distillation: float
    student_temperature: float | None
    teacher_temperature: float | None
    held_out_loss: float | None
    perplexity: float | None
    kl: float | None
    agreement: float | None


class _TokenEpochs:
    """The epochs of a language model; see `EpochKind`.

    Args:
        trainer: of the network.
    """

    def __init__(self, trainer: TokenTrainer) -> None:
        self._trainer = trainer

    def read(self, values: list[Any]) -> TokenEpoch:
        """Return a line of metrics from its values."""
        return TokenEpoch(*values)

    def is_better(self, line: TokenEpoch, best: TokenEpoch) -> bool:
        """Return whether an epoch is selected instead of the best before it: without held-out sequences, always."""
        if line.held_out_loss is None or best.held_out_loss is None:
            return True
        return line.held_out_loss < best.held_out_loss

    def described(self, line: TokenEpoch) -> str:
        """Return the results of an epoch, for the progress."""
        if line.held_out_loss is None or line.perplexity is None:
            return ""
        return f", held out {line.held_out_loss:.4g}, perplexity {line.perplexity:.4g}"

    def selected(self) -> Selected:
        """Return the network that is validated and saved."""
        return Selected(self._trainer.selected.network, dict)


def fit_tokens(
    causal: CausalLM,
    inputs: TokenInputs,
    held: Sequence[int],
    spec: TokenTrainSpec,
    loss: Loss,
    *,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[TokenEpoch], None] | None = None,
    checkpointer: Checkpointer | None = None,
    progress: Progress | None = None,
) -> TrainingResult[TokenEpoch]:
    """Train a language model, and load the weights of its best epoch into it.

    Args:
        causal: the language model; moved to `device`.
        inputs: sequences and rows.
        held: sequences that no step is taken on; the last epoch is selected if there are none.
        spec: optimizer, schedule, packing, seed.
        loss: minimized.
        device: where to train.
        on_epoch: called with each line of metrics; after a resume, with those before it too.
        checkpointer: stores the state after each epoch, and returns that of an interrupted run.
        progress: progress reporter; silent if None.

    Raises:
        Diverged: if the loss becomes NaN or infinite.
    """

    def start(clock: Clock) -> Generator[Any, Any, TrainingResult[TokenEpoch]]:
        return _training_work(causal, inputs, held, spec, loss, device, on_epoch, checkpointer, progress, clock)

    return run_alone(start, device)


def _training_work(
    causal: CausalLM,
    inputs: TokenInputs,
    held: Sequence[int],
    spec: TokenTrainSpec,
    loss: Loss,
    device: torch.device | str,
    on_epoch: Callable[[TokenEpoch], None] | None,
    checkpointer: Checkpointer | None,
    progress: Progress | None,
    clock: Clock,
) -> Generator[Any, Any, TrainingResult[TokenEpoch]]:
    """Train; see `fit_tokens`. It asks for no passes over images, and so yields nothing."""
    progress, spec = progress or Silent(), with_packing(spec, causal)
    plan = EpochPlan(inputs.sequences, inputs.lengths, held, spec)
    trainer = TokenTrainer(causal, spec, loss, plan, device, progress.say)
    kind = _TokenEpochs(trainer)
    held_cuts = in_micro_batches(held, inputs.lengths, spec)

    def epoch_work(number: int, task: Task, after_step: Callable[[], None]) -> Generator[Any, Any, TokenEpoch]:
        yield from ()
        lr = float(trainer.schedule.get_last_lr()[0])
        parts = _train_epoch(trainer, plan.steps(number, trainer.accelerator), number, after_step)
        means = mean_losses(number, parts, loss.uses_teacher)
        epoch = TokenEpoch(number, lr, **means, held_out_loss=None, perplexity=None, kl=None, agreement=None)
        if not held_cuts:
            return epoch
        held_loss, score = _score_held_out(trainer, held_cuts, number, task)
        return epoch._replace(
            held_out_loss=held_loss, perplexity=score.perplexity, kl=score.kl, agreement=score.agreement
        )

    return (
        yield from epochs_work(
            trainer,
            spec,
            kind,
            lambda done: sum(trainer.steps[done:]),
            epoch_work,
            clock=clock,
            progress=progress,
            on_epoch=on_epoch,
            checkpointer=checkpointer,
        )
    )


def _train_epoch(
    trainer: TokenTrainer, steps: Sequence[Sequence[Sequence[Micro]]], number: int, after_step: Callable[[], None]
) -> list[Any]:
    """Take the steps of an epoch, and return the loss of each, over all processes."""
    own = [step[trainer.accelerator.process_index] for step in steps]
    trainer.sequences.prefetch(which for step in own for which in step if which)
    trainer.model.train()
    parts = []
    for done, micro in enumerate(own, 1):
        parts.append(trainer.step(micro, number))
        if done < len(own):
            after_step()
    trainer.gradients.check()
    return trainer.reduced(parts)


@torch.no_grad()
def _score_held_out(trainer: TokenTrainer, cuts: Sequence[Micro], epoch: int, task: Task) -> tuple[float, TokenScore]:
    """Return the mean loss and the score of the selected network on sequences that the processes divide."""
    own = cuts[trainer.accelerator.process_index :: trainer.ranks]
    trainer.sequences.prefetch(own)
    whole = trainer.selected
    was_training = whole.network.training
    whole.network.eval()
    sums, losses = TokenSums(trainer.device), []
    for number, which in enumerate(own, 1):
        loaded = trainer.load(which, with_teacher=True)
        hidden = whole.causal.hidden_states(loaded.batch)
        head = whole.causal.head.cut(trainer.sequences.encoding.num_classes)
        losses.append(float(trainer.held_out_loss(loaded, hidden)) * len(hidden))
        for positions in positions_of(hidden, head, loaded.batch.labels, loaded.targets):
            sums.add(positions)
        task.advance(0, f"validating epoch {epoch}: batch {number:,} of {len(own):,}")
    whole.network.train(was_training)
    totals = gather_object([(math.fsum(losses), sums.sums.tolist())])
    sums.sums = torch.tensor([part for _, part in totals], dtype=torch.float64).sum(dim=0)
    score = sums.score()
    return math.fsum(value for value, _ in totals) / max(score.positions, 1), score
