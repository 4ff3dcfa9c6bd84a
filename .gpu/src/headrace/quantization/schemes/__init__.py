"""One file a scheme: its packing, its linear, and its quantizer from 16- or 32-bit weights."""
