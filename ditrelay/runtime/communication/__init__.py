"""Transfers between ranks (layer 1)."""
