"""Networks by name, their checkpoints, and the digest of their weights."""

from kdcache.models.build import build_model, outputs_of, preset_transform
from kdcache.models.build_for import build_for
from kdcache.models.checkpoints import load_weights, save_weights
from kdcache.models.class_mapping import ChosenOutputs, check_run_classes, compare_names, read_groups, record_of_groups
from kdcache.models.digest import weights_digest
from kdcache.models.ensemble import Ensemble

__all__ = [
    "ChosenOutputs",
    "Ensemble",
    "build_for",
    "build_model",
    "check_run_classes",
    "compare_names",
    "load_weights",
    "outputs_of",
    "preset_transform",
    "read_groups",
    "record_of_groups",
    "save_weights",
    "weights_digest",
]
