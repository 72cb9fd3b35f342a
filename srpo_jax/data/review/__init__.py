"""Human review of SSUI records: a page on loopback, an append-only log, and the reviewed data set that comes out of it.

`session.Review` is the state (records, and what people decided about them), `server` shows it to a browser, `export`
writes the data set and its audit trail. `scripts/review.py` is the command; docs/data.md walks through it.
"""
