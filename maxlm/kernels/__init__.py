"""Compute kernels: one signature each, several implementations."""
