"""Measures this queue against the bare limit of the disk and against others: python -m bench."""
