"""Whether a folder holds the network that its own configuration describes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from opd_ds.errors import UserError, shortened
from opd_ds.models.inspection import read_config, weight_files
from opd_ds.models.weight_files import read_shapes, refuse_other_shapes


def check_own_weights(network_class: Any, folder: Path, config_file: str) -> None:
    """Compare names and shapes, from headers, with a network on the meta device: what is more would be left out.

    Args:
        network_class: of diffusers.
        config_file: the configuration in `folder`, as messages name it.

    Raises:
        UserError: other weights than the configuration asks for, or one that describes no such network.
    """
    try:
        with torch.device("meta"):
            network = network_class.from_config(read_config(folder))
    except Exception as error:  # a number that makes no sense leads to anything in a network's constructor
        reason = shortened(" ".join(str(error).split()), 120)
        raise UserError(
            f"{config_file} does not describe {network_class.__name__} ({type(error).__name__}: {reason})"
        ) from error
    found, known = read_shapes(weight_files(folder)), network.state_dict()
    unread = network_class._keys_to_ignore_on_load_unexpected or ()
    found = {key: shape for key, shape in found.items() if not any(re.search(one, key) for one in unread)}
    trained = {key: tuple(value.shape) for key, value in network.named_parameters()}
    stored_tables = {key: tuple(known[key].shape) for key in found.keys() & known.keys() - trained.keys()}
    refuse_other_shapes(found, trained | stored_tables, config_file)
