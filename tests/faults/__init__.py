"""Faults planted in the running code, one at a time: a suite that does not notice them proves nothing."""
