"""When checkpoints are made, and how many are kept."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Settings of `ml.checkpoint.Checkpointer`.

    Attributes:
      every: steps between checkpoints.
      keep: how many of the newest stay. While one is being written there are ``keep + 1`` on the disk.
      keep_every: checkpoints at multiples of this many steps stay for good; ``None``: none do.
      verify: whether a restore compares every file's checksum, which reads the checkpoint once more; otherwise only
        the files' presence and sizes are compared.
    """

    every: int = 100
    keep: int = 2
    keep_every: int | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        for name in ("every", "keep", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
