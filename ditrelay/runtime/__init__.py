"""Processes, scheduling and execution."""
