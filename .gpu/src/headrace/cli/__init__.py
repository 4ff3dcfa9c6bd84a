"""Commands; each starts in milliseconds and imports what it needs when it runs."""
