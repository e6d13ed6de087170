"""Measurements against other libraries, run by hand on a quiet machine; pytest collects nothing here."""
