"""One file per loop (generate, encode), the core process around them, and the client to reach it."""
