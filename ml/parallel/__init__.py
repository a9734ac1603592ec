"""Device meshes, and the table that maps logical axes to mesh axes."""

from ml.parallel.mesh import MeshConfig, make_mesh
from ml.parallel.rules import Rules, place_batch

__all__ = ["MeshConfig", "Rules", "make_mesh", "place_batch"]
