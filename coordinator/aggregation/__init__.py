"""Aggregation rules, one file each: init with the base version, accumulate reports, finalize."""
