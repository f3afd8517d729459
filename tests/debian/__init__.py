"""Tests that need programs of Debian, or packages that do not go with those of the tests.

Plain `pytest` does not collect them, so that the suite passes with Python and pip alone; `.ci/run`
unpacks the programs (`.ci/debian-tools`), puts them on the path, and runs this folder.
"""
