"""Faults that tools/chaos.py makes on real runs, one module for each kind."""
