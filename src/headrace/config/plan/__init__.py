"""The arithmetic of memory and speed, from what a checkpoint's headers say. Reads no files, needs no GPU."""
