"""Constraints: given a sequence's state, which tokens may come next."""
