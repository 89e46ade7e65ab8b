"""Where stages meet transfers (layer 4)."""
