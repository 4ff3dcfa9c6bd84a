"""Empty yet. KV-aware routing: index, cost, policy, app. Never imports torch."""
