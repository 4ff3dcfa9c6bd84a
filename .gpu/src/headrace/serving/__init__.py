"""HTTP: routes, auth, admission, streaming, output parsers, metrics. Never imports torch."""
