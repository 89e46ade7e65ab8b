"""HTTP: request in, response out (layer 6)."""
