"""Pipelines, their stages, and the executors that run them (layers 3 and 4)."""
