"""Families as declarations: config reading, weight names, and the decoder and encoder they declare."""
