"""What a data set is like, before anything is trained on it; `scripts/data_report.py` writes the report.

`measure.measure` gives the numbers, `leakage` what one modality alone gives away, `page.render_page` the report.
"""
