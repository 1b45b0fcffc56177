"""Evaluation for users: whose bounds are kept."""
