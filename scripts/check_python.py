"""Refuse a Python that is too old, with the way out."""

import sys

if sys.version_info < (3, 11):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"headrace needs Python 3.11 or newer; this is {found}. Try: make PYTHON=python3.12 serve")
