"""The bulk performance client. Knows only types and errors."""
