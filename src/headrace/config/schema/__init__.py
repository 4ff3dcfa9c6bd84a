"""The Truss schema as data: checks, defaults and documentation all come from these declarations."""
