"""The errors a user can cause or must act on. Every one carries a single line that says what, where and what to do."""


class CosmosRayError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(CosmosRayError):
    """A flag, config value, task, camera or preset that cannot work. The command line exits with code 2."""


class RunInUse(ConfigError):
    """Another command works on the run."""


class StoreError(CosmosRayError):
    """The replay store cannot be read or written (disk full, wrong directory, incompatible schema)."""


class StoreUnavailable(StoreError):
    """The replay store cannot be reached or written at the moment (disk full, mount gone): trying again may help."""


class BadFile(StoreError):
    """A file that a user brings cannot be read, or has nothing that a store can take. The command line exits with code 2."""


class CheckpointError(CosmosRayError):
    """A checkpoint is missing, truncated or does not fit the model it is loaded into."""


class SimulationError(CosmosRayError):
    """The simulator left the valid state space (non-finite action, exploding contact) or cannot start."""


class PoolUnavailable(CosmosRayError):
    """No inference actor answered within its deadline, retries included."""


class OutOfMemory(CosmosRayError):
    """A GPU or the machine has too little memory for these settings."""
