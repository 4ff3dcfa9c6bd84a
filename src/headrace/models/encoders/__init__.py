"""One file a family of encoders: how it reads `config.json`, and what its checkpoints call the weights."""
