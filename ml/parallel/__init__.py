"""Device meshes, and the table that maps logical axes to mesh axes."""

from ml.parallel.batches import place_batch
from ml.parallel.mesh import AXES, MeshConfig, make_mesh
from ml.parallel.rules import LAYOUTS, Layout, Rules

__all__ = ["AXES", "LAYOUTS", "Layout", "MeshConfig", "Rules", "make_mesh", "place_batch"]
