"""Simulating sessions: scenes, roles, the loop, and training data of what came about."""
