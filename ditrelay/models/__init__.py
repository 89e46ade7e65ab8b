"""Models behind one stage interface (layer 2)."""
