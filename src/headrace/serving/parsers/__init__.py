"""Tool calls and reasoning in a model's text: one declared grammar a format, read whole or in any pieces."""
