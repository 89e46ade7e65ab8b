"""Clients' pictures are decoded here, in processes of their own."""
