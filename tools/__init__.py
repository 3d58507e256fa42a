"""Checks that need more time than a test: faults, fuzzing, load; and the harness of all scripts."""
