"""Empty yet. Replicas and ranks placed on hosts; KV transfer."""
