"""What runs next, on which pages: the host's half of the engine, without JAX."""
