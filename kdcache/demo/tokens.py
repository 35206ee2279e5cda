"""Both stages of a language model: train a teacher on texts that come with Python, dump it, and train students."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdcache.cache.format.schema import MANIFEST
from kdcache.cache.reader import Cache
from kdcache.config.schema import TEXT
from kdcache.config.text import TextPipeline
from kdcache.data.text import load_text
from kdcache.demo.live_teacher import with_live_teacher
from kdcache.demo.text_teacher import TIMES, check_libraries, train_text_teacher
from kdcache.demo.token_scores import HeldOut
from kdcache.demo.topics import Topics, load_topics, write_topics
from kdcache.dump.tokens.dump import dump_language_model
from kdcache.dump.tokens.inputs import load_inputs
from kdcache.errors import InterruptedRun, MismatchError
from kdcache.models.causal_lm import CausalLM
from kdcache.models.from_transformers_lm import load_causal_lm
from kdcache.runtime.atomic_write import write_file
from kdcache.runtime.folder_lock import locked
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress
from kdcache.train.plots import draw_language_models
from kdcache.train.run_folder import check_free, described_differences, read_json, write_json
from kdcache.train.sweep import sweep
from kdcache.train.sweep_groups import all_jobs
from kdcache.train.sweep_points import Point
from kdcache.train.tokens.inputs import inputs_of_sequences
from kdcache.train.tokens.train import MODEL, train_on_sequences

LIVE = "kd-live"

LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"name": "ce"},
    LIVE: {"name": "kd"},
    # What is kept is the same whatever the shape of the tail, and that of the student costs less.
    "kd-renormalized": {"name": "truncated", "tail": "student"},
    "kd-ghost": {"name": "kd", "tail": "student"},
    "kd-lowrank": {"name": "kd"},
}
"""Loss of each student; `truncated` keeps the top 16 and renormalizes them."""

_ARRAYS: dict[str, tuple[str, ...]] = {
    "kd-renormalized": ("log_probs", "indices"),
    "kd-ghost": ("log_probs", "indices", "statistics"),
    "kd-lowrank": ("log_probs", "indices", "statistics", "tail"),
}
"""Arrays of the cache that a student needs."""

CACHE, PICTURE, PIPELINE = "topics.kdcache", "demo.png", "text.yaml"
"""Files of the folder that are named in the results."""

_SETTINGS, _STAGE_ONE = "settings.json", "stage-one.json"


def _network(hidden_size: int, layers: int) -> dict[str, Any]:
    """Return the configuration of a llama network for sequences of up to 128 tokens, without its vocabulary."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 5 * hidden_size // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


@dataclass(frozen=True)
class TokenDemoSizes:
    """What the duration of the demo depends on; tests take smaller ones.

    Attributes:
        vocabulary: tokens of the tokenizer at most.
        topics: largest number of topics; None for all.
        teacher: configuration of its network, of the type llama.
        student: of the students.
        teacher_epochs: passes of the teacher over the texts.
        student_epochs: of each student.
        rank: of the tails in the cache.
        pilot_rows: rows that their basis is fitted to.
    """

    vocabulary: int = 1024
    topics: int | None = None
    teacher: dict[str, Any] = field(default_factory=lambda: _network(128, 3))
    student: dict[str, Any] = field(default_factory=lambda: _network(48, 1))
    teacher_epochs: int = 5
    student_epochs: int = 3
    rank: int = 32
    pilot_rows: int = 4096


class TokenStudent(NamedTuple):
    """A student on the text that is held out; see `HeldOutScore`."""

    student: str
    seed: int
    run: str
    perplexity: float
    kl: float
    agreement: float
    seconds: float


@dataclass(frozen=True)
class TokenDemo:
    """Results of the demo; times in seconds, sizes in bytes.

    Attributes:
        teacher_perplexity: on the text that is held out.
        teacher_parameters: of its network.
        student_parameters: of the network of each student.
        teacher_training_seconds: with the tokenizer.
        stage_one_seconds: of the dump.
        topics: number of topics that teacher and students are trained on.
        held_out_topics: names of those that are held out.
        positions: of the training text with a row of the teacher.
        held_out_positions: that students are compared with the teacher at.
        cache_bytes: on the disk.
        digest: of the cache.
        vocabulary: number of tokens.
        top_k: tokens of a row.
        rank: of its tail.
        bytes_per_token: on the disk, of what each kind of student reads of the teacher.
        students: of all kinds and seeds.
    """

    teacher_perplexity: float
    teacher_parameters: int
    student_parameters: int
    teacher_training_seconds: float
    stage_one_seconds: float
    topics: int
    held_out_topics: list[str]
    positions: int
    held_out_positions: int
    cache_bytes: int
    digest: str
    vocabulary: int
    top_k: int
    rank: int
    bytes_per_token: dict[str, float]
    students: list[TokenStudent]


