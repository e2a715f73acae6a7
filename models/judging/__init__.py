"""Agents and judges: local, recorded, and behind endpoints."""
