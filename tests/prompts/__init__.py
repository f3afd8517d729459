"""Tests of the rooms in `workers.prompts`."""
