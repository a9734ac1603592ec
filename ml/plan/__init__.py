"""Planning: what a job will need on a machine that is not here, and which arrangement suits it."""
