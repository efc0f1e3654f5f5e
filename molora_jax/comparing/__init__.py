"""Runs beside each other: a sweep over settings and seeds, and one page about several runs."""
