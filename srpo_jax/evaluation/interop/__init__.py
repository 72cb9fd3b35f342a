"""Evaluations in the formats of other tools, and responses that other tools generated."""
