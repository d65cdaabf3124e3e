"""The dashboard: one page, which is a client of the public API."""
