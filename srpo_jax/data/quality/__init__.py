"""What a data set is like before it is trained on: counts, lengths, leaks, duplicates, faults. `scripts/data_report.py` writes it.

`measure.measure` gives the numbers, `leakage` what one modality alone gives away, `page.render_page` the report.
"""
