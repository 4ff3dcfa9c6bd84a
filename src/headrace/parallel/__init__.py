"""Mesh, collectives, placement."""
