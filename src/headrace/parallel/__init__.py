"""Empty yet. Mesh, collectives, placement."""
