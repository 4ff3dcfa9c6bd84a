"""Anthropic's API over the same turns."""
