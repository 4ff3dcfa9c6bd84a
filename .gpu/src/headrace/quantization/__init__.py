"""Schemes that swap a linear: pack, read containers, calibrate."""
