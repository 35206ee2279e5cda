"""The `cache` section of pipeline files: what is stored of a teacher, and how it is run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from kdcache.config.section import Count, NotNegativeInt, Section, Seed

OutputName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]

Patches = Annotated[list[Count], Field(min_length=2, max_length=2)]
"""Height and width of the grid of the tokens of a transformer."""

_OF_CLASSES = ("top_k", "tail", "rank", "dtype", "labels")
"""Keys that only an output of kind `classes` at one place has."""


class OutputSpec(Section):
    """An output of the teacher beside its class logits."""

    kind: Literal["vector", "score", "classes"] = "vector"
    """`vector` (embeddings, features), `score` (at most 64 numbers, such as a regression) or `classes` (logits of
    another head)."""
    places: Literal["one", "grid"] = "one"
    """`one` (of the whole image), or `grid`: maps [B, C, h, w], the same h and w for all images, such as the logits of
    a segmentation network before it enlarges them."""
    source: NotNegativeInt | str | None = None
    """What it is in the teacher: an index or a name in the returned tuple, dictionary or record (a nested part is
    written with dots), or the name of a module, such as `layer4` or `"5"`. None: its own name; for `features`, if
    neither a part nor a module has that name, the input of the last linear layer."""
    pool: Literal["none", "mean", "first"] = "none"
    """How [B, D, H, W] or [B, L, D] becomes [B, D]: the mean over all places, or the first of L; `none` refuses it."""
    compression: Literal["fast", "small"] = "fast"
    """Of maps: `small` takes up to 18% fewer bytes where the step is coarse, and half a second per MB on one
    core. Reading takes the same time."""
    patches: Patches | None = None
    """Of maps: h and w of the places of [B, L, D], such as [14, 14] of a vision transformer. The map is of the last
    h * w tokens; those before them, such as a class token, are left out. None: the output is [B, C, h, w]."""
    encoding: Literal["auto", "klt", "steps", "int8", "float16", "float32"] = "auto"
    """How vectors and maps are stored: `auto` is the smallest within `fidelity`; `steps` is for maps, `int8` for
    vectors of images. Scores are float32, unless a map of them names another."""
    fidelity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest error on held-out rows of the pilot. Of vectors it bounds the mean of 1 - cosine, and half of the
    relative squared error; the default is 0.001. Of classes it is that of the logits; of maps of classes it bounds the
    mean total variation per place at T = 1, and the default is 0.005."""
    over_places: bool = False
    """Of maps: whether a loss compares distributions over places, such as `cwd`. Logits are then stored with the level
    of each place, and `fidelity` bounds the total variation over places too."""
    top_k: Count | Literal["all", "auto"] = "auto"
    """Of classes: as that of the logits."""
    tail: Literal["lowrank", "uniform"] = "lowrank"
    """Of classes: as that of the logits."""
    rank: Count | None = None
    """Of classes: as that of the logits."""
    dtype: Literal["uint8", "float16", "float32"] = "float16"
    """Of classes: as that of the logits."""
    labels: bool = False
    """Of classes: whether they are the classes of the data set, so that its labels are labels of this output too."""

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield what cannot be combined: kinds, places and encodings."""
        is_map = self.places == "grid"
        for key in _OF_CLASSES:
            if getattr(self, key) == type(self).model_fields[key].default:
                continue
            if self.kind != "classes":
                yield (key, "kind"), f"belongs to an output of kind classes, and this one is a {self.kind}"
            elif is_map:
                yield (key, "places"), "belongs to an output with one row per image, and this one has a map"
        if is_map:
            yield from self._combinations_of_map()
            return
        for key in ("over_places", "patches", "compression"):
            if getattr(self, key) != type(self).model_fields[key].default:
                yield (key, "places"), "belongs to maps: set `places: grid`"
        if self.kind != "vector" and self.encoding != "auto":
            yield ("encoding", "kind"), f"belongs to an output of kind vector, and this one is of kind {self.kind}"
        elif self.encoding == "steps":
            yield ("encoding", "places"), "steps is an encoding of maps: take int8 or klt, or set `places: grid`"
        if self.kind == "score" and self.fidelity is not None:
            yield ("fidelity", "kind"), "scores are stored exactly, in float32"

    def _combinations_of_map(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.pool != "none":
            yield ("pool", "places"), "makes one row of all places, and a map keeps them: remove one of the two"
        if self.encoding == "int8":
            yield ("encoding", "places"), "int8 is an encoding of vectors of images: take steps or klt for maps"
        if self.kind == "score" and self.fidelity is not None and self.encoding not in ("steps", "klt"):
            yield ("fidelity", "kind"), "scores are stored exactly, in float32, unless `encoding` is steps or klt"


class NoiseSpec(Section):
    """Noise on the logits of private samples, added when they are dumped."""

    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Standard deviation of the noise on each logit, in nats, where the privacy of a sample is 1."""
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """By which logits are divided before the noise is added, where the privacy of a sample is 1."""
    key: str
    """File with the secret that the noise is drawn from: 32 random bytes or more. It is made if it does not exist.
    Anyone who has it can take the noise away."""


