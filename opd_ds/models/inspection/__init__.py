"""What can be named as weights, and whether it is what the loader will load."""

from opd_ds.models.inspection.comparison import differing_parts
from opd_ds.models.inspection.inspector import Inspection, check_base, has_weights, inspect, network_folder
from opd_ds.models.inspection.parts import ENCODER_WEIGHTS, Part, read_config, weight_files

__all__ = [
    "ENCODER_WEIGHTS",
    "Inspection",
    "Part",
    "check_base",
    "differing_parts",
    "has_weights",
    "inspect",
    "network_folder",
    "read_config",
    "weight_files",
]