def run_token_demo(
    out: Path, seeds: int, device: torch.device | str, progress: Progress, sizes: TokenDemoSizes | None = None
) -> TokenDemo:
    """Train a teacher on texts that come with Python, dump it, train students, and measure all on other topics.

    The same call resumes what was interrupted, and takes what is finished from the folder.

    Args:
        out: folder for texts, teacher, cache, students, pipeline, `demo.json` and picture.
        seeds: number of students per loss.
        device: of training, the dump and the comparison.
        progress: progress reporter.
        sizes: the defaults if None.

    Raises:
        UsageError: without the libraries of language models, or if `out` is something else.
        MismatchError: if `out` has a demo of other settings, such as the texts of another version of Python.
        InterruptedRun: on Ctrl-C.
    """
    check_libraries()
    # Absolute, so that the pipeline and its runs do not depend on the folder that the command is run in.
    out, sizes = expand(out).absolute(), sizes or TokenDemoSizes()
    topics = load_topics(sizes.topics)
    try:
        with locked(out):
            _begin(out, sizes, topics)
            return _run(out, seeds, device, progress, sizes, topics)
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; what is finished is kept in {out}", "run the same command again to resume"
        ) from None


def _begin(out: Path, sizes: TokenDemoSizes, topics: Topics) -> None:
    """Create the folder, or check that it is of the same demo.

    Raises:
        UsageError: if it is something else.
        MismatchError: if the settings differ.
    """
    settings = {**asdict(sizes), "texts": f"sha256:{sha256(json.dumps(topics).encode()).hexdigest()}"}
    if not (out / _SETTINGS).is_file():
        check_free(out)
        out.mkdir(parents=True)
        write_json(out / _SETTINGS, settings)
    elif changes := described_differences(read_json(out / _SETTINGS), settings):
        raise MismatchError(
            f"{out} has a demo with other settings: {changes}", "write to another folder with -o, or delete it first"
        )


def _run(
    out: Path,
    seeds: int,
    device: torch.device | str,
    progress: Progress,
    sizes: TokenDemoSizes,
    topics: Topics,
) -> TokenDemo:
    """Do what is not finished yet, and measure all networks."""
    root, teacher_folder = write_topics(topics.train, out / "texts" / "train.jsonl"), out / "teacher"
    other = write_topics(topics.held_out, out / "texts" / "held-out.jsonl")
    pipeline = _pipeline(out, root, teacher_folder, sizes)
    max_length = pipeline.dataset.max_length
    progress.say(f"stage one: a teacher of {len(topics.train)} topics of Python's reference, which runs once on them")
    if not teacher_folder.is_dir():
        texts, epochs, lr = list(topics.train.values()), sizes.teacher_epochs, 4e-3
        given = (root, texts, sizes.teacher, sizes.vocabulary, max_length, epochs, lr, teacher_folder)
        train_text_teacher(*given, device, progress)
    teacher, cache = _dump(pipeline, out, device, progress)
    progress.say("stage two: students of that cache, one of them with the live teacher for comparison")
    runs = _students(pipeline, cache, teacher, out / "students", seeds, device, progress)
    held_out = HeldOut(load_text(other, teacher_folder, max_length=max_length), teacher, device)
    students, parameters = [], 0
    with progress.task("comparing on held-out topics", len(runs), "students") as task:
        for name, seed, run in runs:
            model = load_causal_lm(str(run / MODEL))
            parameters = _parameters(model)
            seconds = float(read_json(run / "metrics.json")["seconds"])
            students.append(TokenStudent(name, seed, str(run), *held_out.score(model), seconds))
            task.advance(1, f"{name}, seed {seed}")
    demo = TokenDemo(
        teacher_perplexity=held_out.score(teacher).perplexity,
        teacher_parameters=_parameters(teacher),
        student_parameters=parameters,
        teacher_training_seconds=read_json(teacher_folder / TIMES)["seconds"],
        stage_one_seconds=read_json(out / _STAGE_ONE)["seconds"],
        topics=len(topics.train),
        held_out_topics=list(topics.held_out),
        positions=int(cache.sequences().row_start[-1]),
        held_out_positions=held_out.positions,
        cache_bytes=cache.bytes_on_disk,
        digest=cache.manifest.digest,
        vocabulary=cache.sequences().encoding.num_classes,
        top_k=pipeline.cache.top_k,
        rank=pipeline.cache.rank,
        bytes_per_token=_bytes_per_token(cache),
        students=students,
    )
    _write(demo, out)
    return demo


