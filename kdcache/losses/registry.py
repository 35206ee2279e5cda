"""The kinds of each axis of a loss, by the name that `kind` has in a pipeline file.

To add a loss, write its function and its options in a module of this folder and list the options here. Its loss name is
in the `presets` of the options.
"""

from __future__ import annotations

from kdcache.losses import (
    adjustments,
    brier,
    comparative,
    correlation,
    cswt,
    divergences,
    graph,
    normalizations,
    temperatures,
)
from kdcache.losses.normalizations import Normalization
from kdcache.losses.options import AdjustmentOptions, DivergenceOptions, TemperatureOptions

NORMALIZATIONS: dict[str, Normalization] = {
    "none": normalizations.NONE,
    "z_score": normalizations.Z_SCORE,
}
ADJUSTMENTS: dict[str, type[AdjustmentOptions]] = {
    "none": adjustments.NoAdjustment,
    "probability_shift": adjustments.ProbabilityShift,
    "label_smoothing": adjustments.LabelSmoothing,
    "truncation": adjustments.Truncation,
    "noise": adjustments.Noise,
}
TEMPERATURES: dict[str, type[TemperatureOptions]] = {
    "constant": temperatures.ConstantTemperature,
    "dtkd": temperatures.DTKD,
    "dtd_flsw": temperatures.DTDFocal,
    "dtd_cwsm": temperatures.DTDConfidence,
    "ctkd": temperatures.CTKD,
    "cswt": cswt.CSWT,
}
DIVERGENCES: dict[str, type[DivergenceOptions]] = {
    "kl": divergences.KL,
    "reverse_kl": divergences.ReverseKL,
    "jensen_shannon": divergences.JensenShannon,
    "dkd": divergences.DKD,
    "dist": correlation.DIST,
    "plackett_luce": divergences.PlackettLuce,
    "ofa": divergences.OFA,
    "mse": divergences.MSE,
    "cosine": correlation.Cosine,
    "brier": brier.Brier,
    "comparative": comparative.Comparative,
    "ff_g2m": graph.FFG2M,
}
