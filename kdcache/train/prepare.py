"""What a network is trained on, and the check that the loss is defined for it."""

from __future__ import annotations

from kdcache.cache.teacher import Teacher
from kdcache.config.schema import StudentSpec, TeacherSpec, TrainSpec
from kdcache.config.transform import Transform
from kdcache.data.transforms import is_random
from kdcache.data.views import View
from kdcache.errors import UsageError, counted
from kdcache.losses import Loss
from kdcache.runtime.launched import n_processes
from kdcache.runtime.progress import Progress
from kdcache.train.dense import check_dense_loss
from kdcache.train.held_out import OPTION, describe
from kdcache.train.inputs import TrainingInputs, labels_shown
from kdcache.train.scoring import HeldOut
from kdcache.train.shared_views import SharedViews
from kdcache.train.student_transform import own_training_view


def smallest_micro_batch(spec: TrainSpec, n_samples: int) -> int:
    """Return the number of images of the smallest micro-batch of a process."""
    return min(spec.batch_size, n_samples) // (spec.gradient_accumulation_steps * n_processes())


def training_view(
    spec: TeacherSpec | StudentSpec, loss: Loss, inputs: TrainingInputs, views: SharedViews, progress: Progress
) -> tuple[View, int | None, Teacher | None]:
    """Return the training images of a network, the number of their views, and its teacher."""
    teacher = inputs.teacher if loss.uses_cache else None
    own = spec.transform if isinstance(spec, StudentSpec) else None
    if inputs.samples.maps is not None and spec.train.labels_per_class is not None:
        raise UsageError(
            f"train.labels_per_class hides labels of images, and {inputs.samples.name} has a class per pixel",
            "remove train.labels_per_class",
        )
    if own is None:
        labels = labels_shown(inputs.samples, spec.train)
        view = views.view(inputs.samples, inputs.transform, inputs.seed, labels=labels, crops=inputs.crops)
        return view, inputs.views, teacher
    if inputs.samples.maps is not None and teacher is not None:
        raise UsageError(
            f"student.transform would move the pixels, and {inputs.samples.name} has a class per pixel: the teacher's "
            "places would be others",
            "remove student.transform; dump several views (cache.views) for a student that sees moved images",
        )
    train = own_training_view(inputs, own, spec.train, views)
    if teacher is not None:
        progress.say("note: the student sees images through student.transform: the teacher did not see these pixels")
    return train, None if is_random(own) else 1, views.fixed(teacher) if teacher is not None else None


def divided_inputs(
    spec: TrainSpec, loss: Loss, inputs: TrainingInputs, views: SharedViews, progress: Progress
) -> tuple[TrainingInputs, TrainingInputs | None]:
    """Return what a network is trained on, and the samples that are held out to select its epoch; None for none.

    Raises:
        UsageError: if a validation split selects the epoch, or too few samples would be held out or left.
    """
    is_validated = loss.uses_logits and inputs.validation is not None
    if spec.held_out_fraction and is_validated:
        raise UsageError(
            f"{OPTION} has no effect: the validation split of {inputs.samples.name} selects the epoch, by its accuracy",
            f"remove {OPTION}, or train without a validation split (dataset.validation_fraction 0)",
        )
    if not spec.held_out_fraction:
        if not loss.uses_logits:
            progress.say(
                "note: without class logits nothing is validated, and the last epoch is kept; to select an epoch, hold "
                f"out samples of the cache, such as --set student.{OPTION}=0.1"
            )
        return inputs, None
    trained, held = views.hold_out(inputs, spec.held_out_fraction)
    progress.say(describe(trained, held))
    return trained, held


def held_out_view(
    spec: TeacherSpec | StudentSpec, loss: Loss, held: TrainingInputs, eval_transform: Transform, views: SharedViews
) -> HeldOut:
    """Return the samples that are held out, as the teacher saw them in view 0, or by the transform of evaluation."""
    teacher = held.teacher if loss.uses_cache else None
    if teacher is None or (isinstance(spec, StudentSpec) and spec.transform is not None):
        return HeldOut(views.view(held.samples, eval_transform), None if teacher is None else views.fixed(teacher))
    return HeldOut(views.view(held.samples, held.transform, held.seed, crops=held.crops), teacher)


def check_loss(loss: Loss, train: View, level_known: bool, epochs: int, progress: Progress) -> None:
    """Check that the loss is defined for these images, labels and logits, and that its warm-up ends within the run.

    Raises:
        UsageError: if it is not.
    """
    if train.samples.maps is not None:
        check_dense_loss(loss, train)
    elif loss.uses_logits and not loss.uses_teacher and not bool((train.labels >= 0).any()):
        if loss.outputs:
            raise UsageError(
                "no training sample has a label, and the loss has a cross-entropy beside its other outputs",
                f"leave the class logits out: loss={{logits: false, {next(iter(loss.outputs))}: ...}}",
            )
        if bool((train.samples.labels >= 0).any()):
            raise UsageError("train.labels_per_class is 0, and the loss uses no teacher", "raise it, or remove it")
        raise UsageError(
            "no training sample has a label, and the loss uses no teacher",
            "give the data set labels (of a graph: in its mask train), or distill from a cache",
        )
    if train.mixes and loss.acts_on_label:
        raise UsageError(
            f"{loss.acts_on_label} acts on the one true class of an image, and {train.transform[-1]} mixes two images",
            "use a loss without ka, lsr, dkd, pld, ofa, the alpha of brier, tgeo and the training reward of itkd, such "
            "as kd or dtkd, or a cache of views that are not mixed",
        )
    if loss.uses_teacher and loss.warmup_epochs > epochs:
        progress.say(
            f"note: the teacher's weight grows over {loss.warmup_epochs:g} epochs, and the run has {epochs}, so it "
            f"reaches {epochs / loss.warmup_epochs:.0%} of its value; lower loss.warmup_epochs, or train longer"
        )
    top = loss.adjustment.classes_kept
    if top is not None and top >= train.samples.num_classes:
        raise UsageError(
            f"truncation to the top {top} has no effect: {train.samples.name} has {train.samples.num_classes} classes",
            "set loss.adjustment.top to fewer, or remove the truncation",
        )
    if train.samples.maps is None and loss.skips_unlabeled and (unlabeled := int((train.labels < 0).sum())):
        if unlabeled == len(train.labels):
            raise UsageError(
                f"no training image has a label, and the divergence {loss.divergence.kind} needs labels",
                "use another divergence, such as kl",
            )
        progress.say(
            f"note: without a label, {counted(unlabeled, 'image')} of the training split cannot contribute: the "
            f"divergence {loss.divergence.kind} needs labels"
        )
    if loss.tail != "stored":
        raise UsageError(
            f"loss.tail is {loss.tail!r}: it is for a teacher of tokens, and the rows of images have their tail",
            "remove it",
        )
    if loss.needs_level and not level_known and train.samples.maps is not None:
        raise UsageError(
            f"the maps of this cache are stored without the level of each place, and {loss.needs_level} depends on it",
            "dump the teacher with cache.outputs.NAME.over_places=true, set loss.normalization to z_score, or use a "
            "loss such as kd",
        )
    if loss.needs_level and not level_known:
        raise UsageError(
            f"the logits of this teacher are known up to an additive constant per sample, because only its "
            f"probabilities were imported; {loss.needs_level} depends on that constant",
            "set loss.normalization to z_score, for dtkd loss.temperature.center to true, or use a loss such as kd",
        )
