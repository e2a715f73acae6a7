"""Evaluating an agent: prepare, carry out, record, show."""