def _pipeline(out: Path, root: Path, teacher: Path, sizes: TokenDemoSizes) -> TextPipeline:
    """Return the pipeline of the demo, and write it for the commands that a reader may try next."""
    train = {"epochs": sizes.student_epochs, "batch_tokens": 2048, "lr": 0.01}
    pipeline = TextPipeline.model_validate(
        {
            "dataset": {"name": TEXT, "root": str(root), "max_length": 128},
            "teacher": {"model": f"hf:{teacher}"},
            "cache": {"tail": "lowrank", "rank": sizes.rank, "pilot_rows": sizes.pilot_rows},
            "student": {"model": "transformers:llama", "args": sizes.student, "train": train},
            "loss": LOSSES["kd-lowrank"],
        }
    )
    write_file(out / PIPELINE, pipeline.to_yaml())
    return pipeline


def _dump(pipeline: TextPipeline, out: Path, device: torch.device | str, progress: Progress) -> tuple[CausalLM, Cache]:
    """Return the teacher and its cache, which is written unless it is complete."""
    loaded, text = load_inputs(pipeline, progress)
    was_complete, begun = (out / CACHE / MANIFEST).is_file(), time.perf_counter()
    identity, spec = loaded.identity, pipeline.cache
    cache = dump_language_model(
        loaded.model, text, out / CACHE, name=identity, spec=spec, device=device, progress=progress
    )
    if not (was_complete and (out / _STAGE_ONE).is_file()):
        write_json(out / _STAGE_ONE, {"seconds": round(time.perf_counter() - begun, 3)})
    return loaded.model, cache


def _students(
    pipeline: TextPipeline,
    cache: Cache,
    teacher: CausalLM,
    out: Path,
    seeds: int,
    device: torch.device | str,
    progress: Progress,
) -> list[tuple[str, int, Path]]:
    """Train the students that are not trained yet, and return name, seed and run folder of each."""
    points = []
    for name, loss in LOSSES.items():
        given = pipeline.model_dump(mode="json", exclude={"loss"})
        points.append(Point(name, TextPipeline.model_validate({**given, "loss": loss})))
    sweep([point for point in points if point.name != LIVE], seeds, [cache], out, device=str(device), progress=progress)
    inputs = with_live_teacher(inputs_of_sequences(cache, device=device, progress=progress), teacher)
    jobs = all_jobs(points, seeds, out)
    for job in jobs:
        if job.point.name == LIVE and isinstance(job.pipeline, TextPipeline):
            train_on_sequences(job.pipeline, inputs, job.folder, device=device, progress=progress)
    return [(job.point.name, job.seed, job.folder) for job in jobs]


def _parameters(model: CausalLM) -> int:
    return sum(one.numel() for one in model.network.parameters())


def _bytes_per_token(cache: Cache) -> dict[str, float]:
    """Return the bytes on the disk per taught position of the arrays that each kind of student reads."""
    positions = int(cache.sequences().row_start[-1])
    sizes = {
        name: sum(record.size for path, record in cache.manifest.files.items() if f"/{name}/" in path)
        for name in ("log_probs", "indices", "statistics", "tail")
    }
    return {kind: sum(sizes[name] for name in names) / positions for kind, names in _ARRAYS.items()}


def as_record(demo: TokenDemo) -> dict[str, Any]:
    """Return the content of `demo.json`."""
    return {**asdict(demo), "students": [student._asdict() for student in demo.students]}


def _write(demo: TokenDemo, out: Path) -> None:
    """Write the results and the picture."""
    write_file(out / "demo.json", json.dumps(as_record(demo), indent=2) + "\n")
    draw_language_models(
        {name: [(one.perplexity, one.kl) for one in demo.students if one.student == name] for name in LOSSES},
        demo.teacher_perplexity,
        f"{len(demo.held_out_topics)} topics of Python's reference that no network was trained on",
        out / PICTURE,
    )
