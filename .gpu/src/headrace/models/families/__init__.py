"""One file a family: its `config.json`, its weight names. Adding one: CONTRIBUTING.md."""
