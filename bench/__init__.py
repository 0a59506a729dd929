"""Benchmark this queue against bare SQLite and other queues: python -m bench."""