class CacheSpec(Section):
    """What a cache stores of the teacher's output, and how the teacher is run."""

    fidelity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest mean total variation between decoded and true softmax at T = 1, 2 and 4, measured on pilot rows. The
    default is 0.02, where a given `top_k` may exceed it."""
    top_k: Count | Literal["all", "auto"] = "auto"
    """Number of classes of each row that are stored exactly; `auto`: the cheapest within `fidelity`, all up to 64."""
    tail: Literal["lowrank", "uniform"] = "lowrank"
    """What is stored of the other classes: coordinates in a basis fitted to the teacher, or their total mass only."""
    rank: Count | None = None
    """Number of coordinates of a lowrank tail; by default the cheapest within `fidelity`."""
    dtype: Literal["uint8", "float16", "float32"] = "float16"
    """Type of the stored log-probabilities; uint8 stores all classes."""
    pilot_rows: Count = 4096
    """Images of the pilot pass, on which the basis is fitted and the fidelity measured; unused if all classes are
    stored."""
    views: Count = 1
    """Number of seeded augmentations of each image; more than 1 needs a random transform."""
    seed: Seed = 0
    """Seed of the views."""
    shard_rows: Count | None = None
    """Rows per shard, the unit of writing; None chooses it."""
    batch_size: Count = 256
    """Images per teacher batch."""
    num_workers: NotNegativeInt | Literal["auto"] = "auto"
    """Data-loading processes; auto: as many as there are cores, at most 8, and none for images in memory whose batches
    are transformed at once, nor for data sets of your own."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the teacher: float32 or mixed precision (autocast)."""
    channels_last: bool = False
    """Channels-last memory format of images and weights, which makes convolutions on a GPU faster."""
    compile: bool = False
    """Compile the teacher with torch.compile."""
    logits: bool = True
    """Whether the class logits are kept; false for a teacher that has none, or of which only other outputs are kept."""
    outputs: dict[OutputName, OutputSpec] = Field(default={})
    """Other outputs of the teacher that are kept, by name: each with the keys below."""
    noise: NoiseSpec | None = None
    """Noise on the class logits, with the keys below; none by default. A data set says by `privacy`, a number from 0 to
    1 per sample, which samples get it; without that all do."""
    license: str = ""
    """License of the cache, for the manifest."""
    notes: str = ""
    """Notes for its users, for the manifest."""

    @property
    def output_names(self) -> list[str]:
        """Names of all outputs that are kept, the class logits first."""
        return [*(["logits"] if self.logits else []), *self.outputs]

    @field_validator("outputs")
    @classmethod
    def _no_output_is_the_logits(cls, outputs: dict[str, OutputSpec]) -> dict[str, OutputSpec]:
        if "logits" in outputs:
            raise ValueError("logits is the name of the class logits, which `cache.top_k` and its neighbors describe")
        return dict(sorted(outputs.items()))

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if not self.logits and not self.outputs:
            yield ("logits", "outputs"), "false leaves nothing to keep: name an output in `outputs`"
        if self.noise is not None and self.outputs:
            yield ("noise", "outputs"), "is on class logits alone, and cannot be combined with outputs, which have none"
        if self.noise is not None and not self.logits:
            yield ("noise", "logits"), "is on class logits, which are left out"
        if self.compile and self.outputs:
            yield ("compile", "outputs"), "true cannot be combined with outputs, which are taken by hooks"
