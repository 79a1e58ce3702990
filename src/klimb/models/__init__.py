"""Models: loading, packed attention, log-probs in chunks, heads."""
