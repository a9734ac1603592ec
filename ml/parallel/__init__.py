"""Device meshes, the table that maps logical axes to mesh axes, and the processes that share a mesh."""

from ml.parallel.batches import batch_axes, loader_share, place_batch
from ml.parallel.mesh import AXES, MeshConfig, make_mesh
from ml.parallel.processes.roll import HealthConfig
from ml.parallel.rules import LAYOUTS, Layout, Rules

__all__ = [
    "AXES",
    "LAYOUTS",
    "HealthConfig",
    "Layout",
    "MeshConfig",
    "Rules",
    "batch_axes",
    "loader_share",
    "make_mesh",
    "place_batch",
]
