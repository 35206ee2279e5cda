"""Sounds that need no recordings: tones with a pitch, and sentences that the speech synthesizer eSpeak NG speaks."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import real_inputs
import torch
from torch import Tensor
from torch.nn import functional as F

RATE = 16_000
"""Numbers per second of a sound."""

_SPEAKS_AT = 22_050
_RETRIEVE, _CHARS_UTF8 = 2, 1  # AUDIO_OUTPUT_SYNCHRONOUS and espeakCHARS_UTF8 of speak_lib.h


def tones(count: int, length: int, seed: int) -> Tensor:
    """Return frames of sound [N, length]: harmonics of a gliding pitch of 60 to 1200 Hz, in noise; some are noise."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    time = torch.arange(length) / RATE
    octaves = math.log2(1200 / 60) * drawn(1) + 2 * (drawn(1) - 0.5) * (time - time.mean())
    phase = 2 * math.pi * (60 * 2**octaves).cumsum(dim=1) / RATE
    frames = torch.zeros(count, length)
    falling = 0.5 + 1.5 * drawn(1)
    for harmonic in range(1, 13):
        heard = 60 * 2**octaves * harmonic < RATE / 2  # others would fold back
        loudness = drawn(1) / harmonic**falling
        frames += heard * loudness * torch.sin(harmonic * phase + 2 * math.pi * drawn(1))
    noise = 10 ** (1.5 * drawn(1) - 1) * torch.randn(count, length, generator=generator)
    silent = drawn(1) < 0.1
    return frames / frames.std(dim=1, keepdim=True) * ~silent + noise * frames.new_tensor(0.5)


def speech(texts: list[str]) -> Iterator[Tensor]:
    """Speak texts with eSpeak NG, and yield the sound of each, [length] float32 at 16,000 per second.

    Raises:
        MissingInputsError: if the package that carries it is not installed.
    """
    real_inputs.package_folder("espeakng_loader", real_inputs.REAL)
    import espeakng_loader  # noqa: PLC0415  # only where it is installed

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    if library.espeak_Initialize(_RETRIEVE, 0, espeakng_loader.get_data_path().encode(), 0) != _SPEAKS_AT:
        raise real_inputs.MissingInputsError("eSpeak NG does not start")
    parts: list[bytes] = []

    def keep(samples: object, count: int, _: object) -> int:
        if samples and count > 0:
            parts.append(ctypes.string_at(samples, 2 * count))  # type: ignore[arg-type]  # a pointer
        return 0

    # Held in a variable: eSpeak calls it after the statement that hands it over.
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(keep)
    library.espeak_SetSynthCallback(callback)
    for text in texts:
        parts.clear()
        encoded = text.encode()
        library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, _CHARS_UTF8, None, None)
        library.espeak_Synchronize()
        spoken = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.int16).float() / 2**15
        size = len(spoken) * RATE // _SPEAKS_AT
        yield F.interpolate(spoken[None, None], size=size, mode="linear", align_corners=False)[0, 0]
