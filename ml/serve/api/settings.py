"""How the server behaves towards its clients; what the engine does is `ml.serve.EngineConfig`."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Limits and manners.

    Attributes:
      max_length: most tokens of a prompt and its completion together.
      api_key: what clients must send as ``Authorization: Bearer KEY``; ``None``: everyone is welcome.
      request_timeout: most seconds that a request may take.
      max_body: most bytes of a request's body.
      max_upload: most bytes of an uploaded file.
      retry_after: seconds after which a client that was turned away may come again.
      pooling: what an embedding is made of: the ``mean`` of all tokens' hidden states, or the ``last`` token's.
      batch_concurrency: most lines of batches that are in the engine at once.
    """

    max_length: int
    api_key: str | None = None
    request_timeout: float = 600.0
    max_body: int = 32 * 2**20
    max_upload: int = 512 * 2**20
    retry_after: int = 1
    pooling: Literal["mean", "last"] = "mean"
    batch_concurrency: int = 256
