"""The schema of pipeline files for language models: `dataset: {name: text}`.

The sections have the names of those of images, and keys of their own. The docstrings of the fields are the table of
keys in docs/PIPELINES.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from kdcache.config.optimizer import OptimizerSpec
from kdcache.config.section import Count, Section
from kdcache.config.yaml_lines import write_yaml
from kdcache.errors import UsageError
from kdcache.losses.config import Loss
from kdcache.losses.options import NotNegative, Positive
from kdcache.losses.presets import settings_of_name
from kdcache.losses.registry import TEMPERATURES
from kdcache.runtime.user_code import is_user_code

_SHORTEST = 2
"""Tokens of a sequence with a position to teach, at least."""


class TextSpec(Section):
    """Texts, and how they become sequences of tokens (`data/text.py`)."""

    name: Literal["text"]
    """`text`."""
    root: str | None = None
    """File of JSON lines, parquet or plain text, a folder of such files, or a folder of `datasets.save_to_disk`. A
    student that is trained from a cache needs none: the tokens are in the cache."""
    format: Literal["auto", "text", "messages", "prompt-completion", "tokens"] = "auto"
    """What a record holds: a text, a conversation, a prompt and its completion, or token ids; `auto`: by its keys."""
    column: str | None = None
    """Key of the text, the messages or the token ids in a record; None: the usual ones."""
    tokenizer: str | None = None
    """Folder with the tokenizer; None: that of the teacher."""
    max_length: Count = 1024
    """Tokens per sequence at most. A longer text becomes several sequences; a longer conversation is cut at its end."""
    taught: Literal["auto", "all", "completion"] = "auto"
    """Positions with a row of the teacher: all, or those whose next token the completion or an assistant says; `auto`:
    `completion` for conversations and for prompts with completions, all for texts."""
    append_eos: bool | None = None
    """Whether the token that ends a text (eos) is appended where the tokenizer itself does not; None: to completions
    only."""


class LanguageModelSpec(Section):
    """A causal language model."""

    model: str
    """`hf:FOLDER`, a folder of transformers; `transformers:TYPE`, a new network of a type that transformers knows, such
    as llama; or `path/file.py:function`, which returns one."""
    args: dict[str, Any] = Field(default={})
    """For `transformers:TYPE` the keys of its configuration, for a function its keyword arguments."""

    @field_validator("model")
    @classmethod
    def _is_known(cls, model: str) -> str:
        kind, _, name = model.partition(":")
        if not ((kind in ("hf", "transformers") and name) or is_user_code(model)):
            raise ValueError("Input should be hf:FOLDER, transformers:TYPE or path/file.py:function")
        return model

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.args and self.model.startswith("hf:"):
            yield ("args", "model"), "are for transformers:TYPE and path/file.py:function; a folder takes none"


class LanguageTeacherSpec(LanguageModelSpec):
    """The teacher."""


class TokenCacheSection(Section):
    """What a cache stores of the teacher at each taught position, and how the teacher is run."""

    top_k: Count = 16
    """Tokens of each row that are stored individually, the most probable ones. Not of `draws`."""
    tail: Literal["lowrank", "ghost", "draws"] = "lowrank"
    """What is stored of the other tokens: coordinates in a basis and their mass; their mass alone; or instead of all
    probabilities some tokens that are drawn from them (RS-KD)."""
    rank: Count = 32
    """Coordinates of a `lowrank` tail; the other tails have none."""
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.4
    """Quantization step of the coordinates of `lowrank`, in nats."""
    draws: Annotated[int, Field(ge=1, le=255)] = 50
    """Tokens that are drawn per row, for `draws`."""
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """That they are drawn at, for `draws`."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the log-probabilities."""
    pilot_rows: Count = 4096
    """Rows on which the basis of `lowrank` is fitted."""
    batch_tokens: Count = 16384
    """Tokens per batch of the teacher."""
    shard_sequences: Count | None = None
    """Sequences per shard, the unit of writing; None chooses it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the teacher's weights and of its body; the head is applied, and rows are encoded, in float32."""
    license: str = ""
    """License of the cache, for the manifest."""
    notes: str = ""
    """Notes for its users, for the manifest."""


class TokenTrainSpec(OptimizerSpec):
    """How a language model is trained."""

    epochs: Count = 1
    """Passes over the training sequences."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """The optimizer."""
    lr: Positive = 5e-4
    """Highest learning rate."""
    weight_decay: NotNegative = 0.01
    """Weight decay of every parameter."""
    max_grad_norm: Positive | None = 1.0
    """Gradient clipping: largest norm of the gradient of all parameters."""
    batch_tokens: Count = 8192
    """Tokens per step, over all processes, without padding."""
    micro_batch_tokens: Count | None = None
    """Tokens that a process passes through the network at once, with padding; None: its whole part of a step, or all
    sequences of about the same length."""
    max_length: Count | None = None
    """Longer sequences are cut to a prefix of as many tokens; None for whole sequences."""
    packed: bool | Literal["auto"] = "auto"
    """Whether the sequences of a micro-batch are packed end to end; or else those of about the same length are padded
    together. Both give the same step. `auto` packs for networks whose attention does not compute what packing masks
    (flash_attention_2, flex_attention). Networks that do not keep packed sequences apart are refused for `true`."""

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super()._combinations()
        if self.early_stopping_patience is not None and not self.held_out_fraction:
            message = "stopping early needs sequences that are held out: set held_out_fraction, such as 0.05"
            yield ("early_stopping_patience", "held_out_fraction"), message
        if self.max_length is not None and self.max_length < _SHORTEST:
            yield ("max_length",), "a prefix of one token has no token to predict: set 2 or more"


class LanguageStudentSpec(LanguageModelSpec):
    """The student and its training."""

    train: TokenTrainSpec = TokenTrainSpec()
    """How `train-student` trains it."""


def at_temperature_1(given: Any) -> Any:
    """Return the section of a loss with `tau: 1` where neither it nor the name of the loss sets another.

    Language models are distilled at T = 1. The defaults of the losses are those of image classification.
    """
    if not isinstance(given, dict) or not isinstance(given.get("name", "kd"), str):
        return given
    try:
        base = settings_of_name(given.get("name", "kd"))
    except ValueError:
        return given
    own = given.get("temperature", {})
    if not isinstance(own, dict) or not any(
        given.get(key, base.get(key, 0)) for key in ("kd_weight", "plain_kd_weight")
    ):
        return given
    temperature = own if "kind" in own else {**base["temperature"], **own}
    kind = temperature.get("kind")
    if "tau" in temperature or kind not in TEMPERATURES or "tau" not in TEMPERATURES[kind].model_fields:
        return given
    return {**given, "temperature": {**temperature, "tau": 1.0}}


class TextPipeline(Section):
    """A whole pipeline file for language models."""

    dataset: TextSpec
    teacher: LanguageTeacherSpec | None = None
    cache: TokenCacheSection = TokenCacheSection()
    student: LanguageStudentSpec | None = None
    loss: Annotated[Loss, BeforeValidator(at_temperature_1)] = Field(default={}, validate_default=True)
    """As for images, with `tau` 1 in place of 4 where none is given."""

    def section(self, name: Literal["teacher", "student"]) -> Any:
        """Return the section of a network.

        Raises:
            UsageError: if the file has no such section.
        """
        section = getattr(self, name)
        if section is None:
            raise UsageError(
                f"the pipeline has no {name!r} section", f"add one, such as {name}: {{model: hf:models/{name}}}"
            )
        return section

    def to_yaml(self) -> str:
        """Return the resolved file with all defaults, which reads back to the same pipeline."""
        return write_yaml(self.model_dump())
