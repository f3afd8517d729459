"""Tests of the decoding room."""
