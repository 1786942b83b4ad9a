"""CLoVE's state under the names of the released code, with the weights of the recorded trajectory."""

import zlib

import numpy as np
import torch

from clove_hub.methods import Clove
from clove_hub.zoo.formats import CLOVE_PARTS


def released_names(method: Clove) -> dict[str, str]:
    """Our name of each tensor of a full state -> the released one, without `module.`."""
    return {
        ours: theirs + ours[len(prefix) :]
        for ours in method.state_dict()
        for theirs, prefix in CLOVE_PARTS.items()
        if ours.startswith(prefix)
    }


def golden_weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    if len(shape) > 1:
        value = rng.standard_normal(tuple(shape)) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("running_mean"):
        value = np.zeros(shape)
    elif name.endswith("running_var"):
        value = np.ones(shape)
    elif name.endswith("weight"):
        value = rng.uniform(0.5, 1.5, tuple(shape))
    else:
        value = rng.standard_normal(tuple(shape)) * 0.1
    return torch.from_numpy(value.astype(np.float32)).double()
