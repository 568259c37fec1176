"""The report of a run: one self-contained HTML page, the same numbers as JSON, and the filmstrip of a planned episode."""
