"""The initial states that LIBERO publishes, read without running what the file says."""

from __future__ import annotations

import codecs
import io
import zipfile
from pathlib import Path

import numpy as np

from cosmos_ray import safe_pickle
from cosmos_ray.config.libero import PUBLISHED_STATES
from cosmos_ray.errors import CheckpointError, ConfigError

ALLOWED = {("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0], ("numpy", "ndarray"): np.ndarray,
           ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): codecs.encode}
"""All that an array in a pickle needs. torch.save wrote the files, and torch.load would run whatever they name."""


def published_states(path: Path) -> np.ndarray:
    """The initial states in a ``.pruned_init`` file: (50, 1 + nq + nv) float64, each [time, positions, velocities] of MuJoCo.

    Raises:
        ConfigError: the file is missing or damaged, or is not of such states.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if name is None:
                raise ConfigError(f"{path} holds no initial states: install the extra libero again")
            states = safe_pickle.load(io.BytesIO(archive.read(name)), ALLOWED, str(path))
    except CheckpointError as error:
        raise ConfigError(f"{error}. The extra libero brings this file: install it again") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read ({error}): install the extra libero again") from error
    if not (isinstance(states, np.ndarray) and states.dtype == np.float64 and states.ndim == 2 and len(states) == PUBLISHED_STATES):
        raise ConfigError(f"{path} does not hold {PUBLISHED_STATES} initial states: install the extra libero again")
    return states
