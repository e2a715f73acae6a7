"""Simulated sessions: scenes, roles, the loop of a session, and training data."""
