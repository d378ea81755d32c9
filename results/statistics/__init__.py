"""Intervals, resampling, significance and crossovers."""
