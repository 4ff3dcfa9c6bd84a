"""The words that models are written in: linear, norm, rotary, attention, embedding, pooling, heads."""
