"""Trackers: the contract (`base`), the names (`registry`), one file per family."""
